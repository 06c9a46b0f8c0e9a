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
    shapes = _Shapes()
    shapes.of(annotation)
    # Classes may hold each other, so none can be written out in full. What each looks like from near, and which there
    # are, tells as much, and does not depend on the order of the walk.
    for _ in range(2):
        shapes.names = {found: shapes.described(*found) for found in shapes.classes}
    text = f"{shapes.of(annotation)};{','.join(sorted(set(shapes.names.values())))}"
    return hashlib.blake2b(text.encode(), digest_size=LENGTH).digest()


class _Shapes:
    """The shapes of an annotation's parts, and the classes that were met."""

    def __init__(self) -> None:
        self.classes: dict[tuple[type, str], tuple[str, bool, dict[str, Any]]] = {}
        """By class and arguments: what sort it is, whether its fields have an order, and the fields."""
        self.names: dict[tuple[type, str], str] = {}

    def of(self, annotation: Any) -> str:
        if isinstance(annotation, typing.NewType):
            return self.of(annotation.__supertype__)
        if isinstance(annotation, typing.TypeVar):
            return self.of(annotation.__bound__ or Any)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        alias = origin or annotation
        if hasattr(alias, "__value__"):  # type Name = ..., type Pair[T] = ...
            inner = ",".join(map(self.of, arguments))
            return self.of(alias.__value__) + (f"[{inner}]" if inner else "")
        if origin is typing.Annotated or str(origin).rpartition(".")[2] in _ABOUT_FIELDS:
            return self.of(arguments[0])
        if origin in (typing.Union, types.UnionType):
            return "|".join(sorted({self.of(each) for each in arguments if each is not types.NoneType}))
        if origin is typing.Literal:
            return "|".join(sorted({type(each).__qualname__ for each in arguments if each is not None}))
        kind = origin or annotation
        if not isinstance(kind, type):
            return repr(annotation)
        if issubclass(kind, enum.Enum):
            return "enum:" + ",".join(sorted({type(each.value).__qualname__ for each in kind}))
        inner = ",".join("..." if each is Ellipsis else self.of(each) for each in arguments)
        name = _BUILT_AS.get(kind)
        if name is not None:
            return f"{name}[{inner}]" if set(arguments) - {Any} else name
        if kind.__module__ == "builtins" or not getattr(kind, "__annotations__", None):
            return f"{kind.__qualname__}[{inner}]" if inner else kind.__qualname__
        found = kind, ",".join(map(repr, arguments))
        if found not in self.classes:
            self.classes[found] = _fields(kind)
            for part in (*self.classes[found][2].values(), *arguments):
                self.of(part)
        return f"{self.names.get(found, '*')}[{inner}]"

    def described(self, kind: type, arguments: str) -> str:
        """A class by its fields, as they are called in what is kept."""
        sort, has_order, fields = self.classes[kind, arguments]
        told = ",".join(f"{name}:{self.of(fields[name])}" for name in (fields if has_order else sorted(fields)))
        return hashlib.blake2b(f"{sort}{{{told}}}".encode(), digest_size=8).hexdigest()


def _fields(kind: type) -> tuple[str, bool, dict[str, Any]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    own = {name: part for name, part in hints.items() if typing.get_origin(part) is not typing.ClassVar}
    is_row, tag = issubclass(kind, tuple), ""
    config = getattr(kind, "__struct_config__", None)
    if config is not None:  # msgspec's
        names = zip(kind.__struct_encode_fields__, kind.__struct_fields__, strict=True)  # type: ignore[attr-defined]
        own = {encoded: own[name] for encoded, name in names}
        is_row, tag = config.array_like, f"{config.tag_field}={config.tag}"
    sort = "row" if is_row else "dict" if typing.is_typeddict(kind) else "object"
    return sort + tag, is_row, own
