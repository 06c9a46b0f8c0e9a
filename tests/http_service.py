"""The applications that real servers run in the tests: `uvicorn http_service:payments`, `gunicorn http_service:flask_app`.

What they do is told by the environment: IDEMPOTENT_TEST_BACKEND, the URL of the records; IDEMPOTENT_TEST_LEDGER, an
SQLite file with the effects; IDEMPOTENT_TEST_LEASE, the seconds after which a dead worker's request may be taken over.
"""

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import flask
import sqlalchemy as sa
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.background import BackgroundTask

from idempotent import current_call, idempotent
from idempotent.http import Response
from idempotent.http.asgi import IdempotencyMiddleware, route_class
from idempotent.http.wsgi import IdempotencyMiddleware as WSGIMiddleware

BACKEND = os.environ["IDEMPOTENT_TEST_BACKEND"]
LEDGER = os.environ["IDEMPOTENT_TEST_LEDGER"]
LEASE = float(os.environ.get("IDEMPOTENT_TEST_LEASE", "30"))
EFFECTS = "CREATE TABLE IF NOT EXISTS effects (number INTEGER PRIMARY KEY, text TEXT)"
ACCOUNTS = {"token-alice": "alice", "token-bob": "bob"}


def write(text: str) -> int:
    """One effect in the ledger, and its number."""
    with contextlib.closing(sqlite3.connect(LEDGER, timeout=30)) as ledger, ledger:
        ledger.execute(EFFECTS)
        return ledger.execute("INSERT INTO effects (text) VALUES (?)", (text,)).lastrowid or 0


class Worker:
    """Outside of everything: says in each answer which process gave it."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def told(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-worker", b"%d" % os.getpid())]}
            await send(message)

        await self._app(scope, receive, told)


# The payment service: account by token, then the key, then the payment. A request is taken over when its worker has
# died, so it may run twice; the ledger's own record, which commits with the entry, is why it is charged once.


class Payment(BaseModel):
    order: str = Field(min_length=1, max_length=50)
    cents: int = Field(gt=0, le=1_000_000)


class Receipt(BaseModel):
    number: int
    order: str
    cents: int
    provider_key: str


def account(request: Request, authorization: Annotated[str, Header()] = "") -> str:
    found = ACCOUNTS.get(authorization)
    if found is None:
        raise HTTPException(401, "who is it?")
    request.state.account = found
    return found


def account_of(request: Any) -> str:
    found: str = request.native["state"]["account"]
    return found


router = APIRouter(
    route_class=route_class(
        scope=account_of, backend=BACKEND, required=True, wait=30, lease=LEASE, docs_url="/docs#keys"
    ),
    responses={
        400: {"content": {"application/json": {}}},  # FastAPI's own, for a body that is no text
        401: {"description": "Not authenticated"},
        402: {"description": "Declined"},
    },
)


ledger = create_async_engine(f"sqlite+aiosqlite:///{LEDGER}", connect_args={"timeout": 30})


@idempotent(within="session", key="{payment}", namespace="ledger")
async def enter(session: AsyncSession, payment: str, text: str) -> int:
    await session.execute(sa.text(EFFECTS))
    entry = await session.execute(sa.text("INSERT INTO effects (text) VALUES (:text) RETURNING number"), {"text": text})
    return int(entry.scalar_one())


@router.post("/payments", status_code=201)
async def pay(payment: Payment, who: Annotated[str, Depends(account)]) -> Receipt:
    call = current_call()
    assert call is not None
    if payment.order == "declined":
        raise HTTPException(402, "declined")
    await asyncio.sleep(0.05)
    async with AsyncSession(ledger) as session, session.begin():
        entered = await enter.outcome(session, call.downstream_key("ledger"), f"{who} {payment.order}")
    if payment.order == "crash" and not entered.replayed:
        await asyncio.Event().wait()  # to be killed here: it is charged, and nobody was told
    return Receipt(
        number=entered.value, order=payment.order, cents=payment.cents, provider_key=call.downstream_key("provider")
    )


payments = FastAPI()
payments.include_router(router)
payments.add_middleware(Worker)


# What the tests of servers need: answers of every kind behind the middleware for whole applications.

asgi_app = FastAPI()


@asgi_app.post("/echo")
async def echo(request: Request) -> Any:
    body = await request.body()
    return PlainTextResponse(f"{write('echo')} {len(body)}")


@asgi_app.post("/slow")
async def slow() -> Any:
    number = write("slow begins")
    await asyncio.sleep(1)
    write("slow ends")
    return PlainTextResponse(str(number))


@asgi_app.post("/stream")
async def stream() -> Any:
    async def parts() -> AsyncIterator[bytes]:
        for part in range(3):
            yield b"part %d " % part

    write("stream")
    return StreamingResponse(parts())


@asgi_app.post("/empty", status_code=204)
async def empty() -> None:
    write("empty")


@asgi_app.post("/background")
async def background() -> Any:
    return PlainTextResponse(str(write("background")), background=BackgroundTask(write, "afterwards"))


@asgi_app.post("/fail")
async def fail() -> Any:
    write("fail")
    raise RuntimeError("the application failed")


asgi_app.add_middleware(
    IdempotencyMiddleware,
    scope=lambda request: request.headers.get("authorization", "nobody"),
    backend=BACKEND,
    lease=LEASE,
    max_body=100_000,
    paths=["!/echo/untouched"],
)


def authenticated(request: Any) -> Any:
    return ACCOUNTS.get(request.headers.get("authorization", "")) or Response(401)


flask_app = flask.Flask(__name__)


@flask_app.post("/echo")
def flask_echo() -> Any:
    return f"{write('echo')} {len(flask.request.get_data())}"


@flask_app.post("/slow")
def flask_slow() -> Any:
    number = write("slow begins")
    time.sleep(1)
    write("slow ends")
    return str(number)


@flask_app.post("/stream")
def flask_stream() -> Any:
    write("stream")
    return flask.Response(iter([b"part 0 ", b"part 1 ", b"part 2 "]))


@flask_app.post("/empty")
def flask_empty() -> Any:
    write("empty")
    return "", 204


@flask_app.post("/background")
def flask_background() -> Any:
    response = flask.make_response(str(write("background")))
    response.call_on_close(lambda: write("afterwards"))
    return response


@flask_app.post("/fail")
def flask_fail() -> Any:
    write("fail")
    raise RuntimeError("the application failed")


served = WSGIMiddleware(
    flask_app.wsgi_app,
    scope=lambda request: request.headers.get("authorization", "nobody"),
    backend=BACKEND,
    lease=LEASE,
    max_body=100_000,
)


def flask_worker(environ: Any, start_response: Any) -> Any:
    """Outside of everything: says in each answer which process gave it."""

    def told(status: str, headers: Any, exc_info: Any = None) -> Any:
        return start_response(status, [*headers, ("X-Worker", str(os.getpid()))], exc_info)

    return served(environ, told)


flask_app.wsgi_app = flask_worker  # type: ignore[method-assign]
