"""Locks whose tasks are cancelled and whose threads are interrupted, at each step: nothing stays locked, nobody waits on."""

import asyncio
import contextlib
import copy
import dis
import functools
import gc
import pickle
import signal
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from faulty import Faulty
from locks import Kind, apart, start
from probes import eventually
from test_cancel import Paused, cancelled, only_this_task

from idempotent import (
    AsyncLock,
    Backend,
    BackendUnavailable,
    Hold,
    LocalBackend,
    Lock,
    LockError,
    _acquire,
    _rooms,
    configure,
    open_backend,
    serialized,
)

# --------------------------------------------------------------------------------------------------------- cancellation


@pytest.mark.parametrize("when", ["before", "after"])
def test_cancelled_at_the_claim_nothing_stays_locked(backend_url: str, when: str) -> None:
    async def main() -> None:
        paused = Paused(open_backend(backend_url), "claim", when)
        task = asyncio.create_task(AsyncLock("l", backend=paused).acquire())
        await paused.reached.wait()
        await cancelled(task)
        hold = await AsyncLock("l", backend=backend_url).acquire(wait=0)
        assert hold is not None
        await hold.release()
        assert only_this_task()

    asyncio.run(main())


def test_cancelled_exactly_as_the_lock_is_granted_nothing_stays_locked(backend_url: str) -> None:
    """Cancelled after every possible number of steps of the loop, waiting for a lock that is freed meanwhile."""

    async def main() -> None:
        lock = AsyncLock("l", backend=backend_url)
        for steps in range(40):
            hold = await lock.acquire()
            assert hold is not None
            task = asyncio.create_task(lock.acquire())
            for _ in range(3):
                await asyncio.sleep(0)
            free = asyncio.create_task(hold.release())
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await free
            try:
                granted = await task
            except asyncio.CancelledError:
                granted = None
            if granted is not None:
                await granted.release()
            after = await lock.acquire(wait=5)
            assert after is not None
            assert after.token > hold.token
            await after.release()
        assert only_this_task()

    asyncio.run(main())


def test_cancelled_while_waiting_in_line_and_at_the_backend(backend_url: str, _fresh: contextlib.ExitStack) -> None:
    async def main() -> None:
        for waiters_of in (backend_url, Faulty(open_backend(backend_url))):
            hold = await AsyncLock("l", backend=backend_url).acquire()
            assert hold is not None
            lock = AsyncLock("l", backend=waiters_of)
            tasks = [asyncio.create_task(lock.acquire()) for _ in range(3)]
            await asyncio.sleep(0.1)
            await cancelled(tasks[0])
            await cancelled(tasks[1])
            await hold.release()
            theirs = await asyncio.wait_for(tasks[2], 20)
            assert theirs is not None
            await theirs.release()
            assert not await lock.locked()
            assert only_this_task()

    asyncio.run(main())


def test_a_waiter_that_is_cancelled_takes_no_wake_up_with_it(backend_url: str, _fresh: contextlib.ExitStack) -> None:
    """Of the waiters of three processes the first is cancelled, before the release or just after: the next is woken."""
    limit = 0.1 if backend_url.startswith(("local", "redis")) else 0.5

    async def main() -> None:
        locks = [AsyncLock("l", backend=apart(backend_url, _fresh)) for _ in range(3)]
        for before in (True, False):
            took: list[float] = []
            while len(took) < 5 and min(took, default=1) > limit:
                hold = await locks[0].acquire()
                assert hold is not None
                first = asyncio.create_task(locks[1].acquire())
                await asyncio.sleep(0.2)
                second = asyncio.create_task(locks[2].acquire())
                await asyncio.sleep(0.2)
                if before:
                    await cancelled(first)
                began = time.monotonic()
                await hold.release()
                if not before:
                    first.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await (await first).release()
                theirs = await second
                took.append(time.monotonic() - began)
                await theirs.release()
            assert min(took) <= limit, took
        assert only_this_task()

    asyncio.run(main())


def test_a_claim_that_is_cancelled_on_its_way_takes_no_wake_up_with_it(
    backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    """The first in line is woken, and cancelled before the backend hears of its claim: the next is woken."""
    limit = 0.3 if backend_url.startswith(("local", "redis")) else 0.5

    async def main() -> None:
        holder, behind = (AsyncLock("l", backend=apart(backend_url, _fresh)) for _ in range(2))
        ahead = apart(backend_url, _fresh)
        took: list[float] = []
        while len(took) < 5 and min(took, default=1) > limit:
            paused = Paused(ahead, "none yet", "before")
            hold = await holder.acquire()
            assert hold is not None
            first = asyncio.create_task(AsyncLock("l", backend=paused).acquire())
            await asyncio.sleep(0.2)
            second = asyncio.create_task(behind.acquire())
            await asyncio.sleep(0.2)
            paused.operation = "claim"
            await hold.release()
            await paused.reached.wait()
            began = time.monotonic()
            await cancelled(first)
            theirs = await second
            assert theirs is not None
            took.append(time.monotonic() - began)
            await theirs.release()
        assert min(took) <= limit, took
        assert only_this_task()

    asyncio.run(main())


def test_ctrl_c_while_waiting_takes_no_wake_up_with_it(backend_url: str, _fresh: contextlib.ExitStack) -> None:
    limit = 0.1 if backend_url.startswith(("local", "redis")) else 0.5
    locks = [Lock("l", backend=apart(backend_url, _fresh)) for _ in range(3)]
    took: list[float] = []
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while len(took) < 5 and min(took, default=1) > limit:
            hold = start(locks[0].acquire).result(30)
            behind = start(lambda: time.sleep(0.2) or locks[2].acquire())
            signal.setitimer(signal.ITIMER_REAL, 0.4)
            with pytest.raises(KeyboardInterrupt):
                locks[1].acquire()
            began = time.monotonic()
            hold.release()
            behind.result(30).release()
            took.append(time.monotonic() - began)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert min(took) <= limit, took


class Deaf(Faulty):
    """A backend whose claims, once it is deaf, are told to have failed later than an answer could have come."""

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner)
        self.timeout = 0.05
        self.is_deaf = False

    def blocking(self) -> Backend:
        self.inner = self.inner.blocking()
        return self

    def asynchronous(self) -> Backend:
        self.inner = self.inner.asynchronous()
        return self

    async def claim(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_deaf:
            return await super().claim(*args, **kwargs)
        await asyncio.sleep(0.1) if asyncio._get_running_loop() else time.sleep(0.1)
        raise BackendUnavailable("no answer")


class StepsBack:
    """Waiters on `backend` step back for long when they are woken, once `after` is set; others never do."""

    def __init__(self, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
        self.after = False
        self.reached = threading.Event()
        self.instead: Callable[[], float] = lambda: 30.0

        def courtesy(plan: _rooms.Plan, room: _rooms.Room, now: float) -> float:
            if not self.after or plan.rooms is not _rooms.rooms_of(backend):
                return 0.0
            self.reached.set()
            return self.instead()

        monkeypatch.setattr(_acquire, "_courtesy", courtesy)


async def _until(reached: threading.Event, coroutine: Coroutine[Any, Any, Any]) -> None:
    """Run a coroutine in this task until `reached`, and leave it where it is."""
    while True:
        step = coroutine.send(None)
        if reached.is_set():
            return
        if step is None:
            await asyncio.sleep(0)
        else:
            step._asyncio_future_blocking = False
            await asyncio.wait([step])


@pytest.mark.parametrize("how", ["cancelled", "thrown away", "unanswered"])
def test_a_woken_task_that_gives_up_before_it_has_claimed_takes_no_wake_up_with_it(
    backend_url: str, how: str, _fresh: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 0.3 if backend_url.startswith(("local", "redis")) else 0.5

    async def main() -> None:
        holder, behind = (AsyncLock("l", backend=apart(backend_url, _fresh)) for _ in range(2))
        took: list[float] = []
        while len(took) < 5 and min(took, default=1) > limit:
            ahead = Deaf(apart(backend_url, _fresh))
            steps_back = StepsBack(ahead, monkeypatch)
            hold = await holder.acquire()
            assert hold is not None
            waits = AsyncLock("l", backend=ahead).acquire()
            if how == "thrown away":
                first = asyncio.create_task(_until(steps_back.reached, waits))
            else:
                first = asyncio.create_task(waits)  # type: ignore[arg-type]
            await asyncio.sleep(0.2)
            second = asyncio.create_task(behind.acquire())
            await asyncio.sleep(0.2)
            ahead.is_deaf = how == "unanswered"
            steps_back.after = not ahead.is_deaf
            await hold.release()
            if how == "unanswered":
                with pytest.raises(BackendUnavailable):
                    await first
            else:
                while not steps_back.reached.is_set():
                    await asyncio.sleep(0.001)
            began = time.monotonic()
            if how == "cancelled":
                await cancelled(first)
            elif how == "thrown away":
                await first
                waits.close()
            theirs = await second
            assert theirs is not None
            took.append(time.monotonic() - began)
            await theirs.release()
        assert min(took) <= limit, took
        while not only_this_task():
            await asyncio.sleep(0.001)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["interrupted", "unanswered"])
def test_a_woken_thread_that_gives_up_before_it_has_claimed_takes_no_wake_up_with_it(
    backend_url: str, how: str, _fresh: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 0.3 if backend_url.startswith(("local", "redis")) else 0.5
    holder, behind = (Lock("l", backend=apart(backend_url, _fresh)) for _ in range(2))
    took: list[float] = []

    def interrupt() -> float:
        raise KeyboardInterrupt

    while len(took) < 5 and min(took, default=1) > limit:
        ahead = Deaf(apart(backend_url, _fresh))
        steps_back = StepsBack(ahead, monkeypatch)
        steps_back.instead = interrupt
        hold = start(holder.acquire).result(30)
        first = start(Lock("l", backend=ahead).acquire)
        time.sleep(0.2)
        second = start(behind.acquire)
        time.sleep(0.2)
        ahead.is_deaf = how == "unanswered"
        steps_back.after = not ahead.is_deaf
        hold.release()
        with pytest.raises(BackendUnavailable if ahead.is_deaf else KeyboardInterrupt):
            first.result(30)
        began = time.monotonic()
        second.result(30).release()
        took.append(time.monotonic() - began)
    assert min(took) <= limit, took


@pytest.mark.parametrize("when", ["before", "after"])
def test_cancelled_while_releasing_it_is_released(backend_url: str, when: str) -> None:
    async def main() -> None:
        paused = Paused(open_backend(backend_url), "release", when)

        async def work() -> None:
            async with AsyncLock("l", backend=paused):
                pass

        task = asyncio.create_task(work())
        await paused.reached.wait()
        for _ in range(3):
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not await AsyncLock("l", backend=backend_url).locked()
        assert only_this_task()

    asyncio.run(main())


def test_a_cancelled_body_frees_the_lock(backend_url: str) -> None:
    async def main() -> None:
        entered = asyncio.Event()

        async def work() -> None:
            async with AsyncLock("l", backend=backend_url):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        await cancelled(task)
        assert not await AsyncLock("l", backend=backend_url).locked()
        assert only_this_task()

    asyncio.run(main())


def test_a_coroutine_thrown_away_inside_its_block_leaves_the_lease_to_end() -> None:
    backend = LocalBackend()

    async def work() -> None:
        async with AsyncLock("l", backend=backend, lease=0.3):
            entered.set()
            await asyncio.sleep(3600)

    async def leave() -> None:
        tasks.append(asyncio.ensure_future(work()))
        await entered.wait()
        tasks[0]._log_destroy_pending = False

    tasks: list[Any] = []
    entered = asyncio.Event()
    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    tasks.clear()
    gc.collect()
    hold = Lock("l", backend=backend).acquire(wait=10)
    assert hold is not None
    hold.release()


def test_an_asynchronous_generator_that_ends_inside_its_block_frees_the_lock(backend_url: str) -> None:
    async def main() -> None:
        lock = AsyncLock("l", backend=backend_url)

        async def numbers() -> AsyncIterator[int]:
            async with lock:
                yield 1
                yield 2

        for _ in range(2):
            generator = numbers()
            async for _ in generator:
                break
            await generator.aclose()
            hold = await lock.acquire(wait=10)
            assert hold is not None
            assert hold.remaining() > 20  # a lease of its own: nobody waited for the other's end
            await hold.release()

    began = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - began < 15


def test_a_claim_that_had_no_more_time_than_its_lease_is_told_so(kind: Kind) -> None:
    backend = Faulty(LocalBackend())
    for lease in (0.5, 30):
        backend.plant("claim", "before")
        with pytest.raises(BackendUnavailable) as told:
            kind.lock(backend=backend, lease=lease).acquire()
        notes = getattr(told.value, "__notes__", [])
        assert any("lease=0.5 s" in note for note in notes) == (lease == 0.5)


def test_a_lock_travels_to_another_process_used_or_not() -> None:
    lock = Lock("l", backend="local://", lease=5)
    with lock:
        for other in (pickle.loads(pickle.dumps(lock)), copy.deepcopy(lock)):
            assert (other.name, other._options.lease) == ("l", 5)
            with pytest.raises(LockError, match="never entered"):
                other.__exit__(None, None, None)
            assert other.locked()


def test_ctrl_c_at_the_claim_and_at_the_release_leaves_no_lock() -> None:
    class Interrupted(Faulty):
        def blocking(self) -> Backend:
            return self

        async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
            result = await getattr(self.inner, operation)(*args, **kwargs)
            if operation in stops:
                stops.remove(operation)
                raise KeyboardInterrupt
            return result

    stops: list[str] = []
    lock = Lock("l", backend=Interrupted(LocalBackend()))
    for operation in ("claim", "release"):
        stops.append(operation)
        with pytest.raises(KeyboardInterrupt):
            with lock:
                assert operation == "release"
        assert not lock.locked()
    hold = lock.acquire(wait=0)
    assert hold is not None
    stops.append("release")
    with pytest.raises(KeyboardInterrupt):
        hold.release()
    assert not lock.locked()


def interrupted(step: int, body: Callable[[], None]) -> bool:
    """Call `body` and raise KeyboardInterrupt in our code at the `step`-th place where a signal handler can run.

    These are, in CPython, the beginning of a function, and the end of a call and of a loop's round. Returns whether there
    are so many.
    """
    folder = str(Path(_rooms.__file__).parent)
    left, last = step, dict[FrameType, int]()

    def reached() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    def within(frame: FrameType, event: str, argument: object) -> Any:
        if event == "opcode":
            before, last[frame] = last.get(frame), frame.f_lasti
            if before is not None and dis.opname[_code(frame.f_code)[before]].startswith(("CALL", "JUMP_BACKWARD")):
                reached()
        return within

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        reached()
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return within

    tracer = sys.gettrace()
    sys.settrace(enter)
    try:
        body()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracer)
        last.clear()
    return left <= 0


@functools.cache
def _code(code: CodeType) -> bytes:
    return code.co_code


@pytest.mark.parametrize("how", ["with", "with a shared lock", "serialized"])
def test_ctrl_c_at_any_instruction_leaves_no_lock(how: str) -> None:
    backend = LocalBackend()
    lock = Lock("l", backend=backend, lease=0.3)

    def block() -> None:
        with Lock("l", backend=backend, lease=0.3) if how == "with" else lock as hold:
            hold.extend()

    @serialized("l", backend=backend, lease=0.3)
    def work() -> None:
        pass

    body: Callable[[], None] = work if how == "serialized" else block
    other = Lock("l", backend=backend)
    left: list[int] = []

    def everywhere() -> int:
        step = 1
        while interrupted(step, body):
            if other.locked():
                left.append(step)
            hold = start(other.acquire, wait=20).result(30)
            assert hold is not None, step
            hold.release()
            with lock:  # nor does this thread stand in its own way
                pass
            step += 1
        return step

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that were never awaited
        # In a thread of its own: what a trace raises between two instructions can stay its thread's handled exception,
        # and then the context of all later ones.
        assert start(everywhere).result(110) > 100
    # Before the first instruction of what ends the block nothing can be done but to let the lease end; a call's is ours.
    assert len(left) == (0 if how == "serialized" else 1)


@pytest.mark.parametrize("backend_url", ["redis", "sqlite"], indirect=True)
def test_ctrl_c_at_any_instruction_of_a_command_takes_no_connection_away(backend_url: str) -> None:
    lock, link = Lock("l", backend=backend_url), open_backend(backend_url).blocking()._link  # type: ignore[attr-defined]
    assert not lock.locked()

    def everywhere() -> int:
        step = 1
        while interrupted(step, ask):
            step += 1
        return step

    def ask() -> None:
        lock.locked()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of coroutines that were never awaited
        assert start(everywhere).result(110) > 20
    assert link._free.qsize() == sys.modules[type(link).__module__]._CONNECTIONS


def test_a_lock_is_left_in_whatever_way_it_was_entered() -> None:
    class Told(Lock):
        def __enter__(self) -> Hold:
            with Lock("other", backend=backend):
                return super().__enter__()

        def __exit__(self, *raised: Any) -> None:  # noqa: PYI036
            super().__exit__(*raised)

    backend = LocalBackend()
    lock, told = Lock("l", backend=backend), Told("l", backend=backend)
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock).check()
    lock.__enter__().check()
    lock.__exit__(None, None, None)
    leave = lock.__exit__
    lock.__enter__().check()
    leave(None, None, None)
    with told as hold:
        hold.check()
    with pytest.raises(LockError, match="re-entrant"), lock, contextlib.ExitStack() as stack:
        stack.enter_context(lock)
    assert not lock.locked()
    for each in (lock, told):
        with pytest.raises(LockError, match="never"):
            each.__exit__(None, None, None)


def test_a_hold_that_nobody_has_any_more_is_not_renewed(kind: Kind, backend_url: str) -> None:
    told: list[str] = []
    configure(hooks=[lambda event: told.append(event.name)])
    lock = kind.lock(backend=backend_url, lease=0.6)
    lock.acquire()
    assert start(lock.acquire, wait=0).result(30) is None
    hold = start(lock.acquire, wait=20).result(30)
    assert hold is not None
    assert "lease_lost" in told
    hold.release()


def test_on_lost_is_called_for_a_hold_that_nobody_has_any_more(kind: Kind) -> None:
    told: list[Any] = []
    lock = kind.lock(backend=LocalBackend(), lease=0.3, on_lost=told.append)
    token = lock.acquire().token
    eventually(lambda: told)
    assert told[0].token == token
    assert told[0].lost
