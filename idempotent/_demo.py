"""The demo: one seeded retry storm against three versions of a charge, and what each of them charged.

Real worker processes share a store. Clients click twice, lose replies and call again, and one worker is killed with
SIGKILL inside the function, before it has charged. Charges are lines in a ledger file, which nothing but the charge
itself writes; the table counts them afterwards.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from random import Random
from typing import Any

from idempotent._config import check_url, open_backend
from idempotent.decorator import idempotent
from idempotent.errors import BackendError, BackendUnavailable

__all__ = ["add_arguments", "main"]

Welcome = Callable[[], contextlib.AbstractContextManager[None]]
"""Where Ctrl-C does no harm; it is put off everywhere else."""

WORKERS = 4
LEASE = 2.0
KEY = "charge:{order}"
MODES = {
    "plain": "no protection",
    "cache": "get-run-set cache",
    "idempotent": "@idempotent",
}


@dataclass
class Setup:
    """What a worker needs to know; paths and URLs as text."""

    mode: str
    folder: str
    backend: str
    namespace: str
    loss: float


@dataclass
class Result:
    """What one version of the charge did in the storm."""

    mode: str
    calls: int = 0
    charges: int = 0
    double_charges: int = 0
    never_charged: int = 0
    replays: int = 0
    disagreed: int = 0
    killed: int = 0
    seconds: float = 0.0
    answers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set), repr=False)


# ------------------------------------------------------------------------------------------------- in the workers


def _ledger(folder: str) -> Path:
    return Path(folder) / "ledger"


def _make_client(setup: Setup, inside: Callable[[], None]) -> Callable[[str], tuple[str, bool]]:
    """A function that asks for an order's charge once: the receipt, and whether it was a replay."""

    def charge(order: str) -> str:
        if order.startswith("killed"):
            inside()
        time.sleep(0.01)  # the payment provider takes its time
        receipt = os.urandom(4).hex()
        line = f"{order} {receipt}\n".encode()
        descriptor = os.open(_ledger(setup.folder), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        return receipt

    if setup.mode == "plain":
        return lambda order: (charge(order), False)
    if setup.mode == "cache":
        return _cached(setup, charge)
    safe = idempotent(backend=setup.backend, namespace=setup.namespace, key=KEY, lease=LEASE, ttl=600, wait=30)(charge)

    def ask(order: str, tries: int = 3) -> tuple[str, bool]:
        try:
            outcome = safe.outcome(order)
        except BackendUnavailable:  # nothing ran, so a client calls again
            if tries == 1:
                raise
            return ask(order, tries - 1)
        return outcome.value, outcome.replayed

    return ask


def _cached(setup: Setup, charge: Callable[[str], str]) -> Callable[[str], tuple[str, bool]]:
    """What many write first: look, run, remember. Two callers can look before either remembers."""
    store = sqlite3.connect(str(Path(setup.folder) / "cache.db"), timeout=30, isolation_level=None)
    store.execute("CREATE TABLE IF NOT EXISTS cache (key TEXT PRIMARY KEY, value TEXT)")

    def ask(order: str) -> tuple[str, bool]:
        found = store.execute("SELECT value FROM cache WHERE key = ?", (order,)).fetchone()
        if found is not None:
            return str(found[0]), True
        receipt = charge(order)
        store.execute("INSERT OR REPLACE INTO cache VALUES (?, ?)", (order, receipt))
        return receipt, False

    return ask


def _work(setup: Setup, pipe: Connection) -> None:
    """A worker process: takes orders from the pipe and answers on it, until it is told to stop or killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends us
    with contextlib.suppress(EOFError, ConnectionError):  # the parent is gone
        try:
            _serve(setup, pipe)
        except Exception as error:
            pipe.send(("error", _one_line(error)))


def _serve(setup: Setup, pipe: Connection) -> None:
    dying = False

    def inside() -> None:
        if dying:
            pipe.send(("inside", None))
            pipe.recv()  # killed before anything comes

    ask = _make_client(setup, inside)
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        order, seed, dying = task
        random = Random(seed)
        answers = [ask(order)]
        while random.random() < setup.loss and len(answers) < 10:  # the reply is lost: the client calls again
            answers.append(ask(order))
        pipe.send(("done", (order, answers)))


# -------------------------------------------------------------------------------------------------- in the parent


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Processes started here never hear Ctrl-C, which a terminal sends to them too, not even while they import."""
    if not hasattr(signal, "pthread_sigmask"):
        yield  # Windows
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # else the first worker starts it, and that lifts the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Crew:
    """The worker processes, each on a pipe of its own: a killed one takes no lock with it."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._context = multiprocessing.get_context("spawn")
        self.members: dict[Any, Any] = {}

    def hire(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(self._setup, theirs), daemon=True)
        self.members[ours] = process
        with _unheard():
            process.start()
        theirs.close()

    def kill(self, pipe: Connection) -> None:
        process = self.members.pop(pipe)
        if process.pid is not None:
            process.kill()
            process.join()
        pipe.close()

    def close(self) -> None:
        """End the workers; what they have begun gets a second, so that no claim comes after the tidying up."""
        for pipe in self.members:
            with contextlib.suppress(OSError):
                pipe.send(None)
        until = time.monotonic() + 1
        for process in self.members.values():
            if process.pid is not None:
                process.join(max(0.0, until - time.monotonic()))
        for pipe in list(self.members):
            self.kill(pipe)


def _tasks(orders: int, seed: int) -> list[tuple[str, int, bool]]:
    """Each order, clicked one to three times; the duplicates stand side by side, so workers take them together."""
    random = Random(seed)
    tasks: list[tuple[str, int, bool]] = []
    for number in range(orders):
        clicks = random.choice((1, 2, 2, 3))
        tasks += [(f"order-{number}", random.getrandbits(32), False) for _ in range(clicks)]
    # One worker is killed inside this order; a redelivery, and a second one, follow.
    tasks.insert(len(tasks) // 3, ("killed-order", random.getrandbits(32), True))
    return tasks


def _storm(
    setup: Setup,
    tasks: list[tuple[str, int, bool]],
    welcome: Welcome,
    asked: set[str],
) -> Result:
    """Let the workers do `tasks`; every order that one of them was given is added to `asked`."""
    result = Result(setup.mode)
    left = list(tasks)
    total = len(left) + 2
    done = 0
    crew = _Crew(setup)
    began = 0.0
    try:
        for _ in range(WORKERS):
            crew.hire()
        starting = WORKERS
        idle: list[Connection] = []
        while done < total:
            with welcome():
                talking = wait(list(crew.members))
            for pipe in talking:
                assert isinstance(pipe, Connection)
                kind, what = pipe.recv()
                if kind == "error":
                    raise BackendError(what)
                if kind == "inside":
                    crew.kill(pipe)
                    crew.hire()
                    result.killed += 1
                    result.calls += 1
                    done += 1
                    seed = tasks[0][1]
                    left[:0] = [("killed-order", seed + n, False) for n in (1, 2)]
                    continue
                if kind == "ready":
                    starting -= 1
                    if starting == 0:
                        began = time.monotonic()
                else:
                    order, answers = what
                    result.calls += len(answers)
                    result.replays += sum(replayed for _, replayed in answers)
                    result.answers[order].update(receipt for receipt, _ in answers)
                    done += 1
                    _progress(setup.mode, done, total)
                idle.append(pipe)
            while starting <= 0 and idle and left:
                asked.add(left[0][0])
                idle.pop().send(left.pop(0))
        result.seconds = time.monotonic() - began
    except (EOFError, ConnectionError):
        raise BackendError("a worker process ended unexpectedly") from None
    finally:
        if 0 < done < total and sys.stderr.isatty():
            print(file=sys.stderr)  # what is said next stands below the bar
        crew.close()
    return result


def _count(result: Result, folder: str, expected: set[str]) -> None:
    """What the ledger says."""
    lines = _ledger(folder).read_text().splitlines()
    charged = Counter(line.split()[0] for line in lines)
    result.charges = len(lines)
    result.double_charges = sum(count - 1 for count in charged.values())
    result.never_charged = sum(order not in charged for order in expected)
    result.disagreed = sum(len(receipts) > 1 for receipts in result.answers.values())


# ------------------------------------------------------------------------------------------------------ for people


def _progress(mode: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // total)
        print(f"\r  {MODES[mode]:<18} [{bar:<30}] {done}/{total}", end="", file=sys.stderr, flush=True)
        if done == total:
            print(file=sys.stderr)
    elif done == total:
        print(f"  {MODES[mode]}: {total} of {total} done", file=sys.stderr, flush=True)


_COLUMNS = (
    ("calls", "calls"),
    ("charges", "charges"),
    ("double_charges", "double charges"),
    ("replays", "replays"),
    ("disagreed", "answers that disagreed"),
)


def _table(results: list[Result]) -> Iterator[str]:
    yield f"{'':<18}" + "".join(f"  {title}" for _, title in _COLUMNS) + "  seconds"
    for result in results:
        cells = "".join(f"  {getattr(result, name):>{len(title)}}" for name, title in _COLUMNS)
        yield f"{MODES[result.mode]:<18}{cells}  {result.seconds:>7.1f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument(
        "--backend", metavar="URL", help="where records live (default: an SQLite file made for the demo)"
    )
    parser.add_argument(
        "--orders", type=_orders, default=40, metavar="N", help="how many orders, 1 to 10000 (default 40)"
    )
    parser.add_argument(
        "--loss", type=_loss, default=0.3, metavar="P", help="how many replies are lost, 0 to 0.9 (default 0.3)"
    )
    parser.add_argument("--seed", type=int, default=7, metavar="N", help="which storm (default 7)")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")


def _orders(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError("must be 1 to 10000")
    return number


def _loss(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 0.9:
        raise argparse.ArgumentTypeError("must be 0 to 0.9")
    return number


def main(options: argparse.Namespace, welcome: Welcome) -> int:
    """Run the demo; Ctrl-C is raised only within `welcome()`, and leaves nothing behind.

    Returns the exit code: 0: `@idempotent` charged every order exactly once and all callers agree; 1: it did not;
    2: the backend could not be used.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="idempotent-demo-") as folder, contextlib.ExitStack() as stack:
            return _run(options, folder, stack, welcome)
    except BackendError as error:
        print(f"the demo cannot use this backend: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, folder: str, stack: contextlib.ExitStack, welcome: Welcome) -> int:
    backend = options.backend or f"sqlite:///{folder}/records.db"
    namespace = f"demo-{os.urandom(6).hex()}"
    _check(backend, namespace, welcome)
    tasks = _tasks(options.orders, options.seed)
    orders = {order for order, _, _ in tasks}
    print(
        f"A retry storm: {len(orders)} orders, {options.loss:.0%} of replies lost, {WORKERS} worker processes,"
        f" one of them killed inside the function before it charges. Seed {options.seed}.",
        file=sys.stderr,
    )
    results = []
    for mode in MODES:
        place = Path(folder) / mode
        place.mkdir()
        setup = Setup(mode, str(place), backend, namespace, options.loss)
        asked: set[str] = set()
        if mode == "idempotent" and options.backend:
            stack.callback(_forget, backend, namespace, asked)
        result = _storm(setup, tasks, welcome, asked)
        _count(result, setup.folder, orders)
        results.append(result)
    safe = results[-1]
    held = not (safe.double_charges or safe.never_charged or safe.disagreed)
    if options.json:
        shown = [
            {name: value for name, value in vars(result).items() if name != "answers"}
            | {"seconds": round(result.seconds, 3)}
            for result in results
        ]
        report = {
            "orders": len(orders),
            "loss": options.loss,
            "seed": options.seed,
            "backend": check_url(backend),
            "results": shown,
            "held": held,
        }
        print(json.dumps(report, indent=2))
    else:
        print()
        print("\n".join(_table(results)))
        print()
        if held:
            print(f"@idempotent charged each of {len(orders)} orders exactly once, and every caller got its receipt.")
        else:
            print("@idempotent broke its promise; please report this seed.")
    return 0 if held else 1


def _check(backend: str, namespace: str, welcome: Welcome) -> None:
    """Raise BackendError, in one line, for a store that cannot be used. Leaves no record there."""
    try:
        if check_url(backend) == "local":
            raise ValueError("local:// is one process's memory, and the demo's workers are processes of their own")
        open_backend(backend)
        with welcome():
            _records(backend, namespace).peek("order-0")
    except Exception as error:  # a driver may say anything of a URL that it cannot use
        raise BackendError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    name = "" if isinstance(error, (ValueError, ImportError)) else f"{type(error).__name__}: "
    return name + " ".join(str(error).split())


def _records(backend: str, namespace: str) -> Any:
    """The workers' function as one who only looks at its records needs it."""

    def charge(order: str) -> str:
        raise NotImplementedError

    return idempotent(backend=backend, namespace=namespace, key=KEY)(charge)


def _forget(backend: str, namespace: str, orders: set[str]) -> None:
    """Leave nothing in a store that is not the demo's own."""
    safe = _records(backend, namespace)
    with contextlib.suppress(BackendError):
        for order in orders:
            safe.forget(order, force=True)
