"""Locks: what anybody expects of one, what other libraries' locks get wrong, and what happens when things break."""

import asyncio
import contextlib
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from faulty import Faulty
from locks import Kind, Loop, and_, apart, start, through_proxy, waiting, wipe
from probes import eventually
from test_cancel import only_this_task

from idempotent import (
    AsyncLock,
    Backend,
    BackendError,
    BackendUnavailable,
    Hold,
    InvalidKey,
    KeyRequired,
    LocalBackend,
    Lock,
    LockError,
    LockLost,
    LockTimeout,
    NotHeld,
    ProcessLocalWarning,
    _rooms,
    configure,
    idempotent,
    open_backend,
    serialized,
)
from idempotent._drive import drive
from idempotent._record import LOCKS, RecordId
from idempotent.backends import base
from idempotent.events import Event

# ------------------------------------------------------------------------------------------------------- one at a time


def test_a_lock_is_held_by_one_and_free_after_it(kind: Kind, backend_url: str) -> None:
    lock, other = kind.lock(backend=backend_url), kind.lock(backend=backend_url)
    assert not lock.locked()
    assert lock.info() is None

    def body(hold: Any) -> None:
        assert hold.name == "l"
        assert 28 < hold.remaining() < 30
        assert not hold.lost
        hold.check()
        assert start(other.locked).result(30)
        assert start(other.acquire, wait=0).result(30) is None
        info = other.info()
        assert (info.token, info.pid) == (hold.token, os.getpid())
        assert 0 < info.lease_left <= 30
        assert 0 <= info.since < 30
        assert len(info.attempt) == 16

    kind.body(lock, body)
    assert not lock.locked()
    hold = other.acquire(wait=0)
    assert hold.token > 0
    hold.release()
    assert hold.remaining() == 0.0
    assert not hold.lost


def test_a_hold_on_a_backend_that_keeps_no_owners_is_described_without_one(kind: Kind) -> None:
    class Nameless(Faulty):
        async def claim(self, *args: Any, **kwargs: Any) -> Any:
            return await self.inner.claim(*args, **{**kwargs, "owner": b""})

        def blocking(self) -> Backend:
            return self

        def asynchronous(self) -> Backend:
            return self

    lock = kind.lock(backend=Nameless(LocalBackend()))
    hold = lock.acquire()
    info = lock.info()
    assert (info.token, info.host, info.pid) == (hold.token, "", 0)


def test_sync_and_async_locks_exclude_each_other(backend_url: str) -> None:
    async def main() -> None:
        async with AsyncLock("l", backend=backend_url):
            assert await asyncio.to_thread(Lock("l", backend=backend_url).acquire, 0) is None
        with Lock("l", backend=backend_url):
            assert await asyncio.create_task(AsyncLock("l", backend=backend_url).acquire(0)) is None
        async with AsyncLock("l", backend=backend_url, wait=0):
            pass

    asyncio.run(main())
    with Lock("l", backend=backend_url):
        assert asyncio.run(AsyncLock("l", backend=backend_url).acquire(wait=0)) is None


def test_names_namespaces_and_keys_never_meet(backend_url: str) -> None:
    def work() -> int:
        return 1

    call = idempotent(backend=backend_url, namespace="n", key=lambda: "l", wait=0)(work)
    with Lock("l", backend=backend_url, namespace="n"), Lock("l", backend=backend_url), Lock("L", backend=backend_url):
        with Lock("l ", backend=backend_url, wait=0), Lock("n:l", backend=backend_url, wait=0):
            assert call() == 1
    assert call() == 1


def test_one_lock_serves_many_threads(backend_url: str) -> None:
    lock = Lock("l", backend=backend_url)
    inside: list[int] = []
    tokens: list[int] = []

    def work() -> None:
        with lock as hold:
            inside.append(1)
            assert inside == [1]
            tokens.append(hold.token)
            inside.pop()

    for future in [start(work) for _ in range(50)]:
        future.result(60)
    assert len(tokens) == 50
    assert tokens == sorted(set(tokens))


def test_one_lock_serves_many_tasks(backend_url: str) -> None:
    inside: list[int] = []
    tokens: list[int] = []

    async def main() -> None:
        lock = AsyncLock("l", backend=backend_url)

        async def work() -> None:
            async with lock as hold:
                inside.append(1)
                await asyncio.sleep(0)
                assert inside == [1]
                tokens.append(hold.token)
                inside.pop()

        await asyncio.gather(*(work() for _ in range(50)))
        assert only_this_task()

    asyncio.run(main())
    assert len(tokens) == 50
    assert tokens == sorted(set(tokens))


def test_a_failed_second_acquire_leaves_the_first_hold_alone(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url)
    hold = lock.acquire()
    assert start(lock.acquire, wait=0).result(30) is None
    assert start(lock.acquire, wait=0.01).result(30) is None
    hold.check()
    hold.extend()
    assert lock.locked()
    hold.release()


def test_a_hold_travels_to_another_thread(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, wait=10)
    hold = start(lock.acquire).result(30)
    waiter = start(lock.acquire)
    eventually(lambda: waiting(backend_url) == 1)
    start(hold.release).result(30)
    waiter.result(30).release()


def test_an_async_hold_is_released_from_another_loop(backend_url: str) -> None:
    first, second = Loop(), Loop()
    lock = AsyncLock("l", backend=backend_url, lease=0.9)
    try:
        hold = first.run(lock.acquire())
        second.run(hold.release())
        assert first.run(lock.acquire(wait=0)) is not None
        first.run(asyncio.sleep(0.5))
        assert not hold.lost
    finally:
        first.close()
        second.close()


def test_a_block_may_end_in_another_thread(backend_url: str) -> None:
    lock = Lock("l", backend=backend_url)

    def body() -> Iterator[None]:
        with lock:
            yield

    generator = body()
    start(next, generator).result(30)
    assert lock.locked()
    next(generator, None)
    assert not lock.locked()


def test_a_block_of_a_lost_hold_that_ends_elsewhere_frees_nothing_of_its_successor() -> None:
    lock = Lock("l", backend=LocalBackend(), lease=0.5, heartbeat=False)
    holds: list[Hold] = []

    def body() -> Iterator[None]:
        with lock as hold:
            holds.append(hold)
            yield

    first, second = body(), body()
    start(next, first).result(30)
    start(next, second).result(30)  # after the first one's lease
    with pytest.raises(LockLost):
        next(first, None)
    holds[1].check()
    assert lock.locked()
    next(second, None)
    assert not lock.locked()
    with pytest.raises(LockError, match="never"):
        lock.__exit__(None, None, None)


# ------------------------------------------------------------------------------------------------------ not re-entrant


@pytest.mark.parametrize("wait", [0, None, 5])
def test_asking_twice_in_one_thread_is_an_error_at_once(backend_url: str, wait: float | None) -> None:
    with Lock("l", backend=backend_url) as hold:
        before = time.monotonic()
        with pytest.raises(LockError, match="not re-entrant"):
            Lock("l", backend=backend_url).acquire(wait=wait)
        assert time.monotonic() - before < 1
        hold.check()
    Lock("l", backend=backend_url).acquire(wait=0).release()  # type: ignore[union-attr]


@pytest.mark.parametrize("wait", [0, None, 5])
def test_asking_twice_in_one_task_is_an_error_at_once(backend_url: str, wait: float | None) -> None:
    async def main() -> None:
        lock = AsyncLock("l", backend=backend_url)
        async with lock as hold:
            with pytest.raises(LockError, match="not re-entrant"):
                await lock.acquire(wait=wait)
            with pytest.raises(LockError, match="not re-entrant"):
                Lock("l", backend=backend_url).acquire(wait=wait)  # would block the loop that the holder needs
            hold.check()
            assert await asyncio.create_task(lock.acquire(wait=0)) is None  # another task is another
        assert not await lock.locked()

    asyncio.run(main())


def test_a_new_thread_with_an_old_ident_is_not_taken_for_the_holder() -> None:
    import _thread

    lock = Lock("l", backend=LocalBackend())
    idents: list[int] = []
    holds: list[Any] = []
    answers: list[Any] = []

    def acquire() -> None:
        holds.append(lock.acquire())
        idents.append(_thread.get_ident())

    def ask() -> None:
        if _thread.get_ident() == idents[0]:
            answers.append(lock.acquire(wait=0))
        idents.append(_thread.get_ident())

    _thread.start_new_thread(acquire, ())
    eventually(lambda: idents)
    for number in range(200):
        _thread.start_new_thread(ask, ())
        eventually(lambda: len(idents) == number + 2)
        if answers:
            break
    assert answers in ([None], [])  # and never a LockError; [] where the system gave the ident to nobody
    holds[0].release()


# ------------------------------------------------------------------------------------------------------------ waiting


def test_wait_is_honoured(kind: Kind, backend_url: str, _fresh: contextlib.ExitStack) -> None:
    """Within 50 ms, under contention, behind others of its process and at the backend; the best of five."""
    hold = kind.lock(backend=apart(backend_url, _fresh)).acquire()
    crowded, lone = kind.lock(backend=backend_url), kind.lock(backend=apart(backend_url, _fresh))
    crowd = [start(lambda: crowded.acquire(wait=60).release()) for _ in range(5)]
    eventually(lambda: waiting(backend_url) == 5)
    for lock, wait in ((lone, 0.3), (crowded, timedelta(seconds=0.123))):
        seconds = wait if isinstance(wait, float) else wait.total_seconds()
        took = []
        for _ in range(5):
            before = time.monotonic()
            assert lock.acquire(wait=wait) is None
            took.append(time.monotonic() - before - seconds)
            if took[-1] < 0.05:
                break
        assert min(took) < 0.05
        assert all(over >= -0.001 for over in took)
    hold.release()
    for future in crowd:
        future.result(60)


def test_with_raises_where_acquire_returns_none(kind: Kind, backend_url: str) -> None:
    lock, impatient = kind.lock(backend=backend_url), kind.lock(backend=backend_url, wait=0.05)
    hold = start(lock.acquire).result(30)
    assert start(impatient.acquire).result(30) is None
    ran: list[Any] = []
    with pytest.raises(LockTimeout, match="0.05 s"):
        kind.body(impatient, ran.append)
    with pytest.raises(TimeoutError):
        kind.body(impatient, ran.append)
    assert ran == []
    hold.release()


def test_waiters_of_one_process_are_served_in_turn_and_ask_little(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    kind.lock(backend=backend)  # the loop
    lock = kind.lock(backend=backend)
    hold = start(lock.acquire).result(30)
    served: list[int] = []

    def work(number: int) -> None:
        mine = lock.acquire()
        served.append(number)
        mine.release()

    room = lambda: next(iter(_rooms.rooms_of(backend)._by_key.values()))  # noqa: E731
    futures = []
    for number in range(30):
        futures.append(start(work, number))
        eventually(lambda: len(room().line) == number + 1)
    del backend.calls[:]
    hold.release()
    for future in futures:
        future.result(30)
    assert served == list(range(30))
    assert len(backend.calls) <= 3 * 30


def test_a_release_wakes_a_waiter_of_another_process_at_once(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    lock, other = kind.lock(backend=backend_url), kind.lock(backend=apart(backend_url, _fresh))
    limit = 0.05 if backend_url.startswith(("local", "redis")) else 0.45
    took = []
    for _ in range(5):
        hold = lock.acquire()
        waiter = start(other.acquire)
        time.sleep(0.3)
        assert not waiter.done()
        before = time.monotonic()
        hold.release()
        theirs = waiter.result(30)
        took.append(time.monotonic() - before)
        theirs.release()
        if took[-1] < limit:
            return
    raise AssertionError(took)


def test_a_release_between_the_refusal_and_the_subscription_is_not_missed(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    class FreedMeanwhile(Faulty):
        def blocking(self) -> Backend:
            self.inner = self.inner.blocking()
            return self

        def asynchronous(self) -> Backend:
            self.inner = self.inner.asynchronous()
            return self

        async def changed(self, *args: Any, **kwargs: Any) -> Any:
            if holds:
                free = holds.pop().release
                await asyncio.to_thread(free) if kind.name == "async" else free()
                freed_at.append(time.monotonic())
            return await self.inner.changed(*args, **kwargs)

    holder = Lock("l", backend=apart(backend_url, _fresh))
    lock = kind.lock(backend=FreedMeanwhile(open_backend(backend_url)))
    holds: list[Any] = []
    freed_at: list[float] = []
    took: list[float] = []
    while len(took) < 5 and min(took, default=1) > 0.4:  # a second is the time after which a waiter looks anyway
        holds.append(start(holder.acquire).result(30))
        theirs = lock.acquire(wait=20)
        took.append(time.monotonic() - freed_at[-1])
        theirs.release()
    assert min(took) <= 0.4, took


def test_a_waiter_sees_a_lease_that_ends_without_a_word(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    dead = kind.lock(backend=apart(backend_url, _fresh), lease=0.8, heartbeat=False).acquire()
    lock = kind.lock(backend=backend_url)
    hold = lock.acquire(wait=10)
    assert hold.token > dead.token
    assert dead.lost
    hold.release()


def test_a_first_in_line_whose_loop_is_blocked_holds_nobody_up(backend_url: str, _fresh: contextlib.ExitStack) -> None:
    hold = Lock("l", backend=apart(backend_url, _fresh)).acquire()
    assert hold is not None
    stands, let_go = threading.Event(), threading.Event()

    async def main() -> None:
        first = asyncio.ensure_future(AsyncLock("l", backend=backend_url).acquire())
        while not waiting(backend_url):
            await asyncio.sleep(0)
        stands.set()
        let_go.wait(60)
        await (await first).release()

    blocked = threading.Thread(target=lambda: asyncio.run(main()))
    blocked.start()
    assert stands.wait(30)
    behind = start(Lock("l", backend=backend_url).acquire, wait=60)
    eventually(lambda: waiting(backend_url) == 2)
    began = time.monotonic()
    hold.release()
    behind.result(60).release()
    assert time.monotonic() - began < 10  # and not a lease and two deadlines
    let_go.set()
    blocked.join(30)


def test_a_first_in_line_whose_loop_is_closed_is_passed_over_at_once() -> None:
    backend = LocalBackend()
    hold = Lock("l", backend=Faulty(backend)).acquire()
    assert hold is not None
    tasks: list[Any] = []

    async def leave() -> None:
        tasks.append(asyncio.ensure_future(AsyncLock("l", backend=backend).acquire()))
        while not backend._store.signals._waiters:
            await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()  # without cancelling the waiter
    behind = start(Lock("l", backend=backend).acquire, wait=60)
    eventually(lambda: len(backend._store.signals._waiters["l0::l"]) == 2)
    hold.release()
    began = time.monotonic()
    behind.result(60).release()
    assert time.monotonic() - began < 1
    tasks[0]._log_destroy_pending = False


def test_a_hold_released_on_another_loop_during_a_renewal_is_not_lost() -> None:
    renewing, told = threading.Event(), []
    configure(hooks=[lambda event: told.append(event.name)])

    class Slow(Faulty):
        def asynchronous(self) -> "Slow":
            self.inner = self.inner.asynchronous()
            return self

        async def renew(self, *args: Any, **kwargs: Any) -> Any:
            renewing.set()
            while "release" not in self.calls:
                await asyncio.sleep(0.001)
            answers.append(await self.inner.renew(*args, **kwargs))
            return answers[-1]

        async def release(self, *args: Any, **kwargs: Any) -> Any:
            reply = await super().release(*args, **kwargs)
            while not answers:
                await asyncio.sleep(0.001)
            return reply

    answers: list[Any] = []
    loops = [Loop(), Loop()]
    lock = AsyncLock("l", backend=Slow(LocalBackend()), lease=1.5, on_lost=lambda hold: told.append("on_lost"))
    hold = loops[0].run(lock.acquire())
    assert renewing.wait(30)
    loops[1].run(hold.release())
    for loop in loops:
        loop.close()
    assert not hold.lost
    assert told == ["claimed", "released"]


def test_waits_that_poll_are_not_in_step_and_overshoot_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(base, "monotonic", lambda: now)

    def pauses(seconds: float) -> list[float]:
        nonlocal now
        taken: list[float] = []

        async def sleep(pause: float) -> None:
            nonlocal now
            taken.append(pause)
            now += pause

        async def always() -> bool:
            return True

        drive(base.poll(always, sleep, seconds))
        return taken

    first, second = pauses(30), pauses(30)
    assert [sum(first), sum(second)] == pytest.approx([30, 30])
    assert len(set(first + second)) == len(first) + len(second)  # no two are alike
    assert max(first) < 0.5
    assert 80 < len(first) < 240


def test_a_wait_may_outlast_the_backends_timeout(
    kind: Kind, shared_backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    hold = kind.lock(backend=shared_backend_url).acquire()
    waiter = start(
        kind.lock(backend=apart(f"{shared_backend_url}{and_(shared_backend_url)}timeout=0.5", _fresh)).acquire
    )
    time.sleep(1.2)
    assert not waiter.done()
    hold.release()
    waiter.result(30).release()


def test_a_wait_too_short_for_an_answer_is_still_one_try(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    lock = kind.lock(backend=backend_url)
    for wait in (0, 1e-9, timedelta(microseconds=1), timedelta(0)):
        hold = lock.acquire(wait=wait)
        assert hold is not None
        assert start(kind.lock(backend=apart(backend_url, _fresh)).acquire, wait=wait).result(30) is None
        assert start(lock.acquire, wait=wait).result(30) is None
        hold.release()


@pytest.mark.parametrize("wait", [-1, timedelta(seconds=-1), float("nan"), float("inf"), "1", True])
def test_a_wait_that_is_none_is_refused_when_asked(kind: Kind, wait: Any) -> None:
    lock = kind.lock(backend=LocalBackend())
    with pytest.raises((ValueError, TypeError), match="wait must be"):
        lock.acquire(wait=wait)
    assert not lock.locked()


def test_a_lease_of_milliseconds_is_one(kind: Kind, backend_url: str, _fresh: contextlib.ExitStack) -> None:
    """Where the backend takes longer than that to answer there is no hold, or it is said that there may be none."""
    lock = kind.lock(backend=backend_url, lease=0.02, heartbeat=False)
    assert not lock.locked()
    hold = None
    with contextlib.suppress(BackendUnavailable, LockError):
        hold = lock.acquire(wait=10)
    if hold is not None:
        assert hold.remaining() <= 0.02
        eventually(lambda: hold.lost)
    other = kind.lock(backend=apart(backend_url, _fresh)).acquire(wait=10)
    assert other is not None
    assert hold is None or other.token > hold.token
    other.release()


@pytest.mark.parametrize("wait", [0, None])
def test_a_lease_that_ends_before_it_can_be_used_is_named(kind: Kind, backend_url: str, wait: float | None) -> None:
    """And the lock is not said to be taken, as nobody has it."""
    lock = kind.lock(backend=backend_url, lease=1e-6, heartbeat=False)
    future = start(lock.acquire, wait=wait)
    error = future.exception(30)
    assert isinstance(error, LockError if backend_url.startswith("local") else (LockError, BackendUnavailable))
    assert not isinstance(error, LockTimeout)
    assert "lease=1e-06 s" in "\n".join([str(error), *getattr(error, "__notes__", ())])
    hold = start(kind.lock(backend=backend_url).acquire, wait=20).result(30)
    assert hold is not None
    hold.release()


def test_any_text_without_control_characters_is_a_name(kind: Kind, backend_url: str) -> None:
    names = [" ", "l", "L", "é", "e\u0301", "漢字 🦄", "a:b{c}d#e*?[x]", "%s'\"; --", "x" * 1023, "x" * 1024]
    locks = [kind.lock(name, backend=backend_url) for name in names]
    holds = [lock.acquire(wait=0) for lock in locks]  # none is another's
    assert None not in holds
    for lock, hold in zip(locks, holds, strict=True):
        assert start(lock.acquire, wait=0).result(30) is None
        assert lock.info().token == hold.token
        hold.release()
        assert not lock.locked()
    for name, says in (("x" * 1025, "1025"), ("a\0b", "control"), ("a\nb", "control"), (b"x", "text"), (5, "text")):
        with pytest.raises(InvalidKey, match=says):
            kind.lock(name, backend=backend_url)  # type: ignore[arg-type]


def test_all_keys_of_a_lock_are_in_one_slot_of_a_cluster() -> None:
    from redis.crc import key_slot

    from idempotent import RedisBackend

    backend = RedisBackend("redis://127.0.0.1:1")
    for name in ("l", "a}b", "{}", "{a}{b}"):
        key = backend._key(RecordId("n", name, LOCKS))
        assert key_slot(key.encode()) == key_slot(f"{key}:line".encode())


# ------------------------------------------------------------------------------------------- releasing what one has not


def test_releasing_twice_is_an_error_and_frees_nothing(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url)
    hold = lock.acquire()
    hold.release()
    successor = start(lock.acquire).result(30)
    for _ in range(2):
        with pytest.raises(NotHeld):
            hold.release()
        with pytest.raises(NotHeld):
            hold.extend()
        with pytest.raises(NotHeld):
            hold.check()
    assert lock.locked()
    successor.check()
    successor.extend()
    successor.release()


def test_releasing_what_another_took_is_an_error_and_frees_nothing(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    late = kind.lock(backend=backend_url, lease=0.6, heartbeat=False).acquire()
    other = kind.lock(backend=apart(backend_url, _fresh))
    successor = other.acquire(wait=10)
    with pytest.raises(LockLost):
        late.check()
    with pytest.raises(LockLost):
        late.extend()
    with pytest.raises(NotHeld):
        late.release()
    with pytest.raises(NotHeld):
        late.release()
    assert other.locked()
    successor.extend()
    assert other.info().token == successor.token
    successor.release()


def test_only_one_of_two_threads_releases(backend_url: str) -> None:
    lock = Lock("l", backend=backend_url)
    for _ in range(10):
        hold = lock.acquire()
        assert hold is not None
        barrier = threading.Barrier(2)

        def release() -> None:
            barrier.wait()
            hold.release()

        errors = [future.exception(30) for future in [start(release), start(release)]]
        assert sorted(type(error).__name__ for error in errors) == ["NoneType", "NotHeld"]


def test_released_inside_its_block_is_no_error(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url)
    kind.body(lock, lambda hold: hold.release())
    assert not lock.locked()


# ------------------------------------------------------------------------------------------------------- lost and truth


def test_a_lease_that_ends_is_known_at_the_local_deadline(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, lease=0.6, heartbeat=False)
    assert not lock.locked()  # connected before the lease begins
    before = time.monotonic()
    hold = lock.acquire()
    eventually(lambda: hold.lost)
    assert 0.5 < time.monotonic() - before < 0.6 + 1
    assert hold.remaining() == 0.0
    with pytest.raises(LockLost):
        hold.check()


def test_with_raises_if_the_body_may_have_run_unprotected(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, lease=0.5, heartbeat=False)
    with pytest.raises(LockLost):
        kind.body(lock, lambda hold: eventually(lambda: hold.lost))
    assert not lock.locked()


def test_the_bodys_own_exception_wins(kind: Kind, backend_url: str) -> None:
    def fail(hold: Any) -> None:
        eventually(lambda: hold.lost)
        raise KeyError("own")

    with pytest.raises(KeyError, match="own") as raised:
        kind.body(kind.lock(backend=backend_url, lease=0.5, heartbeat=False), fail)
    assert "was lost" in raised.value.__notes__[0]

    def fail_soon(hold: Any) -> None:
        raise KeyError("own")

    lock = kind.lock(backend=backend_url)
    with pytest.raises(KeyError) as raised:
        kind.body(lock, fail_soon)
    assert not hasattr(raised.value, "__notes__")
    assert not lock.locked()


def test_a_heartbeat_holds_the_lock_beyond_its_lease(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, lease=0.6)

    def body(hold: Any) -> None:
        time.sleep(1.5)
        assert start(lock.acquire, wait=0).result(30) is None
        hold.check()

    kind.body(lock, body)


def test_one_failed_renewal_does_not_end_the_heartbeat(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    lock = kind.lock(backend=backend, lease=0.6)
    backend.plant("renew", "before", 2)
    backend.plant("renew", "after", 1)

    def body(hold: Any) -> None:
        time.sleep(1.2)
        assert backend.faults == []
        hold.check()

    kind.body(lock, body)


def test_an_outage_longer_than_the_lease_is_a_loss_at_the_deadline(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    lock = kind.lock(backend=backend, lease=0.4)

    def body(hold: Any) -> None:
        backend.plant("renew", "before", 10_000)
        eventually(lambda: hold.lost)
        assert not hold.remaining()

    before = time.monotonic()
    with pytest.raises(LockLost):
        kind.body(lock, body)
    assert time.monotonic() - before > 0.35


def test_a_hung_body_holds_no_longer_than_max_hold(kind: Kind, backend_url: str, _fresh: contextlib.ExitStack) -> None:
    other = kind.lock(backend=apart(backend_url, _fresh))
    before = time.monotonic()
    hung = kind.lock(backend=backend_url, lease=0.3, max_hold=0.9).acquire()
    time.sleep(0.5)
    hung.check()
    hold = other.acquire(wait=20)
    assert 0.85 < time.monotonic() - before < 5
    assert hung.lost
    hold.release()


def test_max_hold_shorter_than_the_lease_shortens_it(kind: Kind, backend_url: str) -> None:
    hold = kind.lock(backend=backend_url, lease=30, max_hold=2).acquire()
    assert hold.remaining() < 2
    hold.release()


def test_extend_restarts_the_lease(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, lease=0.5, heartbeat=False)
    hold = lock.acquire()
    hold.extend(60)
    assert 55 < hold.remaining() <= 60
    assert lock.info().lease_left > 55
    hold.extend()  # as long as before
    assert hold.remaining() > 55
    hold.extend(timedelta(seconds=2))
    assert hold.remaining() <= 2
    assert lock.info().lease_left <= 2
    with pytest.raises(ValueError, match="lease"):
        hold.extend(0)
    hold.release()


def test_the_heartbeat_follows_an_extension(kind: Kind, backend_url: str) -> None:
    hold = kind.lock(backend=backend_url, lease=30).acquire()
    hold.extend(0.6)
    time.sleep(1.2)
    hold.check()
    hold.release()


def test_an_extension_that_is_not_confirmed_promises_the_shorter_lease(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    hold = kind.lock(backend=backend, lease=30, heartbeat=False).acquire()
    backend.plant("renew", "after")
    with pytest.raises(BackendUnavailable):
        hold.extend(5)
    assert hold.remaining() <= 5
    backend.plant("renew", "before")
    with pytest.raises(BackendUnavailable):
        hold.extend(60)
    assert hold.remaining() <= 5
    hold.release()


def test_an_extension_that_is_cancelled_during_a_renewal_leaves_the_heartbeat() -> None:
    async def main() -> None:
        under_way, let_go, renewals = asyncio.Event(), asyncio.Event(), []

        class Slow(LocalBackend):
            def asynchronous(self) -> "Slow":
                return self

            async def renew(self, *args: Any, **kwargs: Any) -> Any:
                renewals.append(1)
                under_way.set()
                await let_go.wait()
                return await super().renew(*args, **kwargs)

        hold = await AsyncLock("l", backend=Slow(), lease=1).acquire()
        assert hold is not None
        await asyncio.wait_for(under_way.wait(), 20)
        extending = asyncio.ensure_future(hold.extend())
        await asyncio.sleep(0)
        extending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await extending
        let_go.set()
        async with asyncio.timeout(20):
            while len(renewals) < 3:
                await asyncio.sleep(0.01)
        hold.check()
        await hold.release()

    asyncio.run(main())


def test_on_lost_calls_back_at_the_deadline_although_a_renewal_hangs(kind: Kind) -> None:
    let_go = threading.Event()

    class Frozen(Faulty):
        def blocking(self) -> "Frozen":
            return self

        def asynchronous(self) -> "Frozen":
            return self

        async def renew(self, *args: Any, **kwargs: Any) -> Any:
            if kind.name == "sync":
                let_go.wait(30)
            else:
                while not let_go.is_set():
                    await asyncio.sleep(0.01)
            raise BackendUnavailable("late")

    told: list[tuple[Any, float]] = []
    lock = kind.lock(
        backend=Frozen(LocalBackend()), lease=0.6, on_lost=lambda hold: told.append((hold, time.monotonic()))
    )
    before = time.monotonic()
    hold = lock.acquire()
    eventually(lambda: told)
    assert told[0][0].token == hold.token
    assert 0.5 < told[0][1] - before < 0.6 + 0.5
    let_go.set()
    hold.release()  # nobody took it
    assert len(told) == 1


def test_a_callback_may_release(kind: Kind, backend_url: str) -> None:
    released: list[str] = []

    def on_lost(hold: Any) -> None:
        if isinstance(hold, Hold):
            with contextlib.suppress(NotHeld):
                hold.release()
        released.append("told")

    lock = kind.lock(backend=backend_url, lease=0.5, heartbeat=False, on_lost=on_lost)
    lock.acquire()
    eventually(lambda: released)
    lock.acquire(wait=10).release()


def test_with_raises_after_a_callback_too(kind: Kind) -> None:
    told: list[Any] = []
    lock = kind.lock(backend=LocalBackend(), lease=0.2, heartbeat=False, on_lost=told.append)
    with pytest.raises(LockLost):
        kind.body(lock, lambda hold: eventually(lambda: told))


def test_on_lost_cancel_ends_the_body() -> None:
    async def main() -> None:
        lock = AsyncLock("l", backend=LocalBackend(), lease=0.2, heartbeat=False, on_lost="cancel")
        before = time.monotonic()
        with pytest.raises(LockLost):
            async with lock:
                await asyncio.sleep(30)
        assert time.monotonic() - before < 10
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # nothing is left to be cancelled

        with pytest.raises(LockLost):  # a body that swallows the cancellation
            async with lock:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(30)
        with pytest.raises(KeyError):
            async with lock:
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    raise KeyError from None
        assert task.cancelling() == 0

        with pytest.raises(LockLost):  # a body that blocks the loop beyond the deadline, so that nothing could be told
            async with lock:
                time.sleep(0.3)
        await asyncio.sleep(0.05)

    asyncio.run(main())


def test_on_lost_cancel_does_not_swallow_a_cancellation_from_outside() -> None:
    async def main() -> None:
        lock = AsyncLock("l", backend=LocalBackend(), lease=0.2, heartbeat=False, on_lost="cancel")

        async def work() -> None:
            async with lock as hold:
                try:
                    await asyncio.sleep(30)
                finally:
                    assert hold.lost
                    task.cancel()  # by whoever

        task = asyncio.create_task(work())
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_record_deleted_by_hand_is_noticed(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, lease=0.6)
    rid = RecordId("", "l", LOCKS)

    def body(hold: Any) -> None:
        asyncio.run(wipe(backend_url, rid))
        eventually(lambda: hold.lost)
        assert not lock.locked()  # no renewal has made it anew

    with pytest.raises(LockLost):
        kind.body(lock, body)

    def short(hold: Any) -> None:
        asyncio.run(wipe(backend_url, rid))

    with pytest.raises(LockLost):  # no heartbeat came by: the release finds out
        kind.body(kind.lock(backend=backend_url), short)


@pytest.mark.parametrize("how", ["deleted by hand", "broken", "taken by another"])
def test_a_renewal_neither_revives_nor_steals_a_lost_lock(
    kind: Kind, backend_url: str, how: str, _fresh: contextlib.ExitStack
) -> None:
    lock, other = kind.lock(backend=backend_url), kind.lock(backend=apart(backend_url, _fresh))
    late, rid = lock.acquire(), RecordId("", "l", LOCKS)
    other.break_() if how == "broken" else asyncio.run(wipe(backend_url, rid))
    successor = other.acquire(wait=0) if how == "taken by another" else None
    with pytest.raises(LockLost):
        late.extend()
    assert late.lost
    if successor is None:
        assert not lock.locked()
        assert lock.info() is None
    else:
        assert lock.info().token == successor.token
        successor.extend()
        successor.release()


# ------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_only_grow(kind: Kind, backend_url: str, _fresh: contextlib.ExitStack) -> None:
    locks = [kind.lock(backend=backend_url), kind.lock(backend=apart(backend_url, _fresh))]
    rid, tokens = RecordId("", "l", LOCKS), []
    for number in range(1000):
        hold = locks[number % 2].acquire(wait=30)
        tokens.append(hold.token)
        hold.release()
    short = kind.lock(backend=backend_url, lease=0.4, heartbeat=False)
    tokens.append(short.acquire(wait=30).token)
    tokens.append(short.acquire(wait=30).token)  # after expiry
    tokens.append(start(locks[1].acquire, wait=30).result(60).token)
    locks[0].break_()
    tokens.append(start(locks[0].acquire, wait=30).result(60).token)
    asyncio.run(wipe(backend_url, rid))
    hold = start(kind.lock(backend=apart(backend_url, _fresh)).acquire, wait=30).result(60)
    tokens.append(hold.token)
    hold.release()
    assert all(later > earlier for earlier, later in zip(tokens, tokens[1:], strict=False))
    assert len(tokens) == 1005


# ------------------------------------------------------------------------------------------------ lost replies, outages


def test_a_claim_whose_reply_is_lost_leaves_no_lock(kind: Kind, backend_url: str) -> None:
    backend = Faulty(open_backend(backend_url))
    lock = kind.lock(backend=backend)
    for when in ("before", "after"):
        backend.plant("claim", when)  # type: ignore[arg-type]
        with pytest.raises(BackendUnavailable):
            lock.acquire()
        hold = kind.lock(backend=backend_url).acquire(wait=0)
        assert hold is not None
        hold.release()


@pytest.mark.parametrize("backend_url", ["redis", "postgres"], indirect=True)  # one command claims there
def test_a_claim_whose_reply_never_comes_leaves_no_lock(kind: Kind, backend_url: str) -> None:
    with through_proxy(backend_url) as (url, proxy):
        lock = kind.lock(backend=f"{url}&timeout=1")
        assert not lock.locked()  # connected
        proxy.mute()  # the claim arrives, and is applied
        try:
            lock.acquire().release()
        except BackendUnavailable:
            pass
        hold = kind.lock(backend=backend_url).acquire(wait=0)
        assert hold is not None
        hold.release()


def test_a_release_that_its_backend_sends_again_after_a_stall_is_no_loss() -> None:
    """Meanwhile another's claim, without an answer too, was taken back: its tombstone stands in the place of ours."""

    class Stalled(Faulty):
        def blocking(self) -> Backend:
            return self

        async def release(self, rid: RecordId, **given: Any) -> Any:
            await self.inner.release(rid, **given)
            await self.inner.release(rid, attempt=b"another's"[:8], token=None)
            time.sleep(self.timeout / 2)
            return await self.inner.release(rid, **given)

    stalled = Stalled(LocalBackend())
    stalled.timeout = 0.1
    with Lock("l", backend=stalled):
        pass


def test_a_release_whose_reply_is_lost_is_a_release(kind: Kind, backend_url: str) -> None:
    backend = Faulty(open_backend(backend_url))
    lock = kind.lock(backend=backend)
    hold = lock.acquire()
    backend.plant("release", "after", 2)
    hold.release()
    assert backend.calls.count("release") == 3
    lock.acquire(wait=0).release()


class TakenBetween(Faulty):
    """A backend that sends a release twice, as its first reply was lost; `between` runs in between."""

    between: Callable[[], Any] = staticmethod(lambda: None)

    def blocking(self) -> "TakenBetween":
        self.inner = self.inner.blocking()
        return self

    def asynchronous(self) -> "TakenBetween":
        self.inner = self.inner.asynchronous()
        return self

    async def release(self, *args: Any, **kwargs: Any) -> Any:
        await self.inner.release(*args, **kwargs)
        await asyncio.to_thread(self.between) if self.between_in_thread else self.between()
        return await self.inner.release(*args, **kwargs)

    between_in_thread = False


@pytest.mark.parametrize("gone", [False, True])
def test_a_release_sent_twice_with_a_successor_in_between_is_no_loss(kind: Kind, backend_url: str, gone: bool) -> None:
    backend = TakenBetween(open_backend(backend_url))
    backend.between_in_thread = kind.name == "async"
    other = Lock("l", backend=backend_url)
    taken: list[Any] = []

    def between() -> None:
        taken.append(start(other.acquire, wait=0).result(30))
        if gone:
            taken[0].release()

    backend.between = between  # type: ignore[method-assign]
    kind.body(kind.lock(backend=backend), lambda hold: None)
    if not gone:
        assert taken[0].remaining() > 0
        taken[0].extend()
        taken[0].release()


def test_a_body_that_another_overtook_is_told_though_that_one_has_left(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    told: list[str] = []
    configure(hooks=[lambda event: told.append(event.name)])
    other = Lock("l", backend=apart(backend_url, _fresh))

    def overtake(hold: Any) -> None:
        assert other.break_()
        theirs = other.acquire(wait=0)
        assert theirs is not None
        theirs.release()
        held = (
            hold._held
        )  # the other's token is told from a later one by as much as the reply to our claim may have taken
        time.sleep(0.01 + 2 * (held.granted - held.begun))

    with pytest.raises(LockLost, match="taken away"):
        kind.body(kind.lock(backend=backend_url), overtake)
    assert "lease_lost" in told
    hold = kind.lock(backend=backend_url).acquire()
    overtake(hold)
    with pytest.raises(NotHeld, match="taken away"):
        hold.release()


def test_a_release_repeated_after_a_successor_came_is_no_loss(kind: Kind, backend_url: str) -> None:
    class Cut(TakenBetween):
        async def release(self, *args: Any, **kwargs: Any) -> Any:
            if taken:
                return await self.inner.release(*args, **kwargs)
            await self.inner.release(*args, **kwargs)
            await asyncio.to_thread(self.between) if self.between_in_thread else self.between()
            raise BackendUnavailable("its reply is lost")

    backend = Cut(open_backend(backend_url))
    backend.between_in_thread = kind.name == "async"
    other = Lock("l", backend=backend_url)
    taken: list[Any] = []

    def between() -> None:
        taken.append(start(other.acquire, wait=0).result(30))
        time.sleep(0.2)  # so long that it looks as if it had been there before the release

    backend.between = between  # type: ignore[method-assign]
    kind.body(kind.lock(backend=backend), lambda hold: None)
    taken[0].extend()
    taken[0].release()


def test_an_outage_at_the_end_of_a_block_is_not_the_bodys_fault(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    backend.timeout = 0.1
    backend.blocking().timeout = backend.asynchronous().timeout = 0.1
    lock = kind.lock(backend=backend, lease=0.5)
    backend.plant("release", "before", 10_000)
    ran: list[int] = []
    kind.body(lock, lambda hold: ran.append(1))
    assert ran == [1]
    backend.faults.clear()
    lock.acquire(wait=10).release()  # when the lease has ended


def test_an_explicit_release_tells_of_an_outage_and_may_be_repeated(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    backend.blocking().timeout = backend.asynchronous().timeout = 0.1
    lock = kind.lock(backend=backend)
    hold = lock.acquire()
    backend.plant("release", "before", 10_000)
    with pytest.raises(BackendUnavailable):
        hold.release()
    backend.faults.clear()
    assert lock.locked()
    hold.release()
    assert not lock.locked()
    with pytest.raises(NotHeld):
        hold.release()


def test_without_its_server_nothing_is_locked(kind: Kind) -> None:
    lock = kind.lock(backend="redis://127.0.0.1:1/?timeout=1", wait=5)
    ran: list[Any] = []
    with pytest.raises(BackendUnavailable):
        lock.acquire()
    with pytest.raises(BackendUnavailable):
        kind.body(lock, ran.append)
    assert ran == []


def test_a_waiter_outlives_a_hiccup_of_the_subscription(kind: Kind, _fresh: contextlib.ExitStack) -> None:
    backend = Faulty(LocalBackend())
    hold = kind.lock(backend=backend.inner).acquire()
    backend.plant("changed", "before", 3)
    waiter = start(kind.lock(backend=backend).acquire, wait=20)
    eventually(lambda: not backend.faults)
    hold.release()
    waiter.result(30).release()


# ---------------------------------------------------------------------------------------------------------- operators


def test_break_frees_the_lock_wakes_waiters_and_tells(
    kind: Kind, backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    told: list[Event] = []
    configure(hooks=[told.append])
    operator = kind.lock(backend=apart(backend_url, _fresh))
    lock = kind.lock(backend=backend_url, lease=0.9)
    assert operator.break_() is False
    assert told == []
    hold = lock.acquire()
    waiter = start(kind.lock(backend=apart(backend_url, _fresh)).acquire)
    assert operator.info().token == hold.token
    assert operator.break_() is True
    theirs = waiter.result(30)
    assert theirs.token > hold.token
    eventually(lambda: hold.lost)
    with pytest.raises(NotHeld):
        hold.release()
    theirs.check()
    theirs.release()
    [broken] = [event for event in told if event.name == "broken"]
    assert broken.token == hold.token
    assert [event.token for event in told if event.name == "lease_lost"] == [hold.token]


def test_breaking_a_lock_of_this_process_tells_its_holder_at_once(kind: Kind) -> None:
    lock = kind.lock(backend=LocalBackend())
    hold = lock.acquire()
    waiter = start(lock.acquire)
    lock.break_()
    assert hold.lost
    waiter.result(30).release()


def test_what_happens_is_told(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    told: list[Event] = []
    configure(hooks=[told.append])
    backend = LocalBackend()
    lock = kind.lock("secret", backend=backend, lease=0.2, heartbeat=False)
    hold = lock.acquire()
    assert start(lock.acquire, wait=0).result(30) is None
    later = start(kind.lock("secret", backend=backend).acquire).result(30)
    later.release()
    assert [event.name for event in told] == ["claimed", "busy", "waited", "taken_over", "released"]
    assert {event.token for event in told} == {None, hold.token, later.token}
    assert all("secret" not in repr(event) for event in told)
    assert "secret" not in repr(later)
    assert "secret" not in repr(lock._inner if kind.name == "async" else lock)


def test_a_hook_that_fails_breaks_no_lock(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="idempotent")

    def fail(event: Event) -> None:
        raise RuntimeError

    configure(hooks=[fail])
    lock = kind.lock(backend=LocalBackend())
    kind.body(lock, lambda hold: None)
    assert not lock.locked()


# --------------------------------------------------------------------------------------------------------- @serialized


def test_serialized_runs_one_at_a_time_per_key_and_remembers_nothing(kind: Kind, backend_url: str) -> None:
    inside: dict[int, int] = {}
    ran: list[int] = []
    most: list[int] = []
    lock = threading.Lock()

    def work(account: int, amount: int = 1) -> int:
        with lock:
            inside[account] = inside.get(account, 0) + 1
            most.append(inside[account])
        time.sleep(0.01)
        with lock:
            inside[account] -= 1
            ran.append(account)
        return amount

    if kind.name == "sync":
        function = serialized(key="account:{account}", backend=backend_url)(work)
        answers = [future.result(60) for future in [start(function, n % 2, amount=n) for n in range(10)]]
    else:

        @serialized(key="account:{account}", backend=backend_url)
        async def function_async(account: int, amount: int = 1) -> int:
            return await asyncio.to_thread(work, account, amount)

        async def main() -> list[int]:
            return await asyncio.gather(*(function_async(n % 2, amount=n) for n in range(10)))

        answers = asyncio.run(main())
    assert answers == list(range(10))
    assert sorted(ran) == [0] * 5 + [1] * 5
    assert set(most) == {1}


def test_serialized_and_lock_exclude_each_other(backend_url: str) -> None:
    @serialized("account:{account}", backend=backend_url, wait=0)
    def work(account: int) -> int:
        return account

    with Lock("account:42", backend=backend_url):
        with pytest.raises(LockTimeout):
            start(work, 42).result(30)
        assert start(work, 43).result(30) == 43
    assert work(42) == 42


def test_serialized_is_a_plain_function_and_serves_methods() -> None:
    backend = LocalBackend()

    class Account:
        number = 7

        @serialized(key="{self.number}:{amount}", backend=backend)
        def pay(self, amount: int) -> int:
            """Pay."""
            return self.number + amount

        @classmethod
        @serialized(key="c", backend=backend)
        def make(cls) -> "Account":
            return cls()

        @serialized(key="s", backend=backend)
        @staticmethod
        def static() -> int:
            return 1

        @serialized(key=lambda self, order: order, backend=backend)
        async def ship(self, order: str) -> str:
            return order

    account = Account.make()
    assert account.pay(1) == 8
    assert Account.pay.__doc__ == "Pay."
    assert Account.pay.__name__ == "pay"
    assert account.static() == 1
    assert asyncio.iscoroutinefunction(account.ship)
    assert asyncio.run(account.ship("o")) == "o"
    with pytest.raises(KeyRequired):
        asyncio.run(account.ship(""))


def test_a_serialized_function_that_calls_itself_is_refused() -> None:
    @serialized(key="k", backend=LocalBackend())
    def work(depth: int) -> int:
        return work(depth - 1) if depth else 0

    with pytest.raises(LockError, match="not re-entrant"):
        work(1)
    assert work(0) == 0


def test_a_serialized_functions_own_exception_wins_and_frees() -> None:
    backend = LocalBackend()

    @serialized(key="k", backend=backend)
    def work() -> None:
        raise KeyError("own")

    @serialized(key="k", backend=backend)
    async def work_async() -> None:
        raise KeyError("own")

    for _ in range(2):
        with pytest.raises(KeyError):
            work()
        with pytest.raises(KeyError):
            asyncio.run(work_async())
    assert not Lock("k", backend=backend).locked()


def test_a_serialized_function_that_outlives_its_lease_is_told() -> None:
    @serialized(key="k", backend=LocalBackend(), lease=0.05, heartbeat=False)
    def work() -> int:
        time.sleep(0.1)
        return 1

    @serialized(key="k", backend=LocalBackend(), lease=0.05, heartbeat=False, on_lost="cancel")
    async def work_async() -> int:
        await asyncio.sleep(30)
        return 1

    with pytest.raises(LockLost):
        work()
    with pytest.raises(LockLost):
        asyncio.run(work_async())


def test_an_async_function_behind_a_sync_wrapper_is_refused() -> None:
    async def inner() -> int:
        return 1

    @serialized(key="k", backend=LocalBackend())
    def work() -> Any:
        return inner()

    with pytest.raises(TypeError, match="has not run"):
        work()


def test_what_cannot_be_serialized_is_refused_at_decoration() -> None:
    def generator() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        serialized(key="k")(generator)
    with pytest.raises(TypeError, match="not <class"):
        serialized(key="k")(LocalBackend)
    with pytest.raises(TypeError, match="template"):
        serialized(generator(), backend="local://")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no parameter"):
        serialized(key="{nobody}")(lambda order: order)
    with pytest.raises(ValueError, match="cancel"):
        serialized(key="k", on_lost="cancel")(lambda: None)


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"lease": 0}, ValueError, "lease"),
        ({"lease": None}, TypeError, "lease"),
        ({"lease": "30"}, TypeError, "lease"),
        ({"wait": -1}, ValueError, "wait"),
        ({"max_hold": 0}, ValueError, "max_hold"),
        ({"heartbeat": 1}, TypeError, "heartbeat"),
        ({"namespace": None}, TypeError, "namespace"),
        ({"backend": 5}, TypeError, "backend"),
        ({"backend": "nowhere://"}, ValueError, "scheme"),
        ({"on_lost": "explode"}, ValueError, "on_lost"),
        ({"on_lost": None}, ValueError, "on_lost"),
        ({"on_lost": asyncio.sleep}, TypeError, "on_lost"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    for make in (Lock, AsyncLock):
        with pytest.raises(error, match=says):
            make("l", **options)


def test_a_name_is_text_and_not_empty() -> None:
    for name in ("", None):
        with pytest.raises(KeyRequired):
            Lock(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_lost"):
        Lock("l", on_lost="cancel")  # type: ignore[arg-type]


def test_leases_are_not_rounded_to_seconds(kind: Kind, backend_url: str) -> None:
    lock = kind.lock(backend=backend_url, lease=timedelta(milliseconds=1500))
    hold = lock.acquire()
    assert 1.0 < hold.remaining() < 1.5
    assert 1.0 < lock.info().lease_left <= 1.5
    hold.release()


def test_the_configured_backend_is_used_and_none_is_warned_of(kind: Kind) -> None:
    lock = kind.lock()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hold = lock.acquire()
    assert [warning.category for warning in said] == [ProcessLocalWarning]
    backend = LocalBackend()
    configure(backend=backend)
    other = start(lock.acquire, wait=0).result(30)
    assert other is not None
    assert other.token != hold.token
    hold.release()
    other.release()


def test_a_client_of_the_other_colour_is_refused() -> None:
    import redis.asyncio

    from idempotent import RedisBackend

    lock = Lock("l", backend=RedisBackend(redis.asyncio.Redis()))
    with pytest.raises(BackendError, match=r"redis\.Redis"):
        lock.acquire()
