"""Subscriptions to Redis's messages, on a blocking connection of redis-py."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import redis.connection
import redis.retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from idempotent.backends._listener import Heard, Refused

__all__ = ["RedisSubscriber", "subscriber_of"]

_SHARED = ("host", "port", "path", "db", "username", "password", "credential_provider", "client_name")


def subscriber_of(pool: Any, timeout: float) -> "Callable[[], RedisSubscriber] | None":
    """How to subscribe where `pool`, of either colour, connects; None: it cannot be told."""
    kind = getattr(redis.connection, getattr(pool, "connection_class", type(None)).__name__, None)
    module = getattr(pool, "connection_class", type(None)).__module__
    if kind is None or not module.startswith("redis."):
        return None  # fakeredis and other stand-ins have no socket to listen at
    given = pool.connection_kwargs
    options = {name: value for name, value in given.items() if name in _SHARED or name.startswith("ssl_")}
    options |= {
        "protocol": 2,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": redis.retry.Retry(NoBackoff(), 0),
        "decode_responses": False,
    }
    return lambda: RedisSubscriber(kind(**options))


class RedisSubscriber:
    """A connection of redis-py to hear messages on."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        try:
            connection.connect()
        except ResponseError as error:  # no permission
            raise Refused(str(error)) from error

    def fileno(self) -> int:
        """Its socket."""
        return int(self._connection._sock.fileno())

    def subscribe(self, channels: set[str]) -> Iterable[Heard]:
        """Ask for the messages of `channels`; `receive` tells when they are subscribed."""
        self._connection.send_command("SUBSCRIBE", *channels)
        return ()

    def unsubscribe(self, channels: list[str]) -> Iterable[Heard]:
        """Ask for them no longer."""
        self._connection.send_command("UNSUBSCRIBE", *channels)
        return ()

    def receive(self) -> Iterator[Heard]:
        """Read what the socket has."""
        while True:
            yield from _heard(self._read())
            if not self._connection.can_read(timeout=0):
                return

    def ping(self) -> Iterator[Heard]:
        """Have the server answer, within the connection's timeout."""
        self._connection.send_command("PING", check_health=False)
        while (reply := self._read())[0] not in (b"pong", b"P"[0]):  # without any subscription it is plain "PONG"
            yield from _heard(reply)

    def _read(self) -> Any:
        try:
            return self._connection.read_response(disable_decoding=True, disconnect_on_error=False)
        except ResponseError as error:  # no permission
            raise Refused(str(error)) from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()


def _heard(reply: Any) -> Iterator[Heard]:
    if reply[0] in (b"subscribe", b"message"):
        yield reply[0] == b"subscribe", reply[1].decode()
