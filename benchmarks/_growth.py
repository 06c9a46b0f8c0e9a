"""Calls beside stores of different sizes, which take turns: the ratio to the smallest tells what growth costs."""

import contextlib
import logging
import time
import warnings
from typing import Any

import redis
import sqlalchemy as sa

from benchmarks._calls import Timings, sync_rounds
from benchmarks._peers import guards_of
from benchmarks._work import BODY, TTL, Contender, charge

__all__ = ["fill", "time_sizes"]

_FILL = """for n = ARGV[1], ARGV[2] do
    redis.call('SET', 'idem:records' .. n .. string.rep('k', 40), ARGV[3], 'PX', ARGV[4])
end"""
_COLUMNS = """(id, space, namespace, "key", state, token, attempt, fingerprint, since, lease, lease_until, expires, codec,
 body)"""
_POSTGRES = """INSERT INTO {table} {columns}
SELECT left(md5(n::text) || md5((-n)::text), 48), 'c', 'fill', n::text, 'C', n, 'aaaaaaaa', 'ffffffffffffffff', {now}, 0, 0,
       {now} + {span} + n, 'json', '{body}'
FROM generate_series(1, {rows}) AS n"""
_SQLITE = """WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows})
INSERT INTO {table} {columns}
SELECT lower(hex(randomblob(24))), 'c', 'fill', n, 'C', n, randomblob(8), randomblob(16), {now}, 0, 0,
       {now} + {span} + n, 'json', '{body}'
FROM numbers"""


def fill(url: str, size: int) -> None:
    """Put `size` settled records of 200 bytes into the store, by its own means."""
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as client:
            for low in range(1, size + 1, 50_000):
                client.eval(_FILL, 0, low, min(size, low + 49_999), BODY, TTL * 1000)
        return
    warnings.simplefilter("ignore")
    guards_of("sqlite", "sync")[0]["idempotent"](url, charge)("first", 1)  # makes the table
    bare, _, query = url.partition("?table=")
    engine = sa.create_engine(bare.replace("postgresql://", "postgresql+psycopg://"))
    template = _SQLITE if url.startswith("sqlite") else _POSTGRES
    values = {"table": query or "idempotent_records", "columns": _COLUMNS, "rows": size, "body": BODY.decode()}
    values |= {"now": time.time_ns() // 1000, "span": TTL * 1_000_000}
    with engine.begin() as connection:
        connection.exec_driver_sql(template.format(**values))
    # What a server owes to so many new rows is paid before anything is measured, and not while the smaller ones are.
    owed = (
        ("ANALYZE", "PRAGMA wal_checkpoint(TRUNCATE)") if url.startswith("sqlite") else ("VACUUM ANALYZE", "CHECKPOINT")
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in owed:
            with contextlib.suppress(sa.exc.DBAPIError):  # a server that is not ours may refuse
                connection.exec_driver_sql(statement).close()
    engine.dispose()


def time_sizes(store: str, urls: dict[str, str], seconds: float) -> Timings:
    """First calls and replays of ours on each of the stores, by name; the first one is what ratios are to."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    guard: Any = guards_of(store, "sync")[0]["idempotent"]
    contenders = {name: Contender.of(guard(url, charge)) for name, url in urls.items()}
    return Timings(sync_rounds(store, contenders, seconds), next(iter(urls)), {})
