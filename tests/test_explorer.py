"""The explorer finds nothing in the protocol that ships, and convicts every planted bug."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from idempotent import _flow as flow
from idempotent import _machine as machine
from idempotent._record import Answer, Busy, Granted, Row, State
from idempotent.testing import explore
from idempotent.testing.explorer import Caller, _call


def planted(**functions: Callable[..., Any]) -> Any:
    """The protocol's functions with some of them replaced."""
    names = ("on_claim", "on_renew", "on_settle", "on_release", "on_forget")
    return SimpleNamespace(**({name: getattr(machine, name) for name in names} | functions))


async def renewing(caller: Caller) -> Any:
    """A call whose function lasts for a renewal."""

    async def body() -> Any:
        assert caller.run is not None
        await flow.renew(caller.driver, caller.run)
        return await caller.effect()

    return await _call(caller, body)


async def failing_once(caller: Caller) -> Any:
    """A call whose function raises the first time."""

    async def body() -> Any:
        value = await caller.effect()
        if value == 1:
            raise KeyError(value)
        return value

    return await _call(caller, body)


# ---------------------------------------------------------------------------------------------------- what ships


@pytest.mark.parametrize(
    ("callers", "crashes", "expiries", "lost_replies"),
    [(2, 0, 0, 0), (3, 0, 0, 0), (2, 2, 0, 0), (2, 1, 1, 1), (3, 0, 1, 0)],
)
@pytest.mark.parametrize("scenario", [None, renewing], ids=["plain", "renewing"])
def test_every_history_of_the_protocol_keeps_its_promises(
    scenario: Any, callers: int, crashes: int, expiries: int, lost_replies: int
) -> None:
    found = explore(
        scenario, callers=callers, crashes=crashes, expiries=expiries, lost_replies=lost_replies, seconds=100
    )
    assert found, str(found)
    assert found.complete
    assert found.histories > 2


def test_after_an_error_another_caller_runs() -> None:
    found = explore(failing_once, callers=3, crashes=1, expiries=0, lost_replies=0)
    assert found, str(found)
    assert found.complete


def test_random_schedules_are_the_same_for_the_same_seed() -> None:
    one, two, three = (explore(seed=seed, histories=200, callers=4, crashes=2, expiries=2) for seed in (1, 1, 2))
    assert one
    assert two
    assert three
    assert one.histories == two.histories == 200
    assert not one.complete


@pytest.mark.soak
def test_three_callers_two_crashes_two_expiries_and_a_lost_reply() -> None:
    found = explore(callers=3, crashes=2, expiries=2, lost_replies=1, seconds=1200)
    assert found, str(found)


# -------------------------------------------------------------------------------------------------- planted bugs


async def get_then_set(caller: Caller) -> Any:
    value = await caller.get("result")
    if value is None:
        value = await caller.effect()
        await caller.set("result", value)
    return value


async def lock_then_set(caller: Caller) -> Any:
    """A lock by SET NX that a crash leaves behind, and that nobody's token protects."""
    while not await caller.add("lock", caller.number):
        value = await caller.get("result")
        if value is not None:
            return value
        await caller.delete("lock")  # it took too long: whoever holds it must have died
    value = await caller.get("result")
    if value is None:
        value = await caller.effect()
        await caller.set("result", value)
    await caller.delete("lock")
    return value


def claim_takes_over_early(row: Row | None, ask: machine.Ask, now: int) -> Any:
    if row is not None and row.state is State.RUNNING and row.attempt != ask.attempt:
        row = row._replace(lease_until=now)
    return machine.on_claim(row, ask, now)


def claim_forgets_its_attempt(row: Row | None, ask: machine.Ask, now: int) -> Any:
    if row is not None and row.state is State.RUNNING and row.attempt == ask.attempt:
        return Busy(row.token, 1.0), None
    return machine.on_claim(row, ask, now)


def complete_without_token(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    return (Answer.GONE, None) if row is None else (Answer.DONE, settled)


def complete_refuses_its_repeat(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    if row is not None and row.state is State.COMPLETED:
        return Answer.STALE, None
    return machine.on_settle(row, attempt, token, settled, now)


def release_without_token(
    row: Row | None, attempt: bytes, token: int | None, now: int, *, unknown: bool = False
) -> Any:
    if row is None:
        return Answer.GONE, None
    return Answer.DONE, Row(State.WITHDRAWN, row.token, attempt, b"", now, expires=now + machine.TOMBSTONE)


def release_resets_the_token(
    row: Row | None, attempt: bytes, token: int | None, now: int, *, unknown: bool = False
) -> Any:
    answer, after = machine.on_release(row, attempt, token, now, unknown=unknown)
    return answer, None if after is None else after._replace(token=0, expires=now)


def renew_without_token(row: Row | None, attempt: bytes, token: int, lease: int, now: int) -> Any:
    if row is None or row.state is not State.RUNNING:
        return Answer.GONE, None
    return Answer.DONE, row._replace(attempt=attempt, token=token, lease=lease, lease_until=now + lease)


def claim_loses_the_token(row: Row | None, ask: machine.Ask, now: int) -> Any:
    reply, after = machine.on_claim(row, ask, now)
    if isinstance(reply, Granted) and after is not None and reply.took_over and row is not None:
        return Granted(row.token, True), after._replace(token=row.token)
    return reply, after


PLANTS: dict[str, tuple[Any, Any]] = {
    "get, run, set": (get_then_set, machine),
    "a lock by SET NX, then set": (lock_then_set, machine),
    "takeover before the lease's end": (None, planted(on_claim=claim_takes_over_early)),
    "a claim that does not know its own attempt": (None, planted(on_claim=claim_forgets_its_attempt)),
    "a takeover under the old token": (None, planted(on_claim=claim_loses_the_token)),
    "complete without token": (None, planted(on_settle=complete_without_token)),
    "complete that refuses its own repeat": (None, planted(on_settle=complete_refuses_its_repeat)),
    "release without token": (failing_once, planted(on_release=release_without_token)),
    "a token that a release resets": (failing_once, planted(on_release=release_resets_the_token)),
    "renew without token": (renewing, planted(on_renew=renew_without_token)),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_convicted(plant: str) -> None:
    scenario, rules = PLANTS[plant]
    found = explore(scenario, rules=rules, callers=2, crashes=1, expiries=1, lost_replies=1, seconds=60)
    assert not found, f"{plant} was not convicted: {found}"


# ------------------------------------------------------------------------------------------------- what it shows


def test_the_shortest_counterexample_is_drawn() -> None:
    found = explore(get_then_set, callers=3)
    assert found.violation is not None
    assert (
        str(found.violation)
        == """2. callers that succeeded do not agree

caller 1      caller 2
|             |
get result    |
EFFECT        |              -> 1
|             get result
set result    |
returns 1     |
|             EFFECT         -> 2
|             set result
|             returns 2"""
    )
    assert found.violation.mermaid().splitlines()[:4] == [
        "sequenceDiagram",
        "    participant C1 as caller 1",
        "    participant C2 as caller 2",
        "    participant S as store",
    ]
    assert "C2->>S: get result" in found.violation.mermaid()
