"""Redelivered messages: real workers on real brokers, killed with the message unacknowledged; one effect each."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).parent


@pytest.fixture(scope="session")
def amqp_url() -> str:
    """The RabbitMQ that the environment names, or the one on the usual port of this machine."""
    url = os.environ.get("IDEMPOTENT_TEST_AMQP_URL")
    if url:
        return url
    url = "amqp://guest:guest@127.0.0.1:5672/%2F"
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", urlsplit(url).port or 5672), 2):
        return url
    reason = (
        "NO RABBITMQ TO TEST WITH: the tests cannot start one; install rabbitmq-server, or set"
        " IDEMPOTENT_TEST_AMQP_URL to a server's URL. Celery and Dramatiq are tested on Redis all the same"
    )
    if os.environ.get("CI") == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def broker(request: pytest.FixtureRequest) -> str:
    """The URL of the broker of that kind."""
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("amqp_url"))
    return f"redis://127.0.0.1:{request.getfixturevalue('redis_server').port}/0"


BROKERS = {"celery": ("rabbitmq", "redis"), "dramatiq": ("rabbitmq", "redis"), "aio-pika": ("rabbitmq",)}


@pytest.mark.parametrize(
    ("kind", "broker"),
    [(kind, broker) for kind, brokers in BROKERS.items() for broker in brokers],
    ids=["celery-rabbitmq", "celery-redis", "dramatiq-rabbitmq", "dramatiq-redis", "aio-pika-rabbitmq"],
    indirect=["broker"],
)
def test_a_message_whose_worker_is_killed_twice_has_one_effect(kind: str, broker: str, tmp_path: Path) -> None:
    queue = f"q{secrets.token_hex(6)}"
    setup = {
        "kind": kind,
        "broker": broker,
        "queue": queue,
        "url": f"sqlite:///{tmp_path}/records.db",
        "dir": str(tmp_path),
    }
    try:
        with worker(setup, "send") as sender:
            assert sender.wait(60) == 0
        # Killed inside the function: redelivered, and taken over when the lease is over.
        with worker(setup) as first:
            assert first.wait(60) == -signal.SIGKILL
        assert not (tmp_path / "effects").exists()
        # Killed after the outcome was recorded, and before the acknowledgement: redelivered, and replayed.
        with worker(setup) as second:
            assert second.wait(60) == -signal.SIGKILL
        assert (tmp_path / "effects").read_text() == "o-1\n"
        assert not (tmp_path / "result").exists()
        with worker(setup) as third:
            deadline = time.monotonic() + 60
            while not (tmp_path / "result").exists() or (tmp_path / "result").read_text() != "charged o-1":
                assert third.poll() is None, "the worker has ended"
                assert time.monotonic() < deadline, "the message has not come again"
                time.sleep(0.02)
        assert (tmp_path / "effects").read_text() == "o-1\n"
    finally:
        drop(kind, broker, queue)


@contextlib.contextmanager
def worker(setup: dict[str, str], *words: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "task_worker.py"), json.dumps(setup), *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def drop(kind: str, broker: str, queue: str) -> None:
    """Delete what the test left on the broker."""
    if broker.startswith("redis"):
        import redis

        with redis.Redis.from_url(broker) as client:
            for key in client.scan_iter(match=f"*{queue}*", count=1000):
                client.delete(key)
        return

    async def delete() -> None:
        import aio_pika

        async with await aio_pika.connect(broker) as connection:
            for name in (queue, f"{queue}.DQ", f"{queue}.XQ"):
                channel = await connection.channel()
                await channel.queue_delete(name)
            if kind == "celery":
                await channel.exchange_delete(queue)

    asyncio.run(delete())
