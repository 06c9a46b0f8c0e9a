"""A soak: worker processes that call one function under faults, and the verdict on what they saw.

Each worker calls `work(key)`, decorated with `@idempotent`, for keys of a window that moves on, so that duplicates meet.
Meanwhile processes are killed (SIGKILL) and frozen (SIGSTOP) at any moment, and one run in twenty-five freezes itself
inside the function for longer than its lease: only so is a completion without a fence found out with certainty.
Every command to the store, with the instants before and after it, goes to a log, which `idempotent.testing.history`
judges. Two plants show that the judge can convict: "naive" looks, runs and stores; "unfenced" claims as we do and then
stores its outcome whoever owns the record by then.
"""

import argparse
import asyncio
import contextlib
import inspect
import itertools
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from idempotent import errors
from idempotent._config import check_url, open_backend
from idempotent._drive import drive
from idempotent._record import ATTEMPT_BYTES, Answer, Claim, Granted, Record, RecordId, Settled
from idempotent._run import current_call
from idempotent.backends.base import Backend
from idempotent.decorator import idempotent
from idempotent.errors import BackendError, IdempotencyError
from idempotent.testing.history import Finding, Operation, join, judge, write

__all__ = ["PROTOCOLS", "Report", "add_arguments", "run"]

PROTOCOLS = ("ours", "naive", "unfenced")
WINDOW = 200
"""Keys that are called at one time."""
STAYS = 2.0
"""Leases for which a key stays in the window."""
NEWEST = 6
"""Every other call is for one of so many keys at the window's front, which nobody may have called yet."""
PATIENT = 0.2
"""The part of the calls that wait for a running one; the others try once."""
RETRIES = 0.5
"""The part of the calls that are for a key whose last call got no result: so those of frozen workers are taken over."""
TASKS = 6
"""Calls that an async worker makes at one time; a sync one makes one."""
OUTLIVES = 0.04
"""The part of the runs that freeze for longer than their lease; with one, all the worker's calls freeze."""
RAISES = 0.03
"""The part that raise, so that another runs."""
AUDITED = 300
"""Keys that are called once more when all is over, beside those that came to no end."""

Welcome = Callable[[], contextlib.AbstractContextManager[None]]
"""Where Ctrl-C does no harm; it is put off everywhere else."""


class Declined(Exception):
    """What the function raises now and then."""


@dataclass(frozen=True)
class Setup:
    """What workers need to know; instants of the monotonic clock, seconds."""

    backend: str
    namespace: str
    protocol: str
    lease: float
    seed: int
    began: float
    until: float
    log: Path
    parent: int
    """Its process id: without it workers end."""


@dataclass
class Report:
    """What came of a soak."""

    backend: str
    protocol: str
    seconds: float
    workers: int
    seed: int
    calls: int = 0
    answered: int = 0
    replayed: int = 0
    runs: int = 0
    keys: int = 0
    operations: int = 0
    killed: int = 0
    frozen: int = 0
    lost: int = 0
    """Runs that were overtaken and told so: LeaseLost."""
    unconfirmed: int = 0
    """Calls that the store did not answer: BackendUnavailable, nothing ran or its outcome was not recorded."""
    doubled: int = 0
    """Keys with more than one outcome."""
    broken: dict[str, int] = field(default_factory=dict)
    """How many keys broke which promise."""


# -------------------------------------------------------------------------------------------------------- the log


class _Log:
    """Lines that are appended whole, by any number of processes."""

    def __init__(self, path: Path, worker: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._worker = worker
        self._calls = itertools.count(1)
        self._count = itertools.count(1)
        self.call = ContextVar("call", default="")
        """The task's call that is under way; heartbeats belong to none."""

    def begin_call(self, key: str) -> str:
        self.call.set(f"{self._worker}.{next(self._calls)}")
        return self.invoke("call", key)

    def invoke(self, does: str, key: str, **asks: Any) -> str:
        """Written before the operation is sent: of a worker that dies next, it may still take effect."""
        number = f"{self._worker}:{next(self._count)}"
        event = {"id": number, "worker": self._worker, "call": self.call.get(), "key": key, "does": does, "asks": asks}
        self._write(event | {"invoked": time.monotonic_ns()})
        return number

    def returns(self, number: str, **reply: Any) -> None:
        self._write({"id": number, "returned": time.monotonic_ns(), "reply": reply})

    def _write(self, event: dict[str, Any]) -> None:
        os.write(self._file, json.dumps(event).encode() + b"\n")


def _words(reply: Any) -> dict[str, Any]:
    """A reply as the history keeps it."""
    if isinstance(reply, Answer):
        return {"is": reply.value}
    kept = {"is": type(reply).__name__.lower()}
    if isinstance(reply, Granted):
        return kept | {"token": reply.token, "took_over": reply.took_over}
    if isinstance(reply, Settled):
        return kept | {"token": reply.token, "failed": reply.failed, "body": reply.body.decode(errors="replace")}
    return kept | {"token": getattr(reply, "token", None)}


class _Layer(Backend):
    """`inner` with something between it and the calls; what is not overridden goes through."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.name = inner.name
        self.timeout = inner.timeout

    def _over(self, inner: Backend) -> Self:
        return type(self)(inner)

    def blocking(self) -> Backend:
        return self._over(self.inner.blocking())

    def asynchronous(self) -> Backend:
        return self._over(self.inner.asynchronous())

    def within(self, seconds: float) -> Backend:
        return self._over(self.inner.within(seconds))

    async def claim(self, rid: RecordId, **options: Any) -> Claim:
        return await self.inner.claim(rid, **options)

    async def renew(self, rid: RecordId, **options: Any) -> Answer:
        return await self.inner.renew(rid, **options)

    async def complete(self, rid: RecordId, **options: Any) -> Answer:
        return await self.inner.complete(rid, **options)

    async def fail(self, rid: RecordId, **options: Any) -> Answer:
        return await self.inner.fail(rid, **options)

    async def release(self, rid: RecordId, **options: Any) -> Answer:
        return await self.inner.release(rid, **options)

    async def read(self, rid: RecordId) -> Record | None:
        return await self.inner.read(rid)

    async def forget(self, rid: RecordId, **options: Any) -> Record | None:
        return await self.inner.forget(rid, **options)

    async def changed(self, rid: RecordId, **options: Any) -> None:
        await self.inner.changed(rid, **options)

    async def pass_on(self, rid: RecordId) -> None:
        await self.inner.pass_on(rid)

    def scan(self, **filters: Any) -> AsyncIterator[Record]:
        return self.inner.scan(**filters)

    async def purge(self, limit: int = 1000) -> int:
        return await self.inner.purge(limit)

    async def _overwrite(self, rid: RecordId, **outcome: Any) -> Answer:
        """Record an outcome in place of whatever there is, as a plain SET would."""
        answer = Answer.GONE
        while answer is not Answer.DONE:
            await self.inner.forget(rid, force=True)
            attempt = os.urandom(ATTEMPT_BYTES)
            ask: dict[str, Any] = {"attempt": attempt, "fingerprint": b"", "lease": 60.0, "keep": None}
            reply = await self.inner.claim(rid, **ask, takeover=True)
            if isinstance(reply, Granted):
                outcome |= {"attempt": attempt, "token": reply.token}
                answer = await self.inner.complete(rid, **outcome)
        return answer


class _Naive(_Layer):
    """A plant: look, run, store."""

    async def claim(self, rid: RecordId, **options: Any) -> Claim:
        record = await self.inner.read(rid)
        if record is not None and record.state == "completed":
            return await self.inner.claim(rid, **options)
        return Granted(time.time_ns() // 1000)

    async def renew(self, rid: RecordId, **options: Any) -> Answer:
        return Answer.DONE

    async def complete(self, rid: RecordId, **options: Any) -> Answer:
        return await self._overwrite(rid, **options)

    async def release(self, rid: RecordId, **options: Any) -> Answer:
        return Answer.DONE


class _Unfenced(_Layer):
    """A plant: whoever completes is believed, and nobody is told that it was overtaken."""

    async def renew(self, rid: RecordId, **options: Any) -> Answer:
        await self.inner.renew(rid, **options)
        return Answer.DONE

    async def complete(self, rid: RecordId, **options: Any) -> Answer:
        answer = await self.inner.complete(rid, **options)
        return answer if answer is Answer.DONE else await self._overwrite(rid, **options)


_PLANTS: dict[str, type[_Layer]] = {"naive": _Naive, "unfenced": _Unfenced}


class _Logged(_Layer):
    """`inner`, with every command that can change a record in the log."""

    def __init__(self, inner: Backend, log: _Log) -> None:
        super().__init__(inner)
        self._log = log

    def _over(self, inner: Backend) -> Self:
        return type(self)(inner, self._log)

    async def _send(self, name: str, rid: RecordId, command: Awaitable[Any], options: dict[str, Any]) -> Any:
        asks: dict[str, Any] = {word: options[word] for word in ("token", "lease") if word in options}
        asks["attempt"] = options["attempt"].hex()
        if "body" in options:
            asks["body"] = options["body"].decode(errors="replace")
        number = self._log.invoke(name, rid.key, **asks)
        try:
            reply = await command
        except BackendError as error:
            self._log.returns(number, error=type(error).__name__)
            raise
        self._log.returns(number, **_words(reply))
        return reply

    async def claim(self, rid: RecordId, **options: Any) -> Any:
        return await self._send("claim", rid, self.inner.claim(rid, **options), options)

    async def renew(self, rid: RecordId, **options: Any) -> Any:
        return await self._send("renew", rid, self.inner.renew(rid, **options), options)

    async def complete(self, rid: RecordId, **options: Any) -> Any:
        return await self._send("complete", rid, self.inner.complete(rid, **options), options)

    async def fail(self, rid: RecordId, **options: Any) -> Any:
        return await self._send("fail", rid, self.inner.fail(rid, **options), options)

    async def release(self, rid: RecordId, **options: Any) -> Any:
        return await self._send("release", rid, self.inner.release(rid, **options), options)


# ----------------------------------------------------------------------------------------------------- in the workers


class _Worker:
    """Calls the function for one key after the other: the blocking one, or its async twin."""

    def __init__(self, setup: Setup, name: str, *, is_async: bool = False, faults: bool = True) -> None:
        self._setup = setup
        self._dice = random.Random(f"{setup.seed} {name}")
        self._name = name
        self._log = _Log(setup.log, name)
        self._outlives = OUTLIVES / TASKS if is_async else OUTLIVES
        self._faults = faults
        store = open_backend(setup.backend)
        if setup.protocol in _PLANTS:
            store = _PLANTS[setup.protocol](store)
        options: dict[str, Any] = {
            "backend": _Logged(store, self._log),
            "namespace": setup.namespace,
            "key": "{key}",
            "lease": setup.lease,
            "ttl": 3600 + 2 * (setup.until - setup.began),
        }
        body = self._async_body if is_async else self._body
        self._patient = idempotent(**options, wait=4 * setup.lease if faults else 30 + 10 * setup.lease)(body)
        self._hasty = idempotent(**options, wait=0)(body)

    def _body(self, key: str) -> str:
        run, pause = self._enter(key)
        time.sleep(pause)
        return self._leave(run)

    async def _async_body(self, key: str) -> str:
        run, pause = self._enter(key)
        await asyncio.sleep(pause)
        return self._leave(run)

    def _enter(self, key: str) -> tuple[str, float]:
        call = current_call()
        assert call is not None
        return self._log.invoke("run", key, token=call.token), self._dice.uniform(0, 0.02)

    def _leave(self, run: str) -> str:
        if self._faults and self._dice.random() < self._outlives:
            os.kill(os.getpid(), signal.SIGSTOP)  # the parent wakes us when the lease is over
        receipt = f"{self._log.call.get()}/{self._dice.getrandbits(32):08x}"
        self._log.returns(run, receipt=receipt)
        if self._faults and self._dice.random() < RAISES:
            raise Declined
        return receipt

    async def calls(self, task: int = 0, tasks: int = 1) -> None:
        """Calls until the time is over, or the parent is gone; of this process's tasks each has keys of its own."""
        setup = self._setup
        unanswered: dict[str, float] = {}
        """By key, since when."""
        while (now := time.monotonic()) < setup.until and os.getppid() == setup.parent:
            first = int((now - setup.began) / (STAYS * setup.lease) * WINDOW)
            place = first + self._dice.randrange(*self._dice.choice(((0, WINDOW), (WINDOW - NEWEST, WINDOW))))
            key = f"k{place - place % tasks + task}"
            if unanswered and self._dice.random() < RETRIES:
                key = self._dice.choice([*unanswered])
            if await self.call(key, patient=self._dice.random() < PATIENT):
                unanswered.pop(key, None)
            elif now - unanswered.setdefault(key, now) > 2 * STAYS * setup.lease:
                del unanswered[key]

    async def call(self, key: str, *, patient: bool) -> bool:
        """One call; whether there was a result."""
        number = self._log.begin_call(key)
        try:
            answer: Any = (self._patient if patient else self._hasty).outcome(key)
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:
            own = isinstance(error, (IdempotencyError, Declined))
            self._log.returns(number, error=type(error).__name__ if own else repr(error))
            return False
        self._log.returns(number, value=answer.value, replayed=answer.replayed, stored=answer.stored)
        return True


def _work(setup: Setup, name: str, *, is_async: bool) -> None:
    worker = _Worker(setup, name, is_async=is_async)

    async def tasks() -> None:
        await asyncio.gather(*(worker.calls(task, TASKS) for task in range(TASKS)))

    if is_async:
        asyncio.run(tasks())
    else:
        drive(worker.calls())


def _audit(setup: Setup, keys: list[str]) -> None:
    auditor = _Worker(setup, "auditor", faults=False)
    for key in keys:
        drive(auditor.call(key, patient=True))


def _tidy(setup: Setup, keys: list[str]) -> None:
    backend = open_backend(setup.backend).blocking()
    for key in keys:
        drive(backend.forget(RecordId(setup.namespace, key), force=True))


def _check(setup: Setup) -> None:
    """A claim and its release, so that a store that cannot be used is told of at once, and its table is there."""
    backend, rid = open_backend(setup.backend).blocking(), RecordId(setup.namespace, "check")
    attempt = os.urandom(ATTEMPT_BYTES)
    options: dict[str, Any] = {"fingerprint": b"", "lease": 10.0, "keep": None, "takeover": True}
    reply = drive(backend.claim(rid, attempt=attempt, **options))
    assert isinstance(reply, Granted)
    drive(backend.release(rid, attempt=attempt, token=reply.token))


# ------------------------------------------------------------------------------------------------------ in the parent


class _Crew:
    """Worker processes, forked: a new one for each that is killed takes milliseconds."""

    def __init__(self, setup: Setup, report: Report) -> None:
        self._setup, self._report = setup, report
        self._dice = random.Random(f"{setup.seed} nemesis")
        self._hired = 0
        self.members: dict[int, float | None] = {}
        """By process id: when it is to be thawed (monotonic seconds); None: it runs."""

    def hire(self) -> None:
        number = self._hired = self._hired + 1
        name = f"w{number}"
        self.members[_forked(lambda: _work(self._setup, name, is_async=number % 2 == 0))] = None

    def tend(self) -> None:
        """Replace those that have died, note those that have frozen, and thaw those whose time has come."""
        now = time.monotonic()
        for pid, thaws in list(self.members.items()):
            done, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                self._report.frozen += 1
                if thaws is None:  # by itself
                    self.members[pid] = now + self._dice.uniform(1.2, 2.2) * self._setup.lease
            elif done:
                del self.members[pid]
                if time.monotonic() < self._setup.until:  # read after its end: before it, it had read the same clock
                    if not os.WIFSIGNALED(status):
                        raise BackendError(f"a worker process ended with {os.waitstatus_to_exitcode(status)}")
                    self.hire()
            elif thaws is not None and thaws <= now:
                os.kill(pid, signal.SIGCONT)
                self.members[pid] = None

    def strike(self) -> None:
        """Kill one, or freeze one that runs."""
        if self._dice.random() < 0.5:
            os.kill(self._dice.choice([*self.members]), signal.SIGKILL)
            self._report.killed += 1
            return
        running = [pid for pid, thaws in self.members.items() if thaws is None]
        if running:
            pid = self._dice.choice(running)
            os.kill(pid, signal.SIGSTOP)
            self.members[pid] = time.monotonic() + self._dice.uniform(0.1, 1.8) * self._setup.lease

    def close(self, patience: float = 0.0) -> None:
        """End them all; those that run get `patience` seconds for what they have begun."""
        until = time.monotonic() + patience
        while self.members and time.monotonic() < until:
            for pid in list(self.members):
                os.kill(pid, signal.SIGCONT)
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del self.members[pid]
            time.sleep(0.01)
        for pid in list(self.members):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del self.members[pid]


def _forked(work: Callable[[], None]) -> int:
    """The id of a process that does `work`; what it raises is printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
        logging.disable(logging.CRITICAL)  # takeovers and broken connections are what this is about
        work()
        code = 0
    except BaseException as error:  # nothing of the parent's stack may run here
        words = " ".join(str(error).split())
        print(f"{type(error).__name__}: {words}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def _done(work: Callable[[], None], welcome: Welcome) -> bool:
    """`work` in a process of its own; whether it succeeded."""
    pid = _forked(work)
    try:
        with welcome():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def _load(url: str) -> None:
    """Import what the workers need, so that they are born with it."""
    if check_url(url) == "redis":
        import idempotent.backends.redis  # noqa: F401

        return
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import create_async_engine

    from idempotent._options import split_url
    from idempotent.backends._engines import twins

    blocking, asynchronous = twins(split_url(url, ("table", "timeout"))[0])
    sa.create_engine(blocking)
    create_async_engine(asynchronous)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The soak's options."""
    parser.add_argument("--backend", metavar="URL", required=True, help="redis://, postgresql://, mysql://, sqlite:///")
    parser.add_argument("--seconds", type=_positive, default=60.0, metavar="S", help="how long (default 60)")
    parser.add_argument("--workers", type=_workers, default=6, metavar="N", help="processes, 2 to 64 (default 6)")
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default="ours", help="what ships, or a plant that must be convicted"
    )
    parser.add_argument(
        "--lease", type=_lease, default=0.3, metavar="S", help="seconds of a lease, at least 0.1 (default 0.3)"
    )
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="who is struck and when (default 7)")
    parser.add_argument("--history", metavar="FILE", help="where to write what happened, one operation a line, in JSON")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1e6:
        raise argparse.ArgumentTypeError("must be greater than 0")
    return number


def _lease(text: str) -> float:
    number = _positive(text)
    if number < 0.1:  # commands are given as long as the lease, and a busy machine takes longer than that
        raise argparse.ArgumentTypeError("must be at least 0.1")
    return number


def _workers(text: str) -> int:
    number = int(text)
    if not 2 <= number <= 64:
        raise argparse.ArgumentTypeError("must be 2 to 64")
    return number


def run(options: argparse.Namespace, welcome: Welcome) -> int:
    """Run the soak; Ctrl-C is raised only within `welcome()`, and leaves no process behind.

    Returns the exit code: 0: every promise was kept that a history can show; 1: one was broken; 2: it could not run.
    """
    try:
        if not hasattr(os, "fork"):
            raise ValueError("the soak freezes and kills processes by POSIX signals, which this system does not have")
        if check_url(options.backend) == "local":
            raise ValueError("local:// is one process's memory, and the workers are processes of their own")
        if options.history:
            Path(options.history).touch()  # told now, and not when the time is over
        _load(options.backend)
        with tempfile.TemporaryDirectory(prefix="idempotent-soak-") as folder:
            return _run(options, Path(folder) / "log", welcome)
    except (BackendError, ValueError, TypeError, ImportError, OSError) as error:
        print(f"the soak cannot run: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, log: Path, welcome: Welcome) -> int:
    began = time.monotonic()
    namespace = f"soak-{os.urandom(6).hex()}"
    until = began + options.seconds
    setup = Setup(
        options.backend,
        namespace,
        options.protocol,
        options.lease,
        options.seed,
        began,
        until,
        log,
        os.getpid(),
    )
    report = Report(check_url(options.backend), options.protocol, 0.0, options.workers, options.seed)
    if not _done(lambda: _check(setup), welcome):
        raise BackendError("this backend could not be used")
    crew = _Crew(setup, report)
    history: list[Operation] = []
    try:
        _storm(setup, crew, options.workers, welcome)
        crew.close(patience=10 + 5 * options.lease)
        report.seconds = round(time.monotonic() - began, 1)
        keys, unsettled = _keys(_read(log))
        sample = keys[-AUDITED:]
        _say("auditing")
        if not _done(lambda: _check(setup), welcome):
            raise BackendError("when the time was over the backend could not be used any more")
        if not _done(lambda: _audit(setup, [*dict.fromkeys([*unsettled, *sample])]), welcome):
            raise BackendError("the keys could not be called again afterwards")
    finally:
        crew.close()
        history = _read(log) if log.exists() else []
        if options.history:
            write(history, Path(options.history))
        _done(lambda: _tidy(setup, _keys(history)[0]), contextlib.nullcontext)
    findings = judge(history, expected_errors=(name for name in errors.__all__ if name != "SerializationError"))
    _count(report, history, findings)
    if not report.answered:
        raise BackendError("no call was answered")
    if options.json:
        print(json.dumps(asdict(report) | {"kept": not findings}, indent=2))
    else:
        print("\n".join(_text(report, findings)))
    return 1 if findings else 0


def _read(log: Path) -> list[Operation]:
    with log.open(encoding="utf-8") as lines:
        return join(lines)


def _keys(history: list[Operation]) -> tuple[list[str], list[str]]:
    """All keys, and those of which no outcome is known."""
    settled = {operation.key for operation in history if operation.is_settled or operation.reply.get("is") == "settled"}
    keys = [*dict.fromkeys(operation.key for operation in history)]
    return keys, [key for key in keys if key not in settled]


def _storm(setup: Setup, crew: _Crew, workers: int, welcome: Welcome) -> None:
    for _ in range(workers):
        crew.hire()
    dice = random.Random(f"{setup.seed} strikes")
    strikes = setup.began + 0.3
    told = 0.0
    while (now := time.monotonic()) < setup.until:
        crew.tend()
        if now >= strikes:
            crew.strike()
            strikes = now + dice.uniform(0.03, 0.1) * max(1.0, setup.lease / 0.3)
        if now - told > (0.2 if sys.stderr.isatty() else 10.0):
            told = now
            _progress(now - setup.began, setup.until - setup.began, crew._report)
        with welcome():
            time.sleep(0.01)
    _progress(setup.until - setup.began, setup.until - setup.began, crew._report)


def _progress(done: float, total: float, report: Report) -> None:
    words = f"{done:.0f} of {total:.0f} s, {report.killed} killed, {report.frozen} frozen"
    if sys.stderr.isatty():
        bar = "#" * int(30 * done / total)
        print(f"\r  [{bar:<30}] {words}", end="\n" if done >= total else "", file=sys.stderr, flush=True)
    else:
        _say(words)


def _say(words: str) -> None:
    print(f"  {words}", file=sys.stderr, flush=True)


def _count(report: Report, history: list[Operation], findings: list[Finding]) -> None:
    report.operations = len(history)
    report.keys = len({operation.key for operation in history})
    outcomes: dict[str, set[int]] = {}
    for operation in history:
        if operation.is_settled:
            outcomes.setdefault(operation.key, set()).add(operation.asks["token"])
        elif operation.does == "run":
            report.runs += 1
        elif operation.does == "call":
            report.calls += 1
            report.answered += "value" in operation.reply
            report.replayed += bool(operation.reply.get("replayed"))
            report.lost += operation.reply.get("error") == "LeaseLost"
            report.unconfirmed += operation.reply.get("error") == "BackendUnavailable"
    report.doubled = sum(len(tokens) > 1 for tokens in outcomes.values())
    report.broken = dict(Counter(finding.promise for finding in findings))


def _text(report: Report, findings: list[Finding]) -> Iterator[str]:
    what = "@idempotent" if report.protocol == "ours" else f"the plant {report.protocol!r}"
    yield f"{what} on {report.backend}: {report.seconds:.0f} s, {report.workers} workers, seed {report.seed}"
    yield f"  {report.calls:,} calls of {report.keys:,} keys, {report.replayed:,} replayed, {report.runs:,} runs"
    yield f"  workers killed {report.killed}, frozen {report.frozen}; overtaken and told so {report.lost}"
    yield f"  not confirmed by the store {report.unconfirmed}; keys with two outcomes {report.doubled}"
    if not findings:
        yield f"kept: {report.operations:,} operations break no promise that a history can show"
        return
    yield "BROKEN:"
    for promise, count in sorted(report.broken.items()):
        yield f"  {promise}: {count:,} keys"
    yield ""
    yield str(min(findings, key=lambda finding: finding.promise))
