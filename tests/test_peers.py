"""What others get wrong, each as a test of ours; `colour` and `backend_url` as everywhere."""

import asyncio
import gc
import threading
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import time_machine
from colours import Colour
from probes import Counter, Gate
from test_calls import same

from idempotent import (
    InProgress,
    LocalBackend,
    ResultUnavailable,
    UnstableKey,
    configure,
    idempotent,
    open_backend,
)
from idempotent._drive import drive
from idempotent._record import RecordId


@pytest.mark.parametrize("value", [0, False, "", [], {}, None], ids=repr)
def test_falsy_results_are_results(backend_url: str, colour: Colour, effects: Counter, value: Any) -> None:
    def work() -> Any:
        effects.hit()
        return value

    work = colour.define(work, backend=backend_url)
    assert same(colour.call(work), value)
    replay = colour.call(work.outcome)
    assert replay.replayed
    assert same(replay.value, value)
    assert effects.count == 1


def test_an_identical_retry_with_fingerprints_on_is_a_replay(backend_url: str, colour: Colour) -> None:
    work = colour.define(lambda order, amount: [order, amount], backend=backend_url, key="{order}", namespace="n")
    first = colour.call(work.outcome, "o", amount=Decimal(1))
    again = colour.call(work.outcome, "o", amount=Decimal(1))
    assert (first.replayed, again.replayed) == (False, True)
    assert first.value == again.value == ["o", Decimal(1)]


@pytest.mark.parametrize(
    ("one", "other"), [(Decimal(1), "1"), ((1, 2), [1, 2]), (1, True), (1, 1.0), ({"1": 1}, {1: 1}), (None, "None")]
)
def test_arguments_that_differ_in_type_do_not_share_a_key(
    backend_url: str, colour: Colour, one: Any, other: Any
) -> None:
    work = colour.define(lambda value: value, backend=backend_url, namespace="n")
    assert work.key_for(one) != work.key_for(other)
    for replayed in (False, True):
        for value in (one, other):
            outcome = colour.call(work.outcome, value)
            assert same(outcome.value, value)
            assert outcome.replayed is replayed


def test_two_decorators_on_one_backend_keep_their_own_settings(backend_url: str, colour: Colour) -> None:
    class Declined(Exception):
        pass

    runs: list[str] = []
    leases: list[float | None] = []

    def made(name: str, **options: Any) -> Any:
        def work(fails: bool) -> str:
            runs.append(name)
            record = drive(open_backend(backend_url).blocking().read(RecordId(name, "k")))
            leases.append(record and record.lease_left)
            if fails:
                raise Declined
            return name

        return colour.define(work, backend=backend_url, key="k", namespace=name, fingerprint=False, **options)

    first = made("first", ttl=60, lease=20, keep_result=False)
    second = made("second", ttl=7200, lease=200, error_ttl={Declined: 600})
    for work, keeps in ((first, False), (second, True)):
        for _ in range(2):
            with pytest.raises(Declined):
                colour.call(work, True)
        record = colour.call(work.peek, True)
        assert (record is not None) is keeps
    colour.call(second.forget, True)
    for _ in range(2):
        answers = [colour.call(work.outcome, False) for work in (first, second)]
    assert [(answer.value, answer.replayed) for answer in answers] == [(None, True), ("second", True)]
    assert runs == ["first", "first", "second", "first", "second"]
    for found, lease in zip(leases, (20, 20, 200, 20, 200), strict=True):
        assert found is not None
        assert lease - 15 < found <= lease
    for work, ttl in ((first, 60), (second, 7200)):
        assert ttl - 30 < colour.call(work.peek, False).expires_in <= ttl


@pytest.mark.parametrize("backend_url", ["local", "redis", "postgres", "mariadb"], indirect=True)
@pytest.mark.parametrize("hours", [-5, 30])
def test_the_callers_clock_neither_ends_nor_lengthens_anything(
    backend_url: str, colour: Colour, effects: Counter, gate: Gate, hours: int
) -> None:
    def work(order: str) -> int:
        if order == "slow":
            gate.pass_through()
        return effects.hit()

    work = colour.define(work, backend=backend_url, namespace="n", key="{order}", ttl=3600)
    impatient = colour.define(work.__wrapped__, backend=backend_url, namespace="n", key="{order}", wait=0)
    running = colour.start(work, "slow")
    assert gate.entered.wait(30)
    first = colour.call(work.outcome, "done")
    # The wall clock alone: of deadlines of one's own the monotonic one decides.
    with time_machine.travel(datetime.now(UTC) + timedelta(hours=hours), tick=True):
        outcome = colour.call(work.outcome, "done")
        assert (outcome.value, outcome.replayed, outcome.token) == (first.value, True, first.token)
        assert 0 <= outcome.age < 60
        with pytest.raises(InProgress) as refused:
            colour.call(impatient, "slow")
        assert 5 < refused.value.retry_after <= 30
        during = colour.call(work.outcome, "meanwhile")
        record = colour.call(work.peek, "meanwhile")
        assert 3500 < record.expires_in <= 3600
        assert 0 <= record.age < 60
    gate.opened.set()
    assert running.result(30) == effects.count == 3
    assert colour.call(work.outcome, "meanwhile").replayed
    assert first.token < during.token < colour.call(work.outcome, "later").token


def test_an_unencodable_result_neither_runs_twice_nor_blocks_the_key(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    def work() -> Any:
        effects.hit()
        return threading.Lock()

    work = colour.define(work, backend=backend_url, wait=0)
    for _ in range(3):
        with pytest.raises(ResultUnavailable):
            colour.call(work)
    assert effects.count == 1


@pytest.mark.parametrize("value", [(1, "a"), {1: "2"}, [(1,)], {"a": {1, 2}}], ids=repr)
def test_replays_keep_tuples_and_integer_keys(backend_url: str, colour: Colour, value: Any) -> None:
    work = colour.define(lambda: value, backend=backend_url, namespace="n")
    for replayed in (False, True):
        outcome = colour.call(work.outcome)
        assert same(outcome.value, value)
        assert outcome.replayed is replayed


def test_an_ordinary_exception_does_not_block_the_retry(backend_url: str, colour: Colour, effects: Counter) -> None:
    def work() -> int:
        if effects.hit() == 1:
            raise ConnectionError
        return effects.count

    work = colour.define(work, backend=backend_url, wait=0)
    with pytest.raises(ConnectionError):
        colour.call(work)
    assert colour.call(work) == 2


def test_the_lease_and_the_ttl_are_two_durations(backend_url: str, colour: Colour) -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> int:
        entered.set()
        assert leave.wait(30)
        return 1

    work = colour.define(work, backend=backend_url, ttl=86_400, lease=5, wait=0)
    first = colour.start(work)
    assert entered.wait(30)
    with pytest.raises(InProgress) as refused:
        colour.call(work)
    assert refused.value.retry_after <= 5
    leave.set()
    assert first.result(30) == 1


@pytest.mark.parametrize(
    "value", [object(), float("nan"), threading.Lock(), (n for n in range(3))], ids=lambda v: type(v).__name__
)
def test_arguments_without_a_stable_form_are_refused_and_never_dropped(
    colour: Colour, effects: Counter, value: Any
) -> None:
    configure(backend="local://")
    by_arguments = colour.define(lambda value: effects.hit(), namespace="n")
    by_template = colour.define(lambda order, value: effects.hit(), namespace="n", key="{order}")
    with pytest.raises(UnstableKey, match="ignore="):
        colour.call(by_arguments, value)
    with pytest.raises(UnstableKey, match="fingerprint="):
        colour.call(by_template, "o", value)
    assert effects.count == 0


def test_a_rename_keeps_its_keys_when_a_namespace_is_given(backend_url: str, colour: Colour, effects: Counter) -> None:
    def before(order: str) -> int:
        return effects.hit()

    def after(order: str) -> int:
        return effects.hit()

    old = colour.define(before, backend=backend_url, namespace="charge")
    new = colour.define(after, backend=backend_url, namespace="charge")
    assert colour.call(old, "o") == colour.call(new, "o") == 1


def test_a_replay_is_a_copy_of_its_own(backend_url: str, colour: Colour, effects: Counter) -> None:
    @dataclass
    class Basket:
        lines: list[int]

    def work() -> Basket:
        effects.hit()
        return Basket([1])

    work.__annotations__["return"] = Basket
    work = colour.define(work, backend=backend_url)
    colour.call(work).lines.append(2)
    answers = colour.storm(work, 3)
    answers[0].lines.append(3)
    assert answers[1] == answers[2] == colour.call(work) == Basket([1])
    assert effects.count == 1


def test_ten_thousand_calls_leave_no_task_thread_or_flight_behind() -> None:
    backend = LocalBackend(maxsize=100)

    @idempotent(backend=backend)
    async def work(order: int) -> int:
        return order

    async def main() -> None:
        for order in range(10_000):
            await work(order)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    threads = threading.active_count()
    asyncio.run(main())
    gc.collect()
    assert threading.active_count() <= threads
    assert len(backend._store.settled) <= 100
    assert backend._store.open == {}
    assert not backend._store.signals._waiters


def test_two_hundred_duplicates_ask_the_backend_twice_in_all(colour: Colour, effects: Counter) -> None:
    from faulty import Faulty

    backend = Faulty(LocalBackend())

    def work() -> int:
        threading.Event().wait(0.1)
        return effects.hit()

    work = colour.define(work, backend=backend)
    assert colour.storm(work, 200) == [1] * 200
    assert backend.calls == ["claim", "complete"]
