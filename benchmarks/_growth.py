"""Calls beside stores of different sizes, which take turns: the ratio to the smallest tells what growth costs.

Every record of a store is one that our function replays, and replays are of records drawn at random from all of them.
Each size has a store of its own: a SQLite file, a table of one PostgreSQL database, a numbered database of one Redis; so
the sizes share a server, and its caches.
"""

import contextlib
import functools
import itertools
import logging
import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import redis
import sqlalchemy as sa

from benchmarks._calls import Timings, sync_rounds
from benchmarks._peers import OURS, guards_of
from benchmarks._work import AMOUNT, BODY, TTL, Contender, charge, filled
from idempotent._record import RecordId, pack, unpack

__all__ = ["fill", "fill_unseen", "time_sizes"]

_FILL = "for n = 2, #ARGV, 2 do redis.call('SET', ARGV[n], ARGV[n + 1], 'PX', ARGV[1]) end"
_MODEL = "o" * 32
"""The order of the one record that a call makes; the others are made like it."""


def fill_unseen(url: str, size: int) -> None:
    """Put `size` records of ours into Redis, and as many results under the floor's keys, for other processes to replay."""
    fill(url, size)
    with redis.Redis.from_url(url) as client:
        _store(client, (("floor:" + filled(number), BODY) for number in range(size)))


def fill(url: str, size: int) -> None:
    """Put `size` records into the store by its own means: what our guarded function leaves after a call."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    store = url.partition(":")[0]
    call = guards_of(store, "sync")[0][OURS](url, charge)
    call(_MODEL, AMOUNT)  # makes the table, too
    if store == "redis":
        _fill_redis(url, call, size)
    else:
        _fill_sql(url, call, size)


def _ids(call: Any, size: int) -> Iterator[tuple[str, RecordId, bytes]]:
    """Order, record id and fingerprint of each record: the model's first."""
    spec = call.__idempotent_spec__[0]
    identify = spec.binder.identifier(None)
    for order in (_MODEL, *map(filled, range(size))):
        key, fingerprint = identify((order, AMOUNT), {})
        yield order, RecordId(spec.namespace, key), fingerprint


def _fill_redis(url: str, call: Any, size: int) -> None:
    ids = _ids(call, size)
    with redis.Redis.from_url(url) as client:
        model = unpack(client.get(f"idem:{next(ids)[1].text}"))

        def rows() -> Iterator[tuple[str, bytes]]:
            for order, rid, fingerprint in ids:
                body = model.body.replace(_MODEL.encode(), order.encode())
                row = model._replace(attempt=os.urandom(8), fingerprint=fingerprint, body=body)
                yield f"idem:{rid.text}", pack(row)

        _store(client, rows())


def _store(client: Any, rows: Iterator[tuple[str, bytes]]) -> None:
    script = client.register_script(_FILL)
    while batch := [part for row in itertools.islice(rows, 1_000) for part in row]:
        script(args=[TTL * 1000, *batch])


def _fill_sql(url: str, call: Any, size: int) -> None:
    bare, _, query = url.partition("?table=")
    engine = sa.create_engine(bare.replace("postgresql://", "postgresql+psycopg://"))
    table = sa.Table(query or "idempotent_records", sa.MetaData(), autoload_with=engine)
    ids = _ids(call, size)
    with engine.begin() as connection:
        digest = next(ids)[1].digest
        model = connection.execute(sa.select(table).where(table.c.id == digest)).one()
        place = {name: number for number, name in enumerate(model._fields)}
        ends, body = model.expires, bytes(model.body)

        def rows() -> Iterator[list[Any]]:
            for number, (order, rid, fingerprint) in enumerate(ids, 1):
                row = list(model)
                row[place["id"]], row[place["key"]], row[place["fingerprint"]] = rid.digest, rid.key, fingerprint
                row[place["attempt"]], row[place["expires"]] = os.urandom(8), ends + number
                row[place["body"]] = body.replace(_MODEL.encode(), order.encode())
                yield row

        names = ", ".join(f'"{name}"' for name in place)
        cursor: Any = connection.connection.cursor()
        if engine.dialect.name == "sqlite":
            marks = ", ".join("?" * len(place))
            cursor.executemany(f"INSERT INTO {table.name} ({names}) VALUES ({marks})", rows())
        else:
            with cursor.copy(f"COPY {table.name} ({names}) FROM STDIN") as copy:
                for row in rows():
                    copy.write_row(row)
    # What a server owes to so many new rows is paid before anything is measured, and not while the smaller ones are.
    owed = (
        ("ANALYZE", "PRAGMA wal_checkpoint(TRUNCATE)")
        if bare.startswith("sqlite")
        else ("VACUUM ANALYZE", "CHECKPOINT")
    )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in owed:
            with contextlib.suppress(sa.exc.DBAPIError):  # a server that is not ours may refuse
                connection.exec_driver_sql(statement).close()
    engine.dispose()


def time_sizes(store: str, places: dict[str, tuple[str, int]], seconds: float) -> Timings:
    """First calls and replays of ours on each of the stores, by name: its URL, and how many records `fill` made.

    The first one is what ratios are to.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    guard: Any = guards_of(store, "sync")[0][OURS]
    contenders = {
        name: Contender.of(guard(url, charge), functools.partial(_any_of, size)) for name, (url, size) in places.items()
    }
    return Timings(sync_rounds(store, contenders, seconds), next(iter(places)), {}, {})


def _any_of(size: int) -> str:
    return filled(random.randrange(size))
