"""The public surface: every promised name is there, documented, and cheap to import; what decorated functions can do."""

import functools
import inspect
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from probes import Counter

import idempotent as package
from idempotent import (
    Applied,
    Backend,
    BackendUnavailable,
    CallError,
    FingerprintMismatch,
    InProgress,
    InvalidKey,
    KeyRequired,
    LocalBackend,
    NotApplied,
    OutcomeUnknown,
    SerializationError,
    StillUnknown,
    open_backend,
)
from idempotent._drive import drive
from idempotent._record import RecordId

PROMISED = [
    *("idempotent", "configure", "open_backend", "new_key", "current_call"),
    *("LocalBackend", "RedisBackend", "SQLBackend", "Backend"),
    *("Applied", "NotApplied", "StillUnknown", "Call", "Outcome", "Explanation", "Record"),
    *("key_for", "with_key", "outcome", "explain", "peek", "forget", "resolve", "stats"),
    *("PickleSerializer", "Compressed", "Encrypted", "Serializer"),
    *("Lock", "AsyncLock", "Hold", "AsyncHold", "LockInfo", "serialized"),
    *("Event", "Hook", "log_event", "OpenTelemetryHook", "PrometheusHook"),
    *("IdempotencyError", "CallError", "KeyRequired", "UnstableKey", "InvalidKey", "FingerprintMismatch"),
    *("InProgress", "OutcomeError", "OutcomeUnknown", "ResultUnavailable", "LeaseLost", "SerializationError"),
    *("BackendError", "BackendUnavailable", "LockError", "LockTimeout", "LockLost", "NotHeld"),
    *("ProcessLocalWarning", "UnprotectedWarning", "ResultTypeWarning"),
]


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_name_is_importable_and_documented(name: str) -> None:
    value = getattr(package, name)
    assert name in dir(package)
    assert inspect.getdoc(value)


KIT = [
    *("explore", "Exploration", "Violation", "Caller"),
    *("Storm", "Aftermath", "Ending", "duplicates", "BackendMachine"),
    *("assert_idempotent", "assert_idempotent_async", "Proof", "NotIdempotent"),
    *("assert_naturally_idempotent", "assert_naturally_idempotent_async"),
    *("BackendContract", "FaultyBackend", "Hang", "VirtualClock"),
]


@pytest.mark.parametrize("name", KIT)
def test_a_promised_name_of_the_testing_kit_is_importable_and_documented(name: str) -> None:
    import idempotent.testing as kit

    value = getattr(kit, name)
    assert name in dir(kit)
    assert name in kit.__all__
    assert inspect.getdoc(value)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_all_names_what_a_star_import_gives_without_extras() -> None:
    assert set(package.__all__) >= set(PROMISED) - {"SQLBackend"}
    assert "SQLBackend" not in package.__all__


WITHOUT = {
    "from idempotent import OpenTelemetryHook; OpenTelemetryHook()": ("opentelemetry", "'idempotent-py[otel]'"),
    "from idempotent import PrometheusHook; PrometheusHook()": ("prometheus_client", "'idempotent-py[prometheus]'"),
    "from idempotent import SQLBackend": ("sqlalchemy", "'idempotent-py[sql]'"),
    "from idempotent.http import Options": ("http_sf", "'idempotent-py[http]'"),
    "from idempotent.http.client import IdempotencyTransport": ("httpx", "httpx"),
    "from idempotent.http.client import IdempotencyAdapter": ("requests", "requests"),
    "from idempotent.testing import duplicates": ("hypothesis", "'idempotent-py[testing]'"),
    "from idempotent.testing import BackendContract": ("pytest", "'idempotent-py[testing]'"),
}


def test_a_library_that_is_not_installed_is_told_with_what_brings_it() -> None:
    hidden = [library for library, _ in WITHOUT.values()]
    code = f"import sys\nsys.modules.update(dict.fromkeys({hidden!r}))\n"
    for statement in WITHOUT:
        code += f"try: exec({statement!r})\nexcept ImportError as error: print(error)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    for told, (_, brought_by) in zip(done.stdout.splitlines(), WITHOUT.values(), strict=True):
        assert f"pip install {brought_by}" in told


def test_every_method_of_a_decorated_function_is_there_in_both_colours() -> None:
    @package.idempotent
    def sync() -> int:
        return 1

    @package.idempotent
    async def coroutine() -> int:
        return 1

    for function in (sync, coroutine):
        for name in ("key_for", "with_key", "outcome", "explain", "peek", "forget", "resolve", "stats", "__wrapped__"):
            assert callable(getattr(function, name))


USED_BY_SOME = "cachetools pickle idempotent._near idempotent._observe idempotent._steps"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import idempotent", "redis sqlalchemy msgspec pydantic hypothesis asyncio orjson cachetools"),
        (
            "from idempotent import idempotent, configure",
            f"redis sqlalchemy pydantic hypothesis asyncio {USED_BY_SOME}",
        ),
        ("from idempotent import *", "sqlalchemy pydantic hypothesis"),
    ],
)
def test_importing_pulls_in_nothing_heavy(statement: str, absent: str) -> None:
    code = f"import sys\n{statement}\nprint([name for name in {absent.split()!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_importing_the_decorator_takes_less_than_twice_what_asyncio_does() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def measure(statement: str) -> float:
        """Seconds of a Python that runs the statement and ends, from bytecode."""
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
        return time.perf_counter() - begun

    measure("from idempotent import idempotent")  # compiled
    ratios = [measure("from idempotent import idempotent") / measure("import asyncio") for _ in range(7)]
    assert min(ratios) < 2, ratios  # the best of some: others use the machine, too


# ----------------------------------------------------------------------------------------- methods of what is decorated


class Declined(Exception):
    pass


Death = Literal["lapsed", "unknown"]


def die(backend: Backend, key: str, how: Death = "unknown", fingerprint: bytes = b"") -> int:
    """Leave the record of a dead runner under `key` in the namespace "n"; its token."""
    rid, blocking, attempt = RecordId("n", key), backend.blocking(), b"deadbeef"
    lease = 0.02 if how == "lapsed" else 30.0
    options: Any = {"attempt": attempt, "fingerprint": fingerprint, "lease": lease, "keep": None, "takeover": False}
    drive(blocking.read(rid))  # connected, and its table made
    while True:
        try:
            granted: Any = drive(blocking.claim(rid, **options))
            break
        except BackendUnavailable:  # no answer within so short a lease
            pass
    if how == "unknown":
        drive(blocking.release(rid, attempt=attempt, token=granted.token, unknown=True))
    while how == "lapsed" and drive(blocking.read(rid)).lease_left > 0:  # type: ignore[union-attr, operator]
        time.sleep(0.002)
    return granted.token


class Task:
    """A framework's wrapper, which hides the attributes of what it wraps."""

    def __init__(self, function: Any) -> None:
        self.run = function


@pytest.mark.parametrize("wrap", [lambda f: f, Task, functools.partial], ids=["itself", "task", "partial"])
def test_the_module_level_functions_are_the_methods(
    colour: Colour, effects: Counter, wrap: Callable[[Any], Any]
) -> None:
    backend = LocalBackend()

    def pay(order: str, amount: int = 1) -> str:
        effects.hit()
        return f"{order} {amount}"

    pay = colour.define(pay, backend=backend, namespace="n", key="pay:{order}", on_crash="raise")
    task = wrap(pay)

    def ask(name: str, *args: Any, **kwargs: Any) -> Any:
        return colour.call(functools.partial(getattr(package, name), task), *args, **kwargs)

    assert package.key_for(task, "a", amount=5) == "pay:a"
    assert ask("explain", "a", amount=5).decision == "would_run"
    outcome = ask("outcome", "a", amount=5)
    assert (outcome.value, outcome.replayed, outcome.key) == ("a 5", False, "pay:a")
    assert ask("outcome", "a", amount=5).replayed
    assert ask("peek", "a", amount=5).token == outcome.token
    with_key = package.with_key(task, "given")
    assert colour.call(with_key, "b") == colour.call(with_key, "b") == "b 1"
    assert colour.call(with_key.peek).key == "given"
    assert ask("forget", "a", amount=5) is True
    assert ask("forget", "a", amount=5) is False
    die(backend, "dead")
    assert ask("resolve", "dead", result="by hand") is True
    assert colour.call(package.with_key(task, "dead"), "c") == "by hand"
    counted = package.stats(task)
    assert counted == pay.stats()
    assert (counted["claimed"], counted["completed"], counted["replayed"]) == (2, 3, 3)
    assert effects.count == 2


@pytest.mark.parametrize("name", ["key_for", "with_key", "outcome", "explain", "peek", "forget", "resolve", "stats"])
def test_what_holds_no_decorated_function_is_told_so(name: str) -> None:
    arguments = {"stats": (), "with_key": ("k",), "resolve": ("k",)}.get(name, (1,))
    with pytest.raises(TypeError, match="holds no function decorated with @idempotent"):
        getattr(package, name)(Task(len), *arguments)


def test_the_counts_of_an_async_function_may_be_awaited() -> None:
    async def main() -> None:
        @package.idempotent(backend=LocalBackend())
        async def work() -> int:
            return 1

        await work()
        await work()
        assert await work.stats() == work.stats() == {"claimed": 1, "completed": 1, "replayed": 1}
        work.stats().clear()
        assert work.stats()["claimed"] == 1, "what is given is a copy"

    COLOURS[1].call(main)


def test_a_given_key_keeps_the_fingerprint_of_its_arguments(backend_url: str, colour: Colour, effects: Counter) -> None:
    def pay(order: str, amount: int) -> int:
        return effects.hit()

    pay = colour.define(pay, backend=backend_url)
    given = pay.with_key("k")
    assert colour.call(given, "o", 5) == colour.call(given, "o", amount=5) == 1
    with pytest.raises(FingerprintMismatch):
        colour.call(given, "o", 6)
    assert given.key_for("o", 6) == "k"
    assert colour.call(pay.with_key("other"), "o", 6) == 2
    assert colour.call(given.peek).state == "completed"
    assert colour.call(given.with_key("other").peek).token != colour.call(given.peek).token
    assert colour.call(given.forget)
    assert colour.call(given, "o", 6) == 3


@pytest.mark.parametrize("key, error", [("", KeyRequired), (None, KeyRequired), ("a\n", InvalidKey), (5, InvalidKey)])
def test_a_given_key_that_is_none_is_refused_at_once(colour: Colour, key: Any, error: type[CallError]) -> None:
    work = colour.define(lambda: 1, backend=LocalBackend())
    with pytest.raises(error):
        work.with_key(key)
    with pytest.raises(error):
        colour.call(work.resolve, key, not_applied=True)


# ------------------------------------------------------------------------------------------------------------- explain


def test_an_explanation_says_what_the_call_then_does_and_changes_nothing(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    backend = open_backend(backend_url)

    def work(fails: bool = False) -> int:
        if fails:
            raise Declined("no")
        return effects.hit()

    def made(key: str, **options: Any) -> Any:
        return colour.define(
            work, backend=backend, namespace="n", key=key, error_ttl={Declined: 60}, fingerprint=False, **options
        )

    def expect(function: Any, decision: str, reason: str, answer: Any) -> None:
        before, ran = colour.call(function.peek), effects.count
        told = colour.call(function.explain)
        assert (told.key, told.decision) == (function.key_for(), decision)
        assert reason in told.reason
        assert str(told) == f"key {told.key!r}: {decision.replace('_', ' ')}, as {told.reason}"
        assert effects.count == ran
        after = colour.call(function.peek)
        if before is None:
            assert after is told.record is None
        else:
            for record in (told.record, after):
                assert (record.state, record.token, record.attempt) == (before.state, before.token, before.attempt)
        if isinstance(answer, type):
            with pytest.raises(answer):
                colour.call(function)
        else:
            outcome = colour.call(function.outcome)
            assert outcome.replayed is answer
        assert effects.count - ran == (answer is False), "replayed is False for a run alone"

    fresh = made("fresh")
    expect(fresh, "would_run", "there is no record", False)
    expect(fresh, "would_replay", "it completed 0.", True)
    failed = made("failed")
    with pytest.raises(Declined):
        colour.call(failed, True)
    expect(failed, "would_replay", "it failed 0.", Declined)

    def probe(call: object) -> StillUnknown:
        return StillUnknown()

    policies: list[tuple[str, Any, str]] = [
        ("raise", "raise", "its outcome is unknown"),
        ("probe", probe, "the probe would be asked"),
        ("rerun", "rerun", "its outcome is unknown"),
    ]
    for name, on_crash, reason in policies:
        for how in ("lapsed", "unknown"):
            key = f"{name} {how}"
            die(backend, key, "lapsed" if how == "lapsed" else "unknown")
            if key == "rerun lapsed":
                expect(made(key, on_crash=on_crash), "would_run", "would take over", False)
            else:
                expect(made(key, on_crash=on_crash), "would_refuse", reason, OutcomeUnknown)
                told = colour.call(made(key, on_crash=on_crash).explain)
                assert ("probe" in told.reason) is (name == "probe")


def test_an_explanation_with_a_probe_says_that_it_would_be_asked_and_does_not_ask_it(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    backend = open_backend(backend_url)
    asked: list[str] = []

    def probe(call: Any) -> Applied | NotApplied:
        asked.append(call.key)
        return Applied(7) if call.key == "applied" else NotApplied()

    for key, answer in (("applied", 7), ("not applied", 1)):
        die(backend, key)
        work = colour.define(effects.hit, backend=backend, namespace="n", key=key, on_crash=probe)
        told = colour.call(work.explain)
        assert (told.decision, asked) == ("would_refuse", [])
        assert "the probe would be asked" in told.reason
        assert colour.call(work) == answer
        assert asked == [key]
        asked.clear()


@pytest.mark.parametrize("state", ["running", "completed", "failed", "lapsed", "unknown"])
def test_other_arguments_are_refused_in_every_state_before_any_wait_probe_or_takeover(
    backend_url: str, colour: Colour, state: str
) -> None:
    backend = open_backend(backend_url)
    runs: list[int] = []
    asked: list[Any] = []

    def work(amount: int) -> int:
        runs.append(amount)
        return amount

    for policy in ("rerun", "raise", asked.append):
        key = f"{state} {policy if isinstance(policy, str) else 'probe'}"
        rid, blocking, own = RecordId("n", key), backend.blocking(), b"f" * 16
        if state in ("lapsed", "unknown"):
            token = die(backend, key, "lapsed" if state == "lapsed" else "unknown", own)
        else:
            claim: Any = {"attempt": b"attemptA", "fingerprint": own, "lease": 30.0, "keep": None, "takeover": False}
            token = drive(blocking.claim(rid, **claim)).token  # type: ignore[union-attr]
        if state in ("completed", "failed"):
            end = blocking.complete if state == "completed" else blocking.fail
            drive(end(rid, attempt=b"attemptA", token=token, codec="json1", body=b"1", ttl=60.0))
        pay = colour.define(work, backend=backend, namespace="n", key=key, on_crash=policy, wait=None)
        told = colour.call(pay.explain, 5)
        assert told.decision == "would_refuse"
        assert "made for other arguments" in told.reason
        with pytest.raises(FingerprintMismatch) as refused:
            colour.call(pay, 5)
        assert refused.value.key_digest == rid.digest
        found = colour.call(pay.peek, 5)
        assert (found.token, found.state) == (token, "running" if state == "lapsed" else state)
    assert runs == asked == []


# ------------------------------------------------------------------------------------------------------------- resolve


@pytest.mark.parametrize("how", ["lapsed", "unknown"])
def test_a_dead_runners_record_is_settled_by_hand(
    backend_url: str, colour: Colour, effects: Counter, how: Death
) -> None:
    backend = open_backend(backend_url)

    def work():
        return effects.hit()

    def made(key: str) -> Any:
        return colour.define(
            work,
            backend=backend,
            namespace="n",
            key=key,
            on_crash="raise",
            error_ttl={Declined: 60},
        )

    token = die(backend, "result", how)
    assert colour.call(made("any").resolve, "result", result=7) is True
    outcome = colour.call(made("result").outcome)
    assert (outcome.value, outcome.replayed) == (7, True)
    assert outcome.token > token
    die(backend, "none", how)
    assert colour.call(made("any").resolve, "none", result=None) is True
    assert colour.call(made("none")) is None
    die(backend, "error", how)
    assert colour.call(made("any").resolve, "error", error=Declined("by hand")) is True
    with pytest.raises(Declined, match="by hand"):
        colour.call(made("error"))
    assert effects.count == 0
    die(backend, "not applied", how)
    assert colour.call(made("any").resolve, "not applied", not_applied=True) is True
    assert colour.call(made("not applied")) == effects.count == 1


@pytest.mark.parametrize(
    "settles",
    [
        {},
        {"not_applied": False},
        {"result": 1, "error": Declined()},
        {"result": None, "not_applied": True},
        {"error": Declined(), "not_applied": True},
        {"result": 1, "error": Declined(), "not_applied": True},
    ],
    ids=lambda given: "+".join(given) or "nothing",
)
def test_resolve_takes_exactly_one_of_the_three(colour: Colour, settles: dict[str, Any]) -> None:
    backend = LocalBackend()
    work = colour.define(lambda: 1, backend=backend, namespace="n", key="k", error_ttl={Declined: 60})
    die(backend, "k")
    with pytest.raises(TypeError, match="exactly one of result=, error= and not_applied=True"):
        colour.call(work.resolve, "k", **settles)
    assert colour.call(work.peek).state == "unknown"


def test_what_resolve_could_not_replay_is_refused_and_the_record_stays_unknown(
    backend_url: str, colour: Colour
) -> None:
    backend = open_backend(backend_url)
    work = colour.define(lambda: 1, backend=backend, namespace="n", key="k", error_ttl={Declined: 60})
    token = die(backend, "k")
    with pytest.raises(SerializationError, match="the given result cannot be recorded"):
        colour.call(work.resolve, "k", result=threading.Lock())
    with pytest.raises(ValueError, match="KeyError is not named in error_ttl"):
        colour.call(work.resolve, "k", error=KeyError("other"))
    with pytest.raises(SerializationError):
        colour.call(work.resolve, "k", error=Declined(threading.Lock()))
    record = colour.call(work.peek)
    assert (record.state, record.token) == ("unknown", token)
    assert colour.call(work.resolve, "k", result=5) is True


def test_resolve_is_refused_on_every_record_whose_outcome_is_not_in_doubt(backend_url: str, colour: Colour) -> None:
    backend = open_backend(backend_url)
    settles: list[dict[str, Any]] = [{"result": 9}, {"error": Declined()}, {"not_applied": True}]

    def work(kind: str) -> int:
        if kind == "failed":
            raise Declined
        return 1

    work = colour.define(work, backend=backend, namespace="n", key="{kind}", error_ttl={Declined: 60})
    assert colour.call(work, "completed") == 1
    with pytest.raises(Declined):
        colour.call(work, "failed")
    options: Any = {"attempt": b"attemptA", "fingerprint": b"", "lease": 30.0, "keep": None, "takeover": True}
    drive(backend.blocking().claim(RecordId("n", "running"), **options))
    for settle in settles:
        for state in ("absent", "completed", "failed"):
            with pytest.raises(CallError, match=f"is {state}; only unknown records are resolved"):
                colour.call(work.resolve, state, **settle)
        with pytest.raises(InProgress, match="only unknown records are resolved") as refused:
            colour.call(work.resolve, "running", **settle)
        assert 5 < refused.value.retry_after <= 30
    states = [colour.call(work.with_key(key).peek) for key in ("absent", "completed", "failed", "running")]
    assert [record and record.state for record in states] == [None, "completed", "failed", "running"]


class Raced(Faulty):
    """A backend on which `meanwhile` happens between a resolve's look and its claim."""

    def __init__(self, inner: Backend, meanwhile: Callable[[], Any]) -> None:
        super().__init__(inner)
        self.meanwhile = meanwhile

    def _view(self, colour: str, inner: Backend) -> Faulty:
        return Raced(inner, self.meanwhile)

    async def _do(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation == "claim":
            self.meanwhile()
        return await super()._do(operation, *args, **kwargs)


@pytest.mark.parametrize("settle", [{"result": 1}, {"error": Declined()}, {"not_applied": True}], ids=list)
def test_of_two_who_resolve_at_once_one_is_told_that_the_other_did(
    backend_url: str, colour: Colour, settle: dict[str, Any]
) -> None:
    backend = open_backend(backend_url)
    options: Any = {"namespace": "n", "key": "k", "error_ttl": {Declined: 60}}
    first = COLOURS[0].define(lambda: 0, backend=backend, **options)
    die(backend, "k")
    won: list[bool] = []
    raced = Raced(backend, lambda: won.append(first.resolve("k", result=7)) if not won else None)
    second = colour.define(lambda: 0, backend=raced, **options)
    assert colour.call(second.resolve, "k", **settle) is False
    assert won == [True]
    outcome = first.outcome()
    assert (outcome.value, outcome.replayed) == (7, True)
