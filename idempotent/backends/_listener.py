"""The one subscription connection of a process: whoever hears what a server tells wakes waiters of any colour.

A thread owns the connection: it opens it, subscribes, sees to it that it is alive, and closes it. It also reads, unless
one thread alone waits: that one reads for itself, and is spared the time that one thread takes to wake another, which
is much of what handing over a lock costs.
"""

import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

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
    """A connection to listen on, used by one thread at a time. What it raises ends it. Each step says what came meanwhile."""

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
        """Read what the socket has; it has something."""
        ...

    def ping(self) -> Iterable[Heard]:
        """Have the server answer, in bounded time."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


def _bell() -> tuple[socket.socket, socket.socket]:
    """Its two ends: the one to ring, and the one to hear."""
    rings, hears = socket.socketpair()
    rings.setblocking(False)
    hears.setblocking(False)
    return rings, hears


def _ring(bell: socket.socket) -> None:
    try:
        bell.send(b"!")
    except BlockingIOError:  # full: it has rung
        pass


class _Line:
    """An open connection, and who reads from it."""

    def __init__(self, subscriber: Subscriber) -> None:
        self.subscriber = subscriber
        self.reader: ThreadWaiter | None = None
        """Whose thread reads for itself; None: the listener's thread does, if anybody waits."""
        self.thread_reads = False
        """Whether the listener's thread waits for what comes."""
        self.rest: Iterator[Heard] | None = None
        """What was read, or begun to, and has not been told."""
        self.heard_at = time.monotonic()
        self.failure: Exception | None = None
        """What broke it in the hands of a reader."""
        self._turn = threading.Lock()
        self._turns = 0
        """Changes when somebody begins to use the subscriber, and when that one ends."""
        self._rings, self._hears = _bell()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._hears, selectors.EVENT_READ)
        self._selector.register(subscriber.fileno(), selectors.EVENT_READ, subscriber)

    def has_come(self, seconds: float) -> int | None:
        """Wait for something to read, or for the reader to be called. None: there is nothing; else what `receive` takes."""
        turns = self._turns
        if self.rest is not None:
            return -1
        found = [key.data for key, _ in self._selector.select(seconds)]
        if None in found:
            self._hears.recv(4096)
        return turns if self.subscriber in found else None

    def call_reader(self) -> None:
        """Have the reader look whether it has been woken."""
        if self.reader is not None:
            _ring(self._rings)

    def receive(
        self, tell: Callable[[Heard], None], until: ThreadWaiter | None = None, since: int | None = None
    ) -> None:
        """Tell what has come; when `until` is woken, the rest is left for later. `since`: what `has_come` gave."""
        with self._turn:
            if self.rest is None:
                # Whoever had the turn since may have read what was there, and a read would block until more comes.
                if since != self._turns and not any(key.data for key, _ in self._selector.select(0)):
                    return
                self.rest = iter(self.subscriber.receive())
            self._turns += 1
            try:
                for heard in self.rest:
                    tell(heard)
                    if until is not None and until.is_woken:  # to look whether there is more would cost it time
                        break
                else:
                    self.rest = None
            finally:
                self._turns += 1
            self.heard_at = time.monotonic()

    def take(self, step: Callable[[], Iterable[Heard]], tell: Callable[[Heard], None]) -> None:
        """Take another step of the subscriber, while nobody else uses it, and tell what came meanwhile."""
        with self._turn:
            self._turns += 1
            try:
                for heard in step():
                    tell(heard)
            finally:
                self._turns += 1

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._selector.close()
        self._rings.close()
        self._hears.close()
        self.subscriber.close()


class Listener:
    """Subscriptions of this process on one connection, made when the first waiter comes.

    Waiters leave requests and wake the thread; they are woken when their channel is subscribed and when a message comes.
    When the connection breaks everyone is woken: whoever still waits asks again.
    """

    def __init__(self, connect: Callable[[], Subscriber]) -> None:
        self.connect = connect
        """Makes a connection to listen on. Raises Refused."""
        self._sessions = 0
        """So many connections have been made."""
        self._reset()
        _listeners.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # the collector may end a lost task's wait while this thread holds it
        self._changed = threading.Condition(self._lock)
        self._signals = Signals()
        self._acknowledged = Signals()
        self._waiting: dict[str, int] = {}
        self._waiters = 0
        """The sum of `_waiting`."""
        self._left: dict[str, float] = {}
        """Channels without waiters, and when they are given up (monotonic seconds)."""
        self._asked: set[str] = set()
        self._heard: set[str] = set()
        self._thread: threading.Thread | None = None
        self._bell: socket.socket | None = None
        self._line: _Line | None = None
        self._refused_until = 0.0
        self._closing = False
        self._watched: set[str] = set()
        """Channels that are listened to for good."""
        self._ask_again_at = 0.0

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
                if left <= 0 or await self._wait(waiter, min(left, pause)):
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
                self._waiters += 1
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

    def watch(self, channel: str, woken: Any) -> None:
        """Listen to `channel` for good: `woken.wake()` is called for each message, and whenever some may have been missed.

        Returns at once; `session` tells when it is heard. To be called now and then, as a broken line is not mended
        unasked.
        """
        now = time.monotonic()
        if channel in self._heard or now < max(self._ask_again_at, self._refused_until):
            return
        with self._lock:
            self._ask_again_at = now + _POLL
            if channel not in self._watched:
                self._watched.add(channel)
                self._signals.add(channel, woken)
                self._waiting[channel] = self._waiting.get(channel, 0) + 1
                self._waiters += 1
                self._left.pop(channel, None)
            self._asked.add(channel)
            self._ring()

    def session(self, channel: str) -> int:
        """A number that stays the same as long as no message of a watched channel can have been missed; 0: it is not heard."""
        return self._sessions if channel in self._heard else 0

    def leave(self, channel: str, waiter: ThreadWaiter | TaskWaiter) -> None:
        """`waiter` waits no longer."""
        self._signals.discard(channel, waiter)
        with self._lock:
            count = self._waiting.get(channel, 0) - 1
            if count < 0:
                return
            self._waiters -= 1
            if count:
                self._waiting[channel] = count
            else:
                del self._waiting[channel]
                self._left[channel] = time.monotonic() + _LINGER

    async def _wait(self, waiter: ThreadWaiter | TaskWaiter, timeout: float) -> bool:
        """Wait until `waiter` is woken, at most `timeout` seconds; whether it was. Somebody reads meanwhile."""
        until = time.monotonic() + timeout
        line = self._line
        if line is not None:
            try:
                if (reader := self._begin_reading(line, waiter)) is not None:
                    self._read(line, reader, until)
            finally:
                try:
                    self._stop_reading(line, waiter)
                except BaseException:  # a signal handler's: who has gone must not be taken for reading
                    self._stop_reading(line, waiter)
                    raise
        return await waiter.wait(max(0.0, until - time.monotonic()))

    def _begin_reading(self, line: _Line, waiter: ThreadWaiter | TaskWaiter) -> ThreadWaiter | None:
        """`waiter`, if its thread is to read what comes; None: it is seen to that another thread does."""
        with self._lock:
            if line is not self._line or line.reader is not None or line.failure is not None:
                return None
            if self._waiters == 1 and isinstance(waiter, ThreadWaiter):
                line.reader = waiter
            if line.thread_reads != (line.reader is None):
                self._ring()  # the listener's thread is to begin, or to leave it to this one
            return line.reader

    def _read(self, line: _Line, waiter: ThreadWaiter, until: float) -> None:
        """Read until `waiter` is woken, or monotonic `until` has come, or the line breaks."""
        while not waiter.is_woken and (left := until - time.monotonic()) > 0:
            has_come = line.has_come(left)
            if line.reader is not waiter:  # a signal handler has forked, and this is the child
                return
            if has_come is not None:
                try:
                    line.receive(self._tell, waiter, has_come)
                except BaseException as error:  # with what was read and not told, wake-ups are lost
                    self._break(line, error)
                    if isinstance(error, Exception):
                        return
                    raise

    def _break(self, line: _Line, error: BaseException) -> None:
        with self._lock:
            line.failure = error if isinstance(error, Exception) else OSError("interrupted while reading")
            if line is self._line:
                self._ring()

    def _stop_reading(self, line: _Line, waiter: ThreadWaiter | TaskWaiter) -> None:
        if line.reader is not waiter:
            return
        with self._lock:
            line.reader = None
            self._changed.notify_all()
            if line is self._line:
                if self._waiters > 1:
                    self._ring()
                return
        line.close()  # it has ended meanwhile, and may have been left open for this reader

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
            theirs, ours = _bell()
            thread = threading.Thread(target=self._listen, args=(ours,), name="idempotent-listener", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no more threads: waiters poll
                ours.close()
                theirs.close()
                return
            self._bell, self._thread = theirs, thread
        elif self._bell is not None:
            _ring(self._bell)

    def _listen(self, bell: socket.socket) -> None:
        subscriber: Subscriber | None = None
        line: _Line | None = None
        try:
            subscriber = self.connect()
            line = _Line(subscriber)
            with selectors.DefaultSelector() as selector:
                selector.register(bell, selectors.EVENT_READ)
                self._sessions += 1
                self._line = line
                self._serve(line, selector, bell)
        except Refused:
            self._refused_until = time.monotonic() + _REFUSED
        except Exception:  # noqa: S110  whatever broke the connection: the waiters are told, and ask again
            pass
        finally:
            with self._lock:
                self._thread = self._line = None
                theirs, self._bell = self._bell, None
                self._heard.clear()
                self._asked.clear()
                self._left.clear()
            bell.close()
            if theirs is not None:
                theirs.close()
            self._acknowledged.notify_all()
            self._signals.notify_all()
            if line is not None:
                self._close(line)
            elif subscriber is not None:
                subscriber.close()

    def _close(self, line: _Line) -> None:
        """Close a line that has ended, once its reader has left it; a reader that is held up closes it itself."""
        with self._lock:
            line.call_reader()
            if not self._changed.wait_for(lambda: line.reader is None, _LINGER):
                return
        line.close()

    def _serve(self, line: _Line, selector: selectors.BaseSelector, bell: socket.socket) -> None:
        subscriber = line.subscriber
        while True:
            with self._lock:
                now = time.monotonic()
                asked, self._asked = self._asked - self._heard, set()
                over = [channel for channel, at in self._left.items() if at <= now]
                for channel in over:
                    del self._left[channel]
                    self._heard.discard(channel)
                if line.failure is not None:
                    raise line.failure
                if self._closing or not (asked or self._waiting or self._left):
                    return
                reads = line.reader is None and self._waiters > 0
                if reads and not line.thread_reads:
                    selector.register(subscriber.fileno(), selectors.EVENT_READ, subscriber)
                elif line.thread_reads and not reads:
                    selector.unregister(subscriber.fileno())
                line.thread_reads = reads
            if asked:
                line.take(partial(subscriber.subscribe, asked), self._tell)
            if over:
                line.take(partial(subscriber.unsubscribe, over), self._tell)
            if reads and line.rest is not None:
                line.receive(self._tell)
            for key, _ in selector.select(_LINGER):
                if key.data is None:
                    bell.recv(4096)
                else:
                    line.receive(self._tell)
            if time.monotonic() - line.heard_at > _QUIET:
                line.take(subscriber.ping, self._tell)
                line.heard_at = time.monotonic()
            line.call_reader()  # it may have been told

    def _tell(self, heard: Heard) -> None:
        is_confirmation, channel = heard
        if is_confirmation:
            with self._lock:
                self._heard.add(channel)
            self._acknowledged.notify(channel)
        else:
            self._signals.notify(channel)


_parents: list[object] = []
"""Lines of a parent process, kept from being finalized here: that could write to its sockets."""
_listeners: weakref.WeakSet[Listener] = weakref.WeakSet()


def _after_fork() -> None:
    for listener in list(_listeners):
        if (line := listener._line) is not None:
            line.reader = None
            _parents.append(line)
        listener._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
