"""What a function under test counts its effects with, and what it waits at; and how a test waits."""

import threading
import time
from collections.abc import Callable
from typing import Any


class Counter:
    """Counts the effects of a function under test."""

    def __init__(self) -> None:
        self.count = 0
        lock = threading.Lock()

        def hit() -> int:  # no method: the calls of one would have to say what identifies its instance
            with lock:
                self.count += 1
                return self.count

        self.hit = hit


class Gate:
    """Holds a function inside until the test lets it go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        assert self.opened.wait(30)


def eventually(holds: Callable[[], Any], seconds: float = 20) -> Any:
    """The first true answer of `holds`, asked until `seconds` are over."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.005)
    return answer
