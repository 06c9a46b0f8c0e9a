"""Ours and the libraries that people use today, each set up as its own documentation says.

A guard takes the store's URL and a function `charge(order_id, amount)`, and gives it back guarded. Those that take their
key from a callable or a template get the order's id; those that only know all the arguments get both. All keep the
outcome for an hour. What is not installed is left out, and said.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from benchmarks._work import TTL
from idempotent import idempotent

__all__ = ["OURS", "PACKAGES", "guards_of"]

OURS = "idempotent"

Guard = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def _ours(url: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return idempotent(backend=url, key="payment:{order_id}", ttl=TTL)(function)


_PEERS: list[tuple[str, str, tuple[str, ...], tuple[str, ...], Guard]] = []
"""Name, package, stores, colours, guard."""

PACKAGES = ("cachetools", "redis", "hiredis", "sqlalchemy", "psycopg", "aiosqlite")


def guards_of(store: str, colour: str) -> tuple[dict[str, Guard], dict[str, str]]:
    """Guards by name, ours first; and why others are missing."""
    guards: dict[str, Guard] = {OURS: _ours}
    missing: dict[str, str] = {}
    for name, module, stores, colours, guard in _PEERS:
        if store in stores and colour in colours:
            if find_spec(module.partition(".")[0]) is None:
                missing[name] = "not installed"
            else:
                guards[name] = guard
    return guards, missing
