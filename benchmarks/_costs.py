"""What a guard costs beside its calls: bytes in Redis and in this process, imports, events, and processes at once."""

import functools
import logging
import os
import subprocess
import sys
import time
import tracemalloc
import uuid
import warnings
from typing import Any

import redis

from benchmarks._calls import Timings, runner, sync_rounds
from benchmarks._floors import FLOORS
from benchmarks._peers import BLOCKING, OURS, guards_of
from benchmarks._work import AMOUNT, BODY, TTL, Contender, charge, charge_async
from idempotent import configure
from idempotent.events import Hook, log_event
from idempotent.otel import OpenTelemetryHook
from idempotent.prometheus import PrometheusHook

__all__ = ["IMPORTS", "bytes_in_redis", "bytes_of_local_record", "calls_per_second", "import_seconds", "time_events"]

IMPORTS = {
    "idempotent": "from idempotent import idempotent",
    "idempotent, the name alone": "import idempotent",
    "idempotent, its lock": "from idempotent import Lock",
    "powertools": "from aws_lambda_powertools.utilities.idempotency import idempotent_function",
    "kasper-idempotent": "from kasper_idempotent import idempotent",
    "idempotency": "from idempotency import idempotent",
    "dogpile.cache": "from dogpile.cache import make_region",
    "pyidempotent": "from pyidempotent import idempotent",
    "idempotency-kit": "from idempotency_kit import async_idempotent",
    "cashews": "from cashews import Cache",
    "aiocache": "from aiocache import cached_stampede",
    "DBOS": "from dbos import DBOS",
    "redis": "import redis",
    "sqlalchemy": "import sqlalchemy",
}
"""What a program writes to use it, by name of the library."""


def bytes_in_redis(url: str) -> dict[str, int]:
    """What `MEMORY USAGE` says of the keys that one call leaves, for each peer; "SET" is the payload under a 41-byte key."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    client: Any = redis.Redis.from_url(url)
    client.flushdb()
    client.set("k" * 41, BODY, px=TTL * 1000)
    found = {"SET": int(client.memory_usage("k" * 41, samples=0))}
    for colour, function in (("sync", charge), ("async", charge_async)):
        for name, guard in guards_of("redis", colour)[0].items():
            client.flushdb()
            try:
                reply = guard(url, function)(uuid.uuid4().hex, AMOUNT)
                if colour == "async":
                    runner().run(reply)
            except Exception:  # the calls' own table says why
                continue
            found.setdefault(
                name.removesuffix(BLOCKING), sum(int(client.memory_usage(key, samples=0)) for key in client.scan_iter())
            )
    client.flushdb()
    return found


def bytes_of_local_record(records: int) -> float:
    """What one record of 200 bytes takes of this process's memory, keys and all."""
    warnings.simplefilter("ignore")
    call = guards_of("local", "sync")[0][OURS](f"local://?maxsize={2 * records}", charge)
    call(uuid.uuid4().hex, AMOUNT)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(records):
        call(uuid.uuid4().hex, AMOUNT)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (after - before) / records


def import_seconds(rounds: int) -> dict[str, list[float]]:
    """Seconds of a Python that imports each and ends, a value a round; "bare Python" imports nothing.

    All of them are read from bytecode, as what is installed is.
    """
    found: dict[str, list[float]] = {"bare Python": []}
    programs = {"bare Python": "pass"} | IMPORTS
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for number in range(rounds + 1):
        for name, program in list(programs.items()):
            begun = time.perf_counter()
            command = [sys.executable, "-W", "ignore", "-c", program]
            done = subprocess.run(command, capture_output=True, check=False, env=environment)
            took = time.perf_counter() - begun
            if done.returncode:
                del programs[name]  # not installed
            elif number:  # the first compiles, and reads files that are not in memory yet
                found.setdefault(name, []).append(took)
    return found


@functools.cache
def _busy(store: str, url: str, who: str) -> Contender:
    """Who keeps this process busy: "floor", or the guard of this name."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    if who == "floor":
        return next(iter(FLOORS[store, "sync"](url).values()))
    return Contender.of(guards_of(store, "sync")[0][who](url, charge))


def calls_per_second(store: str, url: str, who: str, kind: str, start: float, seconds: float) -> float:
    """Of one process that does nothing else from monotonic `start` on; `who`: "floor", ours or a peer."""
    one, known = _busy(store, url, who), uuid.uuid4().hex
    call = getattr(one, kind)
    one.first(known)
    time.sleep(max(0.0, start - time.monotonic()))
    begun = time.monotonic()
    number = 0
    while time.monotonic() < start + seconds:
        call(known if kind == "replay" else uuid.uuid4().hex)
        number += 1
    return number / (time.monotonic() - begun)


def time_events(seconds: float) -> Timings:
    """Calls on the local backend, told to nobody and to each of the hooks that there are.

    "logging" is the default hook at the logger's default level, which writes nothing of an ordinary call; with DEBUG each
    event becomes a line, which goes to the system's null device. The metrics hooks count in the libraries' own counters.
    """
    warnings.simplefilter("ignore")
    hooks: dict[str, tuple[Hook, ...]] = {"no hook": (), "logging": (log_event,), _DEBUG: (log_event,)}
    missing: dict[str, str] = {}
    for name, make in (("OpenTelemetry metrics", _otel_hook), ("Prometheus", _prometheus_hook)):
        try:
            hooks[name] = (make(),)
        except ImportError:
            missing[name] = "not installed"
    call = guards_of("local", "sync")[0][OURS]("local://", charge)
    logger, current = logging.getLogger("idempotent"), ""

    def told_to(name: str) -> Contender:
        def called(order_id: str) -> Any:
            nonlocal current
            if current != name:  # at the first call of a turn, which does not count
                current = name
                configure(hooks=hooks[name])
                logger.setLevel(logging.DEBUG if name == _DEBUG else logging.WARNING)
            return call(order_id, AMOUNT)

        return Contender(called, called)

    before = logger.level, logger.propagate, logging.root.manager.disable
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  it is no path everywhere
        handler = logging.StreamHandler(nowhere)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False
        logging.disable(logging.NOTSET)
        try:
            took = sync_rounds("local", {name: told_to(name) for name in hooks}, seconds)
        finally:
            configure(hooks=(log_event,))
            logger.removeHandler(handler)
            logger.setLevel(before[0])
            logger.propagate = before[1]
            logging.disable(before[2])
    return Timings(took, "no hook", missing, {})


_DEBUG = "logging, DEBUG to the null device"


def _otel_hook() -> Hook:
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    provider = MeterProvider(metric_readers=[InMemoryMetricReader()], shutdown_on_exit=False)
    return OpenTelemetryHook(meter_provider=provider)


def _prometheus_hook() -> Hook:
    from prometheus_client import CollectorRegistry

    return PrometheusHook(registry=CollectorRegistry())
