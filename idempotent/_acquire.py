"""The lock's flows: acquire, renew, extend, release. Written once, as `async def`, over the Backend contract.

A lock is a claim that is released instead of completed, in a key space of its own: `takeover=True`, no fingerprint.
Whatever `_machine` promises for a claim (one owner, growing tokens, commands that know their earlier selves) holds for it.

Between processes the backend wakes one waiter of each, and the quickest gets the lock. The process that gave it up is
quickest by nature, so it steps back for a moment where it has met others lately, or has had its way for long.
"""

import functools
import os
import socket
from random import random
from typing import Self

from idempotent._record import OWNER_BYTES, Answer, Busy, Claim, Granted, Record, RecordId
from idempotent._rooms import Driver, Held, Place, Plan, Room, lock_lost, not_held
from idempotent._run import MARGIN
from idempotent.backends.base import micros
from idempotent.errors import BackendError, BackendUnavailable, LockError, NotHeld

_KEEP = 60.0
"""Seconds past its lease that the record of a dead holder is kept."""
_AGAIN = 0.002
"""Seconds after a release within which the same process, asking again, would nearly always be first."""
_STEP_BACK = 0.003
"""Seconds that it then waits at the least: the time in which others are woken and ask."""
_RECENT = 0.1
"""Seconds after a release for which a process that met others lets them go first, as long as they are more patient."""
_PATIENT = 7
"""So often must others have been quicker before a process steps back no more."""
_RIVALS = 1.0
"""Seconds for which another process is remembered to want the lock."""
_STREAK = 0.1
"""Seconds for which a process may have its way, although no other was met."""
_TIMES = 8
"""As often may it in any case."""
_LATE = 10
"""So many claims in a row, if there is time, may be confirmed only after their lease before it is taken to be too short."""
_AFTER_ALL = 1.0
"""Seconds at the most to take back a claim that has had no answer in time: its connection may be dead, its server alive."""


async def acquire(driver: Driver, held: Held, wait: float | None) -> bool:
    """Claim the lock for `held`; False: `wait` seconds (None: no limit) ran out.

    Whatever is raised, `withdraw` is to follow.

    Raises:
        LockError: the asking thread or task holds it, or claims are confirmed only after their lease has ended.
        BackendUnavailable: the claim could not be confirmed.
    """
    now = driver.now()
    place = held.place = Place(is_async=held.asker.is_async)
    until = None if wait is None else now + wait
    room, first = held.plan.rooms.enter(held, place, now)
    if (first or await _turn(driver, held, room, place, until)) and await _ask(driver, held, room, place, until):
        leave(driver, held)
        return True
    await _pass_on(held)
    leave(driver, held)
    await driver.still(held)
    held.report("busy")
    return False


def leave(driver: Driver, held: Held) -> None:
    """Take the place of `held` out of the line of its process. May be called twice."""
    if held.place is not None:
        held.plan.rooms.leave(held, held.place, driver.now())


async def _pass_on(held: Held) -> None:
    """Have the next process woken if this one stands in line, or was woken and has not claimed since."""
    if held.in_line:
        try:
            await held.plan.backend.pass_on(held.rid)
        except BackendError as error:  # those behind look again by themselves, if later
            held.report("backend_error", error=error)
        held.in_line = False


async def _turn(driver: Driver, held: Held, room: Room, place: Place, until: float | None) -> bool:
    """Wait until `place` is first in line; False: time ran out."""
    rooms = held.plan.rooms
    while (found := rooms.first(room, place, driver)) is not None:
        patience, waiter = found
        if until is not None:
            patience = min(patience, until - driver.now())
            if patience <= 0:
                return False
        held.report_wait()
        await waiter.wait(patience)
    place.waiter = None
    return True


async def _ask(driver: Driver, held: Held, room: Room, place: Place, until: float | None) -> bool:
    """Claim until the claim is granted; wait while others hold the lock. False: time ran out."""
    plan, rid = held.plan, held.rid
    trust = 2 * plan.backend.timeout + plan.lease
    stepped_back, late = False, 0
    while True:
        now = driver.now()
        left = None if until is None else until - now
        holder = room.holder(now)
        if holder is not None:
            if left is not None and left <= 0:
                return False
            held.report_wait()
            await _outwait(driver, room, place, holder, left, trust)
            continue
        pause = 0.0 if stepped_back or left == 0 else _courtesy(plan, room, now)
        if pause:
            stepped_back, room.streak_from, room.streak = True, now + pause, 0
            place.trust(now, now + pause + trust)
            await driver.sleep(pause if left is None else min(pause, max(0.0, left)))
            continue
        stepped_back = False
        place.trust(now, now + trust)
        held.claiming = True
        held.answer_due = now + 0.9 * min(plan.lease, plan.backend.timeout)
        try:
            reply: Claim = await plan.backend.claim(
                rid,
                attempt=held.attempt,
                fingerprint=b"",
                lease=plan.lease,
                keep=_KEEP,
                takeover=True,
                owner=_owner(os.getpid()),
            )
        except BackendError as error:
            if isinstance(error, BackendUnavailable) and plan.lease < plan.backend.timeout:
                error.add_note(f"idempotent: no longer than lease={plan.lease:g} s is of use; a longer one allows more")
            held.report("backend_error", error=error)
            raise
        held.in_line = False
        if isinstance(reply, Granted):
            held.fence = reply.token
            held.begun, held.granted = now, driver.now()
            held.valid_until = now + plan.lease * (1 - MARGIN)
            if driver.now() >= held.valid_until and not await _still_ours(driver, held):
                held.fence, held.attempt = None, held.new_attempt()
                held.claiming = False
                late += 1
                # Not False at the end of the time: nobody holds the lock, and a caller told so would leave it to others.
                if late == _LATE or (until is not None and driver.now() >= until):
                    raise LockError(
                        f"lease={plan.lease:g} s is too short: the lock {rid.digest} was granted {late} times in a row,"
                        " and each lease had ended before it could be used; a longer lease is needed"
                    )
                continue
            held.claiming = False
            if room.beaten or now - room.freed_at > _AGAIN:
                room.streak_from, room.streak = now, 0
            room.beaten, room.streak = 0, room.streak + 1
            plan.rooms.admit(room, held)
            if plan.heartbeat:
                driver.beat(held)
            if held.watch is not None:
                driver.beat(held.watch)
            held.report("taken_over" if reply.took_over else "claimed")
            return True
        held.claiming = False
        if not isinstance(reply, Busy):
            raise BackendError(f"the record of the lock {rid.digest} is no lock's: the backend answered {reply!r}")
        now, late = driver.now(), 0
        room.rivals_until = now + _RIVALS
        room.beaten += 1
        left = None if until is None else until - now
        if left is not None and left <= 0:
            return False
        held.report_wait()
        patience = max(0.001, reply.lease_left if left is None else min(left, reply.lease_left))
        place.trust(now, now + patience + trust)
        if plan.heartbeat and held.beating is None:
            driver.expect(held)
        held.in_line = True
        try:
            await plan.backend.changed(rid, token=reply.token, timeout=patience)
        except BackendError as error:  # the next claim tells whether the backend is out
            held.report("backend_error", error=error)
            await driver.sleep(min(patience, 0.05 * (0.5 + random())))


async def _outwait(driver: Driver, room: Room, place: Place, holder: Held, left: float | None, trust: float) -> None:
    """Wait until a hold of this process has ended, at most to its lease's present end."""
    waiter = place.waiter = driver.waiter()
    now = driver.now()
    if room.holder(now) is holder:
        patience = max(0.001, holder.valid_until - now)
        place.trust(now, now + patience + trust)
        await waiter.wait(patience if left is None else min(patience, left))
    place.waiter = None


def _courtesy(plan: Plan, room: Room, now: float) -> float:
    """Seconds to step back, so that other processes are not starved by the one that is woken first; 0.0: none."""
    since = now - room.freed_at
    if since > _RECENT or room.beaten >= _PATIENT or plan.backend.name == "local":
        return 0.0
    has_its_way = since < _AGAIN and room.streak >= _TIMES and now - room.streak_from > _STREAK
    if now < room.rivals_until or has_its_way:
        return _STEP_BACK * (1 + random()) / (1 + room.beaten)
    return 0.0


async def _still_ours(driver: Driver, held: Held) -> bool:
    """Whether a claim whose reply came after its lease is held nevertheless; the lease then begins anew."""
    plan, sent = held.plan, driver.now()
    answer = await plan.backend.renew(held.rid, attempt=held.attempt, token=held.token, lease=plan.lease)
    held.valid_until = sent + plan.lease * (1 - MARGIN)
    return answer is Answer.DONE and driver.now() < held.valid_until


async def withdraw(driver: Driver, held: Held, error: BaseException) -> None:
    """End an acquisition that raised, so that nothing stays locked and no wake-up is kept; never masks `error`.

    A server that does not answer makes a withdrawal cost another deadline, as the lease ends by itself a short one
    unless the caller was interrupted.
    """
    try:
        if held.inherited or held.over:
            return
        try:
            await driver.still(held)
            if held.fence is not None and not held.claiming:
                await release(driver, held)
            elif held.claiming:
                backend = held.plan.backend
                if driver.now() >= held.answer_due and isinstance(error, Exception):
                    backend = backend.within(_AFTER_ALL)
                await backend.release(held.rid, attempt=held.attempt, token=None)
        except (BackendError, NotHeld) as failure:
            held.report("backend_error", error=failure)
        # Before the next of this process comes first, who would be taken out of the line in its stead.
        await _pass_on(held)
    finally:
        leave(driver, held)


async def release(driver: Driver, held: Held) -> None:
    """Free the lock. After BackendUnavailable it may be called again, and the lease ends by itself.

    Raises:
        NotHeld: it was released before, it is the parent process's, or another has taken it; nothing was freed.
        BackendUnavailable: the backend did not confirm.
    """
    if held.inherited or held.over:
        raise not_held(held)
    try:
        if held.beating is not None or held.watch is not None:
            await _still(driver, held)
        freed = await _send_release(driver, held)
    finally:
        held.plan.rooms.give_up(held)
    with held.plan.rooms.lock:
        if held.over:  # another thread released it meanwhile
            raise not_held(held)
        held.over = True
    if not freed:
        if not held._lost:
            held.mark_lost()
            held.report("lease_lost")
        raise not_held(held)
    held.report("released")


async def _send_release(driver: Driver, held: Held) -> bool:
    """Send the release until the backend answers or its time is over; whether the lock was held until then."""
    backend, lapsed = held.plan.backend, held.lost
    until, pause = driver.now() + backend.timeout, 0.01
    while True:
        sent, sent_before = driver.now(), held.release_sent is not None
        if held.release_sent is None:
            held.release_sent = sent
        try:
            answer = await backend.release(held.rid, attempt=held.attempt, token=held.token)
        except BackendUnavailable as error:
            held.report("backend_error", error=error)
            if driver.now() + pause >= until:
                raise
            await driver.sleep(pause * (0.5 + random() / 2))
            pause = min(2 * pause, 0.5)
            continue
        if answer is Answer.DONE or sent_before:
            return True  # what was sent before may have been applied, and another holds it since
        if lapsed:
            return False
        if answer is Answer.GONE:
            # One that took so long may have been sent again by the backend itself, and another's claim that was taken back
            # since has left its tombstone in the place of ours.
            return driver.now() - sent >= backend.timeout / 2
        # It was held when this was sent, and the backend sends again by itself, too: then whoever came, and may be gone
        # again, came after the release. Only who is there for longer came before it, as after a `break_`, or has left a
        # token from before it: tokens are the backend's microseconds, and GONE says that none stands above this one (which
        # is early by as long as the reply to our claim took: who came so shortly before the release gets the doubt).
        found = await backend.read(held.rid)
        if found is not None:
            return found.age < driver.now() - sent
        bound = held.token + micros((sent - held.granted) * (1 - MARGIN))
        return await backend.release(held.rid, attempt=held.attempt, token=bound) is not Answer.GONE


async def extend(driver: Driver, held: Held, lease: float | None) -> None:
    """Restart the lease from now.

    Raises LockLost, NotHeld, and BackendUnavailable if the backend did not confirm; the hold then stands as before.
    """
    held.check()
    plan = held.plan if lease is None else held.plan.leased(lease)
    valid_until = held.valid_until
    try:
        await _still(driver, held)
        valid_until = driver.now() + plan.lease * (1 - MARGIN)
        answer = await plan.backend.renew(held.rid, attempt=held.attempt, token=held.token, lease=plan.lease)
        if answer is Answer.DONE:
            held.plan, held.valid_until = plan, valid_until
        elif not held.over:
            held.lose()
    except BaseException:
        held.valid_until = min(held.valid_until, valid_until)  # a shorter lease may have been applied
        raise
    finally:
        if not held._over_here():
            if plan.heartbeat:
                driver.beat(held)
            if held.watch is not None:
                driver.beat(held.watch)
    held.check()


async def _still(driver: Driver, held: Held) -> None:
    await driver.still(held)
    if held.watch is not None:
        await driver.still(held.watch)


class Ending:
    """The end of a `with` block: what it raises is decided in one place for both colours."""

    __slots__ = ("_held", "error", "lost")

    def __init__(self, held: Held, error: BaseException | None) -> None:
        self._held = held
        self.error = error
        """What the body raised."""
        # Looked at before the release: whether the *body* may have run unprotected.
        self.lost = held.lost

    async def run(self, driver: Driver) -> Self:
        """Free the lock, if it is still to be freed. A backend that is out is no reason to fail: the lease ends."""
        held = self._held
        if not held.over and not held.inherited:
            try:
                await release(driver, held)
            except NotHeld:
                self.lost = self.lost or held._lost
            except BackendError as failure:
                held.report("backend_error", error=failure)
        return self

    def tell(self) -> None:
        """Raise LockLost if the body may have run unprotected; the body's own exception gets a note instead."""
        if self.lost:
            lost = lock_lost(self._held)
            if self.error is None:
                raise lost
            self.error.add_note(f"idempotent: {lost}")


async def read(plan: Plan, rid: RecordId) -> Record | None:
    """The record of a lock that is held; None: it is free."""
    record = await plan.backend.read(rid)
    if record is None or record.state != "running" or (record.lease_left or 0.0) <= 0:
        return None
    return record


async def break_(plan: Plan, rid: RecordId) -> bool:
    """Take the lock from whoever holds it, dead or alive; whether there was one."""
    found = await plan.backend.forget(rid, force=True)
    if found is None or found.state != "running":
        return False
    plan.report("broken", rid, found.token)
    held = plan.rooms.hold_of(rid, found.token)
    if held is not None:
        held.lose()
    return True


@functools.cache
def _owner(pid: int) -> bytes:
    """What a lock's record says of its holder."""
    return f"{pid}@{socket.gethostname()}".encode(errors="replace")[:OWNER_BYTES]
