"""The near-cache: what it answers, what it never outlives, and how a forget reaches it."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from colours import Colour
from probes import Counter

from idempotent import FingerprintMismatch, LocalBackend, RedisBackend, SQLBackend, configure, idempotent
from idempotent import _near as near
from idempotent._record import Row, State
from idempotent._run import flights_of
from idempotent.backends.base import Backend, Copies


class Silent(LocalBackend):
    """A backend that tells nobody of a forget."""


STORES = ["redis", "sqlite", "postgres"]


class Asked:
    """A backend of a URL as another process would have one, and how often it was asked for a claim."""

    def __init__(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.backend: Backend = RedisBackend(url) if url.startswith("redis") else SQLBackend(url)
        self.claims = 0
        for view in {self.backend.blocking(), self.backend.asynchronous()}:
            claim = view.claim

            async def counted(*args: Any, _claim: Any = claim, **kwargs: Any) -> Any:
                self.claims += 1
                return await _claim(*args, **kwargs)

            monkeypatch.setattr(view, "claim", counted)


@pytest.fixture
def process(backend_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Asked]]:
    with contextlib.ExitStack() as opened:

        def start() -> Asked:
            asked = Asked(backend_url, monkeypatch)
            opened.callback(asked.backend.close)
            return asked

        yield start


def charging(colour: Colour, effects: Counter, asked: Asked, **options: Any) -> Any:
    def charge(order: str, amount: int) -> list[Any]:
        return [order, amount, effects.hit()]

    given = {"key": "{order}", "namespace": "near", "backend": asked.backend, "near_cache": 100}
    return colour.define(charge, **given | options)


def heard(colour: Colour, charge: Any) -> None:
    """Wait until what others forget is heard, and the copies that are made rest on it."""
    plan = charge.__idempotent_spec__[0].plan()
    until = time.monotonic() + 30
    while not plan.near.mark()[0]:
        assert time.monotonic() < until, "the subscription never came"
        time.sleep(0.01)


@pytest.mark.parametrize("backend_url", STORES, indirect=True)
def test_a_replay_is_answered_without_asking(
    colour: Colour, effects: Counter, process: Callable[[], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "UNHEARD", 600_000_000)
    first, second = process(), process()
    ours, others = charging(colour, effects, first), charging(colour, effects, second)
    result = colour.call(ours, "o", 5)
    copies = [colour.call(ours, "o", 5) for _ in range(3)]
    assert copies == [result] * 3
    assert len({id(copy) for copy in [result, *copies]}) == 4
    assert first.claims == 1
    assert [colour.call(others, "o", 5) for _ in range(3)] == [result] * 3
    assert (second.claims, effects.count) == (1, 1)
    outcome = colour.call(others.outcome, "o", 5)
    assert outcome.replayed and outcome.stored and outcome.age > 0
    assert outcome.token == colour.call(ours.outcome, "o", 5).token


@pytest.mark.parametrize("backend_url", STORES, indirect=True)
def test_the_fingerprint_is_compared_first(
    colour: Colour, effects: Counter, process: Callable[[], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "UNHEARD", 600_000_000)
    charge = charging(colour, effects, process())
    colour.call(charge, "o", 5)
    with pytest.raises(FingerprintMismatch):
        colour.call(charge, "o", 6)
    assert colour.call(charge, "o", 5) == ["o", 5, 1]


@pytest.mark.parametrize("backend_url", STORES, indirect=True)
def test_a_copy_ends_with_the_record_whoever_made_it(
    colour: Colour, effects: Counter, process: Callable[[], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "UNHEARD", 600_000_000)
    ours, others = charging(colour, effects, process(), ttl=1.5), charging(colour, effects, process(), ttl=9000)
    began = time.monotonic()
    colour.call(ours, "o", 5)
    colour.call(others, "o", 5)
    until = time.monotonic() + 30
    while effects.count == 1:
        assert time.monotonic() < until
        colour.call(others, "o", 5)
        time.sleep(0.02)
    assert time.monotonic() - began >= 1.5


@pytest.mark.parametrize("backend_url", STORES, indirect=True)
def test_a_forget_in_this_process_reaches_the_copies_of_all_its_functions(
    colour: Colour, effects: Counter, process: Callable[[], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "UNHEARD", 600_000_000)
    asked = process()
    charge, twin = charging(colour, effects, asked), charging(colour, effects, asked)
    assert colour.call(charge, "o", 5) == colour.call(twin, "o", 5)
    assert colour.call(twin.forget, "o", 5)
    assert colour.call(charge, "o", 5) == colour.call(twin, "o", 5) == ["o", 5, 2]


@pytest.mark.parametrize("backend_url", ["redis"], indirect=True)
def test_a_forget_in_another_process_is_heard(
    colour: Colour, effects: Counter, process: Callable[[], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "UNHEARD", 0)
    first = process()
    ours, others = charging(colour, effects, first), charging(colour, effects, process(), near_cache=0)
    colour.call(ours, "o", 5)
    heard(colour, ours)
    colour.call(ours, "o", 5)
    claims = first.claims
    assert [colour.call(ours, "o", 5)[2] for _ in range(5)] == [1] * 5
    assert first.claims == claims
    assert colour.call(others.forget, "o", 5)
    until = time.monotonic() + 30
    while colour.call(ours, "o", 5)[2] == 1:
        assert time.monotonic() < until, "the forget was never heard"
        time.sleep(0.005)
    assert effects.count == 2


@pytest.mark.parametrize("backend_url", ["redis"], indirect=True)
def test_nothing_is_answered_from_copies_that_rest_on_a_line_that_broke(
    colour: Colour, effects: Counter, process: Callable[[], Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "UNHEARD", 0)
    first = process()
    ours, others = charging(colour, effects, first), charging(colour, effects, process(), near_cache=0)
    colour.call(ours, "o", 5)
    heard(colour, ours)
    colour.call(ours, "o", 5)
    first.backend._servers.one.close()  # type: ignore[attr-defined]  the line breaks, and the forget goes unheard
    assert colour.call(others.forget, "o", 5)
    assert colour.call(ours, "o", 5) == ["o", 5, 2]


@pytest.mark.parametrize("backend_url", ["sqlite", "postgres"], indirect=True)
def test_where_nobody_tells_of_a_forget_a_copy_counts_for_a_second(
    colour: Colour, effects: Counter, process: Callable[[], Asked]
) -> None:
    ours, others = charging(colour, effects, process()), charging(colour, effects, process(), near_cache=0)
    colour.call(ours, "o", 5)
    assert colour.call(others.forget, "o", 5)
    time.sleep(1.01)  # the promise is about time that passes
    assert colour.call(ours, "o", 5) == ["o", 5, 2]


def test_what_was_asked_before_a_forget_is_not_kept(effects: Counter) -> None:
    copies = near.Near(10, Silent())
    row = Row(State.COMPLETED, 1, b"", b"f", 0, codec="json1", body=b"1")
    mark = copies.mark()
    copies.clear()
    copies.keep(mark, "k", row, time.monotonic() + 60)
    assert copies.find("k", b"f") is None
    copies.keep(copies.mark(), "k", row, time.monotonic() + 60)
    assert copies.find("k", b"f") is not None
    assert copies.find("k", b"g") is None


def test_where_nobody_tells_a_copy_counts_from_when_the_backend_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic_ns() // 1000
    monkeypatch.setattr(near, "_micros", lambda: now)
    copies = near.Near(10, Silent())
    mark = copies.mark()
    now += 900_000  # the reply takes its time
    copies.keep(mark, "k", Row(State.COMPLETED, 1, b"", b"f", 0, codec="json1", body=b"1"), time.monotonic() + 60)
    assert copies.find("k", b"f") is not None
    now += 100_000
    assert copies.find("k", b"f") is None


def test_a_forget_is_heard_by_copies_in_the_making() -> None:
    class Forgetting(Silent):
        def heed(self, copies: Copies) -> None:
            copies.clear()

    near.Near(3, Forgetting())


def while_others_are_added(body: Callable[[], object], add: Callable[[near.Near], None]) -> None:
    """Run `body`, and `add` new copies at its every line, the interpreter's own in it too, as a thread may."""
    backend, added = Silent(), []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        added.append(near.Near(1, backend))
        add(added[-1])
        return trace

    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        body()
    finally:
        sys.settrace(tracer)
    assert added


def test_a_forget_clears_the_copies_while_another_function_gets_some() -> None:
    backend = Silent()

    @idempotent(backend=backend, key="{order}", namespace="near", near_cache=10)
    def charge(order: str) -> None:
        return None

    charge("o")
    nears = flights_of(backend).nears
    made = near.Near(10, backend)
    nears[id(made)] = made
    drops = made.mark()[1]
    while_others_are_added(lambda: charge.forget("o"), lambda added: nears.update({id(added): added}))
    assert made.mark()[1] == drops + 1


def test_a_forget_that_is_heard_clears_the_copies_while_another_function_gets_some() -> None:
    backend = RedisBackend("redis://localhost:1")
    made = near.Near(10, backend)
    drops = made._drops
    while_others_are_added(backend._heeding.wake, backend.heed)
    assert made._drops == drops + 1


def test_the_local_backend_keeps_no_copies_of_what_is_at_hand(colour: Colour, effects: Counter) -> None:
    def charge(order: str) -> int:
        return effects.hit()

    charge = colour.define(charge, backend=LocalBackend(), near_cache=10)
    assert colour.call(charge, "o") == colour.call(charge, "o") == 1
    assert charge.__idempotent_spec__[0].plan().near is None  # type: ignore[attr-defined]
    assert colour.call(charge.forget, "o")  # type: ignore[attr-defined]
    assert colour.call(charge, "o") == 2


@pytest.mark.parametrize(
    ("size", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), (None, TypeError), ("9", TypeError)]
)
def test_a_wrong_size_is_refused_by_name(size: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="near_cache"):
        idempotent(near_cache=size)
    with pytest.raises(error, match="near_cache"):
        configure(near_cache=size)
