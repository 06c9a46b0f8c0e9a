"""Locks between processes that are killed, stopped, interrupted and forked; and what holds leave behind: nothing."""

import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from faulty import Faulty
from locks import Kind, and_, apart, start, through_proxy
from probes import eventually

from idempotent import (
    AsyncLock,
    LocalBackend,
    Lock,
    LockLost,
    NotHeld,
    _rooms,
    open_backend,
)
from idempotent._drive import drive
from idempotent._record import LOCKS, RecordId

# ------------------------------------------------------------------------------------------------- processes and forks


class Worker:
    """A worker process, spoken to line by line."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [
                sys.executable,
                str(Path(__file__).with_name("lock_worker.py")),
                json.dumps({"colour": kind, "options": options}),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        )
        self.hear("ready")

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self, verb: str) -> str:
        assert self.process.stdout is not None
        heard, _, rest = self.process.stdout.readline().strip().partition(" ")
        assert heard == verb, f"heard {heard!r} {rest!r}, not {verb!r}"
        return rest

    def hold(self) -> int:
        self.tell("hold l")
        return int(self.hear("held"))

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def hire(shared_backend_url: str, kind: Kind) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def hire(**options: Any) -> Worker:
        workers.append(Worker(kind.name, {"backend": shared_backend_url, **options}))
        return workers[-1]

    yield hire
    for worker in workers:
        worker.end()


def test_eight_processes_of_four_threads_count_right(
    hire: Callable[..., Worker], shared_backend_url: str, tmp_path: Path
) -> None:
    times = 25 if shared_backend_url.startswith("redis") else 4
    path = tmp_path / "count"
    path.write_text("0 0\n")
    _count([hire() for _ in range(8)], path, times)
    _assert_counted(path, 8 * 4 * times)


@pytest.mark.parametrize("shared_backend_url", ["redis", "postgres", "mariadb"], indirect=True)
def test_processes_count_right_while_their_connections_are_reset(
    hire: Callable[..., Worker], shared_backend_url: str, tmp_path: Path
) -> None:
    is_redis = shared_backend_url.startswith("redis")
    # To connect to a database, and find the table there, takes many more steps: between two resets there is time for it.
    times, apart = (8, 0.03) if is_redis else (4, 0.3)
    path = tmp_path / "count"
    path.write_text("0 0\n")
    with through_proxy(shared_backend_url) as (url, proxy):
        workers = [hire(backend=url) for _ in range(4)]
        done = start(_count, workers, path, times)
        while not done.done():
            proxy.drop()
            time.sleep(apart)
        done.result()
    _assert_counted(path, 4 * 4 * times)


def _count(workers: list[Worker], path: Path, times: int) -> None:
    for worker in workers:
        worker.tell(f"count l {path} {times} 4")
    for worker in workers:
        worker.hear("counted")


def _assert_counted(path: Path, last: int | None = None) -> None:
    """One at a time did so, with growing tokens."""
    lines = path.read_text().splitlines()
    numbers, tokens = zip(*(map(int, line.split()) for line in lines), strict=True)
    assert list(numbers) == list(range(len(lines) if last is None else last + 1))
    assert list(tokens) == sorted(set(tokens))


def _storm(hire: Callable[..., Worker], lock: Any, path: Path, seconds: float, lease: float) -> None:
    """Worker processes take turns, are interrupted, stopped for less than the lease, and killed."""
    path.write_text("0 0\n")
    dice = random.Random(7)

    def grabbing() -> Worker:
        worker = hire(lease=lease)
        worker.tell(f"grab l {path}")
        return worker

    workers = [grabbing() for _ in range(5)]
    eventually(lambda: path.stat().st_size > 100)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        worker = dice.choice(workers)
        kind = dice.choices(["interrupt", "stop", "kill"], [30, 5, 1])[0]
        if kind == "interrupt":
            worker.process.send_signal(signal.SIGINT)
        elif kind == "stop":
            worker.process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            worker.process.send_signal(signal.SIGCONT)
        else:
            worker.end()
            workers[workers.index(worker)] = grabbing()
        time.sleep(dice.uniform(0, 0.03))
    began = time.monotonic()
    path.with_suffix(".end").touch()
    for worker in workers:
        worker.hear("grabbed")
    assert (
        time.monotonic() - began < lease + 5
    )  # a killed holder's lease, a killed waiter's wake-up, and a slow machine
    _assert_counted(path)
    hold = lock.acquire(wait=0)  # the last holders were let finish
    assert hold is not None
    assert hold.token > int(path.read_text().split()[-1])
    hold.release()


@pytest.mark.parametrize(
    "shared_backend_url",
    ["redis", *(pytest.param(kind, marks=pytest.mark.soak) for kind in ("sqlite", "postgres", "mariadb"))],
    indirect=True,
)
def test_interrupted_stopped_and_killed_holders_and_waiters_leave_no_lock_behind(
    hire: Callable[..., Worker], kind: Kind, shared_backend_url: str, tmp_path: Path
) -> None:
    _storm(hire, kind.lock(backend=shared_backend_url), tmp_path / "count", 2.0, 2.0)


def test_a_killed_holders_lock_is_free_after_its_lease(
    hire: Callable[..., Worker], kind: Kind, shared_backend_url: str
) -> None:
    lock = kind.lock(backend=shared_backend_url)
    assert not lock.locked()  # connected before the lease begins
    worker = hire(lease=1.5)
    token = worker.hold()
    began = time.monotonic()
    worker.process.send_signal(signal.SIGKILL)
    worker.process.wait()
    assert lock.acquire(wait=0) is None
    assert lock.locked()
    hold = lock.acquire(wait=30)
    assert 1.0 < time.monotonic() - began < 10
    assert hold.token > token
    hold.release()


@pytest.mark.parametrize("shared_backend_url", ["redis"], indirect=True)
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_first_in_line_that_is_killed_or_stopped_holds_nobody_up(
    hire: Callable[..., Worker], kind: Kind, shared_backend_url: str, how: str, _fresh: contextlib.ExitStack
) -> None:
    """Between processes; stopped, it gets the wake-up and can make no use of it, as one that is killed just then."""
    import redis

    hold = kind.lock(backend=apart(shared_backend_url, _fresh)).acquire()
    worker = hire()
    behind = kind.lock(backend=shared_backend_url)
    assert behind.locked()
    with redis.Redis.from_url(shared_backend_url.partition("?")[0]) as client:
        line = f"{open_backend(shared_backend_url).prefix}:{{{RecordId('', 'l', LOCKS).text}}}:line"  # type: ignore[attr-defined]
        worker.tell("hold l")
        eventually(lambda: client.zcard(line) == 1)
        waiter = start(behind.acquire)
        eventually(lambda: client.zcard(line) == 2)
        assert client.zrange(line, 0, 0)[0].endswith(f".{worker.process.pid}".encode())
    worker.process.send_signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    if how == "killed":
        worker.process.wait()
    began = time.monotonic()
    hold.release()
    waiter.result(60).release()
    assert time.monotonic() - began < 5  # and not a lease


def test_a_frozen_holder_is_told_that_it_lost_the_lock(
    hire: Callable[..., Worker], kind: Kind, shared_backend_url: str
) -> None:
    lock = kind.lock(backend=shared_backend_url)
    worker = hire(lease=1.0)
    token = worker.hold()
    worker.process.send_signal(signal.SIGSTOP)
    hold = lock.acquire(wait=30)
    assert hold.token > token
    worker.process.send_signal(signal.SIGCONT)
    worker.tell("leave")
    assert worker.hear("error") == "LockLost"
    hold.check()
    assert lock.info().token == hold.token  # nothing of it was freed
    hold.release()


def test_a_frozen_holder_that_nobody_overtook_is_told_as_well(hire: Callable[..., Worker]) -> None:
    worker = hire(lease=0.5)
    worker.hold()
    worker.process.send_signal(signal.SIGSTOP)
    time.sleep(1.0)
    worker.process.send_signal(signal.SIGCONT)
    worker.tell("leave")
    assert worker.hear("error") == "LockLost"


def test_another_processes_hold_is_described_with_its_host_and_pid(
    kind: Kind, shared_backend_url: str, hire: Callable[..., Worker]
) -> None:
    worker = hire()
    token = worker.hold()
    info = kind.lock(backend=shared_backend_url).info()
    assert (info.token, info.host, info.pid) == (token, socket.gethostname(), worker.process.pid)


def test_no_process_starves(hire: Callable[..., Worker], tmp_path: Path) -> None:
    path = tmp_path / "count"
    path.write_text("0 0\n")
    greedy, modest = hire(), hire(wait=20)
    greedy.tell(f"count l {path} 100000 4")
    eventually(lambda: len(path.read_text().splitlines()) > 5)
    for _ in range(5):
        modest.hold()
        modest.tell("leave")
        modest.hear("left")


def test_a_forked_child_holds_nothing_and_frees_nothing(shared_backend_url: str) -> None:
    lock = Lock("l", backend=shared_backend_url)
    parent = os.getpid()
    try:
        with lock as hold:
            child = os.fork()
            if child == 0:
                failures = []
                if not hold.lost or hold.remaining():
                    failures.append("it holds")
                for refused, expected in ((hold.check, LockLost), (hold.extend, LockLost), (hold.release, NotHeld)):
                    try:
                        refused()
                        failures.append(f"{refused} was let")
                    except expected as error:
                        if "parent" not in str(error):
                            failures.append(str(error))
                if lock.acquire(wait=0) is not None:
                    failures.append("two hold it")
                if failures:
                    os._exit(1)
            else:
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                hold.check()
                assert start(lock.acquire, wait=0).result(30) is None
    except LockLost:
        if os.getpid() == parent:
            raise
        os._exit(7)
    if os.getpid() != parent:
        os._exit(2)
    assert not lock.locked()


@pytest.mark.parametrize("backend_url", ["redis"], indirect=True)
def test_a_forked_child_does_not_take_its_parents_place_in_the_line(
    backend_url: str, _fresh: contextlib.ExitStack
) -> None:
    hold = Lock("l", backend=apart(backend_url, _fresh)).acquire()
    assert hold is not None
    backend: Any = open_backend(backend_url).blocking()
    rid = RecordId("", "l", LOCKS)
    for stands, place_of_it in ((f"{backend._id}.{os.getpid()}", 17), (f"{backend._id}.{os.getppid()}", None)):
        backend._places[rid.text] = stands, 17, time.monotonic()  # as a fork copies it
        drive(backend.changed(rid, token=hold.token, timeout=0.7))
        mine, place, _ = backend._places[rid.text]
        assert mine == f"{backend._id}.{os.getpid()}"
        assert (place == 17) == (place_of_it == 17)
    hold.release()


def test_a_child_forked_in_an_async_block_holds_nothing_and_frees_nothing(shared_backend_url: str) -> None:
    async def main() -> None:
        lock = AsyncLock("l", backend=shared_backend_url)
        async with lock as hold:
            child = os.fork()
            if child == 0:
                refused = 0
                for call, expected in ((hold.extend, LockLost), (hold.release, NotHeld)):
                    try:
                        await call()
                    except expected:
                        refused += 1
                os._exit(7 if hold.lost and not hold.remaining() and refused == 2 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            hold.check()
            assert await asyncio.create_task(lock.acquire(wait=0)) is None
        assert not await lock.locked()

    asyncio.run(main())


@pytest.mark.parametrize("backend_url", ["postgres"], indirect=True)
def test_a_lock_that_is_held_in_postgresql_leaves_nothing_in_a_session(kind: Kind, backend_url: str) -> None:
    """No advisory lock, which a pooler in transaction mode would strand, nor a transaction: but a row."""
    import psycopg

    me = f"l{time.time_ns()}"
    lock = kind.lock(backend=f"{backend_url}{and_(backend_url)}application_name={me}")
    plain = urlunsplit(urlsplit(backend_url)._replace(scheme="postgresql", query=""))

    def body(hold: Any) -> None:
        with psycopg.connect(plain, autocommit=True) as onlooker:
            sessions = onlooker.execute("SELECT pid, state FROM pg_stat_activity WHERE application_name = %s", (me,))
            pids, states = zip(*sessions, strict=True)
            assert set(states) == {"idle"}
            assert onlooker.execute("SELECT * FROM pg_locks WHERE pid = ANY(%s)", (list(pids),)).fetchall() == []

    kind.body(lock, body)


# ------------------------------------------------------------------------------------------------------ nothing is left


def test_ten_thousand_holds_leave_nothing_behind(kind: Kind, backend_url: str) -> None:
    _assert_holds_leave_nothing(kind, backend_url, 10_000 if backend_url.startswith(("local", "redis")) else 2_000)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_ten_thousand_holds_leave_nothing_behind_in_a_database_either(kind: Kind, backend_url: str) -> None:
    _assert_holds_leave_nothing(kind, backend_url, 10_000)


def _assert_holds_leave_nothing(kind: Kind, backend_url: str, times: int) -> None:
    lock = kind.lock("x0", backend=backend_url)
    lock.acquire().release()
    gc.collect()
    files = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0

    def cycle() -> list[int]:
        tokens = []
        for _ in range(times):
            hold = lock.acquire()
            tokens.append(hold.token)
            hold.release()
        return tokens

    async def cycle_async() -> list[int]:
        tokens = []
        for _ in range(times):
            hold = await lock._inner.acquire()
            tokens.append(hold.token)
            await hold.release()
        return tokens

    tokens = cycle() if kind.name == "sync" else kind.loops[0].run(cycle_async())
    assert all(later > earlier for earlier, later in itertools.pairwise(tokens))
    eventually(lambda: not any(thread.name == "idempotent-heartbeat" for thread in threading.enumerate()))
    if kind.name == "async":

        async def tasks() -> int:
            return len(asyncio.all_tasks()) - 1

        assert kind.loops[0].run(tasks()) == 0
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) <= files + 1
    held = [each for each in gc.get_objects() if type(each) is _rooms.Held and each.rid.key == "x0"]
    assert held == []
    _assert_only_a_tombstone(backend_url)


def _assert_only_a_tombstone(url: str) -> None:
    """One name leaves one withdrawn record, and that for ten seconds."""
    backend: Any = open_backend(url)
    if url == "local://":
        assert [row.state.value for row in backend._store.open.values()] == ["W"]
    elif url.startswith("redis"):
        import redis

        with redis.Redis.from_url(url.partition("?")[0]) as client:
            [key] = client.keys(f"{backend.prefix}*")
            assert 0 < client.pttl(key) <= 10_000
    else:
        import sqlalchemy as sa

        def rows(connection: sa.Connection) -> Any:
            table = backend.table
            return connection.execute(sa.select(table.c.state, table.c.expires - table.c.since)).all()

        async def read() -> Any:
            return await backend.blocking()._run(rows, 5)

        [(state, kept)] = asyncio.run(read())
        assert state == "W"
        assert 10_000_000 <= kept < 10_001_000  # MySQL and PostgreSQL read their clock twice


def test_many_names_leave_a_bounded_number_of_rooms() -> None:
    backend = LocalBackend()
    for number in range(5000):
        with Lock(f"n{number}", backend=backend):
            pass
    assert len(_rooms.rooms_of(backend)._by_key) <= 1024


def test_the_heartbeats_of_many_holds_share_a_few_threads(backend_url: str) -> None:
    before = threading.active_count()
    holds = [Lock(f"n{number}", backend=backend_url).acquire() for number in range(100)]
    assert threading.active_count() - before <= 8
    for hold in holds:
        assert hold is not None
        hold.release()


def test_a_hold_that_is_dropped_asks_nobody() -> None:
    backend = Faulty(LocalBackend())
    hold = Lock("l", backend=backend, lease=60, heartbeat=False).acquire()
    gone = weakref.ref(hold)
    del backend.calls[:]
    del hold
    gc.collect()
    assert gone() is None
    assert backend.calls == []


def test_a_program_that_ends_while_it_holds_ends_quietly(shared_backend_url: str) -> None:
    program = (
        "import sys; from idempotent import Lock\n"
        f"hold = Lock('l', backend={shared_backend_url!r}, lease=1).acquire(); print(hold.token)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    hold = Lock("l", backend=shared_backend_url).acquire(wait=20)
    assert hold is not None
    assert hold.token > int(done.stdout)
    hold.release()
