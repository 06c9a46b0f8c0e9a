"""What an annotation is made of, as text: records tell by its digest under which one they were made.

Two annotations of one shape read each other's records as the very values that were kept. What only widens what may be
returned (None, another member of an Enum or a Literal) is left out, and so are the names of classes.
"""

import enum
import hashlib
import types
import typing
from collections import abc
from typing import Any

__all__ = ["LENGTH", "digest_of"]

LENGTH = 2
"""Bytes of a digest: one change of an annotation in 65,536 goes unnoticed. A third would cost a record of 200 bytes 64."""
_BUILT_AS: dict[Any, str] = {
    **dict.fromkeys((list, abc.Sequence, abc.MutableSequence, abc.Collection, abc.Iterable), "list"),
    **dict.fromkeys((set, abc.Set, abc.MutableSet), "set"),
    **dict.fromkeys((dict, abc.Mapping, abc.MutableMapping), "dict"),
    tuple: "tuple",
    frozenset: "frozenset",
    type: "type",
}
"""What values of a generic annotation are rebuilt as."""
_ABOUT_FIELDS = ("Required", "NotRequired", "ReadOnly", "Final")


def digest_of(annotation: Any) -> bytes:
    """A few bytes for the shape of `annotation`, the same in every process.

    Raises NameError for a name in a class that is not defined yet.
    """
    return hashlib.blake2b(_shape(annotation, {}).encode(), digest_size=LENGTH).digest()


def _shape(annotation: Any, seen: dict[tuple[type, str], int]) -> str:
    if isinstance(annotation, typing.NewType):
        return _shape(annotation.__supertype__, seen)
    if hasattr(annotation, "__value__"):  # type Name = ...
        return _shape(annotation.__value__, seen)
    if isinstance(annotation, typing.TypeVar):
        return _shape(annotation.__bound__ or Any, seen)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated or str(origin).rpartition(".")[2] in _ABOUT_FIELDS:
        return _shape(arguments[0], seen)
    if origin in (typing.Union, types.UnionType):
        members = sorted({_shape(each, seen) for each in arguments if each is not types.NoneType})
        return "|".join(members)
    if origin is typing.Literal:
        return "|".join(sorted({type(each).__qualname__ for each in arguments if each is not None}))
    kind = origin or annotation
    if not isinstance(kind, type):
        return repr(annotation)
    if issubclass(kind, enum.Enum):
        return "enum:" + ",".join(sorted({type(each.value).__qualname__ for each in kind}))
    inner = ",".join("..." if each is Ellipsis else _shape(each, seen) for each in arguments)
    name = _BUILT_AS.get(kind)
    if name is not None:
        return f"{name}[{inner}]" if set(arguments) - {Any} else name
    if kind.__module__ == "builtins" or not getattr(kind, "__annotations__", None):
        return f"{kind.__qualname__}[{inner}]" if inner else kind.__qualname__
    if (kind, inner) in seen:
        return f"#{seen[kind, inner]}"
    seen[kind, inner] = len(seen)
    return _fields(kind, seen) + (f"[{inner}]" if inner else "")


def _fields(kind: type, seen: dict[tuple[type, str], int]) -> str:
    """The shape of a class by its fields. Those of a NamedTuple have an order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    own = {name: part for name, part in hints.items() if typing.get_origin(part) is not typing.ClassVar}
    is_row = issubclass(kind, tuple)
    sort = "row" if is_row else "dict" if typing.is_typeddict(kind) else "object"
    fields = (f"{name}:{_shape(own[name], seen)}" for name in (own if is_row else sorted(own)))
    return f"{sort}{{{','.join(fields)}}}"
