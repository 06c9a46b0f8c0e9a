"""The floors that ratios are to: the commands that nobody can do without, on the store's usual client, as people use it.

Its pool is in them, so they are no lower bound: who keeps connections outside of the pool may come below.

- Redis: a replay is one GET; a first call is two EVALSHA, of a script that claims a key and of one that compares its
  token and puts the result there. In async code redis-py guards each read with a timer of its own, which is in the floor;
  "no time-out" is without.
- PostgreSQL and SQLite: the statements that we send ourselves, by SQLAlchemy Core in autocommit, each on a connection that
  an engine with its default pool lends for it. "held connection" has them all on one that never goes back, which is how
  ours keeps its own. "plain" are an INSERT, an UPDATE and a SELECT by primary key: the same, without lease and fingerprint.
- local: `cachetools.cached` on a TTLCache with a lock, whose key is what our decorator makes of a call, by the code that
  it uses itself: key and fingerprint. "hashkey" is the same with the key that cachetools makes by default.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import cachetools
import redis
import redis.asyncio
import sqlalchemy as sa
from cachetools.keys import hashkey
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from benchmarks._work import BODY, TTL, Contender, charge
from idempotent import idempotent
from idempotent._record import State
from idempotent.backends._statements import Statements, records_table

__all__ = ["FLOORS"]

_CLAIM = "return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0"
_SETTLE = """if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1"""


def _check(reply: Any, wanted: Any) -> None:
    if reply != wanted:
        raise RuntimeError(f"the floor got {reply!r} instead of {wanted!r}")


def _redis(url: str) -> dict[str, Contender]:
    client: Any = redis.Redis.from_url(url)
    claim, settle = client.script_load(_CLAIM), client.script_load(_SETTLE)

    def first(order_id: str) -> None:
        token = os.urandom(8)
        _check(client.evalsha(claim, 1, "floor:" + order_id, token, 30_000), 1)
        _check(client.evalsha(settle, 1, "floor:" + order_id, token, BODY, TTL * 1000), 1)

    def replay(order_id: str) -> None:
        _check(client.get("floor:" + order_id), BODY)

    return {"redis-py, pool": Contender(first, replay)}


def _redis_async(url: str) -> dict[str, Contender]:
    def on(client: Any, name: str) -> Contender:
        shas: list[str] = []

        async def first(order_id: str) -> None:
            if not shas:
                shas.extend([await client.script_load(_CLAIM), await client.script_load(_SETTLE)])
            token = os.urandom(8)
            _check(await client.evalsha(shas[0], 1, name + order_id, token, 30_000), 1)
            _check(await client.evalsha(shas[1], 1, name + order_id, token, BODY, TTL * 1000), 1)

        async def replay(order_id: str) -> None:
            _check(await client.get(name + order_id), BODY)

        return Contender(first, replay)

    return {
        "redis.asyncio, pool": on(redis.asyncio.Redis.from_url(url), "floor:"),
        "redis.asyncio, no time-out": on(redis.asyncio.Redis.from_url(url, socket_timeout=None), "bare:"),
    }


class _Records:
    """Our own statements and their values, on a table beside ours."""

    def __init__(self, dialect: str, table: str) -> None:
        self.metadata = sa.MetaData()
        self.dialect = dialect
        self.made = Statements(records_table(self.metadata, table), dialect)

    @staticmethod
    def _digest(order_id: str) -> str:
        return order_id.ljust(48, "0")

    def claim(self, connection: sa.Connection, order_id: str, attempt: bytes) -> int:
        made, digest = self.made, self._digest(order_id)
        common = {"space": "c", "namespace": "floor", "key": order_id, "attempt": attempt, "fingerprint": b"f" * 16}
        if made._fresh is not None:
            values = {"b_id": digest, **common, "lease": 30_000_000, "keep": TTL * 1_000_000, "owner": b""}
            return int(connection.execute(made._fresh, values).one()[1])
        now = time.time_ns() // 1000
        found = connection.execute(made._read, {"b_id": digest, "now": now}).one()
        _check(found[1], None)
        until = now + 30_000_000
        values = {
            "id": digest,
            **common,
            "state": "R",
            "token": now,
            "since": now,
            "lease": 30_000_000,
            "lease_until": until,
            "expires": until + TTL * 1_000_000,
            "codec": "",
            "body": b"",
        }
        connection.execute(made._insert, values)
        return now

    def settle(self, connection: sa.Connection, order_id: str, attempt: bytes, token: int) -> None:
        values: dict[str, Any] = {
            "b_id": self._digest(order_id),
            "b_attempt": attempt,
            "b_token": token,
            "b_span": TTL * 1_000_000,
            "b_past": 0,
            "b_state": State.COMPLETED.value,
            "b_codec": "json",
            "b_body": BODY,
        }
        if self.dialect == "sqlite":
            values["now"] = time.time_ns() // 1000
        else:
            values["b_bucket"] = 1
        _check(connection.execute(self.made._settle, values).rowcount, 1)

    def known(self, connection: sa.Connection, order_id: str) -> bool:
        """What a replay asks."""
        if self.made._fresh is not None:
            values = {"b_id": self._digest(order_id), "space": "c", "namespace": "floor", "key": order_id}
            values |= {"attempt": os.urandom(8), "fingerprint": b"f" * 16}
            values |= {"lease": 30_000_000, "keep": TTL * 1_000_000, "owner": b""}
            return bytes(connection.execute(self.made._fresh, values).one()[-1]) == BODY
        values = {"b_id": self._digest(order_id), "now": time.time_ns() // 1000}
        return connection.execute(self.made._read, values).one()[-1] == BODY


class _Plain:
    """An INSERT, an UPDATE and a SELECT by primary key."""

    def __init__(self, dialect: str) -> None:
        self.metadata = sa.MetaData()
        self.table = sa.Table(
            "plain_records",
            self.metadata,
            sa.Column("id", sa.String(48), primary_key=True),
            sa.Column("token", sa.LargeBinary, nullable=False),
            sa.Column("body", sa.LargeBinary),
        )
        self._insert = self.table.insert()
        self._update = (
            self.table.update()
            .where(self.table.c.id == sa.bindparam("b_id"), self.table.c.token == sa.bindparam("b_token"))
            .values(body=sa.bindparam("b_body"))
        )
        self._select = sa.select(self.table.c.token, self.table.c.body).where(self.table.c.id == sa.bindparam("b_id"))

    def claim(self, connection: sa.Connection, order_id: str, attempt: bytes) -> int:
        connection.execute(self._insert, {"id": order_id, "token": attempt, "body": None})
        return 0

    def settle(self, connection: sa.Connection, order_id: str, attempt: bytes, token: int) -> None:
        del token
        values = {"b_id": order_id, "b_token": attempt, "b_body": BODY}
        _check(connection.execute(self._update, values).rowcount, 1)

    def known(self, connection: sa.Connection, order_id: str) -> bool:
        found = connection.execute(self._select, {"b_id": order_id}).first()
        return found is not None and found[1] == BODY


def _wal(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.close()


def _driver(url: str, kind: str) -> str:
    scheme, _, rest = url.partition("://")
    drivers = {"postgresql": ("postgresql+psycopg",) * 2, "sqlite": ("sqlite", "sqlite+aiosqlite")}
    return f"{drivers[scheme][kind == 'async']}://{rest}"


_SAME, _HELD = "the same statements, Core", "the same statements, held connection"
_PLAIN = "plain statements, Core"


def _sql(url: str) -> dict[str, Contender]:
    dialect = url.partition("://")[0]
    engine = sa.create_engine(_driver(url, "sync"), isolation_level="AUTOCOMMIT")
    if dialect == "sqlite":
        event.listen(engine, "connect", _wal)

    def on(records: "_Records | _Plain") -> Contender:
        records.metadata.create_all(engine)

        def first(order_id: str) -> None:
            attempt = os.urandom(8)
            with engine.connect() as connection:
                token = records.claim(connection, order_id, attempt)
            with engine.connect() as connection:
                records.settle(connection, order_id, attempt, token)

        def replay(order_id: str) -> None:
            with engine.connect() as connection:
                _check(records.known(connection, order_id), True)

        return Contender(first, replay)

    def held(records: _Records) -> Contender:
        records.metadata.create_all(engine)
        connection = engine.connect()

        def first(order_id: str) -> None:
            attempt = os.urandom(8)
            token = records.claim(connection, order_id, attempt)
            records.settle(connection, order_id, attempt, token)

        def replay(order_id: str) -> None:
            _check(records.known(connection, order_id), True)

        return Contender(first, replay)

    return {
        _SAME: on(_Records(dialect, "floor_records")),
        _HELD: held(_Records(dialect, "held_records")),
        _PLAIN: on(_Plain(dialect)),
    }


def _sql_async(url: str) -> dict[str, Contender]:
    dialect = url.partition("://")[0]
    engine = create_async_engine(_driver(url, "async"), isolation_level="AUTOCOMMIT")
    if dialect == "sqlite":
        event.listen(engine.sync_engine, "connect", _wal)

    def on(records: "_Records | _Plain") -> Contender:
        made: list[bool] = []

        async def first(order_id: str) -> None:
            if not made:
                async with engine.connect() as connection:
                    await connection.run_sync(records.metadata.create_all)
                made.append(True)
            attempt = os.urandom(8)
            async with engine.connect() as connection:
                token = await connection.run_sync(records.claim, order_id, attempt)
            async with engine.connect() as connection:
                await connection.run_sync(records.settle, order_id, attempt, token)

        async def replay(order_id: str) -> None:
            async with engine.connect() as connection:
                _check(await connection.run_sync(records.known, order_id), True)

        return Contender(first, replay)

    def held(records: _Records) -> Contender:
        opened: list[AsyncConnection] = []

        async def first(order_id: str) -> None:
            if not opened:
                opened.append(await engine.connect())
                await opened[0].run_sync(records.metadata.create_all)
            attempt = os.urandom(8)
            token = await opened[0].run_sync(records.claim, order_id, attempt)
            await opened[0].run_sync(records.settle, order_id, attempt, token)

        async def replay(order_id: str) -> None:
            _check(await opened[0].run_sync(records.known, order_id), True)

        return Contender(first, replay)

    return {
        _SAME: on(_Records(dialect, "floor_records")),
        _HELD: held(_Records(dialect, "held_records")),
        _PLAIN: on(_Plain(dialect)),
    }


def _local(_url: str) -> dict[str, Contender]:
    guarded: Any = idempotent(key="payment:{order_id}", backend="local://")(charge)
    identify: Callable[..., tuple[str, bytes]] = guarded.__idempotent_spec__[0].binder.identifier(None)

    def our_key(*args: Any, **kwargs: Any) -> tuple[str, bytes]:
        return identify(args, kwargs)

    def cached(key: Callable[..., Any]) -> Contender:
        store: Any = cachetools.TTLCache(100_000, TTL)
        call = cachetools.cached(store, key=key, lock=threading.RLock())(charge)
        return Contender.of(call)

    return {"cachetools, our key": cached(our_key), "cachetools, hashkey": cached(hashkey)}


def _local_async(_url: str) -> dict[str, Contender]:
    return {name: Contender(_awaitable(one.first), _awaitable(one.replay)) for name, one in _local(_url).items()}


def _awaitable(call: Callable[[str], Any]) -> Callable[[str], Any]:
    async def awaited(order_id: str) -> Any:
        return call(order_id)

    return awaited


FLOORS: dict[tuple[str, str], Callable[[str], dict[str, Contender]]] = {
    ("local", "sync"): _local,
    ("local", "async"): _local_async,
    ("redis", "sync"): _redis,
    ("redis", "async"): _redis_async,
    ("postgresql", "sync"): _sql,
    ("postgresql", "async"): _sql_async,
    ("sqlite", "sync"): _sql,
    ("sqlite", "async"): _sql_async,
}
"""By store and colour, of the store's URL; the first named of each is the floor that ratios are to."""
