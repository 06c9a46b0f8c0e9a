"""PostgreSQL tells its waiters: they hear of an end at once, hardly ask, and nobody pays who has no waiters."""

import asyncio
import contextlib
import select
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from colours import COLOURS, Colour
from probes import Counter, Gate, eventually
from servers import Server
from sqlalchemy.ext.asyncio import create_async_engine

from idempotent import SQLBackend
from idempotent._options import split_url
from idempotent._record import RecordId
from idempotent.backends._engines import twins
from idempotent.backends._listener import Refused
from idempotent.backends._notify import _CHANNEL, _CLASS, PostgresSubscriber, bucket_of

on_postgres = pytest.mark.parametrize("backend_url", ["postgres"], indirect=True)


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., SQLBackend]:
    """Makes backends that are closed after the test: each is what another process would have."""

    def make(*args: Any, **kwargs: Any) -> SQLBackend:
        backend = SQLBackend(*args, **kwargs)
        _fresh.callback(backend.close)
        return backend

    return make


@pytest.fixture
def space() -> str:
    """A namespace that no other test has."""
    return f"n{time.time_ns()}"


def plain(url: str) -> str:
    """The URL as psycopg reads it."""
    return split_url(url, ("table", "timeout"))[0].replace("postgresql+psycopg", "postgresql")


@contextlib.contextmanager
def onlooker(url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(plain(url), autocommit=True) as connection:
        yield connection


def bucket(namespace: str, key: str = "k") -> int:
    return bucket_of(RecordId(namespace, key).digest)


def subscribers(connection: psycopg.Connection[Any], bucket: int) -> list[int]:
    """The server processes whose sessions wait for something in `bucket`."""
    found = connection.execute(
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND classid::bigint = %s AND objid = %s AND granted",
        (_CLASS % 2**32, bucket),
    )
    return [pid for (pid,) in found]


def looks_of(backend: SQLBackend) -> list[Any]:
    """Grows whenever a waiter of `backend` looks whether the record still runs."""
    looks: list[Any] = []
    runs = backend._statements.runs
    backend._statements.runs = lambda *args: looks.append(args) or runs(*args)  # type: ignore[method-assign,func-returns-value]
    return looks


@on_postgres
def test_a_waiter_is_woken_by_the_notification_and_hardly_asks(
    backend_url: str, colour: Colour, effects: Counter, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    def work() -> int:
        gate.pass_through()
        return effects.hit()

    asking = opened(backend_url)
    first = colour.define(work, backend=opened(backend_url), key="k", namespace=space)
    second = colour.define(work, backend=asking, key="k", namespace=space)
    looks = looks_of(asking)
    with onlooker(backend_url) as connection:
        running = colour.start(first)
        assert gate.entered.wait(30)
        waiting = colour.start(second)
        eventually(lambda: looks)
        assert len(subscribers(connection, bucket(space))) == 1
        began = time.monotonic()
        gate.opened.set()
        assert running.result(30) == waiting.result(30) == 1
        assert time.monotonic() - began < 0.9  # its next look of its own would come after a second
        assert len(looks) == 1
        eventually(lambda: not subscribers(connection, bucket(space)))  # given up when nobody has waited for long
    assert effects.count == 1


@on_postgres
def test_nobody_is_notified_where_nobody_waits(
    backend_url: str, colour: Colour, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    def work(key: str, *, fails: bool = False) -> None:
        if key == "contended":
            gate.pass_through()
        if fails:
            raise KeyError(key)

    first = colour.define(work, backend=opened(backend_url), key="{key}", namespace=space, fingerprint=False)
    second = colour.define(work, backend=opened(backend_url), key="{key}", namespace=space, fingerprint=False)
    with onlooker(backend_url) as connection:
        connection.execute(f"LISTEN {_CHANNEL}")
        colour.call(first, "a")
        with contextlib.suppress(KeyError):
            colour.call(first, "b", fails=True)
        colour.call(first.forget, "a")
        running = colour.start(first, "contended")
        assert gate.entered.wait(30)
        waiting = colour.start(second, "contended")
        eventually(lambda: subscribers(connection, bucket(space, "contended")))
        gate.opened.set()
        running.result(30)
        waiting.result(30)
        digests = {RecordId(space, key).digest: key for key in ("a", "b", "contended")}
        heard = [
            digests[told.payload] for told in connection.notifies(timeout=5, stop_after=1) if told.payload in digests
        ]
    assert heard == ["contended"]


@on_postgres
def test_every_end_of_a_run_wakes_its_waiters(
    backend_url: str, colour: Colour, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    def work(ends: str) -> str:
        gate.pass_through()
        if ends == "raises" and not again:
            again.append(1)
            raise KeyError(ends)
        return ends

    options: dict[str, Any] = {"namespace": space, "key": "{ends}"}
    first = colour.define(work, backend=opened(backend_url), **options)
    second = colour.define(work, backend=opened(backend_url), **options)
    with onlooker(backend_url) as connection:
        for ends in ("returns", "raises", "is forgotten"):
            again: list[int] = []
            gate.entered.clear()
            gate.opened.clear()
            running = colour.start(first, ends)
            assert gate.entered.wait(30)
            waiting = colour.start(second, ends)
            eventually(lambda ends=ends: subscribers(connection, bucket(space, ends)))
            gate.entered.clear()
            began = time.monotonic()
            if ends == "is forgotten":
                assert colour.call(lambda: first.forget(ends, force=True))
                assert gate.entered.wait(30)  # the waiter runs now
            gate.opened.set()
            assert waiting.result(30) == ends
            assert time.monotonic() - began < 0.9
            running.exception(30)


@on_postgres
def test_a_message_that_is_read_together_with_a_reply_is_heard(
    backend_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = psycopg.connect(plain(backend_url))
    subscriber = PostgresSubscriber(connection, 5.0)
    ask = PostgresSubscriber._ask

    def and_more(self: PostgresSubscriber, statement: str, *values: Any) -> Any:
        reply = ask(self, statement, *values)
        other.execute("SELECT pg_notify('idempotent', 'behind the reply')")
        assert select.select([self], [], [], 20)[0]
        connection.pgconn.consume_input()
        return reply

    monkeypatch.setattr(PostgresSubscriber, "_ask", and_more)
    try:
        with psycopg.connect(plain(backend_url), autocommit=True) as other:
            assert (False, "behind the reply") in subscriber.subscribe({"0" * 48})
            assert subscriber.ping() == [(False, "behind the reply")]
    finally:
        subscriber.close()


@on_postgres
def test_a_waiter_whose_subscription_was_ended_still_gets_the_answer(
    backend_url: str, colour: Colour, effects: Counter, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    def work() -> int:
        gate.pass_through()
        return effects.hit()

    first = colour.define(work, backend=opened(backend_url), key="k", namespace=space)
    second = colour.define(work, backend=opened(backend_url), key="k", namespace=space)
    with onlooker(backend_url) as connection:
        running = colour.start(first)
        assert gate.entered.wait(30)
        waiting = colour.start(second)
        for _ in range(2):
            (pid,) = eventually(lambda: subscribers(connection, bucket(space)))
            connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
            eventually(lambda pid=pid: pid not in subscribers(connection, bucket(space)))
        eventually(lambda: subscribers(connection, bucket(space)))
        began = time.monotonic()
        gate.opened.set()
        assert running.result(30) == waiting.result(30) == 1
        assert time.monotonic() - began < 0.9
    assert effects.count == 1


def test_a_frozen_server_does_not_hold_the_waiters(
    own_postgres: Server, colour: Colour, effects: Counter, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    def work() -> int:
        gate.pass_through()
        return effects.hit()

    options: dict[str, Any] = {"key": "k", "namespace": space}
    first = colour.define(work, backend=opened(own_postgres.url, timeout=1), lease=60, **options)
    second = colour.define(work, backend=opened(own_postgres.url, timeout=1), wait=2, **options)
    running = colour.start(first)
    assert gate.entered.wait(30)
    with onlooker(own_postgres.url) as connection:
        waiting = colour.start(second)
        eventually(lambda: subscribers(connection, bucket(space)))
    own_postgres.freeze()
    began = time.monotonic()
    assert waiting.exception(30) is not None
    assert time.monotonic() - began < 10
    own_postgres.thaw()
    gate.opened.set()
    assert running.result(30) == effects.count == 1


@on_postgres
def test_behind_a_pooler_nobody_listens(backend_url: str) -> None:
    class Pooled:
        """A connection through a pooler: the process that answers is not the one that the greeting named."""

        info = SimpleNamespace(backend_pid=1)

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

    connection = psycopg.connect(plain(backend_url))
    with pytest.raises(Refused, match="pooler"):
        PostgresSubscriber(Pooled(), 5.0)
    assert connection.closed


@on_postgres
def test_waiters_poll_where_nobody_can_listen(
    backend_url: str, effects: Counter, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    colour = COLOURS[1]
    bare, options = split_url(backend_url, ("table",))

    def work() -> int:
        gate.pass_through()
        return effects.hit()

    async def on_engines_of_ones_own() -> None:
        engine = create_async_engine(twins(bare)[1])
        try:
            backend = opened(engine, table=options["table"])
            assert backend._listener is None
            running = asyncio.create_task(define(opened(backend_url))())
            await asyncio.to_thread(gate.entered.wait, 30)
            looks = looks_of(backend)
            waiting = asyncio.create_task(define(backend)())
            await asyncio.to_thread(eventually, lambda: len(looks) > 3)
            gate.opened.set()
            assert await running == await waiting == 1
        finally:
            await engine.dispose()

    def define(backend: SQLBackend) -> Any:
        return colour.define(work, backend=backend, key="k", namespace=space)

    asyncio.run(on_engines_of_ones_own())
    assert effects.count == 1


@on_postgres
def test_a_ready_made_engine_listens_on_a_connection_outside_of_its_pool(
    backend_url: str, effects: Counter, gate: Gate, opened: Callable[..., SQLBackend], space: str
) -> None:
    colour = COLOURS[0]
    bare, options = split_url(backend_url, ("table",))
    engine = sa.create_engine(twins(bare)[0], pool_size=1, max_overflow=0, pool_timeout=20)

    def work() -> int:
        gate.pass_through()
        return effects.hit()

    backend = opened(engine, table=options["table"])
    first = colour.define(work, backend=opened(backend_url), key="k", namespace=space)
    second = colour.define(work, backend=backend, key="k", namespace=space)
    with onlooker(backend_url) as connection:
        running = colour.start(first)
        assert gate.entered.wait(30)
        waiting = colour.start(second)
        eventually(lambda: subscribers(connection, bucket(space)))
        eventually(lambda: engine.pool.checkedout() == 0)
        gate.opened.set()
        assert running.result(30) == waiting.result(30) == 1
        backend.close()
        eventually(lambda: not subscribers(connection, bucket(space)))
    engine.dispose()
