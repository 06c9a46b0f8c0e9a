"""Recorded errors: exceptions as bytes, and back as the same class with the same arguments.

No class is ever imported by a name found in a record: it is looked up among the classes that `error_ttl` names and
their loaded subclasses.
"""

from collections.abc import Iterator
from datetime import datetime, time
from decimal import Decimal
from typing import Any

from idempotent import canonical
from idempotent.errors import SerializationError

__all__ = ["decode_error", "encode_error", "exactly"]


def encode_error(error: Exception, named: tuple[type[Exception], ...]) -> bytes:
    """`error` as bytes: the names of its class and bases, its arguments, and the attributes that can be kept.

    Raises SerializationError if its arguments would not come back as what they are.
    """
    body, reduced = canonical.dumps([_names(type(error)), list(error.args), _attributes(error)])
    if reduced:
        raise SerializationError(f"the arguments of {type(error).__qualname__} hold more than plain values")
    rebuilt = decode_error(body, (*named, type(error)))
    if not exactly(list(rebuilt.args), list(error.args)):
        raise SerializationError(f"the arguments of {type(error).__qualname__} would not come back as what they are")
    return body


def decode_error(data: bytes, named: tuple[type[Exception], ...]) -> Exception:
    """The error that `encode_error` kept; if its class is not loaded, the nearest named base of it.

    Raises SerializationError for other bytes, and where none of its bases is named.
    """
    names: list[str] = []
    try:
        names, args, attributes = canonical.loads(data)
        known = {_name(cls): cls for cls in _loaded(named)}
        cls = next(known[name] for name in names if name in known)
    except StopIteration:
        raise SerializationError(f"neither its class nor a base of it is named in error_ttl: {names[0]}") from None
    except (TypeError, ValueError):
        raise SerializationError("the bytes are no recorded error") from None
    try:
        error: Exception = cls.__new__(cls, *args)
        # The class's own __init__ takes what its author likes; that of its built-in base takes `args`.
        base = next(base for base in cls.__mro__ if "__init__" in vars(base) and not _in_python(base))
        base.__init__(error, *args)  # type: ignore[misc]
        error.__dict__.update(attributes)
    except Exception as failure:
        raise SerializationError(f"{cls.__qualname__} cannot be rebuilt: {failure}") from failure
    return error


def _in_python(cls: type) -> bool:
    return hasattr(vars(cls)["__init__"], "__code__") or hasattr(vars(cls)["__init__"], "__wrapped__")


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _names(cls: type[Exception]) -> list[str]:
    return [_name(base) for base in cls.__mro__ if issubclass(base, Exception)]


def _loaded(named: tuple[type[Exception], ...]) -> Iterator[type[Exception]]:
    """The named classes and their subclasses; of two with one name the named one comes last, and so is taken."""
    seen: set[type[Exception]] = set()
    left = list(named)
    while left:
        cls = left.pop()
        if cls not in seen:
            seen.add(cls)
            left += type.__subclasses__(cls)
            yield cls
    yield from named


def _attributes(error: Exception) -> dict[str, Any]:
    kept = {}
    for name, value in vars(error).items():
        try:
            body, reduced = canonical.dumps(value)
        except SerializationError:
            continue
        if not reduced and exactly(canonical.loads(body), value):
            kept[name] = value
    return kept


def exactly(one: Any, other: Any) -> bool:
    """Whether two values are equal in value and type, all the way down; NaN is itself."""
    kind = type(one)
    if type(other) is not kind:
        return False
    if kind in (str, int, bool, bytes, type(None)):
        return bool(one == other)
    if kind is float:
        return repr(one) == repr(other)
    if kind in (list, tuple):
        return len(one) == len(other) and all(map(exactly, one, other))
    if kind is dict:
        return exactly(list(one), list(other)) and exactly(list(one.values()), list(other.values()))
    if kind in (set, frozenset):
        return bool(one == other) and sorted(_tell(item) for item in one) == sorted(_tell(item) for item in other)
    if kind in (Decimal, datetime, time, complex):  # equal ones can differ: 1.0 and 1.00, one instant in two zones
        return repr(one) == repr(other)
    fields = canonical.fields_of(one)
    if fields is not None:
        theirs = canonical.fields_of(other) or {}
        mine = canonical.beside_fields(one, fields)
        return exactly(fields, theirs) and exactly(mine, canonical.beside_fields(other, theirs))
    return bool(one == other)


def _tell(value: Any) -> str:
    return f"{type(value).__qualname__} {value!r}"
