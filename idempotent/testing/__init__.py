"""What proves that calls, and the stores of their records, keep their promises: for tests, yours and ours.

Names only; each is imported from its module when it is first used. Nothing else in this package imports them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idempotent.testing.clock import VirtualClock as VirtualClock
    from idempotent.testing.contract import BackendContract as BackendContract
    from idempotent.testing.explorer import Caller as Caller
    from idempotent.testing.explorer import Exploration as Exploration
    from idempotent.testing.explorer import Violation as Violation
    from idempotent.testing.explorer import explore as explore
    from idempotent.testing.faults import FaultyBackend as FaultyBackend
    from idempotent.testing.faults import Hang as Hang
    from idempotent.testing.proofs import Proof as Proof
    from idempotent.testing.proofs import assert_idempotent as assert_idempotent
    from idempotent.testing.proofs import assert_idempotent_async as assert_idempotent_async
    from idempotent.testing.proofs import assert_naturally_idempotent as assert_naturally_idempotent
    from idempotent.testing.proofs import assert_naturally_idempotent_async as assert_naturally_idempotent_async
    from idempotent.testing.stateful import BackendMachine as BackendMachine
    from idempotent.testing.storms import Aftermath as Aftermath
    from idempotent.testing.storms import Ending as Ending
    from idempotent.testing.storms import NotIdempotent as NotIdempotent
    from idempotent.testing.storms import Storm as Storm
    from idempotent.testing.strategies import duplicates as duplicates

_HOME_OF = {
    "VirtualClock": "clock",
    "BackendContract": "contract",
    "duplicates": "strategies",
    "Caller": "explorer",
    "Exploration": "explorer",
    "Violation": "explorer",
    "explore": "explorer",
    "FaultyBackend": "faults",
    "Hang": "faults",
    "Proof": "proofs",
    "assert_idempotent": "proofs",
    "assert_idempotent_async": "proofs",
    "assert_naturally_idempotent": "proofs",
    "assert_naturally_idempotent_async": "proofs",
    "BackendMachine": "stateful",
    "Aftermath": "storms",
    "Ending": "storms",
    "NotIdempotent": "storms",
    "Storm": "storms",
}

if not TYPE_CHECKING:
    __all__ = sorted(_HOME_OF)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'idempotent.testing' has no attribute {name!r}")
    try:
        value = getattr(import_module(f"idempotent.testing.{home}"), name)
    except ModuleNotFoundError as error:
        if error.name in ("hypothesis", "pytest"):
            raise ImportError(f"{name} needs {error.name}: pip install 'idempotent-py[testing]'") from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
