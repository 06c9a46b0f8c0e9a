"""Clients that retry and keep their key: transports for httpx, an adapter for requests, and a scope for loops outside.

Names only; each is imported when it is first used, so that neither library is needed for the other.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from idempotent.http._retry import idempotency_scope

if TYPE_CHECKING:
    from idempotent.http._httpx import AsyncIdempotencyTransport as AsyncIdempotencyTransport
    from idempotent.http._httpx import IdempotencyTransport as IdempotencyTransport
    from idempotent.http._requests import IdempotencyAdapter as IdempotencyAdapter

__all__ = ["AsyncIdempotencyTransport", "IdempotencyAdapter", "IdempotencyTransport", "idempotency_scope"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'idempotent.http.client' has no attribute {name!r}")
    library = "requests" if name == "IdempotencyAdapter" else "httpx"
    try:
        import_module(library)
    except ImportError as error:
        raise ImportError(f"{name} needs {library}: pip install {library}") from error
    return getattr(import_module(f"idempotent.http._{library}"), name)
