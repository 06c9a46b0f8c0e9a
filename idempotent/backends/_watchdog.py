"""Deadlines for drivers that have none: a thread that shuts a socket when its time is over.

A frozen PostgreSQL keeps acknowledging packets, so neither `statement_timeout` nor `tcp_user_timeout` ends the wait.
Shutting the socket does: the driver, sync or async, finds the connection closed.
"""

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Watchdog", "within"]

C = TypeVar("C")

_LINGER = 2.0
"""Seconds the thread outlives the last command."""


class Watchdog:
    """Watches any number of sockets with one thread, which runs only while there are some."""

    def __init__(self) -> None:
        self._reset()
        _all.add(self)

    def _reset(self) -> None:
        self._lock = threading.RLock()  # entered directly, as a Condition's own methods are written in Python
        self._changed = threading.Condition(self._lock)
        self._watched: dict[object, tuple[float, int]] = {}
        self._thread: threading.Thread | None = None
        self._wakes = 0.0

    def watch(self, descriptor: int | None, deadline: float) -> object:
        """Shut the socket `descriptor` at monotonic `deadline`, unless `leave` has got what this returns by then.

        None watches nothing. Raises OSError if there can be no thread.
        """
        if descriptor is None:
            return None
        mark = object()
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._watch, name="idempotent-watchdog", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise OSError(f"no deadline can be kept: {error}") from error
                self._thread = thread
            self._watched[mark] = (deadline, descriptor)
            if deadline < self._wakes:
                self._changed.notify()
        return mark

    def leave(self, mark: object) -> None:
        """The socket is not watched any more: when this returns, it has been shut or never will be."""
        with self._lock:
            self._watched.pop(mark, None)

    @contextmanager
    def watching(self, descriptor: int | None, deadline: float) -> Iterator[None]:
        """Shut the socket `descriptor` if the body lasts beyond monotonic `deadline`; None: watch nothing."""
        mark = self.watch(descriptor, deadline)
        try:
            yield
        finally:
            self.leave(mark)

    def _watch(self) -> None:
        idle = False
        while True:
            with self._changed:
                now = time.monotonic()
                if self._watched:
                    idle = False
                elif idle:
                    self._thread = None
                    return
                else:
                    idle = True
                for mark, (deadline, descriptor) in list(self._watched.items()):
                    if deadline <= now:
                        self._watched.pop(mark, None)
                        # Under the lock: the body cannot end meanwhile and leave the number to another socket.
                        _shut(descriptor)
                first = min((deadline for deadline, _ in self._watched.values()), default=now + _LINGER)
                self._wakes = min(first, now + _LINGER)
                self._changed.wait(max(0.0, self._wakes - now))


def within(
    deadline: float, make: Callable[[], C], close: Callable[[C], object], then: Callable[[C], None] | None = None
) -> C:
    """The connection that `make` gives on a thread of its own, and `then` takes on this one; closed if that is too late.

    Raises what these raise, TimeoutError when monotonic `deadline` passes first, OSError if there can be no thread.
    """
    future: Future[C] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            if error.__cause__ is None and not error.__suppress_context__:
                # Raised again on the waiting thread, it gets the context of what is handled there.
                error.__cause__ = error.__context__
            future.set_exception(error)

    def close_late(done: "Future[C]") -> None:
        if done.exception() is None:
            close(done.result())

    try:
        try:
            threading.Thread(target=run, name="idempotent-connect", daemon=True).start()
        except RuntimeError as error:
            raise OSError(f"no connection can be made: {error}") from error
        connection = future.result(max(0.0, deadline - time.monotonic()))
        if then is not None:
            then(connection)
    except BaseException:  # a signal's, too, at any moment
        future.add_done_callback(close_late)
        raise
    return connection


def _shut(descriptor: int) -> None:
    try:
        copy = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # closed already
        return
    with copy:
        try:
            copy.shutdown(socket.SHUT_RDWR)
        except OSError:  # not connected any more
            pass


_all: weakref.WeakSet[Watchdog] = weakref.WeakSet()


def _after_fork() -> None:
    for watchdog in list(_all):
        watchdog._reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
