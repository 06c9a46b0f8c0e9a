"""What statements cost on a large table: the index that each uses, purges in batches, connections that stay at hand."""

import ast
import asyncio
import contextlib
import inspect
import itertools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from colours import Colour
from sqlalchemy import event
from test_sql import A, B, Commands, engine_of, joined, on_each_database, on_each_server, opened, rows_of, table_of

from idempotent import SQLBackend
from idempotent._drive import drive
from idempotent._record import Answer, Expired, RecordId
from idempotent.backends import _statements, sql
from idempotent.backends.base import Backend

assert opened  # a fixture

FILL = {
    "postgresql": """
        INSERT INTO {table} (id, space, namespace, "key", state, token, attempt, fingerprint, since, lease, lease_until,
                             expires, codec, body)
        SELECT left(md5(n::text) || md5((-n)::text), 48), 'c', 'n', n::text, 'C', n, 'aaaaaaaa', '', {now}, 0, 0,
               {now} + (n - {over}) * 1000000000::bigint - 1, '', 'some bytes of a result'
        FROM generate_series(1, {rows}) AS n""",
    "sqlite": """
        WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows})
        INSERT INTO {table} (id, space, namespace, "key", state, token, attempt, fingerprint, since, lease, lease_until,
                             expires, codec, body)
        SELECT lower(hex(randomblob(24))), 'c', 'n', n, 'C', n, x'6161616161616161', x'', {now}, 0, 0,
               {now} + (n - {over}) * 1000000000 - 1, '', x'aabbccdd' FROM numbers""",
    "mysql": """
        INSERT INTO {table} (id, space, namespace, `key`, state, token, attempt, fingerprint, since, lease, lease_until,
                             expires, codec, body)
        SELECT left(concat(md5(seq), md5(seq + 1)), 48), 'c', 'n', seq, 'C', seq, 'aaaaaaaa', '', {now}, 0, 0,
               {now} + (CAST(seq AS SIGNED) - {over}) * 1000000000 - 1, '', 'some bytes of a result'
        FROM seq_1_to_{rows}""",
}


def fill(url: str, rows: int, over: int) -> None:
    """Completed records, of which `over` are past their retention."""
    with engine_of(url) as engine, engine.begin() as connection:
        statement = FILL[engine.dialect.name if engine.dialect.name in FILL else "mysql"]
        values = {"table": table_of(url).name, "rows": rows, "over": over, "now": time.time_ns() // 1000}
        connection.exec_driver_sql(statement.format(**values))
    with engine_of(url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        words = {"mysql": "ANALYZE TABLE", "mariadb": "ANALYZE TABLE"}.get(engine.dialect.name, "ANALYZE")
        connection.exec_driver_sql(f"{words} {table_of(url).name}").close()


class Sent(NamedTuple):
    """A statement that was sent."""

    statement: str
    parameters: Any
    rows: int
    """How many it changed."""
    source: Any
    """What it was compiled from; None: it was text."""
    place: int
    """The line of `_statements.py` that sent it; 0: none did."""


@contextlib.contextmanager
def sent_by(backend: SQLBackend) -> Iterator[list[Sent]]:
    """The statements that the blocking view sends."""
    engine, sent = backend.blocking()._link.engine, []  # type: ignore[attr-defined]

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        frames = traceback.walk_stack(None)
        place = next((line for frame, line in frames if frame.f_code.co_filename == _statements.__file__), 0)
        source = None if context.compiled is None else context.compiled.statement
        sent.append(Sent(statement, parameters, cursor.rowcount, source, place))

    event.listen(engine, "after_cursor_execute", note)
    try:
        yield sent
    finally:
        event.remove(engine, "after_cursor_execute", note)


def every_command(backend: SQLBackend, age: Callable[[RecordId], None]) -> set[str]:
    """All commands, in the ways that they take: fresh, lapsed, renewed, settled, remembered, withdrawn, forgotten.

    `age` lets an hour pass for a record. Returns the commands' names.
    """
    blocking = backend.blocking()
    told: set[str] = set()

    def do(command: str, *args: Any, **options: Any) -> Any:
        told.add(command)
        return drive(getattr(blocking, command)(*args, **options))

    def claimed(key: str, **changes: Any) -> Any:
        options = {"attempt": A, "fingerprint": b"f" * 16, "lease": 30.0, "keep": None, "takeover": True}
        return do("claim", RecordId("n", key), **(options | changes))

    def complete(key: str, **changes: Any) -> None:
        options = {"codec": "", "body": b"done", "ttl": 60.0} | changes
        assert do("complete", RecordId("n", key), attempt=A, token=claimed(key).token, **options) is Answer.DONE

    rid = RecordId("n", "one")
    token = claimed("one").token
    claimed("one", fingerprint=b"g" * 16)
    do("renew", rid, attempt=A, token=token, lease=30.0)
    do("changed", rid, token=token + 1, timeout=30.0)
    age(rid)
    assert claimed("one", attempt=B).took_over
    do("forget", rid, force=True)
    complete("one")
    claimed("one")
    do("read", rid)
    do("forget", rid)
    failed = {"codec": "", "body": b"why", "ttl": 60.0}
    do("fail", RecordId("n", "failed"), attempt=A, token=claimed("failed").token, **failed)
    do("release", RecordId("n", "two"), attempt=A, token=claimed("two").token)
    do("release", RecordId("n", "three"), attempt=A, token=None)
    do("release", RecordId("n", "four"), attempt=A, token=claimed("four").token, unknown=True)
    for key in ("late", "later"):
        complete(key, remember=10_000.0)
        age(RecordId("n", key))
    assert isinstance(claimed("late"), Expired)
    told.add("scan")
    scan = blocking.scan()
    drive(anext(scan))
    drive(scan.aclose())
    do("purge", 1000)
    assert do("read", RecordId("n", "later")).state == "expired"
    return told


def statements_of(backend: SQLBackend) -> dict[str, Any]:
    """The statements that are made for the table, by name."""
    made = vars(backend._statements).items()
    return {name: value for name, value in made if isinstance(value, sa.ClauseElement)}


def places() -> list[range]:
    """The lines of `_statements.py` that send something."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(_statements))) if isinstance(node, ast.Call)]
    ways = ("execute", "exec_driver_sql", "scalar", "scalars")
    sends = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr in ways and call.args]
    return [range(call.lineno, (call.end_lineno or call.lineno) + 1) for call in sends]


UNSENT = {"postgresql": {"_over"}, "sqlite": {"_over_free"}}
"""The statements that a database is never sent: each has one of the two that find what is to be purged."""
ELSEWHERE = {"postgresql": Counter(["check_size"]), "sqlite": Counter(["check_size", "fresh"])}
"""The functions with places that send what other databases alone are sent; one for each such place."""


def name_at(line: int) -> str:
    """The function of `_statements.py` that this line is in."""
    nodes = ast.walk(ast.parse(inspect.getsource(_statements)))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return next(each.name for each in functions if each.lineno <= line <= (each.end_lineno or 0))


def without_index(connection: sa.Connection, statement: str, parameters: Any, table: str) -> str | None:
    """The plan of a statement that reads a table's rows one by one; None: it finds them by an index."""
    if connection.dialect.name == "sqlite":
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        read = [step for step in plan if table in step]
        bad = any(step.startswith("SCAN") for step in read)
    else:
        plan = list(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
        bad = any(f"Seq Scan on {table}" in step for step in plan) or any(
            f" on {table}" in step and "Index" in step and "Index Cond" not in then
            for step, then in itertools.pairwise([*plan, ""])
        )
    return "\n".join([statement, *plan]) if bad else None


@pytest.mark.parametrize("backend_url", ["sqlite", "postgres"], indirect=True)
@pytest.mark.parametrize("rows", [20_000, pytest.param(1_000_000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
def test_every_statement_of_a_backend_finds_its_rows_by_an_index(
    backend_url: str, rows: int, opened: Callable[..., Any]
) -> None:
    """Those of `_statements.py`; of what `within=` sends, the insert alone is not among them, and it looks for none."""
    backend = opened(backend_url, timeout=60)
    drive(backend.blocking().read(RecordId("n", "k")))
    fill(backend_url, rows, over=200)
    with rows_of(backend_url) as beside, sent_by(backend) as sent:
        told = every_command(backend, lambda rid: beside.age(rid, 3_600_000_000))
    assert told >= Backend.__abstractmethods__
    table = table_of(backend_url).name
    statements = {one.statement: one for one in sent if table in one.statement}
    with engine_of(backend_url) as engine, engine.connect() as connection:
        plans = [without_index(connection, one.statement, one.parameters, table) for one in statements.values()]
    assert [plan for plan in plans if plan] == []
    explained = {id(one.source) for one in statements.values()}
    unexplained = {name for name, made in statements_of(backend).items() if id(made) not in explained}
    assert unexplained == UNSENT[backend.name]
    idle = [name_at(place.start) for place in places() if not any(one.place in place for one in sent)]
    assert Counter(idle) == ELSEWHERE[backend.name]


@pytest.mark.parametrize("backend_url", ["sqlite", "postgres"], indirect=True)
def test_a_plan_that_finds_its_rows_by_no_index_is_told(backend_url: str, opened: Callable[..., Any]) -> None:
    drive(opened(backend_url).blocking().read(RecordId("n", "k")))
    table = table_of(backend_url).name
    with engine_of(backend_url) as engine, engine.connect() as connection:
        assert without_index(connection, f"DELETE FROM {table} WHERE state = 'C'", (), table)
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET enable_seqscan = off").close()
        assert not without_index(connection, f"DELETE FROM {table} WHERE id = 'i'", (), table)
        plan = without_index(connection, f"SELECT state FROM {table} ORDER BY id", (), table)
    assert plan is not None
    assert "Seq Scan" not in plan


@on_each_database
def test_a_large_purge_is_many_short_statements(backend_url: str, opened: Callable[..., Any]) -> None:
    backend = opened(backend_url)
    blocking = backend.blocking()
    drive(blocking.read(RecordId("n", "k")))
    fill(backend_url, 2_400, over=2_300)
    with sent_by(backend) as sent:
        assert drive(blocking.purge(100_000)) == 2_300
    assert [one.rows for one in sent if "DELETE" in one.statement] == [1000, 1000, 300]
    assert drive(blocking.purge(100_000)) == 0


@on_each_database
def test_a_purge_goes_on_where_a_row_that_it_found_was_claimed_meanwhile(
    backend_url: str, opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql, "_BATCH", 10)
    blocking = opened(backend_url).blocking()
    drive(blocking.read(RecordId("n", "k")))
    fill(backend_url, 30, over=25)
    table, claimed = table_of(backend_url), []

    def claim(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if "DELETE" in statement and not claimed:
            claimed.append(True)
            with engine_of(backend_url) as other, other.begin() as transaction:
                oldest = transaction.scalar(sa.select(table.c.id).order_by(table.c.expires).limit(1))
                later = table.update().where(table.c.id == oldest).values(expires=table.c.expires + 10**12)
                transaction.execute(later)

    event.listen(blocking._link.engine, "before_cursor_execute", claim)
    assert drive(blocking.purge()) == 24


@on_each_server
def test_a_purge_passes_over_a_row_that_a_transaction_holds(
    backend_url: str, colour: Colour, opened: Callable[..., Any]
) -> None:
    with Commands(opened(joined(backend_url, timeout="3")), colour) as commands, engine_of(backend_url) as engine:
        commands.read(RecordId("n", "k"))
        fill(backend_url, 3_000, over=20)
        table = table_of(backend_url)
        with engine.begin() as connection:
            oldest = sa.select(table.c.id).order_by(table.c.expires).limit(1)
            connection.execute(sa.select(table.c.id).where(table.c.id == connection.scalar(oldest)).with_for_update())
            assert commands.purge() == 19
        assert commands.purge() == 1


@on_each_database
def test_commands_one_after_another_take_one_connection_from_the_pool(
    backend_url: str, colour: Colour, opened: Callable[..., Any]
) -> None:
    backend = opened(backend_url)
    taken: list[Any] = []

    def commands(number: int) -> Iterator[Any]:
        yield from (backend.read(RecordId("n", f"{number}")) for number in range(number))

    async def main() -> None:
        nonlocal backend
        backend = backend.asynchronous()
        await backend.read(RecordId("n", "k"))
        engine = (await backend._link._engines.get()).engine
        event.listen(engine.sync_engine, "checkout", lambda *_: taken.append(1))
        for command in commands(20):
            await command
        await backend.aclose()

    if colour.is_async:
        asyncio.run(main())
    else:
        backend = backend.blocking()
        drive(backend.read(RecordId("n", "k")))
        event.listen(backend._link.engine, "checkout", lambda *_: taken.append(1))
        for command in commands(20):
            drive(command)
    assert taken == []
