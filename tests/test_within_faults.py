"""`within=` where things go wrong: calls inside calls, interruptions at each statement, lost connections, two phases."""

import asyncio
import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import sqlalchemy as sa
from bank import BANKS, Bank, Entry, bank_of, url_of
from colours import Colour
from servers import start_postgres
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncSession

from idempotent import InProgress, UnprotectedWarning, idempotent


@pytest.fixture(params=BANKS, ids="-".join)
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    kind, colour = request.param
    with bank_of(kind, Colour(colour), url_of(kind, request, tmp_path)) as made:
        yield made


def on(*kinds: str, colours: str = "sync async") -> Any:
    """A test for some banks only."""
    chosen = [(kind, colour) for kind, colour in BANKS if kind in kinds and colour in colours.split()]
    return pytest.mark.parametrize("bank", chosen, ids="-".join, indirect=True)


def deposit(session: Any, account: str) -> str:
    session.execute(sa.insert(Entry).values(account=account, amount=1))
    return f"receipt for {account}"


class DeadError(BaseException):
    pass


def sync_twin(bank: Bank) -> Bank:
    """The same database, for sync callers."""
    kind = "postgres" if bank.kind == "asyncpg" else bank.kind
    return Bank(kind, Colour("sync"), str(bank.url.render_as_string(False)), bank.name)


def end_lease(session: Any) -> None:
    """As if the function had been at work for longer than any lease."""
    session.execute(sa.text("UPDATE idempotent_records SET lease_until = 1 WHERE state = 'R'"))


# --------------------------------------------------------------------------------------------------- calls inside calls


def nested(bank: Bank, before: Callable[[Any], object], *, by_another: bool = False, **options: Any) -> Any:
    """A function that writes, has `before` done, and then comes to call itself, or to be called by another."""
    if bank.is_async:

        @idempotent(within="session", namespace="nested", key="{account}", **options)
        async def pay(session: Any, account: str) -> str:
            receipt: str = await session.run_sync(deposit, account)
            await session.run_sync(before)
            assert (await pay.explain(session, account)).decision == "would_refuse"
            with pytest.raises(InProgress, match="in this same transaction"):
                await (helper if by_another else pay)(session, account)
            return receipt

        @idempotent(within="session", namespace="another", key="{account}")
        async def helper(session: Any, account: str) -> str:
            return await pay(session, account)
    else:

        @idempotent(within="session", namespace="nested", key="{account}", **options)
        def pay(session: Any, account: str) -> str:
            receipt = deposit(session, account)
            before(session)
            assert pay.explain(session, account).decision == "would_refuse"
            with pytest.raises(InProgress, match="in this same transaction"):
                (helper if by_another else pay)(session, account)
            return receipt

        @idempotent(within="session", namespace="another", key="{account}")
        def helper(session: Any, account: str) -> str:
            return pay(session, account)

    return pay


@pytest.mark.parametrize("by_another", [False, True], ids=["itself", "another"])
@pytest.mark.parametrize("ttl", [86_400, 1e-6])
def test_a_call_inside_itself_is_refused_however_long_the_outer_one_has_run(
    bank: Bank, by_another: bool, ttl: float
) -> None:
    pay = nested(bank, end_lease, by_another=by_another, ttl=ttl)
    outcome = bank.commit(pay.outcome, "a")
    assert (outcome.value, outcome.replayed, outcome.stored) == ("receipt for a", False, True)
    assert (bank.entries(), bank.records()) == (1, ["C"])
    assert pay.stats()["claimed"] == 1


def test_a_call_inside_itself_is_refused_though_the_function_has_committed_midway(bank: Bank) -> None:
    def commit(session: Any) -> None:
        session.commit()
        end_lease(session)
        session.commit()

    pay = nested(bank, commit)
    with pytest.warns(UnprotectedWarning, match="ended the transaction"):
        assert bank.commit(pay.outcome, "a").stored
    assert (bank.entries(), bank.records()) == (1, ["C"])
    assert bank.commit(pay.outcome, "a").replayed


def test_another_session_does_not_take_over_what_still_runs_in_this_process(bank: Bank) -> None:
    def commit_and_duplicate(session: Any) -> None:
        session.commit()
        end_lease(session)
        session.commit()
        with other.transaction() as transaction, pytest.raises(InProgress):
            transaction.call(twin, "a")

    other = sync_twin(bank)
    twin = other.define(deposit, namespace="nested", key="{account}")
    pay = nested(bank, commit_and_duplicate)
    with pytest.warns(UnprotectedWarning, match="ended the transaction"):
        bank.commit(pay, "a")
    assert bank.commit(pay.outcome, "a").replayed
    assert bank.entries() == 1


def test_what_a_dead_process_has_committed_midway_is_taken_over_when_its_lease_is_over(bank: Bank) -> None:
    @idempotent(within="session", namespace="nested", key="{account}")
    def died(session: Any, account: str) -> str:
        deposit(session, account)
        session.commit()
        session.connection().invalidate()  # what a dead process sends: nothing any more
        raise DeadError

    pay = bank.define(deposit, namespace="nested", key="{account}")
    with sync_twin(bank).transaction() as transaction, pytest.raises(DeadError):
        transaction.call(died, "a")
    with bank.transaction() as transaction, pytest.raises(InProgress, match="committed it midway"):
        transaction.call(pay, "a")
    with bank.sync.begin() as connection:
        end_lease(connection)
    assert not bank.commit(pay.outcome, "a").replayed
    assert pay.stats()["taken_over"] == 1
    assert bank.records() == ["C"]


@on("sqlite", "postgres", "mariadb", "asyncpg", colours="async")
def test_after_a_call_that_was_thrown_away_its_transaction_runs_it_no_more(bank: Bank) -> None:
    entered: list[bool] = []

    @idempotent(within="session", namespace="thrown", key="{account}")
    async def pay(session: Any, account: str) -> str:
        receipt: str = await session.run_sync(deposit, account)
        if not entered:
            entered.append(True)
            await asyncio.Event().wait()
        return receipt

    async def main() -> None:
        async with AsyncSession(bank.engine) as session:
            call: Any = pay(session, "a")
            # Driven by hand to where it waits, and then dropped as nobody who awaits can drop it.
            task = asyncio.ensure_future(_until(call, lambda: bool(entered)))
            await task
            call.close()
            del call
            await session.run_sync(end_lease)
            with pytest.raises(InProgress):
                await pay(session, "a")
            await session.rollback()
            await pay(session, "a")
            await session.commit()

    asyncio.run(main())
    assert (bank.entries(), bank.records()) == (1, ["C"])


class _until:  # noqa: N801  it stands for a function
    """Await `call` until `done`, and leave it there."""

    def __init__(self, call: Any, done: Callable[[], bool]) -> None:
        self._call, self._done = call, done

    def __await__(self) -> Any:
        step: Callable[[], Any] = functools.partial(self._call.send, None)
        while True:
            waits = step()
            if self._done():
                return
            try:
                sent = yield waits
            except BaseException as error:
                step = functools.partial(self._call.throw, error)
            else:
                step = functools.partial(self._call.send, sent)


# ------------------------------------------------------------------------------------- interrupted at every statement


class Interrupted:
    """Ctrl-C, or a cancellation, before or after the thing of that number that is done on a connection."""

    POINTS: ClassVar = [
        (sa.Connection, ("execute", "exec_driver_sql", "begin_nested")),
        (sa.NestedTransaction, ("commit", "rollback", "close")),
    ]

    def __init__(self, bank: Bank, step: int) -> None:
        self._left = step
        self._is_async = bank.is_async
        self._patch = pytest.MonkeyPatch()

    @property
    def fired(self) -> bool:
        return self._left < 0

    def _reach(self) -> None:
        self._left -= 1
        if self._left == -1:
            if not self._is_async:
                raise KeyboardInterrupt
            task = asyncio.current_task()
            assert task is not None
            task.cancel()  # it is told at the next thing that it awaits

    def _around(self, method: Any) -> Any:
        @functools.wraps(method)
        def around(*args: Any, **kwargs: Any) -> Any:
            self._reach()
            result = method(*args, **kwargs)
            self._reach()
            return result

        return around

    def __enter__(self) -> Self:
        for owner, names in self.POINTS:
            for name in names:
                self._patch.setattr(owner, name, self._around(getattr(owner, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def test_interrupted_at_any_moment_a_caller_who_commits_all_the_same_has_both_or_neither(bank: Bank) -> None:
    pay = bank.define(deposit, namespace="interrupted", key="{account}", wait=5)
    bank.commit(pay, "warm")
    looks = bank.make(asynchronous=False, isolation_level="AUTOCOMMIT").connect()
    counted = sa.select(
        sa.select(sa.func.count()).select_from(Entry).scalar_subquery(),
        sa.text("(SELECT count(*) FROM idempotent_records WHERE state = 'C')"),
        sa.text("(SELECT count(*) FROM idempotent_records WHERE state = 'R')"),
    )
    accounts: list[str] = []
    fates: set[tuple[bool, bool, int]] = set()
    effects = 1
    while True:
        accounts.append(account := f"a{len(accounts)}")
        with bank.transaction() as transaction:
            transaction.do(lambda session: session.connection())
            with Interrupted(bank, len(accounts)) as interrupted:
                try:
                    transaction.call(pay, account)
                    raised = False
                except (KeyboardInterrupt, asyncio.CancelledError):
                    raised = True
            try:
                transaction.commit()
                committed = True
            except (exc.SQLAlchemyError, OSError):
                transaction.rollback()
                committed = False
        if bank.kind == "sqlite":
            gc.collect(1)  # a cursor in the traceback keeps the lock
        entries, done, running = looks.execute(counted).one()
        assert (entries, running) == (done, 0), f"step {len(accounts)}: {entries} effects, {done} records"
        fates.add((raised, committed, entries - effects))
        effects = entries
        if not interrupted.fired:
            break
    looks.close()
    with bank.transaction() as transaction:
        for account in accounts:
            assert transaction.call(pay, account) == f"receipt for {account}"
        transaction.commit()
    assert bank.entries() == len(accounts) + 1
    assert len(accounts) > 20
    assert {(True, False, 0), (False, True, 1)} <= fates
    assert bank.is_async or {(True, True, 0), (True, True, 1)} <= fates  # SQLAlchemy gives up what was cancelled


# ------------------------------------------------------------------------------ connections lost, and transactions of
# ------------------------------------------------------------------------------ other kinds


@on("postgres", "mariadb", "asyncpg")
@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_a_connection_that_the_server_ends_in_the_run_leaves_nothing_and_the_retry_runs(
    bank: Bank, plain: bool
) -> None:
    ends = []

    def ended(session: Any, account: str) -> str:
        receipt = deposit(session, account)
        if not ends:
            pid = session.execute(
                sa.text("SELECT CONNECTION_ID()" if bank.kind == "mariadb" else "SELECT pg_backend_pid()")
            ).scalar_one()
            ends.append(pid)
            with bank.sync.connect() as other:
                kill = f"KILL {pid}" if bank.kind == "mariadb" else f"SELECT pg_terminate_backend({pid}, 10000)"
                other.execute(sa.text(kill))
        return receipt

    pay = bank.define(ended, key="{account}")
    with bank.transaction(plain=plain) as transaction:
        with pytest.raises((exc.DBAPIError, exc.PendingRollbackError)):
            transaction.call(pay, "a")
        with pytest.raises((exc.DBAPIError, exc.PendingRollbackError)):
            transaction.commit()
        transaction.rollback()
        assert transaction.call(pay.outcome, "a").replayed is False  # on a new connection
        transaction.commit()
    assert (bank.entries(), bank.records()) == (1, ["C"])
    assert bank.commit(pay.outcome, "a", plain=plain).replayed


@on("sqlite", "postgres", "mariadb", "asyncpg")
@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only"])
def test_sessions_that_have_joined_a_transaction_of_others(bank: Bank, mode: str) -> None:
    """As in a suite of tests that rolls everything back: commits of the session are savepoints there."""
    pay = bank.define(deposit, key="{account}", namespace="joined")
    with bank.transaction(plain=True) as outer:
        outer.do(lambda connection: connection.begin())
        if bank.kind == "sqlite":  # its module begins none before a savepoint
            outer.do(lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        with bank.transaction(engine=outer.subject, runner=outer.runner, join_transaction_mode=mode) as inner:
            assert not inner.call(pay.outcome, "a").replayed
            inner.commit()
            assert inner.call(pay.outcome, "a").replayed
            if mode == "create_savepoint":
                assert not inner.call(pay.outcome, "b").replayed
                inner.rollback()
                assert not inner.call(pay.outcome, "b").replayed
                inner.commit()
            nest = nested(bank, lambda session: (session.commit(), end_lease(session)))
            with pytest.warns(UnprotectedWarning, match="ended the transaction"):
                inner.call(nest, "c")
        outer.rollback()
    assert (bank.entries(), bank.records()) == (0, [])


@pytest.fixture(scope="module")
def two_phase_postgres() -> Iterator[str]:
    with start_postgres(max_prepared_transactions=20) as server:
        yield server.url


@on("postgres", "mariadb", colours="sync")
@pytest.mark.parametrize("end", ["commit", "rollback", "commit later"])
def test_two_phase_transactions(bank: Bank, end: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if bank.kind == "postgres":
        url = request.getfixturevalue("two_phase_postgres")
    else:
        url = url_of(bank.kind, request, tmp_path)
    with bank_of(bank.kind, bank.colour, url) as bank:
        pay = bank.define(deposit, key="{account}", wait=0)
        bank.commit(pay, "warm")
        with bank.transaction(twophase=True) as transaction:
            transaction.call(pay, "a")
            if end != "commit":
                transaction.subject.prepare()
                with bank.transaction() as other, pytest.raises(InProgress):  # neither there nor not there
                    other.call(pay, "a")
            (transaction.rollback if end == "rollback" else transaction.commit)()
        effects = 1 if end != "rollback" else 0
        assert bank.entries("a") == effects
        assert bank.commit(pay.outcome, "a").replayed is bool(effects)
        assert bank.entries("a") == 1
