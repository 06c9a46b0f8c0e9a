"""What a URL or a ready-made client says of the servers: where they are, how to connect, who answers for a key."""

from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.cluster
import redis.asyncio.sentinel
import redis.cluster
import redis.sentinel

from idempotent._options import split_url
from idempotent.backends._listener import Listener
from idempotent.backends._pubsub import subscriber_of
from idempotent.backends._redis_links import (
    Address,
    AsyncLink,
    Link,
    SyncLink,
    async_pool,
    node_pool,
    settings_of,
    sync_pool,
)
from idempotent.backends._redis_nodes import Cluster, Map, NodesLink, Sentinels

__all__ = ["Servers", "servers_of"]

_SENTINEL_PORT, _PORT = 26_379, 6379


class Servers:
    """The links of each colour that is served, and who listens for messages."""

    is_cluster = False
    one: Listener | None = None
    """Who hears all that is published, where there is one server for good; None: nobody does."""

    def __init__(self, links: dict[str, Link], pool: Any, timeout: float) -> None:
        self.links = links
        self.database = int(pool.connection_kwargs.get("db") or 0)
        """Its number; 0 is there without asking for it."""
        subscribe = subscriber_of(pool, timeout)
        self.one = None if subscribe is None else Listener(subscribe)

    def listener(self, key: str) -> Listener | None:
        """Who hears what is published of `key`; None: nobody can, at this moment or at all."""
        return self.one

    def close(self) -> None:
        """Close the connections of blocking callers, and the listening ones."""
        if self.one is not None:
            self.one.close()
        if "sync" in self.links:
            self.links["sync"].close()

    async def aclose(self) -> None:
        """Close those of the running loop as well."""
        self.close()
        if "async" in self.links:
            await self.links["async"].aclose()


class _Nodes(Servers):
    """Several nodes, and a listening connection to each that somebody waits at.

    Args:
        colours: those that are served.
        known: which node answers for a key.
        settings: options of connections, but host and port.
        advisers: options of connections to sentinels; None: the nodes advise.
    """

    def __init__(
        self,
        colours: tuple[str, ...],
        known: Map,
        settings: dict[str, Any],
        advisers: dict[str, Any] | None,
        *,
        is_tls: bool,
        advisers_tls: bool,
        timeout: float,
    ) -> None:
        self.is_cluster = isinstance(known, Cluster)
        self.database = int(settings.get("db") or 0)
        self._known, self._timeout = known, timeout
        self._pool = partial(node_pool, settings, is_tls=is_tls, timeout=timeout)
        self._listeners: dict[Address, Listener] = {}

        def maker(settings: dict[str, Any], colour: str, *, is_tls: bool) -> Callable[[Address], Link]:
            if colour == "sync":
                return lambda address: SyncLink(
                    node_pool(settings, address, is_tls=is_tls, timeout=timeout), owned=True
                )
            return lambda address: AsyncLink(
                partial(node_pool, settings, address, is_tls=is_tls, timeout=None), owned=True, timeout=timeout
            )

        self.links = {
            colour: NodesLink(
                known,
                maker(settings, colour, is_tls=is_tls),
                None if advisers is None else maker(advisers, colour, is_tls=advisers_tls),
                timeout / 2,
            )
            for colour in colours
        }

    def listener(self, key: str) -> Listener | None:
        address = self._known.of(key)
        if address is None:
            return None
        found = self._listeners.get(address)
        if found is None:
            subscribe = subscriber_of(self._pool(address), self._timeout, sharded=self.is_cluster)
            if subscribe is None:
                return None
            found = self._listeners.setdefault(address, Listener(subscribe))
        return found

    def close(self) -> None:
        for listener in list(self._listeners.values()):
            listener.close()
        if "sync" in self.links:
            self.links["sync"].close()


def servers_of(server: Any, timeout: float) -> Servers:
    """The servers that a URL or a client of redis-py names; nothing is sent to them yet.

    Raises:
        TypeError: it is neither.
        ValueError: the URL, or an option in it, is wrong.
    """
    if isinstance(server, str):
        scheme, _, rest = server.partition("://")
        safe, plus, kind = scheme.lower().partition("+")
        if plus:
            return _by_url(safe, kind, rest, timeout)
        pool = sync_pool(server, timeout)
        links: dict[str, Link] = {
            "sync": SyncLink(pool, owned=True),
            "async": AsyncLink(partial(async_pool, server), owned=True, timeout=timeout),
        }
        return Servers(links, pool, timeout)
    if isinstance(server, (redis.cluster.RedisCluster, redis.asyncio.cluster.RedisCluster)):
        return _by_cluster(server, timeout)
    if isinstance(server, (redis.Redis, redis.asyncio.Redis)):
        pool = getattr(server, "connection_pool", None)
        if isinstance(pool, (redis.sentinel.SentinelConnectionPool, redis.asyncio.sentinel.SentinelConnectionPool)):
            return _by_sentinel_pool(pool, timeout)
        if isinstance(server, redis.asyncio.Redis):
            return Servers({"async": AsyncLink(lambda: pool, owned=False, timeout=timeout)}, pool, timeout)
        return Servers({"sync": SyncLink(pool, owned=False)}, pool, timeout)
    raise TypeError(
        f"RedisBackend takes a URL, a redis.Redis or a redis.asyncio.Redis, or their RedisCluster, not {server!r}"
    )


def _by_url(scheme: str, kind: str, rest: str, timeout: float) -> Servers:
    place, _, query = rest.partition("?")
    hosts, _, path = place.partition("/")
    user, at, hosts = hosts.rpartition("@")
    usual = _SENTINEL_PORT if kind == "sentinel" else _PORT
    seeds = [_address(host, usual) for host in hosts.split(",")]
    service, _, database = path.partition("/")
    if kind == "sentinel" and not service:
        raise ValueError("the URL names no service: redis+sentinel://host1:26379,host2:26379/SERVICE")
    if kind == "cluster" and path not in ("", "0"):
        raise ValueError("a Redis Cluster has one database, which has no number: redis+cluster://host1:6379,host2:6379")
    query, own = split_url(f"?{query}", ("sentinel_username", "sentinel_password"))
    if own and kind == "cluster":
        raise ValueError("sentinel_username= and sentinel_password= are for redis+sentinel://")
    # What is left is as in any URL of redis-py, which knows its options.
    host = f"[{seeds[0][0]}]" if ":" in seeds[0][0] else seeds[0][0]
    pool = sync_pool(f"{scheme}://{user}{at}{host}:{seeds[0][1]}/{database}{query}", timeout)
    given = pool.connection_kwargs
    ours = ("host", "port", "retry", "socket_timeout", "socket_connect_timeout", "decode_responses")
    settings = {name: value for name, value in given.items() if name not in ours}
    known: Map = Cluster(seeds) if kind == "cluster" else Sentinels(seeds, unquote(service))
    advisers = None
    if kind == "sentinel":
        advisers = {name: value for name, value in settings.items() if name not in ("db", "username", "password")}
        advisers |= {name.removeprefix("sentinel_"): value for name, value in own.items()}
    is_tls = scheme == "rediss"
    return _Nodes(("sync", "async"), known, settings, advisers, is_tls=is_tls, advisers_tls=is_tls, timeout=timeout)


def _address(text: str, usual: int) -> Address:
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0:
        raise ValueError("a host or port in the URL cannot be read: host1:port1,host2:port2")
    return host, port or usual


# Of a client that knows several nodes we take what it knows. Its connections it keeps for itself: redis-py makes them
# with retries and timeouts of its own, which no deadline of ours would end.


def _by_cluster(client: Any, timeout: float) -> Servers:
    nodes = [*client.nodes_manager.startup_nodes.values(), *client.nodes_manager.nodes_cache.values()]
    seeds = list(dict.fromkeys((str(node.host), int(node.port)) for node in nodes))
    if isinstance(client, redis.asyncio.cluster.RedisCluster):
        colour, pool = "async", nodes[0]
    else:
        colour, pool = "sync", client.get_redis_connection(client.get_nodes()[0]).connection_pool
    is_tls = issubclass(pool.connection_class, (redis.SSLConnection, redis.asyncio.SSLConnection))
    return _Nodes(
        (colour,), Cluster(seeds), settings_of(pool), None, is_tls=is_tls, advisers_tls=is_tls, timeout=timeout
    )


def _by_sentinel_pool(pool: Any, timeout: float) -> Servers:
    if not pool.is_master:
        raise TypeError("RedisBackend takes the client of a primary: Sentinel(...).master_for(service)")
    colour = "async" if isinstance(pool, redis.asyncio.sentinel.SentinelConnectionPool) else "sync"
    pools = [sentinel.connection_pool for sentinel in pool.sentinel_manager.sentinels]
    seeds = [(each.connection_kwargs["host"], int(each.connection_kwargs["port"])) for each in pools]
    tls = (redis.SSLConnection, redis.asyncio.SSLConnection)
    return _Nodes(
        (colour,),
        Sentinels(seeds, pool.service_name),
        settings_of(pool),
        settings_of(pools[0]),
        is_tls=issubclass(pool.connection_class, tls),
        advisers_tls=issubclass(pools[0].connection_class, tls),
        timeout=timeout,
    )
