"""Never run: what type checkers must see of the HTTP side. A negative case is a line that has to be ignored."""

from datetime import timedelta
from typing import Any, assert_type

import httpx
import requests
from fastapi import APIRouter
from starlette.applications import Starlette
from starlette.middleware import Middleware

from idempotent import Compressed, LocalBackend
from idempotent.http import GLOBAL, Headers, Options, Request, Response, describe
from idempotent.http.asgi import IdempotencyMiddleware, route_class
from idempotent.http.client import (
    AsyncIdempotencyTransport,
    IdempotencyAdapter,
    IdempotencyTransport,
    idempotency_scope,
)
from idempotent.http.django import exempt
from idempotent.http.wsgi import IdempotencyMiddleware as WSGIMiddleware


def account(request: Request) -> str | Response:
    assert_type(request.method, str)
    assert_type(request.headers, Headers)
    assert_type(request.headers.get("authorization"), str | None)
    return request.headers.get("x-account") or Response(401, [(b"www-authenticate", b"Bearer")])


def wrong(request: Request) -> int:
    return 5


app = Starlette(middleware=[Middleware(IdempotencyMiddleware, scope=account, backend="redis://localhost", wait=5)])
app.add_middleware(IdempotencyMiddleware, scope=GLOBAL, ttl=timedelta(days=2), serializer=Compressed())
router = APIRouter(route_class=route_class(scope=account, backend=LocalBackend(), paths=lambda request: True))


def wsgi(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    return []


WSGIMiddleware(wsgi, scope=account, methods=["POST"], keep_headers=["X-Cost"], fingerprint=lambda request, body: body)
options: Options = {"scope": GLOBAL, "required": True}
IdempotencyMiddleware(app, **options)

WSGIMiddleware(wsgi)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
IdempotencyMiddleware(app, scope=wrong)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
IdempotencyMiddleware(app, scope="user")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
route_class(scope=GLOBAL, ttl="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
route_class(scope=GLOBAL, tll=1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

assert_type(describe({}, required=True), dict[str, Any])


@exempt
def view(request: Any, order: int) -> str:
    return "x"


assert_type(view(None, order=5), str)
view(None, order="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

client = httpx.Client(transport=IdempotencyTransport(httpx.HTTPTransport(retries=1), retries=2))
async_client = httpx.AsyncClient(transport=AsyncIdempotencyTransport(backoff=timedelta(seconds=1)))
requests.Session().mount("https://", IdempotencyAdapter(retries=3, pool_maxsize=50))
httpx.Client(transport=AsyncIdempotencyTransport())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
IdempotencyTransport(retries="2")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

with idempotency_scope("order-17") as key:
    assert_type(key, str)
