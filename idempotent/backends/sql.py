"""Records in a SQL database: SQLite, PostgreSQL, MySQL or MariaDB, by URL, `Engine` or `AsyncEngine`.

One row per record. Its primary key is the digest of the record id, so no collation and no cut-off can make two ids one.
Every command decides with `_machine` and writes by compare-and-set on what it read; the steps of an ordinary call
(a fresh claim, a replay, a completion, a renewal, a release) are one statement each where the database allows it.

Autocommit, so no command holds a transaction or a lock longer than its own statement.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from random import random
from typing import Any, ClassVar, TypeVar

try:
    import sqlalchemy as sa
except ImportError as error:
    raise ImportError(
        "SQL backends need SQLAlchemy: pip install 'idempotent-py[sql]' (or postgres, mysql, sqlite)"
    ) from error
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from idempotent import _machine as machine
from idempotent._options import split_url, timeout_of
from idempotent._record import ATTEMPT_BYTES, Answer, Claim, Granted, Record, RecordId, Row, State, StateName, describe
from idempotent.backends._coloured import Coloured
from idempotent.backends._engines import AsyncLink, SyncLink, links_of
from idempotent.backends._listener import Listener
from idempotent.backends._statements import Statements, records_table
from idempotent.backends.base import micros, poll
from idempotent.errors import BackendError, BackendUnavailable

__all__ = ["SQLBackend", "records_table"]

R = TypeVar("R")

_BATCH = 1000
"""Rows that `purge` drops in one statement."""


class SQLBackend(Coloured[SyncLink | AsyncLink]):
    """Records in a table of a SQL database.

    Args:
        database: a URL, whose backend serves sync and async callers (by psycopg; sqlite3 and aiosqlite; pymysql and
            aiomysql; asyncpg if the URL asks for it); or an `Engine` or `AsyncEngine`, whose backend serves callers of
            that colour.
        table: its name; None: the URL's `table=`, else "idempotent_records".
        schema: its schema; None: the connection's default.
        create: whether the table is made when it is found missing.
        timeout: seconds a command may take, re-sends included; None: the URL's `timeout=`, else 5.

    Raises:
        TypeError, ValueError: an argument, or an option in the URL, is wrong.
    """

    _takes: ClassVar[dict[str, str]] = {"sync": "an Engine", "async": "an AsyncEngine"}

    def __init__(
        self,
        database: str | Engine | AsyncEngine,
        *,
        table: str | None = None,
        schema: str | None = None,
        create: bool = True,
        timeout: float | None = None,
    ) -> None:
        options: dict[str, str] = {}
        if isinstance(database, str):
            database, options = split_url(database, ("table", "timeout"))
        self.timeout = timeout_of(timeout, options)
        dialect, links = links_of(database, self.timeout)
        self.name = dialect
        self.metadata = sa.MetaData()
        """Holds the table, for Alembic's `target_metadata`."""
        name = options.get("table", "idempotent_records") if table is None else table
        self.table = records_table(self.metadata, name, schema)
        self._create = create
        self._statements = Statements(self.table, dialect)
        listens = links.get("sync")
        self._listener = None
        if isinstance(listens, SyncLink) and listens.engine.dialect.driver == "psycopg":
            self._listener = Listener(partial(listens.subscriber, self.timeout))
        self._connect(links)

    async def claim(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        fingerprint: bytes,
        lease: float,
        keep: float | None,
        takeover: bool,
        over: int | None = None,
        owner: bytes = b"",
    ) -> Claim:
        kept = None if keep is None else micros(keep)
        ask = machine.Ask(attempt, fingerprint, micros(lease), kept, takeover, over, owner)
        make = self._statements

        def work(connection: Connection) -> Claim:
            while True:
                token, row, now = make.fresh(connection, rid, ask)
                if token is not None:
                    return Granted(token)
                reply, changed = machine.on_claim(row, ask, now)
                if changed is None or make.swap(connection, rid, row, changed):
                    return reply

        return await self._run(work, min(self.timeout, lease))

    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        make = self._statements

        def work(connection: Connection) -> Answer:
            if make.renew(connection, rid, attempt, token, micros(lease)):
                return Answer.DONE
            return self._decide(
                connection, rid, lambda row, now: machine.on_renew(row, attempt, token, micros(lease), now)
            )

        return await self._run(work, min(self.timeout, lease))

    async def complete(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        return await self._settle(rid, State.COMPLETED, attempt, token, codec, body, ttl, remember)

    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        return await self._settle(rid, State.FAILED, attempt, token, codec, body, ttl)

    async def _settle(
        self,
        rid: RecordId,
        state: State,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        make = self._statements
        past = micros(remember) if remember else 0

        def decide(row: Row | None, now: int) -> tuple[Answer, Row | None]:
            settled = Row(state, token, attempt, b"", now, past, 0, now + micros(ttl), codec, body)
            return machine.on_settle(row, attempt, token, settled, now)

        def work(connection: Connection) -> Answer:
            make.check_size(connection, body)
            if make.settle(connection, rid, state, attempt, token, codec, body, micros(ttl), past):
                return Answer.DONE
            return self._decide(connection, rid, decide)

        return await self._run(work, self.timeout)

    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        make = self._statements

        def work(connection: Connection) -> Answer:
            if token is not None and not unknown and make.release(connection, rid, attempt, token):
                return Answer.DONE
            return self._decide(
                connection, rid, lambda row, now: machine.on_release(row, attempt, token, now, unknown=unknown)
            )

        return await self._run(work, self.timeout)

    def _decide(
        self,
        connection: Connection,
        rid: RecordId,
        decide: Callable[[Row | None, int], tuple[Answer, Row | None]],
    ) -> Answer:
        """Read, decide, compare and set, until nobody came between."""
        while True:
            row, now = self._statements.read(connection, rid)
            answer, changed = decide(row, now)
            if changed is None or self._statements.swap(connection, rid, row, changed):
                return answer

    async def read(self, rid: RecordId) -> Record | None:
        row, now = await self._run(lambda connection: self._statements.read(connection, rid), self.timeout)
        return None if row is None else describe(rid, row, now)

    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        make = self._statements
        attempt = os.urandom(ATTEMPT_BYTES)

        def work(connection: Connection) -> Record | None:
            while True:
                row, now = make.read(connection, rid)
                found, changed = machine.on_forget(row, attempt, now, force=force)
                if changed is None or make.swap(connection, rid, row, changed):
                    return None if found is None else describe(rid, found, now)

        return await self._run(work, self.timeout)

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        make = self._statements

        async def runs() -> bool:
            return await self._run(lambda connection: make.runs(connection, rid, token), min(timeout, self.timeout))

        link = self._link
        try:
            if self._listener is None:
                await poll(runs, link.sleep, timeout)
            else:
                await self._listener.changed(rid.digest, link.waiter(), runs, link.sleep, timeout, self.timeout)
        except BackendUnavailable:
            if timeout >= self.timeout:
                raise  # else it is the waiter's time that was over

    async def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        last = ""
        while True:
            page = await self._run(partial(self._statements.page, after=last), self.timeout)
            for record_id, rid, row, now in page:
                last = record_id
                record = describe(rid, row, now)
                if record is not None and state in (None, record.state) and namespace in (None, rid.namespace):
                    yield record
            if not page:
                return

    async def purge(self, limit: int = 1000) -> int:
        dropped = 0
        while dropped < limit:
            # Short statements, each with a deadline of its own, so that nobody waits long for a row or for the file.
            batch = min(_BATCH, limit - dropped)
            found = await self._run(partial(self._statements.purge, limit=batch), self.timeout)
            dropped += found
            if not found:  # fewer than asked for is no end: a row that is claimed meanwhile stays
                break
        return dropped

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        link = self._links.get("sync")
        if isinstance(link, SyncLink):
            link.close()

    async def aclose(self) -> None:
        self.close()
        link = self._links.get("async")
        if isinstance(link, AsyncLink):
            await link.aclose()

    async def _run(self, work: Callable[[Connection], R], budget: float) -> R:
        """`work` on a connection, again while that can help and `budget` seconds last."""
        deadline = time.monotonic() + budget
        pause = 0.0
        makes = 3 if self._create else 0
        while True:
            try:
                return await self._link.run(work, deadline)
            except (TimeoutError, exc.SQLAlchemyError, OSError) as error:
                missing = makes > 0 and _is_missing(error)
                if not missing:
                    _raise_unless_transient(error)
                    if deadline - time.monotonic() <= pause:
                        raise BackendUnavailable(
                            f"the database did not confirm within {budget:g} s: {_words(error)}"
                        ) from _cause(error)
            if missing:
                makes -= await self._make_table(deadline)
                continue
            await self._link.sleep(pause * (0.5 + random() / 2))
            pause = min(0.25, pause * 2 or 0.005)

    async def _make_table(self, deadline: float) -> bool:
        """Make the table; whether the database answered: a lack of permission stays, a lost connection does not."""
        try:
            await self._link.run(lambda connection: self.metadata.create_all(connection, checkfirst=True), deadline)
        except (TimeoutError, exc.SQLAlchemyError, OSError) as error:
            # Others make it at the same moment, and only one of us succeeds. Whether it is there now, the next try tells.
            await self._link.sleep(0.01)
            return not _is_transient(error)
        return True


# ------------------------------------------------------------------------------------------------------------ errors

_BUSY = {"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300", "08006", "08003", "25P03"}
"""SQLSTATEs of PostgreSQL after which the same command may succeed: conflicts, restarts, too many connections."""
_BUSY_MYSQL = {1040, 1205, 1213, 1053, 1927, 2006, 2013, 2014}
"""Error numbers of MySQL and MariaDB of the same kind."""
_BUSY_WORDS = (
    "database is locked",
    "database table is locked",
    "too many clients",
    "starting up",
    "shutting down",
    "closed the connection",
    "connection was closed",
)
"""What drivers say where they give no number."""
_DOWN_WORDS = ("refused", "No such file or directory", "could not translate host name", "Name or service not known")
_DOWN_MYSQL = {2003, 2002, 2005}


def _cause(error: Exception) -> Any:
    """The driver's own error: SQLAlchemy's shows the values of a statement."""
    return getattr(error, "orig", None) or error


def _code(error: Exception) -> Any:
    """The error number of MySQL and MariaDB, else the SQLSTATE; None where the driver gives neither."""
    cause = _cause(error)
    said = cause.args[0] if cause.args else None
    if isinstance(said, dict):  # pg8000
        return said.get("C")
    if isinstance(said, int):
        return said
    return getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)  # the latter: psycopg2


def _words(error: Exception) -> str:
    return str(_cause(error)) or "no reply"


def _is_missing(error: Exception) -> bool:
    """Whether the table is not there."""
    return _code(error) in ("42P01", 1146) or "no such table" in _words(error)


def _is_transient(error: Exception) -> bool:
    """Whether the same command may succeed when it is sent again."""
    try:
        _raise_unless_transient(error)
    except BackendError:
        return False
    return True


def _raise_unless_transient(error: Exception) -> None:
    """Return if the same command may succeed when it is sent again; else raise what the caller is to see."""
    words, code = _words(error), _code(error)
    if _is_missing(error):
        raise BackendError(
            "the table of records is missing, and could not be made (create=False, no permission, no time);"
            f" `idempotent migrate URL` makes it: {words}"
        ) from _cause(error)
    if isinstance(error, exc.TimeoutError):
        raise BackendUnavailable(f"no connection became free in time: {words}") from _cause(error)
    if code in _BUSY or code in _BUSY_MYSQL or any(word in words for word in _BUSY_WORDS):
        return
    if (
        code in _DOWN_MYSQL
        or any(word in words for word in _DOWN_WORDS)
        or isinstance(_cause(error), ConnectionRefusedError)
    ):
        raise BackendUnavailable(f"the database cannot be reached: {words}") from _cause(error)
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return
    if isinstance(error, (OSError, asyncio.TimeoutError)):
        return
    outage = (exc.OperationalError, exc.InternalError, exc.InterfaceError)
    limits = isinstance(code, str) and code.startswith("54")  # PostgreSQL's own
    if (isinstance(error, outage) and not limits) or code == "42501":
        raise BackendUnavailable(f"the database does not serve this: {words}") from _cause(error)
    raise BackendError(f"the database answered: {words}") from _cause(error)
