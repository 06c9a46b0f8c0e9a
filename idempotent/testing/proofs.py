"""Is this function safe to call twice? Assertions about functions of your own, decorated or not."""

import copy
import functools
import inspect
import itertools
import numbers
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from idempotent.decorator import _is_async
from idempotent.errors import FingerprintMismatch, IdempotencyError
from idempotent.testing.storms import (
    _BEGIN,
    Aftermath,
    Arguments,
    NotIdempotent,
    Stage,
    Storm,
    Target,
    _short,
    accused,
    answered,
    follow,
    given,
    grown,
    judge,
    new_store,
    run,
    shown,
)

__all__ = [
    "Proof",
    "assert_idempotent",
    "assert_idempotent_async",
    "assert_naturally_idempotent",
    "assert_naturally_idempotent_async",
]

Probe = Callable[[], Any]
Budgets = tuple[int, int, int, int]
"""Callers; how many of them may die; leases that may end early; replies that may be lost."""


@dataclass(frozen=True)
class Proof:
    """What was tried, and found good."""

    storms: int
    """So many storms were played to their end."""
    complete: bool
    """Whether these were all within the limits; False: the time was over."""
    seconds: float
    reran: int
    """In so many of them the body ran again over a dead or late run, as the function's options ask."""

    def __str__(self) -> str:
        extent = "all there are" if self.complete else "as many as there was time for"
        reran = (
            f"; in {self.reran:,} of them a dead or late run was run again, as its options ask" if self.reran else ""
        )
        return f"{self.storms:,} storms, {extent}, in {self.seconds:.1f} s{reran}"


def assert_idempotent(
    function: Callable[..., Any],
    calls: Iterable[Arguments],
    effects: Probe,
    *,
    callers: int = 3,
    crashes: int = 1,
    expiries: int = 1,
    lost_replies: int = 1,
    reruns: bool | None = None,
    reset: Probe | None = None,
    seconds: float = 5.0,
) -> Proof:
    """Prove that a decorated function's effect happens once, however its callers repeat, race, die and lose replies.

        def test_an_order_is_charged_once():
            assert_idempotent(charge, [("o-1", 5), ("o-2", 7)], effects=lambda: len(ledger))

    Each call is made by up to `callers` duplicates in every order of their steps (commands to the store, and the
    function's body), with every fault within the limits, in virtual time. The function's store is replaced meanwhile
    by one in memory; everything else is the function as it ships. Then the calls are made one after another, twice
    over: each must have its own effect, once.

    Args:
        function: the function as `@idempotent` left it, sync or async; a bound method is fine.
        calls: the arguments of each call: a tuple, a mapping by name, or a `unittest.mock.call(...)`. Each should be
            an operation of its own, and succeed.
        effects: a number that grows with each effect; or a state that can be compared and copied, which needs
            `reset`. For an async function it may be async, and `reset` too.
        callers: at the most, for each call.
        crashes: how many callers may die in a storm, at any step.
        expiries: how many leases may end while their runner lives; those of the dead end anyway.
        lost_replies: how many commands may be lost in a storm, before or after they were applied.
        reruns: whether the effect may happen again when a call takes over a dead or late runner's key. None: if the
            function's `on_crash="rerun"` asks for it (likewise `on_outage="run"`, for runs without a claim); False:
            never, for effects that must not happen twice even then.
        reset: called before each storm: puts the world back to how it was, where one run would be in the next one's
            way. None: nothing is put back.
        seconds: when to stop, at the latest.

    Returns:
        What was tried.

    Raises:
        NotIdempotent: an AssertionError with the shortest storm that shows it, as a diagram, and with what to do.
        TypeError: the function is not decorated, there is no call, or `effects` gives neither a number nor has `reset`.
        RuntimeError: the function is async, and an event loop is running: there is `assert_idempotent_async`.
    """
    __tracebackhide__ = True
    target = Target(function)
    limits = callers, crashes, expiries, lost_replies
    return run(target.is_async, _prove(target, calls, effects, limits, reruns, reset, seconds))


async def assert_idempotent_async(
    function: Callable[..., Any],
    calls: Iterable[Arguments],
    effects: Probe,
    *,
    callers: int = 3,
    crashes: int = 1,
    expiries: int = 1,
    lost_replies: int = 1,
    reruns: bool | None = None,
    reset: Probe | None = None,
    seconds: float = 5.0,
) -> Proof:
    """As `assert_idempotent`, on the running event loop: for tests that are async themselves."""
    __tracebackhide__ = True
    limits = callers, crashes, expiries, lost_replies
    return await _prove(Target(function), calls, effects, limits, reruns, reset, seconds)


async def _prove(
    target: Target,
    calls: Iterable[Arguments],
    effects: Probe,
    limits: Budgets,
    reruns: bool | None,
    reset: Probe | None,
    seconds: float,
) -> Proof:
    __tracebackhide__ = True
    asked = list(calls)
    if not asked:
        raise TypeError("there must be at least one call: calls=[(argument, ...), ...]")
    for call in asked:
        target.fits(call)
    if limits[0] < 2 or min(limits) < 0:
        raise ValueError(f"there are at least two callers, and no fewer than no faults; not {limits}")
    began = time.monotonic()
    world = _World(target, effects, reset)
    await _each_has_its_own(world, asked)
    trial = _Trial(world, reruns)
    for number, call in enumerate(asked, 1):
        await trial.of(call, limits, began + seconds * number / len(asked))
    return Proof(trial.storms, trial.complete, time.monotonic() - began, trial.reran)


class _World:
    """What the function acts upon, seen through the user's probe."""

    def __init__(self, target: Target, effects: Probe, reset: Probe | None) -> None:
        self.target = target
        self._effects = effects
        self._reset = reset

    async def reset(self) -> None:
        if self._reset is not None:
            await self.target.asked(self._reset)

    async def look(self) -> Any:
        """The probe's answer; a state is copied, as what it was taken from goes on changing."""
        seen = await self.target.asked(self._effects)
        if _counts(seen):
            return seen if isinstance(seen, (int, float)) else float(seen)
        if self._reset is None:
            raise TypeError(
                f"effects() must give a number that grows with each effect, not {_short(seen)}; to compare states"
                " instead, give reset=, which puts the world back"
            )
        return _snapshot(seen, "effects")


def _counts(seen: Any) -> bool:
    """Whether it is a number: those of `decimal`, `fractions` and numpy are, too."""
    return isinstance(seen, numbers.Number) and not isinstance(seen, (bool, complex))


def _same(one: Any, other: Any, name: str) -> bool:
    """Whether two of the probe's answers are equal. Raises TypeError for those whose `==` is neither yes nor no."""
    try:
        return bool(one == other)
    except Exception as error:
        raise TypeError(
            f"{name}() gives {_short(one)}, and == of two such is neither true nor false ({error}); give plain values:"
            " numbers, lists, dicts"
        ) from error


def _snapshot(seen: Any, name: str) -> Any:
    try:
        return copy.deepcopy(seen)
    except Exception as error:
        raise TypeError(
            f"{name}() gives {_short(seen)}, which cannot be copied ({error}); give plain values: numbers, lists, dicts"
        ) from error


async def _each_has_its_own(world: _World, calls: list[Arguments]) -> None:
    """One after another on one store, twice over: each call has its own effect, once."""
    __tracebackhide__ = True
    target, store = world.target, new_store()
    await world.reset()
    owners: dict[str, Arguments] = {}
    for again in (False, True):
        for call in calls:
            what, key = shown(target.name, call), target.key_of(call)
            is_new = not again and key not in owners
            before = await world.look()
            aftermath = await target.play(call, 1, follow(""), store)
            after = await world.look()
            (ending,) = aftermath.endings
            other = owners.setdefault(key, call)
            if isinstance(ending.error, FingerprintMismatch) or (not is_new and not again and other != call):
                raise NotIdempotent(
                    f"{what} has the key of {shown(target.name, other)}, {key!r}: it would be"
                    + (" refused, and never have an effect." if ending.error else " answered by that call's result.")
                    + "\n\nWhat to do: let key= name all that makes an operation another one, or leave out one of the calls."
                )
            if ending.error is not None and not (target.records(ending.error) and not _ours(ending.error)):
                raise NotIdempotent(
                    f"{what} raised {type(ending.error).__name__} when it was called"
                    f" {'again' if again else 'once'}, without any fault: {ending.error}"
                    "\n\nWhat to do: give calls that succeed (and reset=, if what one run leaves is in the next one's"
                    " way), or name the error in error_ttl."
                ) from ending.error
            same = _same(before, after, "effects")
            if is_new and same:
                raise NotIdempotent(
                    f"effects() was {_short(before)} before and after {what}: it does not see what the function does, so"
                    " nothing can be proved by it.\n\nWhat to do: give a probe that counts the effect."
                )
            if not is_new and not same:
                raise NotIdempotent(
                    f"{what} had its effect again when it was called again, one call after the other: effects() was"
                    f" {_short(before)} before and {_short(after)} after."
                    f"\n  runs of the body for it: {len(aftermath.runs)}; key {key!r}"
                    "\n\nWhat to do: "
                    + (
                        "see that key= gives the same text for the same call every time."
                        if aftermath.runs
                        else "move the effect into the function's body; it happens outside of it."
                    )
                )


def _ours(error: Exception) -> bool:
    return isinstance(error, IdempotencyError)


class _Trial:
    """Storms of one function, and what came of them."""

    def __init__(self, world: _World, reruns: bool | None) -> None:
        self.world = world
        self.target = world.target
        self.reruns = reruns
        self.storms = 0
        self.reran = 0
        self.complete = True
        self._one: Any = None
        """What one call alone adds to a number, or makes of a state."""
        self._counts = True

    async def of(self, call: Arguments, limits: Budgets, deadline: float) -> None:
        """Every storm of `call`, those with fewer callers and faults first, until the deadline."""
        __tracebackhide__ = True
        await self._alone(call)
        for budgets in _growing(limits):
            search = _Search(self.target, call, budgets)
            while search.prefix is not None:
                if time.monotonic() > deadline:
                    self.complete = False
                    return
                seen = await self._storm(search.play)
                if search.pruned:
                    search.next()
                    continue
                aftermath, wrong, *_ = seen
                if wrong:
                    raise await self._shortest(call, Storm(budgets[0], " ".join(aftermath.moves)), seen)
                self.storms += 1
                self.reran += len(aftermath.runs) > 1
                search.next()

    async def _alone(self, call: Arguments) -> None:
        await self.world.reset()
        before = await self.world.look()
        aftermath = await self.target.play(call, 1, follow(""))
        after = await self.world.look()
        self._counts = _counts(after)
        self._one = after - before if self._counts else after
        error = aftermath.endings[0].error
        if _same(before, after, "effects") or (error is not None and not self.target.records(error)):
            came = "had no effect" if error is None else f"raised {type(error).__name__} ({error})"
            raise NotIdempotent(
                f"{shown(self.target.name, call)} {came} when it was called anew, with an empty store: what the call"
                f" before it left is in its way{'' if error is None else ', or it fails at times'}.\n\nWhat to do: give a"
                " reset= that puts the world back."
            ) from error

    async def _storm(self, play: Callable[[], Awaitable[Aftermath]]) -> tuple[Aftermath, str, Any, Any]:
        """Play one; what it left, the promise that it broke, and the effects before and after."""
        await self.world.reset()
        before = await self.world.look()
        aftermath = await play()
        after = await self.world.look()
        if self._counts:
            wrong = judge(self.target, aftermath, (after - before) / self._one, reruns=self.reruns)
        else:
            wrong = judge(self.target, aftermath, None, reruns=self.reruns)
            strict = self.reruns is False or not aftermath.reruns
            if strict and not wrong and aftermath.runs and not _same(self._one, after, "effects"):
                wrong = "the storm left something else than one call alone"
        return aftermath, wrong, before, after

    async def _shortest(self, call: Arguments, storm: Storm, seen: tuple[Aftermath, str, Any, Any]) -> NotIdempotent:
        """The storm, with moves left out and put earlier for as long as that makes it shorter."""
        fewer: Storm | None = storm
        while fewer is not None:
            storm, fewer = fewer, None
            for moves in _shorter(storm.moves.split()):
                other = Storm(storm.callers, " ".join(moves))
                found = await self._storm(functools.partial(other._play, self.target, call))
                lines, most = len(found[0].lines), len(seen[0].lines)
                if found[1] and (lines < most or (lines == most and len(moves) < len(storm.moves.split()))):
                    fewer, seen = other, found
                    break
        aftermath, wrong, before, after = seen
        told = grown(before, after) if self._counts else f"{_short(before)} before and {_short(after)} after"
        note = f"one call alone adds {self._one:g}" if self._counts else f"one call alone leaves {_short(self._one)}"
        return accused(self.target, call, storm, aftermath, wrong, told, note)


def _growing(limits: Budgets) -> Iterator[Budgets]:
    """The spaces within the limits: no fault, each alone, and all together; two callers before three."""
    most, *faults = limits
    spaces = itertools.product(*(sorted({0, limit}) for limit in faults))
    for crashes, expiries, losses in sorted(
        spaces, key=lambda space: (sum(map(bool, space)), [-each for each in space])
    ):
        yield 2, crashes, expiries, losses
    for callers in range(3, most + 1):
        yield callers, 0, 0, 0
        if any(faults):
            yield callers, limits[1], limits[2], limits[3]


def _shorter(moves: list[str]) -> Iterator[list[str]]:
    """The moves without one of them, from the end; then with two neighbours in the other order."""
    for at in reversed(range(len(moves))):
        yield moves[:at] + moves[at + 1 :]
    for at in range(len(moves) - 1):
        yield [*moves[:at], moves[at + 1], moves[at], *moves[at + 2 :]]


class _Search:
    """All storms within a budget, depth first, leaving out what leads to a state that was met before."""

    def __init__(self, target: Target, call: Arguments, budgets: Budgets) -> None:
        self._target = target
        self._call = call
        self._callers, *self._limits = budgets
        self._seen: set[Any] = set()
        self.prefix: list[int] | None = []
        """Which move to choose at each point; None: all were."""
        self.pruned = False

    async def play(self) -> Aftermath:
        self.pruned = False
        self._taken: list[int] = []
        self._offered: list[int] = []
        self._left = list(self._limits)
        self._stage = Stage(self._target, self._call, self._callers, self._choose, new_store())
        return await self._stage.play()

    def _choose(self, options: list[str]) -> str | None:
        options = [option for option in options if self._worth(option)]
        at = len(self._taken)
        prefix = self.prefix or []
        if at >= len(prefix) and len(options) > 1:
            state = self._stage.state(), tuple(self._left)
            if state in self._seen:
                self.pruned = True
                return None
            self._seen.add(state)
        choice = prefix[at] if at < len(prefix) else 0
        self._taken.append(choice)
        self._offered.append(len(options))
        move = options[choice]
        budget = _parsed(move)[2]
        if budget is not None:
            self._left[budget] -= 1
        return move

    def _worth(self, move: str) -> bool:
        """Whether it is within the budget, and leads where no other move leads."""
        number, fault, budget = _parsed(move)
        if budget is not None and not self._left[budget]:
            return False
        if not number:
            return True
        callers = self._stage.callers
        caller = callers[number - 1]
        if fault == "dies-after":
            return caller.step is not None and caller.step.what in ("complete", "fail", "release")
        # Who has done nothing yet is like any other who has not.
        fresh = caller.step is _BEGIN
        return not (fresh and (fault == "dies" or any(other.step is _BEGIN for other in callers[: number - 1])))

    def next(self) -> None:
        """Go on to the next storm in order."""
        taken, offered = self._taken, self._offered
        while taken and taken[-1] + 1 >= offered[-1]:
            taken.pop()
            offered.pop()
        self.prefix = [*taken[:-1], taken[-1] + 1] if taken else None


@functools.cache
def _parsed(move: str) -> tuple[int, str, int | None]:
    """A move's caller (0: nobody), its fault, and which budget that is of."""
    number, _, fault = move.partition(":")
    budget = {"dies": 0, "dies-after": 0, "lease": 1, "lost": 2, "refused": 2}.get(fault or move)
    return 0 if move == "lease" else int(number), fault, budget


# --------------------------------------------------------------------------------------- functions without decorator

Errors = type[Exception] | tuple[type[Exception], ...]


def assert_naturally_idempotent(
    function: Callable[..., Any],
    calls: Iterable[Arguments],
    state: Probe,
    *,
    reset: Probe | None = None,
    late: bool = False,
    refuses: Errors = (),
) -> None:
    """Prove that an undecorated function leaves, called twice, what it leaves when it is called once.

        def test_setting_an_address_twice_is_setting_it_once():
            assert_naturally_idempotent(set_address, [("ada", "Rome")], state=lambda: dict(addresses))

    A SET, an UPSERT and an "add it unless it is there" pass; an INCREMENT and an APPEND do not.

    Args:
        function: the function, sync or async; a bound method is fine.
        calls: the arguments of each call: a tuple, a mapping by name, or a `unittest.mock.call(...)`.
        state: a snapshot of all that the function may change, to be compared by `==`: a dict, rows of a table. It is
            copied. For an async function it may be async, and `reset` too.
        reset: called before each trial: puts the world back. None: each trial goes on from what the last one left.
        late: whether a duplicate may come late, after another of the calls: A, B, and A again. A SET does not stand
            that, as it brings back an old value; an UPSERT with a version, and a conditional add, do.
        refuses: errors by which a repeated call may be refused, such as that of a unique constraint.

    Raises:
        NotIdempotent: an AssertionError with the call, and the states before, between and after.
        TypeError: the function is decorated with `@idempotent`, there is no call, or the state cannot be copied.
        RuntimeError: the function is async, and an event loop is running: there is the twin that ends in `_async`.
    """
    __tracebackhide__ = True
    trials = _Natural(function, state, reset, late=late, refuses=refuses)
    run(trials.is_async, trials.of(calls))


async def assert_naturally_idempotent_async(
    function: Callable[..., Any],
    calls: Iterable[Arguments],
    state: Probe,
    *,
    reset: Probe | None = None,
    late: bool = False,
    refuses: Errors = (),
) -> None:
    """As `assert_naturally_idempotent`, on the running event loop: for tests that are async themselves."""
    __tracebackhide__ = True
    await _Natural(function, state, reset, late=late, refuses=refuses).of(calls)


class _Natural:
    """Trials of an undecorated function."""

    def __init__(
        self, function: Callable[..., Any], state: Probe, reset: Probe | None, *, late: bool, refuses: Errors
    ) -> None:
        self.name = getattr(function, "__name__", None) or repr(function)
        if hasattr(function, "__idempotent__"):
            raise TypeError(
                f"{self.name} is decorated with @idempotent, so its duplicates never reach it: assert_idempotent tests it"
            )
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{self.name} is a generator function, and calling it runs nothing: give a function that goes through it"
            )
        self.is_async = _is_async(function)
        self._function = function
        self._state = state
        self._reset = reset
        self._late = late
        self._refuses = refuses

    async def of(self, calls: Iterable[Arguments]) -> None:
        __tracebackhide__ = True
        asked = list(calls)
        if not asked:
            raise TypeError("there must be at least one call: calls=[(argument, ...), ...]")
        changes = 0
        for call in asked:
            changes += await self._trial(call)
        if self._late:
            for first, second in itertools.permutations(asked, 2):
                changes += await self._trial(first, second)
        if not changes:
            raise NotIdempotent(
                f"nothing was proved: none of the calls of {self.name} changed state(), which is"
                f" {_short(await self._look())}.\n\nWhat to do: give a state that shows what the function changes, calls"
                " that change it, and a reset= if it is as they leave it from the beginning."
            )

    async def _look(self) -> Any:
        return _snapshot(await answered(self._state, self.name, is_async=self.is_async), "state")

    async def _trial(self, call: Arguments, between: Arguments | None = None) -> bool:
        """One call, perhaps another one, and the first once more; whether anything changed at all."""
        __tracebackhide__ = True
        if self._reset is not None:
            await answered(self._reset, self.name, is_async=self.is_async)
        what = shown(self.name, call)
        told = [("state()", start := await self._look()), await self._called(call)]
        if between is not None:
            told.append(await self._called(between))
        told.append(("state()", once := await self._look()))
        try:
            told.append(await self._called(call))
        except self._refuses as error:
            told.append((what, error))
        except Exception as error:
            raise NotIdempotent(
                f"{what} cannot be called twice: the second call raised {type(error).__name__}: {error}\n\n"
                f"{_told([*told, (what, error)])}\n\n"
                "What to do: make the function answer a repeated call as it did the first one; if the caller can live with"
                f" that error, refuses={type(error).__name__} lets it pass."
            ) from error
        told.append(("state()", twice := await self._look()))
        if not _same(once, twice, "state"):
            how = "twice" if between is None else f"once more, after {shown(self.name, between)}"
            raise NotIdempotent(
                f"{self.name} is not idempotent by itself: {what}, called {how}, leaves something else"
                f" than called once.\n\n{_told(told)}{_difference(once, twice)}\n\n"
                + (
                    "What to do: set a value instead of adding to it; add only what is not there yet (a unique key, an"
                    " UPSERT); or decorate it with @idempotent(key=...)."
                    if between is None
                    else "What to do: let a late duplicate lose: by a version or a time that must be newer, or a unique key"
                    " for each operation; or decorate it with @idempotent(key=...)."
                )
            )
        return not _same(start, once, "state")

    async def _called(self, call: Arguments) -> tuple[str, Any]:
        args, kwargs = given(call)
        value = self._function(*args, **kwargs)
        if self.is_async:
            value = await value
        return shown(self.name, call), value


def _told(steps: list[tuple[str, Any]]) -> str:
    width = max(len(what) for what, _ in steps)
    rows = []
    for what, value in steps:
        came = f"raises {value!r}" if isinstance(value, Exception) else _short(value, 200)
        rows.append(f"  {what.ljust(width)}  {'   ' if what == 'state()' else '-> '}{came}")
    return "\n".join(rows)


def _difference(once: Any, twice: Any) -> str:
    """The items of two dicts, or lists, that differ, where they are too long to be shown whole."""
    if all(isinstance(state, (list, tuple)) for state in (once, twice)):
        once, twice = dict(enumerate(once)), dict(enumerate(twice))
    if not (isinstance(once, dict) and isinstance(twice, dict)) or max(map(len, map(repr, (once, twice)))) <= 200:
        return ""
    keys = [key for key in {**once, **twice} if key not in once or key not in twice or once[key] != twice[key]]
    rows = [f"  {key!r}: {_item(once, key)}, then {_item(twice, key)}" for key in keys[:5]]
    return "\n\n  different:\n" + "\n".join(rows) + ("\n  ..." if len(keys) > 5 else "")


def _item(state: dict[Any, Any], key: Any) -> str:
    return _short(state[key]) if key in state else "absent"
