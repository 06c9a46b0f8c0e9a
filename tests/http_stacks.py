"""One small payment application on every stack that the middleware serves, called as a client would."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import django
import httpx
from django.conf import settings
from django.core.handlers.asgi import ASGIRequest
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import re_path

from idempotent import _config
from idempotent.http.asgi import IdempotencyMiddleware as ASGIMiddleware
from idempotent.http.asgi import route_class
from idempotent.http.wsgi import IdempotencyMiddleware as WSGIMiddleware

MIDDLEWARE = ["idempotent.http.django.IdempotencyMiddleware"]

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DEBUG=False,
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth"],
        LOGGING_CONFIG=None,
        MIDDLEWARE=MIDDLEWARE,
        ROOT_URLCONF="http_stacks",
        SECRET_KEY="for tests",
        USE_TZ=True,
    )
    django.setup()


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    """Names in small letters."""
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.headers if each == name]

    def get(self, name: str) -> str | None:
        return ", ".join(self.all(name)) or None

    @property
    def replayed(self) -> bool:
        return self.get("idempotency-replayed") == "true"

    @property
    def problem(self) -> str | None:
        """The kind of a problem answer of ours."""
        if self.get("content-type") != "application/problem+json":
            return None
        return str(httpx.Response(self.status, content=self.body).json()["type"]).removeprefix("urn:idempotent:")


class Shop:
    """What the application does, whatever the framework."""

    def __init__(self) -> None:
        self.effects: list[str] = []
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.seen: Any = None
        self.hook: Any = None
        """Called by each run."""

    def serve(self, method: str, path: str, query: str, body: bytes) -> tuple[int, list[tuple[str, str]], list[bytes]]:
        """Status, headers, and the body's parts; more than one part is a stream."""
        self.effects.append(path)
        number = len(self.effects)
        word, _, rest = path.removeprefix("/").partition("/")
        if self.hook is not None:
            self.seen = self.hook()
        if word == "status":
            return int(rest), [("content-type", "text/plain")], [b"answer %d" % number]
        if word == "raise":
            raise RuntimeError("the application failed")
        if word == "gate":
            self.entered.release()
            assert self.gate.wait(30)
            if rest:
                return int(rest), [("x-internal", "yes")], [b"late"]
        if word == "stream":
            return 200, [("content-type", "text/plain")], [b"part %d " % number, b"and another"]
        if word == "large":
            return 200, [("content-type", "text/plain")], [b"x" * int(query)]
        if word == "empty":
            return 204, [("location", "/nothing")], [b""]
        if word == "echo":
            return 200, [("content-type", "application/octet-stream")], [body]
        headers = [
            ("content-type", "application/json"),
            ("location", f"/payments/{number}"),
            ("link", "</a>; rel=a"),
            ("link", "</b>; rel=b"),
            ("set-cookie", "session=secret"),
            ("x-internal", "yes"),
            ("x-cost", "7"),
            ("date", "Thu, 01 Jan 1970 00:00:00 GMT"),
        ]
        return 201, headers, [b'{"number": %d}' % number]


class Stack:
    """The application behind the middleware, with `options`."""

    is_async = False
    can_repeat = True
    """A header may come in several lines of one answer."""

    def __init__(self, **options: Any) -> None:
        self.shop = Shop()
        self.client = self._client({"scope": lambda request: request.headers.get("x-user", "alice"), **options})

    def _client(self, options: dict[str, Any]) -> Any:
        raise NotImplementedError

    @property
    def effects(self) -> list[str]:
        return self.shop.effects

    def send(
        self,
        method: str,
        path: str,
        body: bytes | Iterable[bytes] = b"{}",
        *,
        key: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
    ) -> Answer:
        lines = list(headers)
        if not any(name == "content-type" for name, _ in lines):
            lines.append(("content-type", "application/json"))
        if key is not None:
            lines.append(("idempotency-key", key))
        return self._send(method, path, body, lines)

    def post(self, path: str = "/pay", body: bytes | Iterable[bytes] = b"{}", **kwargs: Any) -> Answer:
        return self.send("POST", path, body, **kwargs)

    def start(self, *args: Any, **kwargs: Any) -> "Future[Answer]":
        """`post` in the background."""
        future: Future[Answer] = Future()

        def run() -> None:
            try:
                future.set_result(self.post(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return future

    def _send(self, method: str, path: str, body: Any, headers: list[tuple[str, str]]) -> Answer:
        return self._answer(self.client.request(method, path, content=body, headers=headers))

    @staticmethod
    def _answer(response: httpx.Response) -> Answer:
        headers = [(name.lower(), value) for name, value in response.headers.multi_items()]
        return Answer(response.status_code, headers, response.content)


_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """An event loop on a thread of its own, for all tests of a process."""
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        threading.Thread(target=_loop.run_forever, daemon=True).start()
    return _loop


def on_loop(coroutine: Any, timeout: float = 60) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, loop()).result(timeout)


@contextlib.contextmanager
def closing_backends() -> Iterator[None]:
    """Close afterwards what backends opened on the loop; `close` in the tests' own thread would not."""
    yield
    for backend in list(_config._backends.values()):
        on_loop(backend.aclose())


class AsyncStack(Stack):
    is_async = True

    def _send(self, method: str, path: str, body: Any, headers: list[tuple[str, str]]) -> Answer:
        async def send() -> Answer:
            content = body if isinstance(body, bytes) else _parts(body)
            return self._answer(await self.client.request(method, path, content=content, headers=headers))

        return on_loop(send())

    @staticmethod
    def _over(app: Any) -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://shop")


async def _parts(body: Iterable[bytes]) -> Any:
    for part in body:
        yield part


async def _starlette_answer(shop: Shop, request: Any) -> Any:
    from starlette.responses import Response, StreamingResponse

    body = await request.body()
    status, headers, parts = await asyncio.to_thread(
        shop.serve, request.method, request.url.path, request.url.query, body
    )
    if len(parts) > 1:
        response: Any = StreamingResponse(iter(parts), status)
    else:
        response = Response(parts[0], status)
    response.raw_headers += [(name.encode(), value.encode()) for name, value in headers]
    return response


def _over_wsgi(app: Any, **options: Any) -> httpx.Client:
    def as_wsgi_says(environ: Any, start_response: Any) -> Any:
        # httpx gives the path as text, where WSGI has its bytes as latin-1.
        environ["PATH_INFO"] = environ["PATH_INFO"].encode().decode("latin-1")
        return app(environ, start_response)

    return httpx.Client(transport=httpx.WSGITransport(as_wsgi_says), base_url="http://shop", **options)


class Starlette(AsyncStack):
    def _client(self, options: dict[str, Any]) -> Any:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.routing import Route

        async def endpoint(request: Any) -> Any:
            return await _starlette_answer(self.shop, request)

        methods = ["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE"]
        self.app = Starlette(
            routes=[Route("/{path:path}", endpoint, methods=methods)],
            middleware=[Middleware(ASGIMiddleware, **options)],
        )
        return self._over(self.app)


class FastAPIRoute(AsyncStack):
    def _client(self, options: dict[str, Any]) -> Any:
        from fastapi import APIRouter, FastAPI, Request

        router = APIRouter(route_class=route_class(**options))

        @router.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE"])
        async def endpoint(request: Request) -> Any:
            return await _starlette_answer(self.shop, request)

        self.app = FastAPI(openapi_url=None)
        self.app.include_router(router)
        return self._over(self.app)


class Flask(Stack):
    def _client(self, options: dict[str, Any]) -> Any:
        import flask

        app = self.app = flask.Flask(__name__)

        @app.route("/<path:path>", methods=["GET", "HEAD", "POST", "PATCH", "PUT", "DELETE"])
        def endpoint(path: str) -> Any:
            request = flask.request
            status, headers, parts = self.shop.serve(
                request.method, request.path, request.query_string.decode(), request.get_data()
            )
            body = iter(parts) if len(parts) > 1 else parts[0]
            return flask.Response(body, status, headers)

        app.wsgi_app = WSGIMiddleware(app.wsgi_app, **options)  # type: ignore[method-assign]
        return _over_wsgi(app)


_shops: dict[str, Shop] = {}


def _django_answer(request: Any) -> Any:
    shop = _shops[request.headers["x-shop"]]
    status, headers, parts = shop.serve(
        request.method, request.path, request.META.get("QUERY_STRING", ""), request.body
    )
    if len(parts) > 1:
        is_async = isinstance(request, ASGIRequest)
        response: Any = StreamingHttpResponse(_parts(parts) if is_async else parts, status=status)
    else:
        response = HttpResponse(parts[0], status=status)
    for name, value in headers:
        if name == "set-cookie":
            response.set_cookie("session", "secret")
        else:
            there = response.headers.get(name) if name == "link" else None
            response.headers[name] = f"{there}, {value}" if there else value
    return response


urlpatterns = [re_path(r"^.*$", _django_answer)]


@contextlib.contextmanager
def django_settings(**values: Any) -> Iterator[None]:
    from django.test import override_settings

    with override_settings(**values):
        yield


class Django(Stack):
    can_repeat = False

    def _client(self, options: dict[str, Any]) -> Any:
        from django.core.handlers.wsgi import WSGIHandler

        _shops[name := str(id(self.shop))] = self.shop
        with django_settings(IDEMPOTENCY=options):
            self.app = WSGIHandler()
        return _over_wsgi(self.app, headers={"x-shop": name})


class DjangoAsync(AsyncStack):
    can_repeat = False

    def _client(self, options: dict[str, Any]) -> Any:
        from django.core.handlers.asgi import ASGIHandler

        _shops[name := str(id(self.shop))] = self.shop
        with django_settings(IDEMPOTENCY=options):
            self.app = ASGIHandler()
        client = self._over(self.app)
        client.headers["x-shop"] = name
        return client


STACKS = [Starlette, FastAPIRoute, Flask, Django, DjangoAsync]
