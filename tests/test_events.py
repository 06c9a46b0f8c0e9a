"""What is told of a call: one line per event, at the level it deserves, and never at the call's expense."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

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
