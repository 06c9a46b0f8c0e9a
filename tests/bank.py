"""A database of its own with a ledger, and transactions on it, in either colour: what tests of `within=` work on."""

import asyncio
import contextlib
import functools
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from colours import Colour
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from idempotent import idempotent


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """One effect."""

    __tablename__ = "ledger"
    id: Mapped[int] = mapped_column(primary_key=True)
    account: Mapped[str] = mapped_column(sa.String(40))
    amount: Mapped[int]


DRIVERS = {
    "sqlite": ("sqlite", "sqlite+aiosqlite"),
    "postgres": ("postgresql+psycopg", "postgresql+psycopg"),
    "asyncpg": (None, "postgresql+asyncpg"),
    "mariadb": ("mariadb+pymysql", "mariadb+aiomysql"),
}


class Bank:
    """The database; `url` is that of its server, `name` what is ours there."""

    def __init__(self, kind: str, colour: Colour, url: str, name: str) -> None:
        self.kind, self.colour, self.name = kind, colour, name
        self.is_async = colour.is_async
        driver = DRIVERS[kind][self.is_async]
        assert driver is not None
        self.url = sa.make_url(url).set(drivername=driver)
        arguments: dict[str, Any] = {}
        if kind == "mariadb":
            self.url = self.url.set(database=name)
        elif kind == "postgres":
            arguments = {"options": f"-csearch_path={name}"}
        elif kind == "asyncpg":
            arguments = {"server_settings": {"search_path": name}}
        self.arguments = arguments
        self.sync = self.make(asynchronous=False)
        """A sync engine, to look and to prepare."""
        self.engine = self.make()
        self.beside: Any = sa.create_engine(self.sync.url, connect_args=self._sync_arguments())

    def _sync_arguments(self) -> dict[str, Any]:
        return {"options": f"-csearch_path={self.name}"} if self.kind == "asyncpg" else self.arguments

    def make(self, *, asynchronous: bool | None = None, **options: Any) -> Any:
        """An engine; without a pool, as each transaction of an async test has a loop of its own."""
        asynchronous = self.is_async if asynchronous is None else asynchronous
        if not options.keys() & {"pool_size", "poolclass"}:
            options["poolclass"] = sa.NullPool
        if asynchronous:
            url = self.url.set(drivername=DRIVERS[self.kind][1])
            return create_async_engine(url, connect_args=self.arguments, **options)
        url = self.url.set(drivername=DRIVERS["postgres" if self.kind == "asyncpg" else self.kind][0])
        return sa.create_engine(url, connect_args=self._sync_arguments(), **options)

    def entries(self, account: str | None = None) -> int:
        """How many effects there are."""
        with self.sync.connect() as connection:
            found = sa.select(sa.func.count()).select_from(Entry)
            return int(
                connection.execute(found if account is None else found.where(Entry.account == account)).scalar_one()
            )

    def records(self) -> list[str]:
        """The states of the records that count: no tombstones."""
        with self.sync.connect() as connection:
            if "idempotent_records" not in sa.inspect(connection).get_table_names():
                return []
            rows = connection.execute(sa.text("SELECT state FROM idempotent_records WHERE state <> 'W'"))
            return sorted(rows.scalars())

    def define(self, body: Callable[..., Any], **options: Any) -> Any:
        """`body`, on a sync session, decorated in the bank's colour."""
        options = {"within": "session", **options}
        if not self.is_async:
            return idempotent(**options)(body)

        @functools.wraps(body)
        async def twin(session: Any, *args: Any, **kwargs: Any) -> Any:
            return await session.run_sync(body, *args, **kwargs)

        return idempotent(**options)(twin)

    @contextlib.contextmanager
    def transaction(self, **options: Any) -> "Iterator[Transaction]":
        """One that is rolled back at the end, unless it is committed."""
        transaction = Transaction(self, **options)
        try:
            yield transaction
        finally:
            transaction.close()

    def commit(self, function: Any, *args: Any, **options: Any) -> Any:
        """Call in a transaction of its own, and commit it."""
        with self.transaction(**options) as transaction:
            result = transaction.call(function, *args)
            transaction.commit()
            return result


class Transaction:
    """A session, or with `plain` a connection, of the bank's colour."""

    def __init__(
        self, bank: Bank, *, plain: bool = False, engine: Any = None, runner: Any = None, **options: Any
    ) -> None:
        """`engine`: another than the bank's, or a connection to join, with the `runner` that it lives in."""
        self.bank, self.plain, self.options = bank, plain, options
        self.engine = engine or bank.engine
        self.joined = runner is not None
        self.runner = runner or (asyncio.Runner() if bank.is_async else None)
        self.subject: Any = self.run(self._open)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function`, a coroutine function in an async bank, where the transaction lives."""
        if self.runner is None:
            return function(*args)

        async def main() -> Any:
            found = function(*args)
            return await found if asyncio.iscoroutine(found) else found

        return self.runner.run(main())

    def _open(self) -> Any:
        if not self.plain:
            return (AsyncSession if self.bank.is_async else Session)(self.engine, **self.options)
        return self.engine.connect() if not self.bank.is_async else self._connect()

    async def _connect(self) -> AsyncConnection:
        return await self.engine.connect()

    def call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """A decorated function, or a method of it, with this session."""
        return self.run(functools.partial(function, self.subject, *args, **kwargs))

    def do(self, work: Callable[[Any], Any]) -> Any:
        """`work` on the sync session inside."""
        if not self.bank.is_async:
            return work(self.subject)
        return self.run(self.subject.run_sync, work)

    def start(self, function: Any, *args: Any, commit: bool = False) -> "Future[Any]":
        """Call in the background, and commit if asked to."""
        future: Future[Any] = Future()

        def work() -> None:
            try:
                result = self.call(function, *args)
                if commit:
                    self.commit()
                future.set_result(result)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def commit(self) -> None:
        self.run(self.subject.commit)

    def rollback(self) -> None:
        self.run(self.subject.rollback)

    def close(self) -> None:
        try:
            self.run(self.subject.close)
        finally:
            if self.runner is not None and not self.joined:
                self.runner.close()


@contextlib.contextmanager
def bank_of(kind: str, colour: Colour, url: str) -> Iterator[Bank]:
    """A bank on a server, or in a file; it is dropped in the end."""
    name = "b_" + secrets.token_hex(6)
    server = "postgres" if kind == "asyncpg" else kind
    make, drop = {
        "sqlite": ("", ""),
        "postgres": (f"CREATE SCHEMA {name}", f"DROP SCHEMA {name} CASCADE"),
        "mariadb": (f"CREATE DATABASE {name}", f"DROP DATABASE {name}"),
    }[server]
    outside = sa.create_engine(
        sa.make_url(url).set(drivername=DRIVERS[server][0]), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool
    )
    if make:
        with outside.connect() as connection:
            connection.execute(sa.text(make))
    bank = Bank(kind, colour, url, name)
    try:
        Base.metadata.create_all(bank.sync)
        yield bank
    finally:
        if drop:
            with outside.connect() as connection:
                if server == "postgres":
                    connection.execute(sa.text("SET lock_timeout = '10s'"))
                else:
                    connection.execute(sa.text("SET lock_wait_timeout = 10"))
                connection.execute(sa.text(drop))


def url_of(kind: str, request: Any, tmp_path: Path) -> str:
    """The URL of the server, or of a file."""
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/bank.db"
    return str(request.getfixturevalue("postgres_server" if kind == "asyncpg" else f"{kind}_server").url)


BANKS = [
    (kind, colour)
    for kind in ("sqlite", "postgres", "mariadb", "asyncpg")
    for colour in ("sync", "async")
    if (kind, colour) != ("asyncpg", "sync")
]
