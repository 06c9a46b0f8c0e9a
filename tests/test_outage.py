"""A backend that fails, before the run, during it and after it, on every backend and in both colours."""

import asyncio
import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from probes import Counter, Gate
from test_calls import Interruption

from idempotent import (
    Applied,
    Backend,
    BackendError,
    BackendUnavailable,
    Event,
    LeaseLost,
    LocalBackend,
    NotApplied,
    OutcomeUnknown,
    ResultUnavailable,
    StillUnknown,
    UnprotectedWarning,
    configure,
    current_call,
    idempotent,
    open_backend,
)
from idempotent import _flow as flow
from idempotent._drive import drive
from idempotent._record import RecordId


@pytest.fixture
def faulty(backend_url: str) -> Faulty:
    backend = open_backend(backend_url)
    drive(backend.blocking().read(RecordId("n", "none")))  # connected, and its table made: leases here are short
    return Faulty(backend)


@pytest.fixture
def seen() -> list[Event]:
    events: list[Event] = []
    configure(hooks=[events.append])
    return events


def leave_unknown(backend: Backend, rid: RecordId) -> None:
    """What a run leaves that was interrupted where nobody may guess."""
    backend, attempt = backend.blocking(), b"deadbeef"
    options: Any = {"attempt": attempt, "fingerprint": b"", "lease": 30.0, "keep": None, "takeover": False}
    token = drive(backend.claim(rid, **options)).token
    drive(backend.release(rid, attempt=attempt, token=token, unknown=True))


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


def test_a_claim_whose_reply_is_lost_runs_nothing(faulty: Faulty, colour: Colour, effects: Counter) -> None:
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


@pytest.mark.parametrize("error", [KeyError("own"), Interruption("own")], ids=repr)
def test_a_failed_release_is_a_note_on_the_functions_own_error(
    faulty: Faulty, colour: Colour, error: BaseException
) -> None:
    def charge() -> None:
        raise error

    charge = colour.define(charge, backend=faulty, lease=1)
    faulty.plant("release", "before", times=10_000)
    error.__notes__ = []
    with pytest.raises(type(error), match="own") as caught:
        colour.call(charge)
    assert caught.value is error
    [note] = error.__notes__
    assert "stays claimed until its lease ends" in note


def test_what_was_recorded_is_told_although_its_confirmation_was_lost(colour: Colour) -> None:
    class Refusing(Faulty):
        """Refuses the outcome, takes the word that there is none to be had, and then is out for a moment."""

        async def complete(self, *args: Any, codec: str, **kwargs: Any) -> Any:
            if codec != flow.UNAVAILABLE and "complete" not in self.calls:
                raise BackendError("it is too large")
            if "complete" not in self.calls:
                self.plant("claim", "before")
            return await super().complete(*args, codec=codec, **kwargs)

        def blocking(self) -> Backend:
            return self

        def asynchronous(self) -> Backend:
            return self

    work = colour.define(lambda: "receipt", backend=Refusing(LocalBackend()), key="k", namespace="n")
    for _ in range(2):
        with pytest.raises(ResultUnavailable, match="refused to store"):
            colour.call(work)


def test_an_error_before_the_function_ran_is_not_recorded_as_its_own(effects: Counter) -> None:
    async def inner() -> None: ...

    behind = idempotent(lambda: inner(), backend=LocalBackend(), key="k", namespace="n", error_ttl={Exception: 60})
    with pytest.raises(TypeError, match="has not run"):
        behind()
    assert behind.peek() is None


def test_a_heartbeat_that_cannot_be_started_is_not_the_functions_error(
    effects: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = idempotent(backend=LocalBackend(), key="k", namespace="n", error_ttl={Exception: 60})(effects.hit)

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="new thread"):
            work()
    assert work() == effects.count == 1


def test_renewals_that_fail_are_tried_again_and_the_lease_holds(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    def slow() -> int:
        call = current_call()
        assert call is not None
        faulty.plant("renew", "before")
        faulty.plant("renew", "after")
        deadline = time.monotonic() + 20
        while faulty.calls.count("renew") < 4:
            assert time.monotonic() < deadline
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
    faulty.plant("changed", "after")
    second = colour.start(outer)
    while faulty.calls.count("changed") < 3:
        time.sleep(0.01)
    gate.opened.set()
    assert first.result(30) == second.result(30) == 1
    assert not faulty.faults
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


# ------------------------------------------------------------------------------------ outcomes that meet an obstacle


class Cramped(Faulty):
    """A backend that takes no outcome but the words that it refused one."""

    def __init__(self, inner: Backend, error: type[BackendError]) -> None:
        super().__init__(inner)
        self.error = error

    def _view(self, colour: str, inner: Backend) -> Faulty:
        return Cramped(inner, self.error)

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation in ("complete", "fail") and kwargs["codec"] != flow.UNAVAILABLE:
            raise self.error("too large")
        return await super()._do(operation, *args, **kwargs)


@pytest.mark.parametrize("error", [BackendError, BackendUnavailable])  # a refusal; a server that is out of memory
def test_an_outcome_that_the_backend_does_not_take_is_recorded_as_done(
    faulty: Faulty, colour: Colour, effects: Counter, error: type[BackendError]
) -> None:
    charge = colour.define(effects.hit, backend=Cramped(faulty.inner, error), lease=1.5)
    with pytest.raises(ResultUnavailable) as caught:
        colour.call(charge)
    assert caught.value.result == 1
    with pytest.raises(ResultUnavailable, match="refused"):
        colour.call(charge)
    assert effects.count == 1


def test_an_outcome_that_was_taken_after_all_is_not_called_unavailable(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    charge = colour.define(effects.hit, backend=faulty)
    faulty.plant("complete", "after", error=BackendError("taken, and its reply is an error"))
    faulty.plant("complete", "before")
    outcome = colour.call(charge.outcome)
    assert (outcome.value, outcome.stored) == (1, True)
    assert faulty.calls.count("complete") == 3
    assert colour.call(charge) == 1


def test_an_error_that_the_backend_does_not_take_is_recorded_as_done(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    def charge() -> None:
        effects.hit()
        raise ValueError("declined")

    charge = colour.define(charge, backend=Cramped(faulty.inner, BackendError), error_ttl={ValueError: 60})
    with pytest.raises(ValueError, match="declined"):
        colour.call(charge)
    with pytest.raises(ResultUnavailable, match="refused"):
        colour.call(charge)
    assert effects.count == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [RuntimeError("a time limit"), OSError("raw")], ids=repr)
def test_what_else_is_raised_into_a_completion_costs_nothing_of_it(
    faulty: Faulty, colour: Colour, effects: Counter, when: Any, error: Exception
) -> None:
    charge = colour.define(effects.hit, backend=faulty)
    faulty.plant("complete", when, error=error)
    outcome = colour.call(charge.outcome)
    assert (outcome.value, outcome.stored) == (1, True)
    assert colour.call(charge) == 1


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_a_signal_raises_into_a_completion_goes_on_after_the_outcome_is_recorded(
    faulty: Faulty, effects: Counter, when: Any, error: BaseException
) -> None:
    charge = COLOURS[0].define(effects.hit, backend=faulty)
    faulty.plant("complete", when, error=error)
    with pytest.raises(type(error)):
        charge()
    assert charge() == 1
    assert effects.count == 1


def test_a_release_that_breaks_does_not_mask_the_functions_own_error(faulty: Faulty, colour: Colour) -> None:
    def charge() -> None:
        raise KeyError("own")

    charge = colour.define(charge, backend=faulty, lease=1)
    faulty.plant("release", "before", times=10_000, error=RuntimeError("raw"))
    with pytest.raises(KeyError, match="own"):
        colour.call(charge)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("lost", [None, "claim", "complete"])
def test_a_record_that_was_lost_during_the_run_is_made_again(
    faulty: Faulty, colour: Colour, effects: Counter, late: bool, lost: str | None
) -> None:
    def charge() -> int:
        call = current_call()
        assert call is not None
        assert (
            COLOURS[0].define(lambda: None, backend=faulty.inner, namespace="n").with_key(call.key).forget(force=True)
        )
        while late and not call.lease_lost:
            time.sleep(0.01)
        if lost is not None:
            faulty.plant(lost, "after")
        return effects.hit()

    charge = colour.define(charge, backend=faulty, namespace="n", lease=1.5)
    outcome = colour.call(charge.outcome)
    assert (outcome.value, outcome.stored) == (1, True)
    again = colour.call(charge.outcome)
    assert (again.value, again.replayed, again.token) == (1, True, outcome.token)
    assert effects.count == 1


def test_a_run_whose_key_was_forgotten_and_claimed_again_is_told(
    faulty: Faulty, colour: Colour, effects: Counter, gate: Gate
) -> None:
    def charge() -> int:
        if effects.hit() == 1:
            gate.pass_through()
        return effects.count

    charge = colour.define(charge, backend=faulty)
    first = colour.start(charge)
    assert gate.entered.wait(30)
    assert colour.call(charge.forget, force=True)
    assert colour.call(charge) == 2  # beside the one that runs, in the same process too
    gate.opened.set()
    with pytest.raises(LeaseLost):
        first.result(30)
    assert colour.call(charge) == 2


class OutAfter(Faulty):
    """A backend that takes so many completions, and no further ones."""

    def __init__(self, inner: Backend, left: list[None]) -> None:
        super().__init__(inner)
        self.left = left

    def _view(self, colour: str, inner: Backend) -> Faulty:
        view = OutAfter(inner, self.left)
        view.calls = self.calls
        return view

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation == "complete":
            if not self.left:
                self.calls.append(operation)
                raise BackendUnavailable("out")
            self.left.pop()
        return await super()._do(operation, *args, **kwargs)


def test_who_was_taken_over_is_told_although_the_backend_is_out_from_then_on(
    faulty: Faulty, colour: Colour, effects: Counter, gate: Gate
) -> None:
    def charge() -> int:
        if effects.hit() == 1:
            gate.pass_through()
        return effects.count

    backend = OutAfter(faulty.inner, [None, None])  # the successor's, and the answer that it is the record's
    charge = colour.define(charge, backend=backend)
    first = colour.start(charge)
    assert gate.entered.wait(30)
    assert colour.call(charge.forget, force=True)
    assert colour.call(charge) == 2
    gate.opened.set()
    with pytest.raises(LeaseLost):
        first.result(30)
    assert backend.calls.count("complete") == 2


def test_an_outcome_is_sent_again_until_the_lease_ends_counted_from_before_it_was_sent_first() -> None:
    class Driver:
        clock = 100.0

        def now(self) -> float:
            return self.clock

        async def sleep(self, seconds: float) -> None:
            self.clock += seconds

        async def still(self, run: Any) -> None:
            pass

    class Frozen(LocalBackend):
        timeout = 1.0

        async def complete(self, *args: Any, **kwargs: Any) -> Any:
            driver.clock += self.timeout
            raise BackendUnavailable("no reply")

    driver, backend = Driver(), Frozen()
    spec = idempotent(backend=backend, lease=1.0, on_crash="rerun")(lambda: 1).__idempotent_spec__[0]  # type: ignore[attr-defined]
    run = spec.run(spec.plan(), (), {}, "k", b"")
    run.token, run.valid_until = 1, driver.clock + 0.99
    replay = drive(flow.settle(driver, run, 1))  # type: ignore[arg-type]
    assert (replay.value, replay.stored, driver.clock) == (1, False, 101.0)


def test_what_was_sent_again_is_not_kept_in_a_cycle(colour: Colour) -> None:
    class Argument:
        pass

    class OutOnce(LocalBackend):
        is_out = True

        async def complete(self, *args: Any, **kwargs: Any) -> Any:
            if self.is_out:
                self.is_out = False
                raise BackendUnavailable("out")
            return await super().complete(*args, **kwargs)

    def charge(order: str, _argument: Argument) -> str:
        return order

    guarded = colour.define(charge, backend=OutOnce(), key="{order}", ignore=("_argument",))
    argument = Argument()
    gone = weakref.ref(argument)
    gc.collect()
    gc.disable()
    try:
        assert colour.call(guarded, "a", argument) == "a"
        del argument
        assert gone() is None
    finally:
        gc.enable()


# ---------------------------------------------------------------------------------------- claims without an answer


@pytest.mark.parametrize("on_crash", ["rerun", "raise"])
def test_a_claim_without_an_answer_is_taken_back(
    faulty: Faulty, colour: Colour, effects: Counter, on_crash: Any
) -> None:
    charge = colour.define(effects.hit, backend=faulty, on_crash=on_crash, wait=0)
    faulty.plant("claim", "after")
    with pytest.raises(BackendUnavailable):
        colour.call(charge)
    assert effects.count == 0
    assert colour.call(charge) == 1


def test_a_probes_finding_is_not_answered_by_a_run_without_protection(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    asked = []

    def probe(call: object) -> Applied:
        if not asked:
            asked.append(1)
            faulty.plant("claim", "before")
        return Applied(7)

    charge = colour.define(effects.hit, backend=faulty, namespace="n", key="k", on_outage="run", on_crash=probe)
    leave_unknown(faulty.inner, RecordId("n", "k"))
    with pytest.raises(BackendUnavailable):
        colour.call(charge)
    assert effects.count == 0
    assert colour.call(charge) == 7
    assert effects.count == 0


def test_a_run_that_the_backend_spoke_of_is_never_followed_by_one_without_protection(
    faulty: Faulty, colour: Colour, effects: Counter, gate: Gate
) -> None:
    def charge() -> int:
        gate.pass_through()
        effects.hit()
        raise KeyError("own")

    inner = colour.define(charge, backend=faulty.inner, namespace="n")
    outer = colour.define(charge, backend=faulty, namespace="n", on_outage="run")
    first = colour.start(inner)
    assert gate.entered.wait(30)
    second = colour.start(outer)
    while "changed" not in faulty.calls:
        time.sleep(0.01)
    faulty.plant("claim", "before", times=10_000)
    gate.opened.set()
    with pytest.raises(KeyError):
        first.result(30)
    with pytest.raises(BackendUnavailable):
        second.result(30)
    assert effects.count == 1


def test_all_who_follow_a_call_into_an_outage_are_told_with_it(
    faulty: Faulty, colour: Colour, effects: Counter
) -> None:
    charge = colour.define(effects.hit, backend=faulty)
    faulty.plant("claim", "before", times=10_000)
    answers = colour.storm(charge, 20)
    assert [type(answer) for answer in answers] == [BackendUnavailable] * 20
    assert effects.count == 0


# --------------------------------------------------------------------------------------------------- what is left to ask


@pytest.mark.parametrize(
    ("colour", "probe_is_async"), [(COLOURS[0], False), (COLOURS[1], False), (COLOURS[1], True)], ids=repr
)
def test_a_probe_decides_about_what_a_dead_run_left(
    faulty: Faulty, colour: Colour, effects: Counter, probe_is_async: bool
) -> None:
    verdicts: dict[str, Any] = {
        "applied": Applied(7),
        "not applied": NotApplied(),
        "not applied, by its class": NotApplied,
        "still unknown": StillUnknown(),
        "still unknown, by its class": StillUnknown,
        "no verdict": "maybe",
        "raises": ZeroDivisionError("probe"),
    }
    asked: list[str] = []

    def probe(call: Any) -> Any:
        asked.append(call.arguments["order"])
        verdict = verdicts[call.key]
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    async def async_probe(call: Any) -> Any:
        await asyncio.sleep(0)
        return probe(call)

    charge = colour.define(
        lambda order: effects.hit(),
        backend=faulty,
        namespace="n",
        key="{order}",
        on_crash=async_probe if probe_is_async else probe,
    )
    for order in verdicts:
        leave_unknown(faulty.inner, RecordId("n", order))
    for order, error, words in [
        ("still unknown", OutcomeUnknown, "may or may not"),
        ("still unknown, by its class", OutcomeUnknown, "may or may not"),
        ("no verdict", TypeError, "must return Applied"),
        ("raises", ZeroDivisionError, "probe"),
    ]:
        for _ in range(2):
            with pytest.raises(error, match=words):
                colour.call(charge, order)
        assert asked == [order, order]
        assert colour.call(charge.peek, order).state == "unknown"
        asked.clear()
    for _ in range(2):
        assert colour.call(charge, "applied") == 7
    assert effects.count == 0
    for order, answer in {"not applied": 1, "not applied, by its class": 2}.items():
        for _ in range(2):
            assert colour.call(charge, order) == answer
    assert asked == ["applied", "not applied", "not applied, by its class"]
    assert effects.count == 2


LAST_STEP = {"probe": "complete", "result": "complete", "error": "fail", "not_applied": "release"}


def test_a_dead_run_is_settled_although_a_reply_was_lost(faulty: Faulty, colour: Colour, effects: Counter) -> None:
    keys = {f"{way}, {lost} lost": (way, lost) for way, last in LAST_STEP.items() for lost in ("claim", last)}
    answers: dict[str, Any] = {"result": 7, "error": ZeroDivisionError("by hand"), "not_applied": True}
    options: Any = {"backend": faulty, "namespace": "n", "key": "{order}", "lease": 0.5}

    asked: set[str] = set()

    def probe(call: Any) -> Applied:
        if call.key not in asked:
            asked.add(call.key)
            faulty.plant(keys[call.key][1], "after")
        return Applied(7)

    def work(order: str) -> int:
        return effects.hit()

    asking = colour.define(work, on_crash=probe, **options)
    charge = colour.define(work, on_crash="raise", error_ttl={ZeroDivisionError: 60}, **options)

    def settle(key: str) -> None:
        way, _ = keys[key]
        if way == "probe":
            assert colour.call(asking, key) == 7
        else:
            assert colour.call(charge.resolve, key, **{way: answers[way]})

    for key, (way, lost) in keys.items():
        leave_unknown(faulty.inner, RecordId("n", key))
        if way != "probe":
            faulty.plant(lost, "after")
        with pytest.raises(BackendUnavailable):
            settle(key)
        assert not faulty.faults
    for key, (_, lost) in keys.items():
        if lost == "claim":  # it stands until its lease is over, and then whoever asks again settles it
            while colour.call(charge.peek, key).lease_left > 0:
                time.sleep(0.01)
            settle(key)
    for key, (way, _) in keys.items():
        if way == "error":
            with pytest.raises(ZeroDivisionError, match="by hand"):
                colour.call(charge, key)
        elif way != "not_applied":
            assert colour.call(charge, key) == 7
    assert effects.count == 0
    assert [colour.call(charge, key) for key, (way, _) in keys.items() if way == "not_applied"] == [1, 2]


# --------------------------------------------------------------------------------------------- answers that come late


class Late(Faulty):
    """A backend whose first claim is answered when its lease is over."""

    def __init__(self, inner: Backend, meanwhile: Callable[[], None]) -> None:
        super().__init__(inner)
        self.meanwhile: Callable[[], None] | None = meanwhile

    def blocking(self) -> Backend:
        self.inner = self.inner.blocking()
        return self

    async def claim(self, *args: Any, **kwargs: Any) -> Any:
        reply = await super().claim(*args, **kwargs)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            time.sleep(kwargs["lease"])
            meanwhile()
        return reply


@pytest.mark.parametrize("overtaken", [False, True])
def test_a_claim_that_is_granted_after_its_lease_runs_only_if_nobody_took_over(
    backend_url: str, effects: Counter, overtaken: bool
) -> None:
    inner = open_backend(backend_url)
    other = COLOURS[0].define(effects.hit, backend=inner, namespace="n", key="k")

    def charge() -> int:
        call = current_call()
        assert call is not None
        call.check()
        return 10 * effects.hit()

    charge = COLOURS[0].define(
        charge, backend=Late(inner, other if overtaken else lambda: None), namespace="n", key="k", lease=1.0
    )
    assert charge() == (1 if overtaken else 10)
    assert effects.count == 1


def test_a_run_that_outlived_its_lease_asks_through_a_short_outage_before_it_answers(
    faulty: Faulty, effects: Counter
) -> None:
    other = COLOURS[0].define(effects.hit, backend=faulty.inner, namespace="n", key="k")

    def charge() -> int:
        call = current_call()
        assert call is not None
        faulty.plant("renew", "before", times=10_000)
        while not call.lease_lost:
            time.sleep(0.01)
        time.sleep(0.05)
        assert other() == 1
        faulty.faults.clear()
        faulty.plant("complete", "before", times=3)
        return 10

    charge = COLOURS[0].define(charge, backend=faulty, namespace="n", key="k", lease=1.2)
    with pytest.raises(LeaseLost):
        charge()
    assert charge() == 1
