"""The lock's flows: acquire, renew, extend, release. Written once, as `async def`, over the Backend contract.

A lock is a claim that is released instead of completed, in a key space of its own: `takeover=True`, no fingerprint.
Whatever `_machine` promises for a claim (one owner, growing tokens, commands that know their earlier selves) holds for it.

Within one process those who want a lock stand in line, in a Room: threads and tasks of any loop together, first come,
first served. Only the first of them asks the backend, and not even that one while a hold of this process is known to
stand. The line is about order and about commands saved, never about safety: the backend alone decides who holds, so a
place whose thread or loop is gone may be passed over.

Between processes the backend wakes one waiter of each, and the quickest gets the lock. The process that gave it up is
quickest by nature, so it steps back for a moment where it has met others lately, or has had its way for long.
"""

import functools
import os
import socket
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from random import random
from typing import Any, Protocol, Self

from idempotent import _flow as flow
from idempotent import events
from idempotent._record import ATTEMPT_BYTES, OWNER_BYTES, Answer, Busy, Claim, Granted, Record, RecordId
from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends.base import Backend
from idempotent.errors import BackendError, BackendUnavailable, LockError, LockLost, NotHeld
from idempotent.events import EventName, Hook

_KEEP = 60.0
"""Seconds past its lease that the record of a dead holder is kept."""
_PROMPT = 1.0
"""Seconds in which whoever has become first in line must begin to ask; a blocked event loop is passed over."""
_AGAIN = 0.002
"""Seconds after a release within which the same process, asking again, would nearly always be first."""
_STEP_BACK = 0.001
"""Seconds that it then waits at the least: the time in which others are woken and ask."""
_RECENT = 0.1
"""Seconds after a release for which a process that met others lets them go first, as long as they are more patient."""
_PATIENT = 7
"""So often must others have been quicker before a process steps back no more."""
_RIVALS = 1.0
"""Seconds for which another process is remembered to want the lock."""
_STREAK = 0.1
"""Seconds for which a process may have its way, although no other was met."""


class Plan:
    """What one lock asked for; durations in seconds."""

    __slots__ = ("backend", "heartbeat", "hooks", "lease", "max_hold", "on_lost", "rooms", "wait")

    def __init__(
        self,
        *,
        backend: Backend,
        rooms: "Rooms",
        lease: float,
        wait: float | None,
        heartbeat: bool,
        max_hold: float | None,
        on_lost: str | Callable[[Any], object],
        hooks: tuple[Hook, ...],
    ) -> None:
        self.backend = backend
        self.rooms = rooms
        self.lease = lease
        self.wait = wait
        self.heartbeat = heartbeat
        self.max_hold = max_hold
        self.on_lost = on_lost
        self.hooks = hooks

    def leased(self, lease: float) -> "Plan":
        """This plan with another lease."""
        return Plan(
            backend=self.backend,
            rooms=self.rooms,
            lease=lease,
            wait=self.wait,
            heartbeat=self.heartbeat,
            max_hold=self.max_hold,
            on_lost=self.on_lost,
            hooks=self.hooks,
        )

    def report(
        self, name: EventName, rid: RecordId, token: int | None = None, error: BaseException | None = None
    ) -> None:
        """Tell the hooks."""
        if events.wanted(self.hooks, name):
            kind = None if error is None else type(error).__name__
            event = events.Event(name, rid.namespace, rid.digest, self.backend.name, token, None, kind)
            events.dispatch(self.hooks, event)


class Driver(Protocol):
    """How a flow waits and beats."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        ...

    def waiter(self) -> ThreadWaiter | TaskWaiter:
        """A wait of the caller's own, that other threads and loops can end."""
        ...

    def beat(self, run: "Held | Watch") -> None:
        """Await `run.beat` after a third of its lease, and whenever it says."""
        ...

    async def still(self, run: "Held | Watch") -> None:
        """Stop the beats of `run` and wait for one that is under way."""
        ...


class _Thread:
    """A live thread: idents, and the Thread objects of foreign threads, are used again."""

    __slots__ = ("__weakref__", "ref")

    def __init__(self) -> None:
        self.ref = weakref.ref(self)


_here = threading.local()


def _owner() -> bytes:
    """What a lock's record says of its holder."""
    return f"{os.getpid()}@{_host()}".encode(errors="replace")[:OWNER_BYTES]


@functools.cache
def _host() -> str:
    return socket.gethostname()


class Asker:
    """Who asks: the thread, and the task if one is running in it. Holds neither alive."""

    __slots__ = ("is_async", "task", "thread")

    def __init__(self, *, is_async: bool) -> None:
        try:
            here: _Thread = _here.thread
        except AttributeError:
            here = _here.thread = _Thread()
        self.thread = here.ref
        self.is_async = is_async
        task = _running_task()
        self.task = None if task is None else weakref.ref(task)

    def is_me(self, other: "Asker") -> bool:
        """Whether `other`, who is asking now, could only wait for itself if it waited for this one."""
        if self.task is not None and other.task is not None and self.task() is other.task():
            return True
        # Of a thread's tasks one may hold and another await; but who blocks the thread blocks its holder, too.
        return not self.is_async and not other.is_async and self.thread() is other.thread()


def _running_task() -> Any:
    asyncio = sys.modules.get("asyncio")
    if asyncio is None or asyncio._get_running_loop() is None:
        return None
    return asyncio.current_task()


class Held:
    """One acquisition: first a question, then, once granted, the hold itself. All of a lock's state lives here."""

    __slots__ = (
        "__weakref__",
        "_driver",
        "_lost",
        "answer_due",
        "asker",
        "attempt",
        "beating",
        "begun",
        "claiming",
        "fence",
        "forks",
        "given_up",
        "over",
        "plan",
        "release_sent",
        "rid",
        "tell",
        "valid_until",
        "waited",
        "watch",
    )

    def __init__(self, driver: Driver, plan: Plan, rid: RecordId, asker: Asker) -> None:
        self._driver = driver
        self.plan = plan
        self.rid = rid
        self.asker = asker
        self.attempt = os.urandom(ATTEMPT_BYTES)
        self.fence: int | None = None
        """The token; None until the claim is confirmed."""
        self.claiming = False
        """A claim was sent and its reply has not come."""
        self.answer_due = 0.0
        """Monotonic seconds at which a backend that answers at all would have answered the claim."""
        self.begun = 0.0
        """Monotonic seconds: before the claim was sent."""
        self.valid_until = 0.0
        """Monotonic seconds until which nobody else can hold the lock."""
        self.waited = False
        self._lost = False
        self.over = False
        """Released, or given away by its end."""
        self.given_up = False
        """No longer to be waited for in this process: over, lost, or its release is in doubt."""
        self.release_sent: float | None = None
        self.beating: Any = None
        """The driver's own mark while it beats for this hold."""
        self.tell: Callable[[], None] | None = None
        """Does what `on_lost` says, without delay and without blocking."""
        self.watch = None if plan.on_lost == "raise" else Watch(self)
        self.forks = flow._forks

    @property
    def inherited(self) -> bool:
        """This process was forked inside the hold, which is its parent's."""
        return self.forks != flow._forks

    @property
    def token(self) -> int:
        """The fencing token; 0 before the claim is confirmed."""
        return self.fence or 0

    @property
    def lost(self) -> bool:
        """Whether another may hold the lock by now; once true it stays true."""
        if not self._lost and not self.over and self.fence is not None and self._driver.now() >= self.valid_until:
            self.lose()
        return self._lost or self.inherited

    def remaining(self) -> float:
        """Seconds of local validity."""
        return 0.0 if self.over or self.lost else max(0.0, self.valid_until - self._driver.now())

    def check(self) -> None:
        """Raise LockLost or NotHeld unless the lock is held."""
        if self.lost:
            raise lock_lost(self)
        if self.over:
            raise not_held(self)

    def lose(self) -> None:
        """Note that the lock is lost, once, and tell whoever wants to know."""
        rooms = self.plan.rooms
        with rooms.lock:
            if self._lost or self.over or self.inherited:
                return
            self._lost = True
        rooms.give_up(self)
        self.report("lease_lost")
        if self.tell is not None:
            self.tell()

    async def beat(self, driver: Driver) -> float | None:
        """Renew the lease once. Seconds until the next beat; None: there is none."""
        if self._over_here():
            return None
        plan, sent = self.plan, driver.now()
        if sent >= self.valid_until:
            self.lose()
            return None
        lease = plan.lease
        if plan.max_hold is not None:
            lease = min(lease, self.begun + plan.max_hold - sent)
            if sent + lease * (1 - flow._MARGIN) <= self.valid_until:
                return None
        try:
            answer = await plan.backend.renew(self.rid, attempt=self.attempt, token=self.token, lease=lease)
        except BackendError as error:
            # Neither a yes nor a no: ask again soon, and count as lost once local validity is over.
            self.report("backend_error", error=error)
            left = self.valid_until - driver.now()
            return min(plan.lease / 3, max(0.02, left / 4))
        if self._over_here():
            return None
        if answer is not Answer.DONE:
            self.lose()
            return None
        self.valid_until = sent + lease * (1 - flow._MARGIN)
        return plan.lease / 3 if lease == plan.lease else None

    def _over_here(self) -> bool:
        return self.over or self._lost or self.inherited

    def report_wait(self) -> None:
        """Tell the hooks, once, that it has to wait."""
        if not self.waited:
            self.waited = True
            self.report("waited")

    def report(self, name: EventName, *, error: BaseException | None = None) -> None:
        """Tell the hooks."""
        self.plan.report(name, self.rid, self.fence, error)


class Watch:
    """Notices that a hold is lost at the very moment, also while a renewal gets no answer: for `on_lost`."""

    __slots__ = ("beating", "held")

    def __init__(self, held: Held) -> None:
        self.held = held
        self.beating: Any = None

    @property
    def plan(self) -> Plan:
        """The plan of the hold."""
        return self.held.plan

    async def beat(self, driver: Driver) -> float | None:
        """Look once. Seconds until the hold could be lost; None: it is, or is over."""
        held = self.held
        return None if held.over or held.lost else max(0.001, held.valid_until - driver.now())

    def report(self, name: EventName, *, error: BaseException | None = None) -> None:
        """Tell the hooks."""
        self.held.report(name, error=error)


def renewal(driver: Driver, run: Held | Watch) -> Any:
    """One beat of `run`, for the heartbeats."""
    return run.beat(driver)


class _Place:
    """One place in a line."""

    __slots__ = ("passed_over", "trusted_until", "waiter")

    def __init__(self) -> None:
        self.trusted_until = 0.0
        """First in line only: monotonic seconds until which it is taken for alive."""
        self.waiter: ThreadWaiter | TaskWaiter | None = None
        self.passed_over = False

    def wake(self) -> None:
        if self.waiter is not None:
            self.waiter.wake()


class Room:
    """Where those of one process wait who want one lock."""

    __slots__ = ("beaten", "freed_at", "hold", "line", "rivals_until", "streak_from")

    def __init__(self) -> None:
        self.line: deque[_Place] = deque()
        self.hold: weakref.ref[Held] | None = None
        """The last hold of this process."""
        self.freed_at = -1.0
        """Monotonic seconds: when a hold of this process ended last."""
        self.beaten = 0
        """How often other processes have been quicker since this one had the lock."""
        self.rivals_until = 0.0
        """Monotonic seconds until which other processes are taken to want the lock."""
        self.streak_from = 0.0
        """Monotonic seconds: since when this process has had the lock each time it wanted it."""

    def holder(self, now: float) -> Held | None:
        """The hold of this process that stands, as far as can be told here."""
        held = None if self.hold is None else self.hold()
        if held is None or held.given_up or held.valid_until <= now or held.inherited:
            return None
        return held


class Rooms:
    """The rooms of one backend in this process, for locks of both colours."""

    __slots__ = ("__weakref__", "_by_key", "_sweep_at", "lock")

    def __init__(self) -> None:
        self.reset()
        _all_rooms.add(self)

    def reset(self) -> None:
        """Empty the rooms: after a fork those inside are threads of the parent process."""
        self.lock = threading.RLock()  # the collector may end a lost task's wait while this thread holds it
        self._by_key: dict[str, Room] = {}
        self._sweep_at = 1024

    def enter(self, held: Held, place: _Place, now: float) -> tuple[Room, bool]:
        """The room of the lock, with `place` at the end of its line, and whether it is first.

        Raises LockError if the asker itself is the holder.
        """
        key = held.rid.text
        with self.lock:
            room = self._by_key.get(key)
            if room is None:
                if len(self._by_key) >= self._sweep_at:
                    self._sweep(now)
                room = self._by_key[key] = Room()
            holder = room.holder(now)
            if holder is not None and holder.asker.is_me(held.asker):
                raise LockError(
                    f"the lock {held.rid.digest} is not re-entrant: this {'task' if held.asker.is_async else 'thread'}"
                    " holds it already and would wait for itself; pass the hold on, or release it first"
                )
            place.trusted_until = now + _PROMPT
            room.line.append(place)
            return room, len(room.line) == 1

    def leave(self, room: Room, place: _Place, now: float) -> None:
        """Take `place` out of the line; the next one is told that it is first."""
        with self.lock:
            if room.line and room.line[0] is place:
                room.line.popleft()
                if room.line:
                    self._promote(room, now)
            elif place in room.line:
                room.line.remove(place)

    def first(self, room: Room, place: _Place, driver: Driver) -> tuple[float, ThreadWaiter | TaskWaiter] | None:
        """None: `place` is first. Else for how many seconds to wait, and with what."""
        with self.lock:
            if place.passed_over:
                place.passed_over = False
                room.line.append(place)
            now = driver.now()
            while room.line[0] is not place and room.line[0].trusted_until <= now:
                room.line.popleft().passed_over = True
                self._promote(room, now)
            if room.line[0] is place:
                return None
            place.waiter = driver.waiter()
            return room.line[0].trusted_until - now, place.waiter

    @staticmethod
    def _promote(room: Room, now: float) -> None:
        room.line[0].trusted_until = now + _PROMPT
        room.line[0].wake()

    def admit(self, room: Room, held: Held) -> None:
        """`held` holds the lock."""
        room.hold = weakref.ref(held)

    def give_up(self, held: Held) -> None:
        """Nobody in this process is to wait for `held` any more."""
        with self.lock:
            if held.given_up:
                return
            held.given_up = True
            room = self._by_key.get(held.rid.text)
            if room is not None:
                room.freed_at = held._driver.now()
                if room.line:
                    room.line[0].wake()

    def hold_of(self, rid: RecordId, token: int) -> Held | None:
        """The hold of this process that has `token`."""
        room = self._by_key.get(rid.text)
        held = None if room is None or room.hold is None else room.hold()
        return held if held is not None and held.token == token and not held.inherited else None

    def _sweep(self, now: float) -> None:
        for key in [key for key, room in self._by_key.items() if not room.line and room.holder(now) is None]:
            del self._by_key[key]
        self._sweep_at = max(1024, 2 * len(self._by_key))


_all_rooms: weakref.WeakSet[Rooms] = weakref.WeakSet()
_of_backend_lock = threading.Lock()
_of_backend: weakref.WeakKeyDictionary[Backend, Rooms] = weakref.WeakKeyDictionary()


def rooms_of(backend: Backend) -> Rooms:
    """The rooms of locks on `backend`."""
    with _of_backend_lock:
        rooms = _of_backend.get(backend)
        if rooms is None:
            rooms = _of_backend[backend] = Rooms()
        return rooms


def _after_fork() -> None:
    global _of_backend_lock
    _of_backend_lock = threading.Lock()
    for rooms in list(_all_rooms):
        rooms.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def lock_lost(held: Held) -> LockLost:
    """The error that says so."""
    return LockLost(
        f"the lock {held.rid.digest} was lost: the lease of the hold with token {held.token} ended,"
        " and another may hold it. Raise lease=, do not block the event loop, and let the resource compare tokens"
    )


def not_held(held: Held) -> NotHeld:
    """The error that says so."""
    return NotHeld(
        f"the lock {held.rid.digest} is not held by this hold (token {held.token}): it was released, it is another"
        " process's, or its lease ended and another holds it. Nothing was freed"
    )


async def acquire(driver: Driver, held: Held, wait: float | None) -> bool:
    """Claim the lock for `held`; False: `wait` seconds (None: no limit) ran out.

    Raises:
        LockError: the asking thread or task holds it.
        BackendUnavailable: the claim could not be confirmed.
    """
    rooms, place, now = held.plan.rooms, _Place(), driver.now()
    until = None if wait is None else now + wait
    room, first = rooms.enter(held, place, now)
    try:
        if (first or await _turn(driver, held, room, place, until)) and await _ask(driver, held, room, place, until):
            return True
    finally:
        rooms.leave(room, place, driver.now())
    held.report("busy")
    return False


async def _turn(driver: Driver, held: Held, room: Room, place: _Place, until: float | None) -> bool:
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


async def _ask(driver: Driver, held: Held, room: Room, place: _Place, until: float | None) -> bool:
    """Claim until the claim is granted; wait while others hold the lock. False: time ran out."""
    plan, rid = held.plan, held.rid
    trust = 2 * plan.backend.timeout + plan.lease
    stepped_back = False
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
            stepped_back, room.streak_from = True, now + pause
            place.trusted_until = now + pause + trust
            await driver.sleep(pause if left is None else min(pause, max(0.0, left)))
            continue
        stepped_back = False
        place.trusted_until = now + trust
        held.claiming = True
        held.answer_due = now + 0.9 * min(plan.lease, plan.backend.timeout)
        try:
            reply: Claim = await plan.backend.claim(
                rid, attempt=held.attempt, fingerprint=b"", lease=plan.lease, keep=_KEEP, takeover=True, owner=_owner()
            )
        except BackendError as error:
            held.report("backend_error", error=error)
            raise
        if isinstance(reply, Granted):
            held.fence = reply.token
            held.begun = now
            held.valid_until = now + plan.lease * (1 - flow._MARGIN)
            if driver.now() >= held.valid_until and not await _still_ours(driver, held):
                held.fence, held.attempt = None, os.urandom(ATTEMPT_BYTES)
                held.claiming = False
                continue
            held.claiming = False
            if room.beaten or now - room.freed_at > _AGAIN:
                room.streak_from = now
            room.beaten = 0
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
        now = driver.now()
        room.rivals_until = now + _RIVALS
        room.beaten += 1
        left = None if until is None else until - now
        if left is not None and left <= 0:
            return False
        held.report_wait()
        patience = max(0.001, reply.lease_left if left is None else min(left, reply.lease_left))
        place.trusted_until = now + patience + trust
        try:
            await plan.backend.changed(rid, token=reply.token, timeout=patience)
        except BackendError as error:  # the next claim tells whether the backend is out
            held.report("backend_error", error=error)
            await driver.sleep(min(patience, 0.05))


async def _outwait(driver: Driver, room: Room, place: _Place, holder: Held, left: float | None, trust: float) -> None:
    """Wait until a hold of this process has ended, at most to its lease's present end."""
    waiter = place.waiter = driver.waiter()
    now = driver.now()
    if room.holder(now) is holder:
        patience = max(0.001, holder.valid_until - now)
        place.trusted_until = now + patience + trust
        await waiter.wait(patience if left is None else min(patience, left))
    place.waiter = None


def _courtesy(plan: Plan, room: Room, now: float) -> float:
    """Seconds to step back, so that other processes are not starved by the one that is woken first; 0.0: none."""
    since = now - room.freed_at
    if since > _RECENT or room.beaten >= _PATIENT or plan.backend.name == "local":
        return 0.0
    if now < room.rivals_until or (since < _AGAIN and now - room.streak_from > _STREAK):
        return _STEP_BACK * (1 + random()) / (1 + room.beaten)
    return 0.0


async def _still_ours(driver: Driver, held: Held) -> bool:
    """Whether a claim whose reply came after its lease is held nevertheless; the lease then begins anew."""
    plan, sent = held.plan, driver.now()
    answer = await plan.backend.renew(held.rid, attempt=held.attempt, token=held.token, lease=plan.lease)
    held.valid_until = sent + plan.lease * (1 - flow._MARGIN)
    return answer is Answer.DONE and driver.now() < held.valid_until


async def withdraw(driver: Driver, held: Held, error: BaseException) -> None:
    """End an acquisition that raised, so that nothing stays locked; never masks `error`.

    A server that does not answer makes a withdrawal cost a deadline more: not worth it unless the caller was
    interrupted, as the lease ends by itself.
    """
    if held.inherited or held.over:
        return
    try:
        if held.fence is not None and not held.claiming:
            await release(driver, held)
        elif held.claiming and (driver.now() < held.answer_due or not isinstance(error, Exception)):
            await held.plan.backend.release(held.rid, attempt=held.attempt, token=None)
    except (BackendError, NotHeld) as failure:
        held.report("backend_error", error=failure)


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
            held._lost = True
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
        if answer is Answer.GONE or lapsed:
            return False
        # The backend sends again by itself, too: then whoever holds it came after the release, and not before.
        found = await backend.read(held.rid)
        return found is not None and found.age < driver.now() - sent


async def extend(driver: Driver, held: Held, lease: float | None) -> None:
    """Restart the lease from now.

    Raises LockLost, NotHeld, and BackendUnavailable if the backend did not confirm; the hold then stands as before.
    """
    held.check()
    plan = held.plan if lease is None else held.plan.leased(lease)
    valid_until = held.valid_until
    try:
        await _still(driver, held)
        valid_until = driver.now() + plan.lease * (1 - flow._MARGIN)
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
