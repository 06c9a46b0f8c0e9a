"""The type-tagged canonical form of values, both ways: what keys digest, and what untyped results are kept as.

Two forms of one idea. `encode` is for digests: every value carries its type, dicts and sets are sorted, and what has no
stable form is refused. `dumps` and `loads` are for results: JSON as it is where JSON has the value, a tag where it has
not, so that a replay gives back what the function returned, type and all.

Sorting and tagging are chosen so that values that differ in type never share a digest: 1, 1.0, True, "1" and
Decimal("1") are five keys. Decimal("1.0") and Decimal("1.00") differ as well: they print differently on a receipt. The same
instant in two time zones is two values, for the same reason: a function can tell them apart.
"""

import dataclasses
import math
from collections.abc import Callable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import PurePath
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson

from idempotent.errors import SerializationError, UnstableKey

__all__ = ["KEPT", "dumps", "encode", "fields_of", "loads"]

_MAX_DEPTH = 200
"""Deeper nesting is refused: long before Python's own recursion limit, wherever on the stack a call comes from."""


# ---------------------------------------------------------------------------------------------------------- digests


def encode(value: object, where: str = "argument") -> bytes:
    """`value` as canonical bytes: equal bytes exactly for values equal in type and content.

    Args:
        value: anything made of None, bool, int, float, str, bytes, Decimal, date and time types, UUID, Enum, path,
            class, list, tuple, set, frozenset, dict, dataclass, named tuple, attrs, msgspec and pydantic objects.
        where: what to call the value in an error.

    Raises:
        UnstableKey: some part of it has no stable form (NaN among it: it equals nothing).
    """
    try:
        return orjson.dumps(_canonical(value, where, 0))
    except (TypeError, ValueError) as error:  # orjson's JSONEncodeError: a lone surrogate
        raise UnstableKey(f"{where} cannot be made a key of: {error}; {_WAYS_OUT}") from None


_WAYS_OUT = "leave it out with ignore=, say what identifies it with key=, or compare what matters with fingerprint="


def _canonical(value: Any, where: str, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return value if -(2**53) < value < 2**53 else ["i", hex(value)]
    if depth > _MAX_DEPTH:
        raise UnstableKey(f"{where} is nested more than {_MAX_DEPTH} deep, or holds itself; {_WAYS_OUT}")
    scalar = _SCALARS.get(kind)
    if scalar is not None:
        return scalar(value, where)
    depth += 1
    if kind is list:
        return ["l", *[_canonical(item, f"{where}[{n}]", depth) for n, item in enumerate(value)]]
    if kind is tuple:
        return ["t", *[_canonical(item, f"{where}[{n}]", depth) for n, item in enumerate(value)]]
    if kind is dict:
        return ["d", *_sorted_pairs(value.items(), where, depth)]
    if kind is set or kind is frozenset:
        tag = "s" if kind is set else "f"
        return [tag, *sorted((_canonical(item, f"an item of {where}", depth) for item in value), key=orjson.dumps)]
    return _instance(value, kind, where, depth)


def _sorted_pairs(items: Any, where: str, depth: int) -> list[Any]:
    pairs = [
        [_canonical(key, f"a key of {where}", depth), _canonical(item, f"{where}[{key!r:.40}]", depth)]
        for key, item in items
    ]
    return sorted(pairs, key=lambda pair: orjson.dumps(pair[0]))


def _float(value: float, where: str) -> list[str]:
    if math.isnan(value):
        raise UnstableKey(f"{where} is NaN, which equals nothing, not even itself; {_WAYS_OUT}")
    return ["n", value.hex()]


def _decimal(value: Decimal, where: str) -> list[str]:
    if value.is_nan():
        raise UnstableKey(f"{where} is a Decimal NaN, which equals nothing, not even itself; {_WAYS_OUT}")
    return ["D", str(value)]


def _datetime(value: datetime, where: str) -> list[Any]:
    zone = value.tzinfo
    if zone is None:
        return ["dt", value.isoformat(), value.fold]
    return ["dt", value.isoformat(), value.fold, str(zone)]


def _time(value: time, where: str) -> list[Any]:
    return ["tm", value.isoformat(), value.fold, None if value.tzinfo is None else str(value.tzinfo)]


_SCALARS: dict[type, Callable[[Any, str], Any]] = {
    float: _float,
    Decimal: _decimal,
    bytes: lambda value, _: ["b", value.hex()],
    bytearray: lambda value, _: ["ba", value.hex()],
    datetime: _datetime,
    date: lambda value, _: ["da", value.isoformat()],
    time: _time,
    timedelta: lambda value, _: ["td", value.days, value.seconds, value.microseconds],
    UUID: lambda value, _: ["u", value.hex],
    complex: lambda value, where: ["c", _float(value.real, where), _float(value.imag, where)],
}


def _instance(value: Any, kind: type, where: str, depth: int) -> Any:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, type):
        return ["class", f"{value.__module__}.{value.__qualname__}"]
    if isinstance(value, Enum):
        return ["enum", name, value.name]
    if isinstance(value, PurePath):
        return ["path", name, str(value)]
    fields = fields_of(value)
    if fields is not None:
        return ["o", name, *_sorted_pairs(fields.items(), where, depth)]
    for base in (str, int, float, bytes, Decimal, datetime, date, UUID):
        if isinstance(value, base) and kind.__eq__ is base.__eq__:
            return ["sub", name, _canonical(_as_base(base, value), where, depth)]
    for container in (dict, list, tuple, set, frozenset):
        if isinstance(value, container) and kind.__eq__ is container.__eq__:
            return ["sub", name, _canonical(container(value), where, depth)]
    if kind.__module__ == "ipaddress":
        return ["ip", name, str(value)]
    raise UnstableKey(f"{where} is a {name}, which has no stable canonical form; {_WAYS_OUT}")


def _as_base(base: type, value: Any) -> Any:
    if base is str:
        return str.__str__(value)
    if base in (int, float, bytes):
        return base.__new__(base, value)
    if base is Decimal:
        return Decimal(value)
    if base is datetime:
        return datetime.combine(value.date(), value.timetz())
    if base is date:
        return date(value.year, value.month, value.day)
    return UUID(int=value.int)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of an instance of a class that declares them; None for any other."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(kind) if hasattr(value, field.name)}
    if isinstance(value, tuple) and hasattr(kind, "_fields"):
        return dict(zip(kind._fields, value, strict=True))
    if hasattr(kind, "__struct_fields__"):
        return {name: getattr(value, name) for name in kind.__struct_fields__}
    if hasattr(kind, "__attrs_attrs__"):
        return {attribute.name: getattr(value, attribute.name) for attribute in kind.__attrs_attrs__}
    if hasattr(kind, "model_fields") and hasattr(value, "__pydantic_fields_set__"):
        return {**value.__dict__, **(value.__pydantic_extra__ or {})}
    return None


# ---------------------------------------------------------------------------------------------------------- results

_TAG = "$"
"""The key of a dict that stands for what JSON has not: {"$": [tag, ...]}."""


class _Walk:
    """One pass over a value to be kept."""

    def __init__(self, rows: bool) -> None:
        self.rows = rows
        self.reduced = False
        """An instance of a class was reduced to a dict or a plain value."""


def dumps(value: object, *, rows: bool = False) -> tuple[bytes, bool]:
    """`value` as tagged JSON, and whether an instance of a class had to be reduced to a dict or a plain value.

    Args:
        value: what is to be kept.
        rows: reduce a named tuple to a list instead of a dict, for a reader that knows its class.

    Raises:
        SerializationError: it has no such form.
    """
    walk = _Walk(rows)
    try:
        return orjson.dumps(_keep(value, walk, 0)), walk.reduced
    except (TypeError, ValueError) as error:
        raise SerializationError(f"the value cannot be kept as JSON: {error}") from None


def _keep(value: Any, walk: _Walk, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if kind is int:
        return value if -(2**63) <= value < 2**64 else {_TAG: ["i", hex(value)]}
    if kind is float:
        return value if math.isfinite(value) else {_TAG: ["n", repr(value)]}
    if depth > _MAX_DEPTH:
        raise SerializationError(f"the value is nested more than {_MAX_DEPTH} deep, or holds itself")
    depth += 1
    if kind is list:
        return [_keep(item, walk, depth) for item in value]
    if kind is dict:
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: _keep(item, walk, depth) for key, item in value.items()}
        return {_TAG: ["d", *[[_keep(key, walk, depth), _keep(item, walk, depth)] for key, item in value.items()]]}
    if kind in _SEQUENCES:
        return {_TAG: [_SEQUENCES[kind], *[_keep(item, walk, depth) for item in value]]}
    kept = KEPT.get(kind)
    if kept is not None:
        return {_TAG: kept(value)}
    walk.reduced = True
    if isinstance(value, Enum):
        return _keep(value.value, walk, depth)
    fields = fields_of(value)
    if fields is not None:
        return _keep(list(fields.values()) if walk.rows and isinstance(value, tuple) else fields, walk, depth)
    for base in (str, int, float, bytes, Decimal, datetime, date, UUID):
        if isinstance(value, base):
            return _keep(_as_base(base, value), walk, depth)
    for container in (dict, list, tuple, set, frozenset):
        if isinstance(value, container):
            return _keep(container(value), walk, depth)
    raise SerializationError(f"a {kind.__module__}.{kind.__qualname__} cannot be kept as JSON")


def _zone(zone: Any) -> Any:
    """A time zone as JSON: None, an offset in seconds, or a name."""
    if zone is None:
        return None
    if zone is UTC:
        return "UTC"
    if type(zone) is timezone:
        offset = zone.utcoffset(None)
        return [offset.days, offset.seconds, offset.microseconds, zone.tzname(None)]
    if isinstance(zone, ZoneInfo) and zone.key:
        return {"key": zone.key}
    raise SerializationError(f"a time zone of type {type(zone).__qualname__} cannot be kept; use zoneinfo or an offset")


def _unzone(data: Any) -> Any:
    if data is None:
        return None
    if data == "UTC":
        return UTC
    if isinstance(data, dict):
        return ZoneInfo(data["key"])
    offset = timedelta(*data[:3])
    plain = timezone(offset)
    return plain if plain.tzname(None) == data[3] else timezone(offset, data[3])


_SEQUENCES: dict[type, str] = {tuple: "t", set: "s", frozenset: "f"}
KEPT: dict[type, Callable[[Any], list[Any]]] = {
    bytes: lambda value: ["b", value.hex()],
    bytearray: lambda value: ["ba", value.hex()],
    Decimal: lambda value: ["D", str(value)],
    datetime: lambda value: ["dt", value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo)],
    date: lambda value: ["da", value.isoformat()],
    time: lambda value: ["tm", value.replace(tzinfo=None).isoformat(), value.fold, _zone(value.tzinfo)],
    timedelta: lambda value: ["td", value.days, value.seconds, value.microseconds],
    UUID: lambda value: ["u", value.hex],
    complex: lambda value: ["c", repr(value)],
}
_REBUILT: dict[str, Callable[[list[Any]], Any]] = {
    "i": lambda data: int(data[0], 16),
    "n": lambda data: float(data[0]),
    "b": lambda data: bytes.fromhex(data[0]),
    "ba": lambda data: bytearray.fromhex(data[0]),
    "D": lambda data: Decimal(data[0]),
    "dt": lambda data: datetime.fromisoformat(data[0]).replace(fold=data[1], tzinfo=_unzone(data[2])),
    "da": lambda data: date.fromisoformat(data[0]),
    "tm": lambda data: time.fromisoformat(data[0]).replace(fold=data[1], tzinfo=_unzone(data[2])),
    "td": lambda data: timedelta(*data),
    "u": lambda data: UUID(hex=data[0]),
    "c": lambda data: complex(data[0]),
    "t": lambda data: tuple([_rebuild(item) for item in data]),
    "s": lambda data: {_rebuild(item) for item in data},
    "f": lambda data: frozenset([_rebuild(item) for item in data]),
    "d": lambda data: {_rebuild(key): _rebuild(item) for key, item in data},
}


def loads(data: bytes) -> Any:
    """The value that `dumps` kept. Raises SerializationError for bytes that it did not make."""
    try:
        value = orjson.loads(data)
        # Without a tag in the bytes there is nothing to rebuild, and most results have none.
        return _rebuild(value) if b'"$"' in data else value
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, ArithmeticError, OSError) as error:
        raise SerializationError(f"the record cannot be decoded: {type(error).__name__}") from error


def _rebuild(value: Any) -> Any:
    if type(value) is list:
        return [_rebuild(item) for item in value]
    if type(value) is dict:
        if len(value) == 1 and _TAG in value:
            tag, *data = value[_TAG]
            return _REBUILT[tag](data)
        return {key: _rebuild(item) for key, item in value.items()}
    return value
