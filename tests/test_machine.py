"""The table in `_machine`, line by line: the reply and the row afterwards, and after a refusal the row as it was."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from idempotent import _machine as machine
from idempotent._machine import TOMBSTONE, Ask, on_claim, on_forget, on_release, on_renew, on_settle
from idempotent._record import Answer, Busy, Expired, Granted, Mismatched, Row, Settled, State, Unknown, standing

A, B, C = b"attemptA", b"attemptB", b"attemptC"
ARGS, OTHER_ARGS = b"f" * 16, b"g" * 16
SINCE = 1_700_000_000_000_000
LEASE = 30_000_000
KEEP = 60_000_000
TTL = 86_400_000_000
TOKEN = SINCE
SOON = SINCE + 5_000_000
LATE = SINCE + LEASE + 5_000_000

RUNNING = Row(State.RUNNING, TOKEN, A, ARGS, SINCE, LEASE, SINCE + LEASE)
KEPT = RUNNING._replace(expires=SINCE + LEASE + KEEP)
COMPLETED = Row(State.COMPLETED, TOKEN, A, ARGS, SINCE, expires=SINCE + TTL, codec="json", body=b"42")
FAILED = Row(State.FAILED, TOKEN, A, ARGS, SINCE, expires=SINCE + TTL, codec="error", body=b"[]")
UNKNOWN = Row(State.UNKNOWN, TOKEN, A, ARGS, SINCE)
WITHDRAWN = Row(State.WITHDRAWN, TOKEN, A, b"", SINCE, expires=SINCE + TOMBSTONE)
REMEMBERED = COMPLETED._replace(lease=TTL)
EXPIRED = Row(State.EXPIRED, TOKEN, A, ARGS, SINCE, expires=SINCE + TTL)

RECORDS = [RUNNING, KEPT, COMPLETED, FAILED, UNKNOWN, REMEMBERED, EXPIRED]


def by_state(row: Row | None) -> str:
    special = {id(KEPT): "-kept", id(REMEMBERED): "-remembered"}
    return "absent" if row is None else row.state.name.lower() + special.get(id(row), "")


def ask(
    attempt: bytes = B,
    *,
    fingerprint: bytes = ARGS,
    lease: int = LEASE,
    keep: int | None = None,
    takeover: bool = True,
    over: int | None = None,
) -> Ask:
    return Ask(attempt, fingerprint, lease, keep, takeover, over)


def runs(attempt: bytes, token: int, now: int, *, fingerprint: bytes = ARGS) -> Row:
    return Row(State.RUNNING, token, attempt, fingerprint, now, LEASE, now + LEASE)


# ------------------------------------------------------------------------------------------------ the claim, by row


def test_a_claim_on_nothing_is_granted_with_the_time_as_its_token() -> None:
    reply, row = on_claim(None, ask(A), SINCE)
    assert reply == Granted(SINCE, took_over=False)
    assert row == RUNNING


def test_a_granted_row_is_kept_past_its_lease_for_as_long_as_asked() -> None:
    _, row = on_claim(None, ask(A, keep=KEEP), SINCE)
    assert row == KEPT


@pytest.mark.parametrize("row", [KEPT, COMPLETED, FAILED, WITHDRAWN], ids=by_state)
@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("fingerprint", [ARGS, OTHER_ARGS, b""])
def test_a_claim_on_a_record_past_its_retention_is_granted_as_if_there_were_none(
    row: Row, attempt: bytes, fingerprint: bytes
) -> None:
    assert row.expires is not None
    reply, after = on_claim(row, ask(attempt, fingerprint=fingerprint, takeover=False), row.expires)
    assert reply == Granted(row.expires, took_over=False)
    assert after == runs(attempt, row.expires, row.expires, fingerprint=fingerprint)


@pytest.mark.parametrize("row", [KEPT, COMPLETED, FAILED, WITHDRAWN], ids=by_state)
def test_a_record_stands_until_the_last_microsecond_of_its_retention(row: Row) -> None:
    assert row.expires is not None
    reply, after = on_claim(row, ask(A, over=TOKEN), row.expires - 1)
    assert not isinstance(reply, Granted) or reply.token == row.token
    assert after is None


def test_a_withdrawn_claim_that_arrives_late_is_not_applied() -> None:
    reply, row = on_claim(WITHDRAWN, ask(A), SOON)
    assert reply == Busy(TOKEN, 0.0)
    assert row is None


def test_the_tombstone_of_another_attempt_stops_nobody() -> None:
    reply, row = on_claim(WITHDRAWN, ask(B), SOON)
    assert reply == Granted(SOON, took_over=False)
    assert row == runs(B, SOON, SOON)


@pytest.mark.parametrize("row", RECORDS, ids=by_state)
@pytest.mark.parametrize("now", [SOON, LATE])
@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("over", [None, TOKEN])
def test_other_arguments_are_a_mismatch_in_any_state_and_change_nothing(
    row: Row, now: int, attempt: bytes, over: int | None
) -> None:
    reply, after = on_claim(row, ask(attempt, fingerprint=OTHER_ARGS, over=over), now)
    assert reply == Mismatched((now - SINCE) / 1e6, ARGS)
    assert after is None


@pytest.mark.parametrize("row", RECORDS, ids=by_state)
@pytest.mark.parametrize("asked, stored", [(b"", ARGS), (ARGS, b""), (b"", b"")])
def test_where_one_side_has_no_fingerprint_nothing_is_compared(row: Row, asked: bytes, stored: bytes) -> None:
    row = row._replace(fingerprint=stored)
    reply, _ = on_claim(row, ask(B, fingerprint=asked), SOON)
    assert not isinstance(reply, Mismatched)


@pytest.mark.parametrize("now", [SINCE, SOON, LATE])
@pytest.mark.parametrize("takeover", [True, False])
def test_a_claim_sent_twice_is_granted_again_with_the_same_token(now: int, takeover: bool) -> None:
    reply, row = on_claim(RUNNING, ask(A, takeover=takeover, over=TOKEN), now)
    assert reply == Granted(TOKEN)
    assert row is None


def test_a_claim_on_a_live_lease_is_busy_for_what_is_left_of_it() -> None:
    reply, row = on_claim(RUNNING, ask(B), SOON)
    assert reply == Busy(TOKEN, 25.0)
    assert row is None


@pytest.mark.parametrize("takeover", [True, False])
def test_a_live_lease_is_not_taken_even_by_who_names_its_token(takeover: bool) -> None:
    reply, row = on_claim(RUNNING, ask(B, takeover=takeover, over=TOKEN), SOON)
    assert reply == Busy(TOKEN, 25.0)
    assert row is None


def test_a_lease_holds_to_its_last_microsecond_and_not_one_longer() -> None:
    end = SINCE + LEASE
    assert on_claim(RUNNING, ask(B), end - 1) == (Busy(TOKEN, 1e-6), None)
    assert on_claim(RUNNING, ask(B), end) == (Granted(end, took_over=True), runs(B, end, end))


def test_a_lapsed_lease_is_taken_over_under_a_higher_token() -> None:
    reply, row = on_claim(RUNNING, ask(B), LATE)
    assert reply == Granted(LATE, took_over=True)
    assert row == runs(B, LATE, LATE)


def test_without_takeover_a_lapsed_lease_makes_the_record_unknown() -> None:
    reply, row = on_claim(RUNNING, ask(B, takeover=False), LATE)
    assert reply == Unknown(TOKEN, 0.0)
    assert row == Row(State.UNKNOWN, TOKEN, A, ARGS, LATE)


def test_a_record_that_became_unknown_is_no_longer_dropped_by_time() -> None:
    _, row = on_claim(KEPT, ask(B, takeover=False), LATE)
    assert row is not None
    assert row.expires is None


def test_without_takeover_a_lapsed_lease_is_taken_by_who_names_its_token() -> None:
    reply, row = on_claim(RUNNING, ask(B, takeover=False, over=TOKEN), LATE)
    assert reply == Granted(LATE, took_over=True)
    assert row == runs(B, LATE, LATE)


def test_without_takeover_the_token_of_an_earlier_run_takes_nothing() -> None:
    reply, row = on_claim(RUNNING, ask(B, takeover=False, over=TOKEN - 1), LATE)
    assert reply == Unknown(TOKEN, 0.0)
    assert row == Row(State.UNKNOWN, TOKEN, A, ARGS, LATE)


@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("takeover", [True, False])
def test_an_unknown_record_is_taken_by_who_names_its_token(attempt: bytes, takeover: bool) -> None:
    reply, row = on_claim(UNKNOWN, ask(attempt, takeover=takeover, over=TOKEN), SOON)
    assert reply == Granted(SOON, took_over=True)
    assert row == runs(attempt, SOON, SOON)


@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("takeover", [True, False])
@pytest.mark.parametrize("over", [None, TOKEN - 1, TOKEN + 1])
def test_an_unknown_record_stays_unknown_for_everyone_else(attempt: bytes, takeover: bool, over: int | None) -> None:
    reply, row = on_claim(UNKNOWN, ask(attempt, takeover=takeover, over=over), SOON)
    assert reply == Unknown(TOKEN, 5.0)
    assert row is None


@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("over", [None, TOKEN])
def test_a_completed_record_answers_every_claim_with_its_outcome(attempt: bytes, over: int | None) -> None:
    assert on_claim(COMPLETED, ask(attempt, over=over), SOON) == (Settled(False, TOKEN, 5.0, "json", b"42"), None)


@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("over", [None, TOKEN])
def test_a_failed_record_answers_every_claim_with_its_error(attempt: bytes, over: int | None) -> None:
    assert on_claim(FAILED, ask(attempt, over=over), SOON) == (Settled(True, TOKEN, 5.0, "error", b"[]"), None)


def test_a_record_is_never_of_negative_age() -> None:
    before = SINCE - 1_000_000
    assert on_claim(COMPLETED, ask(), before)[0] == Settled(False, TOKEN, 0.0, "json", b"42")
    assert on_claim(UNKNOWN, ask(), before)[0] == Unknown(TOKEN, 0.0)
    assert on_claim(COMPLETED, ask(fingerprint=OTHER_ARGS), before)[0] == Mismatched(0.0, ARGS)


# ------------------------------------------------------------------------------------------- the owner's commands

Stored = Row | None
Command = Callable[[Row | None, bytes, int, int], tuple[Answer, Stored]]

RENEWED_BY = 40_000_000


def renew(row: Row | None, attempt: bytes, token: int, now: int) -> tuple[Answer, Stored]:
    return on_renew(row, attempt, token, RENEWED_BY, now)


def outcome(state: State, attempt: bytes, token: int, now: int) -> Row:
    return Row(state, token, attempt, b"", now, expires=now + TTL, codec="new", body=b"new")


def complete(row: Row | None, attempt: bytes, token: int, now: int) -> tuple[Answer, Stored]:
    return on_settle(row, attempt, token, outcome(State.COMPLETED, attempt, token, now), now)


def fail(row: Row | None, attempt: bytes, token: int, now: int) -> tuple[Answer, Stored]:
    return on_settle(row, attempt, token, outcome(State.FAILED, attempt, token, now), now)


def release(row: Row | None, attempt: bytes, token: int, now: int) -> tuple[Answer, Stored]:
    return on_release(row, attempt, token, now)


def release_unknown(row: Row | None, attempt: bytes, token: int, now: int) -> tuple[Answer, Stored]:
    return on_release(row, attempt, token, now, unknown=True)


def tombstone(attempt: bytes, now: int) -> Row:
    return Row(State.WITHDRAWN, TOKEN, attempt, ARGS, now, expires=now + TOMBSTONE)


COMMANDS: list[Command] = [renew, complete, fail, release, release_unknown]


def name_of(command: Command) -> str:
    return command.__name__


@pytest.mark.parametrize("now", [SOON, LATE])
def test_the_owner_renews_a_running_record_also_when_the_lease_is_over(now: int) -> None:
    answer, row = renew(RUNNING, A, TOKEN, now)
    assert answer is Answer.DONE
    assert row == RUNNING._replace(lease=RENEWED_BY, lease_until=now + RENEWED_BY)


def test_a_renewal_moves_the_retention_along_with_the_lease() -> None:
    _, row = renew(KEPT, A, TOKEN, SOON)
    assert isinstance(row, Row)
    assert row.expires == SOON + RENEWED_BY + KEEP


def test_the_owner_renews_an_unknown_record_and_it_runs_again() -> None:
    answer, row = renew(UNKNOWN, A, TOKEN, SOON)
    assert answer is Answer.DONE
    assert row == Row(State.RUNNING, TOKEN, A, ARGS, SOON, RENEWED_BY, SOON + RENEWED_BY)


@pytest.mark.parametrize("found", [RUNNING, KEPT, UNKNOWN], ids=by_state)
@pytest.mark.parametrize("now", [SOON, LATE])
@pytest.mark.parametrize("command, state", [(complete, State.COMPLETED), (fail, State.FAILED)])
def test_the_owner_settles_a_running_or_unknown_record_and_its_fingerprint_stays(
    found: Row, now: int, command: Command, state: State
) -> None:
    answer, row = command(found, A, TOKEN, now)
    assert answer is Answer.DONE
    assert row == outcome(state, A, TOKEN, now)._replace(fingerprint=ARGS)


@pytest.mark.parametrize("found", [RUNNING, KEPT, UNKNOWN], ids=by_state)
@pytest.mark.parametrize("now", [SOON, LATE])
def test_the_owner_releases_a_running_or_unknown_record_and_a_tombstone_stays(found: Row, now: int) -> None:
    assert release(found, A, TOKEN, now) == (Answer.DONE, tombstone(A, now))


@pytest.mark.parametrize("found", [RUNNING, KEPT], ids=by_state)
@pytest.mark.parametrize("now", [SOON, LATE])
def test_the_owner_makes_its_running_record_unknown(found: Row, now: int) -> None:
    assert release_unknown(found, A, TOKEN, now) == (Answer.DONE, Row(State.UNKNOWN, TOKEN, A, ARGS, now))


def test_an_unknown_record_made_unknown_again_is_as_it_was() -> None:
    assert release_unknown(UNKNOWN, A, TOKEN, SOON) == (Answer.DONE, None)


@pytest.mark.parametrize("found", [COMPLETED, FAILED], ids=by_state)
@pytest.mark.parametrize("command", [complete, fail], ids=name_of)
def test_the_owner_who_settles_again_is_told_done_and_the_first_outcome_stays(found: Row, command: Command) -> None:
    assert command(found, A, TOKEN, SOON) == (Answer.DONE, None)


@pytest.mark.parametrize("found", [COMPLETED, FAILED], ids=by_state)
@pytest.mark.parametrize("command", [renew, release, release_unknown], ids=name_of)
def test_a_settled_record_is_neither_renewed_nor_released_by_its_own_attempt(found: Row, command: Command) -> None:
    assert command(found, A, TOKEN, SOON) == (Answer.STALE, None)


@pytest.mark.parametrize("found", RECORDS, ids=by_state)
@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
@pytest.mark.parametrize("now", [SOON, LATE])
@pytest.mark.parametrize("attempt, token", [(B, TOKEN), (A, TOKEN - 1), (A, TOKEN + 1), (B, TOKEN + 1)])
def test_the_record_of_another_attempt_or_token_is_left_as_it_was(
    found: Row, command: Command, now: int, attempt: bytes, token: int
) -> None:
    assert command(found, attempt, token, now) == (Answer.STALE, None)


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_no_owners_command_makes_a_record_where_there_is_none(command: Command) -> None:
    assert command(None, A, TOKEN, SOON) == (Answer.GONE, None)


@pytest.mark.parametrize("found", [KEPT, COMPLETED, FAILED, WITHDRAWN], ids=by_state)
@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
@pytest.mark.parametrize("attempt", [A, B])
def test_a_record_past_its_retention_is_gone_for_its_owner_too(found: Row, command: Command, attempt: bytes) -> None:
    assert found.expires is not None
    assert command(found, attempt, TOKEN, found.expires) == (Answer.GONE, None)


@pytest.mark.parametrize("found", [KEPT, COMPLETED, FAILED], ids=by_state)
@pytest.mark.parametrize("command", [complete, fail], ids=name_of)
def test_a_record_is_its_owners_until_the_last_microsecond_of_its_retention(found: Row, command: Command) -> None:
    assert found.expires is not None
    assert command(found, A, TOKEN, found.expires - 1)[0] is Answer.DONE


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
@pytest.mark.parametrize("attempt", [A, B])
def test_a_tombstone_is_no_record_to_an_owner(command: Command, attempt: bytes) -> None:
    if attempt == A and command in (release, release_unknown):
        assert command(WITHDRAWN, attempt, TOKEN, SOON) == (Answer.DONE, None)  # it knows itself
        attempt = B
    assert command(WITHDRAWN, attempt, TOKEN, SOON) == (Answer.GONE, None)
    assert command(WITHDRAWN, attempt, TOKEN + 1, SOON) == (Answer.GONE, None)


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
@pytest.mark.parametrize("attempt", [A, B])
def test_an_owner_learns_from_a_tombstone_that_it_was_overtaken(command: Command, attempt: bytes) -> None:
    assert command(WITHDRAWN, attempt, TOKEN - 1, SOON) == (Answer.STALE, None)
    assert command(WITHDRAWN, attempt, TOKEN - 1, SINCE + TOMBSTONE) == (Answer.GONE, None)


@pytest.mark.parametrize("found", RECORDS, ids=by_state)
def test_a_forgotten_record_leaves_a_tombstone_from_which_its_runner_may_claim_again(found: Row) -> None:
    forgotten, row = on_forget(found, C, SOON, force=True)
    assert forgotten == found
    assert row == tombstone(C, SOON)._replace(lease=ord(found.state.value))
    assert on_claim(row, ask(A), SOON + 1) == (Granted(SOON + 1), runs(A, SOON + 1, SOON + 1))


@pytest.mark.parametrize("found", RECORDS, ids=by_state)
def test_a_forget_sent_twice_says_twice_what_it_found_and_another_finds_nothing(found: Row) -> None:
    _, row = on_forget(found, C, SOON, force=True)
    again, changed = on_forget(row, C, SOON + 1, force=True)
    assert again is not None
    assert (again.state, again.token, changed) == (found.state, found.token, None)
    assert on_forget(row, B, SOON + 1, force=True) == (None, None)
    assert on_forget(row, C, SOON + TOMBSTONE, force=True) == (None, None)


def test_a_running_record_is_forgotten_only_by_force() -> None:
    assert on_forget(RUNNING, C, SOON, force=False) == (RUNNING, None)


@pytest.mark.parametrize("found", [None, WITHDRAWN, COMPLETED._replace(expires=SOON)], ids=by_state)
def test_where_there_is_no_record_there_is_nothing_to_forget(found: Row | None) -> None:
    assert on_forget(found, C, SOON, force=True) == (None, None)


def test_a_record_says_who_runs_it_until_it_is_settled() -> None:
    _, row = on_claim(None, ask(A)._replace(owner=b"me"), SINCE)
    assert row is not None
    for kept in (on_renew(row, A, SINCE, LEASE, SOON)[1], on_release(row, A, SINCE, SOON, unknown=True)[1]):
        assert kept is not None
        assert kept.body == b"me"
    _, released = on_release(row, A, SINCE, SOON)
    assert released is not None
    assert released.body == b""
    _, taken = on_claim(row, ask(B)._replace(owner=b"you"), LATE)
    assert taken is not None
    assert taken.body == b"you"


# ------------------------------------------------------------------------------------------------- withdrawing


@pytest.mark.parametrize("found", [RUNNING, KEPT, UNKNOWN], ids=by_state)
def test_an_unconfirmed_claim_that_was_applied_is_taken_back_by_its_attempt_alone(found: Row) -> None:
    assert on_release(found, A, None, SOON) == (Answer.DONE, tombstone(A, SOON))


def test_an_unconfirmed_claim_that_was_not_applied_leaves_a_tombstone() -> None:
    answer, row = on_release(None, A, None, SOON)
    assert answer is Answer.DONE
    assert row == Row(State.WITHDRAWN, 0, A, b"", SOON, expires=SOON + TOMBSTONE)


@pytest.mark.parametrize("found", [KEPT, COMPLETED, FAILED], ids=by_state)
def test_a_tombstone_in_the_place_of_an_expired_record_remembers_its_token(found: Row) -> None:
    assert found.expires is not None
    now = found.expires
    answer, row = on_release(found, B, None, now)
    assert answer is Answer.DONE
    assert row == tombstone(B, now)


@pytest.mark.parametrize("found", [None, RUNNING, KEPT, UNKNOWN, tombstone(B, SINCE)], ids=str)
def test_a_withdrawal_that_is_sent_twice_answers_the_same_and_changes_nothing(found: Row | None) -> None:
    first, row = on_release(found, A, None, SOON)
    assert on_release(row, A, None, SOON + 1) == (first, None) == (Answer.DONE, None)


@pytest.mark.parametrize("found", [COMPLETED, FAILED], ids=by_state)
def test_a_settled_record_is_not_withdrawn(found: Row) -> None:
    assert on_release(found, A, None, SOON) == (Answer.STALE, None)


@pytest.mark.parametrize("found", RECORDS, ids=by_state)
@pytest.mark.parametrize("unknown", [True, False])
def test_a_withdrawal_leaves_the_record_of_another_as_it_was(found: Row, unknown: bool) -> None:
    assert on_release(found, B, None, SOON, unknown=unknown) == (Answer.STALE, None)


def test_a_withdrawn_claim_is_refused_until_its_tombstone_ends() -> None:
    _, tombstone = on_release(None, A, None, SINCE)
    assert isinstance(tombstone, Row)
    assert on_claim(tombstone, ask(A), SINCE + TOMBSTONE - 1) == (Busy(0, 0.0), None)
    end = SINCE + TOMBSTONE
    assert on_claim(tombstone, ask(A), end) == (Granted(end), runs(A, end, end))


# ------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    "found, now",
    [(RUNNING, LATE), (KEPT, SINCE + LEASE + KEEP), (COMPLETED, SINCE + TTL), (FAILED, SINCE + TTL), (WITHDRAWN, SOON)],
    ids=["takeover", "kept", "completed", "failed", "withdrawn"],
)
@pytest.mark.parametrize("ahead", [0, 1, 10**15])
def test_a_token_grows_also_where_the_last_one_is_ahead_of_the_clock(found: Row, now: int, ahead: int) -> None:
    reply, row = on_claim(found._replace(token=now + ahead), ask(B), now)
    assert isinstance(reply, Granted)
    assert row is not None
    assert reply.token == row.token == now + ahead + 1


def test_a_token_is_the_time_where_the_last_one_is_behind_the_clock() -> None:
    reply, _ = on_claim(RUNNING._replace(token=1), ask(B), LATE)
    assert reply == Granted(LATE, took_over=True)


def test_a_token_taken_over_the_operators_way_grows_as_well() -> None:
    reply, _ = on_claim(UNKNOWN._replace(token=LATE + 7), ask(B, over=LATE + 7), LATE)
    assert reply == Granted(LATE + 8, took_over=True)


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_token_grows_over_release_and_forget_also_for_a_claim_that_read_the_clock_before(forgotten: bool) -> None:
    first, row = on_claim(None, ask(A), SINCE)
    assert isinstance(first, Granted)
    assert row is not None
    forget = on_forget(row, C, SINCE + 1, force=True)
    left = forget[1] if forgotten else on_release(row, A, first.token, SINCE + 1)[1]
    for behind in (0, 5):
        second, _ = on_claim(left, ask(B), SINCE - behind)
        assert second == Granted(first.token + 1)


def test_a_claim_that_was_released_cannot_be_applied_once_more() -> None:
    _, row = on_claim(None, ask(A), SINCE)
    _, row = on_release(row, A, SINCE, SINCE + 1)
    assert on_claim(row, ask(A), SINCE + 2) == (Busy(SINCE, 0.0), None)


def test_a_tombstone_does_not_let_the_token_fall_back() -> None:
    ahead = SINCE + TTL + 10**15
    _, tombstone = on_release(COMPLETED._replace(token=ahead), B, None, SINCE + TTL)
    assert isinstance(tombstone, Row)
    reply, _ = on_claim(tombstone, ask(C), SINCE + TTL + 1)
    assert reply == Granted(ahead + 1)


# ------------------------------------------------------------------------------------------------- fingerprints


@pytest.mark.parametrize("found", [RUNNING, UNKNOWN], ids=by_state)
def test_an_operators_takeover_without_arguments_keeps_the_fingerprint_of_the_dead_run(found: Row) -> None:
    reply, row = on_claim(found, ask(B, fingerprint=b"", takeover=False, over=TOKEN), LATE)
    assert reply == Granted(LATE, took_over=True)
    assert row == runs(B, LATE, LATE, fingerprint=ARGS)


def test_a_takeover_brings_its_fingerprint_where_the_dead_run_had_none() -> None:
    _, row = on_claim(RUNNING._replace(fingerprint=b""), ask(B), LATE)
    assert row == runs(B, LATE, LATE, fingerprint=ARGS)


@pytest.mark.parametrize("found", [COMPLETED, FAILED], ids=by_state)
def test_a_new_run_after_the_retention_does_not_inherit_the_fingerprint(found: Row) -> None:
    _, row = on_claim(found, ask(B, fingerprint=b""), SINCE + TTL)
    assert row == runs(B, SINCE + TTL, SINCE + TTL, fingerprint=b"")


def test_an_outcome_brings_no_fingerprint_of_its_own() -> None:
    brought = outcome(State.COMPLETED, A, TOKEN, SOON)._replace(fingerprint=OTHER_ARGS)
    _, row = on_settle(RUNNING, A, TOKEN, brought, SOON)
    assert row == brought._replace(fingerprint=ARGS)


# --------------------------------------------------------------------------------------------- a clock that steps


@pytest.mark.parametrize("back", [1, 1_000_000, 3_600_000_000])
def test_a_clock_that_steps_back_lengthens_no_lease_and_the_row_is_rewritten_once(back: int) -> None:
    now = SINCE - back
    reply, row = on_claim(KEPT, ask(B), now)
    assert reply == Busy(TOKEN, LEASE / 1e6)
    assert row == KEPT._replace(lease_until=now + LEASE, expires=now + LEASE + KEEP)
    assert on_claim(row, ask(B), now + 1) == (Busy(TOKEN, (LEASE - 1) / 1e6), None)
    assert on_claim(row, ask(B), now + LEASE)[0] == Granted(max(TOKEN + 1, now + LEASE), took_over=True)


def test_a_full_lease_left_is_no_step_back() -> None:
    assert on_claim(RUNNING, ask(B), SINCE) == (Busy(TOKEN, LEASE / 1e6), None)


def test_the_owner_of_a_lease_may_renew_it_after_the_clock_stepped_back() -> None:
    now = SINCE - 3_600_000_000
    answer, row = renew(RUNNING, A, TOKEN, now)
    assert answer is Answer.DONE
    assert row == RUNNING._replace(lease=RENEWED_BY, lease_until=now + RENEWED_BY)


# ---------------------------------------------------------------------------------------------- whole histories


def apply(row: Row | None, stored: Stored) -> Row | None:
    """The row that a backend holds after it was told to store `stored`."""
    return row if stored is None else stored


def test_an_owner_that_was_overtaken_changes_nothing_however_late_it_comes() -> None:
    _, row = on_claim(RUNNING, ask(B), LATE)
    assert row is not None
    for command in COMMANDS:
        assert command(row, A, TOKEN, LATE + 1) == (Answer.STALE, None)


def test_an_owner_frozen_until_its_record_was_unknown_may_complete_it_unless_somebody_took_over() -> None:
    _, unknown = on_claim(RUNNING, ask(B, takeover=False), LATE)
    answer, row = complete(unknown, A, TOKEN, LATE + 1)
    assert answer is Answer.DONE
    assert isinstance(row, Row)
    assert row.state is State.COMPLETED
    _, resolved = on_claim(unknown, ask(C, fingerprint=b"", takeover=False, over=TOKEN), LATE + 1)
    assert complete(resolved, A, TOKEN, LATE + 2) == (Answer.STALE, None)


@pytest.mark.parametrize("found", [None, *RECORDS, WITHDRAWN], ids=by_state)
@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("takeover", [True, False])
@pytest.mark.parametrize("over", [None, TOKEN])
@pytest.mark.parametrize("now", [SINCE - LEASE, SOON, LATE, SINCE + TTL])
def test_a_claim_applied_twice_changes_nothing_the_second_time_and_answers_the_same(
    found: Row | None, attempt: bytes, takeover: bool, over: int | None, now: int
) -> None:
    asked = ask(attempt, takeover=takeover, over=over)
    first, stored = on_claim(found, asked, now)
    again, stored_again = on_claim(apply(found, stored), asked, now)
    assert stored_again is None
    if isinstance(first, Granted):
        assert isinstance(again, Granted)
        assert again.token == first.token
    else:
        assert again == first


@pytest.mark.parametrize("found", [None, *RECORDS, WITHDRAWN], ids=by_state)
@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
@pytest.mark.parametrize("attempt", [A, B])
@pytest.mark.parametrize("now", [SOON, LATE, SINCE + TTL])
def test_an_owners_command_applied_twice_leaves_what_it_left_the_first_time(
    found: Row | None, command: Command, attempt: bytes, now: int
) -> None:
    first, stored = command(found, attempt, TOKEN, now)
    after = apply(found, stored)
    again, stored_again = command(after, attempt, TOKEN, now)
    assert apply(after, stored_again) == after
    assert again is first


@pytest.mark.parametrize("found", [None, *RECORDS, WITHDRAWN], ids=by_state)
@pytest.mark.parametrize("now", [SOON, LATE, SINCE + TTL])
def test_a_withdrawal_sent_twice_never_lets_the_claim_through(found: Row | None, now: int) -> None:
    after = apply(found, on_release(found, A, None, now)[1])
    after = apply(after, on_release(after, A, None, now + 1)[1])
    reply, stored = on_claim(after, ask(A), now + 2)
    assert not isinstance(reply, Granted)
    assert stored is None or isinstance(reply, Expired)


ATTEMPTS = st.sampled_from([A, B, C])
SMALL = st.integers(1, 50)


class History(RuleBasedStateMachine):
    """One key under any commands in any order; the clock only goes forward, as a backend's reading of it does."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000
        self.row: Row | None = None
        self.highest = 0
        self.tokens: dict[bytes, int] = {}

    def store(self, stored: Stored) -> None:
        before, self.row = self.row, apply(self.row, stored)
        if before is not None and before.state in (State.COMPLETED, State.FAILED):
            assert before.expires is not None
            if self.now < before.expires:
                assert self.row == before

    def token_of(self, attempt: bytes, guess: int | None) -> int:
        return guess if guess is not None else self.tokens.get(attempt, 0)

    def owns(self, attempt: bytes, token: int | None) -> bool:
        row = self.row
        return (
            row is not None
            and row.state is not State.WITHDRAWN
            and (row.expires is None or self.now < row.expires)
            and row.attempt == attempt
            and token in (None, row.token)
        )

    @rule(by=st.one_of(st.just(1), st.integers(1, 200)))
    def pass_time(self, by: int) -> None:
        self.now += by

    @rule(
        attempt=ATTEMPTS,
        fingerprint=st.sampled_from([b"", ARGS, OTHER_ARGS]),
        lease=SMALL,
        keep=st.one_of(st.none(), SMALL),
        takeover=st.booleans(),
        names_token=st.booleans(),
    )
    def claim(
        self, attempt: bytes, fingerprint: bytes, lease: int, keep: int | None, takeover: bool, names_token: bool
    ) -> None:
        self.now += 1
        before = self.row
        over = before.token if names_token and before is not None else None
        asked = Ask(attempt, fingerprint, lease, keep, takeover, over)
        reply, stored = on_claim(before, asked, self.now)
        self.store(stored)
        if isinstance(reply, Granted):
            assert self.row is not None
            assert (self.row.state, self.row.attempt, self.row.token) == (State.RUNNING, attempt, reply.token)
            if stored is None:
                assert reply.token == self.tokens[attempt]
            else:
                assert reply.token > self.highest
                self.highest = reply.token
                if before is not None and before.state is State.RUNNING:
                    assert before.lease_until <= self.now
            self.tokens[attempt] = reply.token
        elif stored is not None:
            assert isinstance(reply, Unknown)
            assert stored.state is State.UNKNOWN
        again, stored_again = on_claim(self.row, asked, self.now)
        assert stored_again is None
        assert type(again) is type(reply)

    @rule(attempt=ATTEMPTS, guess=st.one_of(st.none(), st.integers(999, 1100)), command=st.sampled_from(COMMANDS))
    def command(self, attempt: bytes, guess: int | None, command: Command) -> None:
        token = self.token_of(attempt, guess)
        owns = self.owns(attempt, token)
        answer, stored = command(self.row, attempt, token, self.now)
        if not owns:
            assert stored is None
            row = self.row
            known = row is not None and row.state is State.WITHDRAWN and (row.attempt, row.token) == (attempt, token)
            assert answer in (Answer.STALE, Answer.GONE) or (known and command in (release, release_unknown))
        self.store(stored)
        _, stored_again = command(self.row, attempt, token, self.now)
        assert apply(self.row, stored_again) == self.row

    @rule(attempt=ATTEMPTS, unknown=st.booleans())
    def withdraw(self, attempt: bytes, unknown: bool) -> None:
        owns = self.owns(attempt, None)
        before = self.row
        answer, stored = on_release(before, attempt, None, self.now, unknown=unknown)
        if not owns:
            assert answer in (Answer.STALE, Answer.DONE)
            assert stored is None or (isinstance(stored, Row) and stored.state is State.WITHDRAWN)
            if answer is Answer.STALE:
                assert stored is None
        self.store(stored)
        assert on_release(self.row, attempt, None, self.now, unknown=unknown) == (answer, None)

    @precondition(lambda self: self.row is not None)
    @rule()
    def owner_renews(self) -> None:
        assert self.row is not None
        self.command(self.row.attempt, self.row.token, renew)

    @precondition(lambda self: self.row is not None)
    @rule(command=st.sampled_from([complete, fail]))
    def owner_settles(self, command: Command) -> None:
        assert self.row is not None
        self.command(self.row.attempt, self.row.token, command)


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


@settings(deadline=None)
@given(st.integers(1, 10**9), st.integers(0, 10**10), st.integers(0, 2 * 10**10))
def test_what_is_left_of_a_lease_is_never_more_than_the_lease(lease: int, taken: int, now: int) -> None:
    _, row = on_claim(None, ask(A, lease=lease), taken)
    reply, _ = on_claim(row, ask(B, lease=1), now)
    if now - taken >= lease:
        assert reply == Granted(max(taken + 1, now), took_over=True)
    else:
        assert reply == Busy(taken, min(lease, taken + lease - now) / 1e6)


# -------------------------------------------------------------------------------------------------- what is remembered

PAST = SINCE + TTL


def test_past_its_ttl_a_remembered_record_is_expired_and_its_body_is_dropped() -> None:
    assert on_claim(REMEMBERED, ask(B), PAST - 1)[0] == Settled(False, TOKEN, (TTL - 1) / 1e6, "json", b"42")
    reply, row = on_claim(REMEMBERED, ask(B), PAST + 2_000_000)
    assert reply == Expired(TOKEN, 2.0)
    assert row == Row(State.EXPIRED, TOKEN, A, ARGS, PAST, expires=PAST + TTL)
    assert on_claim(row, ask(C), PAST + 3_000_000) == (Expired(TOKEN, 3.0), None)


@pytest.mark.parametrize("takeover", [True, False])
@pytest.mark.parametrize("attempt", [A, B])
def test_nobody_may_run_what_is_remembered(attempt: bytes, takeover: bool) -> None:
    for row in (REMEMBERED, standing(REMEMBERED, PAST)):
        for now in (PAST, PAST + TTL - 1):
            reply, _ = on_claim(row, ask(attempt, takeover=takeover, over=TOKEN), now)
            assert reply == Expired(TOKEN, (now - PAST) / 1e6)
        reply, after = on_claim(row, ask(attempt, takeover=takeover), PAST + TTL)
        assert reply == Granted(PAST + TTL, took_over=False)
        assert after == runs(attempt, PAST + TTL, PAST + TTL)


def test_other_arguments_are_a_mismatch_on_what_is_remembered() -> None:
    reply, row = on_claim(REMEMBERED, ask(B, fingerprint=OTHER_ARGS), PAST + 1_000_000)
    assert reply == Mismatched(1.0, ARGS)
    assert row is None


def test_who_completed_what_is_remembered_is_told_so_again_and_may_do_nothing_else() -> None:
    for row in (REMEMBERED, standing(REMEMBERED, PAST)):
        assert on_settle(row, A, TOKEN, COMPLETED, PAST) == (Answer.DONE, None)
        assert on_renew(row, A, TOKEN, LEASE, PAST) == (Answer.STALE, None)
        assert on_release(row, A, TOKEN, PAST) == (Answer.STALE, None)
        assert on_settle(row, B, TOKEN, COMPLETED, PAST) == (Answer.STALE, None)


def test_what_is_remembered_is_forgotten_like_any_other_record_and_told_as_expired() -> None:
    found, tombstone = on_forget(REMEMBERED, C, PAST, force=False)
    assert found == standing(REMEMBERED, PAST)
    assert tombstone is not None
    again, nothing = on_forget(tombstone, C, PAST + 1, force=False)
    assert again is not None
    assert (again.state, nothing) == (State.EXPIRED, None)
    assert isinstance(on_claim(tombstone, ask(B), PAST + 1)[0], Granted)


# --------------------------------------------------------------------------------------------------------- the tables


def test_every_line_of_the_claims_applies_and_leaves_what_it_says() -> None:
    seen = set()
    rows = [None, *RECORDS, WITHDRAWN, *(row._replace(lease_until=SINCE + 9 * LEASE) for row in (RUNNING, KEPT))]
    asks = itertools.product((A, B), (ARGS, OTHER_ARGS, b""), (True, False), (None, TOKEN))
    for row, (attempt, fingerprint, takeover, over) in itertools.product(rows, asks):
        for now in (SOON, LATE, PAST, PAST + TTL):
            asked = ask(attempt, fingerprint=fingerprint, takeover=takeover, over=over)
            found = standing(row, now)
            line = machine.CLAIM[name := machine._found(found, asked, now)]
            seen.add(name)
            assert (None if found is None else found.state) in line.found
            _, after = on_claim(row, asked, now)
            left = found if after is None else after
            assert (None if left is None else left.state) == (line.then or (found.state if found else None))
    assert seen == set(machine.CLAIM)


def test_the_tables_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine.CLAIM, "lease alive", machine.CLAIM["lease over, takeover"])
    assert isinstance(on_claim(RUNNING, ask(B), SOON)[0], Granted)
    monkeypatch.setitem(machine.OWNER["complete"], "another's", (Answer.GONE, None))
    assert on_settle(RUNNING, B, TOKEN, COMPLETED, SOON)[0] is Answer.GONE
    monkeypatch.setitem(machine.FORGET, "running", (True, State.WITHDRAWN))
    assert on_forget(RUNNING, C, SOON, force=False)[1] is not None


def test_the_diagram_in_readme_is_drawn_from_the_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
    assert f"```mermaid\n{machine.diagram()}\n```" in readme, (
        f"README's diagram of states is to be\n{machine.diagram()}"
    )
    before = machine.diagram()
    monkeypatch.setitem(machine.OWNER["fail"], "running", (Answer.DONE, State.COMPLETED))
    assert machine.diagram() != before
