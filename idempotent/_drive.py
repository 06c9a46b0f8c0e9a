"""The sync driver: flows on the calling thread, and heartbeat threads for each backend."""

import contextlib
import functools
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from typing import Any, Generic, Protocol, TypeVar

from idempotent._flow import renew
from idempotent._run import Call, Run
from idempotent._signals import ThreadWaiter
from idempotent.backends.base import Backend
from idempotent.errors import BackendError, IdempotencyError
from idempotent.events import EventName

__all__ = ["SYNC", "Beating", "SyncDriver", "drive", "finish"]

R = TypeVar("R")


class Pace(Protocol):
    """What a heartbeat needs of a plan."""

    @property
    def lease(self) -> float: ...
    @property
    def backend(self) -> Backend: ...


class Beating(Protocol):
    """What a heartbeat keeps alive: a run, or a lock's hold."""

    beating: Any

    @property
    def plan(self) -> Pace: ...
    def report(self, name: EventName, *, error: BaseException | None = None) -> None: ...


B = TypeVar("B", bound=Beating)

_LINGER = 2.0
"""Seconds a heartbeat thread sleeps at the longest, and so how long it outlives the last run."""
_BEATING = 8
"""The most heartbeat threads of one backend."""


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


def finish(flow: Callable[[], Coroutine[Any, Any, R]]) -> None:
    """Run a closing flow to its end while an exception is on its way out.

    What a signal handler raises into it (Ctrl-C, SystemExit, a task's time limit) goes on after the flow was run once
    more: every step of it is idempotent.
    """
    try:
        drive(flow())
    except IdempotencyError:
        pass
    except BaseException:
        with contextlib.suppress(IdempotencyError):
            drive(flow())
        raise


class Heart(Generic[B]):
    """The heartbeat threads of one backend: started by the first run, gone soon after the last.

    Those of one backend, so that a frozen server does not hold up the leases of another; more than one, so that a slow
    renewal does not hold up the next.
    """

    def __init__(self, renew: Callable[[B], Coroutine[Any, Any, float | None]]) -> None:
        self._flow = renew
        self._reset()
        _hearts.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._due: dict[B, float] = {}
        self._under_way: set[B] = set()
        self._threads = 0
        self._waits = False
        """One of the threads waits for the next renewal to be due."""
        self._spare = 0
        """So many threads are idle."""
        self._wakes = 0.0
        self._added = 0
        self._starting = 0
        """So many threads have not yet come to work."""

    def add(self, run: B, due: float) -> None:
        """Renew `run` at `due` (monotonic seconds), and on. Raises RuntimeError if no thread can be started."""
        with self._lock:
            if not self._threads:
                self._start()
            elif not self._waits and not self._spare and not self._starting:
                self._try_start()
            self._added += 1
            self._schedule(run, due)

    def discard(self, run: B) -> None:
        """Never renew `run` again; returns when a renewal that is under way has ended."""
        with self._lock:
            self._due.pop(run, None)
            while run in self._under_way:
                self._changed.wait()
            self._due.pop(run, None)

    def _schedule(self, run: B, due: float) -> None:
        self._due[run] = due
        if due < self._wakes:
            self._changed.notify_all()

    def _start(self) -> None:
        threading.Thread(target=self._beat, name="idempotent-heartbeat", daemon=True).start()
        self._threads += 1
        self._starting += 1

    def _try_start(self) -> None:
        if self._threads < _BEATING:
            with contextlib.suppress(RuntimeError):  # no more threads: the renewals take turns
                self._start()

    def _next(self) -> B | None:
        """The run to renew now; None: this thread is not needed any more."""
        while True:
            if self._waits:  # be at hand for when that one has to work
                self._spare += 1
                called = self._changed.wait(_LINGER)
                self._spare -= 1
                if self._waits and not called:
                    return None
                continue
            now = time.monotonic()
            due = min(self._due.values(), default=now + _LINGER)
            if self._due and due <= now:
                run = min(self._due, key=self._due.__getitem__)
                del self._due[run]
                self._under_way.add(run)
                return run
            added = self._added
            self._waits, self._wakes = True, min(due, now + _LINGER)
            try:
                self._changed.wait(self._wakes - now)
            finally:
                self._waits, self._wakes = False, 0.0
            if not self._due and self._added == added:
                return None

    def _beat(self) -> None:
        with self._changed:
            self._starting -= 1
            try:
                while (run := self._next()) is not None:
                    if self._spare:
                        self._changed.notify_all()
                    elif min(self._due.values(), default=math.inf) < math.inf:
                        self._try_start()
                    self._changed.release()
                    try:
                        pause = self._renew(run)
                    finally:
                        self._changed.acquire()
                        self._under_way.discard(run)
                        self._changed.notify_all()
                    if pause is not None:
                        self._schedule(run, time.monotonic() + pause)
                    del run  # a thread that waits keeps no arguments alive
            finally:
                self._threads -= 1

    def _renew(self, run: B) -> float | None:
        try:
            return drive(self._flow(run))
        except BaseException as error:  # a faulty backend or hook must not end the other runs' renewals
            run.report("backend_error", error=error)
            return run.plan.lease / 3


_hearts: "weakref.WeakSet[Heart[Any]]" = weakref.WeakSet()
_lock = threading.Lock()


class SyncDriver(Generic[B]):
    """Waits by blocking the calling thread; never suspends. `renew` is the flow of one beat."""

    now = staticmethod(time.monotonic)

    def __init__(self, renew: "Callable[[SyncDriver[B], B], Coroutine[Any, Any, float | None]]") -> None:
        self._renew = renew
        self._heart_of: weakref.WeakKeyDictionary[Backend, Heart[B]] = weakref.WeakKeyDictionary()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def waiter(self) -> ThreadWaiter:
        return ThreadWaiter()

    def expect(self, run: B) -> None:
        """`run` waits, and may soon be to be renewed: start the thread meanwhile."""
        with contextlib.suppress(RuntimeError):  # no more threads: `beat` tells
            self._heart(run).add(run, math.inf)

    def beat(self, run: B) -> None:
        self._heart(run).add(run, time.monotonic() + run.plan.lease / 3)

    def _heart(self, run: B) -> Heart[B]:
        backend = run.plan.backend
        heart = self._heart_of.get(backend)
        if heart is None:
            with _lock:
                heart = self._heart_of.setdefault(backend, Heart(functools.partial(self._renew, self)))
        run.beating = heart
        return heart

    async def still(self, run: B) -> None:
        heart = run.beating
        if heart is not None:
            heart.discard(run)
            run.beating = None


class CallDriver(SyncDriver[Run]):
    """The driver of sync functions' calls."""

    def step(
        self, call: Call, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As Call.step."""
        from idempotent import _steps as steps

        if steps.is_async(function):
            raise TypeError(f"the step {name!r} is an async function, and a sync function cannot await it")
        step = steps.Step(call, name, function, args, kwargs)
        value: Any = steps.NOTHING
        with step.under_way():
            try:
                replay = drive(steps.begin(self, step))
                if replay is not None:
                    return replay.value
                with step:
                    found = function(*args, **kwargs)
                value = steps.awaited_nowhere(step, found)
                return drive(steps.settle(self, step, value))
            except BaseException as error:
                if value is steps.NOTHING:
                    finish(functools.partial(steps.drop, self, step, error))
                elif not isinstance(error, Exception):
                    # A signal handler raised this after the step was done: it is recorded all the same.
                    finish(functools.partial(steps.settle, self, step, value))
                raise


SYNC = CallDriver(renew)


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for heart in list(_hearts):
        heart._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
