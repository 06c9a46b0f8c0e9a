"""The Backend contract: what a store must do so that the protocol holds on it.

A backend keeps one row per record id and changes it only as `idempotent._machine` says: each command below is one
function of that module, applied atomically. A store that can run `on_claim` and its siblings under a lock or in a
compare-and-set loop is a correct backend.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from random import random
from time import monotonic
from types import TracebackType
from typing import Protocol, Self

from idempotent._record import Answer, Claim, Record, RecordId, Row, StateName

__all__ = ["Backend", "Copies", "Finder", "Heed", "micros", "poll"]


def micros(seconds: float) -> int:
    """A duration in whole microseconds, at least one."""
    return max(1, round(seconds * 1e6))


async def poll(holds: Callable[[], Awaitable[bool]], sleep: Callable[[float], Awaitable[None]], timeout: float) -> None:
    """Return when `holds()` no longer does, or after `timeout` seconds: for stores that cannot tell of changes.

    Looks after 5 ms first, then ever more seldom, up to four times a second, and never in step with others.
    """
    until = monotonic() + timeout
    pause = 0.005
    while await holds():
        left = until - monotonic()
        if left <= 0:
            return
        await sleep(min(left, pause * (0.5 + random())))
        pause = min(pause * 1.5, 0.25)


Finder = Callable[[str, bytes], tuple[Row, int] | None]
Heed = Callable[[], int]


class Copies(Protocol):
    """Copies of settled records."""

    def clear(self) -> None:
        """Drop them all: something was forgotten, or may have been."""
        ...


class Backend(ABC):
    """A store of records.

    All commands are `async def`, in both colours: those of `blocking()` never suspend (they block the thread), those
    of `asynchronous()` never block the event loop. All durations are seconds; the backend's own clock decides expiry.

    Each command is sent again by the backend itself, with the same attempt, when its reply may have been lost, and
    ends within `timeout` seconds in all, whatever the server does. It then raises BackendUnavailable; the step may or
    may not have been applied. A refused connection is told at once. Any other answer that a record store would not
    give (foreign bytes under the key, a missing table) is a BackendError. No driver's error escapes: it is the cause.
    """

    name: str = "backend"
    """A short word for logs and metrics: "local", "redis", "postgresql"."""

    timeout: float = 5.0
    """Seconds a command may take, its own re-sends included."""

    def blocking(self) -> "Backend":
        """The view of this store whose commands never suspend. Raises BackendError if it has none."""
        return self

    def asynchronous(self) -> "Backend":
        """The view of this store whose commands never block the loop. Raises BackendError if it has none."""
        return self

    def within(self, seconds: float) -> "Backend":
        """This view with commands that take at most `seconds`, for leases shorter than `timeout`; self where none waits."""
        return self

    def finder(self) -> Finder | None:
        """How to look at settled records without waiting for anything; None: there is no way.

        For stores in this process's memory. The look is given the text of a record's id and a fingerprint, and returns
        the row and the backend's time in microseconds where `claim` would reply Settled; None where it would not.
        """
        return None

    def heed(self, copies: Copies) -> Heed | None:
        """Have `copies` cleared whenever any process forgets a record; None: nobody tells. Keeps no reference that counts.

        Gives what is to be asked before each record that is then copied: a number that stays the same as long as nothing
        can have been missed; 0: nothing is heard at the moment.
        """
        return None

    @abstractmethod
    async def claim(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        fingerprint: bytes,
        lease: float,
        keep: float | None,
        takeover: bool,
        over: int | None = None,
        owner: bytes = b"",
    ) -> Claim:
        """Apply `_machine.on_claim` atomically and return its reply.

        Args:
            rid: the record.
            attempt: 8 random bytes; the same bytes when the command is sent again.
            fingerprint: 16 bytes, or b"" for none: then nothing is compared.
            lease: seconds until the claim lapses unless it is renewed.
            keep: seconds past the lease's end that the running record is kept; None: until it is settled.
            takeover: whether a lapsed lease is taken over (True) or makes the record unknown (False).
            over: the token of a lapsed or unknown record that this claim may take over all the same.
            owner: up to 200 bytes that `read` shows of who runs it, until it is settled.
        """

    @abstractmethod
    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        """Restart the lease from now (`_machine.on_renew`). Never makes a record where there is none."""

    @abstractmethod
    async def complete(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        """Record a result for `ttl` seconds from now (`_machine.on_settle`), and wake those who wait in `changed`.

        For `remember` seconds past the ttl the record is expired: claims are told so, its body is told to nobody, and
        is dropped at the latest by the first claim, or by a purge. 0: past the ttl the record is absent.
        """

    @abstractmethod
    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        """Record an error, otherwise as `complete`."""

    @abstractmethod
    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        """Give the record up (`_machine.on_release`), and wake those who wait in `changed`.

        With `unknown` the record stays and becomes unknown. With `token=None` an unconfirmed claim is withdrawn: it is
        recognised by its attempt, and where there is no record a tombstone keeps it from being applied later. There is one
        tombstone: a release that is sent again after another's claim was withdrawn finds that one's, and is told GONE.
        """

    @abstractmethod
    async def read(self, rid: RecordId) -> Record | None:
        """The record as it stands; None where there is none. Changes nothing."""

    @abstractmethod
    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        """Remove the record whatever its state (`_machine.on_forget`), and wake those who wait; a running one only with `force`.

        Returns the record that was found; where it is running and `force` is False, it is still there.
        """

    @abstractmethod
    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        """Return when the record may be no longer running under `token`, at the latest after `timeout` seconds.

        Returning early is allowed, missing a change is not: subscribe first, then look, then wait. It changes no record.
        Of several who wait for a lock the first alone may be told: who was woken claims, or calls `pass_on`. When the
        backend cannot be reached it waits a moment and returns; the caller's next claim tells.
        """

    async def pass_on(self, rid: RecordId) -> None:  # noqa: B027  most stores wake everyone who waits
        """Wake the next who waits in `changed` for a lock, if it is free: whoever waited here will not claim it.

        For stores that wake one of those who wait, and not all: where that one leaves without having claimed, it has
        taken the wake-up with it. Ends within half a second, or raises BackendUnavailable. Here: nothing.
        """

    @abstractmethod
    def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        """Every record of the call space, in no order; those that come or go meanwhile may be missing."""

    @abstractmethod
    async def purge(self, limit: int = 1000) -> int:
        """Drop up to `limit` records past their retention, and bodies past their ttl whose keys are remembered.

        Returns how many there were. 0 where the store does it itself.
        """

    def close(self) -> None:  # noqa: B027  a store may have nothing to release
        """Release connections and threads of the blocking view. May be called twice; the process exits cleanly without."""

    async def aclose(self) -> None:
        """Release what `close` does, and the connections of the running loop."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
