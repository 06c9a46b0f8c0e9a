"""The async driver: flows on the running event loop, heartbeats as timers of that loop."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from idempotent import _steps as steps
from idempotent._drive import Beating, drive
from idempotent._flow import renew
from idempotent._run import Call, Run
from idempotent._signals import TaskWaiter
from idempotent.errors import CallError

__all__ = ["ASYNC", "AsyncDriver", "finish"]

R = TypeVar("R")
B = TypeVar("B", bound=Beating)


async def finish(flow: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Run a closing flow to its end. Cancelled midway, it is run once more where cancellation does not reach it.

    Every step is idempotent, so running it again is safe, and a call that is not cancelled pays for no task.
    """
    try:
        return await flow()
    except asyncio.CancelledError:
        again = asyncio.ensure_future(flow())
        while not again.done():
            try:
                await asyncio.wait([again])
            except asyncio.CancelledError:
                continue
        again.exception()  # the cancellation is what the caller is told
        raise


class _Beats(Generic[B]):
    """The heartbeat of one run: a timer, and while a renewal is under way its task."""

    __slots__ = ("_driver", "_loop", "_run", "_task", "_timer")

    def __init__(self, driver: "AsyncDriver[B]", run: B) -> None:
        self._driver = driver
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(run.plan.lease / 3, self._start)

    def _start(self) -> None:
        self._task = self._loop.create_task(self._renew())

    async def _renew(self) -> None:
        pause: float | None = self._run.plan.lease / 3
        try:
            pause = await self._driver.renew(self._driver, self._run)
        except Exception as error:  # a faulty backend must not end the renewals
            self._run.report("backend_error", error=error)
        if pause is not None and self._timer is not None:
            self._timer = self._loop.call_later(pause, self._start)

    def drop(self) -> None:
        """No further beats. A renewal that is under way goes on."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def still(self) -> None:
        """No further beats, and none under way."""
        if self._loop is not asyncio.get_running_loop():
            with contextlib.suppress(RuntimeError):  # closed, and its timers with it
                self._loop.call_soon_threadsafe(self.drop)
            return
        self.drop()
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])


class AsyncDriver(Generic[B]):
    """Waits by suspending the task. `renew` is the flow of one beat."""

    now = staticmethod(time.monotonic)

    def __init__(self, renew: "Callable[[AsyncDriver[B], B], Coroutine[Any, Any, float | None]]") -> None:
        self.renew = renew

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def waiter(self) -> TaskWaiter:
        return TaskWaiter()

    def expect(self, run: B) -> None:
        """Nothing has to be made ready."""

    def beat(self, run: B) -> None:
        run.beating = _Beats(self, run)

    async def still(self, run: B) -> None:
        beats = run.beating
        if beats is not None:
            await beats.still()
            run.beating = None

    def drop(self, run: B) -> None:
        """End the beats without waiting: the coroutine is being closed and cannot."""
        if run.beating is not None:
            run.beating.drop()


class CallDriver(AsyncDriver[Run]):
    """The driver of async functions' calls."""

    def step(
        self, call: Call, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """As Call.step. The step's place is the one in which it is asked for, whenever it is awaited."""
        if steps.is_async(function):
            return self._step(steps.Step(call, name, function, args, kwargs), function, args, kwargs)
        if asyncio._get_running_loop() is not None:
            raise TypeError(f"the step {name!r} is no async function; in an async function steps are awaited")
        return self._step_of_thread(steps.Step(call, name, function, args, kwargs), function, args, kwargs)

    async def _step(
        self, step: steps.Step, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        with step.under_way():
            try:
                replay = await steps.begin(self, step)
                if replay is not None:
                    return replay.value
                with step:
                    value = await function(*args, **kwargs)
            except GeneratorExit:  # the coroutine is thrown away and can await nothing
                raise
            except BaseException as error:
                await finish(functools.partial(steps.drop, self, step, error))
                raise
            return await finish(functools.partial(steps.settle, self, step, value))

    def _step_of_thread(
        self, step: steps.Step, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A step of sync code that an async call runs in a thread: the function here, the flows on the call's loop."""
        with step.under_way():
            beats: _Beats[Run] | None = step.parent.beating

            def wait(flow: Coroutine[Any, Any, R]) -> R:
                if beats is None:  # nothing is recorded, and nothing sent
                    return drive(flow)
                try:
                    return asyncio.run_coroutine_threadsafe(flow, beats._loop).result()
                except RuntimeError as error:
                    if not beats._loop.is_closed():
                        raise
                    flow.close()
                    raise CallError(f"the step {step.name!r} comes too late: the loop of its call is closed") from error

            try:
                replay = wait(steps.begin(self, step))
                if replay is not None:
                    return replay.value
                with step:
                    value = steps.awaited_nowhere(step, function(*args, **kwargs))
            except BaseException as error:
                with contextlib.suppress(CallError):
                    wait(finish(functools.partial(steps.drop, self, step, error)))
                raise
            return wait(finish(functools.partial(steps.settle, self, step, value)))


ASYNC = CallDriver(renew)
