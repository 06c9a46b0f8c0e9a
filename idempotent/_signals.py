"""Waiting for a key to change, in this process: threads and tasks of any event loop alike.

A waiter registers before it looks, so that no change between the look and the wait is lost.
"""

import os
import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future

__all__ = ["Signals", "TaskWaiter", "ThreadWaiter"]


class ThreadWaiter:
    """One wait of one thread."""

    __slots__ = ("_gate", "_woken")

    def __init__(self) -> None:
        self._gate = threading.Lock()  # no Event: the collector may wake it in the midst of its own wait
        self._gate.acquire()
        self._woken = False

    @property
    def is_woken(self) -> bool:
        """Whether `wake` was called."""
        return self._woken

    def wake(self) -> None:
        """End the wait. Any thread may call it, any number of times."""
        self._woken = True
        try:
            self._gate.release()
        except RuntimeError:  # it is open
            pass

    async def wait(self, timeout: float | None) -> bool:
        """Block the thread until `wake`, at most `timeout` seconds (None: no limit). Never suspends."""
        if not self._woken:
            self._gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        return self._woken


class TaskWaiter:
    """One wait of one task, on the loop that runs it."""

    __slots__ = ("_future", "_loop", "_woken")

    def __init__(self) -> None:
        from asyncio import get_running_loop

        self._loop: AbstractEventLoop = get_running_loop()
        self._future: Future[None] = self._loop.create_future()
        self._woken = False

    def wake(self) -> None:
        """End the wait. Any thread may call it, any number of times."""
        try:
            self._loop.call_soon_threadsafe(self._wake)
        except RuntimeError:  # the loop is closed: nobody waits there any more
            pass

    def _wake(self) -> None:
        self._woken = True
        self._end()

    def _end(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self, timeout: float | None) -> bool:
        """Suspend the task until `wake`, at most `timeout` seconds (None: no limit). May be called again."""
        if not self._woken:
            if self._future.done():
                self._future = self._loop.create_future()
            handle = None if timeout is None else self._loop.call_later(timeout, self._end)
            try:
                await self._future
            finally:
                if handle is not None:
                    handle.cancel()
        return self._woken


Waiter = ThreadWaiter | TaskWaiter


class Signals:
    """Waiters by key. `notify` wakes all who wait for a key."""

    __slots__ = ("__weakref__", "_lock", "_waiters")

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the collector may end a lost task's wait while this thread holds it
        self._waiters: dict[str, set[Waiter]] = {}
        _all.add(self)

    def add(self, key: str, waiter: Waiter) -> None:
        """Register `waiter`: from now on no change of `key` is missed."""
        with self._lock:
            self._waiters.setdefault(key, set()).add(waiter)

    def discard(self, key: str, waiter: Waiter) -> None:
        """Take `waiter` off the list. May be called twice."""
        with self._lock:
            waiters = self._waiters.get(key)
            if waiters is not None:
                waiters.discard(waiter)
                if not waiters:
                    del self._waiters[key]

    def notify(self, key: str) -> None:
        """Wake everyone who waits for `key`."""
        if key in self._waiters:
            with self._lock:
                waiters = list(self._waiters.get(key, ()))
            for waiter in waiters:
                waiter.wake()

    def notify_all(self) -> None:
        """Wake everyone: whoever could have told them of changes may have missed some."""
        with self._lock:
            waiters = [waiter for waiters in self._waiters.values() for waiter in waiters]
        for waiter in waiters:
            waiter.wake()

    def reset(self) -> None:
        """Forget all waiters: they are threads of the parent process."""
        self._lock = threading.RLock()  # the collector may end a lost task's wait while this thread holds it
        self._waiters = {}


_all: weakref.WeakSet[Signals] = weakref.WeakSet()


def _after_fork() -> None:
    for signals in list(_all):
        signals.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
