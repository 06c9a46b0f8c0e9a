"""One test body for both colours: how to define, call and storm a decorated function, sync or async."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from idempotent import idempotent


class Colour:
    """Sync or async. A test defines its function as a plain sync one; the async twin runs it in a worker thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_async = name == "async"

    def __repr__(self) -> str:
        return self.name

    def define(self, function: Callable[..., Any], **options: Any) -> Any:
        """`function` decorated with `options`, in this colour."""
        if not self.is_async:
            return idempotent(**options)(function)

        @functools.wraps(function)
        async def twin(*args: Any, **kwargs: Any) -> Any:
            return await asyncio.to_thread(function, *args, **kwargs)

        return idempotent(**options)(twin)

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a decorated function, or a method of it, to its end."""
        if not self.is_async:
            return function(*args, **kwargs)

        async def main() -> Any:
            return await function(*args, **kwargs)

        return asyncio.run(main())

    def start(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
        """Call in the background; the future brings the result or the error."""
        future: Future[Any] = Future()

        def run() -> None:
            try:
                future.set_result(self.call(function, *args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def storm(self, function: Callable[..., Any], times: int, *args: Any, **kwargs: Any) -> list[Any]:
        """Call `times` times at once; results and errors as they come."""
        if self.is_async:

            async def main() -> list[Any]:
                calls = [function(*args, **kwargs) for _ in range(times)]
                return await asyncio.gather(*calls, return_exceptions=True)

            return asyncio.run(main())
        answers: list[Any] = []
        barrier = threading.Barrier(times)

        def run() -> None:
            barrier.wait()
            try:
                answers.append(function(*args, **kwargs))
            except BaseException as error:
                answers.append(error)

        threads = [threading.Thread(target=run) for _ in range(times)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


COLOURS = [Colour("sync"), Colour("async")]


@contextlib.contextmanager
def on_one_loop(colour: Colour) -> Iterator[Callable[..., Any]]:
    """`colour.call`, but for async callers all on one event loop, whose connections stay open between the calls."""
    if not colour.is_async:
        yield colour.call
        return

    async def main(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    with asyncio.Runner() as runner:
        yield lambda function, *args, **kwargs: runner.run(main(function, *args, **kwargs))
