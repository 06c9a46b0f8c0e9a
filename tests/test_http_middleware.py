"""The middleware as clients see it: the same promises on Starlette, FastAPI's routes, Flask and Django, sync and async."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Faulty
from http_stacks import STACKS, Answer, AsyncStack, DjangoAsync, FastAPIRoute, Stack, Starlette, closing_backends

from idempotent import Compressed, Encrypted, LocalBackend, current_call
from idempotent._drive import drive
from idempotent._record import Granted, RecordId
from idempotent.http import GLOBAL, Response

LOCAL = "local://"


@pytest.fixture(params=STACKS, ids=lambda stack: stack.__name__)
def stack_type(request: pytest.FixtureRequest) -> type[Stack]:
    return request.param


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with closing_backends():
        yield


def scanned(backend: Any) -> list[Any]:
    async def scan() -> list[Any]:
        return [record async for record in backend.scan()]

    return drive(scan())


def claimed_by_another(backend: Any, rid: RecordId, *, lease: float, keep: float | None = 60) -> Granted:
    claim = backend.claim(rid, attempt=b"other-by", fingerprint=b"", lease=lease, keep=keep, takeover=True)
    granted = drive(claim)
    assert isinstance(granted, Granted)
    return granted


def test_a_duplicate_gets_the_same_answer_and_the_effect_happens_once(
    stack_type: type[Stack], backend_url: str
) -> None:
    stack = stack_type(backend=backend_url)
    first = stack.post(key="k-1")
    again = [stack.post(key="k-1") for _ in range(2)]
    assert stack.effects == ["/pay"]
    assert first.status == 201
    assert not first.replayed
    for answer in again:
        assert (answer.status, answer.body) == (first.status, first.body) == (201, b'{"number": 1}')
        assert answer.replayed
        assert answer.get("cache-control") == "no-store"
        assert answer.get("content-length") == str(len(first.body))
    assert stack.post(key="k-2").body == b'{"number": 2}'


def test_a_replay_has_the_headers_on_the_list_and_no_others(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, keep_headers=["X-Cost"])
    first, again = stack.post(key="k"), stack.post(key="k")
    for name in ("location", "link", "content-type", "x-cost"):
        assert first.all(name)
        assert again.all(name) == first.all(name)
    if stack.can_repeat:
        assert again.all("link") == ["</a>; rel=a", "</b>; rel=b"]
    assert first.get("set-cookie")
    assert first.get("x-internal") == "yes"
    for name in ("set-cookie", "x-internal", "date"):
        assert again.get(name) is None


def test_a_quoted_key_and_a_bare_one_are_the_same(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    stack.post(key="8e03978e-40d5-43e8-bc93-6894a57f9324")
    assert stack.post(key='"8e03978e-40d5-43e8-bc93-6894a57f9324"').replayed
    assert len(stack.effects) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PATCH"},
        {"path": "/pay/other"},
        {"path": "/pay?a=1"},
        {"body": b'{"amount": 2}'},
        {"headers": [("content-type", "text/plain")]},
    ],
    ids=["method", "path", "query", "body", "content type"],
)
def test_a_key_with_another_request_is_refused_with_422(stack_type: type[Stack], change: dict[str, Any]) -> None:
    stack = stack_type(backend=LOCAL)
    stack.post(key="k")
    answer = stack.send(**{"method": "POST", "path": "/pay", "body": b"{}", "key": "k", **change})
    assert (answer.status, answer.problem) == (422, "key-reused")
    assert len(stack.effects) == 1
    assert stack.post(key="k").replayed


def test_while_the_first_runs_a_duplicate_gets_409_with_retry_after(stack_type: type[Stack], backend_url: str) -> None:
    stack = stack_type(backend=backend_url, lease=20)
    first = stack.start("/gate", key="k")
    assert stack.shop.entered.acquire(timeout=30)
    duplicate = stack.post("/gate", key="k")
    assert (duplicate.status, duplicate.problem) == (409, "in-progress")
    assert 1 <= int(duplicate.get("retry-after") or 0) <= 20
    # The payload is compared first: another request learns nothing of the one that runs.
    assert stack.post("/gate", b"[]", key="k").status == 422
    stack.shop.gate.set()
    assert first.result(30).status == 201
    assert stack.post("/gate", key="k").replayed
    assert stack.effects == ["/gate"]


def test_with_wait_a_duplicate_waits_for_the_answer(stack_type: type[Stack], backend_url: str) -> None:
    waiting = threading.Semaphore(0)
    stack = stack_type(backend=backend_url, wait=30)
    from idempotent import configure

    configure(hooks=[lambda event: waiting.release() if event.name == "waited" else None])
    first = stack.start("/gate", key="k")
    assert stack.shop.entered.acquire(timeout=30)
    duplicates = [stack.start("/gate", key="k") for _ in range(3)]
    for _ in duplicates:
        assert waiting.acquire(timeout=30)
    stack.shop.gate.set()
    assert {answer.result(30).body for answer in (first, *duplicates)} == {b'{"number": 1}'}
    assert [answer.result(30).replayed for answer in duplicates] == [True] * 3
    assert stack.effects == ["/gate"]


def test_no_more_requests_wait_than_are_allowed(stack_type: type[Stack]) -> None:
    waiting = threading.Semaphore(0)
    stack = stack_type(backend=LOCAL, wait=30, max_waiting=1)
    from idempotent import configure

    configure(hooks=[lambda event: waiting.release() if event.name == "waited" else None])
    first = stack.start("/gate", key="k")
    assert stack.shop.entered.acquire(timeout=30)
    duplicate = stack.start("/gate", key="k")
    assert waiting.acquire(timeout=30)
    assert stack.post("/gate", key="k").problem == "in-progress"
    stack.shop.gate.set()
    assert (first.result(30).status, duplicate.result(30).replayed) == (201, True)


def test_a_request_without_a_key_is_left_alone_unless_one_is_required(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    assert [stack.post().body for _ in range(2)] == [b'{"number": 1}', b'{"number": 2}']
    stack = stack_type(backend=LOCAL, required=True)
    answer = stack.post()
    assert (answer.status, answer.problem) == (400, "key-missing")
    assert stack.effects == []
    assert stack.post(key="k").status == 201
    assert stack.send("PUT", "/pay").status == 201


@pytest.mark.parametrize("key", ["", '""', "a b", "a,b", 'a"', '"a";b=1', "x" * 256, '"a', "a;b=1"])
def test_a_malformed_key_is_refused_with_400(stack_type: type[Stack], key: str) -> None:
    stack = stack_type(backend=LOCAL)
    answer = stack.post(headers=[("idempotency-key", key)])
    assert (answer.status, answer.problem) == (400, "key-invalid")
    assert stack.effects == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
def test_other_methods_are_left_alone(stack_type: type[Stack], method: str) -> None:
    stack = stack_type(backend=LOCAL, required=True)
    answers = [stack.send(method, "/pay", b"", key="k") for _ in range(2)]
    assert [answer.status for answer in answers] == [201, 201]
    assert not any(answer.replayed for answer in answers)
    assert len(stack.effects) == 2


def test_methods_that_are_named_are_served(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, methods=["DELETE"])
    assert not stack.send("DELETE", "/pay", b"", key="k").replayed
    assert stack.send("DELETE", "/pay", b"", key="k").replayed
    assert [stack.post(key="k").replayed for _ in range(2)] == [False, False]


@pytest.mark.parametrize("status", [200, 202, 302, 304, 400, 404, 409, 422, 451])
def test_an_answer_of_this_status_is_kept(stack_type: type[Stack], status: int) -> None:
    stack = stack_type(backend=LOCAL)
    first, again = (stack.post(f"/status/{status}", key="k") for _ in range(2))
    assert (again.status, again.body, again.replayed) == (status, first.body, True)
    assert len(stack.effects) == 1


@pytest.mark.parametrize("status", [401, 403, 408, 425, 429, 500, 503])
def test_an_answer_of_this_status_frees_the_key(stack_type: type[Stack], status: int) -> None:
    stack = stack_type(backend=LOCAL)
    answers = [stack.post(f"/status/{status}", key="k") for _ in range(2)]
    assert [answer.status for answer in answers] == [status] * 2
    assert not any(answer.replayed or answer.get("idempotency-stored") for answer in answers)
    assert len(stack.effects) == 2


def test_answers_are_kept_for_ttl_and_those_to_mistakes_for_error_ttl(stack_type: type[Stack]) -> None:
    backend = LocalBackend()
    stack = stack_type(backend=backend, ttl=500, error_ttl=20)
    for status, ttl in ((200, 500), (303, 500), (404, 20)):
        stack.post(f"/status/{status}", key=f"k{status}")
        (record,) = [each for each in scanned(backend) if each.key.endswith(str(status))]
        assert ttl - 15 < record.expires_in <= ttl
    stack = stack_type(backend=LocalBackend(), error_ttl=0)
    assert [stack.post("/status/404", key="k").replayed for _ in range(2)] == [False, False]
    stack = stack_type(backend=LocalBackend(), ttl=1e-6)
    assert [stack.post("/status/200", key="k").replayed for _ in range(2)] == [False, False]


def test_an_error_in_the_application_frees_the_key(stack_type: type[Stack]) -> None:
    backend = LocalBackend()
    stack = stack_type(backend=backend)
    try:
        assert stack.post("/raise", key="k").status == 500
    except RuntimeError:
        pass
    assert scanned(backend) == []
    try:
        stack.post("/raise", key="k")
    except RuntimeError:
        pass
    assert len(stack.effects) == 2


def test_a_stream_is_passed_on_and_duplicates_are_told_that_it_was_done(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    first = stack.post("/stream", key="k")
    assert (first.status, first.body) == (200, b"part 1 and another")
    assert first.get("idempotency-stored") == "false"
    again = stack.post("/stream", key="k")
    assert (again.status, again.problem, again.get("retry-after")) == (409, "result-unavailable", None)
    assert len(stack.effects) == 1


def test_an_answer_over_max_response_is_passed_on_and_duplicates_are_told_that_it_was_done(
    stack_type: type[Stack],
) -> None:
    stack = stack_type(backend=LOCAL, max_response=1000)
    assert stack.post("/large?1000", key="fits").get("idempotency-stored") is None
    assert stack.post("/large?1000", key="fits").replayed
    first = stack.post("/large?1001", key="k")
    assert (first.body, first.get("idempotency-stored")) == (b"x" * 1001, "false")
    again = stack.post("/large?1001", key="k")
    assert (again.status, again.problem) == (409, "result-unavailable")
    assert len(stack.effects) == 2


def test_an_answer_without_a_body_is_replayed_without_one(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    first, again = (stack.post("/empty", key="k") for _ in range(2))
    for answer in (first, again):
        assert (answer.status, answer.body) == (204, b"")
    assert again.replayed
    assert again.get("content-length") is None
    assert again.get("location") == "/nothing"


def test_the_application_reads_the_body_as_it_was_sent(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    deep = b"[" * 100_000  # what no JSON parser takes is just bytes here
    assert stack.post("/echo", deep, key="k").body == deep
    assert stack.post("/echo", deep, key="k").replayed


def test_a_body_over_max_body_is_refused_with_413(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, max_body=1000)
    answer = stack.post("/echo", b"x" * 1001, key="k")
    assert (answer.status, answer.problem) == (413, "body-too-large")
    assert stack.effects == []
    assert stack.post("/echo", b"x" * 1000, key="k").status == 200
    assert stack.post("/echo", b"x" * 1001).status == 200  # without a key it is the application's business


@pytest.mark.parametrize("stack_type", [Starlette, FastAPIRoute, DjangoAsync], ids=lambda stack: stack.__name__)
def test_a_chunked_body_is_counted_as_it_comes(stack_type: type[AsyncStack]) -> None:
    stack = stack_type(backend=LOCAL, max_body=1000)
    assert stack.post("/echo", [b"x" * 500] * 2, key="k").body == b"x" * 1000
    assert stack.post("/echo", [b"x" * 250] * 4, key="k").replayed
    answer = stack.post("/echo", [b"x" * 500] * 3, key="other")
    assert (answer.status, answer.problem) == (413, "body-too-large")
    assert len(stack.effects) == 1


def test_with_the_backend_out_nothing_runs_and_503_says_when_to_come_back(stack_type: type[Stack]) -> None:
    backend = Faulty(LocalBackend())
    stack = stack_type(backend=backend)
    backend.plant("claim", "before")
    answer = stack.post(key="k")
    assert (answer.status, answer.problem) == (503, "backend-unavailable")
    assert int(answer.get("retry-after") or 0) >= 1
    assert stack.effects == []
    assert stack.post(key="k").status == 201


def test_an_answer_that_the_backend_did_not_take_says_so(stack_type: type[Stack]) -> None:
    backend = Faulty(LocalBackend())
    stack = stack_type(backend=backend, lease=0.4)
    backend.plant("complete", "before", times=10_000)
    answer = stack.post(key="k")
    assert (answer.status, answer.body, answer.get("idempotency-stored")) == (201, b'{"number": 1}', "false")


@pytest.mark.parametrize("path", ["/gate", "/gate/409"])
def test_a_run_that_another_has_overtaken_does_not_give_its_own_answer(stack_type: type[Stack], path: str) -> None:
    backend = LocalBackend()
    stack = stack_type(backend=backend)
    rid = RecordId("http", "5:alice:k")
    first = stack.start(path, key="k")
    assert stack.shop.entered.acquire(timeout=30)
    drive(backend.forget(rid, force=True))
    claimed_by_another(backend, rid, lease=60)
    stack.shop.gate.set()
    answer = first.result(30)
    assert (answer.status, answer.problem, answer.get("retry-after")) == (409, "in-progress", "1")
    assert answer.get("set-cookie") is answer.get("x-internal") is None
    assert answer.get("content-length") == str(len(answer.body))


def test_an_unknown_outcome_is_409_without_retry_after(stack_type: type[Stack]) -> None:
    backend = LocalBackend()
    stack = stack_type(backend=backend, on_crash="raise", fingerprint=False)
    claimed_by_another(backend, RecordId("http", "5:alice:k"), lease=1e-6, keep=None)
    answer = stack.post(key="k")
    assert (answer.status, answer.problem, answer.get("retry-after")) == (409, "outcome-unknown", None)
    assert stack.effects == []


def test_a_probe_may_answer_for_a_run_that_died(stack_type: type[Stack]) -> None:
    from idempotent import Applied

    def probe(call: Any) -> Any:
        assert call.arguments["request"].path == "/pay"
        return Applied(Response(201, [(b"location", b"/payments/9")], b"found"))

    backend = LocalBackend()
    stack = stack_type(backend=backend, on_crash=probe, fingerprint=False)
    claimed_by_another(backend, RecordId("http", "5:alice:k"), lease=1e-6, keep=None)
    answer = stack.post(key="k")
    assert (answer.status, answer.body, answer.get("location")) == (201, b"found", "/payments/9")
    assert answer.replayed
    assert stack.effects == []


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"number": 9}, "found dict, which is no idempotent.http.Response"),
        (Response(201, [("location", "/payments/9")]), "headers that are no list of pairs of bytes"),  # type: ignore[list-item]
    ],
    ids=["dict", "lines"],
)
def test_a_probe_that_finds_what_cannot_be_sent_is_an_error_that_says_so_and_settles_nothing(
    stack_type: type[Stack], found: Any, message: str
) -> None:
    from idempotent import Applied

    answers: list[Any] = [found, None]

    def probe(call: Any) -> Any:
        return Applied(answers.pop(0))

    async def probe_async(call: Any) -> Any:
        return probe(call)

    backend = LocalBackend()
    is_async = stack_type.is_async
    stack = stack_type(backend=backend, on_crash=probe_async if is_async else probe, fingerprint=False)
    claimed_by_another(backend, RecordId("http", "5:alice:k"), lease=1e-6, keep=None)
    try:
        assert stack.post(key="k").status == 500
    except TypeError as error:
        assert message in str(error)
    answer = stack.post(key="k")  # that it was done, and no more
    assert (answer.status, answer.problem, answers) == (409, "result-unavailable", [])
    assert stack.effects == []


def test_keys_of_two_callers_never_meet(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    pairs = [("acme:eu", "42"), ("acme", "eu:42"), ("acme:e", "u:42"), ("bob", "42")]
    answers = [stack.post(key=key, headers=[("x-user", user)]) for user, key in pairs]
    assert [answer.replayed for answer in answers] == [False] * 4
    assert len(stack.effects) == 4
    assert [stack.post(key=key, headers=[("x-user", user)]).replayed for user, key in pairs] == [True] * 4


def test_with_the_global_scope_all_callers_share_their_keys(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, scope=GLOBAL)
    answers = [stack.post(key="k", headers=[("x-user", user)]) for user in ("a", "b")]
    assert [answer.replayed for answer in answers] == [False, True]


def test_the_scope_may_refuse_a_request_which_is_asked_each_time(stack_type: type[Stack]) -> None:
    known = {"token-1": "alice"}

    def scope(request: Any) -> Any:
        account = known.get(request.headers.get("authorization", ""))
        return account or Response(401, [(b"www-authenticate", b"Bearer")], b"who?")

    stack = stack_type(backend=LOCAL, scope=scope)
    headers = [("authorization", "token-1")]
    assert stack.post(key="k", headers=headers).status == 201
    assert stack.post(key="k", headers=headers).replayed
    answer = stack.post(key="k")
    assert (answer.status, answer.body, answer.get("www-authenticate")) == (401, b"who?", "Bearer")
    known.clear()  # the token is revoked: the recorded answer is out of its reach
    assert stack.post(key="k", headers=headers).status == 401
    assert len(stack.effects) == 1


@pytest.mark.parametrize("who", [None, "", 5], ids=repr)
def test_a_scope_that_names_nobody_is_an_error_and_nothing_runs(stack_type: type[Stack], who: Any) -> None:
    stack = stack_type(backend=LOCAL, scope=lambda request: who)
    try:
        assert stack.post(key="k").status == 500
    except TypeError as error:
        assert "scope= must return who is asking" in str(error)
    assert stack.effects == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Response(401, [("www-authenticate", "Bearer")]), "headers that are no list of pairs of bytes"),  # type: ignore[list-item]
        (Response(401, {"www-authenticate": "Bearer"}), "headers that are no list of pairs of bytes"),  # type: ignore[arg-type]
        (Response(401, body="who?"), "a body of str"),  # type: ignore[arg-type]
        (Response("401"), "a status of '401'"),  # type: ignore[arg-type]
        (Response(99), "a status of 99"),
    ],
    ids=["lines", "headers", "body", "status", "number"],
)
def test_a_scope_that_refuses_by_what_is_no_response_is_an_error_that_says_what(
    stack_type: type[Stack], answer: Response, message: str
) -> None:
    stack = stack_type(backend=LOCAL, scope=lambda request: answer)
    try:
        assert stack.post(key="k").status == 500
    except TypeError as error:
        assert message in str(error)
    assert stack.effects == []


def test_a_refusals_repeated_lines_stay_lines(stack_type: type[Stack]) -> None:
    lines = [
        (b"set-cookie", b"a=1; Path=/"),
        (b"set-cookie", b"b=2"),
        (b"link", b"</a>; rel=a"),
        (b"link", b"</b>; rel=b"),
    ]
    answer = stack_type(backend=LOCAL, scope=lambda request: Response(401, lines)).post(key="k")
    assert answer.all("set-cookie") == ["a=1; Path=/", "b=2"]
    assert answer.all("link") == ["</a>; rel=a", "</b>; rel=b"]


def test_a_scope_too_long_for_a_key_is_refused(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    answer = stack.post(key="k", headers=[("x-user", "x" * 2000)])
    assert (answer.status, answer.problem) == (400, "key-invalid")
    assert stack.effects == []


def test_paths_say_what_is_served(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, required=True, paths=["/pay*", "!/pay/quote"])
    assert stack.post("/pay").problem == stack.post("/pay/card").problem == "key-missing"
    assert [stack.post(path).status for path in ("/pay/quote", "/echo")] == [201, 200]
    stack = stack_type(backend=LOCAL, required=True, paths=lambda request: request.path.endswith("/card"))
    assert stack.post("/pay").status == 201
    assert stack.post("/pay/card").problem == "key-missing"


def test_problem_answers_link_the_services_own_page(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, required=True, docs_url="https://shop.example/docs#keys")
    answer = stack.post()
    assert answer.get("link") == '<https://shop.example/docs#keys>; rel="describedby"'
    assert answer.get("content-type") == "application/problem+json"


def test_what_is_compared_may_be_chosen(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, fingerprint=False)
    assert [stack.post(body=body, key="k").replayed for body in (b"1", b"2")] == [False, True]
    stack = stack_type(backend=LOCAL, fingerprint=lambda request, body: body[:1], namespace="own")
    assert [stack.post(body=body, key="k").status for body in (b"1a", b"1b", b"2")] == [201, 201, 422]


def test_another_header_may_carry_the_key(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL, header="X-Request-Id")
    assert [stack.post(headers=[("x-request-id", "k")]).replayed for _ in range(2)] == [False, True]
    assert [stack.post(key="other").replayed for _ in range(2)] == [False, False]


def test_what_is_kept_may_be_encrypted_and_compressed(stack_type: type[Stack]) -> None:
    backend = Faulty(LocalBackend())
    bodies = []
    complete = backend.inner.complete

    async def spy(*args: Any, **kwargs: Any) -> Any:
        bodies.append(kwargs["body"])
        return await complete(*args, **kwargs)

    keys = {"2026": bytes(32)}
    backend.inner.complete = spy  # type: ignore[method-assign]
    backend.inner.asynchronous().complete = spy  # type: ignore[method-assign]
    stack = stack_type(backend=backend, serializer=Encrypted(Compressed(), keys))
    first, again = (stack.post(key="k") for _ in range(2))
    assert (again.body, again.replayed) == (first.body, True)
    assert len(bodies) == 1
    assert b"number" not in bodies[0]


def test_the_steps_of_a_request_are_kept_as_its_answer_is(stack_type: type[Stack], tmp_path: Path) -> None:
    """In sync code on every stack; a rerun goes on behind them, and what is encrypted is nowhere in plain text."""
    charged: list[str] = []

    def charge(card: str) -> str:
        charged.append(card)
        return f"the secret of {card}"

    def pay() -> str:
        call = current_call()
        assert call is not None
        receipt = call.step("charge", charge, "4242")
        if len(stack.effects) == 1:
            raise KeyError("before the answer")
        return receipt

    serializer = Encrypted(None, {"2026": bytes(32)})
    stack = stack_type(backend=f"sqlite:///{tmp_path}/records.db", serializer=serializer)
    stack.shop.hook = pay
    with contextlib.suppress(KeyError):
        assert stack.post(key="k").status == 500
    assert stack.post(key="k").status == 201
    assert stack.post(key="k").replayed
    assert (charged, stack.shop.seen) == (["4242"], "the secret of 4242")
    kept = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"aesgcm1+json1" in kept
    assert b"the secret" not in kept


def test_the_application_sees_its_call(stack_type: type[Stack]) -> None:
    stack = stack_type(backend=LOCAL)
    stack.shop.hook = current_call
    stack.post(key="k")
    call = stack.shop.seen
    assert call.key == "5:alice:k"
    assert call.token > 0
    assert len(call.downstream_key("stripe")) == 32
    assert call.arguments["request"].path == "/pay"
    assert call.arguments["body"] == b"{}"
    stack.post()
    assert stack.shop.seen is None


def test_a_record_is_the_same_on_every_stack() -> None:
    backend = LocalBackend()
    body = '{"amount": "5 €"}'.encode()
    answers: list[Answer] = []
    effects = 0
    for each in STACKS:
        stack = each(backend=backend)
        answers.append(stack.post("/pay/caf%C3%A9?b=1&a=%20", body, key="k"))
        effects += len(stack.effects)
    assert effects == 1
    assert {answer.status for answer in answers} == {201}
    assert [answer.replayed for answer in answers] == [False] + [True] * (len(STACKS) - 1)


def test_defaults_are_read_when_a_request_comes_and_followed_when_they_change(stack_type: type[Stack]) -> None:
    from idempotent import configure

    configure(backend=LocalBackend())
    stack = stack_type()
    assert [stack.post(key="k").replayed for _ in range(2)] == [False, True]
    configure(backend=LocalBackend())
    assert not stack.post(key="k").replayed


def test_many_duplicates_at_once_have_one_effect_and_one_answer(stack_type: type[Stack], backend_url: str) -> None:
    stack = stack_type(backend=backend_url, wait=30)
    calls = [stack.start(key="k") for _ in range(20)]
    answers = [call.result(60) for call in calls]
    assert {(answer.status, answer.body) for answer in answers} == {(201, b'{"number": 1}')}
    assert sum(answer.replayed for answer in answers) == 19
    assert len(stack.effects) == 1
