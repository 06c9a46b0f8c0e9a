"""Workers killed, frozen, interrupted and forked; storms from many processes. Every store that processes can share."""

import asyncio
import collections
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio
from colours import COLOURS, Colour
from sqlalchemy.ext.asyncio import create_async_engine

from idempotent import (
    Applied,
    Backend,
    BackendError,
    CallError,
    InProgress,
    LeaseLost,
    NotApplied,
    OutcomeUnknown,
    RedisBackend,
    SQLBackend,
    StillUnknown,
    _config,
    current_call,
)
from idempotent._options import split_url
from idempotent._record import Granted, RecordId
from idempotent.backends._engines import twins

LEASE = 2.0
CHECKOUT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
"""The environment of a process that is to run this checkout, and not a copy that is installed."""


class Worker:
    """A worker process, spoken to line by line."""

    def __init__(self, colour: Colour, effects: Path, options: dict[str, Any]) -> None:
        setup = json.dumps({"colour": colour.name, "effects": str(effects), "options": options})
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=CHECKOUT,
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

    def enter(self, order: str) -> int:
        """Call, and return the token once the worker is inside the function."""
        self.tell(f"call {order}")
        return int(self.hear("enter"))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def effects(tmp_path: Path) -> Path:
    path = tmp_path / "effects"
    path.touch()
    return path


Hire = Callable[..., Worker]


@pytest.fixture
def hire(shared_backend_url: str, colour: Colour, effects: Path) -> Iterator[Hire]:
    workers: list[Worker] = []

    def hire(**options: Any) -> Worker:
        options = {"backend": shared_backend_url, "key": "{order}", "lease": LEASE, **options}
        workers.append(Worker(colour, effects, options))
        return workers[-1]

    yield hire
    for worker in workers:
        worker.end()


def define(colour: Colour, url: str | Backend, effects: Path, **options: Any) -> Any:
    """The worker's function, in this process."""

    def work(order: str) -> str:
        call = current_call()
        assert call is not None
        with effects.open("a") as file:
            file.write(f"{order} {call.token}\n")
        return f"by the test, {order}"

    return colour.define(work, **{"backend": url, "namespace": "worker", "key": "{order}", "lease": LEASE, **options})


def happened(effects: Path) -> list[tuple[str, int]]:
    return [(order, int(token)) for order, token in map(str.split, effects.read_text().splitlines())]


def test_duplicates_from_eight_processes_run_once_and_agree(hire: Hire, effects: Path) -> None:
    workers = [hire(lease=30) for _ in range(8)]
    for worker in workers:
        worker.tell("storm o1 25")
    answers = [answer for worker in workers for answer in json.loads(worker.hear("answers"))]
    assert collections.Counter(answers) == {"o1": 200}
    assert len(happened(effects)) == 1


def test_duplicates_from_eight_processes_of_a_function_that_raises_get_no_result(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    workers = [hire(wait=100) for _ in range(8)]
    for worker in workers:
        worker.tell("fail o1 25")
    answers = [answer for worker in workers for answer in json.loads(worker.hear("answers"))]
    assert collections.Counter(answers) == {"CardDeclinedError('o1')": 200}
    tokens = [token for _, token in happened(effects)]
    assert len(tokens) == 200  # each waiter whose runner raised has run it itself, one after the other
    assert tokens == sorted(set(tokens))
    assert colour.call(define(colour, shared_backend_url, effects), "o1") == "by the test, o1"


def test_a_killed_workers_key_is_taken_over_once_and_not_before_its_lease_ends(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    work = define(colour, shared_backend_url, effects)
    impatient = define(colour, shared_backend_url, effects, wait=0)
    assert colour.call(impatient.peek, "o1") is None  # connected before the lease begins
    worker = hire()
    began = time.monotonic()
    token = worker.enter("o1")
    worker.signal(signal.SIGKILL)
    with pytest.raises(InProgress) as refused:
        colour.call(impatient, "o1")
    assert 0 < refused.value.retry_after <= LEASE
    answers = colour.storm(work, 10, "o1")
    assert time.monotonic() - began >= LEASE
    assert answers == ["by the test, o1"] * 10
    [(_, taken_over)] = happened(effects)
    assert taken_over > token


def test_a_killed_workers_outcome_is_unknown_until_it_is_resolved(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    work = define(colour, shared_backend_url, effects, on_crash="raise", error_ttl={KeyError: 60})
    workers = {order: hire(on_crash="raise") for order in ("o1", "o2", "o3")}
    tokens = {order: worker.enter(order) for order, worker in workers.items()}
    for worker in workers.values():
        worker.signal(signal.SIGKILL)
    for order, token in tokens.items():
        for _ in range(2):
            with pytest.raises(OutcomeUnknown):
                colour.call(work, order)
        record = colour.call(work.peek, order)
        assert (record.state, record.token, record.expires_in) == ("unknown", token, None)
    assert happened(effects) == []
    assert colour.call(work.resolve, "o1", result="by hand") is True
    assert colour.call(work, "o1") == "by hand"
    with pytest.raises(CallError, match="completed"):
        colour.call(work.resolve, "o1", result="again")
    assert colour.call(work.resolve, "o2", error=KeyError("no")) is True
    with pytest.raises(KeyError):
        colour.call(work, "o2")
    assert happened(effects) == []
    assert colour.call(work.resolve, "o3", not_applied=True) is True
    assert colour.call(work, "o3") == "by the test, o3"
    with pytest.raises(CallError, match="absent"):
        colour.call(work.resolve, "o4", not_applied=True)
    hire(on_crash="raise").enter("o5")
    with pytest.raises(InProgress):
        colour.call(work.resolve, "o5", not_applied=True)


def test_a_probe_settles_what_a_killed_worker_left(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    verdicts: list[Any] = [StillUnknown(), NotApplied()]
    asked: list[str] = []

    def probe(call: Any) -> Any:
        asked.append(call.arguments["order"])
        return verdicts[0]

    work = define(colour, shared_backend_url, effects, on_crash=probe)
    for order in ("o1", "o2"):
        worker = hire(on_crash="raise")
        worker.enter(order)
        worker.signal(signal.SIGKILL)
    with pytest.raises(OutcomeUnknown):
        colour.call(work, "o1")
    assert asked == ["o1"]
    verdicts[0] = NotApplied()
    assert colour.storm(work, 10, "o1") == ["by the test, o1"] * 10
    assert len(happened(effects)) == 1  # exactly one asker ran
    verdicts[0] = Applied("it was")
    assert colour.storm(work, 10, "o2") == ["it was"] * 10
    assert len(happened(effects)) == 1


def test_a_frozen_worker_that_was_overtaken_is_told_and_changes_nothing(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    work = define(colour, shared_backend_url, effects)
    workers = {"running": hire(), "completed": hire()}
    tokens = {state: worker.enter(state) for state, worker in workers.items()}
    for worker in workers.values():
        worker.signal(signal.SIGSTOP)
    successor = hire()
    taken_over = successor.enter("running")  # and it stays inside
    assert colour.call(work, "completed") == "by the test, completed"
    for state, worker in workers.items():
        record = colour.call(work.peek, state)
        assert record.state == state
        assert record.token > tokens[state]
        worker.signal(signal.SIGCONT)
        worker.tell("return stale")
        assert worker.hear("error") == "LeaseLost"
        after = colour.call(work.peek, state)
        assert (after.state, after.token, after.attempt) == (state, record.token, record.attempt)
    successor.tell("return fresh")
    assert json.loads(successor.hear("result")) == "fresh"
    outcome = colour.call(work.outcome, "running")
    assert (outcome.value, outcome.replayed, outcome.token) == ("fresh", True, taken_over)
    assert colour.call(work, "completed") == "by the test, completed"


def test_a_frozen_worker_whose_successor_failed_is_told_as_well(hire: Hire, effects: Path) -> None:
    frozen, successor = hire(), hire()
    token = frozen.enter("o1")
    frozen.signal(signal.SIGSTOP)
    assert successor.enter("o1") > token
    successor.tell("raise")
    assert successor.hear("error") == "CardDeclinedError"
    frozen.signal(signal.SIGCONT)
    frozen.tell("return stale")
    assert frozen.hear("error") == "LeaseLost"
    later = successor.enter("o1")
    assert later > token
    successor.tell("return fresh")
    assert json.loads(successor.hear("result")) == "fresh"


def test_a_frozen_worker_that_fails_after_it_was_overtaken_changes_nothing(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    work = define(colour, shared_backend_url, effects)
    worker = hire()
    worker.enter("o1")
    worker.signal(signal.SIGSTOP)
    assert colour.call(work, "o1") == "by the test, o1"
    worker.signal(signal.SIGCONT)
    worker.tell("raise")
    kind, _, note = worker.hear("error").partition(" ")
    assert kind == "CardDeclinedError"
    assert note.startswith("idempotent: ")
    assert "another call took over" in note
    assert colour.call(work, "o1") == "by the test, o1"
    assert len(happened(effects)) == 1


def test_a_frozen_worker_may_still_complete_an_unknown_record(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    work = define(colour, shared_backend_url, effects, on_crash="raise")
    worker = hire(on_crash="raise")
    worker.enter("o1")
    worker.signal(signal.SIGSTOP)
    with pytest.raises(OutcomeUnknown):
        colour.call(work, "o1")
    worker.signal(signal.SIGCONT)
    worker.tell("return late")
    assert worker.hear("result") == '"late"'
    assert colour.call(work, "o1") == "late"


def test_a_frozen_worker_whose_record_was_resolved_is_told(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path
) -> None:
    work = define(colour, shared_backend_url, effects, on_crash="raise")
    worker = hire(on_crash="raise")
    worker.enter("o1")
    worker.signal(signal.SIGSTOP)
    with pytest.raises(OutcomeUnknown):
        colour.call(work, "o1")
    assert colour.call(work.resolve, "o1", result="by hand")
    worker.signal(signal.SIGCONT)
    worker.tell("return late")
    assert worker.hear("error") == "LeaseLost"
    assert colour.call(work, "o1") == "by hand"


def test_a_worker_slower_than_its_lease_keeps_it_and_others_of_either_colour_wait(
    hire: Hire, shared_backend_url: str, effects: Path, _fresh: contextlib.ExitStack
) -> None:
    worker = hire()
    worker.enter("o1")
    waiters = []
    for colour in COLOURS:
        backend = _config._open(shared_backend_url)  # each waits in the store, not one behind the other
        _fresh.callback(backend.close)
        waiters.append(colour.start(define(colour, backend, effects), "o1"))
    time.sleep(1.5 * LEASE)  # what is tested is that time passes and nothing happens
    assert not any(waiter.done() for waiter in waiters)
    worker.tell("return slow")
    assert worker.hear("result") == '"slow"'
    assert [waiter.result(30) for waiter in waiters] == ["slow", "slow"]


@pytest.mark.parametrize("colour", COLOURS[:1], ids=repr)  # the async twin: test_cancel.py
@pytest.mark.parametrize("on_crash", ["rerun", "raise"])
def test_ctrl_c_in_a_running_call_leaves_no_lease(
    hire: Hire, shared_backend_url: str, colour: Colour, effects: Path, on_crash: str
) -> None:
    work = define(colour, shared_backend_url, effects, wait=0, on_crash=on_crash)
    worker = hire(on_crash=on_crash, lease=60)
    worker.enter("o1")
    worker.signal(signal.SIGINT)
    assert worker.hear("error") == "KeyboardInterrupt"
    if on_crash == "rerun":
        assert colour.call(work, "o1") == "by the test, o1"
    else:
        with pytest.raises(OutcomeUnknown):
            colour.call(work, "o1")


def _in_child(colour: Colour, work: Any, pipe: Any) -> None:
    try:
        pipe.send([colour.call(work, "o1"), colour.call(work, "o2")])
    except BaseException as error:
        pipe.send(repr(error))


def test_a_forked_child_has_connections_of_its_own(shared_backend_url: str, colour: Colour, effects: Path) -> None:
    work = define(colour, shared_backend_url, effects)
    assert colour.call(work, "o1") == "by the test, o1"
    context = multiprocessing.get_context("fork")
    children = []
    for _ in range(3):
        ours, theirs = context.Pipe()
        child = context.Process(target=_in_child, args=(colour, work, theirs))
        child.start()
        children.append((child, ours))
    assert [colour.call(work, f"p{n}") for n in range(20)] == [f"by the test, p{n}" for n in range(20)]
    for child, pipe in children:
        assert pipe.poll(30)
        assert pipe.recv() == ["by the test, o1", "by the test, o2"]
        child.join(30)
        assert child.exitcode == 0
    assert collections.Counter(order for order, _ in happened(effects))["o2"] == 1


@pytest.mark.parametrize("shared_backend_url", ["redis", "postgres", "mariadb"], indirect=True)
def test_a_forked_child_leaves_the_connections_of_a_ready_made_async_client_alone(shared_backend_url: str) -> None:
    async def storm(backend: Backend, me: str) -> list[bool]:
        rids = [RecordId(me, str(n)) for n in range(100)]
        right = []
        for rid in rids:
            ask = {"attempt": me.encode(), "fingerprint": b"", "lease": 30, "keep": 1, "takeover": True}
            granted = await backend.claim(rid, **ask)
            found = await backend.read(rid)
            right.append(isinstance(granted, Granted) and found is not None and found.token == granted.token)
        return right

    if shared_backend_url.startswith("redis"):
        bare, options = split_url(shared_backend_url, ("prefix",))
        backend: Any = RedisBackend(redis.asyncio.Redis.from_url(bare), prefix=options["prefix"])
    else:
        bare, options = split_url(shared_backend_url, ("table",))
        backend = SQLBackend(create_async_engine(twins(bare)[1]), table=options["table"])
    with asyncio.Runner() as runner:
        runner.run(backend.read(RecordId("n", "k")))
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                asyncio.set_event_loop(None)
                with asyncio.Runner() as own:
                    assert own.run(storm(backend, "children")) == [True] * 100
                os.write(write, b"right")
            finally:
                os._exit(0)
        os.close(write)
        assert runner.run(storm(backend, "parents.")) == [True] * 100
        with open(read, "rb") as pipe:
            assert pipe.read() == b"right"
        os.waitpid(child, 0)
        link = backend._link
        runner.run(link._given.disconnect() if isinstance(backend, RedisBackend) else link._engines.dispose())


def test_a_child_forked_inside_a_call_does_not_end_it(shared_backend_url: str, effects: Path) -> None:
    colour = COLOURS[0]

    def work(order: str) -> str:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        return order

    work = colour.define(work, backend=shared_backend_url, lease=LEASE)
    assert work("o1") == "o1"
    assert work.outcome("o1").replayed


@pytest.mark.parametrize("leaves", ["by return", "by exit", "by error"])
def test_a_child_forked_inside_a_call_holds_nothing_of_it(
    shared_backend_url: str, effects: Path, leaves: str, _fresh: contextlib.ExitStack
) -> None:
    def work(order: str) -> str:
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            call = current_call()
            assert call is not None
            assert call.lease_lost
            if leaves == "by exit":
                sys.exit(0)
            if leaves == "by error":
                raise KeyError(order)
            return "by the child"
        os.waitpid(child, 0)
        assert os.getpid() == parent
        with effects.open("a") as file:
            file.write(f"{order} 1\n")
        with pytest.raises(InProgress):
            impatient(order)
        return "by the parent"

    safe = COLOURS[0].define(work, backend=shared_backend_url, namespace="n", lease=30)
    second = _config._open(shared_backend_url)
    _fresh.callback(second.close)
    impatient = COLOURS[0].define(lambda order: "beside", backend=second, namespace="n", wait=0)
    parent = os.getpid()
    try:
        answer = safe("o1")
    except BaseException as error:
        if os.getpid() != parent:
            os._exit(0 if isinstance(error, (LeaseLost, KeyError, SystemExit)) else 1)
        raise
    if os.getpid() != parent:
        os._exit(1)
    assert answer == "by the parent"
    assert safe("o1") == "by the parent"
    assert len(happened(effects)) == 1


def test_what_a_forked_child_records_is_there_after_its_parent_is_gone(shared_backend_url: str, effects: Path) -> None:
    program = """
import os, sys, time
from idempotent import idempotent, open_backend
url, effects = sys.argv[1:3]
@idempotent(backend=url, namespace="n", key="{order}")
def work(order):
    with open(effects, "a") as file:
        file.write(f"{order} 1\\n")
    return order
work("before")
ours, theirs = os.pipe()
if os.fork() == 0:
    os.close(theirs)
    work("first")
    os.read(ours, 1)  # until the parent is gone
    work("second")
    work("third")
    print("done", flush=True)
    os._exit(0)
time.sleep(0.3)
open_backend(url).close()
"""
    command = [sys.executable, "-c", program, shared_backend_url, str(effects)]
    done = subprocess.run(command, env=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("done\n", "")
    work = COLOURS[0].define(lambda order: "again", backend=shared_backend_url, namespace="n", key="{order}")
    assert [work(order) for order in ("before", "first", "second", "third")] == ["before", "first", "second", "third"]
    assert len(happened(effects)) == 4


def test_children_forked_while_others_call_are_served(shared_backend_url: str, effects: Path) -> None:
    work = define(COLOURS[0], shared_backend_url, effects)
    stop = threading.Event()

    def call() -> None:
        number = 0
        while not stop.is_set():
            work(f"{threading.get_ident()} {number}".replace(" ", "-"))
            number += 1

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(5):
            ours, theirs = context.Pipe()
            child = context.Process(target=_in_child, args=(COLOURS[0], work, theirs))
            child.start()
            assert ours.poll(30)
            assert ours.recv() == ["by the test, o1", "by the test, o2"]
            child.join(30)
            assert child.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_child_of_a_running_loop_is_refused_the_sqlite_file(tmp_path: Path) -> None:
    function = COLOURS[1].define(lambda: 1, backend=f"sqlite:///{tmp_path}/x.db")

    async def main() -> int:
        assert await function() == 1
        child = os.fork()
        if child == 0:
            try:
                COLOURS[0].define(lambda: 2, backend=f"sqlite:///{tmp_path}/x.db")()
            except BackendError as error:
                os._exit(7 if "spawn" in str(error) else 1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert asyncio.run(main()) == 7
    assert COLOURS[1].call(function) == 1  # the parent goes on
