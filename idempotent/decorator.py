"""`@idempotent`: options checked at decoration, a plan made at the first call, and one wrapper for each colour."""

import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast, overload

from idempotent import _config as config
from idempotent import _flow as flow
from idempotent._config import DEFAULT, Default, Duration
from idempotent._drive import SYNC, drive, finish
from idempotent._flow import Replay, at_hand
from idempotent._record import Record, RecordId
from idempotent._run import Flights, Plan, Run, Running, flights_of
from idempotent._types import (
    AsyncIdempotent,
    Decision,
    Decorator,
    Explanation,
    ForgetfulDecorator,
    Idempotent,
    Outcome,
    Stats,
)
from idempotent.backends.base import Backend
from idempotent.errors import CallError, IdempotencyError
from idempotent.keys import Binder, check_key, new_key
from idempotent.serializers import Codec, Serializer, codec_for

if TYPE_CHECKING:
    from idempotent._observe import Watch

__all__ = ["explain", "forget", "idempotent", "key_for", "outcome", "peek", "resolve", "stats", "with_key"]

P = ParamSpec("P")
R = TypeVar("R")

_UNSET: Any = object()


@overload
def idempotent(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
    function: Callable[P, Coroutine[Any, Any, R]], /
) -> AsyncIdempotent[P, R]: ...
@overload
def idempotent(function: Callable[P, R], /) -> Idempotent[P, R]: ...
@overload
def idempotent(  # type: ignore[overload-overlap]  # pyright: ignore[reportOverlappingOverload]
    *,
    keep_result: Literal[False],
    backend: Backend | str | None = None,
    key: str | Callable[..., str | None] | None = None,
    namespace: str | None = None,
    ttl: Duration | Default = DEFAULT,
    remember: Duration | None | Default = DEFAULT,
    lease: Duration | Default = DEFAULT,
    wait: Duration | None | Default = DEFAULT,
    fingerprint: bool | Callable[..., str | bytes] = True,
    ignore: Iterable[str] = (),
    serializer: Serializer | None = None,
    error_ttl: Mapping[type[Exception], Duration] | None = None,
    on_crash: Literal["rerun", "raise"] | Callable[..., Any] | Default = DEFAULT,
    on_outage: Literal["raise", "run"] | Default = DEFAULT,
    near_cache: int | Default = DEFAULT,
    within: str | None = None,
) -> ForgetfulDecorator: ...
@overload
def idempotent(
    *,
    backend: Backend | str | None = None,
    key: str | Callable[..., str | None] | None = None,
    namespace: str | None = None,
    ttl: Duration | Default = DEFAULT,
    remember: Duration | None | Default = DEFAULT,
    lease: Duration | Default = DEFAULT,
    wait: Duration | None | Default = DEFAULT,
    fingerprint: bool | Callable[..., str | bytes] = True,
    ignore: Iterable[str] = (),
    serializer: Serializer | None = None,
    keep_result: bool = True,
    error_ttl: Mapping[type[Exception], Duration] | None = None,
    on_crash: Literal["rerun", "raise"] | Callable[..., Any] | Default = DEFAULT,
    on_outage: Literal["raise", "run"] | Default = DEFAULT,
    near_cache: int | Default = DEFAULT,
    within: str | None = None,
) -> Decorator: ...
def idempotent(
    function: Callable[..., Any] | None = None,
    /,
    *,
    backend: Backend | str | None = None,
    key: str | Callable[..., str | None] | None = None,
    namespace: str | None = None,
    ttl: Duration | Default = DEFAULT,
    remember: Duration | None | Default = DEFAULT,
    lease: Duration | Default = DEFAULT,
    wait: Duration | None | Default = DEFAULT,
    fingerprint: bool | Callable[..., str | bytes] = True,
    ignore: Iterable[str] = (),
    serializer: Serializer | None = None,
    keep_result: bool = True,
    error_ttl: Mapping[type[Exception], Duration] | None = None,
    on_crash: Literal["rerun", "raise"] | Callable[..., Any] | Default = DEFAULT,
    on_outage: Literal["raise", "run"] | Default = DEFAULT,
    near_cache: int | Default = DEFAULT,
    within: str | None = None,
) -> Any:
    """Make a sync or async function safe to call twice: its effect happens once, and every caller gets its answer.

    Use it bare, `@idempotent`, or with options. The decorated function is a plain function of the same kind, with the
    methods of `Idempotent`. It goes *under* a framework's own decorator (`@app.post`, `@app.task`), which registers
    what it is given, and a retrying decorator goes above it.

    Args:
        function: the function, where the decorator is used bare.
        backend: where records live: a Backend or its URL. None: what `configure` or `IDEMPOTENT_URL` say, else this
            process's memory, with a warning.
        key: what names the operation. A template of parameters with their attributes and items,
            `"payment:{user_id}:{order.id}"`; or a callable that takes the call's arguments and returns text. None: all
            the arguments, in a canonical form.
        namespace: what the key is unique within. None: the function's `module.qualname`; give one before renaming it,
            and to each of several functions that one factory makes, as they share that name.
        ttl: seconds or timedelta for which an outcome is replayed, counted from the outcome. Default one day.
        remember: seconds or timedelta for which the key of a result is remembered, counted from the end of its ttl. A
            call that comes then raises ResultUnavailable, and does not run. Recorded errors are not remembered: past
            their time the call runs again. None: past the ttl nothing is kept, and a late call runs. Default None.
        lease: seconds or timedelta for which a claim stands without being renewed; it is renewed every third of it
            while the function runs, and a dead runner's key is free again after it. Default 30.
        wait: seconds or timedelta a duplicate waits for the running call; 0: it raises InProgress at once; None: no
            limit. Default 30.
        fingerprint: whether a key that comes with other arguments is refused. False: it is not; a callable takes the
            call's arguments and returns the str or bytes to compare instead of them.
        ignore: names of parameters that are part of neither key nor fingerprint: sessions, loggers, trace ids.
        serializer: how the result becomes bytes: an object with `dumps(value) -> bytes` and `loads(bytes) -> value`.
            None: JSON, its types rebuilt by the return annotation.
        keep_result: False: remember only that it was done; the run returns its own value, replays return None.
        error_ttl: exception classes to record and replay, subclasses included, each with its seconds or timedelta.
            None: every exception releases the key, and the next call runs.
        on_crash: what happens when a runner dies between its claim and its outcome. "rerun": the next call takes over
            when the lease is over; "raise": calls raise OutcomeUnknown until somebody settles it with `resolve`; a
            callable is a probe: it takes a Call and returns Applied(result), NotApplied() or StillUnknown().
        on_outage: what happens when the claim cannot be confirmed. "raise": BackendUnavailable, and nothing ran;
            "run": the function runs unprotected, with a warning and an event.
        near_cache: how many settled records of this function each process keeps copies of, and answers from without asking
            the backend. None is kept past its record's own ttl, nor across the `forget` of a function on the same backend
            object. On Redis any other forget is heard within milliseconds, and within 20 seconds if the connection has
            died in silence; elsewhere, and while the subscription is not heard, a copy counts for one second from when
            the backend was asked. The first replay
            of a key in a process costs one more command, which asks how long its record is kept. Default 0: none. The
            local backend needs none.
        within: the name of the parameter that holds a SQLAlchemy Session, AsyncSession, Connection or AsyncConnection.
            The record is then written in its transaction, and committed or rolled back with it; the parameter is part of
            neither key nor fingerprint, and `backend`, `lease`, `on_crash` and `on_outage` have no meaning. None: records
            live in the backend.

    Raises, at decoration:
        TypeError, ValueError: an option is wrong; the message names it.
        SerializationError: the return annotation cannot be served.

    Raises, when called: what the function raises, and
        KeyRequired, UnstableKey, InvalidKey: the call gives no usable key.
        FingerprintMismatch: the key was used with other arguments.
        InProgress: `wait` ran out.
        OutcomeUnknown, ResultUnavailable, LeaseLost: the function ran, and its outcome cannot be given.
        BackendUnavailable: nothing ran.
    """
    given = {
        name: value
        for name, value in (
            ("backend", backend),
            ("ttl", ttl),
            ("remember", remember),
            ("lease", lease),
            ("wait", wait),
            ("error_ttl", error_ttl),
            ("on_crash", on_crash),
            ("on_outage", on_outage),
            ("near_cache", near_cache),
            ("serializer", serializer),
        )
        if value is not DEFAULT and (value is not None or name in ("wait", "remember", "near_cache"))
    }
    options = config.checked(given)
    if within is not None:
        _check_within(within, options)
    for name, flag in (("keep_result", keep_result),) + ((("fingerprint", fingerprint),) * (not callable(fingerprint))):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, not {flag!r}")
    if key is not None and not isinstance(key, str) and not callable(key):
        raise TypeError(f"key must be a template, a callable or None, not {key!r}")
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a tuple of parameter names, such as ({ignore!r},)")

    def decorate(function: Any) -> Any:
        if isinstance(function, (classmethod, staticmethod)):
            return type(function)(decorate(function.__func__))
        return _build(
            _Spec(
                function,
                options,
                key=key,
                namespace=namespace,
                fingerprint=fingerprint,
                ignore=tuple(ignore),
                keep_result=keep_result,
                within=within,
            ),
            None,
        )

    return decorate if function is None else decorate(function)


class _Spec:
    """One decorated function: what was asked for, and the plan it makes with the defaults of the moment."""

    def __init__(
        self,
        function: Any,
        options: dict[str, Any],
        *,
        key: str | Callable[..., str | None] | None,
        namespace: str | None,
        fingerprint: bool | Callable[..., str | bytes],
        ignore: tuple[str, ...],
        keep_result: bool,
        within: str | None,
    ) -> None:
        _check_function(function)
        self.function = function
        self.is_async = _is_async(function)
        self.options = options
        self.keep_result = keep_result
        self.namespace = _namespace(function, namespace)
        self.within = within
        self.flows: Any = flow
        if within is not None:
            from idempotent import _within

            self.flows = _within
            names = inspect.signature(function).parameters
            if within not in names:
                raise ValueError(f"within names {within!r}, which is no parameter; there are {', '.join(names)}")
            ignore = (*ignore, within)
        self.binder = Binder(function, key=key, fingerprint=fingerprint, ignore=ignore)
        self.stats = Stats()
        probe = options.get("on_crash")
        if not self.is_async and _is_async(probe):
            raise TypeError(f"the probe {probe!r} is async, and a sync function cannot await it")
        self._made: tuple[config.Settings, Plan] | None = None
        self._serializer = _UNSET
        self._codec: Codec | None = None
        self._make_codec(config.settings)

    def _make_codec(self, settings: config.Settings) -> None:
        serializer = self.options.get("serializer") or settings.serializer
        if self.keep_result and serializer is not self._serializer:
            self._codec = codec_for(self.function, serializer)
            self._serializer = serializer

    def plan(self) -> Plan:
        """The plan, made anew when `configure` has changed the defaults."""
        made, settings = self._made, config.settings
        if made is None or made[0] is not settings:
            options = self.options
            lease = options.get("lease", settings.lease)
            if self.within is None:
                shared = config.resolve_backend(options.get("backend"))
                longest = lease
                if settings.mode == "observe":
                    from idempotent._observe import BUDGET

                    longest = min(lease, BUDGET)
                backend = (shared.asynchronous() if self.is_async else shared.blocking()).within(longest)
                flights = flights_of(shared)
            else:
                backend, flights = self.flows.NOWHERE, self.flows.NO_FLIGHTS
            self._make_codec(settings)
            if self._codec is not None:
                self._codec.ready()
            plan = Plan(
                backend=backend,
                flights=flights,
                codec=cast("Codec", self._codec),
                namespace=self.namespace,
                ttl=options.get("ttl", settings.ttl),
                lease=lease,
                wait=options.get("wait", settings.wait),
                keep_result=self.keep_result,
                error_ttl=options.get("error_ttl", settings.error_ttl) or {},
                on_crash=options.get("on_crash", settings.on_crash),
                run_on_outage=options.get("on_outage", settings.on_outage) == "run",
                hooks=settings.hooks,
                stats=self.stats,
                serializer=options.get("serializer") or settings.serializer,
                remember=options.get("remember", settings.remember) or 0.0,
                observes=settings.mode == "observe",
            )
            if self.within is None:
                plan.find = backend.finder()
                size = options.get("near_cache", settings.near_cache)
                if plan.find is None and size:
                    from idempotent._near import Near

                    plan.near = Near(size, backend)
                    plan.find = plan.near.find
                    flights.nears[id(plan.near)] = plan.near
            made = self._made = (settings, plan)
        return made[1]

    def blind_plan(self) -> Plan:
        """A plan for observed calls that nothing is asked of."""
        settings = config.settings
        return Plan(
            backend=cast("Backend", None),
            flights=Flights(),
            codec=cast("Codec", None),
            namespace=self.namespace,
            ttl=settings.ttl,
            lease=settings.lease,
            wait=0.0,
            keep_result=False,
            error_ttl={},
            on_crash="rerun",
            run_on_outage=True,
            hooks=settings.hooks,
            stats=self.stats,
            observes=True,
        )

    def run(self, plan: Plan, args: tuple[Any, ...], kwargs: dict[str, Any], key: str, fingerprint: bytes) -> Run:
        """The question that this call asks."""
        bind = self.binder.bind
        if self.within is not None:
            plan = self.flows.plan_on(plan, bind(args, kwargs)[self.within], is_async=self.is_async)
        return Run(plan, RecordId(self.namespace, key), fingerprint, lambda: bind(args, kwargs))

    def question(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: str | None) -> Run:
        """As `run`, for those who only look: after `with_key` the arguments may be left out, but for the session."""
        if key is not None and self.within is None and not args and not kwargs:
            return Run(self.plan(), RecordId(self.namespace, key), b"", dict)
        if key is not None and self.within is not None:
            given = inspect.signature(self.function).bind_partial(*args, **kwargs).arguments
            if given.keys() == {self.within}:
                plan = self.flows.plan_on(self.plan(), given[self.within], is_async=self.is_async)
                return Run(plan, RecordId(self.namespace, key), b"", dict)
        named, fingerprint = self.binder.identify(args, kwargs, key)
        return self.run(self.plan(), args, kwargs, named, fingerprint)


def _check_within(within: Any, options: dict[str, Any]) -> None:
    if not isinstance(within, str):
        raise TypeError(f"within must be the name of a parameter, not {within!r}")
    for name in ("backend", "lease", "on_crash", "on_outage", "near_cache"):
        if name in options:
            raise TypeError(
                f"{name}= has no meaning with within=: the record is in the caller's transaction, and lives or dies with it"
            )


def _check_function(function: Any) -> None:
    name = getattr(function, "__qualname__", repr(function))
    if not callable(function):
        raise TypeError(
            f"@idempotent decorates functions, not {function!r}; options go by keyword: @idempotent(key=...)"
        )
    if isinstance(function, type):
        raise TypeError(f"@idempotent decorates functions, and {name} is a class; decorate its methods")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{name} is a generator function: it has no one result that could be replayed")


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  an object whose __call__ is async is async
    )


def _namespace(function: Any, given: str | None) -> str:
    if given is None:
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__qualname__", None)
        if name is None:
            raise ValueError(f"{function!r} has no name to make a namespace of; give namespace=")
        return f"{function.__module__}.{name}"
    if not isinstance(given, str):
        raise TypeError(f"namespace must be text, not {given!r}")
    if not given:
        raise ValueError("namespace must not be empty")
    check_key(given)
    return given


Pick = Callable[[str, Replay], Any]
"""What a call returns, from its key and its answer; None: the value alone."""


def _outcome(key: str, replay: Replay) -> Outcome[Any]:
    return Outcome(
        value=replay.value,
        replayed=replay.replayed,
        stored=replay.stored,
        key=key,
        token=replay.token,
        age=replay.age,
    )


def _sync_call(spec: _Spec, key: str | None, pick: Pick | None) -> Callable[..., Any]:
    function, flow, identify = spec.function, spec.flows, spec.binder.identifier(key)
    observed = _sync_observed(spec, identify, pick)

    def call(*args: Any, **kwargs: Any) -> Any:
        if config.settings.mode != "enforce":
            return observed(*args, **kwargs)
        named, fingerprint = identify(args, kwargs)
        plan = spec.plan()
        if plan.find is not None:
            text = plan.prefix + named
            found = plan.find(text, fingerprint)
            if found is not None:
                replay = at_hand(plan, text, found)
                if replay.error is not None:
                    raise replay.error
                return replay.value if pick is None else pick(named, replay)
        run = spec.run(plan, args, kwargs, named, fingerprint)
        value: Any = _UNSET
        try:
            replay = drive(flow.begin(SYNC, run))
            if replay is None:
                with Running(SYNC, run):
                    value = function(*args, **kwargs)
                if inspect.iscoroutine(value) and inspect.getcoroutinestate(value) == inspect.CORO_CREATED:
                    unrun, value = value, _UNSET
                    _refuse(unrun)
                replay = drive(flow.settle(SYNC, run, value))
        except BaseException as error:
            if value is _UNSET:
                finish(functools.partial(flow.abandon, SYNC, run, error))
            elif not isinstance(error, IdempotencyError):
                # A signal handler raised this after the function had returned: the outcome is recorded all the same.
                finish(functools.partial(flow.settle, SYNC, run, value))
            raise
        if replay.error is not None:
            raise replay.error
        return replay.value if pick is None else pick(named, replay)

    return call


def _refuse(unrun: Any) -> None:
    unrun.close()
    raise TypeError(
        f"{unrun.__qualname__} is an async function behind a wrapper that is none: it has not run, and nothing was recorded."
        " Put @idempotent directly on the async function"
    )


def _async_call(spec: _Spec, key: str | None, pick: Pick | None, driver: Any = None) -> Callable[..., Any]:
    from idempotent import _aio

    function, flow, identify = spec.function, spec.flows, spec.binder.identifier(key)
    driver = driver or _aio.ASYNC  # tests bring one whose time is their own
    observed = _async_observed(spec, identify, pick, driver)

    async def call(*args: Any, **kwargs: Any) -> Any:
        if config.settings.mode != "enforce":
            return await observed(*args, **kwargs)
        named, fingerprint = identify(args, kwargs)
        plan = spec.plan()
        if plan.find is not None:
            text = plan.prefix + named
            found = plan.find(text, fingerprint)
            if found is not None:
                replay = at_hand(plan, text, found)
                if replay.error is not None:
                    raise replay.error
                return replay.value if pick is None else pick(named, replay)
        run = spec.run(plan, args, kwargs, named, fingerprint)
        value: Any = None
        try:
            replay = await flow.begin(driver, run)
            if replay is None:
                with Running(driver, run):
                    value = await function(*args, **kwargs)
        except GeneratorExit:  # the coroutine is thrown away and can await nothing: the lease is left to run out
            driver.drop(run)
            run.plan.flights.land(run)
            raise
        except BaseException as error:
            await _aio.finish(functools.partial(flow.abandon, driver, run, error))
            raise
        if replay is None:
            replay = await _aio.finish(functools.partial(flow.settle, driver, run, value))
        if replay.error is not None:
            raise replay.error
        return replay.value if pick is None else pick(named, replay)

    return call


Identify = Callable[[tuple[Any, ...], dict[str, Any]], tuple[str, bytes]]


def _watch(spec: _Spec, identify: Identify, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Watch":
    """What is to be observed of a call."""
    from idempotent import _observe as observe

    key = None
    try:
        key, fingerprint = identify(args, kwargs)
        if spec.within is None:
            return observe.Watch(spec.run(spec.plan(), args, kwargs, key, fingerprint))
    except Exception as error:  # a key function's, too: enforcement would let it through
        if spec.within is None:
            observe.unusable(spec.blind_plan(), error)
    # Nothing is: there is no key, or a claim would hold up other transactions, in savepoints that are not the
    # application's own. The function has a `current_call()` all the same.
    rid = RecordId(spec.namespace, key or new_key())
    watch = observe.Watch(Run(spec.blind_plan(), rid, b"", lambda: spec.binder.bind(args, kwargs)))
    watch.over = True
    return watch


def _observed(watch: "Watch", pick: Pick | None, value: Any) -> Any:
    if pick is None:
        return value
    run = watch.run
    return pick(run.rid.key, Replay(value, replayed=False, stored=watch.stored, token=run.token or 0, age=0.0))


def _sync_observed(spec: _Spec, identify: Identify, pick: Pick | None) -> Callable[..., Any]:
    function = spec.function

    def call(*args: Any, **kwargs: Any) -> Any:
        from idempotent import _observe as observe

        watch = _watch(spec, identify, args, kwargs)
        value: Any = None
        try:
            drive(observe.begin(SYNC, watch))
            with Running(SYNC, watch.run):
                value = function(*args, **kwargs)
            unrun = inspect.iscoroutine(value)  # an async function behind a wrapper that is none
        except BaseException as error:
            finish(functools.partial(observe.end, SYNC, watch, error=error))
            raise
        finish(functools.partial(observe.end, SYNC, watch, value, TypeError() if unrun else None))
        return _observed(watch, pick, value)

    return call


def _async_observed(spec: _Spec, identify: Identify, pick: Pick | None, driver: Any) -> Callable[..., Any]:
    from idempotent import _aio

    function = spec.function

    async def call(*args: Any, **kwargs: Any) -> Any:
        from idempotent import _observe as observe

        watch = _watch(spec, identify, args, kwargs)
        try:
            await observe.begin(driver, watch)
            with Running(driver, watch.run):
                value = await function(*args, **kwargs)
        except GeneratorExit:  # the coroutine is thrown away and can await nothing: the lease is left to run out
            driver.drop(watch.run)
            raise
        except BaseException as error:
            await _aio.finish(functools.partial(observe.end, driver, watch, error=error))
            raise
        await _aio.finish(functools.partial(observe.end, driver, watch, value))
        return _observed(watch, pick, value)

    return call


def _build(spec: _Spec, key: str | None) -> Any:
    """The decorated function, with its methods; `key` is the one that `with_key` gave."""
    make = _async_call if spec.is_async else _sync_call
    # A function like any other: frameworks inspect its signature, its kind and its name.
    wrapper: Any = functools.wraps(spec.function)(make(spec, key, None))
    wrapper.__wrapped__ = spec.function
    wrapper.__idempotent__ = wrapper
    wrapper.__idempotent_spec__ = spec, key
    wrapper.outcome = make(spec, key, _outcome)
    wrapper.stats = lambda: Stats(spec.stats)

    def key_for(*args: Any, **kwargs: Any) -> str:
        return spec.binder.identify(args, kwargs, None)[0] if key is None else key

    def with_key(key: str) -> Any:
        return _build(spec, check_key(key))

    async def peek(*args: Any, **kwargs: Any) -> Record | None:
        return await flow.peek(spec.question(args, kwargs, key))

    async def explain(*args: Any, **kwargs: Any) -> Explanation:
        run = spec.question(args, kwargs, key)
        record = await flow.peek(run)
        return _explain(run, record, within=spec.within is not None)

    async def forget(*args: Any, force: bool = False, **kwargs: Any) -> bool:
        return await flow.forget(spec.question(args, kwargs, key), force=force)

    async def resolve(
        key: str, *, result: Any = _UNSET, error: Exception | None = None, not_applied: bool = False
    ) -> bool:
        if (result is not _UNSET) + (error is not None) + bool(not_applied) != 1:
            raise TypeError("resolve takes exactly one of result=, error= and not_applied=True")
        if spec.within is not None:
            raise CallError("there is nothing to resolve: a record within a transaction is never left in doubt")
        run = Run(spec.plan(), RecordId(spec.namespace, check_key(key)), b"", dict)
        return await flow.resolve(run, value=result, error=error, applied=not not_applied)

    wrapper.key_for = key_for
    wrapper.with_key = with_key
    for method in (peek, explain, forget, resolve):
        setattr(wrapper, method.__name__, method if spec.is_async else _driven(method))
    return wrapper


def _driven(method: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Any]:
    @functools.wraps(method)
    def driven(*args: Any, **kwargs: Any) -> Any:
        return drive(method(*args, **kwargs))

    return driven


def _explain(run: Run, record: Record | None, *, within: bool) -> Explanation:
    plan = run.plan
    backend: Any = plan.backend
    decision: Decision
    if record is None:
        decision, reason = "would_run", "there is no record"
    elif run.fingerprint and record.fingerprint and run.fingerprint.hex() != record.fingerprint:
        decision, reason = "would_refuse", f"the {record.state} record was made for other arguments"
    elif record.state == "expired":
        decision = "would_refuse"
        reason = f"its result expired {record.age:.1f} s ago, and only the key is remembered since"
    elif record.state in ("completed", "failed"):
        decision, reason = "would_replay", f"it {record.state} {record.age:.1f} s ago"
        if not flow.replayable(plan, record.codec, failed=record.state == "failed"):
            decision, reason = "would_refuse", f"{reason}, and its outcome cannot be given"
    elif within and record.state == "running" and (backend.lives or (record.lease_left or 0.0) > 0):
        decision, reason = "would_refuse", "it runs in this same transaction, or has committed it midway"
    elif record.state == "running" and (record.lease_left or 0.0) > 0:
        decision = "would_refuse" if plan.wait == 0 else "would_wait"
        reason = f"a call has been running for {record.age:.1f} s, its lease has {record.lease_left:.1f} s left"
    elif record.state == "running" and plan.takeover:
        decision, reason = "would_run", "the runner's lease is over, and this call would take over"
    else:
        decision = "would_refuse"
        reason = "a runner died and its outcome is unknown" + ("; the probe would be asked" if plan.probe else "")
    return Explanation(run.rid.key, record, decision, reason)


def _find(function: Any) -> Any:
    """The decorated function inside `function`: a framework's task, a partial, another decorator's wrapper."""
    seen = function
    for _ in range(32):
        found = getattr(seen, "__idempotent__", None)
        if found is not None and callable(found):
            return found
        for name in ("__wrapped__", "__func__", "run", "func"):
            inner = getattr(seen, name, None)
            if inner is not None and inner is not seen and callable(inner):
                seen = inner
                break
        else:
            break
    raise TypeError(f"{function!r} holds no function decorated with @idempotent")


def key_for(function: Any, /, *args: Any, **kwargs: Any) -> str:
    """`function.key_for(...)`, for wrappers that hide attributes (a Celery task). TypeError where there is none."""
    return cast("str", _find(function).key_for(*args, **kwargs))


def with_key(function: Any, key: str, /) -> Any:
    """`function.with_key(key)`, for wrappers that hide attributes."""
    return _find(function).with_key(key)


def outcome(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`function.outcome(...)`, for wrappers that hide attributes; a coroutine for an async function."""
    return _find(function).outcome(*args, **kwargs)


def explain(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`function.explain(...)`, for wrappers that hide attributes; a coroutine for an async function."""
    return _find(function).explain(*args, **kwargs)


def peek(function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`function.peek(...)`, for wrappers that hide attributes; a coroutine for an async function."""
    return _find(function).peek(*args, **kwargs)


def forget(function: Any, /, *args: Any, force: bool = False, **kwargs: Any) -> Any:
    """`function.forget(...)`, for wrappers that hide attributes; a coroutine for an async function."""
    return _find(function).forget(*args, force=force, **kwargs)


def resolve(function: Any, key: str, /, **settle: Any) -> Any:
    """`function.resolve(key, ...)`, for wrappers that hide attributes; a coroutine for an async function."""
    return _find(function).resolve(key, **settle)


def stats(function: Any, /) -> Stats:
    """`function.stats()`, for wrappers that hide attributes."""
    return cast("Stats", _find(function).stats())
