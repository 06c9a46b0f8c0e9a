"""What only WSGI has: start_response, write, close, iterables, and bodies by length or without one."""

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

import idempotent.http.wsgi as wsgi
from idempotent import LocalBackend, current_call
from idempotent._drive import drive
from idempotent.http import GLOBAL
from idempotent.http.wsgi import IdempotencyMiddleware


class Call:
    """One request and what the server was told; `finish` iterates and closes, as a server does."""

    def __init__(self, app: Any, body: bytes = b"{}", **environ: Any) -> None:
        self.status = ""
        self.headers: list[tuple[str, str]] = []
        environ = {
            "REQUEST_METHOD": "POST",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/pay",
            "QUERY_STRING": "",
            "CONTENT_TYPE": "application/json",
            "CONTENT_LENGTH": str(len(body)),
            "HTTP_IDEMPOTENCY_KEY": "k",
            "wsgi.input": io.BytesIO(body),
            **environ,
        }
        self.environ = {name: value for name, value in environ.items() if value is not None}
        self.answer: Iterable[bytes] = app(self.environ, self._start)
        self.parts = iter(self.answer)

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        if exc_info is not None and self.status:  # as WSGI says of a server that has sent the status
            raise exc_info[1]
        self.status, self.headers = status, headers
        return lambda data: None

    def get(self, name: str) -> str | None:
        return next((value for each, value in self.headers if each.lower() == name), None)

    def close(self) -> None:
        close = getattr(self.answer, "close", None)
        if close is not None:
            close()

    def finish(self) -> bytes:
        try:
            return b"".join(self.parts)
        finally:
            self.close()


def served(app: Any, **options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(app, **{"scope": GLOBAL, "backend": "local://", **options})


class App:
    """Answers with its number, as a list."""

    def __init__(self) -> None:
        self.runs = 0
        self.environ: Any = None
        self.read: Any = None

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        self.runs += 1
        self.environ = environ
        self.read = environ["wsgi.input"].read()
        start_response("200 Fine", [("Content-Type", "text/plain"), ("X-Own", "yes")])
        return [b"%d" % self.runs]


def test_the_first_answer_keeps_its_reason_and_spelling_and_a_replay_has_the_same_status() -> None:
    middleware = served(App())
    first, again = Call(middleware), Call(middleware)
    assert (first.status, first.headers) == ("200 Fine", [("Content-Type", "text/plain"), ("X-Own", "yes")])
    assert (first.finish(), again.finish()) == (b"1", b"1")
    assert again.status == "200 OK"
    assert again.get("idempotency-replayed") == "true"
    assert again.get("x-own") is None


def test_a_request_that_is_sent_in_once_more_by_whoever_is_further_out_is_served_again() -> None:
    middleware = served(served(App()))
    first = Call(middleware)
    again = Call(middleware, **{**first.environ, "wsgi.input": io.BytesIO(b"{}")})
    assert (first.finish(), again.finish()) == (b"1", b"1")
    assert again.get("idempotency-replayed") == "true"


def test_a_status_without_a_name_is_replayed() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("299 Odd", [])
        return [b"x"]

    middleware = served(app)
    assert [Call(middleware).status for _ in range(2)] == ["299 Odd", "299 Unknown"]


def test_the_header_twice_as_servers_join_it_is_refused() -> None:
    app = App()
    for joined in ("k,k", '"k", "k"', '"k","k"'):
        assert Call(served(app), HTTP_IDEMPOTENCY_KEY=joined).status.startswith("400")
    assert app.runs == 0


def test_without_a_length_there_is_no_body_unless_the_server_ends_it() -> None:
    app = App()
    Call(served(app), b"abc", CONTENT_LENGTH=None).finish()
    assert app.read == b""
    chunked = {"CONTENT_LENGTH": None, "HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
    Call(served(app), b"abc", **chunked, HTTP_IDEMPOTENCY_KEY="other").finish()
    assert app.read == b"abc"
    assert app.environ["CONTENT_LENGTH"] == "3"
    assert "HTTP_TRANSFER_ENCODING" not in app.environ
    refused = Call(served(app, max_body=2), b"abc", **chunked, HTTP_IDEMPOTENCY_KEY="third")
    assert refused.status.startswith("413")
    assert app.runs == 2


def test_no_more_is_read_than_the_cap_or_the_length() -> None:
    class Input(io.BytesIO):
        count = 0

        def read(self, size: int | None = -1) -> bytes:
            found = super().read(size)
            Input.count += len(found)
            return found

    source = Input(b"x" * 1_000_000)
    terminated = {"CONTENT_LENGTH": None, "wsgi.input_terminated": True, "wsgi.input": source}
    assert Call(served(App(), max_body=10), **terminated).status.startswith("413")
    assert Input.count == 11
    assert Call(served(App(), max_body=10), CONTENT_LENGTH="11", **{"wsgi.input": source}).status.startswith("413")
    assert Input.count == 11
    Call(served(App()), CONTENT_LENGTH="5", **{"wsgi.input": source}).finish()
    assert Input.count == 16


def test_a_body_that_ends_early_runs_nothing() -> None:
    app = App()
    assert Call(served(app), b"half", CONTENT_LENGTH="8").status.startswith("400")
    assert app.runs == 0


def test_what_goes_through_write_is_part_of_the_answer() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        write(b"first ")
        return [b"second"]

    middleware = served(app)
    assert [Call(middleware).finish() for _ in range(2)] == [b"first second"] * 2


def test_an_answer_that_is_replaced_by_an_error_is_that_error() -> None:
    runs = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        runs.append(1)
        start_response("200 OK", [])
        try:
            raise KeyError
        except KeyError as error:
            start_response("500 Oops", [], (KeyError, error, error.__traceback__))
        return [b"sorry"]

    middleware = served(app)
    assert [Call(middleware).status for _ in range(2)] == ["500 Oops"] * 2
    assert len(runs) == 2


class Parts:
    """An iterable without a length, that says when it was closed."""

    def __init__(self, parts: Iterator[bytes], log: list[str]) -> None:
        self._parts, self._log = parts, log

    def __iter__(self) -> Iterator[bytes]:
        return self._parts

    def close(self) -> None:
        self._log.append("closed")


def test_an_answer_of_known_length_is_recorded_before_it_is_sent_and_closed_after() -> None:
    log: list[str] = []
    backend = LocalBackend()

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        def parts() -> Iterator[bytes]:
            start_response("200 OK", [("Content-Length", "4")])  # as late as WSGI allows
            yield b"ab"
            yield b"cd"

        return Parts(parts(), log)

    call = Call(served(app, backend=backend))
    assert log == []
    again = Call(served(app, backend=backend))
    assert (again.finish(), again.get("idempotency-replayed")) == (b"abcd", "true")
    assert call.finish() == b"abcd"
    assert log == ["closed"]


def test_an_answer_without_a_body_is_no_stream() -> None:
    log: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("204 No Content", [])
        return Parts(iter([b""]), log)

    middleware = served(app)
    for _ in range(2):
        call = Call(middleware)
        assert (call.status[:3], call.finish(), call.get("idempotency-stored")) == ("204", b"", None)
    assert log == ["closed"]


def test_a_stream_is_sent_as_it_comes_and_keeps_the_key_until_it_ends() -> None:
    log: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])

        def parts() -> Iterator[bytes]:
            for part in (b"one", b"two"):
                log.append(part.decode())
                yield part

        return Parts(parts(), log)

    middleware = served(app)
    call = Call(middleware)
    assert call.get("idempotency-stored") == "false"
    assert log == ["one"]  # the second is not made before it is asked for
    assert b"urn:idempotent:in-progress" in Call(middleware).finish()
    assert call.finish() == b"onetwo"
    assert log == ["one", "two", "closed"]
    assert b"urn:idempotent:result-unavailable" in Call(middleware).finish()


def test_the_call_is_current_in_every_part_of_a_stream_and_not_between() -> None:
    seen: list[Any] = []

    def parts() -> Iterator[bytes]:
        try:
            for part in (b"one", b"two", b"three"):
                seen.append(current_call())
                yield part
        finally:
            seen.append(current_call())

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        seen.append(current_call())
        return parts()

    call = Call(served(app))
    assert current_call() is None
    assert [next(call.parts), next(call.parts)] == [b"one", b"two"]
    assert current_call() is None
    call.close()  # the client leaves
    assert len(seen) == 4
    assert seen[0] is not None
    assert all(each is seen[0] for each in seen[:3])


def test_a_probe_that_is_async_is_refused_at_once() -> None:
    async def probe(call: Any) -> Any: ...

    with pytest.raises(TypeError, match="probe .* is async, and a sync middleware cannot await it"):
        served(App(), on_crash=probe)


def test_a_stream_whose_client_leaves_counts_as_done() -> None:
    log: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return Parts(iter([b"one", b"two", b"three"]), log)

    middleware = served(app)
    call = Call(middleware)
    next(call.parts)
    call.close()
    assert log == ["closed"]
    assert b"urn:idempotent:result-unavailable" in Call(middleware).finish()


def test_a_stream_that_fails_midway_frees_the_key() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"one"
        raise KeyError("midway")

    middleware = served(app)
    for _ in range(2):
        call = Call(middleware)
        with pytest.raises(KeyError, match="midway"):
            call.finish()


def test_an_error_page_after_the_status_was_sent_is_the_servers_to_refuse() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b"one"
        try:
            raise KeyError("midway")
        except KeyError:
            start_response("500 Internal Server Error", [], sys.exc_info())
        yield b"an error page"

    middleware = served(app)
    for _ in range(2):  # the key is free again
        call = Call(middleware)
        with pytest.raises(KeyError, match="midway"):
            call.finish()


def test_what_goes_through_write_amid_a_stream_is_in_its_place() -> None:
    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        write = start_response("200 OK", [])
        yield b"one "
        write(b"two ")
        yield b"three "
        yield b"four "
        write(b"five")

    assert Call(served(app)).finish() == b"one two three four five"


@pytest.mark.parametrize("when", ["call", "first part", "never started"])
def test_an_error_of_the_application_passes_through_and_frees_the_key(when: str) -> None:
    log: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        log.append("run")
        if when == "call":
            raise KeyError(when)

        def parts() -> Iterator[bytes]:
            if when == "first part":
                raise KeyError(when)
            yield b"x"

        return Parts(parts(), log)

    middleware = served(app)
    for _ in range(2):
        with pytest.raises(Exception, match=when if when != "never started" else "start_response"):
            Call(middleware)
    assert log.count("run") == 2
    assert log.count("closed") == (0 if when == "call" else 2)


@pytest.mark.parametrize("streams", [False, True])
def test_headers_that_cannot_be_sent_free_the_key(streams: bool) -> None:
    """That they are not latin-1 shows in the middleware; that they hold a line break, in strict servers."""
    log: list[str] = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        log.append("run")
        start_response("200 OK", [("X-Note", "a\nb")] if streams else [("X-Note", "5 \u20ac"), ("Content-Length", "0")])
        return Parts(iter([b"one", b"two"] if streams else []), log)

    class Strict(Call):
        def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            if any("\n" in value for _, value in headers):
                raise ValueError("a line break")
            return super()._start(status, headers, exc_info)

    middleware = served(app)
    for _ in range(2):
        with pytest.raises(ValueError, match="a line break" if streams else "latin-1"):
            Strict(middleware)
    assert log == ["run", "closed"] * 2


class Interrupt(BaseException):
    """What a signal handler raises: gunicorn's time-out, Ctrl-C."""


@pytest.mark.parametrize("where", ["application", "claim", "before the outcome", "after the outcome"])
def test_an_interruption_leaves_no_lease_behind_and_loses_no_outcome(where: str) -> None:
    backend = LocalBackend()
    runs = []

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        runs.append(1)
        if where == "application" and len(runs) == 1:
            raise Interrupt
        start_response("200 OK", [])
        return [b"%d" % len(runs)]

    struck: list[bool] = []

    def strike_once(command: Any) -> Any:
        async def struck_command(*args: Any, **kwargs: Any) -> Any:
            if struck:
                return await command(*args, **kwargs)
            struck.append(True)
            if where != "before the outcome":
                await command(*args, **kwargs)
            raise Interrupt

        return struck_command

    if where == "claim":
        backend.claim = strike_once(backend.claim)  # type: ignore[method-assign]
    if where.endswith("the outcome"):
        backend.complete = strike_once(backend.complete)  # type: ignore[method-assign]
    middleware = served(app, backend=backend)
    with pytest.raises(Interrupt):
        Call(middleware)
    again = Call(middleware)
    assert again.status[:3] == "200"
    assert (again.get("idempotency-replayed") == "true") is where.endswith("the outcome")
    assert len(runs) == (2 if where == "application" else 1)


def test_an_interruption_between_the_claim_and_the_application_frees_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    app = App()
    middleware = served(app)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(wsgi._Taken, "__init__", interrupted)
        Call(middleware)
    assert Call(middleware).finish() == b"1"


def interrupted(*_: Any) -> None:
    raise Interrupt


def test_two_middlewares_are_as_one() -> None:
    app = App()
    middleware = served(served(app))
    assert [Call(middleware).finish() for _ in range(2)] == [b"1", b"1"]


def test_a_mounted_application_has_its_prefix_in_the_path() -> None:
    app, backend = App(), LocalBackend()
    middleware = served(app, backend=backend)
    Call(middleware, SCRIPT_NAME="/a", PATH_INFO="/b")
    assert Call(middleware, SCRIPT_NAME="", PATH_INFO="/a/b").get("idempotency-replayed") == "true"
    assert Call(middleware, SCRIPT_NAME="", PATH_INFO="/b").status.startswith("422")


def test_an_async_backend_is_refused_at_the_first_call_with_the_remedy() -> None:
    import redis.asyncio

    from idempotent import BackendError, RedisBackend

    middleware = served(App(), backend=RedisBackend(redis.asyncio.Redis()))
    with pytest.raises(BackendError, match="sync"):
        Call(middleware)


def test_the_record_says_what_is_kept() -> None:
    backend = LocalBackend()
    Call(served(App(), backend=backend)).finish()

    async def scan() -> Any:
        return [record async for record in backend.scan()]

    (record,) = drive(scan())
    assert (record.namespace, record.key, record.state, record.codec) == ("http", "-:k", "completed", "http1")
