"""`Idempotency-Key` for WSGI: Flask, Bottle, Pyramid and any other application.

The middleware belongs inside what authenticates. Where that happens in the application itself, as with Flask's
extensions, let `scope` authenticate: it is asked for every request with a key, before anything is looked up, and may
return a Response that refuses.
"""

import functools
import io
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any, Unpack

from idempotent._drive import SYNC, drive, finish
from idempotent._run import Running
from idempotent.http._exchange import Exchange, Service, Verdict
from idempotent.http._rules import BODILESS, NOT_STORED, Headers, Options, RawHeaders, Refused, Request, Response, Rules

__all__ = ["IdempotencyMiddleware", "begin", "failed", "settle"]

Environ = dict[str, Any]
Lines = list[tuple[str, str]]
StartResponse = Callable[..., Any]
App = Callable[[Environ, StartResponse], Iterable[bytes]]

_SEEN = "idempotent.http"
"""Marks an environ that is being served: a second middleware further in leaves it alone."""


class IdempotencyMiddleware:
    """Serve requests that carry a key once, and replay the answer to their duplicates.

    Args:
        app: the application.
        options: see `idempotent.http.Options`; `scope` is required.

    Raises:
        TypeError, ValueError: an option is wrong; the message names it.
    """

    def __init__(self, app: App, **options: Unpack[Options]) -> None:
        self.app = app
        self._service = Service(SYNC, options, is_async=False)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request, as WSGI says."""
        if _SEEN in environ or environ["REQUEST_METHOD"] not in self._service.rules.methods:
            return self.app(environ, start_response)
        request = _request(environ)
        try:
            key = self._service.key_of(request)
            if key is None:
                return self.app(environ, start_response)
            body = _body(environ, request, self._service.rules)
        except Refused as refused:
            return _answer(start_response, refused.answer)
        environ["wsgi.input"] = io.BytesIO(body)
        environ["CONTENT_LENGTH"] = str(len(body))
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        exchange = Exchange(self._service, request, key, body)
        try:
            answer = begin(exchange)
            if answer is None:
                return _Taken(exchange, start_response).run(self.app, environ)
        except BaseException as error:
            if exchange.open:
                failed(exchange, error)
            raise
        return _answer(start_response, answer)


def begin(exchange: Exchange) -> Response | None:
    """Claim the key; the answer to a duplicate or a refusal, or None: the application is to run."""
    try:
        return drive(exchange.begin())
    except BaseException as error:
        failed(exchange, error)
        answer = exchange.refusal(error)
        if answer is None:
            raise
        return answer


def settle(exchange: Exchange, response: Response, *, whole: bool = True) -> Verdict:
    """Record the answer; once more, if a signal handler raises meanwhile."""
    step = functools.partial(exchange.settle, response, whole=whole)
    try:
        return drive(step())
    except BaseException:
        finish(step)
        raise


def failed(exchange: Exchange, error: BaseException) -> None:
    """Free the key while `error` is on its way out."""
    finish(functools.partial(exchange.abandon, error))


def _request(environ: Environ) -> Request:
    names = {name: name[5:] for name in environ if name.startswith("HTTP_")}
    names |= {name: name for name in ("CONTENT_TYPE", "CONTENT_LENGTH") if environ.get(name)}
    raw = [
        (field.replace("_", "-").encode("latin-1"), str(environ[name]).encode("latin-1"))
        for name, field in names.items()
    ]
    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
    return Request(
        environ["REQUEST_METHOD"],
        path.encode("latin-1").decode("utf-8", "surrogateescape"),
        environ.get("QUERY_STRING", ""),
        Headers(raw),
        environ,
    )


def _body(environ: Environ, request: Request, rules: Rules) -> bytes:
    """The request's body. Raises Refused for one over the cap, and for one that ends before its length."""
    length, source = rules.length_of(request), environ["wsgi.input"]
    if length is None and not environ.get("wsgi.input_terminated"):
        return b""  # as WSGI says: without a length there is no body
    wanted = rules.max_body + 1 if length is None else length
    parts: list[bytes] = []
    while wanted > 0:
        part = source.read(min(wanted, 1 << 16))
        if not part:
            break
        parts.append(part)
        wanted -= len(part)
    if length is None and wanted <= 0:
        raise Refused(rules.problem("body-too-large"))
    if length is not None and wanted > 0:
        raise Refused(Response(400, [(b"content-length", b"0")]))  # its client has gone
    return b"".join(parts)


def _answer(start_response: StartResponse, response: Response) -> list[bytes]:
    start_response(_status_line(response.status), _lines(response.headers))
    return [response.body] if response.body else []


def _status_line(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} Unknown"


def _lines(headers: RawHeaders) -> Lines:
    return [(name.decode("latin-1").title(), value.decode("latin-1")) for name, value in headers]


class _Taken:
    """What the application answers, held back until it is recorded.

    A stream (an answer in parts whose length is not said) and what is larger than `max_response` is passed on as it
    comes, and recorded as done when it ends.
    """

    def __init__(self, exchange: Exchange, start_response: StartResponse) -> None:
        self._exchange = exchange
        self._running = exchange.running()
        self._start_response = start_response
        self._status = ""
        self._headers: Lines = []
        self._parts: list[bytes] = []
        self._streams = False
        self._close: Callable[[], object] | None = None

    def run(self, app: App, environ: Environ) -> Iterable[bytes]:
        """Call the application; what the server is to send."""
        running = self._running
        try:
            environ[_SEEN] = True
            with running.part():
                found = app(environ, self._start)
                self._close = getattr(found, "close", None)
                rest = self._collect(found)
            self._check()
            return self._whole() if rest is None else self._stream(rest)
        except BaseException as error:  # of the application, or of the server that refuses its headers
            running.end(raised=True)
            if self._exchange.open:
                failed(self._exchange, error)
            if self._close is not None:
                self._close()
            raise
        finally:
            environ.pop(_SEEN, None)  # whoever is further out may send the request once more, to be served again

    def _whole(self) -> Iterable[bytes]:
        self._running.end(raised=False)
        response = self._response()
        verdict = settle(self._exchange, response)
        if verdict.instead is not None:
            response = verdict.instead
            self._start_response(_status_line(response.status), _lines(response.headers))
        else:  # with its own reason phrase and spelling
            self._start_response(self._status, self._headers + _lines(verdict.extra))
        return _Body(iter([response.body] if response.body else []), self._close)

    def _check(self) -> None:
        if not self._status:
            raise RuntimeError("the application has not called start_response")

    def _start(self, status: str, headers: Lines, exc_info: Any = None) -> Callable[[bytes], object]:
        if self._streams:  # the server raises what went wrong, for the status has been sent
            self._start_response(status, list(headers), exc_info)
        self._status, self._headers = status, list(headers)
        return self._parts.append

    @property
    def _code(self) -> int:
        return int(self._status[:3])

    def _response(self) -> Response:
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers]
        return Response(self._code, raw, b"".join(self._parts))

    def _collect(self, found: Iterable[bytes]) -> Iterator[bytes] | None:
        """Take the parts of the answer; the rest of it, if it is a stream or too much."""
        limit = self._exchange.service.rules.max_response
        is_counted = hasattr(found, "__len__")
        rest = iter(found)
        for part in rest:
            self._check()
            self._parts.append(part)
            length = Headers(self._response().headers).get("content-length")
            known = is_counted or self._code in BODILESS if length is None else length.isdecimal()
            if not known or sum(map(len, self._parts)) > limit or int(length or 0) > limit:
                return rest
        return None if sum(map(len, self._parts)) <= limit else rest

    def _stream(self, rest: Iterator[bytes]) -> Iterable[bytes]:
        headers = list(self._headers)
        if self._exchange.service.rules.kept_for(self._code) is not None:
            headers += _lines([NOT_STORED])
        self._start_response(self._status, headers)
        self._streams = True
        return _Stream(self._exchange, self._running, Response(self._code), self._parts, rest, self._close)


class _Body:
    """The parts of an answer, and the application's own `close`, which comes after they were sent."""

    def __init__(self, parts: Iterator[bytes], close: Callable[[], object] | None) -> None:
        self._parts = parts
        self._close = close

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._parts)

    def close(self) -> None:
        """As WSGI says: called by the server when it is through, or the client has gone."""
        if self._close is not None:
            self._close()


class _Stream(_Body):
    """A stream: what was taken of it, then the rest; recorded as done when it ends or the client leaves."""

    def __init__(
        self,
        exchange: Exchange,
        running: Running,
        response: Response,
        taken: list[bytes],
        rest: Iterator[bytes],
        close: Callable[[], object] | None,
    ) -> None:
        super().__init__(rest, close)
        self._exchange = exchange
        self._running = running
        self._response = response
        self._taken = taken

    def __next__(self) -> bytes:
        if self._taken:
            return self._taken.pop(0)
        try:
            with self._running.part():
                part = next(self._parts)
        except StopIteration:
            if self._taken:
                return self._taken.pop(0)
            self._end()
            raise
        except BaseException as error:
            self._running.end(raised=True)
            if self._exchange.open:
                failed(self._exchange, error)
            raise
        self._taken.append(part)  # behind what went through `write` meanwhile
        return self._taken.pop(0)

    def _end(self) -> None:
        self._running.end(raised=False)
        if self._exchange.open:
            settle(self._exchange, self._response, whole=False)

    def close(self) -> None:
        try:
            with self._running.part():
                super().close()
        finally:
            self._end()
