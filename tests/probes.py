"""What a function under test counts its effects with, and what it waits at."""

import threading


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
