"""Names of header fields and methods, checked: the same for servers and clients."""

import re
from typing import Any, TypeGuard

__all__ = ["checked_name", "is_token"]

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110: the name of a field or a method
_TAKEN = re.compile(
    "authorization|connection|content-.*|cookie|date|expect|host|keep-alive|origin|proxy-.*|range|referer|set-cookie|te"
    "|trailer|transfer-encoding|upgrade|user-agent|www-authenticate",
    re.IGNORECASE,
)
"""Fields that mean something else: a key there would be a secret, or no key, or break the request."""


def is_token(value: Any) -> TypeGuard[str]:
    """Whether it can name a field or a method."""
    return isinstance(value, str) and _TOKEN.fullmatch(value) is not None


def checked_name(option: str, value: Any) -> str:
    """The name of the field that bears the key. Raises ValueError for what is no name, or is the name of another field."""
    if not is_token(value):
        raise ValueError(f"{option} must be the name of a header field, not {value!r}")
    if _TAKEN.fullmatch(value):
        raise ValueError(f"{option} must be the name of a field of its own, and {value} has another meaning")
    return value
