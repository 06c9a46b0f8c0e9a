"""What tests of locks share: one test for sync and async locks, and stores that look like another process's."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from faulty import Faulty
from proxy import Proxy

from idempotent import (
    AsyncLock,
    Backend,
    Lock,
    _config,
    _rooms,
    open_backend,
)
from idempotent._record import LOCKS, RecordId


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(60)

    def close(self) -> None:
        self.run(self.loop.shutdown_asyncgens())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(30)
        self.loop.close()


class AsyncFace:
    """An AsyncLock, or a hold of one, for a test that is written for a Lock; each call is a task of its own."""

    def __init__(self, inner: Any, loop: Loop) -> None:
        self._inner = inner
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not asyncio.iscoroutinefunction(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = self._loop.run(value(*args, **kwargs))
            return AsyncFace(result, self._loop) if type(result).__name__ == "AsyncHold" else result

        return call


class Kind:
    """Sync or async locks."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loops: list[Loop] = []

    def lock(self, name: str = "l", **options: Any) -> Any:
        if self.name == "sync":
            return Lock(name, **options)
        if not self.loops:
            self.loops.append(Loop())
        return AsyncFace(AsyncLock(name, **options), self.loops[0])

    def body(self, lock: Any, body: Callable[[Any], None]) -> None:
        """`with lock as hold: body(hold)`, the body in a worker thread."""
        if self.name == "sync":
            with lock as hold:
                body(hold)
            return

        async def main() -> None:
            async with lock._inner as hold:
                await asyncio.to_thread(body, AsyncFace(hold, self.loops[0]))

        self.loops[0].run(main())


def start(function: Callable[..., Any], *args: Any, **kwargs: Any) -> "Future[Any]":
    """Call in a thread; the future brings the result or the error."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def apart(url: str, after: contextlib.ExitStack) -> Backend:
    """The same store through a backend of its own, as another process has it; local stores are shared by wrapping."""
    if url == "local://":
        return Faulty(open_backend(url))
    backend = _config._open(url)
    after.callback(backend.close)
    return backend


def waiting(url: str, name: str = "l") -> int:
    """How many stand in line for a lock in this process."""
    room = _rooms.rooms_of(open_backend(url))._by_key.get(RecordId("", name, LOCKS).text)
    return 0 if room is None else len(room.line)


def and_(url: str) -> str:
    """What a further option of `url` begins with."""
    return "&" if "?" in url else "?"


async def wipe(url: str, rid: RecordId) -> None:
    """Delete a record behind the backend's back, token and all."""
    backend: Any = open_backend(url)
    if url == "local://":
        del backend._store.open[rid.text]
    elif url.startswith("redis"):
        import redis

        with redis.Redis.from_url(url.partition("?")[0]) as client:
            assert client.delete(f"{backend.prefix}:{{{rid.text}}}") == 1
    else:
        view = backend.blocking()
        await view._run(
            lambda connection: connection.execute(backend.table.delete().where(backend.table.c.id == rid.digest)), 5
        )


@contextlib.contextmanager
def through_proxy(url: str) -> Iterator[tuple[str, Proxy]]:
    parts = urlsplit(url)
    with Proxy(parts.hostname or "127.0.0.1", parts.port or 6379) as proxy:
        user, at, _ = parts.netloc.rpartition("@")
        yield urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{proxy.port}")), proxy
