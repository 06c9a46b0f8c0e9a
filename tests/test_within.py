"""`within=`: claim, work and outcome share the fate of the caller's transaction, on every database and in both colours."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from bank import BANKS, Bank, Entry, bank_of, url_of
from colours import Colour
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from idempotent import (
    BackendError,
    CallError,
    FingerprintMismatch,
    InProgress,
    ResultUnavailable,
    SQLBackend,
    UnprotectedWarning,
    current_call,
    idempotent,
)


@pytest.fixture(params=BANKS, ids="-".join)
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    kind, colour = request.param
    with bank_of(kind, Colour(colour), url_of(kind, request, tmp_path)) as made:
        yield made


def on(*kinds: str, colours: str = "sync async") -> Any:
    """A test for some banks only."""
    chosen = [(kind, colour) for kind, colour in BANKS if kind in kinds and colour in colours.split()]
    return pytest.mark.parametrize("bank", chosen, ids="-".join, indirect=True)


each_database_once = on("sqlite", "postgres", "mariadb", colours="sync")


@dataclass
class Receipt:
    account: str
    amount: Decimal


def deposit(session: Any, account: str, amount: int) -> Receipt:
    session.execute(sa.insert(Entry).values(account=account, amount=amount))
    return Receipt(account, Decimal(amount))


class DeclinedError(Exception):
    pass


class Refusing:
    """A body that writes and raises as long as `broken` is true."""

    def __init__(self) -> None:
        self.broken = True

        def body(session: Any, account: str) -> str:
            session.execute(sa.insert(Entry).values(account=account, amount=1))
            if self.broken:
                raise DeclinedError(account)
            return "done"

        self.body = body


# ---------------------------------------------------------------------------------------------------- one fate for all


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_claim_work_and_outcome_commit_together_and_are_replayed(bank: Bank, plain: bool) -> None:
    pay = bank.define(deposit, key="{account}")
    first = bank.commit(pay, "a", 5, plain=plain)
    assert first == Receipt("a", Decimal(5))
    again = bank.commit(pay.outcome, "a", 5, plain=plain)
    assert (again.value, again.replayed, again.key) == (first, True, "a")
    assert bank.entries() == 1
    assert bank.records() == ["C"]
    assert dict(pay.stats()) == {"claimed": 1, "completed": 1, "replayed": 1}


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_a_rollback_after_success_takes_the_record_too_and_the_next_call_runs(bank: Bank, plain: bool) -> None:
    pay = bank.define(deposit, key="{account}")
    with bank.transaction(plain=plain) as transaction:
        outcome = transaction.call(pay.outcome, "a", 5)
        assert (outcome.replayed, outcome.stored) == (False, True)
        assert transaction.call(pay.outcome, "a", 5).replayed
        transaction.rollback()
        assert (bank.entries(), bank.records()) == (0, [])
        assert not transaction.call(pay.outcome, "a", 5).replayed
        transaction.commit()
    assert (bank.entries(), bank.records()) == (1, ["C"])


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_an_error_inside_leaves_nothing_of_the_call_though_the_caller_commits(bank: Bank, plain: bool) -> None:
    refusing = Refusing()
    pay = bank.define(refusing.body)
    with bank.transaction(plain=plain) as transaction:
        transaction.do(lambda session: session.execute(sa.insert(Entry).values(account="before", amount=1)))
        with pytest.raises(DeclinedError) as raised:
            transaction.call(pay, "a")
        assert not hasattr(raised.value, "__notes__")
        assert transaction.call(pay.peek, "a") is None
        transaction.commit()
    assert (bank.entries("before"), bank.entries("a"), bank.records()) == (1, 0, [])
    refusing.broken = False
    assert bank.commit(pay, "a", plain=plain) == "done"
    assert bank.entries("a") == 1


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_an_error_that_error_ttl_names_is_recorded_and_the_work_is_undone(bank: Bank, plain: bool) -> None:
    refusing = Refusing()
    pay = bank.define(refusing.body, error_ttl={DeclinedError: 60})
    with bank.transaction(plain=plain) as transaction:
        with pytest.raises(DeclinedError):
            transaction.call(pay, "a")
        transaction.rollback()  # what `with session.begin()` does when an error leaves it
    assert bank.records() == []
    with bank.transaction(plain=plain) as transaction:
        with pytest.raises(DeclinedError):
            transaction.call(pay, "a")
        transaction.commit()
    assert (bank.entries(), bank.records()) == (0, ["F"])
    refusing.broken = False
    with bank.transaction(plain=plain) as transaction, pytest.raises(DeclinedError) as replayed:
        transaction.call(pay, "a")
    assert replayed.value.args == ("a",)


def test_an_error_of_the_database_inside_leaves_the_transaction_usable(bank: Bank) -> None:
    def twice(session: Any, account: str) -> None:
        for _ in range(2):
            session.add(Entry(id=7, account=account, amount=1))
            session.flush()
            session.expunge_all()

    pay = bank.define(twice)
    with bank.transaction() as transaction:
        with pytest.raises(exc.IntegrityError) as raised:
            transaction.call(pay, "a")
        assert not hasattr(raised.value, "__notes__")
        transaction.do(lambda session: session.execute(sa.insert(Entry).values(account="after", amount=1)))
        transaction.commit()
    assert (bank.entries("a"), bank.entries("after"), bank.records()) == (0, 1, [])


def test_what_fails_when_the_functions_work_is_flushed_has_failed_in_the_function(bank: Bank) -> None:
    def careless(session: Any, account: str) -> str:
        session.add(Entry(id=7, account=account, amount=None))
        return "done"

    pay = bank.define(careless, error_ttl={exc.IntegrityError: 60})
    with bank.transaction() as transaction:
        with pytest.raises(exc.IntegrityError):
            transaction.call(pay, "a")
        transaction.commit()
    assert (bank.entries(), bank.records()) == (0, ["F"])


def test_savepoints_of_the_caller_and_of_the_function_nest(bank: Bank) -> None:
    def pay(session: Any, account: str) -> str:
        deposit(session, account, 1)
        inner = session.begin_nested()
        deposit(session, account, 2)
        inner.rollback()
        return account

    pay = bank.define(pay)
    with bank.transaction() as transaction:
        outer = transaction.do(lambda session: session.begin_nested())
        assert transaction.call(pay, "a") == "a"
        transaction.do(lambda _: outer.rollback())
        assert transaction.call(pay.peek, "a") is None
        outer = transaction.do(lambda session: session.begin_nested())
        assert transaction.call(pay, "b") == "b"
        transaction.do(lambda _: outer.commit())
        transaction.commit()
    assert (bank.entries("a"), bank.entries("b"), bank.records()) == (0, 1, ["C"])


def test_a_call_inside_a_call_rides_in_the_same_transaction(bank: Bank) -> None:
    inner = bank.define(deposit, key="{account}", namespace="inner")

    if bank.is_async:

        @idempotent(within="session", namespace="outer")
        async def outer(session: Any, account: str) -> str:
            await inner(session, account, 1)
            raise DeclinedError
    else:

        @idempotent(within="session", namespace="outer")
        def outer(session: Any, account: str) -> str:
            inner(session, account, 1)
            raise DeclinedError

    with bank.transaction() as transaction:
        with pytest.raises(DeclinedError):
            transaction.call(outer, "a")
        transaction.commit()
    assert (bank.entries(), bank.records()) == (0, [])


# ------------------------------------------------------------------------------------------------ duplicates that race


def test_a_duplicate_waits_for_the_first_transaction_and_is_then_answered_from_it(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    with bank.transaction() as first, bank.transaction() as second:
        receipt = first.call(pay, "a", 5)
        waiting = second.start(pay.outcome, "a", 5, commit=True)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        first.commit()
        answer = waiting.result(30)
    assert (answer.replayed, answer.value) == (True, receipt)
    assert (bank.entries(), bank.records()) == (1, ["C"])


def test_a_duplicate_that_waited_for_a_rollback_runs_itself_with_a_higher_token(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    with bank.transaction() as first, bank.transaction() as second:
        lost = first.call(pay.outcome, "a", 5)
        waiting = second.start(pay.outcome, "a", 5, commit=True)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        first.rollback()
        answer = waiting.result(30)
    assert not answer.replayed
    assert answer.token > lost.token
    assert (bank.entries(), bank.records()) == (1, ["C"])


def test_a_storm_in_which_every_second_transaction_is_rolled_back_has_one_effect(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    bank.commit(pay, "warm", 1)
    barrier, answers = threading.Barrier(8), []

    def attempt(number: int) -> Any:
        with bank.transaction() as transaction:
            receipt = transaction.call(pay, "a", 5)
            if number % 2:
                transaction.rollback()
            else:
                transaction.commit()
            return receipt

    def run(number: int) -> None:
        barrier.wait()
        while True:
            try:
                answers.append(attempt(number))
                return
            except exc.OperationalError as error:  # InnoDB may make a deadlock of those who waited for a rollback
                assert "Deadlock" in str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [Receipt("a", Decimal(5))] * 8
    assert bank.entries("a") == 1


def settings(session: Any) -> Any:
    """What the database is told about waiting."""
    asked = {
        "postgresql": "SHOW lock_timeout",
        "sqlite": "PRAGMA busy_timeout",
        "mariadb": "SELECT @@SESSION.innodb_lock_wait_timeout",
    }
    return session.execute(sa.text(asked[session.get_bind().dialect.name])).scalar_one()


@pytest.mark.parametrize("wait", [0, 0.3, 1.2])
def test_when_wait_runs_out_the_losers_own_work_and_settings_stay(bank: Bank, wait: float) -> None:
    pay = bank.define(deposit, key="{account}", wait=wait)
    with bank.transaction() as first, bank.transaction() as second:
        if bank.kind != "sqlite":  # where one transaction writes at a time
            second.do(lambda session: deposit(session, "own", 1))
        before = second.do(settings)
        first.call(pay, "a", 5)
        with pytest.raises(InProgress) as refused:
            second.call(pay, "a", 5)
        assert refused.value.retry_after > 0
        assert second.do(settings) == before
        first.commit()
        second.do(lambda session: deposit(session, "own", 1))
        second.commit()
    assert (bank.entries("a"), bank.entries("own")) == (1, 1 if bank.kind == "sqlite" else 2)
    assert pay.stats()["busy"] == 1


@on("sqlite")
def test_on_sqlite_it_is_told_that_whoever_writes_holds_all_up(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}", wait=0)
    with bank.transaction() as first, bank.transaction() as second:
        first.do(lambda session: deposit(session, "other", 1))  # by nobody's key
        with pytest.raises(InProgress, match="or anything else writes to this file"):
            second.call(pay, "a", 5)


@on("sqlite", "postgres", "mariadb")
def test_the_settings_are_the_callers_again_after_a_call_too(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}", wait=3)
    with bank.transaction() as transaction:
        before = transaction.do(settings)
        transaction.call(pay, "a", 5)
        assert transaction.do(settings) == before
        transaction.call(pay, "a", 5)
        assert transaction.do(settings) == before


@on("postgres", "asyncpg", colours="async")
def test_a_frozen_loop_is_none_while_a_duplicate_waits(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")

    async def main() -> list[bool]:
        async with AsyncSession(bank.engine) as first, AsyncSession(bank.engine) as second:
            await pay(first, "a", 5)
            waiting = asyncio.ensure_future(pay.outcome(second, "a", 5))
            done, _ = await asyncio.wait([waiting], timeout=0.2)
            await first.commit()
            return [bool(done), (await waiting).replayed]

    assert asyncio.run(main()) == [False, True]


@on("postgres", "asyncpg")
@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ"])
def test_a_conflict_of_transactions_reaches_the_caller_whose_retry_is_answered(bank: Bank, level: str) -> None:
    pay = bank.define(deposit, key="{account}")
    bank.commit(pay, "warm", 1)
    with bank.transaction(engine=bank.make(isolation_level=level)) as late:
        late.do(lambda session: session.execute(sa.text("SELECT 1 FROM ledger")).all())  # the snapshot is taken here
        receipt = bank.commit(pay, "a", 5)
        with pytest.raises(exc.DBAPIError) as conflict:
            late.call(pay, "a", 5)
        assert conflict.value.orig.sqlstate == "40001"
        assert "parameters hidden" in str(conflict.value)
        late.rollback()
        assert late.call(pay, "a", 5) == receipt
        late.commit()
    assert bank.entries("a") == 1


@on("postgres", "asyncpg")
def test_no_lock_that_waiters_of_other_calls_need_lasts_as_long_as_the_transaction(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    held = sa.text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()")
    with bank.transaction() as transaction:
        transaction.call(pay, "a", 5)
        assert transaction.do(lambda session: session.execute(held).scalar_one()) == 0


@on("mariadb")
def test_a_snapshot_taken_before_does_not_hide_the_record(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    bank.commit(pay, "warm", 1)
    with bank.transaction() as late:
        late.do(lambda session: session.execute(sa.text("SELECT * FROM idempotent_records")).all())
        receipt = bank.commit(pay, "a", 5)
        assert late.call(pay, "a", 5) == receipt
        late.commit()
        assert late.call(pay.forget, "a", 5)
        late.commit()
    assert bank.entries("a") == 1


@on("postgres", "mariadb", colours="sync")
def test_a_deadlock_reaches_one_of_the_two_and_the_other_goes_on(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}", wait=None)
    bank.commit(pay, "warm", 1)
    with bank.transaction() as first, bank.transaction() as second:
        first.call(pay, "a", 1)
        second.call(pay, "b", 1)
        errors: list[Exception] = []

        def cross(transaction: Any, account: str) -> None:
            try:
                transaction.call(pay, account, 1)
                transaction.commit()
            except exc.OperationalError as error:
                errors.append(error)
                transaction.rollback()

        threads = [threading.Thread(target=cross, args=args) for args in ((first, "b"), (second, "a"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(errors) == 1
        assert "deadlock" in str(errors[0]).lower()
    for account in "ab":
        bank.commit(pay, account, 1)
    assert (bank.entries("a"), bank.entries("b")) == (1, 1)


@on("sqlite", "postgres", "mariadb")
def test_a_commit_whose_reply_is_lost_is_retried_and_replays(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    bank.commit(pay, "warm", 5)
    dialect = bank.engine.dialect
    commit, lost = dialect.do_commit, []

    def lose(connection: Any) -> None:
        commit(connection)
        if not lost:
            lost.append(True)
            raise ConnectionResetError("the reply to COMMIT is lost")

    dialect.do_commit = lose
    with pytest.raises(ConnectionResetError):
        bank.commit(pay, "a", 5)
    assert bank.commit(pay.outcome, "a", 5).replayed
    assert bank.entries("a") == 1


# -------------------------------------------------------------------------------------------- kill -9 at every statement


@pytest.mark.parametrize(
    "bank", [b for b in BANKS if b[0] != "asyncpg"] + [("asyncpg", "async")], ids="-".join, indirect=True
)
def test_a_worker_killed_at_any_statement_leaves_both_or_neither(bank: Bank) -> None:
    """P7: before and after each statement and the commit, the process dies; then the rows are counted."""
    setup = json.dumps(
        {"kind": bank.kind, "colour": bank.colour.name, "url": str(bank.url.render_as_string(False)), "name": bank.name}
    )
    root = Path(__file__).parent
    worker = subprocess.Popen(
        [sys.executable, str(root / "bank_worker.py"), setup],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root.parent), str(root)])},
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    fates: list[int] = []
    pay = WORKERS_PAY(bank)
    try:
        assert worker.stdout.readline() == "ready\n"
        for step in range(200):
            account = f"a{step}"
            worker.stdin.write(f"{account} {step}\n")
            worker.stdin.flush()
            status = int(worker.stdout.readline())
            effects = bank.entries(account)
            with bank.transaction() as transaction:
                record = transaction.call(pay.peek, account, 5)
            assert effects == (0 if record is None else 1), f"step {step}: {effects} effects and {record}"
            assert record is None or record.state == "completed"
            fates.append(effects)
            # Whoever retries, the end is one effect.
            assert bank.commit(pay, account, 5) == Receipt(account, Decimal(5))
            assert bank.entries(account) == 1
            if status == 0:
                break
            assert status == -signal.SIGKILL
    finally:
        worker.kill()
        worker.communicate()
    assert fates == sorted(fates), "once it is committed it stays"
    assert fates[-2:] == [1, 1], "killed after the commit, and not at all"
    assert fates.count(0) >= 12


def WORKERS_PAY(bank: Bank) -> Any:
    return bank.define(deposit, key="{account}", namespace="worker")


# -------------------------------------------------------------------------------------------------------- the arguments


def test_other_arguments_are_refused_and_the_transaction_goes_on(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    with bank.transaction() as transaction:
        transaction.call(pay, "a", 5)
        with pytest.raises(FingerprintMismatch):
            transaction.call(pay, "a", 6)
        transaction.commit()
    with bank.transaction() as transaction, pytest.raises(FingerprintMismatch):
        transaction.call(pay, "a", 6)
    assert bank.entries() == 1


def test_the_session_is_part_of_neither_key_nor_fingerprint(bank: Bank) -> None:
    whole = bank.define(deposit)
    with bank.transaction() as one, bank.transaction() as other:
        assert whole.key_for(one.subject, "a", 5) == whole.key_for(other.subject, "a", amount=5)
        assert whole.key_for(one.subject, "a", 5) == whole.key_for(None, "a", 5)


@each_database_once
def test_scoped_sessions_and_methods(bank: Bank) -> None:
    class Accounts:
        @idempotent(key="{account}", within="session")
        def pay(self, account: str, amount: int, session: Any) -> Receipt:
            return deposit(session, account, amount)

    scoped = scoped_session(sessionmaker(bank.engine))
    for _ in range(2):
        assert Accounts().pay("a", 5, scoped) == Receipt("a", Decimal(5))
        scoped.commit()
    scoped.remove()
    assert bank.entries() == 1


@on("sqlite", "postgres", colours="async")
def test_async_scoped_sessions(bank: Bank) -> None:
    from sqlalchemy.ext.asyncio import async_sessionmaker

    async def main() -> None:
        scoped = async_scoped_session(async_sessionmaker(bank.engine), scopefunc=asyncio.current_task)

        @idempotent(within="session", key="{account}")
        async def pay(session: Any, account: str, amount: int) -> Receipt:
            return await (await session.connection()).run_sync(deposit, account, amount)

        for _ in range(2):
            assert await pay(scoped, "a", 5) == Receipt("a", Decimal(5))
            await scoped.commit()
        await scoped.remove()

    asyncio.run(main())
    assert bank.entries() == 1


@on("sqlite")
def test_what_is_no_session_of_the_functions_colour_is_refused(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    for wrong in (None, "session", bank.engine, object()):
        with pytest.raises(TypeError, match="needs a SQLAlchemy"):
            bank.colour.call(pay, wrong, "a", 5)
    with bank.transaction() as transaction:
        inner = transaction.subject.sync_session if bank.is_async else AsyncSession(bank.make(asynchronous=True))
        with pytest.raises(TypeError, match="not AsyncSession" if not bank.is_async else "not Session"):
            bank.colour.call(pay, inner, "a", 5)
    assert bank.entries() == 0


def test_a_connection_in_autocommit_is_refused(bank: Bank) -> None:
    engine = bank.make(isolation_level="AUTOCOMMIT")
    pay = bank.define(deposit, key="{account}")
    with bank.transaction(engine=engine) as transaction, pytest.raises(CallError, match="AUTOCOMMIT"):
        transaction.call(pay, "a", 5)
    assert (bank.entries(), bank.records()) == (0, [])


def test_wrong_options_are_told_at_decoration() -> None:
    def pay(session: Any, account: str) -> None: ...

    for name, value in {"backend": "local://", "lease": 5, "on_crash": "raise", "on_outage": "run"}.items():
        with pytest.raises(TypeError, match=f"{name}= has no meaning with within="):
            idempotent(within="session", **{name: value})(pay)
    with pytest.raises(ValueError, match="within names 'sesion', which is no parameter; there are session, account"):
        idempotent(within="sesion")(pay)
    with pytest.raises(TypeError, match="within must be the name of a parameter"):
        idempotent(within=5)(pay)  # type: ignore[arg-type]
    idempotent(within="session", backend=None)(pay)


# ------------------------------------------------------------------------------------------------- the ORM's own business


@each_database_once
def test_a_replay_flushes_nothing_and_expires_nothing(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    bank.commit(pay, "a", 5)
    with bank.transaction() as transaction:
        session: Session = transaction.subject
        kept = session.scalars(sa.select(Entry)).one()
        kept.amount = 6
        session.add(Entry(account="pending", amount=1))
        transaction.call(pay, "a", 5)
        assert len(session.new) == len(session.dirty) == 1
        assert "account" in kept.__dict__


@each_database_once
def test_a_run_keeps_the_callers_objects_and_an_error_undoes_the_functions_alone(bank: Bank) -> None:
    mine = Entry(account="mine", amount=1)

    def change(session: Any, fails: bool) -> None:
        mine.amount += 10
        session.add(Entry(account="inner", amount=1))
        if fails:
            raise DeclinedError

    change = bank.define(change)
    with bank.transaction() as transaction:
        session: Session = transaction.subject
        session.add(mine)
        session.flush()
        with pytest.raises(DeclinedError):
            transaction.call(change, True)
        assert mine.amount == 1
        transaction.call(change, False)
        assert mine.amount == 11
        session.commit()
        assert mine.amount == 11
    assert (bank.entries("inner"), bank.entries("mine")) == (1, 1)


@each_database_once
def test_a_function_that_commits_has_its_outcome_recorded_and_is_told(bank: Bank) -> None:
    def pay(session: Any, account: str) -> str:
        deposit(session, account, 1)
        session.commit()
        return account

    pay = bank.define(pay)
    with bank.transaction() as transaction:
        with pytest.warns(UnprotectedWarning, match="ended the transaction"):
            assert transaction.call(pay.outcome, "a").stored
        transaction.commit()
    assert (bank.entries(), bank.records()) == (1, ["C"])
    assert bank.commit(pay.outcome, "a").replayed


@each_database_once
def test_a_function_that_rolls_back_has_no_record(bank: Bank) -> None:
    def pay(session: Any, account: str) -> str:
        deposit(session, account, 1)
        session.rollback()
        return account

    pay = bank.define(pay)
    with bank.transaction() as transaction:
        with pytest.warns(UnprotectedWarning, match="ended the transaction"):
            assert not transaction.call(pay.outcome, "a").stored
        transaction.commit()
    assert (bank.entries(), bank.records()) == (0, [])


@each_database_once
def test_a_result_that_cannot_be_kept_is_recorded_as_done(bank: Bank) -> None:
    def pay(session: Any, account: str) -> Any:
        deposit(session, account, 1)
        return threading.Lock()

    pay = bank.define(pay)
    with bank.transaction() as transaction:
        with pytest.raises(ResultUnavailable) as raised:
            transaction.call(pay, "a")
        assert raised.value.result is not None
        transaction.commit()
    with bank.transaction() as transaction, pytest.raises(ResultUnavailable):
        transaction.call(pay, "a")
    assert bank.entries() == 1


@each_database_once
def test_the_running_call_has_no_lease_to_lose(bank: Bank) -> None:
    def pay(session: Any, account: str) -> int:
        call = current_call()
        assert call is not None
        call.check()
        return call.token

    pay = bank.define(pay)
    with bank.transaction() as transaction:
        outcome = transaction.call(pay.outcome, "a")
        assert outcome.value == outcome.token > 0


@on("sqlite", "postgres", "asyncpg", "mariadb", colours="async")
def test_a_cancelled_call_leaves_nothing_of_its_own(bank: Bank) -> None:
    entered = asyncio.Event()

    @idempotent(within="session", namespace="cancelled")
    async def pay(session: Any, account: str) -> str:
        await session.run_sync(deposit, account, 1)
        entered.set()
        await asyncio.Event().wait()
        return account

    async def main() -> None:
        async with AsyncSession(bank.engine) as session:
            call = asyncio.ensure_future(pay(session, "a"))
            await entered.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await session.commit()

    asyncio.run(main())
    assert (bank.entries(), bank.records()) == (0, [])


# ------------------------------------------------------------------------------------------------------------- the table


@on("sqlite", "postgres", "mariadb")
def test_the_table_is_made_without_ending_the_callers_transaction(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}")
    with bank.transaction() as transaction:
        transaction.do(lambda session: deposit(session, "own", 1))
        transaction.call(pay, "a", 5)
        transaction.rollback()
    assert bank.entries() == 0
    assert bank.commit(pay, "a", 5) == bank.commit(pay, "a", 5)


@on("postgres", "mariadb", colours="sync")
def test_without_a_second_connection_the_table_must_be_there(bank: Bank) -> None:
    engine = bank.make(poolclass=sa.pool.StaticPool)
    pay = bank.define(deposit, key="{account}")
    with bank.transaction(engine=engine) as transaction:
        transaction.do(lambda session: deposit(session, "own", 1))
        with pytest.raises(BackendError, match="make it beforehand|make the table beforehand"):
            transaction.call(pay, "a", 5)
        transaction.rollback()
    assert bank.entries() == 0
    small = bank.make(pool_size=1, max_overflow=0, pool_timeout=0.1)
    with bank.transaction(engine=small) as transaction, pytest.raises(BackendError, match="no second connection"):
        transaction.call(pay, "a", 5)
    engine.dispose()
    small.dispose()


@on("postgres", "mariadb", colours="sync")
def test_tenants_by_schema_translate_map(bank: Bank, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pay = bank.define(deposit, key="{account}")
    with bank_of(bank.kind, bank.colour, url_of(bank.kind, request, tmp_path)) as tenant:
        engine = bank.engine.execution_options(schema_translate_map={None: tenant.name})
        assert bank.commit(pay, "a", 5, engine=engine) == bank.commit(pay, "a", 5, engine=engine)
        assert (tenant.entries(), tenant.records()) == (1, ["C"])
    assert (bank.entries(), bank.records()) == (0, [])


@on("sqlite", "postgres", "mariadb", colours="sync")
def test_peek_forget_explain_and_a_backend_of_the_database_see_one_record(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}", namespace="shared")
    with SQLBackend(bank.sync) as backend:

        @idempotent(backend=backend, key="{account}", namespace="shared", ignore=("session",))
        def leased(session: Any, account: str, amount: int) -> Receipt:
            raise AssertionError

        with bank.transaction() as transaction:
            assert transaction.call(pay.peek, "a", 5) is None
            assert transaction.call(pay.explain, "a", 5).decision == "would_run"
            receipt = transaction.call(pay, "a", 5)
            assert transaction.call(pay.explain, "a", 5).decision == "would_replay"
            if bank.kind != "sqlite":
                assert leased.peek(None, "a", 5) is None  # not committed
            transaction.commit()
        assert leased(None, "a", 5) == receipt
        seen = leased.peek(None, "a", 5)
        with bank.transaction() as transaction:
            mine = transaction.call(pay.peek, "a", 5)
            assert transaction.call(pay.with_key("a").peek)._replace(age=0, expires_in=0) == mine._replace(
                age=0, expires_in=0
            )
            assert transaction.call(pay.with_key("a").explain).decision == "would_replay"
            assert (seen.state, seen.token, seen.fingerprint, seen.size) == (
                mine.state,
                mine.token,
                mine.fingerprint,
                mine.size,
            )
            assert transaction.call(pay.forget, "a", 5)
            assert transaction.call(pay.peek, "a", 5) is None
            transaction.rollback()
        assert leased.peek(None, "a", 5) is not None
        with bank.transaction() as transaction:
            assert transaction.call(pay.with_key("a").forget)
            assert not transaction.call(pay.forget, "a", 5)
            transaction.commit()
        assert leased.peek(None, "a", 5) is None
        later = bank.commit(pay.outcome, "a", 5)
        assert not later.replayed
        assert later.token > seen.token
        with pytest.raises(CallError, match="nothing to resolve"):
            pay.resolve("a", not_applied=True)


@on("sqlite", "postgres", "mariadb", colours="sync")
def test_a_record_past_its_ttl_is_claimed_anew(bank: Bank) -> None:
    pay = bank.define(deposit, key="{account}", ttl=0.001)
    first = bank.commit(pay.outcome, "a", 5)
    second = bank.commit(pay.outcome, "a", 5)
    assert not second.replayed
    assert second.token > first.token
    assert bank.entries() == 2


# ---------------------------------------------------------------------------------------------------------------- SQLite


@on("sqlite")
@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_the_sqlite_module_sends_no_begin_before_a_savepoint_and_the_claim_is_undone_all_the_same(
    bank: Bank, plain: bool
) -> None:
    @idempotent(within="session", namespace="empty", key="{account}")
    def nothing(session: Any, account: str) -> str:
        return account

    @idempotent(within="session", namespace="empty", key="{account}")
    async def nothing_async(session: Any, account: str) -> str:
        return account

    pay = nothing_async if bank.is_async else nothing
    with bank.transaction(plain=plain) as transaction:
        transaction.call(pay, "a")  # its savepoint would be the first statement of the transaction
        transaction.rollback()
    assert bank.records() == []
    bank.commit(pay, "a", plain=plain)
    with bank.transaction(plain=plain) as transaction:
        transaction.call(pay.forget, "a")
        transaction.rollback()
    assert bank.records() == ["C"]


@on("sqlite", colours="sync")
def test_applications_that_send_begin_themselves(bank: Bank) -> None:
    engine = bank.make()
    with bank.sync.connect() as connection:
        connection.exec_driver_sql("PRAGMA journal_mode=WAL")  # where who reads does not hold up who writes

    @sa.event.listens_for(engine, "connect")
    def connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN")

    pay = bank.define(deposit, key="{account}")
    for plain in (False, True):
        with bank.transaction(engine=engine, plain=plain) as transaction:
            transaction.call(pay, "a", 5)
            transaction.rollback()
        assert bank.records() == []
    bank.commit(pay, "a", 5, engine=engine)
    assert bank.commit(pay.outcome, "a", 5, engine=engine).replayed
    with bank.transaction(engine=engine) as late:
        late.do(lambda session: session.execute(sa.text("SELECT * FROM ledger")).all())
        bank.commit(pay, "b", 5)
        with pytest.raises(exc.OperationalError, match="locked"):  # it has read what has changed since
            late.call(pay, "c", 5)
        late.rollback()
        assert late.call(pay.outcome, "b", 5).replayed
