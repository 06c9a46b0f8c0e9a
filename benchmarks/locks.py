"""Locks on one Redis: ours, redis-py's, python-redis-lock, pottery and sherlock, round by round in one run.

python -m benchmarks.locks [--redis URL] [--quick] [--seconds N] [--json]

How to read it. All locks take turns in short rounds, so that what the machine does meanwhile hits all of them; ratios
are taken within a round, and their median and quartiles are shown. Ratios carry from one machine to another, times do
not.

- Uncontended: acquire and release with nobody waiting, as a ratio to two commands on redis-py's own client, `SET NX PX`
  and an `EVALSHA` that compares and deletes. "one CPU" has server and client on the same one, which leaves out what
  waking another CPU costs; the target is about that column where it can be had. "cold" is the first call after other
  locks had the processor's caches, which is what a program that seldom locks pays.
- Hand-over: one holds the lock while eight wait; each then holds it once, for 1 ms. Measured from the call of `release`
  to the return of the next `acquire`. A polling lock's figure is half its pause, or none if it is lucky.
- Commands: what the clients send per acquisition, as MONITOR shows it; in brackets with what their scripts run inside
  the server. Alone; by eight threads of one process, and by eight processes, that hold it for 1 ms and ask again.
- Fairness: the same eight processes; Jain's index of their acquisitions (1: all alike; 1/8: one has everything), the
  median of the rounds, and the longest that anyone waited in any round.
- Correctness: updates lost by a counter that only the lock protects, holds that overlapped, tokens that did not grow,
  and errors; "-" stands for no tokens. A figure beside anything but zeros is worth nothing.

Options that are not said are the libraries' defaults; all leases are 30 s. Ours renews its lease while it is held, as
python-redis-lock does with auto_renewal; the others never do. The server must serve nobody else meanwhile.
"""

import argparse
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any

import redis

from benchmarks._crew import Crew
from benchmarks._lock_peers import RAW, SYNC, WAITING
from benchmarks._lock_work import Block, Turn, Usage, Work, count_alone, use_alone, wait_in_line
from benchmarks._monitor import Monitor
from benchmarks._report import Target, jain, machine, met_or_missed, quantile, ratio_text, say, table
from benchmarks._server import Server, redis_server

OURS, RIVAL = "idempotent", "python-redis-lock"
WAITERS = 8
THREADS, PROCESSES = f"{WAITERS} threads", f"{WAITERS} processes"
"""The two shapes of contention."""
_PASSES = 3
"""So often each variant of uncontended use has its turn."""

Result = dict[str, Any]


@dataclass
class Round:
    """What happened around one lock for a while."""

    lost: int = 0
    """Updates that the protected counter lost."""
    errors: list[str] = field(default_factory=list)
    usages: list[list[Usage]] = field(default_factory=list)
    """By thread or process."""

    @property
    def in_order(self) -> list[Usage]:
        """All usages, as they followed each other."""
        return sorted((usage for usages in self.usages for usage in usages), key=lambda usage: usage.got)

    @property
    def overlaps(self) -> int:
        """How often a hold began before the one before it had ended."""
        return sum(after.got < before.left for before, after in pairwise(self.in_order))

    @property
    def bad_tokens(self) -> int | None:
        """Tokens that were not larger than the one before; None: this lock has none."""
        tokens = [usage.token for usage in self.in_order]
        if any(token is None for token in tokens):
            return None
        return sum(after <= before for before, after in pairwise(tokens) if before is not None and after is not None)

    @property
    def hand_overs(self) -> list[float]:
        """Seconds from a release to the next acquisition by somebody who had waited for it."""
        return [after.got - before.left for before, after in pairwise(self.in_order) if after.asked < before.left]


@dataclass(frozen=True)
class Bench:
    """What all sections use."""

    server: Server
    crew: Crew
    """One process for each waiter, and one for who holds the lock first."""
    counter: Path
    seconds: float
    names: Iterator[str]

    def contend(self, shape: str, peer: str, turns: Sequence[Turn], seconds: float) -> Round:
        """Have the threads or processes of `shape` take the turns, on a lock of a new name."""
        self.counter.write_bytes(bytes(8))
        common = (self.server.url, next(self.names), peer, self.counter)
        if shape == THREADS:
            (work,) = self.crew.run(wait_in_line, [(*common, turns)], seconds)
        else:
            replies: list[list[Work]] = self.crew.run(wait_in_line, [(*common, [turn]) for turn in turns], seconds)
            work = [one for reply in replies for one in reply]
        done = Round(usages=[one.usages for one in work], errors=[error for one in work for error in one.errors])
        done.lost = len(done.in_order) - int.from_bytes(self.counter.read_bytes(), sys.byteorder)
        return done

    def burst(self, shape: str, peer: str) -> Round:
        """One holds the lock, the others gather, and then each has it once."""
        start = time.monotonic() + 0.02
        gather = start + 0.02
        free = gather + random.uniform(0.08, 0.16)  # in step with nobody's polling
        waiters = [Turn(gather + random.uniform(0, 0.02)) for _ in range(WAITERS)]
        return self.contend(shape, peer, [Turn(start, hold_until=free), *waiters], 1)

    def loop(self, shape: str, peer: str, seconds: float) -> Round:
        """All acquire and release again and again."""
        begin = time.monotonic() + 0.05
        return self.contend(shape, peer, [Turn(begin, end=begin + seconds)] * WAITERS, seconds)

    def shuffled(self) -> list[str]:
        """The locks that can wait, in random order."""
        return random.sample(list(WAITING), len(WAITING))


def correctness(rounds: Sequence[Round]) -> Result:
    """What went wrong in all of them."""
    tokens = [done.bad_tokens for done in rounds]
    return {
        "acquisitions": sum(len(done.in_order) for done in rounds),
        "lost": sum(done.lost for done in rounds),
        "overlaps": sum(done.overlaps for done in rounds),
        "bad_tokens": None if None in tokens else sum(bad for bad in tokens if bad is not None),
        "errors": [error for done in rounds for error in done.errors],
    }


def correct_text(found: Result) -> str:
    """For the column of the table."""
    tokens = "-" if found["bad_tokens"] is None else found["bad_tokens"]
    return f"{found['lost']} {found['overlaps']} {tokens} {len(found['errors'])}"


CORRECT = "lost overlaps tokens errors"


def fault_count(found: Result) -> int:
    """All faults of a lock that has tokens; having none is one."""
    tokens = 1 if found["bad_tokens"] is None else found["bad_tokens"]
    return int(found["lost"] + found["overlaps"] + tokens + len(found["errors"]))


def uncontended(bench: Bench) -> Result:
    """Acquire and release alone: for each variant and lock the ratios to raw, and raw's own microseconds."""
    can_pin = bench.server.pid is not None and hasattr(os, "sched_setaffinity")
    every = os.sched_getaffinity(0) if can_pin else set()
    one = {min(every)} if can_pin else set()
    took: dict[str, list[dict[str, list[Block]]]] = {}
    with ExitStack() as stack:
        places = {"": (bench.crew, every)}
        if can_pin:
            places = {", one CPU": (stack.enter_context(Crew(1, one)), one), **places}
            stack.callback(bench.server.pin, every)
        variants = [(colour, place) for colour in ("sync", "async") for place in places]
        seconds = bench.seconds / len(variants) / _PASSES
        for colour, place in variants * _PASSES:
            crew, cpus = places[place]
            if can_pin:
                bench.server.pin(cpus)
            order = (bench.server.url, next(bench.names), seconds, colour == "async")
            took.setdefault(colour + place, []).extend(crew.run(use_alone, [order], seconds))
    found: Result = {}
    for variant, passed in took.items():
        blocks = {peer: [block for one in passed for block in one[peer]] for peer in passed[0]}
        found[variant] = {
            "raw_us": quantile([raw.warm for raw in blocks[RAW]], 0.25) * 1e6,
            "ratios": {
                peer: [mine.warm / raw.warm for mine, raw in zip(own, blocks[RAW], strict=True)]
                for peer, own in blocks.items()
            },
            "cold_ratios": {
                peer: [mine.cold / raw.cold for mine, raw in zip(own, blocks[RAW], strict=True)]
                for peer, own in blocks.items()
            },
        }
    return found


def uncontended_table(found: Result) -> str:
    """For people."""
    rows = []
    for peer in SYNC:
        cells: list[str] = []
        for own in found.values():
            if peer in own["ratios"]:
                cells += [ratio_text(own["ratios"][peer]), f"{median(own['cold_ratios'][peer]):.2f}"]
            else:
                cells += ["-", "-"]
        rows.append((peer, *cells))
    columns = [column for variant in found for column in (variant, "cold")]
    floor = ", ".join(f"{variant} {own['raw_us']:.0f}" for variant, own in found.items())
    return table(f"Uncontended acquire and release, ratio to raw (which took, in µs: {floor})", columns, rows)


def hand_over(bench: Bench) -> Result:
    """Hand-over latencies, for each shape and lock."""
    found: Result = {}
    for shape in (THREADS, PROCESSES):
        rounds: dict[str, list[Round]] = {peer: [] for peer in WAITING}
        for peer in WAITING:
            bench.burst(shape, peer)  # connects, and loads scripts
        end = time.monotonic() + bench.seconds / 2
        while time.monotonic() < end:
            for peer in bench.shuffled():
                rounds[peer].append(bench.burst(shape, peer))
        found[shape] = {
            peer: {
                "milliseconds": [[value * 1e3 for value in one.hand_overs] for one in done],
                "correctness": correctness(done),
            }
            for peer, done in rounds.items()
        }
    return found


def paired(of_shape: Result, peer: str) -> list[float]:
    """The ratios of the rounds' medians to the rival's."""
    rounds = zip(of_shape[peer]["milliseconds"], of_shape[RIVAL]["milliseconds"], strict=True)
    return [median(mine) / median(theirs) for mine, theirs in rounds if mine and theirs]


def hand_over_table(found: Result) -> str:
    """For people."""
    rows = []
    for shape, of_shape in found.items():
        for peer, own in of_shape.items():
            values = [value for one in own["milliseconds"] for value in one]
            cells = [f"{quantile(values, share):.2f}" for share in (0.5, 0.99, 1)] if values else ["-"] * 3
            ratio = ratio_text(paired(of_shape, peer)) if values else "-"
            rows.append((f"{shape}: {peer}", *cells, ratio, str(len(values)), correct_text(own["correctness"])))
    columns = ("p50 ms", "p99 ms", "max ms", f"median / {RIVAL}'s", "hand-overs", CORRECT)
    return table(f"Hand-over from release to the next acquisition, {WAITERS} waiters", columns, rows)


def commands(bench: Bench) -> Result:
    """Commands per acquisition, for each way of use and lock."""
    times = 200
    seconds = max(0.3, bench.seconds / 30)
    found: Result = {"alone": {}, THREADS: {}, PROCESSES: {}}
    for peer in WAITING:
        name = next(bench.names)
        bench.crew.run(count_alone, [(bench.server.url, name, peer, 1)])
        with Monitor(bench.server.url) as monitor:
            bench.crew.run(count_alone, [(bench.server.url, name, peer, times)])
        found["alone"][peer] = _per_acquisition(monitor, times)
        for shape in (THREADS, PROCESSES):
            bench.loop(shape, peer, 0.05)
            with Monitor(bench.server.url) as monitor:
                done = bench.loop(shape, peer, seconds)
            found[shape][peer] = _per_acquisition(monitor, len(done.in_order)) | {"correctness": correctness([done])}
    return found


def _per_acquisition(monitor: Monitor, times: float) -> Result:
    times = times or math.nan
    return {
        "sent": monitor.sent.total() / times,
        "run": (monitor.sent.total() + monitor.inside) / times,
        "by_name": {name: number / times for name, number in monitor.sent.most_common()},
    }


def commands_table(found: Result) -> str:
    """For people."""
    rows = [
        (
            peer,
            *(f"{own[peer]['sent']:.1f} ({own[peer]['run']:.1f})" for own in found.values()),
            correct_text(found[THREADS][peer]["correctness"]),
            correct_text(found[PROCESSES][peer]["correctness"]),
        )
        for peer in WAITING
    ]
    columns = (*found, f"threads: {CORRECT}", "processes: the same")
    return table("Commands sent per acquisition (with those inside scripts)", columns, rows)


def fairness(bench: Bench) -> Result:
    """Shares and waits in a closed loop of processes, for each lock."""
    seconds = max(1.0, min(4.0, bench.seconds / len(WAITING)))
    rounds: dict[str, list[Round]] = {peer: [] for peer in WAITING}
    for peer in WAITING:
        bench.loop(PROCESSES, peer, 0.05)
    for _ in range(max(1, int(bench.seconds / seconds / len(WAITING)))):
        for peer in bench.shuffled():
            rounds[peer].append(bench.loop(PROCESSES, peer, seconds))
    return {
        peer: {
            "shares": [[len(usages) for usages in one.usages] for one in done],
            "jain": [jain([len(usages) for usages in one.usages]) for one in done],
            "worst_wait": [max((usage.got - usage.asked for usage in one.in_order), default=math.inf) for one in done],
            "per_second": [len(one.in_order) / seconds for one in done],
            "correctness": correctness(done),
        }
        for peer, done in rounds.items()
    }


def fairness_table(found: Result) -> str:
    """For people."""
    rows = [
        (
            peer,
            f"{median(own['jain']):.3f}",
            f"{min(own['jain']):.3f}",
            f"{max(own['worst_wait']):.3f}",
            f"{median(own['per_second']):.0f}",
            str(len(own["jain"])),
            correct_text(own["correctness"]),
        )
        for peer, own in found.items()
    ]
    columns = ("Jain", "worst round", "worst wait s", "acquisitions/s", "rounds", CORRECT)
    return table(f"Closed loop of {WAITERS} processes", columns, rows)


def targets(found: Result) -> list[Target]:
    """What is promised of ours."""
    alone, contended, fair = found["uncontended"], found["commands"], found["fairness"][OURS]
    judged = [variant for variant in alone if "CPU" in variant] or list(alone)
    contests = (*found["hand_over"].values(), contended[THREADS], contended[PROCESSES], found["fairness"])
    faults = sum(fault_count(contest[OURS]["correctness"]) for contest in contests)
    return [
        *(
            Target(f"uncontended / raw, {variant}", median(alone[variant]["ratios"][OURS]), "<=", 1.15)
            for variant in judged
        ),
        *(
            Target(f"hand-over / {RIVAL}'s, {shape}", median(paired(own, OURS) or [math.nan]), "<=", 1.0)
            for shape, own in found["hand_over"].items()
        ),
        Target(f"commands per acquisition, {THREADS}", contended[THREADS][OURS]["sent"], "<", 6),
        Target(f"Jain's index, {PROCESSES}", median(fair["jain"]), ">=", 0.95),
        Target(f"worst wait in s, {PROCESSES}", max(fair["worst_wait"]), "<", 0.5),
        Target("faults of ours: lost, overlaps, tokens, errors", faults, "<=", 0),
    ]


SECTIONS = {
    "uncontended": (uncontended, uncontended_table),
    "hand_over": (hand_over, hand_over_table),
    "commands": (commands, commands_table),
    "fairness": (fairness, fairness_table),
}


@contextmanager
def prepared(url: str | None, seconds: float) -> Iterator[Bench]:
    """The server and the processes, which end with the block."""
    run = f"benchmark-{uuid.uuid4().hex[:8]}"
    with (
        redis_server(url) as server,
        tempfile.TemporaryDirectory(prefix="benchmarks-") as directory,
        Crew(WAITERS + 1) as crew,
    ):
        yield Bench(server, crew, Path(directory, "counter"), seconds, (f"{run}-{number}" for number in count()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. The exit code is 0 whether targets are met or not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.locks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--redis", metavar="URL", help="a server that serves nobody else; default: one is started")
    parser.add_argument("--quick", action="store_true", help="under 40 s, and noisier")
    parser.add_argument("--seconds", type=float, metavar="N", help="for each of the four sections; default: 60")
    parser.add_argument("--json", action="store_true", help="all measured values, instead of tables")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with prepared(options.redis, options.seconds or (5 if options.quick else 60)) as bench:
            with redis.Redis.from_url(bench.server.url) as client:
                info: Any = client.info("server")
            found: Result = {"machine": machine("redis", "hiredis", "python-redis-lock", "pottery", "sherlock")}
            found["machine"]["server"] = info.get("valkey_version") or info["redis_version"]
            if not options.json:
                print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
            for section, (measure, show) in SECTIONS.items():
                say(f"{section} ...")
                found[section] = measure(bench)
                if not options.json:
                    print(f"\n{show(found[section])}", flush=True)
            goals = targets(found)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    if options.json:
        found["targets"] = [target.as_dict() for target in goals]
        print(json.dumps(found, indent=1))
    else:
        print(f"\n{met_or_missed(goals)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
