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
    return hashlib.blake2b(_shape(annotation, ()).encode(), digest_size=LENGTH).digest()


def _shape(annotation: Any, inside: tuple[tuple[type, str], ...]) -> str:
    """`inside`: the classes that this is a field of."""
    if isinstance(annotation, typing.NewType):
        return _shape(annotation.__supertype__, inside)
    if isinstance(annotation, typing.TypeVar):
        return _shape(annotation.__bound__ or Any, inside)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    alias = origin or annotation
    if hasattr(alias, "__value__"):  # type Name = ..., type Pair[T] = ...
        inner = ",".join(_shape(each, inside) for each in arguments)
        return _shape(alias.__value__, inside) + (f"[{inner}]" if inner else "")
    if origin is typing.Annotated or str(origin).rpartition(".")[2] in _ABOUT_FIELDS:
        return _shape(arguments[0], inside)
    if origin in (typing.Union, types.UnionType):
        members = sorted({_shape(each, inside) for each in arguments if each is not types.NoneType})
        return "|".join(members)
    if origin is typing.Literal:
        return "|".join(sorted({type(each).__qualname__ for each in arguments if each is not None}))
    kind = origin or annotation
    if not isinstance(kind, type):
        return repr(annotation)
    if issubclass(kind, enum.Enum):
        return "enum:" + ",".join(sorted({type(each.value).__qualname__ for each in kind}))
    inner = ",".join("..." if each is Ellipsis else _shape(each, inside) for each in arguments)
    name = _BUILT_AS.get(kind)
    if name is not None:
        return f"{name}[{inner}]" if set(arguments) - {Any} else name
    if kind.__module__ == "builtins" or not getattr(kind, "__annotations__", None):
        return f"{kind.__qualname__}[{inner}]" if inner else kind.__qualname__
    if (kind, inner) in inside:
        return f"#{inside.index((kind, inner))}"
    return _fields(kind, (*inside, (kind, inner))) + (f"[{inner}]" if inner else "")


def _fields(kind: type, inside: tuple[tuple[type, str], ...]) -> str:
    """The shape of a class by its fields, as they are called in what is kept. Those of a row have an order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    own = {name: part for name, part in hints.items() if typing.get_origin(part) is not typing.ClassVar}
    is_row, tag = issubclass(kind, tuple), ""
    config = getattr(kind, "__struct_config__", None)
    if config is not None:  # msgspec's
        names = zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True)  # type: ignore[attr-defined]
        own = {encoded: own[name] for encoded, name in names}
        is_row, tag = config.array_like, f"{config.tag_field}={config.tag}"
    sort = "row" if is_row else "dict" if typing.is_typeddict(kind) else "object"
    fields = (f"{name}:{_shape(own[name], inside)}" for name in (own if is_row else sorted(own)))
    return f"{sort}{tag}{{{','.join(fields)}}}"
