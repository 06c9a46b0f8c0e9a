"""Ours and the libraries that people use today, each set up as its own documentation says.

A guard takes the store's URL and a function `charge(order_id, amount)`, and gives it back guarded. Those that take a key
get the order's id; those that make it of all the arguments get both. All keep the outcome for an hour, and where a
duplicate may wait it waits. The Redis clients that we make for them have room for a thousand connections: with redis-py's
default of a hundred most of them fail among 200 duplicates, and one runs a hundred times. cashews, whose pool of ten has
callers wait for a connection, and DBOS make their own, as they are by default. What is not installed is left out, and said.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from benchmarks._work import TTL
from idempotent import idempotent

__all__ = ["BLOCKING", "OURS", "PACKAGES", "POLLING", "guards_of"]

OURS = "idempotent"
BLOCKING = ", blocking"
"""What a peer has behind its name in async code if the event loop stands still while its client waits for the store."""

Function = Callable[..., Any]
Guard = Callable[[str, Function], Function]


class _Peer(NamedTuple):
    """A library in one of its uses."""

    name: str
    module: str
    """What must be installed."""
    stores: str
    colours: str
    guard: Guard


def _ours(url: str, function: Function) -> Function:
    # The name that `charge` has anyhow, for both colours: they share records.
    return idempotent(backend=url, key="payment:{order_id}", namespace="benchmarks._work.charge", ttl=TTL)(function)


def _powertools(url: str, function: Function) -> Function:
    from aws_lambda_powertools.utilities.idempotency import IdempotencyConfig, idempotent_function
    from aws_lambda_powertools.utilities.idempotency.persistence.redis import RedisCachePersistenceLayer

    layer = RedisCachePersistenceLayer(client=_client(url))
    config = IdempotencyConfig(event_key_jmespath="order", payload_validation_jmespath="", expires_after_seconds=TTL)

    @idempotent_function(data_keyword_argument="event", persistence_store=layer, config=config)
    def guarded(event: dict[str, Any]) -> Any:
        return function(event["order"], event["amount"])

    return lambda order_id, amount: guarded(event={"order": order_id, "amount": amount})


def _kasper(url: str, function: Function) -> Function:
    from kasper_idempotent import MemoryStore, RedisStore
    from kasper_idempotent import idempotent as guard

    store = MemoryStore() if url.startswith("local") else RedisStore(_roomy(url))
    return guard(store=store, key=lambda order_id, _amount: f"kasper:{order_id}", ttl=TTL)(function)


def _idempotency(url: str, function: Function) -> Function:
    from idempotency import MemoryStore
    from idempotency import idempotent as guard
    from idempotency.stores.redis import RedisStore

    store: Any = MemoryStore() if url.startswith("local") else RedisStore(_client(url))
    return guard(ttl=TTL, store=store, on_duplicate="wait")(function)


def _dogpile(url: str, function: Function) -> Function:
    from dogpile.cache import make_region

    region = make_region()
    if url.startswith("local"):
        region.configure("dogpile.cache.memory", expiration_time=TTL)
    else:
        arguments = {
            "url": _roomy(url),
            "redis_expiration_time": TTL,
            "distributed_lock": True,
            "thread_local_lock": False,
        }
        region.configure("dogpile.cache.redis", expiration_time=TTL, arguments=arguments)
    return region.cache_on_arguments()(function)


def _pyidempotent(url: str, function: Function) -> Function:
    from pyidempotent import idempotent as guard
    from pyidempotent.backends.memory import MemoryBackend
    from pyidempotent.backends.redis import RedisBackend

    backend: Any = MemoryBackend() if url.startswith("local") else RedisBackend(_async_client(url))
    return guard(backend, ttl=TTL, key_extractor=lambda order_id, _amount, **_: order_id)(function)


def _idemptx(url: str, function: Function) -> Function:
    """It guards FastAPI's routes: the call gets a request with the key in its header."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from idemptx import idempotent as guard
    from idemptx.backend.redis import AsyncRedisBackend

    @guard(AsyncRedisBackend(_async_client(url)), key_ttl=TTL, wait_timeout=30)
    async def route(request: Request) -> JSONResponse:
        order = request.headers["idempotency-key"]
        return JSONResponse(await function(order, int(request.headers["amount"])))

    async def guarded(order_id: str, amount: int) -> Any:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        headers = [(b"idempotency-key", order_id.encode()), (b"amount", b"%d" % amount), (b"host", b"shop")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": headers,
            "scheme": "http",
        }
        return _json((await route(request=Request(scope, receive))).body)

    return guarded


def _idempotency_kit(url: str, function: Function) -> Function:
    from idempotency_kit import (
        AsyncIdempotencyCoordinator,
        IdempotencyDomainService,
        JsonResultAdapter,
        async_idempotent,
    )
    from idempotency_kit.infra.storage.redis.aio.repository import RedisAsyncIdempotencyRepository

    coordinator = AsyncIdempotencyCoordinator(
        RedisAsyncIdempotencyRepository(_async_client(url)), IdempotencyDomainService()
    )

    @async_idempotent(
        "charge",
        JsonResultAdapter(),
        ttl_seconds=TTL,
        key_param="order_id",
        infra_param="coordinator",
        fingerprint_params=("amount",),
    )
    async def guarded(order_id: str, amount: int, *, coordinator: Any) -> Any:
        del coordinator
        return await function(order_id, amount)

    return lambda order_id, amount: guarded(order_id, amount, coordinator=coordinator)


def _cashews(url: str, function: Function) -> Function:
    from cashews import Cache

    cache = Cache()
    cache.setup("mem://" if url.startswith("local") else url)
    return cache(ttl=TTL, key="cashews:{order_id}", lock=True)(function)


def _aiocache(url: str, function: Function) -> Function:
    from aiocache import Cache, cached_stampede
    from aiocache.serializers import JsonSerializer

    place: dict[str, Any] = {"cache": Cache.MEMORY}
    if not url.startswith("local"):
        parts = urlsplit(url)
        place = {"cache": Cache.REDIS, "endpoint": parts.hostname, "port": parts.port, "serializer": JsonSerializer()}
        place["pool_max_size"] = 1000
    return cached_stampede(ttl=TTL, lease=30, key_builder=lambda _function, order_id, _amount: order_id, **place)(
        function
    )


def _dbos(url: str, function: Function) -> Function:
    """A workflow whose id is the key; the library is one for each process."""
    from dbos import DBOS, SetWorkflowID

    config: Any = {"name": "benchmark", "system_database_url": url, "log_level": "CRITICAL", "run_admin_server": False}
    DBOS(config=config)

    @DBOS.workflow()
    def blocking(order_id: str, amount: int) -> Any:
        return function(order_id, amount)

    def call(order_id: str, amount: int) -> Any:
        with SetWorkflowID(order_id):
            return blocking(order_id, amount)

    DBOS.launch()
    return call


_PEERS = (
    _Peer("powertools", "aws_lambda_powertools", "redis", "sync", _powertools),
    _Peer("kasper-idempotent", "kasper_idempotent", "local", "sync async", _kasper),
    _Peer("kasper-idempotent", "kasper_idempotent", "redis", "sync", _kasper),
    _Peer("kasper-idempotent" + BLOCKING, "kasper_idempotent", "redis", "async", _kasper),
    _Peer("idempotency", "idempotency", "redis local", "sync", _idempotency),
    _Peer("dogpile.cache", "dogpile", "redis local", "sync", _dogpile),
    _Peer("pyidempotent", "pyidempotent", "redis local", "async", _pyidempotent),
    _Peer("idemptx", "idemptx", "redis", "async", _idemptx),
    _Peer("idempotency-kit", "idempotency_kit", "redis", "async", _idempotency_kit),
    _Peer("cashews + lock", "cashews", "redis local", "async", _cashews),
    _Peer("aiocache stampede", "aiocache", "redis local", "async", _aiocache),
    _Peer("DBOS", "dbos", "postgresql sqlite", "sync", _dbos),
)

POLLING = ("idempotency", "dogpile.cache", "pyidempotent", "idemptx", "idempotency-kit", "cashews + lock", "DBOS")
"""Whose waiters ask the store again and again."""

PACKAGES = (
    *("redis", "hiredis", "cachetools", "sqlalchemy", "psycopg", "aiosqlite"),
    *("opentelemetry-sdk", "prometheus-client"),
    *("aws-lambda-powertools", "kasper-idempotent", "idempotency", "dogpile.cache", "pyidempotent", "idemptx"),
    *("idempotency-kit", "cashews", "aiocache", "dbos"),
)
"""Whose versions are told."""


def guards_of(store: str, colour: str) -> tuple[dict[str, Guard], dict[str, str]]:
    """Guards by name, ours first; and why others are missing."""
    guards: dict[str, Guard] = {OURS: _ours}
    missing: dict[str, str] = {}
    for peer in _PEERS:
        if store in peer.stores.split() and colour in peer.colours.split():
            if find_spec(peer.module) is None:
                missing[peer.name] = "not installed"
            else:
                guards[peer.name] = peer.guard
    return guards, missing


def _roomy(url: str) -> str:
    return f"{url}?max_connections=1000"


@functools.cache
def _client(url: str) -> Any:
    import redis

    return redis.Redis.from_url(_roomy(url))


@functools.cache
def _async_client(url: str) -> Any:
    import redis.asyncio

    return redis.asyncio.Redis.from_url(_roomy(url))


def _json(body: Any) -> Any:
    import orjson

    return orjson.loads(body)
