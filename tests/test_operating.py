"""README's section "Operating": its transcripts are what the commands print, and its alerts name what the hook counts."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from servers import start_redis

from idempotent.cli.exits import BROKEN_PIPE, DONE, INTERRUPTED, NOT_SAFE, REFUSED, RETRIES_ONLY, UNUSABLE
from idempotent.cli.main import _COMMANDS
from idempotent.events import EventName

ROOT = Path(__file__).parent.parent
SECTION = (ROOT / "README.md").read_text("utf-8").partition("\n## Operating\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
SHOP = next(code for language, code in BLOCKS if language == "python")
STORY, DOCTOR = [code for language, code in BLOCKS if language == "text"]

WORKER = """
import sys, time
import shop

def waits_for_ever(cents, key):
    print("asked", flush=True)
    time.sleep(600)

shop.ask_provider = waits_for_ever
shop.charge("o-17", 990)
"""
RETRY = """
import idempotent, prometheus_client, shop

idempotent.configure(hooks=[idempotent.PrometheusHook()])
try:  # the first call of a process that was started anew
    shop.charge("o-17", 990)
except idempotent.OutcomeUnknown:
    print(prometheus_client.generate_latest().decode())
"""


def spoken(transcript: str) -> list[tuple[str, str]]:
    """The commands of a transcript, each with what it prints."""
    return [(command, said) for command, said in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", transcript, re.MULTILINE)]


def steady(text: str) -> list[str]:
    """The lines without what differs from run to run: durations, tokens, attempts, the server's version."""
    text = re.sub(r"\b\d+(\.\d+)? (ms|s|min|h|d)\b", "TIME", text)
    text = re.sub(r"\b(\d{16}|[0-9a-f]{16})\b", "NUMBER", text)
    text = re.sub(r"(Redis|Valkey) \d+\.\d+\.\d+", "VERSION", text)
    return [" ".join(line.split()) for line in text.strip().splitlines()]


def run(command: str, folder: Path, **environment: str) -> str:
    """What a command of a transcript prints, on either stream."""
    words = shlex.split(command)
    program = {"idempotent": ["-m", "idempotent"], "python": []}[words[0]]
    done = subprocess.run(
        [sys.executable, *program, *words[1:]],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout + done.stderr


def test_the_story_of_the_night_is_what_happens(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP, "utf-8")
    url = f"sqlite:///{tmp_path}/payments.db"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IDEMPOTENT_URL": url}
    short = "import idempotent; idempotent.configure(lease=1)\n"  # the lease that a retry waits for
    worker = subprocess.Popen(
        [sys.executable, "-c", short + WORKER], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    with worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "asked\n"
        worker.send_signal(signal.SIGKILL)
    retry = [sys.executable, "-c", short + RETRY]
    scraped = subprocess.run(
        retry, cwd=tmp_path, env=environment, check=True, timeout=60, stdout=subprocess.PIPE, text=True
    )
    counted = series(scraped.stdout)
    unknown, unprotected, _ = rules()
    assert rings(unknown, [{}, counted, counted]) == {"shop.charge"}
    assert rings(unprotected, [{}, counted, counted]) == set()
    told = spoken(STORY)
    assert [command.split()[1] for command, _ in told] == ["list", "show", "resolve", "resolve", "resolve", "-c"]
    for command, said in told:
        assert steady(run(command, tmp_path, IDEMPOTENT_URL=url)) == steady(said), command


def test_the_doctors_transcript_is_what_it_says(tmp_path: Path) -> None:
    ((command, said),) = spoken(DOCTOR)
    named = command.split()[-1]
    with start_redis("--maxmemory 100mb --maxmemory-policy allkeys-lru") as server:
        printed = run(command.replace(named, server.url), tmp_path).replace(server.url, named)
    assert steady(printed) == steady(said)


def test_every_command_and_exit_code_is_in_the_tables() -> None:
    rows = re.findall(r"^\| `?(\w+)[^|]*\|", SECTION, re.MULTILINE)
    assert {row for row in rows if row.isalpha()} - {"command", "exit"} == {*_COMMANDS, "demo"}
    codes = {DONE, REFUSED, UNUSABLE, RETRIES_ONLY, NOT_SAFE, INTERRUPTED, BROKEN_PIPE}
    assert {int(row) for row in rows if row.isdecimal()} == codes


def rules() -> list[dict[str, Any]]:
    (text,) = [code for language, code in BLOCKS if language == "yaml"]
    (group,) = yaml.safe_load(text)["groups"]
    return list(group["rules"])


def test_there_are_three_alerts_and_the_story_begins_with_one() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == 3
    assert f"alert `{names[0]}` rang" in SECTION


SELECTOR = r"(\w+)\{event=~?\"([\w|]+)\"\}"
NEW = rf"sum by \((\w+)\) \({SELECTOR} unless {SELECTOR} offset (\d+)m\) > 0"
"""The series that were not there some minutes ago, added up."""

Series = dict[tuple[str, str, str], float]
"""Values by event, namespace and backend."""


def series(exposition: str) -> Series:
    """What the hook counts in a scraped page."""
    from prometheus_client.parser import text_string_to_metric_families

    return {
        tuple(sample.labels[label] for label in ("event", "namespace", "backend")): sample.value
        for metric in text_string_to_metric_families(exposition)
        for sample in metric.samples
        if sample.name == "idempotent_events_total"
    }


def rings(rule: dict[str, Any], scrapes: list[Series]) -> set[str]:
    """The namespaces for which an alert rings, by scrapes of which the first is older than its minutes."""
    grown, _, new = rule["expr"].partition(" or ")
    events = set(re.findall(SELECTOR, grown)[0][1].split("|"))
    found = set()
    for place, value in scrapes[-1].items():
        if place[0] in events:
            values = [scrape[place] for scrape in scrapes[1:] if place in scrape]
            increase = sum(max(0.0, after - before) for before, after in zip(values, values[1:], strict=False))
            if increase > 0 or (re.fullmatch(NEW, new) and place not in scrapes[0] and value > 0):
                found.add(place[1])
    return found


def test_an_alert_rings_for_a_series_that_grows_or_is_new_and_then_no_more() -> None:
    unknown, unprotected, _ = rules()
    for rule, event in ((unknown, "unknown"), (unprotected, "not_stored")):
        zero, one = ({(event, "shop", "redis"): value} for value in (0.0, 1.0))
        assert rings(rule, [zero, zero, one]) == rings(rule, [{}, one, one]) == {"shop"}
        assert rings(rule, [{}, zero, zero]) == rings(rule, [one, one, one]) == set()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_the_hook_counts(rule: dict[str, Any]) -> None:
    """Each selector finds series that PrometheusHook exports, and sums by a label that they have."""
    from prometheus_client import CollectorRegistry

    from idempotent import Event, PrometheusHook

    registry = CollectorRegistry()
    PrometheusHook(registry=registry)(Event("claimed", "n", "d", "local"))
    samples = [sample for metric in registry.collect() for sample in metric.samples]
    grown, _, new = rule["expr"].partition(" or ")
    found = re.fullmatch(rf"sum by \((\w+)\) \((?:increase|rate)\({SELECTOR}\[(\d+)m\]\)\) > [\d.]+", grown)
    assert found is not None, rule["expr"]
    by, name, events, minutes = found.groups()
    if "increase" in grown:  # which sees no change in a series that is born at 1
        beside = re.fullmatch(NEW, new)
        assert beside is not None, rule["expr"]
        assert beside.groups() == (by, name, events, name, events, minutes)
    for event in events.split("|"):
        assert event in get_args(EventName)
        series = [sample for sample in samples if sample.name == name and sample.labels["event"] == event]
        assert len(series) == 1
        assert by in series[0].labels


def test_time_is_what_the_transcripts_are_steady_about() -> None:
    assert steady("unknown  4 s  ab\n") == steady("unknown 17 min ab")
    assert steady("unknown 4 s") != steady("running 4 s")
