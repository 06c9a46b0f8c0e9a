"""What the worker processes of the lock benchmark do; instants are monotonic seconds, which all processes share."""

import asyncio
import functools
import mmap
import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks._lock_peers import ASYNC, SYNC, WAITING

__all__ = ["Block", "Turn", "Usage", "Work", "count_alone", "use_alone", "wait_in_line"]

HOLD = 0.001
"""Seconds that a critical section takes at the least."""
_COLD, _PAIRS = 5, 40
"""Acquisitions and releases that open a block, and those after them that count."""


class Usage(NamedTuple):
    """One acquisition."""

    asked: float
    got: float
    """`acquire` has returned."""
    left: float
    """`release` is about to be called."""
    token: int | None


class Turn(NamedTuple):
    """What one thread is to do: from `begin` on acquire, hold until `hold_until`, release; again until `end`."""

    begin: float
    hold_until: float = 0.0
    end: float = 0.0


class Work(NamedTuple):
    """What one thread did."""

    usages: list[Usage]
    errors: list[str]


class Block(NamedTuple):
    """Seconds that an acquisition with its release took."""

    cold: float
    """The first, after others had the processor's caches."""
    warm: float
    """The mean of many."""


def use_alone(url: str, name: str, seconds: float, is_async: bool) -> dict[str, list[Block]]:
    """For `seconds`, rounds of one block for each lock, in random order."""
    return _runner().run(_alone_async(url, name, seconds)) if is_async else _alone(url, name, seconds)


@functools.cache
def _runner() -> asyncio.Runner:
    """The event loop of this process, which the clients are bound to."""
    return asyncio.Runner()


def _alone(url: str, name: str, seconds: float) -> dict[str, list[Block]]:
    locks = [(peer, make(url, f"{name}:{peer}")) for peer, make in SYNC.items()]

    def pairs(lock: Any, number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            with lock:
                pass
        return (time.perf_counter() - begin) / number

    for _, lock in locks:
        pairs(lock, _COLD)  # connects, and loads scripts
    took: dict[str, list[Block]] = {peer: [] for peer in SYNC}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        random.shuffle(locks)
        for peer, lock in locks:
            cold = pairs(lock, 1)
            pairs(lock, _COLD - 1)
            took[peer].append(Block(cold, pairs(lock, _PAIRS)))
    return took


async def _alone_async(url: str, name: str, seconds: float) -> dict[str, list[Block]]:
    locks = [(peer, make(url, f"{name}:{peer}")) for peer, make in ASYNC.items()]

    async def pairs(lock: Any, number: int) -> float:
        begin = time.perf_counter()
        for _ in range(number):
            async with lock:
                pass
        return (time.perf_counter() - begin) / number

    for _, lock in locks:
        await pairs(lock, _COLD)
    took: dict[str, list[Block]] = {peer: [] for peer in ASYNC}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        random.shuffle(locks)
        for peer, lock in locks:
            cold = await pairs(lock, 1)
            await pairs(lock, _COLD - 1)
            took[peer].append(Block(cold, await pairs(lock, _PAIRS)))
    return took


def count_alone(url: str, name: str, peer: str, times: int) -> None:
    """Acquire and release `times` times."""
    lock = WAITING[peer](url, name)
    for _ in range(times):
        with lock:
            pass


def wait_in_line(url: str, name: str, peer: str, counter: Path, turns: Sequence[Turn]) -> list[Work]:
    """Take the turns, each in a thread of its own.

    Whoever holds the lock adds one to the number in the file `counter`, by a read when it begins and a write when it
    ends: two holders at once lose an update.
    """
    with counter.open("r+b") as file, mmap.mmap(file.fileno(), 8) as number:
        work: list[Work] = [Work([], []) for _ in turns]
        threads = [
            threading.Thread(target=_take_turn, args=(WAITING[peer], url, name, number, turn, done))
            for turn, done in zip(turns, work, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return work


def _take_turn(make: Callable[[str, str], Any], url: str, name: str, number: mmap.mmap, turn: Turn, done: Work) -> None:
    lock = make(url, name)
    _sleep_until(turn.begin)
    while True:
        asked = time.monotonic()
        try:
            with lock as hold:
                got = time.monotonic()
                (seen,) = struct.unpack("q", number[:8])
                _sleep_until(max(got + HOLD, turn.hold_until))
                number[:8] = struct.pack("q", seen + 1)
                left = time.monotonic()
                done.usages.append(Usage(asked, got, left, getattr(hold, "token", None)))
        except Exception as error:
            done.errors.append(repr(error))
        if time.monotonic() >= turn.end:
            return


def _sleep_until(instant: float) -> None:
    left = instant - time.monotonic()
    if left > 0:
        time.sleep(left)
