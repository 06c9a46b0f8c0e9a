"""`remember=`: past its ttl a result is gone, and its key is not: who comes late is told, and nothing runs again."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from bank import BANKS, Bank, Entry, bank_of, url_of
from colours import COLOURS, Colour
from differential import Commands
from probes import Counter, eventually

from idempotent import (
    Applied,
    FingerprintMismatch,
    Lock,
    ResultUnavailable,
    configure,
    idempotent,
    open_backend,
)
from idempotent._options import split_url
from idempotent.backends._engines import twins

SHORT = 0.05
LONG = 600.0
RESULT = "the-receipt-of-a-payment"


def state(colour: Colour, function: Any, *args: Any) -> str | None:
    record = colour.call(function.peek, *args)
    return None if record is None else record.state


def charging(colour: Colour, effects: Counter, url: str, **options: Any) -> Any:
    def charge(order: str, amount: int) -> str:
        effects.hit()
        return RESULT

    given = {"key": "{order}", "namespace": "remember", "backend": url, "ttl": SHORT, "remember": LONG}
    return colour.define(charge, **given | options)


def test_a_late_retry_is_told_and_does_not_run(backend_url: str, colour: Colour, effects: Counter) -> None:
    charge = charging(colour, effects, backend_url)
    assert colour.call(charge, "o-1", 5) == RESULT
    eventually(lambda: state(colour, charge, "o-1", 5) == "expired")
    for _ in range(2):  # the first of them drops the payload
        with pytest.raises(ResultUnavailable, match=r"expired \d+\.\d s ago") as late:
            colour.call(charge, "o-1", 5)
        assert late.value.result is None
    assert effects.count == 1
    with pytest.raises(FingerprintMismatch):
        colour.call(charge, "o-1", 6)
    record = colour.call(charge.peek, "o-1", 5)
    assert (record.state, record.size, record.codec, record.owner, record.lease_left) == ("expired", 0, "", "", None)
    assert 0 < record.expires_in <= LONG
    explained = colour.call(charge.explain, "o-1", 5)
    assert explained.decision == "would_refuse"
    assert "expired" in str(explained)
    assert colour.call(charge.explain, "o-1", 6).decision == "would_refuse"
    assert dict(charge.stats()) == {"claimed": 1, "completed": 1, "replayed": 2, "mismatched": 1}
    assert colour.call(charge.with_key("o-1").forget)
    assert state(colour, charge, "o-1", 5) is None
    assert colour.call(charge, "o-1", 6) == RESULT
    assert effects.count == 2


def test_within_its_ttl_a_result_is_replayed(backend_url: str, colour: Colour, effects: Counter) -> None:
    charge = charging(colour, effects, backend_url, ttl=LONG)
    assert colour.call(charge, "o-1", 5) == colour.call(charge, "o-1", 5) == RESULT
    assert effects.count == 1
    assert state(colour, charge, "o-1", 5) == "completed"


def test_when_the_key_is_not_remembered_any_more_the_call_runs(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    charge = charging(colour, effects, backend_url, remember=timedelta(seconds=SHORT))
    colour.call(charge, "o-1", 5)
    eventually(lambda: state(colour, charge, "o-1", 5) is None)
    assert colour.call(charge, "o-1", 5) == RESULT
    assert effects.count == 2


def test_without_remember_the_call_runs_past_the_ttl(backend_url: str, colour: Colour, effects: Counter) -> None:
    configure(remember=LONG)
    charge = charging(colour, effects, backend_url, remember=None)
    colour.call(charge, "o-1", 5)
    eventually(lambda: state(colour, charge, "o-1", 5) is None)
    assert colour.call(charge, "o-1", 5) == RESULT
    assert effects.count == 2


def test_recorded_errors_are_not_remembered(backend_url: str, colour: Colour, effects: Counter) -> None:
    def charge(order: str) -> str:
        if effects.hit() == 1:
            raise KeyError(order)
        return RESULT

    charge = colour.define(charge, backend=backend_url, error_ttl={KeyError: SHORT}, ttl=LONG, remember=LONG)
    with pytest.raises(KeyError):
        colour.call(charge, "o-1")
    eventually(lambda: state(colour, charge, "o-1") is None)
    assert colour.call(charge, "o-1") == RESULT


def test_the_payload_is_gone_after_a_late_claim_and_after_a_purge(
    backend_url: str, colour: Colour, effects: Counter
) -> None:
    charge = charging(colour, effects, backend_url)
    for order in ("o-1", "o-2"):
        colour.call(charge, order, 5)
    eventually(lambda: state(colour, charge, "o-2", 5) == "expired")
    assert stored(backend_url).count(RESULT) == 2
    with pytest.raises(ResultUnavailable):
        colour.call(charge, "o-1", 5)
    assert stored(backend_url).count(RESULT) == 1
    with Commands(open_backend(backend_url), colour) as commands:
        purged = commands.purge()
        assert purged == (0 if backend_url.startswith("redis") else 1)
        assert commands.purge() == 0
        assert [record.state for record in commands.scanned(state="expired")] == ["expired"] * 2
        assert commands.scanned(state="completed") == []
    assert stored(backend_url).count(RESULT) == (1 if purged == 0 else 0)
    for order in ("o-1", "o-2"):
        with pytest.raises(ResultUnavailable, match="expired"):
            colour.call(charge, order, 5)
    assert stored(backend_url).count(RESULT) == 0
    assert effects.count == 2


def stored(url: str) -> str:
    """All that the store holds, as text."""
    if url == "local://":
        store: Any = open_backend(url)
        return repr([*store._store.settled.values(), *store._store.open.values()])
    if url.startswith("redis"):
        import redis

        bare, options = split_url(url, ("prefix",))
        with redis.Redis.from_url(bare) as client:
            return repr([client.get(name) for name in client.scan_iter(f"{options['prefix']}:*")])
    bare, options = split_url(url, ("table",))
    engine = sa.create_engine(twins(bare)[0])
    with engine.connect() as connection:
        columns = sa.text(f"SELECT body FROM {options.get('table', 'idempotent_records')}")  # noqa: S608  the test's own
        found = repr([bytes(body) for body in connection.execute(columns).scalars()])
    engine.dispose()
    return found


def test_what_only_says_that_it_was_done_is_remembered_too(colour: Colour, effects: Counter) -> None:
    charge = charging(colour, effects, "local://", keep_result=False)
    assert colour.call(charge, "o-1", 5) == RESULT
    eventually(lambda: state(colour, charge, "o-1", 5) == "expired")
    with pytest.raises(ResultUnavailable):
        colour.call(charge, "o-1", 5)


@pytest.mark.parametrize("by", ["a probe", "an operator"])
def test_what_is_settled_in_a_dead_runs_stead_is_remembered(
    backend_url: str, colour: Colour, effects: Counter, by: str
) -> None:
    probe: Any = (lambda call: Applied(RESULT)) if by == "a probe" else "raise"
    charge = charging(colour, effects, backend_url, on_crash=probe, fingerprint=False)
    with Commands(open_backend(backend_url), colour) as commands:
        from idempotent._record import RecordId

        rid = RecordId("remember", "o-1")
        ask: dict[str, Any] = {"attempt": b"attemptA", "fingerprint": b"", "lease": 60.0, "keep": None}
        token = commands.claim(rid, takeover=False, **ask).token
        commands.release(rid, attempt=b"attemptA", token=token, unknown=True)
        if by == "a probe":
            assert colour.call(charge, "o-1", 5) == RESULT
        else:
            assert colour.call(charge.resolve, "o-1", result=RESULT)
        eventually(lambda: commands.read(rid).state == "expired")
    with pytest.raises(ResultUnavailable, match="expired"):
        colour.call(charge, "o-1", 5)
    assert effects.count == 0


def test_a_storm_of_late_retries_runs_nothing(backend_url: str, colour: Colour, effects: Counter) -> None:
    charge = charging(colour, effects, backend_url)
    colour.call(charge, "o-1", 5)
    eventually(lambda: state(colour, charge, "o-1", 5) == "expired")
    answers = colour.storm(charge, 12, "o-1", 5)
    assert {type(answer) for answer in answers} == {ResultUnavailable}
    assert effects.count == 1


def test_locks_know_nothing_of_it(effects: Counter) -> None:
    configure(remember=LONG, backend="local://")
    for _ in range(2):
        with Lock("remembered"):
            effects.hit()
    assert effects.count == 2


@pytest.mark.parametrize("given", [0, -1, float("nan"), float("inf"), "1 day", True])
def test_what_is_no_duration_is_refused_at_decoration(given: Any) -> None:
    for refused in (lambda: idempotent(remember=given), lambda: configure(remember=given)):
        with pytest.raises((TypeError, ValueError), match="remember must be"):
            refused()


# --------------------------------------------------------------------------------------------- within a transaction


@pytest.fixture(params=BANKS, ids="-".join)
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bank]:
    kind, name = request.param
    (chosen,) = [each for each in COLOURS if each.name == name]
    with bank_of(kind, chosen, url_of(kind, request, tmp_path)) as made:
        yield made


def test_within_a_transaction_a_late_retry_is_told_and_leaves_it_usable(bank: Bank) -> None:
    def deposit(session: Any, account: str) -> str:
        session.execute(sa.insert(Entry).values(account=account, amount=5))
        return RESULT

    pay = bank.define(deposit, key="{account}", ttl=SHORT, remember=LONG)
    assert bank.commit(pay, "a") == RESULT

    def expired() -> bool:
        record = bank.commit(pay.peek, "a")
        return record is not None and record.state == "expired"

    eventually(expired)
    for _ in range(2):
        with bank.transaction() as transaction:
            with pytest.raises(ResultUnavailable, match="expired"):
                transaction.call(pay, "a")
            transaction.do(lambda session: session.execute(sa.insert(Entry).values(account="after", amount=1)))
            transaction.commit()
    assert (bank.entries("a"), bank.entries("after")) == (1, 2)
    assert bank.records() == ["E"]
