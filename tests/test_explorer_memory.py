"""The explorer on answers from a process's own memory: the local backend's finder, and the near-cache."""

from typing import Any

import pytest
from test_explorer import CALLS, failing_for_good, of_two_minds, too_late

from idempotent import _flow as flow
from idempotent import _machine as machine
from idempotent import _near
from idempotent._near import Near
from idempotent._record import Record, RecordId, Row, Settled, State
from idempotent.backends import local
from idempotent.errors import FingerprintMismatch, InProgress
from idempotent.testing import explore
from idempotent.testing._world import START, Applied, Step, hand_over
from idempotent.testing.explorer import Caller, InMemory, Model, Telling, call, forget


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was answered from memory."""
    told: list[str] = []
    at_hand = flow.at_hand

    def noted(plan: Any, text: str, found: Any) -> Any:
        told.append(text)
        return at_hand(plan, text, found)

    monkeypatch.setattr(flow, "at_hand", noted)
    return told


async def forget_if_ended(caller: Caller) -> None:
    try:
        await forget(caller)
    except InProgress:
        pass


# ------------------------------------------------------------------------------------------------------- scenarios


async def twice(caller: Caller) -> Any:
    """Each calls twice; without near-cache."""
    await call(caller)
    return await call(caller)


async def forgetting(caller: Caller) -> Any:
    """All but the first forget what there is, and call again; without near-cache."""
    if caller.number:
        await forget_if_ended(caller)
    return await twice(caller)


async def forgetting_by_force(caller: Caller) -> Any:
    """Each calls, and all but the first forget that by force and call again; without near-cache."""
    await call(caller)
    if caller.number:
        assert caller.run is not None
        await flow.forget(caller.run, force=True)
    return await call(caller)


async def near_twice(caller: Caller) -> Any:
    """The first caller has a near-cache and calls twice; the others forget what there is, and call."""
    if caller.number:
        await forget_if_ended(caller)
        return await call(caller)
    caller.give_near()
    await call(caller)
    return await call(caller)


async def near_a_second_later(caller: Caller) -> Any:
    """As `near_twice`, and the first caller's second call comes later than a second after what the others do."""
    if caller.number:
        await caller.pause(0.5)
        await forget_if_ended(caller)
        return await call(caller)
    caller.give_near()
    await call(caller)
    await caller.pause(1.6)
    return await call(caller)


async def near_own_forget(caller: Caller) -> Any:
    """The first caller has a near-cache, and forgets between two calls."""
    if caller.number:
        return await call(caller)
    caller.give_near()
    await call(caller)
    await forget_if_ended(caller)
    return await call(caller)


async def near_failing(caller: Caller) -> Any:
    """Each has a near-cache and calls twice what raises; the error is recorded."""
    caller.give_near()
    try:
        await failing_for_good(caller)
    except KeyError:
        pass
    return await failing_for_good(caller)


async def near_other_arguments(caller: Caller) -> Any:
    """Each has a near-cache, and calls with two kinds of arguments, the others the other way round."""
    caller.give_near()
    one, two = (b"a" * 16, b"b" * 16)[:: 1 if caller.number else -1]
    for fingerprint in (one, two):
        try:
            await call(caller, fingerprint=fingerprint)
        except FingerprintMismatch:
            pass
    return await call(caller, fingerprint=one)


async def near_too_late(caller: Caller) -> Any:
    """Each has a near-cache, and calls again when the result has expired; the key is remembered."""
    caller.give_near()
    await call(caller, ttl=10.0, remember=60.0)
    await caller.pause(50.0)
    return await call(caller, ttl=10.0, remember=60.0)


async def near_on_a_line_that_breaks(caller: Caller) -> Any:
    """As `near_a_second_later`, but the first caller hears nothing between its calls."""
    if caller.number:
        return await near_a_second_later(caller)
    caller.give_near()
    model: Any = caller.model
    await call(caller)
    model.breaks()
    await caller.pause(1.6)
    await model.listens_again()
    return await call(caller)


async def near_as_it_expires(caller: Caller) -> Any:
    """The first caller has a near-cache, and calls again half a second after the result has expired."""
    if caller.number:
        return await call(caller, ttl=10.0, remember=60.0)
    caller.give_near()
    await call(caller, ttl=10.0, remember=60.0)
    await caller.pause(10.5)
    return await call(caller, ttl=10.0, remember=60.0)


async def later(model: Model) -> None:
    """The reply to a command comes nine tenths of a second after it was applied."""
    until = model.now + 900_000
    nothing, ready = lambda facts, rules: Applied(None, facts), lambda facts: facts.now >= until
    await hand_over(Step("wait", nothing, ready=ready, deadline=until))


class Slow(Model):
    """A store whose reply to a completion takes its time."""

    async def complete(self, *args: Any, **options: Any) -> Any:
        answer = await super().complete(*args, **options)
        await later(self)
        return answer


class SlowReads(Telling):
    """A store that tells of what is forgotten, and whose reply to a read takes its time."""

    async def read(self, rid: RecordId) -> Record | None:
        found = await super().read(rid)
        await later(self)
        return found


# ---------------------------------------------------------------------------------------------------- what ships

FOUND = [(scenario, InMemory) for scenario in [*CALLS, twice, forgetting]]
NEAR = [
    (near_twice, Telling),
    (near_twice, Model),
    (near_a_second_later, Telling),
    (near_a_second_later, Model),
    (near_a_second_later, Slow),
    (near_own_forget, Telling),
    (near_own_forget, Model),
    (near_failing, Telling),
    (near_failing, Model),
    (near_other_arguments, Telling),
    (near_other_arguments, Model),
    (near_too_late, Telling),
    (near_too_late, Model),
    (near_on_a_line_that_breaks, Telling),
    (near_as_it_expires, SlowReads),
]


def named(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(
    ("scenario", "model"), [*FOUND, *NEAR, (forgetting, Model), (forgetting_by_force, Model)], ids=named
)
@pytest.mark.parametrize(
    ("callers", "crashes", "expiries", "lost_replies"),
    [
        *((1, 1, 1, 1), (1, 0, 1, 2), (1, 1, 1, 2), (2, 1, 1, 0), (2, 0, 0, 1)),
        pytest.param(3, 0, 0, 0, marks=pytest.mark.soak),
    ],
)
def test_every_history_with_answers_from_memory_keeps_its_promises(
    scenario: Any, model: Any, callers: int, crashes: int, expiries: int, lost_replies: int
) -> None:
    budgets = {"callers": callers, "crashes": crashes, "expiries": expiries, "lost_replies": lost_replies}
    found = explore(scenario, model=model, **budgets, seconds=100)
    assert found, str(found)
    assert found.complete


@pytest.mark.parametrize(
    ("scenario", "model"),
    [
        (call, InMemory),
        (failing_for_good, InMemory),
        (twice, InMemory),
        (forgetting, InMemory),
        (near_twice, Telling),
        (near_twice, Model),
        (near_failing, Model),
        (near_other_arguments, Model),
    ],
    ids=named,
)
def test_some_histories_are_answered_from_memory(scenario: Any, model: Any, answers: list[str]) -> None:
    assert explore(scenario, model=model, callers=2, crashes=0, expiries=0, lost_replies=0)
    assert answers


def test_all_answers_of_the_near_cache_are_the_stores_but_for_a_forget_by_others() -> None:
    """Where nobody tells, a copy that was forgotten is told for up to a second: the explorer finds that history."""
    strict = type("Strict", (Model,), {"told": property(lambda self: {*range(START, 2 * START)}, lambda *_: None)})
    found = explore(near_twice, model=strict, callers=2, crashes=0, expiries=0, lost_replies=0)
    assert found.violation is not None
    assert found.violation.promise.startswith("15.")


# -------------------------------------------------------------------------------------------------- planted bugs

find, keep, look, on_forget, record = Near.find, Near.keep, local._Store.look, machine.on_forget, flow.record


def find_without_fingerprint(near: Near, text: str, fingerprint: bytes) -> Any:
    row = near._rows.get(text)
    return find(near, text, fingerprint if row is None else row.fingerprint)


def find_whatever_was_missed(near: Near, text: str, fingerprint: bytes) -> Any:
    row = near._rows.get(text)
    return None if row is None or row.fingerprint != fingerprint else (row, near._clock())


def keep_past_the_ttl(near: Near, mark: Any, text: str, row: Row, until: float) -> None:
    keep(near, mark, text, row, until + 1000)


def keep_what_was_asked_before_a_forget(near: Near, mark: Any, text: str, row: Row, until: float) -> None:
    keep(near, (mark[0], near._drops, mark[2]), text, row, until)


def keep_from_the_reply_on(near: Near, mark: Any, text: str, row: Row, until: float) -> None:
    keep(near, (*mark[:2], near._clock()), text, row, until)


async def copy_found_from_the_reply_on(driver: Any, run: Any, settled: Settled, mark: Any) -> None:
    found = await run.plan.backend.read(run.rid)
    if found is not None and found.state == "completed":
        flow._copy(driver, run, settled, mark, driver.now() + found.expires_in)


async def record_with_a_copy_in_any_case(driver: Any, run: Any, settled: Settled, ttl: float) -> tuple[Settled, bool]:
    mark, sent = run.plan.near.mark(), driver.now()
    recorded, stored = await record(driver, run, settled, ttl)
    flow._copy(driver, run, recorded, mark, sent + ttl)
    return recorded, stored


def look_without_fingerprint(store: Any, key: str, fingerprint: bytes) -> Any:
    return look(store, key, b"")


def look_at_what_has_expired(store: Any, key: str, fingerprint: bytes) -> Any:
    row = store.settled.get(key)
    return None if row is None or row.state is State.EXPIRED else (row, store.clock())


def forget_that_forgets_nothing(row: Row | None, attempt: bytes, now: int, *, force: bool) -> Any:
    return on_forget(row, attempt, now, force=force)[0], None


PLANTS: dict[str, tuple[Any, str, Any, Any, Any, str]] = {
    "a copy told without its fingerprint": (Near, "find", find_without_fingerprint, near_other_arguments, Model, "13."),
    "a copy that outlives its record": (Near, "keep", keep_past_the_ttl, near_too_late, Telling, "14."),
    "a forget that is heard and ignored": (Near, "clear", lambda near: None, near_twice, Telling, "15."),
    "a process that ignores its own forget": (Near, "clear", lambda near: None, near_own_forget, Model, "15."),
    "a copy of what was asked before a forget": (
        *(Near, "keep", keep_what_was_asked_before_a_forget),
        *(near_twice, Telling, "15."),
    ),
    "a copy that nobody would tell of, for ever": (_near, "UNHEARD", 10**9, near_a_second_later, Model, "15."),
    "a copy that counts from the reply on": (Near, "keep", keep_from_the_reply_on, near_a_second_later, Slow, "15."),
    "a copy from before the line broke": (
        *(Near, "find", find_whatever_was_missed),
        *(near_on_a_line_that_breaks, Telling, "15."),
    ),
    "a copy of what was found that counts from the reply on": (
        *(flow, "_copy_found", copy_found_from_the_reply_on),
        *(near_as_it_expires, SlowReads, "14."),
    ),
    "a look without the fingerprint": (local._Store, "look", look_without_fingerprint, of_two_minds, InMemory, "13."),
    "a look at what has expired": (local._Store, "look", look_at_what_has_expired, too_late, InMemory, "14."),
    "a forget that forgets nothing": (machine, "on_forget", forget_that_forgets_nothing, forgetting, Model, "16."),
    "a look that finds nothing": (local._Store, "look", lambda *_: None, twice, InMemory, "15."),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_convicted(plant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, bug, scenario, model, promise = PLANTS[plant]
    assert explore(scenario, model=model, callers=2, crashes=0, expiries=0, lost_replies=0)
    monkeypatch.setattr(where, name, bug)
    found = explore(scenario, model=model, callers=2, crashes=0, expiries=0, lost_replies=0)
    assert found.violation is not None
    assert found.violation.promise.startswith(promise)


@pytest.mark.parametrize(("crashes", "lost_replies"), [(0, 2), (1, 2)])
def test_a_copy_of_an_outcome_that_was_not_stored_is_convicted(
    monkeypatch: pytest.MonkeyPatch, crashes: int, lost_replies: int
) -> None:
    monkeypatch.setattr(flow, "record", record_with_a_copy_in_any_case)
    found = explore(near_twice, model=Telling, callers=1, crashes=crashes, expiries=1, lost_replies=lost_replies)
    assert found.violation is not None
    assert found.violation.promise.startswith("15.")


# ------------------------------------------------------------------------------------------------- what it shows


def test_what_is_found_in_memory_is_drawn_at_the_caller_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Near, "clear", lambda near: None)
    found = explore(near_own_forget, model=Telling, callers=1, crashes=0, expiries=0, lost_replies=0).violation
    assert found is not None
    assert [what for _, what, _ in found.lines] == [
        *("looks in memory", "claim", "EFFECT", "complete", "read", "forget by force", "forget"),
        *("looks in memory", "finds token 0 in memory", "returns 1"),
    ]
    notes = [line for line in found.mermaid().splitlines() if "memory" in line]
    looks, finds = "    Note over C1: looks in memory", "    Note over C1: finds token 0 in memory"
    assert notes == [looks, looks, finds]
