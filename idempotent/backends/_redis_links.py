"""Connections to one Redis server, in both colours: taken, used for one command with a deadline, and put back.

Commands are sent on redis-py's connections directly: its own re-sending knows neither the deadline of a command nor which
replies may be asked for again.
"""

import asyncio
import errno
import inspect
import os
import socket
import ssl
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from idempotent._signals import TaskWaiter, ThreadWaiter
from idempotent.backends._loops import PerLoop
from idempotent.backends._watchdog import within

pack_command: Any
try:
    from hiredis import pack_command
except ImportError:
    pack_command = None

__all__ = [
    "Address",
    "AsyncLink",
    "Link",
    "NodeLost",
    "Send",
    "SyncLink",
    "async_pool",
    "is_refused",
    "node_pool",
    "settings_of",
    "sync_pool",
]

Address = tuple[str, int]
"""Host and port."""


_CONNECTIONS = 64
"""Connections of a pool of ours; a call that finds none free waits for one within its deadline."""


class Link(Protocol):
    """How one colour talks to the server."""

    @property
    def waiter(self) -> type[ThreadWaiter | TaskWaiter]:
        """What this colour waits with."""
        ...

    async def send(self, command: tuple[Any, ...], deadline: float, *more: tuple[Any, ...]) -> Any:
        """The reply to `command`; a TimeoutError when monotonic `deadline` passes first.

        With `more` commands, one after the other on the same connection, the list of all replies.
        """
        ...

    async def senders(self, deadline: float) -> "Sequence[Send]":
        """How to send to each server that holds records."""
        ...

    def close(self) -> None:
        """Close the connections of blocking callers."""
        ...

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        ...

    async def sleep(self, pause: float) -> None:
        """Let `pause` seconds pass."""
        ...


class Send(Protocol):
    """`Link.send`, or the same to one server of many."""

    async def __call__(self, command: tuple[Any, ...], deadline: float, *more: tuple[Any, ...]) -> Any:
        """As `Link.send`."""
        ...


class NodeLost(RedisConnectionError):
    """The server that answered for a key so far does so no longer: another may, so asking again can help."""


def is_refused(error: BaseException | None, handled: BaseException | None) -> bool:
    """Whether nobody listens at the address, or a stranger does: asking again at once does not help.

    `handled`: what the caller was handling when it sent the command (`sys.exception()`), and `error` did not come from.
    """
    while error is not None and error is not handled and not isinstance(error, NodeLost):
        if isinstance(
            error, (ConnectionRefusedError, FileNotFoundError, socket.gaierror, ssl.SSLCertVerificationError)
        ):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ECONNREFUSED, errno.ENOENT):
            return True
        if isinstance(error, OSError) and "Connect call failed" in str(error):  # asyncio, for several addresses
            return "refused" in str(error) or str(errno.ECONNREFUSED) in str(error)
        error = error.__cause__ or error.__context__
    return False


_SHARED = {
    *("host", "port", "path", "db", "username", "password", "credential_provider", "client_name", "protocol"),
    *("socket_keepalive", "socket_keepalive_options"),
}


def settings_of(pool: Any) -> dict[str, Any]:
    """Where and as whom `pool` connects: the options that connections of either colour take."""
    given = pool.connection_kwargs.items()
    return {name: value for name, value in given if name in _SHARED or name.startswith("ssl_")}


def _options(timeout: float | None) -> dict[str, Any]:
    """The options that are ours to choose; `timeout` is that of blocking sockets, None is for the other colour."""
    module = redis.asyncio if timeout is None else redis
    # Two tries fit into the deadline, so that one lost reply is asked for again.
    seconds = None if timeout is None else timeout / 2
    return {
        "socket_timeout": seconds,
        "socket_connect_timeout": seconds,
        "retry": module.retry.Retry(NoBackoff(), 0),
        "decode_responses": False,
    }


def sync_pool(url: str, timeout: float) -> Any:
    """A pool whose connections are made as `url` says. Raises ValueError for an option that is not known."""
    return _checked(redis.ConnectionPool.from_url(url), _options(timeout))


def async_pool(url: str) -> Any:
    """As `sync_pool`. Deadlines are those of the callers."""
    return _checked(redis.asyncio.ConnectionPool.from_url(url), _options(None))


def node_pool(settings: dict[str, Any], address: Address, *, is_tls: bool, timeout: float | None) -> Any:
    """A pool whose connections go to `address`; `timeout` as in `sync_pool`, None is for the other colour."""
    module: Any = redis.asyncio if timeout is None else redis
    kind = module.SSLConnection if is_tls else module.Connection
    where = {"host": address[0], "port": address[1]}
    return _checked(module.ConnectionPool(connection_class=kind, **settings | where), _options(timeout))


def _checked(pool: Any, options: dict[str, Any]) -> Any:
    given = pool.connection_kwargs
    given.update(options)
    if issubclass(pool.connection_class, (redis.SSLConnection, redis.asyncio.SSLConnection)):
        # redis-py 5 compares the certificate with the host only when asked to.
        if given.get("ssl_cert_reqs", "required") not in ("none", ssl.CERT_NONE):
            given.setdefault("ssl_check_hostname", True)
    try:
        pool.connection_class(**given)
    except TypeError as error:  # a misspelt option is refused now, and not when the first connection is made
        raise ValueError(
            f"an option in the Redis URL is not known: {error}; ours are prefix=, timeout= and replicas="
        ) from None
    return pool


def _packed(command: tuple[Any, ...]) -> list[bytes]:
    """`command`, of bytes and text only, as it is sent: redis-py looks at each part in Python first."""
    if pack_command is not None:
        return [pack_command(command)]
    parts = [part if type(part) is bytes else part.encode() for part in command]
    return [b"*%d\r\n" % len(parts), *[b"$%d\r\n%b\r\n" % (len(part), part) for part in parts]]


_WAITING = (True,)


def _permits() -> "SimpleQueue[None]":
    """One for each connection that there may be: taken and put back at a tenth of what a semaphore costs."""
    permits: SimpleQueue[None] = SimpleQueue()
    for _ in range(_CONNECTIONS):
        permits.put(None)
    return permits


def _named(pool: Any) -> tuple[str, ...]:
    """What `get_connection` has to be given: redis-py 5.0 wants the command's name."""
    parameter = inspect.signature(pool.get_connection).parameters.get("command_name")
    wanted = parameter is not None and parameter.default is inspect.Parameter.empty
    return ("EVALSHA",) if wanted else ()


class _Idle:
    """Connections that we made as `pool` would, and that are not in use: taken and put back at less cost than its own.

    A connection that the server has closed meanwhile is found out by the command, which is sent again.
    """

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._idle: deque[Any] = deque()
        self.closed = False

    def take(self) -> Any:
        """One of them; None: there is none."""
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def make(self) -> Any:
        """A new one, not connected yet."""
        return self._pool.connection_class(**self._pool.connection_kwargs)

    def put(self, connection: Any) -> None:
        """It is not in use any more."""
        self._idle.append(connection)

    def drain(self) -> Iterator[Any]:
        """All of them, each to be disconnected: where one was found broken, the others are, too."""
        while True:
            try:
                yield self._idle.pop()
            except IndexError:
                return

    def forget(self) -> None:
        """Leave them alone: they are the parent process's."""
        _parents.append(self._idle)
        self._idle = deque()


def _disconnect(connection: Any) -> None:
    connection.disconnect()


class SyncLink:
    """One connection for each command, on the calling thread."""

    waiter = ThreadWaiter

    def __init__(self, pool: Any, *, owned: bool) -> None:
        self._pool = pool
        self._owned = owned
        self._named = _named(pool)
        self._idle = _Idle(pool)
        self._free = _permits()
        _links.add(self)

    async def send(self, command: tuple[Any, ...], deadline: float, *more: tuple[Any, ...]) -> Any:
        permit: list[None] = []
        connection = whole = None
        try:
            if self._owned:
                try:
                    # One step of the interpreter: a signal handler's exception between two would lose the permit for good.
                    permit.extend(map(self._free.get, _WAITING, (max(0.0, deadline - time.monotonic()),)))
                except Empty:
                    raise RedisTimeoutError("no connection became free in time") from None
                connection = whole = self._idle.take() or within(deadline, self._connect, _disconnect)
            else:
                connection = whole = self._take_given(deadline)
            reply = self._exchange(connection, command, deadline)
            return [reply, *(self._exchange(connection, each, deadline) for each in more)] if more else reply
        except ResponseError:
            raise
        except BaseException:
            whole = None
            if connection is not None:
                connection.disconnect()  # a reply that comes late must not answer the next command
                self._disconnect_idle()
            raise
        finally:
            if permit:
                self._free.put(None)  # first of all, and here: a signal handler's exception is not to come before it
            if not self._owned:
                self._give_back(connection)
            elif whole is not None:
                self._idle.put(whole)
            if self._idle.closed:
                self._disconnect_idle()

    @staticmethod
    def _exchange(connection: Any, command: tuple[Any, ...], deadline: float) -> Any:
        connection.send_packed_command(_packed(command))
        patience = getattr(connection, "socket_timeout", None)
        if patience is None or patience > deadline - time.monotonic():
            if not connection.can_read(timeout=max(0.001, deadline - time.monotonic())):
                raise RedisTimeoutError("no reply in time")
        return connection.read_response(disable_decoding=True)

    def _connect(self) -> Any:
        connection = self._idle.make()
        try:
            connection.connect()
        except BaseException:
            connection.disconnect()
            raise
        return connection

    def _give_back(self, connection: Any | None) -> None:
        if connection is not None:
            self._pool.release(connection)

    def _disconnect_idle(self) -> None:
        for connection in self._idle.drain():
            connection.disconnect()

    def _take_given(self, deadline: float) -> Any:
        pool = self._pool
        try:
            if getattr(pool, "_available_connections", True):
                return pool.get_connection(*self._named)
            # The client's own retries and timeouts may take minutes.
            return within(deadline, lambda: pool.get_connection(*self._named), pool.release)
        except RedisError:
            raise
        except BaseException:  # redis-py keeps a handshake that a signal has ended as if it were complete
            _disconnect_given(pool)
            raise

    async def senders(self, deadline: float) -> Sequence[Send]:
        return [self.send]

    async def sleep(self, pause: float) -> None:
        if pause:
            time.sleep(pause)

    def close(self) -> None:
        if self._owned:
            self._idle.closed = True
            self._disconnect_idle()

    async def aclose(self) -> None:
        self.close()

    def after_fork(self) -> None:
        self._idle.forget()
        self._free = _permits()


async def _drop(connection: Any) -> None:
    """Disconnect at once: a connection by TLS that is closed waits for the other side, maybe beyond its loop's end."""
    writer = getattr(connection, "_writer", None)
    await connection.disconnect(nowait=True)
    if writer is not None:
        writer.transport.abort()


class AsyncLink:
    """One connection for each command; those that we make belong to the event loop they were made in."""

    waiter = TaskWaiter

    def __init__(self, make: Callable[[], Any], *, owned: bool, timeout: float) -> None:
        """`make` makes the pool: once for each loop one that connections are made after, or the client's own."""
        self._patience = timeout / 2  # two tries fit into the deadline, so that one lost reply is asked for again
        self._given = None if owned else make()
        self._named = () if owned else _named(self._given)
        self._loops: PerLoop[tuple[_Idle, asyncio.Semaphore]] = PerLoop(
            lambda: (_Idle(make()), asyncio.Semaphore(_CONNECTIONS)), self._close
        )
        if not owned:
            _given_pools.add(self._given)

    async def send(self, command: tuple[Any, ...], deadline: float, *more: tuple[Any, ...]) -> Any:
        left = max(0.0, deadline - time.monotonic())
        if self._given is not None:
            async with asyncio.timeout(min(left, self._patience)):
                return await self._send_given(self._given, command, more)
        idle, free = await self._loops.get()
        async with asyncio.timeout(left if free.locked() else min(left, self._patience)):
            async with free:
                connection = idle.take() or idle.make()
                try:
                    if not connection.is_connected:
                        await connection.connect()
                    return await self._exchange(connection, command, more)
                except ResponseError:
                    raise
                except BaseException:
                    # Neither a late reply nor a handshake that was cancelled must serve the next command.
                    await _drop(connection)
                    await self._disconnect(idle)
                    raise
                finally:
                    idle.put(connection)
                    if idle.closed:
                        await self._disconnect(idle)

    @staticmethod
    async def _exchange(connection: Any, command: tuple[Any, ...], more: tuple[tuple[Any, ...], ...]) -> Any:
        await connection.send_packed_command(_packed(command))
        reply = await connection.read_response(disable_decoding=True)
        if not more:
            return reply
        replies = [reply]
        for each in more:
            await connection.send_packed_command(_packed(each))
            replies.append(await connection.read_response(disable_decoding=True))
        return replies

    async def _send_given(self, pool: Any, command: tuple[Any, ...], more: tuple[tuple[Any, ...], ...]) -> Any:
        try:
            connection = await pool.get_connection(*self._named)
        except RedisError:
            raise
        except BaseException:
            await _disconnect_given(pool)
            raise
        try:
            return await self._exchange(connection, command, more)
        except ResponseError:
            raise
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    @staticmethod
    async def _disconnect(idle: _Idle) -> None:
        for connection in idle.drain():
            await _drop(connection)

    async def _close(self, made: tuple[_Idle, asyncio.Semaphore]) -> None:
        made[0].closed = True
        await self._disconnect(made[0])

    async def senders(self, deadline: float) -> Sequence[Send]:
        return [self.send]

    async def sleep(self, pause: float) -> None:
        await asyncio.sleep(pause)

    def close(self) -> None:
        pass

    async def aclose(self) -> None:
        await self._loops.aclose()


def _disconnect_given(pool: Any) -> Any:
    """Disconnect what is idle in a pool of redis-py."""
    try:
        return pool.disconnect(inuse_connections=False)
    except TypeError:  # the blocking pool of redis-py 5.0 knows all or none; whoever is cut off asks again
        return pool.disconnect()


_given_pools: weakref.WeakSet[Any] = weakref.WeakSet()
"""Pools of ready-made asynchronous clients: unlike its blocking ones, redis-py's go on with the parent's connections."""
_links: weakref.WeakSet[SyncLink] = weakref.WeakSet()
_parents: list[Any] = []
"""A parent process's connections, kept from being finalized here: that could write to its sockets."""


def _after_fork() -> None:
    for link in list(_links):
        link.after_fork()
    for pool in list(_given_pools):
        _parents.append((getattr(pool, "_available_connections", None), list(getattr(pool, "_in_use_connections", ()))))
        pool.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
