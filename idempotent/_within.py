"""The flows of a call within its caller's transaction: begin, settle and abandon, as `_flow` has them for leases.

    caller's transaction
    ├── the claim               in a savepoint of its own; a duplicate waits here until the first transaction ends
    ├── savepoint
    │   ├── the function's work
    │   └── the outcome
    └── commit or rollback      the caller's: claim, work and outcome share their fate

Nothing of this is seen by others before the commit, so there is no lease to lose and nobody to take over. A function
that raises leaves nothing of its own in the transaction, whatever the caller does next: the savepoint is rolled back,
and the claim released, or the error recorded if `error_ttl` names it.
"""

import contextlib
import copy
import math
import warnings
from random import random
from typing import Any, cast

from idempotent import _flow as flow
from idempotent import _machine as machine
from idempotent._flow import Replay
from idempotent._record import Answer, Busy, Expired, Granted, Mismatched, Settled, Unknown
from idempotent._run import Driver, Flights, Plan, Run
from idempotent.backends._caller import Blocked, CallersTransaction, subject_of
from idempotent.backends.base import Backend, micros
from idempotent.errors import (
    BackendError,
    FingerprintMismatch,
    InProgress,
    OutcomeUnknown,
    ResultUnavailable,
    UnprotectedWarning,
)

__all__ = ["NOWHERE", "NO_FLIGHTS", "abandon", "begin", "plan_on", "settle"]

NO_FLIGHTS = Flights()
"""Duplicates meet in the database alone: each has a transaction of its own, with its own view of what is there."""
NOWHERE = cast("Backend", None)
"""The backend of a plan before a call brings its session."""


def plan_on(plan: Plan, given: Any, *, is_async: bool) -> Plan:
    """`plan` for one call, on the session or connection that it was given. Raises TypeError if it is none."""
    made = copy.copy(plan)
    made.backend = CallersTransaction(subject_of(given, is_async=is_async))
    return made


def _place(run: Run) -> CallersTransaction:
    return cast("CallersTransaction", run.plan.backend)


async def begin(driver: Driver, run: Run) -> Replay | None:
    """Claim the key for `run` in its caller's transaction, or answer it from what is recorded. None: it is to run now.

    Raises:
        FingerprintMismatch, InProgress, OutcomeUnknown, ResultUnavailable: as the outcome table says.
        CallError: the connection cannot hold a transaction.
        sqlalchemy.exc.SQLAlchemyError: what the database says of a conflict, for the caller to retry the transaction.
    """
    plan, rid = run.plan, run.rid
    place = _place(run)
    ask = machine.Ask(run.attempt, run.fingerprint, micros(plan.lease), micros(plan.ttl), takeover=True)
    until = None if plan.wait is None else driver.now() + plan.wait
    while True:
        left = None if until is None else max(0.0, until - driver.now())
        try:
            reply = await place.try_claim(rid, ask, left)
            break
        except Blocked as blocked:
            if until is not None and driver.now() >= until:
                run.report("busy")
                holder = "another transaction that holds it has not ended"
                if place.name == "sqlite":  # it does not say who holds what
                    holder = "or anything else writes to this file, where one transaction writes at a time"
                raise InProgress(rid.digest, retry_after=1.0, detail=holder) from blocked.__cause__
        if not run.waited:
            run.waited = True
            run.report("waited")
        pause = 0.01 + 0.02 * random()
        await driver.sleep(pause if until is None else min(pause, max(0.0, until - driver.now())))
    if isinstance(reply, Granted):
        run.token = reply.token
        run.valid_until = math.inf
        await place.open()
        run.report("taken_over" if reply.took_over else "claimed")
        return None
    if isinstance(reply, Settled):
        return flow.replay(run, reply)
    if isinstance(reply, Expired):
        raise flow._too_late(run, reply)
    if isinstance(reply, Mismatched):
        run.report("mismatched", age=reply.age)
        raise FingerprintMismatch(rid.digest, age=reply.age, stored=reply.stored.hex(), given=run.fingerprint.hex())
    if isinstance(reply, Unknown):
        run.report("unknown", token=reply.token, age=reply.age)
        raise OutcomeUnknown(rid.digest, age=reply.age)
    assert isinstance(reply, Busy)
    run.report("busy", token=reply.token)
    raise InProgress(
        rid.digest,
        retry_after=reply.lease_left or 1.0,
        detail="it runs in this same transaction, or has committed it midway",
    )


async def settle(driver: Driver, run: Run, value: Any) -> Replay:
    """Record the value that the function returned, in the same transaction, and return what a replay of it would.

    Raises:
        ResultUnavailable: the value cannot be encoded; the record says that it was done.
        sqlalchemy.exc.SQLAlchemyError: the database refused the function's work or the record; both are undone.
    """
    place = _place(run)
    try:
        return await _settle(run, place, value)
    except ResultUnavailable:
        raise
    except Exception as error:
        run.raised = True  # what it left to be flushed is its own work
        await abandon(driver, run, error)
        if place.interrupted:  # what interrupted it is on its way out
            raise BackendError(f"the outcome could not be recorded: {type(error).__name__}") from error
        raise
    except BaseException:
        place.interrupted = True
        raise


async def _settle(run: Run, place: CallersTransaction, value: Any) -> Replay:
    plan, token = run.plan, run.token or 0
    if place.over:
        return Replay(value, replayed=False, stored=False, token=token, age=0.0)
    codec, body, result = flow._encode(run, value)
    stands, complete = place.stands, flow._completion(plan)
    try:
        answer = await complete(run.rid, attempt=run.attempt, token=token, codec=codec, body=body, ttl=plan.ttl)
    except BackendError:  # too large for the server
        codec, body = flow.UNAVAILABLE, b"the backend refused to store it"
        answer = await complete(run.rid, attempt=run.attempt, token=token, codec=codec, body=body, ttl=plan.ttl)
    await place.keep()  # flushes what the function has left
    place.close()
    stored = answer is Answer.DONE
    run.report("completed" if stored else "not_stored")
    if not stands:
        warnings.warn(
            f"{plan.namespace} ended the transaction that its record is in; its effect and the record are not one any more."
            " Leave commit and rollback to the caller, and use begin_nested() inside",
            UnprotectedWarning,
            stacklevel=2,
        )
    if codec == flow.UNAVAILABLE:
        raise ResultUnavailable(run.rid.digest, reason=body.decode(), result=value)
    return Replay(result, replayed=False, stored=stored, token=token, age=0.0)


async def abandon(_driver: Driver, run: Run, error: BaseException) -> None:
    """Undo what a call that raised has done in the transaction, then release its key or record the error.

    Never masks `error`. Where even this fails, a note says that the transaction must be rolled back, and its connection
    is given up, so that nobody can commit half of it.
    """
    plan, place = run.plan, _place(run)
    if place.token is None or place.over:
        return
    try:
        await place.undo()
        ttl = flow.ttl_of(plan, error)
        if ttl is None or not run.raised or not isinstance(error, Exception):
            await place.release(run.rid, attempt=run.attempt, token=place.token)
            run.report("released", error=error)
        else:
            codec, body = flow.encoded_error(error)
            await place.fail(run.rid, attempt=run.attempt, token=place.token, codec=codec, body=body, ttl=ttl)
            run.report("failed", error=error)
        place.close()
    except Exception as failure:
        run.report("backend_error", error=failure)
        error.add_note(f"idempotent: the transaction must be rolled back, as this call could not be undone: {failure}")
        place.over = True
        with contextlib.suppress(Exception):
            await place.doom()
