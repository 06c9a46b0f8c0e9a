"""Heartbeat threads, the listener's bell, flights and nested calls: what must hold when threads, signals or the
collector come at a bad moment.
"""

import asyncio
import contextlib
import functools
import gc
import os
import queue
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
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
    Lock,
    UnstableKey,
    _run,
    current_call,
    idempotent,
    open_backend,
)
from idempotent import _flow as flow
from idempotent._drive import drive
from idempotent._record import Answer, RecordId
from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends._listener import Listener, _Line


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


class LateReplies(Faulty):
    """A local backend whose renewals are answered seven seconds later, on a clock that only they move."""

    def __init__(self) -> None:
        super().__init__(LocalBackend())
        self.late = 0.0

    def blocking(self) -> "LateReplies":
        return self

    def now(self) -> float:
        return 100.0 + self.late

    async def renew(self, *args: Any, **kwargs: Any) -> Answer:
        answer = await self.inner.renew(*args, **kwargs)
        self.late += 7.0
        return answer


def test_a_renewed_lease_counts_from_before_the_renewal_was_sent() -> None:
    """The backend's lease was already running while the reply was on its way."""
    clock: Any = LateReplies()

    @idempotent(backend=clock, lease=30)
    def charge() -> float:
        call: Any = current_call()
        drive(flow.renew(clock, call._run))
        return call._run.valid_until

    assert charge() == 100.0 + 30 * (1 - _run.MARGIN)
    clock.late = 0.0
    hold: Any = Lock("l", backend=clock, lease=30, heartbeat=False).acquire()
    hold._held.valid_until = 105.0
    drive(hold._held.beat(clock))
    assert hold._held.valid_until == 100.0 + 30 * (1 - _run.MARGIN)
    hold._held.valid_until = time.monotonic() + 30
    hold.release()


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


class Wire:
    """A server, and the connection to it, that counts who reads: each message is its channel and a newline."""

    def __init__(self) -> None:
        self._ours, self._theirs = socket.socketpair()
        self.readers: list[str] = []
        self.closed = threading.Event()
        self.on_receive: Callable[[], None] = lambda: None

    def publish(self, *channels: str) -> None:
        self._theirs.sendall("".join(f"{channel}\n" for channel in channels).encode())

    def fileno(self) -> int:
        return self._ours.fileno()

    def subscribe(self, channels: set[str]) -> list[tuple[bool, str]]:
        return [(True, channel) for channel in channels]

    def unsubscribe(self, channels: list[str]) -> tuple[()]:
        return ()

    def receive(self) -> Iterator[tuple[bool, str]]:
        self.readers.append(threading.current_thread().name)
        self.on_receive()
        read = self._ours.recv(4096)
        if not read:
            raise OSError("the server has closed the connection")
        for channel in read.decode().split():
            yield False, channel

    def ping(self) -> tuple[()]:
        return ()

    def close(self) -> None:
        self._ours.close()
        self.closed.set()

    def hang_up(self) -> None:
        self._theirs.close()


class Waits:
    """Waits of threads on a listener, each until its channel's message or `timeout` seconds."""

    def __init__(self) -> None:
        self.wires = [Wire()]
        self.listener = Listener(lambda: self.wires[-1])
        self.woken: queue.SimpleQueue[str] = queue.SimpleQueue()

    def wait(self, channel: str, timeout: float = 30) -> None:
        async def runs() -> bool:
            return True

        async def sleep(seconds: float) -> None:
            time.sleep(seconds)

        drive(self.listener.changed(channel, ThreadWaiter(), runs, sleep, timeout, 30))
        self.woken.put(channel)

    def start(self, channel: str, timeout: float = 30) -> None:
        threading.Thread(target=self.wait, args=(channel, timeout), name=channel, daemon=True).start()

    @property
    def reader(self) -> Any:
        line = self.listener._line
        return None if line is None else line.reader


@pytest.fixture
def waits() -> Iterator[Waits]:
    waits = Waits()
    yield waits
    waits.listener.close()
    for wire in waits.wires:
        wire.close()
        wire.hang_up()


def test_whoever_comes_to_read_what_another_has_read_does_not_block() -> None:
    wire = Wire()
    line = _Line(wire)
    told: list[Any] = []
    wire.publish("a")
    since = line.has_come(30)
    assert since is not None
    line.receive(told.append)
    wire._ours.setblocking(False)  # a read that found nothing would raise
    line.receive(told.append)
    line.receive(told.append, since=since)
    assert (told, len(wire.readers)) == ([(False, "a")], 1)
    line.close()
    wire.hang_up()


def test_a_thread_that_waits_alone_reads_for_itself(waits: Waits) -> None:
    for _ in range(3):
        waits.start("a")
        eventually(lambda: waits.reader is not None)
        waits.wires[0].publish("a")
        assert waits.woken.get(timeout=0.9) == "a"  # it would look by itself after a second
        eventually(lambda: waits.reader is None)
    assert waits.wires[0].readers == ["a"] * 3


def test_a_thread_that_reads_wakes_the_others_and_hands_the_reading_on(waits: Waits) -> None:
    wire = waits.wires[0]
    waits.start("a")
    eventually(lambda: waits.reader is not None)
    waits.start("b")
    waits.start("c")
    eventually(lambda: waits.listener._waiters == 3 and {"a", "b", "c"} <= waits.listener._heard)
    wire.publish("b")
    assert waits.woken.get(timeout=0.9) == "b"
    wire.publish("a", "c")  # what is behind its own message it leaves to the next reader
    assert {waits.woken.get(timeout=0.9), waits.woken.get(timeout=0.9)} == {"a", "c"}
    assert wire.readers == ["a", "a"]
    waits.start("b")
    waits.start("c")
    eventually(lambda: waits.listener._waiters == 2 and waits.reader is None)
    eventually(lambda: waits.listener._line.thread_reads)
    wire.publish("b")
    assert waits.woken.get(timeout=0.9) == "b"
    assert wire.readers[-1] == "idempotent-listener"
    wire.publish("c")
    assert waits.woken.get(timeout=0.9) == "c"


def test_a_task_that_waits_beside_a_reading_thread_is_woken(waits: Waits) -> None:
    async def runs() -> bool:
        return True

    async def main() -> None:
        for _ in range(2):
            task = asyncio.create_task(waits.listener.changed("t", TaskWaiter(), runs, asyncio.sleep, 30, 30))
            await asyncio.sleep(0.05)
            waits.wires[0].publish("t")
            await asyncio.wait_for(task, 0.9)

    asyncio.run(main())  # alone: the listener's thread reads
    waits.start("a")
    eventually(lambda: waits.reader is not None)
    asyncio.run(main())
    assert waits.wires[0].readers[-2:] == ["a", "a"]
    waits.wires[0].publish("a")
    assert waits.woken.get(timeout=0.9) == "a"
    asyncio.run(main())  # alone again, on a channel that is still subscribed


def test_a_thread_that_reads_waits_no_longer_than_it_was_to(waits: Waits) -> None:
    waits.wait("a", 0.01)
    began = time.monotonic()
    waits.wait("a", 0.2)
    assert 0.2 <= time.monotonic() - began < 0.9
    assert waits.wires[0].readers == []


def test_a_listener_that_is_closed_wakes_its_reader_and_closes_the_connection(waits: Waits) -> None:
    waits.start("a", 60)
    eventually(lambda: waits.reader is not None)
    line, wire = waits.listener._line, waits.wires[0]
    began = time.monotonic()
    waits.listener.close()
    assert time.monotonic() - began < 1.5
    assert wire.closed.is_set()
    assert line is not None
    assert line.reader is None


@pytest.mark.parametrize("how", ["hung up", "interrupted"])
def test_a_connection_that_breaks_in_the_hands_of_its_reader_is_made_anew_and_everyone_woken(
    waits: Waits, how: str
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    wire = waits.wires[0]
    raised: list[str] = []

    def reads() -> None:
        try:
            waits.wait("a")
        except KeyboardInterrupt:
            raised.append("interrupted")
            waits.woken.put("a")

    threading.Thread(target=reads, name="a", daemon=True).start()
    eventually(lambda: waits.reader is not None)
    waits.start("b")
    eventually(lambda: waits.listener._waiters == 2 and "b" in waits.listener._heard)
    waits.wires.append(Wire())
    if how == "hung up":
        wire.hang_up()
    else:
        wire.on_receive = interrupt
        wire.publish("b")
    assert {waits.woken.get(timeout=0.9), waits.woken.get(timeout=0.9)} == {"a", "b"}
    assert raised == (["interrupted"] if how == "interrupted" else [])
    assert wire.closed.wait(10)
    assert wire.readers == ["a"]
    waits.start("a")
    eventually(lambda: waits.reader is not None)
    waits.wires[1].publish("a")
    assert waits.woken.get(timeout=0.9) == "a"


def test_a_handler_that_forks_while_its_thread_reads_leaves_the_connection_to_the_parent(waits: Waits) -> None:
    wire = waits.wires[0]
    children: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        try:
            waits.wait("a", 0.6)
        finally:
            if children == [0]:
                os._exit(1 if waits.woken.empty() or wire.closed.is_set() or wire.readers else 7)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7
        assert waits.woken.get(timeout=1) == "a"
        waits.start("a")
        eventually(lambda: waits.reader is not None)
        wire.publish("a")
        assert waits.woken.get(timeout=0.9) == "a"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------- flights


def test_the_collector_may_end_a_lost_call_while_flights_are_looked_at() -> None:
    flights = _run.Flights()
    lost = flow.Run(_plan(flights), RecordId("n", "k"), b"", dict)
    assert flights.board(lost, 0.0) is None
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
    plan.flights, plan.wait, plan.trust = flights, 30.0, 10.0  # type: ignore[attr-defined]
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
