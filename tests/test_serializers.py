"""Results and recorded errors as bytes, and back as what they were."""

import asyncio
import copy
import dataclasses
import functools
import gc
import importlib
import itertools
import math
import os
import pickle
import re
import subprocess
import sys
import threading
import traceback
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, NamedTuple, NotRequired, Optional, Self, TypedDict, TypeVar
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import attrs
import msgspec
import postponed
import pydantic
import pytest
from colours import COLOURS, Colour
from hypothesis import given, settings
from hypothesis import strategies as st

from idempotent import (
    Compressed,
    Encrypted,
    InProgress,
    LocalBackend,
    PickleSerializer,
    ResultTypeWarning,
    ResultUnavailable,
    SerializationError,
    idempotent,
)
from idempotent import _flow as flow
from idempotent._failures import decode_error, encode_error, exactly
from idempotent._record import RecordId, Row
from idempotent._shape import digest_of
from idempotent.serializers import Codec, codec_for

RECORD = "c4:shop:order-1"
SECRET = b"a secret of 16+ bytes"
KEY = b"k" * 32
PARIS = ZoneInfo("Europe/Paris")
SERIAL = itertools.count(1)
T = TypeVar("T")


class Unannotated:
    """In place of an annotation: there is none."""


UNANNOTATED = Unannotated


def called(value: Any) -> str:
    """A test id that is the same in every process."""
    if isinstance(value, type):
        return value.__name__
    if hasattr(value, "dumps"):
        return as_codec(value).name
    if isinstance(value, (set, frozenset)):  # nan hashes by where it lies
        return ", ".join(sorted(map(called, value)))
    return re.sub(r"test_serializers\.|typing\.|0x\w+|UUID\('[^']*'\)", "", ascii(value))[:60]


def picture(value: Any) -> str:
    """All that can be told about a value: types, contents and order, but for the order of sets."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, Enum):
        return f"{name}.{value.name}"
    if hasattr(kind, "get_secret_value"):
        return f"{name} {value.get_secret_value()!r}"
    if dataclasses.is_dataclass(kind):
        held = [(f.name, picture(getattr(value, f.name))) for f in dataclasses.fields(kind)]
        return f"{name} {held}"
    if hasattr(kind, "__struct_fields__"):
        return f"{name} {[(field, picture(getattr(value, field))) for field in kind.__struct_fields__]}"
    if attrs.has(kind):
        return f"{name} {[(f.name, picture(getattr(value, f.name))) for f in attrs.fields(kind)]}"
    if isinstance(value, pydantic.BaseModel):
        held = [value.__dict__, value.__pydantic_extra__, value.__pydantic_private__]
        return f"{name} {[picture(part) for part in held]}"
    if isinstance(value, (list, tuple)):
        return f"{name} {[picture(item) for item in value]}"
    if isinstance(value, (set, frozenset)):
        return f"{name} {sorted(picture(item) for item in value)}"
    if isinstance(value, dict):
        return f"{name} {[(picture(key), picture(item)) for key, item in value.items()]}"
    return f"{name} {value!r}"


def annotated(annotation: Any) -> Callable[[], Any]:
    """A function with that return annotation."""

    def function() -> Any:
        raise NotImplementedError

    function.__annotations__ = {"return": annotation}
    return function


@functools.cache
def codec_of(annotation: Any) -> Codec:
    codec = codec_for(annotated(annotation), None)
    codec.ready()
    return codec


def comes_back(annotation: Any, value: Any, codec: Codec | None = None) -> bytes:
    """Assert that a value comes back as what it is, without a warning; its bytes."""
    codec = codec or codec_of(annotation)
    before = picture(value)
    body = codec.keep(value, RECORD)[0]
    back = codec.decode(body, RECORD)
    assert picture(back) == before == picture(value)
    assert exactly(back, value)
    assert (
        back is not value
        or type(value) in (int, str, bool, float, bytes, type(None), timedelta)  # some are singletons
        or isinstance(value, Enum | tuple | frozenset)
    )
    return body


def returning(value: Any, annotation: Any = UNANNOTATED, **options: Any) -> Any:
    """A decorated function that returns `value`; `.runs` counts."""

    def function(key: str = "k") -> Any:
        decorated.runs += 1
        return value() if callable(value) else value

    function.__annotations__ = {} if annotation is UNANNOTATED else {"return": annotation}
    options.setdefault("backend", LocalBackend())
    decorated: Any = idempotent(namespace="shop", key="{key}", **options)(function)
    decorated.runs = 0
    return decorated


def rows(backend: Any) -> dict[str, Row]:
    """The settled records of a LocalBackend, to look at and to forge."""
    return backend._store.settled  # type: ignore[no-any-return]


def body_of(backend: Any, key: str = "k") -> bytes:
    return rows(backend)[RecordId("shop", key).text].body


def forge(backend: Any, key: str = "k", **fields: Any) -> None:
    text = RecordId("shop", key).text
    rows(backend)[text] = rows(backend)[text]._replace(**fields)


class Colours(Enum):
    RED = "red"
    BLUE = "blue"


class Size(IntEnum):
    SMALL = 1
    LARGE = 2


class Word(StrEnum):
    ONE = "one"
    TWO = "two"


class Mixed(Enum):
    TEXT = "text"
    NUMBER = 1


@dataclass
class Money:
    amount: Decimal
    currency: str = "EUR"


class Cents(msgspec.Struct):
    cents: int = 0


class CentsRenamed(msgspec.Struct, rename="pascal"):
    cents: int = 0


class NetGross(msgspec.Struct, array_like=True):
    net: int
    gross: int


class GrossNet(msgspec.Struct, array_like=True):
    gross: int
    net: int


@dataclass
class Retold:
    total: Decimal = Decimal(0)
    currency: str = "EUR"


@dataclass
class Wider:
    amount: Decimal
    currency: str = "EUR"
    fee: Decimal = Decimal(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    sku: UUID
    count: int = 1
    tags: frozenset[str] = frozenset()


@dataclass
class Order:
    id: int
    total: Money
    at: datetime
    lines: list[Line] = field(default_factory=list)
    note: str | None = None


@dataclass
class Box(Generic[T]):
    item: T
    more: list[T] = field(default_factory=list)


@dataclass
class Loose:
    data: Any
    other: dict[str, Any] = field(default_factory=dict)


@dataclass
class Tree:
    name: str
    leaves: list["Tree"] = field(default_factory=list)


class Point(NamedTuple):
    x: int
    y: Decimal = Decimal("0.5")


class Ticket(TypedDict):
    id: UUID
    at: datetime
    seats: NotRequired[tuple[int, ...]]


@attrs.define
class Parcel:
    id: int
    weight: Decimal
    labels: list[str] = attrs.field(factory=list)


@attrs.frozen
class Stamp:
    at: date
    parcel: Parcel


class Event(msgspec.Struct):
    id: int
    at: datetime
    data: dict[str, int] = {}


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    name: str


class Packed(msgspec.Struct, array_like=True, frozen=True, omit_defaults=True):
    id: int
    size: Size = Size.SMALL


class Renamed(msgspec.Struct, rename="camel"):
    first_name: str
    last_name: str = ""


class Address(pydantic.BaseModel):
    street: str
    zip_code: str = pydantic.Field(alias="zipCode")


class Customer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(populate_by_name=True)
    id: UUID = pydantic.Field(default_factory=uuid4)
    home: Address
    others: dict[int, Address] = {}
    limit: Decimal = pydantic.Field(default=Decimal("1.50"), serialization_alias="creditLimit")
    born: date | None = None
    labels: frozenset[str] = frozenset()
    point: Point = Point(1)

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def street(self) -> str:
        return self.home.street


class Card(pydantic.BaseModel):
    kind: Literal["card"] = "card"
    last4: str


class Cash(pydantic.BaseModel):
    kind: Literal["cash"] = "cash"
    coins: tuple[int, ...]


class Payment(pydantic.BaseModel):
    by: Annotated[Card | Cash, pydantic.Field(discriminator="kind")]
    at: datetime


class Page(pydantic.BaseModel, Generic[T]):
    items: list[T]
    next: int | None = None


class Open(pydantic.BaseModel, extra="allow"):
    id: int


class Private(pydantic.BaseModel):
    id: int
    _seen: int = pydantic.PrivateAttr(default=0)


class Seen(pydantic.BaseModel):
    """Its private attribute is never what a fresh instance has."""

    id: int
    _seen: int = pydantic.PrivateAttr(default=0)

    def model_post_init(self, context: Any) -> None:
        self._seen = next(SERIAL)


class Spot(pydantic.BaseModel, frozen=True):
    x: int
    near: frozenset[int] = frozenset()


class Bag(pydantic.BaseModel):
    spots: set[Spot] = set()
    groups: frozenset[frozenset[str]] = frozenset()
    counts: dict[Spot, int] = {}
    lines: set[Line] = set()
    sizes: set[Size] = set()


class Aliased(pydantic.BaseModel, extra="forbid"):
    zip_code: Any = pydantic.Field(alias="zipCode")
    both: int = pydantic.Field(validation_alias="readAs", serialization_alias="writtenAs")
    choice: int = pydantic.Field(default=0, validation_alias=pydantic.AliasChoices("one", "other"))


class Lazy(pydantic.BaseModel):
    id: int

    @functools.cached_property
    def twice(self) -> int:
        return 2 * self.id


class Site(pydantic.BaseModel):
    at: datetime
    home: pydantic.HttpUrl
    address: IPv4Address
    folder: Path
    ordered: OrderedDict[str, Any] = OrderedDict()


class Zoned(msgspec.Struct, tag="z", tag_field="kind", rename="camel", forbid_unknown_fields=True):
    first_seen: datetime
    count: int | msgspec.UnsetType = msgspec.UNSET


class ZonedRow(msgspec.Struct, array_like=True):
    first_seen: datetime
    data: Any = None


class Login(pydantic.BaseModel):
    user: str
    password: pydantic.SecretStr


class Veiled(pydantic.BaseModel):
    id: int
    hidden: str = pydantic.Field(default="", exclude=True)
    quiet: str = pydantic.Field(default="", repr=False)


class Numbers(pydantic.RootModel[list[int]]):
    pass


ZONES = st.one_of(
    st.none(),
    st.just(UTC),
    st.sampled_from([PARIS, ZoneInfo("America/New_York"), ZoneInfo("UTC")]),
    st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(timezone),
    st.just(timezone(timedelta(hours=2), "CEST")),
)
DATETIMES = st.datetimes(timezones=ZONES)
TIMES = st.times(timezones=ZONES)
DECIMALS = st.decimals()
MONEY = st.builds(Money, DECIMALS, st.text())
LINES = st.builds(Line, sku=st.uuids(), count=st.integers(), tags=st.frozensets(st.text()))
SPOTS = st.builds(Spot, x=st.integers(), near=st.frozensets(st.integers(), max_size=3))
LOOSE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | DECIMALS
    | DATETIMES
    | st.uuids(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text() | st.just("$"), inner, max_size=3)
        | st.sets(st.integers() | st.text() | st.uuids(), max_size=3)
        | st.dictionaries(st.integers() | st.uuids(), inner, max_size=3)
    ),
    max_leaves=8,
)
PARCELS = st.builds(Parcel, st.integers(), DECIMALS, st.lists(st.text()))
ADDRESSES = st.builds(lambda street, code: Address(street=street, zipCode=code), st.text(), st.text())

ROUND_TRIPS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers() | st.integers(-(2**200), 2**200)),
    (float, st.floats()),
    (bool, st.booleans()),
    (None, st.none()),
    (str, st.text()),
    (bytes, st.binary()),
    (bytearray, st.binary().map(bytearray)),
    (complex, st.complex_numbers()),
    (Decimal, DECIMALS),
    (datetime, DATETIMES),
    (date, st.dates()),
    (time, TIMES),
    (timedelta, st.timedeltas()),
    (UUID, st.uuids()),
    (Colours, st.sampled_from(Colours)),
    (Size, st.sampled_from(Size)),
    (Word, st.sampled_from(Word)),
    (Literal["a", 1, None], st.sampled_from(["a", 1, None])),  # noqa: PYI061  as some write it
    (Optional[Decimal], st.none() | DECIMALS),  # noqa: UP045  as some write it
    (int | str | None, st.integers() | st.text() | st.none()),
    (int | float, st.integers() | st.floats()),
    (bool | int, st.booleans() | st.integers()),
    (list[int] | str | None, st.lists(st.integers()) | st.text() | st.none()),
    (Money | None, MONEY | st.none()),
    (Cat | Dog, st.builds(Cat, st.integers()) | st.builds(Dog, st.text())),
    (list[Decimal], st.lists(DECIMALS)),
    (list[float], st.lists(st.floats())),
    (tuple[int, str], st.tuples(st.integers(), st.text())),
    (tuple[datetime, ...], st.lists(DATETIMES).map(tuple)),
    (set[UUID], st.sets(st.uuids())),
    (set[str], st.sets(st.text())),
    (frozenset[int], st.frozensets(st.integers())),
    (frozenset[tuple[int, str]], st.frozensets(st.tuples(st.integers(), st.text()))),
    (set[Line], st.sets(LINES)),
    (dict[str, int], st.dictionaries(st.text(), st.integers())),
    (dict[int, Money], st.dictionaries(st.integers(), MONEY)),
    (dict[UUID, list[date]], st.dictionaries(st.uuids(), st.lists(st.dates()))),
    (dict[Word, set[int]], st.dictionaries(st.sampled_from(Word), st.sets(st.integers()))),
    (dict[tuple[int, str], str], st.dictionaries(st.tuples(st.integers(), st.text()), st.text())),
    (set[frozenset[str]], st.sets(st.frozensets(st.text()))),
    (set[float], st.sets(st.floats())),
    (set[Spot], st.sets(SPOTS)),
    (set[frozenset[Line]], st.sets(st.frozensets(LINES, max_size=2), max_size=2)),
    (dict[Line, int], st.dictionaries(LINES, st.integers(), max_size=3)),
    (
        dict[Point, Line],
        st.dictionaries(st.builds(Point, st.integers(), st.decimals(allow_nan=False)), LINES, max_size=3),
    ),
    (dict[tuple[Line, int], str], st.dictionaries(st.tuples(LINES, st.integers()), st.text(), max_size=3)),
    (dict[frozenset[Line], int], st.dictionaries(st.frozensets(LINES, max_size=2), st.integers(), max_size=2)),
    (dict[Spot, Spot], st.dictionaries(SPOTS, SPOTS, max_size=3)),
    (dict[date, float], st.dictionaries(st.dates(), st.floats())),
    (list, LOOSE.map(lambda item: [item])),
    (dict, st.dictionaries(st.text(), LOOSE)),
    (tuple, LOOSE.map(lambda item: (item, item))),
    (Any, LOOSE),
    (object, LOOSE),
    (UNANNOTATED, LOOSE),
    (Money, MONEY),
    (Line, LINES),
    (Order, st.builds(Order, st.integers(), MONEY, DATETIMES, st.lists(LINES), st.none() | st.text())),
    (Box[int], st.builds(Box, st.integers(), st.lists(st.integers()))),
    (Box[Money], st.builds(Box, MONEY, st.lists(MONEY))),
    (Loose, st.builds(Loose, LOOSE, st.dictionaries(st.text(), LOOSE))),
    (dict[int, Loose], st.dictionaries(st.integers(), st.builds(Loose, LOOSE))),
    (Tree, st.recursive(st.builds(Tree, st.text()), lambda t: st.builds(Tree, st.text(), st.lists(t)), max_leaves=6)),
    (Point, st.builds(Point, st.integers(), DECIMALS)),
    (list[Point], st.lists(st.builds(Point, st.integers(), DECIMALS))),
    (Ticket, st.fixed_dictionaries({"id": st.uuids(), "at": DATETIMES}, optional={"seats": st.tuples(st.integers())})),
    (Parcel, PARCELS),
    (Stamp, st.builds(Stamp, st.dates(), PARCELS)),
    (Event, st.builds(Event, st.integers(), DATETIMES, st.dictionaries(st.text(), st.integers()))),
    (Packed, st.builds(Packed, st.integers(), st.sampled_from(Size))),
    (Renamed, st.builds(Renamed, st.text(), st.text())),
    (Address, ADDRESSES),
    (
        Customer,
        st.builds(
            Customer,
            id=st.uuids(),
            home=ADDRESSES,
            others=st.dictionaries(st.integers(), ADDRESSES, max_size=2),
            limit=st.decimals(allow_nan=False, allow_infinity=False),
            born=st.none() | st.dates(),
            labels=st.frozensets(st.text(), max_size=3),
            point=st.builds(Point, st.integers(), st.decimals(allow_nan=False, allow_infinity=False)),
        ),
    ),
    (
        Payment,
        st.builds(
            Payment,
            by=st.builds(Card, last4=st.text()) | st.builds(Cash, coins=st.lists(st.integers()).map(tuple)),
            at=DATETIMES,
        ),
    ),
    (
        Card | Cash | None,
        st.builds(Card, last4=st.text()) | st.builds(Cash, coins=st.tuples(st.integers())) | st.none(),
    ),
    (list[Page[int]], st.lists(st.builds(Page[int], items=st.lists(st.integers()), next=st.none() | st.integers()))),
    (Open, st.builds(lambda n, extra: Open(id=n, extra=extra), st.integers(), LOOSE)),
    (
        Bag,
        st.builds(
            Bag,
            spots=st.sets(SPOTS, max_size=3),
            groups=st.frozensets(st.frozensets(st.text(), max_size=3), max_size=3),
            counts=st.dictionaries(SPOTS, st.integers(), max_size=2),
            lines=st.sets(LINES, max_size=2),
            sizes=st.sets(st.sampled_from(Size)),
        ),
    ),
    (Aliased, st.builds(lambda code: Aliased.model_validate({"zipCode": code, "readAs": 1, "other": 2}), LOOSE)),
    (Zoned, st.builds(Zoned, DATETIMES, st.integers() | st.just(msgspec.UNSET))),
    (ZonedRow, st.builds(ZonedRow, DATETIMES, LOOSE)),
    (
        Site,
        st.builds(
            Site,
            at=DATETIMES,
            home=st.just("https://example.com/a?b=1"),
            address=st.ip_addresses(v=4),
            folder=st.just(Path("a/b")),
            ordered=st.dictionaries(st.text(), st.integers()).map(OrderedDict),
        ),
    ),
    (Veiled, st.builds(Veiled, id=st.integers(), hidden=st.text(), quiet=st.text())),
    (Numbers, st.lists(st.integers()).map(Numbers)),
    (dict[str, Address], st.dictionaries(st.text(), ADDRESSES)),
]


@pytest.mark.parametrize("annotation, values", ROUND_TRIPS, ids=[called(annotation) for annotation, _ in ROUND_TRIPS])
def test_a_value_that_fits_its_annotation_comes_back_as_what_it_is(
    annotation: Any, values: st.SearchStrategy[Any]
) -> None:
    codec = codec_for(lambda: None, None) if annotation is UNANNOTATED else codec_of(annotation)

    @settings(max_examples=40, deadline=None)
    @given(values)
    def check(value: Any) -> None:
        comes_back(annotation, value, codec)

    check()


EXAMPLES: list[tuple[Any, Any]] = [
    (int, 2**64),
    (int, -(2**63) - 1),
    (int, 10**300),
    (float, -0.0),
    (float, 5e-324),
    (float, math.inf),
    (float, -math.inf),
    (float, math.nan),
    (str, "naïve \U0001f600 \x00 \u2028"),
    (Decimal, Decimal("1.50")),
    (Decimal, Decimal("1E+3")),
    (Decimal, Decimal("sNaN")),
    (datetime, datetime(2026, 10, 25, 2, 30, tzinfo=PARIS, fold=1)),
    (datetime, datetime(2026, 10, 25, 2, 30, tzinfo=PARIS, fold=0)),
    (datetime, datetime(2026, 1, 1, fold=1)),
    (datetime, datetime.max.replace(tzinfo=UTC)),
    (datetime, datetime(1, 1, 1, tzinfo=timezone(timedelta(seconds=1, microseconds=5)))),
    (time, time(1, 2, 3, 4, tzinfo=PARIS)),
    (timedelta, timedelta.max),
    (timedelta, timedelta.min),
    (Loose, Loose((1, {2, 3}), {"$": frozenset({b"x"}), "deep": [(1,), {1: (2,)}]})),
    (Loose, Loose(datetime(2026, 1, 1, tzinfo=PARIS))),
    (dict[str, Any], {"$": ["t", 1]}),
    (list[Any], [(1,), [1], {1}, frozenset({1}), {"a": (1,)}]),
    (tuple[()], ()),
    (Private, Private(id=1)),
    (Page[Customer], Page[Customer](items=[Customer(home=Address(street="s", zipCode="z"))])),
    (set[float], {math.nan, 1.0}),
    (set[Colours], {Colours.RED}),
]


@pytest.mark.parametrize("annotation, value", EXAMPLES, ids=called)
def test_a_border_case_comes_back_as_what_it_is(annotation: Any, value: Any) -> None:
    comes_back(annotation, value)


@pytest.mark.parametrize("colour", COLOURS, ids=str)
@pytest.mark.parametrize("value", [None, 0, False, "", [], {}, (), set(), b"", 0.0])
def test_an_empty_result_is_a_result(colour: Colour, value: Any) -> None:
    runs: list[int] = []

    def function() -> Any:
        runs.append(1)
        return value

    decorated = colour.define(function, backend=LocalBackend())
    answers = [colour.call(decorated) for _ in range(3)]
    assert [picture(answer) for answer in answers] == [picture(value)] * 3
    assert len(runs) == 1


@pytest.mark.parametrize(
    "annotation, value",
    [
        (Order, Order(1, Money(Decimal("1.50")), datetime(2026, 1, 1, tzinfo=PARIS), [Line(sku=UUID(int=1))])),
        (Customer, Customer(home=Address(street="s", zipCode="z"))),
        (dict[int, tuple[Point, ...]], {1: (Point(1), Point(2))}),
        (Stamp, Stamp(date(2026, 1, 1), Parcel(1, Decimal(2)))),
        (Cat | Dog, Dog("rex")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_run_and_its_replay_give_equal_values_of_equal_types(annotation: Any, value: Any) -> None:
    function = returning(value, annotation)
    first, replay = function(), function()
    assert picture(first) == picture(replay) == picture(value)
    assert function.runs == 1
    assert first is not value, "the run returns what a replay would: the decoded record"
    assert first is not replay


def test_exactly_agrees_with_the_picture_of_values_that_differ_in_type_alone() -> None:
    alike: list[Any] = [1, 1.0, True, Decimal(1), "1", b"1", (1,), [1], {1}, frozenset({1}), Size.SMALL, {1: 1}]
    for n, one in enumerate(alike):
        for m, other in enumerate(alike):
            assert exactly(one, other) is (n == m) is (picture(one) == picture(other))


@pytest.mark.parametrize(
    "one, other",
    [
        (OrderedDict(a=1), OrderedDict(a=True)),
        (OrderedDict(a=Size.SMALL), OrderedDict(a=1)),
        (deque([1]), deque([1.0])),
        ({1, 2}, {True, 2}),
        ({(1, 2)}, {(True, 2)}),
        (frozenset({frozenset({1})}), frozenset({frozenset({True})})),
        ({pydantic.SecretStr("a")}, {pydantic.SecretStr("b")}),
    ],
    ids=ascii,
)
def test_exactly_looks_inside_containers_of_every_kind(one: Any, other: Any) -> None:
    assert not exactly(one, other)
    assert exactly(one, copy.deepcopy(one))


@given(LOOSE, LOOSE)
@settings(max_examples=200, deadline=None)
def test_exactly_is_what_the_picture_shows(one: Any, other: Any) -> None:
    assert exactly(one, other) is (picture(one) == picture(other))
    assert exactly(one, one)


# ------------------------------------------------------------------------------------------- values that do not fit


class Opaque:
    pass


@pytest.mark.parametrize(
    "annotation, value, plain",
    [
        (int, "text", "text"),
        (str, 5, 5),
        (Money, Order(1, Money(Decimal(1)), datetime(2026, 1, 1)), None),
        (Money, Parcel(1, Decimal("2.0")), {"id": 1, "weight": Decimal("2.0"), "labels": []}),
        (list[int], [1, "two", (3,)], [1, "two", (3,)]),
        (Card, Cash(coins=(1, 2)), {"kind": "cash", "coins": (1, 2)}),
        (None, 3, 3),
        (tuple[int, int], (1, 2, 3), (1, 2, 3)),
        (Money, Money("not a decimal"), {"amount": "not a decimal", "currency": "EUR"}),  # type: ignore[arg-type]
        (Seen, Seen(id=1), {"id": 1}),
        (set[Any], {Spot(x=1)}, [{"x": 1, "near": frozenset()}]),
    ],
    ids=called,
)
def test_a_value_that_does_not_fit_its_annotation_becomes_plain_with_a_warning(
    annotation: Any, value: Any, plain: Any
) -> None:
    function = returning(value, annotation)
    with pytest.warns(ResultTypeWarning, match="returning.<locals>.function returned a") as seen:
        first = function()
    assert len(seen) == 1
    replay = function()
    assert picture(first) == picture(replay)
    if plain is not None:
        assert picture(first) == picture(plain)
    assert function.runs == 1


def test_an_instance_without_an_annotation_becomes_a_dict_from_the_first_call_on_with_a_warning() -> None:
    function = returning(Money(Decimal("1.50")))
    with pytest.warns(ResultTypeWarning, match=r"function returned a Money.*annotation"):
        first = function()
    assert picture(first) == picture(function()) == picture({"amount": Decimal("1.50"), "currency": "EUR"})


def test_the_warning_points_at_no_value() -> None:
    function = returning(Money(Decimal(4242)))
    with pytest.warns(ResultTypeWarning) as seen:
        function()
    assert "4242" not in str(seen[0].message)


def test_a_warning_that_is_an_error_makes_the_result_unavailable_and_nothing_runs_again() -> None:
    function = returning(Money(Decimal("1.50")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ResultUnavailable) as caught:
            function()
        assert caught.value.result == Money(Decimal("1.50"))
        with pytest.raises(ResultUnavailable, match="ResultTypeWarning"):
            function()
    assert function.runs == 1


@pytest.mark.parametrize(
    "value",
    [Opaque(), threading.Lock(), "\ud800", lambda: 1, [Opaque()], {"a": iter([])}, {Money: 1}, Loose(Opaque())],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("annotation", [UNANNOTATED, Loose], ids=["unannotated", "annotated"])
def test_a_result_that_cannot_be_encoded_is_done_and_unavailable(annotation: Any, value: Any) -> None:
    function = returning(lambda: value, annotation)
    with pytest.raises(ResultUnavailable, match="will not run again") as caught:
        function()
    assert caught.value.result is value
    with pytest.raises(ResultUnavailable) as again:
        function()
    assert again.value.result is None
    assert function.runs == 1


def test_a_result_that_holds_itself_is_unavailable() -> None:
    endless: list[Any] = []
    endless.append(endless)
    function = returning(endless)
    with pytest.raises(ResultUnavailable, match="deep, or holds itself"):
        function()
    with pytest.raises(ResultUnavailable):
        function()
    assert function.runs == 1


def test_a_secret_is_never_stored_in_clear() -> None:
    backend = LocalBackend()
    login = Login(user="ann", password=pydantic.SecretStr("hunter2"))
    function = returning(login, Login, backend=backend)
    try:
        first = function()
    except ResultUnavailable as error:
        assert error.result is login
        assert "hunter2" not in str(error)
    else:
        assert first.password.get_secret_value() == "hunter2"
    assert b"hunter2" not in body_of(backend)
    assert "hunter2" not in repr(rows(backend))


@pytest.mark.parametrize("annotation", [pydantic.SecretStr, dict[str, pydantic.SecretStr], Any], ids=called)
def test_a_bare_secret_is_never_stored_in_clear(annotation: Any) -> None:
    secret = pydantic.SecretStr("hunter2")
    backend = LocalBackend()
    try:
        function = returning(
            {"a": secret} if annotation is not pydantic.SecretStr else secret, annotation, backend=backend
        )
    except SerializationError:
        return
    with pytest.raises(ResultUnavailable):
        function()
    assert b"hunter2" not in body_of(backend)


def test_an_encrypted_secret_is_served_by_pickle() -> None:
    login = Login(user="ann", password=pydantic.SecretStr("hunter2"))
    backend = LocalBackend()
    serializer = Encrypted(PickleSerializer(SECRET), {"1": KEY})
    function = returning(login, Login, backend=backend, serializer=serializer)
    assert function() == function() == login
    assert b"hunter2" not in body_of(backend)


def test_the_value_of_a_cached_property_is_no_part_of_a_model() -> None:
    lazy = Lazy(id=2)
    assert lazy.twice == 4
    function = returning(lazy, Lazy)
    first, replay = function(), function()
    assert (type(first), first, replay) == (Lazy, Lazy(id=2), Lazy(id=2))


def test_the_run_tells_set_fields_from_defaults_no_better_than_its_replay() -> None:
    function = returning(lambda: Customer(home=Address(street="s", zipCode="z")), Customer)
    assert function().model_fields_set == function().model_fields_set >= {"home"}


# ------------------------------------------------------------------------------------------ where annotations come from


def test_a_string_annotation_is_resolved() -> None:
    function = idempotent(backend=LocalBackend())(postponed.early)
    expected = postponed.Early(UUID(int=1), ("a", "b"))
    assert picture(function(UUID(int=1))) == picture(function(UUID(int=1))) == picture(expected)


def test_a_string_annotation_of_an_async_function_is_resolved() -> None:
    function = idempotent(backend=LocalBackend())(postponed.early_async)

    async def main() -> list[Any]:
        return [await function(UUID(int=1)) for _ in range(2)]

    expected = postponed.Early(UUID(int=1), ("a", "b"))
    assert [picture(answer) for answer in asyncio.run(main())] == [picture(expected)] * 2


def test_a_parameter_known_to_type_checkers_alone_is_no_hindrance() -> None:
    function = idempotent(backend=LocalBackend())(postponed.with_context)
    assert picture(function(1)) == picture(function(1)) == picture((1, "done"))


def test_a_class_defined_later_is_found_at_the_first_call() -> None:
    module = importlib.reload(postponed)
    vars(module).pop("Late", None)
    function = idempotent(backend=LocalBackend())(module.late)
    with pytest.raises(SerializationError, match="late cannot be resolved.*'Late'"):
        function(1)
    module.define_late()
    first = function(1)
    assert picture(first) == picture(function(1)) == picture([module.Late(1)])  # type: ignore[attr-defined]


def test_a_name_that_is_never_defined_stops_the_first_call_before_anything_runs() -> None:
    backend = LocalBackend()
    function = idempotent(backend=backend)(postponed.never)
    for _ in range(2):
        with pytest.raises(SerializationError, match="never cannot be resolved.*'Nowhere'.*define or import"):
            function(1)
    assert not rows(backend)
    assert not backend._store.open
    assert not function.stats()


def test_a_name_that_is_never_defined_stops_an_async_call_too() -> None:
    async def never() -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError("ran")

    with pytest.raises(SerializationError, match="'Nowhere'"):
        asyncio.run(idempotent(backend=LocalBackend())(never)())


def test_a_string_annotation_of_a_local_class_is_found_where_the_function_uses_it() -> None:
    function = idempotent(backend=LocalBackend())(postponed.local(1))
    first = function(1)
    assert type(first).__qualname__ == "local.<locals>.Inner"
    assert picture(first) == picture(function(1))


def test_a_quoted_name_of_an_enclosing_scope_is_found() -> None:
    @dataclass
    class Inner:
        id: int

    def function() -> "list[Inner]":
        return [Inner(1)]

    decorated = idempotent(backend=LocalBackend())(function)
    assert picture(decorated()) == picture(decorated()) == picture([Inner(1)])


class Priced:
    """A callable object."""

    def __call__(self, n: int) -> tuple[int, Money]:
        return n, Money(Decimal(n))


class PricedAsync:
    async def __call__(self, n: int) -> tuple[int, Money]:
        return n, Money(Decimal(n))


def price(n: int, currency: str) -> tuple[int, Money]:
    return n, Money(Decimal(n), currency)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


@pytest.mark.parametrize(
    "function, currency",
    [
        (functools.partial(price, currency="USD"), "USD"),
        (functools.partial(functools.partial(price), currency="USD"), "USD"),
        (functools.partial(Priced()), "EUR"),
        (Priced(), "EUR"),
        (Priced().__call__, "EUR"),
        (logged(Priced().__call__), "EUR"),
    ],
    ids=["partial", "partial of partial", "partial of object", "object", "method", "wrapped method"],
)
def test_the_annotation_is_found_through_partials_objects_and_wrappers(function: Any, currency: str) -> None:
    decorated = idempotent(backend=LocalBackend(), namespace="n", key="{n}")(function)
    expected = (1, Money(Decimal(1), currency))
    assert picture(decorated(1)) == picture(decorated(1)) == picture(expected)


def test_the_annotation_of_an_async_object_is_found() -> None:
    decorated = idempotent(backend=LocalBackend(), namespace="n", key="{n}")(PricedAsync())

    async def main() -> list[Any]:
        return [await decorated(1), await decorated(1)]

    assert [picture(answer) for answer in asyncio.run(main())] == [picture((1, Money(Decimal(1))))] * 2


@pytest.mark.parametrize(
    "annotation",
    [
        threading.Thread,
        Callable[[], int],
        Iterator[int],
        Money | Order,
        list[Money | Order],
        Mixed,
        Opaque,
        dict[str, Opaque],
        Loose | Opaque,
        Customer | threading.Thread,
    ],
    ids=called,
)
@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_an_annotation_that_cannot_be_served_is_refused_at_decoration(colour: Colour, annotation: Any) -> None:
    with pytest.raises(SerializationError) as caught:
        colour.define(annotated(annotation), backend=LocalBackend())
    said = str(caught.value)
    assert "annotated.<locals>.function" in said
    assert "cannot be served" in said
    for remedy in ("Annotate", "serializer=", "keep_result=False"):
        assert remedy in said


def test_an_annotation_that_cannot_be_served_matters_not_where_another_serializer_or_none_is_asked_for() -> None:
    assert returning(1, threading.Thread, serializer=PickleSerializer(SECRET))() == 1
    assert returning(1, threading.Thread, keep_result=False)() == 1


# ------------------------------------------------------------------------------------------------------- deployments


DEPLOYMENTS: list[tuple[Any, Any, Any]] = [
    # value, annotation then, annotation now
    (5, int, UNANNOTATED),
    (5, UNANNOTATED, int),
    (Decimal("1.50"), Decimal, UNANNOTATED),
    (Decimal("1.50"), UNANNOTATED, Decimal),
    ((1, 2), UNANNOTATED, tuple[int, ...]),
    ((1, 2), tuple[int, ...], UNANNOTATED),
    ({1, 2}, UNANNOTATED, set[int]),
    (Money(Decimal("1.50")), Money, UNANNOTATED),
    (Money(Decimal("1.50")), UNANNOTATED, Money),
    (Money(Decimal("1.50")), Money, int),
    (Money(Decimal("1.50")), Money, Parcel),
    (Loose((1,)), Loose, UNANNOTATED),
    (Loose((1,)), Loose, Money),
    (datetime(2026, 1, 1, tzinfo=PARIS), datetime, UNANNOTATED),
    (datetime(2026, 1, 1, tzinfo=PARIS), datetime, int),
    (Card(last4="4242"), Card, UNANNOTATED),
    (Card(last4="4242"), Card, Cash),
    (Card(last4="4242"), UNANNOTATED, Card),
    ("text", str, int),
    ("4242", str, Card),
    (Money(Decimal("1.50")), Money, Retold),
    (Money(Decimal("1.50")), Money, Wider),
    ([1, 1, 2], list[int], set[int]),
    ([1, 2], list[int], tuple[int, int]),
    ([1, 2], list[int], list[float]),
    (5, int, float),
    ("1.50", str, Decimal),
    ("2026-01-01", str, date),
    ({"last4": "4242"}, dict[str, str], Card),
    ((1, [2]), tuple[Any, Any], list[Any]),
    (Cents(500), Cents, CentsRenamed),
    (NetGross(1, 2), NetGross, GrossNet),
]


@pytest.mark.parametrize("value, then, now", DEPLOYMENTS, ids=called)
def test_a_record_of_another_annotation_replays_as_the_run_answered_or_not_at_all(
    value: Any, then: Any, now: Any
) -> None:
    backend = LocalBackend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResultTypeWarning)
        first = returning(value, then, backend=backend)()
    after = returning(value, now, backend=backend)
    try:
        replay = after()
    except ResultUnavailable as error:
        assert error.result is None
    else:
        assert picture(replay) == picture(first)
    assert after.runs == 0


@pytest.mark.parametrize(
    "then, now",
    [
        (int, int | None),
        (int, Annotated[int, "cents"]),
        (Literal["a"], Literal["a", "b"]),
        (list[int], Sequence[int]),
        (Money, Money | None),
        (Colours, Enum("Colours", {"RED": "red", "BLUE": "blue", "GREEN": "green"})),
        (Money, dataclasses.make_dataclass("Amount", [("currency", str), ("amount", Decimal)])),
        (Tree | dict[str, Money] | list[Money], list[Money] | Tree | dict[str, Money]),
    ],
    ids=called,
)
def test_an_annotation_that_only_allows_more_or_is_called_otherwise_reads_what_was_kept(then: Any, now: Any) -> None:
    assert digest_of(then) == digest_of(now)


def test_classes_that_hold_each_other_in_every_way_have_a_shape_soon() -> None:
    """Not one that is written out for each path to a class."""
    names = [f"Part{number}" for number in range(12)]
    made: dict[str, Any] = {}
    for name in names:
        fields = [(f"f{other}", other) for other in names]
        made[name] = dataclasses.make_dataclass(name, fields)
    for kind in made.values():
        kind.__annotations__ = {field: made[field[1:]] | None for field in kind.__annotations__}
    assert digest_of(made["Part0"]) == digest_of(made["Part0"])
    deeper = dataclasses.make_dataclass("Deeper", [("f", int)])
    before = digest_of(made["Part0"])
    made["Part11"].__annotations__["f0"] = deeper
    assert digest_of(made["Part0"]) != before


def test_the_shape_of_an_annotation_is_the_same_in_every_process() -> None:
    kinds = [Money, Line, Loose, Card, Tree, Money | Card | int | str, dict[str, list[tuple[int, ...]]], Colours, Size]
    code = (
        "import test_serializers as t; from idempotent._shape import digest_of; from typing import *;"
        "print([digest_of(kind) for kind in (t.Money, t.Line, t.Loose, t.Card, t.Tree, t.Money | t.Card | int | str,"
        " dict[str, list[tuple[int, ...]]], t.Colours, t.Size)])"
    )
    here = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(here), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str([digest_of(kind) for kind in kinds])
    assert len({digest_of(kind) for kind in kinds}) == len(kinds)


REFUSED = [row for row in DEPLOYMENTS if row[2] in (int, Cash, Card, Money, Parcel)]


def printed(error: BaseException) -> str:
    """What a log shows of an error, its causes included, but for the lines of source."""
    return "".join(
        traceback.TracebackException.from_exception(error, lookup_lines=False).format_exception_only()
    ) + "".join(
        printed(cause)
        for cause in (error.__cause__, None if error.__suppress_context__ else error.__context__)
        if cause is not None
    )


@pytest.mark.parametrize("value, then, now", REFUSED, ids=called)
def test_an_error_about_a_record_that_cannot_be_decoded_holds_nothing_of_it(value: Any, then: Any, now: Any) -> None:
    backend = LocalBackend()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResultTypeWarning)
        first = returning(value, then, backend=backend)()
    after = returning(value, now, backend=backend)
    try:
        replay = after()
    except ResultUnavailable as error:
        for data in ("4242", "1.50", "text'", "2026"):
            assert data not in printed(error)
        for told in ("returning.<locals>.function", "forget()", "Error"):
            assert told in str(error)
    else:
        assert picture(replay) == picture(first)
    assert after.runs == 0


class Talkative:
    """A serializer, and a value, that quote what they are given in their errors."""

    name = "talkative"

    def dumps(self, value: Any) -> bytes:
        raise ValueError(f"cannot dump {value!r}")

    def loads(self, data: bytes) -> Any:
        raise ValueError(f"cannot load {data!r}")


@dataclass
class Quoting:
    number: str

    def __getattribute__(self, name: str) -> Any:
        if name == "number":
            raise ValueError(f"no view of {vars(self)}")
        return super().__getattribute__(name)


@pytest.mark.parametrize(
    "make, annotation, serializer",
    [
        (lambda: "4242", str, Talkative()),
        (lambda: "4242", str, Encrypted(Talkative(), {"1": KEY})),
        (lambda: Loose("4242", Opaque()), Loose, None),  # type: ignore[arg-type]
        (lambda: "4242\ud800", str, None),
        (lambda: {Money: "4242"}, UNANNOTATED, None),
        (lambda: {Spot(x=4242): 1}, UNANNOTATED, None),
        (lambda: Quoting("4242"), UNANNOTATED, None),
        (lambda: pydantic.SecretStr("4242"), Any, None),
    ],
)
def test_an_error_about_a_result_that_cannot_be_encoded_holds_nothing_of_it(
    make: Any, annotation: Any, serializer: Any
) -> None:
    backend = LocalBackend()
    function = returning(make, annotation, serializer=serializer, backend=backend)
    for _ in range(2):
        with pytest.raises(ResultUnavailable, match="Error.*give serializer= or keep_result=False") as caught:
            function()
        assert "4242" not in printed(caught.value)
        assert "shop" in str(caught.value)
    assert b"4242" not in body_of(backend)
    assert function.runs == 1


def test_an_error_of_a_users_loads_is_told_by_its_place_and_not_by_its_words() -> None:
    serializer: Any = Shout()
    function = returning("4242", serializer=serializer)
    assert function() == "4242"
    serializer.loads = Talkative().loads
    with pytest.raises(
        ResultUnavailable, match=r"shop cannot decode it: ValueError in Talkative.loads, line \d+$"
    ) as caught:
        function()
    assert "4242" not in printed(caught.value)


def test_an_error_about_a_recorded_error_holds_nothing_of_it() -> None:
    backend = LocalBackend()
    function = failing(lambda: Picky("4242", Opaque()), backend=backend)  # type: ignore[arg-type]
    assert type(raised_by(function)) is Picky
    for body in (None, b'[["%s.Picky"],["4242"],{}]' % __name__.encode(), b'["4242"]', b'{"$":["dt","4242"]}'):
        if body is not None:
            forge(backend, body=body, codec="error1")
        error = raised_by(function)
        assert type(error) is ResultUnavailable
        assert "4242" not in printed(error)
    assert function.runs == 1


@pytest.mark.parametrize(
    "before, after",
    [
        (None, PickleSerializer(SECRET)),
        (PickleSerializer(SECRET), None),
        (None, Compressed()),
        (Compressed(), None),
        (Compressed(), Compressed(PickleSerializer(SECRET))),
        (Encrypted(keys={"1": KEY}), Compressed(Encrypted(keys={"1": KEY}))),
    ],
    ids=called,
)
def test_a_record_of_another_codec_is_unavailable_and_nothing_runs(before: Any, after: Any) -> None:
    backend = LocalBackend()
    assert returning([1, 2], list[int], backend=backend, serializer=before)() == [1, 2]
    function = returning([1, 2], list[int], backend=backend, serializer=after)
    with pytest.raises(ResultUnavailable, match="was recorded by the codec '.*', and this function reads '.*'"):
        function()
    assert function.runs == 0


MONEY_JSON = b"\x03" + digest_of(Money)
MONEY_CONVERTED = b"\x02" + digest_of(Money)
BAD_BODIES = [
    b"",
    b"\x00",
    b"\x01",
    b"\x02",
    b"\x03",
    b"\x02null",
    b"\x01{",
    b'\x01{"$": []}',
    b'\x01{"$": ["os.system", "id"]}',
    b'\x01{"$": ["dt", "x", 0, null]}',
    b'\x01{"$": ["i", "zz"]}',
    b'\x01{"$": 5}',
    b"\xff\xfe",
    b'{"amount": "1.50", "currency": "EUR"}',
    b"\x03" + digest_of(int) + b'{"amount": "1.50", "currency": "EUR"}',
    MONEY_JSON,
    MONEY_JSON + b"{",
    MONEY_JSON + b"null",
    MONEY_JSON + b"[]",
    MONEY_JSON + b'{"currency": "EUR"}',
    MONEY_JSON + b'{"amount": "x", "currency": "EUR"}',
    MONEY_JSON + b"[" * 5000,
    MONEY_CONVERTED + b"null",
    MONEY_CONVERTED + b'{"$": 5}',
    b"\x01" + b"[" * 5000 + b"]" * 5000,
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:20]))
def test_bytes_that_nobody_can_decode_are_unavailable_and_nothing_runs(body: bytes) -> None:
    backend = LocalBackend()
    function = returning(Money(Decimal(1)), Money, backend=backend)
    function()
    forge(backend, body=body)
    with pytest.raises(ResultUnavailable):
        function()
    assert function.runs == 1


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_foreign_bytes_decode_to_a_serialization_error_or_to_what_fits(data: bytes) -> None:
    for mark in (b"", MONEY_JSON, MONEY_CONVERTED):
        try:
            value = codec_of(Money).decode(mark + data, RECORD)
        except SerializationError:
            continue
        assert isinstance(value, Money) or (mark + data)[:1] == b"\x01"


# ------------------------------------------------------------------------------------------------------------- pickle


class Planted:
    """A pickle with a side effect."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def as_codec(serializer: Any) -> Codec:
    return codec_for(lambda: None, serializer)


def test_what_nothing_else_can_hold_is_held_by_pickle() -> None:
    value = {"a": [Size.SMALL, Money(Decimal(1)), range(3), 2 + 3j], "b": re.compile("x")}
    function = returning(value, serializer=PickleSerializer(SECRET))
    assert function() == function() == value
    assert function.runs == 1
    serializer = PickleSerializer(SECRET)
    assert serializer.loads(serializer.dumps(value)) == value


def test_a_pickle_is_opened_with_its_own_secret_alone() -> None:
    body = as_codec(PickleSerializer(SECRET)).keep([1], RECORD)[0]
    assert as_codec(PickleSerializer(bytes(SECRET))).decode(body, RECORD) == [1]
    with pytest.raises(SerializationError, match="signature"):
        as_codec(PickleSerializer(SECRET + b"!")).decode(body, RECORD)


def test_a_pickle_tampered_with_anywhere_is_refused() -> None:
    codec = as_codec(PickleSerializer(SECRET))
    body = codec.keep({"amount": 100}, RECORD)[0]
    for at in range(len(body)):
        bad = bytearray(body)
        bad[at] ^= 1
        with pytest.raises(SerializationError, match="signature"):
            codec.decode(bytes(bad), RECORD)
    for cut in range(len(body)):
        with pytest.raises(SerializationError, match="signature"):
            codec.decode(body[:cut], RECORD)
    with pytest.raises(SerializationError, match="signature"):
        codec.decode(body + b"\x00", RECORD)


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 15])
def test_a_short_secret_is_refused(secret: bytes) -> None:
    with pytest.raises(ValueError, match="secret must be at least 16 bytes"):
        PickleSerializer(secret)


@pytest.mark.parametrize("secret", ["x" * 32, None, 5, bytearray(32)])
def test_a_secret_that_is_no_bytes_is_refused(secret: Any) -> None:
    with pytest.raises(TypeError, match="secret must be bytes"):
        PickleSerializer(secret)


def test_a_pickle_of_somebody_else_never_runs(tmp_path: Path) -> None:
    target = tmp_path / "planted"
    evil = pickle.dumps(Planted(str(target)))
    backend = LocalBackend()
    function = returning([1], serializer=PickleSerializer(SECRET), backend=backend)
    function()
    signature = body_of(backend)[:32]
    for body in (evil, b"\x00" * 32 + evil, signature + evil, PickleSerializer(b"y" * 16)._seal(evil, RECORD)):
        forge(backend, body=body)
        with pytest.raises(ResultUnavailable, match="signature"):
            function()
    assert not target.exists()
    pickle.loads(evil)
    assert target.exists(), "the pickle would have had its effect"


@pytest.mark.parametrize(
    "serializer",
    [
        PickleSerializer(SECRET),
        Encrypted(keys={"1": KEY}),
        Compressed(Encrypted(keys={"1": KEY})),
        Encrypted(Compressed(), {"1": KEY}),
        Compressed(PickleSerializer(SECRET)),
    ],
    ids=called,
)
def test_sealed_bytes_moved_to_another_record_are_unavailable(serializer: Any) -> None:
    backend = LocalBackend()
    values = iter(["poor", "rich"])
    function = returning(lambda: next(values), str, serializer=serializer, backend=backend)
    assert (function("ann"), function("bob")) == ("poor", "rich")
    mine, theirs = body_of(backend, "ann"), body_of(backend, "bob")
    forge(backend, "ann", body=theirs)
    with pytest.raises(ResultUnavailable, match="another record"):
        function("ann")
    assert function("bob") == "rich"
    forge(backend, "ann", body=mine)
    assert function("ann") == "poor"
    assert function.runs == 2


# --------------------------------------------------------------------------------------------- compressed, encrypted


def test_what_shrinks_is_compressed_and_what_does_not_is_kept() -> None:
    plain, packed = codec_of(list[str]), codec_for(annotated(list[str]), Compressed())
    long, short = ["the same words"] * 500, ["a"]
    assert len(packed.keep(long, RECORD)[0]) < len(plain.keep(long, RECORD)[0]) / 10
    assert packed.keep(short, RECORD)[0] == b"\x00" + plain.keep(short, RECORD)[0]
    for value in (long, short, []):
        assert picture(packed.decode(packed.keep(value, RECORD)[0], RECORD)) == picture(value)


@pytest.mark.parametrize("body", [b"", b"\x01", b"\x01rubbish", b"\x02rubbish", b"rubbish", b"\x00", b"\x00{"])
def test_what_cannot_be_decompressed_is_unavailable(body: bytes) -> None:
    backend = LocalBackend()
    function = returning(["a"] * 100, list[str], serializer=Compressed(), backend=backend)
    function()
    forge(backend, body=body)
    with pytest.raises(ResultUnavailable):
        function()
    assert function.runs == 1


def test_compressed_bytes_cut_short_are_refused() -> None:
    codec = codec_for(annotated(list[str]), Compressed())
    body = codec.keep(["the same words"] * 500, RECORD)[0]
    for cut in range(len(body)):
        with pytest.raises(SerializationError):
            codec.decode(body[:cut], RECORD)


class Shout:
    """A serializer of a user's own."""

    name = "shout"

    def dumps(self, value: Any) -> bytes:
        return str(value).upper().encode()

    def loads(self, data: bytes) -> Any:
        return data.decode()


@pytest.mark.parametrize(
    "serializer, name",
    [
        (None, "json1"),
        (PickleSerializer(SECRET), "pickle1"),
        (Compressed(), "zstd1+json1"),
        (Encrypted(keys={"1": KEY}), "aesgcm1+json1"),
        (Compressed(Shout()), "zstd1+shout"),
        (Encrypted(Compressed(PickleSerializer(SECRET)), {"1": KEY}), "aesgcm1+zstd1+pickle1"),
        (Compressed(Encrypted(Shout(), {"1": KEY})), "zstd1+aesgcm1+shout"),
        (Shout(), "shout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_name_of_a_codec_tells_what_it_is_made_of(serializer: Any, name: str) -> None:
    backend = LocalBackend()
    function = returning("Hello", str, serializer=serializer, backend=backend)
    expected = "HELLO" if "shout" in name else "Hello"
    assert (function(), function(), function.runs) == (expected, expected, 1)
    record = function.peek()
    assert record is not None
    assert record.codec == name


@pytest.mark.parametrize(
    "wrap",
    [Compressed, lambda inner: Encrypted(inner, {"1": KEY}), lambda inner: Encrypted(Compressed(inner), {"1": KEY})],
    ids=["Compressed", "Encrypted", "both"],
)
def test_a_wrapper_of_the_default_rebuilds_types_by_the_annotation(wrap: Any) -> None:
    value = Order(1, Money(Decimal("1.50")), datetime(2026, 1, 1, tzinfo=PARIS), [Line(sku=UUID(int=1))])
    comes_back(None, value, codec_for(annotated(Order), wrap(None)))
    alone = wrap(None)
    assert alone.loads(alone.dumps({"a": (1, {2})})) == {"a": (1, {2})}


def test_a_wrapper_of_the_default_refuses_what_the_default_refuses() -> None:
    with pytest.raises(SerializationError, match="cannot be served"):
        returning(1, threading.Thread, serializer=Compressed())
    with pytest.raises(SerializationError, match="'Nowhere'"):
        idempotent(backend=LocalBackend(), serializer=Compressed())(postponed.never)(1)


def test_encrypted_bytes_hold_nothing_of_the_value_and_never_repeat() -> None:
    codec = codec_for(annotated(str), Encrypted(keys={"2026": KEY}))
    text = "card number 4242 4242"
    one, other = codec.keep(text, RECORD)[0], codec.keep(text, RECORD)[0]
    assert one != other
    for body in (one, other):
        for part in (b"card", b"4242"):
            assert part not in body
        assert codec.decode(body, RECORD) == text


@pytest.mark.parametrize("size", [16, 24, 32])
def test_encrypted_bytes_tampered_with_anywhere_are_refused(size: int) -> None:
    codec = codec_for(annotated(list[int]), Encrypted(keys={"2026": b"k" * size}))
    body = codec.keep([100], RECORD)[0]
    for at in range(len(body)):
        bad = bytearray(body)
        bad[at] ^= 1
        with pytest.raises(SerializationError):
            codec.decode(bytes(bad), RECORD)
    for cut in range(len(body)):
        with pytest.raises(SerializationError):
            codec.decode(body[:cut], RECORD)
    with pytest.raises(SerializationError):
        codec.decode(body + b"\x00", RECORD)


def test_keys_are_rotated_by_putting_the_new_one_first() -> None:
    backend = LocalBackend()
    old, new = b"o" * 32, b"n" * 32

    def deploy(keys: dict[str, bytes]) -> Any:
        return returning("secret", str, backend=backend, serializer=Encrypted(keys=keys))

    deploy({"old": old})("a")
    both = deploy({"new": new, "old": old})
    assert (both("a"), both("b"), both.runs) == ("secret", "secret", 1)
    assert body_of(backend, "a")[1:4] == b"old"
    assert body_of(backend, "b")[1:4] == b"new"
    last = deploy({"new": new})
    assert last("b") == "secret"
    with pytest.raises(ResultUnavailable, match="the key 'old', not among keys="):
        last("a")
    with pytest.raises(ResultUnavailable, match="does not decrypt"):
        deploy({"old": new})("a")
    assert last.runs == 0


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {},
        {"1": b"short"},
        {"1": b"k" * 33},
        {"1": "k" * 32},
        {"": KEY},
        {"x" * 256: KEY},
        {1: KEY},
        {KEY: "1"},
        {"1": bytearray(KEY)},
        {"1": KEY, "2": b""},
        KEY,
        [("1", KEY)],
    ],
    ids=lambda keys: repr(keys)[:20],
)
def test_bad_keys_are_refused(keys: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="key") as caught:
        Encrypted(None, keys)
    assert "kkkk" not in str(caught.value)


@pytest.mark.parametrize("keys", [KEY, "key", [("1", KEY)], {("1", KEY)}, 5], ids=lambda keys: type(keys).__name__)
def test_keys_that_are_no_mapping_are_refused_with_an_example(keys: Any) -> None:
    said = rf"keys must be a dict such as \{{'2026': AESGCM.generate_key\(256\)\}}, not {type(keys).__name__}$"
    with pytest.raises(TypeError, match=said):
        Encrypted(keys=keys)


@pytest.mark.parametrize("inner", [KEY, {"1": KEY}], ids=["key", "keys"])
def test_a_key_given_in_the_place_of_inner_is_refused_and_not_shown(inner: Any) -> None:
    with pytest.raises(TypeError, match="inner must have dumps") as caught:
        Encrypted(inner)
    assert "kkkk" not in str(caught.value)


@pytest.mark.parametrize("inner", [5, "json", object(), lambda: None], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "wrap", [Compressed, lambda inner: Encrypted(inner, {"1": KEY})], ids=["Compressed", "Encrypted"]
)
def test_an_inner_that_is_no_serializer_is_refused(wrap: Any, inner: Any) -> None:
    with pytest.raises(TypeError, match="inner must have dumps"):
        wrap(inner)


@pytest.mark.parametrize("module, wrap", [("zstandard", Compressed), ("cryptography.exceptions", Encrypted)])
def test_a_missing_extra_is_named(module: str, wrap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"pip install 'idempotent-py\[(zstd|crypto)\]'"):
        wrap()


# ----------------------------------------------------------------------------------------------- users' serializers


class Bare:
    """A serializer without a name."""

    def dumps(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def loads(self, data: bytes) -> Any:
        return pickle.loads(data)


@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_a_serializer_without_a_name_goes_by_its_class(colour: Colour) -> None:
    def function() -> Any:
        return {Size.SMALL: 2 + 3j}

    decorated = colour.define(function, backend=LocalBackend(), serializer=Bare())
    assert colour.call(decorated) == colour.call(decorated) == {Size.SMALL: 2 + 3j}
    assert colour.call(decorated.peek).codec == "Bare"


class NotBytes(Shout):
    def dumps(self, value: Any) -> Any:
        return str(value)


class Raising(Shout):
    def dumps(self, value: Any) -> bytes:
        raise RuntimeError("dumps is broken")


class OneWay(Shout):
    def loads(self, data: bytes) -> Any:
        raise RuntimeError("loads is broken")


@pytest.mark.parametrize(
    "serializer, said",
    [
        (NotBytes(), "must return bytes, not str"),
        (Raising(), "RuntimeError in Raising.dumps"),
        (OneWay(), "RuntimeError in OneWay.loads"),
        (Compressed(Raising()), "RuntimeError in Raising.dumps"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_a_serializer_that_fails_makes_the_result_unavailable_and_nothing_runs_again(
    colour: Colour, serializer: Any, said: str
) -> None:
    runs: list[int] = []

    def function() -> str:
        runs.append(1)
        return "mine"

    decorated = colour.define(function, backend=LocalBackend(), serializer=serializer)
    with pytest.raises(ResultUnavailable, match=said) as caught:
        colour.call(decorated)
    assert caught.value.result == "mine"
    with pytest.raises(ResultUnavailable, match=said) as again:
        colour.call(decorated)
    assert again.value.result is None
    assert len(runs) == 1


def test_loads_that_fails_later_makes_the_result_unavailable() -> None:
    serializer = Shout()
    function = returning("mine", serializer=serializer)
    assert function() == "MINE"
    serializer.loads = lambda data: 1 // 0  # type: ignore[method-assign]
    with pytest.raises(ResultUnavailable, match="ZeroDivisionError"):
        function()
    assert function.runs == 1


def named(name: Any) -> Any:
    serializer = Shout()
    serializer.name = name
    return serializer


@pytest.mark.parametrize("name", ["x" * 101, "é" * 51, 5, b"bytes", "\ud800"], ids=ascii)
def test_a_name_that_cannot_be_stored_is_refused(name: Any) -> None:
    with pytest.raises(ValueError):
        returning(1, serializer=named(name))


def test_names_that_are_too_long_together_are_refused() -> None:
    serializer: Any = named("x" * 95)
    assert as_codec(serializer).name == "x" * 95
    with pytest.raises(ValueError, match="over 100 bytes"):
        as_codec(Compressed(serializer))


@pytest.mark.parametrize("name", [flow.DONE, flow.UNAVAILABLE, flow.ERROR])
@pytest.mark.parametrize("wrap", [lambda inner: inner, Compressed], ids=["bare", "inside"])
def test_a_serializer_by_the_name_of_another_kind_of_record_is_refused_at_decoration(wrap: Any, name: str) -> None:
    with pytest.raises(ValueError, match=f"the name of serializer= must not be '{name}'"):
        returning("mine", serializer=wrap(named(name)))


@pytest.mark.parametrize("name", ["json1", "pickle1"])
def test_a_serializer_that_takes_the_name_of_one_of_ours_serves_its_own_records(name: str) -> None:
    function = returning("mine", serializer=named(name))
    assert (function(), function(), function.runs) == ("MINE", "MINE", 1)


@pytest.mark.parametrize("serializer", [5, object(), "json", lambda: None], ids=lambda value: type(value).__name__)
def test_what_is_no_serializer_is_refused_at_decoration(serializer: Any) -> None:
    with pytest.raises(TypeError, match="serializer must have dumps"):
        returning(1, serializer=serializer)


def test_a_result_that_is_not_kept_is_the_runs_own_and_none_after() -> None:
    value = Opaque()
    function = returning(lambda: value, keep_result=False)
    assert function() is value
    assert function() is None
    assert function.runs == 1


# -------------------------------------------------------------------------------------------------- recorded errors


class Declined(Exception):
    """A signature of its own, and attributes."""

    def __init__(self, order: str, *, code: int, extra: Any = None) -> None:
        super().__init__(f"order {order} declined: {code}")
        self.order = order
        self.code = code
        self.extra = extra


class DeclinedHard(Declined):
    pass


class Slotted(Exception):
    __slots__ = ("__hidden", "code", "never")

    def __init__(self, code: int) -> None:
        super().__init__("slotted")
        self.code = code
        self.__hidden = (code,)

    def __str__(self) -> str:
        return f"slotted {self.code} {self.__hidden}"


class Picky(Exception):
    """It cannot be made from its own arguments."""

    def __new__(cls, first: int, second: int) -> Self:
        return super().__new__(cls, f"{first}-{second}")

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first}-{second}")


class Money2(Exception):
    pass


def raised_by(action: Callable[[], Any]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


ERRORS: list[Callable[[], Any]] = [
    lambda: open("/nowhere/at/all"),
    lambda: os.rename("/nowhere/a", "/nowhere/b"),
    lambda: {}["missing"],
    lambda: b"\xff".decode(),
    lambda: "é".encode("ascii"),
    lambda: next(iter([])),
    lambda: int("x"),
    lambda: 1 // 0,
    lambda: {}.nothing,  # type: ignore[attr-defined]
    lambda: importlib.import_module("nowhere_at_all"),
    lambda: undefined,  # type: ignore[name-defined]  # noqa: F821
    lambda: compile("a b", "file", "exec"),
]
ERROR_IDS = [type(raised_by(action)).__name__ for action in ERRORS]
TOLD = (
    "filename",
    "filename2",
    "errno",
    "strerror",
    "name",
    "path",
    "value",
    "lineno",
    "offset",
    "text",
    "start",
    "end",
    "reason",
)


def told(error: BaseException) -> dict[str, Any]:
    """What a handler can read from an error."""
    held = {name: getattr(error, name) for name in TOLD if hasattr(error, name)}
    return {**held, **vars(error), "str": str(error), "args": picture(error.args), "class": type(error)}


@pytest.mark.parametrize("action", ERRORS, ids=ERROR_IDS)
def test_a_builtin_error_comes_back_with_all_it_tells(action: Callable[[], Any]) -> None:
    error = raised_by(action)
    back = decode_error(encode_error(error), (Exception,))
    assert back is not error
    assert told(back) == told(error)


def failing(error: Any, **options: Any) -> Any:
    """A decorated function that raises what `error` makes; `.runs` counts."""

    def function(key: str = "k") -> None:
        decorated.runs += 1
        raise error()

    options.setdefault("backend", LocalBackend())
    options.setdefault("error_ttl", {Exception: 60})
    decorated: Any = idempotent(namespace="shop", key="{key}", **options)(function)
    decorated.runs = 0
    return decorated


@pytest.mark.parametrize(
    "colour, action",
    [
        pytest.param(colour, action, id=f"{colour}-{name}")
        for colour in COLOURS
        for action, name in zip(ERRORS, ERROR_IDS, strict=True)
        if name != "StopIteration" or not colour.is_async  # which no async function can raise: see below
    ],
)
def test_a_recorded_builtin_error_is_replayed_as_the_same_class(colour: Colour, action: Callable[[], Any]) -> None:
    runs: list[int] = []

    def function() -> None:
        runs.append(1)
        action()

    decorated = colour.define(function, backend=LocalBackend(), error_ttl={Exception: 60})
    first = raised_by(lambda: colour.call(decorated))
    replay = raised_by(lambda: colour.call(decorated))
    assert (type(replay), picture(replay.args)) == (type(first), picture(first.args))
    assert len(runs) == 1


def test_a_stop_iteration_keeps_its_value_through_a_replay() -> None:
    function = failing(lambda: StopIteration(5), error_ttl={StopIteration: 60})
    for _ in range(2):
        assert raised_by(function).value == 5  # type: ignore[attr-defined]
    assert function.runs == 1


def test_a_stop_iteration_in_an_async_function_is_replayed_as_what_python_makes_of_it() -> None:
    runs: list[int] = []

    @idempotent(error_ttl={Exception: 60}, backend=LocalBackend())
    async def function() -> None:
        runs.append(1)
        raise StopIteration(5)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="^coroutine raised StopIteration$"):
            asyncio.run(function())
    assert len(runs) == 1


def test_a_stop_iteration_that_a_sync_worker_recorded_is_what_python_makes_of_it_for_an_async_one() -> None:
    backend = LocalBackend()
    raised_by(failing(lambda: StopIteration(5), error_ttl={StopIteration: 60}, backend=backend))

    @idempotent(namespace="shop", key="{key}", error_ttl={StopIteration: 60}, backend=backend)
    async def function(key: str = "k") -> None:
        raise AssertionError("ran")

    with pytest.raises(RuntimeError, match="coroutine raised StopIteration") as caught:
        asyncio.run(function())
    assert caught.value.__cause__.value == 5  # type: ignore[union-attr]


@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_outcome_raises_a_recorded_error_as_the_call_does(colour: Colour) -> None:
    def function() -> None:
        raise Declined("o1", code=7)

    decorated = colour.define(function, backend=LocalBackend(), error_ttl={Declined: 60})
    for _ in range(2):
        error = raised_by(lambda: colour.call(decorated.outcome))
        assert (type(error), vars(error)["code"]) == (Declined, 7)
    assert decorated.stats() == {"claimed": 1, "failed": 1, "replayed": 1}


def test_an_error_with_a_signature_of_its_own_keeps_its_attributes_and_notes() -> None:
    def make() -> Exception:
        error = Declined("o1", code=7, extra=(Decimal("1.50"), {1}))
        error.add_note("seen by the gateway")
        return error

    function = failing(make, error_ttl={Declined: 60})
    first, replay = raised_by(function), raised_by(function)
    assert told(replay) == told(first) == told(make())
    assert replay.__notes__ == ["seen by the gateway"]
    assert picture(vars(replay)) == picture(vars(first))
    assert function.runs == 1
    assert replay is not first


def test_attributes_that_cannot_be_kept_are_left_out() -> None:
    function = failing(lambda: Declined("o1", code=7, extra=Opaque()), error_ttl={Declined: 60})
    first, replay = raised_by(function), raised_by(function)
    assert isinstance(first.extra, Opaque)  # type: ignore[attr-defined]
    assert vars(replay) == {"order": "o1", "code": 7}


def test_an_attribute_in_a_slot_is_kept() -> None:
    function = failing(lambda: Slotted(7))
    raised_by(function)
    replay: Any = raised_by(function)
    assert (type(replay), replay.code, str(replay), vars(replay)) == (Slotted, 7, "slotted 7 (7,)", {})
    assert not hasattr(replay, "never")


@pytest.mark.parametrize("obj, kept", [({"a": (1,)}, {"a": (1,)}), (Opaque(), None), (Money(Decimal(1)), None)])
def test_the_object_of_an_attribute_error_is_kept_where_it_can_be(obj: Any, kept: Any) -> None:
    function = failing(lambda: raised_by(lambda: obj.nothing))
    first, replay = raised_by(function), raised_by(function)
    assert (first.obj, first.name) == (obj, "nothing")  # type: ignore[attr-defined]
    assert (type(replay), replay.obj, replay.name) == (AttributeError, kept, "nothing")  # type: ignore[attr-defined]
    assert str(replay) == str(first)


class Broken:
    """A value that nothing can look into."""

    __slots__ = ("__attrs_attrs__",)

    def __getattribute__(self, name: str) -> Any:
        raise LookupError(name)


def test_an_attribute_that_cannot_be_looked_into_is_left_out() -> None:
    function = failing(lambda: Declined("o1", code=7, extra=Broken()), error_ttl={Declined: 60})
    raised_by(function)
    replay = raised_by(function)
    assert (type(replay), vars(replay)) == (Declined, {"order": "o1", "code": 7})


def test_a_replayed_error_brings_no_context_of_another_call() -> None:
    def cause() -> Exception:
        error = Declined("o1", code=1)
        error.__cause__ = ValueError("inner")
        return error

    function = failing(cause)
    assert isinstance(raised_by(function).__cause__, ValueError)
    replay = raised_by(function)
    assert (replay.__cause__, replay.__context__) == (None, None)
    again = raised_by(function)
    assert again is not replay


def test_a_subclass_is_recorded_under_its_named_base_and_replayed_as_itself() -> None:
    function = failing(lambda: DeclinedHard("o1", code=1), error_ttl={Declined: 60})
    assert [type(raised_by(function)) for _ in range(2)] == [DeclinedHard, DeclinedHard]
    assert function.runs == 1


def test_an_error_that_is_not_named_releases_the_key() -> None:
    function = failing(lambda: ValueError("again"), error_ttl={Declined: 60})
    for _ in range(2):
        with pytest.raises(ValueError, match="again"):
            function()
    assert function.runs == 2


def test_the_nearest_named_class_decides_how_long_an_error_is_kept() -> None:
    backend = LocalBackend()
    function = failing(lambda: DeclinedHard("o1", code=1), error_ttl={Exception: 1000, Declined: 50}, backend=backend)
    raised_by(function)
    record = function.peek()
    assert record.state == "failed"
    assert 40 < record.expires_in <= 50


def test_a_class_that_is_not_loaded_comes_back_as_its_nearest_named_base() -> None:
    def local() -> bytes:
        class Ephemeral(DeclinedHard):
            pass

        return encode_error(Ephemeral("o1", code=1))

    body = local()
    gc.collect()
    assert not [cls for cls in DeclinedHard.__subclasses__() if cls.__name__ == "Ephemeral"]
    assert type(decode_error(body, (Exception, Declined))) is DeclinedHard, "a loaded subclass of a named class"
    assert type(decode_error(body, (Exception,))) is DeclinedHard
    forged = body.replace(b"DeclinedHard", b"DeclinedGone")
    back = decode_error(forged, (Exception, Declined))
    assert type(back) is Declined
    assert vars(back) == {"order": "o1", "code": 1, "extra": None}
    assert type(decode_error(forged.replace(b".Declined", b".Gone"), (Exception, ValueError))) is Exception


def test_of_two_classes_of_one_name_the_named_one_is_taken() -> None:
    def make() -> type[Exception]:
        return type("Twin", (Exception,), {"__module__": "shop", "__qualname__": "Twin"})

    one, other = make(), make()
    body = encode_error(one("x"))
    assert type(decode_error(body, (one,))) is one
    assert type(decode_error(body, (other,))) is other
    assert type(decode_error(body, (Exception, other))) is other
    assert type(decode_error(body, (other, Exception))) is other
    assert type(decode_error(body, (Exception, one))) is one


@pytest.mark.parametrize(
    "make",
    [
        lambda: ValueError(Opaque()),
        lambda: ValueError(Money(Decimal(1))),
        lambda: ValueError(Size.SMALL),
        lambda: ValueError("\ud800"),
        lambda: Picky(1, 2),
        lambda: ExceptionGroup("several", [ValueError("inner")]),
        lambda: KeyError(threading.Lock()),
    ],
    ids=["object", "dataclass", "enum", "surrogate", "picky", "group", "lock"],
)
@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_an_error_that_cannot_be_encoded_goes_to_its_own_caller_and_ends_the_record(colour: Colour, make: Any) -> None:
    runs: list[Exception] = []

    def function() -> None:
        runs.append(make())
        raise runs[-1]

    decorated = colour.define(function, backend=LocalBackend(), error_ttl={Exception: 60})
    assert raised_by(lambda: colour.call(decorated)) is runs[0]
    for _ in range(2):
        error = raised_by(lambda: colour.call(decorated))
        assert isinstance(error, ResultUnavailable)
        assert type(runs[0]).__name__ in str(error)
    assert len(runs) == 1
    assert colour.call(decorated.peek).state == "failed"


def test_nothing_is_imported_by_a_name_in_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_module.py").write_text("class Error(Exception): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    backend = LocalBackend()
    function = failing(lambda: Declined("o1", code=1), error_ttl={Declined: 60}, backend=backend)
    raised_by(function)
    for name in ("os.system", "posix.system", "planted_module.Error", "builtins.SystemExit", "builtins.ValueError"):
        forge(backend, body=b'[["%s"],["id"],{}]' % name.encode())
        with pytest.raises(ResultUnavailable, match="named in error_ttl"):
            function()
    assert "planted_module" not in sys.modules
    forge(backend, body=b'[["planted_module.Error","%s.Declined"],["id"],{}]' % __name__.encode())
    assert type(raised_by(function)) is Declined
    assert "planted_module" not in sys.modules
    assert function.runs == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"5",
        b"[]",
        b"{}",
        b"[[],[],{}]",
        b"[{},[],{}]",
        b'["",[],{}]',
        b"[null,null,null]",
        b"[[5],[],{}]",
        b"[[[]],[],{}]",
        b'[["builtins.Exception"],5,{}]',
        b'[["builtins.Exception"],[],5]',
        b'[["builtins.Exception"],[],[1]]',
        b'[["builtins.Exception"],[]]',
        b'[["builtins.Exception", 5],[],{}]',
        b'[["builtins.Exception"],"x",{}]',
        b'[["builtins.Exception"],{},{}]',
        b'[["builtins.Exception"],[],{"$":["d",[1,2]]}]',
        b'[["builtins.BlockingIOError"],[],{"characters_written":"x"}]',
        b'[["builtins.UnicodeDecodeError"],["x"],{}]',
        b'[["builtins.ExceptionGroup"],["x"],{}]',
        b"\xff",
        b"[" * 5000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_a_record_that_is_no_error_is_unavailable(body: bytes) -> None:
    backend = LocalBackend()
    function = failing(lambda: Declined("o1", code=1), backend=backend)
    raised_by(function)
    forge(backend, body=body)
    with pytest.raises(ResultUnavailable, match="recorded error cannot be rebuilt"):
        function()
    assert function.runs == 1


@pytest.mark.parametrize(
    "body", [b'[["builtins.Exception"],["x"],{"args": [1]}]', b'[["builtins.Exception"],["x"],{"__class__": 5}]']
)
def test_attributes_in_a_forged_record_change_nothing_but_the_instance(body: bytes) -> None:
    back = decode_error(body, (Exception,))
    assert (type(back), back.args) == (Exception, ("x",))


def test_an_error_whose_class_is_no_longer_named_is_unavailable() -> None:
    backend = LocalBackend()
    raised_by(failing(lambda: Declined("o1", code=1), error_ttl={Declined: 60}, backend=backend))
    for table in (None, {ValueError: 60}):
        after = failing(lambda: Declined("o1", code=1), error_ttl=table, backend=backend)
        with pytest.raises(ResultUnavailable, match="Declined"):
            after()
        assert after.runs == 0


def test_an_error_of_the_librarys_own_is_replayed_with_its_data() -> None:
    function = failing(lambda: InProgress("digest", retry_after=2.5), error_ttl={InProgress: 60})
    first, replay = raised_by(function), raised_by(function)
    assert told(first) == told(replay)
    assert (type(replay), replay.retry_after, replay.key_digest) == (InProgress, 2.5, "digest")  # type: ignore[attr-defined]
    assert function.runs == 1


@given(st.lists(LOOSE, max_size=4), st.dictionaries(st.sampled_from(["order", "code"]), LOOSE))
@settings(max_examples=100, deadline=None)
def test_plain_arguments_and_attributes_come_back_as_what_they_are(args: list[Any], attributes: dict[str, Any]) -> None:
    error = Money2(*args)
    error.__dict__.update(attributes)
    back = decode_error(encode_error(error), (Money2,))
    assert type(back) is Money2
    assert picture(back.args) == picture(tuple(args))
    assert picture(vars(back)) == picture(attributes)
