"""The sections of `python -m benchmarks`: what each measures, its table for people, and what is promised of it."""

import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._calls import KINDS, Timings, summary, time_calls, time_near
from benchmarks._costs import (
    IMPORTS,
    bytes_in_redis,
    bytes_of_local_record,
    calls_per_second,
    import_seconds,
    time_events,
)
from benchmarks._crew import Crew
from benchmarks._growth import fill, fill_unseen, time_sizes
from benchmarks._monitor import Monitor
from benchmarks._peers import OURS, POLLING, guards_of
from benchmarks._report import Target, quantile, say, table
from benchmarks._server import Server
from benchmarks._storms import Storm, duplicate, prepare, verdict
from benchmarks._work import DUPLICATES

__all__ = ["SECTIONS", "Bench", "Result"]

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


_UNSEEN = 12_000
"""Records of another process for each second of measuring: more than are replayed, as others take turns."""


def calls(bench: Bench) -> Result:
    """First calls and replays on every store, in both colours."""
    every = os.sched_getaffinity(0) if bench.can_pin else set()
    places: dict[str, set[int] | None] = {"one CPU": {min(every)}, "all CPUs": every} if every else {"all CPUs": None}
    seconds = 1.2 if bench.quick else 8.0
    found: Result = {}
    for store in STORES:
        for colour in COLOURS:
            for place, cpus in places.items():
                if place != next(iter(places)) and (bench.quick or store != "redis"):
                    continue  # only Redis is so quick that waking a CPU shows
                title, url, unseen = f"{store}, {colour}, {place}", bench.url(store), 0
                if store == "redis":
                    unseen = int(seconds * _UNSEEN)
                    with Crew(1) as crew:
                        crew.run(fill_unseen, [(url, unseen)], _PATIENCE)
                order = (store, colour, url, seconds, (), unseen)
                found[title] = _timed(bench, title, cpus, seconds, time_calls, order)
    place, cpus = next(iter(places.items()))
    title = f"near-cache of Redis, sync, {place}"
    found[title] = _timed(bench, title, cpus, seconds, time_near, (bench.url("redis"), seconds))
    return found


def _timed(
    bench: Bench,
    title: str,
    cpus: set[int] | None,
    seconds: float,
    work: Callable[..., Timings],
    order: tuple[Any, ...],
) -> Result:
    """What a process of its own, and the servers, took on these CPUs; None: on those that there are."""
    say(f"calls: {title} ...")
    every = os.sched_getaffinity(0) if bench.can_pin else set()
    if cpus is not None:
        bench.pin(cpus)
    try:
        with Crew(1, cpus) as crew:
            (timings,) = crew.run(work, [order], seconds)
    finally:
        if cpus is not None:
            bench.pin(every)
    return summary(timings)


def calls_tables(found: Result) -> str:
    """For people."""
    parts = []
    for title, one in found.items():
        kinds = one["kinds"]
        names = sorted(kinds["replay"], key=lambda name: (name != one["floor"], kinds["replay"][name]["ratio"][1]))
        rows = [(name, *(text for kind in KINDS for text in _cells(kinds[kind].get(name)))) for name in names]
        rows += [(name, why, "", "", "") for name, why in one["missing"].items()]
        columns = [text for kind in KINDS for text in (f"{kind} µs", "ratio [quartiles]")]
        if "duplicates" in one:
            rows = [(*row, *_verdict(one["duplicates"].get(row[0]))) for row in rows]
            columns += [f"runs for {DUPLICATES}", "errors", ""]
        others = "".join(f"; of {name}: to {floor}" for name, floor in one["floors"].items())
        parts.append(table(f"{title}; ratios to: {one['floor']}{others}", columns, rows))
    return "\n\n".join(parts)


def _cells(one: Result | None) -> tuple[str, str]:
    if one is None:
        return "", ""
    return f"{one['micros']:.1f}", _ratio_cell(one["ratio"])


def _ratio_cell(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _verdict(own: Result | None) -> tuple[str, str, str]:
    """What the storms say; None: nobody asked them."""
    if own is None:
        return "not asked", "", ""
    return _span(own["runs"]), _span(own["errors"]), "right" if own["correct"] else "WRONG"


_BOUNDS = {
    "redis": (1.35, 1.35),
    "postgresql": (1.25, 1.25),
    "sqlite": (1.5, 1.5),
    "local": (None, 3.0),
    "near-cache of Redis": (None, 3.0),
}
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
        for name, floor in one["floors"].items():
            ratio = one["kinds"]["replay"][name]["ratio"][1]
            yield Target(f"{title}: replay / {floor}", ratio, "<=", _BOUNDS[store][1])


PROCESSES = 8
_PATIENCE = 60.0
"""Seconds that a storm may last."""


def storms(bench: Bench) -> Result:
    """Duplicates on every store, in one process and, where processes can share it, in eight."""
    found: Result = {}
    warms, repeats = (0, 1) if bench.quick else (1, 5)
    for store in STORES:
        for colour in COLOURS:
            shapes = (1,) if store == "local" else (1, PROCESSES)
            for processes in shapes:
                if bench.quick and processes > 1 and (store, colour) != ("redis", "sync"):
                    continue
                say(f"storms: {store}, {colour}, {processes} x {DUPLICATES // processes} ...")
                found[f"{store}, {colour}, {processes} x {DUPLICATES // processes}"] = _storms_of(
                    bench, store, colour, processes, warms, repeats
                )
    return found


def _storms_of(bench: Bench, store: str, colour: str, processes: int, warms: int, repeats: int) -> Result:
    url, (guards, missing) = bench.url(store), guards_of(store, colour)
    seen: dict[str, list[Result]] = {}
    with Crew(processes) as crew:
        for peer in guards:
            try:
                crew.run(prepare, [(store, colour, url, peer)] * processes, _PATIENCE)
            except RuntimeError as error:  # what it needs beside itself is not installed
                missing[peer] = str(error).strip().rpartition("\n")[2]
            else:
                seen[peer] = []
        for warm in (*(True,) * warms, *(False,) * repeats):
            for peer in random.sample(list(seen), len(seen)):
                found = _storm(bench, crew, (store, colour, peer), processes)
                if not warm:  # the first opens connections
                    seen[peer].append(found)
    return {"missing": missing, "peers": {peer: _storm_summary(own) for peer, own in seen.items()}}


def _storm(bench: Bench, crew: Crew, what: tuple[str, str, str], processes: int) -> Result:
    callers = DUPLICATES // processes
    order = (*what, uuid.uuid4().hex, callers, time.monotonic() + 0.1)
    if what[0] != "redis":
        return verdict(crew.run(duplicate, [order] * processes, _PATIENCE))
    with Monitor(bench.url("redis")) as monitor:
        seen: list[Storm] = crew.run(duplicate, [order] * processes, _PATIENCE)
    names = {name: number for name, number in monitor.sent.items() if name not in _HANDSHAKE}
    return verdict(seen) | {"commands": sum(names.values())}


_HANDSHAKE = ("HELLO", "CLIENT", "AUTH", "SELECT", "PING")
"""What opening a connection and asking whether it is alive costs, which is no part of a call."""


def _storm_summary(own: list[Result]) -> Result:
    """Of several storms: the runs and answers of each, and medians of what they cost."""
    errors: dict[str, int] = {}
    for one in own:
        for name, number in one["errors"].items():
            errors[name] = errors.get(name, 0) + number
    waits = [one["last_ms"] for one in own if one["last_ms"] is not None]
    return {
        "runs": [one["runs"] for one in own],
        "answers": [one["answers"] for one in own],
        "errors": errors,
        "commands": [one["commands"] for one in own if "commands" in one],
        "last_ms": waits,
        "correct": all(one["runs"] == 1 and one["answers"] == DUPLICATES for one in own),
    }


def storms_tables(found: Result) -> str:
    """For people."""
    parts = []
    for title, one in found.items():
        rows = []
        for peer, own in one["peers"].items():
            errors = ", ".join(f"{number} {name}" for name, number in own["errors"].items())
            rows.append(
                (
                    peer,
                    _span(own["runs"]),
                    _span(own["answers"]),
                    f"{median(own['commands']):.0f}" if own["commands"] else "-",
                    f"{median(own['last_ms']):.1f}" if own["last_ms"] else "-",
                    "right" if own["correct"] else f"WRONG {errors}",
                )
            )
        rows += [(name, why, "", "", "", "") for name, why in one["missing"].items()]
        columns = ("runs", "answers", "commands", "ms to the last", "")
        parts.append(table(f"Storm: {title} duplicates", columns, rows))
    return "\n\n".join(parts)


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def storms_targets(found: Result) -> Iterator[Target]:
    """What is promised of ours."""
    for title, one in found.items():
        ours, peers = one["peers"][OURS], one["peers"]
        wrong = sum(runs != 1 for runs in ours["runs"]) + sum(answers != DUPLICATES for answers in ours["answers"])
        yield Target(f"storm, {title}: storms of ours gone wrong", wrong, "<=", 0)
        if not title.startswith("redis"):
            continue
        processes = int(title.split(", ")[2].split(" ")[0])
        yield Target(f"storm, {title}: Redis commands", median(ours["commands"]), "<=", 5 if processes == 1 else 50)
        if processes > 1:
            rivals = {name: own for name, own in peers.items() if name != OURS and own["correct"]}
            polling = {name: own for name, own in rivals.items() if name in POLLING}
            yield Target(f"storm, {title}: last waiter / the best right peer's", _last_ratio(ours, rivals), "<=", 2)
            yield Target(f"storm, {title}: last waiter / the best one's that polls", _last_ratio(ours, polling), "<", 1)


def _last_ratio(ours: Result, rivals: dict[str, Result]) -> float | None:
    """Ours' last answer to that of the quickest of these; None: there is none, or none of ours."""
    if not rivals or not ours["last_ms"]:
        return None
    return median(ours["last_ms"]) / min(median(own["last_ms"]) for own in rivals.values())


def growth(bench: Bench) -> Result:
    """Calls on stores that hold a thousand records, and up to a million."""
    sizes = (1_000, 20_000) if bench.quick else (1_000, 100_000, 1_000_000)
    found: Result = {}
    for store in ("redis", "postgresql", "sqlite"):
        places = {f"{size:,}": (_place(bench, store, number, size), size) for number, size in enumerate(sizes, 1)}
        say(f"growth: filling {store} ...")
        with Crew(1) as crew:
            for place in places.values():
                crew.run(fill, [place], _PATIENCE)
            say(f"growth: {store} ...")
            seconds = 1.5 if bench.quick else 8.0
            (timings,) = crew.run(time_sizes, [(store, places, seconds)], seconds)
        found[store] = summary(timings)
    return found


def _place(bench: Bench, store: str, number: int, size: int) -> str:
    """A store of its own for one size: another Redis database, table or file."""
    if store == "sqlite":
        return f"sqlite:///{bench.directory}/{size}.db"
    url = bench.url(store)
    return f"{url.rpartition('/')[0]}/{number}" if store == "redis" else f"{url}?table=records_{size}"


def growth_tables(found: Result) -> str:
    """For people."""
    return calls_tables({f"Growth: {store}": one for store, one in found.items()})


def growth_targets(found: Result) -> Iterator[Target]:
    """What is promised of ours."""
    for store, one in found.items():
        for kind in KINDS:
            size, largest = list(one["kinds"][kind].items())[-1]
            yield Target(
                f"growth, {store}: {kind} at {size} records / at {one['floor']}", largest["ratio"][1], "<=", 1.2
            )


def costs(bench: Bench) -> Result:
    """Bytes, imports, events, and several processes at once."""
    seconds = 1.0 if bench.quick else 3.0
    found: Result = {"throughput": {}}
    with Crew(1) as crew:
        say("costs: bytes ...")
        (found["redis_bytes"],) = crew.run(bytes_in_redis, [(bench.url("redis"),)])
        (found["local_bytes"],) = crew.run(bytes_of_local_record, [(5_000 if bench.quick else 20_000,)])
        say("costs: events ...")
        (timings,) = crew.run(time_events, [(seconds,)], seconds)
        found["events"] = summary(timings)
    say("costs: imports ...")
    took = import_seconds(1 if bench.quick else 15)
    bare = took.pop("bare Python")
    found["imports"] = {
        name: median((one - base) * 1000 for one, base in zip(own, bare, strict=True)) for name, own in took.items()
    }
    for store in ("redis",) if bench.quick else ("redis", "postgresql"):
        for processes in (1, 2, 4):
            say(f"costs: throughput, {store}, {processes} processes ...")
            found["throughput"] |= _throughput(bench, store, processes)
    return found


_RIVAL = {"redis": "idempotency", "postgresql": "DBOS"}
"""The peer whose throughput is measured beside ours, by store: one whose storms are right."""


def _throughput(bench: Bench, store: str, processes: int) -> Result:
    """Calls per second of so many processes: the floor, ours and a peer take turns in short rounds, and ratios are in a round."""
    url, rounds, seconds = bench.url(store), 2 if bench.quick else 12, 0.15 if bench.quick else 0.4
    whose = ["floor", OURS, *({_RIVAL[store]} & guards_of(store, "sync")[0].keys())]
    turns = [(who, kind) for who in whose for kind in KINDS]
    seen: dict[tuple[str, str], list[float]] = {turn: [] for turn in turns}
    with Crew(processes) as crew:
        for warm in (True, *(False,) * rounds):  # the first makes clients, connections and tables
            for who, kind in turns if warm else random.sample(turns, len(turns)):
                order = (store, url, who, kind, time.monotonic() + 0.05, 0.0 if warm else seconds)
                calls_of_each = crew.run(calls_per_second, [order] * processes, seconds)
                if not warm:
                    seen[who, kind].append(sum(calls_of_each))
    found: Result = {}
    for kind in KINDS:
        base = seen["floor", kind]
        found[f"{store}, {kind}, {processes} processes"] = {
            who: {
                "per_second": median(seen[who, kind]),
                "ratio": [
                    quantile([one / floor for one, floor in zip(seen[who, kind], base, strict=True)], share)
                    for share in (0.25, 0.5, 0.75)
                ],
            }
            for who in whose
        }
    return found


def costs_tables(found: Result) -> str:
    """For people."""
    base = found["redis_bytes"]["SET"]
    sizes = sorted(found["redis_bytes"].items(), key=lambda item: item[1])
    rows = [
        (f"{title}: {who}", f"{own['per_second']:,.0f}", _ratio_cell(own["ratio"]))
        for title, one in found["throughput"].items()
        for who, own in one.items()
    ]
    return "\n\n".join(
        (
            table(
                "Bytes in Redis of a 200-byte result",
                ("bytes", "/ SET"),
                [(n, str(b), f"{b / base:.2f}") for n, b in sizes],
            ),
            f"Local backend: {found['local_bytes']:,.0f} bytes of Python's memory per record of 200 bytes",
            calls_tables({"Events, local backend": found["events"]}),
            table(
                "Import",
                ("ms over bare Python",),
                [
                    (f"{n}: {IMPORTS[n]}", f"{ms:.0f}")
                    for n, ms in sorted(found["imports"].items(), key=lambda item: item[1])
                ],
            ),
            table("Throughput, all processes together", ("calls/s", "/ the floor's [quartiles]"), rows),
        )
    )


def costs_targets(found: Result) -> Iterator[Target]:
    """What is promised of ours."""
    yield Target(
        "bytes of a record / SET of the payload", found["redis_bytes"][OURS] / found["redis_bytes"]["SET"], "<=", 1.3
    )
    yield Target(f"{IMPORTS[OURS]}: ms over bare Python", found["imports"][OURS], "<=", 30)


Section = tuple[Callable[[Bench], Result], Callable[[Result], str], Callable[[Result], Iterator[Target]]]

SECTIONS: dict[str, Section] = {
    "storms": (storms, storms_tables, storms_targets),
    "calls": (calls, calls_tables, calls_targets),
    "growth": (growth, growth_tables, growth_targets),
    "costs": (costs, costs_tables, costs_targets),
}
"""By name, in the order of a run: what it measures, its tables, what is promised. The calls' tables tell what storms found."""
