"""Holds of locks in this process, and the line of those who want one.

Within one process those who want a lock stand in line, in a Room: threads and tasks of any loop together, first come,
first served. Only the first of them asks the backend, and not even that one while a hold of this process is known to
stand. The line is about order and about commands saved, never about safety: the backend alone decides who holds, so a
place whose thread or loop is gone may be passed over.
"""

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from idempotent import events
from idempotent._record import ATTEMPT_BYTES, Answer, RecordId
from idempotent._run import MARGIN, forks
from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends.base import Backend
from idempotent.errors import BackendError, LockError, LockLost, NotHeld
from idempotent.events import EventName, Hook

_PROMPT = 1.0
"""Seconds in which whoever has become first in line must begin to ask; a blocked event loop is passed over."""
_ANSWER = 2.0
"""Seconds in which an event loop must answer those who wait behind one of its tasks."""


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

    def expect(self, run: "Held | Watch") -> None:
        """Make ready to beat for `run`, which waits; `still` ends this, too."""
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

    # Most acquisitions leave most of these as they are, so one is made without them.
    fence: int | None = None
    """The token; None until the claim is confirmed."""
    claiming = False
    """A claim was sent and its reply has not come."""
    answer_due = 0.0
    """Monotonic seconds at which a backend that answers at all would have answered the claim."""
    place: "Place | None" = None
    """Where it waits among those of its process."""
    in_line = False
    """It waits at the backend, or has been woken there and has not claimed since."""
    begun = 0.0
    """Monotonic seconds: before the claim was sent,"""
    granted = 0.0
    """and after its reply had come."""
    valid_until = 0.0
    """Monotonic seconds until which nobody else can hold the lock, unless its record is taken away."""
    waited = False
    _lost = False
    taken = False
    """Lost within its lease, as the backend says."""
    over = False
    """Released, or given away by its end."""
    given_up = False
    """No longer to be waited for in this process: over, lost, or its release is in doubt."""
    release_sent: float | None = None
    beating: Any = None
    """The driver's own mark while it beats for this hold."""
    tell: "Callable[[Held], None] | None" = None
    """Does what `on_lost` says, without delay and without blocking."""
    user: "weakref.ref[Any] | None" = None
    """The caller's own object for this hold: once nobody refers to that, nobody can release it."""
    watch: "Watch | None" = None

    def __init__(self, driver: Driver, plan: Plan, rid: RecordId, asker: Asker) -> None:
        self._driver = driver
        self.plan = plan
        self.rid = rid
        self.asker = asker
        self.attempt = self.new_attempt()
        self.forks = forks()
        if plan.on_lost != "raise":
            self.watch = Watch(self)

    def new_attempt(self) -> bytes:
        """An id that no other attempt has."""
        return os.urandom(ATTEMPT_BYTES)

    @property
    def inherited(self) -> bool:
        """This process was forked inside the hold, which is its parent's."""
        return self.forks != forks()

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
            self.mark_lost()
        rooms.give_up(self)
        self.report("lease_lost")
        if self.tell is not None:
            self.tell(self)

    def mark_lost(self) -> None:
        """It is lost; the backend says so if its lease has not ended here."""
        self._lost, self.taken = True, self._driver.now() < self.valid_until

    async def beat(self, driver: Driver) -> float | None:
        """Renew the lease once. Seconds until the next beat; None: there is none."""
        if self._over_here() or self._is_dropped():
            return None
        plan, sent = self.plan, driver.now()
        if sent >= self.valid_until:
            self.lose()
            return None
        lease = plan.lease
        if plan.max_hold is not None:
            lease = min(lease, self.begun + plan.max_hold - sent)
            if sent + lease * (1 - MARGIN) <= self.valid_until:
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
        self.valid_until = sent + lease * (1 - MARGIN)
        return plan.lease / 3 if lease == plan.lease else None

    def _over_here(self) -> bool:
        # Once a release was sent, a renewal that finds nothing is no loss.
        return self.over or self._lost or self.inherited or self.release_sent is not None

    def _is_dropped(self) -> bool:
        """Nobody can release it, so its lease is to run out: an exception came between the grant and the caller."""
        if self.user is None or self.user() is not None:
            return False
        self.plan.rooms.give_up(self)
        if self.watch is None:  # else that one tells, at the lease's end
            self.report("lease_lost")
        return True

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


class Place:
    """One place in a line."""

    __slots__ = ("_loop", "passed_over", "trusted_until", "waiter")

    def __init__(self, *, is_async: bool) -> None:
        self._loop: Any = sys.modules["asyncio"].get_running_loop() if is_async else None
        self.trusted_until = 0.0
        """First in line only: monotonic seconds until which it is taken for alive."""
        self.waiter: ThreadWaiter | TaskWaiter | None = None
        self.passed_over = False

    def trust(self, now: float, until: float) -> None:
        """It has something to do until monotonic `until`. A task's event loop, which may be closed or blocked, is asked."""
        self.trusted_until = until if self._loop is None else min(until, now + _ANSWER)

    def is_alive(self, now: float) -> bool:
        """Whether it is to be waited for; a task's loop is asked to show that it still runs."""
        if now >= self.trusted_until:
            return False
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # closed
                return False
        return True

    def _answer(self) -> None:
        self.trusted_until = max(self.trusted_until, time.monotonic() + _ANSWER)

    def wake(self) -> None:
        if self.waiter is not None:
            self.waiter.wake()


class Room:
    """Where those of one process wait who want one lock."""

    __slots__ = ("beaten", "freed_at", "hold", "line", "rivals_until", "streak", "streak_from")

    def __init__(self) -> None:
        self.line: deque[Place] = deque()
        self.hold: weakref.ref[Held] | None = None
        """The last hold of this process."""
        self.freed_at = -1.0
        """Monotonic seconds: when a hold of this process ended last."""
        self.beaten = 0
        """How often other processes have been quicker since this one had the lock."""
        self.rivals_until = 0.0
        """Monotonic seconds until which other processes are taken to want the lock."""
        self.streak = 0
        """How often in a row this process has had the lock each time it wanted it,"""
        self.streak_from = 0.0
        """and since when, in monotonic seconds."""

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

    def enter(self, held: Held, place: Place, now: float) -> tuple[Room, bool]:
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
            place.trust(now, now + _PROMPT)
            room.line.append(place)
            return room, len(room.line) == 1

    def leave(self, held: Held, place: Place, now: float) -> None:
        """Take `place` out of the line, if it is in it; the next one is told that it is first."""
        with self.lock:
            room = self._by_key.get(held.rid.text)
            if room is None:
                return
            if room.line and room.line[0] is place:
                room.line.popleft()
                if room.line:
                    self._promote(room, now)
            elif place in room.line:
                room.line.remove(place)

    def first(self, room: Room, place: Place, driver: Driver) -> tuple[float, ThreadWaiter | TaskWaiter] | None:
        """None: `place` is first. Else for how many seconds to wait, and with what."""
        with self.lock:
            if place.passed_over:
                place.passed_over = False
                room.line.append(place)
            now = driver.now()
            while room.line[0] is not place and not room.line[0].is_alive(now):
                room.line.popleft().passed_over = True
                self._promote(room, now)
            if room.line[0] is place:
                return None
            place.waiter = driver.waiter()
            return max(0.0, room.line[0].trusted_until - now), place.waiter

    @staticmethod
    def _promote(room: Room, now: float) -> None:
        room.line[0].trust(now, now + _PROMPT)
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
    told = f"the lock {held.rid.digest} was lost: "
    if held.inherited:
        return LockLost(f"{told}the hold with token {held.token} is the parent process's; a forked child has none")
    if held.taken:
        return LockLost(
            f"{told}the hold with token {held.token} was {_TAKEN}, and another may hold it."
            " Let the resource compare tokens"
        )
    return LockLost(
        f"{told}the lease of the hold with token {held.token} ended, and another may hold it."
        " Raise lease=, do not block the event loop, and let the resource compare tokens"
    )


_TAKEN = "taken away (broken by an operator, deleted, or forgotten by the store)"


def not_held(held: Held) -> NotHeld:
    """The error that says so."""
    if held.inherited:
        why = "it is the parent process's"
    elif held.taken:
        why = f"it was {_TAKEN}"
    else:
        why = "its lease had ended" if held._lost else "it was released"
    return NotHeld(
        f"the lock {held.rid.digest} is not held by this hold (token {held.token}): {why}. Nothing was freed"
    )
