"""Shadow mode: the flows of a call under `configure(mode="observe")`, which runs whatever the records say.

The first call of a key claims it and records its outcome as usual, or nothing could be told of its duplicates. These run
all the same, and what enforcement would have done to them is an event and a count. So that a live system is left alone:

- nothing is waited for, nothing is replayed, and no error is raised but the function's own;
- a command takes one second at the most and is sent once; after an outage the backend is left alone for a while, but
  for taking back a claim that may have been applied: its lease would end, and it would pass for a runner that died;
- the caller gets the very value that its function returned.
"""

from collections.abc import Awaitable, Callable
from typing import Any
from weakref import WeakKeyDictionary

from idempotent import _flow as flow
from idempotent import events
from idempotent._record import Answer, Busy, Claim, Expired, Granted, Mismatched, Settled, Unknown
from idempotent._run import MARGIN, Driver, Flights, Plan, Run
from idempotent.errors import BackendError, BackendUnavailable, InProgress, LeaseLost, ResultUnavailable
from idempotent.events import EventName, Observed
from idempotent.serializers import encode_error

__all__ = ["BUDGET", "Watch", "begin", "end", "unusable"]

BUDGET = 1.0
"""Seconds that a command may take."""
_REST = 5.0
"""Seconds for which a backend that has failed is not asked."""

_rests: "WeakKeyDictionary[Flights, float]" = WeakKeyDictionary()
"""Until when (monotonic seconds) the backends that these are of are left alone."""


class Watch:
    """One observed call."""

    __slots__ = ("over", "reply", "run", "stored")

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reply: Claim | None = None
        """What its claim was answered; None: nothing."""
        self.stored = False
        self.over = False
        """There is nothing to observe any more, or at all."""


def _report(
    plan: Plan,
    name: EventName,
    observed: Observed | None = None,
    *,
    digest: str = "",
    token: int | None = None,
    age: float | None = None,
    error: BaseException | None = None,
    agrees: bool | None = None,
) -> None:
    plan.count(observed or name)
    if agrees is False:
        plan.count("disagreed")
    if events.wanted(plan.hooks, name, observed):
        kind = None if error is None else type(error).__name__
        backend = getattr(plan.backend, "name", "none")
        event = events.Event(name, plan.namespace, digest, backend, token, age, kind, observed, agrees)
        events.dispatch(plan.hooks, event)


def unusable(plan: Plan, error: Exception) -> None:
    """Report a call that enforcement would refuse before it asked the backend: its key, its options."""
    _report(plan, "unprotected", "would_refuse", error=error)


def _failed(watch: Watch, driver: Driver, error: Exception) -> None:
    plan = watch.run.plan
    if isinstance(error, BackendUnavailable) or not isinstance(error, BackendError):
        _rests[plan.flights] = driver.now() + _REST  # what it merely refused says nothing of other calls
    would = None if watch.run.token is not None else _without_claim(plan)
    _report(plan, "backend_error", would, digest=watch.run.rid.digest, error=error)


def _without_claim(plan: Plan) -> Observed | None:
    """What enforcement does to a call whose claim the backend does not confirm."""
    return None if plan.run_on_outage else "would_refuse"


async def _withdraw(watch: Watch) -> None:
    """Take back a claim without an answer: it may have been applied, or may be yet."""
    run = watch.run
    try:
        await run.plan.backend.release(run.rid, attempt=run.attempt, token=None)
        run.claiming = False
    except Exception as failure:  # the claim's own error has said what enforcement would do
        _report(run.plan, "backend_error", digest=run.rid.digest, error=failure)


async def begin(driver: Driver, watch: Watch) -> None:
    """Claim the key, or find out what enforcement would do instead. Raises nothing of its own."""
    run = watch.run
    plan, rid = run.plan, run.rid
    if watch.over:
        return
    if driver.now() < _rests.get(plan.flights, 0.0):
        _report(plan, "unprotected", _without_claim(plan), digest=rid.digest)
        return
    if flow.reentered(run) is not None:
        _report(plan, "busy", "would_refuse", digest=rid.digest, error=InProgress(rid.digest, retry_after=0.0))
        return
    sent = driver.now()
    run.claiming = True
    run.answer_due = sent + 0.9 * min(plan.lease, plan.backend.timeout)
    try:
        reply = watch.reply = await plan.backend.claim(
            rid,
            attempt=run.attempt,
            fingerprint=run.fingerprint,
            lease=plan.lease,
            keep=plan.keep,
            takeover=plan.takeover,
        )
        run.claiming = False
        if isinstance(reply, Granted):
            run.token = reply.token
            run.valid_until = sent + plan.lease * (1 - MARGIN)
            driver.beat(run)
    except Exception as error:  # of a backend that breaks its contract, or for want of a thread, too
        _failed(watch, driver, error)
        if run.claiming and driver.now() < run.answer_due:  # the backend answers at all
            await _withdraw(watch)
        return
    if isinstance(reply, Granted):
        run.report("taken_over" if reply.took_over else "claimed")
    elif isinstance(reply, Busy):
        waits = plan.wait != 0
        name: EventName = "waited" if waits else "busy"
        _report(plan, name, "would_wait" if waits else "would_refuse", digest=rid.digest, token=reply.token)
    elif isinstance(reply, Mismatched):
        _report(plan, "mismatched", "would_refuse", digest=rid.digest, age=reply.age)
    elif isinstance(reply, Unknown):
        _report(plan, "unknown", "would_refuse", digest=rid.digest, token=reply.token, age=reply.age)
    elif isinstance(reply, Expired):
        late = ResultUnavailable(rid.digest, reason="it expired")
        _report(plan, "replayed", "would_refuse", digest=rid.digest, token=reply.token, age=reply.age, error=late)


async def end(driver: Driver, watch: Watch, value: Any = None, error: BaseException | None = None) -> None:
    """Record the outcome of a run that was granted, or compare it with the one recorded. Raises nothing of its own.

    It may be run twice, if it was interrupted.
    """
    run = watch.run
    if watch.over or run.inherited:
        return
    if isinstance(watch.reply, Granted):
        try:
            await _record(driver, watch, value, error)
        except Exception as failure:
            _failed(watch, driver, failure)
            _report(run.plan, "not_stored", digest=run.rid.digest, token=run.token, error=failure)
        finally:
            await driver.still(run)
    elif isinstance(watch.reply, Settled):
        _compare(run, watch.reply, value, error)
    elif run.claiming:
        interrupted = error is not None and not isinstance(error, Exception)
        if interrupted or not run.plan.takeover:  # elsewhere not worth a second more: the next call takes over
            await _withdraw(watch)
    watch.over = True


async def _once(
    driver: Driver,
    run: Run,
    step: Callable[[], Awaitable[Answer]],
    fallback: Callable[[], Awaitable[Answer]] | None,
) -> bool:
    """Send the last step of a run once, and `fallback` where the backend refuses it; whether either was applied."""
    await driver.still(run)
    try:
        answer = await step()
    except BackendUnavailable:
        raise
    except BackendError as error:
        run.report("backend_error", error=error)
        if fallback is None:
            return False
        answer = await fallback()
    if answer is Answer.STALE:
        run.lost = True
        raise LeaseLost(run.rid.digest, token=run.token or 0)
    return answer is Answer.DONE


def _outcome(run: Run, value: Any, error: BaseException | None) -> tuple[Settled, float] | None:
    """What is to be recorded of a run, and for how many seconds; None: nothing, its key is released."""
    if error is None:
        codec, body, _ = flow._encode(run, value)
        return Settled(False, 0, 0.0, codec, body), run.plan.ttl
    ttl = flow.ttl_of(run.plan, error)
    if ttl is None or not run.raised or not isinstance(error, Exception):
        return None
    return Settled(True, 0, 0.0, *flow.encoded_error(error)), ttl


async def _record(driver: Driver, watch: Watch, value: Any, error: BaseException | None) -> None:
    run = watch.run
    plan, digest = run.plan, run.rid.digest
    outcome = _outcome(run, value, error)
    if outcome is None:
        await driver.still(run)
        unknown = not isinstance(error, Exception) and not plan.takeover
        answer = await plan.backend.release(run.rid, attempt=run.attempt, token=run.token or 0, unknown=unknown)
        # As where it is enforced: gone is what it was to be, and another's within the lease is this release, sent twice.
        applied = answer is not Answer.STALE or driver.now() < run.valid_until
        named: EventName = ("unknown" if unknown else "released") if applied else "lease_lost"
        _report(plan, named, digest=digest, token=run.token, error=error)
        return
    try:
        settled, watch.stored = await flow.record(driver, run, *outcome, _once)
    except LeaseLost:
        _report(plan, "lease_lost", "would_refuse", digest=digest, token=run.token)
        return
    if not watch.stored:
        _report(plan, "not_stored", digest=digest, token=run.token)
        return
    named = "completed" if error is None else "failed"
    if error is None and settled.codec == flow.UNAVAILABLE:
        late = ResultUnavailable(digest, reason=settled.body.decode())
        _report(plan, named, "would_refuse", digest=digest, token=run.token, error=late)
    else:
        _report(plan, named, digest=digest, token=run.token, error=error)


def _compare(run: Run, found: Settled, value: Any, error: BaseException | None) -> None:
    plan = run.plan
    replayable = flow.replayable(plan, found.codec, failed=found.failed)
    refused = None if replayable else ResultUnavailable(run.rid.digest, reason="it cannot be replayed")
    try:
        agrees = _agrees(run, found, value, error) if replayable else None
    except Exception:  # what a serializer or a value's own comparison may raise
        agrees = None
    _report(
        plan,
        "replayed",
        "would_replay" if replayable else "would_refuse",
        digest=run.rid.digest,
        token=found.token,
        age=found.age,
        error=refused or error,
        agrees=agrees,
    )


def _agrees(run: Run, found: Settled, value: Any, error: BaseException | None) -> bool | None:
    """Whether the replay would have been what the call came to; None: it cannot be told."""
    if (error is not None) is not found.failed:
        return False
    if error is not None:
        return isinstance(error, Exception) and encode_error(error) == found.body
    if found.codec == flow.DONE:
        return None
    codec, body, result = flow._encode(run, value)
    if codec != found.codec:
        return None
    return body == found.body or bool(run.plan.codec.decode(found.body, run.rid.text) == result)
