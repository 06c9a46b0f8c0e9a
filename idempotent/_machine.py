"""Who owns a key: the theory, the tables, and the pure functions that apply them.

**Owning.** A record is absent, running, completed, failed, unknown or expired. Exactly one attempt owns a running record:
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

**Remembering.** A result is kept for its ttl. Past it the record is absent, unless its key is to be remembered: then
it is expired. It says that the call was done and by which arguments, and nobody may run it: who comes late is told so,
instead of doing it all again. A recorded error is not remembered: past its time the call is to be tried again.

**Tokens.** `max(previous + 1, backend time in microseconds)`: larger than every token before, also when the record
and its previous token are gone.

**The tables.** `CLAIM`, `OWNER` and `FORGET` decide what a command is answered and what the record is afterwards,
`RETENTION_ENDS` in `_record` what time makes of it. The functions say which line applies, and make the rows. README's
diagram is drawn from the tables by `diagram()`.

What a release or a forget leaves is a tombstone, the withdrawn record, for longer than a command can be in flight.
It keeps the token: a claim that read the clock before the release and is applied after it is granted a higher one all
the same, and an owner of a lower one is told STALE. And it keeps the attempt: the release, sent twice, knows itself
and says DONE again, and its claim cannot be applied once more; a forget, which brings an id of its own, knows itself
likewise and says again what it found. To everybody else it is an absent record.

A release whose token is None takes back a claim that was never confirmed: it knows itself by its attempt alone and
leaves a tombstone even where it finds nothing, so that the claim cannot be applied after it. A record has one
tombstone, of the last claim withdrawn: should an earlier one arrive after it, its lease runs out like a dead runner's.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from idempotent._record import (
    RETENTION_ENDS,
    Answer,
    Busy,
    Claim,
    Expired,
    Granted,
    Mismatched,
    Row,
    Settled,
    State,
    Unknown,
    standing,
)

_R, _C, _F = State.RUNNING, State.COMPLETED, State.FAILED
_U, _E, _W = State.UNKNOWN, State.EXPIRED, State.WITHDRAWN

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


# ------------------------------------------------------------------------------------- what a claim is answered


def _token(row: Row | None, now: int) -> int:
    return now if row is None else max(row.token + 1, now)


def _granted(row: Row | None, _ask: Ask, now: int) -> Claim:
    return Granted(_token(row, now))


def _taken_over(row: Row | None, _ask: Ask, now: int) -> Claim:
    return Granted(_token(row, now), took_over=True)


def _granted_again(row: Row, _ask: Ask, _now: int) -> Claim:
    return Granted(row.token)


def _busy(row: Row, _ask: Ask, now: int) -> Claim:
    return Busy(row.token, max(0, min(row.lease_until - now, row.lease)) / 1e6)


def _mismatched(row: Row, _ask: Ask, now: int) -> Claim:
    return Mismatched(max(0, now - row.since) / 1e6, row.fingerprint)


def _in_doubt(row: Row, _ask: Ask, now: int) -> Claim:
    return Unknown(row.token, max(0, now - row.since) / 1e6 if row.state is State.UNKNOWN else 0.0)


def _settled(row: Row, _ask: Ask, now: int) -> Claim:
    return Settled(row.state is State.FAILED, row.token, max(0, now - row.since) / 1e6, row.codec, row.body)


def _expired(row: Row, _ask: Ask, now: int) -> Claim:
    return Expired(row.token, max(0, now - row.since) / 1e6)


# -------------------------------------------------------------------------------------- what a claim leaves behind


def _runs(row: Row | None, ask: Ask, now: int) -> Row:
    until = now + ask.lease
    expires = None if ask.keep is None else until + ask.keep
    return Row(_R, _token(row, now), ask.attempt, ask.fingerprint, now, ask.lease, until, expires, "", ask.owner)


def _runs_after(row: Row, ask: Ask, now: int) -> Row:
    # An operator who settles a dead run knows its key alone: the arguments' digest stays.
    return _runs(row, ask if ask.fingerprint else ask._replace(fingerprint=row.fingerprint), now)


def _leased(row: Row, lease: int, now: int) -> Row:
    """`row` with a lease from now on, its retention moved along."""
    until = now + lease
    expires = row.expires
    if expires is not None and row.lease_until:
        expires = until + max(0, expires - row.lease_until)
    return row._replace(lease=lease, lease_until=until, expires=expires)


def _leased_at_most(row: Row, _ask: Ask, now: int) -> Row:
    return _leased(row, row.lease, now)


def _unknown(row: Row, _ask: object, now: int) -> Row:
    return row._replace(state=State.UNKNOWN, since=now, lease=0, lease_until=0, expires=None)


def _cut(row: Row, _ask: Ask, _now: int) -> Row:
    return row


# ------------------------------------------------------------------------------------------------------- the tables


class Line(NamedTuple):
    """One line of the table of claims."""

    found: tuple[State | None, ...]
    """The record that the claim finds, as it stands by then; None: none."""
    reply: Callable[..., Claim]
    then: State | None = None
    """What the record is afterwards; None: what it was."""
    store: Callable[..., Row] | None = None
    """Makes the row that is stored; None: none is."""


CLAIM: dict[str, Line] = {
    # what the claim finds             the record there    reply           afterwards
    "nothing":                    Line((None,),            _granted,       _R, _runs),
    "withdrawn by the same":      Line((_W,),              _busy),
    "withdrawn by another":       Line((_W,),              _granted,       _R, _runs),
    "other arguments":            Line((_R, _U, _C, _F, _E), _mismatched),
    "its own run":                Line((_R,),              _granted_again),
    "the clock stepped back":     Line((_R,),              _busy,          _R, _leased_at_most),
    "lease alive":                Line((_R,),              _busy),
    "lease over, takeover":       Line((_R,),              _taken_over,    _R, _runs_after),
    "lease over, over its token": Line((_R,),              _taken_over,    _R, _runs_after),
    "lease over":                 Line((_R,),              _in_doubt,      _U, _unknown),
    "in doubt, over its token":   Line((_U,),              _taken_over,    _R, _runs_after),
    "in doubt":                   Line((_U,),              _in_doubt),
    "an outcome":                 Line((_C, _F),           _settled),
    "its ttl over, remembered":   Line((_E,),              _expired,       None, _cut),
}  # fmt: skip
"""The claim. An earlier line wins; `over its token`: the claim names the token that the record has."""

_STALE, _GONE = (Answer.STALE, None), (Answer.GONE, None)


def _settling(then: State) -> dict[str, tuple[Answer, State | None]]:
    return {
        "running":     (Answer.DONE, then),
        "in doubt":    (Answer.DONE, then),
        "settled":     (Answer.DONE, None),
        "withdrawn":   _GONE,
        "another's":   _STALE,
        "none":        _GONE,
    }  # fmt: skip


OWNER: dict[str, dict[str, tuple[Answer, State | None]]] = {
    # The command, and what it finds: its sender's own record, which is running, in doubt or settled; its sender's
    # tombstone; another's record, or tombstone with a higher token; none, by who knows its token and who does not.
    "renew": {
        "running":     (Answer.DONE, _R),
        "in doubt":    (Answer.DONE, _R),
        "settled":     _STALE,
        "withdrawn":   _GONE,
        "another's":   _STALE,
        "none":        _GONE,
    },
    "complete": _settling(_C),
    "fail": _settling(_F),
    "release": {
        "running":     (Answer.DONE, _W),
        "in doubt":    (Answer.DONE, _W),
        "settled":     _STALE,
        "withdrawn":   (Answer.DONE, None),
        "another's":   _STALE,
        "none":        _GONE,
        "unconfirmed": (Answer.DONE, _W),
    },
    "release to unknown": {
        "running":     (Answer.DONE, _U),
        "in doubt":    (Answer.DONE, None),
        "settled":     _STALE,
        "withdrawn":   (Answer.DONE, None),
        "another's":   _STALE,
        "none":        _GONE,
        "unconfirmed": (Answer.DONE, _W),
    },
}  # fmt: skip
"""The owner's commands: the answer, and what the record is afterwards; None: what it was."""

FORGET: dict[str, tuple[bool, State | None]] = {
    "none":              (False, None),
    "withdrawn":         (False, None),
    "forgotten by this": (True, None),
    "running":           (True, None),
    "running, by force": (True, _W),
    "in doubt":          (True, _W),
    "settled":           (True, _W),
}  # fmt: skip
"""What a forget finds: whether that is told, and what the record is afterwards; None: what it was."""


# ------------------------------------------------------------------------------------- which line of a table applies


def _found(found: Row | None, ask: Ask, now: int) -> str:
    """The line of CLAIM; `found`: the record as it stands."""
    if found is None:
        return "nothing"
    state = found.state
    if state is _W:
        return "withdrawn by the same" if found.attempt == ask.attempt else "withdrawn by another"
    if ask.fingerprint and found.fingerprint and ask.fingerprint != found.fingerprint:
        return "other arguments"
    if state is _C or state is _F:
        return "an outcome"
    if state is _R:
        if found.attempt == ask.attempt:
            return "its own run"
        left = found.lease_until - now
        if left > found.lease:
            return "the clock stepped back"
        if left > 0:
            return "lease alive"
        if ask.takeover:
            return "lease over, takeover"
        return "lease over, over its token" if ask.over == found.token else "lease over"
    if state is _U:
        return "in doubt, over its token" if ask.over == found.token else "in doubt"
    return "its ttl over, remembered"


def _whose(row: Row | None, attempt: bytes, token: int | None, now: int) -> str:
    """The line of OWNER."""
    found = standing(row, now)
    if found is None:
        return "none" if token is not None else "unconfirmed"
    mine = found.attempt == attempt and token in (None, found.token)
    if found.state is _W:
        if mine:
            return "withdrawn"
        if token is None:
            return "unconfirmed"
        return "another's" if found.token > token else "none"
    if not mine:
        return "another's"
    return "running" if found.state is _R else _LINE.get(found.state, "settled")


_LINE = {_R: "running", _U: "in doubt"}


# ------------------------------------------------------------------------------------------------- the rules applied


def on_claim(row: Row | None, ask: Ask, now: int) -> tuple[Claim, Row | None]:
    """The reply to `ask` and the row to store instead of `row` (None: leave it as it is)."""
    found = standing(row, now)
    line = CLAIM[_found(found, ask, now)]
    at = row if found is None else found  # what has been dropped in all but name still has its token
    stored = None if line.store is None else line.store(at, ask, now)
    return line.reply(at, ask, now), None if stored is row else stored


def on_renew(row: Row | None, attempt: bytes, token: int, lease: int, now: int) -> tuple[Answer, Row | None]:
    """The answer to a renewal and the row to store (None: leave it)."""
    answer, then = OWNER["renew"][_whose(row, attempt, token, now)]
    if row is None or then is None:
        return answer, None
    if row.state is not then:
        row = row._replace(state=then, since=now)
    return answer, _leased(row, lease, now)


def on_settle(row: Row | None, attempt: bytes, token: int, settled: Row, now: int) -> tuple[Answer, Row | None]:
    """The answer to a completion or failure whose row would be `settled`, and the row to store (None: leave it).

    The fingerprint stays the one that the claim brought. A `lease` of a completed row says how long past `expires` the
    key is remembered.
    """
    command = "fail" if settled.state is _F else "complete"
    answer, then = OWNER[command][_whose(row, attempt, token, now)]
    if row is None or then is None:
        return answer, None
    return answer, settled._replace(state=then, fingerprint=row.fingerprint)


def on_release(
    row: Row | None, attempt: bytes, token: int | None, now: int, *, unknown: bool = False
) -> tuple[Answer, Row | None]:
    """The answer to a release, and the row to store (None: leave it)."""
    command = "release to unknown" if unknown else "release"
    answer, then = OWNER[command][_whose(row, attempt, token, now)]
    if then is None:
        return answer, None
    if row is None or then is _W:
        return answer, _withdrawn(row, attempt, now)
    return answer, _unknown(row, None, now)


def on_forget(row: Row | None, attempt: bytes, now: int, *, force: bool) -> tuple[Row | None, Row | None]:
    """The record that a forget with its own id `attempt` finds, and the row to store (None: leave it)."""
    found = standing(row, now)
    if found is None:
        line = "none"
    elif found.state is _W:
        line = "forgotten by this" if found.attempt == attempt and found.lease else "withdrawn"
    else:
        line = _LINE.get(found.state, "settled") + (", by force" if force and found.state is _R else "")
    told, then = FORGET[line]
    if found is None or not told:
        return None, None
    if found.state is _W:
        return found._replace(state=State(chr(found.lease)), lease=0, lease_until=now), None
    return found, None if then is None else _withdrawn(found, attempt, now)._replace(lease=ord(found.state.value))


def _withdrawn(row: Row | None, attempt: bytes, now: int) -> Row:
    token, fingerprint = (0, b"") if row is None else (row.token, row.fingerprint)
    return Row(_W, token, attempt, fingerprint, now, expires=now + TOMBSTONE)


# ------------------------------------------------------------------------------------------------------- the diagram


def diagram() -> str:
    """The tables as a Mermaid state diagram: what changes a record, and into what."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for (one, other), why in _changes():
        said = arrows.setdefault((_name(one), _name(other)), [])
        if why not in said:
            said.append(why)
    lines = [f"    {one} --> {other}: {', '.join(why)}" for (one, other), why in arrows.items()]
    return "\n".join(["stateDiagram-v2", "    [*] --> absent", *lines])


def _changes() -> Iterator[tuple[tuple[State | None, State | None], str]]:
    """From what to what, None: absent, and why."""
    own = {"running": (_R,), "in doubt": (_U,), "settled": (_C, _F, _E), "unconfirmed": (None,)}
    for what, line in CLAIM.items():
        for state in line.found:
            if line.then is not None:
                yield (state, line.then), f"claim ({what})"
    for command, finds in OWNER.items():
        for what, (_, then) in finds.items():
            for state in own.get(what, ()):
                if then is not None:
                    yield (state, then), command if what != "unconfirmed" else f"{command} ({what})"
    for what, (_, then) in FORGET.items():
        for state in own.get(what.removesuffix(", by force"), ()):
            if then is not None:
                yield (state, then), "forget" + (" (by force)" if what.endswith("by force") else "")
    for state, then in RETENTION_ENDS.items():
        if state is not _U:  # which is kept until somebody settles it
            if then is not None:
                yield (state, then), "time (remembered)"
            yield (state, None), "time"


def _name(state: State | None) -> str:
    return "absent" if state is None else state.name.lower()
