"""A real worker of a task queue, which is killed twice over one message: inside the function, and before the message is acknowledged.

python task_worker.py '{"kind": "celery" | "dramatiq" | "aio-pika", "broker": URL, "queue": NAME, "url": BACKEND, "dir": DIR}' [send]

With "send" it puts the message into the queue instead.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from idempotent import idempotent

setup: dict[str, str] = json.loads(sys.argv[1])
home = Path(setup["dir"])


def die_once(where: str) -> None:
    """SIGKILL for the process that comes here first."""
    try:
        (home / where).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def effect(order: str) -> str:
    die_once("killed inside")
    with (home / "effects").open("a") as file:
        file.write(f"{order}\n")
    return f"charged {order}"


def finished(result: str) -> None:
    """After the decorated function, and before the message is acknowledged."""
    die_once("killed unacknowledged")
    (home / "result").write_text(result)


options: dict[str, Any] = {"backend": setup["url"], "lease": 1.0, "namespace": "tasks"}


def celery_app() -> Any:
    from celery import Celery, signals

    redis_options: dict[str, Any] = {
        "visibility_timeout": 1,
        "unacked_mutex_expire": 1,
        "unacked_restore_interval": 1,  # else it is looked for every 100 seconds only
        "unacked_restore_throttle": 1,
    }
    for name in ("unacked_key", "unacked_index_key", "unacked_mutex_key"):
        redis_options[name] = f"{setup['queue']}.{name}"  # else shared by all who use the server
    app = Celery("shop", broker=setup["broker"], set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_default_queue=setup["queue"],
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        broker_transport_options=redis_options if setup["broker"].startswith("redis") else {},
    )

    @app.task(name="charge", bind=True)
    @idempotent(key="{self.request.id}", **options)
    def charge(self: Any, order: str) -> str:
        return effect(order)

    @signals.task_success.connect(weak=False)  # sent after the function, and before the late acknowledgement
    def succeeded(result: str, **_: Any) -> None:
        finished(result)

    return app


def dramatiq_broker() -> Any:
    import dramatiq
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.middleware import CurrentMessage

    middleware = [CurrentMessage()]
    if setup["broker"].startswith("redis"):
        broker: Any = RedisBroker(
            url=setup["broker"],
            namespace=setup["queue"],
            middleware=middleware,
            heartbeat_timeout=1000,
            maintenance_chance=1_000_000,
        )
    else:
        broker = RabbitmqBroker(url=setup["broker"], middleware=middleware)
    dramatiq.set_broker(broker)

    @idempotent(**options)
    def charge(order: str) -> str:
        return effect(order)

    @dramatiq.actor(actor_name="charge", queue_name=setup["queue"])
    def charge_order(order: str) -> None:
        message = CurrentMessage.get_current_message()
        finished(charge.with_key(message.message_id)(order))

    broker.charge_order = charge_order
    return broker


async def publish_aio_pika() -> None:
    import aio_pika

    async with await aio_pika.connect(setup["broker"]) as connection:
        channel = await connection.channel()
        await channel.declare_queue(setup["queue"], durable=True)
        message = aio_pika.Message(b"o-1", message_id="m-1", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key=setup["queue"])


async def consume_aio_pika() -> None:
    import aio_pika

    @idempotent(**options)
    async def charge(order: str) -> str:
        return effect(order)

    connection = await aio_pika.connect(setup["broker"])
    async with connection:
        channel = await connection.channel()
        queue = await channel.declare_queue(setup["queue"], durable=True)
        async with queue.iterator() as messages:
            async for message in messages:
                async with message.process(requeue=True):  # acknowledged at its end, whatever dies before
                    finished(await charge.with_key(message.message_id)(message.body.decode()))


def send() -> None:
    if setup["kind"] == "celery":
        celery_app().tasks["charge"].delay("o-1")
    elif setup["kind"] == "dramatiq":
        dramatiq_broker().charge_order.send("o-1")
    else:
        asyncio.run(publish_aio_pika())


def work() -> None:
    if setup["kind"] == "celery":
        celery_app().worker_main(["worker", "--pool=solo", "--loglevel=ERROR", "--without-gossip", "--without-mingle"])
    elif setup["kind"] == "dramatiq":
        from dramatiq import Worker

        Worker(dramatiq_broker(), worker_threads=1).start()
        signal.pause()
    else:
        asyncio.run(consume_aio_pika())


if __name__ == "__main__":
    send() if sys.argv[2:] == ["send"] else work()
