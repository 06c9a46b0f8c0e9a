"""Heartbeat threads, the listener's bell, flights and nested calls: what must hold when threads, signals or the
collector come at a bad moment.
"""

import asyncio
import contextlib
import functools
import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from probes import Counter, Gate

from idempotent import (
    Applied,
    Backend,
    BackendError,
    InProgress,
    LeaseLost,
    LocalBackend,
    UnstableKey,
    _run,
    current_call,
    idempotent,
    open_backend,
)
from idempotent import _flow as flow
from idempotent._drive import drive
from idempotent._record import Answer, RecordId
from idempotent._signals import ThreadWaiter
from idempotent.backends._listener import Listener


class SlowRenewals(Faulty):
    """A local backend whose renewals wait until `let_go` is set; `under_way` counts those that wait."""

    def __init__(self) -> None:
        super().__init__(LocalBackend())
        self.under_way: list[float] = []
        self.let_go = threading.Event()

    def blocking(self) -> "SlowRenewals":
        return self

    async def renew(self, *args: Any, **kwargs: Any) -> Answer:
        self.under_way.append(kwargs["lease"])
        assert self.let_go.wait(30)
        return await self.inner.renew(*args, **kwargs)


def eventually(holds: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------------- heartbeats


def test_a_slow_renewal_does_not_hold_up_those_of_other_runs(gate: Gate) -> None:
    backend = SlowRenewals()

    def work(number: int) -> None:
        gate.opened.wait(30)

    long = idempotent(backend=backend, lease=1.2)(work)
    short = idempotent(backend=backend, lease=0.6, namespace="short")(work)
    calls = [COLOURS[0].start(long, 1)]
    eventually(lambda: backend.under_way == [1.2])
    calls += [COLOURS[0].start(short, number) for number in range(3)]  # begun while the only thread is held up
    eventually(lambda: backend.under_way.count(0.6) >= 3)
    backend.let_go.set()
    gate.opened.set()
    for call in calls:
        call.result(30)


def test_heartbeats_come_back_after_a_thread_could_not_be_started(
    monkeypatch: pytest.MonkeyPatch, effects: Counter
) -> None:
    backend = Faulty(LocalBackend())

    def work(number: int) -> int:
        while number and backend.calls.count("renew") < 2:
            time.sleep(0.005)
        return effects.hit()

    work = idempotent(backend=backend, lease=0.3)(work)
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "idempotent-heartbeat":
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="thread"):
        work(0)
    assert effects.count == 0
    monkeypatch.undo()
    assert work(0) == 1  # the key was free
    assert work(1) == 2


def test_a_run_that_ends_waits_for_its_renewal_and_has_none_after_it(effects: Counter) -> None:
    backend = SlowRenewals()

    def work() -> int:
        eventually(lambda: backend.under_way)
        threading.Timer(0.05, backend.let_go.set).start()
        return effects.hit()

    work = idempotent(backend=backend, lease=0.6)(work)
    assert work() == 1
    renewed = len(backend.under_way)
    eventually(lambda: not any(thread.name == "idempotent-heartbeat" for thread in threading.enumerate()))
    assert len(backend.under_way) == renewed


def test_an_outage_past_the_lease_is_not_asked_about_in_a_hurry(gate: Gate) -> None:
    backend = Faulty(LocalBackend())
    backend.plant("renew", "before", times=100_000)

    def work() -> None:
        call = current_call()
        eventually(lambda: call.lease_lost)
        asked = backend.calls.count("renew")
        time.sleep(0.6)  # two leases
        assert backend.calls.count("renew") - asked <= 8

    idempotent(backend=backend, lease=0.3)(work)()


def test_events_are_counted_right_by_many_threads() -> None:
    work = idempotent(lambda n: n, backend=LocalBackend(), key="{n}", namespace="n")
    work(1)
    before, threads = sys.getswitchinterval(), [threading.Thread(target=lambda: [work(1) for _ in range(2000)])]
    threads += [threading.Thread(target=threads[0]._target) for _ in range(7)]  # type: ignore[attr-defined]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert work.stats()["replayed"] == 16_000


class Beats(Faulty):
    """A backend whose renewals take until `let_go` is set, in either colour; `history` says what came when."""

    def __init__(self, inner: Backend, colour: Colour) -> None:
        super().__init__(inner.asynchronous() if colour.is_async else inner.blocking())
        self.is_async = colour.is_async
        self.history: list[str] = []
        self.let_go = threading.Event()

    def blocking(self) -> "Beats":
        return self

    def asynchronous(self) -> "Beats":
        return self

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        self.history.append(f"{operation} begins")
        while operation == "renew" and not self.let_go.is_set():
            await asyncio.sleep(0.002) if self.is_async else time.sleep(0.002)
        answer = await super()._do(operation, *args, **kwargs)
        self.history.append(f"{operation} ends")
        return answer


@pytest.mark.parametrize("backend_url", ["local", "redis", "postgres"], indirect=True)  # each takes a second
def test_no_renewal_outlives_its_call(backend_url: str, colour: Colour) -> None:
    inner = open_backend(backend_url)
    drive(inner.blocking().read(RecordId("n", "none")))  # connected, and its table made: the lease is short
    backend = Beats(inner, colour)

    def work(error: bool) -> None:
        backend.let_go.clear()
        eventually(lambda: backend.history[-1] == "renew begins")
        threading.Timer(0.03, backend.let_go.set).start()
        if error:
            raise KeyError("own")

    work = colour.define(work, backend=backend, lease=0.9)

    async def main() -> None:
        await work(False)
        with contextlib.suppress(KeyError):
            await work(True)
        await asyncio.sleep(0.35)

    if colour.is_async:
        asyncio.run(main())
    else:
        work(False)
        with contextlib.suppress(KeyError):
            work(True)
        time.sleep(0.35)
    history = backend.history
    assert history.count("renew begins") == history.count("renew ends") >= 2
    for ending in ("complete begins", "release begins"):
        at = history.index(ending)
        assert history[at - 1] == "renew ends", "the one under way was waited for"
        assert history[at + 1] == ending.replace("begins", "ends")
    assert history[-1] == "release ends", "and none came after"
    assert "lease_lost" not in work.stats()


# -------------------------------------------------------------------------------------------------- the current call


def test_a_call_and_its_record_are_of_one_attempt(backend_url: str, colour: Colour) -> None:
    inner = open_backend(backend_url)

    def work(order: str) -> tuple[Any, ...]:
        call = current_call()
        assert call is not None
        call.check()
        found = drive(inner.blocking().read(RecordId("n", call.key)))
        assert found is not None
        return call.key, call.attempt, call.token, found.attempt, found.token

    work = colour.define(work, backend=inner, namespace="n", key="{order}")
    outcome = colour.call(work.outcome, "o")
    key, attempt, token, *stored = outcome.value
    assert (key, token) == ("o", outcome.token)
    assert stored == [attempt, token]
    assert colour.call(work.peek, "o").attempt == attempt
    assert colour.call(work, "other")[1] != attempt


def test_check_raises_lease_lost_once_another_call_may_run(colour: Colour) -> None:
    backend = Faulty(LocalBackend())
    after: list[str] = []

    def work() -> None:
        call = current_call()
        assert call is not None
        call.check()
        backend.plant("renew", "before", 10_000)
        eventually(lambda: call.lease_lost)
        try:
            call.check()
        finally:
            backend.faults.clear()
        after.append("an effect that must not happen twice")

    work = colour.define(work, backend=backend, namespace="n", key="k", lease=0.6, wait=0)
    with pytest.raises(LeaseLost) as lost:
        colour.call(work)
    assert lost.value.token > 0
    assert lost.value.key_digest == RecordId("n", "k").digest
    assert after == []
    assert colour.call(work.peek) is None, "it is an error like any other: the key is free"


# ------------------------------------------------------------------------------------------ what suspends is refused


class Suspending(Faulty):
    """A backend with no blocking twin that says so only when it is asked."""

    def blocking(self) -> Backend:
        return self

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0)
        return await super()._do(operation, *args, **kwargs)


def test_a_sync_function_on_a_backend_that_suspends_is_told_so_and_does_not_run(effects: Counter) -> None:
    backend = Suspending(LocalBackend())
    work = idempotent(backend=backend, key="k", namespace="n")(effects.hit)
    for ask in (work, work.outcome, work.peek, work.explain, work.forget):
        with pytest.raises(BackendError, match="suspends, so it cannot serve a sync function"):
            ask()
    assert effects.count == 0
    assert backend.calls == []


def test_a_sync_functions_probe_that_suspends_is_told_so_and_nothing_runs(effects: Counter) -> None:
    async def ask_the_provider() -> Applied:
        await asyncio.sleep(0)
        return Applied(7)

    backend = LocalBackend()
    work = idempotent(backend=backend, key="k", namespace="n", on_crash=lambda call: ask_the_provider())(effects.hit)
    died = idempotent(backend=backend, key="k", namespace="n", on_crash="raise")(_interrupted)
    with pytest.raises(KeyboardInterrupt):
        died()
    for _ in range(2):
        with pytest.raises(BackendError, match=r"probe.* suspends"):
            work()
    assert work.peek().state == "unknown"
    assert effects.count == 0


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_a_flow_that_is_refused_is_closed() -> None:
    closed: list[str] = []

    async def flow() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append("closed")

    refused = flow()
    with pytest.raises(BackendError):
        drive(refused)
    assert closed == ["closed"]


# ---------------------------------------------------------------------------------------------- the listener's bell


def test_waiters_outnumber_what_the_bell_holds_while_the_server_does_not_answer() -> None:
    answers = threading.Event()

    def connect() -> Any:
        assert answers.wait(30)
        raise OSError("it was down")

    listener = Listener(connect)
    joined: list[bool] = []

    def join(number: int) -> None:
        waiter = ThreadWaiter()
        joined.append(drive(listener.join(f"channel {number}", waiter, 30)))
        listener.leave(f"channel {number}", waiter)

    threads = [threading.Thread(target=join, args=(number,), daemon=True) for number in range(600)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(listener._waiting) == 600)
    answers.set()
    for thread in threads:
        thread.join(20)
    assert joined == [False] * 600


# ---------------------------------------------------------------------------------------------------------- flights


def test_the_collector_may_end_a_lost_call_while_flights_are_looked_at() -> None:
    flights = _run.Flights()
    lost = flow.Run(_plan(flights), RecordId("n", "k"), b"", dict)
    assert flights.board(lost, 0.0, 10.0) is None
    done = threading.Event()

    def collected_at_a_bad_moment() -> None:
        with flights._lock:
            flights.land(lost)
        done.set()

    threading.Thread(target=collected_at_a_bad_moment, daemon=True).start()
    assert done.wait(20)


def _plan(flights: _run.Flights) -> Any:
    class Plan:
        pass

    plan = Plan()
    plan.flights, plan.wait = flights, 30.0  # type: ignore[attr-defined]
    return plan


def test_arguments_and_results_are_not_kept_after_the_call(colour: Colour) -> None:
    class Argument:
        pass

    argument = Argument()
    gone = weakref.ref(argument)
    work = colour.define(lambda order, heavy: None, backend="local://", ignore=("heavy",))
    gc.disable()
    try:
        colour.call(work, 1, argument) if not colour.is_async else None
        if colour.is_async:
            asyncio.run(_alone(work, argument))
        del argument
        if colour.is_async:
            gc.collect()  # the event loop's own cycles
        assert gone() is None
    finally:
        gc.enable()


async def _alone(work: Any, argument: Any) -> None:
    await work(1, argument)


def test_a_task_that_starts_the_next_one_for_ever_keeps_no_chain_of_calls() -> None:
    hops = 300

    tasks: set[asyncio.Task[None]] = set()

    async def main() -> int:
        @idempotent(backend="local://", key="{number}", namespace="hops")
        async def hop(number: int) -> None:
            if number < hops:
                task = asyncio.create_task(hop(number + 1))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        await hop(0)
        while tasks:
            await asyncio.sleep(0)
        gc.collect()
        calls = [found for found in gc.get_objects() if type(found) is flow.Call]
        return sum(call._run.rid.namespace == "hops" for call in calls)  # others' tests may keep some

    assert asyncio.run(main()) < 20


def test_a_call_that_meets_itself_through_a_finished_one_is_told_at_once() -> None:
    async def main() -> None:
        @idempotent(backend="local://", key="inner")
        async def inner() -> None:
            later.append(asyncio.create_task(again()))

        @idempotent(backend="local://", key="outer")
        async def outer() -> None:
            await inner()
            with pytest.raises(InProgress, match="own key"):
                await later[0]

        async def again() -> None:
            await asyncio.sleep(0.01)  # the inner call is over by now
            call = current_call()
            assert call is not None
            assert call.key == "outer"
            await outer()

        later: list[asyncio.Task[None]] = []
        await outer()

    asyncio.run(main())


# ------------------------------------------------------------------------------------ what is no function of its own


def test_an_async_function_behind_a_plain_wrapper_is_refused_and_its_key_is_free(effects: Counter) -> None:
    async def charge() -> int:
        return effects.hit()

    def wrapper() -> Any:
        return charge()

    wrapped = idempotent(backend="local://", key="k")(wrapper)
    for _ in range(2):
        with pytest.raises(TypeError, match="directly on the async function"):
            wrapped()
    assert wrapped.peek() is None
    assert effects.count == 0


def test_a_function_that_charges_and_returns_a_generator_runs_once(effects: Counter) -> None:
    def charge() -> Any:
        effects.hit()
        return (number for number in range(3))

    charge = idempotent(backend="local://")(charge)
    for _ in range(2):
        with pytest.raises(Exception, match="could not be kept"):
            charge()
    assert effects.count == 1


def test_partials_with_other_arguments_are_other_calls(colour: Colour, effects: Counter) -> None:
    def pay(provider: str, order: str, *, currency: str = "EUR") -> str:
        effects.hit()
        return f"{provider} {order} {currency}"

    stripe, adyen, dollars = (
        idempotent(backend="local://")(partial)
        for partial in (
            functools.partial(pay, "stripe"),
            functools.partial(pay, "adyen"),
            functools.partial(pay, "stripe", currency="USD"),
        )
    )
    assert [pay("o") for pay in (stripe, adyen, dollars) * 2] == ["stripe o EUR", "adyen o EUR", "stripe o USD"] * 2
    assert effects.count == 3
    named = idempotent(backend="local://", key="{provider}:{order}")(functools.partial(pay, "stripe"))
    assert named.key_for("o") == "stripe:o"


def test_bound_methods_of_two_instances_are_other_calls() -> None:
    class Account:
        def __init__(self, number: int) -> None:
            self.number = number

        def close(self) -> str:
            return f"closed {self.number}"

    with pytest.raises(UnstableKey, match=r"self\.id"):
        idempotent(backend="local://")(Account(1).close)()
    one, two = (idempotent(backend="local://", key="{self.number}")(Account(number).close) for number in (1, 2))
    assert [one(), two(), one()] == ["closed 1", "closed 2", "closed 1"]
