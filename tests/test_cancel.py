"""Cancellation of a task while it waits, runs and finishes; Ctrl-C in a thread; coroutines thrown away."""

import asyncio
import collections
import contextlib
import gc
import random
import signal
import sys
import threading
import time
from typing import Any

import pytest
import redis
from colours import COLOURS, Colour
from faulty import Faulty
from probes import Counter, Gate
from proxy import Proxy
from servers import Address
from test_calls import backend_at, in_both_places

from idempotent import (
    Backend,
    InProgress,
    LeaseLost,
    LocalBackend,
    OutcomeUnknown,
    RedisBackend,
    idempotent,
    open_backend,
)
from idempotent._options import split_url


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


def interrupt_main_thread_when_it_waits() -> None:
    """Send SIGINT to the main thread, as soon as it has stood still for a while: it is in a system call or a lock."""
    ident = threading.main_thread().ident
    assert ident is not None
    place, since = None, time.monotonic()
    while time.monotonic() - since < 0.03:
        frame = sys._current_frames()[ident]
        if (frame.f_code, frame.f_lasti) != place:
            place, since = (frame.f_code, frame.f_lasti), time.monotonic()
        del frame
        time.sleep(0.001)
    signal.pthread_kill(ident, signal.SIGINT)


@in_both_places
def test_ctrl_c_in_a_call_that_waits_disturbs_nobody(backend_url: str, place: str) -> None:
    gate, effects = Gate(), Counter()

    def work() -> int:
        gate.pass_through()
        return effects.hit()

    def interrupt() -> None:
        while not second.stats().get("waited"):
            time.sleep(0.001)
        interrupt_main_thread_when_it_waits()

    first = idempotent(backend=backend_url, namespace="n", lease=60)(work)
    second = idempotent(backend=backend_at(place, backend_url), namespace="n", lease=60)(work)
    running = threading.Thread(target=first)
    running.start()
    assert gate.entered.wait(30)
    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            second()
    finally:
        interrupter.join(30)
        gate.opened.set()
        running.join(30)
    assert second() == effects.count == 1


def test_cancelled_at_any_moment_of_an_exchange_leaves_no_lease_no_mix_up_and_no_task(shared_backend_url: str) -> None:
    async def main() -> None:
        ran: collections.Counter[int] = collections.Counter()

        @idempotent(backend=shared_backend_url, key="{number}", wait=5, lease=60)
        async def work(number: int) -> str:
            ran[number] += 1
            return f"receipt {number}"

        took = []
        for number in (-1, -2, -3):
            began = time.monotonic()
            await work(number)
            took.append(time.monotonic() - began)
        dice = random.Random(1)
        for number in range(150):
            task = asyncio.ensure_future(work(number))
            await asyncio.sleep(dice.uniform(0, 1.2 * min(took)))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                assert await task == f"receipt {number}"
            assert await work(number) == f"receipt {number}"
            assert ran[number] <= 2
        assert only_this_task()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("shared_backend_url", "colour", "ready_made"),
    [(kind, colour, False) for kind in ("redis", "postgres", "mariadb") for colour in COLOURS]
    + [("redis", COLOURS[0], True)],  # redis-py itself minds the interruptions of its other reads
    indirect=["shared_backend_url"],
    ids=str,
)
@pytest.mark.parametrize("step", ["claim", "complete", "release"])
@pytest.mark.parametrize("command", ["comes late", "is lost"])
def test_interrupted_while_a_reply_is_under_way_leaves_no_lease_and_no_mix_up(
    shared_backend_url: str, colour: Colour, ready_made: bool, step: str, command: str
) -> None:
    ran: collections.Counter[str] = collections.Counter()
    expected = {"claim": "hit 1", "complete": "hit 1", "release": "hit 2"}[step]

    def work(order: str) -> str:
        ran[order] += 1
        if (order, ran[order]) == ("hit", 1) and step != "claim":
            proxy.stall = True
            if step == "release":
                raise KeyError(order)
        return f"{order} {ran[order]}"

    def interrupt() -> None:
        while not proxy.stall:
            time.sleep(0.001)
        interrupt_main_thread_when_it_waits()
        go_on()

    def go_on() -> None:
        if command == "is lost":
            proxy.drop()
        proxy.stall = False

    async def cancel() -> None:
        assert await function("before") == "before 1"
        proxy.stall = step == "claim"
        task = asyncio.create_task(function("hit"))
        while not proxy.stall:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.05)  # by now it waits for the reply; elsewhere, too, it must come to no harm
        task.cancel()
        await asyncio.sleep(0)
        go_on()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [await function(order) for order in ("after", "hit", "before")] == ["after 1", expected, "before 1"]
        assert only_this_task()

    port = Address(shared_backend_url).port
    with Proxy("127.0.0.1", port) as proxy, contextlib.ExitStack() as stack:
        backend: str | Backend = shared_backend_url.replace(f":{port}/", f":{proxy.port}/")
        if ready_made:
            bare, options = split_url(str(backend), ("prefix",))
            client = stack.enter_context(redis.Redis.from_url(bare, socket_timeout=None))
            backend = stack.enter_context(RedisBackend(client, prefix=options["prefix"]))
        function = colour.define(work, backend=backend, key="{order}", wait=5, lease=60)
        if colour.is_async:
            asyncio.run(cancel())
        else:
            assert function("before") == "before 1"
            proxy.stall = step == "claim"
            interrupter = threading.Thread(target=interrupt)
            interrupter.start()
            with pytest.raises(KeyboardInterrupt):
                function("hit")
            interrupter.join(30)
            assert [function(order) for order in ("after", "hit", "before")] == ["after 1", expected, "before 1"]
    assert ran["hit"] == int(expected[-1])


def test_a_blocked_event_loop_loses_its_lease_and_is_told(backend_url: str) -> None:
    """A function that blocks its loop cannot renew: another takes over, and the late one is told."""
    ran: list[str] = []
    overtaken = threading.Event()

    @idempotent(backend=backend_url, namespace="n", lease=0.3)
    async def blocking() -> str:
        assert overtaken.wait(30)
        return "late"

    @idempotent(backend=Faulty(open_backend(backend_url)), namespace="n", lease=0.3)
    def patient() -> str:
        ran.append("patient")
        return "patient"

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
