"""The pytest plugin: a backend and a clock for tests, and configuration that ends with its test.

It is loaded with every pytest run of an environment that has this package, so it imports nothing but pytest before a
test asks for something.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from idempotent.backends.base import Backend
    from idempotent.testing.clock import VirtualClock

KINDS = ("local", "fakeredis")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--idempotent-backend`, and two settings."""
    group = parser.getgroup("idempotent")
    group.addoption(
        "--idempotent-backend",
        choices=KINDS,
        help="what the fixture idempotent_backend is: local (this process's memory) or fakeredis",
    )
    parser.addini("idempotent_backend", "as --idempotent-backend, which wins over it", default="local")
    parser.addini(
        "idempotent_isolation",
        "whether what a test configures, and what it records in local://, ends with the test",
        type="bool",
        default=True,
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker."""
    config.addinivalue_line(
        "markers", 'idempotent(backend="local" | "fakeredis"): what the fixture idempotent_backend is for this test'
    )


def _loaded() -> Any:
    """The configuration's module; None where nothing has needed it yet."""
    return sys.modules.get("idempotent._config")


@pytest.fixture(autouse=True)
def _idempotent_isolation(request: pytest.FixtureRequest) -> Iterator[None]:
    """After the test: what `configure` had set before, and an empty `local://`."""
    if not request.config.getini("idempotent_isolation"):
        yield
        return
    before = _loaded()
    kept = None if before is None else _begin(before)
    yield
    config = _loaded()
    if config is not None:
        for url in _local_urls(config):
            del config._backends[url]
        config.settings, local = (config.Settings(), {}) if kept is None else kept
        config._backends.update(local)


def _begin(config: Any) -> tuple[Any, dict[str, Any]]:
    """Set the configuration anew, the same, with no records; what there was."""
    local = {url: config._backends.pop(url) for url in _local_urls(config)}
    settings = config.settings
    config.settings = config.replace(settings)  # functions make their plans anew
    return settings, local


def _local_urls(config: Any) -> list[str]:
    return [url for url in config._backends if url.lower().startswith("local:")]


@pytest.fixture
def idempotent_backend(request: pytest.FixtureRequest) -> Iterator["Backend"]:
    """An empty backend for this test, which every decorated function and lock uses that names a URL or nothing.

    Those that were given a Backend object keep it. It is a `LocalBackend` by default. On request it is a Redis
    backend over fakeredis: by `@pytest.mark.idempotent(backend="fakeredis")`, for a whole run by
    `--idempotent-backend=fakeredis`, or by the setting `idempotent_backend`.

    What fakeredis is not: a proof of safety. It knows no persistence, failover, replicas, memory limits, ACLs or
    cluster, no lost connections, and no virtual time; it shows that keys, results and prefixes fit Redis. For the rest
    use a real server.
    """
    from dataclasses import replace

    from idempotent import _config
    from idempotent.backends.base import Backend

    marker = request.node.get_closest_marker("idempotent")
    kind = None if marker is None else _marked(*marker.args, **marker.kwargs)
    kind = kind or request.config.getoption("--idempotent-backend") or request.config.getini("idempotent_backend")
    if kind not in KINDS:
        raise ValueError(f"idempotent_backend is one of {', '.join(KINDS)}, not {kind!r}")

    def resolve(given: "Backend | str | None") -> "Backend":
        named = _config.settings.backend if given is None else given
        return named if isinstance(named, Backend) else backend

    with contextlib.ExitStack() as after, pytest.MonkeyPatch.context() as patch:
        backend = after.enter_context(_local() if kind == "local" else _fakeredis())
        patch.setattr(_config, "resolve_backend", resolve)
        patch.setattr(_config, "settings", replace(_config.settings))
        yield backend


def _marked(backend: str | None = None) -> str | None:
    """What the marker asks for; whatever else is written in it is a TypeError, and not passed over."""
    return backend


def _local() -> "Backend":
    from idempotent.backends.local import LocalBackend
    from idempotent.testing.clock import VirtualClock

    return LocalBackend(clock=VirtualClock())


def _fakeredis() -> "Backend":
    try:
        import fakeredis
    except ImportError as error:
        raise ImportError("fakeredis is not installed: pip install 'idempotent-py[testing]'") from error
    from idempotent.backends.redis import RedisBackend

    server = fakeredis.FakeServer()
    backend = RedisBackend(fakeredis.FakeRedis(server=server))
    # One made from a client serves one colour; this one has a client for each.
    backend._links["async"] = RedisBackend(fakeredis.FakeAsyncRedis(server=server))._link
    return backend


@pytest.fixture
def idempotent_clock(idempotent_backend: "Backend") -> Iterator["VirtualClock"]:
    """The time of `idempotent_backend`, local only: `advance(seconds)` lets leases and ttls pass without sleeping.

    The time of runs and locks goes with it: `current_call().lease_lost` and `hold.lost` turn true. No heartbeat has
    run meanwhile: a runner that lives through an `advance` beyond its lease is one that was frozen for so long. (Within
    one process its duplicates wait for it for a lease more, as they see that it is alive.)
    """
    from idempotent._aio import AsyncDriver
    from idempotent._drive import SyncDriver
    from idempotent.backends.local import LocalBackend
    from idempotent.testing.clock import VirtualClock

    clock = idempotent_backend._store.clock if isinstance(idempotent_backend, LocalBackend) else None
    if not isinstance(idempotent_backend, LocalBackend) or not isinstance(clock, VirtualClock):
        raise TypeError("idempotent_clock moves the time of the local backend, and fakeredis keeps its own")
    clock.wakes.append(idempotent_backend._store.signals.notify_all)
    with pytest.MonkeyPatch.context() as patch:
        for driver in (SyncDriver, AsyncDriver):
            patch.setattr(driver, "now", staticmethod(clock.now))
        yield clock
