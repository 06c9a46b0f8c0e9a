"""The tree of errors: as drawn, fit for logs, and the same in another process."""

import copy
import pickle
import re
from typing import Any

import pytest

from idempotent import errors
from idempotent.errors import (
    BackendError,
    BackendUnavailable,
    CallError,
    FingerprintMismatch,
    IdempotencyError,
    InProgress,
    InvalidKey,
    KeyRequired,
    LeaseLost,
    LockError,
    LockLost,
    LockTimeout,
    NotHeld,
    OutcomeError,
    OutcomeUnknown,
    ProcessLocalWarning,
    ResultTypeWarning,
    ResultUnavailable,
    SerializationError,
    StepMismatch,
    UnprotectedWarning,
    UnstableKey,
)

DIGEST = "a744fc4181cfb218dd9edd7b9433b5b6370fadd63d1c90be"

MADE: list[IdempotencyError] = [
    IdempotencyError("said"),
    CallError("said"),
    KeyRequired("said"),
    UnstableKey("said"),
    InvalidKey("said"),
    FingerprintMismatch(DIGEST, age=1.5, stored="aa", given="bb"),
    StepMismatch(DIGEST, step="charge", place=0, same_name=True),
    InProgress(DIGEST, retry_after=2.5, detail="why"),
    OutcomeError("said"),
    OutcomeUnknown(DIGEST, age=3.5),
    ResultUnavailable(DIGEST, reason="another codec"),
    LeaseLost(DIGEST, token=7),
    SerializationError("said"),
    BackendError("said"),
    BackendUnavailable("said"),
    LockError("said"),
    LockTimeout("said"),
    LockLost("said"),
    NotHeld("said"),
]
KEYED = [error for error in MADE if hasattr(error, "key_digest")]
WARNINGS: list[type[Warning]] = [ProcessLocalWarning, UnprotectedWarning, ResultTypeWarning]


def class_name(error: Any) -> str:
    return type(error).__name__


def drawn_tree() -> dict[str, str | None]:
    """Each error of the drawing with the one it hangs on."""
    above: dict[int, str] = {}
    tree: dict[str, str | None] = {}
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line)
        if drawn:
            depth = len(drawn[1]) // 4
            above[depth] = drawn[2]
            tree[drawn[2]] = above[depth - 1] if depth else None
    return tree


def is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, IdempotencyError)


def test_the_tree_is_as_drawn() -> None:
    tree = drawn_tree()
    assert len(tree) == 19
    for name, parent in tree.items():
        bases = [base.__name__ for base in getattr(errors, name).__bases__ if is_error(base)]
        assert bases == ([] if parent is None else [parent]), name


def test_every_error_is_in_the_drawing_and_every_name_is_public() -> None:
    defined = {name for name, kind in vars(errors).items() if is_error(kind)}
    assert defined == set(drawn_tree())
    assert defined | {kind.__name__ for kind in WARNINGS} == set(errors.__all__)
    assert {class_name(error) for error in MADE} == defined


def test_a_lock_timeout_is_a_timeout_error() -> None:
    with pytest.raises(TimeoutError, match="said"):
        raise LockTimeout("said")


def test_an_unavailable_backend_can_be_told_from_a_caller_who_is_wrong() -> None:
    assert not issubclass(BackendUnavailable, CallError)
    assert not issubclass(BackendUnavailable, OSError)


@pytest.mark.parametrize("kind", WARNINGS)
def test_a_warning_is_no_error_of_the_tree_and_shown_by_default(kind: type[Warning]) -> None:
    assert issubclass(kind, UserWarning)
    assert not issubclass(kind, IdempotencyError)


@pytest.mark.parametrize("error", MADE, ids=class_name)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_comes_out_of_another_process_as_it_went_in(error: IdempotencyError, protocol: int) -> None:
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert back.args == error.args
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", MADE, ids=class_name)
def test_an_error_can_be_copied(error: IdempotencyError) -> None:
    back = copy.copy(error)
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("error", MADE, ids=class_name)
def test_a_note_travels_with_the_error(error: IdempotencyError) -> None:
    error = copy.copy(error)
    error.add_note("the release failed")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["the release failed"]


def test_an_error_of_a_subclass_with_data_of_its_own_travels_too() -> None:
    back = pickle.loads(pickle.dumps(Declined("o1", shop="s1")))
    assert (type(back), str(back), back.key_digest, back.shop) == (Declined, str(Declined("o1", shop="s1")), "o1", "s1")


class Declined(InProgress):
    def __init__(self, key_digest: str, *, shop: str) -> None:
        super().__init__(key_digest, retry_after=1.0)
        self.shop = shop


def test_the_value_that_could_not_be_kept_stays_with_its_own_caller() -> None:
    error = ResultUnavailable(DIGEST, reason="it cannot be encoded", result=lambda: "card 4242")
    back = pickle.loads(pickle.dumps(error))
    assert error.result is not None
    assert back.result is None
    assert (back.key_digest, back.reason, str(back)) == (DIGEST, "it cannot be encoded", str(error))


@pytest.mark.parametrize("error", KEYED, ids=class_name)
def test_an_error_names_the_key_by_its_digest(error: Any) -> None:
    assert error.key_digest == DIGEST
    assert DIGEST in str(error)


def test_every_error_about_a_key_takes_its_digest() -> None:
    assert {class_name(error) for error in KEYED} == {
        "FingerprintMismatch",
        "StepMismatch",
        "InProgress",
        "OutcomeUnknown",
        "ResultUnavailable",
        "LeaseLost",
    }


def test_no_error_tells_of_a_result() -> None:
    error = ResultUnavailable(DIGEST, reason="it cannot be encoded", result="card 4242")
    assert "4242" not in str(error)
    assert "4242" not in repr(error)


def test_an_error_writes_its_message_from_its_data() -> None:
    mismatch = FingerprintMismatch(DIGEST, age=1.52, stored="aa", given="bb")
    assert (mismatch.age, mismatch.stored, mismatch.given) == (1.52, "aa", "bb")
    assert "1.5 s ago" in str(mismatch)
    assert "fingerprint aa, now bb" in str(mismatch)
    running = InProgress(DIGEST, retry_after=2.52)
    assert running.retry_after == 2.52
    assert str(running).endswith("retry in 2.5 s")
    assert str(InProgress(DIGEST, retry_after=2.5, detail="why")).endswith("retry in 2.5 s (why)")
    unknown = OutcomeUnknown(DIGEST, age=3.5)
    assert unknown.age == 3.5
    assert "3.5 s ago" in str(unknown)
    lost = LeaseLost(DIGEST, token=7)
    assert lost.token == 7
    assert "token 7" in str(lost)
    unavailable = ResultUnavailable(DIGEST, reason="another codec")
    assert (unavailable.reason, unavailable.result) == ("another codec", None)
    assert str(unavailable).endswith("another codec")
