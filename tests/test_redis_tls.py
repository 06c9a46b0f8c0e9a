"""RedisBackend by TLS: with the certificates that the tests make, and by none that is not to be trusted."""

import asyncio
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from colours import Colour
from servers import Address, RedisCluster, Server, start_redis, start_sentinel
from tls import TLSDoor, certificate

from idempotent import BackendUnavailable, Lock, RedisBackend


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., RedisBackend]:
    """Makes backends that are closed after the test."""

    def make(server: Any) -> RedisBackend:
        backend = RedisBackend(server, prefix=f"t{secrets.token_hex(6)}")
        _fresh.callback(backend.close)
        return backend

    return make


@pytest.fixture
def door(redis_server: Server | Address, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A URL, without options, and the certificate."""
    files = certificate(tmp_path, "127.0.0.1")
    with TLSDoor(redis_server.port, files) as door:
        yield f"rediss://127.0.0.1:{door.port}/0", files[0]


def test_calls_replays_and_wake_ups_go_by_tls(
    redis_server: Server | Address,
    door: tuple[str, Path],
    colour: Colour,
    opened: Callable[..., RedisBackend],
) -> None:
    url, authority = door
    backend = opened(f"{url}?ssl_ca_certs={authority}")
    entered, gate = threading.Event(), threading.Event()

    def work(order: int) -> int:
        if order:
            entered.set()
            assert gate.wait(30)
        return order + 1

    one = colour.define(work, backend=backend, key="{order}", namespace="n")
    assert colour.call(one, 0) == colour.call(one, 0) == 1
    other = RedisBackend(f"{url}?ssl_ca_certs={authority}", prefix=backend.prefix)
    with other, redis.Redis.from_url(redis_server.url) as client:
        running = colour.start(one, 1)
        assert entered.wait(30)
        waiting = colour.start(colour.define(work, backend=other, key="{order}", namespace="n"), 1)
        for _ in range(2000):
            if client.pubsub_channels(f"{backend.prefix}:*"):
                break
            threading.Event().wait(0.01)
        assert client.pubsub_channels(f"{backend.prefix}:*")
        gate.set()
        assert running.result(30) == waiting.result(30) == 2


@pytest.mark.parametrize("trouble", ["an authority that is not known", "another host's"])
def test_a_certificate_that_is_not_to_be_trusted_is_refused_before_the_run(
    redis_server: Server | Address,
    door: tuple[str, Path],
    tmp_path: Path,
    colour: Colour,
    trouble: str,
    opened: Callable[..., RedisBackend],
) -> None:
    runs: list[int] = []

    def refused(url: str) -> None:
        with pytest.raises(BackendUnavailable, match="(?i)certificate"):
            colour.call(colour.define(lambda: runs.append(1), backend=opened(url)))
        assert runs == []

    if trouble == "another host's":
        files = certificate(tmp_path, "redis.example")
        with TLSDoor(redis_server.port, files) as other:
            url = f"rediss://127.0.0.1:{other.port}/0?ssl_ca_certs={files[0]}"
            refused(url)
            # Both can be asked for by name.
            work: Any = colour.define(lambda: 1, backend=opened(f"{url}&ssl_check_hostname=false"))
            assert colour.call(work) == 1
    else:
        refused(door[0])
        assert colour.call(colour.define(lambda: 1, backend=opened(f"{door[0]}?ssl_cert_reqs=none"))) == 1


def test_a_server_that_speaks_no_tls_is_refused_before_the_run(
    redis_server: Server | Address, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    runs: list[int] = []
    url = f"rediss://127.0.0.1:{redis_server.port}/0?timeout=0.5"
    with pytest.raises(BackendUnavailable):
        colour.call(colour.define(lambda: runs.append(1), backend=opened(url)))
    assert runs == []


# --------------------------------------------------------------------------------------------------------- several nodes


class Nodes(NamedTuple):
    """Servers that know of each other, and tell of each other, by TLS alone."""

    url: str
    """Without options."""
    places: list[tuple[str, int]]
    """Those in the URL."""
    authority: Path


@pytest.fixture(scope="module", params=["cluster", "sentinel"])
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("tls")
    files = certificate(folder, "127.0.0.1")
    with contextlib.ExitStack() as started:
        if request.param == "cluster":
            cluster = started.enter_context(RedisCluster(tls=files))
            url, servers = cluster.url, cluster.nodes[:1]
        else:
            primary = started.enter_context(start_redis(tls=files))
            servers = [started.enter_context(start_sentinel(primary, 1, tls=files))]
            url = f"rediss+sentinel://127.0.0.1:{servers[0].tls_port}/main"
        yield Nodes(url, [("127.0.0.1", server.tls_port) for server in servers], files[0])


@contextlib.contextmanager
def client_of(nodes: Nodes, colour: Colour) -> Iterator[Any]:
    """A ready-made client of redis-py that goes by TLS."""
    module: Any = redis.asyncio if colour.is_async else redis
    tls = {"ssl": True, "ssl_ca_certs": str(nodes.authority)}
    if "cluster" in nodes.url:
        host, port = nodes.places[0]
        client = module.RedisCluster(host=host, port=port, **tls)
    else:
        client = module.sentinel.Sentinel(nodes.places, sentinel_kwargs=tls, **tls).master_for("main")
    yield client
    if not colour.is_async:
        client.close()


@pytest.mark.parametrize("by", ["url", "client"])
def test_calls_and_replays_at_several_nodes_go_by_tls(
    nodes: Nodes, by: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    with contextlib.ExitStack() as stack:
        server = f"{nodes.url}?ssl_ca_certs={nodes.authority}"
        backend = opened(server if by == "url" else stack.enter_context(client_of(nodes, colour)))
        runs: list[int] = []
        work = colour.define(runs.append, backend=backend, key="{object}", namespace="n")

        async def all_of_them() -> None:
            for order in range(9):  # at every node of a cluster
                await work(order)

        for _ in range(2):
            if colour.is_async:
                asyncio.run(all_of_them())
            else:
                for order in range(9):
                    work(order)
        assert runs == list(range(9))


def test_who_waits_at_several_nodes_hears_of_the_end_by_tls(nodes: Nodes, opened: Callable[..., RedisBackend]) -> None:
    backend: Any = opened(f"{nodes.url}?ssl_ca_certs={nodes.authority}")
    with Lock("a", backend=backend):  # which finds the node
        listener = backend._servers.listener(f"{backend.prefix}:{{l0::a}}")
        with contextlib.closing(listener.connect()) as subscriber:
            subscriber.subscribe({f"{backend.prefix}:{{l0::a}}"})
            assert list(subscriber.receive()) == [(True, f"{backend.prefix}:{{l0::a}}")]


def test_nodes_with_a_certificate_that_is_not_to_be_trusted_are_refused_before_the_run(
    nodes: Nodes, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    runs: list[int] = []
    with pytest.raises(BackendUnavailable, match="(?i)certificate"):
        colour.call(colour.define(lambda: runs.append(1), backend=opened(nodes.url)))
    assert runs == []
