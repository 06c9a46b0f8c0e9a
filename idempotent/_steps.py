"""Steps: parts of a call that a rerun of it shall not do again. The flows, once, as `_flow` has those of whole calls.

A step is a record of its own, in a key space of its own:

    the call's record        namespace, key
    the journal              the call's id, ""               made before the first step; its token is the epoch
    the steps                the call's id, "epoch:place"    place: how many steps were done before this one

**Places.** A step is known by its place, and its record says, as the fingerprint, which name and arguments it was
recorded for. So a run that takes another way than the one recorded is told before it does anything there. A step that
raised gives its place back: whoever tries it again gets that one, where the run that succeeded at once would be; another
step gets the first that is free, so that a rerun which asks for the one that raised is told.

**Exclusion.** The call's own claim is what keeps two runs apart; a step's claim only says who wrote it. Another's step
that is still running belongs to a run before this one, or to one after it. The call's claim tells: if it still stands
(`renew`), the other's is taken away; if it does not, this run is over. So a run that was overtaken can record a step
only where its successor has not yet come, and there it is right to: the step was done.

**Its end.** A call that raises while steps of it still run (`asyncio.gather` leaves the others running) keeps its claim
until they have ended, as a rerun would do the same again beside them. A step that had not begun by then is refused.

**At the same time.** Steps of one run may be asked for by several threads or tasks. Their places are given out one by
one; the journal is made by one of them while the others wait, as each would take the other's for a dead run's. A step
inside a step is refused: the run that replays the outer one would not ask for the inner one, and so count differently.

**Epoch.** `forget` drops the journal, in one command. The steps that are left then belong to no epoch any more.
"""

import contextlib
import copy
import inspect
import math
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar, Token
from hashlib import blake2b
from types import TracebackType
from typing import Any

from idempotent import _flow as flow
from idempotent import canonical
from idempotent._flow import Replay
from idempotent._record import FINGERPRINT_BYTES, STEPS, Answer, Granted, Mismatched, RecordId, Settled
from idempotent._run import Call, Driver, Run
from idempotent.errors import (
    BackendError,
    BackendUnavailable,
    CallError,
    LeaseLost,
    ResultUnavailable,
    StepMismatch,
    UnprotectedWarning,
)
from idempotent.serializers import Codec, codec_for

__all__ = ["NOTHING", "Step", "awaited_nowhere", "begin", "drop", "is_async", "settle"]

NOTHING: Any = object()
"""The value of a step that has none yet."""

_HALF = FINGERPRINT_BYTES // 2


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a step of this function is awaited."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  an object whose __call__ is async is async
    )


def awaited_nowhere(step: "Step", found: Any) -> Any:
    """What the function of a sync step gave. Raises TypeError for a coroutine: nobody here could await it."""
    if inspect.iscoroutine(found) and inspect.getcoroutinestate(found) == inspect.CORO_CREATED:
        found.close()
        raise TypeError(
            f"the step {step.name!r} gave {found.__qualname__}, an async function's, which a sync function cannot"
            " await: it has not run, and nothing was recorded"
        )
    return found


_places = threading.Lock()
"""Held while places are given out; never while anything is waited for."""


class _Journal:
    """The places of one run's steps."""

    __slots__ = ("_free", "_next", "epoch", "making")

    def __init__(self) -> None:
        self.epoch = 0
        """0: not known yet."""
        self.making = threading.Lock()
        """Held by whoever finds the epoch; tried, and never waited for."""
        self._free: dict[int, bytes] = {}
        """The places that were given back, and the fingerprint of the step that had each."""
        self._next = 0

    def take(self, fingerprint: bytes) -> int:
        """The place of the next step: its own from before, else the first that is free."""
        with _places:
            if self._free:
                own = [place for place, freed in self._free.items() if freed == fingerprint]
                place = min(own or self._free)
                del self._free[place]
                return place
            self._next += 1
            return self._next - 1

    def give_back(self, place: int, fingerprint: bytes) -> None:
        """Nothing was done there, by the step of that fingerprint."""
        with _places:
            self._free[place] = fingerprint


class Step:
    """One step of a run that is asked for. Raises what makes it impossible, before it takes a place."""

    __slots__ = ("_mark", "around", "call", "codec", "fingerprint", "name", "over", "parent", "place", "run")
    call: Call
    name: str
    over: bool
    """Its function has ended."""

    def __init__(
        self, call: Call, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        run = call._run
        if not isinstance(name, str) or not name:
            raise TypeError(f"a step's name must be text, and not empty; not {name!r}")
        if run.valid_until == math.inf:
            raise CallError(
                "a record within a transaction has no steps: they would be rolled back with it, when they are needed"
            )
        _in_time(call, name)
        if run.token is None and not run.unprotected:
            raise CallError(f"a probe has no steps ({name!r}): it looks, and runs nothing")
        around = _inside.get()
        while around is not None and around.over:  # those that are over are left out: no endless chain of tasks
            around = around.around
        self.around: Step | None = around
        """The step inside which this one is asked for, of an outer call; None: there is none."""
        while around is not None:
            if around.call is call and not around.over:
                raise CallError(
                    f"the step {name!r} is asked for inside the step {around.name!r}, and a run that gets that one from its"
                    " record would not ask for it; call its function there, or make both steps of the call itself"
                )
            while around.around is not None and around.around.over:
                around.around = around.around.around
            around = around.around
        digest = blake2b(_canonical(args, kwargs, name), digest_size=_HALF).digest()
        self.fingerprint = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=_HALF).digest() + digest
        self.codec = _codec_of(function, run.plan.serializer)
        self.codec.ready()
        self.call, self.name, self.parent = call, name, run
        with _places:
            if call._journal is None:
                call._journal = _Journal()
        self.place: int = call._journal.take(self.fingerprint)
        self.run: Run | None = None
        """As which it is claimed; None: it is not claimed yet."""
        self.over = False

    @contextlib.contextmanager
    def under_way(self) -> Iterator[None]:
        """From before its claim until its outcome is recorded: the call's key is not released meanwhile."""
        with _places:
            self.parent.steps += 1
        try:
            _in_time(self.call, self.name)
            yield
        finally:
            with _places:
                self.parent.steps -= 1

    def __enter__(self) -> None:
        """Around the function: no step of this call may be asked for in it."""
        self._mark: Token[Step | None] = _inside.set(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over = True
        try:
            _inside.reset(self._mark)
        except ValueError:
            pass  # a coroutine that was thrown away is closed in another context than it ran in
        del self._mark


def _in_time(call: Call, name: str) -> None:
    run = call._run
    # A request's call goes on behind its answer, in background tasks, when its claim has ended.
    if call._over or (run.token is not None and run.beating is None):
        raise CallError(f"the step {name!r} comes too late: the call it belongs to has ended")


_inside: ContextVar[Step | None] = ContextVar("idempotent_step", default=None)


def _after_fork() -> None:
    global _places
    _places = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _canonical(args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> bytes:
    return canonical.encode([list(args), kwargs], f"an argument of the step {name!r}")


_codecs: "weakref.WeakKeyDictionary[Any, tuple[Any, Codec]]" = weakref.WeakKeyDictionary()


def _codec_of(function: Callable[..., Any], serializer: Any) -> Codec:
    """The function's codec; made once for each, as looking its annotation up takes a while."""
    found: tuple[Any, Codec] | None = None
    try:
        found = _codecs.get(function)
        if found is None or found[0] is not serializer:
            found = _codecs[function] = serializer, codec_for(function, serializer)
    except TypeError:  # neither hashed nor referred to weakly
        if found is None:
            return codec_for(function, serializer)
    return found[1]


def _sub_run(parent: Run, key: str, fingerprint: bytes, codec: Codec) -> Run:
    """A run of the parent's on a record beside it. Silent: events and counts are about calls."""
    plan = copy.copy(parent.plan)
    plan.codec, plan.keep_result, plan.hooks, plan.stats = codec, True, (), {}
    return Run(plan, RecordId(parent.rid.text, key, STEPS), fingerprint, parent.arguments)


async def begin(driver: Driver, step: Step) -> Replay | None:
    """What an earlier run recorded of this step; None: it is to run now.

    Raises:
        StepMismatch, LeaseLost, ResultUnavailable, BackendUnavailable: as Call.step says.
    """
    step.call.check()
    parent, journal = step.parent, step.call._journal
    if parent.unprotected:
        return None
    try:
        while not journal.epoch:
            if journal.making.acquire(blocking=False):
                try:
                    journal.epoch = journal.epoch or await _epoch(driver, parent, step.codec)
                finally:
                    journal.making.release()
            else:
                await driver.sleep(0.002)
        run = _sub_run(parent, f"{journal.epoch}:{step.place}", step.fingerprint, step.codec)
        reply = await _claim(parent, run)
    except BackendUnavailable as error:
        parent.report("backend_error", error=error)
        if not parent.plan.run_on_outage:
            raise
        parent.report("unprotected", error=error)
        warnings.warn(
            f"the step {step.name!r} of {parent.plan.namespace} runs without a record, as its backend is out and"
            f" on_outage is 'run': {error}",
            UnprotectedWarning,
            stacklevel=2,
        )
        return None
    if isinstance(reply, Granted):
        step.run = run
        _in_time(step.call, step.name)  # it ended while this was asked
        return None
    if isinstance(reply, Mismatched):
        same = reply.stored[:_HALF] == step.fingerprint[:_HALF]
        raise StepMismatch(parent.rid.digest, step=step.name, place=step.place, same_name=same)
    return flow.replay(run, reply)


async def _epoch(driver: Driver, parent: Run, codec: Codec) -> int:
    """The token of the call's journal, which is made if there is none."""
    run = _sub_run(parent, "", b"", codec)
    reply = await _claim(parent, run)
    if isinstance(reply, Granted):
        if await _record(driver, parent, run, flow.DONE, b""):
            return run.token or 0
        raise BackendUnavailable("the journal of the call's steps could not be recorded")
    assert isinstance(reply, Settled)
    return reply.token


async def _claim(parent: Run, run: Run) -> Granted | Settled | Mismatched:
    """Claim a record of the parent's. Raises LeaseLost if the parent's own claim has been taken over."""
    plan = run.plan
    while True:
        reply = await plan.backend.claim(
            run.rid,
            attempt=run.attempt,
            fingerprint=run.fingerprint,
            lease=plan.lease,
            keep=plan.ttl,
            takeover=True,
        )
        if isinstance(reply, Granted):
            run.token = reply.token
        if isinstance(reply, (Granted, Settled, Mismatched)):
            return reply
        await _make_way(parent, run)


async def _make_way(parent: Run, run: Run) -> None:
    """Take another's claim on a record of the parent's away. Raises LeaseLost if it is the parent's successor's."""
    plan = parent.plan
    answer = await plan.backend.renew(parent.rid, attempt=parent.attempt, token=parent.token or 0, lease=plan.lease)
    if answer is not Answer.DONE:
        parent.lost = True
        parent.report("lease_lost")
        raise LeaseLost(parent.rid.digest, token=parent.token or 0)
    await plan.backend.forget(run.rid, force=True)


async def settle(driver: Driver, step: Step, value: Any) -> Any:
    """Record what the step returned, and return what a replay of it would.

    Raises:
        LeaseLost: another run of the call has come to this step.
        ResultUnavailable: the value cannot be encoded; the record says that the step was done.
    """
    parent, run = step.parent, step.run
    if run is None:  # without protection, as was asked for
        run = _sub_run(parent, str(step.place), step.fingerprint, step.codec)
        codec, body, result = flow._encode(run, value)
    else:
        codec, body, result = flow._encode(run, value)
        if not await _record(driver, parent, run, codec, body):
            parent.report("not_stored")
    if codec == flow.UNAVAILABLE:
        raise ResultUnavailable(run.rid.digest, reason=body.decode(), result=value)
    return result


async def _record(driver: Driver, parent: Run, run: Run, codec: str, body: bytes) -> bool:
    """Record an outcome of the parent's; False: the backend did not confirm it while the parent's lease lasted."""
    plan = run.plan
    pause = 0.01
    while True:
        try:
            answer = await plan.backend.complete(
                run.rid, attempt=run.attempt, token=run.token or 0, codec=codec, body=body, ttl=plan.ttl
            )
            if answer is Answer.DONE:
                return True
            await _make_way(parent, run)
            if isinstance(await _claim(parent, run), Granted):
                continue
            return True  # the run before this one has recorded it at this moment
        except BackendError as error:
            parent.report("backend_error", error=error)
            if not isinstance(error, BackendUnavailable):
                if codec == flow.UNAVAILABLE:
                    return False
                codec, body = flow.UNAVAILABLE, b"the backend refused to store it"
                continue
        left = parent.valid_until - driver.now()
        if left <= 0:
            return False
        await driver.sleep(min(left, pause))
        pause = min(2 * pause, 1.0)


async def drop(_driver: Driver, step: Step, error: BaseException) -> None:
    """Give the place of a step back that raised, so that it may be tried again; never masks `error`."""
    if not isinstance(error, Exception):
        return  # a crash as far as anybody knows: the next run takes over what was begun
    run = step.run
    try:
        if run is not None and run.token is not None:
            await run.plan.backend.release(run.rid, attempt=run.attempt, token=run.token)
    except BackendError as failure:  # whoever tries it again takes it over
        step.parent.report("backend_error", error=failure)
    # Not before, when another step there would meet this one's claim; and once: what is interrupted is run again.
    step.call._journal.give_back(step.place, step.fingerprint)
