"""First calls and replays, one after another: everybody takes turns in short rounds, and ratios are taken in a round."""

import asyncio
import functools
import gc
import logging
import random
import time
import uuid
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks._floors import FLOORS
from benchmarks._peers import OURS, guards_of
from benchmarks._report import quantile
from benchmarks._work import TTL, UNSEEN, Contender, charge, charge_async, filled
from idempotent import idempotent

__all__ = ["KINDS", "Timings", "runner", "summary", "sync_rounds", "time_calls", "time_near"]

KINDS = ("first", "replay")
_BLOCK = {"local": 400, "redis": 40, "postgresql": 20, "sqlite": 40}
"""Calls of one contender in its turn, at the most."""
_TURN, _FEW = 0.02, 4
"""Seconds that a turn should take at the most, and the fewest calls that it has."""

Result = dict[str, Any]


class Timings(NamedTuple):
    """Seconds per call, a value a round, by kind of call and contender; the floor's name; why others were left out."""

    took: dict[str, dict[str, list[float]]]
    floor: str
    missing: dict[str, str]
    floors: dict[str, str]
    """Of contenders that have a floor of their own."""


def time_calls(
    store: str, colour: str, url: str, seconds: float, only: tuple[str, ...] = (), unseen: int = 0
) -> Timings:
    """Measure in this process.

    Args:
        store, colour, url: what, and where.
        seconds: for how long.
        only: peers of these names (and floors and ours); () is all of them.
        unseen: how many records `fill_unseen` made there in another process. Ours and the floor replay each of them once,
            in rows of their own; 0: there are no such rows.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")  # what peers have to say about the way they are used is not of interest here
    guard = charge if colour == "sync" else charge_async
    guards, missing = guards_of(store, colour)
    contenders = dict(FLOORS[store, colour](url))
    needed = {*contenders, OURS}
    floor = next(iter(contenders))
    for name, make in guards.items():
        if not only or name in only or name in needed:
            try:
                contenders[name] = Contender.of(make(url, guard))
            except Exception as error:  # a peer that cannot be set up is told of, and the others are measured
                if name in needed:
                    raise
                missing[name] = f"{type(error).__name__}: {error}"
    floors: dict[str, str] = {}
    if unseen:
        floors[OURS + UNSEEN] = floor + UNSEEN
        for name in (floor, OURS):
            orders = [filled(number) for number in range(unseen)]
            contenders[name + UNSEEN] = Contender(None, contenders[name].replay, orders.pop)
        needed |= {*floors, *floors.values()}
    run = _run_async if colour == "async" else _run_sync
    return Timings(_rounds(store, contenders, run, seconds, needed, missing), floor, missing, floors)


def time_near(url: str, seconds: float) -> Timings:
    """Measure replays from copies in the process of records in Redis, beside the local floor, in this process for `seconds`."""
    logging.disable(logging.CRITICAL)
    contenders = dict(FLOORS["local", "sync"](url))
    floor = next(iter(contenders))
    near = idempotent(backend=url, key="payment:{order_id}", ttl=TTL, near_cache=100_000)(charge)
    contenders[OURS] = Contender.of(near)
    return Timings(sync_rounds("local", contenders, seconds), floor, {}, {})


Runner = Callable[[Callable[[str], Any], list[str]], float]


def _run_sync(call: Callable[[str], Any], ids: list[str]) -> float:
    begun = time.perf_counter()
    for one in ids:
        call(one)
    return time.perf_counter() - begun


def _run_async(call: Callable[[str], Any], ids: list[str]) -> float:
    async def calls() -> float:
        begun = time.perf_counter()
        for one in ids:
            await call(one)
        return time.perf_counter() - begun

    return runner().run(calls())


@functools.cache
def runner() -> asyncio.Runner:
    """The event loop of this process, which clients are bound to."""
    return asyncio.Runner()


def sync_rounds(store: str, contenders: dict[str, Contender], seconds: float) -> dict[str, dict[str, list[float]]]:
    """The timings of contenders that a caller has made."""
    return _rounds(store, contenders, _run_sync, seconds, set(contenders), {})


def _rounds(
    store: str, contenders: dict[str, Contender], run: Runner, seconds: float, needed: set[str], missing: dict[str, str]
) -> dict[str, dict[str, list[float]]]:
    known = uuid.uuid4().hex
    block = {}
    for name, one in list(contenders.items()):
        try:
            if one.first is not None:
                run(one.first, [known])
                run(one.first, [uuid.uuid4().hex for _ in range(10)])  # connections, scripts and prepared statements
            run(one.replay, _known(one, known, 10))
            fresh = _known(one, known, 4) if one.first is None else [uuid.uuid4().hex for _ in range(4)]
            mean = run(one.first or one.replay, fresh) / 4
        except Exception as error:
            if name in needed:
                raise
            missing[name] = f"{type(error).__name__}: {error}"
            del contenders[name]
        else:
            block[name] = max(_FEW, min(_BLOCK[store], int(_TURN / mean)))
    turns = [(name, kind) for name, one in contenders.items() for kind in KINDS if getattr(one, kind) is not None]
    took: dict[str, dict[str, list[float]]] = {kind: {name: [] for name, own in turns if own == kind} for kind in KINDS}
    until = time.monotonic() + seconds
    gc.collect()
    while True:
        random.shuffle(turns)
        for name, kind in turns:
            number = block[name]
            one = contenders[name]
            ids = _known(one, known, number) if kind == "replay" else [uuid.uuid4().hex for _ in range(number)]
            call = getattr(one, kind)
            run(call, ids[:2])  # others had the processor's caches
            took[kind][name].append(run(call, ids[2:] or ids) / (number - 2))
        if time.monotonic() >= until:
            return took


def _known(one: Contender, hot: str, number: int) -> list[str]:
    """Orders to replay."""
    return [hot] * number if one.known is None else [one.known() for _ in range(number)]


def summary(timings: Timings) -> Result:
    """For JSON and tables: microseconds at the median, and quartiles of the ratios to the floor within a round."""
    found: Result = {"floor": timings.floor, "floors": timings.floors, "missing": timings.missing, "kinds": {}}
    for kind, took in timings.took.items():
        found["kinds"][kind] = {}
        for name, own in took.items():
            base = took[timings.floors.get(name, timings.floor)]
            ratios = [one / floor for one, floor in zip(own, base, strict=True)]
            found["kinds"][kind][name] = {
                "micros": quantile(own, 0.5) * 1e6,
                "ratio": [quantile(ratios, share) for share in (0.25, 0.5, 0.75)],
                "rounds": len(own),
            }
    return found
