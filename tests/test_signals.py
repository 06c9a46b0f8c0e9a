"""Waiting for a key to change: no wake-up is lost, by threads and by tasks alike."""

import asyncio
import gc
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from idempotent._signals import Signals, TaskWaiter, ThreadWaiter, Waiter

LONG = 30.0
SHORT = 0.01


def finish(coroutine: Any) -> Any:
    """The result of a coroutine that must never suspend."""
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    return stopped.value.value


# ------------------------------------------------------------------------------------------------------ threads


def test_a_thread_that_was_woken_before_it_waits_does_not_wait() -> None:
    waiter = ThreadWaiter()
    waiter.wake()
    assert finish(waiter.wait(LONG)) is True
    assert finish(waiter.wait(None)) is True


def test_a_thread_that_nobody_wakes_waits_for_its_timeout() -> None:
    started = time.monotonic()
    assert finish(ThreadWaiter().wait(SHORT)) is False
    assert time.monotonic() - started >= SHORT / 2


@pytest.mark.parametrize("timeout", [LONG, None])
def test_a_waiting_thread_is_woken_from_another(timeout: float | None) -> None:
    waiter = ThreadWaiter()
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(lambda: finish(waiter.wait(timeout)))
        waiter.wake()
        assert waited.result(LONG) is True


# -------------------------------------------------------------------------------------------------------- tasks


def test_a_task_that_was_woken_before_it_waits_does_not_wait() -> None:
    async def main() -> None:
        waiter = TaskWaiter()
        waiter.wake()
        waiter.wake()
        assert await asyncio.wait_for(waiter.wait(None), LONG) is True

    asyncio.run(main())


def test_a_task_that_nobody_wakes_waits_for_its_timeout() -> None:
    async def main() -> None:
        assert await TaskWaiter().wait(SHORT) is False

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [LONG, None])
def test_a_waiting_task_is_woken_by_another(timeout: float | None) -> None:
    async def main() -> None:
        waiter = TaskWaiter()
        waiting = asyncio.create_task(waiter.wait(timeout))
        await asyncio.sleep(0)
        assert not waiting.done()
        waiter.wake()
        assert await asyncio.wait_for(waiting, LONG) is True

    asyncio.run(main())


@pytest.mark.parametrize("timeout", [LONG, None])
def test_a_waiting_task_is_woken_from_another_thread(timeout: float | None) -> None:
    async def main() -> None:
        waiter = TaskWaiter()
        threading.Thread(target=waiter.wake).start()
        assert await asyncio.wait_for(waiter.wait(timeout), LONG) is True

    asyncio.run(main())


def test_a_wait_that_ended_leaves_no_timer_behind() -> None:
    async def main() -> None:
        waiter = TaskWaiter()
        waiter.wake()
        await waiter.wait(LONG)
        timers: Any = asyncio.get_running_loop()
        assert [timer for timer in timers._scheduled if not timer.cancelled()] == []

    asyncio.run(main())


def test_a_cancelled_wait_ends_as_cancelled_and_a_late_wake_is_harmless() -> None:
    errors: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        waiter = TaskWaiter()
        waiting = asyncio.create_task(waiter.wait(LONG))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        waiter.wake()
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(main())
    assert errors == []


def test_a_wake_after_the_timeout_is_harmless() -> None:
    errors: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        waiter = TaskWaiter()
        assert await waiter.wait(SHORT) is False
        waiter.wake()
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(main())
    assert errors == []


def test_waking_a_task_whose_loop_is_closed_is_harmless() -> None:
    async def main() -> TaskWaiter:
        return TaskWaiter()

    waiter = asyncio.run(main())
    waiter.wake()
    signals = Signals()
    signals.add("k", waiter)
    awake = ThreadWaiter()
    signals.add("k", awake)
    signals.notify("k")
    assert finish(awake.wait(0)) is True


def test_a_task_waiter_is_made_on_a_running_loop_only() -> None:
    with pytest.raises(RuntimeError):
        TaskWaiter()


# ------------------------------------------------------------------------------------------------------ signals


def woken(waiter: ThreadWaiter) -> bool:
    return bool(finish(waiter.wait(0)))


def test_a_change_wakes_all_who_wait_for_the_key_and_nobody_else() -> None:
    signals = Signals()
    first, second, other = ThreadWaiter(), ThreadWaiter(), ThreadWaiter()
    signals.add("k", first)
    signals.add("k", second)
    signals.add("other", other)
    signals.notify("k")
    assert (woken(first), woken(second), woken(other)) == (True, True, False)


def test_a_change_between_registering_and_waiting_is_not_lost() -> None:
    signals = Signals()
    waiter = ThreadWaiter()
    signals.add("k", waiter)
    signals.notify("k")
    assert finish(waiter.wait(LONG)) is True


def test_a_waiter_that_was_taken_off_is_not_woken() -> None:
    signals = Signals()
    waiter = ThreadWaiter()
    signals.add("k", waiter)
    signals.discard("k", waiter)
    signals.notify("k")
    signals.notify_all()
    assert not woken(waiter)


def test_a_waiter_may_be_taken_off_twice_and_also_when_it_was_never_on() -> None:
    signals = Signals()
    waiter, other = ThreadWaiter(), ThreadWaiter()
    signals.add("k", waiter)
    signals.add("k", other)
    signals.discard("k", waiter)
    signals.discard("k", waiter)
    signals.discard("never", waiter)
    assert list(signals._waiters) == ["k"]
    signals.notify("k")
    assert woken(other)


def test_a_change_of_a_key_that_nobody_waits_for_is_harmless() -> None:
    Signals().notify("k")
    Signals().notify_all()


def test_everyone_is_woken_when_changes_may_have_been_missed() -> None:
    signals = Signals()
    waiters = [ThreadWaiter() for _ in range(4)]
    for place, waiter in enumerate(waiters):
        signals.add(f"k{place % 2}", waiter)
    signals.notify_all()
    assert all(woken(waiter) for waiter in waiters)


def test_the_keys_are_those_that_somebody_waits_for() -> None:
    signals = Signals()
    waiter = ThreadWaiter()
    assert not signals._waiters
    signals.add("a", waiter)
    signals.add("b", waiter)
    assert sorted(signals._waiters) == ["a", "b"]
    signals.discard("a", waiter)
    assert list(signals._waiters) == ["b"]


def test_threads_and_tasks_of_several_loops_wait_for_one_key_together() -> None:
    signals = Signals()
    registered = threading.Barrier(4)

    def wait_on(make: Callable[[], Waiter]) -> bool:
        async def main() -> bool:
            waiter = make()
            signals.add("k", waiter)
            try:
                registered.wait(LONG)
                return await waiter.wait(LONG)
            finally:
                signals.discard("k", waiter)

        return asyncio.run(main())

    with ThreadPoolExecutor(3) as pool:
        waits = [pool.submit(wait_on, make) for make in (ThreadWaiter, TaskWaiter, TaskWaiter)]
        registered.wait(LONG)
        signals.notify("k")
        assert [wait.result(LONG) for wait in waits] == [True, True, True]
    assert not signals._waiters


def test_threads_that_come_and_go_leave_nothing_behind() -> None:
    signals = Signals()

    def come_and_go(_: int) -> None:
        for _ in range(200):
            waiter = ThreadWaiter()
            signals.add("k", waiter)
            signals.notify("k")
            assert woken(waiter)
            signals.discard("k", waiter)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(8)))
    assert not signals._waiters


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_forgets_the_waiters_of_its_parent_and_their_lock() -> None:
    signals = Signals()
    waiter = ThreadWaiter()
    signals.add("k", waiter)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child() -> None:
        answers.put(list(signals._waiters))

    with signals._lock:
        process = context.Process(target=child)
        process.start()
    process.join(LONG)
    assert process.exitcode == 0
    assert answers.get() == []
    assert list(signals._waiters) == ["k"]
