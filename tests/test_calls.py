"""What callers are promised, on every backend and in both colours."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from probes import Counter, Gate
from pydantic import BaseModel

from idempotent import (
    Backend,
    FingerprintMismatch,
    InProgress,
    LocalBackend,
    OutcomeUnknown,
    ResultTypeWarning,
    ResultUnavailable,
    SerializationError,
    _config,
    current_call,
    open_backend,
)
from idempotent._drive import drive
from idempotent._record import RecordId


def apart(url: str) -> Backend:
    """Another backend object on the records of `url`: its calls meet the others in the store, not in the process."""
    return Faulty(open_backend(url))


in_both_places = pytest.mark.parametrize("place", ["in the process", "in the store"])


def backend_at(place: str, url: str) -> Backend | str:
    """What a duplicate is given so that it meets the first call there."""
    return apart(url) if place == "in the store" else url


def test_two_hundred_duplicates_run_once_and_agree(backend_url: str, colour: Colour, effects: Counter) -> None:
    def charge(order: str, amount: int) -> dict[str, Any]:
        time.sleep(0.05)
        return {"charge": effects.hit(), "order": order, "amount": amount}

    charge = colour.define(charge, backend=backend_url, key="charge:{order}")
    answers = colour.storm(charge, 200, "o1", amount=5)
    assert answers == [{"charge": 1, "order": "o1", "amount": 5}] * 200
    assert effects.count == 1


def test_a_function_that_raises_tells_nobody_a_result_and_runs_again_later(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    class DownstreamError(Exception):
        pass

    broken = True

    def charge(order: str) -> str:
        effects.hit()
        if broken:
            raise DownstreamError(order)
        return "done"

    charge = colour.define(charge, backend=backend_url, key="charge:{order}", wait=100)
    answers = colour.storm(charge, 200, "o1")
    assert collections.Counter(map(type, answers)) == {DownstreamError: 200}
    assert effects.count == 200
    broken = False
    assert colour.call(charge, "o1") == "done"
    assert colour.call(charge, "o1") == "done"
    assert effects.count == 201


def test_without_wait_a_duplicate_is_told_the_lease_left(backend_url: str, colour: Colour, gate: Gate) -> None:
    def slow() -> str:
        gate.pass_through()
        return "done"

    slow = colour.define(slow, backend=backend_url, wait=0, lease=20)
    first = colour.start(slow)
    assert gate.entered.wait(30)
    with pytest.raises(InProgress) as refused:
        colour.call(slow)
    assert 5 < refused.value.retry_after <= 20
    gate.opened.set()
    assert first.result(30) == "done"
    assert colour.call(slow) == "done"


@in_both_places
def test_a_duplicate_whose_wait_runs_out_is_refused_alike_and_leaves_the_runner_alone(
    backend_url: str, colour: Colour, gate: Gate, effects: Counter, place: str
) -> None:
    def slow() -> int:
        gate.pass_through()
        return effects.hit()

    first = colour.define(slow, backend=backend_url, namespace="n", lease=20)
    second = colour.define(slow, backend=backend_at(place, backend_url), namespace="n", lease=20, wait=0.3)
    running = colour.start(first)
    assert gate.entered.wait(30)
    before = colour.call(second.peek)
    began = time.monotonic()
    with pytest.raises(InProgress) as refused:
        colour.call(second)
    assert time.monotonic() - began >= 0.3
    assert 5 < refused.value.retry_after <= 20
    after = colour.call(second.peek)
    assert (after.state, after.token, after.attempt) == ("running", before.token, before.attempt)
    gate.opened.set()
    assert running.result(30) == 1
    replay = colour.call(second.outcome)
    assert (replay.value, replay.replayed, replay.token, effects.count) == (1, True, before.token, 1)


class Coin(Enum):
    HEADS = "heads"
    TAILS = "tails"


class Point(NamedTuple):
    x: int
    y: float


@dataclass
class Line:
    start: Point
    end: Point
    tags: set[str] = field(default_factory=set)


class Receipt(BaseModel):
    id: UUID
    total: Decimal
    at: datetime
    lines: list[tuple[str, Decimal]] = []


MOMENT = datetime(2026, 11, 24, 12, 30, 15, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
TYPED: list[tuple[Any, Any]] = [
    (None, None),
    (0, int),
    (False, bool),
    ("", str),
    ([], list[int]),
    ({}, dict[str, int]),
    (Line(Point(1, 2.5), Point(3, -0.5), {"a", "b"}), Line),
    (Point(1, 2.0), Point),
    ((1, "a", None), tuple[int, str, None]),
    (Decimal("10.50"), Decimal),
    (MOMENT, datetime),
    (UUID(int=7), UUID),
    (Coin.TAILS, Coin),
    (b"\x00\xff", bytes),
    ({1, 2, 3}, set[int]),
    ({"a": [Point(1, 2.0)], "b": []}, dict[str, list[Point]]),
    (Receipt(id=UUID(int=9), total=Decimal("9.90"), at=MOMENT, lines=[("x", Decimal("1.00"))]), Receipt),
    ([Receipt(id=UUID(int=9), total=Decimal("9.90"), at=MOMENT)], list[Receipt]),
]


def same(left: object, right: object) -> bool:
    """Equal in value and in type, all the way down."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and left != left:
        return right != right
    if isinstance(left, dict):
        return list(map(repr, left)) == list(map(repr, right)) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.mark.parametrize(("value", "annotation"), TYPED, ids=lambda v: getattr(v, "__name__", str(v))[:30])
def test_first_call_and_replay_are_equal_in_value_and_type(
    backend_url: str, colour: Colour, value: Any, annotation: Any, effects: Counter
) -> None:
    def produce():  # noqa: ANN202  annotated below
        effects.hit()
        return value

    produce.__annotations__["return"] = annotation
    produce = colour.define(produce, backend=backend_url, namespace="typed")
    first, replay = colour.call(produce), colour.call(produce)
    assert same(first, value)
    assert same(replay, value)
    assert effects.count == 1


PLAIN: list[Any] = [
    None,
    0,
    False,
    "",
    [],
    {},
    (1, (2, "x")),
    {1, 2},
    frozenset({"a"}),
    b"\x00",
    Decimal("1.10"),
    MOMENT,
    datetime(2026, 1, 2, tzinfo=UTC),
    date(2026, 1, 2),
    timedelta(seconds=1.5),
    UUID(int=1),
    {1: "a", 2: (3,)},
    float("nan"),
    [float("inf")],
    {"nested": [{"t": (1,)}]},
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_unannotated_standard_values_keep_their_type(backend_url: str, colour: Colour, value: Any) -> None:
    produce = colour.define(lambda: value, backend=backend_url, namespace="plain")
    assert same(colour.call(produce), value)
    replay = colour.call(produce.outcome)
    assert replay.replayed
    assert same(replay.value, value)


def test_unannotated_instances_come_back_as_dicts_from_the_first_call_on_with_a_warning(
    backend_url: str, colour: Colour
) -> None:
    def produce():  # noqa: ANN202  the lack of it is the point
        return Line(Point(1, 2.0), Point(3, 4.0))

    produce = colour.define(produce, backend=backend_url)
    with pytest.warns(ResultTypeWarning, match="produce"):
        first = colour.call(produce)
    assert isinstance(first, dict)
    assert same(colour.call(produce), first)


def test_a_result_that_cannot_be_encoded_ran_once_and_everyone_is_told_so(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    thing = object()

    def produce():  # noqa: ANN202  no annotation, no codec
        effects.hit()
        return thing

    produce = colour.define(produce, backend=backend_url)
    with pytest.raises(ResultUnavailable, match="will not run again") as own:
        colour.call(produce)
    assert own.value.result is thing
    for _ in range(2):
        with pytest.raises(ResultUnavailable, match="will not run again") as duplicate:
            colour.call(produce)
        assert duplicate.value.result is None
    assert effects.count == 1


def test_an_annotation_that_cannot_be_served_is_refused_at_decoration(colour: Colour) -> None:
    def produce() -> threading.Thread:
        raise AssertionError

    with pytest.raises(SerializationError, match=r"Thread"):
        colour.define(produce)


class DeclinedError(Exception):
    def __init__(self, code: str, amount: Decimal) -> None:
        super().__init__(code, amount)


class StolenCardError(DeclinedError):
    pass


def test_named_errors_are_replayed_and_others_release_the_key(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    errors: list[Exception] = [StolenCardError("stolen", Decimal("1.50"))]

    def charge(order: int) -> None:
        effects.hit()
        raise errors[-1]

    charge = colour.define(charge, backend=backend_url, error_ttl={DeclinedError: 60})
    for _ in range(3):
        with pytest.raises(DeclinedError) as caught:
            colour.call(charge, 1)
        assert type(caught.value) is StolenCardError
        assert caught.value.args == ("stolen", Decimal("1.50"))
    assert effects.count == 1
    errors.append(KeyError("not named"))
    for count in (2, 3):
        with pytest.raises(KeyError):
            colour.call(charge, 2)
        assert effects.count == count


def test_an_error_that_cannot_be_encoded_still_ends_the_record(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    def charge() -> None:
        effects.hit()
        raise DeclinedError("x", threading.Lock())  # type: ignore[arg-type]

    charge = colour.define(charge, backend=backend_url, error_ttl={DeclinedError: 60})
    with pytest.raises(DeclinedError):
        colour.call(charge)
    for _ in range(2):
        with pytest.raises(ResultUnavailable):
            colour.call(charge)
    assert effects.count == 1


class Interruption(BaseException):
    """What ends a run that is no ordinary error: its outcome is unknown where `on_crash` says so."""


@pytest.mark.parametrize("state", ["running", "lapsed", "completed", "failed", "unknown"])
def test_the_same_key_with_other_arguments_is_refused_in_every_state(
    backend_url: str, colour: Colour, gate: Gate, effects: Counter, state: str
) -> None:
    errors = {"failed": DeclinedError("no", Decimal(1)), "unknown": Interruption(), "lapsed": KeyError("not released")}

    def charge(order: str, amount: int) -> int:
        if effects.hit() == 1 and state in errors:
            raise errors[state]
        if state == "running":
            gate.pass_through()
        return amount

    faulty = Faulty(open_backend(backend_url))
    drive(faulty.blocking().read(RecordId("n", "none")))  # connected, and its table made, before a short lease begins
    charge = colour.define(
        charge,
        backend=faulty,
        key="charge:{order}",
        wait=10,
        lease=0.8 if state == "lapsed" else 30,
        error_ttl={DeclinedError: 60},
        on_crash="raise" if state == "unknown" else "rerun",
    )
    if state == "lapsed":
        faulty.plant("release", "before", times=10_000)
    first = colour.start(charge, "o1", 5)
    if state == "running":
        assert gate.entered.wait(30)
    else:
        assert first.exception(30) is errors.get(state)
    faulty.faults.clear()
    before = colour.call(charge.peek, "o1", 5)
    while state == "lapsed" and before.lease_left > 0:
        before = colour.call(charge.peek, "o1", 5)
    assert before.state == ("running" if state == "lapsed" else state)
    with pytest.raises(FingerprintMismatch) as refused:  # before any wait, replay or takeover
        colour.call(charge, "o1", 6)
    assert "o1" not in str(refused.value)
    after = colour.call(charge.peek, "o1", 5)
    assert (after.state, after.token, after.attempt) == (before.state, before.token, before.attempt)
    gate.opened.set()
    if state in ("failed", "unknown"):
        with pytest.raises(DeclinedError if state == "failed" else OutcomeUnknown):
            colour.call(charge, "o1", 5)
    else:
        assert colour.call(charge, "o1", 5) == 5
    assert effects.count == (2 if state == "lapsed" else 1)


def test_ignored_parameters_are_in_neither_key_nor_fingerprint(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    def charge(order: str, session: object) -> int:
        return effects.hit()

    by_template = colour.define(charge, backend=backend_url, key="{order}", ignore=("session",), namespace="t")
    by_arguments = colour.define(charge, backend=backend_url, ignore=("session",), namespace="a")
    for function in (by_template, by_arguments):
        assert colour.call(function, "o1", object()) == colour.call(function, "o1", session=object())
    assert effects.count == 2


def test_arguments_mutated_inside_the_function_change_nothing(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    def charge(lines: list[int]) -> int:
        lines.append(99)
        return effects.hit()

    charge = colour.define(charge, backend=backend_url)
    assert [colour.call(charge, [1, 2]), colour.call(charge, [1, 2])] == [1, 1]


@pytest.mark.parametrize("keys", [["Key-1", "KEY-1", "Key-1 ", "Kéy-1", "key-1"], ["a:b", "a", "b"], ["x" * 1000]])
def test_keys_are_compared_exactly(backend_url: str, colour: Colour, keys: list[str]) -> None:
    charge = colour.define(lambda order: order, backend=backend_url, key="{order}", namespace="exact")
    for replayed in (False, True):
        outcomes = [colour.call(charge.outcome, key) for key in keys]
        assert [(outcome.value, outcome.replayed) for outcome in outcomes] == [(key, replayed) for key in keys]
    assert colour.call(charge.with_key("given"), "x") == "x"


def test_keys_are_unique_within_their_namespace(backend_url: str, colour: Colour) -> None:
    pairs = [("acme:eu", "42"), ("acme", "eu:42"), ("acm", "e:eu:42")]
    functions = [
        colour.define(lambda order, pair=pair: list(pair), backend=backend_url, namespace=pair[0], ignore=("pair",))
        for pair in pairs
    ]
    for replayed in (False, True):
        for function, (namespace, key) in zip(functions, pairs, strict=True):
            outcome = colour.call(function.with_key(key).outcome, "x")
            assert (outcome.value, outcome.replayed) == ([namespace, key], replayed)


def test_outcome_says_how_the_call_was_answered(backend_url: str, colour: Colour) -> None:
    tokens = []

    def charge(order: str) -> str:
        call = current_call()
        assert call is not None
        call.check()
        assert call.arguments["order"] == order
        assert not call.lease_lost
        tokens.append((call.key, call.token, call.downstream_key("stripe"), call.downstream_key("mail")))
        return "done"

    charge = colour.define(charge, backend=backend_url, key="c:{order}")
    run = colour.call(charge.outcome, "o1")
    replay = colour.call(charge.outcome, "o1")
    assert (run.value, run.replayed, run.stored, run.key, run.age) == ("done", False, True, "c:o1", 0.0)
    assert (replay.value, replay.replayed, replay.stored, replay.key) == ("done", True, True, "c:o1")
    assert replay.age >= 0.0
    [(key, token, stripe, mail)] = tokens
    assert (run.token, replay.token, key) == (token, token, "c:o1")
    assert stripe != mail
    assert current_call() is None
    colour.call(charge.forget, "o1")
    assert colour.call(charge.outcome, "o1").token > token
    assert tokens[1][2] == stripe


def test_keep_result_false_remembers_only_that_it_was_done(backend_url: str, colour: Colour, effects: Counter) -> None:
    def charge() -> object:
        effects.hit()
        return effects

    charge = colour.define(charge, backend=backend_url, keep_result=False)
    assert colour.call(charge) is effects
    assert colour.call(charge) is None
    assert effects.count == 1


def test_peek_explain_and_forget(backend_url: str, colour: Colour, gate: Gate, effects: Counter) -> None:
    def charge(order: str) -> int:
        gate.pass_through()
        return effects.hit()

    charge = colour.define(charge, backend=backend_url, key="{order}")
    assert colour.call(charge.peek, "o1") is None
    assert colour.call(charge.explain, "o1").decision == "would_run"
    assert colour.call(charge.forget, "o1") is False
    first = colour.start(charge, "o1")
    assert gate.entered.wait(30)
    assert colour.call(charge.peek, "o1").state == "running"
    assert colour.call(charge.explain, "o1").decision == "would_wait"
    with pytest.raises(InProgress):
        colour.call(charge.forget, "o1")
    gate.opened.set()
    assert first.result(30) == 1
    record = colour.call(charge.with_key("o1").peek)
    assert (record.state, record.key) == ("completed", "o1")
    assert 80_000 < record.expires_in <= 86_400
    explained = colour.call(charge.explain, "o1")
    assert explained.decision == "would_replay"
    assert "would replay" in str(explained)
    assert colour.call(charge.with_key("o1").explain, "o2").decision == "would_refuse"
    assert colour.call(charge.forget, "o1") is True
    assert colour.call(charge, "o1") == 2


@pytest.mark.parametrize("kind", ["result", "error"])
def test_an_outcome_is_replayed_for_its_ttl_only(backend_url: str, colour: Colour, effects: Counter, kind: str) -> None:
    def work() -> None:
        effects.hit()
        if kind == "error":
            raise DeclinedError("no", Decimal(effects.count))

    ttls: dict[str, Any] = {"ttl": 60, "error_ttl": {DeclinedError: 0.2}} if kind == "error" else {"ttl": 0.2}
    work = colour.define(work, backend=backend_url, **ttls)
    began = time.monotonic()
    while effects.count < 2:
        assert time.monotonic() - began < 10
        with pytest.raises(DeclinedError) if kind == "error" else contextlib.nullcontext():
            colour.call(work)
    assert time.monotonic() - began > 0.19  # Redis counts in whole milliseconds


@in_both_places
def test_a_duplicate_of_the_other_colour_waits_for_the_run_and_replays_it(
    backend_url: str, colour: Colour, gate: Gate, effects: Counter, place: str
) -> None:
    def charge(order: str) -> int:
        gate.pass_through()
        return effects.hit()

    other = next(each for each in COLOURS if each is not colour)
    first = colour.define(charge, backend=backend_url, key="{order}", namespace="shared")
    second = other.define(charge, backend=backend_at(place, backend_url), key="{order}", namespace="shared")
    running = colour.start(first, "o1")
    assert gate.entered.wait(30)
    waiting = other.start(second.outcome, "o1")
    while not second.stats().get("waited"):
        time.sleep(0.002)
    gate.opened.set()
    assert running.result(30) == 1
    assert (waiting.result(30).value, waiting.result(30).replayed) == (1, True)
    assert effects.count == 1


def test_a_slow_function_with_heartbeats_is_never_taken_over(backend_url: str, effects: Counter) -> None:
    lease = 1.0
    entered = threading.Semaphore(0)

    def slow(order: str) -> int:
        number = effects.hit()
        entered.release()
        time.sleep(4 * lease)  # what is tested is that time passes and nothing happens
        return number

    def define(colour: Colour, backend: Backend | str) -> Any:
        return colour.define(slow, backend=backend, key="{order}", namespace="slow", lease=lease)

    # Both colours at once, as it takes its time; each has duplicates of both that ask the store.
    running = [colour.start(define(colour, backend_url), colour.name) for colour in COLOURS]
    assert all(entered.acquire(timeout=30) for _ in COLOURS)
    duplicates = [define(colour, apart(backend_url)) for colour in COLOURS]
    waiting = [
        [colour.start(each, run.name) for run in COLOURS] for colour, each in zip(COLOURS, duplicates, strict=True)
    ]
    answers = [call.result(30) for call in running]
    assert [[call.result(30) for call in calls] for calls in waiting] == [answers, answers]
    assert sorted(answers) == [1, 2]
    assert effects.count == 2


def test_a_function_that_calls_itself_with_its_own_key_is_told_at_once(backend_url: str, colour: Colour) -> None:
    def loop() -> None:
        colour.call(decorated)

    decorated = colour.define(loop, backend=backend_url, wait=None)
    with pytest.raises(InProgress, match="called itself"):
        colour.call(decorated)


def test_a_waiter_on_the_local_backend_is_woken_and_does_not_poll(colour: Colour, gate: Gate) -> None:
    backend = Faulty(LocalBackend())

    def slow() -> str:
        gate.pass_through()
        return "done"

    # Two backend objects, so that the waiter waits in the store and not behind the first call in the process.
    first = colour.start(colour.define(slow, backend=backend.inner, namespace="n", lease=30))
    assert gate.entered.wait(30)
    second = colour.start(colour.define(slow, backend=backend, namespace="n"))
    deadline = time.monotonic() + 30
    while "changed" not in backend.calls:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    gate.opened.set()
    assert (first.result(30), second.result(30)) == ("done", "done")
    assert backend.calls == ["claim", "changed", "claim"]


class Meanwhile(Faulty):
    """A backend on which something happens between the reply "busy" and the subscription that follows it."""

    def __init__(self, inner: Backend, happen: Callable[[], object], waits: list[float]) -> None:
        super().__init__(inner)
        self.happen, self.waits = happen, waits

    def _view(self, colour: str, inner: Backend) -> Faulty:
        return Meanwhile(inner, self.happen, self.waits)

    async def changed(self, *args: Any, **kwargs: Any) -> None:
        self.happen()
        began = time.monotonic()
        await super().changed(*args, **kwargs)
        self.waits.append(time.monotonic() - began)


def test_a_run_that_ends_before_its_waiter_has_subscribed_is_not_waited_for(
    backend_url: str, colour: Colour, gate: Gate, effects: Counter
) -> None:
    def work() -> int:
        gate.pass_through()
        return effects.hit()

    def end() -> None:
        gate.opened.set()
        assert running.result(30) == 1

    waits: list[float] = []
    inner = open_backend(backend_url)
    running = colour.start(colour.define(work, backend=inner, namespace="n"))
    assert gate.entered.wait(30)
    assert colour.call(colour.define(work, backend=Meanwhile(inner, end, waits), namespace="n")) == 1
    assert len(waits) == 1
    assert waits[0] < 0.9  # a look of its own would come after a second, if at all
    assert effects.count == 1


def test_tokens_grow_over_releases_whoever_claims_next(
    shared_backend_url: str, colour: Colour, _fresh: contextlib.ExitStack
) -> None:
    tokens: list[int] = []

    def work() -> None:
        call = current_call()
        assert call is not None
        tokens.append(call.token)
        raise KeyError

    # Backends of their own, so that the calls do not meet before the database.
    storms = []
    for _ in range(4):
        backend = _config._open(shared_backend_url)
        _fresh.callback(backend.close)
        function = colour.define(work, backend=backend, namespace="n")
        storms.append(threading.Thread(target=lambda f=function: [colour.storm(f, 5) for _ in range(8)]))
    for storm in storms:
        storm.start()
    for storm in storms:
        storm.join()
    assert len(tokens) == 4 * 5 * 8
    assert tokens == sorted(set(tokens))
