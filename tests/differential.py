"""Random commands, given to a backend and to `idempotent._machine` on what the server's own clock says: they must agree."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, Protocol, Self

from colours import Colour

from idempotent import Backend
from idempotent import _machine as machine
from idempotent._drive import drive
from idempotent._machine import Ask
from idempotent._record import Granted, Record, RecordId, Row, State, describe, standing

ATTEMPTS = [b"attemptA", b"attemptB", b"attemptC"]
FINGERPRINTS = [b"f" * 16, b"f" * 16, b"g" * 16, b""]
LEASE, KEEP, TTL, REMEMBER = 60.0, 600.0, 1000.0, 1500.0
SLACK = 0.5
"""Seconds by which the end of a retention may differ: Redis keeps milliseconds, and tells what is left of them."""


class Store(Protocol):
    """A way to a backend's server beside the backend."""

    def clock(self) -> int:
        """The server's time in microseconds."""
        ...

    def row(self, rid: RecordId) -> Row | None:
        """What is stored."""
        ...

    def age(self, rid: RecordId, by: int) -> None:
        """Move the instants of the stored row back, as if `by` microseconds had passed; or have them pass."""
        ...


class Commands:
    """A backend's commands in one colour, on one event loop, as plain calls."""

    def __init__(self, backend: Backend, colour: Colour) -> None:
        self._runner = asyncio.Runner() if colour.is_async else None
        self._backend = backend.asynchronous() if colour.is_async else backend.blocking()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runner is not None:
            self._runner.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        command = getattr(self._backend, name)
        if self._runner is None:
            return lambda *args, **kwargs: drive(command(*args, **kwargs))
        runner = self._runner
        return lambda *args, **kwargs: runner.run(command(*args, **kwargs))

    def scanned(self, **filters: Any) -> list[Record]:
        async def collect() -> list[Record]:
            return [record async for record in self._backend.scan(**filters)]

        return drive(collect()) if self._runner is None else self._runner.run(collect())


def aged(row: Row, by: int) -> Row:
    """`row` as it would stand if it had been written `by` microseconds earlier."""
    return row._replace(
        token=max(0, row.token - by),
        since=row.since - by,
        lease_until=row.lease_until and row.lease_until - by,
        expires=None if row.expires is None else row.expires - by,
    )


def disagreement(
    commands: Commands, store: Store, rid: RecordId, seed: int, steps: int, *, clock_moves: bool = False
) -> str:
    """Where the backend first differs from the machine in a random history; "" if nowhere.

    `clock_moves`: the store ages by moving its clock and not the row; its tokens grow even if the clock steps back.
    """
    dice = random.Random(seed)
    history: list[str] = []
    tokens: list[int] = []
    stepped_back = False
    for _ in range(steps):
        row = store.row(rid)
        name, arguments = _choose(dice, row, tokens)
        history.append(f"{name} {arguments}")
        if name == "age":
            if row is not None:
                store.age(rid, arguments["by"])
            if not clock_moves:
                tokens = [token - arguments["by"] for token in tokens]
                stepped_back |= arguments["by"] < 0
            continue
        before = store.clock()
        reply = getattr(commands, name)(rid, **arguments)
        after = store.clock()
        wrong = _compare(reply, store.row(rid), row, name, arguments, rid, before, after)
        if isinstance(reply, Granted) and reply.token not in tokens:
            # Once a record is gone, only the clock makes its tokens grow.
            if tokens and reply.token < max(tokens) and not stepped_back:
                wrong = f"the token {reply.token} is smaller than one before it"
            tokens.append(reply.token)
        if wrong:
            return "\n".join([*history, f"row before: {row}", wrong])
    return ""


def _choose(dice: random.Random, row: Row | None, tokens: list[int]) -> tuple[str, dict[str, Any]]:
    mine = dice.random() < 0.75
    attempt = row.attempt if row is not None and mine else dice.choice(ATTEMPTS)
    token = row.token if row is not None and mine else dice.choice([*tokens, 1])
    name = dice.choices(
        ["claim", "renew", "complete", "fail", "release", "forget", "read", "age"], [12, 3, 1, 1, 3, 1, 2, 8]
    )[0]
    if name == "claim":
        return name, {
            "attempt": dice.choice([*ATTEMPTS, attempt]),
            "fingerprint": dice.choice(FINGERPRINTS),
            "lease": LEASE,
            "keep": dice.choice([None, KEEP]),
            "takeover": dice.random() < 0.4,
            "over": dice.choice([None, None, token]),
            "owner": dice.choice([b"", "7@höst".encode()]),
        }
    if name == "renew":
        return name, {"attempt": attempt, "token": token, "lease": dice.choice([LEASE, 2 * LEASE])}
    if name in ("complete", "fail"):
        body = dice.choice([b"", b"\x00\xff'\\", b"{}" * 2000])
        brings = {"attempt": attempt, "token": token, "codec": "json", "body": body, "ttl": TTL}
        return name, brings | ({"remember": dice.choice([0.0, REMEMBER])} if name == "complete" else {})
    if name == "release":
        return name, {
            "attempt": attempt,
            "token": dice.choice([token, token, None]),
            "unknown": dice.random() < 0.4,
        }
    if name == "forget":
        return name, {"force": dice.random() < 0.5}
    if name == "age":
        # Within a lease (twice as often); past one; past all that is kept; and the clock stepped back.
        shares = [0.8 * LEASE, 0.8 * LEASE, 1.5 * LEASE, 2.5 * LEASE, 2 * KEEP, -2.5 * LEASE]
        return name, {"by": round(dice.choice(shares) * 1e6)}
    return name, {}


def _expected(row: Row | None, name: str, arguments: dict[str, Any], rid: RecordId, now: int) -> tuple[Any, Row | None]:
    """What the machine answers at `now`, and what is stored afterwards; None: as before."""
    if name == "claim":
        ask = {**arguments, "lease": _micros(arguments["lease"])}
        ask["keep"] = None if arguments["keep"] is None else _micros(arguments["keep"])
        return machine.on_claim(row, Ask(**ask), now)
    attempt, token = arguments.get("attempt", b""), arguments.get("token", 0)
    if name == "renew":
        return machine.on_renew(row, attempt, token, _micros(arguments["lease"]), now)
    if name in ("complete", "fail"):
        state = State.COMPLETED if name == "complete" else State.FAILED
        expires = now + _micros(arguments["ttl"])
        past = _micros(arguments.get("remember", 0.0))
        settled = Row(state, token, attempt, b"", now, past, 0, expires, arguments["codec"], arguments["body"])
        return machine.on_settle(row, attempt, token, settled, now)
    if name == "release":
        return machine.on_release(row, attempt, token, now, unknown=arguments["unknown"])
    found, changed = row, None
    if name == "forget":
        found, changed = machine.on_forget(row, attempt, now, force=arguments["force"])
    return None if found is None else describe(rid, found, now), changed


def _compare(
    reply: Any,
    stored: Row | None,
    row: Row | None,
    name: str,
    arguments: dict[str, Any],
    rid: RecordId,
    before: int,
    after: int,
) -> str:
    if name == "forget":  # with an id of its own, which only its tombstone tells
        new = stored is not None and (row is None or stored.attempt != row.attempt)
        arguments = {**arguments, "attempt": stored.attempt if stored is not None and new else b"itsown.."}
    (early, early_row), (late, late_row) = (_expected(row, name, arguments, rid, now) for now in (before, after))
    if not _between(reply, early, late):
        return f"replied {reply}, not {early} to {late}"
    rows = [row if each is None else each for each in (early_row, late_row)]
    rows = [None if each is not None and _over(each, after) else each for each in rows]
    if not _between(None if stored is not None and _over(stored, after) else stored, *rows):
        return f"replied {reply} and stored {stored}, not {rows[0]} to {rows[1]}"
    return ""


def _over(row: Row, now: int) -> bool:
    return standing(row, now) is None


def _between(value: Any, one: Any, other: Any, slack: float = 1e-6) -> bool:
    """Whether numbers that depend on the time lie between two answers, and all else is equal to both."""
    if type(value) is not type(one) or type(value) is not type(other):
        return False
    if isinstance(value, tuple):
        slacks = {"expires": SLACK * 1e6, "expires_in": SLACK}
        if getattr(value, "state", None) is State.COMPLETED:  # how long it is remembered
            slacks["lease"] = SLACK * 1e6
        names = value._fields  # type: ignore[attr-defined]
        return all(
            _between(*each, slacks.get(name, 1e-6)) for name, *each in zip(names, value, one, other, strict=True)
        )
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return bool(value == one == other)
    return bool(min(one, other) - slack <= value <= max(one, other) + slack)


def _micros(seconds: float) -> int:
    return round(seconds * 1e6)
