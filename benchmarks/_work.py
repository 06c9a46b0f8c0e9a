"""The function that everybody guards, and what is measured of it: the same payload, the same key, the same stores."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "AMOUNT",
    "BODY",
    "DUPLICATES",
    "TTL",
    "UNSEEN",
    "Contender",
    "Slow",
    "charge",
    "charge_async",
    "filled",
    "is_receipt",
    "receipt",
]

AMOUNT = 1999
TTL = 3600
"""Seconds for which an outcome is kept, for all of them."""
DUPLICATES = 200
"""Callers of a storm, in all processes together."""
UNSEEN = ", keys of another process"
"""What the row of a contender's replays of keys that its process sees for the first time has behind the name."""
_NOTE = "n" * 113
BODY = b'{"order":"%s","amount":1999,"status":"charged","note":"%s"}' % (b"o" * 32, _NOTE.encode())
"""The result as JSON: what a floor stores. 200 bytes, with an order id of 32 characters."""

Call = Callable[[str, int], Any]
"""`charge(order_id, amount)`, guarded; a coroutine for async contenders."""


def receipt(order_id: str, amount: int) -> dict[str, Any]:
    """A result whose JSON has 200 bytes."""
    return {"order": order_id, "amount": amount, "status": "charged", "note": _NOTE}


def filled(number: int) -> str:
    """The order of a record that is put into a store to be replayed: of the first, 0, and so on."""
    return f"{number:032x}"


def is_receipt(result: Any, order_id: str) -> bool:
    """Whether a caller got what the function returns."""
    return bool(result == receipt(order_id, AMOUNT))


def charge(order_id: str, amount: int) -> dict[str, Any]:
    """A function that costs nothing, so that only its guard is measured."""
    return receipt(order_id, amount)


async def charge_async(order_id: str, amount: int) -> dict[str, Any]:
    """The same for async callers."""
    return receipt(order_id, amount)


@dataclass
class Slow:
    """A function that takes its time, and counts how often it ran in this process."""

    seconds: float
    ended: list[float] = field(default_factory=list)
    """Monotonic seconds at which a run ended."""

    def function(self, colour: str) -> Callable[..., Any]:
        """A plain function, as some guards set attributes on what they are given; for "sync" or "async" callers."""

        def charge(order_id: str, amount: int) -> dict[str, Any]:
            time.sleep(self.seconds)
            self.ended.append(time.monotonic())
            return receipt(order_id, amount)

        async def charge_async(order_id: str, amount: int) -> dict[str, Any]:
            await asyncio.sleep(self.seconds)
            self.ended.append(time.monotonic())
            return receipt(order_id, amount)

        return charge if colour == "sync" else charge_async


@dataclass(frozen=True)
class Contender:
    """What is measured beside others; `first` and `replay` take an order id, and give a coroutine where they are async.

    Floors have both made by hand: the commands that nobody can do without, on the usual client of the store.
    """

    first: Callable[[str], Any] | None
    """None: only replays are measured."""
    replay: Callable[[str], Any]
    known: Callable[[], str] | None = None
    """An order whose record is there, another for each replay; None: one that was called before, again and again."""

    @classmethod
    def of(cls, call: Call, known: Callable[[], str] | None = None) -> "Contender":
        """Of a guarded function: the same call is the first for a new id, and a replay for one that is known."""

        def once(order_id: str) -> Any:
            return call(order_id, AMOUNT)

        return cls(once, once, known)
