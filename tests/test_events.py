"""What is told of a call: one line per event, at the level it deserves, and never at the call's expense."""

import collections
import dataclasses
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import pytest
from colours import Colour
from faulty import Faulty

from idempotent import (
    Backend,
    BackendUnavailable,
    FingerprintMismatch,
    InProgress,
    LeaseLost,
    OutcomeUnknown,
    UnprotectedWarning,
    configure,
    open_backend,
)
from idempotent._drive import drive
from idempotent._record import Granted, RecordId
from idempotent.events import Event, EventName, dispatch, log_event, wanted

NAMES: tuple[EventName, ...] = get_args(EventName)
LEVELS: dict[EventName, int] = {
    "claimed": logging.DEBUG,
    "replayed": logging.DEBUG,
    "waited": logging.DEBUG,
    "busy": logging.DEBUG,
    "completed": logging.DEBUG,
    "failed": logging.DEBUG,
    "released": logging.DEBUG,
    "taken_over": logging.WARNING,
    "lease_lost": logging.WARNING,
    "mismatched": logging.WARNING,
    "unknown": logging.WARNING,
    "backend_error": logging.WARNING,
    "broken": logging.WARNING,
    "not_stored": logging.ERROR,
    "unprotected": logging.ERROR,
}


def event(name: EventName = "claimed") -> Event:
    return Event(name, "shop.charge", "d1g357", "local", token=7, age=1.5, error="Declined")


def at(caplog: pytest.LogCaptureFixture, level: int) -> None:
    caplog.set_level(level, logger="idempotent")


@pytest.mark.parametrize("name", NAMES)
def test_an_event_is_logged_at_the_level_it_deserves(name: EventName, caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.DEBUG)
    log_event(event(name))
    assert [(record.name, record.levelno) for record in caplog.records] == [("idempotent", LEVELS[name])]


@pytest.mark.parametrize("name", NAMES)
def test_an_event_below_the_loggers_level_is_not_logged(name: EventName, caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, LEVELS[name] + 1)
    log_event(event(name))
    assert caplog.records == []


def test_a_line_holds_every_field_of_the_event(caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.DEBUG)
    log_event(event("taken_over"))
    assert caplog.messages == ["taken_over shop.charge key=d1g357 backend=local token=7 age=1.5 error=Declined"]


def test_a_line_holds_no_field_that_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.DEBUG)
    log_event(Event("busy", "shop.charge", "d1g357", "redis"))
    assert caplog.messages == ["busy shop.charge key=d1g357 backend=redis"]


def test_a_token_or_an_age_of_zero_is_told(caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.DEBUG)
    log_event(Event("claimed", "n", "d", "local", token=0, age=0.0))
    assert caplog.messages == ["claimed n key=d backend=local token=0 age=0.0"]


def test_a_namespace_with_a_percent_sign_is_no_format(caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.DEBUG)
    log_event(Event("claimed", "100%s %d", "d", "local"))
    assert caplog.messages == ["claimed 100%s %d key=d backend=local"]


def test_a_log_record_carries_the_event_itself(caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.DEBUG)
    told = event()
    log_event(told)
    assert vars(caplog.records[0])["event"] is told


def test_an_event_cannot_be_changed_by_a_hook() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        event().token = 8  # type: ignore[misc]


def test_an_application_that_configures_no_logging_is_not_written_to() -> None:
    script = (
        "from idempotent.events import Event, log_event, dispatch\n"
        "def broken(event): raise ValueError\n"
        "log_event(Event('not_stored', 'n', 'd', 'local'))\n"
        "dispatch([broken], Event('claimed', 'n', 'd', 'local'))\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True, capture_output=True, timeout=60
    )
    assert (finished.stdout, finished.stderr) == (b"", b"")


# ------------------------------------------------------------------------------------------------------- wanted


@pytest.mark.parametrize("name", NAMES)
def test_an_event_that_only_the_log_would_see_is_wanted_if_its_level_is(
    name: EventName, caplog: pytest.LogCaptureFixture
) -> None:
    at(caplog, LEVELS[name])
    assert wanted([log_event], name)
    at(caplog, LEVELS[name] + 1)
    assert not wanted([log_event], name)


@pytest.mark.parametrize("name", NAMES)
def test_every_event_is_wanted_by_a_hook_of_ones_own(name: EventName, caplog: pytest.LogCaptureFixture) -> None:
    at(caplog, logging.CRITICAL)
    assert wanted([print], name)
    assert wanted([log_event, print], name)
    assert wanted([print, log_event], name)


@pytest.mark.parametrize("name", NAMES)
def test_without_hooks_no_event_is_wanted(name: EventName) -> None:
    assert not wanted([], name)


# ----------------------------------------------------------------------------------------------------- dispatch


def test_an_event_goes_to_every_hook_in_order() -> None:
    seen: list[tuple[str, Event]] = []
    told = event()
    dispatch([lambda given: seen.append(("first", given)), lambda given: seen.append(("second", given))], told)
    assert seen == [("first", told), ("second", told)]


def test_a_hook_that_raises_is_logged_and_the_others_are_told_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Event] = []

    def broken(given: Event) -> None:
        raise ValueError("the meter is out")

    told = event()
    dispatch([broken, seen.append], told)
    assert seen == [told]
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("idempotent", logging.ERROR)
    assert "broken" in record.getMessage()
    assert "claimed" in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_in_a_hook_is_not_swallowed(kind: type[BaseException]) -> None:
    def interrupted(given: Event) -> None:
        raise kind

    with pytest.raises(kind):
        dispatch([interrupted], event())


# ------------------------------------------------------------------------------------------------ the events of calls


class DeclinedError(Exception):
    pass


class Stop(BaseException):
    """An interruption, as a cancellation or Ctrl-C is one."""


TOLD: dict[str, list[tuple[str, str | None]]] = {
    "run": [("claimed", None), ("completed", None)],
    "replay": [("replayed", None)],
    "other arguments": [("mismatched", None)],
    "error": [("claimed", None), ("released", "DeclinedError")],
    "recorded error": [("claimed", None), ("failed", "DeclinedError"), ("replayed", None)],
    "busy": [("busy", None)],
    "wait over": [("waited", None), ("busy", None)],
    "takeover": [("taken_over", None), ("completed", None)],
    "death": [("unknown", None)],
    "interruption": [("claimed", None), ("released", "Stop")],
    "interruption, raise": [("claimed", None), ("unknown", "Stop")],
    "overtaken": [("claimed", None), ("lease_lost", None)],
    "overtaken, error": [("claimed", None), ("lease_lost", None)],
    "resolved": [("completed", None), ("replayed", None)],
    "outage before": [("backend_error", "BackendUnavailable")],
    "outage before, run": [("backend_error", "BackendUnavailable"), ("unprotected", "BackendUnavailable")],
    "outage after": [("claimed", None), ("backend_error", "BackendUnavailable"), ("not_stored", None)],
}


class Stage:
    """Brings calls on `backend` into each situation, and notes what was told of it."""

    def __init__(self, backend: Backend, colour: Colour) -> None:
        self.backend, self.colour = Faulty(backend), colour
        self.blocking = backend.blocking()
        self.seen: list[Event] = []
        self.told: dict[str, list[tuple[str, str | None]]] = collections.defaultdict(list)
        self.tokens: dict[str, set[int | None]] = collections.defaultdict(set)
        self._counts: dict[Any, collections.Counter[str]] = collections.defaultdict(collections.Counter)

    def claim(self, key: str, lease: float = 30.0) -> int:
        """Claim the key as another process would; the token."""
        options: Any = {"attempt": b"attemptA", "fingerprint": b"", "lease": lease, "keep": None, "takeover": False}
        granted = drive(self.blocking.claim(rid(key), **options))
        assert isinstance(granted, Granted)
        return granted.token

    def die(self, key: str) -> int:
        token = self.claim(key)
        drive(self.blocking.release(rid(key), attempt=b"attemptA", token=token, unknown=True))
        return token

    def overtake(self, key: str) -> None:
        drive(self.blocking.forget(rid(key), force=True))
        self.claim(key)

    def lapsed(self, key: str) -> bool:
        record = drive(self.blocking.read(rid(key)))
        return record is not None and record.lease_left is not None and record.lease_left <= 0

    def make(self, key: str, error: BaseException | None = None, overtaken: bool = False, **options: Any) -> Any:
        def work(argument: str) -> str:
            if overtaken:
                self.overtake(key)
            if error is not None:
                raise error
            return "SECRET RESULT"

        return self.colour.define(work, backend=self.backend, namespace="n", key=f"SECRET KEY {key}", **options)

    def call(
        self, situation: str, function: Any, error: type[BaseException] | None = None, argument: str = "ARGUMENT"
    ) -> None:
        if error is None:
            assert self.colour.call(function, f"SECRET {argument}") == "SECRET RESULT"
        else:
            with pytest.raises(error):
                self.colour.call(function, f"SECRET {argument}")
        self.note(situation, function)

    def note(self, situation: str, function: Any) -> None:
        digest = RecordId("n", function.key_for("")).digest
        for told in self.seen:
            assert (told.namespace, told.key_digest, told.backend) == ("n", digest, self.backend.name)
            found = told.name in ("replayed", "mismatched", "unknown") and told.error is None
            assert (told.age is not None) == found
            assert 0 <= (told.age or 0.0) < 60
            self.told[situation].append((told.name, told.error))
            self.tokens[situation].add(told.token)
            self._counts[function][told.name] += 1
        self.seen.clear()
        assert function.stats() == self._counts[function]


def rid(key: str) -> RecordId:
    return RecordId("n", f"SECRET KEY {key}")


@pytest.mark.parametrize("backend_url", ["local", "redis", "postgres"], indirect=True)  # each takes a second
def test_every_event_of_a_call_is_told_with_its_key_token_and_error_and_with_nothing_secret(
    backend_url: str, colour: Colour, caplog: pytest.LogCaptureFixture
) -> None:
    at(caplog, logging.DEBUG)
    stage = Stage(open_backend(backend_url), colour)
    configure(hooks=[stage.seen.append, log_event])
    drive(stage.blocking.read(rid("none")))  # connected, and its table made: one lease here is short
    declined, stopped = DeclinedError("SECRET ERROR"), Stop("SECRET ERROR")
    recorded: Any = {"error_ttl": {DeclinedError: 60}}

    lapsing = stage.claim("takeover", lease=0.8)
    run = stage.make("run")
    stage.call("run", run)
    stage.call("replay", run)
    stage.call("other arguments", run, FingerprintMismatch, "OTHER")
    token = colour.call(run.peek, "SECRET ARGUMENT").token
    assert stage.tokens["run"] == stage.tokens["replay"] == {token}

    stage.call("error", stage.make("error", declined), DeclinedError)
    fails = stage.make("recorded error", declined, **recorded)
    stage.call("recorded error", fails, DeclinedError)
    stage.call("recorded error", fails, DeclinedError)

    token = stage.claim("busy")
    stage.call("busy", stage.make("busy", wait=0), InProgress)
    stage.call("wait over", stage.make("busy", wait=0.3), InProgress)
    assert stage.tokens["busy"] == stage.tokens["wait over"] == {token}

    while not stage.lapsed("takeover"):
        time.sleep(0.01)
    stage.call("takeover", stage.make("takeover"))
    (taken,) = stage.tokens["takeover"]
    assert taken is not None
    assert taken > lapsing

    token = stage.die("death")
    stage.call("death", stage.make("death", on_crash="raise"), OutcomeUnknown)
    assert stage.tokens["death"] == {token}
    resolved = stage.make("death")
    assert colour.call(resolved.resolve, "SECRET KEY death", result="SECRET RESULT")
    stage.note("resolved", resolved)
    stage.call("resolved", resolved)

    stage.call("interruption", stage.make("interruption", stopped), Stop)
    stage.call("interruption, raise", stage.make("interruption, raise", stopped, on_crash="raise"), Stop)

    stage.call("overtaken", stage.make("overtaken", overtaken=True), LeaseLost)
    late = stage.make("overtaken, error", declined, overtaken=True, **recorded)
    stage.call("overtaken, error", late, DeclinedError)

    stage.backend.plant("claim", "before", times=2)
    stage.call("outage before", stage.make("outage before"), BackendUnavailable)
    with pytest.warns(UnprotectedWarning) as warned:
        stage.call("outage before, run", stage.make("outage before, run", on_outage="run"))
    stage.backend.plant("complete", "before", times=10_000)
    stage.call("outage after", stage.make("outage after", lease=0.8))
    stage.told["outage after"] = list(dict.fromkeys(stage.told["outage after"]))  # tried for as long as the lease

    assert stage.told == TOLD
    assert {name for told in stage.told.values() for name, _ in told} == set(NAMES) - {"broken"}
    assert len(caplog.records) > len(TOLD)
    for text in (caplog.text, *map(repr, map(vars, caplog.records)), *(str(each.message) for each in warned)):
        assert "SECRET" not in text
