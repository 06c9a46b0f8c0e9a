"""`python -m idempotent.testing soak`: real processes, killed and frozen. Ours keeps its promises, the plants do not."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis
import servers
from colours import COLOURS
from differential import Commands
from servers import Server
from test_crash import CHECKOUT

from idempotent import errors, open_backend
from idempotent.testing import soak
from idempotent.testing.__main__ import main
from idempotent.testing.history import judge, read


def command(url: str, *options: str) -> list[str]:
    return [sys.executable, "-m", "idempotent.testing", "soak", "--backend", url, *options]


def soaked(url: str, *options: str, seconds: float = 2.5) -> tuple[int, Any]:
    """The exit code and the report of a soak with four workers."""
    words = command(url, "--json", "--workers", "4", "--seconds", str(seconds), *options)
    done = subprocess.run(words, env=CHECKOUT, capture_output=True, text=True, timeout=110)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


def test_ours_keeps_its_promises_and_leaves_nothing_behind(shared_backend_url: str, tmp_path: Path) -> None:
    history = tmp_path / "history"
    code, report = soaked(shared_backend_url, "--history", str(history))
    assert (code, report["kept"], report["broken"], report["doubled"]) == (0, True, {}, 0), report
    assert min(report[name] for name in ("answered", "runs", "killed", "frozen", "keys")) > 0
    operations = read(history)
    assert len(operations) == report["operations"]
    assert judge(operations, expected_errors=errors.__all__) == []
    assert {"call", "run", "claim", "complete"} <= {operation.does for operation in operations}
    assert any(operation.returned is None for operation in operations)  # somebody was killed in the midst of something
    with open_backend(shared_backend_url) as backend, Commands(backend, COLOURS[0]) as commands:
        assert commands.scanned() == []


@pytest.mark.parametrize("shared_backend_url", ["redis"], indirect=True)
@pytest.mark.parametrize("protocol", ["naive", "unfenced"])
def test_a_plant_is_convicted(shared_backend_url: str, protocol: str) -> None:
    for seed in range(8):  # on a busy machine few calls are made, and a short run may see nothing
        code, report = soaked(shared_backend_url, "--protocol", protocol, "--seed", str(seed), seconds=4)
        if code == 1:
            break
    assert code == 1, report
    assert report["kept"] is False
    assert report["doubled"] > 0
    assert report["broken"]["1. two outcomes were recorded"] == report["doubled"]


@pytest.mark.soak
@pytest.mark.parametrize("protocol", soak.PROTOCOLS)
def test_a_minute_of_it(shared_backend_url: str, protocol: str) -> None:
    seed = str(time.time_ns() % 10**6)
    words = command(shared_backend_url, "--protocol", protocol, "--seed", seed, "--seconds", "60")
    done = subprocess.run(words, env=CHECKOUT, capture_output=True, text=True, timeout=115)
    print(done.stdout)
    assert done.returncode == (0 if protocol == "ours" else 1), done.stdout + done.stderr


@pytest.mark.parametrize("shared_backend_url", ["redis"], indirect=True)
def test_ctrl_c_ends_the_workers_and_writes_what_there_is(shared_backend_url: str, tmp_path: Path) -> None:
    history = tmp_path / "history"
    words = command(shared_backend_url, "--seconds", "60", "--history", str(history))
    with subprocess.Popen(words, env=CHECKOUT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert "0 of 60 s" in process.stderr.readline()
        deadline = time.monotonic() + 20
        while len(family := servers._tree(process.pid)) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with redis.Redis.from_url(shared_backend_url.partition("?")[0]) as client:
            prefix = shared_backend_url.rpartition("=")[2]
            while len(list(client.scan_iter(f"{prefix}:*"))) < 30:  # so that some commands have ended and are written
                assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read().strip().endswith("interrupted")
    assert not family & servers._parents().keys()
    assert read(history)
    with open_backend(shared_backend_url) as backend, Commands(backend, COLOURS[0]) as commands:
        assert commands.scanned() == []


@pytest.mark.parametrize("shared_backend_url", ["redis"], indirect=True)
def test_workers_whose_parent_is_killed_end_by_themselves(shared_backend_url: str) -> None:
    with subprocess.Popen(
        command(shared_backend_url, "--seconds", "60"), env=CHECKOUT, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        deadline = time.monotonic() + 20
        while len(family := servers._tree(process.pid)) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # so that it hires nobody meanwhile
        family = servers._tree(process.pid)
        process.kill()
    while family & servers._parents().keys():
        assert time.monotonic() < deadline + 20
        for pid in family:  # those that it had frozen
            if pid in servers._parents():
                os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("local://", "processes of their own"),
        ("redis://127.0.0.1:1/0", "could not be used"),
        ("sqlite:////no/such/folder/x.db", "could not be used"),
        ("nonsense://x", "nonsense"),
    ],
)
def test_what_cannot_run_says_so_and_exits_with_2(url: str, words: str) -> None:
    code, said = soaked(url)
    assert code == 2
    assert words in said


def test_a_history_that_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    code, said = soaked(f"sqlite:///{tmp_path}/x.db", "--history", str(tmp_path / "none" / "history"))
    assert code == 2
    assert "No such file" in said
    assert not (tmp_path / "x.db").exists()


def test_a_server_that_is_gone_in_the_end_is_no_broken_promise(own_redis: Server) -> None:
    words = command(own_redis.url, "--seconds", "1")
    with subprocess.Popen(words, env=CHECKOUT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        own_redis.kill()
        assert process.wait(60) == 2
        assert "could not be used any more" in process.stderr.read()


@pytest.mark.parametrize(
    "options", [["--workers", "1"], ["--seconds", "0"], ["--lease", "0.01"], ["--protocol", "best"], []]
)
def test_a_bad_option_is_refused_with_the_usage(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["soak", *options] if not options else ["soak", "--backend", "redis://", *options])
    assert refused.value.code == 2
    assert "usage: python -m idempotent.testing" in capsys.readouterr().err


def test_the_report_in_words() -> None:
    report = soak.Report("redis", "naive", 6.0, 4, 7, calls=12_345, doubled=2, broken={"1. two outcomes": 2})
    shown = list(soak._text(report, []))
    assert shown[0] == "the plant 'naive' on redis: 6 s, 4 workers, seed 7"
    assert "12,345 calls" in shown[1]
    assert shown[-1].startswith("kept: ")


def test_the_readme_shows_what_a_soak_prints() -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8").partition("### Soak")[2]
    block = readme.partition("```text")[2].partition("```")[0]
    runs = [run.strip().splitlines() for run in block.split("$ python -m idempotent.testing ")[1:]]
    shape = [re.sub(r"\d[\d,]*", "N", line) for line in soak._text(soak.Report("redis", "ours", 60, 6, 7), [])]
    for command_line, *printed in runs:
        options = argparse.ArgumentParser()
        soak.add_arguments(options)
        asked = options.parse_args(command_line.split()[1:])
        assert asked.seconds == 60
        lines = [re.sub(r"\d[\d,]*", "N", line) for line in printed]
        assert lines[1:4] == shape[1:4]
        assert (lines[4] == shape[4]) == (asked.protocol == "ours")
        assert (lines[4] == "BROKEN:") == (asked.protocol != "ours")
    assert [run[1].partition(":")[0] for run in runs] == [
        *("@idempotent on redis", "@idempotent on postgresql", "the plant 'unfenced' on redis")
    ]
