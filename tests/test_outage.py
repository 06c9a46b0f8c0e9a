"""A backend that fails, before the run, during it and after it, on every backend and in both colours."""

import threading
import time
import warnings
from typing import Any

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from test_calls import Counter, Gate

from idempotent import (
    BackendUnavailable,
    Event,
    ResultUnavailable,
    UnprotectedWarning,
    configure,
    current_call,
    open_backend,
)


@pytest.fixture(params=COLOURS, ids=repr)
def colour(request: pytest.FixtureRequest) -> Colour:
    return request.param


@pytest.fixture
def effects() -> Counter:
    return Counter()


@pytest.fixture
def faulty(backend_url: str) -> Faulty:
    return Faulty(open_backend(backend_url))


@pytest.fixture
def seen() -> list[Event]:
    events: list[Event] = []
    configure(hooks=[events.append])
    return events


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


def test_a_claim_that_is_not_confirmed_runs_nothing(
    faulty: Faulty, colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    charge = colour.define(effects.hit, backend=faulty)
    faulty.plant("claim", "before")
    with pytest.raises(BackendUnavailable):
        colour.call(charge)
    assert effects.count == 0
    assert names(seen) == ["backend_error"]
    assert colour.call(charge) == 1


def test_a_claim_whose_reply_is_lost_runs_nothing_and_is_free_after_its_lease(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    charge = colour.define(effects.hit, backend=faulty, lease=0.3)
    faulty.plant("claim", "after")
    with pytest.raises(BackendUnavailable):
        colour.call(charge)
    assert effects.count == 0
    assert colour.call(charge) == 1


def test_on_outage_run_runs_with_a_warning_and_an_event(
    faulty: Faulty, colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    charge = colour.define(effects.hit, backend=faulty, on_outage="run")
    faulty.plant("claim", "before", times=2)
    for count in (1, 2):
        with pytest.warns(UnprotectedWarning):
            outcome = colour.call(charge.outcome)
        assert (outcome.value, outcome.stored, outcome.replayed) == (count, False, False)
    assert names(seen).count("unprotected") == 2
    assert colour.call(charge) == 3
    assert colour.call(charge) == 3


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("times", [1, 3])
def test_a_completion_is_sent_until_it_is_confirmed(
    faulty: Faulty, colour: Colour, effects: Counter, when: Any, times: int
) -> None:
    charge = colour.define(effects.hit, backend=faulty)
    faulty.plant("complete", when, times)
    outcome = colour.call(charge.outcome)
    assert (outcome.value, outcome.stored) == (1, True)
    assert colour.call(charge) == 1
    assert effects.count == 1


def test_an_outage_past_the_lease_returns_the_result_as_not_stored(
    faulty: Faulty, colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    charge = colour.define(effects.hit, backend=faulty, lease=0.3)
    faulty.plant("complete", "before", times=10_000)
    outcome = colour.call(charge.outcome)
    assert (outcome.value, outcome.stored, outcome.replayed) == (1, False, False)
    assert effects.count == 1
    assert names(seen)[-1] == "not_stored"


def test_followers_share_a_result_that_could_not_be_stored(faulty: Faulty, colour: Colour, effects: Counter) -> None:
    gate = Gate()

    def charge() -> int:
        gate.pass_through()
        return effects.hit()

    charge = colour.define(charge, backend=faulty, lease=0.3)
    faulty.plant("complete", "before", times=10_000)
    leader = colour.start(charge.outcome)
    assert gate.entered.wait(30)
    follower = colour.start(charge.outcome)
    while faulty.calls.count("renew") < 2:  # the follower has had time to board, and the lease outlives it
        time.sleep(0.01)
    gate.opened.set()
    answers = [leader.result(30), follower.result(30)]
    assert [answer.value for answer in answers] == [1, 1]
    assert not any(answer.stored for answer in answers)
    assert effects.count == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_recorded_error_and_a_release_survive_a_lost_reply(
    faulty: Faulty, colour: Colour, effects: Counter, when: Any
) -> None:
    def charge(kind: type[Exception]) -> None:
        effects.hit()
        raise kind("no")

    charge = colour.define(charge, backend=faulty, error_ttl={ValueError: 60})
    faulty.plant("fail", when)
    faulty.plant("release", when)
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            colour.call(charge, ValueError)
    assert effects.count == 1
    for count in (2, 3):
        with pytest.raises(KeyError) as caught:
            colour.call(charge, KeyError)
        assert not getattr(caught.value, "__notes__", [])
        assert effects.count == count


def test_a_failed_release_is_a_note_on_the_functions_own_error(faulty: Faulty, colour: Colour) -> None:
    def charge() -> None:
        raise KeyError("own")

    charge = colour.define(charge, backend=faulty, lease=0.2)
    faulty.plant("release", "before", times=10_000)
    with pytest.raises(KeyError, match="own"):
        colour.call(charge)


def test_renewals_that_fail_are_tried_again_and_the_lease_holds(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    def slow() -> int:
        call = current_call()
        assert call is not None
        faulty.plant("renew", "before", 2)
        while faulty.calls.count("renew") < 4:
            time.sleep(0.01)
        call.check()
        return effects.hit()

    slow = colour.define(slow, backend=faulty, lease=2)
    assert colour.call(slow) == 1
    assert colour.call(slow) == 1


def test_lease_lost_is_seen_at_the_local_deadline_when_no_renewal_is_confirmed(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    def slow() -> int:
        call = current_call()
        assert call is not None
        faulty.plant("renew", "before", 10_000)
        deadline = time.monotonic() + 20
        while not call.lease_lost:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        faulty.faults.clear()
        return effects.hit()

    slow = colour.define(slow, backend=faulty, lease=0.3)
    assert colour.call(slow) == 1  # nobody took over, so the outcome is recorded all the same
    assert colour.call(slow) == 1


def test_a_waiter_that_cannot_wait_asks_again_and_never_runs_unprotected(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    gate = Gate()

    def charge() -> int:
        gate.pass_through()
        return effects.hit()

    inner = colour.define(charge, backend=faulty.inner, namespace="n")
    outer = colour.define(charge, backend=faulty, namespace="n", on_outage="run")
    first = colour.start(inner)
    assert gate.entered.wait(30)
    faulty.plant("changed", "before", 2)
    second = colour.start(outer)
    while faulty.calls.count("changed") < 3:
        time.sleep(0.01)
    gate.opened.set()
    assert first.result(30) == second.result(30) == 1
    assert effects.count == 1


def test_a_hook_that_raises_breaks_no_call(colour: Colour, effects: Counter, caplog: pytest.LogCaptureFixture) -> None:
    def hook(event: Event) -> None:
        raise RuntimeError("hook")

    configure(backend="local://", hooks=[hook])
    charge = colour.define(effects.hit)
    assert colour.call(charge) == 1
    assert "failed on the event claimed" in caplog.text


def test_no_thread_is_left_after_the_last_run(faulty: Faulty, effects: Counter) -> None:
    charge = COLOURS[0].define(effects.hit, backend=faulty)
    COLOURS[0].call(charge)
    deadline = time.monotonic() + 20
    while any(thread.name == "idempotent-heartbeat" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_serializer_that_breaks_is_not_an_invitation_to_run_again(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    class Broken:
        def dumps(self, value: object) -> bytes:
            raise ZeroDivisionError

        def loads(self, data: bytes) -> object:
            raise AssertionError

    charge = colour.define(effects.hit, backend=backend_url, serializer=Broken())
    for _ in range(2):
        with pytest.raises(ResultUnavailable):
            colour.call(charge)
    assert effects.count == 1


def test_a_probe_of_the_wrong_kind_is_named(colour: Colour) -> None:
    async def probe(call: object) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if colour.is_async:
            colour.define(lambda: 1, on_crash=probe)
        else:
            with pytest.raises(TypeError, match="async"):
                colour.define(lambda: 1, on_crash=probe)
