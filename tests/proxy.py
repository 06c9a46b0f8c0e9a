"""A TCP proxy that loses bytes and connections on request."""

import asyncio
import contextlib
import fcntl
import socket
import struct
import sys
import termios
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Literal, Self

__all__ = ["Direction", "Proxy"]

Direction = Literal["up", "down"]
"""From client to server, or from server to client."""


class Proxy:
    """Forwards connections to `port` of 127.0.0.1 to a server, in a thread of its own, while its context lasts.

    Attributes:
        port: where it listens.
        refuse: set True to close new connections at once.
        fired: whether the last `cut` has happened.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = 0
        self.refuse = False
        self.fired = False
        self._target = (host, port)
        self._cut: tuple[Direction, int] | None = None
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._mute: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()

    def __enter__(self) -> Self:
        ready: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="proxy", daemon=True)
        self._thread.start()
        self.port = ready.result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._do(self._end.set)
        self._thread.join()

    @property
    def stall(self) -> bool:
        """Set True to hold all bytes back, connections open; set False to let them go."""
        return not self._flow.is_set()

    @stall.setter
    def stall(self, value: bool) -> None:
        self._do(self._flow.clear if value else self._flow.set)

    def cut(self, direction: Direction, after: int) -> None:
        """Reset, once, the connection that carries byte number `after` in this direction, counted over all from now.

        That byte is still forwarded, none after it. 0: none at all; the next byte to come is lost with its connection.
        """

        def arm() -> None:
            self._cut, self.fired = (direction, after), False

        self._do(arm)

    def mute(self) -> None:
        """Swallow what the server says on present connections from now on; they stay open, and new ones are forwarded."""
        self._do(lambda: self._mute.update(self._pairs))

    def retarget(self, port: int) -> None:
        """Send new connections to another port of the same host; present ones are reset."""
        self._target = (self._target[0], port)
        self.drop()

    def drop(self) -> None:
        """Reset all present connections."""
        self._do(self._drop)

    def _drop(self) -> None:
        for pair in self._pairs:
            _reset(*pair)

    def _do(self, action: Callable[[], None]) -> None:
        """Run `action` in the loop, and wait until it has taken effect."""

        async def run() -> None:
            action()
            await asyncio.sleep(0)  # An aborted socket is closed in the loop's next round.

        asyncio.run_coroutine_threadsafe(run(), self._loop).result()

    async def _main(self, ready: Future[int]) -> None:
        self._loop, self._flow, self._end = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()
        self._flow.set()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        ready.set_result(server.sockets[0].getsockname()[1])
        await self._end.wait()
        server.close()
        self._drop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            return _reset(writer)
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            return _reset(writer)
        pair = (writer, far_writer)
        self._pairs.add(pair)
        try:
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump("up", reader, far_writer, pair))
                pumps.create_task(self._pump("down", far_reader, writer, pair))
        except* OSError:  # One side was reset, so the other is.
            _reset(*pair)
        finally:
            self._pairs.discard(pair)
            self._mute.discard(pair)
            for end in pair:
                end.close()

    async def _pump(
        self,
        direction: Direction,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        pair: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        writer.transport.set_write_buffer_limits(0)  # So that drain() waits until all is with the system.
        while data := await reader.read(65536):
            await self._flow.wait()
            if direction == "down" and pair in self._mute:
                continue
            last = False
            if self._cut and self._cut[0] == direction:
                left = self._cut[1]
                last = len(data) >= left
                self._cut = None if last else (direction, left - len(data))
                data = data[:left]
            writer.write(data)
            await writer.drain()
            if last:
                await _arrival(writer)
                _reset(*pair)
                self.fired = True
                return
        await self._flow.wait()
        with contextlib.suppress(OSError):
            writer.write_eof()


# What the system has not sent yet. On the loopback what was sent has arrived; waiting until it is acknowledged, as other
# systems must, takes 40 ms where the other side expects more.
_UNSENT = 0x894B if sys.platform == "linux" else termios.TIOCOUTQ


async def _arrival(writer: asyncio.StreamWriter) -> None:
    """Wait, a second at most, until the other side's system has what was sent, which a reset would discard."""
    end: socket.socket = writer.get_extra_info("socket")
    for _ in range(1000):
        if not struct.unpack("i", fcntl.ioctl(end.fileno(), _UNSENT, bytes(4)))[0]:
            break
        await asyncio.sleep(0.001)


def _reset(*writers: asyncio.StreamWriter) -> None:
    """Close abruptly: RST instead of FIN, bytes under way are lost."""
    for writer in writers:
        end: socket.socket = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
