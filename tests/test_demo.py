"""`python -m idempotent demo`: what it measures, how it ends, and that it leaves nothing behind."""

import asyncio
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Address, Server, _parents, _tree

from idempotent import Record, idempotent, open_backend

ROOT = Path(__file__).parent.parent
REFUSED = "the demo cannot use this backend: "


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "IDEMPOTENT_URL"}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def demo(
    *options: str, program: tuple[str, ...] = ("-m", "idempotent"), **env: str
) -> "subprocess.CompletedProcess[str]":
    """Run the demo to its end, warnings as errors."""
    command = [sys.executable, "-W", "error", *program, "demo", *options]
    return subprocess.run(command, env=environment(**env), capture_output=True, text=True, timeout=90)


def measured(done: "subprocess.CompletedProcess[str]") -> dict[str, dict[str, Any]]:
    """The results in the JSON on standard output, by mode."""
    results = json.loads(done.stdout)["results"]
    return {result["mode"]: result for result in results}


@pytest.fixture(scope="module")
def default_run() -> tuple["subprocess.CompletedProcess[str]", float]:
    """One run with nothing but --json, and its seconds."""
    began = time.monotonic()
    done = demo("--json")
    return done, time.monotonic() - began


def stored(url: str) -> list[Record]:
    """Every record in a store."""

    async def main() -> list[Record]:
        async with open_backend(url) as backend:
            return [record async for record in backend.asynchronous().scan()]

    return asyncio.run(main())


def eventually(holds: Callable[[], Any], seconds: float = 30) -> Any:
    """What `holds()` gives once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := holds():
            return found
        time.sleep(0.005)
    raise AssertionError(f"it did not come true in {seconds} s: {holds}")


def test_the_default_storm_charges_twice_without_protection_and_never_with_it(
    default_run: tuple["subprocess.CompletedProcess[str]", float],
) -> None:
    done, _ = default_run
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    report = json.loads(done.stdout)
    assert report["orders"] == 41
    assert (report["loss"], report["seed"], report["backend"], report["held"]) == (0.3, 7, "sqlite", True)
    results = measured(done)
    assert list(results) == ["plain", "cache", "idempotent"]
    assert results["plain"]["double_charges"] > 0
    assert results["cache"]["double_charges"] > 0
    assert results["idempotent"]["double_charges"] == 0
    for result in results.values():
        assert result["killed"] == 1
        assert result["never_charged"] == 0


def test_what_the_default_storm_measured_adds_up(default_run: tuple["subprocess.CompletedProcess[str]", float]) -> None:
    results = measured(default_run[0])
    for result in results.values():
        assert result["charges"] == 41 + result["double_charges"]
        assert result["calls"] == result["charges"] + result["replays"] + result["killed"]
        assert result["seconds"] > 0
    assert len({result["calls"] for result in results.values()}) == 1, "the same storm for all three"
    assert results["plain"]["replays"] == 0
    assert results["idempotent"]["charges"] == 41
    assert results["idempotent"]["disagreed"] == 0
    assert results["plain"]["disagreed"] > 0
    assert results["idempotent"]["seconds"] >= 1.5, "the killed worker's lease had to run out"


def test_the_default_storm_takes_less_than_20_seconds(
    default_run: tuple["subprocess.CompletedProcess[str]", float],
) -> None:
    assert default_run[1] < 20


def test_progress_goes_to_standard_error_and_json_stands_alone(
    default_run: tuple["subprocess.CompletedProcess[str]", float],
) -> None:
    done, _ = default_run
    assert done.stdout.startswith("{")
    assert done.stdout.endswith("}\n")
    for said in ("Seed 7", "no protection: ", "get-run-set cache: ", "@idempotent: "):
        assert said in done.stderr


def test_the_table_shows_what_was_measured(default_run: tuple["subprocess.CompletedProcess[str]", float]) -> None:
    done = demo("--orders", "10")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line]
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "calls",
        "charges",
        "double charges",
        "replays",
        "answers that disagreed",
        "seconds",
    ]
    cells = {
        re.split(r"\s{2,}", line)[0]: [float(cell) for cell in re.split(r"\s{2,}", line)[1:]] for line in lines[1:4]
    }
    assert list(cells) == ["no protection", "get-run-set cache", "@idempotent"]
    for calls, charges, double, replays, _, _ in cells.values():
        assert charges == 11 + double
        assert calls == charges + replays + 1
    assert cells["no protection"][2] > 0
    assert cells["@idempotent"][2] == 0
    assert lines[4] == "@idempotent charged each of 11 orders exactly once, and every caller got its receipt."
    assert len(lines) == 5


def test_one_seed_is_one_storm_and_another_seed_another() -> None:
    runs = [demo("--json", "--orders", "10", "--seed", seed) for seed in ("3", "3", "4")]
    for done in runs:
        assert done.returncode == 0, done.stderr
    calls = [measured(done)["plain"]["calls"] for done in runs]
    assert calls[0] == calls[1] != calls[2]
    assert [json.loads(done.stdout)["seed"] for done in runs] == [3, 3, 4]


def test_without_losses_each_click_is_one_call() -> None:
    done = demo("--json", "--orders", "1", "--loss", "0")
    assert done.returncode == 0, done.stderr
    results = measured(done)
    assert {result["calls"] for result in results.values()} <= {4, 5, 6}
    assert results["idempotent"]["charges"] == 2


@pytest.mark.parametrize(
    "options",
    [
        ("--orders", "0"),
        ("--orders", "10001"),
        ("--orders", "many"),
        ("--orders", "-1"),
        ("--loss", "0.91"),
        ("--loss", "-0.1"),
        ("--loss", "nan"),
        ("--loss", "x"),
        ("--seed", "x"),
        ("--unknown",),
        ("surplus",),
        ("--backend",),
    ],
    ids=" ".join,
)
def test_a_bad_option_is_refused_with_the_usage(options: tuple[str, ...]) -> None:
    done = demo(*options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: python -m idempotent")
    assert options[0] in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_command_there_is_the_usage() -> None:
    done = subprocess.run([sys.executable, "-m", "idempotent"], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m idempotent")


def test_help_and_version_end_with_0() -> None:
    from idempotent import __version__

    shown = demo("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for word in ("--backend", "--orders", "--loss", "--seed", "--json"):
        assert word in shown.stdout
    command = [sys.executable, "-m", "idempotent", "--version"]
    assert subprocess.run(command, env=environment(), capture_output=True, text=True).stdout == f"{__version__}\n"


def refusal(done: "subprocess.CompletedProcess[str]") -> str:
    """What the demo says of a backend: the one line that it prints, before any storm."""
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(REFUSED)
    assert "hunter2" not in lines[0]
    return lines[0].removeprefix(REFUSED)


@pytest.mark.parametrize(
    "url, said",
    [
        ("local://", "local:// is one process's memory"),
        ("hunter2", "no backend serves this URL"),
        ("mongodb://root:hunter2@host/db", "no backend serves the URL scheme 'mongodb'"),
        ("redis://:hunter2@127.0.0.1:1/0", "BackendUnavailable: Redis refuses connections"),
        ("redis://127.0.0.1/0?timeout=soon", "timeout= in the URL must be seconds"),
        ("postgresql://ann:hunter2@127.0.0.1:1/db", "BackendUnavailable: the database cannot be reached"),
        ("mysql://ann:hunter2@127.0.0.1:1/db", "BackendUnavailable: the database cannot be reached"),
        ("sqlite:////nowhere/at/all.db", "BackendUnavailable"),
        ("sqlite://", "sqlite:// needs a file"),
        ("redis://:hunter2@127.0.0.1:99999/0", "a port is 1 to 65535"),
        ("postgresql://ann:hunter2/x@127.0.0.1/db", "written %2F"),
    ],
)
def test_a_backend_that_cannot_be_used_is_told_in_one_line_before_anything_runs(url: str, said: str) -> None:
    assert said in refusal(demo("--backend", url, "--orders", "2"))


@pytest.mark.parametrize("kind", ["redis", "postgres", "mariadb"])
def test_a_wrong_password_is_told_in_one_line_and_not_shown(kind: str, request: pytest.FixtureRequest) -> None:
    scheme, _, rest = request.getfixturevalue(f"{kind}_server").url.partition("://")
    said = refusal(demo("--backend", f"{scheme}://nobody_of_this_name:hunter2@{rest.rpartition('@')[2]}"))
    assert said.startswith("BackendUnavailable: ")


@pytest.mark.parametrize(
    "missing, options, extra",
    [
        ("psycopg", ("--backend", "postgresql://127.0.0.1:1/db"), "postgres"),
        ("sqlalchemy", ("--backend", "sqlite:///records.db"), "sql"),
        ("sqlalchemy", (), "sql"),
    ],
    ids=["driver", "sqlalchemy", "default"],
)
def test_what_is_not_installed_is_told_with_the_extra_that_brings_it(
    missing: str, options: tuple[str, ...], extra: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    done = demo(*options, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert f"pip install 'idempotent-py[{extra}]'" in refusal(done)


def test_it_holds_on_every_backend_and_leaves_only_the_records_of_others(shared_backend_url: str) -> None:
    def mine(order: str) -> str:
        return order

    safe = idempotent(backend=shared_backend_url, namespace="mine", key="charge:{order}")(mine)
    safe("order-1")
    done = demo("--json", "--orders", "10", "--backend", shared_backend_url)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    report = json.loads(done.stdout)
    assert report["held"] is True
    assert report["backend"] == shared_backend_url.partition("://")[0].partition("+")[0]
    assert measured(done)["idempotent"]["charges"] == 11
    left = [(record.namespace, record.key) for record in stored(shared_backend_url)]
    assert left == [("mine", safe.key_for("order-1"))]


BROKEN = """
import dataclasses, os, sys
from idempotent import _demo
from idempotent.__main__ import main

make = _demo._make_client

def broken(setup, inside):
    if setup.mode != "idempotent":
        return make(setup, inside)
    if sys.argv[1] == "disagree":
        ask = make(setup, inside)
        return lambda order: (os.urandom(4).hex(), ask(order)[1])
    if sys.argv[1] == "never":
        ask = make(setup, inside)
        return lambda order: ("made up", True) if order == "order-1" else ask(order)
    return make(dataclasses.replace(setup, mode=sys.argv[1]), inside)

_demo._make_client = broken  # in the workers, too: they import this script

if __name__ == "__main__":
    sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "how, seen, form",
    [
        ("plain", "double_charges", "table"),
        ("cache", "double_charges", "json"),
        ("disagree", "disagreed", "json"),
        ("never", "never_charged", "json"),
    ],
)
def test_a_protocol_that_breaks_its_promise_ends_with_1(how: str, seen: str, form: str, tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    options = ("--orders", "10", *(["--json"] if form == "json" else []))
    done = demo(*options, program=(str(script), how))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    if form == "json":
        assert json.loads(done.stdout)["held"] is False
        assert measured(done)["idempotent"][seen] > 0
    else:
        assert "@idempotent broke its promise" in done.stdout
        assert "exactly once" not in done.stdout


# ------------------------------------------------------------------------------------------------------ interruption


class Running:
    """A demo under way, in a process group of its own, its files under `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "idempotent", "demo", "--orders", "3000", *options],
            env=environment(TMPDIR=str(folder)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.seen: set[int] = set()

    def working(self, mode: str) -> bool:
        """Whether charges of that mode have been made; remembers the processes seen."""
        assert self.process.poll() is None, "the demo has ended"
        self.seen |= _tree(self.process.pid)
        return any(ledger.stat().st_size for ledger in self.folder.glob(f"idempotent-demo-*/{mode}/ledger"))

    def starting(self, workers: int) -> bool:
        """Whether the tracker and that many workers are there beside it, be they still importing."""
        self.seen |= _tree(self.process.pid)
        return len(self.seen) >= 2 + workers

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err

    def stop(self) -> None:
        for pid in _tree(self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    started: list[Running] = []

    def start(*options: str) -> Running:
        started.append(Running(tmp_path, *options))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.stop()


def interrupted(running: Running, how: str) -> str:
    """Interrupt a demo as a terminal does ("group") or as `kill -INT` does; its standard error."""
    if how == "group":
        os.killpg(running.process.pid, signal.SIGINT)
    else:
        running.process.send_signal(signal.SIGINT)
    code, out, err = running.end()
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    eventually(lambda: not (running.seen & set(_parents())), 10)
    assert list(running.folder.glob("idempotent-demo-*")) == []
    return err


@pytest.mark.parametrize("how", ["group", "process"])
def test_an_interrupt_ends_it_with_130_and_no_process_is_left(run: Callable[..., Running], how: str) -> None:
    running = run()
    eventually(functools.partial(running.working, "plain"))
    assert len(running.seen) >= 5
    interrupted(running, how)


@pytest.mark.parametrize("workers", [0, 1, 3, 4])
def test_an_interrupt_while_the_workers_start_is_no_different(run: Callable[..., Running], workers: int) -> None:
    running = run()
    eventually(functools.partial(running.starting, workers))
    interrupted(running, "group")


def test_a_second_interrupt_does_not_keep_it_from_tidying_up(run: Callable[..., Running], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/given.db"
    running = run("--backend", url, "--orders", "100")
    eventually(functools.partial(running.working, "idempotent"))
    stop = threading.Event()

    def again() -> None:
        while not stop.wait(0.002) and running.process.poll() is None:
            running.process.send_signal(signal.SIGINT)

    impatient = threading.Thread(target=again)
    impatient.start()
    try:
        interrupted(running, "group")
    finally:
        stop.set()
        impatient.join()
    assert stored(url) == []


def test_an_interrupt_leaves_no_record_in_a_backend_that_was_given(run: Callable[..., Running], tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/given.db"
    running = run("--backend", url, "--orders", "100")
    eventually(functools.partial(running.working, "idempotent"))
    assert stored(url), "it was under way"
    interrupted(running, "group")
    assert stored(url) == []


def test_a_backend_that_dies_under_way_ends_it_with_2(run: Callable[..., Running], own_redis: Server | Address) -> None:
    assert isinstance(own_redis, Server)
    running = run("--backend", f"{own_redis.url}?prefix=demo&timeout=1", "--orders", "100")
    eventually(functools.partial(running.working, "idempotent"))
    own_redis.kill()
    code, out, err = running.end()
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(REFUSED)
    assert "Traceback" not in err
    eventually(lambda: not (running.seen & set(_parents())), 10)
