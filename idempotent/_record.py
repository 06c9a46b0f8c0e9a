"""What a backend stores and what it answers: frozen values, and the byte envelope of a stored row.

Instants and durations inside a row are whole microseconds of the *backend's* clock (milliseconds would let a
30 ms lease be taken over at 29.4 ms). What leaves a backend are durations in seconds.
"""

import struct
from enum import Enum
from hashlib import blake2b
from typing import Literal, NamedTuple

from idempotent.errors import BackendError

CALLS = "c"
"""The key space of idempotency keys."""
LOCKS = "l"
"""The key space of lock names: the two never meet."""
STEPS = "s"
"""The key space of steps: what a call has done so far. The namespace is the call's own id as text."""

ATTEMPT_BYTES = 8
FINGERPRINT_BYTES = 16
OWNER_BYTES = 200
"""At most."""

StateName = Literal["running", "completed", "failed", "unknown", "expired"]


class State(Enum):
    """The states of a stored row; the value is the letter it is stored as."""

    RUNNING = "R"
    COMPLETED = "C"
    FAILED = "F"
    UNKNOWN = "U"
    EXPIRED = "E"
    """What is left of a completed record past its ttl where the key is remembered: that it was done, and for what."""
    WITHDRAWN = "W"
    """A short tombstone: the record was released or forgotten, or its claim taken back."""


SETTLED = (State.COMPLETED, State.FAILED, State.EXPIRED)
"""The states that nothing but a forget, and time, ends."""


class RecordId:
    """What a record is stored under: key space, namespace and key, joined without ambiguity.

    `text` is injective (the namespace is length-prefixed), so a backend that stores whole strings cannot confuse
    two ids; `digest` (48 hex characters, BLAKE2b-192 of `text`) is for backends with bounded keys and for logs.
    """

    __slots__ = ("_digest", "key", "namespace", "space", "text")

    def __init__(self, namespace: str, key: str, space: str = CALLS) -> None:
        self.space = space
        self.namespace = namespace
        self.key = key
        self.text = f"{space}{len(namespace)}:{namespace}:{key}"
        self._digest = ""

    @property
    def digest(self) -> str:
        """Hex digest of `text`; what logs, errors and fixed-length columns show."""
        if not self._digest:
            self._digest = digest_of(self.text)
        return self._digest

    @classmethod
    def parse(cls, text: str) -> "RecordId":
        """The id whose `text` this is. Raises BackendError for any other string."""
        length, colon, rest = text[1:].partition(":")
        if text[:1] in (CALLS, LOCKS, STEPS) and colon and length.isdecimal() and len(length) < 10:
            cut = int(length)
            found = cls(rest[:cut], rest[cut + 1 :], text[0])
            if found.text == text:
                return found
        raise BackendError(f"{text[:80]!r} is no record id of ours")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RecordId) and other.text == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"RecordId({self.digest})"


def digest_of(text: str) -> str:
    """The digest of the record id with this text."""
    return blake2b(text.encode(), digest_size=24).hexdigest()


class Row(NamedTuple):
    """One stored record. `since`, `lease_until`, `expires` are instants, `lease` a duration: microseconds."""

    state: State
    token: int
    attempt: bytes
    """The attempt that claimed the record, or settled it: how a re-sent command recognises itself."""
    fingerprint: bytes
    """Digest of the arguments; empty: not checked."""
    since: int
    """When the record reached this state."""
    lease: int = 0
    """Running: the lease's length. Completed: how long past `expires` the key is remembered; 0: not at all. In the
    tombstone of a forgotten record the code of its state's letter."""
    lease_until: int = 0
    """Running only: when the lease ends unless it is renewed."""
    expires: int | None = None
    """When the row counts as absent, or a completed one as expired; None: it stays until someone settles it."""
    codec: str = ""
    body: bytes = b""
    """The outcome; until there is one, what the claim said of its owner."""


class Granted(NamedTuple):
    """The claim stands: this attempt is the only runner."""

    token: int
    took_over: bool = False
    """Another attempt held the record and its lease had run out."""


class Busy(NamedTuple):
    """Another attempt runs."""

    token: int
    lease_left: float
    """Seconds."""


class Settled(NamedTuple):
    """The outcome is recorded."""

    failed: bool
    token: int
    age: float
    """Seconds since it was recorded."""
    codec: str
    body: bytes


class Expired(NamedTuple):
    """It was done; its result was kept for its ttl, and only the key is remembered."""

    token: int
    age: float
    """Seconds since the result expired."""


class Unknown(NamedTuple):
    """A runner died, and the policy is not to guess."""

    token: int
    age: float
    """Seconds since the record became unknown."""


class Mismatched(NamedTuple):
    """The record, whatever its state, was made for other arguments."""

    age: float
    stored: bytes


Claim = Granted | Busy | Settled | Expired | Unknown | Mismatched


class Answer(Enum):
    """What renew, complete, fail and release answer."""

    DONE = "done"
    """Applied, now or by an earlier send of the same command."""
    STALE = "stale"
    """The record belongs to another attempt by now."""
    GONE = "gone"
    """There is no record: forgotten, expired, released, or lost by the backend."""


class Record(NamedTuple):
    """A record as operators and `peek` see it; durations in seconds, never a payload."""

    state: StateName
    namespace: str
    key: str
    token: int
    attempt: str
    """Hex id of the attempt that runs it or settled it."""
    fingerprint: str
    """Hex digest of the arguments; empty: not kept."""
    age: float
    """Seconds since it reached this state."""
    lease_left: float | None
    """Running only; 0.0 or less: the lease ran out."""
    expires_in: float | None
    """Seconds until the record is dropped, or a completed one expires; None: it stays until it is settled."""
    codec: str
    size: int
    """Bytes of the stored outcome."""
    owner: str = ""
    """What the claim said of who runs it; "": nothing, or it runs no more."""


RETENTION_ENDS: dict[State, State | None] = {
    State.RUNNING: None,
    State.COMPLETED: State.EXPIRED,
    State.FAILED: None,
    State.UNKNOWN: None,
    State.EXPIRED: None,
    State.WITHDRAWN: None,
}
"""What a record is past its `expires`, if its key is remembered then, which the row's `lease` says; None: absent."""


def standing(row: Row | None, now: int) -> Row | None:
    """`row` as it counts at instant `now`, whatever its backend has done about it so far; None: as absent."""
    if row is None or row.expires is None or row.expires > now:
        return row
    then = RETENTION_ENDS[row.state] if row.lease else None
    if then is None or row.expires + row.lease <= now:
        return None
    return Row(then, row.token, row.attempt, row.fingerprint, row.expires, expires=row.expires + row.lease)


def describe(rid: RecordId, row: Row, now: int) -> Record | None:
    """`row` as a Record at instant `now`; None for a tombstone or a row past its retention."""
    stands = standing(row, now)
    if stands is None or stands.state is State.WITHDRAWN:
        return None
    row = stands
    settled = row.state in SETTLED
    return Record(
        state=_NAMES[row.state],
        namespace=rid.namespace,
        key=rid.key,
        token=row.token,
        attempt=row.attempt.hex(),
        fingerprint=row.fingerprint.hex(),
        age=max(0, now - row.since) / 1e6,
        lease_left=min(row.lease_until - now, row.lease) / 1e6 if row.state is State.RUNNING else None,
        expires_in=None if row.expires is None else (row.expires - now) / 1e6,
        codec=row.codec,
        size=len(row.body) if settled else 0,
        owner="" if settled else row.body.decode(errors="replace"),
    )


_NAMES: dict[State, StateName] = {
    State.RUNNING: "running",
    State.COMPLETED: "completed",
    State.FAILED: "failed",
    State.UNKNOWN: "unknown",
    State.EXPIRED: "expired",
}


# The envelope, version 1, for backends that keep a row as one string. Big-endian.
#
#   offset 0  1  0xD1: magic and version        offset 10  8  since
#          1  1  state letter                          18  8  attempt
#          2  8  token                                 26  1  length of the fingerprint (0 or 16), then it
#
#   running, unknown, withdrawn: then  8 lease, 8 lease_until, 8 expires (0: None),
#                                      1 length of the owner, then it.
#   completed, failed:           then  1 length of the codec, the codec, the body to the end.
#                                The backend's own expiry is their `expires`.
#   completed, remembered:       magic 0xD2; 8 expires before the length of the codec. The backend's own expiry is
#                                the end of the time that the key is remembered.
#   expired:                     then nothing. The backend's own expiry is its `expires`.
# A completed record costs 44 bytes and the codec's name over its body, 52 if its key is remembered, and 43 expired.

MAGIC = 0xD1
REMEMBERED = 0xD2
_HEAD = struct.Struct(">BcQQ8sB")
_TAIL = struct.Struct(">QQQB")
_UNTIL = struct.Struct(">Q")


# The class itself takes ten times as long to find one, and what it has as attributes are lookups of its own.
_STATES = {state.value.encode(): state for state in State}
_COMPLETED, _EXPIRED = State.COMPLETED, State.EXPIRED


def pack(row: Row) -> bytes:
    """`row` as bytes. `expires` of a settled row, or the end of its key's remembrance, is left to the backend's own expiry."""
    remembered = row.state is State.COMPLETED and row.lease
    head = (
        _HEAD.pack(
            REMEMBERED if remembered else MAGIC,
            row.state.value.encode(),
            row.token,
            row.since,
            row.attempt,
            len(row.fingerprint),
        )
        + row.fingerprint
    )
    if row.state is State.EXPIRED:
        return head
    if row.state in SETTLED:
        codec = row.codec.encode()
        if remembered:
            head += _UNTIL.pack(row.expires or 0)
        return b"%b%c%b%b" % (head, len(codec), codec, row.body)
    return head + _TAIL.pack(row.lease, row.lease_until, row.expires or 0, len(row.body)) + row.body


def settled_in(data: bytes, now: int) -> Settled:
    """The outcome in the envelope of a settled row, at an instant of the backend's clock. Raises as `unpack`."""
    try:
        magic, letter, token, since, _, size = _HEAD.unpack_from(data)
        at = _HEAD.size + size
        body = at + 1 + data[at]
        if magic == MAGIC and letter in (b"C", b"F") and body <= len(data):  # and not remembered, as most are
            age = max(0, now - since) / 1e6
            return Settled(letter == b"F", token, age, data[at + 1 : body].decode(), data[body:])
    except (struct.error, ValueError, LookupError):
        pass
    row = unpack(data)
    return Settled(row.state is State.FAILED, row.token, max(0, now - row.since) / 1e6, row.codec, row.body)


def unpack(data: bytes) -> Row:
    """The row that `data` is the envelope of. Raises BackendError for bytes that are none of ours.

    A remembered row's `lease` is 1: how long it is remembered, only the backend's own expiry says.
    """
    try:
        magic, letter, token, since, attempt, size = _HEAD.unpack_from(data)
        state = _STATES[letter]
        remembered = magic == REMEMBERED and state is _COMPLETED
        if (magic != MAGIC and not remembered) or size not in (0, FINGERPRINT_BYTES):
            raise ValueError
        at = _HEAD.size + size
        fingerprint = data[_HEAD.size : at]
        if state is _EXPIRED:
            if at != len(data):
                raise ValueError
            return Row(state, token, attempt, fingerprint, since)
        if state in SETTLED:
            expires = None
            if remembered:
                (expires,) = _UNTIL.unpack_from(data, at)
                at += _UNTIL.size
            body = at + 1 + data[at]
            if body > len(data):
                raise ValueError
            lease, codec = int(remembered), data[at + 1 : body].decode()
            return Row(state, token, attempt, fingerprint, since, lease, 0, expires, codec, data[body:])
        lease, lease_until, expires, size = _TAIL.unpack_from(data, at)
        owner = data[at + _TAIL.size :]
        if len(owner) != size:
            raise ValueError
    except (struct.error, ValueError, LookupError):
        raise BackendError(
            "the bytes under this key are no record of ours; nothing ran and nothing was overwritten."
            " Give the backend a prefix of its own"
        ) from None
    return Row(state, token, attempt, fingerprint, since, lease, lease_until, expires or None, body=owner)
