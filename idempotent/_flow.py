"""The flows of one call: begin, settle, abandon, renew, and what operators do. Written once, as `async def`.

A flow decides nothing about time, threads or tasks: it asks its Driver. The sync driver answers without ever
suspending, the async one on the event loop, a test's scheduler as it pleases. No flow is alive while the user's
function runs: the wrapper awaits `begin`, calls the function in its own frame, then awaits `settle` or `abandon`.
"""

import functools
import inspect
import warnings
from collections.abc import Awaitable, Callable
from random import random
from typing import TYPE_CHECKING, Any

from idempotent import events
from idempotent._record import (
    STEPS,
    Answer,
    Claim,
    Expired,
    Granted,
    Mismatched,
    Record,
    RecordId,
    Row,
    Settled,
    State,
    Unknown,
    digest_of,
)
from idempotent._run import MARGIN, Call, Driver, Flight, Plan, Run, _current
from idempotent.errors import (
    BackendError,
    BackendUnavailable,
    CallError,
    FingerprintMismatch,
    InProgress,
    LeaseLost,
    OutcomeUnknown,
    ResultUnavailable,
    SerializationError,
    UnprotectedWarning,
)
from idempotent.serializers import decode_error, encode_error, why

if TYPE_CHECKING:
    from idempotent._near import Mark

DONE = "-"
"""The codec of an outcome of which only "it was done" was to be kept."""
UNAVAILABLE = "!"
"""The codec of an outcome that could not be encoded; the body says why."""
ERROR = "error1"
"""The codec of recorded errors."""


class Applied:
    """A probe's answer: the effect of the dead run took place, and this is its result."""

    __slots__ = ("result",)

    def __init__(self, result: Any = None) -> None:
        self.result = result

    def __repr__(self) -> str:
        return "Applied(...)"


class NotApplied:
    """A probe's answer: the effect did not take place; one asker may run the function."""

    __slots__ = ()


class StillUnknown:
    """A probe's answer: it cannot be told yet; the caller gets OutcomeUnknown."""

    __slots__ = ()


class Replay:
    """What a call returns: the value and how it was come by. Made by `begin` for duplicates, by `settle` for runs."""

    __slots__ = ("age", "error", "replayed", "stored", "token", "value")

    def __init__(
        self, value: Any, replayed: bool, stored: bool, token: int, age: float, error: Exception | None = None
    ) -> None:
        self.value = value
        self.error = error
        """A recorded error, for the wrapper to raise: no flow can raise a StopIteration."""
        self.replayed = replayed
        self.stored = stored
        self.token = token
        self.age = age


def at_hand(plan: Plan, text: str, found: tuple[Row, int]) -> Replay:
    """The answer of a settled record that `plan.find` has found. Raises ResultUnavailable if it has none."""
    row, now = found
    age = (now - row.since) / 1e6 if now > row.since else 0.0
    return _replay(plan, text, row.state is _FAILED, row.token, age, row.codec, row.body, True)


_FAILED = State.FAILED
_SETTLED = ("completed", "failed")


async def begin(driver: Driver, run: Run) -> Replay | None:
    """Claim the key for `run`, or answer it from what another call recorded. None: the function is to run now.

    Raises:
        FingerprintMismatch, InProgress, OutcomeUnknown, ResultUnavailable: as the outcome table says.
        BackendUnavailable: the claim could not be confirmed; nothing ran.
    """
    plan = run.plan
    if _current.get() is not None:
        _refuse_reentry(driver, run)
    until = None if plan.wait is None else driver.now() + plan.wait
    while True:
        flight = plan.flights.board(run, driver.now())
        if flight is None:
            break
        followed = await _follow(driver, run, flight, until)
        if followed is not None:
            return followed
    mark = None if plan.near is None else plan.near.mark()
    try:
        settled = await _ask(driver, run, until)
        if settled is None:
            if not run.unprotected:
                driver.beat(run)
            return None
    except BackendUnavailable as error:
        plan.flights.land(run, error=error)
        raise
    except Exception:
        plan.flights.land(run)
        raise
    plan.flights.land(run, settled)
    if mark is not None:
        await _copy_found(driver, run, settled, mark)
    return replay(run, settled)


async def _copy_found(driver: Driver, run: Run, settled: Settled, mark: "Mark") -> None:
    """Copy what a claim has found into the near-cache, for as long as the backend says that it is there."""
    asked = driver.now()
    try:
        record = await run.plan.backend.read(run.rid)
    except BackendError:
        return
    if record is not None and record.state in _SETTLED and record.token == settled.token and record.expires_in:
        _copy(driver, run, settled, mark, asked + record.expires_in)


def _copy(driver: Driver, run: Run, settled: Settled, mark: "Mark", until: float) -> None:
    if run.plan.near is not None:
        state = State.FAILED if settled.failed else State.COMPLETED
        since = int((driver.now() - settled.age) * 1e6)
        row = Row(state, settled.token, b"", run.fingerprint, since, codec=settled.codec, body=settled.body)
        run.plan.near.keep(mark, run.rid.text, row, until)


def _refuse_reentry(driver: Driver, run: Run) -> None:
    """A call under its own key, from inside its own function, would wait for itself."""
    outer = reentered(run)
    if outer is not None:
        run.report("busy")
        raise InProgress(
            run.rid.digest,
            retry_after=max(0.0, outer.valid_until - driver.now()),
            detail="the function called itself with its own key, and would wait for itself for ever",
        )


def reentered(run: Run) -> Run | None:
    """The run under the same key that this call is made inside of; None: there is none."""
    outer = _current.get()
    while outer is not None:
        if not outer._over and outer._run.rid == run.rid and outer._run.plan.flights is run.plan.flights:
            return outer._run
        outer = outer._outer
    return None


async def _follow(driver: Driver, run: Run, flight: Flight, until: float | None) -> Replay | None:
    """Wait for the leader's outcome. None: it brought none, or is not heard of; ask again."""
    flights = run.plan.flights
    if not run.waited:
        run.waited = True
        run.report("waited")
    waiter = driver.waiter()
    if flights.join(flight, waiter):
        try:
            while not flight.landed:
                now = driver.now()
                trusted = flight.trusted_until - now
                left = trusted if until is None else min(trusted, until - now)
                if left <= 0:
                    break
                await waiter.wait(left)
        finally:
            flights.leave(flight, waiter)
    if flight.landed and flight.settled is not None:
        return replay(run, flight.settled, stored=flight.stored)
    if flight.error is not None and not run.plan.run_on_outage:
        raise BackendUnavailable(str(flight.error)) from flight.error
    now = driver.now()
    if until is not None and now >= until:
        run.report("busy")
        raise InProgress(run.rid.digest, retry_after=max(0.0, flight.busy_until - now, flight.run.valid_until - now))
    return None


async def _ask(driver: Driver, run: Run, until: float | None) -> Settled | None:
    """Claim until the claim is granted (None) or answered; wait while another process runs."""
    plan, rid, flight = run.plan, run.rid, run.flight
    over: int | None = None
    reply: Claim | None = None
    while True:
        sent = driver.now()
        if flight is not None:
            flight.trust(sent + plan.trust)
        run.claiming = True
        run.answer_due = sent + 0.9 * min(plan.lease, plan.backend.timeout)
        try:
            reply = await plan.backend.claim(
                rid,
                attempt=run.attempt,
                fingerprint=run.fingerprint,
                lease=plan.lease,
                keep=plan.keep,
                takeover=plan.takeover,
                over=over,
            )
        except BackendError as error:
            run.report("backend_error", error=error)
            # Once the backend has spoken of another run, nothing runs beside it.
            if not (plan.run_on_outage and isinstance(error, BackendUnavailable) and reply is None):
                raise
            _go_unprotected(run, error)
            return None
        if isinstance(reply, Granted):
            run.token = reply.token
            run.valid_until = sent + plan.lease * (1 - MARGIN)
            if driver.now() >= run.valid_until and not await _still_ours(driver, run):
                run.token, run.attempt = None, run.new_attempt()
                continue
            run.claiming = False
            run.report("taken_over" if reply.took_over else "claimed")
            return None
        run.claiming = False
        if isinstance(reply, Settled):
            return reply
        if isinstance(reply, Expired):
            raise _too_late(run, reply)
        if isinstance(reply, Mismatched):
            run.report("mismatched", age=reply.age)
            raise FingerprintMismatch(rid.digest, age=reply.age, stored=reply.stored.hex(), given=run.fingerprint.hex())
        if isinstance(reply, Unknown):
            over, settled = await _probe(driver, run, reply)
            if settled is not None:
                return settled
            continue
        now = driver.now()
        left = None if until is None else until - now
        if left is not None and left <= 0:
            run.report("busy", token=reply.token)
            raise InProgress(rid.digest, retry_after=reply.lease_left)
        if not run.waited:
            run.waited = True
            run.report("waited", token=reply.token)
        patience = reply.lease_left if left is None else min(left, reply.lease_left)
        if flight is not None:
            flight.busy_until = now + reply.lease_left
            flight.trust(now + patience + plan.trust)
        try:
            await plan.backend.changed(rid, token=reply.token, timeout=max(patience, 0.001))
        except BackendError as error:  # the next claim tells whether the backend is out
            run.report("backend_error", error=error)
            await driver.sleep(min(patience, 0.05))


def _too_late(run: Run, found: Expired) -> ResultUnavailable:
    error = ResultUnavailable(
        run.rid.digest, reason=f"it expired {found.age:.1f} s ago, and only the key is remembered since"
    )
    run.report("replayed", token=found.token, age=found.age, error=error)
    return error


async def _still_ours(driver: Driver, run: Run) -> bool:
    """Whether a claim whose reply came after its lease is held nevertheless; the lease then begins anew."""
    plan, sent = run.plan, driver.now()
    answer = await plan.backend.renew(run.rid, attempt=run.attempt, token=run.token or 0, lease=plan.lease)
    run.valid_until = sent + plan.lease * (1 - MARGIN)
    return answer is Answer.DONE and driver.now() < run.valid_until


def _go_unprotected(run: Run, error: BackendUnavailable) -> None:
    run.claiming = False
    run.unprotected = True
    run.report("unprotected", error=error)
    warnings.warn(
        f"{run.plan.namespace} runs without protection, as its backend is out and on_outage is 'run': {error}",
        UnprotectedWarning,
        stacklevel=2,
    )


async def _probe(driver: Driver, run: Run, found: Unknown) -> tuple[int | None, Settled | None]:
    """Ask the probe about a dead run: the token whose record may be taken over, or the outcome it found out."""
    plan = run.plan
    run.report("unknown", token=found.token, age=found.age)
    if plan.probe is None:
        raise OutcomeUnknown(run.rid.digest, age=found.age)
    verdict = plan.probe(Call(driver, run))
    if inspect.isawaitable(verdict):
        verdict = await verdict
    if isinstance(verdict, type) and issubclass(verdict, (NotApplied, StillUnknown)):
        verdict = verdict()
    if isinstance(verdict, StillUnknown):
        raise OutcomeUnknown(run.rid.digest, age=found.age)
    if isinstance(verdict, NotApplied):
        return found.token, None
    if not isinstance(verdict, Applied):
        raise TypeError(
            f"the probe of {plan.namespace} must return Applied(result), NotApplied() or StillUnknown(), not {verdict!r}"
        )
    codec, body, _ = _encode(run, verdict.result)
    settled = await _settle_dead(run, found.token, codec, body, failed=False, ttl=plan.ttl)
    return None, settled


async def _settle_dead(run: Run, over: int, codec: str, body: bytes, *, failed: bool, ttl: float) -> Settled | None:
    """Record what a dead run did, in its stead. None: another settled it first."""
    backend = run.plan.backend
    attempt = run.new_attempt()
    reply = await backend.claim(
        run.rid,
        attempt=attempt,
        fingerprint=run.fingerprint,
        lease=run.plan.lease,
        keep=None,
        takeover=False,
        over=over,
    )
    if not isinstance(reply, Granted):
        return None
    step = backend.fail if failed else _completion(run.plan)
    answer = await step(run.rid, attempt=attempt, token=reply.token, codec=codec, body=body, ttl=ttl)
    if answer is not Answer.DONE:
        return None
    run.report("failed" if failed else "completed", token=reply.token)
    return Settled(failed, reply.token, 0.0, codec, body)


def _completion(plan: Plan) -> Callable[..., Awaitable[Answer]]:
    """How results are recorded."""
    complete = plan.backend.complete
    return functools.partial(complete, remember=plan.remember) if plan.remember else complete


Confirm = Callable[
    [Driver, Run, Callable[[], Awaitable[Answer]], Callable[[], Awaitable[Answer]] | None], Awaitable[bool]
]
"""Sends the last step of a run, and where the backend refuses it another one; whether either was applied."""


async def settle(driver: Driver, run: Run, value: Any, ttl: float | None = None) -> Replay:
    """Record the value that the function returned, and return what a replay of it would.

    It is kept for `ttl` seconds; None: for the plan's.

    Raises:
        LeaseLost: another attempt took over; the value is not returned.
        ResultUnavailable: the value cannot be encoded; the record says that it was done.
    """
    plan = run.plan
    if run.inherited:
        raise LeaseLost(run.rid.digest, token=run.token or 0)
    try:
        codec, body, result = _encode(run, value)
        settled, stored = Settled(False, 0, 0.0, codec, body), False
        if not run.unprotected:
            settled, stored = await record(driver, run, settled, plan.ttl if ttl is None else ttl)
            run.report("completed" if stored else "not_stored")
        plan.flights.land(run, settled, stored=stored)
    finally:
        plan.flights.land(run)
    if settled.codec == UNAVAILABLE:
        raise ResultUnavailable(run.rid.digest, reason=settled.body.decode(), result=value)
    return Replay(result, replayed=False, stored=stored, token=settled.token, age=0.0)


async def record(
    driver: Driver, run: Run, settled: Settled, ttl: float, confirm: Confirm | None = None
) -> tuple[Settled, bool]:
    """Record the outcome; what was recorded, and whether it was. Raises LeaseLost if another attempt took over.

    `confirm`: how the command is sent; None: until the backend answers or the lease ends.
    """
    plan = run.plan
    mark, sent = None if plan.near is None else plan.near.mark(), driver.now()
    told: Answer | Exception | None = None
    until = 0.0
    if confirm is None:
        await driver.still(run)
        until = _last_moment(driver, run)
        told = await _record_at_once(run, settled, ttl)  # as it nearly always can be
    if told is Answer.DONE:
        recorded, stored = settled, True
    else:
        confirm = confirm or functools.partial(_confirm, until=until)
        recorded, stored = await _record(driver, run, settled, ttl, confirm, told)
    recorded = Settled(recorded.failed, run.token or 0, recorded.age, recorded.codec, recorded.body)
    if mark is not None and stored:
        _copy(driver, run, recorded, mark, sent + ttl)
    return recorded, stored


async def _record_at_once(run: Run, settled: Settled, ttl: float) -> Answer | Exception:
    """What came of the one command that records the outcome: an answer, or why there is none."""
    backend, token = run.plan.backend, run.token or 0
    command = backend.fail if settled.failed else _completion(run.plan)
    try:
        return await command(run.rid, attempt=run.attempt, token=token, codec=settled.codec, body=settled.body, ttl=ttl)
    except Exception as error:
        return error


async def _record(
    driver: Driver, run: Run, settled: Settled, ttl: float, confirm: Confirm, told: Answer | Exception | None
) -> tuple[Settled, bool]:
    """As `record`, whatever the backend answers and however often it does not; `told`: what came of the first command."""
    plan, backend, rid, attempt = run.plan, run.plan.backend, run.rid, run.attempt
    command = backend.fail if settled.failed else _completion(plan)
    recorded = settled
    gone = doubted = False

    def claim() -> Awaitable[Claim]:
        return backend.claim(
            rid,
            attempt=attempt,
            fingerprint=run.fingerprint,
            lease=plan.lease,
            keep=plan.keep,
            takeover=plan.takeover,
        )

    async def step(what: Settled = settled) -> Answer:
        nonlocal recorded, gone, doubted, told
        if told is not None:
            first, told = told, None
            if isinstance(first, Exception):
                try:
                    raise first
                finally:
                    del first  # or the error, and by it the outcome, is kept in a cycle
            gone = first is Answer.GONE
            if not gone:
                return first
        answer = Answer.GONE
        for _ in range(2):
            if gone:
                # Forgotten by force, or lost by the backend: a new claim tells whether anybody runs it by now.
                reply = await claim()
                if not isinstance(reply, Granted):
                    return Answer.STALE
                run.token, gone, doubted = reply.token, False, False
            # Once both were sent, either may have been applied, whatever reply was lost.
            doubted |= what is not settled
            answer = await command(
                rid, attempt=attempt, token=run.token or 0, codec=what.codec, body=what.body, ttl=ttl
            )
            gone = answer is Answer.GONE
            if not gone:
                break
        if answer is Answer.DONE and doubted:
            reply = await claim()
            if isinstance(reply, Settled):
                recorded = reply
        return answer

    def fallback() -> Awaitable[Answer]:
        return step(settled._replace(codec=UNAVAILABLE, body=b"the backend refused to store it"))

    stored = await confirm(driver, run, step, fallback)
    return recorded, stored


async def abandon(driver: Driver, run: Run, error: BaseException) -> None:
    """End a call that raised: record the error, release the key, or mark it unknown; never mask `error`."""
    plan = run.plan
    if run.inherited:
        return
    try:
        if run.token is None:
            await _withdraw(driver, run, error)
            return
        if isinstance(error, Exception):
            await _last_steps(driver, run)
        if run.steps and plan.takeover:
            await driver.still(run)
            error.add_note("idempotent: a step still runs, and the key stays claimed until its lease ends")
            return
        if run.steps or not isinstance(error, Exception):
            await driver.still(run)
            unknown = not plan.takeover
            await plan.backend.release(run.rid, attempt=run.attempt, token=run.token, unknown=unknown)
            run.report("unknown" if unknown else "released", error=error)
            return
        ttl = ttl_of(plan, error)
        if ttl is not None and run.raised:
            await _record_error(driver, run, error, ttl)
            return

        async def release() -> Answer:
            answer = await plan.backend.release(run.rid, attempt=run.attempt, token=run.token)
            # Gone is what it was to be; another's within the lease: this release was applied, and its reply lost.
            applied = answer is Answer.GONE or driver.now() < run.valid_until
            return Answer.DONE if applied else answer

        released = await _confirm(driver, run, release)
        run.report("released" if released else "not_stored", error=error)
        if not released:
            error.add_note("idempotent: the key could not be released and stays claimed until its lease ends")
    except LeaseLost as lost:
        error.add_note(f"idempotent: {lost}")
    except Exception as failure:
        run.report("backend_error", error=failure)
        error.add_note(f"idempotent: the key could not be released and stays claimed until its lease ends: {failure}")
    finally:
        plan.flights.land(run)


async def _last_steps(driver: Driver, run: Run) -> None:
    """Wait for the steps that still run, while the lease lasts: whoever is let in would do them again beside them."""
    pause = 0.001
    while run.steps and run.beating is not None and driver.now() < run.valid_until:
        try:
            await driver.sleep(pause)
        except GeneratorExit:
            raise
        except BaseException:
            await driver.still(run)  # this wait is given up for good, also when the flow is run once more
            raise
        pause = min(2 * pause, 0.05)


async def _withdraw(driver: Driver, run: Run, error: BaseException) -> None:
    """Take back a claim without an answer: it may have been applied, or may be yet.

    A server that does not answer makes this cost a deadline more: not worth it where others may take over.
    """
    plan = run.plan
    answers = driver.now() < run.answer_due
    if run.claiming and (answers or not plan.takeover or not isinstance(error, Exception)):
        try:
            await plan.backend.release(run.rid, attempt=run.attempt, token=None)
        except BackendError as failure:
            run.report("backend_error", error=failure)


def ttl_of(plan: Plan, error: BaseException) -> float | None:
    """For how long an error is recorded; None: it is not."""
    return next((plan.error_ttl[cls] for cls in type(error).__mro__ if cls in plan.error_ttl), None)


def encoded_error(error: Exception) -> tuple[str, bytes]:
    """Codec and bytes of an error that is recorded, whatever it is."""
    try:
        return ERROR, encode_error(error)
    except Exception as failure:
        reason = f"its error, {type(error).__name__}, could not be encoded: {why(failure)}"
        return UNAVAILABLE, reason.encode()


def replayable(plan: Plan, codec: str, *, failed: bool) -> bool:
    """Whether an outcome in that codec can be told at all."""
    if failed or codec == UNAVAILABLE:
        return codec != UNAVAILABLE
    return codec == DONE or not plan.keep_result or codec == plan.codec.name


async def _record_error(driver: Driver, run: Run, error: Exception, ttl: float) -> None:
    plan = run.plan
    codec, body = encoded_error(error)
    settled, stored = await record(driver, run, Settled(True, 0, 0.0, codec, body), ttl)
    run.report("failed" if stored else "not_stored", error=error)
    plan.flights.land(run, settled, stored=stored)


def _last_moment(driver: Driver, run: Run) -> float:
    """Monotonic seconds until which the last step of a run is sent again."""
    plan = run.plan
    # A lease that is over already may have been taken over: an answer is worth the time of one command.
    return max(run.valid_until, driver.now() + min(plan.lease, plan.backend.timeout))


async def _confirm(
    driver: Driver,
    run: Run,
    step: Callable[[], Awaitable[Answer]],
    fallback: Callable[[], Awaitable[Answer]] | None = None,
    until: float | None = None,
) -> bool:
    """Send the last step of a run until the backend answers or the lease ends; whether it was applied.

    `until`: `_last_moment` from before the step was sent first; None: it is sent first here. Where the backend refuses the
    step, or has not taken it for most of the lease, `fallback` is tried after it. Raises LeaseLost only when another
    attempt holds the record.
    """
    await driver.still(run)
    plan = run.plan
    if until is None:
        until = _last_moment(driver, run)
    steps = [step]
    refused = False
    pause = 0.01
    while True:
        for each in steps:
            try:
                answer = await each()
            except Exception as error:  # of a backend that breaks its contract, too: the function has run
                run.report("backend_error", error=error)
                refused = isinstance(error, BackendError) and not isinstance(error, BackendUnavailable)
            else:
                if answer is not Answer.STALE:
                    return answer is Answer.DONE
                run.lost = True
                run.report("lease_lost")
                raise LeaseLost(run.rid.digest, token=run.token or 0)
        left = until - driver.now()
        if left <= 0:
            return False
        if fallback is not None and (refused or left <= plan.lease / 3):
            steps = [step, fallback]
        elif left > plan.lease / 3:
            left -= plan.lease / 3
        await driver.sleep(min(left, pause * (0.5 + random() / 2)))
        pause = min(pause * 2, 1.0)


async def renew(driver: Driver, run: Run) -> float | None:
    """One beat: renew the lease of `run`. Seconds until the next beat; None: there is none, the lease is lost."""
    sent = driver.now()
    plan = run.plan
    if sent >= run.valid_until:
        run.lost = True
    try:
        answer = await plan.backend.renew(run.rid, attempt=run.attempt, token=run.token or 0, lease=plan.lease)
    except BackendError as error:
        # Neither a yes nor a no: ask again soon, and count as lost once local validity is over.
        run.report("backend_error", error=error)
        left = run.valid_until - driver.now()
        return plan.lease / 3 if left <= 0 else min(plan.lease / 3, max(0.02, left / 4))
    if answer is Answer.DONE:
        run.valid_until = sent + plan.lease * (1 - MARGIN)
        return plan.lease / 3
    run.lost = True  # where the record is gone, anybody may claim the key by now
    run.report("lease_lost")
    return None


def _encode(run: Run, value: Any) -> tuple[str, bytes, Any]:
    """Codec, bytes, and the value that a replay will give; whatever fails makes the outcome "unavailable"."""
    plan = run.plan
    if not plan.keep_result:
        return DONE, b"", value
    try:
        return plan.codec.name, *plan.codec.keep(value, run.rid.text)
    except Exception as failure:
        # Any error of a user's serializer, too: the function has run, so nothing may invite a second run.
        reason = (
            f"what {plan.namespace} returned could not be kept ({why(failure)}); give serializer= or keep_result=False"
        )
        return UNAVAILABLE, reason.encode(errors="replace"), value


def replay(run: Run, settled: Settled, *, stored: bool = True) -> Replay:
    """The recorded outcome as the call's own: the decoded value, or the recorded error. Raises ResultUnavailable."""
    return _replay(run.plan, run.rid.text, *settled, stored)


def _replay(
    plan: Plan, text: str, failed: bool, token: int, age: float, codec: str, body: bytes, stored: bool
) -> Replay:
    plan.count("replayed")
    if events.wanted(plan.hooks, "replayed"):
        plan.tell("replayed", digest_of(text), token, age)
    if plan.keep_result and not failed and codec == plan.codec.name:
        try:
            return Replay(plan.codec.decode(body, text), True, stored, token, age)
        except Exception as failure:
            reason = f"{plan.namespace} cannot decode it: {why(failure)}"
    elif codec == UNAVAILABLE:
        reason = body.decode(errors="replace")
    elif failed:
        try:
            error = decode_error(body, tuple(plan.error_ttl))
        except Exception as failure:
            reason = f"its recorded error cannot be rebuilt for {plan.namespace}: {why(failure)}"
        else:
            return Replay(None, True, stored, token, age, error)
    elif codec == DONE or not plan.keep_result:
        return Replay(None, True, stored, token, age)
    else:
        reason = f"it was recorded by the codec {codec!r}, and this function reads {plan.codec.name!r}"
    raise ResultUnavailable(digest_of(text), reason=reason)


async def peek(run: Run) -> Record | None:
    """The record under the key of `run`; changes nothing."""
    return await run.plan.backend.read(run.rid)


async def forget(run: Run, *, force: bool) -> bool:
    """Remove the record and its steps, so that the next call runs; whether there was one. Raises InProgress for a running one."""
    backend = run.plan.backend
    found = None if force else await backend.read(run.rid)
    if found is None or found.state != "running":
        # First: with the record gone, a new call could find them and skip what it is to do anew.
        await backend.forget(RecordId(run.rid.text, "", STEPS), force=True)
    try:
        found = await backend.forget(run.rid, force=force)
    finally:
        for reference in run.plan.flights.nears.valuerefs():
            near = reference()
            if near is not None:
                near.clear()
    if force:
        run.plan.flights.ground(run.rid)
    if found is not None and found.state == "running" and not force:
        raise InProgress(
            run.rid.digest,
            retry_after=max(0.0, found.lease_left or 0.0),
            detail="force=True forgets it all the same, and then it may run twice",
        )
    return found is not None


async def resolve(run: Run, *, value: Any, error: Exception | None, applied: bool) -> bool:
    """Settle the record of a dead run by hand; False: another did so meanwhile.

    Raises:
        InProgress: the record's runner is alive.
        CallError: there is no record, or it is settled.
    """
    plan, rid = run.plan, run.rid
    found = await plan.backend.read(rid)
    if found is not None and found.state == "running":
        if (found.lease_left or 0.0) > 0:
            raise InProgress(
                rid.digest, retry_after=found.lease_left or 0.0, detail="only unknown records are resolved"
            )
    elif found is None or found.state != "unknown":
        state = "absent" if found is None else found.state
        raise CallError(f"the record of key {rid.digest} is {state}; only unknown records are resolved")
    if not applied:
        reply = await plan.backend.claim(
            rid,
            attempt=run.attempt,
            fingerprint=b"",
            lease=plan.lease,
            keep=None,
            takeover=False,
            over=found.token,
        )
        if not isinstance(reply, Granted):
            return False
        await plan.backend.release(rid, attempt=run.attempt, token=reply.token)
        run.report("released", token=reply.token)
        return True
    if error is None:
        codec, body, _ = _encode(run, value)
        if codec == UNAVAILABLE:
            raise SerializationError(f"the given result cannot be recorded: {body.decode()}")
        ttl = plan.ttl
    else:
        named = ttl_of(plan, error)
        if named is None:
            raise ValueError(f"{type(error).__name__} is not named in error_ttl, so it could not be replayed")
        ttl = named
        codec, body = ERROR, encode_error(error)
    settled = await _settle_dead(run, found.token, codec, body, failed=error is not None, ttl=ttl)
    return settled is not None
