"""Schedules of the explorer, replayed against real servers: each command must be answered as the model answered it.

The explorer runs the shipped flows over a model in memory. What it makes of each schedule, every command with all its
arguments, commands that are sent twice, and the ends of leases, is recorded here and given to a real backend under a
record of its own. Tokens are compared by their order, times not at all: both are the server's own.
"""

import contextlib
import os
import random
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest import mock

import pytest
import redis
import sqlalchemy as sa
from colours import COLOURS, Colour
from differential import Commands
from servers import Server, start_redis

from idempotent import Backend, open_backend
from idempotent import _flow as flow
from idempotent import _machine as machine
from idempotent._options import split_url
from idempotent._record import ATTEMPT_BYTES, CALLS, LOCKS, Granted, RecordId, Row, State, describe, pack, unpack
from idempotent.backends._engines import twins
from idempotent.backends.sql import records_table
from idempotent.testing._world import Facts
from idempotent.testing.explorer import Caller, Model, _Limits, _Space, call, hold

RID = RecordId("explored", "k")


class Step(NamedTuple):
    """A command, what the model replied to it, and the instant in virtual microseconds."""

    name: str
    arguments: dict[str, Any]
    reply: Any
    now: int


@dataclass
class Schedule:
    """What one history asked of its store, and the row it left."""

    steps: list[Step] = field(default_factory=list)
    row: Row | None = None
    now: int = 0
    space: str = CALLS

    def key(self) -> str:
        return repr((self.space, [(step.name, step.arguments, step.now) for step in self.steps]))


class Recorder:
    """The functions of `idempotent._machine`, writing down what they are asked: rules for the explorer."""

    def __init__(self) -> None:
        self.schedule = Schedule()

    def _note(self, name: str, arguments: dict[str, Any], decision: Any, row: Row | None, now: int) -> Any:
        reply, changed = decision
        self.schedule.steps.append(Step(name, arguments, reply, now))
        self.schedule.row, self.schedule.now = changed or row, now
        return decision

    def on_claim(self, row: Row | None, ask: machine.Ask, now: int) -> Any:
        seconds = {"lease": ask.lease / 1e6, "keep": None if ask.keep is None else ask.keep / 1e6}
        return self._note("claim", ask._asdict() | seconds, machine.on_claim(row, ask, now), row, now)

    def on_renew(self, row: Row | None, attempt: bytes, token: int, lease: int, now: int) -> Any:
        arguments = {"attempt": attempt, "token": token, "lease": lease / 1e6}
        return self._note("renew", arguments, machine.on_renew(row, attempt, token, lease, now), row, now)

    def on_settle(self, row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> Any:
        assert settled.expires is not None
        outcome = {"codec": settled.codec, "body": settled.body, "ttl": (settled.expires - now) / 1e6}
        name = "complete" if settled.state is State.COMPLETED else "fail"
        if settled.lease:
            outcome["remember"] = settled.lease / 1e6
        arguments = {"attempt": attempt, "token": token, **outcome}
        return self._note(name, arguments, machine.on_settle(row, attempt, token, settled, now), row, now)

    def on_release(self, row: Row | None, attempt: bytes, token: int | None, now: int, *, unknown: bool = False) -> Any:
        arguments = {"attempt": attempt, "token": token, "unknown": unknown}
        decision = machine.on_release(row, attempt, token, now, unknown=unknown)
        return self._note("release", arguments, decision, row, now)

    def on_forget(self, row: Row | None, attempt: bytes, now: int, *, force: bool) -> Any:
        decision = machine.on_forget(row, attempt, now, force=force)
        found = None if decision[0] is None else describe(RID, decision[0], now)
        self._note("forget", {"attempt": attempt, "force": force}, (found, decision[1]), row, now)
        return decision

    def ask(self, name: str, arguments: dict[str, Any], row: Row | None, now: int) -> Any:
        """The same by a command's name, durations in microseconds."""
        if name == "claim":
            return self.on_claim(row, machine.Ask(**arguments), now)
        if name in ("complete", "fail"):
            state = State.COMPLETED if name == "complete" else State.FAILED
            attempt, token = arguments["attempt"], arguments["token"]
            outcome = Row(
                state, token, attempt, b"", now, 0, 0, now + 60_000_000, arguments["codec"], arguments["body"]
            )
            return self.on_settle(row, attempt, token, outcome, now)
        return getattr(self, f"on_{name}")(row, now=now, **arguments)


# ------------------------------------------------------------------------------------------------------------ scenarios

Command = tuple[str, dict[str, Any]]


async def renewing(caller: Caller) -> Any:
    async def body() -> Any:
        assert caller.run is not None
        await flow.renew(caller.driver, caller.run)
        return await caller.effect()

    return await call(caller, body)


async def failing(caller: Caller) -> Any:
    """The first run raises: a release, and another runs; or the error is recorded."""

    async def body() -> Any:
        value = await caller.effect()
        if value == 1:
            raise KeyError(value)
        return value

    return await call(caller, body, error_ttl={KeyError: 60.0} if caller.number == 0 else None)


async def cautious(caller: Caller) -> Any:
    """A dead runner leaves a record that is unknown, and one of the callers has other arguments."""
    return await call(caller, on_crash="raise", fingerprint=b"%d" % (caller.number // 2) * 16, wait=40.0)


async def too_late(caller: Caller) -> Any:
    """The second comes when the first one's result has expired, and the key is remembered."""
    await caller.pause(50.0 * caller.number)
    return await call(caller, ttl=10.0, remember=600.0)


async def locking(caller: Caller) -> Any:
    return await hold(caller, wait=40.0, renewals=caller.number)


def meddling(number: int) -> Generator[Command, Any, None]:
    """Commands that no flow sends in this order: other arguments, an operator, claims that are taken back."""
    attempt = b"caller%02d" % number
    ask: dict[str, Any] = {"attempt": attempt, "fingerprint": b"%d" % (number // 2) * 16, "lease": 30_000_000}
    reply = yield "claim", ask | {"keep": 600_000_000 if number else None, "takeover": number != 1}
    if not isinstance(reply, Granted):
        if number == 2:
            yield "forget", {"attempt": b"forgets.", "force": True}
        else:
            yield "release", {"attempt": attempt, "token": None, "unknown": False}
        over = getattr(reply, "token", None)
        rest = {"keep": None, "takeover": False, "over": over, "owner": "7@höst".encode()}
        reply = yield "claim", {**ask, "attempt": b"another%d" % number, **rest}
        attempt = b"another%d" % number
    if isinstance(reply, Granted):
        own: dict[str, Any] = {"attempt": attempt, "token": reply.token}
        yield "renew", own | {"lease": 60_000_000}
        if number == 1:
            yield "release", own | {"unknown": True}
        yield "fail", own | {"codec": "e", "body": b"\x00\xff'\\"}
        yield "complete", own | {"codec": "json", "body": b"{}" * 500}
        yield "release", own | {"unknown": False}
    yield "forget", {"attempt": b"forget%02d" % number, "force": number == 0}


def meddled(seed: int) -> Schedule:
    """Three who meddle, in an order that follows `seed`, with commands sent twice and leases that end."""
    dice, recorder = random.Random(seed), Recorder()
    row, now = None, 1_000_000
    callers = [meddling(number) for number in range(3)]
    waiting = {caller: next(caller) for caller in callers}
    while waiting:
        if row is not None and row.state is State.RUNNING and row.lease_until > now and dice.random() < 0.1:
            now = row.lease_until + 1
        caller = dice.choice([*waiting])
        command = waiting.pop(caller)
        for _ in range(dice.choice((1, 1, 1, 2))):
            reply, changed = recorder.ask(*command, row, now)
            row = changed or row
        with contextlib.suppress(StopIteration):
            if dice.random() < 0.95:  # else it dies
                waiting[caller] = caller.send(reply)
    return recorder.schedule


SCENARIOS: list[Any] = [call, renewing, failing, cautious, locking, too_late]
TIMES = {
    "goes on": 1,
    "does it and dies": 1,
    " (reply lost, sent again)": 2,
    " (applied, reply lost)": 1,
    " (lost on its way)": 0,
    "dies": 0,
    "time": 0,
}
"""How often a choice of the explorer's applies the command."""


class Explorer:
    """Random histories of the explorer's, one after the other; a scenario's space is worked out once for all of them."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._spaces = [_Space(scenario, machine, Model) for scenario in SCENARIOS]
        self._turn = 0

    def next(self) -> Schedule:
        self._turn += 1
        space, recorder = self._spaces[self._turn % len(SCENARIOS)], Recorder()
        recorder.schedule.space = LOCKS if SCENARIOS[self._turn % len(SCENARIOS)] is locking else CALLS
        state = space.start(_Limits(callers=3, crashes=1, expiries=2, lost_replies=2))
        while choices := list(space.choices(state)):
            choice = self._dice.choice(choices)
            facts: Facts = state[1].facts
            for _ in range(TIMES[choice.what]):
                assert choice.step is not None
                facts = choice.step.apply(facts, recorder).facts
            state = choice.state
        return recorder.schedule

    def close(self) -> None:
        for space in self._spaces:
            space.close()


def schedules(count: int, seed: int) -> list[Schedule]:
    """Different schedules that follow `seed`, `count` in all, one in five of them meddled with."""
    found: dict[str, Schedule] = {}
    turn = 5 * seed
    with contextlib.closing(Explorer(seed)) as explorer:
        while len(found) < count:
            schedule = explorer.next() if turn % 5 else meddled(turn)
            if schedule.steps:
                found.setdefault(schedule.key(), schedule)
            turn += 1
    return list(found.values())


# --------------------------------------------------------------------------------------------------------------- replay

Lapse = Callable[[RecordId, int], None]
"""Lets so many microseconds pass for a stored row, its token left as it is."""


def aged(row: Row, by: int) -> Row:
    expires = None if row.expires is None else row.expires - by
    return row._replace(since=row.since - by, lease_until=row.lease_until and row.lease_until - by, expires=expires)


@contextlib.contextmanager
def lapse_on(url: str) -> Iterator[Lapse]:
    if url.startswith("redis"):
        bare, options = split_url(url, ("prefix",))
        with redis.Redis.from_url(bare) as client:

            def lapse(rid: RecordId, by: int) -> None:
                name = f"{options.get('prefix', 'idem')}:{rid.text if rid.space == CALLS else f'{{{rid.text}}}'}"
                client.set(name, pack(aged(unpack(client.get(name)), by)), keepttl=True)

            yield lapse
        return
    bare, options = split_url(url, ("table",))
    table = records_table(sa.MetaData(), options.get("table", "idempotent_records"))
    engine = sa.create_engine(twins(bare)[0], isolation_level="AUTOCOMMIT")
    older = {c.name: c - sa.bindparam("by") for c in (table.c.since, table.c.lease_until, table.c.expires)}
    update = sa.update(table).where(table.c.id == sa.bindparam("rid")).values(older)
    with engine.connect() as connection:
        yield lambda rid, by: connection.execute(update, {"rid": rid.digest, "by": by})
    engine.dispose()


def disagreement(schedule: Schedule, commands: Commands, rid: RecordId, lapse: Lapse) -> str:
    """The first step that the backend answers otherwise than the model did; "" if there is none."""
    tokens: dict[int | None, int | None] = {None: None}
    now = schedule.steps[0].now
    urandom = os.urandom
    for number, step in enumerate(schedule.steps):
        if step.now != now:
            lapse(rid, step.now - now)
            now = step.now
        arguments = dict(step.arguments)
        for name in ("token", "over"):
            if name in arguments:
                arguments[name] = tokens[arguments[name]]
        with contextlib.ExitStack() as stack:
            if step.name == "forget":  # its id, which is the same when it is sent again
                mine = arguments.pop("attempt")
                pinned = mock.patch("os.urandom", lambda size: mine if size == ATTEMPT_BYTES else urandom(size))
                stack.enter_context(pinned)
            reply = getattr(commands, step.name)(rid, **arguments)
        if isinstance(step.reply, Granted) and step.reply.token not in tokens and isinstance(reply, Granted):
            # Model and server count apart, but in the same order.
            if any(token is not None and token >= reply.token for token in tokens.values()):
                return _told(schedule, number, f"a token that did not grow: {reply}")
            tokens[step.reply.token] = reply.token
        if _plain(reply, {}) != _plain(step.reply, tokens):
            return _told(schedule, number, f"replied {reply}")
    row = schedule.row
    left = None if row is None else describe(RID, row, schedule.now)
    if _plain(commands.read(rid), {}) != _plain(left, tokens):
        return _told(schedule, len(schedule.steps) - 1, f"left {commands.read(rid)}, not {left}")
    return ""


def _plain(reply: Any, tokens: dict[Any, Any]) -> Any:
    """`reply` without what depends on the time and on the record's name; the model's tokens as the server's."""
    if not isinstance(reply, tuple):
        return reply
    named: dict[str, Any] = {"": type(reply).__name__, **reply._asdict()}  # type: ignore[attr-defined]
    for name in ("lease_left", "expires_in"):
        if named.get(name) is not None:
            named[name] = named[name] > 0
    for name in ("age", "namespace", "key"):
        named.pop(name, None)
    if "token" in named:
        named["token"] = tokens.get(named["token"], named["token"])
    return named


def _told(schedule: Schedule, number: int, what: str) -> str:
    lines = [f"{at}: {name} {arguments} -> {reply}" for name, arguments, reply, at in schedule.steps[: number + 1]]
    return "\n".join([*lines, what])


def conforms(url: str, colour: Colour, count: int, seed: int) -> float:
    """Replay `count` schedules; how many a second."""
    backend: Backend
    chosen = schedules(count, seed)
    with open_backend(url) as backend, Commands(backend, colour) as commands, lapse_on(url) as lapse:
        commands.read(RID)
        began = time.monotonic()
        for number, schedule in enumerate(chosen):
            wrong = disagreement(schedule, commands, RecordId("conforms", f"{seed}.{number}", schedule.space), lapse)
            assert wrong == "", wrong
        return count / (time.monotonic() - began)


def test_the_schedules_meet_every_command_and_every_reply() -> None:
    seen = {
        (step.name, getattr(step.reply, "value", type(step.reply).__name__))
        for schedule in schedules(400, seed=1)
        for step in schedule.steps
    }
    owners = {
        (name, answer) for name in ("renew", "complete", "fail", "release") for answer in ("done", "stale", "gone")
    }
    claims = {("claim", kind) for kind in ("Granted", "Busy", "Settled", "Unknown", "Mismatched")}
    assert claims | {("forget", "Record"), ("forget", "NoneType")} | owners <= seen


COUNTS = {"redis": 500, "sqlite": 200, "postgres": 250, "mariadb": 200}


@pytest.mark.parametrize("shared_backend_url", COUNTS, indirect=True)
@pytest.mark.parametrize("colour", COLOURS, ids=repr)
def test_a_server_answers_the_explorers_schedules_as_the_model_does(
    shared_backend_url: str, colour: Colour, request: pytest.FixtureRequest
) -> None:
    kind = request.node.callspec.params["shared_backend_url"]
    conforms(shared_backend_url, colour, COUNTS[kind], seed=1 + colour.is_async)


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    with start_redis(prefers="valkey") as server:
        yield server


def test_valkey_answers_the_explorers_schedules_as_the_model_does(valkey: Server) -> None:
    with redis.Redis.from_url(valkey.url) as client:
        assert "valkey_version" in client.info("server")
    conforms(f"{valkey.url}?prefix=conforms", COLOURS[0], COUNTS["redis"], seed=3)


@pytest.mark.soak
@pytest.mark.parametrize("shared_backend_url", COUNTS, indirect=True)
def test_a_server_answers_thousands_of_schedules_as_the_model_does(
    shared_backend_url: str, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    rate = conforms(shared_backend_url, COLOURS[0], count=10_000, seed=time.time_ns() % 10**6)
    with capsys.disabled():
        print(f"\n{request.node.callspec.params['shared_backend_url']}: {rate:,.0f} schedules/s")


@pytest.mark.parametrize("lost", ["fingerprint", "attempt", "token"])
def test_a_backend_that_forgets_part_of_a_row_is_convicted(lost: str) -> None:
    """The replay can fail: a store that loses one field of a row answers some schedule otherwise."""

    class Forgetful(Recorder):
        """The model of a store that keeps a row without one of its fields."""

        def _note(self, name: str, arguments: dict[str, Any], decision: Any, row: Row | None, now: int) -> Any:
            reply, changed = super()._note(name, arguments, decision, row, now)
            blank = {"fingerprint": b"", "attempt": b"somebody", "token": 1}[lost]
            return reply, None if changed is None else changed._replace(**{lost: blank})

    for turn in range(100):
        with mock.patch(f"{__name__}.Recorder", Forgetful):
            schedule = meddled(turn)
        with open_backend("local://") as backend, Commands(backend, COLOURS[0]) as commands:
            with contextlib.suppress(KeyError):
                if disagreement(schedule, commands, RecordId("forgetful", str(turn)), lambda rid, by: None):
                    return
    pytest.fail("no schedule tells")
