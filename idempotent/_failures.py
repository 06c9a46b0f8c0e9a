"""Recorded errors: exceptions as bytes, and back as the same class with the same arguments.

No class is ever imported by a name found in a record: it is looked up among the classes that `error_ttl` names and
their loaded subclasses.
"""

from collections import deque
from collections.abc import Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any
from uuid import UUID

from idempotent import canonical
from idempotent.errors import ResultTypeWarning, SerializationError

__all__ = ["decode_error", "encode_error", "exactly", "why"]


def encode_error(error: Exception) -> bytes:
    """`error` as bytes: the names of its class and bases, its arguments, and the attributes that can be kept.

    Raises SerializationError if its arguments would not come back as what they are.
    """
    cls = type(error)
    args, reduced = canonical.dumps(list(error.args))
    if reduced:
        raise SerializationError(f"the arguments of {cls.__qualname__} hold more than plain values")
    rebuilt = _rebuilt(cls, canonical.loads(args))
    if not exactly(rebuilt.args, error.args):
        raise SerializationError(f"the arguments of {cls.__qualname__} would not come back as what they are")
    return canonical.dumps([_names(cls), list(error.args), _attributes(error, rebuilt)])[0]


def decode_error(data: bytes, named: tuple[type[Exception], ...]) -> Exception:
    """The error that `encode_error` kept; if its class is not loaded, the nearest named base of it.

    Raises SerializationError for other bytes, and where none of its bases is named.
    """
    try:
        names, args, attributes = canonical.loads(data)
    except (TypeError, ValueError):
        raise SerializationError("the bytes are no recorded error") from None
    texts = (
        isinstance(names, list) and isinstance(attributes, dict) and all(type(n) is str for n in (*names, *attributes))
    )
    if not texts or not names or not isinstance(args, list):
        raise SerializationError("the bytes are no recorded error")
    known = {_name(cls): cls for cls in _loaded(named)}
    cls = next((known[name] for name in names if name in known), None)
    if cls is None:
        raise SerializationError(f"neither its class nor a base of it is named in error_ttl: {names[0]}")
    error = _rebuilt(cls, args)
    slots = _slots(cls)
    try:
        for name, value in attributes.items():
            if name in slots:
                slots[name].__set__(error, value)
            else:
                error.__dict__[name] = value
    except Exception as failure:
        raise SerializationError(f"{cls.__qualname__} does not take its attributes ({why(failure)})") from None
    return error


def _rebuilt(cls: type[Exception], args: list[Any]) -> Exception:
    try:
        error: Exception = cls.__new__(cls, *args)
        # The class's own __init__ takes what its author likes; that of its built-in base takes `args`.
        base = next(base for base in cls.__mro__ if "__init__" in vars(base) and not _in_python(base))
        base.__init__(error, *args)  # type: ignore[misc]
    except Exception as failure:
        raise SerializationError(f"{cls.__qualname__} cannot be made from its arguments ({why(failure)})") from None
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


_Slot = MemberDescriptorType | GetSetDescriptorType


def _slots(cls: type[Exception]) -> dict[str, _Slot]:
    """Where instances keep what is in no `__dict__`: `__slots__`, and the likes of OSError.filename."""
    return {
        name: slot
        for base in reversed(cls.__mro__)
        for name, slot in vars(base).items()
        if isinstance(slot, _Slot) and name != "args" and not name.startswith("__")
    }


def _attributes(error: Exception, rebuilt: Exception) -> dict[str, Any]:
    """What `error` holds that can be kept and that `rebuilt`, made from its arguments, does not hold anyway."""
    kept = {name: value for name, value in vars(error).items() if _keepable(value)}
    for name, slot in _slots(type(error)).items():
        try:
            value = slot.__get__(error)
            if _keepable(value) and not exactly(value, getattr(rebuilt, name, ...)):
                slot.__set__(rebuilt, value)
                kept[name] = value
        except (AttributeError, TypeError, ValueError):  # never set, or read-only
            continue
    return kept


def _keepable(value: Any) -> bool:
    try:
        body, reduced = canonical.dumps(value)
        return not reduced and exactly(canonical.loads(body), value)
    except Exception:  # whatever a class of the user's may raise
        return False


def why(failure: Exception) -> str:
    """The reason of an error or a record: what failed and where. Other libraries' own words often quote the value."""
    if isinstance(failure, (SerializationError, ResultTypeWarning)):
        return f"{type(failure).__name__}: {failure}"
    trace = failure.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else f" in {trace.tb_frame.f_code.co_qualname}, line {trace.tb_lineno}"
    return type(failure).__name__ + place


def exactly(one: Any, other: Any) -> bool:
    """Whether two values are equal in value and type, all the way down; NaN is itself."""
    kind = type(one)
    if type(other) is not kind:
        return False
    if kind in _PLAIN:
        return bool(one == other)
    if kind is float:
        return repr(one) == repr(other)
    if kind in (list, tuple):
        kinds = list(map(type, one))
        if kinds != list(map(type, other)):
            return False
        return bool(one == other) if _PLAIN.issuperset(kinds) else all(map(exactly, one, other))
    if kind is dict:
        return exactly([*one, *one.values()], [*other, *other.values()])
    if kind in (set, frozenset):
        alike = set(map(type, one))
        if len(alike) == 1 and alike <= _PLAIN:
            return bool(one == other and alike == set(map(type, other)))
        return exactly(sorted(one, key=_tell), sorted(other, key=_tell))
    if kind in (Decimal, datetime, time, complex):  # equal ones can differ: 1.0 and 1.00, one instant in two zones
        return repr(one) == repr(other)
    fields = canonical.fields_of(one)
    if fields is not None:
        theirs = canonical.fields_of(other) or {}
        mine = canonical.beside_fields(one, fields)
        return exactly(fields, theirs) and exactly(mine, canonical.beside_fields(other, theirs))
    for base, plain in _CONTAINERS:  # equal ones may hold 1 and True
        if isinstance(one, base) and not exactly(plain(one), plain(other)):
            return False
    return bool(one == other)


_PLAIN = {str, int, bool, bytes, type(None), date, timedelta, UUID}
"""Types whose equal values are the same in every way."""
_CONTAINERS: tuple[Any, ...] = (
    (dict, dict),
    (list, list),
    (tuple, tuple),
    (set, set),
    (frozenset, frozenset),
    (deque, list),
)


def _tell(value: Any) -> str:
    """A text to sort the items of two sets by: equal ones have one text, whatever the order of the sets inside them."""
    kind = type(value)
    inner: Any
    if kind in _PLAIN:
        inner = repr(value)
    elif kind in (set, frozenset):
        inner = sorted(map(_tell, value))
    elif kind in (list, tuple):
        inner = list(map(_tell, value))
    else:
        fields = canonical.fields_of(value)
        inner = repr(value) if fields is None else [(name, _tell(item)) for name, item in fields.items()]
    return f"{kind.__qualname__} {inner}"
