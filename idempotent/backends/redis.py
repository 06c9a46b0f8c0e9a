"""Records in Redis (6.2 or newer) or Valkey: `redis://`, `rediss://`, `unix://`, or a ready-made client.

One key per record, one Lua script per command (in `lua/`, each the transcription of its function in `_machine`), one
round trip each. Key and pub/sub channel of a record are the same string: prefix, colon, record id.
"""

import asyncio
import copy
import errno
import hashlib
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine
from importlib.resources import files
from random import random
from typing import Any

import redis
import redis.asyncio
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from idempotent import _machine as machine
from idempotent._machine import TOMBSTONE
from idempotent._options import split_url, timeout_of
from idempotent._record import (
    ATTEMPT_BYTES,
    LOCKS,
    SETTLED,
    Answer,
    Busy,
    Claim,
    Expired,
    Granted,
    Mismatched,
    Record,
    RecordId,
    Row,
    Settled,
    State,
    StateName,
    Unknown,
    describe,
    unpack,
)
from idempotent.backends._listener import Listener
from idempotent.backends._redis_links import AsyncLink, Link, SyncLink, sync_pool
from idempotent.backends.base import Backend, micros, poll
from idempotent.backends.pubsub import subscriber_of
from idempotent.errors import BackendError, BackendUnavailable

__all__ = ["RedisBackend"]

_PLACE = 5.0
"""Seconds for which a place in a lock's line is kept after it was last asked for."""

_LEAVING = 0.5
"""Seconds that a waiter who gives up takes at the longest to leave the line."""

_ANSWERS = {1: Answer.DONE, 2: Answer.STALE, 3: Answer.GONE}

# redis-py makes classes of some error codes and cuts them off the text; others stay in the text.
_TRANSIENT = (BusyLoadingError, ClusterDownError, TryAgainError)
_TRANSIENT_CODES = ("LOADING", "BUSY ", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")
"""Error replies after which the same command may be answered."""

_OUT = (AuthenticationError, AuthorizationError, NoPermissionError, OutOfMemoryError, ReadOnlyError)
_OUT_CODES = ("OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "max number of")
"""Error replies of a server that does not serve us, now or for good."""


class _Script:
    """A Lua file, with the shared ones that it needs before it: a server makes their functions anew at each call."""

    def __init__(self, *names: str, at_once: tuple[str, ...] = ()) -> None:
        folder = files("idempotent.backends") / "lua"
        self.source = b"\n".join((folder / f"{name}.lua").read_bytes() for name in ("get", *at_once, "record", *names))
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()


_CLAIM = _Script("lease", "claim", at_once=("settled",))
_RENEW = _Script("owner", "lease", "renew")
_SETTLE = _Script("owner", "wake", "settle")
_RELEASE = _Script("wake", "release")
_READ, _FORGET = _Script("read"), _Script("wake", "forget")
_WAIT, _LEAVE = _Script("wait"), _Script("wake", "leave")


class RedisBackend(Backend):
    """Records in Redis or Valkey.

    Args:
        server: a URL, whose backend serves sync and async callers, with its own pools; or a `redis.Redis` or
            `redis.asyncio.Redis`, whose backend serves callers of that colour.
        prefix: what all keys and channels begin with; None: the URL's `prefix=`, else "idem".
        timeout: seconds a command may take, re-sends included; None: the URL's `timeout=`, else 5.

    Raises:
        TypeError, ValueError: an argument, or an option in the URL, is wrong.
    """

    name = "redis"

    def __init__(
        self,
        server: "str | redis.Redis | redis.asyncio.Redis",
        *,
        prefix: str | None = None,
        timeout: float | None = None,
    ) -> None:
        options: dict[str, str] = {}
        if isinstance(server, str):
            server, options = split_url(server, ("prefix", "timeout"))
        self.timeout = timeout_of(timeout, options)
        self.prefix = options.get("prefix", "idem") if prefix is None else prefix
        if not isinstance(self.prefix, str) or not 0 < len(self.prefix) <= 200:
            raise ValueError(f"prefix must be text of 1 to 200 characters, not {self.prefix!r}")
        links: dict[str, Link]
        if isinstance(server, str):
            pool: Any = sync_pool(server, self.timeout)
            links = {"sync": SyncLink(pool, owned=True), "async": AsyncLink(server)}
        else:
            pool = getattr(server, "connection_pool", None)
            if isinstance(server, redis.asyncio.Redis):
                links = {"async": AsyncLink(pool)}
            elif isinstance(server, redis.Redis):
                links = {"sync": SyncLink(pool, owned=False)}
            else:
                raise TypeError(f"RedisBackend takes a URL, a redis.Redis or a redis.asyncio.Redis, not {server!r}")
        subscribe = subscriber_of(pool, self.timeout)
        self._listener = None if subscribe is None else Listener(subscribe)
        self._id = os.urandom(6).hex()
        self._places: dict[str, tuple[Any, float]] = {}
        """By lock: this process's place in its line, and when it was last asked for (monotonic seconds)."""
        self._links = links
        self._colour, self._link = next(iter(links.items()))
        self._views: dict[str, RedisBackend] = {self._colour: self}

    def blocking(self) -> Backend:
        return self._view("sync")

    def asynchronous(self) -> Backend:
        return self._view("async")

    def within(self, seconds: float) -> Backend:
        if seconds >= self.timeout:
            return self
        view = copy.copy(self)  # the two share everything else
        view.timeout = seconds
        return view

    def _view(self, colour: str) -> "RedisBackend":
        view = self._views.get(colour)
        if view is None:
            if colour not in self._links:
                raise BackendError(
                    f"this RedisBackend was made from a client for {self._colour} code and cannot serve {colour} functions;"
                    f" give it a {'redis.Redis' if colour == 'sync' else 'redis.asyncio.Redis'}, or a URL, which serves both"
                )
            view = copy.copy(self)  # the two share everything but the link
            view._colour, view._link = colour, self._links[colour]
            self._views[colour] = view
        return view

    def _key(self, rid: RecordId) -> str:
        # A lock's key and that of its line are of one slot: the braces are what Redis Cluster looks at.
        return f"{self.prefix}:{{{rid.text}}}" if rid.space == LOCKS else f"{self.prefix}:{rid.text}"

    @property
    def _turn(self) -> str:
        """Who waits in a lock's line: this backend in this process, on behalf of the first who waits in it."""
        return f"{self._id}.{os.getpid()}"

    async def claim(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        fingerprint: bytes,
        lease: float,
        keep: float | None,
        takeover: bool,
        over: int | None = None,
        owner: bytes = b"",
    ) -> Claim:
        ask = (
            attempt,
            fingerprint,
            micros(lease),
            b"" if keep is None else micros(keep),
            b"1" if takeover else b"0",
            b"" if over is None else over,
            owner,
            self._turn if rid.text in self._places else b"",
        )
        reply = await self._run(_CLAIM, rid, ask, min(self.timeout, lease))
        if type(reply) is int:
            self._places.pop(rid.text, None)
            return Granted(reply)
        kind = reply[0]
        if kind == 1:
            self._places.pop(rid.text, None)
            return Granted(reply[1], bool(reply[2]))
        if kind == 2:
            return Busy(reply[1], reply[2] / 1e6)
        if kind == 3:
            row = unpack(reply[2])
            age = max(0, reply[1] - row.since) / 1e6
            return Settled(row.state is State.FAILED, row.token, age, row.codec, row.body)
        if kind == 4:
            return Unknown(reply[1], reply[2] / 1e6)
        if kind == 6:
            return Expired(reply[1], reply[2] / 1e6)
        return Mismatched(reply[1] / 1e6, reply[2])

    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        return _ANSWERS[await self._run(_RENEW, rid, (attempt, token, micros(lease)), min(self.timeout, lease))]

    async def complete(
        self,
        rid: RecordId,
        *,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        remember: float = 0.0,
    ) -> Answer:
        past = (_milliseconds(remember),) if remember else ()
        return await self._settle(rid, b"C", attempt, token, codec, body, ttl, past)

    async def fail(self, rid: RecordId, *, attempt: bytes, token: int, codec: str, body: bytes, ttl: float) -> Answer:
        return await self._settle(rid, b"F", attempt, token, codec, body, ttl)

    async def _settle(
        self,
        rid: RecordId,
        state: bytes,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: float,
        past: tuple[int, ...] = (),
    ) -> Answer:
        ask = (attempt, token, state, _milliseconds(ttl), codec, body, *past)
        return _ANSWERS[await self._run(_SETTLE, rid, ask, self.timeout)]

    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        ask = (attempt, b"" if token is None else token, b"1" if unknown else b"0", TOMBSTONE)
        return _ANSWERS[await self._run(_RELEASE, rid, ask, self.timeout)]

    async def read(self, rid: RecordId) -> Record | None:
        found = _found(await self._run(_READ, rid, (), self.timeout))
        return None if found is None else describe(rid, *found)

    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        attempt = os.urandom(ATTEMPT_BYTES)
        found = _found(await self._run(_FORGET, rid, (attempt, b"1" if force else b"0", TOMBSTONE), self.timeout))
        if found is None:
            return None
        row, _ = machine.on_forget(found[0], attempt, found[1], force=force)
        return None if row is None else describe(rid, row, found[1])

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        async def runs() -> bool:
            record = await self.read(rid)
            return record is not None and record.state == "running" and record.token == token

        async def stands_in_line() -> bool:
            place, seen = self._places.get(rid.text, (b"", 0.0))
            if time.monotonic() - seen > _PLACE:
                place = b""
            place = await self._run(_WAIT, rid, (token, self._turn, place), self.timeout)
            if place is None:
                return False
            self._places[rid.text] = place, time.monotonic()
            return True

        link, listener, channel = self._link, self._listener, self._key(rid)
        if listener is None:
            await poll(runs, link.sleep, timeout)
        elif rid.space == LOCKS:
            channel = f"{channel}#{self._turn}"
            await listener.changed(channel, link.waiter(), stands_in_line, link.sleep, timeout, self.timeout)
            self._forget_places()
        else:
            await listener.changed(channel, link.waiter(), runs, link.sleep, timeout, self.timeout)

    async def pass_on(self, rid: RecordId) -> None:
        if self._listener is not None and rid.space == LOCKS:
            await self._run(_LEAVE, rid, (self._turn,), min(self.timeout, _LEAVING))

    def _forget_places(self) -> None:
        """Forget places in lines that nobody came back for."""
        if len(self._places) > 1000:
            now = time.monotonic()
            for text, (_, seen) in list(self._places.items()):
                if now - seen > _PLACE:
                    self._places.pop(text, None)

    async def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        escaped = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in self.prefix)
        cursor: Any = b"0"
        while True:
            cursor, keys = await self._send(("SCAN", cursor, "MATCH", f"{escaped}:c*", "COUNT", 500), self.timeout)
            for key in keys:
                try:
                    rid = RecordId.parse(key.decode(errors="replace")[len(self.prefix) + 1 :])
                    record = await self.read(rid) if namespace in (None, rid.namespace) else None
                except BackendUnavailable:
                    raise
                except BackendError:  # another's, under our prefix
                    continue
                if record is not None and state in (None, record.state):
                    yield record
            if cursor in (b"0", 0):
                return

    async def purge(self, limit: int = 1000) -> int:
        return 0  # Redis drops what is past its retention

    def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        link = self._links.get("sync")
        if isinstance(link, SyncLink):
            link.close()

    async def aclose(self) -> None:
        self.close()
        link = self._links.get("async")
        if isinstance(link, AsyncLink):
            await link.aclose()

    def _run(self, script: _Script, rid: RecordId, ask: tuple[Any, ...], budget: float) -> Coroutine[Any, Any, Any]:
        key = self._key(rid)
        keys = (2, key, f"{key}:line") if rid.space == LOCKS else (1, key)
        return self._send(("EVALSHA", script.sha, *keys, *ask), budget, script)

    async def _send(self, command: tuple[Any, ...], budget: float, script: _Script | None = None) -> Any:
        """The reply to `command`, sent again while that can help and `budget` seconds last."""
        deadline = time.monotonic() + budget
        pause = 0.0
        while True:
            try:
                return await self._link.send(command, deadline)
            except NoScriptError as error:
                if script is None or command[0] == "EVAL":
                    raise _failure(error) from error
                command = ("EVAL", script.source, *command[2:])
                continue
            except (TimeoutError, RedisError, OSError) as error:
                if not _transient(error):
                    raise _failure(error) from error
                if _refused(error):
                    raise BackendUnavailable(f"Redis refuses connections: {error}") from error
                left = deadline - time.monotonic()
                if left <= pause:
                    raise BackendUnavailable(
                        f"Redis did not confirm within {budget:g} s: {str(error) or 'no reply'}"
                    ) from error
            await self._link.sleep(pause * (0.5 + random() / 2))
            pause = min(0.25, pause * 2 or 0.005)


def _milliseconds(seconds: float) -> int:
    return max(1, math.ceil(seconds * 1000))


def _found(reply: Any) -> tuple[Row, int] | None:
    """The row that was found, and the server's time."""
    if not reply:
        return None
    raw, now, left = reply
    row = unpack(raw)
    if row.state in SETTLED and left >= 0:
        end = now + left * 1000
        row = row._replace(lease=max(1, end - (row.expires or 0))) if row.lease else row._replace(expires=end)
    return row, now


def _transient(error: Exception) -> bool:
    if isinstance(error, _OUT):
        return False
    if isinstance(error, ResponseError) and not isinstance(error, _TRANSIENT):
        return str(error).startswith(_TRANSIENT_CODES)
    return isinstance(error, (*_TRANSIENT, RedisConnectionError, RedisTimeoutError, OSError, asyncio.TimeoutError))


def _refused(error: BaseException | None) -> bool:
    """Whether nobody listens at the address: asking again at once does not help."""
    while error is not None:
        if isinstance(error, (ConnectionRefusedError, FileNotFoundError, socket.gaierror)):
            return True
        if isinstance(error, OSError) and error.errno in (errno.ECONNREFUSED, errno.ENOENT):
            return True
        if isinstance(error, OSError) and "Connect call failed" in str(error):  # asyncio, for several addresses
            return "refused" in str(error) or str(errno.ECONNREFUSED) in str(error)
        error = error.__cause__ or error.__context__
    return False


def _failure(error: Exception) -> BackendError:
    text = str(error)
    if "FOREIGN" in text or "WRONGTYPE" in text:
        return BackendError(
            f"the key holds no record of ours, so nothing ran and nothing was overwritten ({text});"
            " give the backend a prefix= of its own"
        )
    # A script's error names the line before the reason.
    if isinstance(error, _OUT) or any(code in text for code in _OUT_CODES):
        return BackendUnavailable(f"Redis does not serve this: {text}")
    return BackendError(f"Redis answered {text}")
