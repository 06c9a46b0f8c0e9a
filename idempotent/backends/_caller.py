"""Records in a transaction of the caller's: on its own connection, committed or rolled back with everything else.

Two calls with one key meet at the primary key of the records' table: the later one's insert waits in the database
until the earlier one's transaction has ended. A claim is three statements in a savepoint:

1. insert a placeholder unless there is a row: this is where a duplicate waits;
2. read the row that is there now, with the database's clock;
3. decide with `_machine`, and write by compare-and-set.

The clock is read after the wait, so that the token is higher than that of a run which was rolled back meanwhile.

**No takeover within.** A running row that a claim can see is either of its own transaction, or was committed by a
function in the middle of its work. The former is never dead: a claim on it is a call inside the call, or one after a
call whose coroutine was thrown away, and running again would do the work twice in one transaction. The latter is taken
over when its lease is over, unless its function still runs in this process.
"""

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.engine import Connection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session

from idempotent import _machine as machine
from idempotent._record import Answer, Busy, Claim, Granted, Record, RecordId, Row, State, describe
from idempotent.backends._engines import DIALECTS
from idempotent.backends._statements import Statements, _row, records_table
from idempotent.backends.sql import SQLBackend, _code, _is_missing
from idempotent.errors import BackendError, CallError

__all__ = ["Blocked", "CallersTransaction", "begun", "connection_of", "subject_of"]

R = TypeVar("R")

Subject = Session | Connection
AsyncSubject = AsyncSession | AsyncConnection


class Blocked(Exception):
    """Another transaction holds the key, and the time to wait for it is over."""


def subject_of(given: Any, *, is_async: bool) -> Any:
    """The session or connection that `given` is or stands for. Raises TypeError for anything else."""
    if isinstance(given, (scoped_session, async_scoped_session)):
        given = given()
    if isinstance(given, (AsyncSession, AsyncConnection) if is_async else (Session, Connection)):
        return given
    wanted = "AsyncSession or AsyncConnection" if is_async else "Session or Connection"
    colour = "an async" if is_async else "a sync"
    raise TypeError(f"{colour} function needs a SQLAlchemy {wanted}, not {type(given).__name__}")


def connection_of(subject: Subject) -> Connection:
    """The connection that the session's transaction is on; begins one if there is none. Nothing is flushed."""
    connection = subject.connection() if isinstance(subject, Session) else subject
    if connection._is_autocommit_isolation():
        raise CallError(
            "the connection is in AUTOCOMMIT, so there is no transaction that a record could ride in;"
            " give the session an engine, or execution options, with another isolation level"
        )
    return connection


def begun(connection: Connection) -> None:
    """Have a transaction open in the driver, too, before a savepoint is set.

    The sqlite3 module sends BEGIN before a write, and not before SAVEPOINT: releasing a savepoint that stands alone
    would commit it. IMMEDIATE, because a transaction that has read before others wrote can never write.
    """
    if connection.dialect.name == "sqlite":
        if not connection.in_transaction():
            connection.begin()  # an application's own listener may send BEGIN here
        driver = connection.connection.driver_connection
        if not getattr(driver, "in_transaction", True):
            connection.exec_driver_sql("BEGIN IMMEDIATE").close()


class _Claims(Statements):
    """The statements of the usual table, as a transaction of the caller's needs them."""

    def __init__(self, dialect: str) -> None:
        self.metadata = sa.MetaData()
        self.table = records_table(self.metadata)
        super().__init__(self.table, dialect, notifies=False)
        binds: dict[str, Any] = {
            column.name: self._binary(column.name)
            if column.name in ("attempt", "fingerprint", "body")
            else sa.bindparam(column.name, type_=column.type)
            for column in self.table.c
        }
        self._place: sa.Insert
        if self._hex:
            # A plain insert leaves a shared lock on the row that is there, and two who then want more of it deadlock.
            self._place = mysql.insert(self.table).values(binds).on_duplicate_key_update(id=self.table.c.id)
        else:
            insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
            self._place = insert(self.table).values(binds).on_conflict_do_nothing(index_elements=[self.table.c.id])
        self._look = self._read
        if self._hex:  # REPEATABLE READ, the default there, shows an old state to any other read
            self._read = self._read.with_for_update()

    def look(self, connection: Connection, rid: RecordId) -> tuple[Row | None, int]:
        """As `read`, without a lock."""
        now, *found = connection.execute(self._look, self._clocked({"b_id": rid.digest})).one()
        return (None if found[0] is None else _row(found)), int(now)

    def claim(
        self, connection: Connection, rid: RecordId, ask: machine.Ask, lives: Callable[[Connection, bytes], bool]
    ) -> Claim:
        """Claim the record; waits while another transaction holds it. `lives` says which attempts are not taken over."""
        values: dict[str, Any] = {
            "id": rid.digest,
            "space": rid.space,
            "namespace": rid.namespace,
            "key": rid.key,
            **Row(State.WITHDRAWN, 0, ask.attempt, b"", 0)._asdict(),
            "state": State.WITHDRAWN.value,
            "attempt": self._bytes(ask.attempt),
            "fingerprint": self._bytes(b""),
            "body": self._bytes(b""),
        }
        while True:
            connection.execute(self._place, values)
            row, now = self.read(connection, rid)
            if row is None:
                continue  # it was there, and has been purged
            placed = row.token == 0 and row.attempt == ask.attempt
            reply, changed = machine.on_claim(None if placed else row, ask, now)
            theirs = row.state is State.RUNNING and row.attempt != ask.attempt
            if isinstance(reply, Granted) and theirs and lives(connection, row.attempt):
                return Busy(row.token, 0.0)
            if changed is None or self.swap(connection, rid, row, changed):
                return reply

    @contextlib.contextmanager
    def waiting(self, connection: Connection, seconds: float | None) -> Iterator[None]:
        """Statements inside wait at most `seconds` for others; None: as long as the connection is set to.

        MySQL counts in whole seconds and waits one at least; MariaDB in whole seconds, or not at all.
        """
        if seconds is None:
            yield
            return
        if self._dialect == "postgresql":
            limit = str(min(max(1, round(seconds * 1000)), 2**31 - 1))
            read = sa.func.current_setting("lock_timeout")
            before = connection.execute(sa.select(read, sa.func.set_config("lock_timeout", limit, True))).one()[0]
            restore: Any = sa.select(sa.func.set_config("lock_timeout", before, True))
        elif self._dialect == "sqlite":
            before = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
            limit = str(min(round(seconds * 1000), 2**31 - 1))
            connection.exec_driver_sql(f"PRAGMA busy_timeout={limit}").close()
            restore = sa.text(f"PRAGMA busy_timeout={before}")
        else:
            least = 0 if getattr(connection.dialect, "is_mariadb", False) else 1
            before = connection.execute(sa.text("SELECT @@SESSION.innodb_lock_wait_timeout")).scalar_one()
            limit = str(min(max(least, int(seconds)), 100_000_000))
            connection.execute(sa.text(f"SET SESSION innodb_lock_wait_timeout={limit}")).close()
            restore = sa.text(f"SET SESSION innodb_lock_wait_timeout={before}")
        try:
            yield
        except BaseException:
            with contextlib.suppress(exc.SQLAlchemyError):  # the connection is lost, or what has failed goes first
                connection.execute(restore).close()
            raise
        connection.execute(restore).close()


@functools.cache
def _claims_of(dialect: str) -> _Claims:
    if dialect not in DIALECTS:
        raise CallError(f"within= serves {', '.join(DIALECTS)}, and not {dialect}")
    return _Claims(dialect)


class _Savepoint(NamedTuple):
    """What the function's own work is done in."""

    subject: Subject
    transaction: Any

    @property
    def stands(self) -> bool:
        """Whether nobody has ended it, or the transaction around it."""
        return bool(self.transaction.is_active)

    def undo(self) -> None:
        """Roll back to it, if that is not done yet."""
        if self.transaction.is_active:
            self.transaction.rollback()
        elif getattr(self.transaction, "session", None) is not None:
            self.transaction.close()  # a failed flush has rolled back; the session is to go on all the same


class CallersTransaction(SQLBackend):
    """Records on one session or connection of a caller's, for one call.

    Nothing is sent again here: what fails is the caller's whole transaction, and an error of the driver reaches the
    caller as it is, so that what retries transactions recognises it.
    """

    def __init__(self, subject: Subject | AsyncSubject) -> None:
        self._subject = subject
        self._is_async = isinstance(subject, (AsyncSession, AsyncConnection))
        self.name = _dialect_of(subject)
        self._statements: _Claims = _claims_of(self.name)
        self._savepoint: _Savepoint | None = None
        self.over = False
        """The call has ended, or failed to."""
        self.interrupted = False
        self.token: int | None = None
        """The token of the claim, known before the claim is confirmed: an interruption may come between."""
        self._connection: Connection | None = None
        self.lives = False
        """Whether what was read last is a run that is not taken over, however old it is."""
        self._attempt = b""
        self._claims: set[bytes] = set()
        """The attempts that have claimed in this transaction and have not ended, this call's among them."""

    async def on(self, work: Callable[[Subject], R]) -> R:
        """`work` on the session or connection, the async ones' sync inside."""
        subject: Any = self._subject
        if self._is_async:
            return await subject.run_sync(functools.partial(_silent, work))  # type: ignore[no-any-return]
        return _silent(work, subject)

    async def try_claim(self, rid: RecordId, ask: machine.Ask, seconds: float | None) -> Claim:
        """As `claim`, waiting up to `seconds`. Raises Blocked when they are over."""
        make = self._statements

        def work(connection: Connection) -> Claim:
            with make.waiting(connection, seconds):
                try:
                    begun(connection)
                    with _savepoint(connection):
                        reply = make.claim(connection, rid, ask, _lives)
                        if isinstance(reply, Granted):
                            self._mark(connection, ask.attempt, reply.token)
                except exc.DBAPIError as error:
                    if _is_blocked(error):
                        raise Blocked from error.orig
                    raise
            return reply

        return await self._with_table(work)

    def _mark(self, connection: Connection, attempt: bytes, token: int) -> None:
        transaction = connection.get_transaction()
        assert transaction is not None
        self.token, self._connection = token, connection
        self._attempt, self._claims = attempt, _claimed.setdefault(transaction, set())
        self._claims.add(attempt)
        _running[attempt] = self

    def close(self) -> None:
        """The call has ended, and its record with it."""
        self.over = True
        self._claims.discard(self._attempt)

    async def open(self) -> None:
        """Set the savepoint of the function's own work."""

        def work(subject: Subject) -> _Savepoint:
            return _Savepoint(subject, subject.begin_nested())

        self._savepoint = await self.on(work)

    @property
    def stands(self) -> bool:
        """Whether the function has left its transaction open."""
        return self._savepoint is not None and self._savepoint.stands

    async def keep(self) -> None:
        """Flush what the function has left to be sent, and release the savepoint."""
        savepoint = self._savepoint
        if savepoint is not None and savepoint.stands:
            await self.on(lambda _: savepoint.transaction.commit())

    async def undo(self) -> None:
        """Roll back to the savepoint."""
        savepoint = self._savepoint
        if savepoint is not None:
            await self.on(lambda _: savepoint.undo())

    async def doom(self) -> None:
        """Have the transaction end in a rollback, whatever its owner does: SQLAlchemy refuses to commit it."""
        connection = self._connection
        if connection is not None and not connection.closed:
            await self.on(lambda _: connection.invalidate())

    async def read(self, rid: RecordId) -> Record | None:
        make = self._statements

        def work(connection: Connection) -> Record | None:
            with contextlib.nullcontext() if self.name == "sqlite" else _savepoint(connection):
                row, now = make.look(connection, rid)
                self.lives = row is not None and row.state is State.RUNNING and _lives(connection, row.attempt)
                return None if row is None else describe(rid, row, now)

        try:
            return await self.on(lambda subject: work(connection_of(subject)))
        except exc.DBAPIError as error:
            if _is_missing(error):
                return None
            raise

    async def _settle(self, *args: Any, **kwargs: Any) -> Answer:
        try:
            return await super()._settle(*args, **kwargs)
        except exc.DBAPIError as error:
            if self.stands or not _is_missing(error):
                raise
            return Answer.GONE  # the function has rolled back, and on SQLite the table is gone, too

    async def _run(self, work: Callable[[Connection], R], budget: float) -> R:
        if self._savepoint is not None:
            return await self.on(lambda subject: work(connection_of(subject)))

        def guarded(connection: Connection) -> R:
            begun(connection)
            with _savepoint(connection):
                return work(connection)

        return await self._with_table(guarded)

    async def _with_table(self, work: Callable[[Connection], R]) -> R:
        try:
            return await self.on(lambda subject: work(connection_of(subject)))
        except exc.DBAPIError as error:
            if not _is_missing(error):
                raise
        await self.on(lambda subject: self._make_it(connection_of(subject)))
        return await self.on(lambda subject: work(connection_of(subject)))

    def _make_it(self, connection: Connection) -> None:
        """Make the table on another connection: on this one it would end the transaction, or hold up everybody else."""
        metadata = self._statements.metadata
        if self.name == "sqlite":  # there it does neither, and another connection could not write now
            begun(connection)
            metadata.create_all(connection)
            return
        try:
            with connection.engine.connect() as other:
                if other.connection.driver_connection is connection.connection.driver_connection:
                    raise BackendError("the engine has this one connection only; make the table beforehand")
                if (schemas := connection.get_execution_options().get("schema_translate_map")) is not None:
                    other.execution_options(schema_translate_map=schemas)
                metadata.create_all(other)
                other.commit()
        except exc.TimeoutError as error:
            raise BackendError(
                "the table of records is missing, and the engine's pool had no second connection to make it on;"
                " make it beforehand"
            ) from error
        except exc.DBAPIError:
            return  # others make it at the same moment, or we may not: the next try tells


_running: "weakref.WeakValueDictionary[bytes, CallersTransaction]" = weakref.WeakValueDictionary()
"""The calls of this process, by attempt, while they run."""
_claimed: "weakref.WeakKeyDictionary[sa.Transaction, set[bytes]]" = weakref.WeakKeyDictionary()
"""The attempts that have claimed in a transaction and have not ended, while it lasts."""


def _lives(connection: Connection, attempt: bytes) -> bool:
    """Whether that attempt's claim is of this very transaction, or its function runs in this process."""
    place = _running.get(attempt)
    transaction = connection.get_transaction()
    mine = () if transaction is None else _claimed.get(transaction, ())
    return attempt in mine or (place is not None and not place.over)


@contextlib.contextmanager
def _savepoint(connection: Connection) -> Iterator[None]:
    """A savepoint, whose own failure to be rolled back hides nothing: after a deadlock MariaDB has none left."""
    transaction = connection.begin_nested()
    try:
        yield
    except BaseException:
        with contextlib.suppress(exc.SQLAlchemyError):
            transaction.rollback()
        raise
    transaction.commit()


def _dialect_of(subject: Any) -> str:
    inner = subject.sync_session if isinstance(subject, AsyncSession) else subject
    if isinstance(inner, Session):
        inner = inner.get_bind()
    return str(inner.dialect.name)


def _silent(work: Callable[[Subject], R], subject: Subject) -> R:
    try:
        return work(subject)
    except exc.StatementError as error:
        error.hide_parameters = True  # keys and results are not for logs
        raise


def _is_blocked(error: exc.DBAPIError) -> bool:
    """Whether a statement waited for another transaction until its time was over."""
    cause: Any = error.orig
    code = getattr(cause, "sqlite_errorcode", None)
    if code is not None:
        return bool(code & 0xFF == 5 and code != _BUSY_SNAPSHOT)
    return _code(error) in ("55P03", 1205, 3572)


_BUSY_SNAPSHOT = 517
"""SQLite: the transaction has read what others have changed since, and can never write."""
