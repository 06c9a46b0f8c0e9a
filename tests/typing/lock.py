"""Never run: what type checkers must see of locks. A negative case is a line that has to be ignored."""

from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any, assert_type

from idempotent import AsyncLock, Hold, LocalBackend, Lock, serialized
from idempotent.lock import AsyncHold, LockInfo

lock = Lock("l", backend=LocalBackend(), namespace="n", lease=timedelta(seconds=5), wait=None, max_hold=60)
async_lock = AsyncLock("l", backend="redis://localhost", wait=0, heartbeat=False, on_lost="cancel")

with lock as hold:
    assert_type(hold, Hold)
    assert_type(hold.token, int)
    assert_type(hold.lost, bool)
    assert_type(hold.remaining(), float)
    assert_type(hold.check(), None)
    hold.extend(timedelta(seconds=5))

assert_type(lock.acquire(), Hold | None)
assert_type(lock.acquire(wait=0), Hold | None)
assert_type(lock.acquire(wait=None), Hold | None)
assert_type(lock.locked(), bool)
assert_type(lock.info(), LockInfo | None)
assert_type(lock.break_(), bool)
assert_type(lock.name, str)

lock.acquire().release()  # type: ignore[union-attr]  # pyright: ignore[reportOptionalMemberAccess]
lock.acquire(wait="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Lock(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Lock("l", on_lost="cancel")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Lock("l", lease=None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Lock("l", ttl=5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
lock.name = "x"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def told(hold: Hold) -> None: ...
def told_async(hold: AsyncHold) -> None: ...


Lock("l", on_lost=told)
AsyncLock("l", on_lost=told_async)
Lock("l", on_lost=told_async)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def colours() -> None:
    async with async_lock as hold:
        assert_type(hold, AsyncHold)
        assert_type(hold.token, int)
        assert_type(await hold.extend(), None)
        assert_type(hold.check(), None)
    assert_type(await async_lock.acquire(wait=1.5), AsyncHold | None)
    assert_type(await async_lock.info(), LockInfo | None)
    assert_type(await async_lock.break_(), bool)
    with async_lock:  # type: ignore[attr-defined]  # pyright: ignore[reportGeneralTypeIssues]
        pass


@serialized(key="account:{account}", wait=10)
def transfer(account: int, *, amount: int = 1) -> list[int]:
    return [account]


@serialized(lambda account: str(account), backend="local://", on_lost="cancel")
async def transfer_async(account: int) -> str:
    return ""


assert_type(transfer(1, amount=2), list[int])
transfer("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
plain: Callable[[int], list[int]] = transfer
awaitable: Callable[[int], Coroutine[Any, Any, str]] = transfer_async
serialized()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


class Account:
    number = 1

    @serialized(key="{self.number}")
    def pay(self, amount: int) -> int:
        return amount


assert_type(Account().pay(1), int)
