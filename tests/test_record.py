"""Record ids that cannot be confused, the byte envelope both ways, and what operators are shown."""

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from idempotent._record import CALLS, LOCKS, Record, RecordId, Row, State, describe, pack, standing, unpack
from idempotent.errors import BackendError

NOW = 1_700_000_000_000_000
ATTEMPT = b"\x00\x01attempt"[:8]
ARGS = bytes(range(16))

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
tricky = st.text(st.sampled_from("0123:cl"), max_size=6)
names = st.one_of(texts, tricky)
spaces = st.sampled_from([CALLS, LOCKS])
instants = st.integers(0, 2**64 - 1)
attempts = st.binary(min_size=8, max_size=8)
fingerprints = st.one_of(st.just(b""), st.binary(min_size=16, max_size=16))

settled_rows = st.builds(
    Row,
    state=st.sampled_from([State.COMPLETED, State.FAILED]),
    token=instants,
    attempt=attempts,
    fingerprint=fingerprints,
    since=instants,
    codec=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    body=st.binary(max_size=300),
    lease=st.just(0),
    lease_until=st.just(0),
    expires=st.none(),
)
remembered_rows = st.builds(
    lambda row, expires: row._replace(state=State.COMPLETED, lease=1, expires=expires),
    settled_rows,
    st.integers(1, 2**64 - 1),
)
expired_rows = st.builds(lambda row: row._replace(state=State.EXPIRED, codec="", body=b""), settled_rows)
open_rows = st.builds(
    Row,
    state=st.sampled_from([State.RUNNING, State.UNKNOWN, State.WITHDRAWN]),
    token=instants,
    attempt=attempts,
    fingerprint=fingerprints,
    since=instants,
    lease=instants,
    lease_until=instants,
    expires=st.one_of(st.none(), st.integers(1, 2**64 - 1)),
    codec=st.just(""),
    body=st.just(b""),
)


# ------------------------------------------------------------------------------------------------------ record ids


@settings(deadline=None)
@given(spaces, names, names, spaces, names, names)
@example("c", "a", "b:c", "c", "a:b", "c")
@example("c", "", "1:x:y", "c", "1:x", "y")
@example("c", "1", ":", "c", "1:", "")
def test_two_record_ids_have_one_text_only_if_they_are_the_same(
    space: str, namespace: str, key: str, space2: str, namespace2: str, key2: str
) -> None:
    one, two = RecordId(namespace, key, space), RecordId(namespace2, key2, space2)
    same = (space, namespace, key) == (space2, namespace2, key2)
    assert (one.text == two.text) is same
    assert (one == two) is same
    assert (one.digest == two.digest) is same


@settings(deadline=None)
@given(spaces, names, names)
def test_a_record_id_is_read_back_from_its_text(space: str, namespace: str, key: str) -> None:
    rid = RecordId(namespace, key, space)
    back = RecordId.parse(rid.text)
    assert (back.space, back.namespace, back.key, back.text) == (space, namespace, key, rid.text)
    assert back == rid
    assert hash(back) == hash(rid)


@settings(deadline=None)
@given(st.one_of(st.text(max_size=30), st.text(st.sampled_from("cl0123456789:ab"), max_size=12)))
@example("c")
@example("c:")
@example("c1")
@example("c-1:a:b")
@example("c2:a:b")
@example("c+1:a:b")
@example("c 1:a:b")
@example("x1:a:b")
@example("")
def test_a_text_is_parsed_to_an_id_of_that_very_text_or_refused(text: str) -> None:
    assume(not text[1:].partition(":")[0].startswith("0") or text[1:2] + text[2:3] == "0:")
    assume(text[1:].partition(":")[0].isascii())
    try:
        rid = RecordId.parse(text)
    except BackendError:
        return
    assert rid.text == text


@pytest.mark.parametrize("text", ["c01:a:k", "c\uff11:a:k", "c\u0661:a:k", "c00::k"])
def test_another_spelling_of_the_length_is_no_record_id(text: str) -> None:
    with pytest.raises(BackendError):
        RecordId.parse(text)


def test_a_length_of_thousands_of_digits_is_no_record_id() -> None:
    with pytest.raises(BackendError):
        RecordId.parse("c" + "9" * 5000 + ":a:k")


def test_calls_and_locks_of_one_name_never_meet() -> None:
    assert RecordId("n", "k", CALLS) != RecordId("n", "k", LOCKS)


def test_a_record_id_is_equal_to_no_text() -> None:
    rid = RecordId("n", "k")
    assert rid != rid.text


def test_a_digest_is_48_hex_characters_and_the_same_each_time() -> None:
    rid = RecordId("orders", "o1")
    assert rid.digest == rid.digest == RecordId("orders", "o1").digest
    assert len(rid.digest) == 48
    assert set(rid.digest) <= set("0123456789abcdef")


def test_a_digest_does_not_change_between_versions() -> None:
    assert RecordId("orders", "o1").text == "c6:orders:o1"
    assert RecordId("orders", "o1").digest == "a744fc4181cfb218dd9edd7b9433b5b6370fadd63d1c90be"


def test_a_record_id_is_shown_by_its_digest_and_never_by_its_key() -> None:
    rid = RecordId("secret-namespace", "secret-key")
    assert repr(rid) == f"RecordId({rid.digest})"


# ---------------------------------------------------------------------------------------------------- the envelope


@settings(deadline=None)
@given(open_rows)
def test_an_open_row_comes_out_of_its_envelope_as_it_went_in(row: Row) -> None:
    assert unpack(pack(row)) == row


@settings(deadline=None)
@given(st.one_of(settled_rows, remembered_rows, expired_rows))
def test_a_settled_row_comes_out_of_its_envelope_as_it_went_in(row: Row) -> None:
    assert unpack(pack(row)) == row


@settings(deadline=None)
@given(st.one_of(settled_rows, expired_rows), st.integers(1, 2**64 - 1))
def test_the_expiry_of_a_settled_row_is_left_to_the_backend(row: Row, expires: int) -> None:
    assert pack(row._replace(expires=expires)) == pack(row)


@settings(deadline=None)
@given(*[st.one_of(open_rows, settled_rows, remembered_rows, expired_rows)] * 2)
def test_different_rows_have_different_envelopes(one: Row, two: Row) -> None:
    assert (pack(one) == pack(two)) is (one == two)


def test_a_completed_record_costs_44_bytes_and_its_codec_over_its_body() -> None:
    row = Row(State.COMPLETED, 1, ATTEMPT, ARGS, NOW, codec="json", body=b"x" * 1000)
    assert len(pack(row)) == 44 + len("json") + 1000


def test_a_remembered_record_costs_8_bytes_more_and_43_when_it_has_expired() -> None:
    row = Row(State.COMPLETED, 1, ATTEMPT, ARGS, NOW, 60, 0, NOW + 30, "json", b"x" * 1000)
    assert len(pack(row)) == 52 + len("json") + 1000
    expired = standing(row, NOW + 30)
    assert expired == Row(State.EXPIRED, 1, ATTEMPT, ARGS, NOW + 30, expires=NOW + 90)
    assert len(pack(expired)) == 43
    assert standing(row, NOW + 29) is row
    assert standing(row, NOW + 90) is standing(expired, NOW + 90) is None


def test_the_envelope_is_laid_out_as_drawn() -> None:
    running = pack(Row(State.RUNNING, 2, ATTEMPT, ARGS, 3, 4, 5, 6))
    assert running[:2] == b"\xd1R"
    assert [int.from_bytes(running[at : at + 8], "big") for at in (2, 10)] == [2, 3]
    assert running[18:26] == ATTEMPT
    assert running[26:43] == b"\x10" + ARGS
    assert [int.from_bytes(running[at : at + 8], "big") for at in (43, 51, 59)] == [4, 5, 6]
    assert len(running) == 68
    assert pack(Row(State.RUNNING, 2, ATTEMPT, ARGS, 3, 4, 5, 6, body=b"7@here"))[67:] == b"\x067@here"
    completed = pack(Row(State.COMPLETED, 2, ATTEMPT, b"", 3, codec="json", body=b"null"))
    assert completed[26:] == b"\x00" + b"\x04json" + b"null"
    remembered = pack(Row(State.COMPLETED, 2, ATTEMPT, b"", 3, 1, 0, 4, "json", b"null"))
    assert remembered == b"\xd2" + completed[1:27] + bytes(7) + b"\x04" + completed[27:]
    assert pack(Row(State.EXPIRED, 2, ATTEMPT, ARGS, 3)) == b"\xd1E" + running[2:43]


@settings(deadline=None)
@given(st.binary(max_size=120))
def test_foreign_bytes_are_refused_with_a_backend_error_and_nothing_else(data: bytes) -> None:
    try:
        row = unpack(data)
    except BackendError:
        return
    assert pack(row) == data


@settings(deadline=None)
@given(st.sampled_from(b"\xd1\xd2"), st.sampled_from(b"RCFUWE"), st.sampled_from([0, 16]), st.binary(max_size=100))
def test_bytes_that_begin_like_a_record_are_read_or_refused(magic: int, letter: int, size: int, rest: bytes) -> None:
    data = bytes([magic, letter]) + rest[:24].ljust(24, b"\x07") + bytes([size]) + rest[24:]
    try:
        unpack(data)
    except BackendError:
        pass


@pytest.mark.parametrize(
    "data",
    [b"", b"\xd1", b"null", b'{"a": 1}', b"\x80\x04K\x01.", b"\xd1X" + bytes(60), b"\xd0R" + bytes(60)],
    ids=["empty", "magic", "null", "json", "pickle", "letter", "other-magic"],
)
def test_bytes_of_somebody_else_are_no_record(data: bytes) -> None:
    with pytest.raises(BackendError, match="no record of ours"):
        unpack(data)


@pytest.mark.parametrize("magic", [0x00, 0x7B, 0xD0, 0xD3, 0xFF])
@pytest.mark.parametrize("state", list(State))
def test_an_envelope_of_another_version_is_no_record(magic: int, state: State) -> None:
    whole = pack(Row(state, 1, ATTEMPT, ARGS, NOW, 2, 3, 4))
    with pytest.raises(BackendError):
        unpack(bytes([magic]) + whole[1:])


@pytest.mark.parametrize("size", [1, 15, 17, 255])
@pytest.mark.parametrize("state", list(State))
def test_a_fingerprint_of_another_length_is_no_record_of_ours(size: int, state: State) -> None:
    whole = pack(Row(state, 1, ATTEMPT, b"", NOW, 2, 3, 4))
    with pytest.raises(BackendError):
        unpack(whole[:26] + bytes([size]) + bytes(size) + whole[27:])


@settings(deadline=None)
@given(open_rows, st.data())
def test_an_open_row_cut_short_or_with_bytes_after_it_is_no_record(row: Row, data: st.DataObject) -> None:
    whole = pack(row)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for broken in (whole[:cut], whole + b"\x00"):
        with pytest.raises(BackendError):
            unpack(broken)


@pytest.mark.parametrize("fingerprint", [b"", ARGS])
@pytest.mark.parametrize("remember", [0, 1])
def test_a_settled_row_cut_short_in_its_head_is_no_record(fingerprint: bytes, remember: int) -> None:
    whole = pack(Row(State.COMPLETED, 1, ATTEMPT, fingerprint, NOW, remember, 0, NOW, "json", b""))
    for cut in range(len(whole) - len("json")):
        with pytest.raises(BackendError):
            unpack(whole[:cut])


@pytest.mark.parametrize("state", [state for state in State if state is not State.COMPLETED])
def test_only_completed_records_are_remembered(state: State) -> None:
    whole = pack(Row(state, 1, ATTEMPT, ARGS, NOW, 2, 3, 4))
    with pytest.raises(BackendError):
        unpack(b"\xd2" + whole[1:])


def test_an_expired_row_with_bytes_after_it_is_no_record() -> None:
    with pytest.raises(BackendError):
        unpack(pack(Row(State.EXPIRED, 1, ATTEMPT, ARGS, NOW)) + b"\x00")


def test_a_settled_row_cut_short_in_its_codec_is_no_record() -> None:
    whole = pack(Row(State.COMPLETED, 1, ATTEMPT, ARGS, NOW, codec="json", body=b""))
    with pytest.raises(BackendError):
        unpack(whole[:-2])


# ------------------------------------------------------------------------------------------------------- describe

RID = RecordId("orders", "o1")
RUNNING = Row(State.RUNNING, 7, ATTEMPT, ARGS, NOW, 30_000_000, NOW + 30_000_000, NOW + 90_000_000)


def test_a_running_row_is_described_with_what_is_left_of_its_lease() -> None:
    assert describe(RID, RUNNING, NOW + 5_000_000) == Record(
        state="running",
        namespace="orders",
        key="o1",
        token=7,
        attempt=ATTEMPT.hex(),
        fingerprint=ARGS.hex(),
        age=5.0,
        lease_left=25.0,
        expires_in=85.0,
        codec="",
        size=0,
    )


def test_a_lease_that_ran_out_is_described_as_negative() -> None:
    record = describe(RID, RUNNING, NOW + 31_000_000)
    assert record is not None
    assert record.lease_left == -1.0


def test_after_the_clock_stepped_back_no_lease_is_described_longer_than_it_is_and_no_age_as_negative() -> None:
    record = describe(RID, RUNNING, NOW - 3_600_000_000)
    assert record is not None
    assert (record.age, record.lease_left) == (0.0, 30.0)


@pytest.mark.parametrize("state, name", [(State.COMPLETED, "completed"), (State.FAILED, "failed")])
def test_a_settled_row_is_described_by_the_size_of_its_outcome_and_not_by_the_outcome(state: State, name: str) -> None:
    row = Row(state, 7, ATTEMPT, b"", NOW, expires=NOW + 60_000_000, codec="json", body=b"card 4242")
    record = describe(RID, row, NOW + 1_000_000)
    assert record is not None
    assert (record.state, record.age, record.lease_left, record.expires_in) == (name, 1.0, None, 59.0)
    assert (record.codec, record.size, record.fingerprint) == ("json", 9, "")
    assert "4242" not in repr(record)


def test_an_unknown_row_is_described_without_lease_and_without_end() -> None:
    record = describe(RID, Row(State.UNKNOWN, 7, ATTEMPT, ARGS, NOW), NOW + 2_000_000)
    assert record is not None
    assert (record.state, record.age, record.lease_left, record.expires_in) == ("unknown", 2.0, None, None)


def test_a_tombstone_is_not_described() -> None:
    assert describe(RID, Row(State.WITHDRAWN, 7, ATTEMPT, b"", NOW, expires=NOW + 10), NOW) is None


def test_a_row_is_described_until_the_last_microsecond_of_its_retention() -> None:
    row = Row(State.COMPLETED, 7, ATTEMPT, b"", NOW, expires=NOW + 10)
    assert describe(RID, row, NOW + 9) is not None
    assert describe(RID, row, NOW + 10) is None
