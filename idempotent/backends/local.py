"""Records in this process's memory: `local://`.

Settled records live in a cachetools cache with each record's own ttl, bounded in number. Running and unknown ones
live apart, so that no amount of traffic evicts a claim. One lock, no I/O; the clock is the process's monotonic one.
"""

import os
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable

from cachetools import TLRUCache

from idempotent import _machine as machine
from idempotent._record import (
    ATTEMPT_BYTES,
    SETTLED,
    Answer,
    Claim,
    Granted,
    Record,
    RecordId,
    Row,
    State,
    StateName,
    describe,
    standing,
)
from idempotent._signals import Signals, TaskWaiter, ThreadWaiter
from idempotent.backends.base import Backend, Finder, micros

__all__ = ["LocalBackend"]


def _monotonic_micros() -> int:
    return time.monotonic_ns() // 1000


_EXPIRED = State.EXPIRED


class _Store:
    """The rows, under one lock; both colours of a LocalBackend look at the same store."""

    def __init__(self, maxsize: int, clock: Callable[[], int]) -> None:
        self.clock = clock
        self.last_token = 0
        self.open: dict[str, Row] = {}
        self.sweep_at = 1024
        self.settled: TLRUCache[str, Row] = TLRUCache(
            maxsize, ttu=lambda _key, row, _now: (row.expires or 0) + row.lease, timer=clock
        )
        self.signals = Signals()
        self.reset()
        _stores.add(self)

    def reset(self) -> None:
        # What another process runs is not running here, and its lock may be held by a thread that was not copied.
        self.lock = threading.Lock()
        self.open.clear()

    def find(self, key: str) -> Row | None:
        row = self.open.get(key)
        if row is None:
            try:
                return self.settled[key]  # its `get` looks three times
            except KeyError:
                return None
        return row

    def look(self, key: str, fingerprint: bytes) -> tuple[Row, int] | None:
        """As `finder` of the contract says."""
        with self.lock:
            try:
                row = self.settled[key]
            except KeyError:
                return None
        stored, now = row.fingerprint, self.clock()
        if row.state is _EXPIRED or (row.lease and row.expires is not None and row.expires <= now):
            return None
        return None if stored != fingerprint and stored and fingerprint else (row, now)

    def put(self, key: str, row: Row | None) -> None:
        if row is None:
            return
        if row.state in SETTLED:
            self.open.pop(key, None)
            self.settled[key] = row
            return
        self.settled.pop(key, None)
        self.open[key] = row
        if len(self.open) > self.sweep_at:  # of tombstones, and of calls that were thrown away
            self.sweep(len(self.open))
            self.sweep_at = max(1024, 2 * len(self.open))

    def sweep(self, limit: int) -> int:
        """Drop up to `limit` open rows past their retention; how many there were."""
        now = self.clock()
        over = [key for key, row in self.open.items() if row.expires is not None and row.expires <= now][:limit]
        for key in over:
            del self.open[key]
        return len(over)

    def cut(self, limit: int) -> int:
        """Drop the bodies of up to `limit` expired rows whose keys are remembered; how many there were."""
        now = self.clock()
        over = [
            (key, row)
            for key, row in [*self.settled.items()]
            if row.lease and row.expires is not None and row.expires <= now
        ][:limit]
        for key, row in over:
            self.put(key, standing(row, now))
        return len(over)

    def new_token(self, token: int) -> int:
        """`token`, or the next one that was never granted: the record that had it last may be gone."""
        self.last_token = max(token, self.last_token + 1)
        return self.last_token


class LocalBackend(Backend):
    """A bounded in-process store, for tests and for duplicates that meet within one process.

    Args:
        maxsize: how many settled records are kept; the least recently used make room. Running and unknown records are
            not counted and never evicted.
        clock: the time in whole microseconds; None: the monotonic clock. Tests give a virtual one.

    A forked child starts with the settled records of its parent and holds nothing that runs.
    """

    name = "local"

    def __init__(self, maxsize: int = 65_536, *, clock: Callable[[], int] | None = None) -> None:
        if maxsize < 1:
            raise ValueError(f"maxsize must be at least 1, not {maxsize}")
        self._store = _Store(maxsize, clock or _monotonic_micros)
        self._waiter: type[ThreadWaiter | TaskWaiter] = ThreadWaiter
        self._twin: LocalBackend | None = None

    def blocking(self) -> Backend:
        return self

    def asynchronous(self) -> Backend:
        if self._waiter is TaskWaiter:
            return self
        if self._twin is None:
            twin = object.__new__(LocalBackend)
            twin._store, twin._waiter, twin._twin = self._store, TaskWaiter, self
            self._twin = twin
        return self._twin

    def finder(self) -> Finder:
        return self._store.look

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
        owner: bytes = b"",
    ) -> Claim:
        store = self._store
        with store.lock:
            now = store.clock()
            ask = machine.Ask(
                attempt,
                fingerprint,
                micros(lease),
                None if keep is None else micros(keep),
                takeover,
                over,
                owner,
            )
            reply, row = machine.on_claim(store.find(rid.text), ask, now)
            if row is not None and isinstance(reply, Granted):
                token = store.new_token(row.token)
                reply, row = reply._replace(token=token), row._replace(token=token)
            store.put(rid.text, row)
        return reply

    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        store = self._store
        with store.lock:
            answer, row = machine.on_renew(store.find(rid.text), attempt, token, micros(lease), store.clock())
            store.put(rid.text, row)
        return answer

    async def complete(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        return self._settle(rid, State.COMPLETED, attempt, token, codec, body, ttl, remember)

    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        return self._settle(rid, State.FAILED, attempt, token, codec, body, ttl)

    def _settle(
        self,
        rid: RecordId,
        state: State,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        store = self._store
        with store.lock:
            now = store.clock()
            past = micros(remember) if remember else 0
            settled = Row(state, token, attempt, b"", now, past, 0, now + micros(ttl), codec, body)
            answer, row = machine.on_settle(store.find(rid.text), attempt, token, settled, now)
            store.put(rid.text, row)
        store.signals.notify(rid.text)
        return answer

    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        store = self._store
        with store.lock:
            answer, row = machine.on_release(store.find(rid.text), attempt, token, store.clock(), unknown=unknown)
            store.put(rid.text, row)
        store.signals.notify(rid.text)
        return answer

    async def read(self, rid: RecordId) -> Record | None:
        store = self._store
        with store.lock:
            row = store.find(rid.text)
            return None if row is None else describe(rid, row, store.clock())

    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        store = self._store
        with store.lock:
            row = store.find(rid.text)
            now = store.clock()
            found, row = machine.on_forget(row, os.urandom(ATTEMPT_BYTES), now, force=force)
            store.put(rid.text, row)
        store.signals.notify(rid.text)
        return None if found is None else describe(rid, found, now)

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        store = self._store
        waiter = self._waiter()
        store.signals.add(rid.text, waiter)
        try:
            with store.lock:
                row = store.find(rid.text)
            if row is not None and row.state is State.RUNNING and row.token == token:
                await waiter.wait(timeout)
        finally:
            store.signals.discard(rid.text, waiter)

    async def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        store = self._store
        with store.lock:
            now = store.clock()
            rows = [*store.open.items(), *store.settled.items()]
        for text, row in rows:
            rid = RecordId.parse(text)
            record = describe(rid, row, now)
            if (
                record is not None
                and rid.space == "c"
                and state in (None, record.state)
                and namespace in (None, rid.namespace)
            ):
                yield record

    async def purge(self, limit: int = 1000) -> int:
        store = self._store
        with store.lock:
            store.settled.expire()
            swept = store.sweep(limit)
            return swept + store.cut(limit - swept)


_stores: weakref.WeakSet[_Store] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_stores):
        store.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
