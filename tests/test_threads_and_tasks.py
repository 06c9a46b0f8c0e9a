"""What calls cost in threads and tasks: none each, and a few for the process."""

import _thread
import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from colours import Colour
from probes import Counter

from idempotent import idempotent

CALLS = 200
FEW = 10
"""A heartbeat has up to eight threads, a listener one."""


@contextlib.contextmanager
def threads_started() -> Iterator[list[str]]:
    """The threads that are started meanwhile, by name, whoever starts them."""
    started: list[str] = []
    start, start_bare = threading.Thread.start, _thread.start_new_thread

    def noted(thread: threading.Thread) -> None:
        started.append(thread.name)
        start(thread)

    def noted_bare(function: Any, *args: Any) -> int:
        started.append(repr(function))
        return start_bare(function, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", noted)
        patch.setattr(_thread, "start_new_thread", noted_bare)
        yield started


class Tasks:
    """The tasks that are made on a loop, by the names of their coroutines."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **how: Any) -> Any:
        self.made.append(getattr(coroutine, "__qualname__", repr(coroutine)))
        return asyncio.Task(coroutine, loop=loop, **how)


def charging(colour: Colour, effects: Counter, **options: Any) -> Any:
    def charge(order: int) -> int:
        return effects.hit()

    async def charge_async(order: int) -> int:
        return effects.hit()

    return idempotent(key="{order}", namespace="charge", **options)(charge_async if colour.is_async else charge)


def call_all(colour: Colour, charge: Any, tasks: Tasks) -> list[list[str]]:
    """First calls, and replays of them; the tasks that either made, beside the one that makes the calls."""
    made: list[list[str]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(tasks)
        for _ in range(2):
            tasks.made.clear()
            assert [await charge(order) for order in range(CALLS)] == [*range(1, CALLS + 1)]
            made.append([*tasks.made])

    if colour.is_async:
        asyncio.run(main())
    else:
        for _ in range(2):
            assert [charge(order) for order in range(CALLS)] == [*range(1, CALLS + 1)]
    return made


def test_calls_start_no_thread_each(backend_url: str, colour: Colour, effects: Counter) -> None:
    charge = charging(colour, effects, backend=backend_url)
    with threads_started() as started:
        call_all(colour, charge, Tasks())
    assert len(started) <= FEW


def test_what_counts_threads_counts_one_for_each_call(effects: Counter) -> None:
    def hit_in_a_thread(order: int) -> int:
        thread = threading.Thread(target=effects.hit)
        thread.start()
        thread.join()
        _thread.start_new_thread(effects.hit, ())
        return 0

    with threads_started() as started:
        for order in range(3):
            hit_in_a_thread(order)
    assert len(started) == 6


@pytest.mark.parametrize(
    ("backend_url", "most"),
    [("local", 0), ("redis", 0), ("postgres", FEW), ("mariadb", FEW)],  # of SQL drivers, some connect in a task
    indirect=["backend_url"],
)
def test_calls_make_no_task_each(backend_url: str, most: int, effects: Counter) -> None:
    tasks = Tasks()
    first, replays = call_all(Colour("async"), charging(Colour("async"), effects, backend=backend_url), tasks)
    assert len(first) <= most
    assert replays == []
    assert tasks.made != []  # the loop's end makes some, and they are counted
