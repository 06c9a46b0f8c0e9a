"""One call in this process: what was asked for, where it stands, how its function sees it, and where duplicates meet.

Within one process duplicates meet in a Flight before the backend is asked: one leads, the others follow, and each
decodes its own copy of what the leader recorded.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar, cast

from idempotent import events
from idempotent._record import ATTEMPT_BYTES, RecordId, Settled
from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends.base import Backend, Finder
from idempotent.errors import BackendUnavailable, CallError, LeaseLost
from idempotent.events import Counted, EventName, Hook
from idempotent.serializers import Codec

if TYPE_CHECKING:
    from idempotent._near import Near

P = ParamSpec("P")
R = TypeVar("R")

MARGIN = 0.01
"""The part of a lease that local validity leaves out, for clocks that do not run at one speed."""


class Driver(Protocol):
    """How a flow waits: the difference between threads, tasks and a test's scheduler."""

    def now(self) -> float:
        """Monotonic seconds."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        ...

    def waiter(self) -> ThreadWaiter | TaskWaiter:
        """A wait of the caller's own, that other threads and loops can end."""
        ...

    def beat(self, run: "Run") -> None:
        """Call `renew(run)` every third of its lease until `still`."""
        ...

    async def still(self, run: "Run") -> None:
        """Stop the beats of `run` and wait for one that is under way."""
        ...


class Stepper(Protocol):
    """What runs a step: the drivers of threads and of tasks, in their colour."""

    def step(
        self, call: "Call", name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run `function`, or give what is recorded of it."""
        ...


class Plan:
    """What one decorated function asked for, with the defaults filled in; durations in seconds."""

    __slots__ = (
        "backend",
        "codec",
        "error_ttl",
        "find",
        "flights",
        "hooks",
        "keep_result",
        "lease",
        "namespace",
        "near",
        "observes",
        "prefix",
        "probe",
        "remember",
        "run_on_outage",
        "serializer",
        "stats",
        "takeover",
        "trust",
        "ttl",
        "wait",
    )

    def __init__(
        self,
        *,
        backend: Backend,
        flights: "Flights",
        codec: Codec,
        namespace: str,
        ttl: float,
        lease: float,
        wait: float | None,
        keep_result: bool,
        error_ttl: Mapping[type[Exception], float],
        on_crash: str | Callable[..., Any],
        run_on_outage: bool,
        hooks: tuple[Hook, ...],
        stats: dict[Counted, int],
        serializer: Any = None,
        remember: float = 0.0,
        observes: bool = False,
    ) -> None:
        self.backend = backend
        self.find: Finder | None = None
        """How to look at settled records in this process's own memory; None: there are none."""
        self.near: Near | None = None
        """Where copies of settled records are kept; None: nowhere."""
        self.flights = flights
        self.codec = codec
        self.namespace = namespace
        self.observes = observes
        """It runs whatever the records say (`configure(mode="observe")`)."""
        self.prefix = RecordId(namespace, "").text
        """What the text of a call's record id begins with, before the key."""
        self.ttl = ttl
        self.lease = lease
        self.wait = wait
        self.trust = lease + (0.0 if backend is None else 2 * backend.timeout)
        """Seconds after which duplicates no longer count on a leader that has asked the backend."""
        self.keep_result = keep_result
        self.error_ttl = error_ttl
        self.takeover = on_crash == "rerun"
        self.probe = None if isinstance(on_crash, str) else on_crash
        self.run_on_outage = run_on_outage
        self.hooks = hooks
        self.stats = stats
        self.remember = remember
        """How long past its ttl the key of a result is remembered; 0.0: not at all."""
        self.serializer = serializer
        """What results become bytes by, for those of steps; None: JSON."""

    @property
    def keep(self) -> float | None:
        """How long a running record is kept past its lease: for ever where a dead run has to be settled."""
        return self.ttl if self.takeover else None

    def count(self, name: Counted) -> None:
        """Count an event."""
        with _counting:
            self.stats[name] = self.stats.get(name, 0) + 1

    def tell(
        self, name: EventName, digest: str, token: int | None, age: float | None, error: BaseException | None = None
    ) -> None:
        """Tell the hooks of an event."""
        kind = None if error is None else type(error).__name__
        event = events.Event(name, self.namespace, digest, self.backend.name, token, age, kind)
        events.dispatch(self.hooks, event)


class Run:
    """One call: first its question, then, once granted, its claim."""

    # Most calls leave most of these as they are, so a run is made without them.
    token: int | None = None
    """The fencing token; None until the claim is confirmed."""
    claiming = False
    """A claim was sent and its reply has not come."""
    answer_due = 0.0
    """Monotonic seconds at which a backend that answers at all would have answered the claim."""
    unprotected = False
    """The backend was out, and the function runs all the same."""
    valid_until = 0.0
    """Monotonic seconds until which nobody else can have taken over."""
    lost = False
    beating: Any = None
    """The driver's own mark while it beats for this run."""
    flight: "Flight | None" = None
    waited = False
    raised = False
    """The function itself has raised."""
    steps = 0
    """How many of its steps are under way."""

    def __init__(
        self, plan: Plan, rid: RecordId, fingerprint: bytes, arguments: Callable[[], Mapping[str, Any]]
    ) -> None:
        self.plan = plan
        self.rid = rid
        self.fingerprint = fingerprint
        self.arguments = arguments
        self.attempt = self.new_attempt()
        self.forks = _forks

    def new_attempt(self) -> bytes:
        """An id that no other attempt has."""
        return os.urandom(ATTEMPT_BYTES)

    @property
    def inherited(self) -> bool:
        """This process was forked inside the call, which is its parent's."""
        return self.forks != _forks

    def report(
        self,
        name: EventName,
        *,
        token: int | None = None,
        age: float | None = None,
        error: BaseException | None = None,
    ) -> None:
        """Count the event and tell the hooks."""
        plan = self.plan
        plan.count(name)
        if events.wanted(plan.hooks, name):
            plan.tell(name, self.rid.digest, self.token if token is None else token, age, error)


class Call:
    """The call that is running, as its function sees it through `current_call()`; a probe gets one too."""

    __slots__ = ("_driver", "_journal", "_outer", "_over", "_run")

    def __init__(self, driver: Driver, run: Run) -> None:
        self._driver = driver
        self._run = run
        self._journal: Any = None
        """What the steps of this run have come to; None: there was none yet."""
        self._outer = _current.get()
        self._over = False
        inner = self  # finished calls are left out: a task that starts the next one for ever makes no endless chain
        while (outer := inner._outer) is not None:
            if outer._over:
                inner._outer = outer._outer
            else:
                inner = outer

    @property
    def key(self) -> str:
        """The key, without its namespace."""
        return self._run.rid.key

    @property
    def token(self) -> int:
        """The fencing token: it only grows for a key. 0 for a run without a claim, and for a probe."""
        return self._run.token or 0

    @property
    def attempt(self) -> str:
        """Hex id of this attempt."""
        return self._run.attempt.hex()

    @property
    def arguments(self) -> Mapping[str, Any]:
        """The call's arguments by parameter name, defaults applied."""
        return self._run.arguments()

    @property
    def lease_lost(self) -> bool:
        """Whether another call may run by now: the lease ran out unrenewed, or the backend says so."""
        run = self._run
        if not run.lost and run.token is not None and self._driver.now() >= run.valid_until:
            run.lost = True
        return run.lost or run.inherited

    def check(self) -> None:
        """Raise LeaseLost if `lease_lost`: call it before an effect that must not happen twice."""
        if self.lease_lost and not self._run.plan.observes:
            raise LeaseLost(self._run.rid.digest, token=self.token)

    def downstream_key(self, name: str) -> str:
        """An idempotency key for another service: the same for every attempt at this key, another for every `name`.

        32 hexadecimal characters; it tells nothing about the key.
        """
        return RecordId(self._run.rid.text, name, "d").digest[:32]

    def step(self, name: str, function: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Do a part of the work that a rerun of this call shall not do again: its result is recorded under the call's key.

        A run after a crash, or after an error, gets the result of each recorded step instead of running it, and goes on
        behind the last one. Steps must be asked for in the same order and with the same arguments each time.

        A step that raises is not recorded and may be tried again. Not covered is a crash between a step's effect and its
        record: give the step a `downstream_key`, too, where that must not happen twice. Steps are kept for the `ttl` of
        the function, from the first one on; `forget` drops them with the call's record.

        In an async function the step is one as well, and is awaited; sync code that it runs in a thread takes sync steps.

        Args:
            name: says which step this is.
            function: does it; its return annotation says how the result is kept, as for a decorated function's.
            *args: its arguments, compared with those of the earlier run. What has no stable form, such as a client, is
                brought by a closure or a partial instead.
            **kwargs: the same, by name.

        Raises, besides what the function raises:
            StepMismatch: an earlier run recorded another step here, or other arguments.
            LeaseLost: another run of this key has taken over.
            UnstableKey: an argument has no stable form.
            ResultUnavailable: the step was done, and its result could not be kept.
            BackendUnavailable: the step could not be claimed, and was not run.
            CallError: there is no claim to record steps under (a probe, or a call that uses `within=`), it is asked for
                inside another step of this call, or the call ended before the step began.
        """
        if self._run.plan.observes:
            return function(*args, **kwargs)
        if not hasattr(self._driver, "step"):
            raise CallError(
                f"the step {name!r} cannot be played in virtual time; test functions with steps on a backend"
            )
        return cast("R", cast("Stepper", self._driver).step(self, name, function, args, kwargs))

    def __repr__(self) -> str:
        return f"<Call {self._run.rid.digest} token={self.token}>"


class Running:
    """While the function runs: `current_call()` is this call."""

    __slots__ = ("_call", "_token")

    def __init__(self, driver: Driver, run: Run) -> None:
        self._call = Call(driver, run)

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Around a part of what the function does, where more of it comes later; `end` ends it."""
        token = _current.set(self._call)
        try:
            yield
        finally:
            _current.reset(token)

    def end(self, *, raised: bool) -> None:
        """The function has ended."""
        self._call._over = True
        self._call._run.raised = raised

    def __enter__(self) -> None:
        self._token = _current.set(self._call)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(raised=error is not None)
        try:
            _current.reset(self._token)
        except ValueError:
            pass  # a coroutine that was thrown away is closed in another context than it ran in


_current: ContextVar[Call | None] = ContextVar("idempotent_call", default=None)


def current_call() -> Call | None:
    """The call whose function is running in this thread or task; None outside a decorated function."""
    call = _current.get()
    while call is not None and call._over:
        call = call._outer
    return call


class Flight:
    """The calls with one key in one process: a leader, and those who wait for what it brings."""

    busy_until = 0.0
    """Monotonic seconds: when the lease that the leader waits for ends."""
    landed = False
    error: BackendUnavailable | None = None
    """Why the leader got no answer."""
    settled: Settled | None = None
    stored = True

    def __init__(self, run: Run, trusted_until: float) -> None:
        self.run = run
        self.fingerprint = run.fingerprint
        self._trusted_until = trusted_until
        self.waiters: set[ThreadWaiter | TaskWaiter] = set()

    @property
    def trusted_until(self) -> float:
        """Monotonic seconds after which followers ask the backend themselves: the leader's loop may be gone."""
        run = self.run
        # Until its lease ends the leader tries to record what it has; then it lands.
        return self._trusted_until if run.token is None else run.valid_until + run.plan.lease

    def trust(self, until: float) -> None:
        """The leader is alive, and asks or waits until then."""
        self._trusted_until = until


class Flights:
    """The flights of one backend in this process, whatever the colour of the calls."""

    __slots__ = ("__weakref__", "_by_key", "_lock", "nears")

    def __init__(self) -> None:
        self.nears: weakref.WeakValueDictionary[int, Near] = weakref.WeakValueDictionary()
        """The near-caches of the backend's functions, by id: a WeakSet cannot be gone through while a thread adds one."""
        self.reset()
        _all_flights.add(self)

    def board(self, run: Run, now: float) -> Flight | None:
        """The flight to follow, or None: `run` leads now.

        A call with other arguments, or one that will not wait, goes to the backend on its own. A flight whose leader
        has not been heard of in time (its event loop may be gone) is given up, and led anew.
        """
        key = run.rid.text
        with self._lock:
            flight = self._by_key.get(key)
            if flight is not None and now < flight.trusted_until:
                other = flight.fingerprint and run.fingerprint and flight.fingerprint != run.fingerprint
                return None if other or run.plan.wait == 0 else flight
            run.flight = self._by_key[key] = Flight(run, now + run.plan.trust)
        return None

    def join(self, flight: Flight, waiter: ThreadWaiter | TaskWaiter) -> bool:
        """Have `waiter` woken when `flight` lands; False: it has landed."""
        with self._lock:
            if not flight.landed:
                flight.waiters.add(waiter)
            return not flight.landed

    def leave(self, flight: Flight, waiter: ThreadWaiter | TaskWaiter) -> None:
        """Take `waiter` off the list."""
        with self._lock:
            flight.waiters.discard(waiter)

    def land(
        self,
        run: Run,
        settled: Settled | None = None,
        *,
        stored: bool = True,
        error: BackendUnavailable | None = None,
    ) -> None:
        """End the flight that `run` leads, with what it brought or nothing. May be called twice."""
        if run.flight is not None:
            self._end(run.flight, settled, stored, error)
            run.flight = None

    def ground(self, rid: RecordId) -> None:
        """End the flight of a record that was forgotten: its followers ask anew."""
        flight = self._by_key.get(rid.text)
        if flight is not None:
            self._end(flight, None, True, None)

    def _end(self, flight: Flight, settled: Settled | None, stored: bool, error: BackendUnavailable | None) -> None:
        with self._lock:
            key = flight.run.rid.text
            if self._by_key.get(key) is flight:
                del self._by_key[key]
            if flight.landed:
                return
            flight.settled, flight.stored, flight.error = settled, stored, error
            flight.landed = True
            waiters = tuple(flight.waiters)
        for waiter in waiters:
            waiter.wake()

    def reset(self) -> None:
        """Forget every flight: after a fork their leaders are threads of the parent process."""
        self._lock = threading.RLock()  # the collector may end a lost task's call while this thread holds it
        self._by_key: dict[str, Flight] = {}


_counting = threading.RLock()  # a hook, a signal's or the collector's, may count while this thread does
_forks = 0


def forks() -> int:
    """How often this process's line has been forked: a run belongs to the process that began it."""
    return _forks


_all_flights: weakref.WeakSet[Flights] = weakref.WeakSet()
_of_backend_lock = threading.Lock()
_of_backend: weakref.WeakKeyDictionary[Backend, Flights] = weakref.WeakKeyDictionary()


def flights_of(backend: Backend) -> Flights:
    """The flights of calls on `backend`."""
    with _of_backend_lock:
        flights = _of_backend.get(backend)
        if flights is None:
            flights = _of_backend[backend] = Flights()
        return flights


def _after_fork() -> None:
    global _counting, _forks, _of_backend_lock
    _forks += 1
    _counting, _of_backend_lock = threading.RLock(), threading.Lock()
    for flights in list(_all_flights):
        flights.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
