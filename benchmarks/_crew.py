"""Worker processes that run a function each, at the same time: what is measured happens in them."""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

__all__ = ["Crew"]

T = TypeVar("T")

_PATIENCE = 120.0
"""Seconds that an order may take beyond what it says."""


class Crew:
    """`size` new processes, which live until the `with` block ends.

    Args:
        size: how many.
        cpus: where they may run; None: anywhere.
    """

    def __init__(self, size: int, cpus: set[int] | None = None) -> None:
        context = multiprocessing.get_context("spawn")  # none of the parent's threads and connections
        self._lines: list[Any] = []
        self._processes = []
        heed = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: we hear Ctrl-C, and end them
        try:
            for _ in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, cpus), daemon=True)
                process.start()
                theirs.close()
                self._lines.append(ours)
                self._processes.append(process)
        finally:
            signal.signal(signal.SIGINT, heed)

    def run(self, function: Callable[..., T], orders: Sequence[tuple[Any, ...]], seconds: float = 0.0) -> list[T]:
        """`function(*order)` for each order in a process of its own, all at once; their results, in order.

        Args:
            function: of a module's top level.
            orders: at most one for each process.
            seconds: how long it is meant to take.

        Raises:
            RuntimeError: one of them failed.
            TimeoutError: one of them hangs.
        """
        lines = self._lines[: len(orders)]
        for line, order in zip(lines, orders, strict=True):
            line.send((function, order))
        results: list[T] = []
        failures = []
        for line in lines:  # all of them, so that the next order's replies are not mistaken for these
            if not line.poll(seconds + _PATIENCE):
                raise TimeoutError(f"{function.__name__} hangs")
            failure, result = line.recv()
            failures += [] if failure is None else [failure]
            results.append(result)
        if failures:
            raise RuntimeError(f"a worker failed:\n{failures[0]}")
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.join(0 if error else 2)
            process.kill()
            process.join()


def _work(line: Any, cpus: set[int] | None) -> None:
    if cpus is not None:
        os.sched_setaffinity(0, cpus)
    try:
        while True:
            function, order = line.recv()
            line.send(_outcome(function, order))
    except (EOFError, OSError):  # the parent is done, or gone
        return


def _outcome(function: Callable[..., T], order: tuple[Any, ...]) -> tuple[str | None, T | None]:
    """A failure's traceback, or the result."""
    try:
        return None, function(*order)
    except Exception:
        return traceback.format_exc(), None
