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
from collections.abc import Callable, Mapping
from datetime import date, datetime
from datetime import time as day_time
from decimal import Decimal
from enum import Enum
from hashlib import blake2b
from string import Formatter
from typing import Any
from unicodedata import category
from uuid import UUID

from idempotent import canonical
from idempotent._record import FINGERPRINT_BYTES
from idempotent.errors import InvalidKey, KeyRequired, UnstableKey

__all__ = ["Binder", "check_key", "new_key"]

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
                raise InvalidKey(f"the key holds the control character {character!r} at position {place}")
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
        self._left_out = frozenset(ignore) if key is None else frozenset(ignore) | self._receiver
        kinds = {parameter.kind for parameter in parameters.values()}
        self._plain = tuple(parameters) if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD} else None
        self._defaults = {
            name: parameter.default
            for name, parameter in parameters.items()
            if parameter.default is not inspect.Parameter.empty
        }

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by parameter, defaults applied. Raises TypeError for a call that does not fit."""
        if self._args or self._kwargs:
            args, kwargs = self._args + args, {**self._kwargs, **kwargs}
        names = self._plain
        if names is not None and len(args) <= len(names):
            # Most calls: parameters that take positions and names alike, which needs no inspect.
            bound = dict(zip(names, args, strict=False))
            if kwargs.keys().isdisjoint(bound):
                given = {**self._defaults, **bound, **kwargs}
                if len(given) == len(names) and all(name in given for name in names):
                    return {name: given[name] for name in names}
        arguments = self._signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        bound = dict(arguments.arguments)
        if len(bound) < len(self._signature.parameters):  # Python 3.13.0 misses this one
            missing = next(name for name in self._signature.parameters if name not in bound)
            raise TypeError(f"missing a required argument: {missing!r}")
        return bound

    def identify(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: str | None) -> tuple[str, bytes]:
        """Key and fingerprint of a call; `key` is one the caller gave, and is taken as it is.

        Raises:
            TypeError: the arguments do not fit the function.
            KeyRequired, UnstableKey, InvalidKey: they make no key.
        """
        bound = self.bind(args, kwargs)
        digest = b""
        if self._fingerprint is True or (key is None and self._key is None):
            digest = _digest(bound, self._left_out if key is None else self._left_out | self._receiver)
        if key is None:
            if self._template is not None:
                key = check_key(self._template.render(bound))
            elif callable(self._key):
                key = check_key(self._key(*args, **kwargs))
            else:
                key = digest.hex()
        if self._fingerprint is True:
            return key, digest[:FINGERPRINT_BYTES]
        if self._fingerprint is False:
            return key, b""
        return key, _own_fingerprint(self._fingerprint(*args, **kwargs))


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


def _digest(bound: dict[str, Any], left_out: frozenset[str]) -> bytes:
    parts: list[bytes] = []
    for name, value in bound.items():
        if name not in left_out:
            if name in ("self", "cls") and not parts:
                parts.append(_instance(name, value))
            else:
                parts.append(canonical.encode(value, f"the argument {name!r}"))
    return blake2b(b"\x00".join(parts), digest_size=24).digest()


def _instance(name: str, value: object) -> bytes:
    try:
        return canonical.encode(value, f"the argument {name!r}")
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
        self._parts: list[tuple[str, str | None, Callable[[dict[str, Any]], Any] | None]] = []
        for literal, field, spec, conversion in parsed:
            if field is None:
                self._parts.append((literal, None, None))
                continue
            if spec or conversion:
                raise ValueError(f"the key template {text!r} formats {{{field}}}, and fields are taken as they are")
            self._parts.append((literal, field, _getter(text, field, parameters)))
        literals = {character for literal, _, _ in self._parts for character in literal}
        self._special = frozenset(literals - set(_ALNUM)) | {"\\"}

    def render(self, bound: dict[str, Any]) -> str:
        """The key of a call with these arguments."""
        out: list[str] = []
        for place, (literal, field, get) in enumerate(self._parts):
            out.append(literal)
            if get is None or field is None:
                continue
            try:
                value = get(bound)
            except (AttributeError, LookupError, TypeError) as error:
                raise KeyRequired(f"the key template's field {{{field}}} is not there: {error}") from None
            out.append(self._escape(_render(value, field)))
            following = self._parts[place + 1] if place + 1 < len(self._parts) else None
            if following is not None and not self._ends(following[0]):
                out.append("\\e")
        return "".join(out)

    def _ends(self, literal: str) -> bool:
        """Whether the text after a field tells where the field ended: its first character is escaped in values."""
        return bool(literal) and literal[0] in self._special and literal[0] != "\\"

    def _escape(self, value: str) -> str:
        if self._special.isdisjoint(value):
            return value
        return "".join("\\" + character if character in self._special else character for character in value)


_ALNUM = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"


_STEP = re.compile(r"\.([A-Za-z_]\w*)|\[([^\[\]]+)\]")


def _getter(text: str, field: str, parameters: tuple[str, ...]) -> Callable[[dict[str, Any]], Any]:
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
    if not steps:
        return lambda bound: bound[name]

    def get(bound: dict[str, Any]) -> Any:
        value = bound[name]
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
