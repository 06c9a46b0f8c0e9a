"""Shadow mode: under `configure(mode="observe")` everything runs, and events tell what would have become of it."""

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from bank import BANKS, Bank, Entry, bank_of, url_of
from colours import COLOURS, Colour
from differential import Commands
from probes import Counter, Gate

from idempotent import (
    BackendError,
    InProgress,
    LocalBackend,
    Lock,
    LockTimeout,
    ProcessLocalWarning,
    configure,
    current_call,
    idempotent,
    open_backend,
)
from idempotent._record import RecordId
from idempotent.events import Event
from idempotent.testing import FaultyBackend


@pytest.fixture
def seen() -> Iterator[list[Event]]:
    """The events of the test, in shadow mode."""
    events: list[Event] = []
    configure(mode="observe", hooks=[events.append])
    yield events


def observed(seen: list[Event]) -> list[tuple[str, str | None, bool | None]]:
    return [(event.name, event.observed, event.agrees) for event in seen]


def counting(colour: Colour, effects: Counter, backend: Any, **options: Any) -> Any:
    def count(order: str, amount: int) -> int:
        return effects.hit()

    return colour.define(count, **{"key": "{order}", "namespace": "observed", "backend": backend} | options)


def test_duplicates_run_and_are_told_to_be_replayable(
    backend_url: str, colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    count = counting(colour, effects, backend_url)
    assert [colour.call(count, "o-1", 5) for _ in range(3)] == [1, 2, 3]
    assert observed(seen) == [
        ("claimed", None, None),
        ("completed", None, None),
        ("replayed", "would_replay", False),
        ("replayed", "would_replay", False),
    ]
    assert dict(count.stats()) == {"claimed": 1, "completed": 1, "would_replay": 2, "disagreed": 2}
    assert {event.key_digest for event in seen} == {RecordId("observed", "o-1").digest}
    assert seen[2].token == seen[0].token is not None
    configure(mode="enforce")
    assert colour.call(count, "o-1", 5) == 1  # what was observed is what enforcement then replays
    assert effects.count == 3


def test_answers_that_agree_are_told_to(backend_url: str, colour: Colour, seen: list[Event]) -> None:
    def receipt(order: str) -> dict[str, Any]:
        return {"order": order, "tags": {"b", "a", "c"}}

    receipt = colour.define(receipt, backend=backend_url)
    assert colour.call(receipt, "o-1") == colour.call(receipt, "o-1")
    assert observed(seen)[2:] == [("replayed", "would_replay", True)]
    outcome = colour.call(receipt.outcome, "o-1")
    assert (outcome.replayed, outcome.stored, outcome.token) == (False, False, 0)


def test_what_enforcement_would_refuse_runs(
    backend_url: str, colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    count = counting(colour, effects, backend_url, on_crash="raise", wait=0)
    colour.call(count, "o-1", 5)
    assert colour.call(count, "o-1", 6) == 2  # other arguments
    with Commands(open_backend(backend_url), colour) as commands:
        for order, unknown in (("o-2", False), ("o-3", True)):
            rid, attempt = RecordId("observed", order), b"another."
            reply = commands.claim(rid, attempt=attempt, fingerprint=b"", lease=60.0, keep=None, takeover=False)
            if unknown:
                commands.release(rid, attempt=attempt, token=reply.token, unknown=True)
        seen.clear()
        assert colour.call(count, "o-2", 5) == 3  # in progress
        assert colour.call(count, "o-3", 5) == 4  # unknown
        patient = counting(colour, effects, backend_url)
        assert colour.call(patient, "o-2", 5) == 5
        assert commands.read(RecordId("observed", "o-2")).state == "running"
        assert commands.read(RecordId("observed", "o-3")).state == "unknown"
    assert observed(seen) == [
        ("busy", "would_refuse", None),
        ("unknown", "would_refuse", None),
        ("waited", "would_wait", None),
    ]
    assert count.stats()["would_refuse"] == 3


def test_a_late_retry_of_what_is_remembered_runs(colour: Colour, effects: Counter, seen: list[Event]) -> None:
    class Clock:
        now = 1_000_000_000

        def __call__(self) -> int:
            return self.now

    clock = Clock()
    count = counting(colour, effects, LocalBackend(clock=clock), ttl=10, remember=60)
    colour.call(count, "o-1", 5)
    clock.now += 20_000_000
    assert colour.call(count, "o-1", 5) == 2
    assert observed(seen)[-1] == ("replayed", "would_refuse", None)
    assert (seen[-1].error, seen[-1].age) == ("ResultUnavailable", 10.0)


def test_nothing_is_waited_for(backend_url: str, colour: Colour, gate: Gate, seen: list[Event]) -> None:
    def slow(order: str, first: bool) -> str:
        if first:
            gate.pass_through()
        return order

    slow = colour.define(slow, key="{order}", fingerprint=False, wait=None, backend=backend_url)
    running = colour.start(slow, "o-1", True)
    assert gate.entered.wait(30)
    assert colour.call(slow, "o-1", False) == "o-1"
    assert ("waited", "would_wait", None) in observed(seen)
    gate.opened.set()
    assert running.result(30) == "o-1"
    assert colour.call(slow.peek, "o-1", False).state == "completed"


def raises(order: str) -> str:
    raise AttributeError(order)


@pytest.mark.parametrize(
    "key", ["{order}", lambda order: "", lambda order: None, raises], ids=["unstable", "empty", "none", "broken"]
)
def test_calls_without_a_usable_key_run(colour: Colour, key: Any, effects: Counter, seen: list[Event]) -> None:
    function = colour.define(lambda order: effects.hit(), key=key, namespace="n", backend="local://")
    given = object() if key == "{order}" else "o-1"
    assert colour.call(function, given) == 1
    (event,) = seen
    assert (event.name, event.observed, event.key_digest) == ("unprotected", "would_refuse", "")
    assert event.error in ("UnstableKey", "KeyRequired", "AttributeError")
    assert dict(function.stats()) == {"would_refuse": 1}
    assert colour.call(function.outcome, given).value == 2


def test_a_call_without_a_usable_key_has_a_current_call_all_the_same(seen: list[Event]) -> None:
    def charge(order: object) -> tuple[Any, ...]:
        call = current_call()
        assert call is not None
        call.check()
        return call.arguments["order"], call.token, call.step("one", lambda: 1), call.downstream_key("provider")

    given = object()
    function = idempotent(key="{order}", namespace="n", backend="local://")(charge)
    (*first, key), (*second, other) = function(given), function(given)
    assert first == second == [given, 0, 1]
    assert key != other  # or the provider would take different calls for one


def test_arguments_that_do_not_fit_are_the_functions_own_error(colour: Colour, seen: list[Event]) -> None:
    function = colour.define(lambda order: order, backend="local://")
    with pytest.raises(TypeError, match="order"):
        colour.call(function)


def test_an_outage_changes_nothing_and_is_not_met_again_at_once(
    colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    faulty = FaultyBackend(LocalBackend())
    count = counting(colour, effects, faulty)
    faulty.refuse("claim")
    assert [colour.call(count, "o-1", 5) for _ in range(3)] == [1, 2, 3]
    assert faulty.calls == ["claim", "release"]  # it may have been applied
    assert observed(seen) == [
        ("backend_error", "would_refuse", None),
        *[("unprotected", "would_refuse", None)] * 2,
    ]


def test_while_the_store_is_left_alone_the_log_has_no_error(
    colour: Colour, effects: Counter, caplog: pytest.LogCaptureFixture
) -> None:
    configure(mode="observe")
    faulty = FaultyBackend(LocalBackend())
    count = counting(colour, effects, faulty)
    faulty.refuse("claim")
    for _ in range(2):
        colour.call(count, "o-1", 5)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


@pytest.mark.parametrize("on_crash", ["rerun", "raise"])
def test_a_claim_whose_reply_was_lost_leaves_nothing(
    colour: Colour, effects: Counter, seen: list[Event], on_crash: str
) -> None:
    faulty = FaultyBackend(LocalBackend())
    count = counting(colour, effects, faulty, on_crash=on_crash)
    faulty.lose_reply("claim")
    assert colour.call(count, "o-1", 5) == 1
    assert colour.call(count.peek, "o-1", 5) is None  # or its lease would end, as if its runner had died
    faulty.heal()
    configure(mode="enforce")
    assert colour.call(count, "o-1", 5) == 2


def test_a_claim_that_could_not_be_taken_back_at_once_is_when_the_function_has_ended(
    colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    faulty = FaultyBackend(LocalBackend())
    count = counting(colour, effects, faulty, on_crash="raise")
    faulty.lose_reply("claim")
    faulty.refuse("release")
    assert colour.call(count, "o-1", 5) == 1
    assert faulty.calls == ["claim", "release", "release"]
    assert [event.observed for event in seen if event.name == "backend_error"] == ["would_refuse", None]  # one call
    assert colour.call(count.peek, "o-1", 5) is None


@pytest.mark.parametrize("fails", [False, True])
def test_an_outcome_that_the_backend_refuses_is_recorded_as_done_and_the_backend_asked_on(
    colour: Colour, seen: list[Event], fails: bool
) -> None:
    def work(order: str) -> str:
        if fails:
            raise DeclinedError
        return "done"

    faulty = FaultyBackend(LocalBackend())
    function = colour.define(work, key="{order}", backend=faulty, error_ttl={DeclinedError: 60})
    faulty.refuse("fail" if fails else "complete", error=BackendError("too large"))
    for order in ("o-1", "o-2"):
        if fails:
            with pytest.raises(DeclinedError):
                colour.call(function, order)
        else:
            assert colour.call(function, order) == "done"
    last: Any = ("failed", None, None) if fails else ("completed", None, None)
    first = last if fails else ("completed", "would_refuse", None)
    assert observed(seen) == [
        ("claimed", None, None),
        ("backend_error", None, None),
        first,
        ("claimed", None, None),
        last,
    ]
    assert colour.call(function.peek, "o-1").state == ("failed" if fails else "completed")


def test_a_record_that_was_forgotten_meanwhile_is_made_anew(colour: Colour, seen: list[Event]) -> None:
    store = LocalBackend()

    def forgets() -> str:
        with Commands(store, COLOURS[0]) as commands:
            commands.forget(RecordId("n", "k"), force=True)
        return "done"

    function = colour.define(forgets, namespace="n", key="k", fingerprint=False, backend=store)
    assert colour.call(function) == "done"
    assert [event.name for event in seen] == ["claimed", "completed"]


@pytest.mark.parametrize("command", ["claim", "complete"])
def test_a_backend_that_hangs_holds_up_one_call_for_a_second(
    colour: Colour, effects: Counter, seen: list[Event], command: Any
) -> None:
    faulty = FaultyBackend(LocalBackend())
    count = counting(colour, effects, faulty)
    with faulty.hang(command, times=None):
        assert [colour.call(count, "o-1", 5) for _ in range(3)] == [1, 2, 3]
    assert faulty.calls.count(command) == 1
    assert "backend_error" in {event.name for event in seen}


def test_a_backend_that_breaks_its_contract_breaks_no_call(colour: Colour, effects: Counter, seen: list[Event]) -> None:
    faulty = FaultyBackend(LocalBackend())
    faulty.refuse("complete", error=ZeroDivisionError())
    count = counting(colour, effects, faulty)
    assert colour.call(count, "o-1", 5) == 1
    assert [event.name for event in seen] == ["claimed", "backend_error", "not_stored"]


def test_a_process_that_can_start_no_thread_runs_its_calls(
    effects: Counter, seen: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    count = counting(COLOURS[0], effects, LocalBackend())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert [count("o-1", 5) for _ in range(2)] == [1, 2]
    assert observed(seen) == [
        ("backend_error", None, None),
        ("completed", None, None),
        ("unprotected", "would_refuse", None),
    ]
    assert (seen[0].error, count.peek("o-1", 5).state) == ("RuntimeError", "completed")


@pytest.mark.parametrize("make", [lambda: iter([1, 2]), lambda: (n for n in (1, 2)), lambda: map(int, "12")])
def test_what_can_be_read_once_is_returned_unread(make: Any, colour: Colour, seen: list[Event]) -> None:
    result = make()
    function = colour.define(lambda: result, namespace="n", backend="local://")
    assert colour.call(function) is colour.call(function) is result
    assert list(result) == [1, 2]


class DeclinedError(Exception):
    pass


def test_errors_are_the_functions_own_and_are_recorded_or_released(
    backend_url: str, colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    def charge(order: str) -> str:
        count = effects.hit()
        if order == "never" or (order == "once" and count == 1):
            raise DeclinedError(order)
        return "done"

    released = colour.define(charge, backend=backend_url, namespace="released")
    with pytest.raises(DeclinedError) as raised:
        colour.call(released, "once")
    assert not hasattr(raised.value, "__notes__")
    assert colour.call(released, "once") == "done"
    kept = colour.define(charge, backend=backend_url, namespace="kept", error_ttl={DeclinedError: 600})
    for _ in range(2):
        with pytest.raises(DeclinedError):
            colour.call(kept, "never")
    assert [event.name for event in seen] == [
        "claimed",
        "released",
        "claimed",
        "completed",
        "claimed",
        "failed",
        "replayed",
    ]
    assert observed(seen)[-1] == ("replayed", "would_replay", True)
    with pytest.raises(DeclinedError):
        colour.call(kept, "never")
    assert colour.call(kept.peek, "never").state == "failed"


def test_a_replay_that_would_have_hidden_an_error_disagrees(
    colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    def charge() -> str:
        if effects.hit() > 1:
            raise DeclinedError
        return "done"

    charge = colour.define(charge, backend="local://")
    colour.call(charge)
    with pytest.raises(DeclinedError):
        colour.call(charge)
    assert observed(seen)[-1] == ("replayed", "would_replay", False)


def test_a_result_that_cannot_be_kept_is_returned_all_the_same(colour: Colour, seen: list[Event]) -> None:
    result = object()
    function = colour.define(lambda: result, namespace="n", backend="local://")
    assert colour.call(function) is colour.call(function) is result
    assert [(event.name, event.observed, event.error) for event in seen[1:]] == [
        ("completed", "would_refuse", "ResultUnavailable"),
        ("replayed", "would_refuse", "ResultUnavailable"),
    ]
    assert colour.call(function.explain).decision == "would_refuse"


def test_a_call_inside_itself_runs(seen: list[Event]) -> None:
    @idempotent(key="{order}", fingerprint=False, backend="local://")
    def nested(order: str, depth: int) -> int:
        return depth if depth == 0 else nested(order, depth - 1)

    assert nested("o-1", 1) == 0
    assert ("busy", "would_refuse", None) in observed(seen)


def test_steps_and_checks_stand_in_nobodys_way(seen: list[Event]) -> None:
    ran: list[str] = []

    @idempotent(key="{order}", backend="local://")
    def ship(order: str, fails: bool = False) -> str:
        call = current_call()
        assert call is not None
        call.step("pack", lambda box: ran.append("packed"), object())  # which enforcement would refuse
        call._run.lost = True
        call.check()
        if fails:
            raise DeclinedError
        return "shipped"

    for fails in (True, False, False):
        try:
            assert ship.with_key("o-1")("o-1", fails) == "shipped"
        except DeclinedError:
            assert fails
    assert ran == ["packed"] * 3


def test_a_cancelled_call_leaves_no_claim(seen: list[Event]) -> None:
    entered = asyncio.Event()

    @idempotent(backend="local://")
    async def sleeping() -> None:
        entered.set()
        await asyncio.sleep(600)

    async def main() -> None:
        task = asyncio.create_task(sleeping())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await sleeping.peek() is None

    asyncio.run(main())
    assert [event.name for event in seen] == ["claimed", "released"]


def test_a_lease_that_another_took_is_told_and_the_value_returned(
    colour: Colour, effects: Counter, seen: list[Event]
) -> None:
    store = LocalBackend()
    options = {"namespace": "observed", "key": "{order}", "backend": store}

    def lose(order: str) -> str:
        with Commands(store, COLOURS[0]) as commands:
            rid = RecordId("observed", order)
            commands.forget(rid, force=True)
            commands.claim(rid, attempt=b"another.", fingerprint=b"", lease=60.0, keep=None, takeover=True)
        return "mine"

    lose = colour.define(lose, **options)
    assert colour.call(lose, "o-1") == "mine"
    assert observed(seen)[-1] == ("lease_lost", "would_refuse", None)


def test_locks_are_enforced(seen: list[Event]) -> None:
    with Lock("observed", backend="local://"):
        with pytest.raises(LockTimeout):
            asyncio.run(_locked())


async def _locked() -> None:
    from idempotent import AsyncLock

    async with AsyncLock("observed", backend="local://", wait=0):
        pass


def test_a_mode_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match='mode must be "enforce" or "observe"'):
        configure(mode="shadow")  # type: ignore[arg-type]


def test_enforcement_is_the_default_and_comes_back(colour: Colour, gate: Gate) -> None:
    slow = colour.define(lambda: gate.pass_through(), wait=0, namespace="n", backend="local://")
    running = colour.start(slow)
    assert gate.entered.wait(30)
    with pytest.raises(InProgress):
        colour.call(slow)
    gate.opened.set()
    running.result(30)


def test_the_log_tells_what_would_have_been(caplog: pytest.LogCaptureFixture) -> None:
    configure(mode="observe")
    answers = iter([1, 1, 2])

    @idempotent(namespace="n", backend="local://")
    def function() -> int:
        return next(answers)

    with caplog.at_level(logging.INFO, "idempotent"):
        for _ in range(3):
            function()
    told = [(record.levelname, record.getMessage().split(" key=")[0]) for record in caplog.records]
    assert told == [("INFO", "would_replay n"), ("WARNING", "would_replay n")]
    assert "agrees=False event=replayed" in caplog.text


def test_without_a_backend_it_is_this_process_as_ever(seen: list[Event]) -> None:
    function = idempotent(namespace="n")(lambda: 1)
    with pytest.warns(ProcessLocalWarning):
        assert function() == 1


# --------------------------------------------------------------------------------------------- within a transaction


@pytest.fixture(params=BANKS, ids="-".join)
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    kind, name = request.param
    (chosen,) = [each for each in COLOURS if each.name == name]
    with bank_of(kind, chosen, url_of(kind, request, tmp_path)) as made:
        yield made


def test_a_transaction_of_the_callers_is_left_alone(bank: Bank, seen: list[Event]) -> None:
    def deposit(session: Any, account: str) -> str:
        session.execute(sa.insert(Entry).values(account=account, amount=5))
        call = current_call()
        assert call is not None
        return call.key

    pay = bank.define(deposit, key="{account}")
    for _ in range(2):
        assert bank.commit(pay, "a") == "a"
    assert bank.entries("a") == 2
    assert seen == []
