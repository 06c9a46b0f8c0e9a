"""The suite that every backend passes: a subclass of BackendContract is a test class for pytest.

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self, tmp_path):
            return MyBackend(tmp_path)

Each test runs as a sync and as an async caller. The promises are those of `idempotent.backends.base` and of the tables
in `idempotent._machine`, seen through the commands alone; a failure begins with the one that was broken.
"""
# ruff: noqa: D102  a test's name is its sentence

import asyncio
import functools
import os
import random
import secrets
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, Self, TypeVar

import pytest

from idempotent import _machine as machine
from idempotent._drive import drive
from idempotent._record import (
    ATTEMPT_BYTES,
    LOCKS,
    OWNER_BYTES,
    Answer,
    Busy,
    Expired,
    Granted,
    Record,
    RecordId,
    Row,
    Settled,
    State,
    describe,
    standing,
)
from idempotent.backends.base import Backend, micros
from idempotent.errors import BackendUnavailable

__all__ = ["BackendContract"]

Colour = Literal["sync", "async"]
R = TypeVar("R")

LONG = 60.0
"""Seconds: a lease, or a retention, that no test outlives."""
SLACK = 0.02
"""Seconds by which a duration may differ: stores round, and clocks do not run at one speed."""
DURATIONS = ("age", "lease_left", "expires_in")
"""What of a reply depends on when it was given."""
ARGUMENTS, OTHERS = b"f" * 16, b"g" * 16
"""Fingerprints."""
OWNER = ("7@h\u00f6st " + "x" * (OWNER_BYTES - 8)).encode()
BODIES = [b'"done"', b"", b" \n\0", bytes(range(256)), "'é\\\"%s\N{GRINNING FACE}".encode()]
SETTLES: dict[str, Any] = {"codec": "json", "body": BODIES[0], "ttl": LONG}
COMMANDS: dict[str, dict[str, Any]] = {
    "claim": {"fingerprint": ARGUMENTS, "lease": LONG, "keep": None, "takeover": False, "over": None, "owner": b""},
    "renew": {"lease": LONG},
    "complete": SETTLES,
    "fail": SETTLES,
    "release": {"unknown": False},
    "forget": {"force": False},
    "read": {},
}
"""What each command brings unless it is said otherwise; the owner's bring attempt and token too."""


def promised(holds: object, promise: str, *seen: object) -> None:
    """Fail, in words, unless it holds; `seen` is what led there."""
    __tracebackhide__ = True
    if not holds:
        raise AssertionError("\n  ".join([f"broken promise: {promise}", *(str(each)[:300] for each in seen)]))


def driven(test: Callable[[Any, "Store"], Coroutine[Any, Any, None]]) -> Callable[[Any, "Store"], None]:
    """A test that is one `async def` for both colours, as pytest can call it."""

    @functools.wraps(test)
    def run(self: Any, store: "Store") -> None:
        __tracebackhide__ = True
        store.run(test(self, store))

    return run


class Store:
    """A backend as one caller has it, sync or async, and records that no other test has."""

    def __init__(
        self, backend: Backend, colour: Colour, short: float = 0.05, pass_time: Callable[[float], None] | None = None
    ) -> None:
        self.backend = backend
        self.is_async = colour == "async"
        self.view = backend.asynchronous() if self.is_async else backend.blocking()
        self.short = short
        self.namespace = f"contract-{secrets.token_hex(6)}"
        self._pass_time = pass_time
        self._passed = 0.0
        self._runner = asyncio.Runner() if self.is_async else None

    def __enter__(self) -> Self:
        self.run(self.view.read(self.rid()))  # connected, and its table made, before a short lease begins
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner is not None:
            self._runner.run(self.view.aclose())
            self._runner.close()
        self.backend.close()

    def run(self, steps: Coroutine[Any, Any, R]) -> R:
        """Take steps as this caller does: those of a sync one never suspend."""
        return drive(steps) if self._runner is None else self._runner.run(steps)

    async def at_once(self, *steps: Coroutine[Any, Any, Any]) -> list[Any]:
        """Take each of the steps in a thread or task of its own; what they return."""
        if self.is_async:
            return await asyncio.gather(*steps)
        start = threading.Barrier(len(steps))

        def work(one: Coroutine[Any, Any, Any]) -> Any:
            start.wait()
            return drive(one)

        with ThreadPoolExecutor(len(steps)) as pool:
            return list(pool.map(work, steps))

    def pass_time(self, seconds: float) -> None:
        """Let the store's time pass."""
        self._passed += seconds
        (self._pass_time or time.sleep)(seconds)

    def lapse(self) -> None:
        """Let the short leases and retentions begun so far end."""
        self.pass_time(self.short + 0.01)

    def now(self) -> float:
        """Seconds, of which as many pass as for the store."""
        return time.monotonic() if self._pass_time is None else self._passed

    def rid(self, key: str | None = None, *, namespace: str = "", space: str = "c") -> RecordId:
        return RecordId(self.namespace + namespace, secrets.token_hex(4) if key is None else key, space)

    async def left(self, state: str, rid: RecordId | None = None) -> "History":
        """A record that is left so by its first owner, whose history this is.

        "lapsed" (its lease is over), "expired" (its ttl), "remembered" (likewise, and its key is remembered), "outlived"
        (that is over, too) and "dropped" (its keep) come true at the next `lapse`.
        """
        one = History(self, rid or self.rid())
        lapses = {"lapsed": {"lease": self.short}, "dropped": {"lease": self.short, "keep": 0.001}}
        spans: dict[str, dict[str, float]] = {
            "expired": {"ttl": self.short},
            "remembered": {"ttl": self.short, "remember": LONG},
            "outlived": {"ttl": self.short / 2, "remember": self.short / 2},
        }
        ends = {"completed": "complete", "failed": "fail", "released": "release", **dict.fromkeys(spans, "complete")}
        if state != "absent":
            await one.send("a first claim", "claim", owner=OWNER, **lapses.get(state, {}))
        if state in ends:
            await one.send(ends[state], ends[state], **spans.get(state, {}))
        elif state == "forgotten":
            await one.send("forget", "forget", force=True)
        elif state in ("unknown", "overtaken", "replaced"):
            await one.send("release to unknown", "release", unknown=True)
        if state in ("overtaken", "replaced"):
            after = one.by(os.urandom(ATTEMPT_BYTES))
            await after.send("a claim over a dead run", "claim", over=one.token)
            if state == "replaced":
                await after.send("a release by the successor", "release")
        return one


class Told:
    """What is known of a record: its row, twice, and what was answered on the way there.

    Nothing but replies, and when they came, tells of the store. So the row is kept as it is if each command was
    applied as soon as it can have been, and as late.
    """

    def __init__(self) -> None:
        self.soon: Row | None = None
        self.late: Row | None = None
        self.highest = 0
        self.answers: list[str] = []
        self.doubt = False
        """Something ended, or a reply was lost, so that more than one row is possible: nothing is checked any more."""


class History:
    """Commands of one attempt on one record, each checked against what `_machine` says to it."""

    def __init__(self, store: Store, rid: RecordId, attempt: bytes = b"", told: Told | None = None) -> None:
        self.store, self.rid = store, rid
        self.attempt = attempt or os.urandom(ATTEMPT_BYTES)
        self.token = 1
        """That of this attempt's last grant."""
        self.told = told or Told()

    def by(self, attempt: bytes = b"") -> "History":
        """The same record as another attempt has it."""
        return History(self.store, self.rid, attempt, self.told)

    async def ask(self, name: str, **changes: Any) -> Any:
        """Send a command, and check nothing."""
        return await self._ask(name, self._options(name, changes))

    async def send(self, says: str, name: str, **changes: Any) -> Any:
        """Send a command, and check its reply: `says` is its name in words."""
        __tracebackhide__ = True
        told, options = self.told, self._options(name, changes)
        answer = functools.partial(_answer, self.rid, name, options, os.urandom(ATTEMPT_BYTES))
        begun = micros(self.store.now())
        reply = await self._ask(name, options)
        ended = micros(self.store.now())
        (least, _), (most, _) = answer(told.late, begun), answer(told.soon, ended)
        (_, soon), (_, late) = answer(told.soon, begun), answer(told.late, ended)
        says = f"{says}, where the record is {_state(told.late, begun)}, is answered"
        if isinstance(reply, Granted) and isinstance(least, Granted) and soon and late and not told.doubt:
            promised(reply.token > told.highest, "tokens only grow", *told.answers, f"{says}: {reply}")
            told.highest = reply.token
            soon, late = soon._replace(token=reply.token), late._replace(token=reply.token)
            least, most = (each._replace(token=reply.token) for each in (least, most))
        elif name == "release" and soon and told.late and standing(told.late, begun) is None:
            told.doubt = True  # what is left of it depends on whether the store had dropped it
        told.doubt |= bare(least) != bare(most)
        if told.doubt:
            return reply
        wrong = _wrong(reply, least, most)
        promised(not wrong, f"{says}: {wrong}", *told.answers)
        told.answers.append(f"{says}: {reply}")
        told.soon, told.late = soon or told.soon, late or told.late
        return reply

    def _options(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        own = {"read": (), "forget": (), "claim": ("attempt",)}.get(name, ("attempt", "token"))
        return {**COMMANDS[name], **{each: getattr(self, each) for each in own}, **changes}

    async def _ask(self, name: str, options: dict[str, Any]) -> Any:
        for tries in range(20, 0, -1):
            try:
                reply = await getattr(self.store.view, name)(self.rid, **options)
            except BackendUnavailable:  # a short lease is its command's deadline; sent again, the command knows itself
                self.told.doubt = True
                if tries == 1:
                    raise
            else:
                if isinstance(reply, Granted):
                    self.token = reply.token
                return reply
        return None


def _answer(
    rid: RecordId, name: str, options: dict[str, Any], own: bytes, row: Row | None, now: int
) -> tuple[Any, Row | None]:
    """What the machine answers at `now`, and the row it stores; None: none."""
    if name == "claim":
        keep = options["keep"] and micros(options["keep"])
        return machine.on_claim(row, machine.Ask(**{**options, "lease": micros(options["lease"]), "keep": keep}), now)
    if name == "renew":
        return machine.on_renew(row, options["attempt"], options["token"], micros(options["lease"]), now)
    if name in ("complete", "fail"):
        state = State.COMPLETED if name == "complete" else State.FAILED
        attempt, token, expires = options["attempt"], options["token"], now + micros(options["ttl"])
        past = micros(options["remember"]) if options.get("remember") else 0
        settled = Row(state, token, attempt, b"", now, past, 0, expires, options["codec"], options["body"])
        return machine.on_settle(row, attempt, token, settled, now)
    if name == "release":
        return machine.on_release(row, options["attempt"], options["token"], now, unknown=options["unknown"])
    found, changed = machine.on_forget(row, own, now, **options) if name == "forget" else (row, None)
    return found and describe(rid, found, now), changed


def _state(row: Row | None, now: int) -> str:
    if row is None:
        return "absent"
    row = standing(row, now)
    if row is None:
        return "past its retention"
    if row.state is State.WITHDRAWN:
        return "released or forgotten"
    lapsed = row.state is State.RUNNING and row.lease_until <= now
    return row.state.name.lower() + (" with its lease over" if lapsed else "")


def bare(reply: Any) -> Any:
    """A reply by type and fields, without its durations, which are never twice the same."""
    if not isinstance(reply, tuple):
        return reply
    fields: dict[str, Any] = getattr(reply, "_asdict")()  # noqa: B009  any of the replies
    return type(reply), *(
        None if name in DURATIONS and value is not None else (value,) for name, value in fields.items()
    )


def _wrong(reply: Any, least: Any, most: Any) -> str:
    """In words, what of a reply does not lie between two answers; "" if nothing."""
    if type(reply) is not type(least):
        return f"{least}, and not {reply}"
    if not isinstance(reply, tuple):
        return "" if reply == least else f"{least}, and not {reply}"
    for name in getattr(reply, "_fields"):  # noqa: B009  any of the replies
        got, low, high = (getattr(each, name) for each in (reply, least, most))
        if name in DURATIONS and None not in (got, low, high):
            fits = min(low, high) - SLACK <= got <= max(low, high) + SLACK
        else:
            fits = got == low
        if not fits:
            return f"{type(reply).__name__} with {name} {low!r}, and not {got!r}"
    return ""


Case = tuple[str, str, bool, dict[str, Any]]
"""A command in words; its name; whether another than the record's owner sends it; and what it brings besides.

A token, or `over`, is told by how much it is higher than the owner's.
"""
STATES = (
    *("absent", "running", "lapsed", "dropped", "unknown", "completed", "failed", "expired"),
    *("released", "forgotten", "overtaken", "replaced", "remembered", "outlived"),
)
CLAIMS: list[Case] = [
    ("the owner's claim, sent late", "claim", False, {}),
    ("another's claim", "claim", True, {}),
    ("another's claim with takeover", "claim", True, {"takeover": True}),
    ("another's claim over the token found", "claim", True, {"over": 0}),
    ("another's claim over a token not found", "claim", True, {"over": 1}),
    ("a claim with another fingerprint", "claim", True, {"takeover": True, "fingerprint": OTHERS}),
    ("a claim without a fingerprint", "claim", True, {"takeover": True, "fingerprint": b""}),
]
OWNERS: list[Case] = [
    (f"{says} {by}", name, by == "by another attempt", {**changes, **token})
    for says, name, changes in (
        ("a renewal", "renew", {}),
        ("a completion", "complete", {}),
        ("a failure", "fail", {}),
        ("a release", "release", {}),
        ("a release to unknown", "release", {"unknown": True}),
    )
    for by, token in (("by the owner", {}), ("by another attempt", {"token": 0}), ("with a lower token", {"token": -1}))
]
ENDS: list[Case] = [
    ("the withdrawal of the owner's claim", "release", False, {"token": None}),
    ("the withdrawal of another's claim", "release", True, {"token": None}),
    ("a forget", "forget", False, {"force": False}),
    ("a forget by force", "forget", False, {"force": True}),
]
ALIKE = [
    *("key", "KEY", "Key", "k\u00e9y", "ke\u0301y", "key ", " key", "key  ", "key.", "k ey", "key\\", "key/", "key%"),
    *("ke_", "key*", "k?y", "[k]ey", "'key'", '"key"', "`key`", "key:1", "1:key", "\u00df", "ss", "\ufb01", "fi"),
    *("\u0130", "i", "\u0131", "\u043a\u043b\u044e\u0447", "\u9375", "\U0001f511", "\U0001f5dd"),
    *("A" * 1024, "a" * 1024, "a" * 1023, "a" * 1023 + "b", "\u00e9" * 1024, "\U0001f511" * 1024),
]


class BackendContract:
    """What a backend must do, as tests. A subclass has a fixture `backend` that gives each test a backend of its own.

    The store behind them may be shared, as keys are random. Each backend is closed after its test.
    """

    colours: ClassVar[tuple[Colour, ...]] = ("sync", "async")
    """The callers it serves."""
    short: ClassVar[float] = 0.05
    """Seconds: a lease that the tests let end. Longer for a store whose commands take longer."""
    patience: ClassVar[float] = 3.0
    """Seconds: a wait that comes near it has missed the end it waited for."""
    histories: ClassVar[int] = 3
    """So many random histories are played."""

    def pass_time(self, backend: Any, seconds: float) -> None:
        """Let the store's time pass. Overridden only where its clock stands still otherwise."""
        time.sleep(seconds)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each test once for each colour."""
        if "colour" in metafunc.fixturenames:
            metafunc.parametrize("colour", self.colours)

    @pytest.fixture
    def store(self, backend: Backend, colour: Colour) -> Iterator[Store]:
        """The backend as a caller of one colour has it."""
        stands = type(self).pass_time is not BackendContract.pass_time
        pass_time = functools.partial(self.pass_time, backend) if stands else None
        with Store(backend, colour, self.short, pass_time) as store:
            yield store

    @driven
    async def test_claims_are_answered_by_what_they_find(self, store: Store) -> None:
        await self._in_every_state(store, CLAIMS)

    @driven
    async def test_owners_change_their_own_record_alone(self, store: Store) -> None:
        await self._in_every_state(store, OWNERS)

    @driven
    async def test_what_is_taken_back_or_forgotten_is_gone(self, store: Store) -> None:
        await self._in_every_state(store, ENDS)

    async def _in_every_state(self, store: Store, cases: list[Case]) -> None:
        found = [(await store.left(state), case) for state in STATES for case in cases]
        store.lapse()
        for owner, (says, name, other, changes) in found:
            sender = owner.by() if other else owner
            above = {key: owner.token + changes[key] for key in ("token", "over") if changes.get(key) is not None}
            brings = {**changes, **above}
            await sender.send(says, name, **brings)
            await sender.send(f"{says}, sent again", name, **brings)
            await sender.send(f"a read after {says}", "read")
            await sender.send(f"its sender's claim after {says}", "claim")
            await owner.by().send(f"a third attempt's claim after {says}", "claim")
        checked = sum(not owner.told.doubt for owner, _ in found)
        promised(
            checked > len(found) / 2, f"commands end within {self.short} s; if the store needs longer, raise `short`"
        )

    @driven
    async def test_an_outcome_stays_byte_for_byte(self, store: Store) -> None:
        outcomes = [("complete", "json1", body) for body in [*BODIES, random.Random(1).randbytes(1 << 20)]]
        for name, codec, body in [*outcomes, ("fail", "", b"1"), ("fail", "\u03bb" + "x" * 28, b"1")]:
            one = await store.left("running")
            await one.send(f"an outcome of {len(body)} bytes", name, body=body, codec=codec)
            await one.send("another outcome", "complete", body=b"2", codec="other")
            await one.send("a read after two outcomes", "read")
            await one.by().send("a claim after two outcomes", "claim")

    @driven
    async def test_durations_are_seconds_from_the_command_on(self, store: Store) -> None:
        one = History(store, store.rid())
        await one.send("a first claim", "claim", lease=50.0, keep=20.0)
        for name, changes in (("renew", {"lease": 30.0}), ("renew", {"lease": 70.0}), ("complete", {"ttl": 40.0})):
            store.pass_time(2 * SLACK)
            await one.send("a read after some time", "read")
            await one.by().send("a claim after some time", "claim")
            await one.send(name, name, **changes)
            await one.send(f"a read at once after {name}", "read")
            await one.by().send(f"a claim at once after {name}", "claim")

    @driven
    async def test_nothing_ends_before_its_time(self, store: Store) -> None:
        for state in ("lapsed", "expired", "remembered", "outlived", "dropped"):
            begun = store.now()
            one = await store.left(state)
            ask = {"name": "read"} if state == "dropped" else {"name": "claim", "takeover": True}
            ended = Expired if state == "remembered" else Granted
            while not isinstance(await one.by().ask(**ask), ended | None):
                promised(store.now() < begun + 5, f"a record is {state} when its time is over")
                store.pass_time(self.short / 25)
            took = store.now() - begun
            promised(took >= self.short, f"a record is not {state} before its time is over", f"but after {took} s")

    @driven
    async def test_a_wait_misses_no_end_of_the_run(self, store: Store) -> None:
        ends: dict[str, dict[str, Any]] = {"complete": {}, "fail": {}, "release": {}, "forget": {"force": True}}
        for name, changes in [*ends.items(), ("release", {"unknown": True})]:
            for delay in (0.0, 0.0005, 0.003):
                one, begun = await store.left("running"), time.monotonic()
                waits = [store.view.changed(one.rid, token=one.token, timeout=self.patience) for _ in range(2)]
                await store.at_once(*waits, self._end(one, delay, name, changes))
                says = f"changed() hears of {name}, {delay * 1000} ms after it began to wait"
                promised(time.monotonic() - begun < 0.9 * self.patience, says)

    async def _end(self, one: History, delay: float, name: str, changes: dict[str, Any]) -> None:
        if one.store.is_async:
            await asyncio.sleep(delay)
        else:
            time.sleep(delay)
        await one.send(name, name, **changes)

    @driven
    async def test_a_wait_is_short_where_nothing_runs_and_else_as_long_as_asked(self, store: Store) -> None:
        for state, more, timeout in (
            *(("absent", 0, self.patience), ("released", 0, self.patience), ("unknown", 0, self.patience)),
            *(("completed", 0, self.patience), ("running", -1, self.patience), ("running", 0, 0.05)),
        ):
            one, begun = await store.left(state), time.monotonic()
            await store.view.changed(one.rid, token=one.token + more, timeout=timeout)
            says = f"changed() for {timeout} s and a token {more} off returns in time, where the record is {state}"
            promised(time.monotonic() - begun < 0.9 * self.patience, says)
            await one.send("a read after a wait", "read")

    @driven
    async def test_a_scan_shows_every_call_once(self, store: Store) -> None:
        cases = [(state, (await store.left(state)).rid.key) for state in (*STATES, "running", "completed")]
        elsewhere = (await store.left("completed", store.rid(namespace="2"))).rid.key
        await store.left("running", store.rid(space=LOCKS))
        store.lapse()
        shown = {"lapsed": "running", "overtaken": "running", "remembered": "expired"}
        gone = ("absent", "dropped", "expired", "outlived", "released", "forgotten", "replaced")
        there = sorted((key, shown.get(state, state)) for state, key in cases if state not in gone)
        seen = [(each.key, each.state) for each in await self._scan(store, namespace=store.namespace)]
        promised(sorted(seen) == there, "a scan of a namespace shows its calls, each once, no others", seen, there)
        names: Any = ("running", "completed", "failed", "unknown", "expired")
        for name in names:
            seen = [(each.key, each.state) for each in await self._scan(store, namespace=store.namespace, state=name)]
            wanted = [each for each in there if each[1] == name]
            promised(sorted(seen) == wanted, f"a scan for {name} records shows these and no others", seen, wanted)
        everywhere = [each.key for each in await self._scan(store) if each.namespace.startswith(store.namespace)]
        promised(sorted(everywhere) == sorted([elsewhere, *(key for key, _ in there)]), "a scan shows all namespaces")

    async def _scan(self, store: Store, **filters: Any) -> list[Record]:
        return [record async for record in store.view.scan(**filters)]

    @driven
    async def test_a_purge_drops_what_is_past_its_retention_and_nothing_else(self, store: Store) -> None:
        found = [await store.left(state) for state in (*STATES, "expired", "expired", "remembered")]
        store.lapse()
        count = await store.view.purge(1)
        promised(count in (0, 1), "a purge drops no more records than its limit", count)
        await store.view.purge()
        for one in found:
            await one.send("a read after a purge", "read")
            await one.by().send("a claim after a purge", "claim")

    @driven
    async def test_keys_that_look_alike_are_apart(self, store: Store) -> None:
        rids = [store.rid(key) for key in ALIKE]
        rids += [store.rid("1:key", namespace=":"), store.rid("key", namespace=":1"), store.rid("key", space=LOCKS)]
        rids += [store.rid("key", namespace=name) for name in ("N", "n", "n ", "\u00e9", "%", "*")]
        found = [await store.left("running", rid) for rid in rids]
        for one in found:
            await one.send(f"a read of {one.rid.key[-40:]!r}", "read")

    @driven
    async def test_of_many_claims_at_once_one_is_granted(self, store: Store) -> None:
        states = ("absent", "absent", "released", "lapsed", "lapsed", "unknown", "expired")
        found = [(state, await store.left(state)) for state in states]
        store.lapse()
        for state, one in found:
            replies = await store.at_once(*(one.by().ask("claim", over=one.token) for _ in range(12)))
            tokens = [reply.token for reply in replies if isinstance(reply, Granted)]
            promised(len(tokens) == 1, f"of many claims at once, where the record is {state}, one is granted", replies)
            others = {bare(reply) for reply in replies if not isinstance(reply, Granted)}
            promised(others == {bare(Busy(tokens[0], 0.0))}, "who is not granted is told who runs", others)
        replies = await store.at_once(*(one.ask("claim") for one in [History(store, store.rid())] * 6))
        promised(len({bare(reply) for reply in replies}) == 1, "a claim sent six times at once is one claim", replies)

    @driven
    async def test_of_a_late_completion_and_a_takeover_one_wins(self, store: Store) -> None:
        found = [await store.left("lapsed") for _ in range(8)]
        store.lapse()
        for one in found:
            answer, reply = await store.at_once(one.ask("complete"), one.by().ask("claim", takeover=True))
            won = (answer, type(reply)) in ((Answer.DONE, Settled), (Answer.STALE, Granted))
            promised(won, "of a late completion and a takeover at once one wins, and the other is told", answer, reply)

    @driven
    async def test_all_views_have_the_same_records(self, store: Store) -> None:
        one = await store.left("running")
        record = await store.view.within(1.0).read(one.rid)
        promised(record is not None, "within() gives a view of the same records")
        if not store.is_async or "sync" not in self.colours:
            return
        blocking, begun = store.backend.blocking(), time.monotonic()
        record = await asyncio.to_thread(drive, blocking.read(one.rid))
        promised(record is not None and record.token == one.token, "both colours see the same records", record)
        settle = blocking.complete(one.rid, attempt=one.attempt, token=one.token, **SETTLES)
        wait = store.view.changed(one.rid, token=one.token, timeout=self.patience)
        await asyncio.gather(wait, asyncio.to_thread(drive, settle))
        promised(
            time.monotonic() - begun < 0.9 * self.patience,
            "an async caller's changed() hears of what a sync one completes",
        )
        reply = await one.by().ask("claim")
        promised(isinstance(reply, Settled), "what a sync caller completes, an async caller finds", reply)

    @driven
    async def test_closing_twice_does_no_harm(self, store: Store) -> None:
        await store.left("running")
        for _ in range(2):
            if store.is_async:
                await store.view.aclose()
            store.backend.close()

    @driven
    async def test_random_histories_are_answered_as_the_table_says(self, store: Store) -> None:
        for seed in range(self.histories):
            await self._history(store, random.Random(seed))

    async def _history(self, store: Store, dice: random.Random) -> None:
        first = History(store, store.rid())
        attempts, told, short = [first, first.by(), first.by()], first.told, self.short
        for _ in range(40):
            row, before = told.late, told.soon
            owners = [each for each in attempts if row is not None and each.attempt == row.attempt]
            one = dice.choice(owners * 6 + attempts)
            name = dice.choices([*COMMANDS], [12, 4, 2, 1, 4, 2, 2])[0]
            choices: dict[str, dict[str, list[Any]]] = {
                "claim": {
                    "fingerprint": [ARGUMENTS, ARGUMENTS, OTHERS, b""],
                    "lease": [LONG, LONG, short],
                    "keep": [None, LONG],
                    "takeover": [False, False, True],
                    "over": [None, None, one.token, row.token if row else 1],
                    "owner": [b"", OWNER],
                },
                "renew": {"lease": [LONG, 2 * LONG, short]},
                "complete": {"body": BODIES, "ttl": [LONG, LONG, short], "remember": [0.0, 0.0, LONG]},
                "fail": {"body": BODIES, "ttl": [LONG, short]},
                "release": {"token": [one.token, one.token, None], "unknown": [False, True]},
                "forget": {"force": [False, True]},
            }
            options = {key: dice.choice(values) for key, values in choices.get(name, {}).items()}
            await one.send(f"a random {name}", name, **options)
            if told.soon is not before and short in (options.get("lease"), options.get("ttl")):
                store.lapse()
