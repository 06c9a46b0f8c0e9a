"""What only ASGI has: messages, disconnects, cancellation, background tasks, streams; and FastAPI's route class."""

import asyncio
import gc
import inspect
from collections.abc import Callable, Iterable
from contextvars import Context
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest

from idempotent import CallError, LocalBackend, current_call
from idempotent.http import GLOBAL, asgi, describe
from idempotent.http.asgi import IdempotencyMiddleware, route_class

KEY = (b"idempotency-key", b"k")


def scope_of(method: str = "POST", path: str = "/pay", headers: Iterable[tuple[bytes, bytes]] = (KEY,)) -> Any:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("shop", 80),
        "extensions": {"http.response.pathsend": {}, "http.response.debug": {}, "http.response.trailers": {}},
    }


class Client:
    """A client of one request, who may leave at any time."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = list(parts or (b"{}",))
        self.left = asyncio.Event()
        self.sent: list[Any] = []
        self.asked_after_the_body = 0

    async def receive(self) -> Any:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        self.asked_after_the_body += 1
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.sent[0]["headers"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])


class App:
    """Answers 200 with a number, in one message; `before` is awaited by each run, `after` when it has answered."""

    def __init__(self, before: Any = None, after: Any = None, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.before, self.after, self.headers = before, after, list(headers)
        self.runs = 0
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.runs += 1
        self.scopes.append(scope)
        number = self.runs
        if self.before is not None:
            await self.before()
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"%d" % number})
        if self.after is not None:
            await self.after()


def served(app: Any, **options: Any) -> IdempotencyMiddleware:
    return IdempotencyMiddleware(app, **{"scope": GLOBAL, "backend": "local://", **options})


def test_websockets_and_lifespan_are_left_alone() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    async def receive() -> Any:
        raise AssertionError

    async def send(message: Any) -> None:
        raise AssertionError

    for kind in ("websocket", "lifespan"):
        scope = {"type": kind, "headers": [KEY]}
        asyncio.run(served(app, required=True)(scope, receive, send))
        assert seen.pop() == (scope, receive, send)


def test_a_websocket_works_through_the_middleware() -> None:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import WebSocketRoute

    async def echo(websocket: Any) -> None:
        await websocket.accept()
        await websocket.send_text(await websocket.receive_text())
        await websocket.close()

    app = Starlette(
        routes=[WebSocketRoute("/ws", echo)],
        middleware=[Middleware(IdempotencyMiddleware, scope=GLOBAL, backend="local://", required=True)],
    )

    async def main() -> None:
        said: list[Any] = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hello"}]
        sent: list[Any] = []

        async def receive() -> Any:
            return said.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        await app({**scope_of(path="/ws"), "type": "websocket", "subprotocols": []}, receive, send)
        kinds = [message["type"].removeprefix("websocket.") for message in sent]
        assert kinds == ["accept", "send", "close"]
        assert sent[1]["text"] == "hello"

    asyncio.run(main())


def test_a_request_without_a_key_passes_with_its_own_receive_and_send() -> None:
    seen: list[Any] = []

    async def app(*args: Any) -> None:
        seen.append(args)

    async def main() -> None:
        client = Client()
        scope = scope_of(headers=())
        receive, send = client.receive, client.send
        await served(app)(scope, receive, send)
        assert seen == [(scope, receive, send)]
        assert client.parts  # its body is the application's to read

    asyncio.run(main())


def test_the_header_twice_is_refused() -> None:
    async def main() -> None:
        app, client = App(), Client()
        await served(app)(scope_of(headers=[KEY, KEY]), client.receive, client.send)
        assert client.status == 400
        assert b"urn:idempotent:key-invalid" in client.body
        assert app.runs == 0

    asyncio.run(main())


def test_a_client_that_leaves_before_its_body_is_there_runs_nothing() -> None:
    async def main() -> None:
        app, client = App(), Client(b"half", b"never")
        client.parts.pop()
        client.left.set()

        async def receive() -> Any:
            message = await client.receive()
            return {**message, "more_body": True} if message["type"] == "http.request" else message

        await served(app)(scope_of(), receive, client.send)
        assert (app.runs, client.sent) == (0, [])

    asyncio.run(main())


def test_a_claimed_length_over_the_cap_is_refused_before_the_body_is_read() -> None:
    async def main() -> None:
        for length in (b"11", b"9" * 30):
            app, client = App(), Client(b"x" * 11)
            scope = scope_of(headers=[KEY, (b"content-length", length)])
            await served(app, max_body=10)(scope, client.receive, client.send)
            assert client.status == 413
            assert client.parts
            assert app.runs == 0

    asyncio.run(main())


def test_the_count_of_a_body_stops_at_the_cap() -> None:
    async def main() -> None:
        app, client = App(), Client(*[b"x" * 6] * 100)
        await served(app, max_body=10)(scope_of(), client.receive, client.send)
        assert client.status == 413
        assert len(client.parts) == 98

    asyncio.run(main())


def test_a_client_that_leaves_during_the_run_loses_nothing() -> None:
    """The application is not told, so nothing in it gives up; its answer is there for the retry."""

    async def main() -> None:
        client, entered, gate = Client(), asyncio.Event(), asyncio.Event()
        told = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await receive()
            watching = asyncio.ensure_future(receive())
            entered.set()
            await gate.wait()
            told.append(watching.done())
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})
            assert (await watching)["type"] == "http.disconnect"  # now that it is over

        middleware = served(app)
        first = asyncio.ensure_future(middleware(scope_of(), client.receive, client.send))
        await entered.wait()
        client.left.set()
        for _ in range(5):
            await asyncio.sleep(0)
        gate.set()
        await first
        assert told == [False]
        again = Client()
        await middleware(scope_of(), again.receive, again.send)
        assert again.body == b"done"
        assert (b"idempotency-replayed", b"true") in again.headers

    asyncio.run(main())


def test_an_application_that_listens_on_is_told_when_its_answer_was_sent() -> None:
    async def main() -> None:
        client = Client()  # who stays
        told = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})
            await receive()
            told.append(await receive())

        await asyncio.wait_for(served(app)(scope_of(), client.receive, client.send), 30)
        assert told == [{"type": "http.disconnect"}]

    asyncio.run(main())


@pytest.mark.parametrize("times", [1, 2])
def test_a_server_that_cancels_the_request_does_not_end_the_run(times: int) -> None:
    async def main() -> None:
        entered, gate = asyncio.Event(), asyncio.Event()

        async def before() -> None:
            entered.set()
            await gate.wait()

        app = App(before)
        middleware = served(app)
        client = Client()
        task = asyncio.ensure_future(middleware(scope_of(), client.receive, client.send))
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()  # what is around the application waits for it
        if times == 2:
            task.cancel()
            await asyncio.wait([task], timeout=30)
            assert task.cancelled()  # and not longer than it must
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        again = Client()
        while not again.sent or again.status == 409:
            await asyncio.sleep(0)
            again = Client()
            await middleware(scope_of(), again.receive, again.send)
        assert (again.status, again.body, app.runs) == (200, b"1", 1)

    asyncio.run(main())


def test_a_cancelled_run_that_then_fails_is_nobodys_unheard_error() -> None:
    heard: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: heard.append(context))
        entered, gate = asyncio.Event(), asyncio.Event()

        async def before() -> None:
            entered.set()
            await gate.wait()
            raise KeyError

        app = App(before)
        middleware = served(app)
        client = Client()
        task = asyncio.ensure_future(middleware(scope_of(), client.receive, client.send))
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.set()
        app.before = None
        again = Client()
        while not again.sent or again.status == 409:
            await asyncio.sleep(0)
            again = Client()
            await middleware(scope_of(), again.receive, again.send)
        assert app.runs == 2

    asyncio.run(main())
    gc.collect()
    assert heard == []


def test_an_interrupted_run_is_treated_as_a_crash() -> None:
    """The loop ends and cancels every task, that of the run too: released at once where another may run it."""
    backend = LocalBackend()

    async def interrupted() -> None:
        entered = asyncio.Event()

        async def before() -> None:
            entered.set()
            await asyncio.Event().wait()

        client = Client()
        task = asyncio.ensure_future(served(App(before), backend=backend)(scope_of(), client.receive, client.send))
        await entered.wait()
        del task

    async def after() -> None:
        client = Client()
        await served(App(), backend=backend)(scope_of(), client.receive, client.send)
        assert client.status == 200

    asyncio.run(interrupted())
    asyncio.run(after())


def test_a_run_that_is_thrown_away_leaves_its_lease_to_run_out() -> None:
    """As a loop that is closed leaves it: nothing can be awaited any more."""

    async def main() -> None:
        gate = asyncio.Event()
        app = App(gate.wait)
        middleware = served(app)
        client = Client()
        exchange = await asgi._exchange(middleware._service, scope_of(), client.receive)
        assert exchange is not None
        assert await asgi._tasks.begin(exchange) is None
        run = asgi._run(app, exchange, scope_of(), client.receive, client.send)
        run.send(None)
        run.close()
        assert not exchange.open
        again = Client()
        await middleware(scope_of(), again.receive, again.send)
        assert b"urn:idempotent:in-progress" in again.body
        assert app.runs == 1

    asyncio.run(main())


def test_an_error_of_the_application_passes_through_with_its_traceback() -> None:
    async def main() -> None:
        async def before() -> None:
            raise KeyError("the application's own")

        app, client = App(before), Client()
        middleware = served(app)
        with pytest.raises(KeyError, match="the application's own") as caught:
            await middleware(scope_of(), client.receive, client.send)
        assert caught.traceback[-1].name == "before"
        assert client.sent == []
        app.before, client = None, Client()
        await middleware(scope_of(), client.receive, client.send)
        assert client.body == b"2"

    asyncio.run(main())


def test_background_tasks_come_after_the_answer_and_do_not_hold_it_up() -> None:
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def main() -> None:
        gate, began = asyncio.Event(), asyncio.Event()
        runs = []

        async def background() -> None:
            began.set()
            await gate.wait()
            runs.append("background")

        async def endpoint(request: Any) -> Any:
            runs.append("endpoint")
            return PlainTextResponse("paid", background=BackgroundTask(background))

        middleware = served(Starlette(routes=[Route("/pay", endpoint, methods=["POST"])]))
        client = Client()
        first = asyncio.ensure_future(middleware(scope_of(), client.receive, client.send))
        await began.wait()
        assert client.body == b"paid"
        again = Client()
        await middleware(scope_of(), again.receive, again.send)  # recorded already
        assert again.body == b"paid"
        assert runs == ["endpoint"]
        gate.set()
        await first
        assert runs == ["endpoint", "background"]

    asyncio.run(main())


def test_a_background_task_that_fails_leaves_the_recorded_answer() -> None:
    async def main() -> None:
        async def after() -> None:
            raise KeyError

        app = App(after=after)
        middleware = served(app)
        for _ in range(2):
            client = Client()
            if app.runs == 0:
                with pytest.raises(KeyError):
                    await middleware(scope_of(), client.receive, client.send)
            else:
                await middleware(scope_of(), client.receive, client.send)
            assert client.body == b"1"

    asyncio.run(main())


def test_a_step_in_a_background_task_comes_too_late_for_its_call(tmp_path: Path) -> None:
    """The answer is recorded: no run of this key would ever ask for the step again."""
    done: list[str] = []
    told: list[str] = []

    async def mail() -> None:
        done.append("mail")

    async def after() -> None:
        call = current_call()
        assert call is not None
        with pytest.raises(CallError, match="too late"):
            await call.step("mail", mail)
        with pytest.raises(CallError, match="too late"):
            await asyncio.to_thread(call.step, "mail", done.append, "mail")
        told.append(call.downstream_key("mail"))

    async def main() -> None:
        client = Client()
        await served(App(after=after), backend=f"sqlite:///{tmp_path}/records.db")(
            scope_of(), client.receive, client.send
        )

    asyncio.run(main())
    assert (done, len(told)) == ([], 1)


def streaming(parts: Callable[[], Any]) -> Any:
    from starlette.applications import Starlette
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    async def endpoint(request: Any) -> Any:
        return StreamingResponse(parts())

    return Starlette(routes=[Route("/pay", endpoint, methods=["POST"])])


def test_a_stream_is_sent_as_it_comes_and_keeps_the_key_until_it_ends() -> None:
    async def main() -> None:
        gate = asyncio.Event()

        async def parts() -> Any:
            yield b"one "
            await gate.wait()
            yield b"two"

        middleware = served(streaming(parts))
        client = Client()
        first = asyncio.ensure_future(middleware(scope_of(), client.receive, client.send))
        while client.sent[1:] == []:
            await asyncio.sleep(0)
        assert client.body == b"one "
        assert (b"idempotency-stored", b"false") in client.headers
        again = Client()
        await middleware(scope_of(), again.receive, again.send)
        assert b"urn:idempotent:in-progress" in again.body
        gate.set()
        await first
        assert client.body == b"one two"
        again = Client()
        await middleware(scope_of(), again.receive, again.send)
        assert b"urn:idempotent:result-unavailable" in again.body

    asyncio.run(main())


def test_a_stream_is_recorded_before_its_last_part_is_sent() -> None:
    async def main() -> None:
        async def parts() -> Any:
            yield b"one "
            yield b"two"

        middleware = served(streaming(parts))
        client, again = Client(), Client()

        async def send(message: Any) -> None:
            await client.send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # It has the whole answer, and asks at once: a request of its own, in a context of its own.
                await asyncio.create_task(middleware(scope_of(), again.receive, again.send), context=Context())

        await middleware(scope_of(), client.receive, send)
        assert client.body == b"one two"
        assert b"urn:idempotent:result-unavailable" in again.body

    asyncio.run(main())


def test_a_stream_whose_client_leaves_ends_and_counts_as_done() -> None:
    for spec_version in ("2.3", "2.4"):  # Starlette listens for the disconnect, or waits for a send that fails

        async def main(spec_version: str = spec_version) -> None:
            async def parts() -> Any:
                for _ in range(1000):
                    yield b"tick "
                    await asyncio.sleep(0)

            middleware = served(streaming(parts), backend=LocalBackend())
            client = Client()
            scope = scope_of()
            scope["asgi"]["spec_version"] = spec_version

            async def send(message: Any) -> None:
                if client.left.is_set() and spec_version == "2.4":
                    raise OSError("the client has gone")
                await client.send(message)
                if len(client.sent) == 5:
                    client.left.set()

            try:
                await asyncio.wait_for(middleware(scope, client.receive, send), 30)
            except Exception as error:
                assert type(error).__name__ == "ClientDisconnect"
            assert len(client.sent) < 20
            again = Client()
            await middleware(scope_of(), again.receive, again.send)
            assert b"urn:idempotent:result-unavailable" in again.body

        asyncio.run(main())


def test_a_stream_that_fails_midway_frees_the_key() -> None:
    async def main() -> None:
        async def parts() -> Any:
            yield b"one "
            raise KeyError

        middleware = served(streaming(parts))
        for _ in range(2):
            client = Client()
            with pytest.raises(KeyError):
                await middleware(scope_of(), client.receive, client.send)
            assert client.body == b"one "

    asyncio.run(main())


def test_a_stream_of_a_status_that_frees_the_key_is_not_marked() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    async def main() -> None:
        middleware = served(app)
        for _ in range(2):
            client = Client()
            await middleware(scope_of(), client.receive, client.send)
            assert (client.status, client.body, client.headers) == (503, b"xxx", [])

    asyncio.run(main())


def test_parts_of_a_known_length_are_one_answer() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"6")]})
        for part in (b"ab", b"cd", b"ef"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body"})

    async def main() -> None:
        middleware = served(app)
        for replayed in (False, True):
            client = Client()
            await middleware(scope_of(), client.receive, client.send)
            assert client.body == b"abcdef"
            assert ((b"idempotency-replayed", b"true") in client.headers) is replayed

    asyncio.run(main())


@pytest.mark.parametrize("length", [b"11", b"much"])
def test_a_length_over_the_cap_makes_a_stream_of_the_first_part(length: bytes) -> None:
    async def main() -> None:
        client = Client()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
            assert client.status == 200
            await send({"type": "http.response.body", "body": b"x" * 5, "more_body": True})
            assert client.body == b"xxxxx"  # nothing is held back
            await send({"type": "http.response.body", "body": b"x" * 6})

        await served(app, max_response=10)(scope_of(), client.receive, client.send)
        assert len(client.body) == 11
        assert (b"idempotency-stored", b"false") in client.headers

    asyncio.run(main())


def test_the_headers_of_an_event_stream_do_not_wait_for_its_first_event() -> None:
    async def main() -> None:
        client, event = Client(), asyncio.Event()

        async def parts() -> Any:
            assert (client.status, client.sent[1:]) == (200, [])
            await event.wait()
            yield b"data: 1\n\n"

        async def app(scope: Any, receive: Any, send: Any) -> None:
            from starlette.responses import StreamingResponse

            await StreamingResponse(parts(), media_type="text/event-stream")(scope, receive, send)

        middleware = served(app)
        run = asyncio.ensure_future(middleware(scope_of(), client.receive, client.send))
        while not client.sent:
            await asyncio.sleep(0)
        assert (b"idempotency-stored", b"false") in client.headers
        again = Client()
        await middleware(scope_of(), again.receive, again.send)
        assert b"urn:idempotent:in-progress" in again.body
        event.set()
        await run
        assert client.body == b"data: 1\n\n"
        again = Client()
        await middleware(scope_of(), again.receive, again.send)
        assert b"urn:idempotent:result-unavailable" in again.body

    asyncio.run(main())


@pytest.mark.parametrize("inside", [True, False], ids=["gzip inside", "gzip outside"])
def test_a_compressed_answer_is_replayed_as_it_was(inside: bool) -> None:
    from starlette.middleware.gzip import GZipMiddleware

    async def main() -> None:
        runs: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            from starlette.responses import JSONResponse

            runs.append(scope)
            await JSONResponse({"number": len(runs), "text": "x" * 5000})(scope, receive, send)

        whole: Any = served(GZipMiddleware(app)) if inside else GZipMiddleware(served(app))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(whole), base_url="http://shop") as client:
            first, again = [await client.post("/pay", headers={"idempotency-key": "k"}) for _ in range(2)]
            assert first.json() == again.json() == {"number": 1, "text": "x" * 5000}
            for answer in (first, again):
                assert answer.headers["content-encoding"] == "gzip"
                assert int(answer.headers["content-length"]) < 500
                assert "accept-encoding" in answer.headers["vary"].lower()
            assert again.headers["idempotency-replayed"] == "true"
            plain = await client.post("/pay", headers={"idempotency-key": "k", "accept-encoding": "identity"})
            # What is kept is what came out of the application: outside, each answer is compressed for its own client.
            assert plain.headers.get("content-encoding") == ("gzip" if inside else None)
            assert plain.json()["number"] == 1
        assert len(runs) == 1

    asyncio.run(main())


def test_a_request_that_is_sent_in_once_more_by_whoever_is_further_out_is_served_again() -> None:
    async def main() -> None:
        app, scope = App(), scope_of()
        middleware = served(served(app))
        clients = [Client(), Client()]
        for client in clients:
            await middleware(scope, client.receive, client.send)
        assert [client.body for client in clients] == [b"1", b"1"]
        assert (b"idempotency-replayed", b"true") in clients[1].headers

    asyncio.run(main())


def test_two_mounts_of_one_application_never_answer_for_each_other() -> None:
    from starlette.applications import Starlette
    from starlette.routing import Mount

    async def main(whole: Any, app: App) -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(whole), base_url="http://shop") as client:
            answers = [await client.post(path, headers={"idempotency-key": "k"}) for path in ("/a/pay", "/b/pay") * 2]
        assert [answer.status_code for answer in answers] == [200, 422, 200, 422]
        assert answers[2].headers["idempotency-replayed"] == "true"
        assert app.runs == 1

    app = App()
    inner = served(app, backend=LocalBackend(), paths=["/a/*", "/b/*"], required=True)
    asyncio.run(main(Starlette(routes=[Mount("/a", inner), Mount("/b", inner)]), app))

    app = App()
    mounted = served(app, backend=LocalBackend(), paths=["/a/*", "/b/*"], required=True)

    async def dispatcher(scope: Any, receive: Any, send: Any) -> None:  # one that takes the prefix off, as some do
        await mounted({**scope, "root_path": scope["path"][:2], "path": scope["path"][2:]}, receive, send)

    asyncio.run(main(dispatcher, app))


@pytest.mark.parametrize(
    ("root", "path", "whole"),
    [
        ("", "/pay", "/pay"),
        ("/", "/pay", "/pay"),
        ("/api", "/api/pay", "/api/pay"),
        ("/api/", "/api/pay", "/api/pay"),
        ("/api", "/api", "/api"),
        ("/api", "/pay", "/api/pay"),
        ("/api", "/apiary", "/api/apiary"),
    ],
)
def test_a_path_has_its_root_in_front(root: str, path: str, whole: str) -> None:
    seen: list[str] = []
    middleware = served(App(), scope=lambda request: seen.append(request.path) or "alice")
    client = Client()
    asyncio.run(middleware({**scope_of(path=path), "root_path": root}, client.receive, client.send))
    assert seen == [whole]


@pytest.mark.parametrize("begun", [False, True])
def test_an_application_that_does_not_finish_its_answer_frees_the_key(begun: bool) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            headers = [(b"content-length", b"9")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def main() -> None:
        middleware = served(app)
        for _ in range(2):
            client = Client()
            await middleware(scope_of(), client.receive, client.send)
            kinds = [message["type"] for message in client.sent]
            assert kinds == (["http.response.start", "http.response.body"] if begun else [])
            if begun:
                assert client.sent[-1]["more_body"]  # the server sees that it is cut short

    asyncio.run(main())


def test_headers_may_be_any_iterable_as_asgi_says() -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(list(scope["headers"]))
        await send({"type": "http.response.start", "status": 200, "headers": iter([(b"etag", b'"1"')])})
        await send({"type": "http.response.body", "body": b"done"})

    async def main() -> None:
        middleware = served(app)
        for _ in range(2):
            scope, client = scope_of(), Client()
            scope["headers"] = iter([KEY])
            await middleware(scope, client.receive, client.send)
            assert (b"etag", b'"1"') in client.headers
        scope, client = scope_of(), Client()
        scope["headers"] = iter([(b"x-own", b"yes")])
        await middleware(scope, client.receive, client.send)

    asyncio.run(main())
    assert seen == [[KEY], [(b"x-own", b"yes")]]


def test_extensions_that_would_bypass_the_middleware_are_hidden() -> None:
    async def main() -> None:
        app, client = App(), Client()
        await served(app)(scope_of(), client.receive, client.send)
        assert list(app.scopes[0]["extensions"]) == ["http.response.debug"]

    asyncio.run(main())


def test_messages_that_are_no_part_of_the_answer_are_passed_on_at_once() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.early_hint", "links": []})
        assert [message["type"] for message in client.sent] == ["http.response.early_hint"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    client: Any = None

    async def main() -> None:
        nonlocal client
        client = Client()
        await served(app)(scope_of(), client.receive, client.send)

    asyncio.run(main())
    assert len(client.sent) == 3


def test_hop_by_hop_fields_are_not_replayed_nor_those_that_connection_names() -> None:
    headers = [
        (b"Connection", b"keep-alive, ETag"),
        (b"Keep-Alive", b"5"),
        (b"ETag", b'"1"'),
        (b"Trailer", b"x"),
        (b"Content-Type", b"text/plain"),
        (b"Location", b"/1"),
    ]

    async def main() -> None:
        middleware = served(App(headers=headers))
        first, again = Client(), Client()
        for client in (first, again):
            await middleware(scope_of(), client.receive, client.send)
        assert first.headers == headers  # the first answer is the application's own
        kept = [(b"content-type", b"text/plain"), (b"location", b"/1")]
        assert again.headers[:2] == kept
        assert {name for name, _ in again.headers[2:]} == {
            b"idempotency-replayed",
            b"cache-control",
            b"content-length",
        }

    asyncio.run(main())


def test_two_middlewares_are_as_one() -> None:
    async def main() -> None:
        app = App()
        middleware = served(served(app))
        for _ in range(2):
            client = Client()
            await middleware(scope_of(), client.receive, client.send)
            assert client.body == b"1"

    asyncio.run(main())


def test_other_middleware_may_stand_inside() -> None:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.gzip import GZipMiddleware
    from starlette.responses import FileResponse, JSONResponse
    from starlette.routing import Route

    class Base(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            return await call_next(request)

    async def endpoint(request: Any) -> Any:
        runs.append(await request.json())
        return JSONResponse({"text": "x" * 2000})

    async def file(request: Any) -> Any:
        runs.append(None)
        return FileResponse(__file__)

    runs: list[Any] = []
    app = Starlette(
        routes=[Route("/pay", endpoint, methods=["POST"]), Route("/file", file, methods=["POST"])],
        middleware=[
            Middleware(IdempotencyMiddleware, scope=GLOBAL, backend="local://"),
            Middleware(Base),
            Middleware(GZipMiddleware),
        ],
    )

    async def main() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            answers = [await client.post("/pay", json={}, headers={"idempotency-key": "k"}) for _ in range(2)]
            assert answers[0].json() == answers[1].json() == {"text": "x" * 2000}
            assert {answer.headers["content-encoding"] for answer in answers} == {"gzip"}
            assert answers[1].headers["idempotency-replayed"] == "true"
            headers = {"idempotency-key": "f", "accept-encoding": "identity"}
            answers = [await client.post("/file", headers=headers) for _ in range(2)]
            assert {answer.text for answer in answers} == {Path(__file__).read_text("utf-8")}
            assert answers[1].headers["idempotency-replayed"] == "true"
        assert runs == [{}, None]

    asyncio.run(main())


def test_inside_what_authenticates_a_replay_is_authenticated_again() -> None:
    """The order that the README gives: added before it, and so inside it."""
    from starlette.applications import Starlette
    from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
    from starlette.middleware.authentication import AuthenticationMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    tokens = {"token": "alice"}

    class Tokens(AuthenticationBackend):
        async def authenticate(self, conn: Any) -> Any:
            if conn.headers["authorization"] not in tokens:
                raise AuthenticationError("who is it?")
            return AuthCredentials(), SimpleUser(tokens[conn.headers["authorization"]])

    runs: list[str] = []

    async def endpoint(request: Any) -> Any:
        runs.append(request.user.username)
        return PlainTextResponse(str(len(runs)))

    app = Starlette(routes=[Route("/pay", endpoint, methods=["POST"])])
    app.add_middleware(IdempotencyMiddleware, scope=lambda request: request.native["user"].username, backend="local://")
    app.add_middleware(AuthenticationMiddleware, backend=Tokens())

    request = ("POST", "/pay", {})
    assert [answer.text for answer in ask(app, request, request)] == ["1", "1"]
    tokens["other"] = "bob"
    assert ask(app, request, token="other")[0].text == "2"
    tokens.pop("token")
    assert ask(app, request)[0].status_code == 400
    assert runs == ["alice", "bob"]


def test_the_route_is_known_to_what_is_further_out() -> None:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def endpoint(request: Any) -> Any:
        return PlainTextResponse(request.path_params["order"])

    async def main() -> None:
        scope, client = scope_of(path="/pay/7"), Client()
        await served(Starlette(routes=[Route("/pay/{order}", endpoint, methods=["POST"])]))(
            scope, client.receive, client.send
        )
        assert scope["path_params"] == {"order": "7"}

    asyncio.run(main())


async def _async_paths(request: Any) -> bool:
    return False


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "scope is required"),
        ({"scope": None}, "scope"),
        ({"scope": "user"}, "scope"),
        ({"fingerprint": "body"}, "fingerprint"),
        ({"methods": "POST"}, "methods"),
        ({"methods": ["GET"]}, "GET"),
        ({"methods": ["post"]}, "methods"),
        ({"methods": ["a b"]}, "methods"),
        ({"paths": "/pay"}, "paths"),
        ({"paths": ["pay"]}, "paths"),
        ({"required": 1}, "required"),
        ({"header": "a b"}, "header"),
        ({"header": "Authorization"}, "header"),
        ({"header": "content-length"}, "header"),
        ({"paths": []}, "paths must name one at least"),
        ({"ttl": 0}, "ttl"),
        ({"error_ttl": -1}, "error_ttl"),
        ({"lease": "5"}, "lease"),
        ({"wait": -1}, "wait"),
        ({"max_waiting": 1.5}, "max_waiting"),
        ({"max_body": -1}, "max_body"),
        ({"max_response": True}, "max_response"),
        ({"keep_headers": "etag"}, "keep_headers"),
        ({"keep_headers": ["Set-Cookie"]}, "set-cookie"),
        ({"keep_headers": ["a\r\nb"]}, "keep_headers"),
        ({"docs_url": "https://x/\r\nset-cookie: a"}, "docs_url"),
        ({"docs_url": "https://x/> b"}, "docs_url"),
        ({"namespace": ""}, "namespace"),
        ({"backend": 5}, "backend"),
        ({"backend": "mongodb://x"}, "mongodb"),
        ({"on_crash": "retry"}, "on_crash"),
        ({"serializer": object()}, "serializer"),
        ({"tll": 5}, "tll"),
        ({"methods": None}, "methods"),
        ({"methods": ()}, "methods"),
        ({"paths": 5}, "paths"),
        ({"paths": _async_paths}, "paths"),
        ({"keep_headers": None}, "keep_headers"),
        ({"namespace": None}, "namespace"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, Any], name: str) -> None:
    if options and "scope" not in options:
        options = {"scope": GLOBAL, **options}
    for make in (lambda: IdempotencyMiddleware(App(), **options), lambda: route_class(**options)):
        with pytest.raises((TypeError, ValueError), match=name):
            make()


@pytest.mark.parametrize("option", ["scope", "fingerprint", "paths"])
def test_a_callable_that_raises_is_the_services_own_error_and_nothing_runs(option: str) -> None:
    broken = True

    def raises(*_: Any) -> Any:
        if broken:
            raise KeyError("a bug of the service")
        return "alice"

    app, client = App(), Client()
    middleware = served(app, **{option: raises})
    with pytest.raises(KeyError, match="a bug of the service"):
        asyncio.run(middleware(scope_of(), client.receive, client.send))
    assert (app.runs, client.sent) == (0, [])
    broken = False
    client = Client()
    asyncio.run(middleware(scope_of(), client.receive, client.send))
    assert (client.status, client.body) == (200, b"1")  # the key is free


def test_an_async_scope_is_refused_for_it_would_never_be_awaited() -> None:
    async def scope(request: Any) -> str:
        return "alice"

    with pytest.raises(TypeError, match="scope must be a sync callable"):
        IdempotencyMiddleware(App(), scope=scope)  # type: ignore[arg-type]


# FastAPI's route class.


def shop() -> Any:
    from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Request
    from pydantic import BaseModel

    class Payment(BaseModel):
        amount: int

    class Receipt(BaseModel):
        number: int
        amount: int

    def account(request: Request, authorization: str = Header()) -> None:
        if authorization not in app.state.tokens:
            raise HTTPException(401)
        request.state.account = app.state.tokens[authorization]

    options = {"scope": lambda request: request.native["state"]["account"], "backend": "local://"}
    router = APIRouter(route_class=route_class(**options), dependencies=[Depends(account)])  # type: ignore[arg-type]

    @router.post("/payments", status_code=201)
    async def create(payment: Payment) -> Receipt:
        app.state.runs.append("async")
        assert current_call() is not None
        if payment.amount == 13:
            raise HTTPException(409, "unlucky")
        return Receipt(number=len(app.state.runs), amount=payment.amount)

    @router.post("/sync", status_code=201, openapi_extra={"x-own": True})
    def create_sync(payment: Payment) -> Receipt:
        app.state.runs.append("sync")
        assert current_call() is not None
        return Receipt(number=len(app.state.runs), amount=payment.amount)

    @router.get("/payments")
    def payments() -> int:
        return len(app.state.runs)

    app = FastAPI()
    app.state.runs, app.state.tokens = [], {"token": "alice"}
    app.include_router(router, prefix="/v1")

    @app.post("/plain")
    def plain() -> int:
        app.state.runs.append("plain")
        return len(app.state.runs)

    return app


def ask(app: Any, *requests: Any, key: str | None = "k", token: str = "token") -> list[httpx.Response]:
    async def main() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            headers = {"authorization": token, **({"idempotency-key": key} if key else {})}
            return [await client.request(*request, headers=headers, **body) for *request, body in requests]

    return asyncio.run(main())


@pytest.mark.parametrize("path", ["/v1/payments", "/v1/sync"])
def test_a_route_of_the_class_replays_and_others_are_left_alone(path: str) -> None:
    app = shop()
    first, again = ask(app, *[("POST", path, {"json": {"amount": 5}})] * 2)
    assert (first.status_code, first.json()) == (201, {"number": 1, "amount": 5})
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert [answer.json() for answer in ask(app, *[("POST", "/plain", {})] * 2)] == [2, 3]
    assert ask(app, ("GET", "/v1/payments", {}))[0].json() == 3


def test_a_replay_passes_the_dependencies_that_authenticate() -> None:
    app = shop()
    request = ("POST", "/v1/payments", {"json": {"amount": 5}})
    assert ask(app, request)[0].status_code == 201
    app.state.tokens.clear()
    assert ask(app, request)[0].status_code == 401
    app.state.tokens["other"] = "bob"
    assert ask(app, request, token="other")[0].json()["number"] == 2
    app.state.tokens["new"] = "alice"
    assert ask(app, request, token="new")[0].json()["number"] == 1


def test_a_request_that_fails_its_validation_is_not_recorded() -> None:
    app = shop()
    bad, good = ask(app, ("POST", "/v1/payments", {"json": {}}), ("POST", "/v1/payments", {"json": {"amount": 5}}))
    assert (bad.status_code, good.status_code) == (422, 201)
    assert "detail" in bad.json()


def test_an_error_answer_that_the_endpoint_raises_is_kept() -> None:
    app = shop()
    first, again = ask(app, *[("POST", "/v1/payments", {"json": {"amount": 13}})] * 2)
    assert (first.status_code, first.json()) == (409, {"detail": "unlucky"})
    assert (again.content, again.headers["idempotency-replayed"]) == (first.content, "true")
    assert len(app.state.runs) == 1


def test_openapi_shows_the_header_and_the_answers_of_the_routes() -> None:
    paths = shop().openapi()["paths"]
    for path in ("/v1/payments", "/v1/sync"):
        found = paths[path]["post"]
        (header,) = [each for each in found["parameters"] if each["name"] == "Idempotency-Key"]
        assert (header["in"], header["required"]) == ("header", False)
        assert header["description"].endswith("Its answer is kept for 86400 seconds, a 4xx one for 60.")
        assert {"400", "409", "413", "422", "503"} <= found["responses"].keys()
        assert "application/problem+json" in found["responses"]["422"]["content"]
        assert "application/json" in found["responses"]["422"]["content"]  # FastAPI's own validation error
    assert paths["/v1/sync"]["post"]["x-own"] is True
    assert "400" not in paths["/plain"]["post"]["responses"]
    assert "400" not in paths["/v1/payments"]["get"]["responses"]


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # FastAPI's own, of a route with two methods
def test_openapi_shows_the_header_once_and_as_required_where_each_method_requires_it() -> None:
    from fastapi import APIRouter, FastAPI, Header

    router = APIRouter(route_class=route_class(scope=GLOBAL, backend="local://", required=True))

    @router.post("/declares")
    async def declares(idempotency_key: Annotated[str, Header(description="ours")]) -> None: ...

    @router.api_route("/both", methods=["GET", "POST"])
    async def both() -> None: ...

    @router.post("/pay", openapi_extra={"parameters": [{"name": "X-Own", "in": "header"}]})
    async def pay() -> None: ...

    app = FastAPI()
    app.include_router(router, prefix="/v1")
    paths = app.openapi()["paths"]
    declared = paths["/v1/declares"]["post"]["parameters"]
    assert [(each["name"], each["description"]) for each in declared] == [("idempotency-key", "ours")]
    assert [paths["/v1/both"][method]["parameters"][0]["required"] for method in ("get", "post")] == [False, False]
    shown = {each["name"]: each.get("required") for each in paths["/v1/pay"]["post"]["parameters"]}
    assert shown == {"X-Own": None, "Idempotency-Key": True}


@dataclass
class Order:
    """What the annotations of an endpoint name as a string."""

    cents: int


def test_annotations_that_are_strings_are_read_where_the_endpoint_is() -> None:
    from fastapi import APIRouter, FastAPI

    router = APIRouter(route_class=route_class(scope=GLOBAL, backend="local://"))

    @router.post("/pay")
    async def pay(order: "Order") -> "Order":
        return order

    app = FastAPI()
    app.include_router(router)
    (answer,) = ask(app, ("POST", "/pay", {"json": {"cents": 5}}))
    assert (answer.status_code, answer.json()) == (200, {"cents": 5})
    # What older versions of FastAPI take names from, which they would look up in our module.
    signature = inspect.signature(getattr(router.routes[0], "endpoint"))
    assert (signature.parameters["order"].annotation, signature.return_annotation) == (Order, Order)


def test_a_replay_starts_no_background_task_of_a_dependency_either() -> None:
    from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI

    ran: list[str] = []

    def audit(tasks: BackgroundTasks) -> None:
        tasks.add_task(ran.append, "audit")

    router = APIRouter(route_class=route_class(scope=GLOBAL, backend="local://"), dependencies=[Depends(audit)])

    @router.post("/pay")
    async def pay() -> int:
        return 5

    app = FastAPI()
    app.include_router(router)
    answers = ask(app, *[("POST", "/pay", {})] * 2)
    assert [answer.json() for answer in answers] == [5, 5]
    assert ran == ["audit"]


def test_a_client_that_leaves_a_route_during_the_run_loses_nothing() -> None:
    """With a server that tells the application so, and with one that cancels it."""
    from fastapi import APIRouter, FastAPI

    async def main() -> None:
        entered, gate = asyncio.Event(), asyncio.Event()
        router = APIRouter(route_class=route_class(scope=GLOBAL, backend="local://"))

        @router.post("/pay")
        async def pay() -> int:
            entered.set()
            await gate.wait()
            return 5

        app = FastAPI()
        app.include_router(router)
        for key, cancels in ((b"told", False), (b"cancelled", True)):
            entered.clear()
            gate.clear()
            request = scope_of(headers=[(b"idempotency-key", key)])
            client, again = Client(), Client()
            first = asyncio.ensure_future(app(dict(request), client.receive, client.send))
            await entered.wait()
            client.left.set()
            if cancels:
                first.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            gate.set()
            await asyncio.wait([first])
            await app(dict(request), again.receive, again.send)
            assert again.body == b"5"
            assert (b"idempotency-replayed", b"true") in again.headers

    asyncio.run(main())


def test_describe_adds_the_header_and_the_answers_to_a_schema() -> None:
    from fastapi import FastAPI

    app = FastAPI()

    @app.post("/payments")
    def create(amount: int) -> int:
        return amount

    @app.post("/quotes")
    def quote() -> int:
        return 1

    @app.get("/payments")
    def payments() -> int:
        return 1

    options: Any = {"paths": ["/payments"], "required": True, "ttl": timedelta(minutes=5), "error_ttl": 0.5}
    schema = describe(app.openapi(), **options)
    found = schema["paths"]["/payments"]["post"]
    assert [(each["name"], each["required"]) for each in found["parameters"]] == [
        ("amount", True),
        ("Idempotency-Key", True),
    ]
    assert "kept for 300 seconds, a 4xx one for 0.5." in found["parameters"][1]["description"]
    assert set(found["responses"]) == {"200", "400", "409", "413", "422", "503"}
    assert set(found["responses"]["422"]["content"]) == {"application/json", "application/problem+json"}
    assert set(schema["paths"]["/quotes"]["post"]["responses"]) == {"200"}
    assert set(schema["paths"]["/payments"]["get"]["responses"]) == {"200"}
    assert describe(schema, **options) == schema  # twice changes nothing


def test_a_generator_cannot_be_a_route_of_the_class() -> None:
    from fastapi import APIRouter

    router = APIRouter(route_class=route_class(scope=GLOBAL))

    with pytest.raises(TypeError, match="generator"):

        @router.post("/events")
        async def events() -> Any:
            yield 1


def test_a_route_of_the_class_behind_the_middleware_is_served_once() -> None:
    app = shop()
    app.add_middleware(IdempotencyMiddleware, scope=GLOBAL, backend="local://", namespace="outer")
    answers = ask(app, *[("POST", "/v1/payments", {"json": {"amount": 5}})] * 2)
    assert [answer.json()["number"] for answer in answers] == [1, 1]
    assert answers[1].headers["idempotency-replayed"] == "true"


def test_a_client_that_leaves_a_route_before_its_body_is_there_runs_nothing() -> None:
    async def main() -> None:
        app, client = shop(), Client(b"")
        client.parts.clear()
        client.left.set()
        headers = [KEY, (b"authorization", b"token"), (b"content-type", b"application/json")]
        await app(scope_of(path="/v1/payments", headers=headers), client.receive, client.send)
        assert (client.sent, app.state.runs) == ([], [])

    asyncio.run(main())


def test_an_object_whose_call_is_async_may_be_an_endpoint() -> None:
    from fastapi import APIRouter, FastAPI

    class Endpoint:
        runs = 0

        async def __call__(self, cents: int) -> int:
            self.runs += 1
            return cents

    router = APIRouter(route_class=route_class(scope=GLOBAL, backend="local://"))
    endpoint = Endpoint()
    router.add_api_route("/pay", endpoint, methods=["POST"])
    app = FastAPI()
    app.include_router(router)
    answers = ask(app, *[("POST", "/pay?cents=5", {})] * 2)
    assert [answer.json() for answer in answers] == [5, 5]
    assert endpoint.runs == 1


def test_a_call_from_inside_a_route_does_not_take_the_outer_key() -> None:
    """An application that calls itself, in one process and context, without a key of its own."""
    from fastapi import APIRouter, FastAPI

    router = APIRouter(route_class=route_class(scope=GLOBAL, backend="local://"))
    app = FastAPI()

    @router.post("/inner")
    async def inner() -> int:
        return 5

    @router.post("/outer")
    async def outer() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop") as client:
            answer = await client.post("/inner")
        return answer.json() + 1

    app.include_router(router)
    (answer,) = ask(app, ("POST", "/outer", {}))
    assert (answer.status_code, answer.json()) == (200, 6)
