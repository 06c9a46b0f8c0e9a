"""Counts the commands that reach a Redis server."""

import uuid
from collections import Counter
from types import TracebackType
from typing import Any, Self

import redis

__all__ = ["Monitor"]


class Monitor:
    """Counts between the beginning and the end of a `with` block, on a server that nobody else uses.

    `INFO commandstats` would count what scripts run as if clients had sent it; MONITOR tells them apart. It is read
    after the block, so that nothing but the server's writing disturbs what is measured.
    """

    def __init__(self, url: str) -> None:
        self._client: Any = redis.Redis.from_url(url)
        self.sent: Counter[str] = Counter()
        """Commands that clients sent, by name."""
        self.inside = 0
        """Commands that scripts ran inside the server."""

    def __enter__(self) -> Self:
        self._mark = f"end-{uuid.uuid4().hex}"
        self._client.ping()  # its handshake is not to be counted
        self._monitor = self._client.monitor().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._client.echo(self._mark)
                self._read()
        finally:
            self._monitor.__exit__(kind, error, trace)
            self._client.close()

    def _read(self) -> None:
        while True:
            line = self._monitor.next_command()
            if self._mark in line["command"]:
                return
            if line["client_type"] == "lua":
                self.inside += 1
            else:
                self.sent[line["command"].split(" ", 1)[0].upper()] += 1
