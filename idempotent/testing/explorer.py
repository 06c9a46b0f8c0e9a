"""Every interleaving of duplicate calls, with crashes, lease ends and lost replies: the third driver of the shipped flows.

An exploration runs the calls in virtual time, over a store in memory that changes as `idempotent._machine` says. Wherever
a call waits for the store, or is about to take effect, the explorer decides what happens next: who goes on, whose reply is
lost, who dies, whose lease ends. It goes every way there is, breadth first, up to the budgets; where two ways lead to the
same state it goes on from there once (explicit-state model checking, as in Clarke, Grumberg, Peled, "Model Checking",
1999). Nothing here is a model of the flows: they are those that ship.

Invariants: 1. the outcome of a record never changes, and is kept and told for its ttl; 2. callers that succeed agree; 3.
tokens grow with each claim that is granted; 4. what is returned is what is stored; 5. runs <= 1 + lease ends + releases
+ outcomes forgotten, and where a crash is not to be guessed at, the same without lease ends; 6. without faults the effect
happens exactly once, and nobody is told of trouble; with faults, of none that they do not explain; 7. every caller that
lives comes to an end, and a key whose lease is over can be claimed; 8. who records holds the newest token; 9. a caller that
has finished leaves no running record of its own; 10. an owner is refused only if another has taken over; 11. a command
applied twice changes nothing and answers the same; 12. nobody enters a lock while another surely holds it; 13. no call is
answered from the outcome of other arguments, nor refused for its own; 14. a key that is remembered past its result's ttl is
neither free nor tells the result; 15. what a process answers from its own memory is what the store would answer, but for a
forget that it was not told of, for a second at the most; 16. what was forgotten is not there any more, unless it was running
and not forgotten by force.

What is not explored: a command and its reply are one step, so no lease ends between them, and a command that was lost is
not applied later; what a store tells of a forget is heard by the next reply, and never later, as it may be of a server;
the callers share no process, but for the records of a store in their memory; heartbeats beat where a scenario lets them.
"""

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from idempotent import _machine as machine
from idempotent._record import Answer, Granted, Record, State
from idempotent._run import Run
from idempotent.errors import (
    BackendUnavailable,
    LeaseLost,
    LockError,
    LockLost,
    NotHeld,
    OutcomeUnknown,
    ResultUnavailable,
    SerializationError,
)
from idempotent.testing._callers import Caller, End, Local, Move, Scenario, Troupe, call, forget, hold, unavailable
from idempotent.testing._world import SETTLED, START, Facts, InMemory, Model, Seen, Step, Telling, World, Worlds

__all__ = [
    "Caller",
    "Exploration",
    "InMemory",
    "Model",
    "Telling",
    "Violation",
    "call",
    "explore",
    "forget",
    "hold",
]

_STEPS = 400
"""What has not ended after so many steps never does."""
_SHORTER = 20.0
"""Seconds spent on looking for a counterexample with fewer callers and faults."""
_KNOWN = 50_000
"""States whose choices random ways remember."""
_TELL_EVERY = 0.5
"""Seconds between two words about a long exploration."""


@dataclass(frozen=True)
class Violation:
    """A history that breaks a promise; none with so few callers and faults is shorter."""

    promise: str
    """Which one, in words."""
    lines: tuple[tuple[str, str, str], ...]
    """Who did what, and what came of it."""

    def __str__(self) -> str:
        return f"{self.promise}\n\n{self.diagram()}"

    def diagram(self) -> str:
        """The history as text: a column for each caller."""
        names = sorted({who for who, _, _ in self.lines if who != "time"})
        width = max([14, *(len(what) + 2 for _, what, _ in self.lines)])
        rows = ["".join(name.ljust(width) for name in names)]
        rows += ["".join("|".ljust(width) for _ in names)]
        for who, what, came in self.lines:
            if who == "time":
                rows.append(f"--- {what} ".ljust(width * len(names), "-"))
                continue
            cells = [(what if name == who else "|").ljust(width) for name in names]
            rows.append("".join(cells) + (f" -> {came}" if came else ""))
        return "\n".join(row.rstrip() for row in rows)

    def mermaid(self) -> str:
        """The history as a Mermaid sequence diagram."""
        names = sorted({who for who, _, _ in self.lines if who != "time"})
        short = {name: f"C{number + 1}" for number, name in enumerate(names)}
        rows = ["sequenceDiagram", *(f"    participant {short[name]} as {name}" for name in names)]
        rows.append("    participant S as store")
        for who, what, came in self.lines:
            if who == "time":
                rows.append(f"    Note over S: {what}")
            elif what.startswith(("EFFECT", "RUNS", "dies", "leave", "looks", "finds", "returns", "raises")):
                rows.append(f"    Note over {short[who]}: {what}")
            else:
                rows.append(f"    {short[who]}->>S: {what}")
                if came:
                    rows.append(f"    S-->>{short[who]}: {came}")
        return "\n".join(rows)


@dataclass
class Exploration:
    """What an exploration found; true if no promise was broken."""

    histories: int
    """Schedules that were followed to an end, or to a state from which everything had been followed before."""
    states: int
    """Different states that were met; 0 for random schedules."""
    seconds: float
    complete: bool
    """Whether every schedule within the budgets was covered; False: time or the limit ran out."""
    violation: Violation | None

    def __bool__(self) -> bool:
        """Whether no promise was broken."""
        return self.violation is None

    def __str__(self) -> str:
        extent = "all of them" if self.complete else "not all"
        head = f"{self.histories:,} histories, {self.states:,} states, {extent}, in {self.seconds:.1f} s"
        return head if self.violation is None else f"{head}\n\n{self.violation}"


class _Limits(NamedTuple):
    callers: int
    crashes: int
    expiries: int
    lost_replies: int


State_ = tuple[tuple[Local, ...], World, int, int, int]
"""Where each caller stands, the world, and what is left of the budgets: crashes, expiries, lost replies."""


class _Choice(NamedTuple):
    """One thing that may happen next."""

    state: State_
    promise: str
    """What it breaks at once; "": nothing."""
    what: str
    who: int
    move: Move | None
    step: Step | None


class _Space:
    """All that may happen to a scenario's callers under some rules."""

    def __init__(self, scenario: Scenario, rules: Any, model: Callable[[], Model]) -> None:
        self._rules = rules
        self._worlds = Worlds()
        self._troupe = Troupe(scenario, model)
        self.close = self._troupe.close

    def start(self, limits: _Limits) -> State_:
        """How every history begins."""
        roots = tuple(self._troupe.root(number) for number in range(limits.callers))
        return roots, self._worlds.of(Facts()), *limits[1:]

    def choices(self, state: State_) -> Iterator[_Choice]:
        """What may happen next; nothing: the history has ended."""
        places, world, crashes, expiries, losses = state
        nothing = True
        waiting: list[Step] = []
        dead = self._troupe.dead
        for who, local in enumerate(places):
            step = local.step
            if step is None:
                continue
            try:
                move = local.go[world]
            except KeyError:
                move = self._go(local, step, world)
            if move is None:
                waiting.append(step)
                continue
            nothing = False
            before, behind = places[:who], places[who + 1 :]
            yield _Choice(
                ((*before, move.after, *behind), move.world, crashes, expiries, losses),
                move.promise,
                "goes on",
                who,
                move,
                step,
            )
            if step.ready is not None:
                continue
            if losses and not step.is_effect:
                try:
                    lost = local.losses[world]
                except KeyError:
                    lost = self._lose(local, step, world)
                for what, each in zip(_LOSSES, lost, strict=True):
                    after = ((*before, each.after, *behind), each.world, crashes, expiries, losses - 1)
                    yield _Choice(after, each.promise, what, who, each, step)
            if crashes:
                rest = (*before, dead, *behind)
                yield _Choice((rest, world, crashes - 1, expiries, losses), "", "dies", who, None, None)
                yield _Choice(
                    (rest, move.world, crashes - 1, expiries, losses), move.promise, "does it and dies", who, move, step
                )
        if nothing and waiting:
            later = self._later(world, waiting)
            if later is not None:
                yield _Choice((places, later, crashes, expiries, losses), "", "time", -1, None, None)
        elif expiries and not nothing:
            expired = self._expired(world)
            if expired is not None:
                yield _Choice((places, expired, crashes, expiries - 1, losses), "", "time", -1, None, None)

    def _go(self, local: Local, step: Step, world: World) -> Move | None:
        move = None
        if step.ready is None or step.ready(world.facts):
            reply, facts, promise = step.apply(world.facts, self._rules)
            move = Move(self._troupe.after(local, reply, facts.now), self._worlds.of(facts), reply, promise)
        local.go[world] = move
        return move

    def _lose(self, local: Local, step: Step, world: World) -> tuple[Move, Move, Move]:
        """A fault of the connection: a command sent twice as its first reply was lost, or one that is given up."""
        once = step.apply(world.facts, self._rules)
        again = step.apply(once.facts, self._rules)
        same = again.reply == once.reply
        if isinstance(once.reply, Granted) and isinstance(again.reply, Granted):  # which took over is told once
            same = again.reply.token == once.reply.token
        if isinstance(once.reply, Record) and isinstance(again.reply, Record):  # the result of what is forgotten, too
            same = (again.reply.state, again.reply.token) == (once.reply.state, once.reply.token)
        promise = once.promise or again.promise
        applied, twice = self._worlds.of(once.facts), self._worlds.of(again.facts)
        if applied is not twice or not same:
            promise = promise or "11. a command that was applied twice changed something, or answered otherwise"
        now = world.facts.now
        resumed = self._troupe.after(local, again.reply, now)
        given_up = self._troupe.after(local, None, now, unavailable())
        local.losses[world] = lost = (
            Move(resumed, twice, again.reply, promise),
            Move(given_up, applied, None, once.promise),
            Move(given_up, world, None, ""),
        )
        return lost

    def _expired(self, world: World) -> World | None:
        """The world when its running leases have ended; None: there are none."""
        if world.expired is None:
            facts = world.facts
            ends = [row.lease_until for _, row in facts.rows if row.state is State.RUNNING]
            if not any(end > facts.now for end in ends):
                return None
            world.expired = self._worlds.of(facts._replace(now=1 + max(ends), expiries=facts.expiries + 1))
        return world.expired

    def _later(self, world: World, waiting: list[Step]) -> World | None:
        """The world at the next moment at which somebody may go on; None: there is none."""
        facts = world.facts
        ends = [row.lease_until for _, row in facts.rows if row.state is State.RUNNING]
        times = [*ends, *(step.deadline for step in waiting if step.deadline is not None)]
        coming = min((instant for instant in times if instant > facts.now), default=None)
        if coming is None:
            return None
        ended = any(facts.now < end <= coming for end in ends)
        return self._worlds.of(facts._replace(now=coming, expiries=facts.expiries + ended))

    def told(self, start: State_, path: list[int]) -> tuple[tuple[str, str, str], ...]:
        """The history that takes those choices, in words."""
        lines: list[tuple[str, str, str]] = []
        state = start
        for index in path:
            choice = next(itertools.islice(self.choices(state), index, None))
            lines += _lines(choice, state[1], choice.state[1])
            state = choice.state
        return tuple(lines)


_LOSSES = (" (reply lost, sent again)", " (applied, reply lost)", " (lost on its way)")


def _lines(choice: _Choice, before: World, after: World) -> Iterator[tuple[str, str, str]]:
    if choice.who < 0:
        yield "time", "the lease runs out" if after.facts.expiries > before.facts.expiries else "time passes", ""
        return
    name = f"caller {choice.who + 1}"
    move, step = choice.move, choice.step
    if move is not None and step is not None:
        if choice.what in _LOSSES:
            yield name, step.label + choice.what, "no answer" if choice.what is not _LOSSES[0] else _words(move.reply)
        elif step.label not in ("hears", "sleep", "wait"):
            yield name, step.label, _words(move.reply)
        end = move.after.end
        if end is not None and choice.what != "does it and dies":
            yield name, f"returns {end.value!r}" if end.error is None else f"raises {type(end.error).__name__}", ""
    if choice.what in ("dies", "does it and dies"):
        yield name, "dies", ""


def _words(reply: Any) -> str:
    if reply is None or isinstance(reply, Seen):
        return ""
    if isinstance(reply, Answer):
        return reply.value
    if isinstance(reply, Granted):
        return f"granted, token {reply.token - START}" + (" (taken over)" if reply.took_over else "")
    if isinstance(reply, tuple):
        return type(reply).__name__.lower()
    return repr(reply)


# ----------------------------------------------------------------------------------------------------- the judgement


def _judge(state: State_, limits: _Limits) -> str:
    """The promise that a history has broken which ended there; "": none."""
    places, world, *left = state
    faultless = left == list(limits[1:])
    living = [local for local in places if local.number >= 0]
    if any(local.step is not None for local in living):
        return "7. a caller waits for ever"
    ends = [local.end for local in living if local.end is not None]
    facts = world.facts
    if faultless and not facts.expiries:
        if any(not end.excused for end in ends):
            return "6. without any fault a caller got an error"
        if any(not end.stored for end in ends):
            return "6. without any fault a caller was told that its outcome is not stored"
        if len({repr(end.error) for end in ends if end.recorded}) > 1:
            return "2. callers that were told a recorded error do not agree"
    for _, row in facts.rows:
        owners = [end for end in ends if (owner := end.run or end.held) is not None and owner.attempt == row.attempt]
        if row.state is State.RUNNING and any(faultless or (end.stored and end.error is None) for end in owners):
            return "9. a caller that has finished left its record running"
    lossless = left[2] == limits.lost_replies
    if any(not _explained(end, lossless=lossless, expiries=facts.expiries) for end in ends):
        return "6. a caller got an error that no fault explains"
    if any(end.held is not None for end in ends):
        return _judge_locks(ends, facts, faultless=faultless)
    return _judge_calls(ends, facts, faultless=faultless)


def _explained(end: End, *, lossless: bool, expiries: int) -> bool:
    """Whether the faults that there were, or what it asked itself, account for a caller's error."""
    error = end.error
    if end.excused or (end.run is None and end.held is None) or isinstance(error, (LeaseLost, NotHeld)):
        return True  # of leases that were lost the tenth promise speaks
    if isinstance(error, OutcomeUnknown):
        return end.run is not None and not end.run.plan.takeover
    if isinstance(error, LockLost) or (type(error) is LockError and "too short" in str(error)):
        return expiries > 0  # the second: its lease had ended before it was used
    # What could not be recorded, as far as the caller can tell, is recorded as done at least.
    return isinstance(error, (BackendUnavailable, ResultUnavailable)) and not lossless


def _judge_calls(ends: list[End], facts: Facts, *, faultless: bool) -> str:
    returned = [end for end in ends if end.error is None]
    # Whoever could not record its outcome says so: `stored` is False.
    agreed = [end for end in returned if end.stored]
    told = {end.token if facts.forgotten else 0: end.value for end in agreed}
    if any(end.value != told[end.token if facts.forgotten else 0] for end in agreed):
        return "2. callers that succeeded do not agree"
    guessing = not ends or any(end.run is None or end.run.plan.takeover for end in ends)
    epochs = 1 + len(facts.forgotten)
    if facts.effects > epochs + facts.releases + (facts.expiries if guessing else 0):
        return "5. the effect happened again although no lease had run out"
    settled = any(row.state in SETTLED for _, row in facts.rows)
    settled |= bool(returned) and not facts.forgotten
    if faultless and facts.effects != max(1, facts.releases + len(facts.forgotten) + settled):
        return f"6. without any fault the effect happened {facts.effects} times"
    asked = [(end.token, end.run.fingerprint) for end in returned if end.run is not None and end.run.fingerprint]
    if len(asked) != len({token for token, _ in asked}) and len(set(asked)) != len({token for token, _ in asked}):
        return "13. a call was answered from the outcome of other arguments"
    for end in returned:
        run = end.run
        if run is None or not end.stored:
            continue
        for text, row in facts.rows:
            newer = facts.forgotten and row.token != end.token
            if row.state is State.COMPLETED and text == run.rid.text and not newer:
                if _decoded(run, row.body, text) != [end.value]:
                    return "4. what was returned is not what is stored"
    for end in ends:
        if isinstance(end.error, LeaseLost) and end.run is not None and facts.newest[0] <= (end.run.token or 0):
            return "10. a lease was reported lost, and nobody had taken over"
    return ""


def _decoded(run: Run, body: bytes, text: str) -> list[Any]:
    """What a record's body says; empty: nothing that can be read."""
    try:
        return [run.plan.codec.decode(body, text)]
    except SerializationError:
        return []


def _judge_locks(ends: list[End], facts: Facts, *, faultless: bool) -> str:
    if faultless and facts.effects != sum(end.value is not None for end in ends):
        return "6. without any fault somebody was not let in who held the lock"
    if faultless and any(end.held is not None and end.value is None and end.held.plan.wait is None for end in ends):
        return "6. without any fault somebody did not get the lock"
    for end in ends:
        if isinstance(end.error, NotHeld) and not facts.expiries and facts.newest[0] <= (end.token or 0):
            return "10. a hold was reported lost, and nobody had taken over"
    return ""


# -------------------------------------------------------------------------------------------------------- the search


class _Search:
    """One search through a space: what it met, and how long it may take."""

    def __init__(
        self, space: _Space, limits: _Limits, until: float, most: int | None, progress: Callable[[int, int], None]
    ) -> None:
        self._space = space
        self._limits = limits
        self._until = until
        self._most = most
        self._progress = progress
        self.start = space.start(limits)
        self.histories = 0
        self.states = 0
        self.complete = False
        self.promise = ""
        self.path: list[int] = []
        """The choices that led to the broken promise."""

    def _goes_on(self) -> bool:
        self._progress(self.histories, self.states)
        return time.monotonic() < self._until and (self._most is None or self.histories < self._most)

    def everything(self) -> None:
        """Go every way, shorter ones first."""
        came: dict[State_, tuple[State_, int] | None] = {self.start: None}
        level, depth = [self.start], 0
        unfinished = False
        choices = self._space.choices
        while level:
            further: list[State_] = []
            for state in level:
                if not self.states & 127 and not self._goes_on():
                    return
                self.states += 1
                index = -1
                for index, choice in enumerate(choices(state)):
                    after = choice[0]
                    if choice[1]:
                        self.histories += 1
                        self._found(choice[1], came, state, index)
                        return
                    if after in came:
                        self.histories += 1
                    else:
                        came[after] = (state, index)
                        further.append(after)
                if index < 0:
                    self.histories += 1
                    promise = _judge(state, self._limits)
                    if promise:
                        self._found(promise, came, state, None)
                        return
                elif depth >= _STEPS:
                    if self._goes_on_for_ever(state):
                        self._found("7. a caller goes on for ever", came, state, None)
                        return
                    unfinished = True
            level, depth = ([] if depth >= _STEPS else further), depth + 1
        self.complete = not unfinished

    def _goes_on_for_ever(self, state: State_) -> bool:
        """Whether there is nothing else to do than what has taken so many steps already, and it does not end."""
        for _ in range(_STEPS):
            choices = list(itertools.islice(self._space.choices(state), 2))
            if len(choices) != 1:
                return False
            state = choices[0].state
        return True

    def _found(
        self, promise: str, came: dict[State_, tuple[State_, int] | None], state: State_, last: int | None
    ) -> None:
        self.promise = promise
        self.path = [] if last is None else [last]
        while (step := came[state]) is not None:
            state, index = step
            self.path.insert(0, index)

    def some(self, seed: int) -> None:
        """Go random ways until time or the limit runs out."""
        dice = random.Random(seed)
        known: dict[State_, list[_Choice]] = {}  # many ways lead through the same states
        while self._goes_on():
            state = self.start
            path: list[int] = []
            promise = ""
            while not promise:
                choices = known.get(state)
                if choices is None:
                    if len(known) >= _KNOWN:
                        known.clear()
                    choices = known[state] = list(self._space.choices(state))
                if not choices:
                    promise = _judge(state, self._limits)
                    break
                if len(path) >= _STEPS:
                    promise = "7. a caller goes on for ever" if self._goes_on_for_ever(state) else ""
                    break
                index = dice.randrange(len(choices))
                path.append(index)
                state, promise = choices[index][:2]
            self.histories += 1
            if promise:
                self.promise, self.path = promise, path
                return


def explore(
    scenario: Scenario = call,
    *,
    callers: int = 3,
    crashes: int = 1,
    expiries: int = 1,
    lost_replies: int = 1,
    rules: Any = machine,
    model: Callable[[], Model] = Model,
    seconds: float = 60.0,
    seed: int | None = None,
    histories: int | None = None,
    progress: bool | None = None,
) -> Exploration:
    """Run duplicate calls in every possible order, with every fault within the budgets, and judge each history.

    Args:
        scenario: what each caller does, an async function of its Caller, by which alone it touches the world. Default: a
            call of a function decorated with `@idempotent`; `hold` is a `with Lock(...)`.
        callers: how many duplicates, each in a process of its own; 1 to 9.
        crashes: how many callers may die, at any step.
        expiries: how many leases may run out while their holder lives; those that somebody waits for run out anyway.
        lost_replies: how many commands may be sent twice, or lost before or after they were applied.
        rules: the functions that a store applies, for planted bugs; the protocol's own by default.
        model: makes the store of each caller, for planted bugs in a backend.
        seconds: when to stop, at the latest.
        seed: random schedules from this seed instead of all of them, for spaces that are too large.
        histories: how many schedules to follow at the most; None: no limit, so with a seed until `seconds` are over.
        progress: whether to tell how far it is, on standard error. None: if that is a terminal.

    Returns:
        What was found; it is true if no promise was broken, and its text shows the shortest counterexample.

    Raises:
        ValueError: a budget is negative, or the number of callers is not 1 to 9.
    """
    limits = _Limits(callers, crashes, expiries, lost_replies)
    if not 1 <= callers <= 9 or min(limits) < 0:
        raise ValueError(f"callers must be 1 to 9 and budgets not negative, not {limits}")
    began = time.monotonic()
    teller = _Teller(began, show=sys.stderr.isatty() if progress is None else progress)
    space = _Space(scenario, rules, model)
    try:
        search = _Search(space, limits, began + seconds, histories, teller)
        if seed is None:
            search.everything()
        else:
            search.some(seed)
        violation = None
        if search.promise:
            best = _shortest(space, limits, search)
            violation = Violation(best.promise, space.told(best.start, best.path))
    finally:
        space.close()
        teller.end()
    return Exploration(search.histories, search.states, time.monotonic() - began, search.complete, violation)


class _Teller:
    """A line on standard error about how far an exploration is."""

    def __init__(self, began: float, *, show: bool) -> None:
        self._began = began
        self._next = began + 2 * _TELL_EVERY if show else float("inf")
        self._told = False

    def __call__(self, histories: int, states: int) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next, self._told = now + _TELL_EVERY, True
            text = f"\rexplore: {histories:,} histories, {states:,} states, {now - self._began:.0f} s "
            print(text, end="", file=sys.stderr, flush=True)  # noqa: T201  what it is for

    def end(self) -> None:
        """Leave the line."""
        if self._told:
            print(file=sys.stderr)  # noqa: T201


def _shortest(space: _Space, limits: _Limits, found: _Search) -> _Search:
    """The search that found a counterexample with as few callers and faults as can be."""
    until = time.monotonic() + _SHORTER
    ranges = [range(1, limits.callers + 1), *(range(limit + 1) for limit in limits[1:])]
    # What is found with fewer callers and faults is easier to follow.
    for fewer in sorted(itertools.starmap(_Limits, itertools.product(*ranges)), key=lambda each: (each[0], sum(each))):
        search = _Search(space, fewer, until, None, lambda *_: None)
        search.everything()
        if search.promise:
            return search
    return found
