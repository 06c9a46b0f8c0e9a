"""The locks that are compared. Each is made for one thread or task and used again and again: the peers' best case."""

import functools
import os
from collections.abc import Callable
from typing import Any

import redis
import redis.asyncio

from idempotent import AsyncLock, Lock

__all__ = ["ASYNC", "RAW", "SYNC", "WAITING", "Make"]

Make = Callable[[str, str], Any]
"""Makes a context manager, of a server's URL and a lock's name."""

LEASE = 30
"""Seconds, for all of them."""
RAW = "raw SET NX PX + EVALSHA"

_COMPARE_AND_DELETE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"


@functools.cache
def _client(url: str, *, one: bool = False) -> Any:
    return redis.Redis.from_url(url, single_connection_client=one)


@functools.cache
def _async_client(url: str, *, one: bool = False) -> Any:
    return redis.asyncio.Redis.from_url(url, single_connection_client=one)


class _Raw:
    """A SET and a script that compares and deletes, by hand on redis-py's own client. Does not wait."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._name = name
        self._sha = client.script_load(_COMPARE_AND_DELETE)
        self._token = b""

    def __enter__(self) -> None:
        self._token = os.urandom(16)
        if not self._client.set(self._name, self._token, nx=True, px=LEASE * 1000):
            raise RuntimeError("the lock is not free")

    def __exit__(self, *_: object) -> None:
        if self._client.evalsha(self._sha, 1, self._name, self._token) != 1:
            raise RuntimeError("the lock was lost")


class _AsyncRaw:
    """The same for async code."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self._name = name
        self._sha = ""
        self._token = b""

    async def __aenter__(self) -> None:
        self._sha = self._sha or await self._client.script_load(_COMPARE_AND_DELETE)
        self._token = os.urandom(16)
        if not await self._client.set(self._name, self._token, nx=True, px=LEASE * 1000):
            raise RuntimeError("the lock is not free")

    async def __aexit__(self, *_: object) -> None:
        if await self._client.evalsha(self._sha, 1, self._name, self._token) != 1:
            raise RuntimeError("the lock was lost")


def _ours(url: str, name: str) -> Lock:
    return Lock(name, backend=url, lease=LEASE)


def _redis_py(url: str, name: str, sleep: float = 0.1) -> Any:
    return _client(url).lock(name, timeout=LEASE, sleep=sleep)


def _python_redis_lock(url: str, name: str, *, auto_renewal: bool = False) -> Any:
    import redis_lock  # type: ignore[import-untyped]

    return redis_lock.Lock(_client(url), name, expire=LEASE, auto_renewal=auto_renewal)


def _sherlock(url: str, name: str) -> Any:
    import sherlock  # type: ignore[import-untyped]

    return sherlock.RedisLock(name, client=_client(url), expire=LEASE)


def _pottery(url: str, name: str) -> Any:
    import pottery

    return pottery.Redlock(key=name, masters={_client(url)}, auto_release_time=LEASE)


def _pottery_async(url: str, name: str) -> Any:
    import pottery

    return pottery.AIORedlock(key=name, masters={_async_client(url)}, auto_release_time=LEASE)


WAITING: dict[str, Make] = {
    "idempotent": _ours,
    "redis-py": _redis_py,
    "redis-py, sleep=0.01": functools.partial(_redis_py, sleep=0.01),
    "python-redis-lock": _python_redis_lock,
    "pottery": _pottery,
}
"""Those that can wait for each other."""

SYNC: dict[str, Make] = {
    RAW: lambda url, name: _Raw(_client(url), name),
    "raw, one connection": lambda url, name: _Raw(_client(url, one=True), name),
    "idempotent": _ours,
    "redis-py": _redis_py,
    "python-redis-lock": _python_redis_lock,
    "python-redis-lock, auto_renewal": functools.partial(_python_redis_lock, auto_renewal=True),
    "sherlock": _sherlock,
    "pottery": _pottery,
}
"""With sherlock, which waits as redis-py's does."""

ASYNC: dict[str, Make] = {
    RAW: lambda url, name: _AsyncRaw(_async_client(url), name),
    "raw, one connection": lambda url, name: _AsyncRaw(_async_client(url, one=True), name),
    "idempotent": lambda url, name: AsyncLock(name, backend=url, lease=LEASE),
    "redis-py": lambda url, name: _async_client(url).lock(name, timeout=LEASE),
    "pottery": _pottery_async,
}
