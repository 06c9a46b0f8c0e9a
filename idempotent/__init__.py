"""Functions that are safe to call twice: `from idempotent import idempotent`.

Names only; each is imported from its module when it is first used, so that `import idempotent` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idempotent._config import configure as configure
    from idempotent._config import open_backend as open_backend
    from idempotent._flow import Applied as Applied
    from idempotent._flow import NotApplied as NotApplied
    from idempotent._flow import StillUnknown as StillUnknown
    from idempotent._record import Record as Record
    from idempotent._run import Call as Call
    from idempotent._run import current_call as current_call
    from idempotent._types import AsyncIdempotent as AsyncIdempotent
    from idempotent._types import Explanation as Explanation
    from idempotent._types import Idempotent as Idempotent
    from idempotent._types import Outcome as Outcome
    from idempotent.backends.base import Backend as Backend
    from idempotent.backends.local import LocalBackend as LocalBackend
    from idempotent.backends.redis import RedisBackend as RedisBackend
    from idempotent.backends.sql import SQLBackend as SQLBackend
    from idempotent.decorator import explain as explain
    from idempotent.decorator import forget as forget
    from idempotent.decorator import idempotent as idempotent
    from idempotent.decorator import key_for as key_for
    from idempotent.decorator import outcome as outcome
    from idempotent.decorator import peek as peek
    from idempotent.decorator import resolve as resolve
    from idempotent.decorator import stats as stats
    from idempotent.decorator import with_key as with_key
    from idempotent.errors import BackendError as BackendError
    from idempotent.errors import BackendUnavailable as BackendUnavailable
    from idempotent.errors import CallError as CallError
    from idempotent.errors import FingerprintMismatch as FingerprintMismatch
    from idempotent.errors import IdempotencyError as IdempotencyError
    from idempotent.errors import InProgress as InProgress
    from idempotent.errors import InvalidKey as InvalidKey
    from idempotent.errors import KeyRequired as KeyRequired
    from idempotent.errors import LeaseLost as LeaseLost
    from idempotent.errors import LockError as LockError
    from idempotent.errors import LockLost as LockLost
    from idempotent.errors import LockTimeout as LockTimeout
    from idempotent.errors import NotHeld as NotHeld
    from idempotent.errors import OutcomeError as OutcomeError
    from idempotent.errors import OutcomeUnknown as OutcomeUnknown
    from idempotent.errors import ProcessLocalWarning as ProcessLocalWarning
    from idempotent.errors import ResultTypeWarning as ResultTypeWarning
    from idempotent.errors import ResultUnavailable as ResultUnavailable
    from idempotent.errors import SerializationError as SerializationError
    from idempotent.errors import StepMismatch as StepMismatch
    from idempotent.errors import UnprotectedWarning as UnprotectedWarning
    from idempotent.errors import UnstableKey as UnstableKey
    from idempotent.events import Event as Event
    from idempotent.events import Hook as Hook
    from idempotent.events import log_event as log_event
    from idempotent.keys import new_key as new_key
    from idempotent.lock import AsyncHold as AsyncHold
    from idempotent.lock import AsyncLock as AsyncLock
    from idempotent.lock import Hold as Hold
    from idempotent.lock import Lock as Lock
    from idempotent.lock import LockInfo as LockInfo
    from idempotent.lock import serialized as serialized
    from idempotent.otel import OpenTelemetryHook as OpenTelemetryHook
    from idempotent.prometheus import PrometheusHook as PrometheusHook
    from idempotent.serializers import Compressed as Compressed
    from idempotent.serializers import Encrypted as Encrypted
    from idempotent.serializers import PickleSerializer as PickleSerializer
    from idempotent.serializers import Serializer as Serializer

__version__ = "0.1.0"

_HOMES = {
    "_config": ("configure", "open_backend"),
    "_flow": ("Applied", "NotApplied", "StillUnknown"),
    "_run": ("Call", "current_call"),
    "_record": ("Record",),
    "_types": ("AsyncIdempotent", "Explanation", "Idempotent", "Outcome"),
    "backends.base": ("Backend",),
    "backends.local": ("LocalBackend",),
    "backends.redis": ("RedisBackend",),
    "backends.sql": ("SQLBackend",),
    "decorator": (
        "explain",
        "forget",
        "idempotent",
        "key_for",
        "outcome",
        "peek",
        "resolve",
        "stats",
        "with_key",
    ),
    "errors": (
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
    ),
    "events": ("Event", "Hook", "log_event"),
    "keys": ("new_key",),
    "lock": ("AsyncHold", "AsyncLock", "Hold", "Lock", "LockInfo", "serialized"),
    "otel": ("OpenTelemetryHook",),
    "prometheus": ("PrometheusHook",),
    "serializers": ("Compressed", "Encrypted", "PickleSerializer", "Serializer"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if not TYPE_CHECKING:
    # SQLBackend needs an extra, and a star import must not.
    __all__ = ["__version__", *sorted(_HOME_OF.keys() - {"SQLBackend"})]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'idempotent' has no attribute {name!r}")
    value = getattr(import_module(f"idempotent.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
