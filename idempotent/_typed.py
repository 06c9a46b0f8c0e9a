r"""Results as JSON, their types rebuilt by the function's return annotation.

A body begins with what tells its form:

    \x01          the canonical form: the value as it is, its classes reduced to dicts
    \x02 + shape  the canonical form, rebuilt by the annotation: for what JSON alone would lose (a tuple in an Any)
    \x03 + shape  the value as JSON; msgspec (or pydantic) rebuilds it by the annotation

`shape` is the digest of the annotation's shape. Under an annotation of another shape the same JSON may be another value
(a list that became a set, a field that was renamed and has a default), so such a record is not read at all.

What is kept is decoded again and compared before a form is chosen, so no value ever changes between run and replay.
"""

import functools
import inspect
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, NoReturn
from uuid import UUID

import orjson

from idempotent import canonical
from idempotent._failures import exactly
from idempotent._shape import LENGTH, digest_of
from idempotent.errors import ResultTypeWarning, SerializationError

__all__ = ["TypedJSON", "without_mark"]

_CANONICAL = b"\x01"
_CONVERTED = b"\x02"
_JSON = b"\x03"
_UNTYPED = (Any, object, NoReturn, typing.Never)
_NATIVE = (bytes, bytearray, datetime, date, time, timedelta, Decimal, UUID)

_MARK = 1 + LENGTH
"""The length of a mark that holds a shape."""

Dump = Callable[[Any], bytes]
Load = Callable[[bytes], Any]


def without_mark(body: bytes) -> bytes:
    """A body without what tells its form: JSON."""
    return body[{_CANONICAL: 1, _CONVERTED: _MARK, _JSON: _MARK}.get(body[:1], 0) :]


class TypedJSON:
    """The default codec of one function.

    Raises SerializationError if the return annotation cannot be served. One that names what is not defined yet is
    looked up again by `ready`.
    """

    name = "json1"

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._label = getattr(function, "__qualname__", repr(function))
        self._resolved = False
        self._dump: Dump | None = None
        self._load: Load | None = None
        self._convert: Callable[[Any], Any] | None = None
        self._json = self._converted = b""
        try:
            self._resolve()
        except NameError:
            pass

    def ready(self) -> None:
        """Look the annotation up if that was not possible yet. Raises SerializationError if it still is not."""
        if not self._resolved:
            try:
                self._resolve()
            except NameError as error:
                raise SerializationError(
                    f"the return annotation of {self._label} cannot be resolved: {error};"
                    " define or import that name at run time, or annotate with one that is"
                ) from None

    def _resolve(self) -> None:
        annotation = _return_annotation(self._function)
        if annotation not in _UNTYPED:
            try:
                if any(_is_model(part) for part in _parts(annotation)):
                    self._dump, self._load, self._convert = _by_pydantic(annotation)
                else:
                    self._dump, self._load, self._convert = _by_msgspec(annotation)
                shape = digest_of(annotation)
                self._json, self._converted = _JSON + shape, _CONVERTED + shape
            except NameError:
                raise
            except Exception as error:
                raise SerializationError(
                    f"the return annotation of {self._label}, {annotation!r}, cannot be served: {error}."
                    " Annotate what it really returns, give serializer=, or keep_result=False"
                ) from error
        self._resolved = True

    def keep(self, value: Any, record: str) -> tuple[bytes, Any]:
        """`value` as bytes, and as it comes back. Raises SerializationError for what cannot be kept."""
        if self._dump is not None and self._load is not None:
            try:
                body = self._dump(value)
                loaded = self._load(body)
                if exactly(loaded, value):
                    return self._json + body, loaded
            except Exception:  # noqa: S110  a value that does not fit its annotation may break the encoder in any way
                pass
        if self._convert is not None:
            try:
                plain = canonical.dumps(value, rows=True)[0]
                loaded = self._convert(canonical.loads(plain))
                if exactly(loaded, value):
                    return self._converted + plain, loaded
            except Exception:  # noqa: S110
                pass
        plain, reduced = canonical.dumps(value)
        if reduced or self._dump is not None:
            warnings.warn(
                f"{self._label} returned a {type(value).__qualname__} that does not come back as what it is:"
                " replays, and this call, get plain values for it."
                " Give the function a return annotation that fits what it returns",
                ResultTypeWarning,
                stacklevel=2,
            )
        return _CANONICAL + plain, canonical.loads(plain)

    def decode(self, data: bytes, record: str) -> Any:
        """The value that was encoded. Raises SerializationError for bytes of another annotation."""
        mark = data[:_MARK]
        try:
            if mark == self._json and self._load is not None:
                return self._load(data[_MARK:])
            if mark == self._converted and self._convert is not None:
                return self._convert(canonical.loads(data[_MARK:]))
        except Exception as error:  # its own words may quote the record
            raise SerializationError(
                f"it does not fit the return annotation of {self._label} ({type(error).__name__});"
                " annotate what the record holds, or forget() the key"
            ) from None
        if data[:1] == _CANONICAL:
            return canonical.loads(data[1:])
        raise SerializationError(
            f"it was recorded under a return annotation that {self._label} no longer has; put it back, or forget() the key"
        )

    def value_of(self, text: bytes) -> Any:
        """The value that `text`, JSON written by hand, stands for. Raises SerializationError if the annotation has no such value."""
        if self._load is None:
            return orjson.loads(text)
        try:
            value = self._load(text)
        except Exception as error:
            raise SerializationError(f"it does not fit the return annotation ({type(error).__name__})") from None
        unread = _unread(orjson.loads(text), orjson.loads(self._dump(value)) if self._dump else None, "")
        if unread:
            raise SerializationError(f"the return annotation has no place for {unread}")
        return value


def _unread(given: Any, kept: Any, path: str) -> str:
    """The first name in `given` that `kept`, what was made of it as JSON, has not: readers pass over it. "": none."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            found = f"{path}.{name}" if name not in kept else _unread(value, kept[name], f"{path}.{name}")
            if found:
                return found.removeprefix(".")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return next(filter(None, (_unread(*pair, path) for pair in zip(given, kept, strict=True))), "")
    return ""


class _Return:
    """Something whose only annotation is a function's return annotation."""

    def __init__(self, annotation: Any) -> None:
        self.__annotations__ = {"return": annotation}


def _return_annotation(function: Any) -> Any:
    """The resolved return annotation; Any where there is none. Raises NameError for a name not defined yet."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function):
        function = type(function).__call__
    annotation = _annotations(function).get("return", Any)
    inner = inspect.unwrap(function)
    names = dict(getattr(inner, "__globals__", {}))
    code = getattr(inner, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(inner, "__closure__", None) or (), strict=True):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    resolved = typing.get_type_hints(_Return(annotation), names, include_extras=True)["return"]
    if isinstance(resolved, typing.ForwardRef):
        raise NameError(f"name {resolved.__forward_arg__!r} is not defined")  # noqa: TRY004
    return resolved


def _annotations(function: Any) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        from annotationlib import Format, get_annotations

        return get_annotations(function, format=Format.FORWARDREF)
    return getattr(function, "__annotations__", None) or {}


def _parts(annotation: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """`annotation` and everything it is made of: arguments of generics, fields of classes."""
    seen = set() if seen is None else seen
    if id(annotation) in seen:
        return
    seen.add(id(annotation))
    yield annotation
    for part in typing.get_args(annotation):
        yield from _parts(part, seen)
    kind = typing.get_origin(annotation) or annotation
    if isinstance(kind, type) and kind.__module__ != "builtins" and getattr(kind, "__annotations__", None):
        for part in typing.get_type_hints(kind).values():
            yield from _parts(part, seen)


def _is_model(part: Any) -> bool:
    pydantic = sys.modules.get("pydantic")  # no annotation holds a model if nobody imported pydantic
    return pydantic is not None and isinstance(part, type) and issubclass(part, pydantic.BaseModel)


def _by_pydantic(annotation: Any) -> tuple[Dump, Load, Callable[[Any], Any]]:
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    def dump(value: Any) -> bytes:
        return adapter.dump_json(value, by_alias=False, round_trip=True, warnings="error")

    def load(data: bytes) -> Any:
        return adapter.validate_json(data, by_alias=False, by_name=True)

    def convert(value: Any) -> Any:
        return adapter.validate_python(value, by_alias=False, by_name=True)

    return dump, load, convert


def _by_msgspec(annotation: Any) -> tuple[Dump, Load, Callable[[Any], Any]]:
    import msgspec

    strange = [kind for kind in _custom(msgspec.inspect.type_info(annotation)) if kind not in canonical.KEPT]
    if strange:
        raise SerializationError(f"{strange[0]!r} has no form in JSON")
    encoder = msgspec.json.Encoder(decimal_format="string", uuid_format="canonical")
    decoder = msgspec.json.Decoder(annotation)

    def convert(value: Any) -> Any:
        return msgspec.convert(value, annotation, builtin_types=_NATIVE)

    return encoder.encode, decoder.decode, convert


def _custom(info: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """The classes in a msgspec type description that msgspec itself knows nothing of."""
    import msgspec

    seen = set() if seen is None else seen
    if id(info) in seen:
        return
    seen.add(id(info))
    if isinstance(info, msgspec.inspect.CustomType):
        if info.cls is not object:
            yield info.cls
        return
    for value in (getattr(info, name) for name in getattr(info, "__struct_fields__", ())):
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, (msgspec.inspect.Type, msgspec.inspect.Field)):
                yield from _custom(part, seen)
