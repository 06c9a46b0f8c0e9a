"""What real histories prove: operations with the bounds of each, judged by the promises that they can show.

An operation took effect at some instant between `invoked` and `returned`, and nobody knows at which: instants that
processes write into logs are taken before or after the effect, and comparing them accuses the innocent. So one
operation came before another only if it had returned before the other was invoked. One that never returned, because
its process died or the store did not answer, may take effect at any later time, or never.

Judged by key: 1. one outcome is recorded, and no other takes its place; 2. calls that succeed agree; 3. tokens grow, and
no two claims get one; 4. what a run recorded is what its caller got; 5. one run for each claim, and no claim is granted
before the lease of the one before it is over; 6. once an outcome is recorded, every claim is told of it, and nothing runs
again; 7. when the faults are over, every key comes to an end; 8. a lease is reported lost only if another may have taken
over; 9. no call raises anything but the errors that are documented.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Finding", "Operation", "join", "judge", "read", "write"]

SLACK = 0.05
"""How much a store's clock may run fast against ours, as a part of each lease."""

_SETTLES = ("complete", "fail")


@dataclass
class Operation:
    """One thing that a worker did; instants in nanoseconds of the machine's monotonic clock."""

    worker: str
    call: str
    """Which of the worker's calls it belongs to."""
    key: str
    does: str
    """"call", "run" (the function itself), or a backend's command."""
    asks: dict[str, Any]
    invoked: int
    returned: int | None = None
    """None: it never did."""
    reply: dict[str, Any] = field(default_factory=dict)
    """Empty: there is none; {"error": ...}: nobody knows whether it was applied."""

    @property
    def is_granted(self) -> bool:
        """Whether it is a claim that was granted."""
        return self.reply.get("is") == "granted"

    @property
    def is_settled(self) -> bool:
        """Whether it is a completion or failure that was confirmed."""
        return self.does in _SETTLES and self.reply.get("is") == "done"

    @property
    def is_open(self) -> bool:
        """Whether it may still take effect, or may have, without an answer."""
        return self.returned is None or "error" in self.reply


@dataclass(frozen=True)
class Finding:
    """A promise that was broken, and what shows it."""

    promise: str
    key: str
    operations: tuple[Operation, ...]

    def __str__(self) -> str:
        began = min((operation.invoked for operation in self.operations), default=0)
        rows = [f"{self.promise}; key {self.key}"]
        for operation in sorted(self.operations, key=lambda each: each.invoked):
            end = "never" if operation.returned is None else f"{(operation.returned - began) / 1e9:.4f}"
            answer = " ".join(f"{name}={value}" for name, value in operation.reply.items()) or "no answer"
            asked = " ".join(f"{name}={value}" for name, value in operation.asks.items())
            bounds = f"[{(operation.invoked - began) / 1e9:.4f}, {end}]"
            rows.append(f"  {bounds:<18} {operation.worker:<7} {operation.does:<8} {asked} -> {answer}")
        return "\n".join(rows)


def join(events: Iterable[str]) -> list[Operation]:
    """The operations of a log whose lines are either half of one; a line that a killed worker tore is left out."""
    operations: dict[str, Operation] = {}
    for line in events:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        number = event.pop("id")
        if "invoked" in event:
            operations[number] = Operation(**event)
        elif number in operations:
            operations[number].returned, operations[number].reply = event["returned"], event["reply"]
    return sorted(operations.values(), key=lambda operation: operation.invoked)


def write(operations: Iterable[Operation], path: Path) -> None:
    """Write a history, one operation a line, in JSON."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(operation)) + "\n" for operation in operations)


def read(path: Path) -> list[Operation]:
    """What `write` has written."""
    with path.open(encoding="utf-8") as file:
        return [Operation(**json.loads(line)) for line in file]


def judge(operations: Iterable[Operation], *, expected_errors: Iterable[str] = ()) -> list[Finding]:
    """The promises that the history breaks, each at most once for a key.

    Args:
        operations: of all workers; leases are what the claims and renewals asked for.
        expected_errors: the names of what calls may raise.
    """
    by_key: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        by_key[operation.key].append(operation)
    expected = {*expected_errors}
    return [finding for key, history in by_key.items() for finding in _Judge(key, history, expected).findings()]


class _Judge:
    """Judges one key's history."""

    def __init__(self, key: str, history: list[Operation], expected: set[str]) -> None:
        self.key = key
        self.history = sorted(history, key=lambda operation: operation.invoked)
        self.expected = expected
        self.claims = [each for each in self.history if each.does == "claim"]
        self.grants = [each for each in self.claims if each.is_granted]
        self.settles = [each for each in self.history if each.is_settled]
        self.calls = [each for each in self.history if each.does == "call"]

    def findings(self) -> Iterator[Finding]:
        for check in (
            self._one_outcome,
            self._agreement,
            self._growth,
            self._returned_is_stored,
            self._runs,
            self._leases,
            self._permanence,
            self._end,
            self._lost_leases,
            self._errors,
        ):
            shown = check()
            if shown is not None:
                promise, *operations = shown
                yield Finding(promise, self.key, tuple(operations))

    def _one_outcome(self) -> Any:
        first: Operation | None = None
        for settle in self.settles:
            if first is not None and settle.asks["token"] != first.asks["token"]:
                return "1. two outcomes were recorded", first, settle
            first = first or settle
        told: Operation | None = None
        for claim in self.claims:
            if claim.reply.get("is") == "settled":
                if told is not None and claim.reply != told.reply:
                    return "1. a recorded outcome was changed", told, claim
                told = told or claim
        return None

    def _agreement(self) -> Any:
        first: Operation | None = None
        for call in self.calls:
            if call.reply.get("stored"):
                if first is not None and call.reply["value"] != first.reply["value"]:
                    return "2. calls that succeeded do not agree", first, call
                first = first or call
        return None

    def _growth(self) -> Any:
        owners: dict[int, Operation] = {}
        for grant in self.grants:
            other = owners.setdefault(grant.reply["token"], grant)
            if other.asks["attempt"] != grant.asks["attempt"]:
                return "3. two claims were granted one token", other, grant
        newest: Operation | None = None
        ended = sorted(self.grants, key=lambda grant: grant.returned or 0)
        at = 0
        for grant in self.grants:
            while (ended[at].returned or 0) < grant.invoked:
                if newest is None or ended[at].reply["token"] > newest.reply["token"]:
                    newest = ended[at]
                at += 1
            if newest is not None and newest.asks["attempt"] != grant.asks["attempt"]:
                if grant.reply["token"] <= newest.reply["token"]:
                    return "3. a token did not grow", newest, grant
        return None

    def _returned_is_stored(self) -> Any:
        recorded = {settle.call: settle for settle in self.settles}
        for call in self.calls:
            settle = recorded.get(call.call)
            if settle is not None and call.reply.get("stored") and call.reply["value"] not in settle.asks["body"]:
                return "4. what was returned is not what was recorded", settle, call
        return None

    def _runs(self) -> Any:
        granted = {(grant.call, grant.reply["token"]) for grant in self.grants}
        runs: dict[int, Operation] = {}
        for run in (each for each in self.history if each.does == "run"):
            token = run.asks["token"]
            if token in runs:
                return "5. one claim, two runs", runs[token], run
            if (run.call, token) not in granted:
                return "5. a run without a claim", run
            runs[token] = run
        return None

    def _leases(self) -> Any:
        sent: dict[str, int] = {}
        for claim in self.claims:  # the first sending counts: its reply may be what was lost
            sent.setdefault(claim.asks["attempt"], claim.invoked)
        known: dict[int, tuple[int, Operation]] = {}
        """By token: the latest instant at which a lease is known to have been begun or renewed, at the earliest."""
        confirmed: dict[int, Operation] = {}
        for grant in self.grants:
            token = grant.reply["token"]
            known.setdefault(token, (sent[grant.asks["attempt"]], grant))
            if token not in confirmed or (grant.returned or 0) < (confirmed[token].returned or 0):
                confirmed[token] = grant
        for renewal in self.history:
            if renewal.does == "renew" and renewal.reply.get("is") == "done":
                token = renewal.asks["token"]
                if token in known and renewal.invoked > known[token][0]:
                    known[token] = renewal.invoked, renewal
        given_up = {each.asks["attempt"]: each.invoked for each in reversed(self.history) if each.does == "release"}
        holder: tuple[float, Operation, Operation] | None = None
        for token in sorted(known):
            grant = confirmed[token]
            if holder is not None and grant.returned is not None and grant.returned < holder[0]:
                released = given_up.get(holder[2].asks["attempt"])
                if released is None or released > grant.returned:
                    return "5. a claim was granted before the lease of another was over", holder[1], grant
            begun, evidence = known[token]
            until = begun + evidence.asks["lease"] * 1e9 * (1 - SLACK) - 10e6
            if holder is None or until > holder[0] or holder[2].asks["attempt"] in given_up:
                holder = until, evidence, grant
        return None

    def _permanence(self) -> Any:
        if not self.settles:
            return None
        settle = min(self.settles, key=lambda each: each.returned or 0)
        for claim in self.claims:
            if claim.is_granted and claim.reply["token"] > settle.asks["token"]:
                return "6. a claim was granted although there was an outcome", settle, claim
            later = settle.returned is not None and claim.invoked > settle.returned
            if later and not claim.is_open and claim.reply["is"] != "settled":
                return "6. a claim was not told of the outcome", settle, claim
        return None

    def _end(self) -> Any:
        for call in self.calls:
            if call.worker == "auditor" and (call.returned is None or not call.reply.get("stored")):
                return "7. the faults are over, and the key does not come to an end", call
        return None

    def _lost_leases(self) -> Any:
        for call in self.calls:
            if call.reply.get("error") != "LeaseLost":
                continue
            mine = [grant for grant in self.grants if grant.call == call.call]
            if not mine:
                return "8. a lease was reported lost that was never granted", call
            token = max(grant.reply["token"] for grant in mine)
            if not any(
                claim.call != call.call
                and claim.invoked < (call.returned or 0)
                and (claim.is_open or (claim.is_granted and claim.reply["token"] > token))
                for claim in self.claims
            ):
                return "8. a lease was reported lost, and nobody had taken over", mine[-1], call
        return None

    def _errors(self) -> Any:
        for call in self.calls:
            if call.reply.get("error", "Declined") not in {"Declined", *self.expected}:
                return "9. a call raised what it must not", call
        return None
