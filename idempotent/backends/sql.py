"""Records in a SQL database: SQLite, PostgreSQL, MySQL or MariaDB, by URL, `Engine` or `AsyncEngine`.

One row per record. Its primary key is the digest of the record id, so no collation and no cut-off can make two ids one.
Every command decides with `_machine` and writes by compare-and-set on what it read; the steps of an ordinary call
(a fresh claim, a replay, a completion, a renewal, a release) are one statement each where the database allows it.

Autocommit, so no command holds a transaction or a lock longer than its own statement.
"""

import asyncio
import contextlib
import copy
import importlib
import inspect
import math
import os
import re
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from random import random
from typing import Any, Protocol, TypeVar

try:
    import sqlalchemy as sa
except ImportError as error:
    raise ImportError(
        "SQL backends need SQLAlchemy: pip install 'idempotent-py[sql]' (or postgres, mysql, sqlite)"
    ) from error
from sqlalchemy import event, exc
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from idempotent import _machine as machine
from idempotent._options import split_url, timeout_of
from idempotent._record import Answer, Claim, Granted, Record, RecordId, Row, State, StateName, describe
from idempotent.backends._loops import PerLoop
from idempotent.backends._watchdog import Watchdog
from idempotent.backends.base import Backend, micros, poll
from idempotent.errors import BackendError, BackendUnavailable

__all__ = ["SQLBackend", "records_table"]

R = TypeVar("R")

_CONNECTIONS = 8
"""Connections of an engine of ours; a call that finds none free waits for one within its deadline."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,47}")

_DRIVERS = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "mysql": ("mysql+pymysql", "mysql+aiomysql"),
    "mariadb": ("mariadb+pymysql", "mariadb+aiomysql"),
}


def records_table(metadata: sa.MetaData, name: str = "idempotent_records", schema: str | None = None) -> sa.Table:
    """The table of records, as part of `metadata`: for Alembic, and for whoever wants to query it.

    Args:
        metadata: where the table is registered.
        name: 1 to 48 ASCII letters, digits and underscores, no digit first.
        schema: the database schema; None: the connection's default.

    Raises:
        ValueError: the name or the schema is no such identifier.
    """
    for identifier in (name, schema):
        if identifier is not None and not _IDENTIFIER.fullmatch(identifier):
            raise ValueError(
                f"the table's name or schema {identifier!r} must be 1 to 48 ASCII letters, digits and underscores, no digit first"
            )
    ascii_digest = mysql.CHAR(48, charset="ascii", collation="ascii_bin")
    short_bytes = sa.LargeBinary(16).with_variant(mysql.VARBINARY(16), "mysql", "mariadb")
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.String(48).with_variant(ascii_digest, "mysql", "mariadb"), primary_key=True),
        sa.Column("space", sa.String(1), nullable=False),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("state", sa.String(1), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("attempt", short_bytes, nullable=False),
        sa.Column("fingerprint", short_bytes, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False, comment="microseconds since 1970, as all of these"),
        sa.Column("lease", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.BigInteger, index=True, comment="NULL: kept until it is settled"),
        sa.Column("codec", sa.String(100), nullable=False),
        sa.Column("body", sa.LargeBinary().with_variant(mysql.LONGBLOB, "mysql", "mariadb"), nullable=False),
        schema=schema,
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )


class _Link(Protocol):
    """How one colour runs statements."""

    async def run(self, work: Callable[[Connection], R], deadline: float) -> R:
        """`work` on a connection, which is broken when monotonic `deadline` passes."""
        ...

    async def sleep(self, pause: float) -> None:
        """Let `pause` seconds pass."""
        ...


class SQLBackend(Backend):
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
        self._watchdog = Watchdog()
        links: dict[str, _Link]
        if isinstance(database, str):
            sync_url, async_url = _twins(database)
            _refuse_unknown_options(async_url if async_url.get_driver_name() == "asyncpg" else sync_url)
            links = {
                "sync": _SyncLink(_engine(sync_url, self.timeout), self._watchdog, self.timeout),
                "async": _AsyncLink(lambda: _async_engine(async_url, self.timeout), self._watchdog, self.timeout),
            }
            dialect = sync_url.get_backend_name()
        elif isinstance(database, AsyncEngine):
            given = database.execution_options(isolation_level="AUTOCOMMIT")
            links = {"async": _AsyncLink(given, self._watchdog, None)}
            dialect = database.dialect.name
        elif isinstance(database, Engine):
            autocommit = database.execution_options(isolation_level="AUTOCOMMIT")
            links = {"sync": _SyncLink(autocommit, self._watchdog, None)}
            dialect = database.dialect.name
        else:
            raise TypeError(f"SQLBackend takes a URL, an Engine or an AsyncEngine, not {database!r}")
        if dialect not in _DRIVERS:
            raise ValueError(f"no SQL backend for {dialect}; there are {', '.join(_DRIVERS)}")
        self.name = dialect
        self.metadata = sa.MetaData()
        """Holds the table, for Alembic's `target_metadata`."""
        name = options.get("table", "idempotent_records") if table is None else table
        self.table = records_table(self.metadata, name, schema)
        self._create = create
        self._statements = _Statements(self.table, dialect)
        self._links = links
        self._colour, self._link = next(iter(links.items()))
        self._views: dict[str, SQLBackend] = {self._colour: self}

    def blocking(self) -> Backend:
        return self._view("sync")

    def asynchronous(self) -> Backend:
        return self._view("async")

    def _view(self, colour: str) -> "SQLBackend":
        view = self._views.get(colour)
        if view is None:
            if colour not in self._links:
                raise BackendError(
                    f"this SQLBackend was made from an engine for {self._colour} code and cannot serve {colour} functions;"
                    f" give it an {'Engine' if colour == 'sync' else 'AsyncEngine'}, or a URL, which serves both"
                )
            view = copy.copy(self)  # the two share everything but the link
            view._colour, view._link = colour, self._links[colour]
            self._views[colour] = view
        return view

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
    ) -> Claim:
        ask = machine.Ask(attempt, fingerprint, micros(lease), None if keep is None else micros(keep), takeover, over)
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
        self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float
    ) -> Answer:
        return await self._settle(rid, State.COMPLETED, attempt, token, codec, body, ttl)

    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        return await self._settle(rid, State.FAILED, attempt, token, codec, body, ttl)

    async def _settle(
        self, rid: RecordId, state: State, attempt: bytes, token: int, codec: str, body: bytes, ttl: float
    ) -> Answer:
        make = self._statements

        def decide(row: Row | None, now: int) -> tuple[Answer, Row | None]:
            settled = Row(state, token, attempt, b"", now, 0, 0, now + micros(ttl), codec, body)
            return machine.on_settle(row, attempt, token, settled, now)

        def work(connection: Connection) -> Answer:
            make.check_size(connection, body)
            if make.settle(connection, rid, state, attempt, token, codec, body, micros(ttl)):
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

        def work(connection: Connection) -> Record | None:
            while True:
                row, now = make.read(connection, rid)
                found = None if row is None else describe(rid, row, now)
                if found is None or (found.state == "running" and not force):
                    return found
                if row is None or make.swap(connection, rid, row, machine.on_forget(row, now)):
                    return found

        return await self._run(work, self.timeout)

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        make = self._statements

        async def runs() -> bool:
            return await self._run(lambda connection: make.runs(connection, rid, token), min(timeout, self.timeout))

        await poll(runs, self._link.sleep, timeout)

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
        return await self._run(lambda connection: self._statements.purge(connection, limit), self.timeout)

    def close(self) -> None:
        link = self._links.get("sync")
        if isinstance(link, _SyncLink):
            link.engine.dispose()

    async def aclose(self) -> None:
        self.close()
        link = self._links.get("async")
        if isinstance(link, _AsyncLink):
            await link.aclose()

    async def _run(self, work: Callable[[Connection], R], budget: float) -> R:
        """`work` on a connection, again while that can help and `budget` seconds last."""
        deadline = time.monotonic() + budget
        pause = 0.0
        created = False
        while True:
            try:
                return await self._link.run(work, deadline)
            except (TimeoutError, exc.SQLAlchemyError, OSError) as error:
                if _is_missing(error) and self._create and not created:
                    created = True
                    problem: Exception | None = error
                else:
                    problem = None
                    _raise_unless_transient(error)
                    if deadline - time.monotonic() <= pause:
                        raise BackendUnavailable(
                            f"the database did not confirm within {budget:g} s: {_words(error)}"
                        ) from _cause(error)
            if problem is not None:
                await self._make_table(deadline)
                continue
            await self._link.sleep(pause * (0.5 + random() / 2))
            pause = min(0.25, pause * 2 or 0.005)

    async def _make_table(self, deadline: float) -> None:
        try:
            await self._link.run(lambda connection: self.metadata.create_all(connection, checkfirst=True), deadline)
        except (TimeoutError, exc.SQLAlchemyError, OSError):
            # Others make it at the same moment, and only one of us succeeds. Whether it is there now, the next try tells.
            await self._link.sleep(0.01)


class _Statements:
    """The SQL, made once for one table and dialect."""

    def __init__(self, table: sa.Table, dialect: str) -> None:
        self._dialect = dialect
        # As text: aiomysql 0.3 breaks on bytes under PyMySQL 1.2, where a name that it imports is no function any more.
        self._hex = dialect in ("mysql", "mariadb")
        c = table.c
        columns = (
            c.state,
            c.token,
            c.attempt,
            c.fingerprint,
            c.since,
            c.lease,
            c.lease_until,
            c.expires,
            c.codec,
            c.body,
        )
        now: sa.ColumnElement[int]
        if dialect == "postgresql":
            now = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, sa.BigInteger)
        elif dialect == "sqlite":
            # The file and its users are on one machine and share its clock.
            now = sa.bindparam("now", type_=sa.BigInteger)
        else:  # UTC, so that no change to or from summer time moves a lease
            now = sa.func.timestampdiff(sa.text("MICROSECOND"), "1970-01-01", sa.func.utc_timestamp(6))
        here = c.id == sa.bindparam("b_id")
        clock = sa.select(now.label("now")).subquery("clock")
        self._read = sa.select(clock.c.now, *columns).select_from(clock.outerjoin(table, here))
        owned = sa.and_(
            here,
            c.token == sa.bindparam("b_token"),
            c.attempt == self._binary("b_attempt"),
            sa.or_(c.expires.is_(None), c.expires > now),
        )
        span = sa.bindparam("b_span", type_=sa.BigInteger)
        # MySQL assigns from left to right and reads what it has assigned: `expires` first.
        self._renew = (
            table.update()
            .where(owned, c.state == "R")
            .ordered_values(
                (c.expires, now + span + (c.expires - c.lease_until)), (c.lease, span), (c.lease_until, now + span)
            )
        )
        self._settle = (
            table.update()
            .where(owned, c.state.in_(("R", "U")))
            .values(
                state=sa.bindparam("b_state"),
                since=now,
                lease=0,
                lease_until=0,
                expires=now + span,
                codec=sa.bindparam("b_codec"),
                body=self._binary("b_body"),
            )
        )
        self._release = (
            table.update()
            .where(owned, c.state.in_(("R", "U")))
            .values(
                state=State.WITHDRAWN.value,
                since=now,
                lease=0,
                lease_until=0,
                expires=now + machine.TOMBSTONE,
            )
        )
        unchanged = sa.and_(
            here,
            c.state == sa.bindparam("b_state"),
            c.token == sa.bindparam("b_token"),
            c.attempt == self._binary("b_attempt"),
            c.lease_until == sa.bindparam("b_until"),
        )
        values: dict[str, Any] = {
            column.name: self._binary(column.name)
            if column.name in ("attempt", "fingerprint", "body")
            else sa.bindparam(column.name, type_=column.type)
            for column in columns
        }
        self._swap = table.update().where(unchanged).values(values)
        named: dict[str, Any] = {name: sa.bindparam(name) for name in ("id", "space", "namespace", "key")}
        self._insert = table.insert().values({**named, **values})
        self._runs = sa.select(sa.literal(1)).where(here, c.state == "R", c.token == sa.bindparam("b_token"))
        self._page = (
            sa.select(now.label("now"), c.id, c.namespace, c.key, *columns)
            .where(c.id > sa.bindparam("b_id"), c.space == "c")
            .order_by(c.id)
            .limit(500)
        )
        self._over = sa.select(c.id).where(c.expires <= now).limit(sa.bindparam("b_limit"))
        self._purge = table.delete().where(c.id.in_(sa.bindparam("b_ids", expanding=True)), c.expires <= now)
        self._fresh = self._fresh_postgresql(table, columns) if dialect == "postgresql" else None

    @staticmethod
    def _fresh_postgresql(table: sa.Table, columns: tuple[sa.Column[Any], ...]) -> sa.TextClause:
        """Insert where there is nothing, and read what there is: one statement, one round trip."""
        name = f'"{table.name}"' if table.schema is None else f'"{table.schema}"."{table.name}"'
        shown = ", ".join(f"record.{column.name}" for column in columns)
        return sa.text(
            f"""
            WITH clock AS MATERIALIZED (
                SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint) AS now
            ), fresh AS (
                INSERT INTO {name} (id, space, namespace, "key", state, token, attempt, fingerprint,
                                    since, lease, lease_until, expires, codec, body)
                SELECT CAST(:b_id AS varchar), CAST(:space AS varchar), CAST(:namespace AS text), CAST(:key AS text),
                       'R', now, CAST(:attempt AS bytea), CAST(:fingerprint AS bytea), now, CAST(:lease AS bigint),
                       now + CAST(:lease AS bigint), now + CAST(:lease AS bigint) + CAST(:keep AS bigint),
                       '', CAST('' AS bytea)
                FROM clock
                ON CONFLICT (id) DO NOTHING
                RETURNING token
            )
            SELECT clock.now, fresh.token AS fresh, {shown}
            FROM clock LEFT JOIN fresh ON true LEFT JOIN {name} AS record ON record.id = CAST(:b_id AS varchar)
            """  # noqa: S608  the name was checked and is quoted
        )

    def _binary(self, name: str) -> sa.ColumnElement[bytes]:
        if self._hex:
            return sa.func.unhex(sa.bindparam(name, type_=sa.String), type_=sa.LargeBinary)
        return sa.bindparam(name, type_=sa.LargeBinary)

    def _bytes(self, value: bytes) -> bytes | str:
        return value.hex() if self._hex else value

    def check_size(self, connection: Connection, body: bytes) -> None:
        """Refuse what MySQL and MariaDB would close the connection for. Raises BackendError."""
        if self._hex and len(body) > 250_000:
            limit = connection.execute(sa.text("SELECT @@max_allowed_packet")).scalar_one()
            if 2 * len(body) + 4096 > limit:
                raise BackendError(f"an outcome of {len(body):,} bytes does not fit into max_allowed_packet={limit:,}")

    def _clocked(self, values: dict[str, Any]) -> dict[str, Any]:
        if self._dialect == "sqlite":
            values["now"] = time.time_ns() // 1000
        return values

    def fresh(self, connection: Connection, rid: RecordId, ask: machine.Ask) -> tuple[int | None, Row | None, int]:
        """Claim a record that is not there: its token. Else None, the row that is there, and the time."""
        if self._fresh is not None:
            values = {
                "b_id": rid.digest,
                "space": rid.space,
                "namespace": rid.namespace,
                "key": rid.key,
                "attempt": ask.attempt,
                "fingerprint": ask.fingerprint,
                "lease": ask.lease,
                "keep": ask.keep,
            }
            while True:
                now, token, *found = connection.execute(self._fresh, values).one()
                if token is not None:
                    return int(token), None, now
                if found[0] is not None:
                    return None, _row(found), now
                # Another inserted it after this statement's snapshot was taken.
        while True:
            row, now = self.read(connection, rid)
            if row is not None:
                return None, row, now
            reply, granted = machine.on_claim(None, ask, now)
            assert isinstance(reply, Granted)
            assert granted is not None
            if self.swap(connection, rid, None, granted):
                return reply.token, None, now

    def read(self, connection: Connection, rid: RecordId) -> tuple[Row | None, int]:
        """The row, and the backend's time."""
        now, *found = connection.execute(self._read, self._clocked({"b_id": rid.digest})).one()
        return (None if found[0] is None else _row(found)), int(now)

    def swap(self, connection: Connection, rid: RecordId, row: Row | None, changed: Row) -> bool:
        """Put `changed` where `row` is, if it still is; whether it was."""
        values: dict[str, Any] = {
            "b_id": rid.digest,
            **changed._asdict(),
            "state": changed.state.value,
            "attempt": self._bytes(changed.attempt),
            "fingerprint": self._bytes(changed.fingerprint),
            "body": self._bytes(changed.body),
        }
        if row is None:
            del values["b_id"]
            values |= {"id": rid.digest, "space": rid.space, "namespace": rid.namespace, "key": rid.key}
            try:
                connection.execute(self._insert, values)
            except exc.IntegrityError:
                return False
            return True
        values |= {
            "b_state": row.state.value,
            "b_token": row.token,
            "b_attempt": self._bytes(row.attempt),
            "b_until": row.lease_until,
        }
        return connection.execute(self._swap, values).rowcount == 1

    def renew(self, connection: Connection, rid: RecordId, attempt: bytes, token: int, lease: int) -> bool:
        """Renew a running record that is this attempt's; whether it was."""
        values = self._clocked(
            {"b_id": rid.digest, "b_attempt": self._bytes(attempt), "b_token": token, "b_span": lease}
        )
        return connection.execute(self._renew, values).rowcount == 1

    def settle(
        self,
        connection: Connection,
        rid: RecordId,
        state: State,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: int,
    ) -> bool:
        """Settle an unsettled record that is this attempt's; whether it was."""
        values = self._clocked(
            {
                "b_id": rid.digest,
                "b_attempt": self._bytes(attempt),
                "b_token": token,
                "b_span": ttl,
                "b_state": state.value,
                "b_codec": codec,
                "b_body": self._bytes(body),
            }
        )
        return connection.execute(self._settle, values).rowcount == 1

    def release(self, connection: Connection, rid: RecordId, attempt: bytes, token: int) -> bool:
        """Withdraw an unsettled record that is this attempt's; whether it was."""
        values = self._clocked({"b_id": rid.digest, "b_attempt": self._bytes(attempt), "b_token": token})
        return connection.execute(self._release, values).rowcount == 1

    def runs(self, connection: Connection, rid: RecordId, token: int) -> bool:
        """Whether the record is running under `token`."""
        return connection.execute(self._runs, {"b_id": rid.digest, "b_token": token}).first() is not None

    def page(self, connection: Connection, after: str) -> list[tuple[str, RecordId, Row, int]]:
        """The next records of the call space, in the order of their digests."""
        rows = connection.execute(self._page, self._clocked({"b_id": after})).all()
        return [
            (digest, RecordId(namespace, key), _row(found), int(now)) for now, digest, namespace, key, *found in rows
        ]

    def purge(self, connection: Connection, limit: int) -> int:
        """Drop at most `limit` rows past their retention; how many."""
        ids = connection.execute(self._over, self._clocked({"b_limit": limit})).scalars().all()
        if not ids:
            return 0
        return int(connection.execute(self._purge, self._clocked({"b_ids": list(ids)})).rowcount)


def _row(found: list[Any]) -> Row:
    state, token, attempt, fingerprint, since, lease, lease_until, expires, codec, body = found
    return Row(
        State(state), token, bytes(attempt), bytes(fingerprint), since, lease, lease_until, expires, codec, bytes(body)
    )


# ------------------------------------------------------------------------------------------------------------ errors

_BUSY = {"40001", "40P01", "55P03", "57P01", "57P02", "57P03", "53300", "08006", "08003", "25P03"}
"""SQLSTATEs of PostgreSQL after which the same command may succeed: conflicts, restarts, too many connections."""
_BUSY_MYSQL = {1040, 1205, 1213, 1053, 1927, 2006, 2013, 2014}
"""Error numbers of MySQL and MariaDB of the same kind."""
_BUSY_WORDS = ("database is locked", "database table is locked", "too many clients", "starting up", "shutting down")
"""What drivers say where they give no number."""
_DOWN_WORDS = ("refused", "No such file or directory", "could not translate host name", "Name or service not known")
_DOWN_MYSQL = {2003, 2002, 2005}


def _cause(error: Exception) -> Any:
    """The driver's own error: SQLAlchemy's shows the values of a statement."""
    return getattr(error, "orig", None) or error


def _code(error: Exception) -> Any:
    """The error number of MySQL and MariaDB, else the SQLSTATE; None where the driver gives neither."""
    cause = _cause(error)
    number = cause.args[0] if cause.args else None
    return number if isinstance(number, int) else getattr(cause, "sqlstate", None)


def _words(error: Exception) -> str:
    return str(_cause(error)) or "no reply"


def _is_missing(error: Exception) -> bool:
    """Whether the table is not there."""
    return _code(error) in ("42P01", 1146) or "no such table" in _words(error)


def _raise_unless_transient(error: Exception) -> None:
    """Return if the same command may succeed when it is sent again; else raise what the caller is to see."""
    words, code = _words(error), _code(error)
    if _is_missing(error):
        raise BackendError(
            f"the table of records is missing, and could not be made (create=False, no permission, no time): {words}"
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


# ------------------------------------------------------------------------------------------------------ connections


def _twins(text: str) -> tuple[URL, URL]:
    """The URL for sync and for async callers."""
    scheme, _, rest = text.partition("://")
    if scheme.partition("+")[0] == "postgres":
        text = f"postgresql{scheme[len('postgres') :]}://{rest}"
    try:
        url = make_url(text)
    except exc.ArgumentError as error:
        raise ValueError(f"the database URL cannot be read: {error}") from None
    kind = url.get_backend_name()
    if kind not in _DRIVERS:
        raise ValueError(f"no SQL backend for {kind}; there are {', '.join(_DRIVERS)}")
    if kind == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("sqlite:// needs a file, such as sqlite:///idempotent.db; local:// keeps records in memory")
    sync, asynchronous = _DRIVERS[kind]
    if url.drivername == "postgresql+asyncpg":
        asynchronous = url.drivername
    return url.set(drivername=sync), url.set(drivername=asynchronous)


_SQLALCHEMYS = ("ssl_ca", "ssl_cert", "ssl_key", "ssl_capath", "ssl_cipher", "ssl_check_hostname")
"""Options in a URL that SQLAlchemy translates for the drivers of MySQL."""


def _refuse_unknown_options(url: URL) -> None:
    """ValueError for an option in the URL that its driver would refuse, or pass over, at the first connection."""
    name = url.get_driver_name()
    if url.get_backend_name() == "sqlite":
        known = {"timeout", "detect_types", "isolation_level", "check_same_thread", "cached_statements"}
        if "uri" in url.query:  # then SQLite itself reads the rest
            return
    else:
        try:
            driver = importlib.import_module(name)
        except ImportError as error:
            raise _no_driver(url, error) from error
        if name == "psycopg":
            known = {option.keyword.decode() for option in driver.pq.Conninfo.get_defaults()}
        else:
            known = {*inspect.signature(driver.connect).parameters, *_SQLALCHEMYS, "prepared_statement_cache_size"}
    if unknown := sorted(set(url.query) - known):
        raise ValueError(f"{name} knows no option {', '.join(unknown)} in a database URL; ours are table= and timeout=")


def _options(url: URL, timeout: float) -> dict[str, Any]:
    """What an engine of ours is made with."""
    driver = url.get_driver_name()
    options: dict[str, Any] = {
        "isolation_level": "AUTOCOMMIT",
        "hide_parameters": True,
        "pool_size": _CONNECTIONS,
        "max_overflow": 0,
        "pool_timeout": timeout,
        "connect_args": {
            "timeout" if driver in ("asyncpg", "pysqlite", "aiosqlite") else "connect_timeout": math.ceil(timeout)
        },
    }
    if driver in ("pymysql", "aiomysql") and sa.__version__.split(".") >= ["2", "1"]:
        options["skip_autocommit_rollback"] = True  # it would be a round trip of its own
    return options


def _on_connect(dbapi_connection: Any, _record: Any) -> None:
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers and the writer do not block each other
    cursor.close()


def _engine(url: URL, timeout: float) -> Engine:
    try:
        engine = sa.create_engine(url, **_options(url, timeout))
    except ImportError as error:
        raise _no_driver(url, error) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _on_connect)
    return engine


def _async_engine(url: URL, timeout: float) -> AsyncEngine:
    try:
        _refuse_unknown_options(url)
        engine = create_async_engine(url, **_options(url, timeout))
    except ImportError as error:
        raise _no_driver(url, error) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine.sync_engine, "connect", _on_connect)
    return engine


def _no_driver(url: URL, error: ImportError) -> ImportError:
    extra = {"postgresql": "postgres", "mariadb": "mysql"}.get(url.get_backend_name(), url.get_backend_name())
    package = "asyncpg" if url.get_driver_name() == "asyncpg" else f"'idempotent-py[{extra}]'"
    return ImportError(f"{url.drivername} needs a driver: pip install {package} ({error})")


def _guarded(
    connection: Connection,
    work: Callable[[Connection], R],
    watchdog: Watchdog,
    deadline: float,
    busy_timeout: float | None,
) -> R:
    """`work`, given up at `deadline`; `busy_timeout`: what the connection was made with, None: it is not ours."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed before a connection was free")
    if connection.dialect.name != "sqlite":
        with watchdog.watching(_descriptor(connection.connection.driver_connection), deadline):
            return work(connection)
    if busy_timeout is not None and abs(left - connection.info.get("busy", busy_timeout)) > busy_timeout / 20:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={max(1, round(left * 1000))}").close()
        connection.info["busy"] = left
    return work(connection)


def _descriptor(connection: Any) -> int | None:
    """The socket of a driver's connection; None: the driver has deadlines of its own, or is not known."""
    if hasattr(connection, "fileno"):  # psycopg
        return int(connection.fileno())
    found = getattr(connection, "_sock", None)  # pymysql
    return None if found is None else int(found.fileno())


class _SyncLink:
    """One colour's engine; `timeout`: what it was made with, None: it was given ready-made."""

    def __init__(self, engine: Engine, watchdog: Watchdog, timeout: float | None) -> None:
        self.engine = engine
        self._watchdog = watchdog
        self._timeout = timeout
        self._free = threading.Semaphore(_CONNECTIONS)
        self._here = threading.local()
        if timeout is not None and engine.dialect.name != "sqlite":
            event.listen(engine, "do_connect", self._connect)
        _engines.add(self)

    async def run(self, work: Callable[[Connection], R], deadline: float) -> R:
        if self._timeout is None:
            with self.engine.connect() as connection:
                return _guarded(connection, work, self._watchdog, deadline, None)
        free = self._free
        if not free.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError("the deadline passed before a connection was free")
        try:
            with contextlib.ExitStack() as self._here.watches:
                self._here.deadline = deadline
                with self.engine.connect() as connection:
                    return _guarded(connection, work, self._watchdog, deadline, self._timeout)
        finally:
            free.release()

    def _connect(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        """Connect on a thread of its own: drivers count in whole seconds, and libpq in no fewer than two."""
        deadline = self._here.deadline
        future: Future[Any] = Future()

        def connect() -> None:
            try:
                future.set_result(dialect.connect(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)

        try:
            threading.Thread(target=connect, name="idempotent-connect", daemon=True).start()
        except RuntimeError as error:
            raise OSError(f"no connection can be made: {error}") from error
        try:
            connection = future.result(max(0.0, deadline - time.monotonic()))
        except BaseException:
            future.add_done_callback(_close_late)
            raise
        # What SQLAlchemy asks of a new connection has no deadline either.
        self._here.watches.enter_context(self._watchdog.watching(_descriptor(connection), deadline))
        return connection

    async def sleep(self, pause: float) -> None:
        if pause:
            time.sleep(pause)

    def abandon(self) -> None:
        _parents.append(self.engine.pool)
        self.engine.dispose(close=False)
        self._free = threading.Semaphore(_CONNECTIONS)


def _close_late(future: "Future[Any]") -> None:
    if future.exception() is None:
        future.result().close()


class _AsyncLink:
    def __init__(
        self, source: AsyncEngine | Callable[[], AsyncEngine], watchdog: Watchdog, timeout: float | None
    ) -> None:
        self._watchdog = watchdog
        self._timeout = timeout
        self._given = source if isinstance(source, AsyncEngine) else None
        self._engines = None if isinstance(source, AsyncEngine) else PerLoop(source, lambda engine: engine.dispose())

    async def run(self, work: Callable[[Connection], R], deadline: float) -> R:
        engine = self._given if self._engines is None else await self._engines.get()
        assert engine is not None
        async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + _GRACE), engine.connect() as connection:
            return await connection.run_sync(_guarded, work, self._watchdog, deadline, self._timeout)

    async def sleep(self, pause: float) -> None:
        await asyncio.sleep(pause)

    async def aclose(self) -> None:
        if self._engines is not None:
            await self._engines.aclose()


_GRACE = 0.2
"""Seconds after a command's deadline at which its task is cancelled, if shutting the socket has not ended it."""

_engines: weakref.WeakSet[_SyncLink] = weakref.WeakSet()
_parents: list[Any] = []
"""Pools of a parent process, kept from being finalized here: that could write to the parent's sockets and files."""


def _after_fork() -> None:
    for link in list(_engines):
        link.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
