"""The one subscription connection of a process: a thread that hears Redis's messages and wakes waiters of any colour."""

import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import redis.connection
import redis.retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from idempotent._signals import Signals, TaskWaiter, ThreadWaiter

__all__ = ["Listener", "listening_connection"]

_LINGER = 2.0
"""Seconds a subscription, and in the end the connection, outlives its last waiter: the next one is often near."""
_QUIET = 15.0
"""Seconds of silence after which the server is asked whether it is still there."""
_REFUSED = 30.0
"""Seconds for which a refused subscription is not asked for again; waiters poll meanwhile."""

_SHARED = ("host", "port", "path", "db", "username", "password", "credential_provider", "client_name")


def listening_connection(pool: Any, timeout: float) -> Callable[[], Any] | None:
    """How to make a blocking connection to where `pool`, of either colour, connects; None: it cannot be told."""
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
    return lambda: kind(**options)


class Listener:
    """Subscriptions of this process on one connection, made when the first waiter comes.

    The thread owns the connection. Waiters leave requests and wake it; it wakes them when their channel is subscribed
    and when a message comes. When the connection breaks everyone is woken: whoever still waits asks again.
    """

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._reset()
        _listeners.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # the collector may end a lost task's wait while this thread holds it
        self._signals = Signals()
        self._acknowledged = Signals()
        self._waiting: dict[str, int] = {}
        self._left: dict[str, float] = {}
        """Channels without waiters, and when they are given up (monotonic seconds)."""
        self._asked: set[str] = set()
        self._heard: set[str] = set()
        self._thread: threading.Thread | None = None
        self._bell: socket.socket | None = None
        self._refused_until = 0.0
        self._closing = False

    def hears(self, channel: str) -> bool:
        """Whether messages of `channel` are heard at this moment."""
        return channel in self._heard

    async def join(self, channel: str, waiter: ThreadWaiter | TaskWaiter, timeout: float) -> bool:
        """Have `waiter` woken by messages of `channel`; whether it is subscribed, after at most `timeout` seconds."""
        self._signals.add(channel, waiter)
        ack = type(waiter)()
        self._acknowledged.add(channel, ack)
        try:
            with self._lock:
                self._waiting[channel] = self._waiting.get(channel, 0) + 1
                self._left.pop(channel, None)
                if channel in self._heard:
                    return True
                if time.monotonic() < self._refused_until:
                    return False
                self._asked.add(channel)
                self._ring()
                if self._thread is None:
                    return False
            await ack.wait(timeout)
        finally:
            self._acknowledged.discard(channel, ack)
        return channel in self._heard

    def leave(self, channel: str, waiter: ThreadWaiter | TaskWaiter) -> None:
        """`waiter` waits no longer."""
        self._signals.discard(channel, waiter)
        with self._lock:
            count = self._waiting.get(channel, 0) - 1
            if count > 0:
                self._waiting[channel] = count
            elif count == 0:
                del self._waiting[channel]
                self._left[channel] = time.monotonic() + _LINGER

    def close(self) -> None:
        """End the thread and its connection; waiters are woken. A later waiter starts anew."""
        with self._lock:
            thread = self._thread
            if thread is None:
                return
            self._closing = True
            self._ring()
        if thread is not threading.current_thread():
            thread.join(5)

    def _ring(self) -> None:
        if self._thread is None:
            self._closing = False
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            theirs.setblocking(False)
            thread = threading.Thread(target=self._listen, args=(ours,), name="idempotent-listener", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: waiters poll
                ours.close()
                theirs.close()
                return
            self._bell, self._thread = theirs, thread
        elif self._bell is not None:
            try:
                self._bell.send(b"!")
            except BlockingIOError:  # full: it has rung
                pass

    def _listen(self, bell: socket.socket) -> None:
        connection: Any = None
        try:
            connection = self._connect()
            connection.connect()
            with selectors.DefaultSelector() as selector:
                selector.register(bell, selectors.EVENT_READ)
                selector.register(connection._sock, selectors.EVENT_READ, connection)
                self._serve(connection, selector, bell)
        except ResponseError:  # no permission: neither now nor in a moment
            self._refused_until = time.monotonic() + _REFUSED
        except Exception:  # noqa: S110  whatever broke the connection: the waiters are told, and ask again
            pass
        finally:
            with self._lock:
                self._thread = None
                theirs, self._bell = self._bell, None
                self._heard.clear()
                self._asked.clear()
                self._left.clear()
            bell.close()
            if theirs is not None:
                theirs.close()
            if connection is not None:
                connection.disconnect()
            self._acknowledged.notify_all()
            self._signals.notify_all()

    def _serve(self, connection: Any, selector: selectors.BaseSelector, bell: socket.socket) -> None:
        heard = time.monotonic()
        pinged = False
        while True:
            with self._lock:
                now = time.monotonic()
                asked, self._asked = self._asked - self._heard, set()
                over = [channel for channel, at in self._left.items() if at <= now]
                for channel in over:
                    del self._left[channel]
                    self._heard.discard(channel)
                if self._closing or not (asked or self._waiting or self._left):
                    return
            if asked:
                connection.send_command("SUBSCRIBE", *asked)
            if over:
                connection.send_command("UNSUBSCRIBE", *over)
            for key, _ in selector.select(_LINGER):
                if key.data is None:
                    bell.recv(4096)
                    continue
                heard, pinged = time.monotonic(), False
                self._handle(connection.read_response(disable_decoding=True, disconnect_on_error=False))
                while connection.can_read(timeout=0):
                    self._handle(connection.read_response(disable_decoding=True, disconnect_on_error=False))
            silent = time.monotonic() - heard
            if silent > 2 * _QUIET:
                return
            if silent > _QUIET and not pinged:
                pinged = True
                connection.send_command("PING", check_health=False)

    def _handle(self, reply: Any) -> None:
        kind, channel = reply[0], reply[1]
        text = channel.decode() if isinstance(channel, bytes) else ""
        if kind == b"subscribe":
            with self._lock:
                self._heard.add(text)
            self._acknowledged.notify(text)
        elif kind == b"message":
            self._signals.notify(text)


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _after_fork() -> None:
    for listener in list(_listeners):
        listener._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
