"""The explorer finds nothing in the protocol that ships, and convicts every planted bug."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from idempotent import _flow as flow
from idempotent import _machine as machine
from idempotent._record import Answer, Busy, Granted, Mismatched, RecordId, Row, Settled, State, Unknown, standing
from idempotent.errors import BackendUnavailable
from idempotent.testing import explore
from idempotent.testing._world import Applied, Step, hand_over
from idempotent.testing.explorer import Caller, Model, call, hold


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

    return await call(caller, body)


async def failing_once(caller: Caller) -> Any:
    """A call whose function raises the first time."""

    async def body() -> Any:
        value = await caller.effect()
        if value == 1:
            raise KeyError(value)
        return value

    return await call(caller, body)


async def failing_for_good(caller: Caller) -> Any:
    """A call whose function raises, and whose error is recorded."""

    async def body() -> Any:
        raise KeyError(await caller.effect())

    return await call(caller, body, error_ttl={KeyError: 60})


async def not_waiting(caller: Caller) -> Any:
    return await call(caller, wait=0)


async def waiting_a_while(caller: Caller) -> Any:
    return await call(caller, wait=10)


async def not_guessing(caller: Caller) -> Any:
    return await call(caller, on_crash="raise")


async def of_two_minds(caller: Caller) -> Any:
    """The first caller has other arguments than the rest."""
    return await call(caller, fingerprint=b"ab"[caller.number > 0 :][:1] * 16)


async def too_late(caller: Caller) -> Any:
    """The last caller comes when the result has expired, and the key is remembered."""
    await caller.pause(50.0 * (caller.number == 1))
    return await call(caller, ttl=10.0, remember=60.0)


async def renewed_hold(caller: Caller) -> Any:
    return await hold(caller, renewals=1)


async def hold_or_leave(caller: Caller) -> Any:
    return await hold(caller, wait=10)


CALLS = [
    call,
    renewing,
    failing_once,
    failing_for_good,
    not_waiting,
    waiting_a_while,
    not_guessing,
    of_two_minds,
    too_late,
]
HOLDS = [hold, renewed_hold, hold_or_leave]


# ---------------------------------------------------------------------------------------------------- what ships


@pytest.mark.parametrize("scenario", CALLS + HOLDS, ids=lambda scenario: scenario.__name__)
@pytest.mark.parametrize(
    ("callers", "crashes", "expiries", "lost_replies"),
    [(1, 1, 1, 2), (2, 0, 0, 0), (3, 0, 0, 0), (2, 2, 2, 1), (2, 1, 1, 2), (3, 1, 1, 0)],
)
def test_every_history_of_what_ships_keeps_its_promises(
    scenario: Any, callers: int, crashes: int, expiries: int, lost_replies: int
) -> None:
    found = explore(
        scenario, callers=callers, crashes=crashes, expiries=expiries, lost_replies=lost_replies, seconds=100
    )
    assert found, str(found)
    assert found.complete
    assert found.histories >= found.states / 10 > 0


def test_three_callers_two_crashes_two_expiries_and_a_lost_reply() -> None:
    found = explore(callers=3, crashes=2, expiries=2, lost_replies=1, seconds=100)
    assert found, str(found)
    assert found.complete
    assert found.histories > 2_040_000


@pytest.mark.soak
@pytest.mark.parametrize("scenario", CALLS + HOLDS, ids=lambda scenario: scenario.__name__)
def test_three_callers_and_every_fault(scenario: Any) -> None:
    found = explore(scenario, callers=3, crashes=2, expiries=2, lost_replies=1, seconds=100)
    assert found, str(found)


def test_random_schedules_are_the_same_for_the_same_seed() -> None:
    one, two, three = (explore(seed=seed, histories=200, callers=4, crashes=2, expiries=2) for seed in (1, 1, 2))
    assert one
    assert two
    assert three
    assert one.histories == two.histories == 200
    assert not one.complete
    found = [explore(get_then_set, seed=seed, histories=200, callers=4) for seed in (1, 1)]
    assert not found[0]
    assert found[0].histories == found[1].histories
    assert str(found[0].violation) == str(found[1].violation)


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


def settle_drops_the_fingerprint(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    answer, after = machine.on_settle(row, attempt, token, settled, now)
    return answer, None if after is None else after._replace(fingerprint=b"")


def release_of_what_is_recorded(
    row: Row | None, attempt: bytes, token: int | None, now: int, *, unknown: bool = False
) -> Any:
    if row is not None and row.state is State.FAILED and row.attempt == attempt:
        row = row._replace(state=State.RUNNING)
    return machine.on_release(row, attempt, token, now, unknown=unknown)


async def error_released_after_it_was_recorded(caller: Caller) -> Any:
    try:
        return await failing_for_good(caller)
    finally:
        run = caller.run
        if run is not None and run.token is not None:
            try:
                await caller.model.release(run.rid, attempt=run.attempt, token=run.token)
            except BackendUnavailable:
                pass


def claim_refuses_its_own_arguments(row: Row | None, ask: machine.Ask, now: int) -> Any:
    if row is not None and row.state is State.COMPLETED:
        return Mismatched(0.0, row.fingerprint), None
    return machine.on_claim(row, ask, now)


def claim_never_takes_over(row: Row | None, ask: machine.Ask, now: int) -> Any:
    if row is not None and row.state is State.RUNNING and row.attempt != ask.attempt:
        return Busy(row.token, 1.0), None
    return machine.on_claim(row, ask, now)


def claim_guesses_at_no_crash(row: Row | None, ask: machine.Ask, now: int) -> Any:
    return machine.on_claim(row, ask._replace(takeover=False), now)


def claim_does_not_tell_the_outcome(row: Row | None, ask: machine.Ask, now: int) -> Any:
    if row is not None and row.state is State.COMPLETED:
        return Unknown(row.token, 0.0), None
    return machine.on_claim(row, ask, now)


def settle_refuses_who_is_late(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    if row is not None and row.state is State.RUNNING and row.lease_until <= now:
        return Answer.GONE, None
    return machine.on_settle(row, attempt, token, settled, now)


def settle_forgets_soon(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    return machine.on_settle(row, attempt, token, settled._replace(expires=now + 1000), now)


def settle_stores_another_result(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    return machine.on_settle(row, attempt, token, settled._replace(body=b"torn"), now)


def renew_does_nothing(row: Row | None, attempt: bytes, token: int, lease: int, now: int) -> Any:
    answer, _ = machine.on_renew(row, attempt, token, lease, now)
    return answer, None


def renew_refuses_who_is_late(row: Row | None, attempt: bytes, token: int, lease: int, now: int) -> Any:
    if row is not None and row.state is State.RUNNING and row.lease_until <= now:
        return Answer.STALE, None
    return machine.on_renew(row, attempt, token, lease, now)


def claim_frees_what_is_remembered(row: Row | None, ask: machine.Ask, now: int) -> Any:
    if row is not None and row.state is State.COMPLETED and row.expires is not None and row.expires <= now:
        row = None
    return machine.on_claim(row, ask, now)


def claim_tells_what_has_expired(row: Row | None, ask: machine.Ask, now: int) -> Any:
    stands = standing(row, now)
    if row is not None and stands is not None and stands.state is State.EXPIRED:
        return Settled(False, row.token, 0.0, row.codec, row.body), None
    return machine.on_claim(row, ask, now)


def settle_remembers_nothing(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
    return machine.on_settle(row, attempt, token, settled._replace(lease=0), now)


class Impatient(Model):
    """A waiter that deletes the owner's record when it has waited long enough."""

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        await super().changed(rid, token=token, timeout=timeout / 2)
        found = await self.read(rid)
        if found is not None and found.state == "running":
            await self._command(
                "delete", rid, lambda _rules, row, now: machine.on_forget(row, b"deletes.", now, force=True)
            )


class Deaf(Model):
    """A wait that nothing ends."""

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        await hand_over(Step("wait", lambda facts, rules: Applied(None, facts), ready=lambda facts: False))


PLANTS: dict[str, tuple[Any, Any]] = {
    "get, run, set": (get_then_set, machine),
    "a lock by SET NX, then set": (lock_then_set, machine),
    "takeover before the lease's end": (call, planted(on_claim=claim_takes_over_early)),
    "a claim that does not know its own attempt": (call, planted(on_claim=claim_forgets_its_attempt)),
    "a takeover under the old token": (call, planted(on_claim=claim_loses_the_token)),
    "complete without token": (call, planted(on_settle=complete_without_token)),
    "complete that refuses its own repeat": (call, planted(on_settle=complete_refuses_its_repeat)),
    "release without token": (failing_once, planted(on_release=release_without_token)),
    "a token that a release resets": (failing_once, planted(on_release=release_resets_the_token)),
    "renew without token": (renewing, planted(on_renew=renew_without_token)),
    "a waiter that deletes the owner's record": (call, Impatient),
    "a wait that hears of no end": (call, Deaf),
    "a fingerprint that completion drops": (of_two_minds, planted(on_settle=settle_drops_the_fingerprint)),
    "a call refused for its own arguments": (call, planted(on_claim=claim_refuses_its_own_arguments)),
    "a dead runner's key that is never free": (call, planted(on_claim=claim_never_takes_over)),
    "a dead runner's key given up as unknown": (call, planted(on_claim=claim_guesses_at_no_crash)),
    "an outcome that is not told": (not_guessing, planted(on_claim=claim_does_not_tell_the_outcome)),
    "an outcome refused for being late": (call, planted(on_settle=settle_refuses_who_is_late)),
    "an outcome forgotten before its ttl is over": (call, planted(on_settle=settle_forgets_soon)),
    "another result stored": (call, planted(on_settle=settle_stores_another_result)),
    "a renewal that does nothing": (renewing, planted(on_renew=renew_does_nothing)),
    "a key that is free although it is remembered": (too_late, planted(on_claim=claim_frees_what_is_remembered)),
    "a result told past its ttl": (too_late, planted(on_claim=claim_tells_what_has_expired)),
    "a key that is not remembered": (too_late, planted(on_settle=settle_remembers_nothing)),
    "a renewal refused for being late": (renewing, planted(on_renew=renew_refuses_who_is_late)),
    "an error released after it was recorded": (
        error_released_after_it_was_recorded,
        planted(on_release=release_of_what_is_recorded),
    ),
    "a lock taken over before the lease's end": (hold, planted(on_claim=claim_takes_over_early)),
    "a lock released without token": (hold, planted(on_release=release_without_token)),
    "a lock's token that a release resets": (hold, planted(on_release=release_resets_the_token)),
    "a lock's claim that does not know its own attempt": (hold, planted(on_claim=claim_forgets_its_attempt)),
    "a lock renewed without token": (renewed_hold, planted(on_renew=renew_without_token)),
}


README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
CONVICTED = dict(re.findall(r"^\| (.*?) \| ([0-9]+)\. .*? \|$", README.partition("### Planted bugs")[2], re.MULTILINE))
"""Planted bugs by what README says of them, and the promise that they break."""


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_bug_is_convicted(plant: str) -> None:
    scenario, bug = PLANTS[plant]
    how = {"model": bug} if isinstance(bug, type) else {"rules": bug}
    shows_on_repeats = "its own" in plant
    found = explore(scenario, **how, callers=3, crashes=1, expiries=1, lost_replies=int(shows_on_repeats), seconds=60)
    assert not found, f"{plant} was not convicted: {found}"
    assert found.violation is not None
    assert found.violation.promise.startswith(f"{CONVICTED[plant]}. ")
    assert len(found.violation.lines) <= 20


def test_readme_tells_of_every_planted_bug() -> None:
    assert set(CONVICTED) == set(PLANTS)


async def unconfirmed(driver: Any, run: Any, settled: Any, ttl: float) -> Any:
    await driver.still(run)
    outcome = {"codec": settled.codec, "body": settled.body, "ttl": ttl}
    await run.plan.backend.complete(run.rid, attempt=run.attempt, token=run.token, **outcome)
    return settled, False


async def releasing_what_is_to_be_recorded(driver: Any, run: Any, error: BaseException) -> None:
    if run.token is not None:
        await run.plan.backend.release(run.rid, attempt=run.attempt, token=run.token)


async def leaving_it_running(driver: Any, run: Any, error: BaseException) -> None:
    pass


async def unrecorded(driver: Any, run: Any, value: Any) -> Any:
    return flow.Replay(value, replayed=False, stored=True, token=run.token, age=0.0)


@pytest.mark.parametrize(
    ("name", "bug", "scenario", "promise"),
    [
        ("record", unconfirmed, call, "6. without any fault a caller was told that its outcome is not stored"),
        ("abandon", releasing_what_is_to_be_recorded, failing_for_good, "2. callers that were told a recorded error"),
        ("abandon", leaving_it_running, failing_once, "9. a caller that has finished left its record running"),
        ("settle", unrecorded, call, "9. a caller that has finished left its record running"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_bug_planted_in_the_flows_is_convicted(
    monkeypatch: pytest.MonkeyPatch, name: str, bug: Any, scenario: Any, promise: str
) -> None:
    monkeypatch.setattr(flow, name, bug)
    found = explore(scenario, callers=3, seconds=60)
    assert found.violation is not None
    assert found.violation.promise.startswith(promise)


def test_a_record_that_cannot_be_read_is_told_as_a_broken_promise() -> None:
    class Torn(Model):
        async def complete(self, rid: RecordId, **settled: Any) -> Answer:
            return await super().complete(rid, **settled | {"codec": "torn", "body": b"torn"})

    found = explore(model=Torn, callers=1)
    assert found.violation is not None
    assert found.violation.promise == "4. what was returned is not what is stored"


# ---------------------------------------------------------------------------------------------------- its limits


async def spinning(caller: Caller) -> Any:
    """Asks for a lock again and again, which no other caller that goes on can keep it from."""
    while not await caller.add("lock", caller.number):
        pass
    value = await caller.get("result")
    if value is None:
        value = await caller.effect()
        await caller.set("result", value)
    await caller.delete("lock")
    return value


def test_who_asks_again_and_again_while_another_could_go_on_breaks_no_promise() -> None:
    found = explore(spinning, callers=2, crashes=0, expiries=0, lost_replies=0, seconds=3)
    assert found, str(found)
    assert not found.complete


def test_who_asks_for_ever_after_a_crash_is_told() -> None:
    found = explore(spinning, callers=2, crashes=1, expiries=0, lost_replies=0, seconds=60, seed=1)
    assert found.violation is not None
    assert found.violation.promise.startswith("7.")


def test_a_scenario_that_is_not_the_same_when_it_is_played_again_is_told_so() -> None:
    turns = iter(range(1000))

    async def moody(caller: Caller) -> Any:
        await (caller.get("a") if next(turns) % 2 else caller.get("b"))
        return await caller.effect()

    with pytest.raises(RuntimeError, match="only through its caller"):
        explore(moody, callers=2)


@pytest.mark.parametrize("wrong", [{"callers": 0}, {"callers": 10}, {"crashes": -1}, {"lost_replies": -1}])
def test_budgets_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="budgets"):
        explore(**wrong)


def test_a_scenario_may_clean_up_after_itself() -> None:
    async def tidy(caller: Caller) -> Any:
        try:
            return await call(caller)
        finally:
            await caller.set("done", caller.number)

    found = explore(tidy, callers=2)
    assert found, str(found)


def test_a_long_exploration_tells_how_far_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    assert explore(callers=3, crashes=2, expiries=2, lost_replies=1, seconds=1.5, progress=True)
    assert "histories" in capfd.readouterr().err
    assert explore(callers=2)
    assert capfd.readouterr().err == ""


def test_a_shorter_counterexample_with_fewer_callers_and_faults_is_shown() -> None:
    found = explore(get_then_set, callers=4, crashes=2, expiries=2, lost_replies=2)
    assert str(found.violation) == str(explore(get_then_set, callers=2, crashes=0, lost_replies=0).violation)


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
