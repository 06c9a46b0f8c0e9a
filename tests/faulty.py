"""A backend whose commands fail on request, before or after they were applied."""

from collections.abc import AsyncIterator
from typing import Any, Literal

from idempotent import Backend, BackendUnavailable

When = Literal["before", "after"]
Fault = tuple[str, When, BaseException]


class Faulty(Backend):
    """`inner` with faults: `plant("complete", "after", times=2)` applies it twice, and loses the reply each time.

    The error is BackendUnavailable unless another is given.
    """

    def __init__(self, inner: Backend, faults: "list[Fault] | None" = None) -> None:
        self.inner = inner
        self.name = inner.name
        self.timeout = inner.timeout
        self.faults: list[Fault] = [] if faults is None else faults
        self.calls: list[str] = []
        self._views: dict[str, Faulty] = {}

    def plant(self, operation: str, when: When, times: int = 1, error: BaseException | None = None) -> None:
        error = error or BackendUnavailable(f"injected {when} {operation}")
        self.faults.extend([(operation, when, error)] * times)

    def _view(self, colour: str, inner: Backend) -> "Faulty":
        view = self._views.get(colour)
        if view is None:
            view = self._views[colour] = Faulty(inner, self.faults)
            view.calls = self.calls
        return view

    def blocking(self) -> Backend:
        return self._view("blocking", self.inner.blocking())

    def asynchronous(self) -> Backend:
        return self._view("asynchronous", self.inner.asynchronous())

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(operation)
        for fault in self.faults:
            if fault[0] == operation:
                self.faults.remove(fault)
                if fault[1] == "after":
                    await getattr(self.inner, operation)(*args, **kwargs)
                raise fault[2]
        return await getattr(self.inner, operation)(*args, **kwargs)

    async def claim(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("claim", *args, **kwargs)

    async def renew(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("renew", *args, **kwargs)

    async def complete(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("complete", *args, **kwargs)

    async def fail(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("fail", *args, **kwargs)

    async def release(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("release", *args, **kwargs)

    async def read(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("read", *args, **kwargs)

    async def forget(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("forget", *args, **kwargs)

    async def changed(self, *args: Any, **kwargs: Any) -> Any:
        return await self._do("changed", *args, **kwargs)

    async def pass_on(self, *args: Any, **kwargs: Any) -> Any:
        return await self.inner.pass_on(*args, **kwargs)

    def scan(self, **kwargs: Any) -> AsyncIterator[Any]:
        return self.inner.scan(**kwargs)

    async def purge(self, limit: int = 1000) -> int:
        return await self.inner.purge(limit)
