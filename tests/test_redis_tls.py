"""RedisBackend by TLS: with the certificates that the tests make, and by none that is not to be trusted."""

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from colours import COLOURS, Colour
from servers import Address, Server
from tls import TLSDoor, certificate

from idempotent import BackendUnavailable, RedisBackend


@pytest.fixture(params=COLOURS, ids=repr)
def colour(request: pytest.FixtureRequest) -> Colour:
    return request.param


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., RedisBackend]:
    """Makes backends that are closed after the test."""

    def make(url: str) -> RedisBackend:
        backend = RedisBackend(url, prefix=f"t{secrets.token_hex(6)}")
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
