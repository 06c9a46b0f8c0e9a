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
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import cached_property
from pathlib import PurePath
from types import MemberDescriptorType
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import orjson

from idempotent.errors import SerializationError, UnstableKey

__all__ = ["KEPT", "beside_fields", "dumps", "encode", "fields_of", "loads"]

_MAX_DEPTH = 200
"""Deeper nesting is refused: long before Python's own recursion limit, wherever on the stack a call comes from."""


# ---------------------------------------------------------------------------------------------------------- digests


def encode(value: Any, where: str = "argument") -> bytes:
    """`value` as canonical bytes: equal bytes exactly for values equal in type and content.

    Args:
        value: anything made of None, bool, int, float, str, bytes, Decimal, date and time types, UUID, Enum, path,
            class, list, tuple, set, frozenset, dict, dataclass, named tuple, attrs, msgspec and pydantic objects.
        where: what to call the value in an error.

    Raises:
        UnstableKey: some part of it has no stable form (NaN among it: it equals nothing).
    """
    kind = type(value)
    try:
        if kind is str or (kind is int and -(2**53) < value < 2**53) or kind is bool or value is None:
            return orjson.dumps(value)  # there is nothing to walk through
        return orjson.dumps(_canonical(value, where, 0))
    except (TypeError, ValueError, RecursionError) as error:  # orjson's own: a lone surrogate
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
        return ["l", *[_canonical(item, where, depth) for item in value]]
    if kind is tuple:
        return ["t", *[_canonical(item, where, depth) for item in value]]
    if kind is dict:
        return ["d", *_sorted_pairs(value, where, depth)]
    if kind is set or kind is frozenset:
        tag = "s" if kind is set else "f"
        return [tag, *sorted([_canonical(item, where, depth) for item in value], key=orjson.dumps)]
    return _instance(value, kind, where, depth)


def _sorted_pairs(value: dict[Any, Any], where: str, depth: int) -> list[Any]:
    """Keys and values in turn, in the order of the keys' bytes."""
    pairs = [(_canonical(key, where, depth), _canonical(item, where, depth)) for key, item in value.items()]
    return [part for pair in sorted(pairs, key=lambda pair: orjson.dumps(pair[0])) for part in pair]


def _float(value: float, where: str) -> list[str]:
    if math.isnan(value):
        raise UnstableKey(f"{where} is or holds NaN, which equals nothing, not even itself; {_WAYS_OUT}")
    return ["n", value.hex()]


def _decimal(value: Decimal, where: str) -> list[str]:
    if value.is_nan():
        raise UnstableKey(f"{where} is or holds a Decimal NaN, which equals nothing, not even itself; {_WAYS_OUT}")
    return ["D", str(value)]


def _moment(tag: str, value: datetime | time, where: str) -> list[Any]:
    try:
        zone = _zone(value.tzinfo)
    except SerializationError:
        raise UnstableKey(
            f"{where} is or holds a time in a zone that has no name of its own; use zoneinfo or an offset, or {_WAYS_OUT}"
        ) from None
    return [tag, value.replace(tzinfo=None).isoformat(), value.fold, zone]


_SCALARS: dict[type, Callable[[Any, str], Any]] = {
    float: _float,
    Decimal: _decimal,
    bytes: lambda value, _: ["b", value.hex()],
    bytearray: lambda value, _: ["ba", value.hex()],
    datetime: lambda value, where: _moment("dt", value, where),
    date: lambda value, _: ["da", value.isoformat()],
    time: lambda value, where: _moment("tm", value, where),
    timedelta: lambda value, _: ["td", value.days, value.seconds, value.microseconds],
    UUID: lambda value, _: ["u", value.hex],
    complex: lambda value, where: ["c", _float(value.real, where), _float(value.imag, where)],
}


def _instance(value: Any, kind: type, where: str, depth: int) -> Any:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, type):
        return ["class", f"{value.__module__}.{value.__qualname__}"]
    if isinstance(value, Enum):  # a combination of flags may have no name
        return ["enum", name, value.name if value.name is not None else [_canonical(value.value, where, depth)]]
    if isinstance(value, PurePath):
        return ["path", name, str(value)]
    container = next((base for base in _CONTAINERS if isinstance(value, base)), None)
    fields = fields_of(value)
    if fields is not None and (container is None or container is tuple):
        return ["o", name, *_sorted_pairs({**fields, **beside_fields(value, fields)}, where, depth)]
    if fields is None:
        for base in _BASES:
            if isinstance(value, base) and kind.__eq__ is base.__eq__:
                return ["sub", name, _canonical(_as_base(base, value), where, depth), *_beside(value, where, depth)]
        if container is not None and kind.__eq__ is container.__eq__:
            return ["sub", name, _canonical(container(value), where, depth), *_beside(value, where, depth)]
        if kind.__module__ == "ipaddress":
            return ["ip", name, str(value)]
    verb = "is" if depth == 1 else "holds"
    raise UnstableKey(f"{where} {verb} a {name}, which has no stable canonical form; {_WAYS_OUT}")


def _beside(value: Any, where: str, depth: int) -> list[Any]:
    """What an instance of a subclass of a built-in type holds besides its base's content, such as an amount's currency."""
    slots = {
        name: getattr(value, name)
        for base in type(value).__mro__
        if "__slots__" in vars(base)  # written in Python: the built-in types' own members are their content
        for name, slot in vars(base).items()
        if isinstance(slot, MemberDescriptorType) and hasattr(value, name)
    }
    return _sorted_pairs({**beside_fields(value, {}), **slots}, where, depth)


_BASES: tuple[Any, ...] = (str, int, float, bytes, Decimal, datetime, date, UUID)
_CONTAINERS: tuple[Any, ...] = (dict, list, tuple, set, frozenset)


def _as_base(base: Any, value: Any) -> Any:
    if base is str:
        return str.__str__(value)
    if base is Decimal:
        return Decimal(value)
    if base in (int, float, bytes):
        return base.__new__(base, value)  # pyright: ignore[reportArgumentType]  of one base or another
    if base is datetime:
        return datetime.combine(value.date(), value.timetz())
    if base is date:
        return date(value.year, value.month, value.day)
    return UUID(int=value.int)


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of an instance of a class that declares them; None for any other."""
    kind: Any = type(value)
    names: Any
    if dataclasses.is_dataclass(kind):
        names = [field.name for field in dataclasses.fields(kind)]
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        return dict(zip(kind._fields, value, strict=True))
    elif hasattr(kind, "__struct_fields__"):
        unset = sys.modules["msgspec"].UNSET
        return {name: item for name in kind.__struct_fields__ if (item := getattr(value, name, unset)) is not unset}
    elif hasattr(kind, "__attrs_attrs__"):
        names = [attribute.name for attribute in kind.__attrs_attrs__]
    elif hasattr(kind, "model_fields") and hasattr(value, "__pydantic_fields_set__"):
        held = {name: value.__dict__[name] for name in kind.model_fields if name in value.__dict__}
        return {**held, **(getattr(value, "__pydantic_extra__", None) or {})}
    else:
        return None
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def beside_fields(value: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What an instance holds besides its declared fields; values of cached properties are no content."""
    kind = type(value)
    beside = {
        name: item
        for name, item in getattr(value, "__dict__", {}).items()
        if name not in fields and not isinstance(getattr(kind, name, None), cached_property)
    }
    private = getattr(value, "__pydantic_private__", None)
    return {**beside, **private} if private else beside


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
        rows: for a reader that knows the classes and compares: fields in the form and by the names that it looks for,
            dict keys that are not hashable once reduced, and the text of what has no other form.

    Raises:
        SerializationError: it has no such form. The message holds nothing of the value.
    """
    walk = _Walk(rows)
    try:
        kept = _keep(value, walk, 0)
    except (TypeError, ValueError, RecursionError) as error:  # raised by a class of the user's: it may say anything
        raise SerializationError(f"the value cannot be kept as JSON ({type(error).__name__})") from None
    try:
        return orjson.dumps(kept), walk.reduced
    except TypeError as error:
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
        keys, distinct = _distinct(value, walk, depth)
        if not distinct and not walk.rows:
            raise SerializationError("the keys of a dict, reduced to plain values, would not be keys of their own")
        pairs = [[key, _keep(item, walk, depth)] for key, item in zip(keys, value.values(), strict=True)]
        return {_TAG: ["d" if distinct else "k", *pairs]}
    if kind is tuple:
        return {_TAG: ["t", *[_keep(item, walk, depth) for item in value]]}
    if kind is set or kind is frozenset:
        items, distinct = _distinct(value, walk, depth)
        return {_TAG: ["s" if kind is set else "f", *items]} if distinct else items
    kept = KEPT.get(kind)
    if kept is not None:
        return {_TAG: kept(value)}
    walk.reduced = True
    if isinstance(value, Enum):
        return _keep(value.value, walk, depth)
    fields = fields_of(value)
    if fields is not None and (not isinstance(value, _CONTAINERS) or isinstance(value, tuple)):
        return _keep(_row(value, fields) if walk.rows else fields, walk, depth)
    for base in _BASES:
        if isinstance(value, base):
            return _keep(_as_base(base, value), walk, depth)
    for container in _CONTAINERS:
        if isinstance(value, container) and fields is None:
            return _keep(container(value), walk, depth)
    if walk.rows:  # such as a path or an address: what the reader makes of its text is compared
        return str(value)
    raise SerializationError(f"a {kind.__module__}.{kind.__qualname__} cannot be kept as JSON")


def _row(value: Any, fields: dict[str, Any]) -> Any:
    """The fields as a reader that knows the class looks for them: msgspec's structs may have other names, or none."""
    if isinstance(value, tuple):
        return list(fields.values())
    config = getattr(value, "__struct_config__", None)
    if config is None:
        return fields
    names = dict(zip(value.__struct_fields__, value.__struct_encode_fields__, strict=True))
    fields = {names[name]: item for name, item in fields.items()}
    if config.tag is not None:
        fields = {config.tag_field: config.tag, **fields}
    return list(fields.values()) if config.array_like else fields


def _distinct(items: Iterable[Any], walk: _Walk, depth: int) -> tuple[list[Any], bool]:
    """Set items or dict keys as they are kept, and whether they are that still: reducing instances may have made two
    of them one, or unhashable.
    """
    reduced, walk.reduced = walk.reduced, False
    kept = [_keep(item, walk, depth) for item in items]
    distinct = True
    if walk.reduced:
        try:
            distinct = len({_rebuild(item) for item in kept}) == len(kept)
        except TypeError:
            distinct = False
    walk.reduced |= reduced
    return kept, distinct


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
    "k": lambda data: {_as_key(_rebuild(key)): _rebuild(item) for key, item in data},
}


class _Key(dict[str, Any]):
    """The fields of an instance that was the key of a dict, until a reader makes an instance of them again."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


def _as_key(value: Any) -> Any:
    if isinstance(value, dict):
        return _Key(value)
    return tuple([_as_key(item) for item in value]) if isinstance(value, (list, tuple)) else value


def loads(data: bytes) -> Any:
    """The value that `dumps` kept. Raises SerializationError for bytes that it did not make."""
    try:
        value = orjson.loads(data)
        # Without a tag in the bytes there is nothing to rebuild, and most results have none.
        return _rebuild(value) if b'"$"' in data else value
    except Exception as error:  # a forged or damaged record can break any constructor in any way
        raise SerializationError(f"the record cannot be decoded ({type(error).__name__})") from None


def _rebuild(value: Any) -> Any:
    if type(value) is list:
        return [_rebuild(item) for item in value]
    if type(value) is dict:
        if len(value) == 1 and _TAG in value:
            tag, *data = value[_TAG]
            return _REBUILT[tag](data)
        return {key: _rebuild(item) for key, item in value.items()}
    return value
