"""A storm of duplicate calls, as a value: who goes on when, who dies, whose reply is lost, when leases end.

A storm is played on a decorated function of the user's own, in virtual time, through the wrapper that ships. The
function's key, fingerprint, serializer, durations and policies are its own; its store is replaced, while the storm
lasts, by one in memory. Each duplicate is a process of its own, as far as that store can tell. It stops before each
command to the store and before the function's body, and the storm says who goes on. The body is one step: it runs on
the calling thread, or in the running event loop, and nobody else goes on meanwhile.
"""

import contextlib
import contextvars
import copy
import functools
import inspect
import math
import re
import sys
import textwrap
import types
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Literal, TypeVar

from idempotent import _config as config
from idempotent._drive import drive
from idempotent._record import Answer, Granted, Record, RecordId, State
from idempotent._run import Flights, Plan, Run
from idempotent._types import Outcome
from idempotent.backends.base import Backend
from idempotent.backends.local import LocalBackend
from idempotent.decorator import _async_call, _outcome, _refuse, _Spec
from idempotent.errors import BackendUnavailable, IdempotencyError, InProgress, UnprotectedWarning
from idempotent.testing.explorer import Violation

__all__ = ["Aftermath", "Arguments", "Ending", "NotIdempotent", "Storm"]

Arguments = tuple[Any, ...] | Mapping[str, Any]
"""A call's arguments: a tuple of the positional ones, a mapping of those by name, or a `unittest.mock.call(...)`."""
Choose = Callable[[list[str]], str | None]
"""Picks the next move of those possible; None: the storm ends here."""

R = TypeVar("R")

_START = 1_000_000
"""Virtual microseconds at which each storm begins."""
_LONGEST = 100
"""A storm that takes more moves for each caller never ends."""
_MOVE = re.compile(r"[1-9]\d?(:(dies|dies-after|lost|refused))?|lease")


class NotIdempotent(AssertionError):
    """A function under test does not keep its promise; the text says what happened, and what to do."""

    def __init__(self, text: str, storm: "Storm | None" = None, violation: Violation | None = None) -> None:
        super().__init__(text)
        self.storm = storm
        """The shortest storm that shows it; None: no storm is needed."""
        self.violation = violation
        """The history, as `explore` shows one: `diagram()` for terminals, `mermaid()` for documents."""


@dataclass(frozen=True)
class Ending:
    """How one caller ended."""

    caller: int
    how: Literal["returned", "raised", "died"]
    value: Any = None
    """What it returned."""
    error: Exception | None = None
    """What it raised."""
    replayed: bool = False
    """Whether it was answered from the record."""
    stored: bool = True
    """False: it returned a result that the store did not confirm."""

    def __str__(self) -> str:
        if self.how == "died":
            return f"caller {self.caller} died"
        if self.error is not None:
            text = "" if isinstance(self.error, IdempotencyError) else f": {str(self.error)[:120]}"
            return f"caller {self.caller} got {type(self.error).__name__}{text}"
        return f"caller {self.caller} got {_short(self.value)}{'' if self.stored else ' (not stored)'}"


@dataclass(frozen=True)
class Aftermath:
    """What a storm left."""

    endings: tuple[Ending, ...]
    """How the callers ended, by number."""
    runs: tuple[int, ...]
    """Whose call ran the function's body, in order."""
    faults: int
    """How many of the storm's moves were faults."""
    reruns: int
    """So many runs were begun over a dead or late one's, or without a claim, as the function's options ask."""
    moves: tuple[str, ...]
    """All the moves that were made."""
    lines: tuple[tuple[str, str, str], ...]
    """Who did what, and what came of it."""

    def diagram(self) -> str:
        """The history as text: a column for each caller."""
        return self.violation("").diagram()

    def violation(self, promise: str) -> Violation:
        """The history as one that breaks `promise`."""
        return Violation(promise, self.lines)


@dataclass(frozen=True)
class Storm:
    """Duplicates of one call, and what happens to them.

    Args:
        callers: how many call.
        moves: what happens, in order, as words separated by blanks. `2`: caller 2 takes its next step (a command to
            the store, or the function's body). `2:dies`: it dies before that step; `2:dies-after`: it takes the step
            and dies. `2:lost`: its command is applied, and the reply is lost; `2:refused`: its command is not applied,
            and it is told so. `lease`: time passes until all leases that stand are over. A move that cannot be made is
            passed over. When the moves are used up, the callers go on one after another; where all wait, time passes.

    Raises:
        ValueError: a word is no move, or there is no such caller.
    """

    callers: int = 2
    moves: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.callers <= 99:
            raise ValueError(f"a storm has 1 to 99 callers, not {self.callers}")
        for move in self.moves.split():
            if not _MOVE.fullmatch(move):
                raise ValueError(
                    f"{move!r} is no move; there are N, N:dies, N:dies-after, N:lost, N:refused (N is a caller) and lease"
                )
            if move != "lease" and int(move.partition(":")[0]) > self.callers:
                raise ValueError(f"the move {move!r} names a caller that there is not; there are {self.callers}")

    def play(self, function: Callable[..., Any], call: Arguments = ()) -> Aftermath:
        """Play it on a decorated function, and judge nothing. An async one runs on an event loop of its own.

        Raises TypeError for a function that is not decorated with `@idempotent`.
        """
        target = Target(function)
        return run(target.is_async, self._play(target, call))

    async def play_async(self, function: Callable[..., Any], call: Arguments = ()) -> Aftermath:
        """As `play`, on the running event loop."""
        return await self._play(Target(function), call)

    async def _play(self, target: "Target", call: Arguments) -> Aftermath:
        return await target.play(call, self.callers, follow(self.moves))

    def run(
        self,
        function: Callable[..., Any],
        call: Arguments,
        effects: Callable[[], Any],
        *,
        each: float = 1,
        reruns: bool | None = None,
    ) -> Aftermath:
        """Play it on a decorated function, and see that the effect happens once and all answers are one.

        Args:
            function: the decorated function, sync or async.
            call: its arguments.
            effects: a number that grows with each effect; for an async function it may be async.
            each: by how much one effect makes it grow.
            reruns: whether an effect may happen again when a call takes over a dead or late one's key. None: if
                `on_crash="rerun"` (or `on_outage="run"`, for runs without a claim) asks for it; False: never.

        Raises:
            NotIdempotent: it does not.
            TypeError: the function is not decorated with `@idempotent`.
        """
        __tracebackhide__ = True
        target = Target(function)
        return run(target.is_async, self._run(target, call, effects, each, reruns))

    async def run_async(
        self,
        function: Callable[..., Any],
        call: Arguments,
        effects: Callable[[], Any],
        *,
        each: float = 1,
        reruns: bool | None = None,
    ) -> Aftermath:
        """As `run`, on the running event loop."""
        __tracebackhide__ = True
        return await self._run(Target(function), call, effects, each, reruns)

    async def _run(
        self, target: "Target", call: Arguments, effects: Callable[[], Any], each: float, reruns: bool | None
    ) -> Aftermath:
        __tracebackhide__ = True
        before = await target.asked(effects)
        aftermath = await self._play(target, call)
        after = await target.asked(effects)
        wrong = judge(target, aftermath, (after - before) / each, reruns=reruns)
        if wrong:
            raise accused(target, call, self, aftermath, wrong, grown(before, after))
        return aftermath


def run(is_async: bool, steps: Coroutine[Any, Any, R]) -> R:
    """Take steps that never suspend, or those of an async function on an event loop of its own."""
    __tracebackhide__ = True
    if not is_async:
        return drive(steps)
    import asyncio

    if asyncio._get_running_loop() is not None:
        steps.close()
        raise RuntimeError("an event loop is running: await the twin of this whose name ends in _async")
    return asyncio.run(steps)


def follow(moves: str) -> Choose:
    """Make `moves` as far as they are possible, then go on with the first that is."""
    left = iter(moves.split())

    def choose(options: list[str]) -> str:
        return next((move for move in left if move in options), options[0])

    return choose


async def answered(probe: Callable[[], Any], name: str, *, is_async: bool) -> Any:
    """What the user's probe says. Raises TypeError for an async one of a sync function, which is called `name`."""
    answer = probe()
    if inspect.isawaitable(answer):
        if not is_async:
            getattr(answer, "close", lambda: None)()
            raise TypeError(f"{probe!r} is async, and {name} is not: nothing can await it")
        answer = await answer
    return answer


def given(call: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments. Raises TypeError for what is neither a tuple, a mapping nor a mock's call."""
    if type(call).__name__ == "_Call" and isinstance(call, tuple):  # of unittest.mock, which is slow to import
        return tuple(getattr(call, "args")), dict(getattr(call, "kwargs"))  # noqa: B009  a tuple to type checkers
    if isinstance(call, tuple):
        return call, {}
    if isinstance(call, Mapping):
        return (), dict(call)
    raise TypeError(
        f"a call is a tuple of arguments, a mapping of named ones, or unittest.mock.call(...), not {call!r};"
        f" one argument is ({call!r},)"
    )


def shown(name: str, call: Any) -> str:
    """The call as it is written."""
    args, kwargs = given(call)
    return f"{name}({', '.join([*map(_short, args), *(f'{key}={_short(value)}' for key, value in kwargs.items())])})"


def _short(value: Any, most: int = 120) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


# ------------------------------------------------------------------------------------------------------ the judgement


def grown(before: float, after: float) -> str:
    """What the effects did, in words."""
    return f"grew by {after - before:g}, from {before:g} to {after:g}"


def judge(target: "Target", aftermath: Aftermath, effects: float | None, *, reruns: bool | None) -> str:
    """Which promise is broken, in words; "": none. `effects`: how often the effect happened; None: not counted."""
    returned = [ending for ending in aftermath.endings if ending.how == "returned"]
    # Without keep_result, replays return None by design.
    agreed = [ending for ending in returned if ending.stored and (target.base.keep_result or not ending.replayed)]
    living = [ending for ending in aftermath.endings if ending.how != "died"]
    if effects is not None:
        allowed = 1 if reruns is False else 1 + aftermath.reruns
        if effects > allowed:
            times = "once" if allowed == 1 else f"{allowed} times"
            return f"the effect happened {effects:g} times, and should have happened {times}"
        # A run over a dead one's may find parts of the effect done, by calls that are idempotent themselves.
        if effects < allowed and effects != math.floor(effects) and (effects < 1 or not aftermath.reruns):
            return f"the effect happened {effects:g} times: a part of it is missing"
        if effects < 1 and returned:
            return "a caller got an answer, and the effect did not happen"
    for ending in agreed[1:]:
        first = agreed[0]
        if type(ending.value) is not type(first.value) or ending.value != first.value:
            return f"two callers got different answers: {_short(first.value)} and {_short(ending.value)}"
    if len(aftermath.moves) >= _LONGEST * len(aftermath.endings):
        return "a caller goes on for ever"
    for ending in living:
        error = ending.error
        if error is None or aftermath.faults or isinstance(error, InProgress) or target.records(error):
            continue
        return f"nothing went wrong around it, and caller {ending.caller} got {type(error).__name__}"
    return ""


def accused(
    target: "Target", call: Any, storm: Storm, aftermath: Aftermath, wrong: str, seen: str, note: str = ""
) -> NotIdempotent:
    """The failure, as somebody can understand it who was woken by it."""
    violation = aftermath.violation(wrong)
    what = shown(target.name, call)
    lines = [
        f"{what}: {wrong}.",
        "",
        f"  callers   {storm.callers} duplicates of this call, each in a process of its own; key {target.key_of(call)!r}",
        f"  effects   {seen}" + (f"; {note}" if note else ""),
        f"  answers   {'; '.join(map(str, aftermath.endings))}",
        "",
        *(f"  {row}" for row in violation.diagram().splitlines()),
        "",
        textwrap.fill(f"What to do: {_remedy(target, aftermath, wrong)}", 100, break_on_hyphens=False),
        f"Once more:  {storm!r}.play({target.name}, {call!r})",
    ]
    return NotIdempotent("\n".join(line.rstrip() for line in lines), storm, violation)


def _remedy(target: "Target", aftermath: Aftermath, wrong: str) -> str:
    plan = target.base
    moves = " ".join(aftermath.moves)
    ran = len(aftermath.runs)
    if "different answers" in wrong:
        return "see what the serializer's loads() reads: of one record it gave something else each time."
    if wrong.startswith("nothing went wrong"):
        return (
            "call with arguments for which it succeeds. An error releases the key, and the next duplicate runs again;"
            " one that is to stand is named in error_ttl."
        )
    if "did not happen" in wrong or "a part of it" in wrong:
        return "see that effects() counts what the function does, and that the function does it before it returns."
    if ran <= 1:
        return "the body ran once, so the effect is outside of it, or it happens more than once in one run."
    if any(
        isinstance(ending.error, Exception) and not isinstance(ending.error, IdempotencyError)
        for ending in aftermath.endings
    ):
        return (
            "the function raised after its effect. That releases the key, and the next duplicate runs: raise before"
            " the effect, or name the error in error_ttl."
        )
    if plan.run_on_outage and ("lost" in moves or "refused" in moves):
        return 'on_outage="run" runs it without a claim when the store is out; on_outage="raise" does not.'
    if plan.probe is not None:
        return (
            "the probe said NotApplied() although the effect had happened; let it look where the effect is seen first."
        )
    if plan.takeover and ("dies" in moves or "lease" in moves):
        return (
            'the first runner was gone, or late, between its effect and its record, and on_crash="rerun" runs it again.'
            ' Give on_crash="raise" or a probe; or make the effect itself refuse a second time, by a unique key or by'
            " current_call().downstream_key(...). If the second effect does no harm, leave reruns=False out."
        )
    return "two calls ran under different keys: see that key= gives the same text for the same call every time."


# --------------------------------------------------------------------------------------------------------- the stage


class _Step:
    """What a caller is about to do."""

    __slots__ = ("apply", "due", "ready", "what")

    def __init__(
        self,
        what: str,
        apply: Callable[[], Any] | None = None,
        *,
        ready: Callable[[], bool] | None = None,
        due: int = 0,
    ) -> None:
        self.what = what
        self.apply = apply
        """A command to the store; None: it is none."""
        self.ready = ready
        """Whether a wait is over; None: it is no wait."""
        self.due = due
        """Virtual microseconds at which a wait ends at the latest."""


_BEGIN = _Step("claim", lambda: None)
"""The first step of who has not begun: its call begins with it."""


@types.coroutine
def _hand_over(step: _Step) -> Generator[_Step, Any, Any]:
    return (yield step)


@types.coroutine
def _pass_on(yielded: Any) -> Generator[Any, Any, Any]:
    """What the user's function awaits is the event loop's to answer."""
    return (yield yielded)


class _Time:
    """Virtual time in microseconds; it stands still until it is pushed."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = _START

    def __call__(self) -> int:
        return self.now


def _sent(command: str) -> Any:
    async def send(self: "_Gate", *args: Any, **options: Any) -> Any:
        def apply() -> Any:
            return drive(getattr(self.store, command)(*args, **options))

        return await _hand_over(_Step(command, apply))

    return send


class _Gate(Backend):
    """The storm's store as one caller has it: each command stops, and is applied when the storm says so."""

    name = "storm"

    def __init__(self, store: LocalBackend, time: _Time) -> None:
        self.store = store
        self.time = time

    claim: Any = _sent("claim")
    renew: Any = _sent("renew")
    complete: Any = _sent("complete")
    fail: Any = _sent("fail")
    release: Any = _sent("release")
    read: Any = _sent("read")
    forget: Any = _sent("forget")
    purge: Any = _sent("purge")

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        due = self.time.now + math.ceil(timeout * 1e6)

        def ready() -> bool:
            row = self.store._store.find(rid.text)
            runs = row is not None and row.state is State.RUNNING and row.token == token
            return not runs or row is None or min(row.lease_until, due) <= self.time.now

        await _hand_over(_Step("wait", ready=ready, due=due))

    def scan(self, **filters: Any) -> AsyncIterator[Record]:
        return self.store.scan(**filters)


class _Driver:
    """Time is the storm's; leases are not renewed, as what ends them is the storm's to say."""

    def __init__(self, time: _Time) -> None:
        self._time = time

    def now(self) -> float:
        return self._time.now / 1e6

    async def sleep(self, seconds: float) -> None:
        await _hand_over(_Step("sleep"))

    def waiter(self) -> Any:
        raise NotImplementedError("callers of a storm are processes of their own")

    def beat(self, run: Run) -> None:
        pass

    async def still(self, run: Run) -> None:
        pass

    def drop(self, run: Run) -> None:
        pass


class _Staged(_Spec):
    """The decorated function as one caller of a storm has it."""

    caller: "_Caller"
    staged: Plan

    def plan(self) -> Plan:
        return self.staged

    def run(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], key: str, fingerprint: bytes) -> Run:
        run = super().run(plan, args, kwargs, key, fingerprint)
        run.attempt = b"caller%2d" % self.caller.number  # a storm played again is the same
        self.caller.run = run
        return run


class _Caller:
    """One of the callers."""

    __slots__ = ("context", "coroutine", "dead", "error", "number", "outcome", "run", "seen", "step")

    def __init__(self, number: int) -> None:
        self.number = number
        self.context = contextvars.copy_context()
        self.coroutine: Coroutine[Any, Any, Outcome[Any]]
        self.step: _Step | None = _BEGIN
        """What it is about to do; None: it has ended."""
        self.dead = False
        self.outcome: Outcome[Any] | None = None
        self.error: Exception | None = None
        self.run: Run | None = None
        self.seen: list[Any] = []
        """All that it has been told: its state follows from it."""


class Target:
    """A decorated function, made ready for storms.

    Raises TypeError for one that is not decorated with `@idempotent`, or uses `within=`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        inner: Any = getattr(function, "__func__", function) if inspect.ismethod(function) else function
        self.own: tuple[Any, ...] = (function.__self__,) if inspect.ismethod(function) else ()
        self.name = getattr(function, "__name__", None) or repr(function)
        found = getattr(inner, "__idempotent__", None)
        if found is None:
            raise TypeError(
                f"{self.name} is not decorated with @idempotent; assert_naturally_idempotent tests functions that are"
                " to be idempotent without it"
            )
        if found is not inner:
            raise TypeError(
                f"{self.name} is another decorator's wrapper; give the function as @idempotent left it,"
                f" {self.name}.__idempotent__"
            )
        self.spec, self.key = getattr(found, "__idempotent_spec__")  # noqa: B009  a plain function to type checkers
        if self.spec.within is not None:
            raise TypeError(
                f"{self.name} keeps its record in the transaction of its {self.spec.within!r}, and storms have none:"
                " call it twice on a database of your tests, and count the rows"
            )
        self.is_async: bool = self.spec.is_async
        staged = self._staged()
        staged.options = {**self.spec.options, "backend": LocalBackend()}
        staged._made = None
        self.base: Plan = _Spec.plan(staged)
        self.base.hooks = ()

    def _staged(self) -> _Staged:
        staged = object.__new__(_Staged)
        vars(staged).update(vars(self.spec))
        return staged

    def key_of(self, call: Any) -> str:
        """The key of a call, without its namespace."""
        args, kwargs = given(call)
        return self.key or str(self.spec.binder.identify((*self.own, *args), kwargs, None)[0])

    def fits(self, call: Any) -> None:
        """Raises TypeError for arguments that the function does not take."""
        args, kwargs = given(call)
        try:
            inspect.signature(self.spec.function).bind(*self.own, *args, **kwargs)
        except TypeError as error:
            method = "" if self.own or "." not in self.spec.function.__qualname__ else " (a method is given bound)"
            raise TypeError(f"{shown(self.name, call)} cannot be called: {error}{method}") from None

    def records(self, error: Exception) -> bool:
        """Whether `error_ttl` says that this error is an outcome."""
        return any(cls in self.base.error_ttl for cls in type(error).__mro__)

    async def asked(self, probe: Callable[[], Any]) -> Any:
        """What the user's probe says; an async function's may be async."""
        return await answered(probe, self.name, is_async=self.is_async)

    async def play(
        self, call: Any, callers: int, choose: Choose, store: "tuple[LocalBackend, _Time] | None" = None
    ) -> Aftermath:
        """Play a storm of `callers` duplicates of `call`, in a store of its own unless one is given."""
        stage = Stage(self, call, callers, choose, store or new_store())
        return await stage.play()


def new_store() -> "tuple[LocalBackend, _Time]":
    """An empty store, and its time."""
    time = _Time()
    return LocalBackend(clock=time), time


@contextlib.contextmanager
def _all_on(store: LocalBackend) -> Iterator[None]:
    """While it lasts, other decorated functions have their records in `store`, too."""
    settings, resolve = config.settings, config.resolve_backend
    config.settings = replace(settings)  # so that their plans are made anew
    config.resolve_backend = lambda given: store  # noqa: ARG005  its signature is that of what it stands for
    try:
        yield
    finally:
        config.settings, config.resolve_backend = settings, resolve


class Stage:
    """One storm under way."""

    def __init__(
        self, target: Target, call: Any, callers: int, choose: Choose, store: tuple[LocalBackend, _Time]
    ) -> None:
        self.target = target
        self.store, self.time = store
        self.runs: list[int] = []
        self.moves: list[str] = []
        self.lines: list[tuple[str, str, str]] = []
        self.faults = 0
        self.taken_over = 0
        self.stats: dict[Any, int] = {}
        self._choose = choose
        self._call = given(call)
        self._last = 0
        self.callers = [self._enter(number + 1) for number in range(callers)]

    def _enter(self, number: int) -> _Caller:
        target, caller = self.target, _Caller(number)
        staged = target._staged()
        staged.caller = caller
        staged.function = functools.partial(self._body, caller)
        plan = staged.staged = copy.copy(target.base)
        plan.backend, plan.flights, plan.stats = _Gate(self.store, self.time), Flights(), self.stats
        plan.find = None  # the callers are processes of their own
        args, kwargs = self._call
        call = _async_call(staged, target.key, _outcome, _Driver(self.time))
        caller.coroutine = call(*target.own, *args, **kwargs)
        return caller

    async def _body(self, caller: _Caller, *args: Any, **kwargs: Any) -> Any:
        await _hand_over(_Step("run"))
        self.runs.append(caller.number)
        value = self.target.spec.function(*args, **kwargs)
        if self.target.is_async:
            return await value
        if inspect.iscoroutine(value):
            _refuse(value)
        return value

    async def play(self) -> Aftermath:
        """Play it to the end."""
        quiet = warnings.catch_warnings() if self.target.base.run_on_outage else contextlib.nullcontext()
        with _all_on(self.store), quiet:
            if self.target.base.run_on_outage:
                warnings.simplefilter("ignore", UnprotectedWarning)
            try:
                while len(self.moves) < _LONGEST * len(self.callers):
                    options = self.options()
                    if not options:
                        if not self._let_time_pass():
                            break
                        continue
                    move = self._choose(options)
                    if move is None:
                        break
                    self.moves.append(move)
                    await self._make(move)
            finally:
                for caller in self.callers:
                    caller.coroutine.close()
        reruns = self.taken_over * self.target.base.takeover + self.stats.get("unprotected", 0)
        return Aftermath(
            tuple(map(_ending, self.callers)),
            tuple(self.runs),
            self.faults,
            reruns,
            tuple(self.moves),
            tuple(self.lines),
        )

    def options(self) -> list[str]:
        """The moves that can be made: first that the caller who moved last goes on, then the others, then faults."""
        steps: list[str] = []
        faults: list[str] = []
        callers = self.callers
        for caller in (
            *callers[self._last - 1 : self._last],
            *callers[: max(0, self._last - 1)],
            *callers[self._last :],
        ):
            step = caller.step
            if step is None or (step.ready is not None and not step.ready()):
                continue
            number = caller.number
            steps.append(f"{number}")
            if step.apply is not None:
                faults += [f"{number}:lost", f"{number}:refused", f"{number}:dies", f"{number}:dies-after"]
            elif step.what == "run":
                faults += [f"{number}:dies", f"{number}:dies-after"]
        if steps and self._leases():
            faults.append("lease")
        return steps + faults

    def _leases(self) -> list[int]:
        rows = self.store._store.open.values()
        return [row.lease_until for row in rows if row.state is State.RUNNING and row.lease_until > self.time.now]

    def _let_time_pass(self) -> bool:
        """All who are left wait: time goes on to when the first of them need not. False: nobody is left."""
        leases = self._leases()
        dues = [caller.step.due for caller in self.callers if caller.step is not None]
        if not dues:
            return False
        self._pass(min([*dues, *leases]))
        return True

    def _pass(self, until: int) -> None:
        over = any(lease <= until for lease in self._leases())
        self.time.now = max(until, self.time.now) + 1
        self.lines.append(("time", "the lease runs out" if over else "time passes", ""))

    async def _make(self, move: str) -> None:
        if move == "lease":
            self.faults += 1
            self._pass(max(self._leases()))
            return
        number, _, fault = move.partition(":")
        caller = self.callers[int(number) - 1]
        self._last = caller.number
        if caller.step is _BEGIN and fault != "dies":
            await self._advance(caller)
        step = caller.step
        if fault:
            self.faults += 1
        if step is None:  # the call gives no usable key
            return
        if fault == "dies":
            self._end(caller)
        elif fault == "refused":
            self._tell(caller, f"{step.what} (lost on its way)", "no answer")
            await self._advance(caller, error=BackendUnavailable(f"the storm: {step.what} was lost on its way"))
        elif fault == "lost":
            self._apply(step)
            self._tell(caller, f"{step.what} (applied, reply lost)", "no answer")
            await self._advance(caller, error=BackendUnavailable(f"the storm: the reply to {step.what} was lost"))
        elif step.apply is not None:
            reply = self._apply(step)
            self._tell(caller, step.what, _words(reply))
            if fault:
                self._end(caller)
            else:
                await self._advance(caller, reply)
        else:
            if step.what == "run":
                self._tell(caller, f"RUNS {self.target.name}", f"run {len(self.runs) + 1}")
            await self._advance(caller)
            if fault:
                self._end(caller)

    def _apply(self, step: _Step) -> Any:
        assert step.apply is not None
        reply = step.apply()
        self.taken_over += isinstance(reply, Granted) and reply.took_over  # whether its caller hears of it or not
        return reply

    def _end(self, caller: _Caller) -> None:
        if caller.step is not None:
            self._tell(caller, "dies", "")
            caller.dead, caller.step = True, None
            caller.coroutine.close()

    def _tell(self, caller: _Caller, what: str, came: str) -> None:
        self.lines.append((f"caller {caller.number}", what, came))

    async def _advance(self, caller: _Caller, reply: Any = None, error: BaseException | None = None) -> None:
        """Let `caller` go on to its next step, or to its end."""
        caller.seen.append(reply if error is None else str(error))
        cancelled = _cancellations()
        while True:
            try:
                if error is None:
                    out: Any = caller.context.run(caller.coroutine.send, reply)
                else:
                    out = caller.context.run(caller.coroutine.throw, error)
            except StopIteration as stop:
                caller.step, caller.outcome = None, stop.value
                self._tell(caller, f"returns {_short(stop.value.value, 40)}", "" if stop.value.stored else "not stored")
                break
            except Exception as failure:
                caller.step, caller.error = None, failure
                self._tell(caller, f"raises {type(failure).__name__}", "")
                break
            if isinstance(out, _Step):
                caller.step = out
                break
            reply = error = None
            try:
                reply = await _pass_on(out)
            except BaseException as failure:  # what the function awaited raises in the function
                error = failure
        if _cancellations() > cancelled:
            from asyncio import CancelledError

            raise CancelledError

    def state(self) -> Any:
        """What the rest of the storm depends on, if the function itself depends on nothing but its earlier runs."""
        callers = tuple(map(_standing, self.callers))
        store = self.store._store
        # An attempt that settles a dead run has an id that is never the same, and that nobody asks for again.
        rows = tuple(
            (row.state, row.token, row.attempt[:6] == b"caller" and row.attempt, *row[3:8])
            for row in (*store.open.values(), *store.settled.values())
        )
        return hash((callers, rows, self.time.now, tuple(self.runs)))


def _cancellations() -> int:
    """How often the running task was asked to stop."""
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return 0
    task = asyncio.current_task()
    return 0 if task is None else int(task.cancelling())


def _ending(caller: _Caller) -> Ending:
    outcome = caller.outcome
    if outcome is not None:
        return Ending(caller.number, "returned", outcome.value, None, outcome.replayed, outcome.stored)
    if caller.error is not None:
        return Ending(caller.number, "raised", error=caller.error)
    return Ending(caller.number, "died")


def _words(reply: Any) -> str:
    if isinstance(reply, Answer):
        return reply.value
    if isinstance(reply, Granted):
        return "granted (taken over)" if reply.took_over else "granted"
    return type(reply).__name__.lower() if isinstance(reply, tuple) else ""


def _standing(caller: _Caller) -> Any:
    """All of a caller that what comes depends on."""
    if caller.step is not None:
        return caller.step is _BEGIN, *map(_frozen, caller.seen)
    outcome = caller.outcome
    return (None if outcome is None else (outcome.token, outcome.stored)), type(caller.error)


def _frozen(value: Any) -> Any:
    return value if isinstance(value, (tuple, str, Answer, type(None))) else repr(value)


def register() -> None:
    """Let Hypothesis know how storms are made."""
    from hypothesis import strategies

    strategies.register_type_strategy(Storm, lambda _kind: _duplicates())


def _duplicates() -> Any:
    return import_module("idempotent.testing.strategies").duplicates()


if "hypothesis" in sys.modules:
    register()
