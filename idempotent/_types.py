"""What decorated functions look like to callers and type checkers, and what they return besides their result."""

from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, Literal, ParamSpec, Protocol, Self, TypeVar, overload

from idempotent._record import Record
from idempotent.events import Counted

__all__ = ["AsyncIdempotent", "Decision", "Explanation", "Idempotent", "Outcome", "Stats"]

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Decision = Literal["would_run", "would_replay", "would_wait", "would_refuse"]


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R_co]):
    """How a call was answered."""

    value: R_co
    """What the call returns."""
    replayed: bool
    """True: from a record, by this call's duplicate; False: this call ran the function."""
    stored: bool
    """False: the backend could not record the outcome, so a later call may run the function again."""
    key: str
    """The key, without its namespace."""
    token: int
    """The fencing token of the run; 0 for a run without a claim."""
    age: float
    """Seconds since the outcome was recorded; 0.0 for the run itself."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a call would do, and why. `str()` of it is a sentence for people."""

    key: str
    """The key, without its namespace."""
    record: Record | None
    """The record under the key; None: there is none."""
    decision: Decision
    """What the call would do now. Where `on_crash` is a probe, "would_refuse" for a record in doubt means that the
    probe would be asked: its answer decides, and explaining asks nobody.
    """
    reason: str
    """Why, in words."""

    def __str__(self) -> str:
        return f"key {self.key!r}: {self.decision.replace('_', ' ')}, as {self.reason}"


class Stats(dict[Counted, int]):
    """Counts of events of one function in this process; what was only observed is counted as `would_...`, instead.

    It may be awaited as well, so that the methods of an async function can all be used alike.
    """

    def __await__(self) -> Generator[Any, None, "Stats"]:
        async def given() -> "Stats":
            return self

        return given().__await__()


class Idempotent(Protocol[P, R_co]):
    """A decorated sync function. At runtime it is a plain function with these attributes.

    The attributes of a method are called through the class, with the instance as the first argument.
    """

    @property
    def __name__(self) -> str: ...

    @property
    def __wrapped__(self) -> Callable[P, R_co]:
        """The function itself, undecorated."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: "Idempotent[Concatenate[Any, Q], R]", instance: object, owner: type | None = None
    ) -> Callable[Q, R]: ...

    def key_for(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """The key of this call, without its namespace; the same text in every process."""
        ...

    def with_key(self, key: str) -> "Idempotent[P, R_co]":
        """This function with the key given by the caller; the fingerprint still holds.

        Raises KeyRequired for an empty key, InvalidKey for one that is too long or holds control characters.
        """
        ...

    def outcome(self, *args: P.args, **kwargs: P.kwargs) -> Outcome[R_co]:
        """Call, and tell how the call was answered. Raises what the call raises."""
        ...

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Explanation:
        """What this call would do now; runs nothing, writes nothing, asks no probe."""
        ...

    def peek(self, *args: Any, **kwargs: Any) -> Record | None:
        """The record under this call's key; None: there is none. After `with_key` the arguments may be left out."""
        ...

    def forget(self, *args: Any, force: bool = False, **kwargs: Any) -> bool:
        """Remove the record under this call's key, so that the next call runs; whether there was one.

        After `with_key` the arguments may be left out. Raises InProgress for a running record unless `force`: then
        the next call runs beside the running one.
        """
        ...

    def resolve(
        self, key: str, *, result: Any = ..., error: Exception | None = None, not_applied: bool = False
    ) -> bool:
        """Settle the unknown record under `key` by hand, with exactly one of the three.

        Args:
            key: the key, as `key_for` gives it.
            result: what the dead run would have returned; it is replayed from now on.
            error: an error of a class that `error_ttl` names; it is replayed from now on.
            not_applied: the effect did not happen; the next call runs.

        Returns False if another settled it in the same moment. Raises InProgress for a live runner, CallError for a
        record that is absent or settled.
        """
        ...

    def stats(self) -> Stats:
        """How often each event happened to calls of this function, in this process."""
        ...


class AsyncIdempotent(Protocol[P, R_co]):
    """A decorated async function: as Idempotent, with coroutines for methods but for `key_for` and `with_key`."""

    @property
    def __name__(self) -> str: ...

    @property
    def __wrapped__(self) -> Callable[P, Coroutine[Any, Any, R_co]]:
        """The function itself, undecorated."""
        ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R_co]: ...

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(
        self: "AsyncIdempotent[Concatenate[Any, Q], R]", instance: object, owner: type | None = None
    ) -> Callable[Q, Coroutine[Any, Any, R]]: ...

    def key_for(self, *args: P.args, **kwargs: P.kwargs) -> str:
        """As Idempotent.key_for."""
        ...

    def with_key(self, key: str) -> "AsyncIdempotent[P, R_co]":
        """As Idempotent.with_key."""
        ...

    def outcome(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Outcome[R_co]]:
        """As Idempotent.outcome."""
        ...

    def explain(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, Explanation]:
        """As Idempotent.explain."""
        ...

    def peek(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Record | None]:
        """As Idempotent.peek."""
        ...

    def forget(self, *args: Any, force: bool = False, **kwargs: Any) -> Coroutine[Any, Any, bool]:
        """As Idempotent.forget."""
        ...

    def resolve(
        self, key: str, *, result: Any = ..., error: Exception | None = None, not_applied: bool = False
    ) -> Coroutine[Any, Any, bool]:
        """As Idempotent.resolve."""
        ...

    def stats(self) -> Stats:
        """As Idempotent.stats; may be awaited."""
        ...


class Decorator(Protocol):
    """What `idempotent(...)` with options returns."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncIdempotent[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Idempotent[P, R]: ...


class ForgetfulDecorator(Protocol):
    """What `idempotent(keep_result=False)` returns: replays give None."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncIdempotent[P, R | None]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Idempotent[P, R | None]: ...
