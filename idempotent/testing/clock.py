"""Time that tests can push on."""

import threading
import time
from collections.abc import Callable

from idempotent._options import Duration
from idempotent._options import seconds as duration
from idempotent.backends.base import micros

__all__ = ["VirtualClock"]


class VirtualClock:
    """The monotonic time, and as much more as a test lets pass. `LocalBackend(clock=VirtualClock())` lives in it.

        clock.advance(31)  # a lease of 30 seconds is over

    It runs on by itself, as waits end in real time, too.
    """

    def __init__(self) -> None:
        self._passed = 0
        self._lock = threading.Lock()
        self.wakes: list[Callable[[], None]] = []
        """Called after each `advance`: what waits may have waited long enough."""

    def __call__(self) -> int:
        """Whole microseconds."""
        return time.monotonic_ns() // 1000 + self._passed

    def now(self) -> float:
        """Seconds."""
        return self() / 1e6

    def advance(self, seconds: Duration) -> None:
        """Let seconds, or a timedelta, pass at once; any thread may call it. Raises ValueError for less than none."""
        passed = micros(duration("seconds", seconds, zero=True))
        with self._lock:
            self._passed += passed
        for wake in self.wakes:
            wake()
