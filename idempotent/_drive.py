"""The sync driver: flows on the calling thread, and one heartbeat thread for each backend."""

import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from idempotent._flow import Run, renew
from idempotent._signals import ThreadWaiter
from idempotent.backends.base import Backend
from idempotent.errors import BackendError

__all__ = ["SYNC", "SyncDriver", "drive", "finish"]

R = TypeVar("R")

_LINGER = 0.5
"""Seconds the heartbeat thread sleeps at the longest, and so how long it outlives the last run."""


def drive(flow: Coroutine[Any, Any, R]) -> R:
    """Run a flow whose backend never suspends, on this thread, at once."""
    try:
        flow.send(None)
    except StopIteration as stop:
        result: R = stop.value
        return result
    flow.close()
    raise BackendError(
        "this backend (or probe) suspends, so it cannot serve a sync function; give its blocking twin, or a URL"
    )


def finish(flow: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Run a closing flow to its end. Interrupted by Ctrl-C, it is run once more and the interruption goes on after."""
    try:
        return drive(flow())
    except KeyboardInterrupt:
        drive(flow())
        raise


class Heart(Generic[R]):
    """The heartbeat thread of one backend: started by the first run, gone soon after the last.

    One thread for each backend, so that a frozen server does not hold up the leases of another.
    """

    def __init__(self) -> None:
        self._reset()
        _hearts.add(self)

    def _reset(self) -> None:
        self._changed = threading.Condition()
        self._due: dict[Run, float] = {}
        self._under_way: Run | None = None
        self._thread: threading.Thread | None = None
        self._wakes = 0.0

    def add(self, run: Run, due: float) -> None:
        """Renew `run` at `due` (monotonic seconds), and on."""
        with self._changed:
            self._due[run] = due
            if self._thread is None:
                self._thread = threading.Thread(target=self._beat, name="idempotent-heartbeat", daemon=True)
                self._thread.start()
            elif due < self._wakes:
                self._changed.notify_all()

    def discard(self, run: Run) -> None:
        """Never renew `run` again; returns when a renewal that is under way has ended."""
        with self._changed:
            self._due.pop(run, None)
            while self._under_way is run:
                self._changed.wait()

    def _beat(self) -> None:
        while True:
            with self._changed:
                if not self._due:
                    self._thread = None
                    return
                now = time.monotonic()
                run, due = min(self._due.items(), key=lambda item: item[1])
                if due > now:
                    self._wakes = min(due, now + _LINGER)
                    self._changed.wait(self._wakes - now)
                    continue
                self._under_way = run
            pause: float | None = run.plan.lease / 3
            try:
                pause = drive(renew(SYNC, run))
            except Exception as error:  # a faulty backend must not end the other runs' renewals
                run.report("backend_error", error=error)
            finally:
                with self._changed:
                    self._under_way = None
                    if run in self._due:
                        if pause is None:
                            del self._due[run]
                        else:
                            self._due[run] = time.monotonic() + pause
                    self._changed.notify_all()


_hearts: weakref.WeakSet[Heart[Any]] = weakref.WeakSet()
_heart_of: weakref.WeakKeyDictionary[Backend, Heart[Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class SyncDriver:
    """Waits by blocking the calling thread; never suspends."""

    now = staticmethod(time.monotonic)

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def waiter(self) -> ThreadWaiter:
        return ThreadWaiter()

    def beat(self, run: Run) -> None:
        backend = run.plan.backend
        heart = _heart_of.get(backend)
        if heart is None:
            with _lock:
                heart = _heart_of.setdefault(backend, Heart())
        run.beating = heart
        heart.add(run, time.monotonic() + run.plan.lease / 3)

    async def still(self, run: Run) -> None:
        heart, run.beating = run.beating, None
        if heart is not None:
            heart.discard(run)


SYNC = SyncDriver()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for heart in list(_hearts):
        heart._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
