"""Never run: what type checkers must see of the testing kit. A negative case is a line that has to be ignored."""

from typing import Any, assert_type
from unittest import mock

import pytest
from hypothesis.strategies import SearchStrategy

from idempotent import Backend, LocalBackend, idempotent
from idempotent.testing import (
    Aftermath,
    BackendContract,
    BackendMachine,
    Ending,
    Exploration,
    FaultyBackend,
    Hang,
    NotIdempotent,
    Proof,
    Storm,
    Violation,
    VirtualClock,
    assert_idempotent,
    assert_idempotent_async,
    assert_naturally_idempotent,
    assert_naturally_idempotent_async,
    duplicates,
    explore,
)

ledger: list[str] = []


@idempotent(backend="local://")
def charge(order: str, amount: int = 1) -> str:
    return order


@idempotent(backend="local://")
async def charge_async(order: str) -> str:
    return order


def plain(order: str) -> None: ...
async def plain_async(order: str) -> None: ...


async def count() -> int:
    return len(ledger)


assert_type(explore(callers=2), Exploration)

assert_type(duplicates(callers=4, moves=10, crashes=2, expiries=0, lost_replies=0), SearchStrategy[Storm])
storm = Storm(2, "1 2:dies lease")
assert_type(storm.callers, int)
assert_type(storm.moves, str)
aftermath = storm.play(charge, ("o",))
assert_type(aftermath, Aftermath)
assert_type(aftermath.endings, tuple[Ending, ...])
assert_type(aftermath.runs, tuple[int, ...])
assert_type(aftermath.diagram(), str)
assert_type(storm.run(charge_async, {"order": "o"}, count, each=2, reruns=False), Aftermath)

assert_type(assert_idempotent(charge, [("o",), {"order": "o"}, mock.call("o", amount=2)], lambda: len(ledger)), Proof)
assert_type(assert_idempotent(charge_async, [("o",)], count, callers=2, reset=ledger.clear, seconds=1), Proof)
assert_naturally_idempotent(plain, [("o",)], lambda: ledger, reset=ledger.clear, late=True, refuses=KeyError)
assert_naturally_idempotent(plain_async, [("o",)], count, refuses=(KeyError, ValueError))


async def tests() -> None:
    assert_type(await assert_idempotent_async(charge_async, [("o",)], count), Proof)
    assert_type(await assert_naturally_idempotent_async(plain_async, [("o",)], count), None)
    assert_type(await storm.play_async(charge_async, ("o",)), Aftermath)
    assert_type(await storm.run_async(charge_async, ("o",), count), Aftermath)


def failure(error: NotIdempotent) -> None:
    assert_type(error.storm, Storm | None)
    assert_type(error.violation, Violation | None)


assert_idempotent(charge, ["o"], lambda: 1)  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
assert_idempotent(charge, [("o",)])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
Storm("2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

clock = VirtualClock()
assert_type(clock(), int)
clock.advance(5)
backend = LocalBackend(clock=clock)
faulty = FaultyBackend(backend)
assert_type(faulty.hang("claim"), Hang)
faulty.refuse("clame")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class TestMine(BackendContract):
    short = 0.1

    @pytest.fixture
    def backend(self) -> Backend:
        return LocalBackend()


class Machine(BackendMachine):
    colour = "async"

    def open(self) -> Backend:
        return LocalBackend()

    def pass_time(self, backend: Any, seconds: float) -> None:
        clock.advance(seconds)
