"""One resource for each event loop, closed with its loop."""

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, TypeVar

__all__ = ["PerLoop"]

T = TypeVar("T")


class PerLoop(Generic[T]):
    """What `make` makes, once for each event loop that asks.

    Connections belong to the loop they were made in. `asyncio.run` closes a loop's asynchronous generators before the
    loop, so one of them closes the resource, and a program that says nothing leaves nothing open.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._made: dict[asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None, None]]] = {}
        _all.add(self)

    async def get(self) -> T:
        """The resource of the running loop."""
        loop = asyncio.get_running_loop()
        found = self._made.get(loop)
        if found is None:
            for dead in [other for other in list(self._made) if other.is_closed()]:
                self._made.pop(dead, None)
            resource = self._make()
            keeper = self._until_closed(loop, resource)
            found = self._made[loop] = (resource, keeper)
            await anext(keeper)
        return found[0]

    def in_use(self) -> bool:
        """Whether a loop that is not closed has one."""
        return any(not loop.is_closed() for loop in list(self._made))

    async def aclose(self) -> None:
        """Close the resource of the running loop."""
        found = self._made.get(asyncio.get_running_loop())
        if found is not None:
            await found[1].aclose()

    async def _until_closed(self, loop: asyncio.AbstractEventLoop, resource: T) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            self._made.pop(loop, None)
            await self._close(resource)

    def abandon(self) -> None:
        """Forget every resource without closing it: they are the parent process's."""
        _parents.append(self._made)
        self._made = {}


_all: "weakref.WeakSet[PerLoop[Any]]" = weakref.WeakSet()
_parents: list[object] = []
"""What a parent process made, kept from being finalized here: that could write to the parent's sockets."""


def _after_fork() -> None:
    for each in list(_all):
        each.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
