"""Never run: what type checkers must see. A negative case is a line that has to be ignored; an unneeded ignore is an error."""

from collections.abc import Callable, Coroutine
from datetime import timedelta
from decimal import Decimal
from typing import Any, assert_type

from sqlalchemy import MetaData, Row, Table
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from idempotent import (
    Applied,
    AsyncIdempotent,
    Call,
    Explanation,
    Idempotent,
    LocalBackend,
    NotApplied,
    Outcome,
    Record,
    StillUnknown,
    configure,
    current_call,
    explain,
    forget,
    idempotent,
    key_for,
    new_key,
    open_backend,
    outcome,
    peek,
    resolve,
    stats,
    with_key,
)
from idempotent._types import Stats
from idempotent.sql import compare_and_set, insert_once


@idempotent
def bare(order: str, amount: Decimal = Decimal(1)) -> int:
    return 1


@idempotent(key="{order}", ttl=60, wait=None, error_ttl={ValueError: 5}, on_crash="raise", on_outage="run")
def charge(order: str, *, amount: int) -> list[str]:
    return [order]


@idempotent
async def bare_async(order: str) -> int:
    return 1


@idempotent(backend="local://")
async def charge_async(order: str, amount: int = 1) -> dict[str, int]:
    return {order: amount}


@idempotent(within="session")
def in_transaction(session: Session, order: str) -> int:
    return 1


@idempotent(keep_result=False, within="session")
async def in_transaction_async(session: AsyncSession, order: str) -> int:
    return 1


@idempotent(keep_result=False)
def forgetful(order: str) -> int:
    return 1


@idempotent(keep_result=False)
async def forgetful_async(order: str) -> int:
    return 1


assert_type(bare("o"), int)
assert_type(in_transaction(Session(), "o"), int)
assert_type(in_transaction.peek(Session(), "o"), Record | None)
assert_type(insert_once(Session(), list[int], "k", {}), tuple[list[int], bool])
TABLE = Table("t", MetaData())
assert_type(insert_once(Session(), TABLE, "k", {}), tuple[Row[Any], bool])
assert_type(compare_and_set(Session(), TABLE, {}, {}, "k"), bool)
assert_type(charge("o", amount=1), list[str])
assert_type(charge.outcome("o", amount=1), Outcome[list[str]])
assert_type(charge.outcome("o", amount=1).value, list[str])
assert_type(charge.explain("o", amount=1), Explanation)
assert_type(charge.key_for("o", amount=1), str)
assert_type(charge.with_key("k")("o", amount=1), list[str])
assert_type(charge.with_key("k").outcome("o", amount=1).value, list[str])
assert_type(charge.peek("o", amount=1), Record | None)
assert_type(charge.forget("o", amount=1, force=True), bool)
assert_type(charge.resolve("k", result=["x"]), bool)
assert_type(charge.resolve("k", error=ValueError()), bool)
assert_type(charge.stats(), Stats)
assert_type(charge.stats()["completed"], int)
assert_type(charge.with_key("k").with_key("l").stats(), Stats)
assert_type(forgetful("o"), int | None)
assert_type(new_key(), str)
assert_type(current_call(), Call | None)

bare(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
bare()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
charge("o", 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
charge("o", amount="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
charge.outcome("o")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
charge.key_for()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
charge.with_key(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
idempotent(ttl="x")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
idempotent(on_crash="retry")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
idempotent(unknown=1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
charge.resolve(5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
charge.resolve("k", error="no")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
charge.forget("o", amount=1, force="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
charge.stats()["settled"]  # type: ignore[index]  # pyright: ignore[reportArgumentType]
configure(lease="x")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

idempotent(ttl=timedelta(days=1), lease=timedelta(seconds=5), wait=timedelta(0), error_ttl={KeyError: timedelta(1)})
configure(ttl=timedelta(days=1), lease=5, wait=None, error_ttl=None, hooks=[print])
idempotent(error_ttl={"KeyError": 5})  # type: ignore[dict-item]  # pyright: ignore[reportArgumentType]
idempotent(fingerprint="x")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
idempotent(key=lambda order: 5)  # type: ignore[arg-type, return-value]  # pyright: ignore[reportArgumentType]


def key_of(order: str, amount: int = 1) -> str | None:
    return order


def digest_of(order: str, amount: int = 1) -> bytes:
    return order.encode()


@idempotent(key=key_of, fingerprint=digest_of)
def by_callables(order: str, amount: int = 1) -> tuple[str, int]:
    return order, amount


@idempotent(key=lambda order: order, fingerprint=False, ignore=["log"])
def by_lambda(order: str, log: Callable[[str], None] = print) -> str:
    return order


assert_type(by_callables("o"), tuple[str, int])
assert_type(by_lambda("o"), str)

# For wrappers that hide what they wrap, the types are lost but for those that no function changes.
assert_type(key_for(charge, "o", amount=1), str)
assert_type(stats(charge), Stats)
assert_type(with_key(charge, "k"), Any)
assert_type(outcome(charge, "o", amount=1), Any)
assert_type(explain(charge, "o", amount=1), Any)
assert_type(peek(charge, "o", amount=1), Any)
assert_type(forget(charge, "o", amount=1, force=True), Any)
assert_type(resolve(charge, "k", not_applied=True), Any)
with_key(charge, 5)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

plain: Callable[[str], int] = bare
wrapped: Idempotent[..., int] = bare
wrapped_async: AsyncIdempotent[..., int] = bare_async
awaitable: Callable[[str], Coroutine[Any, Any, int]] = bare_async
wrong: Callable[[int], int] = bare  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


async def colours() -> None:
    assert_type(await in_transaction_async(AsyncSession(), "o"), int | None)
    assert_type(await bare_async("o"), int)
    assert_type(await charge_async("o"), dict[str, int])
    assert_type(await charge_async.outcome("o"), Outcome[dict[str, int]])
    assert_type(await charge_async.with_key("k")("o", 2), dict[str, int])
    assert_type(await charge_async.explain("o"), Explanation)
    assert_type(await charge_async.peek("o"), Record | None)
    assert_type(await charge_async.forget("o"), bool)
    assert_type(await charge_async.resolve("k", not_applied=True), bool)
    assert_type(charge_async.key_for("o"), str)
    assert_type(charge_async.stats(), Stats)
    assert_type(await charge_async.stats(), Stats)
    assert_type(await forgetful_async("o"), int | None)
    charge_async("o").upper()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    await charge_async(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await bare("o")  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


class Account:
    @idempotent(key="{self.id}:{order}")
    def pay(self, order: str) -> int:
        return 1

    @idempotent(key="{order}")
    async def pay_async(self, order: str) -> int:
        return 1

    @classmethod
    @idempotent(key="{order}")
    def above(cls, order: str) -> int:
        return 1

    @classmethod
    @idempotent(key="{order}")
    async def above_async(cls, order: str) -> int:
        return 1

    @staticmethod
    @idempotent
    def static(order: str) -> int:
        return 1

    @staticmethod
    @idempotent
    async def static_async(order: str) -> int:
        return 1

    @idempotent(key="{order}", keep_result=False)
    def forgetful(self, order: str) -> int:
        return 1

    @idempotent(key="{order}", keep_result=False)
    async def forgetful_async(self, order: str) -> int:
        return 1

    id = 1


async def methods(account: Account) -> None:
    assert_type(account.pay("o"), int)
    assert_type(Account.pay(account, "o"), int)
    assert_type(Account.pay.key_for(account, "o"), str)
    assert_type(Account.pay.outcome(account, "o"), Outcome[int])
    assert_type(await account.pay_async("o"), int)
    assert_type(await Account.pay_async(account, "o"), int)
    assert_type(account.above("o"), int)
    assert_type(await account.above_async("o"), int)
    assert_type(Account.static("o"), int)
    assert_type(await Account.static_async("o"), int)
    assert_type(account.forgetful("o"), int | None)
    assert_type(await account.forgetful_async("o"), int | None)
    assert_type(Account.pay.with_key("k")(account, "o"), int)
    assert_type(Account.pay.explain(account, "o"), Explanation)
    assert_type(Account.pay.peek(account, "o"), Record | None)
    assert_type(Account.pay.forget(account, "o"), bool)
    assert_type(Account.pay.resolve("k", result=1), bool)
    assert_type(Account.pay.stats(), Stats)
    assert_type(Account.static.key_for("o"), str)
    assert_type(await Account.pay_async.with_key("k")(account, "o"), int)
    assert_type(await Account.pay_async.outcome(account, "o"), Outcome[int])
    assert_type(await Account.pay_async.explain(account, "o"), Explanation)
    assert_type(await Account.pay_async.peek(account, "o"), Record | None)
    assert_type(await Account.pay_async.forget(account, "o"), bool)
    assert_type(await Account.pay_async.resolve("k", not_applied=True), bool)
    assert_type(await Account.static_async.outcome("o"), Outcome[int])
    Account.pay.explain("o")  # type: ignore[arg-type, call-arg]  # pyright: ignore[reportCallIssue]
    account.pay(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    account.pay()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    account.pay_async("o").bit_length()  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def probe(call: Call) -> Applied | NotApplied | StillUnknown:
    return Applied(call.key)


idempotent(on_crash=probe, backend=LocalBackend())
idempotent(backend=open_backend("local://"))
