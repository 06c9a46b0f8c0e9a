"""The near-cache: settled records that one function has seen lately, in this process's own memory.

A settled record does not change while it lives, so a copy of it answers as well as the record does, with three limits:

- it is not kept past the record's own ttl, counted from before the backend was asked for what is left of it;
- it answers calls with its own fingerprint alone;
- `forget` must reach it. Where the backend tells of what is forgotten, a copy counts for as long as nothing can have
  been missed; where it does not, or is not heard, for one second from before the backend was asked.

What was asked of the backend before a forget and is answered after it is not kept: see `mark`.
"""

import os
import threading
import weakref
from collections.abc import Callable
from time import monotonic_ns

from cachetools import TLRUCache

from idempotent._record import Row
from idempotent.backends.base import Backend

__all__ = ["Mark", "Near"]

UNHEARD = 1_000_000
"""Microseconds for which a copy counts where nobody tells of what is forgotten."""

Mark = tuple[int, int, int]
"""What the copies' validity rests on at one moment, and that moment: microseconds of the clock."""


def _micros() -> int:
    return monotonic_ns() // 1000


class Near:
    """The copies of one function.

    Args:
        maxsize: how many there are at the most; the least recently used make room.
        backend: whose records they are of.
        clock: the time in microseconds, the same as the drivers' of its calls. None: the monotonic clock.
    """

    __slots__ = ("__weakref__", "_clock", "_drops", "_lock", "_rows", "_session")

    def __init__(self, maxsize: int, backend: Backend, clock: Callable[[], int] | None = None) -> None:
        self._clock = clock or _micros
        self._drops = 0
        self._rows: TLRUCache[str, Row] = TLRUCache(
            maxsize, ttu=lambda _key, row, _now: row.expires or 0, timer=self._clock
        )
        self._reset()
        _all.add(self)
        self._session = backend.heed(self) or (lambda: 0)  # last: from here on another thread may call `clear`

    def _reset(self) -> None:
        self._lock = threading.RLock()  # a signal handler or the collector may call while this thread holds it
        self._rows.clear()

    def find(self, text: str, fingerprint: bytes) -> tuple[Row, int] | None:
        """As a backend's `finder`: the copy and the time in microseconds."""
        with self._lock:
            try:
                row = self._rows[text]
            except KeyError:
                return None
        now = self._clock()
        if now >= row.lease_until and (not row.lease or row.lease != self._session()):
            return None
        return None if row.fingerprint != fingerprint else (row, now)

    def mark(self) -> Mark:
        """To be taken before the backend is asked for what is then to be kept."""
        return self._session(), self._drops, self._clock()

    def keep(self, mark: Mark, text: str, row: Row, until: float) -> None:
        """Keep a copy of `row` until `until` (seconds of the clock), unless something was forgotten since `mark`.

        The row's `since` is in microseconds of the clock.
        """
        session, drops, asked = mark
        expires = int(until * 1e6)
        row = row._replace(lease=session, lease_until=asked + UNHEARD, expires=expires)
        with self._lock:
            if drops == self._drops and expires > self._clock():
                self._rows[text] = row

    def clear(self) -> None:
        """Something was forgotten, here or elsewhere."""
        with self._lock:
            self._drops += 1
            self._rows.clear()


_all: weakref.WeakSet[Near] = weakref.WeakSet()


def _after_fork() -> None:
    for near in list(_all):
        near._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
