"""Cancellation of a task while it waits, runs and finishes; Ctrl-C in a thread; coroutines thrown away."""

import asyncio
import gc
import threading
import time
from typing import Any

import pytest
from faulty import Faulty

from idempotent import Backend, InProgress, LocalBackend, OutcomeUnknown, idempotent, open_backend


class Paused(Faulty):
    """A backend that stops before or after one command until it is let go."""

    def __init__(self, inner: Backend, operation: str, when: str) -> None:
        super().__init__(inner)
        self.operation, self.when = operation, when
        self.reached = asyncio.Event()
        self.go_on = asyncio.Event()

    def asynchronous(self) -> Backend:
        self.inner = self.inner.asynchronous()
        return self

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(operation)
        if operation == self.operation and self.when == "before":
            await self._pause()
        result = await getattr(self.inner, operation)(*args, **kwargs)
        if operation == self.operation and self.when == "after":
            await self._pause()
        return result

    async def _pause(self) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def only_this_task() -> bool:
    return asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("when", ["before", "after"])
def test_cancelled_while_claiming_leaves_no_lease(backend_url: str, when: str) -> None:
    async def main() -> None:
        paused = Paused(open_backend(backend_url), "claim", when)
        ran = []

        async def work() -> int:
            ran.append(1)
            return 1

        slow = idempotent(backend=paused, namespace="n", wait=0)(work)
        plain = idempotent(backend=backend_url, namespace="n", wait=0)(work)
        task = asyncio.create_task(slow())
        await paused.reached.wait()
        await cancelled(task)
        assert ran == []
        assert await plain() == 1
        assert only_this_task()

    asyncio.run(main())


@pytest.mark.parametrize("on_crash", ["rerun", "raise"])
def test_cancelled_while_running_is_a_crash_that_is_told_at_once(backend_url: str, on_crash: Any) -> None:
    async def main() -> None:
        entered = asyncio.Event()
        hang = True

        @idempotent(backend=backend_url, on_crash=on_crash, wait=0)
        async def work() -> int:
            entered.set()
            if hang:
                await asyncio.Event().wait()
            return 1

        task = asyncio.create_task(work())
        await entered.wait()
        with pytest.raises(InProgress):
            await work()
        await cancelled(task)
        hang = False
        if on_crash == "rerun":
            assert await work() == 1
        else:
            with pytest.raises(OutcomeUnknown):
                await work()
            assert await work.resolve(work.key_for(), result=2)
            assert await work() == 2
        assert only_this_task()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("times", [1, 3])
def test_cancelled_while_finishing_still_records_the_outcome(backend_url: str, when: str, times: int) -> None:
    async def main() -> None:
        paused = Paused(open_backend(backend_url), "complete", when)
        ran = []

        @idempotent(backend=paused)
        async def work() -> int:
            ran.append(1)
            return len(ran)

        task = asyncio.create_task(work())
        await paused.reached.wait()
        for _ in range(times):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await work() == 1
        assert ran == [1]
        assert only_this_task()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["before", "after"])
def test_cancelled_while_releasing_still_releases(backend_url: str, when: str) -> None:
    async def main() -> None:
        paused = Paused(open_backend(backend_url), "release", when)
        broken = True

        @idempotent(backend=paused, wait=0)
        async def work() -> int:
            if broken:
                raise KeyError
            return 1

        task = asyncio.create_task(work())
        await paused.reached.wait()
        await cancelled(task)
        broken = False
        assert await work() == 1
        assert only_this_task()

    asyncio.run(main())


def test_a_cancelled_waiter_disturbs_nobody(backend_url: str) -> None:
    async def main() -> None:
        entered, go_on = asyncio.Event(), asyncio.Event()
        ran = []

        async def work() -> int:
            ran.append(1)
            entered.set()
            await go_on.wait()
            return len(ran)

        # The second waits in the process behind the first; the third, on a backend object of its own, in the store.
        first = idempotent(backend=backend_url, namespace="n")(work)
        apart = idempotent(backend=Faulty(open_backend(backend_url)), namespace="n")(work)
        running = asyncio.create_task(first())
        await entered.wait()
        waiters = [asyncio.create_task(first()), asyncio.create_task(apart()), asyncio.create_task(first())]
        while first.stats().get("waited", 0) < 2 or apart.stats().get("waited", 0) < 1:
            await asyncio.sleep(0)
            time.sleep(0.001)
        await cancelled(waiters[0])
        await cancelled(waiters[1])
        go_on.set()
        assert await running == await waiters[2] == 1
        assert ran == [1]
        assert only_this_task()

    asyncio.run(main())


def test_a_coroutine_thrown_away_lets_its_process_go_on(backend_url: str) -> None:
    async def leave() -> None:
        task = asyncio.ensure_future(work())
        await entered.wait()
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # thrown away is what it is to be

    entered = asyncio.Event()
    hang = [True]

    @idempotent(backend=backend_url, lease=0.3)
    async def work() -> int:
        entered.set()
        while hang[0]:
            await asyncio.sleep(3600)
        return 1

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.run_until_complete(loop.shutdown_asyncgens())  # as asyncio.run does: closes the backend's connections
    loop.close()
    gc.collect()
    hang[0] = False
    assert asyncio.run(work()) == 1


def test_two_event_loops_share_one_backend(backend_url: str) -> None:
    ran: list[int] = []

    @idempotent(backend=backend_url)
    async def work(order: int) -> int:
        ran.append(order)
        await asyncio.sleep(0.05)
        return order

    async def storm() -> list[int]:
        return await asyncio.gather(*(work(order) for order in [1, 2, 3] * 5))

    answers: list[list[int]] = []
    threads = [threading.Thread(target=lambda: answers.append(asyncio.run(storm()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    answers.append(asyncio.run(storm()))
    assert answers == [[1, 2, 3] * 5] * 4
    assert sorted(ran) == [1, 2, 3]


def test_ctrl_c_while_claiming_and_while_finishing_leaves_no_lease() -> None:
    class Interrupted(Faulty):
        def blocking(self) -> Backend:
            return self

        async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
            result = await getattr(self.inner, operation)(*args, **kwargs)
            if operation in stops:
                stops.remove(operation)
                raise KeyboardInterrupt
            return result

    stops: list[str] = []
    ran: list[int] = []

    @idempotent(backend=Interrupted(LocalBackend()), wait=0)
    def work(order: int) -> int:
        ran.append(order)
        return order

    stops.append("claim")
    with pytest.raises(KeyboardInterrupt):
        work(1)
    assert ran == []
    assert work(1) == 1
    stops.append("complete")
    with pytest.raises(KeyboardInterrupt):
        work(2)
    assert work(2) == 2
    assert ran == [1, 2]


def test_a_blocked_event_loop_loses_its_lease_and_is_told(shared_backend_url: str) -> None:
    """A function that blocks its loop cannot renew: another takes over, and the late one is told."""
    ran: list[str] = []
    overtaken = threading.Event()

    @idempotent(backend=shared_backend_url, namespace="n", lease=0.3)
    async def blocking() -> str:
        assert overtaken.wait(30)
        return "late"

    @idempotent(backend=Faulty(open_backend(shared_backend_url)), namespace="n", lease=0.3)
    def patient() -> str:
        ran.append("patient")
        return "patient"

    from idempotent import LeaseLost

    errors: list[BaseException] = []

    def run() -> None:
        try:
            asyncio.run(blocking())
        except LeaseLost as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not blocking.stats().get("claimed"):
        time.sleep(0.01)
    assert patient() == "patient"
    overtaken.set()
    thread.join(30)
    assert len(errors) == 1
    assert patient() == "patient"
    assert ran == ["patient"]
