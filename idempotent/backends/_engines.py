"""Engines for database URLs, and how each colour runs statements on them: within a deadline, and across a fork."""

import asyncio
import contextlib
import importlib
import inspect
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends._loops import PerLoop
from idempotent.backends._notify import PostgresSubscriber
from idempotent.backends._watchdog import Watchdog, within
from idempotent.errors import BackendError

__all__ = ["links_of", "twins"]

R = TypeVar("R")
C = TypeVar("C")

_CONNECTIONS = 8
"""Connections of an engine of ours; a call that finds none free waits for one within its deadline."""

DIALECTS = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "mysql": ("mysql+pymysql", "mysql+aiomysql"),
    "mariadb": ("mariadb+pymysql", "mariadb+aiomysql"),
}


def twins(text: str) -> tuple[URL, URL]:
    """The URL for sync and for async callers."""
    scheme, _, rest = text.partition("://")
    if scheme.partition("+")[0] == "postgres":
        text = f"postgresql{scheme[len('postgres') :]}://{rest}"
    try:
        url = make_url(text)
    except exc.ArgumentError as error:
        raise ValueError(f"the database URL cannot be read: {error}") from None
    kind = url.get_backend_name()
    if kind not in DIALECTS:
        raise ValueError(f"no SQL backend for {kind}; there are {', '.join(DIALECTS)}")
    if kind == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("sqlite:// needs a file, such as sqlite:///idempotent.db; local:// keeps records in memory")
    sync, asynchronous = DIALECTS[kind]
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


def _options(url: URL, timeout: float, pool: type[sa.Pool]) -> dict[str, Any]:
    """What an engine of ours is made with."""
    driver = url.get_driver_name()
    exact = driver in ("asyncpg", "pysqlite", "aiosqlite")  # the others count in whole seconds
    options: dict[str, Any] = {
        "poolclass": pool,
        "isolation_level": "AUTOCOMMIT",
        "hide_parameters": True,
        "pool_size": _CONNECTIONS,
        "max_overflow": 0,
        "pool_timeout": timeout,
        "connect_args": {"timeout": timeout} if exact else {"connect_timeout": math.ceil(timeout)},
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
        engine = sa.create_engine(url, **_options(url, timeout, sa.QueuePool))
    except ImportError as error:
        raise _no_driver(url, error) from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _on_connect)
    return engine


def _async_engine(url: URL, timeout: float) -> AsyncEngine:
    try:
        _refuse_unknown_options(url)
        engine = create_async_engine(url, **_options(url, timeout, sa.AsyncAdaptedQueuePool))
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
    deadline: float,
    busy_timeout: float | None,
) -> R:
    """`work`, given up at `deadline`; `busy_timeout`: what the connection was made with, None: it is not ours."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline passed before a connection was free")
    if connection.dialect.name != "sqlite":
        mark = _watchdog.watch(_descriptor(connection.connection.driver_connection), deadline)
        try:
            return work(connection)
        except exc.OperationalError as error:
            if connection.dialect.driver == "psycopg" and getattr(error.orig, "sqlstate", None) is None:
                # The server said nothing: psycopg may find the socket closed before libpq knows that the connection
                # is broken, and a rollback on it would hide why.
                connection.invalidate()
                error.connection_invalidated = True
            raise
        finally:
            _watchdog.leave(mark)
    if busy_timeout is not None and abs(left - connection.info.get("busy", busy_timeout)) > busy_timeout / 20:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={max(1, round(left * 1000))}").close()
        connection.info["busy"] = left
    return work(connection)


def _descriptor(connection: Any) -> int | None:
    """The socket of a driver's connection; None: the driver has deadlines of its own, or is not known."""
    if hasattr(connection, "fileno"):  # psycopg
        return int(connection.fileno())
    found = getattr(connection, "_usock", None) or getattr(connection, "_sock", None)  # pg8000; pymysql
    return None if found is None else int(found.fileno())


class _ForkGuard:
    """What SQLite must not carry over a fork: its locks and its index of the log belong to the process.

    Idle connections are closed before the fork. Where one is in use all the same, the child is refused.
    """

    def __init__(self) -> None:
        self.open = False
        """Some connection was in use when the fork began."""
        self.torn = False

    def check(self) -> None:
        """Raise BackendError in a child that must not use the file."""
        if self.torn:
            raise BackendError(
                "this process was forked while its parent used the SQLite file, which SQLite does not survive;"
                " fork before the first call or outside of the event loop, or start processes by spawn"
            )


class _Here(threading.local):
    """What a thread is about."""

    deadline: float | None = None
    """Monotonic seconds: when its command is given up; None: no command of ours is under way."""
    watches: contextlib.ExitStack | None = None


def _permits() -> "queue.SimpleQueue[None]":
    """One for each connection of an engine of ours: a semaphore that costs next to nothing."""
    permits: queue.SimpleQueue[None] = queue.SimpleQueue()
    for _ in range(_CONNECTIONS):
        permits.put(None)
    return permits


class SyncLink:
    """Runs statements on the calling thread; `timeout`: what the engine was made with, None: it was given ready-made."""

    waiter = ThreadWaiter

    def __init__(self, engine: Engine, timeout: float | None, guard: _ForkGuard) -> None:
        self.engine = engine
        self._timeout = timeout
        self._guard = guard
        self._closed = False
        self._free = _permits()
        self._idle: list[Connection] = []
        """Connections of an engine of ours that nobody uses; to take one costs less than the pool does."""
        self._held: list[None] = []
        self._here = _Here()
        self._is_sqlite = engine.dialect.name == "sqlite"
        if not self._is_sqlite:
            mine = weakref.ref(self)  # SQLAlchemy's caches keep dialects and their listeners alive

            def connect(*event: Any) -> Any:
                link = mine()
                return None if link is None else link._connect(*event)

            event.listen(engine, "do_connect", connect)
        _links.add(self)

    async def run(self, work: Callable[[Connection], R], deadline: float) -> R:
        """`work` on a connection, given up at monotonic `deadline`."""
        self._guard.check()
        if self._timeout is None:
            with self._connecting(deadline), self._checkout(self.engine.connect) as connection:
                return _guarded(connection, work, deadline, None)
        permit: list[None] = []
        try:
            self._await_permit(permit, deadline)
            try:
                connection = self._idle.pop()
            except IndexError:
                with self._connecting(deadline):
                    connection = self.engine.connect()
            try:
                result = _guarded(connection, work, deadline, self._timeout)
            except BaseException as error:
                connection.close()
                if getattr(error, "connection_invalidated", False):
                    self._close_idle()  # they are as old, and most probably as dead
                raise
            self._idle.append(connection)
            return result
        finally:
            if permit:
                self._free.put(None)  # first of all, and here: a signal handler's exception is not to come before it
            self._end_if_closed()

    def _await_permit(self, permits: list[None], deadline: float) -> None:
        """Add one to `permits`, to use one of the connections of an engine of ours. Raises TimeoutError.

        In one step of the interpreter, as a signal handler's exception between two would lose it for good.
        """
        try:
            permits.extend(map(self._free.get, (True,), (max(0.0, deadline - time.monotonic()),)))
        except queue.Empty:
            raise TimeoutError("the deadline passed before a connection was free") from None

    def _end_if_closed(self) -> None:
        if self._closed:  # whoever closes it waits for no command, and may be followed by some
            self._close_idle()
            self.engine.pool.dispose()

    def _close_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    @contextlib.contextmanager
    def _connecting(self, deadline: float) -> Iterator[None]:
        """A connection that this thread opens meanwhile is there by monotonic `deadline`."""
        here = self._here
        outer = here.deadline, here.watches  # of the command that a signal's handler has interrupted
        try:
            with contextlib.ExitStack() as here.watches:
                here.deadline = deadline
                yield
        finally:
            here.deadline, here.watches = outer

    def _checkout(self, connect: Callable[[], C]) -> C:
        """A connection of the pool; that of a ready-made engine may wait longer than we may."""
        pool, deadline = self.engine.pool, self._here.deadline
        if self._timeout is None and not self._is_sqlite and isinstance(pool, sa.QueuePool) and not pool.checkedin():
            assert deadline is not None
            connection: C = within(deadline, connect, _close)
            return connection
        return connect()

    def _connect(self, dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        """Connect within the deadline: drivers count in whole seconds, and libpq in no fewer than two."""
        here = self._here
        deadline = here.deadline
        if deadline is None:  # the owner of a ready-made engine connects
            return None

        watches = here.watches

        def watch(connection: Any) -> None:
            # What SQLAlchemy asks of a new connection has no deadline either.
            assert watches is not None
            watches.enter_context(_watchdog.watching(_descriptor(connection), deadline))

        return within(deadline, lambda: dialect.connect(*arguments, **options), _close, watch)

    async def sleep(self, pause: float) -> None:
        """Let `pause` seconds pass."""
        if pause:
            time.sleep(pause)

    def subscriber(self, timeout: float) -> PostgresSubscriber:
        """A connection of its own, to hear notifications on; its commands take up to `timeout` seconds each."""
        deadline = time.monotonic() + timeout
        permit: list[None] = []
        try:
            if self._timeout is not None:
                self._await_permit(permit, deadline)
            self._close_idle()  # the pool has no more than there are permits
            with self._connecting(deadline):
                pooled = self._checkout(self.engine.raw_connection)
            connection = pooled.driver_connection
            pooled.detach()
        finally:
            if permit:
                self._free.put(None)
            self._end_if_closed()
        return PostgresSubscriber(connection, timeout)

    def close(self) -> None:
        """Close the connections of an engine of ours; those in use, and those of later commands, after their command."""
        if self._timeout is not None:
            self._closed = True
            self._close_idle()
            self.engine.pool.dispose()

    def before_fork(self) -> None:
        """Let running statements end, and close the connections, where they cannot be forked."""
        if not self._is_sqlite or self._timeout is None:
            return
        until = time.monotonic() + self._timeout
        with contextlib.suppress(TimeoutError):
            while len(self._held) < _CONNECTIONS:
                self._await_permit(self._held, until)
        self._close_idle()
        self._guard.open |= len(self._held) < _CONNECTIONS
        self.engine.dispose()

    def after_fork_in_parent(self) -> None:
        """Go on."""
        while self._held:
            self._free.put(self._held.pop())

    def after_fork_in_child(self) -> None:
        """Forget every connection without closing it: they are the parent process's."""
        _parents.append((self.engine.pool, self._idle))
        self._idle = []
        self.engine.dispose(close=False)
        self._free = _permits()
        self._held = []


def _close(connection: Any) -> None:
    connection.close()


class _Shared:
    """An engine of one loop, closed when no command is under way: a connection that came back later would stay open.

    One of ours keeps its connections at hand, as `SyncLink` does; of a ready-made one (`keeps` is False) the pool has them.
    """

    def __init__(self, engine: AsyncEngine, *, keeps: bool) -> None:
        self.engine = engine
        self._keeps = keeps
        self._idle: list[AsyncConnection] = []
        self._free = asyncio.Semaphore(_CONNECTIONS)
        self._commands = 0
        self._nobody = asyncio.Event()
        self._nobody.set()

    async def run(self, work: Callable[[Connection], R]) -> R:
        """What `work` returns, on a connection."""
        self._commands += 1
        self._nobody.clear()
        try:
            if self._keeps:
                async with self._free:
                    return await self._on_kept(work)
            async with self.engine.connect() as connection:
                return await connection.run_sync(work)
        finally:
            self._commands -= 1
            if not self._commands:
                self._nobody.set()

    async def _on_kept(self, work: Callable[[Connection], R]) -> R:
        connection = self._idle.pop() if self._idle else await self.engine.connect()
        try:
            result = await connection.run_sync(work)
        except BaseException as error:
            await _close_shielded(connection)
            if getattr(error, "connection_invalidated", False):
                await self._close_idle()
            raise
        self._idle.append(connection)
        return result

    async def _close_idle(self) -> None:
        while self._idle:
            await _close_shielded(self._idle.pop())

    async def dispose(self) -> None:
        """Close the connections."""
        await self._nobody.wait()
        await self._close_idle()
        await self.engine.dispose()


async def _close_shielded(connection: AsyncConnection) -> None:
    await asyncio.shield(asyncio.ensure_future(connection.close()))


class AsyncLink:
    """Runs statements on the event loop; `timeout`: what engines are made with, None: `source` is a ready-made one."""

    waiter = TaskWaiter

    def __init__(
        self,
        source: AsyncEngine | Callable[[], AsyncEngine],
        timeout: float | None,
        guard: _ForkGuard,
        *,
        is_sqlite: bool,
    ) -> None:
        self._timeout = timeout
        self._guard = guard
        self._is_sqlite = is_sqlite
        self._engines: _Shared | PerLoop[_Shared]
        if isinstance(source, AsyncEngine):
            self._engines = _Shared(source, keeps=False)
        else:
            self._engines = PerLoop(lambda: _Shared(source(), keeps=True), _Shared.dispose)
        _links.add(self)

    async def run(self, work: Callable[[Connection], R], deadline: float) -> R:
        """`work` on a connection, given up at monotonic `deadline`."""
        self._guard.check()
        if not self._is_sqlite:
            return await self._run(work, deadline)
        # A statement that is cancelled in aiosqlite's thread leaves a task behind; it is short, so it is waited for.
        task = asyncio.ensure_future(self._run(work, deadline))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            while not task.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([task])
            if not task.cancelled():
                task.exception()  # the cancellation is what the caller is told
            raise

    async def _run(self, work: Callable[[Connection], R], deadline: float) -> R:
        shared = await self._engines.get() if isinstance(self._engines, PerLoop) else self._engines
        async with asyncio.timeout(max(0.0, deadline - time.monotonic()) + _GRACE):
            return await shared.run(lambda connection: _guarded(connection, work, deadline, self._timeout))

    async def sleep(self, pause: float) -> None:
        """Let `pause` seconds pass."""
        await asyncio.sleep(pause)

    async def aclose(self) -> None:
        """Close what the running loop has open of engines of ours."""
        if isinstance(self._engines, PerLoop):
            await self._engines.aclose()

    def before_fork(self) -> None:
        """Note whether a loop of this process has the file open: nobody but that loop can close it."""
        self._guard.open |= self._is_sqlite and isinstance(self._engines, PerLoop) and self._engines.in_use()

    def after_fork_in_parent(self) -> None:
        """Go on."""

    def after_fork_in_child(self) -> None:
        """As SyncLink does; engines of ours are forgotten by PerLoop."""
        if isinstance(self._engines, _Shared):
            _parents.append(self._engines.engine.pool)
            self._engines.engine.sync_engine.dispose(close=False)


def links_of(database: "str | Engine | AsyncEngine", timeout: float) -> tuple[str, "dict[str, SyncLink | AsyncLink]"]:
    """The dialect of a database and its links by colour, "sync" and "async".

    Raises:
        TypeError, ValueError: it is no database, or none that we serve.
        ImportError: the driver is not installed.
    """
    guard = _ForkGuard()
    links: dict[str, SyncLink | AsyncLink]
    if isinstance(database, str):
        sync_url, async_url = twins(database)
        _refuse_unknown_options(async_url if async_url.get_driver_name() == "asyncpg" else sync_url)
        dialect = sync_url.get_backend_name()
        links = {
            "sync": SyncLink(_engine(sync_url, timeout), timeout, guard),
            "async": AsyncLink(
                lambda: _async_engine(async_url, timeout), timeout, guard, is_sqlite=dialect == "sqlite"
            ),
        }
    elif isinstance(database, (Engine, AsyncEngine)):
        given = database.execution_options(isolation_level="AUTOCOMMIT")
        dialect = database.dialect.name
        if isinstance(given, AsyncEngine):
            links = {"async": AsyncLink(given, None, guard, is_sqlite=dialect == "sqlite")}
        else:
            links = {"sync": SyncLink(given, None, guard)}
    else:
        raise TypeError(f"SQLBackend takes a URL, an Engine or an AsyncEngine, not {database!r}")
    if dialect not in DIALECTS:
        raise ValueError(f"no SQL backend for {dialect}; there are {', '.join(DIALECTS)}")
    return dialect, links


_GRACE = 0.2
"""Seconds after a command's deadline at which its task is cancelled, if shutting the socket has not ended it."""

_watchdog = Watchdog()
_links: "weakref.WeakSet[SyncLink | AsyncLink]" = weakref.WeakSet()
_parents: list[Any] = []
"""Pools of a parent process, kept from being finalized here: that could write to the parent's sockets and files."""


def _before_fork() -> None:
    for link in list(_links):
        link.before_fork()


def _after_fork_in_parent() -> None:
    for link in list(_links):
        link.after_fork_in_parent()
        link._guard.open = False


def _after_fork_in_child() -> None:
    for link in list(_links):
        link._guard.torn |= link._guard.open
        link.after_fork_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
