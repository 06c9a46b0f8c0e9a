r"""Keys and fingerprints: templates, callables and all-argument keys. Pure.

A template's values are escaped, so that no two different lists of values render to one key, whatever the literal text between
them: a backslash goes before every character of a value that could be mistaken for the template's own text, and a value that
is not followed by such a character is closed by "\e".
"""

import functools
import inspect
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import date, datetime
from datetime import time as day_time
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from operator import itemgetter
from string import Formatter
from typing import Any, cast
from unicodedata import category
from uuid import UUID

import orjson

from idempotent._record import FINGERPRINT_BYTES
from idempotent.canonical import encode
from idempotent.errors import CallError, InvalidKey, KeyRequired, UnstableKey

__all__ = ["Binder", "check_key", "new_key"]

Identify = Callable[[tuple[Any, ...], dict[str, Any]], tuple[str, bytes]]
"""Key and fingerprint of a call with these arguments."""

MAX_KEY = 1024
"""Characters; a longer key is refused and never cut."""


def new_key() -> str:
    """A fresh random key for a new operation: a UUIDv7 (RFC 9562), so that keys sort by the time they were made."""
    milliseconds = time.time_ns() // 1_000_000
    random = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (1 << 48) - 1) << 80 | 7 << 76 | (random >> 68 & 0xFFF) << 64
    return str(UUID(int=value | 2 << 62 | random & (1 << 62) - 1))


def check_key(key: object) -> str:
    """`key`, if it is one.

    Raises:
        KeyRequired: it is None or empty.
        InvalidKey: it is not text, longer than 1,024 characters, or holds control characters.
    """
    if type(key) is str and 0 < len(key) <= MAX_KEY and key.isascii() and key.isprintable():
        return key  # as most are
    if key is None or key == "":
        raise KeyRequired("the key is missing or empty; every call needs one, such as an order's id or new_key()")
    if not isinstance(key, str):
        raise InvalidKey(f"a key must be text, not {type(key).__name__}")
    key = str.__str__(key)  # of a str Enum, the text and not the member's name
    if len(key) > MAX_KEY:
        raise InvalidKey(f"the key has {len(key)} characters, and {MAX_KEY} are allowed; digest long values first")
    if not (key.isascii() and key.isprintable()):
        for place, character in enumerate(key):
            if category(character) in ("Cc", "Cs"):
                kind = "control character" if category(character) == "Cc" else "lone surrogate, which is no character,"
                raise InvalidKey(f"the key holds the {kind} {character!r} at position {place}")
    return key


class Binder:
    """How one function's calls become keys and fingerprints; made once, at decoration.

    Args:
        function: the function; its signature is read here and never again.
        key: a template, a callable, or None for all the arguments.
        fingerprint: True, False, or a callable that takes the call's arguments.
        ignore: parameters that are part of neither.

    Raises:
        ValueError: the template or `ignore` name what is no parameter.
        TypeError: the function has no signature to read.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        key: str | Callable[..., str | None] | None,
        fingerprint: bool | Callable[..., str | bytes],
        ignore: tuple[str, ...],
    ) -> None:
        function, self._args, self._kwargs = _unbound(function)
        try:
            self._signature = inspect.signature(function)
        except ValueError as error:
            raise TypeError(f"{function!r} has no signature that could be read: {error}") from None
        parameters = self._signature.parameters
        for name in ignore:
            if name not in parameters:
                raise ValueError(f"ignore names {name!r}, which is no parameter; there are {', '.join(parameters)}")
        self._key = key
        self._fingerprint = fingerprint
        self._template = _Template(key, tuple(parameters)) if isinstance(key, str) else None
        first = next(iter(parameters), None)
        self._receiver = frozenset([first]) if first in ("self", "cls") else frozenset[str]()
        """The instance or class of a method: where a key is given, part of neither key nor fingerprint."""
        left_out = frozenset(ignore) if key is None else frozenset(ignore) | self._receiver
        self._digested = _Digested(parameters, left_out)
        self._digested_by_caller = _Digested(parameters, left_out | self._receiver)
        """The same where the caller gives the key."""
        self._names = tuple(parameters)
        self._collect = _generated(self._signature, _tuple(self._names), {})
        self._compile()

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by parameter, defaults applied. Raises TypeError for a call that does not fit."""
        return dict(zip(self._names, self._values(args, kwargs), strict=True))

    def _values(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments in the order of the parameters, as `bind` has them."""
        if self._args or self._kwargs:
            args, kwargs = self._args + args, {**self._kwargs, **kwargs}
        try:
            return cast("tuple[Any, ...]", self._collect(*args, **kwargs))
        except TypeError:
            pass
        # It does not fit; inspect says why in words that name no helper of ours.
        arguments = self._signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        bound = arguments.arguments
        if len(bound) < len(self._names):  # Python 3.13.0 misses this one
            missing = next(name for name in self._names if name not in bound)
            raise TypeError(f"missing a required argument: {missing!r}")
        return tuple(bound.values())

    def identify(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: str | None) -> tuple[str, bytes]:
        """Key and fingerprint of a call; `key` is one the caller gave, and is taken as it is.

        Raises:
            TypeError: the arguments do not fit the function.
            KeyRequired, UnstableKey, InvalidKey: they make no key.
        """
        values = self._values(args, kwargs)
        fingerprint = self._fingerprint
        digest = b""
        if fingerprint is True or (key is None and self._key is None):
            digest = (self._digested if key is None else self._digested_by_caller).of(values)
        if key is None:
            if self._template is not None:
                key = check_key(self._template.render(values))
            elif callable(self._key):
                key = check_key(self._key(*args, **kwargs))
            else:
                key = digest.hex()
        if fingerprint is True:
            return key, digest[:FINGERPRINT_BYTES]
        if fingerprint is False:
            return key, b""
        return key, _own_fingerprint(fingerprint(*args, **kwargs))

    def identifier(self, key: str | None) -> Identify:
        """`identify` for calls with this key, at less cost where neither key nor fingerprint is the user's own code."""
        compiled = self._identify if key is None else self._print
        if compiled is None or self._args or self._kwargs:
            return lambda args, kwargs: self.identify(args, kwargs, key)

        def identify(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bytes]:
            try:
                found = compiled(*args, **kwargs)
                return found if key is None else (key, found)
            except (TypeError, CallError):
                pass
            return self.identify(args, kwargs, key)  # it says why

        return identify

    def _compile(self) -> None:
        """Make `identify` of the parameters' own: an expression, and one for where the caller gives the key."""
        self._identify: Callable[..., Any] | None = None
        self._print: Callable[..., Any] | None = None
        if callable(self._fingerprint):
            return
        mark = "_"  # a parameter would hide a helper of its name
        while any(name.startswith(mark) for name in self._names):
            mark += "_"
        helpers: dict[str, Any] = {"blake2b": blake2b, "check": check_key, "dumps": orjson.dumps, "encode": encode}
        helpers |= {"int": int, "str": str, "type": type}
        if self._template is not None:
            template = self._template
            helpers |= {"render": template.render, "part": template.part, "escaped": template.needs_escape}
        helpers = {mark + name: helper for name, helper in helpers.items()}
        cut = f"[:{FINGERPRINT_BYTES}]"
        self._print = _generated(
            self._signature, self._digested_by_caller.expression(mark) + cut if self._fingerprint else "b''", helpers
        )
        digest = self._digested.expression(mark)
        if self._template is not None:
            named = f"{mark}check({self._template.expression(mark, self._names)})"
            result = f"{named}, {digest}{cut}" if self._fingerprint else f"{named}, b''"
        elif self._key is None:
            printed = f"{mark}digest{cut}" if self._fingerprint else "b''"
            result = f"({mark}digest := {digest}).hex(), {printed}"
        else:
            return
        self._identify = _generated(self._signature, result, helpers)


def _tuple(names: Iterable[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _generated(signature: inspect.Signature, result: str, helpers: dict[str, Any]) -> Callable[..., Any]:
    """A function with the parameters of `signature` that returns the expression `result`, which is made of their names and
    those of the helpers. The interpreter binds, as no code of ours can as fast. A call that does not fit is a TypeError.
    """
    given = [parameter for parameter in signature.parameters.values() if parameter.default is not parameter.empty]
    bare = [
        parameter.replace(
            annotation=parameter.empty, default=parameter.empty if parameter.default is parameter.empty else None
        )
        for parameter in signature.parameters.values()
    ]
    made: dict[str, Any] = {}
    try:
        exec(f"def bound{inspect.Signature(bare)}: return {result}", dict(helpers), made)  # noqa: S102  names alone are the user's
    except SyntaxError:  # a signature made by hand, which no `def` could have
        return _nothing_fits
    bound: Any = made["bound"]
    bound.__defaults__ = tuple(p.default for p in given if p.kind is not p.KEYWORD_ONLY)
    bound.__kwdefaults__ = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
    return cast("Callable[..., Any]", bound)


def _nothing_fits(*_args: Any, **_kwargs: Any) -> Any:
    raise TypeError


_PLACEHOLDER = getattr(functools, "Placeholder", object())


def _unbound(function: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The function inside partials and bound methods, and the arguments they bring: those tell calls apart, too."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    while True:
        if isinstance(function, functools.partial):
            if any(arg is _PLACEHOLDER for arg in function.args):
                raise TypeError(f"{function!r} has placeholders; decorate a function that calls it")
            args, kwargs = function.args + args, {**function.keywords, **kwargs}
            function = function.func
        elif inspect.ismethod(function):
            args = (function.__self__, *args)
            function = function.__func__
        else:
            return function, args, kwargs


class _Digested:
    """The parameters whose values make the digest of a call."""

    def __init__(self, parameters: Iterable[str], left_out: frozenset[str]) -> None:
        kept = [(place, name) for place, name in enumerate(parameters) if name not in left_out]
        self._kept = [(place, f"the argument {name!r}") for place, name in kept]
        self._names = [name for _, name in kept]
        self._instance = kept[0][1] if kept and kept[0][1] in ("self", "cls") else None

    def of(self, values: tuple[Any, ...]) -> bytes:
        """The digest of a call with these values. Raises UnstableKey for one that has no stable form."""
        try:
            parts = [encode(values[place], where) for place, where in self._kept]
        except UnstableKey:
            if self._instance is not None:
                _check_instance(self._instance, values[self._kept[0][0]])
            raise
        return blake2b(b"\x00".join(parts), digest_size=24).digest()

    def expression(self, mark: str) -> str:
        """What `of` does, as an expression of the parameters' names and of helpers whose names begin with `mark`."""
        plain = "{0}type({1}) is {0}str or ({0}type({1}) is {0}int and -(2**53) < {1} < 2**53)"
        parts = [f"({mark}dumps({n}) if {plain.format(mark, n)} else {mark}encode({n}))" for n in self._names]
        joined = """ + b'\\0' + """.join(parts) or "b''"
        return f"{mark}blake2b({joined}, digest_size=24).digest()"


def _check_instance(name: str, value: object) -> None:
    try:
        encode(value)
    except UnstableKey:
        raise UnstableKey(
            f"the argument {name!r} is a {type(value).__qualname__}, which has no stable canonical form; say what"
            f' identifies the call with key=, such as key="account:{{self.id}}", or leave it out with ignore=("{name}",)'
        ) from None


def _own_fingerprint(given: object) -> bytes:
    if isinstance(given, str):
        given = given.encode("utf-8", "surrogatepass")
    if not isinstance(given, bytes):
        raise UnstableKey(f"the fingerprint= callable must return str or bytes, not {type(given).__name__}")
    return blake2b(given, digest_size=FINGERPRINT_BYTES).digest()


class _Template:
    """A key template: literal text and fields, in turn."""

    def __init__(self, text: str, parameters: tuple[str, ...]) -> None:
        if not text:
            raise ValueError("the key template is empty; None makes a key of all the arguments")
        try:
            parsed = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"the key template {text!r} cannot be read: {error}") from None
        literals = [literal for literal, *_ in parsed]
        self._special = frozenset("".join(literals)) - frozenset(_ALNUM) | {"\\"}
        self.needs_escape = re.compile(f"[{re.escape(''.join(sorted(self._special)))}]").search
        self._fields: list[tuple[str, str, Callable[[tuple[Any, ...]], Any]]] = []
        """Of each field: the text before it, its name, and how to get its value."""
        self._end = ""
        for place, (literal, field, spec, conversion) in enumerate(parsed, 1):
            self._end += literal
            if field is None:
                continue
            if spec or conversion:
                raise ValueError(f"the key template {text!r} formats {{{field}}}, and fields are taken as they are")
            self._fields.append((self._end, field, _getter(text, field, parameters)))
            self._end = "\\e" if place < len(parsed) and not self._ends(literals[place]) else ""

    def render(self, values: tuple[Any, ...]) -> str:
        """The key of a call with these arguments."""
        key = ""
        for before, field, get in self._fields:
            try:
                value = get(values)
            except (AttributeError, LookupError, TypeError) as error:
                # The class alone: the text may be of the user's own code, and quote what the call was given.
                reason = type(error).__name__
                raise KeyRequired(f"the key template's field {{{field}}} is not there: {reason}") from None
            key += before + self.part(value, field)
        return key + self._end

    def part(self, value: Any, field: str) -> str:
        """A field's value as it stands in the key."""
        part = value if type(value) is str else _render(value, field)
        if self.needs_escape(part):
            part = "".join("\\" + letter if letter in self._special else letter for letter in part)
        return part

    def expression(self, mark: str, names: tuple[str, ...]) -> str:
        """What `render` does, as an expression of the parameters' names and of helpers whose names begin with `mark`."""
        if any(field not in names for _, field, _ in self._fields):
            return f"{mark}render({_tuple(names)})"
        plain = "{1} if {0}type({1}) is {0}str and not {0}escaped({1}) else {0}part({1}, {1!r})"
        parts = [f"{before!r} + ({plain.format(mark, field)})" for before, field, _ in self._fields]
        return " + ".join([*parts, repr(self._end)])

    def _ends(self, literal: str) -> bool:
        """Whether the text after a field tells where the field ended: its first character is escaped in values."""
        return bool(literal) and literal[0] in self._special and literal[0] != "\\"


_ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[([^\[\]]+)\]")


def _getter(text: str, field: str, parameters: tuple[str, ...]) -> Callable[[tuple[Any, ...]], Any]:
    """How to get a field's value from a call's arguments: a parameter, then attributes and items as in str.format."""
    name = re.split(r"[.\[]", field, maxsplit=1)[0]
    if name not in parameters:
        shown = ", ".join(parameters) or "none"
        raise ValueError(
            f"the key template {text!r} names {name or 'a position'!r}, which is no parameter; there are {shown}"
        )
    path = field[len(name) :]
    if _STEP.sub("", path):
        raise ValueError(f"the key template {text!r} cannot be read at {{{field}}}: attributes are .name, items [name]")
    steps = [(attribute, int(item) if item.isdecimal() else item) for attribute, item in _STEP.findall(path)]
    place = parameters.index(name)
    if not steps:
        return itemgetter(place)

    def get(values: tuple[Any, ...]) -> Any:
        value = values[place]
        for attribute, item in steps:
            value = getattr(value, attribute) if attribute else value[item]
        return value

    return get


def _render(value: Any, field: str) -> str:
    kind = type(value)
    if kind is str:
        return str(value)
    if kind is int and value.bit_length() > 4 * MAX_KEY:
        raise InvalidKey(f"the key template's field {{{field}}} is a number of more than {MAX_KEY} digits")
    if kind in (int, bool, UUID, Decimal):
        return str(value)
    if value is None:
        raise KeyRequired(f"the key template's field {{{field}}} is None")
    if isinstance(value, Enum) and value.name is not None:
        return value.name
    if isinstance(value, (datetime, date, day_time)):
        return value.isoformat()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (int, UUID, Decimal)) and not isinstance(value, Enum):
        return str(value)
    raise UnstableKey(
        f"the key template's field {{{field}}} is a {kind.__qualname__}; a key takes str, int, bool, UUID, Decimal,"
        " dates, times and Enum. Name one of its attributes, or give key= a callable"
    )
