"""Every error and warning the library raises of its own accord.

    IdempotencyError
    ├── CallError                what the caller did
    │   ├── KeyRequired          the key function gave None or an empty key
    │   ├── UnstableKey          an argument has no stable canonical form
    │   ├── InvalidKey           too long, control characters, not text
    │   ├── FingerprintMismatch  this key was used with other arguments           (HTTP 422)
    │   └── StepMismatch         a rerun asks for other steps than were recorded
    ├── InProgress               the first call is still running                  (HTTP 409, Retry-After)
    ├── OutcomeError
    │   ├── OutcomeUnknown       a runner died and on_crash says not to guess     (HTTP 409)
    │   ├── ResultUnavailable    it ran, but its result cannot be given           (HTTP 409)
    │   └── LeaseLost            this run outlived its lease and another took over
    ├── SerializationError       the annotation or the value cannot be served
    ├── BackendError             the backend answered, and not as a backend should
    │   └── BackendUnavailable   the claim could not be confirmed; nothing ran    (HTTP 503)
    └── LockError
        ├── LockTimeout          wait ran out (also a TimeoutError)
        ├── LockLost             the lease ended while the body ran
        └── NotHeld              released twice, or by someone who does not hold it

Errors are built from data and write their own message. None of them holds a stored
result, an argument or a readable key: keys appear as digests, so that an error may be logged.
"""

from typing import Any

__all__ = [
    "BackendError",
    "BackendUnavailable",
    "CallError",
    "FingerprintMismatch",
    "IdempotencyError",
    "InProgress",
    "InvalidKey",
    "KeyRequired",
    "LeaseLost",
    "LockError",
    "LockLost",
    "LockTimeout",
    "NotHeld",
    "OutcomeError",
    "OutcomeUnknown",
    "ProcessLocalWarning",
    "ResultTypeWarning",
    "ResultUnavailable",
    "SerializationError",
    "StepMismatch",
    "UnprotectedWarning",
    "UnstableKey",
]


class IdempotencyError(Exception):
    """The root of every error of this library."""

    # Errors cross process borders (Celery, multiprocessing); they are rebuilt from their keyword data.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[IdempotencyError], args: tuple[Any, ...], data: dict[str, Any]) -> IdempotencyError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(data)
    return error


class CallError(IdempotencyError):
    """The call itself cannot be served as it stands; nothing ran."""


class KeyRequired(CallError):
    """The key function gave None or an empty key, or a template met None."""


class UnstableKey(CallError):
    """An argument has no stable canonical form, so no two calls could be told to be the same."""


class InvalidKey(CallError):
    """The key is too long, holds control characters, or is not text."""


class FingerprintMismatch(CallError):
    """This key was used before with other arguments. Nothing ran, nothing was replayed.

    Attributes:
        key_digest: digest of namespace and key.
        age: seconds since the record reached its present state.
        stored: hex digest of the arguments the key was first used with.
        given: hex digest of the arguments of this call.
    """

    def __init__(self, key_digest: str, *, age: float, stored: str, given: str) -> None:
        super().__init__(
            f"key {key_digest} was used {age:.1f} s ago with other arguments"
            f" (fingerprint {stored}, now {given}); use a new key for a new operation,"
            " or leave varying parameters out with ignore="
        )
        self.key_digest = key_digest
        self.age = age
        self.stored = stored
        self.given = given


class StepMismatch(CallError):
    """A run asks for another step than an earlier run of its key began at this place. The step did not run.

    Raised inside the function, so the key is released, and what was recorded stays: put the old order of steps and
    their arguments back, or settle by hand what they did and `forget` the key.

    Attributes:
        key_digest: digest of namespace and key of the call.
        step: the name that was asked for.
        place: how many steps were done before it.
    """

    def __init__(self, key_digest: str, *, step: str, place: int, same_name: bool) -> None:
        other = "this step with other arguments" if same_name else "another step"
        super().__init__(
            f"the call with key {key_digest} asks for the step {step!r} at place {place},"
            f" where an earlier run of it began {other}; it was not run"
        )
        self.key_digest = key_digest
        self.step = step
        self.place = place


class InProgress(IdempotencyError):
    """The first call with this key is still running, and `wait` ran out.

    Attributes:
        key_digest: digest of namespace and key.
        retry_after: seconds until the runner's lease ends unless it renews it.
    """

    def __init__(self, key_digest: str, *, retry_after: float, detail: str = "") -> None:
        super().__init__(
            f"a call with key {key_digest} is still running; retry in {retry_after:.1f} s"
            + (f" ({detail})" if detail else "")
        )
        self.key_digest = key_digest
        self.retry_after = retry_after


class OutcomeError(IdempotencyError):
    """The function ran or may have run, and its outcome cannot be given."""


class OutcomeUnknown(OutcomeError):
    """A runner died before its outcome was recorded, and `on_crash` says not to guess.

    Attributes:
        key_digest: digest of namespace and key.
        age: seconds since the record became unknown.
    """

    def __init__(self, key_digest: str, *, age: float) -> None:
        super().__init__(
            f"a call with key {key_digest} died {age:.1f} s ago and may or may not have taken effect;"
            " find out, then settle it with resolve(), or give on_crash= a probe"
        )
        self.key_digest = key_digest
        self.age = age


class ResultUnavailable(OutcomeError):
    """The function ran once and is recorded as done, but its result cannot be given.

    Attributes:
        key_digest: digest of namespace and key.
        result: the function's own value, for the caller whose call ran it; None for duplicates.
    """

    def __init__(self, key_digest: str, *, reason: str, result: Any = None) -> None:
        super().__init__(
            f"the call with key {key_digest} was done and will not run again, but its result is not available: {reason}"
        )
        self.key_digest = key_digest
        self.reason = reason
        self.result = result

    # The value is what could not be encoded, so it does not travel with the error either.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, {**self.__dict__, "result": None})


class LeaseLost(OutcomeError):
    """This run outlived its lease and another call took over; its own value is not returned.

    Attributes:
        key_digest: digest of namespace and key.
        token: the fencing token this run held.
    """

    def __init__(self, key_digest: str, *, token: int) -> None:
        super().__init__(
            f"the run of key {key_digest} with token {token} outlived its lease and another call took over;"
            " its outcome was not recorded. Raise lease=, and do not block the event loop in the function"
        )
        self.key_digest = key_digest
        self.token = token


class SerializationError(IdempotencyError):
    """A serializer cannot serve this annotation, this value or these bytes."""


class BackendError(IdempotencyError):
    """The backend answered as no backend of ours would (foreign bytes under a key, a missing table)."""


class BackendUnavailable(BackendError):
    """The backend could not be reached, or could not confirm the step, within its deadline."""


class LockError(IdempotencyError):
    """The lock cannot be used like this."""


class LockTimeout(LockError, TimeoutError):
    """`wait` ran out before the lock was free."""


class LockLost(LockError):
    """The lease ended while the body ran: it may have run unprotected."""


class NotHeld(LockError):
    """Released twice, or by someone who does not hold the lock."""


class ProcessLocalWarning(UserWarning):
    """No backend was configured: records live in this process only."""


class UnprotectedWarning(UserWarning):
    """The backend was out and `on_outage="run"` let the function run without a claim."""


class ResultTypeWarning(UserWarning):
    """A result comes back as another type than the function gave, for want of a fitting annotation."""
