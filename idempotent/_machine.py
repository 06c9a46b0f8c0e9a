"""Who owns a key: the theory, the table, and the pure functions that apply it.

**Owning.** A record is absent, running, completed, failed or unknown. Exactly one attempt owns a running record:
the one whose attempt id and fencing token stand in it. Every change is a compare-and-set on both, made atomically by
the backend, so an owner that was overtaken can change nothing, however late its command arrives.

**Sent twice.** A reply can be lost although the command was applied. So every command recognises its own earlier
self by the attempt id: a claim finds its own running record and is granted it again, with the same token; a
completion finds itself recorded and says so again. No command applied twice changes anything.

**Expiry.** Only the backend's clock decides. A lease that has ended takes nothing from its owner by itself: until
somebody else's claim moves the record, the late owner may still renew or complete it. If the clock steps back, the
lease left is cut to the lease's own length, and the row is rewritten so that this happens once.

**Crashes.** Before the claim is applied: nothing happened. After it and before the outcome: the lease runs out, and
the next claim takes over (`takeover`) or marks the record unknown (not `takeover`): nobody can know whether the
effect happened. After the outcome: the record is settled and is replayed. A frozen owner that wakes up to an unknown
record may still renew or complete it, as nobody took over.

**Tokens.** `max(previous + 1, backend time in microseconds)`: larger than every token before, also when the record
and its previous token are gone.

The claim, row by row (an earlier line wins):

    found                                        reply                   the record afterwards
    -------------------------------------------  ----------------------  -----------------------
    absent, or past its retention                Granted(token)          running
    withdrawn, same attempt                      Busy(0)                 as it was
    withdrawn, another attempt                   Granted(token)          running
    another fingerprint, in any state            Mismatched              as it was
    running, same attempt                        Granted(same token)     as it was
    running, lease alive                         Busy(lease left)        as it was
    running, lease over, takeover                Granted(higher token)   running
    running, lease over, over == its token       Granted(higher token)   running
    running, lease over, otherwise               Unknown                 unknown
    unknown, over == its token                   Granted(higher token)   running
    unknown, otherwise                           Unknown                 as it was
    completed, failed                            Settled                 as it was

The owner's commands; `own` means that attempt and token are those in the record:

    command             running, own     unknown, own     settled, own    another's   absent
    ------------------  ---------------  ---------------  --------------  ----------  -----------------
    renew               DONE, renewed    DONE, running    STALE           STALE       GONE
    complete, fail      DONE, settled    DONE, settled    DONE, as it is  STALE       GONE
    release             DONE, withdrawn  DONE, withdrawn  STALE           STALE       GONE
    release(unknown)    DONE, unknown    DONE, as is      STALE           STALE       GONE

What a release or a forget leaves is a tombstone, the withdrawn record, for longer than a command can be in flight.
It keeps the token: a claim that read the clock before the release and is applied after it is granted a higher one all
the same, and an owner of a lower one is told STALE. And it keeps the attempt: the release, sent twice, knows itself
and says DONE again, and its claim cannot be applied once more; a forget, which brings an id of its own, knows itself
likewise and says again what it found. To everybody else it is an absent record.

A release whose token is None takes back a claim that was never confirmed: it knows itself by its attempt alone and
leaves a tombstone even where it finds nothing, so that the claim cannot be applied after it: DONE. A record has one
tombstone, of the last claim withdrawn: should an earlier one arrive after it, its lease runs out like a dead runner's.
"""

from typing import NamedTuple

from idempotent._record import (
    Answer,
    Busy,
    Claim,
    Granted,
    Mismatched,
    Row,
    Settled,
    State,
    Unknown,
)

TOMBSTONE = 10_000_000
"""How long a withdrawn record is remembered, in microseconds: longer than a command can be in flight."""


class Ask(NamedTuple):
    """What a claim brings; durations in microseconds."""

    attempt: bytes
    fingerprint: bytes
    lease: int
    keep: int | None
    """How long past its lease a running row is kept; None: until it is settled."""
    takeover: bool
    """Run again after a crash; False: the record of a dead runner becomes unknown."""
    over: int | None = None
    """The token of the dead runner whose record this claim may take, if it is still that one's."""
    owner: bytes = b""
    """What the running record says of its runner."""


def on_claim(row: Row | None, ask: Ask, now: int) -> tuple[Claim, Row | None]:
    """The reply to `ask` and the row to store instead of `row` (None: leave it as it is)."""
    if row is None or (row.expires is not None and row.expires <= now):
        return _grant(row, ask, now, took_over=False)
    if row.state is State.WITHDRAWN:
        if row.attempt == ask.attempt:
            return Busy(row.token, 0.0), None
        return _grant(row, ask, now, took_over=False)
    age = max(0, now - row.since) / 1e6
    if ask.fingerprint and row.fingerprint and ask.fingerprint != row.fingerprint:
        return Mismatched(age, row.fingerprint), None
    if row.state is State.RUNNING:
        if row.attempt == ask.attempt:
            return Granted(row.token), None
        left = row.lease_until - now
        if left > row.lease:
            return Busy(row.token, row.lease / 1e6), _leased(row, row.lease, now)
        if left > 0:
            return Busy(row.token, left / 1e6), None
        if ask.takeover or ask.over == row.token:
            return _grant(row, ask, now, took_over=True)
        return Unknown(row.token, 0.0), _unknown(row, now)
    if row.state is State.UNKNOWN:
        if ask.over == row.token:
            return _grant(row, ask, now, took_over=True)
        return Unknown(row.token, age), None
    failed = row.state is State.FAILED
    return Settled(failed, row.token, age, row.codec, row.body), None


def on_renew(row: Row | None, attempt: bytes, token: int, lease: int, now: int) -> tuple[Answer, Row | None]:
    """The answer to a renewal and the row to store (None: leave it)."""
    answer = _owner(row, attempt, token, now)
    if row is None or answer is not Answer.DONE:
        return answer, None
    if row.state is State.UNKNOWN:
        row = row._replace(state=State.RUNNING, since=now)
    elif row.state is not State.RUNNING:
        return Answer.STALE, None
    return Answer.DONE, _leased(row, lease, now)


def on_settle(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> tuple[Answer, Row | None]:
    """The answer to a completion or failure whose row would be `settled`, and the row to store (None: leave it).

    The fingerprint stays the one that the claim brought.
    """
    answer = _owner(row, attempt, token, now)
    if row is None or answer is not Answer.DONE:
        return answer, None
    if row.state in (State.COMPLETED, State.FAILED):
        return Answer.DONE, None
    return Answer.DONE, settled._replace(fingerprint=row.fingerprint)


def on_release(
    row: Row | None, attempt: bytes, token: int | None, now: int, *, unknown: bool = False
) -> tuple[Answer, Row | None]:
    """The answer to a release, and the row to store (None: leave it)."""
    answer = _owner(row, attempt, token, now)
    if row is None or answer is not Answer.DONE:
        known = row is not None and row.state is State.WITHDRAWN and row.attempt == attempt and now < (row.expires or 0)
        if answer is Answer.GONE and token is None:
            return Answer.DONE, None if known else _withdrawn(row, attempt, now)
        return Answer.DONE if known and row is not None and token == row.token else answer, None
    if row.state in (State.COMPLETED, State.FAILED):
        return Answer.STALE, None
    if unknown:
        return Answer.DONE, _unknown(row, now) if row.state is State.RUNNING else None
    return Answer.DONE, _withdrawn(row, attempt, now)


def on_forget(row: Row | None, attempt: bytes, now: int, *, force: bool) -> tuple[Row | None, Row | None]:
    """The record that a forget with its own id `attempt` finds, and the row to store (None: leave it)."""
    if row is None or (row.expires is not None and row.expires <= now):
        return None, None
    if row.state is State.WITHDRAWN:
        if row.attempt != attempt or not row.lease:
            return None, None
        return row._replace(state=State(chr(row.lease)), lease=0, lease_until=now), None
    if row.state is State.RUNNING and not force:
        return row, None
    return row, _withdrawn(row, attempt, now)._replace(lease=ord(row.state.value))


def _withdrawn(row: Row | None, attempt: bytes, now: int) -> Row:
    token, fingerprint = (0, b"") if row is None else (row.token, row.fingerprint)
    return Row(State.WITHDRAWN, token, attempt, fingerprint, now, expires=now + TOMBSTONE)


def _owner(row: Row | None, attempt: bytes, token: int | None, now: int) -> Answer:
    if row is None or (row.expires is not None and row.expires <= now):
        return Answer.GONE
    if row.state is State.WITHDRAWN:
        overtaken = token is not None and row.token > token
        return Answer.STALE if overtaken else Answer.GONE
    if row.attempt == attempt and token in (None, row.token):
        return Answer.DONE
    return Answer.STALE


def _grant(row: Row | None, ask: Ask, now: int, *, took_over: bool) -> tuple[Claim, Row]:
    token = now if row is None else max(row.token + 1, now)
    # An operator who settles a dead run knows its key alone: the arguments' digest stays.
    fingerprint = ask.fingerprint or (row.fingerprint if row is not None and took_over else b"")
    granted = Row(State.RUNNING, token, ask.attempt, fingerprint, now, body=ask.owner)
    if ask.keep is not None:
        granted = granted._replace(expires=now + ask.lease + ask.keep)
    granted = _leased(granted, ask.lease, now)
    return Granted(token, took_over), granted


def _leased(row: Row, lease: int, now: int) -> Row:
    """`row` with a lease from now on, its retention moved along."""
    until = now + lease
    expires = row.expires
    if expires is not None and row.lease_until:
        expires = until + max(0, expires - row.lease_until)
    return row._replace(lease=lease, lease_until=until, expires=expires)


def _unknown(row: Row, now: int) -> Row:
    return row._replace(state=State.UNKNOWN, since=now, lease=0, lease_until=0, expires=None)
