"""`Idempotency-Key` for Django, sync and async: `idempotent.http.django.IdempotencyMiddleware` in `MIDDLEWARE`.

It claims the key in `process_view`, that is after the `process_view` of all middleware that is listed above it: list it
below those that authenticate, and a replay has passed them like any other request. Options are in `settings.IDEMPOTENCY`,
a dict of `idempotent.http.Options`; its callables may be dotted paths.
"""

import functools
import io
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse
from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string

import idempotent.http._tasks as _tasks
import idempotent.http.wsgi as wsgi
from idempotent._drive import SYNC
from idempotent._run import Running
from idempotent.http._exchange import Exchange, Service, Verdict
from idempotent.http._rules import Headers, Options, Refused, Request, Response

__all__ = ["IdempotencyMiddleware", "exempt"]

P = ParamSpec("P")
R = TypeVar("R")

_EXEMPT = "idempotency_exempt"
_STATE = "_idempotent_http"


def exempt(view: Callable[P, R]) -> Callable[P, R]:
    """A twin of the view that is left alone, whatever `paths` says."""
    function: Any = view

    async def async_twin(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    def sync_twin(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    twin: Any = functools.wraps(function)(async_twin if iscoroutinefunction(view) else sync_twin)
    setattr(twin, _EXEMPT, True)
    return cast("Callable[P, R]", twin)


class _State:
    """What the middleware knows of one request."""

    def __init__(self, service: Service) -> None:
        self.service = service
        """Whose middleware serves the request; one that is listed again further down leaves it alone."""
        self.refusal: Exception | None = None
        """What to raise if the request turns out to be served, because its body is not to be had."""
        self.exchange: Exchange | None = None
        self.running: Running | None = None


class IdempotencyMiddleware:
    """Serve requests that carry a key once, and replay the answer to their duplicates.

    Raises:
        ImproperlyConfigured: `settings.IDEMPOTENCY` is missing, or an option in it is wrong; the message names it.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        self._is_async = iscoroutinefunction(get_response)
        driver: Any = _tasks.ASYNC if self._is_async else SYNC
        try:
            self._service = Service(driver, self._options(), is_async=self._is_async)
        except (TypeError, ValueError, ImportError) as error:
            raise ImproperlyConfigured(f"settings.IDEMPOTENCY: {error}") from error
        self.process_view: Callable[..., Any] = self._aclaim if self._is_async else self._claim
        if self._is_async:
            markcoroutinefunction(self)

    @staticmethod
    def _options() -> Options:
        given = dict(getattr(settings, "IDEMPOTENCY", None) or {})
        for name in ("scope", "paths", "fingerprint", "on_crash"):
            if isinstance(given.get(name), str) and "." in given[name]:
                given[name] = import_string(given[name])
        return cast("Options", given)

    def __call__(self, request: HttpRequest) -> Any:
        """Answer one request."""
        if not self._may_serve(request):
            return self.get_response(request)
        if self._is_async:
            # Django cancels a view whose client has gone; with a key it runs on, and its answer is kept.
            return _tasks.uninterrupted(self._aanswer(request))
        state = self._prepared(request)
        try:
            try:
                response = self.get_response(request)
            finally:
                _over(state)
            exchange = _open(state)
            if exchange is None:
                return response
            found, whole = self._found(response)
            return _given(response, wsgi.settle(exchange, found, whole=whole))
        except BaseException as error:
            exchange = _open(state)
            if exchange is not None:
                wsgi.failed(exchange, error)
            raise

    async def _aanswer(self, request: HttpRequest) -> Any:
        state = self._prepared(request)
        try:
            try:
                response = await self.get_response(request)
            finally:
                _over(state)
            exchange = _open(state)
            if exchange is None:
                return response
            found, whole = self._found(response)
            return _given(response, await _tasks.settle(exchange, found, whole=whole))
        except BaseException as error:
            exchange = _open(state)
            if exchange is not None:
                await _tasks.failed(exchange, error)
            raise

    def _may_serve(self, request: HttpRequest) -> bool:
        rules = self._service.rules
        is_keyed = rules.required or rules.header in request.headers
        return is_keyed and request.method in rules.methods and not hasattr(request, _STATE)

    def _prepared(self, request: HttpRequest) -> _State:
        """Have the body at hand before any `process_view` (that of CSRF) reads it as a stream."""
        state = _State(self._service)
        setattr(request, _STATE, state)
        stream: Any = request
        rules = self._service.rules
        if hasattr(request, "_body"):
            return state
        try:
            length = rules.length_of(_view(request))
        except Refused as refused:
            state.refusal = refused
            return state
        if length != 0 and getattr(request, "_read_started", False):  # by `request.POST` of an upload, which keeps none
            state.refusal = ImproperlyConfigured(
                "what is listed above IdempotencyMiddleware has read the request's body as a stream; list it below"
            )
            return state
        allowed = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        is_upload = (request.content_type or "").startswith("multipart/")  # Django has other limits for these
        if allowed is not None and length is not None and length > allowed and not is_upload:
            return state  # Django refuses it, as without a key, to whoever asks for the body
        body = request.read(rules.max_body + 1)
        if len(body) > rules.max_body:
            # Only the async handler knows no length, and its stream is a file.
            stream._stream.seek(0)
            stream._read_started = False
            state.refusal = Refused(rules.problem("body-too-large"))
        elif length is not None and len(body) < length:
            state.refusal = Refused(Response(400))  # its client has gone
        else:
            stream._body = body
            stream._stream = io.BytesIO(body)
        return state

    def _exchange(self, request: HttpRequest, view: Any) -> Exchange | None:
        """The request with its key and body; None: it is none of ours. Raises Refused, ImproperlyConfigured."""
        state: _State | None = getattr(request, _STATE, None)
        if state is None or state.service is not self._service or getattr(view, _EXEMPT, False):
            return None
        seen = _view(request)
        key = self._service.key_of(seen)
        if key is None:
            return None
        if state.refusal is not None:
            raise state.refusal
        if len(request.body) > self._service.rules.max_body:
            raise Refused(self._service.rules.problem("body-too-large"))
        state.exchange = Exchange(self._service, seen, key, request.body)
        return state.exchange

    def _claim(self, request: HttpRequest, view: Any, *_: Any) -> HttpResponse | None:
        try:
            exchange = self._exchange(request, view)
        except Refused as refused:
            return _Answer(refused.answer)
        if exchange is None:
            return None
        answer = wsgi.begin(exchange)
        if answer is not None:
            return _Answer(answer)
        _enter(request, exchange)
        return None

    async def _aclaim(self, request: HttpRequest, view: Any, *_: Any) -> HttpResponse | None:
        try:
            exchange = self._exchange(request, view)
        except Refused as refused:
            return _Answer(refused.answer)
        if exchange is None:
            return None
        answer = await _tasks.begin(exchange)
        if answer is not None:
            return _Answer(answer)
        _enter(request, exchange)
        return None

    def _found(self, response: HttpResponseBase) -> tuple[Response, bool]:
        """What the application answered, and whether all of it is at hand."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers.items()]
        body = b"" if response.streaming else cast("HttpResponse", response).content
        whole = not response.streaming and len(body) <= self._service.rules.max_response
        return Response(response.status_code, headers, body), whole


def _view(request: HttpRequest) -> Request:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in request.headers.items()]
    return Request(request.method or "", request.path, request.META.get("QUERY_STRING", ""), Headers(raw), request)


def _open(state: _State) -> Exchange | None:
    return state.exchange if state.exchange is not None and state.exchange.open else None


def _enter(request: HttpRequest, exchange: Exchange) -> None:
    state: _State = getattr(request, _STATE)
    state.running = exchange.running()
    state.running.__enter__()


def _over(state: _State) -> None:
    if state.running is not None:
        state.running.__exit__(None, None, None)


class _Answer(HttpResponse):
    """An answer of ours: Django's own keeps one line for each field, and two cookies are not to be joined."""

    def __init__(self, answer: Response) -> None:
        super().__init__(answer.body, status=answer.status)
        del self.headers["Content-Type"]
        self._more: list[tuple[str, str]] = []
        for raw, value in answer.headers:
            name = raw.decode("latin-1").title()
            if name in self.headers:
                self._more.append((name, value.decode("latin-1")))
            else:
                self.headers[name] = value.decode("latin-1")

    def items(self) -> Any:
        """The lines that Django's handlers send."""
        return [*self.headers.items(), *(line for line in self._more if line[0] in self.headers)]


def _given(response: HttpResponseBase, verdict: Verdict) -> HttpResponseBase:
    """What the client is to get: the application's own response, but for a run that another has overtaken."""
    if verdict.instead is not None:
        return _Answer(verdict.instead)
    for name, value in verdict.extra:
        response.headers[name.decode().title()] = value.decode()
    return response
