"""A backend with faults to order, for ordinary tests: a command fails, loses its reply, or hangs."""
# ruff: noqa: D102  commands are documented by the Backend contract

import copy
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, get_args

from idempotent._record import Record, RecordId
from idempotent._signals import Signals, TaskWaiter, ThreadWaiter
from idempotent.backends.base import Backend
from idempotent.errors import BackendUnavailable

__all__ = ["Command", "FaultyBackend", "Hang"]

Command = Literal["claim", "renew", "complete", "fail", "release", "read", "forget", "changed", "scan", "purge"]


class Hang:
    """Commands that hang until `release`, at the longest for their own timeout. As a context manager it releases."""

    def __init__(self) -> None:
        self.released = False
        self._reached = threading.Event()
        self._signals = Signals()

    def wait(self, timeout: float = 5.0) -> bool:
        """Block this thread until a command hangs; False if none did within `timeout` seconds."""
        return self._reached.wait(timeout)

    def release(self) -> None:
        """Let those that hang go on, and those that would. May be called twice, from any thread."""
        self.released = True
        self._signals.notify("")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    async def _holds(self, waiter: ThreadWaiter | TaskWaiter, timeout: float) -> bool:
        """Wait; whether the command's time ran out before it was released."""
        self._signals.add("", waiter)
        self._reached.set()
        try:
            return not (self.released or await waiter.wait(timeout))
        finally:
            self._signals.discard("", waiter)


@dataclass(eq=False)
class _Fault:
    commands: tuple[Command, ...]
    passing: int
    """So many commands go by unharmed first."""
    left: float
    applied: bool
    """Whether the store carries the command out all the same."""
    error: BaseException | None = None
    hang: Hang | None = None


def _sent(command: Command) -> Any:
    async def send(self: "FaultyBackend", *args: Any, **options: Any) -> Any:
        longest = options.get("timeout", options.get("lease", math.inf))
        return await self._send(command, partial(getattr(self.inner, command), *args, **options), longest)

    return send


class FaultyBackend(Backend):
    """`inner`, with the faults that a test plants in its commands.

        faulty = FaultyBackend(LocalBackend())
        faulty.refuse("claim")                    # the next claim fails, and is not applied
        faulty.lose_reply("complete", times=2)    # applied both times, and the caller cannot know
        with faulty.hang("renew") as hang:        # hangs until the block ends, at most for the command's timeout
            ...
        assert faulty.calls == ["claim", "complete"]

    A fault names one or more commands, by none it means all of them. It strikes at the `nth` of them, counted from
    now, and `times` in a row (None: until `heal`). A command meets one fault, the first that was planted. Both colours
    of the backend share faults and calls. What fails is a BackendUnavailable, unless another `error` is given; but
    `changed` never tells of an outage: it returns early, as the contract says.
    """

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.timeout = inner.timeout
        self.calls: list[str] = []
        """The commands sent so far, by name."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._waiter: type[ThreadWaiter | TaskWaiter] = ThreadWaiter
        self._views: dict[str, Self] = {}

    def refuse(
        self, *commands: Command, nth: int = 1, times: int | None = 1, error: BaseException | None = None
    ) -> None:
        """Fail before the command is applied."""
        self._plant(commands, nth, times, applied=False, error=error)

    def lose_reply(
        self, *commands: Command, nth: int = 1, times: int | None = 1, error: BaseException | None = None
    ) -> None:
        """Fail after the command was applied."""
        self._plant(commands, nth, times, applied=True, error=error)

    def hang(self, *commands: Command, nth: int = 1, times: int | None = 1, applied: bool = False) -> Hang:
        """Hang until what this returns is released; then go on. After the command's timeout, fail.

        `applied`: the command is applied before it hangs, so that it is only its reply that comes late or never.
        """
        hang = Hang()
        self._plant(commands, nth, times, applied=applied, hang=hang)
        return hang

    def heal(self) -> None:
        """Take back all faults; what hangs is released."""
        with self._lock:
            hangs = [fault.hang for fault in self._faults if fault.hang is not None]
            self._faults.clear()
        for hang in hangs:
            hang.release()

    def _plant(self, commands: tuple[Command, ...], nth: int, times: int | None, **what: Any) -> None:
        for command in commands:
            if command not in get_args(Command):
                raise ValueError(f"a backend has no command {command!r}; there are {', '.join(get_args(Command))}")
        if nth < 1 or (times is not None and times < 1):
            raise ValueError(f"nth and times must be at least 1, not {nth} and {times}")
        fault = _Fault(commands or get_args(Command), nth - 1, math.inf if times is None else times, **what)
        with self._lock:
            self._faults.append(fault)

    def _met(self, command: Command) -> _Fault | None:
        with self._lock:
            self.calls.append(command)
            for fault in self._faults:
                if command in fault.commands:
                    if fault.passing:
                        fault.passing -= 1
                    elif fault.left:
                        fault.left -= 1
                        return fault
        return None

    async def _send(self, command: Command, send: Callable[[], Awaitable[Any]], longest: float = math.inf) -> Any:
        fault = self._met(command)
        if fault is None:
            return await send()
        reply = await send() if fault.applied else None
        told = command != "changed" or fault.error is not None
        if fault.hang is not None:
            waits = longest if command == "changed" else min(longest, self.timeout)
            if not await fault.hang._holds(self._waiter(), waits):
                return reply if fault.applied else await send()
        elif not told:
            await self._waiter().wait(0.01)
        if not told:
            return None
        what = "hung" if fault.hang is not None else "lost its reply" if fault.applied else "was refused"
        raise fault.error or BackendUnavailable(f"injected fault: {command} {what}")

    def blocking(self) -> Backend:
        return self._view("blocking", ThreadWaiter)

    def asynchronous(self) -> Backend:
        return self._view("asynchronous", TaskWaiter)

    def _view(self, colour: str, waiter: type[ThreadWaiter | TaskWaiter]) -> Self:
        view = self._views.get(colour)
        if view is None:
            view = copy.copy(self)  # the two share everything else
            view.inner, view._waiter = getattr(self.inner, colour)(), waiter
            self._views[colour] = view
        return view

    def within(self, seconds: float) -> Backend:
        if seconds >= self.timeout:
            return self
        view = copy.copy(self)
        view.inner, view.timeout, view._views = self.inner.within(seconds), seconds, {}
        return view

    claim: Any = _sent("claim")
    renew: Any = _sent("renew")
    complete: Any = _sent("complete")
    fail: Any = _sent("fail")
    release: Any = _sent("release")
    read: Any = _sent("read")
    forget: Any = _sent("forget")
    changed: Any = _sent("changed")
    purge: Any = _sent("purge")

    async def scan(self, **filters: Any) -> AsyncIterator[Record]:
        async def begin() -> AsyncIterator[Record]:
            return self.inner.scan(**filters)

        async for record in await self._send("scan", begin):
            yield record

    async def pass_on(self, rid: RecordId) -> None:
        await self.inner.pass_on(rid)

    def close(self) -> None:
        self.inner.close()

    async def aclose(self) -> None:
        await self.inner.aclose()
