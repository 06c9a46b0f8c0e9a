"""Decorated functions as the plain functions that frameworks expect: FastAPI, Flask, Celery."""

import asyncio
import inspect
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from colours import COLOURS, Colour
from faulty import Faulty

import idempotent as package
from idempotent import configure, idempotent

CALLS: list[str] = []


@pytest.fixture(autouse=True)
def _fresh() -> None:
    configure(backend="local://")
    CALLS.clear()


def test_fastapi_serves_sync_and_async_routes() -> None:
    from fastapi import FastAPI
    from httpx import ASGITransport, AsyncClient
    from pydantic import BaseModel

    class Payment(BaseModel):
        order: str
        amount: int

    class Receipt(BaseModel):
        order: str
        number: int

    app = FastAPI()

    @app.post("/sync")
    @idempotent(key="pay:{payment.order}", namespace="sync")
    def pay(payment: Payment) -> Receipt:
        CALLS.append(payment.order)
        return Receipt(order=payment.order, number=len(CALLS))

    @app.post("/async/{order}")
    @idempotent(key="pay:{order}", namespace="async")
    async def pay_async(order: str, amount: int = 1) -> dict[str, int]:
        CALLS.append(order)
        await asyncio.sleep(0)
        return {"number": len(CALLS), "amount": amount}

    async def main() -> Any:
        async with AsyncClient(transport=ASGITransport(app), base_url="http://shop") as client:
            body = {"order": "o1", "amount": 5}
            paid = [(await client.post("/sync", json=body)).json() for _ in range(2)]
            assert paid == [{"order": "o1", "number": 1}] * 2
            paid = [(await client.post("/async/o2")).json() for _ in range(2)]
            assert paid == [{"number": 2, "amount": 1}] * 2
            assert (await client.post("/sync", json={"order": "o1"})).status_code == 422
            return (await client.get("/openapi.json")).json()

    schema = asyncio.run(main())
    assert "Payment" in schema["components"]["schemas"]
    assert CALLS == ["o1", "o2"]


def test_flask_serves_a_decorated_view() -> None:
    from flask import Flask

    app = Flask(__name__)

    @app.post("/pay/<order>")
    @idempotent(key="pay:{order}")
    def pay(order: str) -> dict[str, Any]:
        CALLS.append(order)
        return {"number": len(CALLS)}

    client = app.test_client()
    assert [client.post("/pay/o1").get_json() for _ in range(2)] == [{"number": 1}] * 2
    assert CALLS == ["o1"]


def test_celery_tasks_bound_and_not_run_eagerly() -> None:
    from celery import Celery

    app = Celery("t", broker="memory://", backend="cache+memory://")
    app.conf.task_always_eager = True
    app.conf.task_eager_propagates = True

    @app.task
    @idempotent(key="pay:{order}", namespace="plain")
    def pay(order: str) -> int:
        CALLS.append(order)
        return len(CALLS)

    @app.task(bind=True)
    @idempotent(key="pay:{order}", namespace="bound")
    def pay_bound(self: Any, order: str) -> int:
        CALLS.append(self.name)
        return len(CALLS)

    assert [pay.delay("o1").get() for _ in range(2)] == [1, 1]
    assert [pay_bound.delay(order="o1").get() for _ in range(2)] == [2, 2]
    assert package.key_for(pay, "o1") == "pay:o1"
    record = package.peek(pay, "o1")
    assert record is not None
    assert record.state == "completed"
    assert package.forget(pay, "o1") is True
    assert pay.delay("o1").get() == 3
    assert package.stats(pay)["completed"] == 2


WORKER = """
import sys
from celery import Celery
from idempotent import idempotent

app = Celery("shop", broker="{broker}", backend="{broker}")
app.conf.task_acks_late = True
app.conf.worker_hijack_root_logger = False
app.conf.broker_connection_retry_on_startup = True

@app.task(name="pay")
@idempotent(key="pay:{{order}}", backend="{backend}")
def pay(order):
    with open("{effects}", "a") as file:
        file.write(order + "\\n")
    return order.upper()

@app.task(name="bound", bind=True)
@idempotent(key="pay:{{order}}", backend="{backend}")
def bound(self, order):
    with open("{effects}", "a") as file:
        file.write(self.name + order + "\\n")
    return order.upper()
"""


def test_a_real_celery_worker_runs_duplicates_once(redis_server: Any, tmp_path: Path) -> None:
    effects = tmp_path / "effects"
    broker = f"redis://127.0.0.1:{redis_server.port}/5"
    backend = f"redis://127.0.0.1:{redis_server.port}/0?prefix=celery-{tmp_path.name}"
    (tmp_path / "shop.py").write_text(WORKER.format(broker=broker, backend=backend, effects=effects))
    here = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}}
    worker = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "shop", "worker", "--pool=threads", "--concurrency=4", "-l", "ERROR"],
        **here,
    )
    try:
        client = (
            "from shop import pay, bound\n"
            "results = [task.delay(order) for task, order in [(pay, 'o1'), (bound, 'o2')] for _ in range(10)]\n"
            "print([r.get(timeout=40) for r in results])\n"
        )
        answers = subprocess.run(
            [sys.executable, "-c", client], **here, capture_output=True, text=True, timeout=50, check=True
        ).stdout
    finally:
        worker.terminate()
        worker.wait(20)
    assert answers.strip() == str(["O1"] * 10 + ["O2"] * 10)
    assert sorted(effects.read_text().split()) == ["boundo2", "o1"]


def test_a_decorated_function_is_a_plain_function_of_its_kind() -> None:
    @idempotent
    def sync(a: int, *, b: str = "x") -> str:
        """Doc."""
        return b

    @idempotent
    async def coroutine(a: int) -> int:
        return a

    assert inspect.isfunction(sync)
    assert not inspect.iscoroutinefunction(sync)
    assert inspect.iscoroutinefunction(coroutine)
    assert str(inspect.signature(sync)) == "(a: int, *, b: str = 'x') -> str"
    assert (sync.__name__, sync.__doc__) == ("sync", "Doc.")
    assert sync.__wrapped__(1) == "x"


def test_methods_classmethods_and_staticmethods() -> None:
    class Account:
        def __init__(self, number: int) -> None:
            self.id = number

        @idempotent(key="{order}")
        def charge(self, order: str) -> list[Any]:
            CALLS.append(order)
            return [self.id, order]

        @idempotent(key="{self.id}:{order}")
        async def charge_own(self, order: str) -> list[Any]:
            return [self.id, order]

        @classmethod
        @idempotent(key="{order}")
        def above(cls, order: str) -> str:
            CALLS.append("above")
            return cls.__name__ + order

        @idempotent(key="{order}")
        @classmethod
        def below(cls, order: str) -> str:
            return cls.__name__ + order

        @staticmethod
        @idempotent
        def static(order: str) -> str:
            CALLS.append("static")
            return order

    one, two = Account(1), Account(2)
    assert one.charge("a") == two.charge("a") == [1, "a"]
    assert asyncio.run(one.charge_own("a")) == [1, "a"]
    assert asyncio.run(two.charge_own("a")) == [2, "a"]
    assert Account.above("a") == one.above("a") == "Accounta"
    assert Account.below("a") == one.below("a") == "Accounta"
    assert Account.static("a") == one.static("a") == "a"
    assert CALLS == ["a", "above", "static"]
    assert Account.charge.key_for(one, "a") == "a"
    assert Account.charge.outcome(one, "a").replayed


def test_an_instance_in_an_all_argument_key_is_refused_with_both_ways_out() -> None:
    class Account:
        @idempotent
        def charge(self, order: str) -> None:
            CALLS.append(order)

    with pytest.raises(package.UnstableKey, match="key=") as refused:
        Account().charge("a")
    assert "ignore=" in str(refused.value)
    assert CALLS == []


def test_what_cannot_be_decorated_is_refused_by_name() -> None:
    def generator() -> Any:
        yield 1

    async def agenerator() -> Any:
        yield 1

    for wrong in (generator, agenerator, int, "x", 5):
        with pytest.raises(TypeError):
            idempotent(wrong)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"ttl": 0}, "ttl"),
        ({"ttl": "60"}, "ttl"),
        ({"lease": -1}, "lease"),
        ({"lease": True}, "lease"),
        ({"wait": -1}, "wait"),
        ({"wait": float("nan")}, "wait"),
        ({"ttl": float("inf")}, "ttl"),
        ({"backend": "mongodb://x"}, "mongodb"),
        ({"backend": 5}, "backend"),
        ({"key": 5}, "key"),
        ({"key": "{nobody}"}, "nobody"),
        ({"namespace": ""}, "namespace"),
        ({"namespace": 5}, "namespace"),
        ({"fingerprint": "x"}, "fingerprint"),
        ({"keep_result": 1}, "keep_result"),
        ({"ignore": "order"}, "ignore"),
        ({"ignore": ("nobody",)}, "nobody"),
        ({"error_ttl": {KeyboardInterrupt: 5}}, "error_ttl"),
        ({"error_ttl": {ValueError: 0}}, "error_ttl"),
        ({"error_ttl": [ValueError]}, "error_ttl"),
        ({"on_crash": "retry"}, "on_crash"),
        ({"on_outage": "ignore"}, "on_outage"),
        ({"serializer": object()}, "serializer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_option_is_refused_at_decoration_by_name(options: dict[str, Any], name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):

        @idempotent(**options)
        def work(order: str) -> str:
            return order


def test_a_call_that_does_not_fit_the_signature_is_the_functions_own_type_error() -> None:
    @idempotent
    def work(order: str) -> str:
        raise AssertionError

    with pytest.raises(TypeError, match=r"work\(\)|order"):
        work()  # type: ignore[call-arg]


def test_the_users_traceback_holds_one_frame_of_ours() -> None:
    @idempotent
    def work() -> None:
        raise KeyError

    with pytest.raises(KeyError) as caught:
        work()
    names = [Path(str(entry.path)).name for entry in caught.traceback]
    assert names == ["test_frameworks.py", "decorator.py", "test_frameworks.py"]


def test_stop_iteration_survives() -> None:
    @idempotent
    def work() -> None:
        raise StopIteration(5)

    with pytest.raises(StopIteration) as caught:
        work()
    assert caught.value.value == 5


def test_defaults_are_read_at_the_first_call_and_followed_when_they_change() -> None:
    @idempotent(key="k")
    def work() -> int:
        CALLS.append("x")
        return len(CALLS)

    configure(backend="local://", ttl=50)
    assert work() == 1
    record = work.peek()
    assert record is not None
    assert record.expires_in is not None
    assert 49 < record.expires_in <= 50
    configure(backend=package.LocalBackend(), ttl=60)
    assert work() == 2


def test_the_environment_names_the_default_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IDEMPOTENT_URL", f"sqlite:///{tmp_path}/default.db")
    configure(backend=None)

    @idempotent
    def work() -> int:
        return 1

    assert work() == 1
    assert (tmp_path / "default.db").exists()


def test_without_any_backend_it_warns_once_that_other_processes_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IDEMPOTENT_URL", raising=False)
    configure(backend=None)

    @idempotent
    def work(order: int) -> int:
        return order

    with pytest.warns(package.ProcessLocalWarning):
        work(1)
    assert [work(1), work(2)] == [1, 2]


@pytest.mark.parametrize("colour", COLOURS, ids=repr)
def test_a_near_deadline_is_not_overshot(colour: Colour) -> None:
    """`wait` bounds the whole call, also where its runner has raised and another one runs."""
    wait, first_takes = 2.0, 1.2
    entered = threading.Semaphore(0)
    ends = [threading.Event(), threading.Event()]

    def work() -> None:
        CALLS.append("run")
        end = ends[len(CALLS) - 1]
        entered.release()
        assert end.wait(30)
        raise KeyError(len(CALLS))

    def lasted(function: Any) -> float | None:
        began = time.monotonic()
        try:
            colour.call(function)
        except package.InProgress:
            return time.monotonic() - began
        except KeyError:
            return None

    # Two wait in the process behind the first; two, on a backend object of their own, in the store.
    backend = package.LocalBackend()
    here, apart = (colour.define(work, backend=each, namespace="n", wait=wait) for each in (backend, Faulty(backend)))
    first = colour.start(here)
    assert entered.acquire(timeout=30)
    began = time.monotonic()
    waiting = [COLOURS[0].start(lasted, function) for function in (here, here, apart, apart)]
    while (here.stats().get("waited"), apart.stats().get("waited")) != (2, 2):
        time.sleep(0.005)
    time.sleep(max(0.0, began + first_takes - time.monotonic()))  # so much of their wait is over
    ends[0].set()
    assert isinstance(first.exception(30), KeyError)
    assert entered.acquire(timeout=30)  # one of them runs now
    while sum(call.done() for call in waiting) < 3:
        time.sleep(0.005)
    ends[1].set()
    times = [call.result(30) for call in waiting]
    refused = [taken for taken in times if taken is not None]
    assert len(refused) == 3
    assert wait <= min(refused)
    assert max(refused) < first_takes + wait - 0.3
