"""Fixtures: the servers, and a backend URL of its own for each test."""

import contextlib
import gc
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from colours import COLOURS, Colour
from locks import Kind
from probes import Counter, Gate
from servers import Address, Server, shared, start_mariadb, start_postgres, start_redis

from idempotent import _config

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: the tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Thousands of tests and what they import stay to the end: no garbage collection needs to look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=COLOURS, ids=repr)
def colour(request: pytest.FixtureRequest) -> Colour:
    """One test per colour: of sync callers and of async ones."""
    return request.param


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest, _fresh: contextlib.ExitStack) -> Iterator[Kind]:
    """One test of locks per colour."""
    kind = Kind(request.param)
    yield kind
    for loop in kind.loops:
        loop.close()


@pytest.fixture
def effects() -> Counter:
    """Counts what the function under test did."""
    return Counter()


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Holds functions inside; opened after the test at the latest."""
    gate = Gate()
    yield gate
    gate.opened.set()


@contextlib.contextmanager
def _stopped_after(server: Server | Address) -> Iterator[Server | Address]:
    yield server
    if isinstance(server, Server):
        server.stop()


@pytest.fixture(scope="session")
def redis_server() -> Iterator[Server | Address]:
    """The Redis that tests share and leave alone."""
    with _stopped_after(shared("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server | Address]:
    """The PostgreSQL that tests share and leave alone."""
    with _stopped_after(shared("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[Server | Address]:
    """The MariaDB that tests share and leave alone."""
    with _stopped_after(shared("mariadb")) as server:
        yield server


@pytest.fixture(scope="module")
def _module_redis() -> Iterator[Server]:
    # Written before each reply, so that records outlive a killed server.
    with start_redis("--appendonly yes --appendfsync no") as server:
        yield server


@pytest.fixture(scope="module")
def _module_postgres() -> Iterator[Server]:
    with start_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def _module_mariadb() -> Iterator[Server]:
    with start_mariadb() as server:
        yield server


def _healed_after(server: Server) -> Iterator[Server]:
    yield server
    server.thaw()
    server.start()


@pytest.fixture
def own_redis(_module_redis: Server) -> Iterator[Server]:
    """A Redis to freeze and kill, which keeps its records; the next test finds it healthy."""
    yield from _healed_after(_module_redis)


@pytest.fixture
def own_postgres(_module_postgres: Server) -> Iterator[Server]:
    """A PostgreSQL to freeze and kill; the next test finds it healthy."""
    yield from _healed_after(_module_postgres)


@pytest.fixture
def own_mariadb(_module_mariadb: Server) -> Iterator[Server]:
    """A MariaDB to freeze and kill; the next test finds it healthy."""
    yield from _healed_after(_module_mariadb)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[contextlib.ExitStack]:
    """After each test: close the backends that URLs opened, forget the configuration, then run the callbacks."""
    with contextlib.ExitStack() as after:
        yield after
        after.callback(_config.reset)
        for backend in list(_config._backends.values()):
            after.callback(backend.close)


@pytest.fixture(params=["local", "redis", "sqlite", "postgres", "mariadb"])
def backend_url(request: pytest.FixtureRequest, tmp_path: Path, _fresh: contextlib.ExitStack) -> str:
    """The URL of a backend that no other test sees, one test per kind."""
    return _own_url(request, tmp_path, _fresh)


@pytest.fixture(params=["redis", "sqlite", "postgres", "mariadb"])
def shared_backend_url(request: pytest.FixtureRequest, tmp_path: Path, _fresh: contextlib.ExitStack) -> str:
    """The same of the backends that several processes can share."""
    return _own_url(request, tmp_path, _fresh)


def _own_url(request: pytest.FixtureRequest, tmp_path: Path, after: contextlib.ExitStack) -> str:
    kind: str = request.param
    if kind == "local":
        return "local://"
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/idempotent.db"
    server: Server | Address = request.getfixturevalue(f"{kind}_server")
    name = ("t" if kind == "redis" else "t_") + secrets.token_hex(6)
    clean = {"redis": _delete_keys, "postgres": _drop_postgres, "mariadb": _drop_mariadb}
    after.callback(clean[kind], server.url, name)
    return f"{server.url}{'&' if '?' in server.url else '?'}{'prefix' if kind == 'redis' else 'table'}={name}"


def _delete_keys(url: str, prefix: str) -> None:
    import redis

    with contextlib.suppress(redis.RedisError), redis.Redis.from_url(url) as client:
        for key in client.scan_iter(match=f"*{prefix}*", count=1000):
            client.delete(key)


def _drop_postgres(url: str, table: str) -> None:
    import psycopg

    scheme, _, rest = url.partition("://")
    with contextlib.suppress(psycopg.Error):
        with psycopg.connect(f"{scheme.partition('+')[0]}://{rest}", connect_timeout=5) as connection:
            # Not for ever, if a worker that a test left behind still holds the table.
            connection.execute("SET lock_timeout = '5s'")
            connection.execute(f'DROP TABLE IF EXISTS "{table}"'.encode())


def _drop_mariadb(url: str, table: str) -> None:
    import pymysql

    with contextlib.suppress(pymysql.MySQLError):
        with pymysql.connect(**_mysql_options(url), connect_timeout=5) as connection, connection.cursor() as cursor:
            cursor.execute("SET lock_wait_timeout = 5")
            cursor.execute(f"DROP TABLE IF EXISTS `{table}`")


def _mysql_options(url: str) -> dict[str, Any]:
    parts = urlsplit(url)
    return {
        "host": parts.hostname,
        "port": Address(url).port,
        "user": unquote(parts.username or "root"),
        "password": unquote(parts.password or ""),
        "database": parts.path.lstrip("/"),
    }
