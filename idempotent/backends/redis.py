"""Records in Redis (6.2 or newer) or Valkey: one server, one that sentinels choose, or a cluster.

One key per record, one Lua script per command (in `lua/`, each the transcription of its function in `_machine`), one
round trip each. Key and pub/sub channel of a record are the same string: prefix, colon, record id.

**Replicas.** Redis answers before its replicas have what it wrote, so a failover can lose what was answered. What that
costs, command by command, when the new primary has an older record, or none:

- a claim: another call is granted the key while the first one runs, and with a clock that is behind, under a token that
  is no higher. The one loss that lets two run at once, and why `replicas=` is there;
- an outcome: the record is running again, nobody renews it, and its lease ends. It is as if the runner had died after
  the effect, and `on_crash` decides;
- a renewal: the lease ends earlier than its owner believes. It was confirmed for its first length, and an owner that
  lives renews it at the new primary well before that; so renewals are not confirmed;
- a release or a forget: the record is back. A lease ends, an outcome is replayed once more: never a second run.

With `replicas=n` an answer on which somebody acts is given only when `n` replicas have the record: Granted, the DONE of
an outcome, and Settled. A `WAIT` behind the command would not do. A claim that is sent again is granted without a write,
and a record that is replayed was written by another connection, perhaps by a process that died before its replicas had
it; but `WAIT` counts from the last write of its own connection, and says yes to one that only read (seen with Valkey 9;
Redis 7.0 counts from the last command). So `confirm.lua` writes the record once more, as it is, in front of the `WAIT`:
replication is one stream, and whoever has that write has all before it. It replies which record it found, as it need
not have met the server that answered the command.

So a replay is as lasting as the outcome that its runner was told was stored. What is not confirmed is
BackendUnavailable: a claim is then taken back by the flow that sent it, an outcome is sent again until the lease is over
and then marked as not stored. `peek`, `scan` and the like show what the primary has.

A failover keeps what n replicas confirmed if one of these is the next primary. Sentinels and clusters choose the replica
that has most, among those that they can reach.
"""

import asyncio
import copy
import hashlib
import math
import os
import sys
import time
import weakref
from collections.abc import AsyncIterator
from functools import cached_property, lru_cache
from importlib.resources import files
from random import random
from typing import Any, ClassVar

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
    STEPS,
    Answer,
    Busy,
    Claim,
    Expired,
    Granted,
    Mismatched,
    Record,
    RecordId,
    Row,
    StateName,
    Unknown,
    describe,
    settled_in,
    unpack,
)
from idempotent.backends._coloured import Coloured
from idempotent.backends._redis_links import Link, Send, is_refused
from idempotent.backends._redis_sources import servers_of
from idempotent.backends.base import Copies, Heed, micros, poll
from idempotent.errors import BackendError, BackendUnavailable
from idempotent.events import logger

__all__ = ["RedisBackend"]

_PLACE = 5.0
"""Seconds for which a place in a lock's line is kept after it was last asked for."""

_CONFIRMED = 0.8
"""Part of a command's time in which replicas must confirm it: a claim that they do not is taken back in the rest."""

_LEAVING = 0.5
"""Seconds that a waiter who gives up takes at the longest to leave the line."""

_OPEN = (b"R", b"W", b"U")
"""What stands in a record that is not settled."""

_digits = b"%d".__mod__
"""A whole number as it is sent. hiredis 3.5 would take the number itself, but crashes if a signal comes meanwhile."""
_TOMBSTONE = _digits(TOMBSTONE)

_ANSWERS = {1: Answer.DONE, 2: Answer.STALE, 3: Answer.GONE}

# redis-py makes classes of some error codes and cuts them off the text; others stay in the text.
_TRANSIENT = (BusyLoadingError, ClusterDownError, TryAgainError)
_TRANSIENT_CODES = ("LOADING", "BUSY ", "TRYAGAIN", "CLUSTERDOWN", "MASTERDOWN")
"""Error replies after which the same command may be answered."""

_OUT = (AuthenticationError, AuthorizationError, NoPermissionError, OutOfMemoryError, ReadOnlyError)
_OUT_CODES = ("OOM", "READONLY", "MISCONF", "NOREPLICAS", "NOAUTH", "WRONGPASS", "NOPERM", "DENIED", "max number of")
"""Error replies of a server that does not serve us, now or for good."""
_UNGRANTED = "The user executing the script"
"""How Redis 7.0 says that a user may not give a command that a script gives; later ones say it as of any command."""


class _Script:
    """Parts in Lua files, one behind the other."""

    def __init__(self, *names: str) -> None:
        folder = files("idempotent.backends") / "lua"
        self.source = b"\n".join((folder / f"{name}.lua").read_bytes() for name in ("get", *names))
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()

    @cached_property
    def sharded(self) -> "_Script":
        """The same for a cluster, where a message of a key is heard at the key's own node."""
        twin = copy.copy(self)
        twin.source = self.source.replace(b"'PUBLISH'", b"'SPUBLISH'")
        twin.sha = hashlib.sha1(twin.source, usedforsecurity=False).hexdigest()
        return twin


_CLAIM = _Script("settled", "record", "claim", "store", "reply")
_RENEW = _Script("record", "owner", "renew", "store", "reply")
_SETTLE = _Script("record", "owner", "settle", "wake", "reply")
_RELEASE = _Script("record", "release", "store", "wake", "reply")
_READ = _Script("record", "read")
_FORGET = _Script("record", "forget", "store", "wake", "reply")
_WAIT = _Script("record", "wait")
_LEAVE = _Script("record", "leave", "wake", "reply")
_CONFIRM = _Script("record", "confirm")


class _Heeding:
    """Who is to know of each forget; it waits on a channel as one waiter."""

    def __init__(self) -> None:
        self.copies: weakref.WeakValueDictionary[int, Copies] = weakref.WeakValueDictionary()
        """By id: a WeakSet cannot be gone through while a thread adds some."""

    def wake(self) -> None:
        """Something was forgotten, or may have been."""
        for reference in self.copies.valuerefs():
            copies = reference()
            if copies is not None:
                copies.clear()


class RedisBackend(Coloured[Link]):
    """Records in Redis or Valkey.

    Args:
        server: a URL, whose backend serves sync and async callers, with its own pools: `redis://`, `rediss://` or
            `unix://` as redis-py reads them, `redis+sentinel://host:port,host:port/service/db` or
            `redis+cluster://host:port,host:port` (`rediss+...` by TLS); or a `redis.Redis` or `redis.asyncio.Redis`,
            whose backend serves callers of that colour. So does that of a `RedisCluster` or of a client that a
            Sentinel's `master_for` made; its settings are used, and connections are made anew.
        prefix: what all keys and channels begin with; None: the URL's `prefix=`, else "idem".
        timeout: seconds a command may take, re-sends included; None: the URL's `timeout=`, else 5.
        replicas: how many replicas must have a claim or an outcome before it counts; None: the URL's `replicas=`, else 0.

    Raises:
        TypeError, ValueError: an argument, or an option in the URL, is wrong.
    """

    name = "redis"
    _takes: ClassVar[dict[str, str]] = {"sync": "a redis.Redis", "async": "a redis.asyncio.Redis"}

    def __init__(
        self,
        server: "str | redis.Redis | redis.asyncio.Redis | redis.RedisCluster | redis.asyncio.RedisCluster",
        *,
        prefix: str | None = None,
        timeout: float | None = None,
        replicas: int | None = None,
    ) -> None:
        options: dict[str, str] = {}
        if isinstance(server, str):
            server, options = split_url(server, ("prefix", "timeout", "replicas"))
        self.timeout = timeout_of(timeout, options)
        self.replicas = _replicas_of(replicas, options)
        self.prefix = options.get("prefix", "idem") if prefix is None else prefix
        if not isinstance(self.prefix, str) or not 0 < len(self.prefix) <= 200:
            raise ValueError(f"prefix must be text of 1 to 200 characters, not {self.prefix!r}")
        self._servers = servers_of(server, self.timeout)
        self._heeding = _Heeding()
        self._id = os.urandom(6).hex()
        self._places: dict[str, tuple[str, int, float]] = {}
        """By lock: who stands in its line, in which place, and when it was last asked for (monotonic seconds)."""
        self._connect(self._servers.links)

    @property
    def _forgotten(self) -> str:
        """The channel on which a forget is told of."""
        return f"{self.prefix}:forgotten"

    def heed(self, copies: Copies) -> Heed | None:
        listener, channel = self._servers.one, self._forgotten
        if listener is None:
            return None
        self._heeding.copies[id(copies)] = copies

        def session() -> int:
            listener.watch(channel, self._heeding)
            return listener.session(channel)

        return session

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
        ask: tuple[Any, ...] = (attempt, fingerprint, _terms(lease, keep, takeover, owner))
        turn = self._turn if rid.text in self._places else b""
        if over is not None or turn:
            ask += (b"" if over is None else _digits(over), turn)
        budget = min(self.timeout, lease)
        sent = time.monotonic()
        reply = await self._run(_CLAIM, rid, ask, budget)
        if self.replicas:
            await self._confirm_claim(rid, reply, sent, budget)
        if type(reply) is int:
            self._places.pop(rid.text, None)
            return Granted(reply)
        if type(reply) is bytes:
            seconds, rest, raw = reply.split(b" ", 2)
            return settled_in(raw, int(seconds) * 1_000_000 + int(rest))
        kind = reply[0]
        if kind == 1:
            self._places.pop(rid.text, None)
            return Granted(reply[1], bool(reply[2]))
        if kind == 2:
            return Busy(reply[1], reply[2] / 1e6)
        if kind == 4:
            return Unknown(reply[1], reply[2] / 1e6)
        if kind == 6:
            return Expired(reply[1], reply[2] / 1e6)
        return Mismatched(reply[1] / 1e6, reply[2])

    async def renew(self, rid: RecordId, *, attempt: bytes, token: int, lease: float) -> Answer:
        ask = (attempt, _digits(token), _digits(micros(lease)))
        return _ANSWERS[await self._run(_RENEW, rid, ask, min(self.timeout, lease))]

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
        past: tuple[bytes, ...] = (),
    ) -> Answer:
        sent = time.monotonic()
        ask = (attempt, _digits(token), state, _milliseconds(ttl), codec, body, *past)
        answer = _ANSWERS[await self._run(_SETTLE, rid, ask, self.timeout)]
        if self.replicas and answer is Answer.DONE:
            await self._confirm(rid, token, sent, self.timeout, is_outcome=True)
        return answer

    async def release(self, rid: RecordId, *, attempt: bytes, token: int | None, unknown: bool = False) -> Answer:
        ask: tuple[bytes, ...] = (attempt, b"" if token is None else _digits(token), _TOMBSTONE)
        if unknown:
            ask += (b"1",)
        return _ANSWERS[await self._run(_RELEASE, rid, ask, self.timeout)]

    async def read(self, rid: RecordId) -> Record | None:
        found = _found(await self._run(_READ, rid, (), self.timeout))
        return None if found is None else describe(rid, *found)

    async def forget(self, rid: RecordId, *, force: bool = False) -> Record | None:
        attempt = os.urandom(ATTEMPT_BYTES)
        # On a cluster it would be another node's message; and of steps there are no copies.
        told = b"" if self._servers.is_cluster or rid.space == STEPS else self._forgotten
        ask = (attempt, b"1" if force else b"0", _TOMBSTONE, told)
        reply = await self._run(_FORGET, rid, ask, self.timeout)
        found = _found(reply)
        if found is None:
            return None
        if len(reply) > 3:
            logger.warning(
                "the record is forgotten, but Redis does not let this user tell of it: copies in other processes"
                " (near_cache=) that could listen may go on answering until their ttl. Grant +publish, and the channels &%s:*",
                self.prefix,
            )
        row, _ = machine.on_forget(found[0], attempt, found[1], force=force)
        return None if row is None else describe(rid, row, found[1])

    async def changed(self, rid: RecordId, *, token: int, timeout: float) -> None:
        async def runs() -> bool:
            record = await self.read(rid)
            return record is not None and record.state == "running" and record.token == token

        async def stands_in_line() -> bool:
            turn = self._turn
            stands, place, seen = self._places.get(rid.text, ("", 0, 0.0))
            # A parent process's place stays the parent's.
            mine = b"" if stands != turn or time.monotonic() - seen > _PLACE else _digits(place)
            found = await self._run(_WAIT, rid, (_digits(token), turn, mine), self.timeout)
            if found is None:
                return False
            self._places[rid.text] = turn, found, time.monotonic()
            return True

        link, channel = self._link, self._key(rid)
        listener = self._servers.listener(channel)
        if listener is None:
            await poll(runs, link.sleep, timeout)
        elif rid.space == LOCKS:
            channel = f"{channel}#{self._turn}"
            await listener.changed(channel, link.waiter(), stands_in_line, link.sleep, timeout, self.timeout)
            self._forget_places()
        else:
            await listener.changed(channel, link.waiter(), runs, link.sleep, timeout, self.timeout)

    async def pass_on(self, rid: RecordId) -> None:
        if rid.space == LOCKS and self._servers.listener(self._key(rid)) is not None:
            await self._run(_LEAVE, rid, (self._turn,), min(self.timeout, _LEAVING))

    def _forget_places(self) -> None:
        """Forget places in lines that nobody came back for."""
        if len(self._places) > 1000:
            now = time.monotonic()
            for text, (_, _, seen) in list(self._places.items()):
                if now - seen > _PLACE:
                    self._places.pop(text, None)

    async def scan(self, *, state: StateName | None = None, namespace: str | None = None) -> AsyncIterator[Record]:
        escaped = "".join(f"\\{letter}" if letter in "*?[]\\^" else letter for letter in self.prefix)
        for send in await self._link.senders(time.monotonic() + self.timeout):
            async for record in self._scan(send, f"{escaped}:c*", state, namespace):
                yield record

    async def _scan(
        self, send: Send, pattern: str, state: StateName | None, namespace: str | None
    ) -> AsyncIterator[Record]:
        cursor: Any = b"0"
        while True:
            ask = ("SCAN", cursor, "MATCH", pattern, "COUNT", b"500")
            cursor, keys = await self._send(ask, self.timeout, send)
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
        self._servers.close()

    async def aclose(self) -> None:
        await self._servers.aclose()

    async def _confirm_claim(self, rid: RecordId, reply: Any, sent: float, budget: float) -> None:
        """As `_confirm`, of what a claim was told; nothing is to be confirmed where it was told to wait or refused."""
        if isinstance(reply, bytes):
            await self._confirm(rid, unpack(reply.split(b" ", 2)[2]).token, sent, budget, is_outcome=True)
        elif not isinstance(reply, list):
            await self._confirm(rid, reply, sent, budget, is_outcome=False)
        elif reply[0] == 1:
            await self._confirm(rid, reply[1], sent, budget, is_outcome=False)

    async def _confirm(self, rid: RecordId, token: int, sent: float, budget: float, *, is_outcome: bool) -> None:
        """Return when `replicas` replicas have the record that was granted, or settled, under `token`.

        Raises BackendUnavailable when they have not in most of the `budget` seconds from `sent` on (monotonic), or the
        record is not there any more.
        """
        confirmed, until = 0, sent + _CONFIRMED * budget
        while (left := until - time.monotonic()) > 0:
            patience = max(1, int(1000 * min(left, self.timeout / 4)))
            wait = ("WAIT", _digits(self.replicas), _digits(patience))
            found, confirmed = await self._run(_CONFIRM, rid, (), sent + budget - time.monotonic(), wait)
            if not found or found[1] != token or (found[0] not in _OPEN) is not is_outcome:
                raise BackendUnavailable("Redis lost the record before its replicas had it")
            if confirmed >= self.replicas:
                return
        raise BackendUnavailable(f"{confirmed} of {self.replicas} replicas confirmed the record in time")

    async def _run(
        self, script: _Script, rid: RecordId, ask: tuple[Any, ...], budget: float, *more: tuple[Any, ...]
    ) -> Any:
        if self._servers.is_cluster:
            script = script.sharded
        key = self._key(rid)
        keys = (b"2", key, f"{key}:line") if rid.space == LOCKS else (b"1", key)
        command = ("EVALSHA", script.sha, *keys, *ask)
        deadline, handled = time.monotonic() + budget, sys.exception()
        try:
            return await self._link.send(command, deadline, *more)
        except (TimeoutError, RedisError, OSError) as error:
            return await self._again(error, handled, command, deadline, budget, *more, script=script)

    async def _send(self, command: tuple[Any, ...], budget: float, send: Send) -> Any:
        deadline, handled = time.monotonic() + budget, sys.exception()
        try:
            return await send(command, deadline)
        except (TimeoutError, RedisError, OSError) as error:
            return await self._again(error, handled, command, deadline, budget, send=send)

    async def _again(
        self,
        error: Exception,
        handled: BaseException | None,
        command: tuple[Any, ...],
        deadline: float,
        budget: float,
        *more: tuple[Any, ...],
        script: _Script | None = None,
        send: Send | None = None,
    ) -> Any:
        """The reply to a `command` that failed, sent again while that can help and its `budget` seconds last; with `more`,
        of all of them.
        """
        pause = 0.0
        while True:
            if script is not None and isinstance(error, NoScriptError) and command[0] != "EVAL":
                command = ("EVAL", script.source, *command[2:])
            else:
                await self._pause(error, handled, deadline, budget, pause)
                pause = min(0.25, pause * 2 or 0.005)
            try:
                return await (send or self._link.send)(command, deadline, *more)
            except (TimeoutError, RedisError, OSError) as failure:
                error = failure

    async def _pause(
        self, error: Exception, handled: BaseException | None, deadline: float, budget: float, pause: float
    ) -> None:
        """Let about `pause` seconds pass before the next try, if there is to be one after this error."""
        if not _transient(error):
            raise _failure(error) from error
        if is_refused(error, handled):
            raise BackendUnavailable(f"Redis refuses connections: {error}") from error
        if deadline - time.monotonic() <= pause:
            raise BackendUnavailable(
                f"Redis did not confirm within {budget:g} s: {str(error) or 'no reply'}"
            ) from error
        await self._link.sleep(pause * (0.5 + random() / 2))


@lru_cache(256)
def _terms(lease: float, keep: float | None, takeover: bool, owner: bytes) -> bytes:
    """What each claim of one function, or of one process on a lock, says alike, as its script reads it."""
    return b"%d,%b,%d,%b" % (micros(lease), b"" if keep is None else _digits(micros(keep)), takeover, owner)


def _milliseconds(seconds: float) -> bytes:
    return _digits(max(1, math.ceil(seconds * 1000)))


def _replicas_of(given: Any, options: dict[str, str]) -> int:
    """How many replicas `replicas=` asks for, from the argument or else from the URL's options; none by default."""
    if given is None and "replicas" in options:
        if not options["replicas"].isdecimal():
            raise ValueError(f"replicas= in the URL must be a whole number, not {options['replicas']!r}")
        given = int(options["replicas"])
    if given is None:
        return 0
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError(f"replicas must be a whole number, not {given!r}")
    if not 0 <= given <= 1000:
        raise ValueError(f"replicas must be 0 or more, and not {given}")
    return given


def _found(reply: Any) -> tuple[Row, int] | None:
    """The row that was found, and the server's time."""
    if not reply:
        return None
    raw, now, left = reply[:3]
    row = unpack(raw)
    if row.state in SETTLED and left >= 0:
        end = now + max(1, left * 1000)  # in its last millisecond Redis says 0, and tells it to claims all the same
        row = row._replace(lease=max(1, end - (row.expires or 0))) if row.lease else row._replace(expires=end)
    return row, now


def _transient(error: Exception) -> bool:
    if isinstance(error, _OUT):
        return False
    if isinstance(error, ResponseError) and not isinstance(error, _TRANSIENT):
        return str(error).startswith(_TRANSIENT_CODES)
    return isinstance(error, (*_TRANSIENT, RedisConnectionError, RedisTimeoutError, OSError, asyncio.TimeoutError))


def _failure(error: Exception) -> BackendError:
    text = str(error)
    if "FOREIGN" in text or "WRONGTYPE" in text:
        return BackendError(
            f"the key holds no record of ours, so nothing ran and nothing was overwritten ({text});"
            " give the backend a prefix= of its own"
        )
    # A script's error names the line before the reason.
    if isinstance(error, NoPermissionError) or _UNGRANTED in text or "NOPERM" in text:
        return BackendUnavailable(
            f"Redis does not serve this: {text}. The user lacks a permission; `python -m idempotent doctor` says which"
        )
    if isinstance(error, _OUT) or any(code in text for code in _OUT_CODES):
        return BackendUnavailable(f"Redis does not serve this: {text}")
    return BackendError(f"Redis answered {text}")
