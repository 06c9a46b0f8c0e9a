"""The locks' benchmark: its column of correctness convicts a lock that does not exclude, and its targets are those promised."""

import contextlib
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import _lock_work, locks
from benchmarks._lock_work import Turn, Usage


def contend(url: str, peer: str, counter: Path, turns: Sequence[Turn]) -> locks.Round:
    """What comes of threads that take the turns."""
    counter.write_bytes(bytes(8))
    work = _lock_work.wait_in_line(url, f"bench-{uuid.uuid4().hex}", peer, counter, turns)
    done = locks.Round(usages=[one.usages for one in work], errors=[error for one in work for error in one.errors])
    done.lost = len(done.in_order) - int.from_bytes(counter.read_bytes(), sys.byteorder)
    return done


def three_turns() -> list[Turn]:
    """One holds for half a second, and two come in the meantime."""
    begin = time.monotonic()
    return [Turn(begin, hold_until=begin + 0.5), Turn(begin + 0.1), Turn(begin + 0.1)]


def test_a_lock_that_does_not_exclude_is_convicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_lock_work.WAITING, "nothing", lambda url, name: contextlib.nullcontext())
    done = contend("", "nothing", tmp_path / "counter", three_turns())
    assert len(done.in_order) == 3
    assert done.lost >= 1 and done.overlaps >= 1 and done.bad_tokens is None
    assert locks.fault_count(locks.correctness([done])) >= 3


@pytest.mark.parametrize("shared_backend_url", ["redis"], indirect=True)
def test_ours_is_acquitted_and_its_hand_overs_are_counted(shared_backend_url: str, tmp_path: Path) -> None:
    done = contend(shared_backend_url, locks.OURS, tmp_path / "counter", three_turns())
    assert (len(done.in_order), len(done.hand_overs)) == (3, 2)
    assert locks.fault_count(locks.correctness([done])) == 0


def test_tokens_that_do_not_grow_and_errors_are_faults() -> None:
    done = locks.Round(usages=[[Usage(0, 1, 2, 7), Usage(2, 3, 4, 7)], [Usage(4, 5, 6, 6)]], errors=["lost"])
    assert (done.overlaps, done.bad_tokens) == (0, 2)
    assert locks.fault_count(locks.correctness([done])) == 3


def test_the_targets_are_those_that_were_promised() -> None:
    fine = {"acquisitions": 9, "lost": 0, "overlaps": 0, "bad_tokens": 0, "errors": []}

    def hand_over(mine: float) -> dict[str, dict[str, object]]:
        return {
            locks.OURS: {"milliseconds": [[mine]] * 3, "correctness": fine},
            locks.RIVAL: {"milliseconds": [[2.0]] * 3, "correctness": fine},
        }

    contended = {locks.OURS: {"sent": 2.0, "correctness": fine}}
    found = {
        "uncontended": {name: {"ratios": {locks.OURS: [1.2]}} for name in ("sync, one CPU", "sync", "async, one CPU")},
        "hand_over": {locks.THREADS: hand_over(1.0), locks.PROCESSES: hand_over(3.0)},
        "commands": {locks.THREADS: contended, locks.PROCESSES: contended},
        "fairness": {locks.OURS: {"jain": [0.99], "worst_wait": [0.1, 0.6], "correctness": fine}},
    }
    goals = [target.as_dict() for target in locks.targets(found)]
    missed = [goal["what"] for goal in goals if not goal["met"]]
    assert missed == [
        "uncontended / raw, sync, one CPU",
        "uncontended / raw, async, one CPU",
        f"hand-over / {locks.RIVAL}'s, {locks.PROCESSES}",
        f"worst wait in s, {locks.PROCESSES}",
    ]
    assert len(goals) == 8
