"""Callers of an exploration as automata: what each does next follows from all that it was told.

A caller is a coroutine of the flows that ship. Where it stands is decided by what it was told so far and when, so each
such place (`Local`) is worked out once, by running the coroutine there, and found again wherever other interleavings
lead to it. A coroutine cannot be copied: to take another way from a place that was left, a new one is told the same again.
"""

import contextvars
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, NamedTuple

from idempotent import _acquire
from idempotent import _flow as flow
from idempotent._near import Near
from idempotent._record import ATTEMPT_BYTES, LOCKS, RecordId
from idempotent._rooms import Asker, Held, Rooms
from idempotent._rooms import Plan as LockPlan
from idempotent._run import Flights, Plan, Run, Running
from idempotent.errors import BackendUnavailable, FingerprintMismatch, InProgress, ResultUnavailable
from idempotent.serializers import codec_for
from idempotent.testing._world import START, Applied, Facts, Model, Step, World, hand_over

__all__ = ["LEASE", "Caller", "End", "Local", "Move", "Scenario", "Troupe", "call", "forget", "hold"]

LEASE = 30.0
"""Seconds of virtual time."""


class _Virtual:
    """The driver: time is the model's, sleeping takes none, and no lease is renewed unless the scenario does it."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def now(self) -> float:
        return self._model.now / 1e6

    async def sleep(self, seconds: float) -> None:
        await hand_over(Step("sleep", lambda facts, _rules: Applied(None, facts), ready=lambda _facts: True))

    def waiter(self) -> Any:
        raise NotImplementedError("callers of an exploration are processes of their own")

    def beat(self, run: Any) -> None:
        pass

    async def still(self, run: Any) -> None:
        pass


class Caller:
    """One of the callers: a process of its own, as far as the store can tell. A scenario touches the world only by it."""

    def __init__(self, number: int, model: Model) -> None:
        self.number = model.number = number
        self.model = model
        self.flights = Flights()
        self.near: Near | None = None
        """The near-cache of its process; None: there is none."""
        self._attempts = 0
        self.driver = _Virtual(model)
        self.run: Run | None = None
        """Its call of a decorated function, if that is what it makes."""
        self.held: Held | None = None
        """Its hold of a lock, likewise."""
        self.stored = True
        self.token: int | None = None
        """The token of the record that answered it."""
        self.coroutine: Coroutine[Step, Any, Any]
        self.context = contextvars.copy_context()

    @property
    def name(self) -> str:
        """What diagrams call it."""
        return f"caller {self.number + 1}"

    def new_attempt(self) -> bytes:
        """An attempt id that is the same whenever this is played again."""
        self._attempts += 1
        return b"%d.%d" % (self.number, self._attempts) + b" " * (ATTEMPT_BYTES - 3)

    def give_near(self, maxsize: int = 10) -> None:
        """Give its process a near-cache of so many records, in the caller's time."""
        self.near = Near(maxsize, self.model, lambda: self.model.now)

    async def effect(self) -> Any:
        """Take effect on the world, once more each time: what must happen once. Returns a value of its own."""

        def apply(facts: Facts, _rules: Any) -> Applied:
            return Applied(facts.effects + 1, facts._replace(effects=facts.effects + 1))

        return await hand_over(Step("EFFECT", apply, is_effect=True))

    async def get(self, key: str) -> Any:
        """Read a value of a plain key-value store, for protocols that are not ours; None: there is none."""

        def apply(facts: Facts, _rules: Any) -> Applied:
            return Applied(dict(facts.values).get(key), facts)

        return await hand_over(Step(f"get {key}", apply))

    async def set(self, key: str, value: Any) -> None:
        """Write a value of a plain key-value store."""
        await hand_over(Step(f"set {key}", lambda facts, _rules: Applied(None, facts.with_value(key, value))))

    async def add(self, key: str, value: Any) -> bool:
        """Write a value unless there is one (Redis's `SET NX`); whether there was none."""

        def apply(facts: Facts, _rules: Any) -> Applied:
            if key in dict(facts.values):
                return Applied(False, facts)
            return Applied(True, facts.with_value(key, value))

        added: bool = await hand_over(Step(f"add {key}", apply))
        return added

    async def delete(self, key: str) -> None:
        """Remove a value of a plain key-value store."""
        await hand_over(Step(f"delete {key}", lambda facts, _rules: Applied(None, facts.without_value(key))))

    async def pause(self, seconds: float) -> None:
        """Do nothing until so many virtual seconds have passed since the beginning."""
        until = START + round(seconds * 1e6)
        ready = lambda facts: facts.now >= until  # noqa: E731
        await hand_over(Step("wait", lambda facts, _rules: Applied(None, facts), ready=ready, deadline=until))

    async def enter(self, valid_until: float) -> Any:
        """Begin what only one may be at, as nobody else may until `valid_until` (virtual seconds). It takes effect."""
        number, until = self.number, round(valid_until * 1e6)

        def apply(facts: Facts, _rules: Any) -> Applied:
            clash = any(other != number and end > facts.now for other, end in facts.inside)
            promise = "12. two callers held the lock at once" if clash and until > facts.now else ""
            facts = facts._replace(effects=facts.effects + 1, inside=(*facts.inside, (number, until)))
            return Applied(facts.effects, facts, promise)

        return await hand_over(Step("EFFECT", apply, is_effect=True))

    async def leave(self) -> None:
        """End it."""
        number = self.number

        def apply(facts: Facts, _rules: Any) -> Applied:
            return Applied(None, facts._replace(inside=tuple(pair for pair in facts.inside if pair[0] != number)))

        await hand_over(Step("leave", apply, is_effect=True))


Scenario = Callable[[Caller], Awaitable[Any]]
"""What each caller does: its coroutine may await the caller's methods, and what it returns is the call's answer."""


class End(NamedTuple):
    """How a caller came to its end."""

    value: Any
    error: BaseException | None
    stored: bool
    token: int | None
    run: Run | None
    held: Held | None

    @property
    def recorded(self) -> bool:
        """It ended with an error of the kind that is recorded."""
        run = self.run
        return run is not None and bool(run.plan.error_ttl) and isinstance(self.error, tuple(run.plan.error_ttl))

    @property
    def excused(self) -> bool:
        """It was refused for what it asked itself, or told its function's own error."""
        error, run = self.error, self.run
        if error is None or (run is not None and run.raised):
            return True
        plan = run.plan if run is not None else None if self.held is None else self.held.plan
        impatient = isinstance(error, InProgress) and (plan is None or plan.wait is not None)
        # Whoever is told so wrongly is told by the world's own promises.
        too_late = isinstance(error, ResultUnavailable) and run is not None and run.plan.remember > 0
        return self.recorded or impatient or too_late or isinstance(error, FingerprintMismatch)


class Move(NamedTuple):
    """What comes of one choice for one caller in one world."""

    after: "Local"
    world: World
    reply: Any
    promise: str


class Local:
    """Where a caller stands; compared and hashed by identity."""

    __slots__ = ("_after", "_caller", "_given", "_parent", "crash", "end", "go", "losses", "number", "step")

    def __init__(self, number: int, parent: "Local | None", given: Any, caller: Caller | None) -> None:
        self.number = number
        self._parent = parent
        self._given = given
        """What it was told last: a reply, an error or None, and the time."""
        self._caller = caller
        """A coroutine that stands here; None: it has gone on."""
        self._after: dict[Any, Local] = {}
        self.step: Step | None = None
        """What it is about to do; None: it has finished or died."""
        self.end: End | None = None
        self.go: dict[World, Move | None] = {}
        """What comes of going on; None: it has to wait."""
        self.losses: dict[World, tuple[Move, Move, Move]] = {}
        """What comes of a command that is sent twice, applied without a reply, or lost on its way."""
        self.crash: dict[World, World] = {}
        """What comes of dying right after the step."""


class Troupe:
    """The callers of a scenario, numbered."""

    def __init__(self, scenario: Scenario, model: Callable[[], Model]) -> None:
        self._scenario = scenario
        self._model = model
        self._roots: dict[int, Local] = {}
        self.dead = Local(-1, None, None, None)
        """Where those are who died."""

    def root(self, number: int) -> Local:
        """Where that caller begins."""
        if number not in self._roots:
            given = (None, None, START)
            root = Local(number, None, given, None)
            self._roots[number] = root
            self._arrive(root, self._told(self._made(number), given))
        return self._roots[number]

    def after(self, local: Local, reply: Any, now: int, error: BaseException | None = None) -> Local:
        """Where the caller stands when it is told `reply`, or `error`, at that time."""
        key = (_frozen(reply), error is None, now)
        found = local._after.get(key)
        if found is None:
            caller = local._caller or self._again(local)
            local._caller = None
            given = (reply, error, now)
            found = local._after[key] = Local(local.number, local, given, None)
            self._arrive(found, self._told(caller, given))
        return found

    def _again(self, local: Local) -> Caller:
        """Another coroutine that stands there."""
        way: list[Local] = []
        at: Local | None = local
        while at is not None:
            way.append(at)
            at = at._parent
        caller = self._made(local.number)
        for place in reversed(way):
            step, _ = self._told(caller, place._given)
            if step is None or place.step is None or step.label != place.step.label:
                raise RuntimeError(
                    f"{caller.name} did not do the same when it was told the same:"
                    " a scenario may touch the world only through its caller"
                )
        return caller

    def _made(self, number: int) -> Caller:
        caller = Caller(number, self._model())
        coroutine: Any = self._scenario(caller)
        caller.coroutine = coroutine
        return caller

    @staticmethod
    def _told(caller: Caller, given: Any) -> tuple[Step | None, Any]:
        """Let the caller go on; its next step, or None and its end. The caller itself comes along."""
        reply, error, caller.model.now = given
        try:
            if error is not None:
                # Each is told an error of its own, as notes and tracebacks are added to it.
                return caller.context.run(caller.coroutine.throw, type(error)(*error.args)), caller
            return caller.context.run(caller.coroutine.send, reply), caller
        except StopIteration as stop:
            return None, _end(caller, stop.value, None)
        except Exception as failure:
            return None, _end(caller, None, failure)

    @staticmethod
    def _arrive(local: Local, told: tuple[Step | None, Any]) -> None:
        local.step, other = told
        if local.step is None:
            local.end = other
        else:
            local._caller = other

    def close(self) -> None:
        """Throw the coroutines away that have not finished."""
        places = list(self._roots.values())
        while places:
            place = places.pop()
            places += place._after.values()
            if place._caller is not None:
                _discard(place._caller)
                place._caller = None


def _discard(caller: Caller) -> None:
    while True:
        try:
            return caller.context.run(caller.coroutine.close)
        except RuntimeError:  # its `finally` asks for another step
            pass
        except Exception:  # nobody is told of what it raises now
            return None


def _end(caller: Caller, value: Any, error: BaseException | None) -> End:
    return End(value, error, caller.stored, caller.token, caller.run, caller.held)


def _frozen(reply: Any) -> Any:
    """`reply` as part of a key: 1, 1.0 and True are not the same to a scenario."""
    kind = type(reply)
    return reply if kind is str else (kind, reply) if kind in _PLAIN else repr(reply)


_PLAIN = (int, float, bool, bytes, type(None))


# ------------------------------------------------------------------------------------- scenarios of what ships


class _Run(Run):
    """A run whose attempt ids are its caller's."""

    __slots__ = ("_caller",)

    def __init__(self, caller: Caller, plan: Plan, fingerprint: bytes) -> None:
        self._caller = caller
        super().__init__(plan, _RID, fingerprint, dict)

    def new_attempt(self) -> bytes:
        return self._caller.new_attempt()


_codec = codec_for(lambda: None, None)
_RID = RecordId("explored", "k")


def _plan(caller: Caller, **options: Any) -> Plan:
    """What the function of the caller's process asked for."""
    defaults: dict[str, Any] = {"ttl": 86_400.0, "wait": None, "error_ttl": {}, "on_crash": "rerun"}
    plan = Plan(
        backend=caller.model,
        flights=caller.flights,
        codec=_codec,
        namespace="explored",
        lease=LEASE,
        keep_result=True,
        run_on_outage=False,
        hooks=(),
        stats={},
        **defaults | options,
    )
    near = plan.near = caller.near
    if near is None:
        plan.find = caller.model.finder()
    else:
        plan.find, plan.flights.nears[id(near)] = near.find, near
    return plan


async def call(
    caller: Caller,
    body: Callable[[], Awaitable[Any]] | None = None,
    *,
    on_crash: str | Callable[..., Any] = "rerun",
    wait: float | None = None,
    fingerprint: bytes = b"",
    error_ttl: Mapping[type[Exception], float] | None = None,
    ttl: float = 86_400.0,
    remember: float = 0.0,
) -> Any:
    """A call of a function decorated with `@idempotent`: what its wrapper does, with the explorer's driver.

    Args:
        caller: who calls.
        body: the function; None: one that takes effect, and returns what that gives.
        on_crash: as in `@idempotent`, and so are the durations, in virtual seconds.
        wait: None: no limit.
        fingerprint: of the arguments; b"": none.
        error_ttl: None: no errors are recorded.
        ttl: how long a result is replayed.
        remember: 0: past its ttl the key is free.
    """
    plan = _plan(caller, on_crash=on_crash, wait=wait, error_ttl=error_ttl or {}, ttl=ttl, remember=remember)
    run = caller.run = _Run(caller, plan, fingerprint)
    replay = await _at_hand(caller, run)
    if replay is None:
        replay = await _called(caller, run, body)
    caller.stored, caller.token = replay.stored, replay.token
    if replay.error is not None:
        raise replay.error
    return replay.value


async def _at_hand(caller: Caller, run: Run) -> flow.Replay | None:
    """The answer in the process's own memory, judged by what the store has at that moment; None: there is none."""
    plan, model = run.plan, caller.model
    if plan.find is None:
        return None
    seen = await model.look(run.rid)
    found = plan.find(run.rid.text, run.fingerprint)
    promise = model.judge_memory(seen, found, run.fingerprint)
    if found is not None or promise:
        told = "nothing" if found is None else f"token {found[0].token - START}"
        label = f"finds {told} in memory"
        await hand_over(Step(label, lambda facts, _rules: Applied(None, facts, promise), is_effect=True))
    return None if found is None else flow.at_hand(plan, run.rid.text, found)


async def _called(caller: Caller, run: Run, body: Callable[[], Awaitable[Any]] | None) -> flow.Replay:
    driver = caller.driver
    value = None
    try:
        replay = await flow.begin(driver, run)
        if replay is None:
            with Running(driver, run):
                value = await (body or caller.effect)()
    except GeneratorExit:
        raise
    except BaseException as error:
        await flow.abandon(driver, run, error)
        raise
    return await flow.settle(driver, run, value) if replay is None else replay


async def forget(caller: Caller) -> bool:
    """The `forget` of the function that `call` calls; whether there was a record.

    Raises:
        InProgress: it runs, and was left alone.
    """
    return await flow.forget(_Run(caller, _plan(caller), b""), force=False)


class _Held(Held):
    """A hold whose attempt ids are its caller's."""

    __slots__ = ("_caller",)

    def __init__(self, caller: Caller, plan: LockPlan) -> None:
        self._caller = caller
        driver: Any = caller.driver
        super().__init__(driver, plan, RecordId("", "explored", LOCKS), Asker(is_async=False))

    def new_attempt(self) -> bytes:
        return self._caller.new_attempt()


async def hold(caller: Caller, *, wait: float | None = None, renewals: int = 0) -> Any:
    """A `with Lock(...)` whose body takes effect: the lock's own flows, with the explorer's driver.

    Args:
        caller: who wants the lock.
        wait: as in `Lock`; where time runs out, None is returned.
        renewals: how often the heartbeat renews before the body begins.
    """
    plan = LockPlan(
        backend=caller.model,
        rooms=Rooms(),
        lease=LEASE,
        wait=wait,
        heartbeat=False,
        max_hold=None,
        on_lost="raise",
        hooks=(),
    )
    driver: Any = caller.driver
    held = _Held(caller, plan)
    caller.held = held
    error: BaseException | None = None
    value = None
    try:
        if not await _acquire.acquire(driver, held, wait):
            return None
    except GeneratorExit:
        raise
    except BaseException as failure:
        await _acquire.withdraw(driver, held, failure)
        raise
    for _ in range(renewals):
        await held.beat(driver)
    if not held.lost:
        value = await caller.enter(held.valid_until)
        await caller.leave()
    ending = await _acquire.Ending(held, error).run(driver)
    caller.stored, caller.token = held.over, held.token
    ending.tell()
    return value


def unavailable() -> BackendUnavailable:
    """What a caller is told when its command is lost."""
    return BackendUnavailable("injected")
