"""What the middleware costs: the same Starlette application bare and behind it, request by request in one run.

python -m benchmarks.http [--redis URL] [--seconds N] [--json]

How to read it. The handler does one GET on Redis and answers 201 with a small JSON object. Four kinds of request take
turns in short rounds, so that what the machine does meanwhile hits all of them; ratios to the bare application are taken
within a round, and their median and quartiles are shown. Ratios carry from one machine to another, times do not.

- bare: the application without the middleware; the request has a key, which nobody reads.
- no key: behind the middleware, without a key, so that it is left alone.
- first: behind it, with a fresh key: claim, handler, outcome.
- replay: behind it, with a key that is known: one round trip to Redis, and the handler does not run.

"over a socket" is what a client sees: uvicorn in a process of its own, one keep-alive connection, from the first byte of
the request to the last of the answer. "in process" leaves out the server: ASGI messages to the
application and back. With server, application and Redis on one CPU where that can be had, which leaves out what waking
another CPU costs.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
import redis.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from benchmarks._report import Target, machine, met_or_missed, quantile, ratio_text, say, table
from benchmarks._server import Server, redis_server
from idempotent.http.asgi import IdempotencyMiddleware

BODY = b'{"order": "o-1", "cents": 500}'
KINDS = ("bare", "no key", "first", "replay")
_BATCH = 25
"""Requests of one kind in a round."""

Send = Callable[[str, str | None], None]
"""Sends one request to "bare" or "served", with a key or none, and takes the whole answer."""


def _applications(url: str) -> dict[str, Any]:
    client = redis.asyncio.Redis.from_url(url)

    async def pay(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"balance": (await client.get("balance") or b"").decode()}, 201)

    bare = Starlette(routes=[Route("/payments", pay, methods=["POST"])])
    return {
        "bare": bare,
        "served": IdempotencyMiddleware(bare, scope=lambda request: request.headers["x-account"], backend=url),
    }


def _key(kind: str) -> str | None:
    return {"bare": "known", "no key": None, "first": uuid.uuid4().hex, "replay": "known"}[kind]


def _rounds(send: Send, seconds: float) -> dict[str, list[float]]:
    """Seconds per request, a value a round, by kind."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for kind in KINDS:  # connections, scripts and caches are warm, and the key is known
        for _ in range(2 * _BATCH):
            send("bare" if kind == "bare" else "served", _key(kind))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for kind in KINDS:
            name = "bare" if kind == "bare" else "served"
            keys = [_key(kind) for _ in range(_BATCH)]
            begun = time.perf_counter()
            for key in keys:
                send(name, key)
            found[kind].append((time.perf_counter() - begun) / _BATCH)
    return found


def in_process(url: str, seconds: float) -> dict[str, list[float]]:
    """ASGI messages to the application and back, on an event loop of this thread."""
    loop = asyncio.new_event_loop()
    applications = _applications(url)
    seen: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": BODY, "more_body": False}

    async def keep(message: Any) -> None:
        seen.append(message)

    def send(name: str, key: str | None) -> None:
        headers = [(b"host", b"shop"), (b"content-type", b"application/json"), (b"x-account", b"alice")]
        headers += [(b"user-agent", b"benchmark"), (b"accept", b"*/*"), (b"content-length", b"%d" % len(BODY))]
        if key is not None:
            headers.append((b"idempotency-key", key.encode()))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/payments",
            "raw_path": b"/payments",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": headers,
        }
        seen.clear()
        loop.run_until_complete(applications[name](scope, receive, keep))
        if seen[0]["status"] != 201:
            raise RuntimeError(f"{name} answered {seen}")

    try:
        return _rounds(send, seconds)
    finally:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def _serve(name: str, url: str, listening: socket.socket, cpus: set[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if cpus:
        os.sched_setaffinity(0, cpus)
    config = uvicorn.Config(_applications(url)[name], log_level="error", access_log=False, timeout_keep_alive=600)
    uvicorn.Server(config).run([listening])


@contextmanager
def _served(url: str, cpus: set[int]) -> Iterator[dict[str, socket.socket]]:
    """Connections to a uvicorn for each application."""
    context = multiprocessing.get_context("spawn")
    processes, connections = [], {}
    try:
        for name in ("bare", "served"):
            # Its protocol named, as asyncio sets TCP_NODELAY only where it is.
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
                listening.bind(("127.0.0.1", 0))
                listening.listen()
                process = context.Process(target=_serve, args=(name, url, listening, cpus), daemon=True)
                process.start()
                processes.append(process)
                address = listening.getsockname()
                connections[name] = socket.create_connection(address)
            connections[name].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connections
    finally:
        for connection in connections.values():
            connection.close()
        for process in processes:
            process.terminate()
            process.join(10)


def over_a_socket(url: str, seconds: float, cpus: set[int]) -> dict[str, list[float]]:
    """What a client sees, on one keep-alive connection to each server."""
    with _served(url, cpus) as connections:

        def send(name: str, key: str | None) -> None:
            lines = ["POST /payments HTTP/1.1", "host: shop", "content-type: application/json", "x-account: alice"]
            lines += ["user-agent: benchmark", "accept: */*", f"content-length: {len(BODY)}"]
            if key is not None:
                lines.append(f"idempotency-key: {key}")
            connection = connections[name]
            connection.sendall("\r\n".join((*lines, "", "")).encode() + BODY)
            answer = b""
            while not answer.endswith(b"}"):
                part = connection.recv(65_536)
                if not part:
                    raise RuntimeError(f"{name} hung up after {answer!r}")
                answer += part
            if not answer.startswith(b"HTTP/1.1 201"):
                raise RuntimeError(f"{name} answered {answer!r}")

        return _rounds(send, seconds)


def measure(server: Server, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Both ways, pinned to one CPU where that can be had."""
    can_pin = server.pid is not None and hasattr(os, "sched_setaffinity")
    every = os.sched_getaffinity(0) if can_pin else set()
    one = {min(every)} if can_pin else set()
    with redis.Redis.from_url(server.url) as client:
        client.set("balance", "100")
    try:
        if can_pin:
            os.sched_setaffinity(0, one)
            server.pin(one)
        say("over a socket ...")
        found = {"over a socket": over_a_socket(server.url, seconds / 2, one)}
        say("in process ...")
        found["in process"] = in_process(server.url, seconds / 2)
    finally:
        if can_pin:
            os.sched_setaffinity(0, every)
    return found


def _ratios(found: dict[str, list[float]], kind: str) -> list[float]:
    return [one / bare for one, bare in zip(found[kind], found["bare"], strict=True)]


def shown(found: dict[str, dict[str, list[float]]]) -> str:
    """The tables."""
    parts = []
    for way, times in found.items():
        rows = [(kind, f"{quantile(times[kind], 0.5) * 1e6:.0f}", ratio_text(_ratios(times, kind))) for kind in KINDS]
        parts.append(table(f"{way}, {len(times['bare'])} rounds", ("µs", "ratio to bare [quartiles]"), rows))
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. The exit code is 0 whether targets are met or not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.http", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--redis", metavar="URL", help="a server that serves nobody else; default: one is started")
    parser.add_argument("--seconds", type=float, metavar="N", default=20, help="in all; default: 20")
    parser.add_argument("--json", action="store_true", help="all measured values, instead of tables")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with redis_server(options.redis) as server:
            found = measure(server, options.seconds)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    goals = [
        Target(f"a replay {way}, to the bare application", quantile(_ratios(times, "replay"), 0.5), "<=", 1.35)
        for way, times in found.items()
    ]
    versions = machine("redis", "hiredis", "starlette", "uvicorn", "httptools", "uvloop")
    if options.json:
        print(json.dumps({"machine": versions, **found, "targets": [goal.as_dict() for goal in goals]}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in versions.items()))
        print(f"\n{shown(found)}\n\n{met_or_missed(goals)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
