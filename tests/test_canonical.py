"""The canonical form: one digest for one value and type, and results that come back as what they were."""

import datetime as dt
import functools
import ipaddress
import json
import math
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, Flag, IntEnum, IntFlag, StrEnum
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import attrs
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotent.canonical import dumps, encode, loads
from idempotent.errors import SerializationError, UnstableKey

PARIS = ZoneInfo("Europe/Paris")


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(IntEnum):
    SMALL = 1


class Word(StrEnum):
    ONE = "one"


class Right(Flag):
    READ = 1
    WRITE = 2


@dataclass
class Money:
    amount: Decimal
    currency: str = "EUR"


@dataclass
class Coin:
    amount: Decimal
    currency: str = "EUR"


@dataclass(slots=True)
class Slotted:
    amount: int


class Point(NamedTuple):
    x: int
    y: int


class Pair(NamedTuple):
    x: int
    y: int


@attrs.define
class AttrsOrder:
    id: int
    lines: list[str] = attrs.field(factory=list)


class StructOrder(msgspec.Struct):
    id: int
    lines: list[str] = []


class ModelOrder(pydantic.BaseModel):
    id: int
    lines: list[str] = []


class OpenModel(pydantic.BaseModel, extra="allow"):
    id: int


class Name(str):
    __slots__ = ()


class Ref(int):
    pass


class Rows(list[Any]):
    pass


class Opaque:
    pass


class Bits(IntFlag):
    ONE = 1


class Labelled(Money):
    label = ""


@dataclass
class Bag(dict[str, int]):
    name: str

    def __init__(self, name: str, **items: int) -> None:
        super().__init__(items)
        self.name = name


@dataclass(frozen=True)
class Frozen:
    id: int


@attrs.define
class Unset:
    id: int = attrs.field(init=False)


class NoZone(dt.tzinfo):
    def utcoffset(self, when: datetime | None) -> timedelta:
        return timedelta(0)

    def dst(self, when: datetime | None) -> timedelta:
        return timedelta(0)

    def tzname(self, when: datetime | None) -> str:
        return "mine"


# ----------------------------------------------------------------------------------------------- encode: distinct

DISTINCT: list[Any] = [
    None,
    False,
    True,
    0,
    1,
    -1,
    1.0,
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    5e-324,
    1 + 0j,
    complex(1, -0.0),
    "",
    "1",
    "None",
    "null",
    "true",
    '["l",1]',
    b"",
    b"1",
    bytearray(b"1"),
    Decimal(1),
    Decimal("1.0"),
    Decimal("1.00"),
    Decimal("1E+2"),
    Decimal(100),
    Decimal("-0"),
    Decimal(0),
    Decimal("Infinity"),
    2**53 - 1,
    2**53,
    2**53 + 1,
    -(2**53),
    -(2**53) - 1,
    2**64,
    10**4000,
    hex(2**53),
    ["i", hex(2**53)],
    [],
    (),
    {},
    set(),
    frozenset(),
    [1],
    (1,),
    {1},
    frozenset([1]),
    {1: None},
    {"1": None},
    {1.5: None},
    [[1], 2],
    [1, [2]],
    [1, 2],
    [2, 1],
    ["l", 1],
    ["t", 1],
    ("l", 1),
    [["l", 1]],
    ["d", ["a", 1]],
    {"a": 1},
    {"a": 1.0},
    {"a": {"b": 1}},
    {"a": 1, "b": 1},
    {"a": [1]},
    {"a": (1,)},
    {"d": ["a", 1]},
    [("a", 1)],
    {("a", 1)},
    {("a", 1): 1},
    date(2024, 1, 1),
    datetime(2024, 1, 1),
    datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
    datetime(2024, 1, 1, 1, tzinfo=timezone(timedelta(hours=1), "X")),
    datetime(2024, 1, 1, 1, tzinfo=PARIS),
    datetime(2024, 1, 1, 1, tzinfo=ZoneInfo("Europe/Berlin")),
    datetime(2024, 10, 27, 2, 30, tzinfo=PARIS),
    datetime(2024, 10, 27, 2, 30, tzinfo=PARIS, fold=1),
    datetime(2024, 10, 27, 2, 30),
    datetime(2024, 10, 27, 2, 30, fold=1),
    datetime(2024, 1, 1, microsecond=1),
    "2024-01-01",
    "2024-01-01T00:00:00",
    time(1),
    time(1, fold=1),
    time(1, tzinfo=UTC),
    time(1, tzinfo=PARIS),
    timedelta(0),
    timedelta(days=1),
    timedelta(microseconds=-1),
    UUID(int=0),
    str(UUID(int=0)),
    UUID(int=0).hex,
    Colour.RED,
    Colour.BLUE,
    "red",
    "RED",
    Size.SMALL,
    Word.ONE,
    "one",
    Right.READ,
    Right.READ | Right.WRITE,
    Right(0),
    PurePosixPath("a/b"),
    PureWindowsPath("a/b"),
    "a/b",
    Money(Decimal(1)),
    Money(Decimal("1.0")),
    Money(Decimal(1), "USD"),
    Coin(Decimal(1)),
    Slotted(1),
    Point(1, 2),
    Point(2, 1),
    Pair(1, 2),
    (1, 2),
    AttrsOrder(1),
    AttrsOrder(1, ["a"]),
    StructOrder(1),
    StructOrder(1, ["a"]),
    ModelOrder(id=1),
    ModelOrder(id=1, lines=["a"]),
    OpenModel(id=1),
    OpenModel.model_validate({"id": 1, "more": 2}),
    {"id": 1, "lines": []},
    int,
    str,
    Money,
    Coin,
    Name("1"),
    Ref(1),
    Ref(2),
    Rows([1]),
    defaultdict(int, a=1),
    ipaddress.ip_address("127.0.0.1"),
    ipaddress.ip_address("::1"),
    ipaddress.ip_network("127.0.0.0/8"),
    "127.0.0.1",
]


def test_values_that_differ_in_type_or_content_differ_in_bytes() -> None:
    seen: dict[bytes, Any] = {}
    for value in DISTINCT:
        other = seen.setdefault(encode(value), value)
        assert other is value, f"{type(other)} {other!r:.80} and {type(value)} {value!r:.80}"


def test_the_order_of_a_dict_does_not_matter() -> None:
    assert encode({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == encode({"b": [2, {"d": 4, "c": 3}], "a": 1})


def test_the_order_of_a_dict_with_keys_of_several_types_does_not_matter() -> None:
    pairs: list[tuple[Any, int]] = [(1, 1), ("1", 2), (None, 3), ((1, "a"), 4), (Decimal(2), 5), (1.5, 6)]
    assert encode(dict(pairs)) == encode(dict(reversed(pairs)))


@pytest.mark.parametrize("kind", [set, frozenset])
def test_the_order_of_a_set_does_not_matter(kind: Callable[[Any], Any]) -> None:
    items = [8, 0, 16, "8", None, (8, 0), Decimal(3)]
    assert encode(kind(items)) == encode(kind(reversed(items)))
    assert list(kind([0, 8])) != list(kind([8, 0])), "the two sets are walked in one order, which proves nothing"
    assert encode(kind([0, 8])) == encode(kind([8, 0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Money(Decimal("1.50")),
        lambda: Slotted(1),
        lambda: Point(1, 2),
        lambda: AttrsOrder(1, ["a"]),
        lambda: StructOrder(1, ["a"]),
        lambda: ModelOrder(id=1, lines=["a"]),
        lambda: OpenModel.model_validate({"id": 1, "more": {"x": 1}}),
        lambda: Colour("red"),
        lambda: Right.READ | Right.WRITE,
        lambda: PurePosixPath("a/b"),
        lambda: Name("x"),
        lambda: Rows([1, "a"]),
        lambda: defaultdict(list, a=[1]),
        lambda: ipaddress.ip_address("127.0.0.1"),
        lambda: {"a": [Money(Decimal(1)), Point(1, 2)]},
    ],
)
def test_equal_instances_have_equal_bytes(make: Callable[[], Any]) -> None:
    assert encode(make()) == encode(make())


def test_the_bytes_of_a_value_do_not_change_between_versions() -> None:
    value = {"b": (1, 2.5, None), "a": [True, "x", Decimal("1.0"), b"\x00", {3}]}
    assert encode(value) == (
        b'["d","a",["l",true,"x",["D","1.0"],["b","00"],["s",3]],"b",["t",1,["n","0x1.4000000000000p+1"],null]]'
    )


# ---------------------------------------------------------------------------------------------- encode: refused


def endless() -> list[Any]:
    loop: list[Any] = []
    loop.append({"again": (loop,)})
    return loop


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


UNSTABLE: dict[str, Callable[[], Any]] = {
    "object": object,
    "instance": Opaque,
    "generator": lambda: (n for n in range(3)),
    "iterator": lambda: iter([1]),
    "function": lambda: lambda: None,
    "nan": lambda: math.nan,
    "complex nan": lambda: complex(0, math.nan),
    "decimal nan": lambda: Decimal("NaN"),
    "signalling nan": lambda: Decimal("sNaN"),
    "itself": endless,
    "too deep": lambda: nested(1000),
    "surrogate": lambda: "\ud800",
    "surrogate key": lambda: {"\ud800": 1},
    "surrogate set": lambda: {"\ud800", "a"},
    "ordered dict": lambda: OrderedDict(a=1),
    "deque": lambda: deque([1]),
    "module": lambda: math,
    "memoryview": lambda: memoryview(b"a"),
    "range": lambda: range(3),
}


@pytest.mark.parametrize("make", UNSTABLE.values(), ids=UNSTABLE.keys())
def test_what_has_no_stable_form_is_refused_and_the_argument_named(make: Callable[[], Any]) -> None:
    with pytest.raises(UnstableKey, match="^the argument 'order'") as caught:
        encode(make(), "the argument 'order'")
    for way_out in ("ignore=", "key=", "fingerprint="):
        assert way_out in str(caught.value)


@pytest.mark.parametrize("make", UNSTABLE.values(), ids=UNSTABLE.keys())
@pytest.mark.parametrize(
    "wrap",
    [
        lambda value: [value],
        lambda value: (1, value),
        lambda value: {"k": value},
        lambda value: Money(value),
        lambda value: Point(1, value),
    ],
    ids=["list", "tuple", "dict", "dataclass", "named tuple"],
)
def test_an_unstable_part_makes_the_whole_unstable(make: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(UnstableKey, match="the argument 'order'"):
        encode(wrap(make()), "the argument 'order'")


def test_the_error_says_which_argument_is_unstable_and_why() -> None:
    with pytest.raises(UnstableKey, match=r"the argument 'order' holds a test_canonical\.Opaque"):
        encode({"lines": [1, Opaque()]}, "the argument 'order'")
    with pytest.raises(UnstableKey, match=r"the argument 'order' is a test_canonical\.Opaque"):
        encode(Opaque(), "the argument 'order'")


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: (value,)], ids=["list", "tuple"])
def test_nesting_of_two_hundred_levels_is_served_and_more_is_refused(wrap: Callable[[Any], Any]) -> None:
    value: Any = 1
    for _ in range(200):
        value = wrap(value)
    encode(value)
    with pytest.raises(UnstableKey, match="nested more than 200 deep"):
        encode([[value]])


def test_dicts_nested_two_hundred_levels_are_served_as_lists_are() -> None:
    value: Any = 1
    for _ in range(200):
        value = {"a": value}
    encode(value)


def test_flags_that_have_no_name_have_bytes_of_their_own() -> None:
    assert len({encode(Bits(value)) for value in (0, 1, 8, 16)}) == 4


def test_a_time_zone_without_a_name_of_its_own_is_no_stable_value() -> None:
    for value in (datetime(2024, 1, 1, tzinfo=NoZone()), time(1, tzinfo=NoZone())):
        with pytest.raises(UnstableKey):
            encode(value)


def test_utc_and_the_zone_named_utc_have_bytes_of_their_own() -> None:
    assert encode(datetime(2024, 1, 1, tzinfo=UTC)) != encode(datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")))


def bytes_or_refusal(value: object) -> object:
    """The bytes of `value`; what is refused is equal to nothing."""
    try:
        return encode(value)
    except UnstableKey:
        return object()


def test_what_an_instance_holds_beside_its_fields_is_not_dropped() -> None:
    one, two = Labelled(Decimal(1)), Labelled(Decimal(1))
    one.label, two.label = "a", "b"
    assert bytes_or_refusal(one) != bytes_or_refusal(two)


class Cents(int):
    currency: str


class Items(dict[str, int]):
    currency: str


class Lines(list[int]):
    __slots__ = ("__currency",)  # mangled, as private names are

    def __init__(self, items: list[int], currency: str) -> None:
        super().__init__(items)
        self.__currency = currency


class Code(str):
    __slots__ = ("currency",)

    currency: str


def held(value: Any, currency: str) -> Any:
    value.currency = currency
    return value


@pytest.mark.parametrize(
    "make",
    [
        lambda currency: held(Cents(5), currency),
        lambda currency: held(Items(a=5), currency),
        lambda currency: held(Code("5"), currency),
        lambda currency: Lines([5], currency),
    ],
    ids=["int", "dict", "str", "list"],
)
def test_what_an_instance_of_a_subclass_of_a_builtin_type_holds_is_not_dropped(make: Callable[[str], Any]) -> None:
    """Or five dollars would be answered with the receipt of five euros."""
    assert encode(make("EUR")) == encode(make("EUR"))
    assert encode(make("EUR")) != encode(make("USD"))
    assert encode(Cents(5)) != encode(held(Cents(5), "EUR"))


def test_the_items_of_a_dataclass_that_is_a_dict_are_not_dropped() -> None:
    assert bytes_or_refusal(Bag("b", a=1)) != bytes_or_refusal(Bag("b", a=2))


def test_a_dict_key_that_cannot_be_shown_can_be_encoded() -> None:
    encode({10**5000: 1})


def test_the_error_holds_no_part_of_the_argument() -> None:
    with pytest.raises(UnstableKey) as caught:
        encode({"4242-4242": object()})
    assert "4242" not in str(caught.value)


def test_an_attrs_field_that_was_never_set_is_left_out() -> None:
    encode(Unset())
    assert loads(dumps(Unset())[0]) == {}


# ------------------------------------------------------------------------------------------- encode: any values

zones = st.sampled_from(
    [
        UTC,
        timezone(timedelta(hours=1)),
        timezone(timedelta(hours=1), "X"),
        timezone(timedelta(0), "Z"),
        timezone(timedelta(seconds=-3723, microseconds=5)),
        PARIS,
        ZoneInfo("America/New_York"),
    ]
)
letters = st.characters(exclude_categories=["Cs"])
scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(letters, max_size=5),
    st.binary(max_size=5),
    st.decimals(allow_nan=False),
    st.dates(),
    st.datetimes(timezones=st.none() | zones),
    st.times(timezones=st.none() | zones),
    st.timedeltas(),
    st.uuids(),
)
alike: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        False,
        True,
        0,
        1,
        0.0,
        -0.0,
        1.0,
        "",
        "0",
        "1",
        "l",
        "t",
        "d",
        b"",
        b"1",
        Decimal(1),
        Decimal("1.0"),
        1 + 0j,
    ]
)


def hashable(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaf,
        lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
        max_leaves=4,
    )


def values(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keys = hashable(leaf)
    return st.recursive(
        leaf | st.sets(keys, max_size=3) | st.frozensets(keys, max_size=3) | st.binary(max_size=3).map(bytearray),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from(["a", "b", "$"]) | keys, inner, max_size=3)
        ),
        max_leaves=8,
    )


def same(one: Any, two: Any) -> bool:
    """Equal in type and content, all the way down."""
    if type(one) is not type(two):
        return False
    if isinstance(one, float):
        return bool(one.hex() == two.hex())
    if isinstance(one, complex):
        return same([one.real, one.imag], [two.real, two.imag])
    if isinstance(one, Decimal):
        return bool(one.as_tuple() == two.as_tuple())
    if isinstance(one, datetime | time):
        zones = [None if part.tzinfo is None else (type(part.tzinfo), str(part.tzinfo)) for part in (one, two)]
        plain = [part.replace(tzinfo=None, fold=0) for part in (one, two)]
        offsets = [None if part.tzinfo is None else part.tzinfo.utcoffset(None) for part in (one, two)]
        return zones[0] == zones[1] and plain[0] == plain[1] and one.fold == two.fold and offsets[0] == offsets[1]
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))
    if isinstance(one, set | frozenset):
        return len(one) == len(two) and all(any(same(a, b) for b in two) for a in one)
    if isinstance(one, dict):
        return len(one) == len(two) and all(
            any(same(key, other) and same(item, two[other]) for other in two) for key, item in one.items()
        )
    return bool(one == two)


def reordered(value: Any) -> Any:
    """An equal value whose dicts and sets were filled the other way round."""
    if isinstance(value, dict):
        return {reordered(key): reordered(item) for key, item in reversed(list(value.items()))}
    if isinstance(value, list | tuple):
        return type(value)([reordered(item) for item in value])
    if isinstance(value, set | frozenset):
        return type(value)([reordered(item) for item in reversed(list(value))])
    return value


@settings(deadline=None)
@given(values(alike), values(alike))
def test_two_values_have_equal_bytes_if_and_only_if_they_are_equal_in_type_and_content(one: Any, two: Any) -> None:
    assert (encode(one) == encode(two)) is same(one, two)


@settings(deadline=None)
@given(values(scalars))
def test_an_equal_value_built_in_another_order_has_equal_bytes(value: Any) -> None:
    assert encode(reordered(value)) == encode(value)


@settings(deadline=None)
@given(scalars, scalars)
def test_two_scalars_of_any_type_have_equal_bytes_only_if_they_are_equal(one: Any, two: Any) -> None:
    assert (encode(one) == encode(two)) is same(one, two)


# ------------------------------------------------------------------------------------------------ dumps and loads


def back(value: object) -> Any:
    """What a replay gives of `value`, which must be kept without being reduced."""
    data, reduced = dumps(value)
    assert not reduced
    return loads(data)


@settings(deadline=None)
@given(values(scalars))
def test_a_value_of_the_standard_types_comes_back_as_it_was(value: Any) -> None:
    assert same(back(value), value)


KEPT_AS_THEY_ARE: list[Any] = [
    {"$": 1},
    {"$": ["t", 1]},
    {"$": {"$": ["d"]}},
    {"$": "x", "a": 1},
    {"a": {"$": [1]}},
    {1: "a", "1": "b"},
    {None: 1, (1, 2): {3}},
    {b"k": 1, 2.5: 2, date(2024, 1, 1): 3, frozenset([1]): 4},
    math.inf,
    -math.inf,
    -0.0,
    1e22,
    0.1 + 0.2,
    5e-324,
    complex(math.inf, -0.0),
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    -(2**63),
    -(2**63) - 1,
    10**4000,
    Decimal("1.00"),
    Decimal("-0E-5"),
    Decimal("sNaN"),
    Decimal("Infinity"),
    Decimal("1" * 60 + ".5"),
    datetime(2024, 10, 27, 2, 30, tzinfo=PARIS, fold=1),
    datetime(2024, 10, 27, 2, 30, tzinfo=PARIS),
    datetime(2024, 10, 27, 2, 30, fold=1),
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=ZoneInfo("America/New_York")),
    datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC")),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=5, minutes=30), "IST")),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(seconds=1, microseconds=1))),
    time(2, 30, fold=1, tzinfo=PARIS),
    time(0),
    timedelta.max,
    timedelta.min,
    timedelta(microseconds=-1),
    "",
    "\x00",
    "$",
    '"$"',
    [],
    (),
    {},
    set(),
    frozenset(),
    b"\xff",
    bytearray(b"\xff"),
    UUID(int=2**128 - 1),
    None,
]


@pytest.mark.parametrize("value", KEPT_AS_THEY_ARE, ids=lambda value: type(value).__name__)
def test_what_json_has_not_comes_back_equal_in_value_and_type(value: Any) -> None:
    assert same(back(value), value)


@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=1), "X"), timezone(timedelta(hours=-3)), PARIS])
def test_a_time_zone_comes_back_as_the_kind_it_was(zone: dt.tzinfo) -> None:
    zone_back = back(datetime(2024, 7, 1, tzinfo=zone)).tzinfo
    assert type(zone_back) is type(zone)
    assert zone_back == zone
    assert zone_back.tzname(datetime(2024, 7, 1)) == zone.tzname(datetime(2024, 7, 1))


def test_utc_and_the_zone_named_utc_come_back_apart() -> None:
    assert back(datetime(2024, 1, 1, tzinfo=UTC)).tzinfo is UTC
    assert type(back(datetime(2024, 1, 1, tzinfo=ZoneInfo("UTC"))).tzinfo) is ZoneInfo


@pytest.mark.parametrize("value", [math.nan, [math.nan], {"a": math.nan}, {"$": math.nan}, (math.nan,)])
def test_nan_comes_back_as_nan(value: Any) -> None:
    assert repr(back(value)) == repr(value)


def test_a_value_that_json_has_is_kept_as_plain_json() -> None:
    value = {"id": 1, "lines": ["a", 2.5, None, True], "of": {"deep": [[]]}}
    data, reduced = dumps(value)
    assert json.loads(data) == value
    assert not reduced


def test_the_order_of_a_dict_is_kept() -> None:
    assert list(back({"b": 1, "a": 2})) == ["b", "a"]
    assert list(back({2: 1, 1: 2})) == [2, 1]


REDUCED: list[tuple[Any, Any]] = [
    (Money(Decimal("1.50")), {"amount": Decimal("1.50"), "currency": "EUR"}),
    (Slotted(1), {"amount": 1}),
    (Point(1, 2), {"x": 1, "y": 2}),
    (AttrsOrder(1, ["a"]), {"id": 1, "lines": ["a"]}),
    (StructOrder(1, ["a"]), {"id": 1, "lines": ["a"]}),
    (ModelOrder(id=1, lines=["a"]), {"id": 1, "lines": ["a"]}),
    (OpenModel.model_validate({"id": 1, "more": (2,)}), {"id": 1, "more": (2,)}),
    (Colour.RED, "red"),
    (Size.SMALL, 1),
    (Word.ONE, "one"),
    (Name("x"), "x"),
    (Ref(5), 5),
    (Rows([1]), [1]),
    (defaultdict(int, a=1), {"a": 1}),
    (OrderedDict(a=1), {"a": 1}),
]


@pytest.mark.parametrize("value, kept", REDUCED, ids=lambda value: type(value).__name__)
def test_an_instance_of_a_class_is_reduced_and_the_flag_says_so(value: Any, kept: Any) -> None:
    data, reduced = dumps(value)
    assert reduced
    assert same(loads(data), kept)


@pytest.mark.parametrize("value, kept", REDUCED, ids=lambda value: type(value).__name__)
def test_an_instance_deep_inside_is_reduced_and_the_flag_says_so(value: Any, kept: Any) -> None:
    data, reduced = dumps([1, {"a": (value,)}])
    assert reduced
    assert same(loads(data), [1, {"a": (kept,)}])


def test_a_reader_that_knows_the_class_gets_a_named_tuple_as_a_list() -> None:
    data, reduced = dumps([Point(1, 2)], rows=True)
    assert reduced
    assert loads(data) == [[1, 2]]


def test_rows_asks_nothing_of_other_values() -> None:
    assert loads(dumps([Money(Decimal(1)), (1, 2)], rows=True)[0]) == [
        {"amount": Decimal(1), "currency": "EUR"},
        (1, 2),
    ]


@pytest.mark.parametrize(
    "value, fields",
    [
        ({Frozen(1): "a"}, [({"id": 1}, "a")]),
        ({Point(1, 2): "a", Point(2, 1): "b"}, [((1, 2), "a"), ((2, 1), "b")]),
        ({(Frozen(1), 5): "a"}, [(({"id": 1}, 5), "a")]),
    ],
    ids=["dataclass", "named tuple", "inside"],
)
def test_a_reader_that_knows_the_class_gets_its_instances_as_keys_of_a_dict(value: Any, fields: Any) -> None:
    with pytest.raises(SerializationError, match="would not be keys"):
        dumps(value)
    data, reduced = dumps(value, rows=True)
    assert reduced
    assert list(loads(data).items()) == fields


@pytest.mark.parametrize(
    "value, items",
    [
        ({Frozen(1)}, [{"id": 1}]),
        (frozenset({Point(1, 2)}), [[1, 2]]),
        ({frozenset({Frozen(1)})}, [[{"id": 1}]]),
        ({frozenset({1})}, {frozenset({1})}),
    ],
    ids=["dataclass", "named tuple", "nested", "plain"],
)
def test_a_reader_that_knows_the_class_gets_a_set_of_instances_as_a_list(value: Any, items: Any) -> None:
    assert loads(dumps(value, rows=True)[0]) == items


class Renamed(msgspec.Struct, tag="one", rename="camel"):
    first_name: str
    last_name: str | msgspec.UnsetType = msgspec.UNSET


class Row(msgspec.Struct, tag=7, array_like=True):
    first_name: str


@pytest.mark.parametrize(
    "value, kept",
    [
        (Renamed("Ann"), {"type": "one", "firstName": "Ann"}),
        (Renamed("Ann", "Lee"), {"type": "one", "firstName": "Ann", "lastName": "Lee"}),
        (Row("Ann"), [7, "Ann"]),
        (PurePosixPath("a/b"), "a/b"),
    ],
    ids=["struct", "full struct", "array", "path"],
)
def test_a_reader_that_knows_the_class_gets_what_its_class_looks_for(value: Any, kept: Any) -> None:
    assert loads(dumps(value, rows=True)[0]) == kept


def test_a_field_that_is_unset_is_left_out() -> None:
    assert loads(dumps(Renamed("Ann"))[0]) == {"first_name": "Ann"}
    assert encode(Renamed("Ann")) != encode(Renamed("Ann", ""))


def test_what_a_cached_property_holds_is_no_content() -> None:
    class Lazy(pydantic.BaseModel):
        id: int

        @functools.cached_property
        def twice(self) -> int:
            return 2 * self.id

    lazy, before = Lazy(id=1), encode(Lazy(id=1))
    assert lazy.twice == 2
    assert encode(lazy) == before
    assert loads(dumps(lazy)[0]) == {"id": 1}


class Quoting:
    """Its errors quote what it holds."""

    __attrs_attrs__ = (types.SimpleNamespace(name="number"),)

    @property
    def number(self) -> Any:
        raise ValueError("no 4242")


def test_an_error_holds_nothing_of_the_value() -> None:
    refused: list[Callable[[], Any]] = [
        lambda: dumps(Quoting()),
        lambda: dumps({Frozen(4242): 1}),
        lambda: dumps(["4242\ud800"]),
        lambda: loads(b'{"$":["dt","4242",0,null]}'),
        lambda: loads(b'"4242'),
    ]
    for act in refused:
        with pytest.raises(SerializationError) as caught:
            act()
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        assert caught.value.__cause__ is None
        assert "4242" not in str(caught.value)


UNENCODABLE: dict[str, Callable[[], Any]] = {
    "object": object,
    "instance": Opaque,
    "generator": lambda: (n for n in range(3)),
    "function": lambda: lambda: None,
    "class": lambda: int,
    "itself": endless,
    "too deep": lambda: nested(1000),
    "surrogate": lambda: "\ud800",
    "surrogate key": lambda: {"\ud800": 1},
    "own zone": lambda: datetime(2024, 1, 1, tzinfo=NoZone()),
}


@pytest.mark.parametrize("make", UNENCODABLE.values(), ids=UNENCODABLE.keys())
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"a": (value,)}], ids=["bare", "inside"])
def test_what_has_no_json_form_is_a_serialization_error(make: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(SerializationError):
        dumps(wrap(make()))


@pytest.mark.parametrize("value", [{Frozen(1)}, frozenset([Point(1, 2)]), {Frozen(1): 1}, {Point(1, 2): 1}])
@pytest.mark.parametrize("rows", [False, True])
def test_what_dumps_takes_loads_can_read(value: Any, rows: bool) -> None:
    try:
        data, _ = dumps(value, rows=rows)
    except SerializationError:
        return
    loads(data)


@pytest.mark.parametrize("value", [{Colour.RED: 1, "red": 2}, {Colour.RED, "red"}])
def test_reducing_loses_no_item(value: Any) -> None:
    try:
        data, _ = dumps(value)
    except SerializationError:
        return
    assert len(loads(data)) == len(value)


def test_keeping_a_value_does_not_change_it() -> None:
    value = {"a": [1, {2: (3, {4})}], "m": Money(Decimal(1))}
    dumps(value)
    encode(value)
    assert value == {"a": [1, {2: (3, {4})}], "m": Money(Decimal(1))}


# -------------------------------------------------------------------------------------------------- loads: anything


def loads_or_refuses(data: bytes) -> None:
    try:
        loads(data)
    except SerializationError:
        pass


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
def test_arbitrary_bytes_are_decoded_or_are_a_serialization_error(data: bytes) -> None:
    loads_or_refuses(data)


TAGS: list[Any] = ["i", "n", "b", "ba", "D", "dt", "da", "tm", "td", "u", "c", "t", "s", "f", "d", "x", "", None, 1, []]
json_scalars: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(letters, max_size=6),
    st.sampled_from(
        [
            "0x1",
            "1",
            "nan",
            "00",
            "2024-01-01",
            "2024-01-01T00:00:00",
            "01:00",
            "UTC",
            "key",
            "Europe",
            "../x",
            "/",
            ".",
        ]
        + ["Europe/Paris", "zone.tab", "1e999999999", "ff" * 16, "", "\x00", "a\x00b", "a//b", ".a/b", "x" * 300]
    ),
)
tagged: st.SearchStrategy[Any] = st.recursive(
    json_scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["$", "key", "a"]), inner, max_size=2),
        st.builds(lambda tag, data: {"$": [tag, *data]}, st.sampled_from(TAGS), st.lists(inner, max_size=4)),
        st.builds(lambda data: {"$": data}, inner),
    ),
    max_leaves=10,
)
tags_only: st.SearchStrategy[Any] = st.builds(
    lambda tag, data: {"$": [tag, *data]},
    st.sampled_from([tag for tag in TAGS if tag != "u"]),
    st.lists(
        json_scalars | st.lists(json_scalars, max_size=4) | st.builds(lambda v: {"key": v}, json_scalars), max_size=4
    ),
)


def without_uuids(value: Any) -> Any:
    """`value` with the tag of a UUID taken out: see the test after the next."""
    if isinstance(value, dict):
        return {key: without_uuids(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_uuids(item) for item in value if item != "u"]
    return value


@settings(deadline=None)
@given(tagged)
def test_arbitrary_json_with_tags_is_decoded_or_is_a_serialization_error(value: Any) -> None:
    loads_or_refuses(json.dumps(without_uuids(value)).encode())


@settings(deadline=None)
@given(tags_only)
def test_a_tag_with_arbitrary_data_is_decoded_or_is_a_serialization_error(value: Any) -> None:
    loads_or_refuses(json.dumps(value).encode())


def test_a_uuid_that_is_no_text_is_a_serialization_error() -> None:
    with pytest.raises(SerializationError):
        loads(b'{"$":["u",5]}')


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nul",
        b"{",
        b"\xff",
        b"NaN",
        b'{"$":1}',
        b'{"$":[]}',
        b'{"$":""}',
        b'{"$":["t2"]}',
        b'{"$":[["t"],1]}',
        b'{"$":["i","x"]}',
        b'{"$":["s",[]]}',
        b'{"$":["d",[[],1]]}',
        b'{"$":["d",1]}',
        b'{"$":["k",1]}',
        b'{"$":["k",[{"$":["s"]},1]]}',
        b'{"$":["D","one"]}',
        b'{"$":["dt","2024-01-01T00:00:00",2,null]}',
        b'{"$":["dt","2024-01-01T00:00:00",0,{"key":"No/Where"}]}',
        b'{"$":["dt","2024-01-01T00:00:00",0,{"key":"../../etc/passwd"}]}',
        b'{"$":["dt","2024-01-01T00:00:00",0,{"key":"Europe"}]}',
        b'{"$":["dt","2024-01-01T00:00:00",0,{}]}',
        b'{"$":["dt","2024-01-01T00:00:00",0,[9,0,0,null]]}',
        b'{"$":["td",1e300]}',
        b'{"a":' * 2000 + b'"$"' + b"}" * 2000,
        b'{"a":' * 1000 + b'{"$":["t"]}' + b"}" * 1000,  # orjson goes to 1024
    ],
    ids=lambda data: repr(data)[:50],
)
def test_bytes_that_were_never_kept_are_a_serialization_error(data: bytes) -> None:
    with pytest.raises(SerializationError):
        loads(data)


@dataclass
class Late:
    made: int = field(init=False)


def test_a_field_that_was_never_set_is_left_out() -> None:
    late = Late()
    assert loads(dumps(late)[0]) == {}
    unset = encode(late)
    late.made = 1
    assert loads(dumps(late)[0]) == {"made": 1}
    assert encode(late) != unset
