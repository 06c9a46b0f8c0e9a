"""Subscriptions to Redis's messages, on a blocking connection of redis-py."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import redis.connection
import redis.retry
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, MovedError, ResponseError

from idempotent.backends._listener import Heard, Refused
from idempotent.backends._redis_links import settings_of

__all__ = ["RedisSubscriber", "subscriber_of"]

_MOVED = (MovedError, ClusterDownError)
_MOVED_CODES = ("MOVED ", "CLUSTERDOWN")
"""Refusals of a node that is the wrong one: whoever waits asks again, and finds the right one."""


def subscriber_of(pool: Any, timeout: float, *, sharded: bool = False) -> "Callable[[], RedisSubscriber] | None":
    """How to subscribe where `pool`, of either colour, connects; None: it cannot be told.

    Sharded are the messages of a cluster that stay with the node of their channel, of Redis 7 and newer.
    """
    kind = getattr(redis.connection, getattr(pool, "connection_class", type(None)).__name__, None)
    module = getattr(pool, "connection_class", type(None)).__module__
    if kind is None or not module.startswith("redis."):
        return None  # fakeredis and other stand-ins have no socket to listen at
    options = settings_of(pool)
    options |= {
        "protocol": 2,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": redis.retry.Retry(NoBackoff(), 0),
        "decode_responses": False,
    }
    return lambda: RedisSubscriber(kind(**options), sharded=sharded)


class RedisSubscriber:
    """A connection of redis-py to hear messages on."""

    def __init__(self, connection: Any, *, sharded: bool = False) -> None:
        self._connection = connection
        self._sharded = sharded
        self._wanted: set[str] = set()
        try:
            connection.connect()
        except ResponseError as error:  # no permission
            raise Refused(str(error)) from error

    def fileno(self) -> int:
        """Its socket."""
        return int(self._connection._sock.fileno())

    def subscribe(self, channels: set[str]) -> Iterable[Heard]:
        """Ask for the messages of `channels`; `receive` tells when they are subscribed."""
        if self._sharded:  # those of one command would have to be of one slot
            self._wanted |= channels
            for channel in channels:
                self._connection.send_command("SSUBSCRIBE", channel)
        else:
            self._connection.send_command("SUBSCRIBE", *channels)
        return ()

    def unsubscribe(self, channels: list[str]) -> Iterable[Heard]:
        """Ask for them no longer."""
        if self._sharded:
            self._wanted.difference_update(channels)
            for channel in channels:
                self._connection.send_command("SUNSUBSCRIBE", channel)
        else:
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
            reply = self._connection.read_response(disable_decoding=True, disconnect_on_error=False)
        except ResponseError as error:
            if isinstance(error, _MOVED) or str(error).startswith(_MOVED_CODES):
                raise
            raise Refused(str(error)) from error  # no permission, or no such command
        if reply[0] == b"sunsubscribe" and reply[1].decode() in self._wanted:
            raise ConnectionError("the channel's slot is another node's by now")
        return reply

    def close(self) -> None:
        """Close the connection."""
        self._connection.disconnect()


def _heard(reply: Any) -> Iterator[Heard]:
    if reply[0] in (b"subscribe", b"ssubscribe", b"message", b"smessage"):
        yield reply[0].endswith(b"subscribe"), reply[1].decode()
