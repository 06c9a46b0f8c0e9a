"""What a guarded call costs: ours, the floor of each store and the libraries that people use, turn by turn in one run.

python -m benchmarks [--quick] [--json FILE] [--only SECTION ...] [--redis URL] [--postgres URL]

How to read it. Everybody takes turns in short rounds, so that what the machine does meanwhile hits all of them; ratios
are taken within a round, and their median and quartiles are shown. Ratios carry from one machine to another, times do
not. The floor of a store is the commands that nobody can do without, on its usual client (see `_floors.py`).

- Calls: the first call with a key, and a replay. "one CPU" has server and caller on the same one, which leaves out what
  waking another CPU costs; the targets are about it where it can be had.

The servers are started for the run, from PATH or from wheels; those that are given by URL must serve nobody else.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._calls import KINDS, summary, time_calls
from benchmarks._crew import Crew
from benchmarks._peers import OURS, PACKAGES
from benchmarks._report import Target, machine, met_or_missed, say, table
from benchmarks._server import Server, postgres_server, redis_server

STORES = ("local", "redis", "postgresql", "sqlite")
COLOURS = ("sync", "async")

Result = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What all sections use."""

    servers: dict[str, Server]
    directory: Path
    quick: bool

    def url(self, store: str) -> str:
        """Where the records of a store live."""
        if store in self.servers:
            return self.servers[store].url
        return "local://" if store == "local" else f"sqlite:///{self.directory}/records.db"

    @property
    def can_pin(self) -> bool:
        """Whether the servers are ours and the system lets processes be kept on one CPU."""
        return hasattr(os, "sched_setaffinity") and all(server.pid is not None for server in self.servers.values())

    def pin(self, cpus: set[int]) -> None:
        """Have the servers, and the processes that they start from now on, run on `cpus` only."""
        for server in self.servers.values():
            server.pin(cpus)


def calls(bench: Bench) -> Result:
    """First calls and replays on every store, in both colours."""
    every = os.sched_getaffinity(0) if bench.can_pin else set()
    places: dict[str, set[int] | None] = {"one CPU": {min(every)}, "all CPUs": every} if every else {"all CPUs": None}
    seconds = 1.5 if bench.quick else 8.0
    found: Result = {}
    for store in STORES:
        for colour in COLOURS:
            for place, cpus in places.items():
                if place != next(iter(places)) and (bench.quick or store != "redis"):
                    continue  # only Redis is so quick that waking a CPU shows
                say(f"calls: {store}, {colour}, {place} ...")
                if cpus is not None:
                    bench.pin(cpus)
                try:
                    with Crew(1, cpus) as crew:
                        (timings,) = crew.run(time_calls, [(store, colour, bench.url(store), seconds)], seconds)
                finally:
                    if cpus is not None:
                        bench.pin(every)
                found[f"{store}, {colour}, {place}"] = summary(timings)
    return found


def calls_tables(found: Result) -> str:
    """For people."""
    parts = []
    for title, one in found.items():
        kinds = one["kinds"]
        names = sorted(kinds["replay"], key=lambda name: (name != one["floor"], kinds["replay"][name]["ratio"][1]))
        rows = [(name, *(text for kind in KINDS for text in _cells(kinds[kind][name]))) for name in names]
        rows += [(name, why, "", "", "") for name, why in one["missing"].items()]
        columns = [text for kind in KINDS for text in (f"{kind} µs", "ratio [quartiles]")]
        parts.append(table(f"{title}; ratios to: {one['floor']}", columns, rows))
    return "\n\n".join(parts)


def _cells(one: Result) -> tuple[str, str]:
    low, middle, high = one["ratio"]
    return f"{one['micros']:.1f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]"


_BOUNDS = {"redis": (1.35, 1.35), "postgresql": (1.25, 1.25), "sqlite": (1.5, 1.5), "local": (None, 3.0)}
"""At most, by store: the ratios of a first call and of a replay to the floor."""


def calls_targets(found: Result) -> Iterator[Target]:
    """What is promised of ours."""
    seen = set()
    for title, one in found.items():
        store, colour, _ = title.split(", ")
        if (store, colour) in seen or (store == "local" and colour == "async"):
            continue
        seen.add((store, colour))
        for kind, bound in zip(KINDS, _BOUNDS[store], strict=True):
            if bound is not None:
                ratio = one["kinds"][kind][OURS]["ratio"][1]
                yield Target(f"{title}: {kind} / {one['floor']}", ratio, "<=", bound)


Section = tuple[Callable[[Bench], Result], Callable[[Result], str], Callable[[Result], Iterator[Target]]]

SECTIONS: dict[str, Section] = {"calls": (calls, calls_tables, calls_targets)}


@contextmanager
def prepared(redis_url: str | None, postgres_url: str | None, *, quick: bool) -> Iterator[Bench]:
    """The servers and files, which are gone with the block."""
    with (
        tempfile.TemporaryDirectory(prefix="benchmarks-") as directory,
        redis_server(redis_url) as redis,
        postgres_server(postgres_url) as postgres,
    ):
        yield Bench({"redis": redis, "postgresql": postgres}, Path(directory), quick)


def measured(bench: Bench, sections: Sequence[str]) -> Iterator[tuple[str, Result]]:
    """What each section found, one after the other."""
    for name in sections:
        yield name, SECTIONS[name][0](bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. The exit code is 0 whether targets are met or not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under two minutes, and noisier")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured there, too")
    parser.add_argument("--only", metavar="SECTION", choices=SECTIONS, nargs="+", help=f"of: {', '.join(SECTIONS)}")
    parser.add_argument("--redis", metavar="URL", help="a server that serves nobody else; default: one is started")
    parser.add_argument("--postgres", metavar="URL", help="the same; postgresql://user@host:port/database")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found: Result = {"machine": machine(*PACKAGES), "quick": options.quick, "sections": {}}
    try:
        with prepared(options.redis, options.postgres, quick=options.quick) as bench:
            print(", ".join(f"{name} {value}" for name, value in found["machine"].items()), flush=True)
            for name, section in measured(bench, options.only or list(SECTIONS)):
                found["sections"][name] = section
                print(f"\n{SECTIONS[name][1](section)}", flush=True)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    goals = [target for name, section in found["sections"].items() for target in SECTIONS[name][2](section)]
    found["targets"] = [target.as_dict() for target in goals]
    print(f"\n{met_or_missed(goals)}")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
