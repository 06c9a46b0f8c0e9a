"""The world of an exploration: an immutable state of the store, and the steps that callers ask to take in it.

A World never changes; a step applied to it gives another. Worlds that are equal are one object, so that what was worked
out once for a world is found again by its identity.
"""

import types
import weakref
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any, NamedTuple

from idempotent import _machine as machine
from idempotent._near import UNHEARD
from idempotent._record import (
    SETTLED,
    Answer,
    Busy,
    Claim,
    Expired,
    Granted,
    Mismatched,
    Record,
    RecordId,
    Row,
    Settled,
    State,
    StateName,
    Unknown,
    describe,
    standing,
)
from idempotent.backends.base import Backend, Copies, Finder, Heed, micros
from idempotent.backends.local import _Store

__all__ = [
    "SETTLED",
    "START",
    "Applied",
    "Facts",
    "InMemory",
    "Model",
    "Seen",
    "Step",
    "Telling",
    "World",
    "Worlds",
    "hand_over",
]

START = 1_000_000
"""Virtual microseconds at which each history begins."""


class Facts(NamedTuple):
    """What a world is made of."""

    rows: tuple[tuple[str, Row], ...] = ()
    """The records by `RecordId.text`."""
    values: tuple[tuple[str, Any], ...] = ()
    """What scenarios without our protocol keep."""
    now: int = START
    """Virtual microseconds."""
    effects: int = 0
    newest: tuple[int, bytes] = (0, b"")
    """Token and attempt of the claim that was granted last."""
    releases: int = 0
    expiries: int = 0
    """Leases that ran out."""
    inside: tuple[tuple[int, int], ...] = ()
    """Who is in a critical section, and until when nobody else may be."""
    forgotten: tuple[tuple[int, int], ...] = ()
    """Token and time of each recorded outcome that was forgotten."""

    def row(self, text: str) -> Row | None:
        """The record of that id."""
        for name, row in self.rows:
            if name == text:
                return row
        return None

    def with_row(self, text: str, row: Row) -> "Facts":
        """The same with another record."""
        others = [pair for pair in self.rows if pair[0] != text]
        return self._replace(rows=tuple(sorted([*others, (text, row)], key=_name)))

    def with_value(self, key: str, value: Any) -> "Facts":
        """The same with another plain value."""
        others = [pair for pair in self.values if pair[0] != key]
        return self._replace(values=tuple(sorted([*others, (key, value)], key=_name)))

    def without_value(self, key: str) -> "Facts":
        """The same without a plain value."""
        return self._replace(values=tuple(pair for pair in self.values if pair[0] != key))


def _name(pair: tuple[str, Any]) -> str:
    return pair[0]


class World:
    """One state of the world; compared and hashed by identity."""

    __slots__ = ("expired", "facts")

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.expired: World | None = None
        """The world after its running lease ended, once that is worked out."""


class Worlds:
    """Every world of an exploration, each once."""

    def __init__(self) -> None:
        self._known: dict[Any, World] = {}

    def of(self, facts: Facts) -> World:
        """The world with these facts."""
        rows = tuple((text, row.state.value, *row[1:]) for text, row in facts.rows)
        key = (rows, repr(facts.values) if facts.values else "", *facts[2:])
        world = self._known.get(key)
        if world is None:
            world = self._known[key] = World(facts)
        return world


class Applied(NamedTuple):
    """What a step came to."""

    reply: Any
    facts: Facts
    promise: str = ""
    """The promise that it broke, in words."""


class Step:
    """What a caller is about to do, handed to the explorer."""

    __slots__ = ("apply", "deadline", "is_effect", "label", "ready")

    def __init__(
        self,
        label: str,
        apply: Callable[[Facts, Any], Applied],
        *,
        ready: Callable[[Facts], bool] | None = None,
        deadline: int | None = None,
        is_effect: bool = False,
    ) -> None:
        self.label = label
        self.apply = apply
        """The step in a world, under the rules of the store. Pure."""
        self.ready = ready
        """Whether it can go on by now; None: at any time, and it can be sent twice."""
        self.deadline = deadline
        """Virtual microseconds at which it goes on in any case."""
        self.is_effect = is_effect


@types.coroutine
def hand_over(step: Step) -> Generator[Step, Any, Any]:
    """Let the explorer take `step`, and return its reply."""
    return (yield step)


def _observed(facts: Facts, text: str, row: Row | None, reply: Any, *, forgets: bool) -> Applied:
    """The facts after a command stored `row` (None: it changed nothing), and the promise that it broke."""
    promise = ""
    was = standing(facts.row(text), facts.now)
    if row is not None:
        ended = was is None or was.state not in SETTLED or was.state is State.EXPIRED
        if was is not None and not ended and (row.state, row.body) != (was.state, was.body):
            if forgets and row.state is State.WITHDRAWN:
                facts = facts._replace(forgotten=(*facts.forgotten, (was.token, facts.now)))
            else:
                promise = "1. a recorded outcome was changed"
        elif row.state in SETTLED and (was is None or was.state not in SETTLED):
            if facts.newest[0] and row.token != facts.newest[0]:
                promise = "8. an outcome was recorded under a token that was not the newest"
        if row.state is State.WITHDRAWN and was is not None and was.state is State.RUNNING:
            facts = facts._replace(releases=facts.releases + 1)
        facts = facts.with_row(text, row)
    if isinstance(reply, Granted):
        stored = facts.row(text)
        grant = (reply.token, b"" if stored is None else stored.attempt)
        if grant != facts.newest:
            if reply.token <= facts.newest[0]:
                promise = promise or "3. a token did not grow"
            facts = facts._replace(newest=grant)
    return Applied(reply, facts, promise)


def _denied(row: Row | None, ask: machine.Ask, reply: Claim, now: int) -> str:
    """The promise that the answer to a claim breaks; "": none."""
    row = standing(row, now)
    if row is None:
        return ""
    if row.state is State.EXPIRED and not isinstance(reply, (Expired, Mismatched)):
        return "14. a key that is remembered was free again, or its result was told past its ttl"
    if isinstance(reply, Expired) and row.state is not State.EXPIRED:
        return "1. a recorded outcome was not told"
    if isinstance(reply, Mismatched) and row.fingerprint in (b"", ask.fingerprint):
        return "13. a call was refused for other arguments than its own"
    if isinstance(reply, Unknown) and row.state in SETTLED:
        return "1. a recorded outcome was not told"
    over = row.state is State.RUNNING and row.attempt != ask.attempt and row.lease_until <= now
    if over and (isinstance(reply, Busy) or (isinstance(reply, Unknown) and (ask.takeover or ask.over == row.token))):
        return "7. a key could not be claimed although its lease was over"
    return ""


def _refused(row: Row | None, attempt: bytes, token: int | None, reply: Answer, now: int) -> str:
    """The promise that the answer to an owner's command breaks; "": none."""
    if row is None or row.state not in (State.RUNNING, State.UNKNOWN) or (row.expires or now + 1) <= now:
        return ""
    if row.attempt == attempt and token in (None, row.token) and reply is not Answer.DONE:
        return "10. a lease was reported lost, and nobody had taken over"
    return ""


class Seen(NamedTuple):
    """What the store has at the moment at which a caller looks into its own memory."""

    row: Row | None
    forgotten: tuple[tuple[int, int], ...]


class Model(Backend):
    """A store in virtual time, each of whose commands waits for the explorer; it serves async flows alone.

    Its answers are those of the explored rules, of `idempotent._machine` unless planted bugs stand in their place.
    """

    name = "model"

    def __init__(self) -> None:
        self.now = START
        """Virtual microseconds when its caller was last told something."""
        self.number = 0
        """Its caller's."""
        self.told: set[int] = set()
        """The tokens of outcomes that its process knows to be forgotten."""
        self._forgets = 0

    async def _command(
        self,
        label: str,
        rid: RecordId,
        decide: Callable[[Any, Row | None, int], Any],
        judge: Callable[[Row | None, Any, Row | None, int], str] = lambda *_: "",
    ) -> Any:
        """`decide` takes the rules, the row and the time, and gives the reply and the row to store (None: leave it).

        `judge` takes the row, the reply, the row stored and the time, and says which promise that breaks.
        """
        text = rid.text

        def apply(facts: Facts, rules: Any) -> Applied:
            found = facts.row(text)
            reply, row = decide(rules, found, facts.now)
            applied = _observed(facts, text, row, reply, forgets=label in ("forget", "forget by force"))
            return applied if applied.promise else applied._replace(promise=judge(found, reply, row, facts.now))

        return await hand_over(Step(label, apply))

    async def claim(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        fingerprint: bytes,
        lease: float,
        keep: float | None,
        takeover: bool,
        over: int | None = None,
        owner: bytes = b"",
    ) -> Claim:
        kept = None if keep is None else micros(keep)
        ask = machine.Ask(attempt, fingerprint, micros(lease), kept, takeover, over)
        claimed: Claim = await self._command(
            "claim",
            rid,
            lambda rules, row, now: rules.on_claim(row, ask, now),
            lambda row, reply, _stored, now: _denied(row, ask, reply, now),
        )
        return claimed

    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        span = micros(lease)

        def judge(row: Row | None, reply: Answer, stored: Row | None, now: int) -> str:
            kept = stored or row
            if reply is Answer.DONE and (kept is None or kept.lease_until < now + span):
                return "10. a lease was said to be renewed, and it was not"
            return _refused(row, attempt, token, reply, now)

        answer: Answer = await self._command(
            "renew", rid, lambda rules, row, now: rules.on_renew(row, attempt, token, span, now), judge
        )
        return answer

    async def complete(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        return await self._settle("complete", State.COMPLETED, rid, attempt, token, codec, body, ttl, remember)

    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        return await self._settle("fail", State.FAILED, rid, attempt, token, codec, body, ttl)

    async def _settle(
        self,
        label: str,
        state: State,
        rid: RecordId,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        past = micros(remember) if remember else 0

        def decide(rules: Any, row: Row | None, now: int) -> Any:
            settled = Row(state, token, attempt, b"", now, past, 0, now + micros(ttl), codec, body)
            return rules.on_settle(row, attempt, token, settled, now)

        def judge(row: Row | None, reply: Answer, stored: Row | None, now: int) -> str:
            if reply is Answer.DONE and stored is not None:
                if (stored.state, stored.codec, stored.body) != (state, codec, body):
                    return "4. another outcome was recorded than was brought"
                if stored.expires is None or stored.expires < now + micros(ttl):
                    return "1. a recorded outcome is not kept for its ttl"
                if stored.lease != past:
                    return "14. a key is not remembered for as long as was asked"
            return _refused(row, attempt, token, reply, now)

        answer: Answer = await self._command(label, rid, decide, judge)
        return answer

    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        answer: Answer = await self._command(
            "release",
            rid,
            lambda rules, row, now: rules.on_release(row, attempt, token, now, unknown=unknown),
            lambda row, reply, _stored, now: _refused(row, attempt, token, reply, now),
        )
        return answer

    async def read(self, rid: RecordId) -> Record | None:
        def decide(_rules: Any, row: Row | None, now: int) -> Any:
            return None if row is None else describe(rid, row, now), None

        found: Record | None = await self._command("read", rid, decide)
        return found

    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        self._forgets += 1
        attempt = b"f%d.%d" % (self.number, self._forgets)

        def decide(rules: Any, row: Row | None, now: int) -> Any:
            found, left = rules.on_forget(row, attempt, now, force=force)
            return None if found is None else describe(rid, found, now), left

        def judge(row: Row | None, _reply: Any, stored: Row | None, now: int) -> str:
            was, left = (None if each is None else describe(rid, each, now) for each in (row, stored or row))
            if was is None or left is None or (was.state == "running" and not force):
                return ""
            return "16. a record that was to be forgotten is still there"

        found: Record | None = await self._command("forget by force" if force else "forget", rid, decide, judge)
        if found is not None and found.state in ("completed", "failed"):
            self.told.add(found.token)
        return found

    async def look(self, rid: RecordId) -> Seen:
        """The record at the moment at which the caller looks into its own memory. No command of a backend."""
        return await self._see("looks in memory", rid.text)

    async def _see(self, label: str, text: str) -> Seen:
        def apply(facts: Facts, _rules: Any) -> Applied:
            return Applied(Seen(facts.row(text), facts.forgotten), facts)

        seen: Seen = await hand_over(Step(label, apply, is_effect=True))
        return seen

    def judge_memory(self, seen: Seen, found: tuple[Row, int] | None, fingerprint: bytes) -> str:
        """The promise that is broken where a process that saw this `found` that in its own memory; "": none."""
        if found is None:
            return ""
        copy, wrong = found[0], "15. an answer from memory is not what is recorded"
        reply, _ = machine.on_claim(seen.row, machine.Ask(b"looks...", fingerprint, 1, None, True), self.now)
        if isinstance(reply, Settled):
            told = (reply.failed, reply.token, reply.codec, reply.body)
            if told == (copy.state is State.FAILED, copy.token, copy.codec, copy.body):
                return ""
        if copy.fingerprint != fingerprint or isinstance(reply, Mismatched):
            return "13. a call was answered from the outcome of other arguments"
        if isinstance(reply, Expired):
            return "14. a key that is remembered was free again, or its result was told past its ttl"
        when = dict(seen.forgotten).get(copy.token)
        if when is None:
            return wrong
        if copy.token in self.told or self.now >= when + UNHEARD:
            return "15. a forgotten outcome was told by a process that knew of it, or a second later"
        return ""

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        text, deadline = rid.text, self.now + micros(timeout)

        def ended(facts: Facts) -> bool:
            row = facts.row(text)
            if row is None or row.state is not State.RUNNING or row.token != token:
                return True
            return facts.now >= min(deadline, row.lease_until)

        await hand_over(Step("wait", _nothing, ready=ended, deadline=deadline))

    async def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        def apply(facts: Facts, _rules: Any) -> Applied:
            found = [describe(RecordId.parse(text), row, facts.now) for text, row in facts.rows]
            return Applied(tuple(record for record in found if record is not None), facts)

        for record in await hand_over(Step("scan", apply)):
            if state in (None, record.state) and namespace in (None, record.namespace):
                yield record

    async def purge(self, limit: int = 1000) -> int:
        return 0


class InMemory(Model):
    """A store in its callers' own memory, as `local://` is: what is settled is found without a command."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = _Store(1000, lambda: self.now)

    def finder(self) -> Finder:
        return self._memory.look

    async def look(self, rid: RecordId) -> Seen:
        seen = await super().look(rid)
        self._memory.put(rid.text, seen.row)
        return seen

    def judge_memory(self, seen: Seen, found: tuple[Row, int] | None, fingerprint: bytes) -> str:
        reply, _ = machine.on_claim(seen.row, machine.Ask(b"looks...", fingerprint, 1, None, True), self.now)
        if isinstance(reply, Settled) and found is None:
            return "15. what is recorded was not found in memory"
        return super().judge_memory(seen, found, fingerprint)


class Telling(Model):
    """A store that tells of what is forgotten, as one Redis does: notices overtake the replies to commands."""

    def __init__(self) -> None:
        super().__init__()
        self.session = 1
        """What copies rest on; 0: nothing is heard."""
        self._copies: weakref.WeakSet[Copies] = weakref.WeakSet()
        self._missed: set[int] = set()

    def heed(self, copies: Copies) -> Heed:
        self._copies.add(copies)
        return lambda: self.session

    def breaks(self) -> None:
        """The line breaks: from now on nothing is heard."""
        self.session = 0

    async def listens_again(self) -> None:
        """There is another line; what was told meanwhile was missed."""
        self._missed = {token for token, _ in (await self._see("hears", "")).forgotten}
        self.session = 2

    async def _command(self, *args: Any, **options: Any) -> Any:
        reply = await super()._command(*args, **options)
        if self.session:
            self._hear((await self._see("hears", "")).forgotten)
        return reply

    async def look(self, rid: RecordId) -> Seen:
        seen = await super().look(rid)
        if self.session:
            self._hear(seen.forgotten)
        return seen

    def _hear(self, forgotten: tuple[tuple[int, int], ...]) -> None:
        heard = {token for token, _ in forgotten} - self._missed
        if not heard <= self.told:
            self.told |= heard
            for copies in self._copies:
                copies.clear()


def _nothing(facts: Facts, _rules: Any) -> Applied:
    return Applied(None, facts)
