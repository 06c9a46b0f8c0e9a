"""The one subscription connection of a process: a thread that hears what a server tells and wakes waiters of any colour."""

import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from idempotent._signals import Signals, TaskWaiter, ThreadWaiter
from idempotent.backends.base import poll

__all__ = ["Heard", "Listener", "Refused", "Subscriber"]

_LINGER = 2.0
"""Seconds a subscription, and in the end the connection, outlives its last waiter: the next one is often near."""
_QUIET = 15.0
"""Seconds of silence after which the server is asked whether it is still there."""
_REFUSED = 30.0
"""Seconds for which a refused subscription is not asked for again; waiters poll meanwhile."""
_POLL = 1.0
"""Seconds a waiter that could not subscribe polls before it tries to subscribe again."""


class Refused(Exception):
    """The server will not let us listen: neither now nor in a moment."""


Heard = tuple[bool, str]
"""What came from the server: whether a subscription is confirmed (True) or a message came (False), and its channel."""


class Subscriber(Protocol):
    """A connection to listen on, used by one thread. Whatever it raises ends it. Each step says what came meanwhile."""

    def fileno(self) -> int:
        """Its socket."""
        ...

    def subscribe(self, channels: set[str]) -> Iterable[Heard]:
        """Ask for the messages of `channels`."""
        ...

    def unsubscribe(self, channels: list[str]) -> Iterable[Heard]:
        """Ask for them no longer."""
        ...

    def receive(self) -> Iterable[Heard]:
        """Read what the socket has."""
        ...

    def ping(self) -> Iterable[Heard]:
        """Have the server answer, in bounded time."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class Listener:
    """Subscriptions of this process on one connection, made when the first waiter comes.

    The thread owns the connection. Waiters leave requests and wake it; it wakes them when their channel is subscribed
    and when a message comes. When the connection breaks everyone is woken: whoever still waits asks again.
    """

    def __init__(self, connect: Callable[[], Subscriber]) -> None:
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

    async def changed(
        self,
        channel: str,
        waiter: ThreadWaiter | TaskWaiter,
        runs: Callable[[], Awaitable[bool]],
        sleep: Callable[[float], Awaitable[None]],
        timeout: float,
        patience: float,
    ) -> None:
        """Return when `runs()` may be true no longer, or after `timeout` seconds; no change is missed.

        Subscribes within `patience` seconds, looks, then waits for a message; where it cannot subscribe it polls.
        """
        until = time.monotonic() + timeout
        try:
            joined = await self.join(channel, waiter, min(timeout, patience))
            # A message can be lost on its way, so look again now and then.
            pause = 1.0
            while joined and self.hears(channel) and await runs():
                left = until - time.monotonic()
                if left <= 0 or await waiter.wait(min(left, pause)):
                    return
                pause = 2.0
            if joined and self.hears(channel):
                return
        finally:
            self.leave(channel, waiter)
        await poll(runs, sleep, min(_POLL, until - time.monotonic()))

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
        subscriber: Subscriber | None = None
        try:
            subscriber = self._connect()
            with selectors.DefaultSelector() as selector:
                selector.register(bell, selectors.EVENT_READ)
                selector.register(subscriber.fileno(), selectors.EVENT_READ, subscriber)
                self._serve(subscriber, selector, bell)
        except Refused:
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
            if subscriber is not None:
                subscriber.close()
            self._acknowledged.notify_all()
            self._signals.notify_all()

    def _serve(self, subscriber: Subscriber, selector: selectors.BaseSelector, bell: socket.socket) -> None:
        heard = time.monotonic()
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
                self._tell(subscriber.subscribe(asked))
            if over:
                self._tell(subscriber.unsubscribe(over))
            for key, _ in selector.select(_LINGER):
                if key.data is None:
                    bell.recv(4096)
                else:
                    heard = time.monotonic()
                    self._tell(subscriber.receive())
            if time.monotonic() - heard > _QUIET:
                self._tell(subscriber.ping())
                heard = time.monotonic()

    def _tell(self, heard: Iterable[Heard]) -> None:
        for is_confirmation, channel in heard:
            if is_confirmation:
                with self._lock:
                    self._heard.add(channel)
                self._acknowledged.notify(channel)
            else:
                self._signals.notify(channel)


_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _after_fork() -> None:
    for listener in list(_listeners):
        listener._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
