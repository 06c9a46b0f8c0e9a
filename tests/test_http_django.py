"""What only Django has: settings, process_view, its own test clients, CSRF and login, and views that are cancelled."""

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import http_stacks  # configures the settings
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.core.handlers.asgi import ASGIHandler
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.template import engines
from django.template.response import ContentNotRenderedError, SimpleTemplateResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import path
from django.utils.decorators import async_only_middleware, sync_only_middleware
from django.utils.deprecation import MiddlewareMixin
from django.views import View

from idempotent import LocalBackend, current_call
from idempotent._drive import drive
from idempotent.http import GLOBAL
from idempotent.http.django import IdempotencyMiddleware, exempt

RUNS: list[Any] = []
GATE: Any = None
ENTERED: Any = None

KEY = {"Idempotency-Key": "k"}


def pay(request: HttpRequest) -> HttpResponse:
    RUNS.append(request.body)
    return JsonResponse({"number": len(RUNS)}, status=201)


async def apay(request: HttpRequest) -> HttpResponse:
    return pay(request)


async def slow(request: HttpRequest) -> HttpResponse:
    ENTERED.set()
    await GATE.wait()
    return pay(request)


def slow_sync(request: HttpRequest) -> HttpResponse:
    ENTERED.set()
    assert GATE.wait(30)
    return pay(request)


async def _probe(call: Any) -> Any: ...


def form(request: HttpRequest) -> HttpResponse:
    RUNS.append((request.POST.dict(), {name: file.read() for name, file in request.FILES.items()}))
    return HttpResponse(str(len(RUNS)))


def current(request: HttpRequest) -> HttpResponse:
    call = current_call()
    assert call is not None
    return HttpResponse(call.key)


def fail(request: HttpRequest) -> HttpResponse:
    RUNS.append("fail")
    raise KeyError("the view failed")


class Template(View):
    def post(self, request: HttpRequest) -> Any:
        from django.template.response import TemplateResponse

        RUNS.append("template")
        return TemplateResponse(request, engines["django"].from_string("run {{ number }}"), {"number": len(RUNS)})


urlpatterns = [
    path("pay", pay),
    path("apay", apay),
    path("slow", slow),
    path("slow-sync", slow_sync),
    path("form", form),
    path("fail", fail),
    path("template", Template.as_view()),
    path("current", current),
    path("quote", exempt(pay)),
    path("open-form", exempt(form)),
]


def scope(request: Any) -> str:
    return "alice"


class Login(MiddlewareMixin):
    """Stands for those that authenticate in `process_view`, as Django's own LoginRequiredMiddleware does."""

    def process_view(self, request: HttpRequest, *_: Any) -> HttpResponse | None:
        return None if request.headers.get("Authorization") != "revoked" else HttpResponse(status=401)


class Reads(MiddlewareMixin):
    """Stands for those that look into a form before any view is chosen."""

    def process_request(self, request: HttpRequest) -> None:
        request.POST.get("order")


class ReadsAll(MiddlewareMixin):
    """Stands for those that read the body as a stream."""

    def process_request(self, request: HttpRequest) -> None:
        request.read()


class Someone(MiddlewareMixin):
    """Stands for the middleware of sessions and users."""

    def process_request(self, request: Any) -> None:
        request.user = SimpleNamespace(is_authenticated=request.headers.get("Authorization") != "none")


@pytest.fixture(autouse=True)
def _django() -> Iterator[None]:
    RUNS.clear()
    templates = [{"BACKEND": "django.template.backends.django.DjangoTemplates"}]
    with override_settings(
        ROOT_URLCONF=__name__,
        MIDDLEWARE=http_stacks.MIDDLEWARE,
        IDEMPOTENCY={"scope": f"{__name__}.scope", "backend": LocalBackend()},
        TEMPLATES=templates,
    ):
        yield


@pytest.mark.parametrize("url", ["/pay", "/apay"])
def test_djangos_own_client_gets_the_replay(url: str) -> None:
    client = Client(headers=KEY)
    first, again = (client.post(url, {"a": 1}, content_type="application/json") for _ in range(2))
    assert (first.status_code, first.json()) == (201, {"number": 1})
    assert (again.status_code, again.json(), again["Idempotency-Replayed"]) == (201, {"number": 1}, "true")
    assert RUNS == [b'{"a": 1}']
    assert client.post(url, {"a": 2}, content_type="application/json").status_code == 422


@pytest.mark.parametrize("url", ["/pay", "/apay"])
def test_djangos_own_async_client_gets_the_replay(url: str) -> None:
    async def main() -> None:
        sent: Any = {"data": {"a": 1}, "content_type": "application/json", "headers": KEY}
        answers = [await AsyncClient().post(url, **sent) for _ in range(2)]
        assert [answer.json() for answer in answers] == [{"number": 1}] * 2
        assert answers[1]["Idempotency-Replayed"] == "true"

    asyncio.run(main())
    assert RUNS == [b'{"a": 1}']


@sync_only_middleware
def sync_only(get_response: Any) -> Any:
    return lambda request: get_response(request)


@async_only_middleware
def async_only(get_response: Any) -> Any:
    async def middleware(request: Any) -> Any:
        return await get_response(request)

    return middleware


@pytest.mark.parametrize("name", ["sync_only", "async_only"])
@pytest.mark.parametrize("place", ["above", "below"])
@pytest.mark.parametrize("client", ["sync", "async"])
def test_middleware_of_one_colour_may_stand_beside_it(name: str, place: str, client: str) -> None:
    other = [f"{__name__}.{name}"]
    middleware = [*other, *http_stacks.MIDDLEWARE] if place == "above" else [*http_stacks.MIDDLEWARE, *other]
    with override_settings(MIDDLEWARE=middleware):
        if client == "sync":
            answers = [Client(headers=KEY).post("/current") for _ in range(2)]
        else:

            async def main() -> Any:
                return [await AsyncClient().post("/current", headers=KEY) for _ in range(2)]

            answers = asyncio.run(main())
    assert [answer.content for answer in answers] == [b"5:alice:k"] * 2
    assert answers[1]["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("client", ["sync", "async"])
def test_two_middlewares_are_as_one(client: str) -> None:
    with override_settings(MIDDLEWARE=http_stacks.MIDDLEWARE * 2):
        if client == "sync":
            answers = [Client(headers=KEY).post("/pay") for _ in range(2)]
        else:

            async def main() -> Any:
                return [await AsyncClient().post("/apay", headers=KEY) for _ in range(2)]

            answers = asyncio.run(main())
    assert [answer.json() for answer in answers] == [{"number": 1}] * 2
    assert answers[1]["Idempotency-Replayed"] == "true"
    assert len(RUNS) == 1


def test_the_middleware_is_of_both_colours() -> None:
    async def async_response(request: Any) -> Any: ...

    def response(request: Any) -> Any: ...

    from asgiref.sync import iscoroutinefunction

    assert iscoroutinefunction(IdempotencyMiddleware(async_response))
    assert not iscoroutinefunction(IdempotencyMiddleware(response))
    assert IdempotencyMiddleware.sync_capable
    assert IdempotencyMiddleware.async_capable


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "scope is required"),
        ({"scope": "nowhere.scope"}, "nowhere"),
        ({"scope": GLOBAL, "ttl": 0}, "ttl"),
        ({"scope": GLOBAL, "tll": 1}, "tll"),
        ({"scope": GLOBAL, "on_crash": _probe}, "probe .* is async"),
    ],
)
def test_wrong_settings_are_told_by_name(given: Any, message: str) -> None:
    with override_settings(IDEMPOTENCY=given), pytest.raises(ImproperlyConfigured, match=message):
        IdempotencyMiddleware(lambda request: None)


def test_an_exempt_view_is_left_alone() -> None:
    client = Client(headers=KEY)
    assert [client.post("/quote").json()["number"] for _ in range(2)] == [1, 2]
    with override_settings(IDEMPOTENCY={"scope": GLOBAL, "required": True, "max_body": 3, "backend": "local://"}):
        client = Client()
        assert client.post("/pay").status_code == 400
        large = client.post("/quote", b"much too large", content_type="text/plain", headers={"Idempotency-Key": "a b"})
        assert large.status_code == 201
    assert RUNS[-1] == b"much too large"  # the view reads its body all the same


def test_a_replay_passes_the_process_view_of_what_is_listed_above() -> None:
    with override_settings(MIDDLEWARE=[f"{__name__}.Login", *http_stacks.MIDDLEWARE]):
        client = Client(headers=KEY)
        assert client.post("/pay").status_code == 201
        assert client.post("/pay")["Idempotency-Replayed"] == "true"
        assert client.post("/pay", headers={"Authorization": "revoked"}).status_code == 401


def test_a_replay_passes_csrf() -> None:
    middleware = ["django.middleware.csrf.CsrfViewMiddleware", *http_stacks.MIDDLEWARE]
    with override_settings(MIDDLEWARE=middleware):
        assert Client(headers=KEY).post("/pay").status_code == 201
        assert Client(headers=KEY).post("/pay")["Idempotency-Replayed"] == "true"
        assert Client(headers=KEY, enforce_csrf_checks=True).post("/pay").status_code == 403


def test_a_replay_passes_the_login_that_django_requires() -> None:
    middleware = [f"{__name__}.Someone", "django.contrib.auth.middleware.LoginRequiredMiddleware"]
    with override_settings(MIDDLEWARE=[*middleware, *http_stacks.MIDDLEWARE], LOGIN_URL="/login"):
        client = Client(headers=KEY)
        assert client.post("/pay").status_code == 201
        assert client.post("/pay")["Idempotency-Replayed"] == "true"
        assert client.post("/pay", headers={"Authorization": "none"}).status_code == 302
    assert len(RUNS) == 1


@pytest.mark.parametrize("client_type", [Client, AsyncClient])
def test_an_upload_that_middleware_above_has_read_is_an_error_that_names_the_order(client_type: Any) -> None:
    async def ask(path: str) -> Any:
        found = client_type().post(path, {"file": io.BytesIO(b"contents")}, headers=KEY)
        return await found if client_type is AsyncClient else found

    with override_settings(MIDDLEWARE=[f"{__name__}.Reads", *http_stacks.MIDDLEWARE]):
        post = (lambda path: asyncio.run(ask(path))) if client_type is AsyncClient else (lambda path: drive(ask(path)))
        with pytest.raises(ImproperlyConfigured, match="list it below"):
            post("/form")
        assert RUNS == []
        assert post("/open-form").content == b"1"


def test_an_empty_body_that_middleware_above_has_read_is_no_error() -> None:
    with override_settings(MIDDLEWARE=[f"{__name__}.ReadsAll", *http_stacks.MIDDLEWARE]):
        client = Client(headers=KEY)
        assert client.post("/pay", b"", content_type="text/plain", CONTENT_LENGTH="0").status_code == 201


def test_an_upload_reaches_the_view_though_its_body_was_compared() -> None:
    middleware = ["django.middleware.csrf.CsrfViewMiddleware", *http_stacks.MIDDLEWARE]
    with override_settings(MIDDLEWARE=middleware):
        client = Client(headers=KEY)
        for _ in range(2):
            answer = client.post("/form", {"order": "7", "file": io.BytesIO(b"contents")})
            assert answer.content == b"1"
    assert RUNS == [({"order": "7"}, {"file": b"contents"})]


def test_a_view_that_fails_frees_the_key() -> None:
    client = Client(headers=KEY, raise_request_exception=False)
    assert [client.post("/fail").status_code for _ in range(2)] == [500, 500]
    assert RUNS == ["fail", "fail"]
    with pytest.raises(KeyError, match="the view failed"):
        Client(headers=KEY).post("/fail")


class Interrupt(BaseException):
    """What Django does not make an answer of: a time-out's signal, Ctrl-C."""


@pytest.mark.parametrize("is_async", [False, True])
def test_an_interrupted_view_frees_the_key(is_async: bool) -> None:
    """As a crash that is told at once: the next request runs it."""
    runs: list[int] = []

    def ran() -> HttpResponse:
        runs.append(1)
        if len(runs) == 1:
            raise Interrupt
        return HttpResponse("done")

    call = through(ran, is_async=is_async)
    with pytest.raises(Interrupt):
        call()
    assert call().content == b"done"
    assert call()["Idempotency-Replayed"] == "true"
    assert len(runs) == 2


@pytest.mark.parametrize("is_async", [False, True])
def test_an_answer_that_cannot_be_read_frees_the_key(is_async: bool) -> None:
    """As one that middleware further in makes of a template, which nobody renders there."""
    answers = [SimpleTemplateResponse(engines["django"].from_string("x")), HttpResponse("done")]
    call = through(lambda: answers.pop(0), is_async=is_async)
    with pytest.raises(ContentNotRenderedError):
        call()
    assert call().content == b"done"


def through(ran: Callable[[], HttpResponse], *, is_async: bool) -> Callable[[], Any]:
    """A request through a middleware of that colour, to what answers once the key is claimed."""

    async def main(request: HttpRequest) -> Any:
        async def get_response(request: HttpRequest) -> Any:
            return await middleware.process_view(request, pay) or ran()

        middleware = IdempotencyMiddleware(get_response)
        return await middleware(request)

    def call() -> Any:
        request = RequestFactory(headers=KEY).post("/pay")
        if is_async:
            return asyncio.run(main(request))
        middleware = IdempotencyMiddleware(lambda request: middleware.process_view(request, pay) or ran())
        return middleware(request)

    return call


def test_a_template_is_rendered_before_it_is_kept() -> None:
    client = Client(headers=KEY)
    answers = [client.post("/template") for _ in range(2)]
    assert [answer.content for answer in answers] == [b"run 1"] * 2


@pytest.mark.parametrize("client_type", [Client, AsyncClient])
def test_djangos_own_limit_of_a_body_holds_with_a_key_too(client_type: Any) -> None:
    async def ask(body: bytes) -> int:
        client = client_type(raise_request_exception=False)
        found = client.post("/pay", body, "application/json", headers=KEY)
        return (await found if client_type is AsyncClient else found).status_code

    post = (lambda body: asyncio.run(ask(body))) if client_type is AsyncClient else (lambda body: drive(ask(body)))
    with override_settings(DATA_UPLOAD_MAX_MEMORY_SIZE=5):
        assert post(b"123456") == 400
        assert RUNS == []
        assert post(b"12345") == 201


def test_a_body_that_ends_early_runs_nothing() -> None:
    from django.core.handlers.wsgi import WSGIHandler

    said: list[str] = []
    environ = {
        **Client()._base_environ(),
        "REQUEST_METHOD": "POST",
        "PATH_INFO": "/pay",
        "CONTENT_LENGTH": "8",
        "HTTP_IDEMPOTENCY_KEY": "k",
        "wsgi.input": io.BytesIO(b"half"),
    }
    answer = WSGIHandler()(environ, lambda status, headers: said.append(status))
    answer.close()
    assert said == ["400 Bad Request"]
    assert RUNS == []


@pytest.mark.parametrize("url", ["/slow", "/slow-sync"])
def test_a_view_whose_client_leaves_runs_on_and_its_answer_is_kept(url: str) -> None:
    """Django cancels an async view when its client is gone; with a key it does not."""
    global GATE, ENTERED

    async def main() -> None:
        global GATE, ENTERED
        GATE, ENTERED = (asyncio.Event(), asyncio.Event()) if url == "/slow" else (threading.Event(), threading.Event())
        handler = ASGIHandler()
        left = asyncio.Event()
        sent: list[Any] = []
        requests = [{"type": "http.request", "body": b"{}"}]

        async def receive() -> Any:
            if requests:
                return requests.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": url,
            "query_string": b"",
            "headers": [(b"idempotency-key", b"k"), (b"content-length", b"2"), (b"host", b"shop")],
        }
        first = asyncio.ensure_future(handler(dict(scope), receive, send))
        while not ENTERED.is_set():
            await asyncio.sleep(0.001)
        left.set()
        for _ in range(10):
            await asyncio.sleep(0)
        assert RUNS == []
        GATE.set()
        await first
        assert len(RUNS) == 1
        left.clear()
        requests.append({"type": "http.request", "body": b"{}"})
        sent.clear()
        await handler(dict(scope), receive, send)
        assert sent[0]["status"] == 201
        assert sent[1]["body"] == b'{"number": 1}'

    asyncio.run(main())
    assert len(RUNS) == 1


def test_the_key_is_of_the_account_that_the_scope_names() -> None:
    backend = LocalBackend()
    with override_settings(
        IDEMPOTENCY={"scope": lambda request: request.native.headers["X-Account"], "backend": backend}
    ):
        for account in ("a", "b"):
            Client(headers={**KEY, "X-Account": account}).post("/pay")
    assert len(RUNS) == 2

    async def scan() -> Any:
        return [record.key async for record in backend.scan()]

    assert sorted(drive(scan())) == ["1:a:k", "1:b:k"]
