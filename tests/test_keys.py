"""Keys and fingerprints: what is a key, how calls become one, and that two different calls never share it."""

import asyncio
import inspect
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum
from functools import partial
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import Any
from uuid import UUID

import orjson
import pytest
import time_machine
from colours import Colour
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from idempotent import LocalBackend, idempotent
from idempotent.canonical import _canonical
from idempotent.errors import CallError, FingerprintMismatch, InvalidKey, KeyRequired, UnstableKey
from idempotent.keys import Binder, check_key, new_key

Function = Callable[..., Any]
Key = str | Callable[..., str | None] | None


def binder(
    function: Function,
    key: Key = None,
    fingerprint: bool | Callable[..., str | bytes] = True,
    ignore: tuple[str, ...] = (),
) -> Binder:
    return Binder(function, key=key, fingerprint=fingerprint, ignore=ignore)


def key_of(bound: Binder, *args: Any, **kwargs: Any) -> str:
    return bound.identify(args, kwargs, None)[0]


def print_of(bound: Binder, *args: Any, **kwargs: Any) -> bytes:
    return bound.identify(args, kwargs, None)[1]


def charge(order: Any, amount: Any = 5, *, currency: Any = "EUR") -> None: ...


def two(a: Any, b: Any) -> None: ...


def one(a: Any) -> None: ...


# ----------------------------------------------------------------------------------------------------- new_key


def test_a_new_key_is_a_uuid_of_version_7() -> None:
    made = UUID(new_key())
    assert made.version == 7
    assert made.variant == "specified in RFC 4122"


def test_a_new_key_is_written_as_uuids_are() -> None:
    made = new_key()
    assert str(UUID(made)) == made


def test_a_new_key_holds_the_milliseconds_of_its_making() -> None:
    with time_machine.travel(datetime(2024, 5, 6, 7, 8, 9, 123_000, tzinfo=UTC), tick=False):
        milliseconds = UUID(new_key()).int >> 80
    assert milliseconds == int(datetime(2024, 5, 6, 7, 8, 9, 123_000, tzinfo=UTC).timestamp() * 1000)


def test_new_keys_sort_by_the_time_they_were_made() -> None:
    made = []
    with time_machine.travel(datetime(2024, 1, 1, tzinfo=UTC), tick=False) as clock:
        for _ in range(1000):
            made.append(new_key())
            clock.shift(timedelta(milliseconds=1))
    assert made == sorted(made)


def test_new_keys_of_one_instant_differ() -> None:
    with time_machine.travel(datetime(2024, 1, 1, tzinfo=UTC), tick=False):
        assert len({new_key() for _ in range(10_000)}) == 10_000


def test_every_bit_of_a_new_key_that_may_be_random_is() -> None:
    with time_machine.travel(datetime(2024, 1, 1, tzinfo=UTC), tick=False):
        made = [UUID(new_key()).int for _ in range(500)]
    ever, always = 0, (1 << 128) - 1
    for value in made:
        ever |= value
        always &= value
    assert ever & ~always == (0xFFF << 64) | ((1 << 62) - 1)


# --------------------------------------------------------------------------------------------------- check_key


@pytest.mark.parametrize("key", [None, ""])
def test_a_missing_or_empty_key_is_asked_for(key: str | None) -> None:
    with pytest.raises(KeyRequired):
        check_key(key)


@pytest.mark.parametrize("key", [5, b"abc", 1.0, ["a"], object(), UUID(int=1), False, 0])
def test_a_key_that_is_no_text_is_invalid(key: object) -> None:
    with pytest.raises(InvalidKey, match=f"not {type(key).__name__}"):
        check_key(key)


@pytest.mark.parametrize("character", ["k", "é", "\U0001f600"])
def test_a_key_of_1024_characters_is_taken_and_one_more_is_refused(character: str) -> None:
    assert check_key(character * 1024) == character * 1024
    with pytest.raises(InvalidKey, match="1025"):
        check_key(character * 1025)


@pytest.mark.parametrize("character", [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), "\ud800", "\udfff"])
@pytest.mark.parametrize("around", ["{}", "a{}", "{}b", "é{}é"])
def test_a_key_with_a_control_character_is_invalid_wherever_it_stands(character: str, around: str) -> None:
    key = around.format(character)
    says = "lone surrogate" if character > "\xff" else "control character"
    with pytest.raises(InvalidKey, match=f"{says}.* at position {key.index(character)}"):
        check_key(key)


@pytest.mark.parametrize(
    "key", ["a", " ", "an order", "ordre n°5 : été", "日本", "a:b/c?d=e&f#g%h", "\\", "'\"", "\U0001f600", "\xa0", "~"]
)
def test_a_key_of_printable_text_is_taken_as_it_is(key: str) -> None:
    assert check_key(key) == key


def test_no_part_of_a_refused_key_is_told() -> None:
    for key in ("secret" * 300, "secret\n"):
        with pytest.raises(InvalidKey) as caught:
            check_key(key)
        assert "secret" not in str(caught.value)


class Shop(str, Enum):  # noqa: UP042
    PARIS = "paris"


def test_a_key_of_a_str_enum_is_its_text() -> None:
    assert check_key(Shop.PARIS) == "paris"


# -------------------------------------------------------------------------------------------------------- bind


def test_positions_names_and_defaults_make_one_key() -> None:
    bound = binder(charge)
    expected = key_of(bound, "o1")
    assert key_of(bound, "o1", 5) == expected
    assert key_of(bound, order="o1") == expected
    assert key_of(bound, "o1", amount=5, currency="EUR") == expected
    assert key_of(bound, currency="EUR", amount=5, order="o1") == expected


@pytest.mark.parametrize(
    "args, kwargs",
    [
        (("o2",), {}),
        (("o1", 6), {}),
        (("o1",), {"currency": "USD"}),
        (("o1", "5"), {}),
        (("o1", 5.0), {}),
        ((5, "o1"), {}),
    ],
)
def test_any_other_argument_makes_another_key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    bound = binder(charge)
    assert key_of(bound, *args, **kwargs) != key_of(bound, "o1")


def test_the_key_of_all_arguments_is_48_hex_characters() -> None:
    key = key_of(binder(charge), "o1")
    assert len(key) == 48
    assert set(key) <= set("0123456789abcdef")


def test_extra_positions_are_bound_in_order() -> None:
    def function(first: Any, *rest: Any) -> None: ...

    bound = binder(function)
    assert bound.bind((1, 2, 3), {}) == {"first": 1, "rest": (2, 3)}
    assert bound.bind((1,), {}) == {"first": 1, "rest": ()}
    assert key_of(bound, 1, 2, 3) != key_of(bound, 1, 3, 2)
    assert key_of(bound, 1, (2, 3)) != key_of(bound, 1, 2, 3)


def test_extra_names_are_bound_in_any_order() -> None:
    def function(first: Any, **more: Any) -> None: ...

    bound = binder(function)
    assert bound.bind((), {"first": 1, "x": 2}) == {"first": 1, "more": {"x": 2}}
    assert key_of(bound, 1, x=2, y=3) == key_of(bound, y=3, first=1, x=2)
    assert key_of(bound, 1, x=2) != key_of(bound, 1, y=2)


def test_a_name_beside_an_equally_named_positional_only_parameter_is_kept_apart() -> None:
    def function(a: Any, /, **more: Any) -> None: ...

    bound = binder(function)
    assert bound.bind((1,), {"a": 2}) == {"a": 1, "more": {"a": 2}}


def plain(a: Any, b: Any = 2) -> dict[str, Any]:
    return locals()


def nothing() -> dict[str, Any]:
    return locals()


def keywords(a: Any, *, b: Any, c: Any = 3) -> dict[str, Any]:
    return locals()


def positions(a: Any, b: Any = 2, /, c: Any = 3) -> dict[str, Any]:
    return locals()


def rest(a: Any, *args: Any, b: Any = 2) -> dict[str, Any]:
    return locals()


def more(a: Any = 1, **kwargs: Any) -> dict[str, Any]:
    return locals()


def everything(a: Any, /, b: Any, *args: Any, c: Any, d: Any = 4, **kwargs: Any) -> dict[str, Any]:
    return locals()


@settings(deadline=None)
@given(
    st.sampled_from([plain, nothing, keywords, positions, rest, more, everything]),
    st.lists(st.integers(), max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "c", "d", "e"]), st.integers(), max_size=4),
)
@example(plain, [1], {"a": 2})
@example(plain, [1, 2, 3], {})
@example(plain, [1], {"c": 2})
@example(plain, [], {"b": 2})
@example(positions, [1], {"a": 2})
@example(everything, [1, 2], {"a": 3, "b": 4, "c": 5})
def test_a_call_is_bound_as_python_binds_it_and_refused_where_python_refuses_it(
    function: Function, args: list[int], kwargs: dict[str, int]
) -> None:
    bound = binder(function)
    try:
        expected = function(*args, **kwargs)
    except TypeError:
        with pytest.raises(TypeError):
            bound.bind(tuple(args), kwargs)
        with pytest.raises(TypeError):
            bound.identify(tuple(args), kwargs, "given")
    else:
        arguments = bound.bind(tuple(args), kwargs)
        assert arguments == expected
        assert list(arguments) == list(inspect.signature(function).parameters)


def test_a_default_is_not_a_value_shared_with_the_caller() -> None:
    bound = binder(charge)
    bound.bind(("o1",), {})["amount"] = 99
    assert bound.bind(("o1",), {})["amount"] == 5


def test_what_has_no_signature_is_refused_at_decoration() -> None:
    with pytest.raises(TypeError, match="no signature"):
        binder(dict)


# ------------------------------------------------------------------------------------------------------ ignore


def test_an_ignored_parameter_is_in_neither_key_nor_fingerprint() -> None:
    bound = binder(charge, ignore=("amount",))
    assert bound.identify(("o1", 1), {}, None) == bound.identify(("o1", 2), {}, None)
    assert key_of(bound, "o1") != key_of(bound, "o2")


def test_an_ignored_parameter_may_be_unstable() -> None:
    bound = binder(charge, ignore=("amount",))
    assert key_of(bound, "o1", object()) == key_of(bound, "o1", object())


def test_an_ignored_parameter_is_left_out_of_the_fingerprint_of_a_template_too() -> None:
    bound = binder(charge, key="{order}", ignore=("amount",))
    assert print_of(bound, "o1", 1) == print_of(bound, "o1", 2)
    assert print_of(bound, "o1", currency="USD") != print_of(bound, "o1")


def test_extra_arguments_can_be_ignored() -> None:
    def function(a: Any, *args: Any, **kwargs: Any) -> None: ...

    bound = binder(function, ignore=("args", "kwargs"))
    assert key_of(bound, 1) == key_of(bound, 1, 2, x=object())


def test_ignoring_what_is_no_parameter_is_refused_at_decoration() -> None:
    with pytest.raises(ValueError, match="'amuont'.*order, amount, currency"):
        binder(charge, ignore=("amuont",))


# --------------------------------------------------------------------------------------------------- templates


class Hue(Enum):
    RED = "r"


class Size(IntEnum):
    SMALL = 1


class Word(StrEnum):
    ONE = "one"


@dataclass
class Order:
    id: Any
    lines: list[Any] = field(default_factory=list)
    tags: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize(
    "value, shown",
    [
        ("o1", "o1"),
        ("", ""),
        ("été", "été"),
        (5, "5"),
        (-5, "-5"),
        (True, "True"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.50"), "1.50"),
        (date(2024, 1, 2), "2024-01-02"),
        (datetime(2024, 1, 2, 3, tzinfo=UTC), "2024-01-02T03:00:00+00:00"),
        (time(1, 2), "01:02:00"),
        (Hue.RED, "RED"),
        (Size.SMALL, "SMALL"),
        (Word.ONE, "ONE"),
    ],
)
def test_a_template_shows_a_value_of_a_stable_type(value: Any, shown: str) -> None:
    assert key_of(binder(one, key="k{a}"), value) == f"k{shown}"


@pytest.mark.parametrize("value", [1.0, float("nan"), b"a", [1], (1,), {1}, {"a": 1}, object(), 1j, timedelta(1), int])
def test_a_template_takes_no_value_that_has_many_spellings_or_none(value: Any) -> None:
    with pytest.raises(UnstableKey, match=f"field {{a}} is a {type(value).__name__}"):
        key_of(binder(one, key="k{a}", fingerprint=False), value)


def test_a_template_with_a_number_of_thousands_of_digits_is_too_long() -> None:
    with pytest.raises(InvalidKey):
        key_of(binder(one, key="k{a}"), 10**5000)


class Right(Flag):
    READ = 1


def test_a_template_takes_no_flag_that_has_no_name() -> None:
    with pytest.raises((KeyRequired, UnstableKey)):
        key_of(binder(one, key="k{a}"), Right(0))


def test_a_template_that_meets_none_asks_for_a_key() -> None:
    with pytest.raises(KeyRequired, match="{order} is None"):
        key_of(binder(charge, key="charge:{order}"), None)


def test_a_template_that_comes_out_empty_asks_for_a_key() -> None:
    with pytest.raises(KeyRequired):
        key_of(binder(one, key="{a}"), "")


@pytest.mark.parametrize("value", ["a\nb", "\x00", "\x7f", "\x85", "\ud800"])
def test_a_template_with_a_control_character_in_a_value_is_invalid(value: str) -> None:
    with pytest.raises(InvalidKey):
        key_of(binder(one, key="k:{a}", fingerprint=False), value)


def test_a_key_that_a_template_renders_too_long_is_refused_and_not_cut() -> None:
    bound = binder(one, key="k:{a}")
    assert len(key_of(bound, "x" * 1022)) == 1024
    with pytest.raises(InvalidKey, match="1025"):
        key_of(bound, "x" * 1023)


def test_a_template_reaches_attributes_and_items() -> None:
    order = Order("o1", lines=["l0", "l1"], tags={"shop": "s1", "0": "zero"})
    assert key_of(binder(one, key="{a.id}"), order) == "o1"
    assert key_of(binder(one, key="{a.lines[1]}"), order) == "l1"
    assert key_of(binder(one, key="{a.tags[shop]}"), order) == "s1"
    assert key_of(binder(one, key="{a[id]}"), {"id": 7}) == "7"
    assert key_of(binder(one, key="{a[1].id}"), [None, order]) == "o1"


@pytest.mark.parametrize("template", ["{a.missing}", "{a.lines[5]}", "{a.tags[none]}", "{a.id[x]}", "{a.id[0][x]}"])
def test_a_template_whose_field_is_not_there_asks_for_a_key(template: str) -> None:
    with pytest.raises(KeyRequired, match="is not there"):
        key_of(binder(one, key=template), Order("o1"))


def test_a_template_whose_field_cannot_be_had_quotes_nothing_of_the_call() -> None:
    class Card:
        def __init__(self, number: str) -> None:
            self.number = number

        def __getitem__(self, name: str) -> str:
            raise KeyError(self.number)

    with pytest.raises(KeyRequired, match="KeyError") as caught:
        key_of(binder(one, key="{a[holder]}", fingerprint=False), Card("4111"))
    assert "4111" not in str(caught.value)


def test_a_template_reads_extra_arguments_by_the_name_of_their_parameter() -> None:
    def function(*args: Any, **kwargs: Any) -> None: ...

    assert key_of(binder(function, key="{args[0]}-{kwargs[order]}"), "a", order="b") == "a-b"


def test_a_template_uses_defaults() -> None:
    assert key_of(binder(charge, key="{order}:{amount}:{currency}"), "o1") == "o1:5:EUR"


def test_doubled_braces_are_text() -> None:
    assert key_of(binder(one, key="{{a}}{a}{{"), "x") == "{a}x{"
    assert key_of(binder(one, key="{{a}}{a}{{"), "x{") == "{a}x\\{{"


def test_a_template_without_fields_is_one_key_for_all_calls() -> None:
    bound = binder(charge, key="nightly")
    assert key_of(bound, "o1") == key_of(bound, "o2") == "nightly"


def test_a_field_may_stand_twice() -> None:
    assert key_of(binder(two, key="{a}/{b}/{a}"), "x", "y") == "x/y/x"


@pytest.mark.parametrize(
    "template",
    [
        "{order_id}",
        "{}",
        "{0}",
        "{order}{}",
        "{order.}",
        "{order[}",
        "{order",
        "order}",
        "{order:>5}",
        "{order!r}",
        "",
        "{ order}",
    ],
)
def test_a_template_that_cannot_be_rendered_is_refused_at_decoration(template: str) -> None:
    with pytest.raises(ValueError):
        binder(charge, key=template)


def test_a_template_that_names_no_parameter_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match="'ordre', which is no parameter; there are order, amount, currency"):
        binder(charge, key="{ordre}")


@pytest.mark.parametrize("template", ["{order:5}", "{order!s}", "{order!r:>9}"])
def test_a_format_in_a_template_is_refused_by_name(template: str) -> None:
    with pytest.raises(ValueError, match="formats {order}"):
        binder(charge, key=template)


TEMPLATES = [
    "{a}:{b}",
    "{a}{b}",
    "x{a}-{b}y",
    "{a}\\{b}",
    "{a}e{b}",
    "{a}\\e{b}",
    "{a}{{{b}}}",
    "{a}::{b}",
    "\\{a}{b}",
    "{a}:e{b}\\",
    "{b}{a}",
    "{a} {b}",
    "{a}é{b}",
    "{a}e:{b}",
    "{a}:{b}:{a}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_no_two_pairs_of_short_values_of_the_templates_own_characters_render_to_one_key(template: str) -> None:
    bound = binder(two, key=template, fingerprint=False)
    alphabet = sorted({"\\", "e", *(character for character in template if character not in "abxy")})
    words = ["".join(letters) for length in range(3) for letters in itertools.product(alphabet, repeat=length)]
    seen: dict[str, tuple[str, ...]] = {}
    for pair in itertools.product(words, repeat=2):
        key = key_of(bound, *pair)
        assert seen.setdefault(key, pair) == pair


words = st.text(st.sampled_from("\\e:-xyéa{} "), max_size=6) | st.text(
    st.characters(exclude_categories=["Cs", "Cc"]), max_size=6
)


@settings(deadline=None)
@given(st.sampled_from(TEMPLATES), words, words, words, words)
def test_different_values_never_render_to_one_key(template: str, a: str, b: str, a2: str, b2: str) -> None:
    bound = binder(two, key=template, fingerprint=False)
    assert (key_of(bound, a, b) == key_of(bound, a2, b2)) is ((a, b) == (a2, b2))


literals = st.text(st.sampled_from("\\e:-xyé{}"), max_size=3).map(
    lambda text: text.replace("{", "{{").replace("}", "}}")
)


@settings(deadline=None)
@given(literals, literals, literals, words, words, st.integers(1, 6), st.booleans())
def test_under_no_template_can_text_be_moved_from_one_value_to_the_next(
    before: str, between: str, after: str, a: str, b: str, moved: int, repeat: bool
) -> None:
    bound = binder(two, key=f"{before}{{a}}{between}{{b}}{after}", fingerprint=False)
    plain_between = "".join(literal for literal, *_ in Formatter().parse(between))
    joined = a + (plain_between if repeat else "") + b
    a2, b2 = joined[:moved], joined[moved:]
    assume((a, b) != (a2, b2))
    assert key_of(bound, a, b) != key_of(bound, a2, b2)


def test_values_are_escaped_only_where_they_could_be_mistaken() -> None:
    bound = binder(two, key="x{a}-{b}")
    assert key_of(bound, "o:1", "été") == "xo:1-été"
    assert key_of(bound, "o-1", "a\\b") == "xo\\-1-a\\\\b"


# ------------------------------------------------------------------------------------------------ callable keys


def test_a_callable_key_gets_the_call_as_it_was_made() -> None:
    seen: list[Any] = []

    def key(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "k1"

    assert key_of(binder(charge, key=key), "o1", currency="USD") == "k1"
    assert seen == [(("o1",), {"currency": "USD"})]


@pytest.mark.parametrize("given_key", [None, ""])
def test_a_callable_key_that_gives_none_or_nothing_asks_for_a_key(given_key: str | None) -> None:
    with pytest.raises(KeyRequired):
        key_of(binder(charge, key=lambda order: given_key), "o1")


@pytest.mark.parametrize("given_key", [5, b"k", "a\nb", "x" * 1025])
def test_a_callable_key_that_gives_what_is_no_key_is_invalid(given_key: Any) -> None:
    with pytest.raises(InvalidKey):
        key_of(binder(charge, key=lambda order: given_key), "o1")


def test_a_call_that_does_not_fit_is_refused_before_the_callable_key_is_asked() -> None:
    asked: list[Any] = []

    def key(*args: Any, **kwargs: Any) -> str:
        asked.append(args)
        return "k1"

    with pytest.raises(TypeError, match="order"):
        key_of(binder(charge, key=key))
    assert asked == []


def test_a_key_that_the_caller_gives_is_taken_before_template_and_arguments() -> None:
    for key in (None, "{order}", lambda order: "mine"):
        bound = binder(charge, key=key)
        assert bound.identify(("o1",), {}, "given")[0] == "given"
        assert bound.identify(("o1",), {}, "given")[1] != bound.identify(("o2",), {}, "given")[1]


# ------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("key", ["{order}", lambda *args, **kwargs: "k1"], ids=["template", "callable"])
def test_the_fingerprint_tells_calls_of_one_key_apart(key: Any) -> None:
    bound = binder(charge, key=key)
    first, again, other = (bound.identify(("o1",), {"amount": amount}, None) for amount in (5, 5, 6))
    assert first == again
    assert first[0] == other[0]
    assert first[1] != other[1]
    assert len(first[1]) == 16


def test_positions_names_and_defaults_make_one_fingerprint() -> None:
    bound = binder(charge, key="{order}")
    assert print_of(bound, "o1") == print_of(bound, order="o1", amount=5, currency="EUR")


@pytest.mark.parametrize("key", [None, "{order}"])
def test_without_a_fingerprint_nothing_is_compared(key: str | None) -> None:
    assert print_of(binder(charge, key=key, fingerprint=False), "o1") == b""


def test_with_a_key_and_without_a_fingerprint_arguments_may_be_unstable() -> None:
    assert binder(charge, key="{order}", fingerprint=False).identify(("o1", object()), {}, None) == ("o1", b"")


def test_an_unstable_argument_beside_a_key_is_refused_for_the_fingerprint_with_the_ways_out() -> None:
    with pytest.raises(UnstableKey, match=r"the argument 'amount' is a builtins\.object") as caught:
        key_of(binder(charge, key="{order}"), "o1", object())
    assert "ignore=" in str(caught.value)
    assert "fingerprint=" in str(caught.value)


def test_a_callable_fingerprint_gets_the_call_as_it_was_made() -> None:
    seen: list[Any] = []

    def mine(*args: Any, **kwargs: Any) -> str:
        seen.append((args, kwargs))
        return "f"

    print_of(binder(charge, key="{order}", fingerprint=mine), "o1", currency="USD")
    assert seen == [(("o1",), {"currency": "USD"})]


@pytest.mark.parametrize(
    "first, other", [("a", "b"), (b"a", b"b"), ("a", ""), (b"a" * 100, b"a" * 101), ("\ud800", "a")]
)
def test_a_callable_fingerprint_of_text_or_bytes_is_digested(first: str | bytes, other: str | bytes) -> None:
    prints = [
        print_of(binder(charge, key="{order}", fingerprint=lambda order, given=given: given), "o1")
        for given in (first, first, other)
    ]
    assert prints[0] == prints[1] != prints[2]
    assert {len(found) for found in prints} == {16}


@pytest.mark.parametrize("result", [None, 5, ["a"], True])
def test_a_callable_fingerprint_of_anything_else_is_refused(result: Any) -> None:
    with pytest.raises(UnstableKey, match=f"str or bytes, not {type(result).__name__}"):
        print_of(binder(charge, key="{order}", fingerprint=lambda order: result), "o1")


def test_a_callable_fingerprint_does_not_change_the_key_of_all_arguments() -> None:
    mine = binder(charge, fingerprint=lambda *args, **kwargs: "f")
    assert key_of(mine, "o1") == key_of(binder(charge), "o1")


def test_neighbouring_arguments_cannot_swap_their_parts() -> None:
    bound = binder(two)
    keys = [
        key_of(bound, *pair)
        for pair in [("a", "b"), ("ab", ""), ("", "ab"), (1, 23), (12, 3), ("a\x00", "b"), ('"a"', "b"), (["a"], "b")]
    ]
    assert len(set(keys)) == len(keys)


# ---------------------------------------------------------------------------------------------------- instances


class Account:
    def __init__(self, number: str) -> None:
        self.id = number

    def pay(self, amount: Any) -> None: ...

    def build(cls, amount: Any) -> None: ...  # noqa: N805


@dataclass(frozen=True)
class Wallet:
    id: str

    def pay(self, amount: Any) -> None: ...


@pytest.mark.parametrize("method", [Account.pay, Account.build])
@pytest.mark.parametrize("key", ["pay:{amount}", lambda account, amount: f"pay:{amount}"], ids=["template", "callable"])
def test_with_a_key_the_instance_is_in_neither_key_nor_fingerprint(method: Function, key: Any) -> None:
    bound = binder(method, key=key)
    assert bound.identify((Account("1"), 5), {}, None) == bound.identify((Account("2"), 5), {}, None)
    assert print_of(bound, Account("1"), 5) != print_of(bound, Account("1"), 6)


def test_a_template_may_name_the_instance() -> None:
    bound = binder(Account.pay, key="account:{self.id}")
    assert key_of(bound, Account("1"), 5) == "account:1"


def test_an_instance_without_a_stable_form_is_refused_with_both_ways_out() -> None:
    with pytest.raises(UnstableKey) as caught:
        key_of(binder(Account.pay), Account("1"), 5)
    message = str(caught.value)
    assert "the argument 'self' is a Account" in message
    assert 'key="account:{self.id}"' in message
    assert 'ignore=("self",)' in message


def test_an_instance_with_a_stable_form_is_part_of_the_key_of_all_arguments() -> None:
    bound = binder(Wallet.pay)
    assert key_of(bound, Wallet("1"), 5) == key_of(bound, Wallet("1"), 5)
    assert key_of(bound, Wallet("1"), 5) != key_of(bound, Wallet("2"), 5)


def test_an_ignored_instance_may_be_unstable() -> None:
    bound = binder(Account.pay, ignore=("self",))
    assert key_of(bound, Account("1"), 5) == key_of(bound, Account("2"), 5)


def test_a_class_is_part_of_the_key_of_all_arguments_by_its_name() -> None:
    bound = binder(Account.build)
    assert key_of(bound, Account, 5) != key_of(bound, Wallet, 5)


# ------------------------------------------------------------------------------------------- decorated functions


def test_a_decorator_without_a_fingerprint_replays_to_other_arguments(backend_url: str, colour: Colour) -> None:
    runs: list[tuple[str, int]] = []

    def pay(order: str, amount: int) -> int:
        runs.append((order, amount))
        return amount

    free = colour.define(pay, backend=backend_url, namespace="n", key="{order}", fingerprint=False)
    assert colour.call(free, "o", 5) == colour.call(free, "o", 6) == 5
    assert colour.call(free.explain, "o", 7).decision == "would_replay"
    assert colour.call(free.peek, "o", 8).fingerprint == ""
    strict = colour.define(pay, backend=backend_url, namespace="n", key="{order}")
    assert colour.call(strict, "o", 9) == 5, "what the record does not hold is not compared"
    assert runs == [("o", 5)]


@pytest.mark.parametrize("digest", [lambda amount: str(amount), lambda amount: b"%d" % amount], ids=["text", "bytes"])
def test_a_decorators_own_fingerprint_is_what_is_compared(backend_url: str, colour: Colour, digest: Any) -> None:
    runs: list[tuple[str, int, str]] = []
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def pay(order: str, amount: int, *, note: str = "") -> int:
        runs.append((order, amount, note))
        return amount

    def by_amount(*args: Any, **kwargs: Any) -> str | bytes:
        seen.append((args, kwargs))
        return digest(args[1])

    pay = colour.define(pay, backend=backend_url, key="{order}", fingerprint=by_amount)
    assert colour.call(pay, "o", 5, note="first") == colour.call(pay, "o", 5, note="again") == 5
    with pytest.raises(FingerprintMismatch):
        colour.call(pay, "o", 6, note="first")
    assert colour.call(pay.explain, "o", 6).decision == "would_refuse"
    assert runs == [("o", 5, "first")]
    assert seen[:2] == [(("o", 5), {"note": "first"}), (("o", 5), {"note": "again"})]


@pytest.mark.parametrize(
    "key, error",
    [
        (None, KeyRequired),
        ("", KeyRequired),
        ("a\nb", InvalidKey),
        ("x" * 1025, InvalidKey),
        (5, InvalidKey),
    ],
    ids=repr,
)
def test_a_call_without_a_usable_key_runs_nothing_and_leaves_nothing(
    backend_url: str, colour: Colour, key: Any, error: type[CallError]
) -> None:
    runs: list[int] = []
    pay = colour.define(lambda: runs.append(1), backend=backend_url, namespace="n", key=lambda: key)
    for ask in (pay, pay.outcome, pay.peek, pay.explain, pay.forget):
        with pytest.raises(error):
            colour.call(ask)
    assert runs == []
    assert pay.stats() == {}


def test_the_namespace_is_the_functions_module_and_name_unless_one_is_given(colour: Colour) -> None:
    backend = LocalBackend()

    def pay(order: str) -> str:
        return order

    named = colour.define(pay, backend=backend)
    given = colour.define(pay, backend=backend, namespace="shop")
    colour.call(named, "o")
    assert colour.call(given.peek, "o") is None
    colour.call(given, "o")
    assert colour.call(named.peek, "o").namespace == f"{__name__}.{pay.__qualname__}"
    assert colour.call(given.peek, "o").namespace == "shop"


def test_functions_of_one_name_in_two_modules_do_not_share_their_keys(colour: Colour) -> None:
    backend = LocalBackend()

    def made_in(module: str) -> Any:
        def pay(order: str) -> str:
            return f"{module} {order}"

        pay.__module__, pay.__qualname__ = module, "pay"
        return colour.define(pay, backend=backend, key="{order}")

    one, other = made_in("shop.eu"), made_in("shop.us")
    assert [colour.call(pay, "o") for pay in (one, other, one)] == ["shop.eu o", "shop.us o", "shop.eu o"]


def test_async_methods_of_every_kind_run_once_for_a_key(backend_url: str) -> None:
    once = partial(idempotent, backend=backend_url)

    class Account:
        runs: list[str] = []
        rate = 1

        def __init__(self, number: int) -> None:
            self.id = number

        @once(key="pay:{self.id}:{order}")
        async def pay(self, order: str) -> str:
            self.runs.append("pay")
            return f"{self.id} {order}"

        @classmethod
        @once(key="above:{order}")
        async def above(cls, order: str) -> str:
            cls.runs.append("above")
            return f"{cls.__name__} {order}"

        @once(key="below:{order}")
        @classmethod
        async def below(cls, order: str) -> str:
            cls.runs.append("below")
            return f"{cls.__name__} {order}"

        @staticmethod
        @once
        async def static(order: str) -> str:
            Account.runs.append("static")
            return order

        @once
        @staticmethod
        async def static_below(order: str) -> str:
            Account.runs.append("static below")
            return order

    async def main() -> None:
        one, other = Account(1), Account(2)
        for _ in range(2):
            assert [await one.pay("o"), await other.pay("o")] == ["1 o", "2 o"]
            assert [await one.above("o"), await Account.above("o")] == ["Account o"] * 2
            assert [await one.below("o"), await Account.below("o")] == ["Account o"] * 2
            assert [await one.static("o"), await Account.static("o")] == ["o"] * 2
            assert [await one.static_below("o"), await Account.static_below("o")] == ["o"] * 2
        assert (await Account.pay.outcome(one, "o")).replayed
        assert Account.pay.key_for(one, "o") == "pay:1:o"
        assert await Account.static.forget("o")
        assert await Account.static.peek("o") is None
        assert inspect.iscoroutinefunction(Account.static)
        assert inspect.iscoroutinefunction(Account.below)

    asyncio.run(main())
    assert sorted(Account.runs) == ["above", "below", "pay", "pay", "static", "static below"]


# --------------------------------------------------------------------------------------------- other processes

SCRIPT = """
import json
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from idempotent.keys import Binder

@dataclass(frozen=True)
class Item:
    name: str
    tags: frozenset

def function(a, *args, b=None, **kwargs): ...

words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
binder = Binder(function, key=None, fingerprint=True, ignore=())
calls = [
    binder.identify((set(words), frozenset(words)), {}, None),
    binder.identify(({word: {word, "x", "y"} for word in set(words)},), {}, None),
    binder.identify((1, Decimal("1.0")), {"b": date(2024, 1, 1), **{word: 1 for word in set(words)}}, None),
    binder.identify(({Item(word, frozenset(words)) for word in words},), {}, None),
]
print(json.dumps([list(set(words)), [[key, digest.hex()] for key, digest in calls]]))
"""


def run_with_seed(seed: str) -> tuple[list[str], list[list[str]]]:
    root = str(Path(__file__).parents[1])
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    order, calls = json.loads(finished.stdout)
    return order, calls


def test_keys_and_fingerprints_are_the_same_in_every_process() -> None:
    orders, calls = zip(*[run_with_seed(seed) for seed in ("1", "2", "3")], strict=True)
    assert len({tuple(order) for order in orders}) > 1, "the sets were walked in one order, which proves nothing"
    assert calls[0] == calls[1] == calls[2]
    assert len({key for key, _ in calls[0]}) == 4


# ------------------------------------------------------------------------------ keys that are in records by now


def pay(order: Any, amount: Any = 5, *items: Any, currency: Any = "EUR", **more: Any) -> None: ...


class Till:
    def pay(self, order: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "key", "args", "kwargs", "given", "named", "printed"),
    [
        (charge, None, ("o-1",), {}, None, "1673f698ee1d69fe6bc2105c2bcae50fe80efd62f5a2755a", None),
        (charge, None, ("o-1", 5), {"currency": "EUR"}, None, "1673f698ee1d69fe6bc2105c2bcae50fe80efd62f5a2755a", None),
        (charge, None, (2**53, -1), {"currency": None}, None, "01660242c3da3d22e4c246c772c675e7bc97b30ce591c6d7", None),
        (
            charge,
            None,
            (1.5, True),
            {"currency": Decimal("1.0")},
            None,
            "14761c3387ea235a4129ffdcad1ab83c01153b0a380681bf",
            None,
        ),
        (
            charge,
            "pay:{order}/{currency}",
            ("a:b\\é",),
            {},
            None,
            "pay:a\\:b\\\\é/EUR",
            "2decb84c9ac94c986b544beb5787a2c4",
        ),
        (charge, "{order}{amount}", ("x", 7), {}, None, "x\\e7", "548704fd149d5b81dcd992ab1f56a661"),
        (charge, "{{{order}}}x{currency}", ("é{",), {}, None, "{é\\{}xEUR", "39098f16c91961e58028801b3c133cb9"),
        (
            pay,
            None,
            ("o", 1, 2, [3]),
            {"z": {"a": 1}},
            None,
            "b4af3f23358511d20603cfd82084e4cb4a2bd50573f90f8c",
            None,
        ),
        (
            pay,
            "k{items[0]}-{more[z]}",
            ("o", 1, "q"),
            {"z": UUID(int=7)},
            None,
            "kq-00000000\\-0000\\-0000\\-0000\\-000000000007",
            "28cca271d4b574ebfdd0543a1d8b2f5d",
        ),
        (
            Till.pay,
            "{order}",
            (Till(), date(2024, 5, 6)),
            {},
            None,
            "2024-05-06",
            "114ca957183d4d818f11bd3fdf2a3501",
        ),
        (charge, None, ("o",), {}, "mine", "mine", "78a1e9ee40ce3d7dd413e9279ed5cd86"),
        (charge, "t{order}", ("o",), {}, "mine", "mine", "78a1e9ee40ce3d7dd413e9279ed5cd86"),
    ],
)
def test_keys_and_fingerprints_are_those_that_records_were_made_under(
    function: Function,
    key: str | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: str | None,
    named: str,
    printed: str | None,
) -> None:
    bound = binder(function, key)
    expected = named, bytes.fromhex(printed or named[:32])
    assert bound.identify(args, kwargs, given) == expected
    assert bound.identifier(given)(args, kwargs) == expected


# ------------------------------------------------------------------------------------ the compiled binder

KINDS = inspect.Parameter
NAMES = ["order", "type", "str", "int", "blake2b", "_encode", "__dumps", "bound", "self", "cls", "key", "render", "é"]
VALUES = st.one_of(
    st.text(max_size=8),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**53, -(2**53), 2**53 - 1, True, None, 1.5, float("nan"), "\ud800", "a:b\\", b"x", object()]),
    st.lists(st.integers(), max_size=2),
)


@st.composite
def signatures(draw: st.DrawFn) -> inspect.Signature:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=5))
    kinds = sorted(
        draw(
            st.lists(
                st.sampled_from(list(type(KINDS.POSITIONAL_ONLY))), min_size=len(names), max_size=len(names)
            ).filter(lambda kinds: kinds.count(KINDS.VAR_POSITIONAL) < 2 and kinds.count(KINDS.VAR_KEYWORD) < 2)
        )
    )
    parameters: list[inspect.Parameter] = []
    defaulted = False
    for name, kind in zip(names, kinds, strict=True):
        default: Any = inspect.Parameter.empty
        if kind not in (KINDS.VAR_POSITIONAL, KINDS.VAR_KEYWORD):
            must = defaulted and kind is not KINDS.KEYWORD_ONLY
            if must or draw(st.booleans()):
                default, defaulted = draw(VALUES), True
        parameters.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(parameters)


def answer(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except (TypeError, CallError) as error:
        assert error.__cause__ is None
        assert error.__context__ is None or error.__suppress_context__
        return type(error), str(error)


@settings(max_examples=300)
@given(
    signatures(),
    st.lists(VALUES, max_size=5),
    st.dictionaries(st.sampled_from([*NAMES, "other"]), VALUES, max_size=4),
    st.data(),
)
def test_the_compiled_binder_does_what_inspect_and_the_digest_of_each_argument_do(
    signature: inspect.Signature, args: list[Any], kwargs: dict[str, Any], data: st.DataObject
) -> None:
    def function(*args: Any, **kwargs: Any) -> None: ...

    function.__signature__ = signature  # type: ignore[attr-defined]
    names = list(signature.parameters)
    scalars = [
        name for name in names if signature.parameters[name].kind not in (KINDS.VAR_POSITIONAL, KINDS.VAR_KEYWORD)
    ]
    fields = data.draw(st.lists(st.sampled_from(scalars), max_size=2) if scalars else st.just([]))
    template = ":".join(["k", *(f"{{{name}}}" for name in fields)]) if fields else None
    ignore = tuple(data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True)) if names else ())
    printing, given_key = data.draw(st.booleans()), data.draw(st.sampled_from([None, "mine"]))
    bound = binder(function, template, printing, ignore)

    def by_inspect() -> dict[str, Any]:
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        return dict(arguments.arguments)

    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    if KINDS.VAR_KEYWORD in kinds.values():  # see the next test
        assume(not any(kinds.get(name) is KINDS.POSITIONAL_ONLY for name in kwargs))
    expected = answer(by_inspect)
    found = answer(lambda: bound.bind(tuple(args), kwargs))
    if not isinstance(expected, dict) or not isinstance(found, dict):
        assert found == expected
    else:
        assert list(found) == list(expected)
        assert all(found[name] is expected[name] or found[name] == expected[name] for name in found)
    general = answer(lambda: bound.identify(tuple(args), kwargs, given_key))
    assert answer(lambda: bound.identifier(given_key)(tuple(args), kwargs)) == general
    if isinstance(expected, dict) and isinstance(general[0], str) and printing:
        left_out = (
            {*ignore, *([names[0]] if names[0] in ("self", "cls") and (template or given_key) else [])}
            if names
            else {*ignore}
        )
        parts = [orjson.dumps(_canonical(value, "", 0)) for name, value in expected.items() if name not in left_out]
        assert general[1] == blake2b(b"\0".join(parts), digest_size=24).digest()[:16]


def test_a_name_that_only_a_position_takes_may_come_again_among_the_others_as_python_has_it() -> None:
    def function(order: Any, /, **more: Any) -> None: ...

    bound = binder(function)
    assert bound.bind((1,), {"order": 2}) == {"order": 1, "more": {"order": 2}}
    assert key_of(bound, 1, order=2) == bound.identifier(None)((1,), {"order": 2})[0] != key_of(bound, 1)
