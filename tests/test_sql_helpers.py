"""`idempotent.sql`: insert_once, compare_and_set, the table of records for Alembic; and the textbook's recipes."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from bank import BANKS, Bank, bank_of, url_of
from colours import Colour
from sqlalchemy import exc
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from idempotent import idempotent
from idempotent.sql import (
    SQLBackend,
    compare_and_set,
    compare_and_set_async,
    insert_once,
    insert_once_async,
    records_table,
)


class Base(DeclarativeBase):
    pass


class Payment(Base):
    __tablename__ = "payment"
    id: Mapped[int] = mapped_column(primary_key=True)
    reference: Mapped[str] = mapped_column("ref", sa.String(40), unique=True)
    invoice: Mapped[str | None] = mapped_column(sa.String(40), unique=True)
    amount: Mapped[int]
    state: Mapped[str] = mapped_column(sa.String(10), default="new")


class Account(Base):
    __tablename__ = "account"
    name: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    currency: Mapped[str] = mapped_column(sa.String(3), primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=1)


class Refund(Base):
    __tablename__ = "refund"
    reference: Mapped[str] = mapped_column(sa.String(40), primary_key=True)
    kind: Mapped[str | None] = mapped_column(sa.String(10))
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "refund"}  # noqa: RUF012


class CardRefund(Refund):
    __mapper_args__ = {"polymorphic_identity": "card"}  # noqa: RUF012


class PostedRefund(Refund):
    __tablename__ = "posted_refund"
    reference: Mapped[str] = mapped_column(sa.ForeignKey("refund.reference"), primary_key=True)
    __mapper_args__ = {"polymorphic_identity": "posted"}  # noqa: RUF012


PAYMENT, ACCOUNT = Payment.__table__, Account.__table__


@pytest.fixture(params=BANKS, ids="-".join)
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    kind, colour = request.param
    with bank_of(kind, Colour(colour), url_of(kind, request, tmp_path)) as made:
        Base.metadata.create_all(made.sync)
        yield made


sync_banks = pytest.mark.parametrize(
    "bank", [(kind, colour) for kind, colour in BANKS if colour == "sync"], ids="-".join, indirect=True
)


def once(bank: Bank, *args: Any) -> Any:
    """The twin of the bank's colour, to be given to a transaction."""
    return lambda place: (insert_once_async if bank.is_async else insert_once)(place, *args)


def change(bank: Bank, *args: Any) -> Any:
    return lambda place: (compare_and_set_async if bank.is_async else compare_and_set)(place, *args)


def count(bank: Bank, table: Any) -> int:
    with bank.sync.connect() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(table)).scalar_one())


# ------------------------------------------------------------------------------------------------------------ insert_once


def test_the_second_insert_finds_the_row_of_the_first(bank: Bank) -> None:
    values = {"reference": "r-1", "amount": 5}
    with bank.transaction() as transaction:
        made, created = transaction.call(once(bank, Payment, "reference", values))
        assert (type(made), made.state, created) == (Payment, "new", True)
        again, created = transaction.call(once(bank, Payment, Payment.reference, {**values, "amount": 6}))
        assert (again is made, again.amount, created) == (True, 5, False)
        transaction.commit()
    found, created = bank.commit(once(bank, Payment, PAYMENT.c.ref, values))
    assert (created, count(bank, PAYMENT)) == (False, 1)


def test_tables_and_connections_give_rows(bank: Bank) -> None:
    values = {"ref": "r-1", "amount": 5}
    row, created = bank.commit(once(bank, PAYMENT, "ref", values), plain=True)
    assert (row.ref, row.amount, created) == ("r-1", 5, True)
    row, created = bank.commit(once(bank, Payment, "reference", {"reference": "r-1", "amount": 5}), plain=True)
    assert (row.ref, row.state, created) == ("r-1", "new", False)
    row, created = bank.commit(once(bank, PAYMENT, "ref", values))
    assert (row.amount, created, count(bank, PAYMENT)) == (5, False, 1)


def test_a_key_of_two_columns(bank: Bank) -> None:
    for name, currency, new in (("a", "EUR", True), ("a", "USD", True), ("a", "EUR", False)):
        values = {"name": name, "currency": currency}
        _, created = bank.commit(once(bank, Account, ["name", "currency"], values))
        assert created is new
    assert count(bank, ACCOUNT) == 2


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_the_callers_rollback_takes_the_row_and_keeps_nothing(bank: Bank, plain: bool) -> None:
    with bank.transaction(plain=plain) as transaction:
        transaction.call(once(bank, Payment, "reference", {"reference": "r-1", "amount": 5}))
        transaction.rollback()
    assert count(bank, PAYMENT) == 0


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_another_constraint_is_an_error_and_the_callers_earlier_work_stays(bank: Bank, plain: bool) -> None:
    bank.commit(once(bank, Payment, "reference", {"reference": "r-1", "invoice": "i-1", "amount": 5}))
    with bank.transaction(plain=plain) as transaction:
        transaction.call(once(bank, Payment, "reference", {"reference": "own", "amount": 5}))
        for wrong in ({"invoice": "i-1", "amount": 5}, {"amount": None}):
            with pytest.raises(exc.IntegrityError):
                transaction.call(once(bank, Payment, "reference", {"reference": "r-2", **wrong}))
        transaction.commit()
    assert count(bank, PAYMENT) == 2


def test_a_duplicate_waits_for_the_first_transaction(bank: Bank) -> None:
    insert = once(bank, Payment, "reference", {"reference": "r-1", "amount": 5})
    with bank.transaction() as first, bank.transaction() as second:
        assert first.call(insert)[1]
        waiting = second.start(insert, commit=True)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        first.commit()
        assert not waiting.result(30)[1]
    assert count(bank, PAYMENT) == 1


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("bank", [each for each in BANKS if each[0] != "sqlite"], ids="-".join, indirect=True)
def test_who_has_read_before_the_first_transaction_ended_finds_its_row_or_is_told_of_the_conflict(
    bank: Bank, level: str
) -> None:
    if (bank.kind, level) == ("mariadb", "SERIALIZABLE"):
        level = "REPEATABLE READ"  # there who has read holds up who inserts, and no row can come between
    insert = once(bank, Payment, "reference", {"reference": "r-1", "amount": 5})
    with bank.transaction(engine=bank.make(isolation_level=level)) as late, bank.transaction() as first:
        assert late.do(lambda session: session.execute(sa.select(PAYMENT)).all()) == []  # its snapshot
        first.call(insert)
        waiting = late.start(insert)
        with pytest.raises(TimeoutError):
            waiting.result(0.1)
        first.commit()
        if bank.kind in ("postgres", "asyncpg") and level != "READ COMMITTED":
            with pytest.raises(exc.DBAPIError) as conflict:
                waiting.result(30)
            assert conflict.value.orig.sqlstate == "40001"
            late.rollback()
            row, created = late.call(insert)  # the whole transaction again
        else:
            row, created = waiting.result(30)
        assert (row.amount, created) == (5, False)
        late.commit()
    assert count(bank, PAYMENT) == 1


def test_of_many_who_insert_at_once_under_repeatable_read_one_has_made_the_row(bank: Bank) -> None:
    level = "SERIALIZABLE" if bank.kind == "sqlite" else "REPEATABLE READ"
    barrier, made = threading.Barrier(6), []

    def run() -> None:
        engine = bank.make(isolation_level=level)  # the first connection of an async one is its loop's
        barrier.wait()
        while True:
            try:
                with bank.transaction(engine=engine) as transaction:
                    row, created = transaction.call(once(bank, Payment, "reference", {"reference": "r-1", "amount": 5}))
                    found = (row.amount, created)
                    transaction.commit()
            except exc.DBAPIError:  # a conflict: the whole transaction again
                continue
            made.append(found)
            return

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [(5, False)] * 5 + [(5, True)]
    assert count(bank, PAYMENT) == 1


@sync_banks
def test_what_the_session_holds_back_is_seen(bank: Bank) -> None:
    with bank.transaction() as transaction:
        pending = Payment(reference="r-1", amount=7)
        transaction.subject.add(pending)
        found, created = transaction.call(once(bank, Payment, "reference", {"reference": "r-1", "amount": 5}))
        assert (found is pending, created) == (True, False)


@sync_banks
def test_a_row_is_of_the_class_that_was_given_and_one_of_several_tables_is_refused(bank: Bank) -> None:
    with bank.transaction() as transaction:
        for mapped, key in ((CardRefund, "card"), (Refund, "refund")):
            for created in (True, False):
                row, made = transaction.do(once(bank, mapped, "reference", {"reference": key}))
                assert (type(row), row.kind, made) == (mapped, key, created)
        with pytest.raises(TypeError, match="several tables"):
            transaction.do(once(bank, PostedRefund, "reference", {"reference": "posted"}))
        other = {"reference": "other", "kind": "refund"}  # a row that the class given would not show
        with pytest.raises(exc.NoResultFound, match="another class"):
            transaction.do(once(bank, CardRefund, "reference", other))
        transaction.commit()
    assert count(bank, Refund.__table__) == 2


@sync_banks
def test_what_cannot_be_a_key_is_refused(bank: Bank) -> None:
    with bank.transaction() as transaction:
        with pytest.raises(ValueError, match="nothing for the key 'ref'"):
            transaction.call(once(bank, Payment, "reference", {"amount": 5}))
        with pytest.raises(ValueError, match="has no column 'refrence'; there are id, reference"):
            transaction.call(once(bank, Payment, "refrence", {"reference": "r-1"}))
        with pytest.raises(TypeError, match="mapped class or a Table"):
            transaction.call(once(bank, "payment", "reference", {"reference": "r-1"}))
        if bank.kind != "mariadb":
            with pytest.raises((exc.OperationalError, exc.ProgrammingError)):
                transaction.call(once(bank, Payment, "state", {"reference": "r-1", "amount": 5, "state": "x"}))
    with pytest.raises(TypeError, match="sync function needs"):
        insert_once(bank.engine, Payment, "reference", {"reference": "r-1", "amount": 5})
    assert count(bank, PAYMENT) == 0


# -------------------------------------------------------------------------------------------------------- compare_and_set


@pytest.mark.parametrize("plain", [False, True], ids=["session", "connection"])
def test_a_row_is_changed_in_the_version_that_was_read_and_only_once(bank: Bank, plain: bool) -> None:
    bank.commit(once(bank, Account, ["name", "currency"], {"name": "a", "currency": "EUR", "balance": 10}))
    target = ACCOUNT if plain else Account
    where = {"name": "a", "currency": "EUR", "version": 1}
    spend = change(bank, target, where, {"balance": 3}, "version")
    with bank.transaction(plain=plain) as transaction:
        assert transaction.call(spend) is True
        assert transaction.call(spend) is False
        transaction.commit()
    assert bank.commit(spend, plain=plain) is False
    assert bank.commit(
        change(bank, target, {**where, "version": 2}, {"balance": 0}, target.c.version if plain else Account.version),
        plain=plain,
    )
    with bank.sync.connect() as connection:
        assert connection.execute(sa.select(ACCOUNT.c.balance, ACCOUNT.c.version)).one() == (0, 3)


@sync_banks
def test_the_sessions_own_copy_follows(bank: Bank) -> None:
    with bank.transaction() as transaction:
        account, _ = transaction.call(once(bank, Account, ["name", "currency"], {"name": "a", "currency": "EUR"}))
        assert transaction.call(change(bank, Account, {"name": "a", "version": 1}, {"balance": 9}, "version"))
        assert (account.balance, account.version) == (9, 2)


@pytest.mark.parametrize("level", ["READ COMMITTED", "REPEATABLE READ"])
def test_a_copy_of_an_older_version_is_not_given_values_that_the_table_has_not_got(bank: Bank, level: str) -> None:
    """Else a retry with what the session says would write over what another has done."""
    if bank.kind == "sqlite":
        level = "SERIALIZABLE"
    bank.commit(once(bank, Account, ["name", "currency"], {"name": "a", "currency": "EUR", "balance": 10}))
    where = {"name": "a", "currency": "EUR", "version": 1}

    def seen(session: Any) -> tuple[int, int]:
        account = session.get(Account, ("a", "EUR"))
        return account.balance, account.version

    with bank.transaction(engine=bank.make(isolation_level=level), expire_on_commit=False) as late:
        kept = [late.do(lambda session: session.get(Account, ("a", "EUR")))]
        if bank.kind == "sqlite":
            late.commit()
        assert bank.commit(change(bank, Account, where, {"balance": 99}, "version"))
        if (bank.kind, level) in (("postgres", "REPEATABLE READ"), ("asyncpg", "REPEATABLE READ")):
            with pytest.raises(exc.DBAPIError) as conflict:
                late.call(change(bank, Account, where, {"balance": 9}, "version"))
            assert conflict.value.orig.sqlstate == "40001"
        else:
            assert late.call(change(bank, Account, where, {"balance": 9}, "version")) is False
            assert (kept[0].balance, kept[0].version) == (10, 1)
        late.rollback()
        assert late.do(seen) == (99, 2)
        assert late.call(change(bank, Account, {**where, "version": 2}, {"balance": 98}, "version"))
        assert (kept[0].balance, kept[0].version) == (
            98,
            3,
        )  # also in an async session, where nothing is read by itself
        late.commit()
    assert count(bank, ACCOUNT) == 1


@sync_banks
def test_what_compares_nothing_or_too_much_changes_nothing(bank: Bank) -> None:
    for currency in ("EUR", "USD"):
        bank.commit(once(bank, Account, ["name", "currency"], {"name": "a", "currency": currency}))
    with bank.transaction() as transaction:
        with pytest.raises(ValueError, match="must name the version"):
            transaction.call(change(bank, Account, {"name": "a"}, {"balance": 9}, "version"))
        with pytest.raises(ValueError, match="goes up by one"):
            transaction.call(change(bank, Account, {"name": "a", "version": 1}, {"version": 5}, "version"))
        with pytest.raises(ValueError, match="names 2 rows"):
            transaction.call(change(bank, Account, {"name": "a", "version": 1}, {"balance": 9}, "version"))
        transaction.commit()
    with bank.sync.connect() as connection:
        assert set(connection.execute(sa.select(ACCOUNT.c.balance, ACCOUNT.c.version))) == {(0, 1)}


@sync_banks
def test_of_many_who_read_one_version_one_wins(bank: Bank) -> None:
    bank.commit(once(bank, Account, ["name", "currency"], {"name": "a", "currency": "EUR"}))
    wins: list[bool] = []
    barrier = threading.Barrier(6)

    def run(number: int) -> None:
        barrier.wait()
        where = {"name": "a", "currency": "EUR", "version": 1}
        wins.append(bank.commit(change(bank, Account, where, {"balance": number}, "version")))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == [False] * 5 + [True]


# ---------------------------------------------------------------------------------------------------------------- Alembic


@sync_banks
@pytest.mark.parametrize("schema", [None, "own"])
def test_alembic_sees_no_drift_after_the_table_was_made(bank: Bank, schema: str | None) -> None:
    """Autogenerate, with types, defaults, indexes and comments compared."""
    if schema is not None and bank.kind == "sqlite":
        pytest.skip("SQLite has no schemas")
    schema = bank.name if schema else None
    metadata = sa.MetaData()
    table = records_table(metadata, "idempotent_records", schema)
    with SQLBackend(bank.sync, schema=schema) as backend:

        @idempotent(backend=backend, namespace="alembic")
        def work() -> None: ...

        work()  # makes the table

        for target in (metadata, backend.metadata):
            with bank.sync.connect() as connection:
                options = {
                    "compare_type": True,
                    "compare_server_default": True,
                    "include_schemas": schema is not None,
                    "include_object": lambda thing, name, kind, *_: (
                        kind != "table" or (name == table.name and thing.schema == schema)
                    ),
                }
                context = MigrationContext.configure(connection, opts=options)
                assert compare_metadata(context, target) == []

        changed = sa.MetaData()
        records_table(changed, "idempotent_records", schema).append_column(sa.Column("more", sa.Integer))
        with bank.sync.connect() as connection:
            context = MigrationContext.configure(connection, opts=options)
            assert [found[0] for found in compare_metadata(context, changed)] == ["add_column"]


# ---------------------------------------------------------------------------------------------------------------- recipes


def dialect_insert(session: Any) -> Any:
    return {"postgresql": postgresql.insert, "sqlite": sqlite.insert}.get(session.get_bind().dialect.name, mysql.insert)


@sync_banks
def test_recipe_create_payment_with_a_unique_key(bank: Bank) -> None:
    def create_payment(session: Any, reference: str, amount: int) -> Payment:
        payment, created = insert_once(session, Payment, "reference", {"reference": reference, "amount": amount})
        if not created and payment.amount != amount:
            raise ValueError(f"{reference} was used for another payment")
        return payment

    with bank.transaction() as transaction:
        first = transaction.call(create_payment, "r-1", 5).id
        transaction.commit()
    with bank.transaction() as transaction:
        assert transaction.call(create_payment, "r-1", 5).id == first
        with pytest.raises(ValueError, match="another payment"):
            transaction.call(create_payment, "r-1", 6)
    assert count(bank, PAYMENT) == 1


@sync_banks
def test_recipe_set_balance_and_upsert_are_idempotent_by_nature(bank: Bank) -> None:
    def set_balance(session: Any, name: str, balance: int) -> None:
        insert = dialect_insert(session)(ACCOUNT).values(name=name, currency="EUR", balance=balance)
        if hasattr(insert, "on_duplicate_key_update"):
            session.execute(insert.on_duplicate_key_update(balance=balance))
        else:
            session.execute(
                insert.on_conflict_do_update(index_elements=["name", "currency"], set_={"balance": balance})
            )

    for _ in range(3):
        bank.commit(set_balance, "a", 7)
    with bank.sync.connect() as connection:
        assert connection.execute(sa.select(ACCOUNT.c.balance)).scalars().all() == [7]


@sync_banks
def test_recipe_add_balance_if_new(bank: Bank) -> None:
    @idempotent(key="{deposit}", within="session")
    def add_balance_if_new(session: Any, deposit: str, name: str, amount: int) -> None:
        insert_once(session, Account, ["name", "currency"], {"name": name, "currency": "EUR"})
        session.execute(sa.update(Account).where(Account.name == name).values(balance=Account.balance + amount))

    for _ in range(3):
        bank.commit(add_balance_if_new, "d-1", "a", 7)
    bank.commit(add_balance_if_new, "d-2", "a", 1)
    with bank.sync.connect() as connection:
        assert connection.execute(sa.select(ACCOUNT.c.balance)).scalars().all() == [8]


@sync_banks
def test_recipe_version_column(bank: Bank) -> None:
    bank.commit(once(bank, Account, ["name", "currency"], {"name": "a", "currency": "EUR", "balance": 10}))

    def withdraw(session: Any, name: str, amount: int, version: int) -> bool:
        """Sent twice with the version that the client has seen, it withdraws once."""
        account = session.execute(sa.select(Account).where(Account.name == name)).scalar_one()
        where = {"name": name, "version": version}
        return compare_and_set(session, Account, where, {"balance": account.balance - amount}, "version")

    assert [bank.commit(withdraw, "a", 4, 1) for _ in range(3)] == [True, False, False]
    with bank.sync.connect() as connection:
        assert connection.execute(sa.select(ACCOUNT.c.balance)).scalar_one() == 6
