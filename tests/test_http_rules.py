"""The rules by themselves: keys, fingerprints, what is kept, problems. No framework."""

import re
import subprocess
import sys
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from idempotent.errors import InvalidKey
from idempotent.http import GLOBAL, Headers, Request, Response
from idempotent.http._rules import (
    _PROBLEMS,
    PATTERN,
    ResponseCodec,
    Rules,
    fingerprint_of,
    parse_key,
    problem,
    record_key,
)

VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (b"8e03978e-40d5-43e8-bc93-6894a57f9324", "8e03978e-40d5-43e8-bc93-6894a57f9324"),
        (b'"8e03978e"', "8e03978e"),
        (b" k\t", "k"),
        (b'  "k" ', "k"),
        (b"a=b:/c?d", "a=b:/c?d"),
        (b":aGVsbG8=:", ":aGVsbG8=:"),
        (b"?1", "?1"),
        (b"5", "5"),
        (b"'k'", "'k'"),
        (rb'"a\"b\\c"', 'a"b\\c'),
        (rb"a\b", "a\\b"),
        (b'"a,b;c"', "a,b;c"),
        (b"x" * 255, "x" * 255),
        (b'"' + b"x" * 255 + b'"', "x" * 255),
        (b'"' + rb"\\" * 255 + b'"', "\\" * 255),
    ],
)
def test_a_key_is_read(line: bytes, key: str) -> None:
    assert parse_key([line]) == key


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b" ",
        b'""',
        b"a b",
        b'"a b"',
        b"a,b",
        b'"a", "b"',
        b"a;b",
        b'"a";b=1',
        b'"a"b',
        b'a"b',
        b'"a',
        b'a"',
        rb'"\a"',
        b"a\x00b",
        b'"a\x00b"',
        b"a\x7fb",
        b"a\nb",
        b"a\r\nset-cookie: b",
        "ä".encode(),
        "ä".encode("latin-1"),
        b'"\xff"',
        b"x" * 256,
        b'"' + b"x" * 256 + b'"',
        b"x" * 100_000,
        b"(a b)",
    ],
)
def test_what_is_no_key_is_refused(line: bytes) -> None:
    assert parse_key([line]) is None


def test_no_line_and_two_lines_are_no_key() -> None:
    assert parse_key([]) is None
    assert parse_key([b"k", b"k"]) is None


@given(st.text(VISIBLE, min_size=1, max_size=255))
def test_every_visible_key_can_be_sent_quoted(key: str) -> None:
    import http_sf

    assert parse_key([http_sf.ser(key).encode()]) == key
    if not set(key) & set('",;'):
        assert parse_key([key.encode()]) == key


@given(st.from_regex(re.compile(PATTERN, re.ASCII)) | st.text(VISIBLE + " ", max_size=8))
def test_the_pattern_in_openapi_says_what_is_taken(line: str) -> None:
    line = line.strip()
    assert (re.fullmatch(PATTERN, line) is not None) == (parse_key([line.encode()]) is not None)


@given(st.binary(max_size=600))
def test_no_line_at_all_breaks_the_parser(line: bytes) -> None:
    key = parse_key([line])
    assert key is None or (1 <= len(key) <= 255 and set(key) <= set(VISIBLE))


@given(st.lists(st.tuples(st.text(max_size=5), st.text(VISIBLE, min_size=1, max_size=5)), min_size=2, max_size=2))
def test_two_scopes_never_make_one_key(pairs: list[tuple[str, str]]) -> None:
    try:
        one, other = (record_key(*pair) for pair in pairs)
    except InvalidKey:
        return
    assert (one == other) == (pairs[0] == pairs[1])
    assert record_key(GLOBAL, pairs[0][1]) not in (one, other)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("idempotent.http.asgi", "fastapi starlette django flask httpx requests redis sqlalchemy pydantic"),
        ("idempotent.http.wsgi", "fastapi starlette django flask httpx requests redis sqlalchemy pydantic asyncio"),
        ("idempotent.http.client", "fastapi starlette django flask httpx requests http_sf"),
        ("idempotent.http", "fastapi starlette django flask httpx requests http_sf"),
    ],
)
def test_no_framework_is_imported_that_is_not_used(module: str, absent: str) -> None:
    code = f"import sys, {module}\nprint([name for name in {absent.split()!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def request(method: str = "POST", path: str = "/a", query: str = "", kind: str | None = "text/plain") -> Request:
    headers = [] if kind is None else [(b"Content-Type", kind.encode())]
    return Request(method, path, query, Headers(headers), None)


def test_each_part_of_a_request_counts_and_none_runs_into_the_next() -> None:
    requests = [
        (request(), b"x"),
        (request("PATCH"), b"x"),
        (request(path="/a?b"), b"x"),
        (request(query="b"), b"x"),
        (request(path="/", query="a"), b"x"),
        (request(kind=None), b"text/plainx"),
        (request(kind="text/plainx"), b""),
        (request(kind="text/html"), b"x"),
        (request(), b"y"),
        (request(), b""),
    ]
    digests = {fingerprint_of(*each) for each in requests}
    assert len(digests) == len(requests)
    assert {len(digest) for digest in digests} == {16}


def test_headers_are_found_in_any_case_and_keep_their_lines() -> None:
    headers = Headers([(b"Link", b"<a>"), (b"LINK", b"<b>"), (b"X", b"\xe9")])
    assert headers["link"] == headers["Link"] == "<a>, <b>"
    assert headers.lines("LINK") == [b"<a>", b"<b>"]
    assert headers.get("x") == "é"
    assert headers.get("y") is None
    assert (list(headers), len(headers)) == (["link", "x"], 2)
    assert headers.raw == [(b"link", b"<a>"), (b"link", b"<b>"), (b"x", b"\xe9")]


@given(
    st.integers(100, 599),
    st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=50)), max_size=5),
    st.binary(max_size=500),
)
def test_a_kept_response_comes_back_as_it_was(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    codec = ResponseCodec()
    response = Response(status, headers, body)
    assert codec.decode(codec.keep(response, "")[0], "") == response


@pytest.mark.parametrize("data", [b"", b"\x93", b"\xc0", b"[" * 100_000, b"\x91" * 100_000, b"\x93\xa1x\x90\xc4\x00"])
def test_foreign_bytes_are_no_response(data: bytes) -> None:
    with pytest.raises(Exception) as caught:
        ResponseCodec().decode(data, "")
    assert not isinstance(caught.value, (MemoryError, SystemError))


@pytest.mark.parametrize("kind", _PROBLEMS)
def test_a_problem_is_of_its_type_and_says_nothing_of_the_request(kind: str) -> None:
    answer = problem(kind, header="Idempotency-Key", max_body=5, docs_url="https://x/")
    body = orjson.loads(answer.body)
    assert body["type"] == f"urn:idempotent:{kind}"
    assert body["status"] == answer.status
    assert set(body) == {"type", "title", "status", "detail"}
    headers = Headers(answer.headers)
    assert headers["content-type"] == "application/problem+json"
    assert headers["content-length"] == str(len(answer.body))
    assert headers["link"] == '<https://x/>; rel="describedby"'
    assert "{" not in body["detail"]


def test_the_types_of_problems_are_those_that_are_promised() -> None:
    promised = (
        "key-missing key-invalid key-reused in-progress outcome-unknown result-unavailable body-too-large"
        " backend-unavailable"
    )
    assert list(_PROBLEMS) == promised.split()


@pytest.mark.parametrize(
    ("paths", "yes", "no"),
    [
        (["/pay"], ["/pay"], ["/pay/", "/pay/1", "/xpay", "/pa"]),
        (["/pay*"], ["/pay", "/payments/1"], ["/xpay"]),
        (["/*/pay"], ["/v1/pay", "/v1/a/pay"], ["/pay"]),
        (["!/quote*"], ["/pay"], ["/quote", "/quotes/1"]),
        (["/a*", "/b", "!/a/x"], ["/a", "/a/y", "/b"], ["/a/x", "/c"]),
        (["/a.b[1]"], ["/a.b[1]"], ["/aXb1"]),
        (["*"], ["/anything"], []),
    ],
)
def test_paths_are_matched_whole(paths: list[str], yes: list[str], no: list[str]) -> None:
    rules = Rules.checked({"scope": GLOBAL, "paths": paths})
    assert [path for path in yes + no if rules.covers(request(path=path))] == yes


def test_retry_after_is_a_whole_second_at_least() -> None:
    rules = Rules.checked({"scope": GLOBAL})
    for seconds, text in ((0.0, b"1"), (0.2, b"1"), (1.0, b"1"), (1.01, b"2"), (29.7, b"30")):
        assert (b"retry-after", text) in rules.problem("in-progress", retry_after=seconds).headers
