"""`Lock`, `AsyncLock` and `@serialized`: one at a time per name, on every backend, with a fencing token.

What a lease-based lock can promise: while `hold.lost` is False nobody else holds the lock, unless its record was taken
away (`break_`, a deleted key, a store that forgot it) or the server's clock stepped ahead: then `hold.lost` is told at
the next heartbeat. It cannot stop a body that is frozen past its lease; the token lets the protected resource refuse it
(Martin Kleppmann, "How to do distributed locking", 2016).
"""

import contextlib
import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from idempotent import _acquire as flow
from idempotent import _config as config
from idempotent._acquire import Ending
from idempotent._config import DEFAULT, Default, Duration, seconds
from idempotent._drive import SyncDriver, drive, finish
from idempotent._record import LOCKS, Record, RecordId
from idempotent._rooms import Asker, Held, Plan, Watch, renewal, rooms_of
from idempotent.backends.base import Backend
from idempotent.errors import IdempotencyError, LockError, LockTimeout
from idempotent.keys import Binder, check_key

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    from idempotent._aio import AsyncDriver

__all__ = ["AsyncHold", "AsyncLock", "Hold", "Lock", "LockInfo", "serialized"]

F = TypeVar("F", bound=Callable[..., Any])

SYNC: SyncDriver[Held | Watch] = SyncDriver(renewal)


@functools.cache
def _async() -> "AsyncDriver[Held | Watch]":
    from idempotent._aio import AsyncDriver  # asyncio is imported only for those who use it

    return AsyncDriver(renewal)


@dataclass(frozen=True, slots=True)
class LockInfo:
    """Who holds a lock, as its record tells."""

    token: int
    """The fencing token of the hold."""
    attempt: str
    """Hex id of the hold."""
    host: str
    """The holder's host name; "": the backend does not keep it."""
    pid: int
    """The holder's process on that host; 0: the backend does not keep it."""
    since: float
    """Seconds since it was acquired."""
    lease_left: float
    """Seconds until the lease ends unless it is renewed."""


def _info(record: Record | None) -> LockInfo | None:
    if record is None:
        return None
    pid, _, host = record.owner.partition("@")  # a store may keep no owners
    return LockInfo(
        token=record.token,
        attempt=record.attempt,
        host=host,
        pid=int(pid) if pid.isdecimal() else 0,
        since=record.age,
        lease_left=record.lease_left or 0.0,
    )


class _Hold:
    """What the holds of both colours have in common."""

    __slots__ = ("__weakref__", "_held")

    def __init__(self, held: Held) -> None:
        self._held = held

    @property
    def name(self) -> str:
        """What is locked."""
        return self._held.rid.key

    @property
    def token(self) -> int:
        """The fencing token: larger than that of every hold of this lock before. Give it to what the lock protects."""
        return self._held.token

    @property
    def lost(self) -> bool:
        """Whether another may hold the lock by now: the lease ran out unrenewed, or the backend says so.

        Counted on this machine's monotonic clock from before the request was sent, less a margin; asks nobody. What
        takes the record away (`break_`, a deleted key) is noticed at the next heartbeat. Once true it stays true. In a
        forked child it is true: the hold is the parent's.
        """
        return self._held.lost

    def remaining(self) -> float:
        """Seconds for which the lock is surely held if nothing renews it; 0.0 once it is lost or released."""
        return self._held.remaining()

    def check(self) -> None:
        """Return if the lock is held: call it before an effect that needs it. Asks nobody.

        Raises:
            LockLost: the lease ended.
            NotHeld: it was released.
        """
        self._held.check()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._held.rid.digest} token={self.token}>"


class Hold(_Hold):
    """A lock that is held: what `Lock.acquire` and `with` give. Any thread may use and release it."""

    __slots__ = ()

    def extend(self, lease: Duration | None = None) -> None:
        """Restart the lease from now.

        Args:
            lease: seconds or timedelta, from now on, for the heartbeat too; None: as long as before.

        Raises:
            LockLost: the lease had ended; nothing was extended.
            NotHeld: the lock was released.
            BackendUnavailable: the backend did not confirm; the hold stands for what it had left.
        """
        drive(flow.extend(SYNC, self._held, None if lease is None else seconds("lease", lease)))

    def release(self) -> None:
        """Free the lock and wake those who wait for it.

        Raises:
            NotHeld: it was released before, is the parent process's, or another holds it by now; nothing was freed.
            BackendUnavailable: the backend did not confirm; call it again, or leave the lease to end by itself.
        """
        try:
            drive(flow.release(SYNC, self._held))
        except IdempotencyError:
            raise
        except BaseException:  # a signal handler's: the lock is freed first
            finish(lambda: flow.release(SYNC, self._held))
            raise

    def _end(self, error: BaseException | None) -> Ending:
        """Free the lock after its block; the caller is to `tell`."""
        ending: Ending | None = None
        try:
            ending = Ending(self._held, error)
            drive(ending.run(SYNC))
        except BaseException:
            finish(lambda: (ending or Ending(self._held, error)).run(SYNC))
            raise
        return ending


def _user_of(held: Held) -> Any:
    """The Hold or AsyncHold that the caller was given; None: nobody has it any more."""
    return None if held.user is None else held.user()


def _tell(held: Held) -> None:
    on_lost = held.plan.on_lost
    if callable(on_lost):
        hold = _user_of(held) or Hold(held)
        # Not on the heartbeat's thread: what it calls, release() for one, may wait for that one.
        threading.Thread(target=on_lost, args=(hold,), name="idempotent-lost", daemon=True).start()


_leaving: set[Any] = set()
"""Tasks that free locks whose blocks could not wait for it."""


def _leave_behind(loop: "AbstractEventLoop", flow: Coroutine[Any, Any, object]) -> None:
    """Run `flow` in a task of its own if `loop` runs here; else nobody can: leases and waits end by themselves."""
    import asyncio

    if asyncio._get_running_loop() is not loop:
        flow.close()
        return
    _leaving.add(task := loop.create_task(flow))
    task.add_done_callback(_leaving.discard)


class AsyncHold(_Hold):
    """A lock that is held: what `AsyncLock.acquire` and `async with` give. Any task may use and release it."""

    __slots__ = ("_cancelled", "_cancelling", "_ended", "_loop", "_task")

    def __init__(self, held: Held) -> None:
        import asyncio

        super().__init__(held)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = asyncio.current_task() if held.plan.on_lost == "cancel" else None
        self._cancelling = 0 if self._task is None else self._task.cancelling()
        self._cancelled = False
        self._ended = False

    async def extend(self, lease: Duration | None = None) -> None:
        """Restart the lease from now.

        Args:
            lease: seconds or timedelta, from now on, for the heartbeat too; None: as long as before.

        Raises:
            LockLost: the lease had ended; nothing was extended.
            NotHeld: the lock was released.
            BackendUnavailable: the backend did not confirm; the hold stands for what it had left.
        """
        await flow.extend(_async(), self._held, None if lease is None else seconds("lease", lease))

    async def release(self) -> None:
        """Free the lock and wake those who wait for it; cancellation does not keep it from that.

        Raises:
            NotHeld: it was released before, is the parent process's, or another holds it by now; nothing was freed.
            BackendUnavailable: the backend did not confirm; call it again, or leave the lease to end by itself.
        """
        from idempotent._aio import finish

        await finish(lambda: flow.release(_async(), self._held))

    def _cancel(self) -> None:
        if self._task is not None and not self._ended and not self._held.over:
            self._cancelled = self._task.cancel()

    async def _end(self, error: BaseException | None) -> None:
        import asyncio

        from idempotent._aio import finish

        self._ended = True
        ending = Ending(self._held, error)
        if isinstance(error, GeneratorExit):  # the coroutine is thrown away and can await nothing
            held = self._held
            _drop(held)
            held.plan.rooms.give_up(held)
            _leave_behind(self._loop, ending.run(_async()))  # or an asynchronous generator ends in its task
            return
        cancelled_too = False
        if self._cancelled and self._task is not None and self._task is asyncio.current_task():
            if not isinstance(error, asyncio.CancelledError):
                try:
                    await asyncio.sleep(0)  # our cancellation may not have reached the body, and is not to go further
                except asyncio.CancelledError:
                    pass
            elif self._task.cancelling() - 1 <= self._cancelling:
                ending.error = None
            cancelled_too = self._task.uncancel() > self._cancelling and not isinstance(error, asyncio.CancelledError)
        await finish(lambda: ending.run(_async()))
        if cancelled_too:
            raise asyncio.CancelledError
        ending.tell()


def _tell_async(loop: "AbstractEventLoop", held: Held) -> None:
    try:
        loop.call_soon_threadsafe(_tell_here, held)
    except RuntimeError:  # the loop is closed: nobody is there to be told
        pass


def _tell_here(held: Held) -> None:
    on_lost, hold = held.plan.on_lost, _user_of(held)
    if callable(on_lost):
        on_lost(hold or AsyncHold(held))
    elif hold is not None:
        hold._cancel()


class _Options:
    """A lock's options, checked, and the plan they make with the defaults of the moment."""

    def __init__(
        self,
        *,
        is_async: bool,
        backend: Backend | str | None,
        namespace: str,
        lease: Duration,
        wait: Duration | None,
        heartbeat: bool,
        max_hold: Duration | None,
        on_lost: Any,
    ) -> None:
        self.is_async = is_async
        self.backend = config.checked({"backend": backend})["backend"]
        if not isinstance(namespace, str):
            raise TypeError(f"namespace must be text, not {namespace!r}")
        self.namespace = check_key(namespace) if namespace else ""
        self.lease = seconds("lease", lease)
        self.wait = _wait(wait)
        if not isinstance(heartbeat, bool):
            raise TypeError(f"heartbeat must be True or False, not {heartbeat!r}")
        self.heartbeat = heartbeat
        self.max_hold = None if max_hold is None else seconds("max_hold", max_hold)
        if on_lost == "cancel" and not is_async:
            raise ValueError(
                'on_lost="cancel" cancels a task, and there is none in sync code; use "raise" or a callable'
            )
        if on_lost not in ("raise", "cancel") and not callable(on_lost):
            raise ValueError(f'on_lost must be "raise", "cancel" (async) or a callable, not {on_lost!r}')
        if inspect.iscoroutinefunction(on_lost):
            raise TypeError(f"on_lost must be a plain function, and {on_lost!r} is async; have it create a task")
        self.on_lost = on_lost
        self._made: tuple[config.Settings, Plan] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a lock may be sent to another process

    def plan(self) -> Plan:
        """The plan, made anew when `configure` has changed the defaults."""
        made, settings = self._made, config.settings
        if made is None or made[0] is not settings:
            shared = config.resolve_backend(self.backend)
            plan = Plan(
                backend=shared.asynchronous() if self.is_async else shared.blocking(),
                rooms=rooms_of(shared),
                lease=self.lease if self.max_hold is None else min(self.lease, self.max_hold),
                wait=self.wait,
                heartbeat=self.heartbeat,
                max_hold=self.max_hold,
                on_lost=self.on_lost,
                hooks=settings.hooks,
            )
            made = self._made = (settings, plan)
        return made[1]


def _wait(wait: Duration | None) -> float | None:
    return None if wait is None else seconds("wait", wait, zero=True)


def _timeout(plan: Plan, rid: RecordId) -> LockTimeout:
    return LockTimeout(f"the lock {rid.digest} was not free within {plan.wait:g} s; raise wait=, or try again later")


def _take(plan: Plan, rid: RecordId, wait: float | None, keep: Callable[[Hold], None] | None = None) -> Hold | None:
    held = Held(SYNC, plan, rid, Asker(is_async=False))
    hold = Hold(held)
    held.user = weakref.ref(hold)
    if held.watch is not None:
        held.tell = _tell
    try:
        if not drive(flow.acquire(SYNC, held, wait)):
            return None
        if keep is not None:  # before a signal handler's exception can keep it from whoever asked
            keep(hold)
        return hold
    except BaseException as error:
        finish(functools.partial(flow.withdraw, SYNC, held, error))
        raise


async def _take_async(plan: Plan, rid: RecordId, wait: float | None) -> AsyncHold | None:
    from idempotent import _aio

    driver = _async()
    held = Held(driver, plan, rid, Asker(is_async=True))
    hold = AsyncHold(held)
    held.user = weakref.ref(hold)
    if held.watch is not None:
        held.tell = functools.partial(_tell_async, hold._loop)
    try:
        return hold if await flow.acquire(driver, held, wait) else None
    except GeneratorExit as error:  # the coroutine is thrown away and can await nothing
        _drop(held)
        flow.leave(driver, held)
        _leave_behind(hold._loop, flow.withdraw(driver, held, error))
        raise
    except BaseException as error:
        await _aio.finish(functools.partial(flow.withdraw, driver, held, error))
        raise


def _drop(held: Held) -> None:
    """End the beats without waiting."""
    _async().drop(held)
    if held.watch is not None:
        _async().drop(held.watch)


H = TypeVar("H", bound=_Hold)


class _Entered(Generic[H]):
    """The holds of a lock's `with` blocks, which are under way: `__exit__` has to find the one that it ends."""

    __slots__ = ("_holds",)

    def __init__(self) -> None:
        self._holds: list[H] = []

    def __reduce__(self) -> Any:
        return (_Entered, ())  # another process has entered nothing

    def add(self, hold: H) -> None:
        self._holds.append(hold)

    def discard(self, hold: H) -> None:
        """The block of `hold` has ended. May be called twice."""
        with contextlib.suppress(ValueError):
            self._holds.remove(hold)

    def mine(self, *, is_async: bool) -> list[H]:
        """What this thread or task has entered."""
        me = Asker(is_async=is_async)
        return [hold for hold in list(self._holds) if hold._held.asker.is_me(me)]

    def ending(self, *, is_async: bool) -> H:
        """The hold whose block ends: the last of this thread or task, else the oldest whose block has not just ended.

        A block of a generator may end in another thread than it began in. Of several holds all but the newest are
        lost, so no live one is taken for another's.
        """
        holds = list(self._holds)
        if not holds:
            raise LockError("the lock was never entered: use it as `with lock:`")
        if len(holds) > 1:
            holds = self.mine(is_async=is_async)[-1:] or [hold for hold in holds if not hold._held.over] or holds
        return holds[0]


class _Exit:
    """What one `with` statement holds on to until its block has ended, in whatever way: it has the block's hold.

    A signal handler's exception may come before the first instruction of any `__exit__`. Then this is gone, and with it
    the hold, so that its lease is not renewed any more.
    """

    __slots__ = ("__weakref__", "hold", "lock")

    def __init__(self, lock: "Lock") -> None:
        self.lock = lock
        self.hold: Hold | None = None
        """None: whoever entered did not look this up before, and the lock knows its holds."""

    def __call__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered = self.lock._entered
        try:
            hold = self.hold = self.hold or entered.ending(is_async=False)
            ending = hold._end(error)
            entered.discard(hold)
            ending.tell()
        except Exception:
            raise
        except BaseException:  # a signal handler's: this is not called again
            self.lock._give_up(entered.mine(is_async=False) if self.hold is None else [self.hold])
            raise


class _Exits:
    """`Lock.__exit__`: a `with` statement looks it up once, before it enters, and gets an _Exit of its own."""

    def __get__(self, lock: "Lock | None", kind: "type[Lock] | None" = None) -> Any:
        if lock is None:  # contextlib.ExitStack asks so, when it has entered
            return _exit
        found = _Exit(lock)
        _here.exit = weakref.ref(found)
        return found


def _exit(lock: "Lock", *raised: Any) -> None:
    _Exit(lock)(*raised)


_here = threading.local()
"""`exit`: the _Exit that this thread looked up last, weakly."""


def _nothing() -> None:
    return None


class Lock:
    """A lock by name, for sync code: one holder at a time among all processes that share the backend.

        with Lock("account:42", wait=10) as hold:
            ledger.debit(..., fence=hold.token)

    A Lock's options never change, and what is held is its Holds': any number of threads may use one. Not re-entrant:
    a thread that asks for what it holds by the same Backend, or URL, gets a LockError; by another it waits for itself.

    Args:
        name: what is locked; at most 1,024 characters.
        backend: a Backend or its URL. None: what `configure` or `IDEMPOTENT_URL` say, else this process's memory, with
            a warning.
        namespace: what the name is unique within. Locks never meet idempotency keys.
        lease: seconds or timedelta for which the lock stands without being renewed: how long it stays locked after its
            holder died. Default 30.
        wait: seconds or timedelta to wait for the lock; 0: try once; None: for ever.
        heartbeat: whether the lease is renewed every third of it while the lock is held.
        max_hold: seconds or timedelta after which the heartbeat lets the lease run out, so that a hung body does not
            hold the lock for ever; `extend` goes beyond it. None: no limit.
        on_lost: what happens when the lease ends while the lock is held. "raise": `with` raises LockLost when its body
            ends; a callable is called with the Hold at once, in a thread of its own, and `with` raises as well.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
        KeyRequired, InvalidKey: the name is.
    """

    __slots__ = ("__weakref__", "_entered", "_options", "_rid")

    def __init__(
        self,
        name: str,
        *,
        backend: Backend | str | None = None,
        namespace: str = "",
        lease: Duration = 30,
        wait: Duration | None = None,
        heartbeat: bool = True,
        max_hold: Duration | None = None,
        on_lost: Literal["raise"] | Callable[[Hold], object] = "raise",
    ) -> None:
        self._options = _Options(
            is_async=False,
            backend=backend,
            namespace=namespace,
            lease=lease,
            wait=wait,
            heartbeat=heartbeat,
            max_hold=max_hold,
            on_lost=on_lost,
        )
        self._rid = RecordId(self._options.namespace, check_key(name), LOCKS)
        self._entered: _Entered[Hold] = _Entered()

    @property
    def name(self) -> str:
        """What is locked."""
        return self._rid.key

    @property
    def namespace(self) -> str:
        """What the name is unique within."""
        return self._rid.namespace

    def acquire(self, wait: Duration | None | Default = DEFAULT) -> Hold | None:
        """The lock, held; None when time runs out.

        Keep the hold: one that nobody refers to any more is not renewed, and the lock is free when its lease ends.

        Args:
            wait: seconds or timedelta; 0: try once; None: for ever. Default: the lock's own.

        Raises:
            LockError: this thread holds the lock already, or `lease` is shorter than the backend takes to answer.
            BackendUnavailable: the backend could not confirm; nothing is held.
        """
        plan = self._options.plan()
        return _take(plan, self._rid, plan.wait if isinstance(wait, Default) else _wait(wait))

    def __enter__(self) -> Hold:
        plan = self._options.plan()
        found: _Exit | None = getattr(_here, "exit", _nothing)()
        leaving = found if found is not None and found.lock is self and found.hold is None else None

        def keep(hold: Hold) -> None:
            if leaving is not None:
                leaving.hold = hold
            else:
                self._entered.add(hold)
            kept.append(hold)

        kept: list[Hold] = []
        try:
            hold = _take(plan, self._rid, plan.wait, keep)
            if hold is None:
                raise _timeout(plan, self._rid)
            return hold
        except Exception:
            raise
        except BaseException:  # a signal handler's: there will be no __exit__
            self._give_up(kept)
            raise

    if TYPE_CHECKING:

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None: ...

    else:
        __exit__ = _Exits()

    def _give_up(self, holds: list[Hold]) -> None:
        for hold in holds:
            finish(functools.partial(flow.release, SYNC, hold._held))
            self._entered.discard(hold)

    def locked(self) -> bool:
        """Whether anybody holds the lock at this moment."""
        return drive(flow.read(self._options.plan(), self._rid)) is not None

    def info(self) -> LockInfo | None:
        """Who holds the lock; None: nobody."""
        return _info(drive(flow.read(self._options.plan(), self._rid)))

    def break_(self) -> bool:
        """Take the lock from whoever holds it, for operators; whether there was a hold, alive or dead.

        Its holder is told at its next heartbeat; until then two may run. Those who wait are woken. The event is
        `broken`.
        """
        return drive(flow.break_(self._options.plan(), self._rid))

    def __repr__(self) -> str:
        return f"<Lock {self._rid.digest}>"


class AsyncLock:
    """A lock by name, for async code; excludes `Lock`s of the same name and backend, too.

        async with AsyncLock("account:42", wait=10) as hold:
            await ledger.debit(..., fence=hold.token)

    An AsyncLock's options never change, and what is held is its AsyncHolds': any number of tasks, of any event loops, may
    use one. Not re-entrant: a task that asks for what it holds by the same Backend, or URL, gets a LockError; by another
    it waits for itself.

    Args:
        name: what is locked; at most 1,024 characters.
        backend: a Backend or its URL. None: what `configure` or `IDEMPOTENT_URL` say, else this process's memory, with
            a warning.
        namespace: what the name is unique within. Locks never meet idempotency keys.
        lease: seconds or timedelta for which the lock stands without being renewed: how long it stays locked after its
            holder died. Default 30.
        wait: seconds or timedelta to wait for the lock; 0: try once; None: for ever.
        heartbeat: whether the lease is renewed every third of it while the lock is held.
        max_hold: seconds or timedelta after which the heartbeat lets the lease run out, so that a hung body does not
            hold the lock for ever; `extend` goes beyond it. None: no limit.
        on_lost: what happens when the lease ends while the lock is held. "raise": `async with` raises LockLost when its
            body ends; "cancel": the task that acquired it is cancelled at once, and `async with` raises LockLost; a
            callable is called with the AsyncHold at once, on the event loop, and `async with` raises as well.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
        KeyRequired, InvalidKey: the name is.
    """

    __slots__ = ("__weakref__", "_entered", "_options", "_rid")

    def __init__(
        self,
        name: str,
        *,
        backend: Backend | str | None = None,
        namespace: str = "",
        lease: Duration = 30,
        wait: Duration | None = None,
        heartbeat: bool = True,
        max_hold: Duration | None = None,
        on_lost: Literal["raise", "cancel"] | Callable[[AsyncHold], object] = "raise",
    ) -> None:
        self._options = _Options(
            is_async=True,
            backend=backend,
            namespace=namespace,
            lease=lease,
            wait=wait,
            heartbeat=heartbeat,
            max_hold=max_hold,
            on_lost=on_lost,
        )
        self._rid = RecordId(self._options.namespace, check_key(name), LOCKS)
        self._entered: _Entered[AsyncHold] = _Entered()

    @property
    def name(self) -> str:
        """What is locked."""
        return self._rid.key

    @property
    def namespace(self) -> str:
        """What the name is unique within."""
        return self._rid.namespace

    async def acquire(self, wait: Duration | None | Default = DEFAULT) -> AsyncHold | None:
        """The lock, held; None when time runs out. Cancelled meanwhile, nothing stays locked.

        Keep the hold: one that nobody refers to any more is not renewed, and the lock is free when its lease ends.

        Args:
            wait: seconds or timedelta; 0: try once; None: for ever. Default: the lock's own.

        Raises:
            LockError: this task holds the lock already, or `lease` is shorter than the backend takes to answer.
            BackendUnavailable: the backend could not confirm; nothing is held.
        """
        plan = self._options.plan()
        return await _take_async(plan, self._rid, plan.wait if isinstance(wait, Default) else _wait(wait))

    async def __aenter__(self) -> AsyncHold:
        plan = self._options.plan()
        hold = await _take_async(plan, self._rid, plan.wait)
        if hold is None:
            raise _timeout(plan, self._rid)
        try:
            self._entered.add(hold)
            return hold
        except BaseException:  # a signal handler's: there will be no __aexit__, and nobody to await the release
            self._entered.discard(hold)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        hold = self._entered.ending(is_async=True)
        self._entered.discard(hold)
        await hold._end(error)

    async def locked(self) -> bool:
        """Whether anybody holds the lock at this moment."""
        return await flow.read(self._options.plan(), self._rid) is not None

    async def info(self) -> LockInfo | None:
        """Who holds the lock; None: nobody."""
        return _info(await flow.read(self._options.plan(), self._rid))

    async def break_(self) -> bool:
        """Take the lock from whoever holds it, for operators; whether there was a hold, alive or dead.

        Its holder is told at its next heartbeat; until then two may run. Those who wait are woken. The event is
        `broken`.
        """
        return await flow.break_(self._options.plan(), self._rid)

    def __repr__(self) -> str:
        return f"<AsyncLock {self._rid.digest}>"


def serialized(
    key: str | Callable[..., str | None],
    *,
    backend: Backend | str | None = None,
    namespace: str = "",
    lease: Duration = 30,
    wait: Duration | None = None,
    heartbeat: bool = True,
    max_hold: Duration | None = None,
    on_lost: Literal["raise", "cancel"] | Callable[[Any], object] = "raise",
) -> Callable[[F], F]:
    """Run a sync or async function one at a time per key; nothing is remembered.

        @serialized(key="account:{account_id}")
        def transfer(account_id: int, amount: int) -> None: ...

    The calls hold the lock that `Lock` of the rendered key and this namespace names, so both exclude each other.

    Args:
        key: what is locked: a template of parameters with their attributes and items, as for `idempotent`, or a
            callable that takes the call's arguments and returns text.
        backend: as for Lock; so are namespace, lease, heartbeat and max_hold.
        namespace: what the key is unique within.
        lease: seconds or timedelta for which the lock stands without being renewed. Default 30.
        wait: seconds or timedelta a call waits for its turn; 0: not at all; None: for ever.
        heartbeat: whether the lease is renewed while the function runs.
        max_hold: seconds or timedelta after which it is not renewed any more; None: no limit.
        on_lost: "raise", a callable that takes the hold, or, for async functions, "cancel".

    Raises, at decoration:
        TypeError, ValueError: an option is wrong; the message names it.

    Raises, when called: what the function raises, and
        KeyRequired, UnstableKey, InvalidKey: the call gives no usable key.
        LockTimeout: `wait` ran out; the function did not run.
        LockError: the function called itself with its own key.
        LockLost: the lease ended while the function ran.
        BackendUnavailable: the lock could not be confirmed; the function did not run.
    """
    if not isinstance(key, str) and not callable(key):
        raise TypeError(f'key must be a template or a callable, not {key!r}: @serialized(key="account:{{account_id}}")')

    def decorate(function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(decorate(function.__func__))
        is_async = _check_function(function)
        options = _Options(
            is_async=is_async,
            backend=backend,
            namespace=namespace,
            lease=lease,
            wait=wait,
            heartbeat=heartbeat,
            max_hold=max_hold,
            on_lost=on_lost,
        )
        binder = Binder(function, key=key, fingerprint=False, ignore=())

        def lock_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> RecordId:
            return RecordId(options.namespace, binder.identify(args, kwargs, None)[0], LOCKS)

        return functools.wraps(function)((_async_call if is_async else _sync_call)(function, options, lock_of))

    return decorate


def _check_function(function: Any) -> bool:
    """Whether `function` is async. Raises TypeError for what cannot be serialized."""
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"@serialized decorates functions, not {function!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{function.__qualname__} is a generator function: its body runs after the call has ended")
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


LockOf = Callable[[tuple[Any, ...], dict[str, Any]], RecordId]


def _sync_call(function: Callable[..., Any], options: _Options, lock_of: LockOf) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        plan, rid = options.plan(), lock_of(args, kwargs)
        kept: list[Hold] = []
        try:
            if _take(plan, rid, plan.wait, kept.append) is None:
                raise _timeout(plan, rid)
            value = function(*args, **kwargs)
            if inspect.iscoroutine(value):
                value.close()
                raise TypeError(
                    f"{value.__qualname__} is an async function behind a wrapper that is none: it has not run."
                    " Put @serialized directly on the async function"
                )
            ending = kept[0]._end(None)
        except BaseException as error:  # a signal handler's may come as soon as the lock is held, and until it is freed
            for hold in kept:
                hold._end(error).tell()
            raise
        ending.tell()
        return value

    return call


def _async_call(function: Callable[..., Any], options: _Options, lock_of: LockOf) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        plan, rid = options.plan(), lock_of(args, kwargs)
        hold = await _take_async(plan, rid, plan.wait)
        if hold is None:
            raise _timeout(plan, rid)
        try:
            value = await function(*args, **kwargs)
        except BaseException as error:
            await hold._end(error)
            raise
        await hold._end(None)
        return value

    return call
