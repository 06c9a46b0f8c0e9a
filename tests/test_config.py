"""Defaults, the environment, options and the backends that URLs name."""

import asyncio
import contextlib
import functools
import math
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from colours import COLOURS, Colour
from faulty import Faulty
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import make_url

from idempotent import (
    BackendError,
    BackendUnavailable,
    Event,
    InProgress,
    LocalBackend,
    Lock,
    OutcomeUnknown,
    PickleSerializer,
    ProcessLocalWarning,
    RedisBackend,
    SQLBackend,
    UnprotectedWarning,
    _config,
    configure,
    idempotent,
    open_backend,
)
from idempotent._config import Settings
from idempotent._options import seconds, split_url, timeout_of

ROOT = Path(__file__).parent.parent
SECRET = b"a secret of 16+ bytes"


@pytest.fixture(autouse=True)
def _no_url_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDEMPOTENT_URL", raising=False)


def held(backend: Any) -> int:
    """How many settled records a LocalBackend holds."""
    return len(backend._store.settled)


def work(key: str = "k") -> str:
    return f"done {key}"


def decorated(**options: Any) -> Any:
    options.setdefault("namespace", "n")
    return idempotent(**options)(work)


# ------------------------------------------------------------------------------------------------ whose word counts


@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_the_decorators_backend_wins_over_the_configured_one_and_that_over_the_environments(
    colour: Colour, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mine, configured = LocalBackend(), LocalBackend()
    url = f"sqlite:///{tmp_path}/environment.db"
    environment = open_backend(url)
    monkeypatch.setenv("IDEMPOTENT_URL", url)

    def backends_of(**options: Any) -> list[str]:
        function = colour.define(work, namespace="n", **options)
        colour.call(function)
        found = [name for name, backend in (("mine", mine), ("configured", configured)) if held(backend)]
        if colour.call(idempotent(backend=environment, namespace="n")(function.__wrapped__).peek):
            found.append("environment")
        return found

    assert backends_of() == ["environment"]
    configure(backend=configured)
    assert backends_of() == ["configured", "environment"]
    assert held(configured) == 1
    backends_of(backend=mine)
    assert (held(mine), held(configured)) == (1, 1)
    configure(backend=None)
    assert colour.call(colour.define(work, namespace="n").outcome).replayed, "the environment's word counts again"


def test_without_any_backend_the_records_live_here_and_one_warning_says_so() -> None:
    function, other = decorated(), decorated(namespace="m")
    with pytest.warns(ProcessLocalWarning, match=r"IDEMPOTENT_URL.*configure\(backend=") as seen:
        function()
        function()
        other()
    assert len(seen) == 1
    assert held(open_backend("local://")) == 2


@pytest.mark.parametrize("said", ["decorator", "configure", "environment"])
def test_a_local_backend_that_is_meant_brings_no_warning(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if said == "configure":
        configure(backend="local://")
    elif said == "environment":
        monkeypatch.setenv("IDEMPOTENT_URL", "local://")
    assert decorated(**({"backend": "local://"} if said == "decorator" else {}))() == "done k"


def test_an_empty_url_in_the_environment_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDEMPOTENT_URL", "")
    with pytest.warns(ProcessLocalWarning):
        decorated()()


def test_a_bad_url_in_the_environment_stops_the_first_call_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IDEMPOTENT_URL", "mongodb://ann:hunter2@host/db")
    runs: list[int] = []
    function = idempotent(lambda: runs.append(1))
    for _ in range(2):
        with pytest.raises(ValueError, match="no backend serves the URL scheme 'mongodb'") as caught:
            function()
        assert "hunter2" not in str(caught.value)
    assert not runs


def test_the_environment_is_read_at_the_first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    function = decorated()
    monkeypatch.setenv("IDEMPOTENT_URL", f"sqlite:///{tmp_path}/late.db")
    function()
    assert (tmp_path / "late.db").exists()


@contextlib.contextmanager
def running(**options: Any) -> Any:
    """A decorated function whose first call is under way."""
    entered, leave = threading.Event(), threading.Event()

    def slow() -> str:
        entered.set()
        assert leave.wait(30)
        return "slow"

    function = idempotent(namespace="slow", **options)(slow)
    thread = threading.Thread(target=function)
    thread.start()
    assert entered.wait(30)
    try:
        yield function
    finally:
        leave.set()
        thread.join()


def lasting(length: float, of: Callable[[Any], float | None], **options: Any) -> None:
    """Assert that a record's duration is about `length` seconds."""
    found = of(options)
    assert found is not None
    assert length - 5 < found <= length


def kept_for(options: dict[str, Any]) -> float | None:
    function = decorated(**options)
    function()
    expires: float | None = function.peek().expires_in
    return expires


def leased_for(options: dict[str, Any]) -> float | None:
    with running(**options) as function:
        left: float | None = function.peek().lease_left
    return left


@pytest.mark.parametrize("option, of, default", [("ttl", kept_for, 86_400), ("lease", leased_for, 30)])
@pytest.mark.parametrize(
    "form", [float, int, lambda value: timedelta(seconds=value)], ids=["float", "int", "timedelta"]
)
def test_a_duration_of_the_decorator_wins_over_the_configured_one_and_that_over_the_default(
    option: str, of: Any, default: float, form: Any
) -> None:
    lasting(default, of, backend=LocalBackend())
    configure(**{option: form(500)})
    lasting(500, of, backend=LocalBackend())
    lasting(200, of, backend=LocalBackend(), **{option: form(200)})


@pytest.mark.parametrize("form", [float, lambda value: timedelta(seconds=value)], ids=["seconds", "timedelta"])
def test_the_wait_of_the_decorator_wins_over_the_configured_one(form: Any) -> None:
    backend = LocalBackend()
    configure(wait=form(0))
    with running(backend=backend) as function:
        with pytest.raises(InProgress):
            function()
        assert function.explain().decision == "would_refuse"
        assert (
            idempotent(namespace="slow", backend=backend, wait=form(5))(lambda: "").explain().decision == "would_wait"
        )
        assert idempotent(namespace="slow", backend=backend, wait=None)(lambda: "").explain().decision == "would_wait"
        configure(wait=None)
        assert function.explain().decision == "would_wait"
        with pytest.raises(InProgress):
            idempotent(namespace="slow", backend=backend, wait=form(0.01))(lambda: "")()


@pytest.mark.parametrize("length", [50, 50.0, timedelta(seconds=50)], ids=str)
def test_errors_to_record_are_configured_or_named_by_the_decorator(length: Any) -> None:
    def function(key: str) -> None:
        runs.append(key)
        raise KeyError(key)

    runs: list[str] = []
    configured = idempotent(backend=LocalBackend())(function)
    configure(error_ttl={LookupError: length})
    own = idempotent(backend=LocalBackend(), error_ttl={ValueError: length})(function)
    for _ in range(2):
        for safe in (configured, own):
            with pytest.raises(KeyError):
                safe("a" if safe is configured else "b")
    assert sorted(runs) == ["a", "b", "b"]
    assert 45 < configured.peek("a").expires_in <= 50
    configure(error_ttl=None)
    with pytest.raises(KeyError):
        configured("c")
    assert configured.peek("c") is None


def test_what_to_do_after_a_crash_is_configured_or_named_by_the_decorator() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    configure(on_crash="raise", backend=LocalBackend())
    configured, own = idempotent(interrupt), idempotent(on_crash="rerun", namespace="own")(interrupt)
    for function in (configured, own):
        with pytest.raises(KeyboardInterrupt):
            function()
    with pytest.raises(OutcomeUnknown):
        configured()
    with pytest.raises(KeyboardInterrupt):
        own()


def test_what_to_do_in_an_outage_is_configured_or_named_by_the_decorator() -> None:
    out = Faulty(LocalBackend())
    out.plant("claim", "before", times=2)
    configure(on_outage="run", backend=out)
    with pytest.warns(UnprotectedWarning):
        assert decorated()() == "done k"
    with pytest.raises(BackendUnavailable):
        decorated(on_outage="raise")()


def codec_of(function: Any) -> str:
    function.forget()
    function()
    codec: str = function.peek().codec
    return codec


def test_the_serializer_is_configured_or_named_by_the_decorator() -> None:
    backend = LocalBackend()
    function = decorated(backend=backend)
    assert codec_of(function) == "json1"
    configure(serializer=PickleSerializer(SECRET))
    assert codec_of(function) == "pickle1"
    assert codec_of(decorated(backend=backend)) == "pickle1"
    configure(serializer=None)
    assert codec_of(function) == "json1"

    configure(serializer=None)
    assert codec_of(function) == "json1"


def test_settings_are_shared_by_a_partial() -> None:
    backend = LocalBackend()
    ours = functools.partial(idempotent, backend=backend, ttl=500, namespace="ours")
    function = ours()(work)
    function()
    assert held(backend) == 1
    assert 495 < function.peek().expires_in <= 500
    other = ours(ttl=100, namespace="other")(work)
    other()
    assert 95 < other.peek().expires_in <= 100


# ----------------------------------------------------------------------------------------------- when it is followed


@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_defaults_are_read_at_the_first_call_and_followed_when_they_change(colour: Colour) -> None:
    first, second = LocalBackend(), LocalBackend()
    function = colour.define(work, namespace="n")
    configure(backend=first, ttl=500)
    colour.call(function)
    assert (held(first), held(second)) == (1, 0)
    assert 495 < colour.call(function.peek).expires_in <= 500
    configure(backend=second)
    assert colour.call(function.peek) is None
    colour.call(function)
    assert (held(first), held(second)) == (1, 1)
    assert 495 < colour.call(function.peek).expires_in <= 500, "what is not named stays as it is"


def test_a_change_made_while_the_first_call_reads_the_defaults_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = LocalBackend()
    configure(backend=backend, ttl=500)
    function = decorated()
    resolve = _config.resolve_backend

    def meanwhile(given: Any) -> Any:
        monkeypatch.undo()
        configure(ttl=100)  # by another thread
        return resolve(given)

    monkeypatch.setattr(_config, "resolve_backend", meanwhile)
    function("first")
    function("second")
    assert function.peek("second").expires_in <= 100


def test_with_key_follows_changes_too() -> None:
    first, second = LocalBackend(), LocalBackend()
    configure(backend=first)
    function = decorated().with_key("given")
    function()
    configure(backend=second)
    function()
    assert (held(first), held(second)) == (1, 1)


def test_hooks_get_every_event_and_are_followed_when_they_change() -> None:
    first: list[Event] = []
    second: list[Event] = []
    configure(backend=LocalBackend(), hooks=[first.append])
    function = decorated()
    function()
    configure(hooks=(first.append, second.append))
    function()
    configure(hooks=[])
    function()
    assert [event.name for event in first] == ["claimed", "completed", "replayed"]
    assert [event.name for event in second] == ["replayed"]
    assert {event.namespace for event in first} == {"n"}


def test_a_list_of_hooks_is_copied() -> None:
    seen: list[Event] = []
    hooks: list[Any] = [seen.append]
    configure(backend=LocalBackend(), hooks=hooks)
    hooks.clear()
    decorated()()
    assert seen


# --------------------------------------------------------------------------------------------------- wrong options

WRONG: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("ttl", "lease")
        for value in (0, -1, math.nan, math.inf, 1e10, timedelta(0), "5", True)
    ),
    *(("wait", value) for value in (-1, -0.001, math.nan, math.inf, timedelta(-1), "5", False)),
    ("ttl", None),
    ("lease", None),
    ("error_ttl", [ValueError]),
    ("error_ttl", {ValueError: 0}),
    ("error_ttl", {ValueError: None}),
    ("error_ttl", {"ValueError": 5}),
    ("error_ttl", {KeyboardInterrupt: 5}),
    ("on_crash", "ignore"),
    ("on_crash", None),
    ("on_outage", "ignore"),
    ("on_outage", None),
    ("serializer", "json"),
    ("serializer", object()),
    ("backend", 5),
    ("backend", "mongodb://host"),
    ("backend", "nonsense"),
    ("hooks", None),
    ("hooks", 5),
    ("hooks", print),
    ("hooks", [print, 5]),
    ("hooks", "print"),
]


@pytest.mark.parametrize("name, value", WRONG, ids=lambda value: repr(value).partition(" at 0x")[0])
def test_a_wrong_default_is_named_and_nothing_is_changed(name: str, value: Any) -> None:
    configure(ttl=7)
    before = _config.settings
    with pytest.raises((TypeError, ValueError), match="URL" if value in ("mongodb://host", "nonsense") else name):
        configure(**{"lease": 9, name: value})
    assert _config.settings is before


OURS = [
    row
    for row in WRONG
    if row[0] != "hooks" and row not in (("on_crash", None), ("on_outage", None), ("ttl", None), ("lease", None))
]


@pytest.mark.parametrize("name, value", OURS, ids=lambda value: repr(value).partition(" at 0x")[0])
def test_a_wrong_option_is_named_at_decoration(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="URL" if value in ("mongodb://host", "nonsense") else name):
        idempotent(**{name: value})


def test_an_unknown_default_is_refused() -> None:
    with pytest.raises(TypeError, match="keys"):
        configure(keys="x")  # type: ignore[call-arg]


def test_nothing_named_changes_nothing() -> None:
    configure(ttl=7)
    before = _config.settings
    configure()
    assert _config.settings == before
    _config.reset()
    assert _config.settings == Settings()


@given(st.floats(min_value=1e-6, max_value=9e9) | st.integers(1, 10**9))
def test_a_duration_is_the_same_in_seconds_and_as_timedelta(value: float) -> None:
    assert seconds("ttl", value) == value
    assert type(seconds("ttl", value)) is float
    length = timedelta(seconds=value)
    if length:
        assert seconds("ttl", length) == length.total_seconds()


def test_a_duration_may_be_nothing_where_that_is_said() -> None:
    assert seconds("wait", 0, zero=True) == seconds("wait", timedelta(0), zero=True) == 0
    with pytest.raises(ValueError, match="wait must be more than 0 seconds"):
        seconds("wait", 0)


# -------------------------------------------------------------------------------------------------------------- URLs


def test_one_url_is_one_backend(backend_url: str) -> None:
    found: list[Any] = []
    barrier = threading.Barrier(16)

    def ask() -> None:
        barrier.wait()
        found.append(open_backend(backend_url))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(backend) for backend in found}) == 1
    assert len(found) == 16
    function = decorated(backend=backend_url)
    function()
    assert idempotent(backend=found[0], namespace="n")(work).peek() is not None


def test_different_urls_are_different_backends(tmp_path: Path) -> None:
    one, other = (open_backend(f"sqlite:///{tmp_path}/{name}.db") for name in "ab")
    assert one is not other
    assert open_backend("local://") is not open_backend("local://?maxsize=5")


@pytest.mark.parametrize(
    "url, kind, name",
    [
        ("local://", LocalBackend, "local"),
        ("LOCAL://", LocalBackend, "local"),
        ("redis://127.0.0.1:1/0", RedisBackend, "redis"),
        ("rediss://127.0.0.1:1/0", RedisBackend, "redis"),
        ("unix:///nowhere/sock", RedisBackend, "redis"),
        ("sqlite:////nowhere/x.db", SQLBackend, "sqlite"),
        ("sqlite+aiosqlite:////nowhere/x.db", SQLBackend, "sqlite"),
        ("postgresql://127.0.0.1:1/db", SQLBackend, "postgresql"),
        ("postgresql+asyncpg://127.0.0.1:1/db", SQLBackend, "postgresql"),
        ("postgres://127.0.0.1:1/db", SQLBackend, "postgresql"),
        ("mysql://127.0.0.1:1/db", SQLBackend, "mysql"),
        ("mysql+aiomysql://127.0.0.1:1/db", SQLBackend, "mysql"),
        ("mariadb://127.0.0.1:1/db", SQLBackend, "mariadb"),
    ],
)
def test_a_url_names_its_backend_and_nothing_is_connected(url: str, kind: type, name: str) -> None:
    backend: Any = open_backend(url)
    assert (type(backend), backend.name, backend.timeout) == (kind, name, 5.0)


def test_options_in_a_url_are_taken(tmp_path: Path) -> None:
    redis: Any = open_backend("redis://127.0.0.1:1/3?prefix=shop%3Aeu&timeout=2.5&protocol=3")
    assert (redis.prefix, redis.timeout) == ("shop:eu", 2.5)
    arguments = redis._links["sync"]._pool.connection_kwargs
    assert (arguments["db"], arguments["protocol"]) == (3, 3)
    sql: Any = open_backend(f"sqlite:///{tmp_path}/x.db?table=calls&timeout=2")
    assert (sql.table.name, sql.timeout) == ("calls", 2.0)
    assert decorated(backend=sql)() == "done k"
    assert (tmp_path / "x.db").exists()
    local: Any = open_backend("local://?maxsize=2")
    function = decorated(backend=local)
    for key in "abc":
        function(key)
    assert held(local) == 2


WRONG_URLS = [
    ("", "no backend serves"),
    ("redis", "no backend serves"),
    ("redis:/host", "no backend serves"),
    ("://host", "no backend serves"),
    ("http://host", "'http'.*there are local://, redis://"),
    ("local://?maxsize=0", "maxsize"),
    ("local://?maxsize=-1", "maxsize"),
    ("local://?maxsize=1.5", "maxsize"),
    ("local://?maxsize=", "maxsize"),
    ("local://?prefix=x", "maxsize=.*prefix"),
    ("redis://h/0?timeout=soon", "timeout= in the URL must be seconds, not 'soon'"),
    ("redis://h/0?timeout=", "timeout"),
    ("redis://h/0?timeout=0", "timeout must be more than 0"),
    ("redis://h/0?timeout=-1", "timeout"),
    ("redis://h/0?timeout=nan", "timeout"),
    ("redis://h/0?timeout=inf", "timeout"),
    ("redis://h/0?prefix=", "prefix"),
    (f"redis://h/0?prefix={'x' * 201}", "prefix"),
    ("redis://h/0?table=x", "table"),
    ("sqlite:///x.db?timeout=soon", "timeout"),
    ("sqlite:///x.db?table=", "ASCII letters"),
    ("sqlite:///x.db?table=a-b", "ASCII letters"),
    (f"sqlite:///x.db?table={'x' * 49}", "ASCII letters"),
    ("sqlite:///x.db?table=a%22%3B--", "ASCII letters"),
    ("sqlite://", "needs a file"),
    ("sqlite:///:memory:", "needs a file"),
    ("redis+ssh://h/0", "'redis.ssh'"),
    ("unix+cluster://h/0", "'unix.cluster'"),
    ("redis+cluster://h,h2:6379/1", "one database"),
    ("redis+cluster://h,/0", "host or port"),
    ("redis+cluster://h:0,h2", "host or port"),
    ("redis+cluster://h:port", "host or port"),
    ("redis+cluster://h?sentinel_password=x", "redis.sentinel"),
    ("redis+cluster://h?replicas=-1", "replicas"),
    ("redis+sentinel://h1,h2:26379", "SERVICE"),
    ("redis+sentinel://h1,h2:26379/", "SERVICE"),
    ("redis+sentinel:///main", "host or port"),
    ("redis+sentinel://h/main/0?nonsense=1", "not known"),
    ("redis://h/0?replicas=some", "replicas"),
    ("redis://h:port/0", "a port is 1 to 65535"),
    ("postgresql://h:port/db", "a port is 1 to 65535"),
    ("mysql://h:65536/db", "a port is 1 to 65535"),
    ("redis://h:0/0", "a port is 1 to 65535"),
]


@pytest.mark.parametrize("url, said", WRONG_URLS)
def test_a_wrong_url_is_refused_when_it_is_opened(url: str, said: str) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match=said):
            open_backend(url)


@pytest.mark.parametrize("url, said", WRONG_URLS)
def test_a_wrong_url_is_refused_where_it_is_named(url: str, said: str) -> None:
    for name in (lambda: decorated(backend=url), lambda: configure(backend=url), lambda: Lock("n", backend=url)):
        with pytest.raises(ValueError, match=said):
            name()


@pytest.mark.parametrize("url", [None, 5, b"local://", Path("x")], ids=repr)
def test_what_is_no_url_is_refused(url: Any) -> None:
    with pytest.raises(TypeError, match="open_backend takes a URL"):
        open_backend(url)


@pytest.mark.parametrize("scheme", ["sqlite:///{file}", "postgresql://127.0.0.1:1/db", "mysql://127.0.0.1:1/db"])
@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_an_option_that_no_driver_knows_is_an_error_of_ours(scheme: str, colour: Colour, tmp_path: Path) -> None:
    with pytest.raises((ValueError, BackendError)):
        colour.call(colour.define(work, backend=f"{scheme.format(file=tmp_path / 'x.db')}?nonsense=1"))


@pytest.mark.parametrize(
    "url",
    [
        "redis://ann:hunter2@host:abc/0",
        "redis://ann:hunter2@host:99999/0",
        "redis://ann:hunter2@127.0.0.1:1/0",
        "redis://ann:hunter2@127.0.0.1:1/0?timeout=soon",
        "redis://ann:hunter2@127.0.0.1:1/0?prefix=",
        "redis://ann:hunter2@127.0.0.1:1/0?nonsense=1",
        "redis://127.0.0.1:1/0?password=hunter2&nonsense=1",
        "redis://127.0.0.1:1/0?password=hunter2",
        "redis://ann:hunter2/x@host/0",
        "redis://ann:x#hunter2@host/0",
        "redis://ann:x?hunter2@host/0",
        "postgresql://ann:x/hunter2@host/db",
        "postgresql://ann:x@hunter2@127.0.0.1:1/db",
        "redis:/ann:hunter2@host/0",
        "redis:ann:hunter2@host/0",
        "ann:hunter2@host",
        "hunter2@host",
        "redis//ann:hunter2@host",
        "mongodb://ann:hunter2@host/db",
        "postgresql://ann:hunter2@host:abc/db",
        "postgresql://ann:hunter2@[host/db",
        "postgresql:/ann:hunter2@host/db",
        "postgresql://ann:hunter2@127.0.0.1:1/db",
        "postgresql://ann:hunter2@127.0.0.1:1/db?nonsense=1",
        "postgresql://ann:hunter2@127.0.0.1:1/db?table=a-b",
        "postgresql+nonsense://ann:hunter2@127.0.0.1:1/db",
        "mysql://ann:hunter2@127.0.0.1:1/db",
        "mysql://ann:hunter2@127.0.0.1:1/db?nonsense=1",
        "mysql://ann:hunter2@host:abc/db",
        "local://ann:hunter2@host?nonsense=1",
        "local://?password=hunter2",
    ],
)
@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_no_error_shows_a_password(url: str, colour: Colour) -> None:
    with pytest.raises(Exception) as caught:
        colour.call(colour.define(work, backend=url))
    error: BaseException | None = caught.value
    while error is not None:
        assert "hunter2" not in str(error)
        assert "hunter2" not in "".join(getattr(error, "__notes__", []))
        error = error.__cause__
    assert isinstance(caught.value, (ValueError, BackendError))


@pytest.mark.parametrize("url", ["redis://ann:hunter2@127.0.0.1:1/0", "postgresql://ann:hunter2@127.0.0.1:1/db"])
def test_no_repr_shows_a_password(url: str) -> None:
    configure(backend=url)
    backend: Any = open_backend(url)
    function = decorated(backend=backend)
    for shown in (
        _config.settings,
        backend,
        backend.blocking(),
        backend.asynchronous(),
        function,
        function.with_key("k"),
    ):
        assert "hunter2" not in repr(shown)


@pytest.mark.parametrize("password", ["p%40ss", "p%2Fs", "p%23s", "p%3As", "p:s", "%5Bs%5D"])
def test_an_escaped_password_arrives_as_it_is_meant(password: str) -> None:
    meant = unquote(password)
    redis: Any = open_backend(f"redis://ann:{password}@127.0.0.1:1/0?timeout=2")
    assert redis._links["sync"]._pool.connection_kwargs["password"] == meant
    sql: Any = open_backend(f"postgresql://ann:{password}@127.0.0.1:1/db?table=t")
    assert sql._links["sync"].engine.url.password == meant


@pytest.mark.parametrize("kind", ["redis", "postgres", "mariadb"])
@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_a_wrong_password_is_unavailable_and_not_shown(
    kind: str, colour: Colour, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue(f"{kind}_server")
    scheme, _, rest = server.url.partition("://")
    where = rest.rpartition("@")[2]
    url = f"{scheme}://nobody_of_this_name:hunter2@{where}"
    runs: list[int] = []
    with pytest.raises(BackendUnavailable) as caught:
        colour.call(colour.define(lambda: runs.append(1), backend=url, namespace="n"))
    assert "hunter2" not in str(caught.value)
    assert not runs


URLS = st.sampled_from(
    [
        "redis://127.0.0.1:6379/0",
        "redis://ann:p%40ss%2F@127.0.0.1/0",
        "unix:///run/redis.sock",
        "sqlite:///relative.db",
        "sqlite:////abs/olute.db",
        "postgresql+psycopg://ann:p%40ss@h:5432/db",
        "mysql://ann:p%23ss@h/db",
    ]
)
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=8)


@given(
    URLS,
    st.dictionaries(st.sampled_from(["sslmode", "db", "charset", "x"]), WORDS, max_size=3),
    st.dictionaries(st.sampled_from(["prefix", "table", "timeout"]), WORDS, max_size=3),
    st.randoms(use_true_random=False),
)
def test_our_options_are_split_from_a_url_and_the_rest_stays(
    url: str, theirs: dict[str, str], ours: dict[str, str], random: Any
) -> None:
    pairs = [*theirs.items(), *ours.items()]
    random.shuffle(pairs)

    def joined(pairs: Any) -> str:
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs)
        return f"{url}?{query}" if query else url

    bare, found = split_url(joined(pairs), ("prefix", "table", "timeout"))
    assert found == ours
    rest = [(name, value) for name, value in pairs if name in theirs]
    if not url.startswith("unix"):
        assert make_url(bare) == make_url(joined(rest))
    assert bare.partition("?")[0] == url


def test_the_argument_wins_over_the_urls_option() -> None:
    assert timeout_of(None, {}) == 5.0
    assert timeout_of(None, {"timeout": "2"}) == 2.0
    assert timeout_of(timedelta(seconds=3), {"timeout": "2"}) == 3.0
    backend = RedisBackend("redis://127.0.0.1:1/0?prefix=url&timeout=2", prefix="given", timeout=3)
    assert (backend.prefix, backend.timeout) == ("given", 3.0)


# ------------------------------------------------------------------------------------------------------ end and exit


def test_a_backend_is_closed_by_with_and_may_be_closed_twice(backend_url: str) -> None:
    with open_backend(backend_url) as backend:
        assert backend is open_backend(backend_url)
        assert decorated(backend=backend)() == "done k"
    backend.close()
    backend.close()


def test_a_backend_is_closed_by_async_with_and_may_be_closed_twice(backend_url: str) -> None:
    async def main() -> None:
        async def twin() -> str:
            return "done"

        async with open_backend(backend_url) as backend:
            assert await idempotent(backend=backend)(twin)() == "done"
        await backend.aclose()
        await backend.aclose()
        backend.close()

    asyncio.run(main())


@pytest.mark.parametrize("colour", COLOURS, ids=str)
def test_a_backend_that_was_never_used_can_be_closed(backend_url: str, colour: Colour) -> None:
    backend = open_backend(backend_url)
    if colour.is_async:
        asyncio.run(backend.aclose())
    backend.close()


def test_closing_leaves_the_records(backend_url: str) -> None:
    function = decorated(backend=backend_url)
    function()
    open_backend(backend_url).close()
    outcome = function.outcome()
    assert (outcome.value, outcome.replayed) == ("done k", True)


EXIT = """
import asyncio, sys, threading
from idempotent import idempotent

url, colour = sys.argv[1:]
entered, leave = threading.Event(), threading.Event()

def work(order):
    entered.set()
    if order == "slow":
        leave.wait(10)
    return order

if colour == "sync":
    safe = idempotent(backend=url, namespace="exit")(work)
    threads = [threading.Thread(target=safe, args=("slow",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    entered.wait(10)
    leave.set()
    for thread in threads:
        thread.join()
    print(safe("a"), safe("a"), safe.outcome("a").replayed)
else:
    @idempotent(backend=url, namespace="exit")
    async def safe(order):
        await asyncio.sleep(0.05)
        return order

    async def main():
        # The first call imports its driver; how long that takes is not what -X dev is asked for here.
        asyncio.get_running_loop().slow_callback_duration = 60
        await asyncio.gather(*[safe("slow") for _ in range(3)])
        print(await safe("a"), await safe("a"), (await safe.outcome("a")).replayed)

    asyncio.run(main())
    asyncio.run(main())
"""


def interpreter(code: str, *arguments: str, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *options, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("colour", ["sync", "async"])
def test_a_process_that_closes_nothing_exits_clean_and_silent(backend_url: str, colour: str) -> None:
    done = interpreter(EXIT, backend_url, colour, options=("-W", "error", "-X", "dev"))
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "a a True\n" * (1 if colour == "sync" else 2)


WAITING = """
import sys, threading
from idempotent import InProgress, _run, decorator, idempotent

url = sys.argv[1]
entered, leave = threading.Event(), threading.Event()

def work():
    entered.set()
    leave.wait(10)

first = threading.Thread(target=idempotent(backend=url, namespace="waiting")(work))
first.start()
entered.wait(10)
decorator.flights_of = lambda backend: _run.Flights()  # as if in another process: it waits at the backend
try:
    idempotent(backend=url, namespace="waiting", wait=0.1)(work)()
except InProgress:
    print("waited")
leave.set()
first.join()
"""


def test_a_process_that_waited_at_the_backend_exits_clean_and_silent(backend_url: str) -> None:
    done = interpreter(WAITING, backend_url, options=("-W", "error", "-X", "dev"))
    assert (done.stderr, done.returncode, done.stdout) == ("", 0, "waited\n")


# -------------------------------------------------------------------------------------------------------------- fork

FORK = """
import os, signal, sys, threading
from idempotent import LocalBackend, _config, idempotent, open_backend

parent = open_backend("local://")
safe = idempotent(backend="local://", namespace="n")(lambda order: os.getpid())
mine = safe("before")
entered, leave = threading.Event(), threading.Event()

def slow():
    entered.set()
    leave.wait(30)

running = idempotent(backend="local://", namespace="running", wait=0)(slow)
threading.Thread(target=running, daemon=True).start()
entered.wait(10)
_config._lock.acquire()
parent._store.lock.acquire()
child = os.fork()
if child == 0:
    signal.alarm(20)  # a lock that nobody will release would hang here
    assert open_backend("local://") is parent
    assert open_backend("local://?maxsize=5") is not parent
    assert safe("before") == mine, "settled records are inherited"
    assert safe("after") == os.getpid()
    assert running.peek() is None, "what the parent runs is not running here"
    os._exit(0)
_config._lock.release()
parent._store.lock.release()
_, status = os.waitpid(child, 0)
print("child", os.waitstatus_to_exitcode(status))
print("parent", running.peek().state, safe("after") == os.getpid())
leave.set()
"""


def test_a_forked_child_inherits_no_lock_and_no_running_call() -> None:
    done = interpreter(FORK, options=("-W", "ignore:This process:DeprecationWarning"))  # from 3.12 on, of any thread
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "child 0\nparent running True\n"


# ----------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(
    "statement, absent",
    [
        ("import idempotent", "redis sqlalchemy msgspec pydantic hypothesis"),
        ("from idempotent import idempotent, configure, open_backend", "redis sqlalchemy pydantic hypothesis"),
        (
            "from idempotent import idempotent; f = idempotent(backend='local://')(lambda: 1); f();"
            + "".join(
                f"idempotent(backend={url!r})(f)," for url in ("redis://127.0.0.1:1/0", "sqlite:////nowhere/x.db")
            ),
            "redis sqlalchemy pydantic hypothesis",
        ),
        ("import idempotent; idempotent.open_backend('redis://127.0.0.1:1/0')", "sqlalchemy pydantic hypothesis"),
    ],
    ids=["package", "names", "decorated", "redis opened"],
)
def test_only_what_is_used_is_imported(statement: str, absent: str) -> None:
    code = f"{statement}\nimport sys\nprint([name for name in {absent.split()!r} if name in sys.modules])"
    done = interpreter(code, options=("-W", "error"))
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("missing, url", [("redis", "redis://h/0"), ("sqlalchemy", "sqlite:///x.db")])
def test_what_is_missing_is_told_only_when_it_is_needed(missing: str, url: str) -> None:
    code = f"""
import sys
sys.modules[{missing!r}] = None
from idempotent import idempotent
assert idempotent(backend="local://")(lambda: 1)() == 1
try:
    idempotent(backend={url!r})(lambda: 1)()
except ImportError as error:
    print(error)
"""
    done = interpreter(code, options=("-W", "error"))
    assert (done.returncode, done.stderr) == (0, "")
    assert missing in done.stdout.lower()
    if missing == "sqlalchemy":
        assert "pip install 'idempotent-py[" in done.stdout


def test_warnings_as_errors_stop_every_call_before_anything_runs() -> None:
    runs: list[int] = []
    function = idempotent(lambda: runs.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(ProcessLocalWarning):
                function()
    assert not runs
