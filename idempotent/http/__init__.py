"""`Idempotency-Key` for HTTP: middleware in `.asgi`, `.wsgi` and `.django`, and retrying clients in `.client`.

Names only; each is imported when it is first used, so that a client needs nothing of a server.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from idempotent.http._rules import GLOBAL as GLOBAL
    from idempotent.http._rules import Headers as Headers
    from idempotent.http._rules import Options as Options
    from idempotent.http._rules import Request as Request
    from idempotent.http._rules import Response as Response
    from idempotent.http._rules import describe as describe

__all__ = ["GLOBAL", "Headers", "Options", "Request", "Response", "describe"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'idempotent.http' has no attribute {name!r}")
    return getattr(import_module("idempotent.http._rules"), name)
