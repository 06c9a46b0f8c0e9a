"""The clients: one key for each request, kept through every retry, with httpx (both colours) and requests."""

import asyncio
import io
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import UUID

import httpx
import pytest
import requests
import time_machine

from idempotent.errors import InvalidKey, KeyRequired
from idempotent.http import _httpx, _requests, _retry
from idempotent.http._rules import parse_key, problem
from idempotent.http.client import (
    AsyncIdempotencyTransport,
    IdempotencyAdapter,
    IdempotencyTransport,
    idempotency_scope,
)

Reply = tuple[int, dict[str, str], bytes] | str
"""A status, headers and body; or "drop": the connection is closed; "cut": in the midst of the body."""
OK: Reply = (201, {}, b"done")


class Script:
    """A server that answers as it is told, one reply a request, the last one for ever."""

    def __init__(self) -> None:
        self.replies: list[Reply] = [OK]
        self.requests: list[tuple[str, str, str | None, bytes]] = []
        self.request_ids: list[str | None] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if self.headers.get("transfer-encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(int(self.headers.get("content-length", 0)))
                keys = self.headers.get_all("idempotency-key", [])
                script.requests.append((self.command, self.path, " twice ".join(keys) or None, body))
                script.request_ids.append(self.headers["x-request-id"])
                reply = script.replies.pop(0) if len(script.replies) > 1 else script.replies[0]
                if isinstance(reply, str):
                    if reply == "cut":
                        self.send_response(201)
                        self.send_header("content-length", "100")
                        self.end_headers()
                        self.wfile.write(b"half")
                        self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, headers, content = reply
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_PATCH = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def keys(self) -> list[str | None]:
        return [key for _, _, key, _ in self.requests]


class Library:
    """One client library: `send` gives status and body, `errors` are what a lost connection raises."""

    errors: tuple[type[Exception], ...] = (httpx.TransportError,)

    def send(self, url: str, *, method: str = "POST", options: Any = None, **kwargs: Any) -> tuple[int, bytes]:
        raise NotImplementedError


class Httpx(Library):
    def send(self, url: str, *, method: str = "POST", options: Any = None, **kwargs: Any) -> tuple[int, bytes]:
        with httpx.Client(transport=IdempotencyTransport(**(options or {})), trust_env=False) as client:
            response = client.request(method, url, **kwargs)
            return response.status_code, response.content


class AsyncHttpx(Library):
    def send(self, url: str, *, method: str = "POST", options: Any = None, **kwargs: Any) -> tuple[int, bytes]:
        async def main() -> tuple[int, bytes]:
            transport = AsyncIdempotencyTransport(**(options or {}))
            async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
                response = await client.request(method, url, **kwargs)
                return response.status_code, response.content

        return asyncio.run(main())


class Requests(Library):
    errors = (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)

    def send(self, url: str, *, method: str = "POST", options: Any = None, **kwargs: Any) -> tuple[int, bytes]:
        with requests.Session() as session:
            session.trust_env = False
            session.mount("http://", IdempotencyAdapter(**(options or {})))
            if "content" in kwargs:
                kwargs["data"] = kwargs.pop("content")
            response = session.request(method, url, **kwargs)
            return response.status_code, response.content


@pytest.fixture(params=[Httpx, AsyncHttpx, Requests], ids=lambda library: library.__name__)
def library(request: pytest.FixtureRequest) -> Library:
    found: Library = request.param()
    return found


@pytest.fixture
def server() -> Iterator[Script]:
    script = Script()
    yield script
    script.close()


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for; none is made."""
    found: list[float] = []

    async def async_sleep(pause: float) -> None:
        found.append(pause)

    class Time:
        sleep = staticmethod(found.append)

    monkeypatch.setattr(_httpx, "time", Time)
    monkeypatch.setattr(_requests, "time", Time)
    monkeypatch.setattr(_httpx.anyio, "sleep", async_sleep)
    return found


def in_progress(**headers: str) -> Reply:
    answer = problem("in-progress", header="Idempotency-Key", max_body=1, docs_url=None)
    return 409, {"content-type": "application/problem+json", **headers}, answer.body


def test_each_request_has_a_fresh_key_that_the_server_can_read(library: Library, server: Script) -> None:
    for method in ("POST", "PATCH"):
        assert library.send(server.url, method=method, json={}) == (201, b"done")
    keys = [parse_key([(key or "").encode()]) for key in server.keys]
    assert len(set(keys)) == 2
    assert all(UUID(key).version == 7 for key in keys)
    assert all((key or "").startswith('"') for key in server.keys)


def test_other_methods_have_no_key_and_are_sent_once(library: Library, server: Script) -> None:
    server.replies = [(503, {}, b"")]
    for method in ("GET", "PUT"):
        assert library.send(server.url, method=method)[0] == 503
    assert server.keys == [None, None]
    library.send(server.url, method="PUT", options={"methods": ["PUT"], "retries": 1})
    assert len(set(server.keys[2:])) == 1
    assert server.keys[2] is not None


def test_a_lost_reply_is_asked_for_again_with_the_same_key_and_body(library: Library, server: Script) -> None:
    server.replies = ["drop", "drop", OK]
    assert library.send(server.url + "/pay", content=b"12345") == (201, b"done")
    assert len(server.requests) == 3
    assert len(set(server.requests)) == 1
    assert server.requests[0][3] == b"12345"


def test_an_answer_that_is_cut_short_counts_as_lost(library: Library, server: Script) -> None:
    server.replies = ["cut", OK]
    assert library.send(server.url, json={}) == (201, b"done")
    assert len(set(server.keys)) == 1


def test_a_server_that_is_not_there_is_asked_again_and_then_told_of(library: Library, pauses: list[float]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(library.errors):
        library.send(f"http://127.0.0.1:{port}", json={}, options={"retries": 2})
    assert len(pauses) == 2


@pytest.mark.parametrize("status", [425, 429, 500, 502, 503, 504])
def test_an_answer_of_this_status_is_asked_for_again(library: Library, server: Script, status: int) -> None:
    server.replies = [(status, {}, b"not now"), OK]
    assert library.send(server.url, json={}) == (201, b"done")
    assert len(set(server.keys)) == 1


@pytest.mark.parametrize("status", [200, 303, 400, 401, 403, 404, 408, 409, 410, 413, 422, 501])
def test_an_answer_of_this_status_is_final(library: Library, server: Script, status: int) -> None:
    server.replies = [(status, {}, b"so it is"), OK]
    assert library.send(server.url, json={}) == (status, b"so it is")
    assert len(server.requests) == 1


def test_409_is_asked_again_only_if_the_first_is_in_progress(
    library: Library, server: Script, pauses: list[float]
) -> None:
    server.replies = [in_progress(), in_progress(**{"retry-after": "3"}), (409, {"retry-after": "4"}, b""), OK]
    assert library.send(server.url, json={}) == (201, b"done")
    assert len(server.requests) == 4
    assert pauses[1] >= 3
    assert pauses[2] >= 4
    unknown = problem("outcome-unknown", header="Idempotency-Key", max_body=1, docs_url=None)
    for body in (unknown.body, b"[" * 10_000, b"[]", b"\xff"):
        server.replies = [(409, {"content-type": "application/problem+json"}, body), OK]
        assert library.send(server.url, json={}) == (409, body)


def test_of_a_409_its_problem_type_counts_for_more_than_its_retry_after(library: Library, server: Script) -> None:
    unknown = problem("outcome-unknown", header="Idempotency-Key", max_body=1, docs_url=None).body
    server.replies = [(409, {"content-type": "application/problem+json", "retry-after": "0"}, unknown), OK]
    assert library.send(server.url, json={}) == (409, unknown)
    blank = {"content-type": "Application/Problem+JSON; charset=utf-8", "retry-after": "0"}
    named = {"content-type": "Application/Problem+JSON"}
    body = b'{"type": "https://shop.example/in-progress"}'
    server.replies = [(409, blank, b"{}"), (409, blank, b'{"type": "about:blank"}'), (409, named, body), OK]
    assert library.send(server.url, json={}) == (201, b"done")


def test_retries_are_bounded_and_the_last_answer_is_given_back(
    library: Library, server: Script, pauses: list[float]
) -> None:
    server.replies = [(503, {}, b"closed")]
    assert library.send(server.url, json={}) == (503, b"closed")
    assert len(server.requests) == 5
    assert len(set(server.keys)) == 1
    for place, pause in enumerate(pauses):
        assert 0.25 * 2**place <= pause <= 0.5 * 2**place
    assert library.send(server.url, json={}, options={"retries": 0}) == (503, b"closed")
    assert len(server.requests) == 6


def test_a_body_that_cannot_be_sent_again_is_sent_once(library: Library, server: Script) -> None:
    if isinstance(library, AsyncHttpx):

        async def parts() -> Any:
            yield b"one "
            yield b"two"
    else:

        def parts() -> Any:
            yield b"one "
            yield b"two"

    server.replies = [(503, {}, b"closed")]
    assert library.send(server.url, content=parts()) == (503, b"closed")
    assert [(key is not None, body) for _, _, key, body in server.requests] == [(True, b"one two")]
    if not isinstance(library, AsyncHttpx):
        assert library.send(server.url, content=io.BytesIO(b"a file")) == (503, b"closed")
        assert len(server.requests) == 2
    server.replies = ["drop"]
    with pytest.raises(library.errors):
        library.send(server.url, content=parts())


@pytest.mark.parametrize("own", ["order-17", '"order-17"'])
def test_a_key_of_the_callers_own_is_kept(library: Library, server: Script, own: str) -> None:
    server.replies = [(503, {}, b""), OK]
    library.send(server.url, json={}, headers={"idempotency-key": own})
    assert server.keys == [own, own]


def test_the_header_and_its_form_may_be_others(library: Library, server: Script) -> None:
    library.send(server.url, json={}, options={"quoted": False})
    assert UUID(server.keys[0]).version == 7
    library.send(server.url, json={}, options={"header": "X-Request-Id"})
    assert server.keys[1] is None
    quoted = server.request_ids[1] or ""
    assert (quoted[0], quoted[-1], UUID(quoted[1:-1]).version) == ('"', '"', 7)


def test_in_a_scope_the_same_request_has_the_same_key_and_another_has_another(library: Library, server: Script) -> None:
    with idempotency_scope():
        for _ in range(2):
            library.send(server.url + "/pay", json={"a": 1})
        library.send(server.url + "/pay", json={"a": 2})  # a mistake that the server answers with 422
        library.send(server.url + "/ship", json={})
        library.send(server.url + "/pay", method="PATCH", json={})
    library.send(server.url + "/pay", json={"a": 1})
    pay, again, other, ship, patch, outside = server.keys
    assert pay == again == other
    assert len({pay, ship, patch, outside}) == 4


def test_a_retry_loop_outside_is_one_operation(library: Library, server: Script) -> None:
    server.replies = ["drop", "drop", OK]
    with idempotency_scope():
        while True:
            try:
                assert library.send(server.url, json={}, options={"retries": 0}) == (201, b"done")
                break
            except library.errors:
                continue
    assert len(server.keys) == 3
    assert len(set(server.keys)) == 1


def test_a_scope_with_a_name_has_the_same_keys_in_every_process(library: Library, server: Script) -> None:
    for name in ("order-17", "order-17", "order-18"):
        with idempotency_scope(name) as key:
            assert key == name
            library.send(server.url, json={})
    assert server.keys[0] == server.keys[1] != server.keys[2]
    policy = _retry.Policy(retries=1, backoff=1, max_pause=1, methods=["POST"], header="Idempotency-Key", quoted=False)
    with idempotency_scope("order-17"):
        assert policy.field_for("POST", "https://shop.example/pay") == "9507aeafafc811eecd2483be687f59c3"


def test_scopes_may_be_nested_and_wrong_ones_are_refused() -> None:
    with idempotency_scope("a") as outer:
        with idempotency_scope() as inner:
            assert UUID(inner).version == 7
        assert outer == "a"
        assert _retry._scope.get() == "a"
    assert _retry._scope.get() is None
    for wrong, error in (("", KeyRequired), ("a\nb", InvalidKey), ("x" * 2000, InvalidKey)):
        with pytest.raises(error), idempotency_scope(wrong):
            raise AssertionError


def test_a_redirect_keeps_the_key_and_is_asked_again_like_any_other(library: Library, server: Script) -> None:
    server.replies = [(307, {"location": "/moved"}, b""), (503, {}, b""), "drop", OK]
    follow = {} if isinstance(library, Requests) else {"follow_redirects": True}
    assert library.send(server.url + "/old", json={}, **follow) == (201, b"done")
    assert [path for _, path, _, _ in server.requests] == ["/old", "/moved", "/moved", "/moved"]
    assert [body for _, _, _, body in server.requests] == [server.requests[0][3]] * 4
    assert len(set(server.keys)) == 1


def test_retry_after_in_seconds_is_the_least_pause(library: Library, server: Script, pauses: list[float]) -> None:
    server.replies = [(429, {"retry-after": "7"}, b""), (503, {"retry-after": "0"}, b""), OK]
    assert library.send(server.url, json={})[0] == 201
    assert 7 <= pauses[0] <= 7.5
    assert 0 <= pauses[1] <= 0.5


def test_a_retry_after_that_is_too_long_gives_the_answer_back(
    library: Library, server: Script, pauses: list[float]
) -> None:
    server.replies = [(503, {"retry-after": "61"}, b"an hour"), OK]
    assert library.send(server.url, json={}) == (503, b"an hour")
    assert pauses == []


# The policy by itself.


def policy(**options: Any) -> _retry.Policy:
    given = {"retries": 4, "backoff": 0.5, "max_pause": 60, "methods": ["POST"], "header": "k", "quoted": True}
    return _retry.Policy(**{**given, **options})


def reply(status: int, retry_after: str | None = None) -> _retry.Reply:
    return _retry.Reply(status, retry_after, False, None)


def test_retry_after_as_a_date_counts_from_now() -> None:
    now = datetime(2026, 11, 28, 12, tzinfo=UTC)
    with time_machine.travel(now, tick=False):
        date = format_datetime(now + timedelta(seconds=20), usegmt=True)
        pause = policy().pause_after(reply(503, date), 1)
        assert pause is not None
        assert 20 <= pause <= 20.5
        past = policy().pause_after(reply(503, format_datetime(now - timedelta(days=1), usegmt=True)), 1)
        assert past is not None
        assert 0 <= past <= 0.5
        assert policy().pause_after(reply(503, format_datetime(now + timedelta(hours=1), usegmt=True)), 1) is None


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"])
def test_retry_after_may_be_a_date_of_each_form_that_http_has_known(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        now = datetime(2026, 11, 28, 12, tzinfo=UTC)
        with time_machine.travel(now.timestamp(), tick=False):  # to a datetime it would travel into its zone as well
            pause = policy().pause_after(reply(503, (now + timedelta(seconds=20)).strftime(form)), 1)
        assert pause is not None
        assert 20 <= pause <= 20.5
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "soon", "-5", "1.5", "²", "Mon, 99 Nov 2026 00:00:00 GMT", "\x00"])
def test_a_retry_after_that_cannot_be_read_is_none(text: str) -> None:
    pause = policy().pause_after(reply(503, text), 1)
    assert pause is not None
    assert 0.25 <= pause <= 0.5


def test_a_retry_after_of_very_many_digits_is_too_long() -> None:
    assert policy().pause_after(reply(503, "9" * 400), 1) is None


def test_pauses_double_up_to_the_longest_and_are_not_in_step() -> None:
    found = [policy(retries=2000).pause_after(None, sent) for sent in (1, 2, 3, 8, 1500)]
    for pause, longest in zip(found, (0.5, 1, 2, 60, 60), strict=True):
        assert pause is not None
        assert longest / 2 <= pause <= longest
    assert len({policy().pause_after(None, 1) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"retries": -1}, "retries"),
        ({"retries": 1.5}, "retries"),
        ({"retries": True}, "retries"),
        ({"backoff": 0}, "backoff"),
        ({"max_pause": "5"}, "max_pause"),
        ({"methods": "POST"}, "methods"),
        ({"methods": ("post",)}, "methods"),
        ({"methods": None}, "methods"),
        ({"methods": (5,)}, "methods"),
        ({"header": ""}, "header"),
        ({"header": "two words"}, "header"),
        ({"header": None}, "header"),
        ({"header": "Authorization"}, "header"),
        ({"quoted": "no"}, "quoted"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: Any, name: str) -> None:
    makers: list[Callable[..., Any]] = [IdempotencyTransport, AsyncIdempotencyTransport, IdempotencyAdapter]
    for make in makers:
        with pytest.raises((TypeError, ValueError), match=name):
            make(**options)


def test_an_adapter_may_be_pickled_with_its_session() -> None:
    copy = pickle.loads(pickle.dumps(IdempotencyAdapter(retries=7)))
    assert copy._policy.retries == 7


def test_a_certificate_that_is_refused_is_not_asked_again(server: Script, pauses: list[float]) -> None:
    session = requests.Session()
    session.trust_env = False
    session.mount("https://", IdempotencyAdapter())
    with session, pytest.raises(requests.exceptions.SSLError):
        session.post(server.url.replace("http:", "https:"), json={})
    assert pauses == []


def mocked(request: httpx.Request) -> httpx.Response:
    assert "idempotency-key" in request.headers
    if request.url.path == "/first":
        return httpx.Response(307, headers={"location": "/"}, content=b"moved")
    return httpx.Response(201, json={"number": 1})


def test_answers_of_a_mock_which_have_been_read_already_are_given_back() -> None:
    transport = httpx.MockTransport(mocked)
    with httpx.Client(transport=IdempotencyTransport(transport), follow_redirects=True) as client:
        assert client.post("https://shop.example/first", json={}).json() == {"number": 1}

    async def main() -> None:
        inner = AsyncIdempotencyTransport(transport)
        async with httpx.AsyncClient(transport=inner, follow_redirects=True) as client:
            assert (await client.post("https://shop.example/first", json={})).json() == {"number": 1}

    asyncio.run(main())


@pytest.mark.parametrize("make", [IdempotencyTransport, AsyncIdempotencyTransport])
def test_what_cannot_send_in_this_colour_is_refused_at_once(make: Any) -> None:
    for wrong in (httpx.Client(), httpx.HTTPTransport, "https://shop.example"):
        with pytest.raises(TypeError, match="transport must have handle_"):
            make(wrong)
    other = httpx.AsyncHTTPTransport() if make is IdempotencyTransport else httpx.HTTPTransport()
    with pytest.raises(TypeError, match="transport must have handle_"):
        make(other)


def test_streamed_answers_stay_streams(server: Script) -> None:
    server.replies = [(201, {}, b"x" * 100_000)]
    with httpx.Client(transport=IdempotencyTransport(), trust_env=False) as client:
        with client.stream("POST", server.url, json={}) as response:
            assert b"".join(response.iter_raw()) == b"x" * 100_000
    with requests.Session() as session:
        session.trust_env = False
        session.mount("http://", IdempotencyAdapter())
        response = session.post(server.url, json={}, stream=True)
        assert b"".join(response.iter_content(1000)) == b"x" * 100_000


def test_a_client_and_the_middleware_agree() -> None:
    """A reply is lost after the effect; the client asks again and gets the recorded answer."""
    from http_stacks import Starlette

    stack = Starlette(backend="local://")
    lost = [True]

    class Lossy(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            response = await httpx.ASGITransport(stack.app).handle_async_request(request)
            if lost:
                lost.pop()
                await response.aread()
                raise httpx.ReadError("the reply was lost")
            return response

    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=AsyncIdempotencyTransport(Lossy()), base_url="http://shop") as client:
            return await client.post("/pay", json={})

    response = asyncio.run(main())
    assert (response.status_code, response.headers["idempotency-replayed"]) == (201, "true")
    assert stack.effects == ["/pay"]
