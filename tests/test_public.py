"""The public surface: every promised name is there, documented, and cheap to import."""

import inspect
import subprocess
import sys

import pytest

import idempotent as package

PROMISED = [
    *("idempotent", "configure", "open_backend", "new_key", "current_call"),
    *("LocalBackend", "RedisBackend", "SQLBackend", "Backend"),
    *("Applied", "NotApplied", "StillUnknown", "Call", "Outcome", "Explanation", "Record"),
    *("key_for", "with_key", "outcome", "explain", "peek", "forget", "resolve", "stats"),
    *("PickleSerializer", "Compressed", "Encrypted", "Serializer"),
    *("Event", "Hook", "log_event"),
    *("IdempotencyError", "CallError", "KeyRequired", "UnstableKey", "InvalidKey", "FingerprintMismatch"),
    *("InProgress", "OutcomeError", "OutcomeUnknown", "ResultUnavailable", "LeaseLost", "SerializationError"),
    *("BackendError", "BackendUnavailable", "LockError", "LockTimeout", "LockLost", "NotHeld"),
    *("ProcessLocalWarning", "UnprotectedWarning", "ResultTypeWarning"),
]


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_name_is_importable_and_documented(name: str) -> None:
    value = getattr(package, name)
    assert name in dir(package)
    if name != "Hook":
        assert inspect.getdoc(value)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_all_names_what_a_star_import_gives_without_extras() -> None:
    assert set(package.__all__) >= set(PROMISED) - {"SQLBackend"}
    assert "SQLBackend" not in package.__all__


def test_every_method_of_a_decorated_function_is_there_in_both_colours() -> None:
    @package.idempotent
    def sync() -> int:
        return 1

    @package.idempotent
    async def coroutine() -> int:
        return 1

    for function in (sync, coroutine):
        for name in ("key_for", "with_key", "outcome", "explain", "peek", "forget", "resolve", "stats", "__wrapped__"):
            assert callable(getattr(function, name))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import idempotent", "redis sqlalchemy msgspec pydantic hypothesis asyncio orjson cachetools"),
        ("from idempotent import idempotent, configure", "redis sqlalchemy pydantic hypothesis asyncio"),
        ("from idempotent import *", "sqlalchemy pydantic hypothesis"),
    ],
)
def test_importing_pulls_in_nothing_heavy(statement: str, absent: str) -> None:
    code = f"import sys\n{statement}\nprint([name for name in {absent.split()!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
