"""RedisBackend against real servers: it answers as the machine does, and through every fault nothing runs twice."""

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fakeredis
import pytest
import redis
import redis.asyncio
from colours import COLOURS, Colour, on_one_loop
from differential import Commands, aged, disagreement
from probes import Counter, Gate, eventually
from proxy import Direction, Proxy
from servers import Address, Server, start_redis

from idempotent import BackendError, BackendUnavailable, InProgress, LeaseLost, Lock, RedisBackend, current_call
from idempotent._drive import drive
from idempotent._record import (
    LOCKS,
    SETTLED,
    Answer,
    Busy,
    Granted,
    RecordId,
    Row,
    Settled,
    State,
    describe,
    pack,
    unpack,
)
from idempotent.backends import _listener, _redis_links
from idempotent.backends._redis_links import _CONNECTIONS, _named
from idempotent.backends.redis import _found
from idempotent.cli import doctor_redis
from idempotent.cli.exits import RETRIES_ONLY
from idempotent.cli.main import main

README = Path(__file__).resolve().parent.parent / "README.md"
A, B = b"attemptA", b"attemptB"
ARGS = b"f" * 16


@pytest.fixture
def prefix(request: pytest.FixtureRequest) -> str:
    """A prefix that no other test has."""
    return f"t{time.time_ns()}"


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., RedisBackend]:
    """Makes backends that are closed after the test."""

    def make(*args: Any, **kwargs: Any) -> RedisBackend:
        backend = RedisBackend(*args, **kwargs)
        _fresh.callback(backend.close)
        return backend

    return make


@contextlib.contextmanager
def client_of(server: Server | Address, **options: Any) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, **options) as client:
        yield client


def claim(commands: Commands, rid: RecordId, attempt: bytes = A, **changes: Any) -> Any:
    options = {"fingerprint": ARGS, "lease": 30.0, "keep": None, "takeover": True}
    return commands.claim(rid, attempt=attempt, **(options | changes))


class Keys:
    """The records of a prefix, beside the backend."""

    def __init__(self, client: redis.Redis, prefix: str) -> None:
        self.client, self.prefix = client, prefix

    def name(self, rid: RecordId) -> str:
        return f"{self.prefix}:{rid.text}"

    def clock(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1_000_000 + int(micros)

    def row(self, rid: RecordId) -> Row | None:
        with self.client.pipeline() as pipeline:
            raw, left = pipeline.get(self.name(rid)).pttl(self.name(rid)).execute()
        if raw is None:
            return None
        row = unpack(raw)
        end = self.clock() + left * 1000
        if row.lease and row.state is State.COMPLETED:
            return row._replace(lease=end - (row.expires or 0))
        return row._replace(expires=end) if row.state in SETTLED else row

    def age(self, rid: RecordId, by: int) -> None:
        row = self.row(rid)
        if row is not None:
            row = aged(row, by)
            past = row.lease if row.state is State.COMPLETED else 0
            left = None if row.expires is None else (row.expires + past - self.clock()) // 1000
            if left is not None and left <= 0:
                self.client.delete(self.name(rid))
            else:
                self.client.set(self.name(rid), pack(row), px=left)


# ------------------------------------------------------------------------------------------------ the machine's answers


@pytest.mark.parametrize("seed", range(12))
def test_the_scripts_answer_and_store_what_the_machine_does(
    redis_server: Server | Address, prefix: str, colour: Colour, seed: int, opened: Callable[..., RedisBackend]
) -> None:
    with (
        client_of(redis_server, protocol=2) as client,
        Commands(opened(redis_server.url, prefix=prefix), colour) as commands,
    ):
        wrong = disagreement(commands, Keys(client, prefix), RecordId("n", f"k{seed}"), seed, steps=400)
    assert wrong == ""


def test_the_scripts_do_what_the_machine_does_within_one_microsecond(
    opened: Callable[..., RedisBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that stands still: what a real server meets once in a million times, such as a token that is the time."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.25)
    with fakeredis.FakeRedis() as client, Commands(opened(client), COLOURS[0]) as commands:
        wrong = disagreement(commands, Keys(client, "idem"), RecordId("n", "k"), seed=0, steps=400)
    assert wrong == ""


def test_the_servers_clock_alone_ends_a_lease(
    redis_server: Server | Address, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    rid = RecordId("n", "k")
    with Commands(opened(redis_server.url, prefix=prefix), colour) as commands:
        first = claim(commands, rid, lease=0.15)
        while isinstance(reply := claim(commands, rid, B, takeover=False), Busy):
            assert 0 < reply.lease_left <= 0.15
        assert commands.read(rid).state == "unknown"
        taken = claim(commands, rid, B, over=first.token, lease=0.15)
        assert taken == Granted(taken.token, took_over=True)
        assert taken.token > first.token
        assert commands.complete(rid, attempt=A, token=first.token, codec="", body=b"", ttl=9) is Answer.STALE
        eventually(lambda: commands.read(rid).lease_left <= 0)
        assert commands.complete(rid, attempt=B, token=taken.token, codec="", body=b"", ttl=9) is Answer.DONE


# ------------------------------------------------------------------------------------------------------ lost connections


@pytest.fixture
def proxy(own_redis: Server) -> Iterator[Proxy]:
    with Proxy("127.0.0.1", own_redis.port) as proxy:
        yield proxy


OPERATIONS: dict[str, Any] = {
    "claim": lambda commands, rid, token: claim(commands, rid),
    "complete": lambda commands, rid, token: commands.complete(
        rid, attempt=A, token=token, codec="json", body=b"42", ttl=60.0
    ),
    "fail": lambda commands, rid, token: commands.fail(rid, attempt=A, token=token, codec="e", body=b"no", ttl=60.0),
    "renew": lambda commands, rid, token: commands.renew(rid, attempt=A, token=token, lease=40.0),
    "read": lambda commands, rid, token: commands.read(rid)[:4],
    "release": lambda commands, rid, token: commands.release(rid, attempt=A, token=token),
    "forget": lambda commands, rid, token: commands.forget(rid, force=True),
}


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_cut_at_any_byte_is_answered_or_refused_and_its_repeat_agrees(
    own_redis: Server,
    proxy: Proxy,
    prefix: str,
    colour: Colour,
    operation: str,
    direction: Direction,
    opened: Callable[..., RedisBackend],
) -> None:
    through = opened(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, timeout=2)
    confirmed = refused = 0
    byte = 0
    with Commands(opened(own_redis.url, prefix=prefix), COLOURS[0]) as direct, Commands(through, colour) as cut:
        while True:
            rid = RecordId("n", f"{direction}{byte:04}")
            token = 0 if operation == "claim" else claim(direct, rid).token
            cut.read(rid)
            proxy.cut(direction, byte)
            try:
                reply = OPERATIONS[operation](cut, rid, token)
                confirmed += 1
            except BackendUnavailable:
                reply = None
                refused += 1
            repeat = OPERATIONS[operation](direct, rid, token)
            stored = direct.read(rid)
            if operation == "claim":
                assert reply in (None, repeat)
                assert (stored.state, stored.token) == ("running", repeat.token)
            elif operation == "release":
                assert reply in (None, Answer.DONE)
                assert (repeat, stored) == (Answer.DONE, None)
            elif operation == "forget":
                assert reply is not None
                assert (reply.state, reply.token) == ("running", token)
                assert (repeat, stored) == (None, None)  # another forget finds nothing
            elif operation == "read":
                assert reply in (None, repeat)
                assert repeat == stored[:4]
                assert (stored.state, stored.token) == ("running", token)
            else:
                assert reply in (None, Answer.DONE)
                assert repeat is Answer.DONE
                state = {"complete": "completed", "fail": "failed"}.get(operation, "running")
                assert (stored.state, stored.token) == (state, token)
            if operation in ("complete", "fail"):
                assert claim(direct, rid, B)[:2] == (operation == "fail", token)
            if not proxy.fired:
                break
            byte += 1
        proxy.cut(direction, 1 << 40)
    assert byte > 3  # the sweep met an exchange, and went past its end
    assert refused == 0, f"{refused} of {confirmed + refused} were not sent again in time"


@pytest.mark.parametrize("ready_made", [False, True])
@pytest.mark.parametrize("step", ["HELLO", "CLIENT", "SELECT"])
def test_a_handshake_that_an_interruption_ended_answers_no_later_command(
    own_redis: Server,
    prefix: str,
    colour: Colour,
    step: str,
    ready_made: bool,
    opened: Callable[..., RedisBackend],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interruption(BaseException):
        """What a signal's handler raises."""

    module = redis.asyncio if colour.is_async else redis
    kind: Any = module.connection.AbstractConnection
    send = kind.send_command
    armed = True

    def interrupts(word: object) -> bool:
        nonlocal armed
        fires, armed = armed and word == step, armed and word != step
        return fires

    def interrupted(self: Any, *words: Any, **options: Any) -> None:
        send(self, *words, **options)
        if interrupts(words[0]):
            raise Interruption

    async def cancelled(self: Any, *words: Any, **options: Any) -> None:
        await send(self, *words, **options)
        if interrupts(words[0]):
            raise asyncio.CancelledError

    url = f"redis://127.0.0.1:{own_redis.port}/3"
    client = module.Redis.from_url(url, protocol=3)
    with Commands(opened(client if ready_made else f"{url}?protocol=3", prefix=prefix, timeout=2), colour) as commands:
        with monkeypatch.context() as patch:
            patch.setattr(kind, "send_command", cancelled if colour.is_async else interrupted)
            with pytest.raises((Interruption, asyncio.CancelledError)):
                claim(commands, RecordId("n", "0"))
        assert not armed
        for number in "123":
            granted = claim(commands, RecordId("n", number))
            assert isinstance(granted, Granted)
            assert commands.read(RecordId("n", number)).token == granted.token
        if ready_made and colour.is_async:
            commands._runner.run(client.aclose())
    client.close() if not colour.is_async else None
    with client_of(own_redis) as zero:
        assert not list(zero.scan_iter(f"{prefix}*"))  # all are where the URL says


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_call_cut_at_any_byte_runs_at_most_once_and_the_next_call_agrees(
    own_redis: Server,
    proxy: Proxy,
    prefix: str,
    colour: Colour,
    direction: Direction,
    opened: Callable[..., RedisBackend],
) -> None:
    runs: dict[int, int] = {}

    def charge(order: int) -> str:
        runs[order] = runs.get(order, 0) + 1
        return f"receipt {order}"

    through = opened(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, timeout=2)
    options = {"key": "{order}", "namespace": "charge", "lease": 30}
    direct = COLOURS[0].define(charge, backend=opened(own_redis.url, prefix=prefix), **options)
    charge = colour.define(charge, backend=through, **options)
    # The async pool is new for each call, so its sweep passes through the handshake as well.
    for order in range(6000):
        proxy.cut(direction, order)
        with contextlib.suppress(BackendUnavailable):
            assert colour.call(charge, order) == f"receipt {order}"
        fired = proxy.fired
        proxy.cut(direction, 1 << 40)
        assert direct(order) == f"receipt {order}"
        assert runs[order] == 1
        if not fired:
            break
    assert 20 < order < 5900


# ----------------------------------------------------------------------------------------------------- servers in trouble


def test_a_frozen_server_is_given_up_by_the_own_deadline_and_nothing_ran(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    charge = colour.define(effects.hit, backend=opened(own_redis.url, prefix=prefix, timeout=0.5))
    own_redis.freeze()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            colour.call(charge)
        assert 0.4 < time.monotonic() - began < 2
    assert effects.count == 0
    own_redis.thaw()
    assert colour.call(charge) == 1
    assert colour.call(charge) == 1


def test_a_reply_that_never_comes_is_asked_for_again_while_there_is_time(
    own_redis: Server, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    with Proxy("127.0.0.1", own_redis.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}"
        with Commands(opened(url, prefix=prefix, timeout=1), colour) as commands:
            rid = RecordId("n", "k")
            assert commands.read(rid) is None
            proxy.mute()  # the claim arrives, and is applied
            assert isinstance(claim(commands, rid), Granted)


def test_a_claim_on_a_frozen_server_does_not_outlast_its_lease(
    own_redis: Server, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    own_redis.freeze()
    with Commands(opened(own_redis.url, prefix=prefix, timeout=6), colour) as commands:
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            claim(commands, RecordId("n", "k"), lease=0.5)
        assert time.monotonic() - began < 2


def test_a_warm_connection_to_a_frozen_server_is_given_up_too(
    own_redis: Server, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    with Commands(opened(own_redis.url, prefix=prefix, timeout=0.5), colour) as commands:
        rid = RecordId("n", "k")
        claim(commands, rid)
        own_redis.freeze()
        for ask in (lambda: claim(commands, rid), lambda: commands.read(rid)):
            began = time.monotonic()
            with pytest.raises(BackendUnavailable):
                ask()
            assert 0.4 < time.monotonic() - began < 1.5
        own_redis.thaw()
        assert commands.read(rid).state == "running"


def test_a_claim_that_a_frozen_server_applies_later_does_no_harm(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    backend = opened(own_redis.url, prefix=prefix, timeout=0.4)
    work = colour.define(lambda order: effects.hit(), backend=backend, key="{order}", lease=1.5)
    with on_one_loop(colour) as call:
        assert call(work, 0) == 1  # the connection is there, and what is sent on it waits for the server
        own_redis.freeze()
        with pytest.raises(BackendUnavailable):
            call(work, 1)
        assert effects.count == 1
        own_redis.thaw()
        assert [call(work, 1), call(work, 1)] == [2, 2]  # at the latest when the lease of that claim is over
        assert call(work.outcome, 1).replayed
        assert effects.count == 2


def test_a_server_whose_writes_stall_confirms_nothing_and_holds_no_lease(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    def work(order: int) -> int:
        if order == 0:
            call = current_call()
            assert call is not None
            call.check()
            client.client_pause(60_000, all=False)
            deadline = time.monotonic() + 20
            while not call.lease_lost:  # at its local deadline, as no renewal is confirmed
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(LeaseLost):
                call.check()
            with pytest.raises(BackendUnavailable):
                COLOURS[0].call(other)
            client.client_unpause()
        return effects.hit()

    backend = opened(own_redis.url, prefix=prefix, timeout=0.4)
    other = COLOURS[0].define(effects.hit, backend=backend, key="other", wait=0)
    work = colour.define(work, backend=backend, key="{order}", lease=1)
    with client_of(own_redis) as client:
        try:
            outcome = colour.call(work.outcome, 0)
        finally:
            client.client_unpause()
    assert (outcome.value, outcome.stored) == (1, True)  # nobody had taken over
    assert colour.call(work, 0) == effects.count == 1


def test_a_partition_confirms_nothing_and_heals(
    own_redis: Server,
    proxy: Proxy,
    prefix: str,
    colour: Colour,
    effects: Counter,
    opened: Callable[..., RedisBackend],
) -> None:
    def work(order: str) -> int:
        if order == "parted while it runs":
            proxy.stall = True
            healing.start()
        return effects.hit()

    def again(order: str) -> int:
        return effects.hit()

    def heal() -> None:
        proxy.drop()
        proxy.stall = False

    healing = threading.Timer(0.7, heal)  # past the first deadline: the flow itself sends again
    backend = opened(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, timeout=0.4)
    options: dict[str, Any] = {"key": "{order}", "namespace": "n"}
    work = colour.define(work, backend=backend, lease=20, **options)
    with on_one_loop(colour) as call:
        assert call(work, "before") == 1
        proxy.stall = True
        for order in ("before", "parted before it runs"):
            with pytest.raises(BackendUnavailable):
                call(work, order)
        assert effects.count == 1
        heal()
        assert call(work, "before") == 1
        assert call(work, "parted before it runs") == 2
        outcome = call(work.outcome, "parted while it runs")
        assert (outcome.value, outcome.stored) == (3, True)
        healing.join()
    beyond = COLOURS[0].define(again, backend=opened(own_redis.url, prefix=prefix), **options)
    assert [beyond(order) for order in ("before", "parted before it runs", "parted while it runs")] == [1, 2, 3]
    assert effects.count == 3


@pytest.mark.parametrize("raises", [False, True])
def test_a_frozen_server_does_not_hold_the_end_of_a_call_beyond_its_lease(
    own_redis: Server, prefix: str, colour: Colour, raises: bool, opened: Callable[..., RedisBackend]
) -> None:
    def work(order: int) -> int:
        if order:
            own_redis.freeze()
            if raises:
                raise KeyError(order)
        return order

    work = colour.define(work, backend=opened(own_redis.url, prefix=prefix, timeout=5), lease=1, key="{order}")
    colour.call(work, 0)
    began = time.monotonic()
    if raises:
        with pytest.raises(KeyError):
            colour.call(work, 1)
    else:
        outcome = colour.call(work.outcome, 1)
        assert (outcome.value, outcome.stored) == (1, False)
    assert time.monotonic() - began < 4
    own_redis.thaw()


def test_a_completion_outlasts_a_frozen_server(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    def work() -> int:
        own_redis.freeze()
        return effects.hit()

    work = colour.define(work, backend=opened(own_redis.url, prefix=prefix, timeout=0.5), lease=30)
    thaw = threading.Timer(1.2, own_redis.thaw)  # past the first deadline: the flow itself sends again
    thaw.start()
    outcome = colour.call(work.outcome)
    thaw.join()
    assert (outcome.value, outcome.stored, outcome.replayed) == (1, True, False)
    assert colour.call(work) == 1
    assert effects.count == 1


@pytest.mark.parametrize("handled", [ConnectionRefusedError(111, "another's"), FileNotFoundError(2, "another's")])
def test_what_the_caller_handles_does_not_keep_a_command_from_being_sent_again(
    own_redis: Server, colour: Colour, opened: Callable[..., RedisBackend], handled: Exception
) -> None:
    twice = colour.define(lambda order: order, backend=opened(own_redis.url), key="{order}", namespace="handled")
    assert colour.call(twice, "a") == "a"
    with client_of(own_redis) as client:
        client.client_kill_filter(_type="normal", skipme=True)
    try:
        raise handled
    except OSError:
        assert colour.call(twice, "b") == "b"


def test_a_refused_connection_is_told_at_once(
    colour: Colour, effects: Counter, opened: Callable[..., RedisBackend], own_redis: Server, prefix: str
) -> None:
    charge = colour.define(effects.hit, backend=opened(own_redis.url, prefix=prefix, timeout=10))
    own_redis.kill()
    for handled in (False, True):
        began = time.monotonic()
        with pytest.raises(BackendUnavailable, match="refuse"):
            try:
                raise KeyError if handled else ConnectionRefusedError
            except ConnectionRefusedError:
                pass
            except KeyError:  # as a caller that tries again does
                colour.call(charge)
            colour.call(charge)
        assert time.monotonic() - began < 4
    assert effects.count == 0


def test_lost_scripts_are_loaded_again(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    with client_of(own_redis) as client:

        def work(order: int) -> int:
            client.script_flush()
            return effects.hit()

        work = colour.define(work, backend=opened(own_redis.url, prefix=prefix), key="{order}", error_ttl={KeyError: 9})
        assert [colour.call(work, order) for order in (1, 2, 1)] == [1, 2, 1]
        client.script_flush()
        assert colour.call(work.peek, 1).state == "completed"
        client.script_flush()
        assert colour.call(work.forget, 1)


def test_killed_connections_between_calls_and_during_one_are_made_again(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    with client_of(own_redis) as client:

        def kill() -> None:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)

        def work(order: int) -> int:
            kill()
            return effects.hit()

        work = colour.define(work, backend=opened(own_redis.url, prefix=prefix), key="{order}")
        for order in (1, 2, 3):
            kill()
            assert colour.call(work, order) == order
        kill()
        assert colour.call(work, 2) == 2


def test_a_waiter_whose_subscription_was_killed_still_gets_the_answer(
    own_redis: Server,
    prefix: str,
    colour: Colour,
    effects: Counter,
    gate: Gate,
    opened: Callable[..., RedisBackend],
) -> None:
    def work() -> int:
        gate.pass_through()
        return effects.hit()

    first = colour.define(work, backend=opened(own_redis.url, prefix=prefix), namespace="n")
    second = colour.define(work, backend=opened(own_redis.url, prefix=prefix), namespace="n")
    with client_of(own_redis) as client:
        running = colour.start(first)
        assert gate.entered.wait(30)
        waiting = colour.start(second)
        for _ in range(2):
            eventually(lambda: client.pubsub_channels(f"{prefix}:*"))
            assert client.client_kill_filter(_type="pubsub") == 1
        eventually(lambda: client.pubsub_channels(f"{prefix}:*"))
        began = time.monotonic()
        gate.opened.set()
        assert running.result(30) == waiting.result(30) == 1
        assert time.monotonic() - began < 0.9  # its next look of its own would come after a second
    assert effects.count == 1


def test_records_survive_a_killed_server(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    work = colour.define(lambda order: effects.hit(), backend=opened(own_redis.url, prefix=prefix), key="{order}")
    answers = [colour.call(work, order) for order in range(20)]
    own_redis.kill()
    with pytest.raises(BackendUnavailable):
        colour.call(work, 20)
    own_redis.restart()
    assert [colour.call(work, order) for order in range(20)] == answers
    assert effects.count == 20


def test_a_server_killed_during_a_run_gets_the_result_when_it_is_back(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    back = threading.Thread(target=own_redis.restart)

    def work() -> int:
        own_redis.kill()
        back.start()
        return effects.hit()

    work = colour.define(work, backend=opened(own_redis.url, prefix=prefix), lease=30)
    outcome = colour.call(work.outcome)
    back.join()
    assert (outcome.value, outcome.stored) == (1, True)
    assert colour.call(work) == 1
    assert effects.count == 1


def test_a_full_server_refuses_before_the_run_and_still_replays(
    colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    with start_redis("--maxmemory-policy noeviction") as server, client_of(server) as client:
        work = colour.define(lambda order: effects.hit(), backend=opened(server.url), key="{order}")
        assert colour.call(work, 1) == 1
        client.config_set("maxmemory", "1")
        with pytest.raises(BackendUnavailable, match="memory"):
            colour.call(work, 2)
        assert colour.call(work, 1) == 1
        assert effects.count == 1
        client.config_set("maxmemory", "0")
        assert colour.call(work, 2) == 2


def test_a_replica_refuses_before_the_run(
    own_redis: Server, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    on_primary = colour.define(effects.hit, backend=opened(own_redis.url, prefix=prefix), namespace="n")
    assert colour.call(on_primary) == 1
    with client_of(own_redis) as client:
        client.config_set("repl-diskless-sync-delay", 0)
    with start_redis(f"--replicaof 127.0.0.1 {own_redis.port}") as replica, client_of(replica) as client:
        eventually(lambda: client.info("replication")["master_link_status"] == "up")
        backend = opened(replica.url, prefix=prefix)
        fresh = colour.define(effects.hit, backend=backend, namespace="other")
        with pytest.raises(BackendUnavailable, match="(?i)read.?only"):
            colour.call(fresh)
        assert effects.count == 1
        assert colour.call(colour.define(effects.hit, backend=backend, namespace="n")) == 1


def test_a_replica_that_lost_its_primary_is_unavailable(
    colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    with start_redis("--replica-serve-stale-data no") as replica, client_of(replica) as client:
        client.replicaof("127.0.0.1", 1)
        with pytest.raises(BackendUnavailable):
            colour.call(colour.define(effects.hit, backend=opened(replica.url, timeout=0.5)))
    assert effects.count == 0


def test_a_server_busy_with_a_script_is_asked_again(
    colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    refusals: list[str] = []

    class Noting(redis.Connection):
        def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().read_response(*args, **kwargs)
            except redis.ResponseError as error:
                refusals.append(str(error))
                raise

    class AsyncNoting(redis.asyncio.Connection):
        async def read_response(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return await super().read_response(*args, **kwargs)
            except redis.ResponseError as error:
                refusals.append(str(error))
                raise

    def call() -> int:
        with (
            redis.ConnectionPool(connection_class=Noting, port=server.port) as pool,
            redis.Redis(connection_pool=pool) as client,
        ):
            return COLOURS[0].call(COLOURS[0].define(effects.hit, backend=opened(client)))

    async def async_call() -> int:
        pool = redis.asyncio.ConnectionPool(connection_class=AsyncNoting, port=server.port)
        async with redis.asyncio.Redis.from_pool(pool) as client:
            return await COLOURS[1].define(effects.hit, backend=opened(client))()

    with (
        start_redis("--lua-time-limit 20") as server,
        client_of(server, socket_timeout=None) as hog,
        client_of(server) as judge,
    ):
        hog.ping()

        def spin() -> None:
            with contextlib.suppress(redis.ResponseError):
                hog.eval("while true do end", 0)

        spinning = threading.Thread(target=spin)
        spinning.start()

        def busy() -> bool:
            try:
                return not judge.ping()
            except redis.ResponseError as error:
                return str(error).startswith("BUSY") or "running a script" in str(error)

        eventually(busy)
        running = COLOURS[0].start(lambda: asyncio.run(async_call()) if colour.is_async else call())
        eventually(lambda: any("BUSY" in refusal or "running a script" in refusal for refusal in refusals))
        assert effects.count == 0
        judge.script_kill()
        assert running.result(30) == 1
        spinning.join()


@pytest.mark.parametrize(
    ("state", "remember"), [(State.COMPLETED, 0), (State.COMPLETED, 7), (State.FAILED, 0), (State.EXPIRED, 0)]
)
def test_what_redis_still_has_is_never_called_over(state: State, remember: int) -> None:
    row = Row(state, 1, A, b"", 5, lease=remember, expires=9, codec="json1", body=b"1")
    found = _found([pack(row), 1_000, 0])  # in the last millisecond
    assert found is not None
    record = describe(RecordId("n", "k"), *found)
    assert record is not None
    assert record.state == ("expired" if remember or state is State.EXPIRED else state.name.lower())


# ------------------------------------------------------------------------------------------------------------ permissions


def minimum() -> list[str]:
    """The rules of the minimal user in the README, which are for the prefix idem."""
    found = re.search(r"`(~idem:\* [^`]*)`", README.read_text("utf-8"))
    assert found, "the README names no minimal ACL user"
    return found[1].split()


def usual() -> list[str]:
    """The same without what older servers do not know."""
    return [rule for rule in minimum() if "|" not in rule]


@pytest.fixture
def guarded() -> Iterator[Callable[[list[str]], str]]:
    """Makes a user with these rules and nothing else; its URL."""
    with start_redis() as server, client_of(server) as client:

        def make(rules: list[str]) -> str:
            client.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret word", *rules)
            return f"redis://app:{quote('secret word')}@127.0.0.1:{server.port}/0"

        make.server = server  # type: ignore[attr-defined]
        yield make


@contextlib.contextmanager
def warnings_of_ours() -> Iterator[list[str]]:
    """What is logged meanwhile as a warning that copies could not be told."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "+publish" in record.getMessage():
                told.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("idempotent").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("idempotent").removeHandler(handler)


def use_everything(
    colour: Colour,
    url: str,
    opened: Callable[..., RedisBackend],
    gate: Gate,
    waits: Callable[[], Any],
    *,
    unheard: bool = False,
) -> None:
    """Every command there is, in both outcomes; `waits` tells when the waiter waits as it should.

    `unheard`: nobody can be told of a forget.
    """
    backend = opened(url)

    def work(order: str) -> str:
        if order == "slow":
            gate.pass_through()
        if order == "bad":
            raise KeyError(order)
        return order

    options = {"key": "{order}", "namespace": "n"}
    one = colour.define(work, backend=backend, **options)
    other = colour.define(work, backend=opened(url), **options)
    assert colour.call(one, "a") == colour.call(other, "a") == "a"
    with pytest.raises(KeyError):
        colour.call(one, "bad")
    running = colour.start(one, "slow")
    assert gate.entered.wait(30)
    waiting = colour.start(other, "slow")
    with Commands(opened(url), colour) as commands:
        assert [record.key for record in commands.scanned(state="running")] == ["slow"]
        assert commands.renew(RecordId("n", "none"), attempt=A, token=1, lease=1.0) is Answer.GONE
    eventually(waits)
    gate.opened.set()
    assert running.result(30) == waiting.result(30) == "slow"
    assert colour.call(one.peek, "slow").state == "completed"
    with warnings_of_ours() as warned:
        assert colour.call(one.forget, "slow")
    assert len(warned) == unheard
    assert colour.call(one.peek, "slow") is None


def test_the_minimal_user_of_the_readme_may_do_everything(
    guarded: Any, colour: Colour, gate: Gate, opened: Callable[..., RedisBackend]
) -> None:
    url = guarded(minimum())
    with client_of(guarded.server) as client:
        use_everything(colour, url, opened, gate, lambda: client.pubsub_channels("idem:*"))
        # redis-py tells its name to servers of 7.2 and newer, and minds no refusal.
        assert {entry["object"] for entry in client.acl_log()} <= {"client|setinfo"}


def test_with_the_rules_for_locks_it_may_do_all_the_rest_and_needs_each_of_them(
    guarded: Any,
    colour: Colour,
    opened: Callable[..., RedisBackend],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(_listener, "_QUIET", 0.01)  # so that it pings,
    monkeypatch.setattr(_listener, "_LINGER", 0.05)  # and unsubscribes, at once
    locks = re.search(r"locks need `([^`]*)`", README.read_text("utf-8"))
    assert locks
    rules = [*minimum(), *locks[1].split()]
    url = guarded(rules)
    one, other = opened(url), opened(url)
    with client_of(guarded.server) as client:
        work = colour.define(lambda order: order, backend=one, key="{order}", namespace="n", near_cache=9, remember=60)
        assert colour.call(work, "a") == colour.call(work, "a") == "a"
        eventually(lambda: client.pubsub_channels("idem:forgotten"))
        assert colour.call(work.forget, "a")

        lock, waiter = (Lock("name", backend=backend) for backend in (other, one))
        hold = lock.acquire()
        assert waiter.acquire(wait=0.05) is None  # it leaves the line
        waiting = COLOURS[0].start(waiter.acquire, wait=20)
        eventually(lambda: client.pubsub_channels("idem:*#*"))
        hold.release()
        waiting.result(30).release()
        eventually(lambda: "cmdstat_unsubscribe" in client.info("commandstats"))

        assert colour.call(work, "kept") == "kept"
        with Commands(one, colour) as commands:
            token = claim(commands, RecordId("n", "dead"), keep=None, takeover=False).token
            commands.release(RecordId("n", "dead"), attempt=A, token=token, unknown=True)
        for words in (
            ["list", url],
            ["show", url, "kept", "--payload"],
            ["resolve", url, "dead", "--not-applied", "--yes"],
            ["forget", url, "kept", "--yes"],
            ["purge", url],
        ):
            assert main(words) == 0, capsys.readouterr()
        assert {entry["object"] for entry in client.acl_log()} <= {"client|setinfo"}
        assert main(["doctor", url]) == RETRIES_ONLY  # it may not look at settings
        used = {name.removeprefix("cmdstat_") for name in client.info("commandstats")}
        assert {rule[1:] for rule in rules if rule.startswith("+")} - used == {"select"}  # for another database


def test_a_user_without_channels_waits_by_polling(
    guarded: Any, colour: Colour, gate: Gate, opened: Callable[..., RedisBackend]
) -> None:
    url = guarded([rule for rule in usual() if not rule.startswith("&")] + ["resetchannels"])
    with client_of(guarded.server) as client:

        def refusals() -> set[str]:
            return {entry["reason"] for entry in client.acl_log() if entry["object"] != "client|setinfo"}

        use_everything(colour, url, opened, gate, refusals, unheard=True)
        assert refusals() == {"channel"}


def test_a_user_without_evalsha_is_refused_before_the_run(
    guarded: Any, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    backend = opened(guarded([*usual(), "-evalsha"]))
    with pytest.raises(BackendUnavailable, match="(?i)evalsha|permission"):
        colour.call(colour.define(effects.hit, backend=backend))
    assert effects.count == 0


@pytest.mark.parametrize("command", ["time", "set"])
def test_a_user_who_may_not_give_a_scripts_command_is_refused_before_the_run(
    guarded: Any, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend], command: str
) -> None:
    backend = opened(guarded([*usual(), f"-{command}"]))
    with pytest.raises(BackendUnavailable, match="lacks a permission"):
        colour.call(colour.define(effects.hit, backend=backend))
    assert effects.count == 0


def test_a_wrong_password_is_refused_before_the_run_and_at_once(
    guarded: Any, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    url = guarded(usual()).replace("secret", "wrong")
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        colour.call(colour.define(effects.hit, backend=opened(url)))
    assert time.monotonic() - began < 2
    assert effects.count == 0


# ------------------------------------------------------------------------------------------------------ clients and pools


def many(colour: Colour, function: Any, times: int) -> list[Any]:
    """Calls with the numbers up to `times`, all at once."""
    if colour.is_async:

        async def main() -> list[Any]:
            return await asyncio.gather(*(function(number) for number in range(times)), return_exceptions=True)

        return asyncio.run(main())
    calls = [colour.start(function, number) for number in range(times)]
    return [call.exception(60) or call.result() for call in calls]


def test_two_hundred_callers_with_keys_of_their_own_share_one_pool(
    redis_server: Server | Address, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    work = colour.define(lambda number: number + 1, backend=opened(redis_server.url, prefix=prefix), key="{number}")
    assert many(colour, work, 200) == [number + 1 for number in range(200)]
    with client_of(redis_server) as client:
        assert len(client.keys(f"{prefix}:*")) == 200


def test_a_clients_pool_that_is_used_up_runs_nothing_until_it_has_room(
    redis_server: Server | Address, prefix: str, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    pool = redis.ConnectionPool.from_url(redis_server.url, max_connections=1)
    with redis.Redis(connection_pool=pool) as client:
        work = COLOURS[0].define(effects.hit, backend=opened(client, prefix=prefix, timeout=0.4))
        taken = pool.get_connection(*_named(pool))
        with pytest.raises(BackendUnavailable):
            work()
        assert effects.count == 0
        pool.release(taken)
        assert work() == 1


def test_an_async_clients_pool_that_is_used_up_runs_nothing_until_it_has_room(
    redis_server: Server | Address, prefix: str, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    async def main() -> None:
        pool = redis.asyncio.ConnectionPool.from_url(redis_server.url, max_connections=1)
        async with redis.asyncio.Redis(connection_pool=pool) as client:
            backend = opened(client, prefix=prefix, timeout=0.4)
            work = COLOURS[1].define(effects.hit, backend=backend)
            taken = await pool.get_connection(*_named(pool))
            with pytest.raises(BackendUnavailable):
                await work()
            assert effects.count == 0
            await pool.release(taken)
            assert await work() == 1
            await backend.aclose()
        await pool.disconnect()

    asyncio.run(main())


def test_the_own_connections_that_are_used_up_run_nothing_until_there_is_room(
    own_redis: Server,
    proxy: Proxy,
    prefix: str,
    colour: Colour,
    effects: Counter,
    opened: Callable[..., RedisBackend],
) -> None:
    backend = opened(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix, timeout=60)
    work = colour.define(effects.hit, backend=backend, key="k", lease=1)
    view = backend.asynchronous() if colour.is_async else backend.blocking()

    def all_are_taken() -> bool:
        return len(proxy._pairs) == _CONNECTIONS

    async def main() -> None:
        proxy.stall = True
        holding = [asyncio.ensure_future(view.read(RecordId("n", str(n)))) for n in range(_CONNECTIONS)]
        while not all_are_taken():
            await asyncio.sleep(0.005)
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            await work()
        assert time.monotonic() - began < 5
        assert all_are_taken()
        assert effects.count == 0
        proxy.stall = False
        assert await asyncio.gather(*holding) == [None] * _CONNECTIONS
        assert await work() == 1

    if colour.is_async:
        asyncio.run(main())
        return
    proxy.stall = True
    holding = [
        colour.start(lambda n=n: drive(view.read(RecordId("n", str(n)))))  # type: ignore[misc]
        for n in range(_CONNECTIONS)
    ]
    eventually(all_are_taken)
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        work()
    assert time.monotonic() - began < 5
    assert all_are_taken()
    assert effects.count == 0
    proxy.stall = False
    assert [call.result(30) for call in holding] == [None] * _CONNECTIONS
    assert work() == 1


@pytest.mark.parametrize("decode", [False, True])
def test_two_hundred_threads_share_a_ready_made_client(
    redis_server: Server | Address, prefix: str, decode: bool, opened: Callable[..., RedisBackend]
) -> None:
    with client_of(redis_server, decode_responses=decode) as client:
        work = COLOURS[0].define(lambda number: number + 1, backend=opened(client, prefix=prefix), key="{number}")
        assert many(COLOURS[0], work, 200) == [number + 1 for number in range(200)]
        assert client.ping()


@pytest.mark.parametrize("decode", [False, True])
def test_two_hundred_tasks_share_a_ready_made_client(
    redis_server: Server | Address, prefix: str, decode: bool, opened: Callable[..., RedisBackend]
) -> None:
    async def main() -> None:
        async with redis.asyncio.Redis.from_url(redis_server.url, decode_responses=decode) as client:
            backend = opened(client, prefix=prefix)
            work = COLOURS[1].define(lambda number: number + 1, backend=backend, key="{number}")
            answers = await asyncio.gather(*(work(number) for number in range(200)), return_exceptions=True)
            assert answers == [number + 1 for number in range(200)]
            assert await client.ping()
            await backend.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("protocol", [2, 3])
def test_a_ready_made_client_may_decode_and_speak_either_protocol(
    redis_server: Server | Address, prefix: str, decode: bool, protocol: int, opened: Callable[..., RedisBackend]
) -> None:
    with client_of(redis_server, decode_responses=decode, protocol=protocol) as client:
        work = COLOURS[0].define(
            lambda number: bytes([number]), backend=opened(client, prefix=prefix), key="{number}", namespace="n"
        )
        assert [work(200), work(200), work(201)] == [b"\xc8", b"\xc8", b"\xc9"]
        assert work.peek(200).state == "completed"
        with Commands(opened(client, prefix=prefix), COLOURS[0]) as commands:
            assert {record.key for record in commands.scanned()} == {"200", "201"}
        assert work.forget(200)


def test_a_client_of_the_other_colour_is_refused_with_the_remedy(
    redis_server: Server | Address, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    with client_of(redis_server) as client:
        with pytest.raises(BackendError, match=r"redis\.asyncio\.Redis.*URL"):
            COLOURS[1].call(COLOURS[1].define(effects.hit, backend=opened(client)))
    with pytest.raises(BackendError, match=r"give it a redis\.Redis, or a URL"):
        COLOURS[0].call(COLOURS[0].define(effects.hit, backend=opened(redis.asyncio.Redis())))
    assert effects.count == 0


def test_fakeredis_serves_claims_replays_and_waiters(
    effects: Counter, gate: Gate, opened: Callable[..., RedisBackend]
) -> None:
    server = fakeredis.FakeServer()

    def work(order: str) -> int:
        if order == "slow":
            gate.pass_through()
        return effects.hit()

    options = {"key": "{order}", "namespace": "n"}
    with fakeredis.FakeRedis(server=server) as one, fakeredis.FakeRedis(server=server) as other:
        first = COLOURS[0].define(work, backend=opened(one), **options)
        second = COLOURS[0].define(work, backend=opened(other), **options)
        assert first("a") == second("a") == 1
        running = COLOURS[0].start(first, "slow")
        assert gate.entered.wait(30)
        waiting = COLOURS[0].start(second, "slow")
        with pytest.raises(InProgress):
            COLOURS[0].define(work, backend=opened(other), wait=0, **options)("slow")
        eventually(lambda: second.stats().get("waited"))
        gate.opened.set()
        assert running.result(30) == waiting.result(30) == 2
        assert first.peek("slow").state == "completed"


def test_fakeredis_serves_async_claims_replays_and_waiters(
    effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    async def main() -> None:
        server = fakeredis.FakeServer()
        options = {"key": "{order}", "namespace": "n"}
        gate = Gate()

        def work(order: str) -> int:
            if order == "slow":
                gate.pass_through()
            return effects.hit()

        async with fakeredis.FakeAsyncRedis(server=server) as one, fakeredis.FakeAsyncRedis(server=server) as other:
            first = COLOURS[1].define(work, backend=opened(one), **options)
            second = COLOURS[1].define(work, backend=opened(other), **options)
            assert await first("a") == await second("a") == 1
            running = asyncio.ensure_future(first("slow"))
            assert await asyncio.to_thread(gate.entered.wait, 30)
            waiting = asyncio.ensure_future(second("slow"))
            async with asyncio.timeout(20):
                while not second.stats().get("waited"):
                    await asyncio.sleep(0.005)
            gate.opened.set()
            assert await running == await waiting == 2

    asyncio.run(main())


# ---------------------------------------------------------------------------------------------------------- foreign bytes

RUNNING = pack(Row(State.RUNNING, 7, A, b"", 5, 30, 35))
COMPLETED = pack(Row(State.COMPLETED, 7, A, b"", 5, codec="json", body=b""))


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"hello",
        b"\xd1",
        bytes(60),
        b"\xd1X" + RUNNING[2:],
        b"\xd2" + RUNNING[1:],
        RUNNING + b"!",
        *(RUNNING[:size] for size in range(2, len(RUNNING), 7)),
        *(COMPLETED[:size] for size in range(20, len(COMPLETED), 3)),
        {"a": "hash"},
    ],
    ids=repr,
)
def test_foreign_bytes_under_a_key_run_nothing_and_are_left_alone(
    redis_server: Server | Address,
    prefix: str,
    colour: Colour,
    effects: Counter,
    raw: Any,
    opened: Callable[..., RedisBackend],
) -> None:
    rid = RecordId("n", "k")
    work = colour.define(effects.hit, backend=opened(redis_server.url, prefix=prefix), key="k", namespace="n")
    with client_of(redis_server) as client, Commands(opened(redis_server.url, prefix=prefix), colour) as commands:
        name = Keys(client, prefix).name(rid)
        client.hset(name, mapping=raw) if isinstance(raw, dict) else client.set(name, raw)
        before = client.dump(name)
        commands_tried: dict[str, Callable[[], Any]] = {
            "call": lambda: colour.call(work),
            "peek": lambda: colour.call(work.peek),
            "forget": lambda: colour.call(work.forget),
            "forced": lambda: colour.call(work.forget, force=True),
            "renew": lambda: commands.renew(rid, attempt=A, token=7, lease=1.0),
            "complete": lambda: commands.complete(rid, attempt=A, token=7, codec="", body=b"", ttl=1.0),
            "release": lambda: commands.release(rid, attempt=A, token=7),
            "withdraw": lambda: commands.release(rid, attempt=A, token=None),
            "scan": commands.scanned,
        }
        answers = {}
        for word, command in commands_tried.items():
            try:
                answers[word] = command()
            except BackendError as error:
                assert not isinstance(error, BackendUnavailable), word
            assert client.dump(name) == before, f"{word} changed it"
        assert answers.pop("scan", []) == []  # it shows what is ours
        # A settled envelope that is cut within its codec is foreign to those alone who read the outcome.
        assert set(answers) <= {"renew", "complete", "release", "withdraw"}
        assert set(answers.values()) <= {Answer.STALE, Answer.DONE}
    assert effects.count == 0


# ---------------------------------------------------------------------------------------------------------------- waiting


def test_a_waiter_is_woken_by_the_message_and_hardly_asks(
    own_redis: Server,
    prefix: str,
    colour: Colour,
    effects: Counter,
    gate: Gate,
    opened: Callable[..., RedisBackend],
) -> None:
    def work(turn: int) -> int:
        gate.pass_through()
        return effects.hit()

    options = {"key": "{turn}", "namespace": "n"}
    runner = colour.define(work, backend=opened(own_redis.url, prefix=prefix), **options)
    waiter = colour.define(work, backend=opened(own_redis.url, prefix=prefix), **options)
    took = []
    with client_of(own_redis) as client:
        for turn in (1, 2, 3):
            gate.entered.clear()
            gate.opened.clear()
            running = colour.start(runner, turn)
            assert gate.entered.wait(30)
            client.config_resetstat()
            waiting = colour.start(waiter, turn)
            channel = Keys(client, prefix).name(RecordId("n", str(turn))).encode()
            eventually(lambda channel=channel: channel in client.pubsub_channels())
            if turn == 1:
                threading.Event().wait(1.0)
            opened_at = time.monotonic()
            gate.opened.set()
            assert running.result(30) == waiting.result(30) == turn
            took.append(time.monotonic() - opened_at)
            if turn == 1:
                calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
                assert calls <= 7  # one completion; two claims and three looks of the waiter; one to spare
    assert min(took) < 0.1, took  # some milliseconds; a look of its own would come after a second
    assert effects.count == 3


def test_many_waiters_of_both_colours_share_one_subscription_connection(
    own_redis: Server, prefix: str, opened: Callable[..., RedisBackend]
) -> None:
    waiters = 40
    entered = threading.Semaphore(0)
    go = threading.Event()

    def work(order: int) -> int:
        entered.release()
        assert go.wait(30)
        return order

    options = {"key": "{order}", "namespace": "n"}
    runner = COLOURS[0].define(work, backend=opened(own_redis.url, prefix=prefix), **options)
    shared = opened(own_redis.url, prefix=prefix)
    sync, asynchronous = (colour.define(work, backend=shared, **options) for colour in COLOURS)
    half = waiters // 2
    running = [COLOURS[0].start(runner, order) for order in range(waiters)]
    try:
        for _ in range(waiters):
            assert entered.acquire(timeout=30)
        waiting = [
            COLOURS[0].start(many, COLOURS[0], sync, half),
            COLOURS[0].start(many, COLOURS[1], lambda order: asynchronous(order + half), half),
        ]
        with client_of(own_redis) as client:
            eventually(lambda: len(client.pubsub_channels(f"{prefix}:*")) == waiters)
            subscribed = client.client_list(_type="pubsub")
        assert [int(entry["sub"]) for entry in subscribed] == [waiters]
    finally:
        go.set()
    answers = [answer for part in waiting for answer in part.result(30)]
    assert answers == [call.result(30) for call in running] == list(range(waiters))


# ----------------------------------------------------------------------------------------------------------- size and URLs


def test_a_completed_record_is_at_most_a_third_larger_than_its_payload(
    redis_server: Server | Address, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    payload = "x" * 198  # 200 bytes as JSON

    def work() -> str:
        return payload

    work = colour.define(work, backend=opened(redis_server.url, prefix=prefix), key="order-12345", namespace="charge")
    colour.call(work)
    with client_of(redis_server) as client:
        name = Keys(client, prefix).name(RecordId("charge", "order-12345"))
        ours = client.memory_usage(name)
        client.set(name, f'"{payload}"', ex=86_400)
        plain = client.memory_usage(name)
        client.set(name, f'"{payload}"')
        assert ours <= 1.3 * client.memory_usage(name), f"{ours} bytes, {plain} for SET with an expiry"


def test_options_in_the_url_are_ours_or_the_clients_or_refused(redis_server: Server | Address) -> None:
    url = redis_server.url
    with RedisBackend(f"{url}?prefix=mine&timeout=1.5&client_name=me") as backend:
        assert (backend.prefix, backend.timeout) == ("mine", 1.5)
    with RedisBackend(f"{url}?prefix=mine&timeout=1.5", prefix="other", timeout=2) as backend:
        assert (backend.prefix, backend.timeout) == ("other", 2)
    with RedisBackend(url) as backend:
        assert (backend.prefix, backend.timeout) == ("idem", 5)
    for wrong in ("?prefx=mine", "?prefix=", "?timeout=soon", "?timeout=0", "?timeout=-1", "?timeout=nan"):
        with pytest.raises(ValueError, match="prefi?x|prefx|timeout"):
            RedisBackend(url + wrong)
    for argument in (17, None, object()):
        with pytest.raises(TypeError, match="RedisBackend takes a URL"):
            RedisBackend(argument)  # type: ignore[arg-type]


def test_the_database_number_of_the_url_is_used(
    redis_server: Server | Address, prefix: str, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    url = f"{redis_server.url.rpartition('/')[0]}/5"
    assert colour.call(colour.define(effects.hit, backend=opened(f"{url}?prefix={prefix}"))) == 1
    with redis.Redis.from_url(url) as fifth, client_of(redis_server) as zeroth:
        assert (len(fifth.keys(f"{prefix}:*")), len(zeroth.keys(f"{prefix}:*"))) == (1, 0)
        fifth.delete(*fifth.keys(f"{prefix}:*"))


def test_a_unix_socket_serves_both_colours_and_waiters(
    colour: Colour, gate: Gate, opened: Callable[..., RedisBackend]
) -> None:
    with start_redis("--unixsocket {dir}/redis.sock") as server:
        url = f"unix://{server.directory}/redis.sock?db=2&prefix=idem"
        with client_of(server) as client:
            use_everything(colour, url, opened, gate, lambda: client.pubsub_channels("idem:*"))
            assert set(client.info("keyspace")) == {"db2"}


def test_a_missing_unix_socket_is_told_at_once(
    tmp_path: Path, colour: Colour, effects: Counter, opened: Callable[..., RedisBackend]
) -> None:
    began = time.monotonic()
    with pytest.raises(BackendUnavailable):
        colour.call(colour.define(effects.hit, backend=opened(f"unix://{tmp_path}/none.sock")))
    assert time.monotonic() - began < 2
    assert effects.count == 0


def test_a_settled_record_answers_settled_with_its_outcome(
    redis_server: Server | Address, prefix: str, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    rid = RecordId("n", "k")
    with Commands(opened(redis_server.url, prefix=prefix), colour) as commands:
        token = claim(commands, rid).token
        commands.complete(rid, attempt=A, token=token, codec="c", body=b"\x00\xff", ttl=60.0)
        settled = claim(commands, rid, B)
        assert settled == Settled(False, token, settled.age, "c", b"\x00\xff")


@pytest.mark.parametrize("trouble", ["refused", "frozen"])
def test_a_ready_made_client_is_given_up_in_our_time_and_not_in_its_own(
    own_redis: Server, prefix: str, trouble: str, opened: Callable[..., RedisBackend]
) -> None:
    with client_of(own_redis) as client, Commands(opened(client, prefix=prefix, timeout=1), COLOURS[0]) as commands:
        if trouble == "frozen":
            own_redis.freeze()
        else:
            own_redis.kill()
        began = time.monotonic()
        with pytest.raises(BackendUnavailable):
            commands.read(RecordId("n", "k"))
        assert time.monotonic() - began < 3


def test_a_command_is_packed_as_redis_py_does_with_hiredis_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("EVALSHA", "sha", b"1", "key é", b"", b"\x00\r\n\xff", "", "\U0001f600")
    expected = b"".join(redis.Connection().pack_command(*command))
    packed = [b"".join(_redis_links._packed(command))]
    monkeypatch.setattr(_redis_links, "pack_command", None)
    packed.append(b"".join(_redis_links._packed(command)))
    assert packed == [expected, expected]


@pytest.mark.parametrize("colour", COLOURS, ids=repr)
def test_only_bytes_and_text_are_sent_as_a_signal_that_meets_hiredis_at_a_number_crashes_the_process(
    colour: Colour,
    redis_server: Address,
    opened: Callable[..., RedisBackend],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: set[str] = set()
    pack = _redis_links._packed

    def packed(command: tuple[Any, ...]) -> list[bytes]:
        assert {type(part) for part in command} <= {bytes, str}, command
        sent.add(command[0])
        return pack(command)

    monkeypatch.setattr(_redis_links, "_packed", packed)
    lock = RecordId("", "k", LOCKS)
    with Commands(opened(redis_server.url, prefix=prefix), colour) as commands:
        for rid in (RecordId("n", "k"), lock):
            token = claim(commands, rid, keep=60.0).token
            claim(commands, rid, B, over=token)
            commands.renew(rid, attempt=A, token=token, lease=30.0)
        for _ in range(2):  # the second time in the place of the first
            commands.changed(lock, token=token, timeout=0.05)
        commands.pass_on(lock)
        rid = RecordId("n", "k")
        token = commands.read(rid).token
        commands.complete(rid, attempt=A, token=token, codec="c", body=b"1", ttl=60.0, remember=60.0)
        commands.release(lock, attempt=A, token=None)
        commands.forget(rid)
        commands.fail(rid, attempt=A, token=token, codec="c", body=b"1", ttl=60.0)
        assert commands.scanned() == []
    drive(doctor_redis.examine(opened(redis_server.url, prefix=prefix)))
    with Commands(opened(redis_server.url, prefix=prefix, replicas=9, timeout=0.2), colour) as commands:
        with pytest.raises(BackendUnavailable, match="confirm"):
            claim(commands, RecordId("n", "other"))
    assert {"EVALSHA", "WAIT", "SCAN", "CONFIG"} <= sent
