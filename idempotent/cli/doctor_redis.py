"""What `doctor` looks at on Redis and Valkey. Each command that is tried changes nothing, as the key it names is absent."""

import contextlib
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from redis.exceptions import NoPermissionError, RedisError, ResponseError

from idempotent._record import LOCKS, RecordId
from idempotent.backends._listener import Refused
from idempotent.backends._redis_links import Send
from idempotent.backends._redis_nodes import NodesLink
from idempotent.backends.redis import RedisBackend
from idempotent.cli.verdict import Finding, Level, clock
from idempotent.errors import BackendError

__all__ = ["NEEDS", "examine"]

NEEDS: tuple[tuple[Level, str, tuple[str, ...]], ...] = (
    (
        "unsafe",
        "calls are refused, or cannot record their outcome",
        ("evalsha", "eval", "get", "set", "time", "select"),
    ),
    ("note", "peek, forget and explain are refused, and so is the command line", ("pttl", "scan", "hello")),
    ("note", "who waits for a call polls, and hears later; calls work", ("publish", "spublish", "ping")),
    ("note", "a call is refused while its key is moved to another node", ("asking",)),
    ("note", "nobody can wait for a lock; calls work", ("zadd", "zpopmin", "zrem", "pexpire")),
)
"""The commands that the user must be allowed, and what happens without them. Subscribing, WAIT and what finds the nodes
are tried where they are used."""


class _Denied(Exception):
    """The user may not send this command, or not with this key or channel."""


async def examine(backend: RedisBackend) -> list[Finding]:
    """Everything that can be found out about the server, or servers, of `backend`."""
    view: Any = backend.blocking()
    try:
        await view.read(RecordId("idempotent.doctor", "probe"))
    except BackendError as error:
        if not isinstance(error.__cause__, ResponseError):  # else it answers, if not as it should: see below
            remedy = "start it, or mend host, port, user, password or scheme (rediss for TLS) in the URL"
            return [Finding("reachable", "unsafe", str(error), "no call runs: each gets BackendUnavailable", remedy)]
    link = view._link
    if not isinstance(link, NodesLink):
        return await _Server(view, link.send, lambda _: True).findings()
    try:
        addresses = await link.addresses(time.monotonic() + backend.timeout)
    except RedisError as error:
        return [_unfound(error)]
    findings: list[Finding] = []
    for address in addresses:
        server = _Server(view, partial(link.send_to, address), partial(link.answers, address))
        name = f"{address[0]}:{address[1]}: " if len(addresses) > 1 else ""
        findings += [finding._replace(found=name + finding.found) for finding in await server.findings()]
    return findings


def _unfound(error: RedisError) -> Finding:
    """Why it is not known which nodes there are."""
    why = "calls are refused: nobody tells which node answers for their keys"
    if isinstance(error, NoPermissionError):
        remedy = (
            "+cluster|slots on a cluster; +role, and for the user of the sentinels +sentinel|get-master-addr-by-name"
        )
        return Finding("permissions", "unsafe", str(error), why, remedy)
    remedy = "bring its nodes, or its sentinels, up, and every slot to a node; a server of its own is redis://"
    return Finding("reachable", "unsafe", str(error), why, remedy)


class _Server:
    """One server that holds records.

    Args:
        backend: the blocking view.
        send: sends to this server.
        holds: whether a key is this server's.
    """

    def __init__(self, backend: Any, send: Send, holds: Callable[[str], bool]) -> None:
        self._backend = backend
        self._send = send
        self._is_cluster = backend._servers.is_cluster
        keys = (backend._key(RecordId("idempotent.doctor", f"probe {number}")) for number in range(100_000))
        # None is only where the node has lost its slots meanwhile, and is told by what it answers.
        self._key = next(filter(holds, keys), backend._key(RecordId("idempotent.doctor", "probe")))
        self._line = backend._key(RecordId("idempotent.doctor", "probe", LOCKS)) + ":line"

    async def _ask(self, *command: Any) -> Any:
        """The reply. Raises _Denied, or what redis-py raises."""
        try:
            texts = tuple(part if isinstance(part, bytes) else str(part) for part in command)
            return await self._send(texts, time.monotonic() + self._backend.timeout)
        except NoPermissionError as error:
            raise _Denied from error
        except ResponseError as error:
            if "NOPERM" in str(error) or "can't run this command" in str(error):
                raise _Denied from error
            raise

    async def findings(self) -> list[Finding]:
        """All of them; what fails on the way is one, too."""
        try:
            hello = await self._hello()
            found = [await self._round_trip(), _version(hello), *await self._clock(), *self._mode(hello)]
            info = await self._info()
            found += [*await self._persistence(info), *_eviction(info), *await self._replicas(info, hello)]
            found += [*await self._permissions(), *await self._writes(), *self._pubsub(), self._client()]
        except (RedisError, OSError) as error:
            words = str(error) or type(error).__name__
            return [Finding("reachable", "unsafe", f"it stopped answering: {words}", "", "look after the server")]
        return found

    async def _hello(self) -> dict[str, str]:
        try:
            reply = await self._ask("HELLO")
        except _Denied:
            return {}
        pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=False)
        return {key.decode(): value.decode() if isinstance(value, bytes) else str(value) for key, value in pairs}

    async def _info(self) -> dict[str, str] | None:
        """What INFO says; None: the user may not ask."""
        try:
            text = (await self._ask("INFO")).decode(errors="replace")
        except _Denied:
            return None
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    async def _config(self, name: str) -> str | None:
        """A setting; None: the user may not ask."""
        try:
            reply = await self._ask("CONFIG", "GET", name)
        except (_Denied, ResponseError):  # hosted servers know no CONFIG
            return None
        value = (
            reply.get(name.encode())
            if isinstance(reply, dict)
            else dict(zip(reply[::2], reply[1::2], strict=False)).get(name.encode())
        )
        return None if value is None else value.decode()

    async def _round_trip(self) -> Finding:
        times = []
        for _ in range(11):
            began = time.perf_counter()
            try:
                await self._ask("PING")
            except _Denied:
                pass
            times.append(time.perf_counter() - began)
        median = statistics.median(times)
        found = f"answers; a round trip takes {median * 1000:.1f} ms"
        if median > self._backend.timeout / 20:
            remedy = "put it nearer to the workers, or give a longer timeout= and lease"
            return Finding("reachable", "note", found, "a first call takes two, and commands have a deadline", remedy)
        return Finding("reachable", "ok", found)

    async def _clock(self) -> list[Finding]:
        try:
            before = time.time()
            seconds, micros = await self._ask("TIME")
            off = int(seconds) + int(micros) / 1e6 - (before + time.time()) / 2
        except _Denied:
            return []  # told among the permissions
        return [clock(off)]

    def _mode(self, hello: dict[str, str]) -> list[Finding]:
        if hello.get("mode") != "cluster" or self._is_cluster:
            return []
        remedy = "name it as a cluster, redis+cluster://, or use a server of its own"
        return [Finding("mode", "unsafe", "it is a node of a cluster", "keys of other nodes are refused", remedy)]

    async def _persistence(self, info: dict[str, str] | None) -> list[Finding]:
        if info is None:
            return [_unseen("persistence", "whether records outlive a restart")]
        if info.get("aof_enabled") == "1":
            if info.get("aof_last_write_status", "ok") != "ok":
                why = "records are not on disk, and writes may be refused"
                return [
                    Finding("persistence", "unsafe", "the append-only file cannot be written", why, "free its disk")
                ]
            sync = await self._config("appendfsync")
            found = f"append-only file, appendfsync {sync or 'not to be seen'}"
            if sync == "always":
                return [Finding("persistence", "ok", found)]
            if sync == "no":
                why = "if the machine dies, what the system had not written is lost: up to half a minute"
                return [Finding("persistence", "warning", found, why, "CONFIG SET appendfsync everysec, or always")]
            why = "a killed server loses nothing; if the machine itself dies, up to a second of records is lost"
            return [Finding("persistence", "note", found, why, "appendfsync always, where that second counts")]
        save = await self._config("save")
        remedy = "CONFIG SET appendonly yes, and the same in its configuration file"
        if save:
            why = "a crash loses every record since the last snapshot, and what it answered runs again"
            return [Finding("persistence", "warning", f"snapshots only (save {save})", why, remedy)]
        found = "none" if save is not None else "no append-only file; whether there are snapshots is not to be seen"
        why = "a restart loses every record, and every retry that comes after it runs again"
        return [Finding("persistence", "warning", found, why, remedy)]

    async def _replicas(self, info: dict[str, str] | None, hello: dict[str, str]) -> list[Finding]:
        role = (info or {}).get("role") or hello.get("role", "")
        if role in ("slave", "replica"):
            why = "every claim is refused (READONLY), so no call runs"
            return [Finding("replicas", "unsafe", "it is a read-only replica", why, "name the primary in the URL")]
        if info is None:
            return [_unseen("replicas", "whether a failover could lose records")]
        there, wanted = int(info.get("connected_slaves", 0)), self._backend.replicas
        if wanted:
            return [await self._waits(there, wanted)]
        if not there:
            return [Finding("replicas", "ok", "none, so no failover can lose a record; the machine is a single one")]
        why = "replicas are behind by a moment: a failover can lose a claim that was confirmed, and it runs again"
        remedy = "replicas=1 in the URL, so that claims and outcomes wait for a replica"
        return [Finding("replicas", "warning", f"{there} connected, and nothing waits for them", why, remedy)]

    async def _waits(self, there: int, wanted: int) -> Finding:
        try:
            confirmed = int(
                await self._ask("WAIT", wanted, int(500 * min(self._backend.timeout, 4.0)) if there >= wanted else 1)
            )
        except _Denied:
            return Finding(
                "replicas", "unsafe", "the user may not WAIT", "no claim is confirmed", "ACL SETUSER ... +wait"
            )
        found = f"{confirmed} of the {wanted} that replicas= asks for confirm"
        if confirmed < wanted:
            remedy = f"bring {wanted - confirmed} more up ({there} connected), or lower replicas="
            return Finding("replicas", "unsafe", found, "no claim is confirmed, so no call runs", remedy)
        return Finding("replicas", "ok", found)

    async def _permissions(self) -> list[Finding]:
        key, line, database = self._key, self._line, self._backend._servers.database
        tried: dict[str, tuple[Any, ...]] = {
            "evalsha": ("EVALSHA", "0" * 40, 1, key),
            "eval": ("EVAL", "return 1", 1, key),
            "get": ("GET", key),
            "set": ("SET", key, "", "XX", "PX", 1),
            "pttl": ("PTTL", key),
            "time": ("TIME",),
            "ping": ("PING",),
            "scan": ("SCAN", 0, "COUNT", 1),
            "hello": ("HELLO",),
            "zadd": ("ZADD", line, "XX", 0, "-"),
            "zpopmin": ("ZPOPMIN", line),
            "zrem": ("ZREM", line, "-"),
            "pexpire": ("PEXPIRE", line, 1),
        }
        if database:
            tried["select"] = ("SELECT", database)
        if self._is_cluster:
            tried |= {"spublish": ("SPUBLISH", key, ""), "asking": ("ASKING",)}
        else:
            tried["publish"] = ("PUBLISH", key, "")
        prefix, found = self._backend.prefix, []
        for level, why, names in NEEDS:
            missing = [name for name in names if name in tried and await self._is_denied(tried[name])]
            if missing:
                rules = " ".join(f"+{name}" for name in missing)
                remedy = f"ACL SETUSER <user> ~{prefix}:* &{prefix}:* {rules}"
                found.append(Finding("permissions", level, f"missing: {', '.join(missing)}", why, remedy))
        return found or [Finding("permissions", "ok", "every command that calls and locks need")]

    async def _is_denied(self, command: tuple[Any, ...]) -> bool:
        try:
            await self._ask(*command)
        except _Denied:
            return True
        except ResponseError:  # it was allowed, and answered otherwise: no such script, no memory, read-only
            return False
        return False

    async def _writes(self) -> list[Finding]:
        """Whether it takes writes at this moment: of a key that is not there, and stays so."""
        try:
            await self._ask("SET", self._key, "", "XX", "PX", 1)
        except _Denied:  # told among the permissions
            return []
        except ResponseError as error:
            text = str(error)
            if "read only replica" in text or "READONLY" in text:
                return []  # told among the replicas
            return [
                Finding("writes", "unsafe", f"refused: {text}", "every claim is refused, so no call runs", "mend that")
            ]
        return [Finding("writes", "ok", "taken")]

    def _pubsub(self) -> list[Finding]:
        listener = self._backend._servers.listener(self._key)
        if listener is None:
            return []
        try:
            with contextlib.closing(listener.connect()) as subscriber:
                subscriber.subscribe({self._key})
                list(subscriber.receive())
        except Refused as error:
            names = "+ssubscribe +sunsubscribe, of Redis 7 or newer" if self._is_cluster else "+subscribe +unsubscribe"
            remedy = f"ACL SETUSER <user> &{self._backend.prefix}:* {names}"
            return [Finding("pub/sub", "note", f"refused: {error}", "who waits polls, and hears later", remedy)]
        return [Finding("pub/sub", "ok", "subscribing is allowed")]

    def _client(self) -> Finding:
        return Finding(
            "client",
            "ok",
            f"a command is sent again for up to timeout={self._backend.timeout:g} s; redis-py's own re-sending is off",
        )


def _version(hello: dict[str, str]) -> Finding:
    server, version = hello.get("server", ""), hello.get("version", "")
    if not version:
        return Finding("version", "note", "not to be seen", "Redis 6.2 or newer is needed", "ACL SETUSER <user> +hello")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
    name = server.capitalize() or "Redis"
    if server == "redis" and numbers < (6, 2):
        why = "its scripts and SET lack what the protocol needs"
        return Finding("version", "unsafe", f"{name} {version}", why, "upgrade to Redis 6.2 or newer, or Valkey")
    return Finding("version", "ok", f"{name} {version}")


def _eviction(info: dict[str, str] | None) -> list[Finding]:
    if info is None:
        return [_unseen("eviction", "whether records are evicted before their time")]
    policy, limit = info.get("maxmemory_policy", ""), int(info.get("maxmemory", 0))
    used = int(info.get("used_memory", 0))
    remedy = "CONFIG SET maxmemory-policy noeviction, and the same in its configuration file"
    if policy == "noeviction":
        found = (
            "noeviction, no memory limit" if not limit else f"noeviction, {100 * used // limit} % of maxmemory in use"
        )
        if limit and used > 0.9 * limit:
            why = "once it is full new calls are refused: nothing runs twice, and nothing runs"
            return [Finding("eviction", "note", found, why, "raise maxmemory, or shorten ttl")]
        return [Finding("eviction", "ok", found)]
    if not limit:
        why = "without a limit nothing is evicted; as soon as somebody sets maxmemory, records are"
        return [Finding("eviction", "warning", f"{policy}, no memory limit yet", why, remedy)]
    why = "when memory is short the server drops records, and what they answered runs again"
    return [Finding("eviction", "unsafe", f"maxmemory-policy {policy}", why, remedy)]


def _unseen(check: str, what: str) -> Finding:
    remedy = "run doctor as a user with +info (and +config|get), or ask who runs the server"
    return Finding(check, "warning", "not to be seen: the user may not INFO", f"{what} is not known", remedy)
