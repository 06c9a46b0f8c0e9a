"""PostgreSQL's `LISTEN` and `NOTIFY`, so that its waiters need not poll.

A notification costs every commit that sends one a lock of the whole server, so one is sent only when somebody waits.
Who waits for a record holds a shared advisory lock on the record's bucket; whoever ends the record tries to take that
lock for itself within the same statement, and notifies if it cannot. No wake-up is lost: a waiter gets its lock either
before that try, and is notified, or after the commit, and then sees the change when it looks.
"""

import time
import zlib
from typing import Any

import sqlalchemy as sa

from idempotent.backends._listener import Heard, Refused
from idempotent.backends._watchdog import Watchdog

__all__ = ["PostgresSubscriber", "bucket_of", "notifying"]

_CHANNEL = "idempotent"
_CLASS = zlib.crc32(b"idempotent") - 2**31
"""The first half of the advisory locks' numbers; the second is the bucket."""
_BUCKETS = 256
"""As many advisory locks does a process hold at the most: a server has room for some thousands."""

_watchdog = Watchdog()


def bucket_of(digest: str) -> int:
    """The bucket of the record whose id has this hex digest."""
    return int(digest[:8], 16) % _BUCKETS


def notifying(unless: sa.ColumnElement[bool] | None = None) -> sa.ColumnElement[Any]:
    """What a statement that changes the record `b_id` returns to tell those who wait for it, if there are any.

    Takes the parameters `b_id` and `b_bucket`.
    """
    nobody_waits: sa.ColumnElement[bool] = sa.func.pg_try_advisory_xact_lock(
        _CLASS, sa.bindparam("b_bucket", type_=sa.Integer)
    )
    notify = sa.func.pg_notify(_CHANNEL, sa.bindparam("b_id", type_=sa.String))
    # One after the other, as `or` may ask both.
    quiet = [(reason, sa.null()) for reason in (unless, nobody_waits) if reason is not None]
    return sa.case(*quiet, else_=sa.cast(notify, sa.Text))


class PostgresSubscriber:
    """A connection of psycopg to hear notifications on. Its channels are digests of records."""

    def __init__(self, connection: Any, timeout: float) -> None:
        self._connection = connection
        self._timeout = timeout
        self._waited_for: dict[int, set[str]] = {}
        self._heard: list[Heard] = []
        try:
            connection.autocommit = True
            (pid,) = self._ask("SELECT pg_backend_pid()")
            if pid != connection.info.backend_pid:
                # What a session holds there, others get: no place for subscriptions and locks.
                raise Refused("a connection pooler stands between us and the server")
            connection.add_notify_handler(lambda message: self._heard.append((False, message.payload)))
            self._ask(f"SELECT set_config('lock_timeout', '{max(1, round(timeout * 500))}', false)")
            self._ask(f"LISTEN {_CHANNEL}")
        except BaseException:
            connection.close()
            raise

    def _ask(self, statement: str, *values: Any) -> Any:
        with _watchdog.watching(self.fileno(), time.monotonic() + self._timeout):
            cursor = self._connection.execute(statement, values)
            return cursor.fetchone() if cursor.description else None

    def _take_heard(self) -> list[Heard]:
        # What came right behind a reply was read with it: no longer in the socket, but not told to the handler either.
        while (message := self._connection.pgconn.notifies()) is not None:
            self._heard.append((False, message.extra.decode()))
        heard, self._heard = self._heard, []
        return heard

    def fileno(self) -> int:
        """Its socket."""
        return int(self._connection.fileno())

    def subscribe(self, channels: set[str]) -> list[Heard]:
        """Hold the locks that say that somebody waits for `channels`."""
        for channel in channels:
            bucket = bucket_of(channel)
            if bucket not in self._waited_for:
                self._ask("SELECT pg_advisory_lock_shared(%s, %s)", _CLASS, bucket)
            self._waited_for.setdefault(bucket, set()).add(channel)
        return [*((True, channel) for channel in channels), *self._take_heard()]

    def unsubscribe(self, channels: list[str]) -> list[Heard]:
        """Give up the locks that nobody needs any more."""
        for channel in channels:
            bucket = bucket_of(channel)
            waited_for = self._waited_for.get(bucket, set())
            waited_for.discard(channel)
            if not waited_for and self._waited_for.pop(bucket, None) is not None:
                self._ask("SELECT pg_advisory_unlock_shared(%s, %s)", _CLASS, bucket)
        return self._take_heard()

    def receive(self) -> list[Heard]:
        """Read what the socket has."""
        self._connection.pgconn.consume_input()
        return self._take_heard()

    def ping(self) -> list[Heard]:
        """Have the server answer, within the timeout."""
        self._ask("SELECT 1")
        return self._take_heard()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
