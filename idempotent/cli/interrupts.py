"""Ctrl-C, where a command welcomes it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

__all__ = ["Interrupts"]


class Interrupts:
    """Ctrl-C, put off to where a command welcomes it: never while modules load, processes start, or it tidies up."""

    def __init__(self) -> None:
        self._seen = self._welcome = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self._seen = True
        if self._welcome:
            self._welcome = False  # a second one must not strike what the first has set off
            raise KeyboardInterrupt

    @contextmanager
    def welcome(self) -> Iterator[None]:
        """Where KeyboardInterrupt is raised, also for a Ctrl-C that came before."""
        self._welcome = True
        try:
            if self._seen:
                raise KeyboardInterrupt
            yield
        finally:
            self._welcome = False
