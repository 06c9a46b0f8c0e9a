"""One request with a key, from its claim to its outcome: the flows of a call, with requests for arguments.

Written once, as `async def`, for every middleware: ASGI and async Django await them, WSGI and sync Django drive them.
"""

import inspect
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from idempotent import _config as config
from idempotent import _flow as flow
from idempotent._record import RecordId
from idempotent._run import Driver, Plan, Run, Running, flights_of
from idempotent._types import Stats
from idempotent.errors import LeaseLost, ResultUnavailable
from idempotent.http._rules import NOT_STORED, Options, RawHeaders, Refused, Request, Response, Rules, sendable
from idempotent.http._rules import is_async as awaits

__all__ = ["Exchange", "NotKept", "Service", "Verdict"]


class NotKept(Exception):
    """The application gave no answer that is kept, such as a 503: the key is free again."""


class Verdict(NamedTuple):
    """What became of the application's answer."""

    instead: Response | None = None
    """What the client is to get in its place; None: it is the application's."""
    extra: RawHeaders = []  # noqa: RUF012  never changed in place
    """Headers to add to it."""


def _probing(on_crash: str | Callable[..., Any]) -> str | Callable[..., Any]:
    """A probe that raises TypeError for an answer that no server could send, before that is recorded for a `ttl`."""
    if isinstance(on_crash, str):
        return on_crash

    def checked(verdict: Any) -> Any:
        if isinstance(verdict, flow.Applied) and verdict.result is not None:
            sendable(verdict.result, f"the probe {on_crash!r} found")
        return verdict

    async def awaited(verdict: Any) -> Any:
        return checked(await verdict)

    def probe(call: Any) -> Any:
        verdict = on_crash(call)
        return awaited(verdict) if inspect.isawaitable(verdict) else checked(verdict)

    return probe


class Service:
    """What one middleware serves: its rules, and the plan that they make with the defaults of the moment."""

    def __init__(self, driver: Driver, options: Options, *, is_async: bool) -> None:
        self.rules = Rules.checked(options)
        config.checked({"backend": self.rules.backend, "on_crash": self.rules.on_crash})
        if not is_async and awaits(self.rules.on_crash):
            raise TypeError(f"the probe {self.rules.on_crash!r} is async, and a sync middleware cannot await it")
        self.driver = driver
        self.is_async = is_async
        self.stats = Stats()
        self._made: tuple[config.Settings, Plan, Plan] | None = None
        self._lock = threading.Lock()
        self._waiting = 0

    def plans(self) -> tuple[Plan, Plan]:
        """The plan, and its twin that does not wait; made anew when `configure` has changed the defaults."""
        made, settings = self._made, config.settings
        if made is None or made[0] is not settings:
            rules = self.rules
            shared = config.resolve_backend(rules.backend)
            backend = (shared.asynchronous() if self.is_async else shared.blocking()).within(rules.lease)
            rules.codec.ready()
            on_crash = _probing(rules.on_crash)

            def plan(wait: float | None) -> Plan:
                return Plan(
                    backend=backend,
                    flights=flights_of(shared),
                    codec=rules.codec,
                    namespace=rules.namespace,
                    ttl=rules.ttl,
                    lease=rules.lease,
                    wait=wait,
                    keep_result=True,
                    error_ttl={},
                    on_crash=on_crash,
                    run_on_outage=False,
                    hooks=settings.hooks,
                    stats=self.stats,
                    serializer=rules.serializer,
                )

            made = self._made = (settings, plan(rules.wait), plan(0.0))
        return made[1], made[2]

    def key_of(self, request: Request) -> str | None:
        """The key of a request that is to be served; None: it goes on as it is. Raises Refused."""
        return self.rules.key_of(request) if self.rules.covers(request) else None

    def may_wait(self) -> bool:
        """Whether one more request may wait; if so it does, until `has_waited`."""
        if self.rules.wait == 0:
            return False
        with self._lock:
            if self._waiting >= self.rules.max_waiting:
                return False
            self._waiting += 1
            return True

    def has_waited(self) -> None:
        """One fewer waits."""
        with self._lock:
            self._waiting -= 1


class Exchange:
    """A request with a key. Its claim stands from a `begin` that answers None to `settle` or `abandon`.

    Made with what the configuration gives: raises its errors, which are not for clients.
    """

    __slots__ = ("_plans", "_run", "body", "key", "open", "request", "service")

    def __init__(self, service: Service, request: Request, key: str, body: bytes) -> None:
        self.service = service
        self.request = request
        self.key = key
        self.body = body
        self.open = False
        """The claim stands, and the application runs."""
        self._plans = service.plans()
        self._run: Run | None = None

    async def begin(self) -> Response | None:
        """Claim the key, or answer from what is recorded. None: the application is to run now.

        Raises what the scope and fingerprint callables raise, and the errors of a call that is not served.
        """
        service, rules = self.service, self.service.rules
        try:
            key = rules.record_of(self.request, self.key)
        except Refused as refused:
            return refused.answer
        patient, impatient = self._plans
        waits = service.may_wait()
        try:
            run = self._run = Run(
                patient if waits else impatient,
                RecordId(rules.namespace, key),
                rules.fingerprint_of(self.request, self.body),
                self._arguments,
            )
            replay = await flow.begin(service.driver, run)
        finally:
            if waits:
                service.has_waited()
        if replay is None:
            self.open = True
            return None
        return rules.replayed(replay.value)

    def _arguments(self) -> dict[str, Any]:
        return {"request": self.request, "body": self.body}

    def running(self) -> Running:
        """While the application runs: `current_call()` is this exchange's."""
        assert self._run is not None
        return Running(self.service.driver, self._run)

    async def settle(self, response: Response, *, whole: bool = True) -> Verdict:
        """Record the application's answer, or free the key if such an answer is not kept.

        Not `whole`: its body is not at hand, and duplicates are only told that it was done.
        """
        assert self._run is not None
        rules, driver = self.service.rules, self.service.driver
        ttl = rules.kept_for(response.status)
        if ttl is None:
            await flow.abandon(driver, self._run, NotKept(f"status {response.status}"))
            self.open = False
            return Verdict()
        stored = True
        try:
            replay = await flow.settle(driver, self._run, rules.kept(response) if whole else None, ttl)
            stored = replay.stored
        except ResultUnavailable:
            stored = False
        except LeaseLost as lost:
            self.open = False
            return Verdict(rules.problem_of(lost))
        self.open = False
        return Verdict() if stored else Verdict(extra=[NOT_STORED])

    async def abandon(self, error: BaseException) -> None:
        """The application, or the claim, raised: free the key, or let `on_crash` decide if it was interrupted."""
        if self._run is not None:
            await flow.abandon(self.service.driver, self._run, error)
        self.open = False

    def drop(self) -> None:
        """The coroutine is thrown away and can await nothing: the lease is left to run out."""
        self.open = False
        if self._run is not None:
            drop = getattr(self.service.driver, "drop", None)
            if drop is not None:
                drop(self._run)
            self._run.plan.flights.land(self._run)

    def refusal(self, error: BaseException) -> Response | None:
        """What the client is told of an error that `begin` raised; None: it is not for clients."""
        return self.service.rules.problem_of(error)
