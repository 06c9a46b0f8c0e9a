"""The judge of histories: each promise broken once, and what looks like it and is none."""

from pathlib import Path
from typing import Any

import pytest

from idempotent.testing.history import Finding, Operation, join, judge, read, write

MS = 1_000_000
LEASE = 0.3


class Book:
    """Writes a history: instants in milliseconds."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def add(
        self, does: str, invoked: float, returned: float | None, asks: Any = None, *, call: str = "c1", **reply: Any
    ) -> "Book":
        end = None if returned is None else round(returned * MS)
        worker = reply.pop("worker", call)
        self.operations.append(Operation(worker, call, "k", does, asks or {}, round(invoked * MS), end, reply))
        return self

    def grant(self, invoked: float, returned: float, token: int, call: str = "c1", attempt: str = "") -> "Book":
        asks = {"attempt": attempt or f"a-{call}", "lease": LEASE}
        return self.add("claim", invoked, returned, asks, call=call, **{"is": "granted"}, token=token)

    def run(self, invoked: float, returned: float, token: int, call: str = "c1") -> "Book":
        return self.add("run", invoked, returned, {"token": token}, call=call, receipt=f"r-{call}")

    def settle(self, invoked: float, returned: float | None, token: int, call: str = "c1", **reply: Any) -> "Book":
        asks = {"token": token, "attempt": f"a-{call}", "body": f'"r-{call}"'}
        return self.add("complete", invoked, returned, asks, call=call, **(reply or {"is": "done"}))

    def call(self, invoked: float, returned: float | None, call: str = "c1", **reply: Any) -> "Book":
        reply = reply or ({} if returned is None else {"value": f"r-{call}", "stored": True})
        return self.add("call", invoked, returned, call=call, **reply)

    def whole(self, at: float, token: int, call: str = "c1") -> "Book":
        """A call that is granted, runs, records and returns, within 5 ms."""
        book = self.grant(at, at + 1, token, call).run(at + 1, at + 2, token, call)
        return book.settle(at + 3, at + 4, token, call).call(at, at + 5, call)

    def claim(self, invoked: float, returned: float | None, call: str, **reply: Any) -> "Book":
        return self.add("claim", invoked, returned, {"attempt": f"a-{call}", "lease": LEASE}, call=call, **reply)

    def promises(self) -> list[str]:
        return [finding.promise for finding in judge(self.operations, expected_errors=["LeaseLost", "InProgress"])]


SETTLED: Any = {"is": "settled", "token": 10, "body": '"r-c1"', "failed": False}
BUSY: Any = {"is": "busy", "token": 10}


def test_ordinary_histories_break_no_promise() -> None:
    book = Book().whole(0, 10)
    book.claim(2, 3, "c2", **BUSY).call(2, 3, "c2", error="InProgress")
    book.claim(6, 7, "c3", **SETTLED).call(6, 8, "c3", value="r-c1", stored=True)
    book.claim(9, None, "c4").call(9, None, "c4")
    assert book.promises() == []
    assert judge([]) == []


def test_a_takeover_a_late_owner_and_a_release_break_no_promise() -> None:
    late = Book().grant(0, 1, 10).run(1, 700, 10).settle(701, 702, 10, **{"is": "stale"})
    late.call(0, 703, error="LeaseLost").whole(310, 20, "c2")
    assert late.promises() == []
    released = Book().grant(0, 1, 10).run(1, 2, 10).add("release", 3, 4, {"attempt": "a-c1", "token": 10})
    released.call(0, 5, error="Declined").whole(3.5, 20, "c2")
    assert released.promises() == []


def test_what_overlaps_is_not_accused() -> None:
    racing = Book().grant(0, 10, 20).grant(5, 300, 30, "c2")
    assert racing.promises() == []  # it may have been granted at its end, and the lease of the other begun at 0
    crossed = Book().grant(0, 400, 30).grant(5, 400, 20, "c2")
    assert crossed.promises() == []
    open_claim = Book().grant(0, 1, 10).claim(310, None, "c2").call(0, 400, error="LeaseLost").call(310, None, "c2")
    assert open_claim.promises() == []  # it may have been granted
    unanswered = Book().grant(0, 1, 10).claim(310, 311, "c2", error="BackendUnavailable")
    assert unanswered.call(0, 400, error="LeaseLost").promises() == []
    before = Book().claim(0, 9, "c2", **BUSY).whole(1, 10)
    assert before.promises() == []


def test_the_first_sending_of_a_claim_begins_its_lease() -> None:
    book = Book().claim(0, 100, "c1", error="BackendUnavailable").grant(200, 201, 10)
    assert book.whole(310, 20, "c2").promises() == []
    renewed = (
        Book()
        .grant(0, 1, 10)
        .add("renew", 200, 201, {"attempt": "a-c1", "token": 10, "lease": LEASE}, **{"is": "done"})
    )
    assert renewed.whole(310, 20, "c2").promises() == ["5. a claim was granted before the lease of another was over"]


@pytest.mark.parametrize(
    ("promise", "book"),
    [
        ("1. two outcomes were recorded", Book().whole(0, 10).settle(400, 401, 20, "c2")),
        (
            "1. a recorded outcome was changed",
            Book().claim(0, 1, "c1", **SETTLED).claim(2, 3, "c2", **(SETTLED | {"token": 11})),
        ),
        (
            "2. calls that succeeded do not agree",
            Book().call(0, 1, value="x", stored=True).call(0, 1, "c2", value="y", stored=True),
        ),
        ("3. two claims were granted one token", Book().grant(0, 1, 10).grant(400, 401, 10, "c2")),
        ("3. a token did not grow", Book().grant(0, 1, 10).grant(400, 401, 9, "c2")),
        (
            "4. what was returned is not what was recorded",
            Book().grant(0, 1, 10).settle(2, 3, 10).call(0, 4, value="other", stored=True),
        ),
        ("5. one claim, two runs", Book().whole(0, 10).run(1, 2, 10)),
        ("5. a run without a claim", Book().run(0, 1, 10)),
        (
            "5. a claim was granted before the lease of another was over",
            Book().grant(0, 1, 10).grant(100, 101, 20, "c2"),
        ),
        ("6. a claim was granted although there was an outcome", Book().whole(0, 10).grant(400, 401, 20, "c2")),
        ("6. a claim was not told of the outcome", Book().whole(0, 10).claim(6, 7, "c2", **BUSY)),
        (
            "7. the faults are over, and the key does not come to an end",
            Book().call(0, 1, error="InProgress", worker="auditor"),
        ),
        ("8. a lease was reported lost that was never granted", Book().call(0, 1, error="LeaseLost")),
        (
            "8. a lease was reported lost, and nobody had taken over",
            Book().grant(0, 1, 10).call(0, 400, error="LeaseLost").grant(500, 501, 20, "c2"),
        ),
        ("9. a call raised what it must not", Book().call(0, 1, error="OperationalError('gone')")),
    ],
)
def test_a_broken_promise_is_found(promise: str, book: Book) -> None:
    assert promise in book.promises()


def test_a_finding_shows_the_operations_with_their_bounds() -> None:
    (finding, *_) = judge(Book().grant(0, 1, 10).grant(400, 401, 9, "c2").operations)
    first, one, other = str(finding).splitlines()
    assert first == "3. a token did not grow; key k"
    assert one.startswith("  [0.0000, 0.0010]   c1      claim    attempt=a-c1 lease=0.3 -> is=granted token=10")
    assert other.startswith("  [0.4000, 0.4010]   c2      claim ")
    open_one = Operation("w", "c", "k", "call", {}, 0)
    assert "[0.0000, never]" in str(Finding("p", "k", (open_one,)))
    assert "no answer" in str(Finding("p", "k", (open_one,)))


def test_a_log_is_joined_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    lines = [
        '{"id": "1", "worker": "w", "call": "c", "key": "k", "does": "claim", "asks": {"lease": 1}, "invoked": 5}',
        '{"id": "2", "worker": "w", "call": "c", "key": "k", "does": "call", "asks": {}, "invoked": 4}',
        '{"id": "1", "returned": 7, "reply": {"is": "busy"}}',
        '{"id": "3", "returned": 9, "reply": {}}',
        '{"id": "4", "wor',
    ]
    joined = join(lines)
    assert joined == [
        Operation("w", "c", "k", "call", {}, 4),
        Operation("w", "c", "k", "claim", {"lease": 1}, 5, 7, {"is": "busy"}),
    ]
    assert [operation.is_open for operation in joined] == [True, False]
    write(joined, tmp_path / "history")
    assert read(tmp_path / "history") == joined
