"""200 duplicates of one call of a function that takes 50 ms: how often it ran, who got its answer, and how soon.

What is not exactly one run and 200 answers is what a peer gets wrong; its speed is worth nothing then.
"""

import asyncio
import logging
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks._calls import runner
from benchmarks._peers import guards_of
from benchmarks._work import AMOUNT, Slow, is_receipt

__all__ = ["Storm", "duplicate", "prepare", "verdict"]

SECONDS = 0.05
"""What the function takes."""


class Storm(NamedTuple):
    """What one process saw; instants are monotonic seconds, which all processes share."""

    runs: int
    answers: int
    """Callers that got the function's result."""
    errors: dict[str, int]
    """By class, of those that did not; "another result" among them."""
    ended: float
    """When the last run ended; 0.0 if none was in this process."""
    last: float
    """When the last caller had its answer."""


_guarded: dict[tuple[str, str, str], tuple[Slow, Callable[[str, int], Any]]] = {}


def prepare(store: str, colour: str, url: str, peer: str) -> None:
    """Set a peer up in this process, with its connections, before anything is counted."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if (store, colour, peer) not in _guarded:
        slow = Slow(SECONDS)
        guard = guards_of(store, colour)[0][peer]
        call = guard(url, slow.function(colour))
        _guarded[store, colour, peer] = slow, call


def duplicate(store: str, colour: str, peer: str, order_id: str, callers: int, start: float) -> Storm:
    """`callers` duplicates in this process, all from monotonic `start` on."""
    slow, call = _guarded[store, colour, peer]
    slow.ended.clear()
    if colour == "async":
        return runner().run(_tasks(slow, call, order_id, callers, start))
    return _threads(slow, call, order_id, callers, start)


def _threads(slow: Slow, call: Callable[[str, int], Any], order_id: str, callers: int, start: float) -> Storm:
    seen: list[tuple[str | None, float]] = []

    def one() -> None:
        time.sleep(max(0.0, start - time.monotonic()))
        fault: str | None
        try:
            fault = None if is_receipt(call(order_id, AMOUNT), order_id) else "another result"
        except Exception as error:
            fault = type(error).__name__
        seen.append((fault, time.monotonic()))

    threads = [threading.Thread(target=one) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _storm(slow, seen)


async def _tasks(slow: Slow, call: Callable[[str, int], Any], order_id: str, callers: int, start: float) -> Storm:
    seen: list[tuple[str | None, float]] = []

    async def one() -> None:
        fault: str | None
        try:
            fault = None if is_receipt(await call(order_id, AMOUNT), order_id) else "another result"
        except Exception as error:
            fault = type(error).__name__
        seen.append((fault, time.monotonic()))

    await asyncio.sleep(max(0.0, start - time.monotonic()))
    await asyncio.gather(*(one() for _ in range(callers)))
    return _storm(slow, seen)


def _storm(slow: Slow, seen: list[tuple[str | None, float]]) -> Storm:
    faults = Counter(fault for fault, _ in seen if fault is not None)
    ended = max(slow.ended, default=0.0)
    return Storm(len(slow.ended), len(seen) - faults.total(), dict(faults), ended, max(at for _, at in seen))


def verdict(storms: list[Storm]) -> dict[str, Any]:
    """Of all processes of one storm: runs, answers, errors, and milliseconds from the last run's end to the last answer."""
    errors: Counter[str] = Counter()
    for storm in storms:
        errors.update(storm.errors)
    ended, last = max(storm.ended for storm in storms), max(storm.last for storm in storms)
    return {
        "runs": sum(storm.runs for storm in storms),
        "answers": sum(storm.answers for storm in storms),
        "errors": dict(errors),
        "last_ms": (last - ended) * 1000 if ended else None,
    }
