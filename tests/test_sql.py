"""SQLBackend against real databases: it answers as the machine does, and through every fault nothing runs twice."""

import asyncio
import contextlib
import gc
import itertools
import os
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pymysql
import pytest
import sqlalchemy as sa
from colours import COLOURS, Colour
from differential import Commands, aged, disagreement
from probes import Counter
from proxy import Direction, Proxy
from servers import Server, start_mariadb, start_postgres
from sqlalchemy.ext.asyncio import create_async_engine

from idempotent import (
    BackendError,
    BackendUnavailable,
    LocalBackend,
    ResultUnavailable,
    SQLBackend,
    idempotent,
    open_backend,
)
from idempotent._drive import drive
from idempotent._options import split_url
from idempotent._record import Answer, Busy, Granted, RecordId, Row, Settled, Unknown
from idempotent.backends import _engines, _statements
from idempotent.backends._caller import _is_blocked
from idempotent.backends.sql import _is_missing, _is_transient, records_table

A, B = b"attemptA", b"attemptB"
ARGS = b"f" * 16

on_each_database = pytest.mark.parametrize("backend_url", ["sqlite", "postgres", "mariadb"], indirect=True)
on_each_server = pytest.mark.parametrize("backend_url", ["postgres", "mariadb"], indirect=True)
on_sqlite = pytest.mark.parametrize("backend_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize("backend_url", ["postgres"], indirect=True)
on_mariadb = pytest.mark.parametrize("backend_url", ["mariadb"], indirect=True)


@pytest.fixture(params=["postgres", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> Server:
    """A database server to freeze and kill."""
    return request.getfixturevalue(f"own_{request.param}")


@pytest.fixture
def table() -> str:
    """A table's name that no other test has."""
    return f"t{time.time_ns()}"


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., SQLBackend]:
    """Makes backends that are closed after the test."""

    def make(*args: Any, **kwargs: Any) -> SQLBackend:
        backend = SQLBackend(*args, **kwargs)
        _fresh.callback(backend.close)
        return backend

    return make


def eventually(holds: Callable[[], Any], seconds: float = 20) -> Any:
    """The first true answer of `holds`, asked until `seconds` are over."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, "it has not come true"
        time.sleep(0.005)
    return answer


@contextlib.contextmanager
def engine_of(url: str, **options: Any) -> Iterator[sa.Engine]:
    """A plain engine for a backend's URL."""
    bare, _ = split_url(url, ("table", "timeout"))
    engine = sa.create_engine(_engines.twins(bare)[0], **options)
    try:
        yield engine
        nobody_connects()
    finally:
        engine.dispose()


def nobody_connects() -> None:
    """Wait for those whose commands were given up: they may get a connection yet, and return it."""
    eventually(lambda: not any(thread.name == "idempotent-connect" for thread in threading.enumerate()))


def table_of(url: str) -> sa.Table:
    return records_table(sa.MetaData(), split_url(url, ("table",))[1].get("table", "idempotent_records"))


def joined(url: str, **query: str) -> str:
    """`url` with more in its query."""
    added = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    return f"{url}{'&' if '?' in url else '?'}{added}"


def claim(commands: Commands, rid: RecordId, attempt: bytes = A, **changes: Any) -> Any:
    options = {"fingerprint": ARGS, "lease": 30.0, "keep": None, "takeover": True}
    return commands.claim(rid, attempt=attempt, **(options | changes))


class Rows:
    """The rows of a table, beside the backend."""

    CLOCKS = {
        "postgresql": "SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint)",
        "mysql": "SELECT timestampdiff(MICROSECOND, '1970-01-01', utc_timestamp(6))",
    }

    def __init__(self, engine: sa.Engine, table: sa.Table) -> None:
        self.connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.dialect = engine.dialect.name
        self.table = table

    def clock(self) -> int:
        if self.dialect == "sqlite":
            return time.time_ns() // 1000
        return int(self.connection.execute(sa.text(self.CLOCKS[self.dialect])).scalar_one())

    def row(self, rid: RecordId) -> Row | None:
        columns = [self.table.c[name] for name in Row._fields]
        found = self.connection.execute(sa.select(*columns).where(self.table.c.id == rid.digest)).first()
        return None if found is None else _statements._row(list(found))

    def age(self, rid: RecordId, by: int) -> None:
        row = self.row(rid)
        if row is not None:
            row = aged(row, by)
            moved = {name: getattr(row, name) for name in ("token", "since", "lease_until", "expires")}
            self.connection.execute(sa.update(self.table).where(self.table.c.id == rid.digest).values(moved))


@contextlib.contextmanager
def rows_of(url: str) -> Iterator[Rows]:
    with engine_of(url) as engine:
        rows = Rows(engine, table_of(url))
        try:
            yield rows
        finally:
            rows.connection.close()


# ------------------------------------------------------------------------------------------------ the machine's answers


@on_each_database
@pytest.mark.parametrize("seed", range(8))
def test_the_statements_answer_and_store_what_the_machine_does(
    backend_url: str, colour: Colour, seed: int, opened: Callable[..., SQLBackend]
) -> None:
    with Commands(opened(backend_url), colour) as commands, rows_of(backend_url) as rows:
        commands.read(RecordId("n", "other"))
        assert disagreement(commands, rows, RecordId("n", f"k{seed}"), seed, steps=250) == ""


@on_each_database
def test_the_databases_clock_alone_ends_a_lease(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    rid = RecordId("n", "k")
    with Commands(opened(backend_url), colour) as commands:
        commands.read(rid)
        first = claim(commands, rid, lease=0.3)
        while isinstance(reply := claim(commands, rid, B, takeover=False), Busy):
            assert 0 < reply.lease_left <= 0.3
        assert commands.read(rid).state == "unknown"
        taken = claim(commands, rid, B, over=first.token, lease=0.3)
        assert taken == Granted(taken.token, took_over=True)
        assert taken.token > first.token
        assert commands.complete(rid, attempt=A, token=first.token, codec="", body=b"", ttl=9) is Answer.STALE
        eventually(lambda: commands.read(rid).lease_left <= 0)
        assert commands.complete(rid, attempt=B, token=taken.token, codec="", body=b"", ttl=9) is Answer.DONE
        assert claim(commands, rid)[:2] == (False, taken.token)


@on_each_database
def test_of_many_claims_on_a_lapsed_lease_one_is_granted(backend_url: str, opened: Callable[..., SQLBackend]) -> None:
    with Commands(opened(backend_url), COLOURS[0]) as commands:
        commands.read(RecordId("n", "k"))
        assert contended(commands, rounds=4) == []


@on_each_database
@pytest.mark.parametrize("late", ["renews", "completes"])
def test_an_owner_who_comes_between_the_reading_and_the_writing_of_a_takeover_keeps_its_record(
    backend_url: str, colour: Colour, late: str, opened: Callable[..., SQLBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is late, and not dead: its lease lives again, or its outcome is recorded, and nobody runs beside it."""
    rid, backend = RecordId("n", "k"), opened(backend_url)
    swap, swaps = backend._statements.swap, itertools.count()
    with Commands(opened(backend_url), COLOURS[0]) as owner, Commands(backend, colour) as rival:
        owner.read(rid)  # connected before a claim that has no longer than its lease
        token = claim(owner, rid, lease=0.4).token
        eventually(lambda: owner.read(rid).lease_left <= 0)
        over = None
        if late == "completes":
            assert isinstance(claim(owner, rid, B, takeover=False), Unknown)
            over = token

        def delayed(*args: Any) -> bool:
            if next(swaps) == 0:
                answer = (
                    owner.renew(rid, attempt=A, token=token, lease=30.0)
                    if late == "renews"
                    else owner.complete(rid, attempt=A, token=token, codec="json", body=b"42", ttl=60.0)
                )
                assert answer is Answer.DONE
            return swap(*args)

        monkeypatch.setattr(backend._statements, "swap", delayed)
        reply = claim(rival, rid, B, over=over)
        assert next(swaps) == 1
        if late == "renews":
            assert isinstance(reply, Busy)
            assert owner.complete(rid, attempt=A, token=token, codec="json", body=b"42", ttl=60.0) is Answer.DONE
            reply = claim(rival, rid, B)
        assert isinstance(reply, Settled)
        assert (reply.token, reply.body) == (token, b"42")


def contended(commands: Commands, rounds: int, claims: int = 16) -> list[Any]:
    """What went wrong where claims race for a record that is not there, and for one whose lease is over."""
    wrong: list[Any] = []
    for turn in range(rounds):
        for lapsed in (False, True):
            rid = RecordId("n", f"{turn}{lapsed}")
            if lapsed:
                claim(commands, rid, lease=0.2)
                eventually(lambda: commands.read(rid).lease_left <= 0)
            barrier = threading.Barrier(claims)
            replies: list[Any] = []

            def race(number: int) -> None:
                barrier.wait()
                try:
                    replies.append(claim(commands, rid, b"rival%03d" % number))
                except BackendError as error:
                    replies.append(error)

            racers = [threading.Thread(target=race, args=(number,)) for number in range(claims)]
            for racer in racers:
                racer.start()
            for racer in racers:
                racer.join()
            kinds = sorted(type(reply).__name__ for reply in replies)
            if kinds != ["Busy"] * (claims - 1) + ["Granted"]:
                wrong.append(replies)
    return wrong


@on_postgres
@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_a_database_whose_default_isolation_is_stricter_serves_storms(
    backend_url: str, colour: Colour, effects: Counter, level: str, opened: Callable[..., SQLBackend]
) -> None:
    url = joined(backend_url, options="-c default_transaction_isolation=" + level.replace(" ", "\\ "))
    with engine_of(url) as engine, engine.connect() as connection:
        assert connection.execute(sa.text("SHOW transaction_isolation")).scalar() == level

    def work(order: str) -> int:
        return effects.hit()

    backends = [opened(url) for _ in range(4)]
    functions = [colour.define(work, backend=backend, namespace="n", key="{order}") for backend in backends]
    calls = [COLOURS[0].start(colour.storm, function, 10, "o") for function in functions]
    assert [call.result(60) for call in calls] == [[1] * 10] * 4
    assert effects.count == 1
    with Commands(backends[0], COLOURS[0]) as commands:
        assert contended(commands, rounds=2) == []


# ------------------------------------------------------------------------------------------------------ lost connections

OPERATIONS: dict[str, Any] = {
    "claim": lambda commands, rid, token: claim(commands, rid),
    "complete": lambda commands, rid, token: commands.complete(
        rid, attempt=A, token=token, codec="json", body=b"42", ttl=60.0
    ),
    "renew": lambda commands, rid, token: commands.renew(rid, attempt=A, token=token, lease=40.0),
    "release": lambda commands, rid, token: commands.release(rid, attempt=A, token=token),
    "forget": lambda commands, rid, token: commands.forget(rid, force=True),
}


def through(proxy: Proxy, server: Server) -> str:
    return server.url.replace(f":{server.port}", f":{proxy.port}")


EVERY = ["in steps", pytest.param("every byte", marks=pytest.mark.soak)]
"""Every byte takes a minute on PostgreSQL, and three on MariaDB, whose driver connects in more exchanges."""


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("every", EVERY)
def test_an_operation_cut_at_any_byte_is_answered_or_refused_and_its_repeat_agrees(
    own_server: Server,
    table: str,
    colour: Colour,
    operation: str,
    direction: Direction,
    every: str,
    opened: Callable[..., SQLBackend],
) -> None:
    step = 1 if every == "every byte" else 7 if own_server.url.startswith("postgres") else 31
    refused = byte = 0
    with (
        Proxy("127.0.0.1", own_server.port) as proxy,
        Commands(opened(own_server.url, table=table), COLOURS[0]) as direct,
        Commands(opened(through(proxy, own_server), table=table, timeout=3), colour) as cut,
    ):
        while True:
            rid = RecordId("n", f"{direction}{byte:05}")
            token = 0 if operation == "claim" else claim(direct, rid).token
            cut.read(rid)
            proxy.cut(direction, byte)
            try:
                reply = OPERATIONS[operation](cut, rid, token)
            except BackendUnavailable:
                reply = None
                refused += 1
            fired = proxy.fired
            repeat = OPERATIONS[operation](direct, rid, token)
            stored = direct.read(rid)
            if operation == "claim":
                assert reply in (None, repeat)
                assert (stored.state, stored.token) == ("running", repeat.token)
            elif operation == "release":
                assert reply in (None, Answer.DONE)
                assert (repeat, stored) == (Answer.DONE, None)
            elif operation == "forget":
                assert reply is not None
                assert (reply.state, reply.token) == ("running", token)
                assert (repeat, stored) == (None, None)  # another forget finds nothing
            else:
                assert reply in (None, Answer.DONE)
                assert repeat is Answer.DONE
                assert (stored.state, stored.token) == ("completed" if operation == "complete" else "running", token)
            if operation == "complete":
                assert claim(direct, rid, B)[:2] == (False, token)
            if not fired:
                break
            byte += step
        proxy.cut(direction, 1 << 40)
    assert byte > 10  # the sweep met an exchange, and went past its end
    assert refused == 0, f"{refused} were not sent again in time"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_call_cut_at_any_byte_runs_at_most_once_and_the_next_call_agrees(
    own_server: Server, table: str, colour: Colour, direction: Direction, opened: Callable[..., SQLBackend]
) -> None:
    runs: dict[int, int] = {}

    def charge(order: int) -> str:
        runs[order] = runs.get(order, 0) + 1
        return f"receipt {order}"

    options = {"key": "{order}", "namespace": "charge", "lease": 30}
    direct = COLOURS[0].define(charge, backend=opened(own_server.url, table=table), **options)
    step = 97 if direction == "up" else 41
    with Proxy("127.0.0.1", own_server.port) as proxy:
        charge = colour.define(charge, backend=opened(through(proxy, own_server), table=table, timeout=3), **options)
        direct(-1)
        # The async pool is new for each call, so its sweep passes through the handshake as well.
        for order in range(0, 40_000, step):
            proxy.cut(direction, order)
            with contextlib.suppress(BackendUnavailable):
                assert colour.call(charge, order) == f"receipt {order}"
            fired = proxy.fired
            proxy.cut(direction, 1 << 40)
            assert direct(order) == f"receipt {order}"
            assert runs[order] == 1
            if not fired:
                break
    assert 80 < order < 39_000


def end_connections(server: Server) -> int:
    """End all connections to the server; how many there were."""
    if server.url.startswith("postgresql"):
        with psycopg.connect(server.url, autocommit=True) as connection:
            ended = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
            return len(ended.fetchall())
    count = 0
    with pymysql.connect(host="127.0.0.1", port=server.port, user="root") as connection:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT id FROM information_schema.processlist WHERE id <> connection_id() AND user = 'root'"
            )
            for (number,) in cursor.fetchall():
                with contextlib.suppress(pymysql.MySQLError):
                    cursor.execute(f"KILL {number}")
                    count += 1
    return count


def test_ended_connections_between_calls_and_during_one_are_made_again(
    own_server: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    ended = 0

    def work(order: int) -> int:
        nonlocal ended
        ended += end_connections(own_server)
        return effects.hit()

    work = colour.define(work, backend=opened(own_server.url, table=table), key="{order}")
    for order in (1, 2, 3):
        end_connections(own_server)
        assert colour.call(work, order) == order
    end_connections(own_server)
    assert colour.call(work, 2) == 2
    assert ended >= 3


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "pg8000"])
def test_what_a_driver_of_postgresql_says_is_understood(driver: str) -> None:
    def error(state: str) -> sa.exc.DBAPIError:
        cause: Any = Exception({"C": state, "M": "words"} if driver == "pg8000" else "words")
        if driver != "pg8000":
            setattr(cause, "pgcode" if driver == "psycopg2" else "sqlstate", state)
        return sa.exc.DBAPIError("SELECT", {}, cause)

    assert _is_missing(error("42P01")) and not _is_missing(error("42703"))
    assert _is_transient(error("40001")) and not _is_transient(error("42703"))
    assert _is_blocked(error("55P03")) and not _is_blocked(error("40001"))


@on_postgres
def test_a_socket_that_psycopg_finds_closed_before_libpq_does_is_no_refusal(
    backend_url: str,
    colour: Colour,
    effects: Counter,
    opened: Callable[..., SQLBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cursor_class = psycopg.AsyncCursor if colour.is_async else psycopg.Cursor
    execute = cursor_class.execute
    cut: list[Any] = []

    def cutting(cursor: Any, statement: Any, *args: Any, **options: Any) -> Any:
        if armed and "INSERT" in str(statement):
            armed.clear()
            cursor.connection.pgconn.send_query(b"SELECT 1")  # whose reply nobody reads
            cut.append(cursor.connection)
            raise psycopg.OperationalError("connection socket closed")
        return execute(cursor, statement, *args, **options)

    armed = [True]
    monkeypatch.setattr(cursor_class, "execute", cutting)
    work = colour.define(effects.hit, backend=opened(backend_url), key="k")
    assert colour.call(work.outcome).stored
    assert cut and not armed
    assert cut[0].closed  # not back in the pool, with another command's reply to come
    assert colour.call(work) == effects.count == 1


@on_each_database
def test_a_row_that_is_no_record_is_refused_and_left_alone(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    work = colour.define(effects.hit, backend=opened(backend_url), key="k", namespace="n")
    colour.call(work)
    table = table_of(backend_url)
    with engine_of(backend_url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        connection.execute(table.update().values(state="X"))
        before = connection.execute(table.select()).all()
        for ask in (work, work.outcome, work.peek, work.explain, work.forget):
            with pytest.raises(BackendError, match="no record of ours") as caught:
                colour.call(ask)
            assert not isinstance(caught.value, BackendUnavailable)
        assert connection.execute(table.select()).all() == before
    assert effects.count == 1


@on_each_database
def test_a_row_that_the_database_refuses_is_an_error_and_no_endless_loop(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    work = colour.define(lambda n: effects.hit(), backend=opened(backend_url), namespace="n", key="{n}")
    colour.call(work, 1)
    table = table_of(backend_url).name
    with engine_of(backend_url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        connection.execute(sa.text(f"CREATE UNIQUE INDEX only_one_{table} ON {table} (space)"))
    with pytest.raises(BackendError, match="(?i)unique|duplicate"):
        colour.call(work, 2)
    assert effects.count == 1


@pytest.mark.parametrize("trouble", ["its pool is used up", "its server is frozen"])
def test_a_ready_made_engine_is_given_up_in_our_time_and_not_in_its_own(
    own_server: Server, table: str, trouble: str, opened: Callable[..., SQLBackend]
) -> None:
    with engine_of(own_server.url, pool_size=1, max_overflow=0, pool_timeout=60) as engine:
        backend = opened(engine, table=table, timeout=0.5)
        drive(backend.read(RecordId("n", "k")))
        taken = engine.connect()
        if trouble == "its server is frozen":
            taken.detach()
            own_server.freeze()
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            drive(backend.read(RecordId("n", "k")))
        assert time.monotonic() - began < 5
        own_server.thaw()
        taken.close()
        nobody_connects()
        assert engine.pool.checkedout() == 0
        assert drive(backend.read(RecordId("n", "k"))) is None


@on_each_server
def test_a_connection_whose_making_was_interrupted_is_closed(
    backend_url: str, opened: Callable[..., SQLBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    link = opened(backend_url).blocking()._link  # type: ignore[attr-defined]
    connect, made = link.engine.dialect.connect, []
    monkeypatch.setattr(link.engine.dialect, "connect", lambda *a, **k: made.append(connect(*a, **k)) or made[-1])
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "idempotent-connect":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            drive(link.run(lambda connection: None, time.monotonic() + 20))
    eventually(lambda: made and (made[0].closed if hasattr(made[0], "closed") else not made[0].open))


@on_each_database
def test_what_is_closed_keeps_no_connection_for_a_command_under_way_or_a_later_one(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    backend = opened(backend_url)
    link = backend._links[colour.name]
    entered, closed = threading.Event(), threading.Event()
    pools: list[Any] = []

    def slow(connection: sa.Connection) -> int:
        pools.append(connection.engine.pool)
        entered.set()
        assert colour.is_async or closed.wait(30)
        return connection.execute(sa.text("SELECT 7")).scalar_one()

    if colour.is_async:

        async def main() -> None:
            slow_one = asyncio.ensure_future(link.run(slow, time.monotonic() + 30))
            while not entered.is_set():
                await asyncio.sleep(0)
            await backend.aclose()
            assert await slow_one == 7
            assert pools[0].checkedin() == 0
            assert await link.run(slow, time.monotonic() + 30) == 7

        asyncio.run(main())
    else:
        thread = threading.Thread(target=lambda: drive(link.run(slow, time.monotonic() + 30)))
        thread.start()
        assert entered.wait(30)
        backend.close()
        closed.set()
        thread.join(30)
        assert pools[0].checkedin() == 0
        assert drive(link.run(slow, time.monotonic() + 30)) == 7
    assert [pool.checkedin() for pool in pools] == [0, 0]


@on_postgres
def test_a_backend_that_nobody_has_any_more_is_collected(backend_url: str) -> None:
    backend = SQLBackend(backend_url)
    drive(backend.read(RecordId("n", "k")))
    backend.close()
    link = weakref.ref(backend._link)
    del backend
    gc.collect()
    assert link() is None


# ----------------------------------------------------------------------------------------------------- servers in trouble


def test_a_frozen_server_is_given_up_by_the_own_deadline_and_nothing_ran(
    own_server: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    charge = colour.define(effects.hit, backend=opened(own_server.url, table=table, timeout=0.5))
    other = colour.define(effects.hit, backend=opened(own_server.url, table=table), namespace="other")
    colour.call(other)
    own_server.freeze()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            colour.call(charge)
        assert 0.4 < time.monotonic() - began < 2.5
    assert effects.count == 1
    own_server.thaw()
    assert colour.call(charge) == 2
    assert colour.call(charge) == 2


@pytest.mark.parametrize("warm", [False, True])
def test_no_command_to_a_frozen_server_outlasts_its_timeout_or_its_lease(
    own_server: Server, table: str, colour: Colour, warm: bool, opened: Callable[..., SQLBackend]
) -> None:
    with (
        Commands(opened(own_server.url, table=table), COLOURS[0]) as direct,
        Commands(opened(own_server.url, table=table, timeout=3), colour) as commands,
    ):
        direct.read(RecordId("n", "k"))
        if warm:
            commands.read(RecordId("n", "k"))
        lasted = {}
        own_server.freeze()
        for word, command in {
            "read, timeout 3": lambda: commands.read(RecordId("n", "k")),
            "claim, lease 0.5": lambda: claim(commands, RecordId("n", "k"), lease=0.5),
        }.items():
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                command()
            lasted[word] = round(time.monotonic() - began, 2)
        own_server.thaw()
    assert lasted["read, timeout 3"] < 3.7, lasted
    assert lasted["claim, lease 0.5"] < 1.2, lasted


@pytest.mark.parametrize("raises", [False, True])
def test_a_frozen_server_does_not_hold_the_end_of_a_call_beyond_its_lease(
    own_server: Server, table: str, colour: Colour, raises: bool, opened: Callable[..., SQLBackend]
) -> None:
    def work(order: int) -> int:
        if order:
            own_server.freeze()
            if raises:
                raise KeyError(order)
        return order

    work = colour.define(work, backend=opened(own_server.url, table=table, timeout=5), lease=1, key="{order}")
    colour.call(work, 0)
    began = time.monotonic()
    if raises:
        with pytest.raises(KeyError):
            colour.call(work, 1)
    else:
        outcome = colour.call(work.outcome, 1)
        assert (outcome.value, outcome.stored) == (1, False)
    assert time.monotonic() - began < 4
    own_server.thaw()


def test_a_completion_outlasts_a_frozen_server(
    own_server: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    def work() -> int:
        own_server.freeze()
        return effects.hit()

    work = colour.define(work, backend=opened(own_server.url, table=table, timeout=1), lease=30)
    thaw = threading.Timer(1.7, own_server.thaw)  # past the first deadline: the flow itself sends again
    thaw.start()
    outcome = colour.call(work.outcome)
    thaw.join()
    assert (outcome.value, outcome.stored, outcome.replayed) == (1, True, False)
    assert colour.call(work) == 1
    assert effects.count == 1


def test_a_refused_connection_is_told_at_once(
    own_server: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    charge = colour.define(effects.hit, backend=opened(own_server.url, table=table, timeout=10))
    own_server.kill()
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        colour.call(charge)
    assert time.monotonic() - began < 2
    assert effects.count == 0


def test_records_survive_a_killed_server(
    own_server: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    work = colour.define(lambda order: effects.hit(), backend=opened(own_server.url, table=table), key="{order}")
    answers = [colour.call(work, order) for order in range(10)]
    own_server.kill()
    with pytest.raises(BackendUnavailable):
        colour.call(work, 10)
    own_server.restart()
    assert [colour.call(work, order) for order in range(10)] == answers
    assert effects.count == 10


@on_postgres
def test_a_read_only_database_refuses_before_the_run(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    writable = colour.define(effects.hit, backend=opened(backend_url), namespace="n")
    assert colour.call(writable) == 1
    url = joined(backend_url, options="-c default_transaction_read_only=on")
    with pytest.raises(BackendUnavailable, match="read-only"):
        colour.call(colour.define(effects.hit, backend=opened(url), namespace="other"))
    assert effects.count == 1


def test_a_read_only_mariadb_refuses_before_the_run(
    own_mariadb: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    user = f"app{table}"[:32]
    url = own_mariadb.url.replace("root@", f"{user}:pw@")
    with pymysql.connect(host="127.0.0.1", port=own_mariadb.port, user="root") as connection:
        cursor = connection.cursor()
        cursor.execute(f"CREATE USER {user}@localhost IDENTIFIED BY 'pw'")
        cursor.execute(f"GRANT ALL ON test.* TO {user}@localhost")
        backend = opened(url, table=table)
        assert colour.call(colour.define(effects.hit, backend=backend, namespace="n")) == 1
        cursor.execute("SET GLOBAL read_only = 1")
        try:
            with pytest.raises(BackendUnavailable, match="read-only"):
                colour.call(colour.define(effects.hit, backend=backend, namespace="other"))
        finally:
            cursor.execute("SET GLOBAL read_only = 0")
    assert effects.count == 1


@pytest.mark.parametrize("kind", ["postgres", "mariadb"])
def test_a_server_without_free_connections_is_waited_for_or_named(
    kind: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    # On PostgreSQL one connection more for each backend that has waiters, to listen.
    small = {"max_connections": 8, "superuser_reserved_connections": 0, "max_wal_senders": 0}
    with start_postgres(**small) if kind == "postgres" else start_mariadb("--max-connections=6") as server:
        work = colour.define(
            lambda order: effects.hit(), backend=opened(server.url, timeout=1.5), key="{order}", namespace="n"
        )
        assert colour.call(work, 0) == 1
        with contextlib.ExitStack() as held:
            with engine_of(server.url, pool_size=20) as engine:
                with contextlib.suppress(sa.exc.OperationalError):
                    for _ in range(20):
                        held.enter_context(engine.connect())
                fresh = colour.define(effects.hit, backend=opened(server.url, timeout=1), namespace="fresh")
                began = time.monotonic()
                with pytest.raises(BackendUnavailable):
                    colour.call(fresh)
                assert time.monotonic() - began < 3
                assert effects.count == 1
                waiting = colour.start(
                    colour.define(effects.hit, backend=opened(server.url, timeout=10), namespace="waiting")
                )
                threading.Event().wait(0.3)
                held.close()
        assert waiting.result(30) == 2
        # More connections wanted than there are: those that exist serve everybody in turn.
        two = [
            colour.define(
                lambda order: effects.hit(), backend=opened(server.url, timeout=10), key="{order}", namespace="two"
            )
            for _ in range(2)
        ]
        # Each has a connection: who comes late to a full server finds none that others have at hand.
        for function in two:
            assert colour.call(function, 0) == 3
        storms = [COLOURS[0].start(many, colour, function, 20) for function in two]
        answers = [storm.result(60) for storm in storms]
        assert answers[0] == answers[1]
        assert sorted(answers[0]) == list(range(3, 23))


def many(colour: Colour, function: Any, times: int) -> list[Any]:
    """Calls with the numbers up to `times`, all at once."""
    if colour.is_async:

        async def main() -> list[Any]:
            return await asyncio.gather(*(function(number) for number in range(times)), return_exceptions=True)

        return asyncio.run(main())
    calls = [colour.start(function, number) for number in range(times)]
    return [call.exception(60) or call.result() for call in calls]


@on_each_database
def test_two_hundred_callers_with_keys_of_their_own_share_one_pool(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    backend = opened(backend_url, timeout=20)
    work = colour.define(lambda number: number + 1, backend=backend, key="{number}")
    assert many(colour, work, 200) == [number + 1 for number in range(200)]
    with rows_of(backend_url) as rows:
        counted = sa.select(sa.func.count()).select_from(rows.table).where(rows.table.c.state == "C")
        assert rows.connection.execute(counted).scalar() == 200


# ----------------------------------------------------------------------------------------------------------------- locks


@on_each_server
def test_a_row_that_another_transaction_locks_is_given_up_in_time(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    rid = RecordId("n", "k")
    complete = {"attempt": A, "codec": "json", "body": b"1", "ttl": 60.0}
    with engine_of(backend_url) as engine, Commands(opened(backend_url, timeout=1), colour) as commands:
        commands.read(rid)
        token = claim(commands, rid).token
        table = table_of(backend_url)
        with engine.begin() as connection:
            locked = sa.select(table.c.id).where(table.c.id == rid.digest).with_for_update()
            assert connection.execute(locked).scalar() == rid.digest
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                commands.complete(rid, token=token, **complete)
            assert 0.8 < time.monotonic() - began < 2.5
            assert claim(commands, rid, B)[:1] == (token,)  # a look is not held up
        assert commands.complete(rid, token=token, **complete) is Answer.DONE
        assert isinstance(claim(commands, rid, B), Settled)


@on_each_server
def test_a_claim_that_another_transaction_holds_up_runs_nothing(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    work = colour.define(effects.hit, backend=opened(backend_url, timeout=1), key="k", namespace="n", lease=2)
    with Commands(opened(backend_url), COLOURS[0]) as commands, engine_of(backend_url) as engine:
        claim(commands, RecordId("n", "other"))
        table, rid = table_of(backend_url), RecordId("n", "k")
        with engine.connect() as connection:
            columns = [column for column in table.c if column.name != "id"]
            source = sa.select(sa.literal(rid.digest), *columns).limit(1)
            connection.execute(table.insert().from_select(["id", *(c.name for c in columns)], source))
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                colour.call(work)
            assert 0.8 < time.monotonic() - began < 2.5
            assert effects.count == 0
            connection.rollback()
        # What the server still had of the claim may be applied now, and then its lease runs out.
        again = colour.define(effects.hit, backend=opened(backend_url), key="k", namespace="n", wait=30)
        assert colour.call(again) == 1
        assert colour.call(again) == 1


@on_sqlite
def test_a_long_writer_on_sqlite_is_waited_for_until_the_deadline(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    patient = colour.define(effects.hit, backend=opened(backend_url, timeout=10), namespace="patient")
    hasty = colour.define(effects.hit, backend=opened(backend_url, timeout=0.5), namespace="hasty")
    assert colour.call(patient) == 1
    path = backend_url.partition("///")[2].partition("?")[0]
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match="did not confirm"):
            colour.call(hasty)
        assert 0.4 < time.monotonic() - began < 1.5
        assert effects.count == 1
        assert colour.call(patient) == 1  # readers go on
        waiting = colour.start(colour.define(effects.hit, backend=opened(backend_url, timeout=10), namespace="late"))
        threading.Event().wait(0.3)
        assert not waiting.done()
        writer.execute("ROLLBACK")
        assert waiting.result(30) == 2
        assert colour.call(hasty) == 3


@on_sqlite
def test_a_claim_that_a_long_writer_holds_up_does_not_outlast_its_lease(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    path = backend_url.partition("///")[2].partition("?")[0]
    with Commands(opened(backend_url, timeout=4), colour) as commands:
        commands.read(RecordId("n", "k"))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as writer:
            writer.execute("BEGIN IMMEDIATE")
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                claim(commands, RecordId("n", "k"), lease=0.5)
            assert time.monotonic() - began < 1.2
            writer.execute("ROLLBACK")


# ----------------------------------------------------------------------------------------------------------------- table


@on_each_database
def test_a_missing_table_is_named_where_it_is_not_to_be_made(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    work = colour.define(effects.hit, backend=opened(backend_url, create=False))
    with pytest.raises(BackendError, match="missing.*t_[0-9a-f]{12}|idempotent_records") as refused:
        colour.call(work)
    assert not isinstance(refused.value, BackendUnavailable)
    assert effects.count == 0
    with engine_of(backend_url) as engine:
        table_of(backend_url).create(engine)
    assert colour.call(work) == 1


@on_each_database
def test_a_table_that_is_dropped_is_made_again(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    work = colour.define(effects.hit, backend=opened(backend_url))
    assert colour.call(work) == 1
    with engine_of(backend_url) as engine:
        table_of(backend_url).drop(engine)
    assert colour.call(work) == 2
    assert colour.call(work) == 2


def test_a_table_is_made_however_often_the_connection_is_lost_meanwhile(
    own_server: Server, table: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    losses = 5
    with Proxy("127.0.0.1", own_server.port) as proxy:
        backend = opened(through(proxy, own_server), table=table, timeout=30)

        @sa.event.listens_for(backend.metadata, "before_create")
        def lose(*_: Any, **__: Any) -> None:
            nonlocal losses
            if losses:
                losses -= 1
                proxy.drop()

        assert colour.call(colour.define(effects.hit, backend=backend, namespace="n", lease=60)) == 1
    assert losses == 0


@on_each_database
def test_threads_that_find_no_table_make_one(
    backend_url: str, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    backends = [opened(backend_url) for _ in range(12)]
    barrier = threading.Barrier(len(backends))

    def first(backend: SQLBackend) -> int:
        work = COLOURS[0].define(effects.hit, backend=backend, namespace="n")
        barrier.wait()
        return work()

    calls = [COLOURS[0].start(first, backend) for backend in backends]
    assert [call.result(60) for call in calls] == [1] * len(backends)


FIRST_USE = """
import sys
from idempotent import SQLBackend, idempotent
backend = SQLBackend(sys.argv[1])
work = idempotent(lambda: sys.argv[2], backend=backend, namespace="n", key=lambda: "k")
sys.stdin.readline()
print(work())
"""


@on_each_database
def test_processes_that_find_no_table_make_one(backend_url: str) -> None:
    command = [sys.executable, "-c", FIRST_USE, backend_url]
    checkout = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}  # and not a copy that is installed
    workers = [
        subprocess.Popen(
            [*command, str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=checkout
        )
        for number in range(4)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=60)[0] for worker in workers]
    assert len(set(answers)) == 1
    assert answers[0].strip() in "0123"


@on_each_database
def test_the_table_is_what_records_table_says(backend_url: str, opened: Callable[..., SQLBackend]) -> None:
    backend = opened(backend_url)
    with Commands(backend, COLOURS[0]) as commands, engine_of(backend_url) as engine:
        commands.read(RecordId("n", "k"))
        inspector = sa.inspect(engine)
        name = table_of(backend_url).name
        columns = {column["name"]: column for column in inspector.get_columns(name)}
        assert list(columns) == [
            *("id", "space", "namespace", "key", "state", "token", "attempt", "fingerprint"),
            *("since", "lease", "lease_until", "expires", "codec", "body"),
        ]
        assert [name for name, column in columns.items() if column["nullable"]] == ["expires"]
        assert inspector.get_pk_constraint(name)["constrained_columns"] == ["id"]
        assert [index["column_names"] for index in inspector.get_indexes(name)] == [["expires"]]
    assert list(backend.metadata.tables) == [name]


@on_each_database
def test_a_table_in_ones_own_metadata_serves(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    metadata = sa.MetaData()
    sa.Table(f"{table_of(backend_url).name}_mine", metadata, sa.Column("id", sa.Integer, primary_key=True))
    table = records_table(metadata, table_of(backend_url).name)
    assert table.metadata is metadata
    with engine_of(backend_url) as engine:
        metadata.create_all(engine)
        try:
            work = colour.define(effects.hit, backend=opened(backend_url, create=False), key="k", namespace="n")
            assert colour.call(work) == 1
            with engine.connect() as connection:
                assert connection.execute(sa.select(table.c.namespace, table.c.key)).all() == [("n", "k")]
        finally:
            metadata.drop_all(engine)


@on_postgres
def test_a_schema_is_used(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    schema = f"s_{time.time_ns()}"
    with engine_of(backend_url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {schema}"))
        try:
            work = colour.define(effects.hit, backend=opened(backend_url, schema=schema))
            assert [colour.call(work), colour.call(work)] == [1, 1]
            assert sa.inspect(engine).get_table_names(schema=schema) == [table_of(backend_url).name]
        finally:
            connection.execute(sa.text(f"DROP SCHEMA {schema} CASCADE"))


@on_each_database
def test_two_tables_share_nothing(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    name = f"{table_of(backend_url).name}_b"
    one = colour.define(effects.hit, backend=opened(backend_url), namespace="n")
    other = colour.define(effects.hit, backend=opened(backend_url, table=name), namespace="n")
    try:
        assert [colour.call(one), colour.call(other), colour.call(one), colour.call(other)] == [1, 2, 1, 2]
        assert colour.call(one.forget)
        assert colour.call(other) == 2
    finally:
        with engine_of(backend_url) as engine:
            records_table(sa.MetaData(), name).drop(engine)


@on_each_database
def test_keys_that_a_collation_holds_for_equal_are_distinct(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    long = "x" * 999
    keys = ["Key-1", "KEY-1", "key-1", "Key-1 ", " Key-1", "Kéy-1", "Ke\u0301y-1", "Straße", "Strasse", "😀", "😁"]
    keys += [f"{long}a", f"{long}b", f"{long}A", long, "😀" * 1000, "😀" * 999 + "😁"]
    with Commands(opened(backend_url), colour) as commands:
        replies = [claim(commands, RecordId("N", key)) for key in keys]
        assert [type(reply) for reply in replies] == [Granted] * len(keys)
        for key in keys:
            assert isinstance(claim(commands, RecordId("n", key)), Granted)
        assert {record.key for record in commands.scanned(namespace="N")} == set(keys)
        for key, reply in zip(keys, replies, strict=True):
            found = commands.read(RecordId("N", key))
            assert (found.key, found.token) == (key, reply.token)


@on_each_database
def test_purge_drops_only_what_is_past_its_retention_batch_by_batch(
    backend_url: str, colour: Colour, opened: Callable[..., SQLBackend]
) -> None:
    with Commands(opened(backend_url), colour) as commands, rows_of(backend_url) as rows:
        commands.read(RecordId("n", "k"))
        for number in range(25):
            rid = RecordId("n", f"over{number}")
            token = claim(commands, rid).token
            commands.complete(rid, attempt=A, token=token, codec="", body=b"", ttl=60.0)
            rows.age(rid, 61_000_000)
        lives = {"running": 30.0, "lapsed": 30.0, "completed": 30.0, "kept": 30.0}
        for key in lives:
            claim(commands, RecordId("n", key), keep=None if key != "kept" else 600.0)
        rows.age(RecordId("n", "lapsed"), 31_000_000)
        rows.age(RecordId("n", "kept"), 600_000_000)
        done = RecordId("n", "completed")
        commands.complete(done, attempt=A, token=commands.read(done).token, codec="", body=b"", ttl=60.0)
        assert {record.key for record in commands.scanned()} == set(lives)  # what is over is not shown
        assert [commands.purge(10), commands.purge(10), commands.purge(10), commands.purge(10)] == [10, 10, 5, 0]
        counted = sa.select(rows.table.c.key).order_by(rows.table.c.key)
        assert set(rows.connection.execute(counted).scalars()) == set(lives)
        rows.age(RecordId("n", "kept"), 60_000_000)
        assert commands.purge() == 1


def test_a_scan_shows_each_record_once_filtered_by_state_and_namespace(backend_url: str, colour: Colour) -> None:
    backend = open_backend(backend_url)
    with Commands(backend, COLOURS[0]) as fill:
        fill.read(RecordId("n", "k"))
        expected: dict[tuple[str, str], str] = {}
        for number in range(560):
            namespace, key = f"n{number % 2}", f"k*{number}"
            rid = RecordId(namespace, key)
            token = claim(fill, rid).token
            expected[namespace, key] = "running"
            if number % 40 == 0:
                fill.complete(rid, attempt=A, token=token, codec="", body=b"", ttl=60.0)
                expected[namespace, key] = "completed"
            elif number % 40 == 1:
                fill.fail(rid, attempt=A, token=token, codec="", body=b"", ttl=60.0)
                expected[namespace, key] = "failed"
            elif number % 40 == 2:
                fill.release(rid, attempt=A, token=token, unknown=True)
                expected[namespace, key] = "unknown"
    with Commands(backend, colour) as commands:
        shown = [(record.namespace, record.key, record.state) for record in commands.scanned()]
        assert len(shown) == 560
        assert {(namespace, key): state for namespace, key, state in shown} == expected
        for state in ("running", "completed", "failed", "unknown"):
            for namespace in ("n0", "n1", "none"):
                wanted = {key for (space, key), found in expected.items() if (space, found) == (namespace, state)}
                assert {record.key for record in commands.scanned(state=state, namespace=namespace)} == wanted
        assert len(commands.scanned(namespace="n1")) == 280


# ----------------------------------------------------------------------------------------------------- engines and URLs


@on_each_database
def test_a_ready_made_engine_serves_sync_callers_and_refuses_others_with_the_remedy(
    backend_url: str, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    with engine_of(backend_url) as engine:
        backend = opened(engine, table=table_of(backend_url).name)
        work = COLOURS[0].define(effects.hit, backend=backend)
        assert COLOURS[0].storm(work, 20) == [1] * 20
        with pytest.raises(BackendError, match="AsyncEngine, or a URL"):
            COLOURS[1].call(COLOURS[1].define(effects.hit, backend=backend))
        backend.close()
        with engine.connect() as connection:  # the engine stays its owner's, and transactional
            assert connection.get_isolation_level() != "AUTOCOMMIT"
    assert effects.count == 1


@on_each_database
def test_a_ready_made_async_engine_serves_async_callers_and_refuses_others_with_the_remedy(
    backend_url: str, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    async def main() -> None:
        bare, _ = split_url(backend_url, ("table",))
        engine = create_async_engine(_engines.twins(bare)[1])
        backend = opened(engine, table=table_of(backend_url).name)
        work = COLOURS[1].define(effects.hit, backend=backend)
        assert await asyncio.gather(*(work() for _ in range(20))) == [1] * 20
        with pytest.raises(BackendError, match="an Engine, or a URL"):
            COLOURS[0].call(COLOURS[0].define(effects.hit, backend=backend))
        await backend.aclose()
        async with engine.connect() as connection:
            assert (await connection.execute(sa.text("SELECT 1"))).scalar() == 1
        await engine.dispose()

    asyncio.run(main())
    assert effects.count == 1


@on_each_database
def test_an_engines_pool_that_is_used_up_runs_nothing_until_it_has_room(
    backend_url: str, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    with engine_of(backend_url, pool_size=1, max_overflow=0, pool_timeout=0.3) as engine:
        work = COLOURS[0].define(effects.hit, backend=opened(engine, table=table_of(backend_url).name))
        with engine.connect(), pytest.raises(BackendUnavailable):
            work()
        assert effects.count == 0
        assert work() == 1


@on_each_database
def test_an_async_engines_pool_that_is_used_up_runs_nothing_until_it_has_room(
    backend_url: str, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    async def main() -> None:
        bare, _ = split_url(backend_url, ("table",))
        engine = create_async_engine(_engines.twins(bare)[1], pool_size=1, max_overflow=0, pool_timeout=0.3)
        work = COLOURS[1].define(effects.hit, backend=opened(engine, table=table_of(backend_url).name))
        async with engine.connect():
            with pytest.raises(BackendUnavailable):
                await work()
        assert effects.count == 0
        assert await work() == 1
        await engine.dispose()

    asyncio.run(main())


@on_each_database
def test_the_own_pool_that_is_used_up_runs_nothing_until_it_has_room(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    backend = opened(backend_url, timeout=0.6)
    work = colour.define(effects.hit, backend=backend, key="k")
    held = threading.Event()

    async def main() -> None:
        link = backend.asynchronous()._link if colour.is_async else backend.blocking()._link  # type: ignore[attr-defined]

        def hold(connection: object) -> None:
            assert held.wait(30)

        if colour.is_async:
            shared = await link._engines.get()
            engine = shared.engine
            await shared._close_idle()
            taken = [await engine.connect() for _ in range(_engines._CONNECTIONS)]
            with pytest.raises(BackendUnavailable):
                await work()
            for connection in taken:
                await connection.close()
            assert await work() == 1
            return
        threads = [
            threading.Thread(target=lambda: drive(link.run(hold, time.monotonic() + 30)))
            for _ in range(_engines._CONNECTIONS)
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: link._free.qsize() == 0)
        with pytest.raises(BackendUnavailable):
            work()
        held.set()
        for thread in threads:
            thread.join()
        assert work() == 1

    asyncio.run(main())
    assert effects.count == 1


DRIVERS = [
    ("sqlite:///f.db", "sqlite", "sqlite+aiosqlite"),
    ("sqlite+aiosqlite:///f.db", "sqlite", "sqlite+aiosqlite"),
    ("sqlite+pysqlite:///f.db", "sqlite", "sqlite+aiosqlite"),
    ("postgres://h/d", "postgresql+psycopg", "postgresql+psycopg"),
    ("postgresql://h/d", "postgresql+psycopg", "postgresql+psycopg"),
    ("postgresql+psycopg2://h/d", "postgresql+psycopg", "postgresql+psycopg"),
    ("postgresql+psycopg://h/d", "postgresql+psycopg", "postgresql+psycopg"),
    ("postgresql+asyncpg://h/d", "postgresql+psycopg", "postgresql+asyncpg"),
    ("postgres+asyncpg://h/d", "postgresql+psycopg", "postgresql+asyncpg"),
    ("mysql://h/d", "mysql+pymysql", "mysql+aiomysql"),
    ("mysql+pymysql://h/d", "mysql+pymysql", "mysql+aiomysql"),
    ("mysql+aiomysql://h/d", "mysql+pymysql", "mysql+aiomysql"),
    ("mysql+mysqldb://h/d", "mysql+pymysql", "mysql+aiomysql"),
    ("mariadb://h/d", "mariadb+pymysql", "mariadb+aiomysql"),
]


@pytest.mark.parametrize(("url", "sync", "asynchronous"), DRIVERS)
def test_a_driver_in_the_url_is_a_hint(url: str, sync: str, asynchronous: str) -> None:
    assert [twin.drivername for twin in _engines.twins(url)] == [sync, asynchronous]


SCHEMES = {
    "sqlite": ["sqlite+aiosqlite"],
    "postgres": ["postgres", "postgresql+psycopg2", "postgresql+asyncpg"],
    "mariadb": ["mysql+pymysql", "mariadb", "mysql+aiomysql"],
}


@pytest.mark.parametrize(
    ("backend_url", "scheme"),
    [(kind, scheme) for kind, schemes in SCHEMES.items() for scheme in schemes],
    indirect=["backend_url"],
)
def test_every_scheme_serves_both_colours(
    backend_url: str, scheme: str, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    backend = opened(f"{scheme}://{backend_url.partition('://')[2]}")
    sync = COLOURS[0].define(effects.hit, backend=backend, namespace="n")
    asynchronous = COLOURS[1].define(effects.hit, backend=backend, namespace="n")
    assert COLOURS[1].storm(asynchronous, 20) == [1] * 20
    assert COLOURS[0].storm(sync, 20) == [1] * 20
    with Commands(backend, COLOURS[1]) as commands:
        assert contended_tasks(backend) == []
        assert claim(commands, RecordId("N", "\U0001f600"), fingerprint=b"").token > 0


def contended_tasks(backend: SQLBackend) -> list[Any]:
    """What went wrong where tasks race for records that are not there."""

    async def main() -> list[Any]:
        commands, wrong = backend.asynchronous(), []
        for turn in range(3):
            options = {"fingerprint": ARGS, "lease": 30.0, "keep": None, "takeover": True}
            rid = RecordId("tasks", str(turn))
            claims = [commands.claim(rid, attempt=b"rival%03d" % number, **options) for number in range(12)]
            kinds = [type(reply) for reply in await asyncio.gather(*claims, return_exceptions=True)]
            if (kinds.count(Granted), kinds.count(Busy)) != (1, 11):
                wrong.append(kinds)
        return wrong

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite+aiosqlite://", "needs a file"),
        ("oracle://h/d", "no SQL backend for oracle"),
        ("nonsense", "cannot be read"),
        ("sqlite:///f.db?timeout=soon", "timeout"),
        ("sqlite:///f.db?timeout=0", "timeout"),
        ("sqlite:///f.db?table=", "identifier|letters"),
        ("sqlite:///f.db?table=1st", "letters"),
        ("sqlite:///f.db?table=a-b", "letters"),
        ("sqlite:///f.db?table=a%22;--", "letters"),
        (f"sqlite:///f.db?table={'t' * 49}", "letters"),
        ("sqlite:///f.db?table=t%0A", "letters"),
        ("sqlite:///f.db?table=t%C3%A9", "letters"),
    ],
)
def test_a_wrong_url_is_refused_when_the_backend_is_made(url: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SQLBackend(url)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "mysql"])
def test_a_misspelt_option_is_refused_when_the_backend_is_made(kind: str, tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path}/f.db" if kind == "sqlite" else f"{kind}://127.0.0.1:1/d"
    with pytest.raises(ValueError, match="tabel"):
        SQLBackend(f"{place}?tabel=records")


def test_what_is_no_database_is_refused() -> None:
    for thing in (None, 17, object()):
        with pytest.raises(TypeError, match="takes a URL, an Engine or an AsyncEngine"):
            SQLBackend(thing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="letters"):
        SQLBackend("sqlite:///f.db", schema="a b")
    with LocalBackend() as local, pytest.raises(TypeError):
        SQLBackend(local)  # type: ignore[arg-type]


@on_each_database
def test_the_options_of_the_url_give_way_to_arguments(backend_url: str, opened: Callable[..., SQLBackend]) -> None:
    bare, _ = split_url(backend_url, ("table",))
    url = joined(bare, table="from_url", timeout="1.5")
    assert (opened(url).table.name, opened(url).timeout) == ("from_url", 1.5)
    both = opened(url, table="from_argument", timeout=2)
    assert (both.table.name, both.timeout) == ("from_argument", 2)
    assert (opened(bare).table.name, opened(bare).timeout) == ("idempotent_records", 5)


# ------------------------------------------------------------------------------------------------- what a command costs


@on_postgres
def test_an_ordinary_call_on_postgresql_is_one_statement_a_step(
    backend_url: str, opened: Callable[..., SQLBackend]
) -> None:
    rid = RecordId("n", "k")
    with engine_of(backend_url) as engine:
        with Commands(opened(engine, table=table_of(backend_url).name), COLOURS[0]) as commands:
            commands.read(rid)
            sent: list[str] = []
            sa.event.listen(engine, "before_cursor_execute", lambda *event: sent.append(event[2]))

            def counted(command: Callable[[], Any]) -> tuple[int, Any]:
                del sent[:]
                reply = command()
                return len(sent), reply

            count, granted = counted(lambda: claim(commands, rid))
            assert (count, type(granted)) == (1, Granted)
            mine = {"attempt": A, "token": granted.token}
            assert counted(lambda: commands.renew(rid, **mine, lease=9.0)) == (1, Answer.DONE)
            outcome = {"codec": "c", "body": b"1", "ttl": 9.0}
            assert counted(lambda: commands.complete(rid, **mine, **outcome)) == (1, Answer.DONE)
            count, settled = counted(lambda: claim(commands, rid, B))
            assert (count, type(settled)) == (1, Settled)
            other = RecordId("n", "other")
            mine = {"attempt": A, "token": claim(commands, other).token}
            assert counted(lambda: commands.release(other, **mine)) == (1, Answer.DONE)


@pytest.mark.parametrize(
    ("colour", "ready_made"), [(COLOURS[0], False), (COLOURS[0], True), (COLOURS[1], False)], ids=repr
)
def test_no_connection_is_left_in_a_transaction(
    own_postgres: Server, table: str, colour: Colour, ready_made: bool, opened: Callable[..., SQLBackend]
) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(engine_of(own_postgres.url)) if ready_made else own_postgres.url
        backend = opened(server, table=table)
        seen: set[str] = set()

        def look() -> None:
            with psycopg.connect(own_postgres.url, autocommit=True) as connection:
                found = connection.execute(
                    "SELECT state FROM pg_stat_activity"
                    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND query LIKE %s",
                    (f"%{table}%",),
                )
                seen.update(state for (state,) in found)

        def work(order: int) -> int:
            look()  # while the function runs, after its claim
            if order % 3 == 2:
                raise KeyError(order)
            return order

        work = colour.define(work, backend=backend, key="{order}")
        for order in (0, 1, 2, 0):
            with contextlib.suppress(KeyError):
                colour.call(work, order)
        look()
        assert seen == {"idle"}


@on_mariadb
def test_an_outcome_larger_than_a_packet_is_recorded_as_done(
    backend_url: str, colour: Colour, effects: Counter, opened: Callable[..., SQLBackend]
) -> None:
    with engine_of(backend_url) as engine, engine.connect() as connection:
        limit = connection.execute(sa.text("SELECT @@max_allowed_packet")).scalar_one()

    def work(share: float) -> str:
        effects.hit()
        return "x" * int(limit * share)

    work = colour.define(work, backend=opened(backend_url))
    assert colour.call(work, 0.45) == colour.call(work, 0.45)
    for _ in range(2):
        with pytest.raises(ResultUnavailable):
            colour.call(work, 0.55)
    assert effects.count == 2


@on_sqlite
def test_cancelled_statements_on_sqlite_leave_no_task(backend_url: str) -> None:
    async def main() -> None:
        @idempotent(backend=backend_url)
        async def work(number: int) -> int:
            return number

        await work(-1)
        for number in range(60):
            task = asyncio.ensure_future(work(number))
            for _ in range(number % 20):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
