"""`Idempotency-Key` for ASGI: FastAPI, Starlette, Litestar, Quart and any other application.

The middleware belongs inside what authenticates: a replay then passes authentication again, like any other request.
"""

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Unpack

import idempotent.http._tasks as _tasks
from idempotent.http._exchange import Exchange, NotKept, Service
from idempotent.http._rules import (
    BODILESS,
    NOT_STORED,
    Headers,
    Options,
    Refused,
    Request,
    Response,
    is_async,
    operation,
)

if TYPE_CHECKING:
    from fastapi.routing import APIRoute

__all__ = ["IdempotencyMiddleware", "route_class"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SEEN = "idempotent.http"
"""Marks a scope that is being served: a second middleware further in leaves it alone."""

_CLAIMING = "__idempotent_http__"
"""Marks an endpoint that is wrapped: routers that are included make its route anew."""
_HIDDEN = frozenset(
    ("http.response.pathsend", "http.response.zerocopysend", "http.response.trailers", "http.response.push")
)
"""Extensions by which an answer would pass the middleware by."""


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
        self._service = Service(_tasks.ASYNC, options, is_async=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI says; websockets and lifespan are left alone."""
        if scope["type"] != "http" or _SEEN in scope:
            await self.app(scope, receive, send)
            return
        try:
            exchange = await _exchange(self._service, scope, receive)
        except Refused as refused:
            await _answer(send, refused.answer)
            return
        except _Gone:
            return
        if exchange is None:
            await self.app(scope, receive, send)
            return
        answer = await _tasks.begin(exchange)
        if answer is not None:
            await _answer(send, answer)
            return
        await _tasks.uninterrupted(_run(self.app, exchange, scope, receive, send))


class _Gone(Exception):
    """The client left before it had sent its request."""


async def _exchange(service: Service, scope: Scope, receive: Receive) -> Exchange | None:
    """The request with its key and body; None: it is none of ours. Raises Refused, _Gone."""
    if scope["method"] not in service.rules.methods:
        return None
    query = scope.get("query_string", b"").decode("latin-1")
    scope["headers"] = list(scope["headers"])  # any iterable, as ASGI says, and it may give them only once
    request = Request(scope["method"], _path(scope), query, Headers(scope["headers"]), scope)
    key = service.key_of(request)
    if key is None:
        return None
    service.rules.length_of(request)
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise _Gone
        part = message.get("body", b"")
        size += len(part)
        if size > service.rules.max_body:
            raise Refused(service.rules.problem("body-too-large"))
        if part:
            parts.append(part)
        more = message.get("more_body", False)
    return Exchange(service, request, key, b"".join(parts))


def _path(scope: Scope) -> str:
    """The whole path: as ASGI says it has `root_path` in front, which some who mount applications take off."""
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    return path if path == root or path.startswith(root + "/") else root + path


async def _answer(send: Send, response: Response) -> None:
    await send({"type": "http.response.start", "status": response.status, "headers": response.headers})
    await send({"type": "http.response.body", "body": response.body})


async def _run(app: App, exchange: Exchange, scope: Scope, receive: Receive, send: Send) -> None:
    """Have the application answer, and record the answer as soon as it is whole: background tasks come after it."""
    # In place: who is further out reads here which route it was.
    scope[_SEEN] = True
    extensions = scope.get("extensions")
    if extensions:
        scope["extensions"] = {name: value for name, value in extensions.items() if name not in _HIDDEN}
    taken = _Taken(exchange, receive, send)
    try:
        if exchange.open:
            with exchange.running():
                await app(scope, taken.receive, taken.send)
        else:
            await app(scope, taken.receive, taken.send)
        await taken.returned()
    except BaseException as error:
        await taken.raised(error)
        raise
    finally:
        taken.over.set()
        scope.pop(_SEEN, None)  # whoever is further out may send the request once more, to be served again


class _Taken:
    """What the application receives and sends: the whole request, and an answer that is held back until it is recorded.

    A stream (an answer in parts whose length is not said) and what is larger than `max_response` is passed on as it
    comes, and recorded as done before its last part is. Where the headers tell it, they go out at once.
    """

    def __init__(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        self._exchange = exchange
        self._receive = receive
        self._send = send
        self._unread = True
        self._start: Message | None = None
        self._parts: list[bytes] = []
        self._size = 0
        self._streams = False
        self._gone = False
        """The client is, in the midst of a stream."""
        self.over = asyncio.Event()
        """There is nothing left to wait for: the answer is whole, or is a stream."""

    async def receive(self) -> Message:
        """The request's body at once. A client that leaves is not told of: the run goes on and its answer is kept."""
        if self._unread:
            self._unread = False
            return {"type": "http.request", "body": self._exchange.body, "more_body": False}
        await self.over.wait()
        return await self._receive() if self._streams else {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take what belongs to the answer; anything else is passed on."""
        kind = message["type"]
        if not self._exchange.open or kind not in ("http.response.start", "http.response.body"):
            await self._send(message)
        elif self._streams:
            await self._stream(message)
        elif kind == "http.response.start":
            # Any iterable, as ASGI says, and it may give them only once.
            self._start = {**message, "headers": list(message.get("headers", ()))}
            if self._is_never_kept(self._start):
                await self._begin_to_stream(self._start)
        elif self._start is not None:
            more = message.get("more_body", False)
            part = bytes(message.get("body", b""))
            self._parts.append(part)
            self._size += len(part)
            if self._is_too_much(self._start, more=more):
                await self._begin_to_stream(self._start)
                await self._stream({"type": "http.response.body", "body": b"".join(self._parts), "more_body": more})
                self._parts.clear()
            elif not more:
                await self._finish(self._start)

    def _is_never_kept(self, start: Message) -> bool:
        """Whether the headers say that the answer is a stream, or too long."""
        headers = Headers(start["headers"])
        length = headers.get("content-length", "0")
        return (
            headers.get("content-type", "").lower().startswith("text/event-stream")
            or not length.isdecimal()
            or int(length) > self._exchange.service.rules.max_response
        )

    def _is_too_much(self, start: Message, *, more: bool) -> bool:
        limit = self._exchange.service.rules.max_response
        if self._size > limit:
            return True
        return more and start["status"] not in BODILESS and "content-length" not in Headers(start["headers"])

    async def _begin_to_stream(self, start: Message) -> None:
        self._streams = True
        self.over.set()
        headers = list(start.get("headers", ()))
        if self._exchange.service.rules.kept_for(start["status"]) is not None:
            headers.append(NOT_STORED)
        await self._pass_on({**start, "headers": headers})

    async def _stream(self, message: Message) -> None:
        if self._start is not None and message["type"] == "http.response.body" and not message.get("more_body", False):
            # First: whoever has the whole answer may ask again at once, and is not to be told that it still runs.
            await _tasks.settle(self._exchange, Response(self._start["status"]), whole=False)
        await self._pass_on(message)

    async def _pass_on(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError:  # as ASGI says of a client that is gone
            self._gone = True
            raise

    async def _finish(self, start: Message) -> None:
        headers = [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]
        response = Response(start["status"], headers, b"".join(self._parts))
        verdict = await _tasks.settle(self._exchange, response)
        self.over.set()
        answer = verdict.instead or response
        await self._send({**start, "status": answer.status, "headers": [*answer.headers, *verdict.extra]})
        await self._send({"type": "http.response.body", "body": answer.body})

    async def returned(self) -> None:
        """The application has returned: a stream is over; an answer that is not whole is none."""
        if not self._exchange.open:
            return
        if self._streams and self._start is not None:
            await _tasks.settle(self._exchange, Response(self._start["status"]), whole=False)
            return
        await _tasks.failed(self._exchange, NotKept("no answer"))
        if self._start is not None:
            await self._send(self._start)
            await self._send({"type": "http.response.body", "body": b"".join(self._parts), "more_body": True})

    async def raised(self, error: BaseException) -> None:
        """The application has raised: the key is free, unless all that failed was to reach the client."""
        if not self._exchange.open:
            return
        if self._gone and isinstance(error, Exception):
            await self.returned()
        else:
            await _tasks.failed(self._exchange, error)


_pending: ContextVar[Exchange | None] = ContextVar("idempotent_http_exchange", default=None)


def route_class(**options: Unpack[Options]) -> "type[APIRoute]":
    """A route class for a FastAPI router: `APIRouter(route_class=route_class(scope=...))`.

    Its routes claim the key when their dependencies have run, those that authenticate among them, and the body has been
    validated: a request that fails there is never recorded, and a replay has passed there again. What the dependencies
    put on `request.state` is in `request.native["state"]` for `scope`. OpenAPI shows the header and the problem answers.

    Args:
        options: see `idempotent.http.Options`; `scope` is required.

    Raises:
        TypeError, ValueError: an option is wrong; at a route: its endpoint is a generator, which cannot be replayed.
    """
    from fastapi.routing import APIRoute

    service = Service(_tasks.ASYNC, options, is_async=True)
    rules = service.rules

    class IdempotentRoute(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **kwargs: Any) -> None:
            methods = {method.upper() for method in kwargs.get("methods") or ("GET",)}
            wraps = methods & rules.methods and not hasattr(endpoint, _CLAIMING)
            super().__init__(path, _claiming(endpoint) if wraps else endpoint, **kwargs)
            if wraps:
                extra = operation(
                    header=rules.header,
                    required=rules.required and methods <= rules.methods,  # FastAPI shows it at each of them
                    ttl=rules.ttl,
                    error_ttl=rules.error_ttl,
                )
                self.openapi_extra = _merged(self.openapi_extra or {}, extra, _headers_of(self.dependant))

        async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
            if _SEEN in scope:
                await super().handle(scope, receive, send)
                return
            try:
                exchange = await _exchange(service, scope, receive)
            except Refused as refused:
                await _answer(send, refused.answer)
                return
            except _Gone:
                return
            # The endpoint runs in this context, and finds there what it is to claim.
            pending = _pending.set(exchange)
            try:
                if exchange is None:
                    await super().handle(scope, receive, send)
                else:
                    await _tasks.uninterrupted(_run(super().handle, exchange, scope, receive, send))
            finally:
                _pending.reset(pending)

    return IdempotentRoute


def _claiming(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The endpoint, which claims the key of the request that it is called for before it runs."""
    if inspect.isgeneratorfunction(endpoint) or inspect.isasyncgenfunction(endpoint):
        raise TypeError(
            f"{endpoint.__qualname__} is a generator, whose stream cannot be replayed; put it on a router without this"
            " route class"
        )
    awaits = is_async(endpoint)

    @functools.wraps(endpoint)
    async def claiming(*args: Any, **kwargs: Any) -> Any:
        exchange = _pending.get()
        if exchange is None:
            return await _called(endpoint, awaits, args, kwargs)
        answer = await _tasks.begin(exchange)
        if answer is not None:
            return _as_starlette(answer)
        with exchange.running():
            return await _called(endpoint, awaits, args, kwargs)

    # FastAPI may look names in annotations up in this module. One that does not resolve is its to refuse, or to ignore.
    wrapper: Any = claiming
    with contextlib.suppress(Exception):
        wrapper.__signature__ = inspect.signature(endpoint, eval_str=True)
    setattr(wrapper, _CLAIMING, True)
    return claiming


async def _called(endpoint: Callable[..., Any], awaits: bool, args: Any, kwargs: Any) -> Any:
    if awaits:
        return await endpoint(*args, **kwargs)
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(endpoint, *args, **kwargs)


def _as_starlette(answer: Response) -> Any:
    from starlette.background import BackgroundTasks
    from starlette.responses import Response as StarletteResponse

    # With none of its own, FastAPI would run those that dependencies have added.
    response = StarletteResponse(answer.body, answer.status, background=BackgroundTasks())
    response.raw_headers = list(answer.headers)
    return response


def _headers_of(dependant: Any) -> set[str]:
    """The headers that an endpoint or one of its dependencies declares, in lower case."""
    own = {field.alias.lower() for field in dependant.header_params}
    return own.union(*map(_headers_of, dependant.dependencies))


def _merged(given: dict[str, Any], extra: dict[str, Any], declared: set[str]) -> dict[str, Any]:
    """The operation's own OpenAPI, which wins, and what the middleware adds to it but for headers that are `declared`."""
    parameters = given.get("parameters", ())
    declared = declared | {str(each.get("name", "")).lower() for each in parameters}
    return {
        **given,
        "parameters": [*parameters, *(each for each in extra["parameters"] if each["name"].lower() not in declared)],
        "responses": {**extra["responses"], **given.get("responses", {})},
    }
