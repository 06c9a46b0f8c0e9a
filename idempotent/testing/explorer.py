"""Every interleaving of duplicate calls, with crashes, lease ends and lost replies: the third driver of the shipped flows.

An exploration runs the calls as coroutines in virtual time, over a store in memory that changes as `idempotent._machine`
says. Wherever a call waits for the store, or is about to take effect, the explorer decides what happens next: who goes
on, whose reply is lost, who dies, whose lease ends. It does so in every possible way (stateless search, after Godefroid,
"Model checking for programming languages using VeriSoft", 1997) up to the budgets, leaving out what leads to a state that
it has seen, and judges each history by the invariants below. Nothing here is a model of the flows: they are those that
ship.

Invariants: 1. the outcome of a record never changes; 2. callers that succeed agree; 3. tokens grow with each claim that is
granted; 4. what is returned is what is stored; 5. runs <= 1 + lease ends + releases; 6. without faults the effect happens
exactly once; 7. every caller that lives comes to an end; 8. who records holds the newest token; 9. a caller that has
finished leaves no running record of its own; 10. a lease is reported lost only if another has taken over; 11. a command
applied twice changes nothing and answers the same.
"""

import itertools
import random
import time
import types
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable
from dataclasses import dataclass, field
from typing import Any

from idempotent import _flow as flow
from idempotent import _machine as machine
from idempotent._record import Answer, Claim, Granted, Record, RecordId, Row, State, StateName, describe
from idempotent._run import Driver, Flights, Plan, Run, Running
from idempotent.backends.base import Backend, micros
from idempotent.errors import BackendUnavailable, LeaseLost
from idempotent.serializers import codec_for

__all__ = ["Caller", "Exploration", "Model", "Violation", "explore"]

START = 1_000_000
"""Virtual microseconds at which each history begins."""
LEASE = 30.0
"""Seconds of virtual time."""
_TRIES = 2000
"""Histories that are looked through for a shorter counterexample, for each budget."""
_STEPS = 400
"""What has not ended after so many steps never does."""


class Step:
    """What a caller is about to do, handed to the explorer."""

    __slots__ = ("apply", "is_effect", "label", "ready")

    def __init__(
        self, label: str, apply: Callable[[], Any], *, ready: Callable[[], bool] | None = None, is_effect: bool = False
    ) -> None:
        self.label = label
        self.apply = apply
        self.ready = ready
        """Whether it can go on by now; None: at any time, and it can be sent twice."""
        self.is_effect = is_effect


@types.coroutine
def _hand_over(step: Step) -> Generator[Step, Any, Any]:
    return (yield step)


class Model(Backend):
    """A store in memory and virtual time, each of whose commands waits for the explorer; it serves async flows alone.

    Args:
        rules: the functions of `idempotent._machine`, or others in their place: planted bugs.
    """

    name = "model"

    def __init__(self, rules: Any = machine) -> None:
        self.rules = rules
        self.now = START
        self.rows: dict[str, Row] = {}
        self.values: dict[str, Any] = {}
        """What scenarios without our protocol keep."""

    def _put(self, rid: RecordId, row: Row | None) -> None:
        if row is not None:
            self.rows[rid.text] = row

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
        ask = machine.Ask(attempt, fingerprint, micros(lease), kept, takeover, over, owner)

        def apply() -> Claim:
            reply: Claim
            reply, row = self.rules.on_claim(self.rows.get(rid.text), ask, self.now)
            self._put(rid, row)
            return reply

        granted: Claim = await _hand_over(Step("claim", apply))
        return granted

    async def _owners(
        self, label: str, rid: RecordId, decide: Callable[[Row | None], tuple[Any, Row | None]]
    ) -> Answer:
        answer: Answer = await self._command(label, rid, decide)
        return answer

    async def _command(self, label: str, rid: RecordId, decide: Callable[[Row | None], tuple[Any, Row | None]]) -> Any:
        def apply() -> Any:
            answer, row = decide(self.rows.get(rid.text))
            self._put(rid, row)
            return answer

        return await _hand_over(Step(label, apply))

    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        return await self._owners(
            "renew", rid, lambda row: self.rules.on_renew(row, attempt, token, micros(lease), self.now)
        )

    async def complete(
        self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float
    ) -> Answer:
        return await self._settle("complete", State.COMPLETED, rid, attempt, token, codec, body, ttl)

    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        return await self._settle("fail", State.FAILED, rid, attempt, token, codec, body, ttl)

    async def _settle(
        self, label: str, state: State, rid: RecordId, attempt: bytes, token: int, codec: str, body: bytes, ttl: float
    ) -> Answer:
        def decide(row: Row | None) -> Any:
            settled = Row(state, token, attempt, b"", self.now, 0, 0, self.now + micros(ttl), codec, body)
            return self.rules.on_settle(row, attempt, token, settled, self.now)

        return await self._owners(label, rid, decide)

    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        return await self._owners(
            "release", rid, lambda row: self.rules.on_release(row, attempt, token, self.now, unknown=unknown)
        )

    async def read(self, rid: RecordId) -> Record | None:
        row = await self._command("read", rid, lambda row: (row, None))
        return None if row is None else describe(rid, row, self.now)

    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        found = await self._command(
            "forget", rid, lambda row: self.rules.on_forget(row, b"forgets.", self.now, force=force)
        )
        return None if found is None else describe(rid, found, self.now)

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        def ended() -> bool:
            row = self.rows.get(rid.text)
            return row is None or row.state is not State.RUNNING or row.token != token or row.lease_until <= self.now

        await _hand_over(Step("wait", lambda: None, ready=ended))

    async def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        for text, row in list(self.rows.items()):
            record = describe(RecordId.parse(text), row, self.now)
            if record is not None and state in (None, record.state) and namespace in (None, record.namespace):
                yield record

    async def purge(self, limit: int = 1000) -> int:
        return 0


class _Virtual:
    """The driver: time is the model's, sleeping takes none, and no lease is renewed unless the exploration says so."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def now(self) -> float:
        return self._model.now / 1e6

    async def sleep(self, seconds: float) -> None:
        await _hand_over(Step("sleep", lambda: None, ready=lambda: True))

    def waiter(self) -> Any:
        raise NotImplementedError("callers of an exploration are processes of their own")

    def beat(self, run: Run) -> None:
        pass

    async def still(self, run: Run) -> None:
        pass


class Caller:
    """One of the callers: a process of its own, as far as the store can tell."""

    def __init__(self, number: int, model: Model, history: "_History") -> None:
        self.number = number
        self.name = f"caller {number + 1}"
        self.model = model
        self._history = history
        self.driver: Driver = _Virtual(model)
        self.coroutine: Coroutine[Step, Any, Any]
        self.step: Step | None = None
        """What it is about to do; None: it has finished or died."""
        self.crashed = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.stored = True
        self.run: Run | None = None
        self.replies: list[Any] = []
        """All it has seen of the world: a coroutine's state follows from it."""

    async def effect(self) -> Any:
        """Take effect on the world, once more each time: what must happen once. Returns a value of its own."""

        def apply() -> int:
            self._history.effects.append(self.number)
            return len(self._history.effects)

        return await _hand_over(Step("EFFECT", apply, is_effect=True))

    async def get(self, key: str) -> Any:
        """Read a value of a plain key-value store, for protocols that are not ours; None: there is none."""
        return await _hand_over(Step(f"get {key}", lambda: self.model.values.get(key)))

    async def set(self, key: str, value: Any) -> None:
        """Write a value of a plain key-value store."""
        await _hand_over(Step(f"set {key}", lambda: self.model.values.__setitem__(key, value)))

    async def add(self, key: str, value: Any) -> bool:
        """Write a value unless there is one (Redis's `SET NX`); whether there was none."""
        return bool(await _hand_over(Step(f"add {key}", lambda: self.model.values.setdefault(key, value) is value)))

    async def delete(self, key: str) -> None:
        """Remove a value of a plain key-value store."""
        await _hand_over(Step(f"delete {key}", lambda: self.model.values.pop(key, None)))


Scenario = Callable[[Caller], Awaitable[Any]]
"""What each caller does: its coroutine may await the caller's methods, and what it returns is the call's answer."""


@dataclass
class _History:
    """What happened in one execution, for the judge and for the diagram."""

    lines: list[tuple[str, str, str]] = field(default_factory=list)
    """Who, what, and what came of it."""
    effects: list[int] = field(default_factory=list)
    granted: list[int] = field(default_factory=list)
    releases: int = 0
    expiries: int = 0
    faults: int = 0


@dataclass(frozen=True)
class Violation:
    """A history that breaks a promise, as short as it could be made."""

    promise: str
    """Which one, in words."""
    choices: tuple[int, ...]
    """The schedule, for `Exploration.replay`."""
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
            elif what.startswith(("EFFECT", "dies", "returns", "raises")):
                rows.append(f"    Note over {short[who]}: {what}")
            else:
                rows.append(f"    {short[who]}->>S: {what}")
                if came:
                    rows.append(f"    S-->>{short[who]}: {came}")
        return "\n".join(rows)


@dataclass
class Exploration:
    """What an exploration found."""

    histories: int
    """Schedules that were run to an end."""
    states: int
    """Different states that were met."""
    seconds: float
    complete: bool
    """Whether every schedule within the budgets was covered; False: time or the limit ran out."""
    violation: Violation | None

    def __bool__(self) -> bool:
        """Whether no promise was broken."""
        return self.violation is None

    def __str__(self) -> str:
        extent = "all" if self.complete else "not all"
        head = f"{self.histories:,} histories, {self.states:,} states, {extent} of them, in {self.seconds:.1f} s"
        return head if self.violation is None else f"{head}\n\n{self.violation}"


class _Execution:
    """One history: the scenario's callers, driven by a list of choices and then by `otherwise`."""

    def __init__(
        self,
        scenario: Scenario,
        rules: Any,
        budgets: tuple[int, int, int, int],
        otherwise: Callable[[int], int],
    ) -> None:
        callers, self._crashes, self._expiries, self._losses = budgets
        self.model = Model(rules)
        self.history = _History()
        self.callers = [Caller(number, self.model, self.history) for number in range(callers)]
        self._otherwise = otherwise
        self.taken: list[int] = []
        self.offered: list[int] = []
        self.promise = ""
        for caller in self.callers:
            coroutine: Any = scenario(caller)
            caller.coroutine = coroutine
            self._resume(caller, None)

    def play(self, choices: Iterable[int], seen: set[Any] | None = None) -> None:
        """Run to the end, or to a state in `seen` beyond the given choices."""
        given = list(choices)
        while not self.promise:
            options = self._options()
            if not options:
                break
            at = len(self.taken)
            if at >= _STEPS:
                self._break("7. a caller goes on for ever")
                break
            if at >= len(given) and seen is not None and len(options) > 1:
                state = self._state()
                if state in seen:
                    self.offered.append(1)
                    self.taken.append(0)
                    return
                seen.add(state)
            choice = given[at] if at < len(given) else self._otherwise(len(options))
            choice = min(choice, len(options) - 1)
            self.taken.append(choice)
            self.offered.append(len(options))
            option = options[choice]
            option[0](*option[1:])
        if not self.promise:
            self._judge()

    def close(self) -> None:
        """Throw the callers away that have not finished."""
        for caller in self.callers:
            if caller.step is not None or caller.crashed:
                caller.coroutine.close()

    # ------------------------------------------------------------------------------------------------- what may happen

    def _options(self) -> list[tuple[Any, ...]]:
        options: list[tuple[Any, ...]] = []
        waiting = False
        for caller in self.callers:
            step = caller.step
            if step is None:
                continue
            if step.ready is not None:
                if step.ready():
                    options.append((self._go_on, caller))
                else:
                    waiting = True
                continue
            options.append((self._go_on, caller))
            if self._losses and not step.is_effect:
                options += [
                    (self._lose, caller, "twice"),
                    (self._lose, caller, "after"),
                    (self._lose, caller, "before"),
                ]
            if self._crashes:
                options += [(self._crash, caller, True), (self._crash, caller, False)]
        leases = [row.lease_until for row in self.model.rows.values() if row.state is State.RUNNING]
        if any(until > self.model.now for until in leases):
            if self._expiries and options:
                options.append((self._expire, False))
            elif waiting and not options:
                options.append((self._expire, True))
        return options

    def _go_on(self, caller: Caller) -> None:
        step = caller.step
        assert step is not None
        self._apply_and_resume(caller, step, "")

    def _apply_and_resume(self, caller: Caller, step: Step, note: str) -> None:
        reply = self._apply(step)
        if step.label not in ("sleep", "wait"):
            self._tell(caller, step.label + note, reply)
        self._resume(caller, reply)

    def _apply(self, step: Step) -> Any:
        before = dict(self.model.rows)
        reply = step.apply()
        for text, row in self.model.rows.items():
            was = before.get(text)
            settled = (State.COMPLETED, State.FAILED)
            if was is not None and was.state in settled and (row.state, row.body) != (was.state, was.body):
                self._break("1. a recorded outcome was changed")
            if row.state in settled and (was is None or was.state not in settled):
                if self.history.granted and row.token != self.history.granted[-1]:
                    self._break("8. an outcome was recorded under a token that was not the newest")
            if row.state is State.WITHDRAWN and was is not None and was.state is State.RUNNING:
                self.history.releases += 1
        if isinstance(reply, Granted) and reply.token not in self.history.granted:
            if self.history.granted and reply.token < self.history.granted[-1]:
                self._break("3. a token did not grow")
            self.history.granted.append(reply.token)
        return reply

    def _lose(self, caller: Caller, what: str) -> None:
        """A fault of the connection: a command sent twice as its first reply was lost, or one that is given up."""
        self._losses -= 1
        self.history.faults += 1
        step = caller.step
        assert step is not None
        if what == "twice":
            first = self._apply(step)
            rows = dict(self.model.rows)
            reply = self._apply(step)
            self._tell(caller, f"{step.label} (reply lost, sent again)", reply)
            same = reply == first or (isinstance(first, Granted) and reply[:1] == first[:1])
            if self.model.rows != rows or not same:
                self._break("11. a command that was applied twice changed something, or answered otherwise")
            self._resume(caller, reply)
            return
        if what == "after":
            self._apply(step)
            self._tell(caller, f"{step.label} (applied, reply lost)", "no answer")
        else:
            self._tell(caller, f"{step.label} (lost on its way)", "no answer")
        self._resume(caller, None, BackendUnavailable("injected"))

    def _crash(self, caller: Caller, before: bool) -> None:
        self._crashes -= 1
        self.history.faults += 1
        step = caller.step
        assert step is not None
        if not before:
            self._tell(caller, step.label, self._apply(step))
        self._tell(caller, "dies", None)
        caller.step, caller.crashed = None, True

    def _expire(self, free: bool) -> None:
        if not free:
            self._expiries -= 1
            self.history.faults += 1
        self.history.expiries += 1
        self.model.now = 1 + max(row.lease_until for row in self.model.rows.values() if row.state is State.RUNNING)
        self.history.lines.append(("time", "the lease runs out", ""))

    def _resume(self, caller: Caller, reply: Any, error: BaseException | None = None) -> None:
        caller.replies.append(error if error is not None else reply)
        try:
            if error is not None:
                caller.step = caller.coroutine.throw(error)
            else:
                caller.step = caller.coroutine.send(reply)
        except StopIteration as stop:
            caller.step, caller.value = None, stop.value
            self._tell(caller, f"returns {stop.value!r}", None)
        except Exception as failure:
            caller.step, caller.error = None, failure
            self._tell(caller, f"raises {type(failure).__name__}", None)

    def _tell(self, caller: Caller, what: str, reply: Any) -> None:
        came = "" if reply is None else _words(reply)
        self.history.lines.append((caller.name, what, came))

    def _break(self, promise: str) -> None:
        self.promise = self.promise or promise

    def _state(self) -> Any:
        callers = tuple(
            (caller.crashed, caller.step is None, tuple(map(_frozen, caller.replies))) for caller in self.callers
        )
        rows = tuple(sorted((text, _frozen(row)) for text, row in self.model.rows.items()))
        values = tuple(sorted((key, repr(value)) for key, value in self.model.values.items()))
        budgets = (self._crashes, self._expiries, self._losses)
        return hash(
            (callers, rows, values, budgets, self.model.now, tuple(self.history.effects), self.history.releases)
        )

    # --------------------------------------------------------------------------------------------------- the judgement

    def _judge(self) -> None:
        history = self.history
        living = [caller for caller in self.callers if not caller.crashed]
        returned = [caller for caller in living if caller.step is None and caller.error is None]
        if any(caller.step is not None for caller in living):
            return self._break("7. a caller waits for ever")
        # Whoever could not record its outcome says so: `stored` is False.
        agreed = [caller.value for caller in returned if caller.stored]
        if any(value != agreed[0] for value in agreed):
            return self._break("2. callers that succeeded do not agree")
        runs = len(history.effects)
        if runs > 1 + history.expiries + history.releases:
            return self._break("5. the effect happened again although no lease had run out")
        if not history.faults and runs != 1 + history.releases:
            return self._break(f"6. without any fault the effect happened {runs} times")
        # The function's own error is its caller's to have.
        if not history.faults and any(c.error is not None and not (c.run and c.run.raised) for c in living):
            return self._break("6. without any fault a caller got an error")
        for row in self.model.rows.values():
            owners = [caller for caller in returned if caller.run is not None and caller.run.attempt == row.attempt]
            if row.state is State.RUNNING and any(caller.stored for caller in owners):
                return self._break("9. a caller that has finished left its record running")
            for caller in returned:
                if row.state is State.COMPLETED and caller.stored and caller.run is not None:
                    if caller.run.plan.codec.decode(row.body, caller.run.rid.text) != caller.value:
                        return self._break("4. what was returned is not what is stored")
        for caller in living:
            if isinstance(caller.error, LeaseLost) and caller.run is not None:
                if history.granted and history.granted[-1] <= (caller.run.token or 0):
                    return self._break("10. a lease was reported lost, and nobody had taken over")
        return None


def _words(reply: Any) -> str:
    if isinstance(reply, Answer):
        return reply.value
    if isinstance(reply, Granted):
        return f"granted, token {reply.token - START}" + (" (taken over)" if reply.took_over else "")
    if isinstance(reply, tuple):
        return type(reply).__name__.lower()
    return repr(reply)


def _frozen(value: Any) -> Any:
    if isinstance(value, BaseException):
        return type(value).__name__
    if isinstance(value, Row):
        return (value.state.value, *value[1:])
    return value if isinstance(value, (tuple, str, bytes, int, float, bool, type(None), Answer)) else repr(value)


def _protocol(caller: Caller) -> Coroutine[Step, Any, Any]:
    """The scenario that is explored when none is given: one call of a decorated function, whose body takes effect."""
    return _call(caller, caller.effect)


_codec = codec_for(lambda: None, None)


def _plan(model: Model, *, on_crash: str, wait: float | None = None) -> Plan:
    return Plan(
        backend=model,
        flights=Flights(),
        codec=_codec,
        namespace="explored",
        ttl=86_400.0,
        lease=LEASE,
        wait=wait,
        keep_result=True,
        error_ttl={},
        on_crash=on_crash,
        run_on_outage=False,
        hooks=(),
        stats={},
    )


async def _call(caller: Caller, body: Callable[[], Awaitable[Any]], on_crash: str = "rerun") -> Any:
    """What the wrapper of a decorated async function does, with the explorer's driver."""
    run = Run(_plan(caller.model, on_crash=on_crash), RecordId("explored", "k"), b"", dict)
    run.attempt = b"caller %d" % caller.number  # each history is the same when it is played again
    caller.run = run
    driver = caller.driver
    value = None
    try:
        replay = await flow.begin(driver, run)
        if replay is None:
            with Running(driver, run):
                value = await body()
    except GeneratorExit:
        raise
    except BaseException as error:
        await flow.abandon(driver, run, error)
        raise
    if replay is None:
        replay = await flow.settle(driver, run, value)
    if replay.error is not None:
        raise replay.error
    caller.stored = replay.stored
    return replay.value


def explore(
    scenario: Scenario | None = None,
    *,
    callers: int = 3,
    crashes: int = 1,
    expiries: int = 1,
    lost_replies: int = 1,
    rules: Any = machine,
    seconds: float = 60.0,
    seed: int | None = None,
    histories: int | None = None,
) -> Exploration:
    """Run duplicate calls in every possible order, with every fault within the budgets, and judge each history.

    Args:
        scenario: what each caller does; None: a call of a function decorated with `@idempotent`.
        callers: how many duplicates, each in a process of its own.
        crashes: how many callers may die, at any step.
        expiries: how many leases may run out while their holder lives; those of the dead run out anyway.
        lost_replies: how many commands may be sent twice, or lost before or after they were applied.
        rules: the functions that a store applies, for planted bugs; the protocol's own by default.
        seconds: when to stop, at the latest.
        seed: random schedules from this seed instead of all of them in order, for spaces that are too large.
        histories: how many schedules to run at the most; None: no limit.

    Returns:
        What was found; it is true if no promise was broken, and its text shows the shortest counterexample.
    """
    budgets = (callers, crashes, expiries, lost_replies)
    chosen = scenario or _protocol
    began = time.monotonic()
    seen: set[Any] | None = set() if seed is None else None
    dice = random.Random(seed)
    choices: list[int] | None = []
    count = 0
    complete = False
    violation: Violation | None = None
    while choices is not None:
        if time.monotonic() - began > seconds or (histories is not None and count >= histories):
            break
        otherwise = _the_first if seed is None else dice.randrange
        execution = _Execution(chosen, rules, budgets, otherwise)
        execution.play(choices, seen)
        execution.close()
        count += 1
        if execution.promise:
            violation = _shortest(chosen, rules, budgets, execution)
            break
        if seed is None:
            choices = _next(execution)
            complete = choices is None
        else:
            choices = []
    return Exploration(count, len(seen or ()), time.monotonic() - began, complete, violation)


def _next(execution: _Execution) -> list[int] | None:
    """The next schedule in order; None: that was the last."""
    taken, offered = execution.taken, execution.offered
    while taken and taken[-1] + 1 >= offered[-1]:
        taken.pop()
        offered.pop()
    if not taken:
        return None
    return [*taken[:-1], taken[-1] + 1]


def _shortest(scenario: Scenario, rules: Any, budgets: tuple[int, int, int, int], found: _Execution) -> Violation:
    """A history as bad as `found`, made shorter while that is possible."""
    best = found
    callers, crashes, expiries, losses = budgets
    spaces = itertools.product(range(2, callers + 1), range(crashes + 1), range(expiries + 1), range(losses + 1))
    # Fewer callers and fewer faults first: what is found there is short.
    for limits in sorted(spaces, key=lambda space: (space[0], sum(space[1:]))):
        other = _first(scenario, rules, limits)
        if other is not None:
            best = _shrunk(scenario, rules, limits, other)
            break
    return Violation(best.promise, tuple(best.taken), tuple(best.history.lines))


def _first(scenario: Scenario, rules: Any, limits: tuple[int, int, int, int]) -> _Execution | None:
    choices: list[int] | None = []
    seen: set[Any] = set()
    for _ in range(_TRIES):
        if choices is None:
            break
        execution = _played(scenario, rules, limits, choices, seen)
        if execution.promise:
            return execution
        choices = _next(execution)
    return None


def _shrunk(scenario: Scenario, rules: Any, limits: tuple[int, int, int, int], best: _Execution) -> _Execution:
    """`best` with each choice in turn put back to the first, as long as that breaks a promise sooner."""
    at = len(best.taken) - 1
    while at >= 0:
        if at < len(best.taken) and best.taken[at]:
            execution = _played(scenario, rules, limits, [*best.taken[:at], 0, *best.taken[at + 1 :]])
            if execution.promise and len(execution.history.lines) < len(best.history.lines):
                best, at = execution, len(execution.taken)
        at -= 1
    return best


def _played(
    scenario: Scenario,
    rules: Any,
    limits: tuple[int, int, int, int],
    choices: list[int],
    seen: set[Any] | None = None,
) -> _Execution:
    execution = _Execution(scenario, rules, limits, _the_first)
    execution.play(choices, seen)
    execution.close()
    return execution


def _the_first(_options: int) -> int:
    return 0
