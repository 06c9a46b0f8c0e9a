"""The process-local backend: the machine's answers on a clock of its own, what is evicted, and what never is."""

import time
from typing import Any

import pytest
from colours import COLOURS, Colour
from differential import Commands, disagreement
from probes import Counter, Gate

from idempotent import InProgress, LocalBackend, Lock
from idempotent._record import Answer, Busy, Granted, RecordId, Row, Settled, State, Unknown

A, B = b"attemptA", b"attemptB"
SECOND = 1_000_000


class Clock:
    """Microseconds that pass when the test says so, and one at each look."""

    def __init__(self) -> None:
        self.now = 1_000_000 * SECOND

    def __call__(self) -> int:
        self.now += 1
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += round(seconds * SECOND)


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Memory:
    """The rows of a LocalBackend, beside its commands."""

    def __init__(self, backend: LocalBackend, clock: Clock) -> None:
        self.store, self.clock = backend._store, clock

    def row(self, rid: RecordId) -> Row | None:
        return self.store.find(rid.text)

    def age(self, rid: RecordId, by: int) -> None:
        self.clock.now += by


def claim(commands: Commands, rid: RecordId, attempt: bytes = A, **changes: Any) -> Any:
    options = {"fingerprint": b"", "lease": 30.0, "keep": None, "takeover": True}
    return commands.claim(rid, attempt=attempt, **(options | changes))


def complete(commands: Commands, rid: RecordId, token: int, attempt: bytes = A, ttl: float = 60.0) -> Answer:
    answer: Answer = commands.complete(rid, attempt=attempt, token=token, codec="json1", body=b"1", ttl=ttl)
    return answer


def settle(commands: Commands, rid: RecordId, **options: Any) -> int:
    """Claim and complete; the token."""
    token: int = claim(commands, rid).token
    assert complete(commands, rid, token, **options) is Answer.DONE
    return token


# ------------------------------------------------------------------------------------------------ the machine's answers


@pytest.mark.parametrize("seed", range(12))
def test_the_store_answers_and_keeps_what_the_machine_does(colour: Colour, clock: Clock, seed: int) -> None:
    backend = LocalBackend(clock=clock)
    with Commands(backend, colour) as commands:
        wrong = disagreement(commands, Memory(backend, clock), RecordId("n", "k"), seed, steps=1000, clock_moves=True)
    assert wrong == ""


F, G = b"f" * 16, b"g" * 16


@pytest.mark.parametrize("stored", [b"", F, G])
@pytest.mark.parametrize("asked", [b"", F, G])
@pytest.mark.parametrize(
    "state", ["absent", "running", "completed", "failed", "unknown", "released", "forgotten", "expired"]
)
def test_a_look_finds_exactly_what_a_claim_is_answered_from(
    colour: Colour, clock: Clock, state: str, stored: bytes, asked: bytes
) -> None:
    rid, backend = RecordId("n", "k"), LocalBackend(clock=clock)
    find = backend.finder()
    with Commands(backend, colour) as commands:
        if state != "absent":
            token = claim(commands, rid, fingerprint=stored).token
            own: dict[str, Any] = {"attempt": A, "token": token}
            if state in ("released", "unknown"):
                commands.release(rid, **own, unknown=state == "unknown")
            elif state != "running":
                settle = commands.fail if state == "failed" else commands.complete
                settle(rid, **own, codec="json1", body=b"[1]", ttl=60.0)
            if state == "forgotten":
                commands.forget(rid)
            clock.pass_by(60.0 if state == "expired" else 7.0)
        found = find(rid.text, asked)
        reply = claim(commands, rid, B, fingerprint=asked, takeover=False)
    assert (found is not None) == isinstance(reply, Settled)
    if found is not None:
        row, now = found
        assert (row.state is State.FAILED, row.token, row.codec, row.body) == (
            reply.failed,
            reply.token,
            reply.codec,
            reply.body,
        )
        assert (now - row.since) / 1e6 == pytest.approx(reply.age, abs=1e-4)


def test_the_given_clock_alone_ends_a_lease_and_a_retention(colour: Colour, clock: Clock) -> None:
    rid = RecordId("n", "k")
    with Commands(LocalBackend(clock=clock), colour) as commands:
        first = claim(commands, rid)
        clock.pass_by(29.9)
        assert isinstance(claim(commands, rid, B), Busy)
        clock.pass_by(0.1)
        taken = claim(commands, rid, B)
        assert taken == Granted(taken.token, took_over=True)
        assert complete(commands, rid, first.token) is Answer.STALE
        assert complete(commands, rid, taken.token, B) is Answer.DONE
        clock.pass_by(59.9)
        assert isinstance(claim(commands, rid), Settled)
        clock.pass_by(0.1)
        assert commands.read(rid) is None
        assert claim(commands, rid).took_over is False


def test_a_call_runs_again_when_its_ttl_is_over_on_the_given_clock(
    colour: Colour, clock: Clock, effects: Counter
) -> None:
    work = colour.define(effects.hit, backend=LocalBackend(clock=clock), ttl=60)
    assert colour.call(work) == 1
    clock.pass_by(30)
    outcome = colour.call(work.outcome)
    assert outcome.replayed
    assert outcome.age == pytest.approx(30, abs=0.1)
    clock.pass_by(30)
    assert colour.call(work) == 2


# -------------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("gone", ["released", "forgotten", "evicted", "expired"])
def test_tokens_grow_whatever_became_of_the_record_and_also_if_the_clock_steps_back(
    colour: Colour, clock: Clock, gone: str
) -> None:
    rid = RecordId("n", "k")
    with Commands(LocalBackend(1, clock=clock), colour) as commands:
        token = claim(commands, rid).token
        if gone == "released":
            commands.release(rid, attempt=A, token=token)
        elif gone == "forgotten":
            assert commands.forget(rid, force=True).token == token
        else:
            assert complete(commands, rid, token) is Answer.DONE
        if gone == "evicted":
            token = settle(commands, RecordId("n", "other"))
        if gone == "expired":
            clock.pass_by(60)
            commands.purge()
        clock.pass_by(-3600)
        again = claim(commands, rid, B)
        assert isinstance(again, Granted)
        assert again.token > token


def test_no_two_claims_get_one_token_even_if_the_clock_stands_still(colour: Colour, clock: Clock) -> None:
    rids = [RecordId("n", str(number)) for number in range(100)]
    with Commands(LocalBackend(clock=lambda: clock.now), colour) as commands:
        tokens = [claim(commands, rid).token for rid in rids]
        assert sorted(set(tokens)) == tokens
        for rid, token in zip(rids, tokens, strict=True):
            assert complete(commands, rid, token) is Answer.DONE


# --------------------------------------------------------------------------------------------------- what makes room


def test_running_and_unknown_records_are_never_evicted(colour: Colour, clock: Clock) -> None:
    running, unknown = ([RecordId(state, str(n)) for n in range(5)] for state in ("running", "unknown"))
    with Commands(LocalBackend(2, clock=clock), colour) as commands:
        tokens = {rid: claim(commands, rid).token for rid in running + unknown}
        for rid in unknown:
            commands.release(rid, attempt=A, token=tokens[rid], unknown=True)
        for number in range(5000):  # of each kind, so that tombstones are swept, too
            settle(commands, RecordId("settled", str(number)))
            passing = RecordId("released", str(number))
            commands.release(passing, attempt=A, token=claim(commands, passing).token)
            clock.pass_by(0.005)
        assert [commands.read(rid).state for rid in running + unknown] == ["running"] * 5 + ["unknown"] * 5
        for rid in running:
            assert isinstance(claim(commands, rid, B), Busy)
        for rid in unknown:
            assert isinstance(claim(commands, rid, B), Unknown)
        for rid in running + unknown:  # a frozen runner of an unknown record may still complete it
            assert complete(commands, rid, tokens[rid]) is Answer.DONE
            assert isinstance(claim(commands, rid, B), Settled)


def test_what_runs_is_not_run_again_however_many_calls_there_are(colour: Colour, effects: Counter, gate: Gate) -> None:
    def work(order: int) -> int:
        if order < 5:
            gate.pass_through()
            return effects.hit()
        return order

    backend = LocalBackend(2)
    work = colour.define(work, backend=backend, key="{order}", namespace="n")
    held = [colour.start(work, order) for order in range(5)]
    deadline = time.monotonic() + 20
    while len(backend._store.open) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for order in range(5, 50):
        assert colour.call(work, order) == order
    again = colour.define(work.__wrapped__, backend=backend, key="{order}", namespace="n", wait=0)
    for order in range(5):
        with pytest.raises(InProgress):
            colour.call(again, order)
    gate.opened.set()
    assert sorted(call.result(30) for call in held) == [1, 2, 3, 4, 5]


def test_a_held_lock_is_never_evicted() -> None:
    backend = LocalBackend(1)
    holds = [Lock(str(number), backend=backend).acquire(wait=0) for number in range(5)]
    with Commands(backend, COLOURS[0]) as commands:
        for number in range(50):
            settle(commands, RecordId("n", str(number)))
    for number, hold in enumerate(holds):
        assert hold is not None
        assert Lock(str(number), backend=backend).locked()
        hold.check()
        hold.release()


def test_the_least_recently_used_of_the_settled_records_makes_room(colour: Colour, clock: Clock) -> None:
    one, two, three = (RecordId("n", key) for key in ("one", "two", "three"))
    with Commands(LocalBackend(2, clock=clock), colour) as commands:
        settle(commands, one)
        settle(commands, two)
        assert isinstance(claim(commands, one), Settled)
        settle(commands, three)
        assert isinstance(claim(commands, one), Settled)
        assert isinstance(claim(commands, three), Settled)
        assert commands.read(two) is None


@pytest.mark.parametrize("maxsize", [0, -1])
def test_a_store_without_room_is_refused(maxsize: int) -> None:
    with pytest.raises(ValueError, match="maxsize must be at least 1"):
        LocalBackend(maxsize)


def test_tombstones_of_releases_and_abandoned_claims_do_not_pile_up(colour: Colour, clock: Clock) -> None:
    backend = LocalBackend(clock=clock)
    with Commands(backend, colour) as commands:
        for number in range(10_000):
            rid = RecordId("n", str(number))
            token = claim(commands, rid, keep=10.0, lease=1.0).token
            if number % 2:
                commands.release(rid, attempt=A, token=token)
            clock.pass_by(0.01)
        assert len(backend._store.open) < 3000
        clock.pass_by(60)
        assert commands.purge(500) == 500
        while commands.purge(500):
            pass
        assert backend._store.open == {}


def test_a_purge_drops_what_is_past_its_retention_and_nothing_else(colour: Colour, clock: Clock) -> None:
    backend = LocalBackend(clock=clock)
    with Commands(backend, colour) as commands:
        settle(commands, RecordId("n", "short"), ttl=10)
        settle(commands, RecordId("n", "long"), ttl=1000)
        claim(commands, RecordId("n", "running"))
        claim(commands, RecordId("n", "dead"), lease=1.0, keep=9.0)
        clock.pass_by(10)
        assert commands.purge() == 1
        assert len(backend._store.settled) == 1
        assert sorted(record.key for record in commands.scanned()) == ["long", "running"]


def test_a_forgotten_record_does_not_come_back_when_its_tombstone_is_swept(colour: Colour, clock: Clock) -> None:
    rid = RecordId("n", "k")
    with Commands(LocalBackend(clock=clock), colour) as commands:
        settle(commands, rid, ttl=1000)
        assert commands.forget(rid).state == "completed"
        assert commands.scanned() == []
        clock.pass_by(20)
        assert commands.purge() == 1
        assert commands.read(rid) is None
        assert isinstance(claim(commands, rid, B), Granted)
