"""What proves that calls, and the stores of their records, keep their promises: for tests, yours and ours.

Names only; each is imported from its module when it is first used. Nothing else in this package imports them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idempotent.testing.contract import BackendContract as BackendContract
    from idempotent.testing.explorer import Exploration as Exploration
    from idempotent.testing.explorer import explore as explore
    from idempotent.testing.faults import FaultyBackend as FaultyBackend
    from idempotent.testing.faults import Hang as Hang

_HOME_OF = {
    "BackendContract": "contract",
    "Exploration": "explorer",
    "explore": "explorer",
    "FaultyBackend": "faults",
    "Hang": "faults",
}

if not TYPE_CHECKING:
    __all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'idempotent.testing' has no attribute {name!r}")
    value = getattr(import_module(f"idempotent.testing.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
