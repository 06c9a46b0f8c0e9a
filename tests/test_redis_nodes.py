"""RedisBackend on several nodes: a cluster, sentinels, replicas. Real servers that the tests start."""

import asyncio
import contextlib
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from colours import COLOURS, Colour
from differential import Commands
from probes import eventually
from servers import RedisCluster, RedisSentinels, Server, start_redis, start_sentinel

from idempotent import Backend, BackendError, BackendUnavailable, Lock, RedisBackend, current_call
from idempotent._record import Granted, RecordId, Settled
from idempotent.testing import BackendContract

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
A, B = b"attemptA", b"attemptB"


@pytest.fixture
def prefix() -> str:
    """A prefix that no other test has."""
    return f"t{secrets.token_hex(6)}"


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., RedisBackend]:
    """Makes backends that are closed after the test."""

    def make(*args: Any, **kwargs: Any) -> RedisBackend:
        backend = RedisBackend(*args, **kwargs)
        _fresh.callback(backend.close)
        return backend

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def sentinels() -> Iterator[RedisSentinels]:
    with RedisSentinels() as sentinels:
        yield sentinels


@pytest.fixture
def own_sentinels() -> Iterator[RedisSentinels]:
    """A set to kill."""
    with RedisSentinels() as sentinels:
        yield sentinels


@pytest.fixture(scope="module")
def _pair() -> Iterator[tuple[Server, Server]]:
    # Valkey, because there a WAIT behind reads is answered at once, and would confirm what is not.
    with start_redis("--repl-diskless-sync-delay 0", prefers="valkey") as primary:
        with start_redis(f"--replicaof 127.0.0.1 {primary.port}", prefers="valkey") as replica:
            with client_of(replica) as client:
                eventually(lambda: client.info("replication")["master_link_status"] == "up")
            yield primary, replica


@pytest.fixture
def pair(_pair: tuple[Server, Server]) -> Iterator[tuple[Server, Server]]:
    """A primary, and its replica to freeze."""
    yield _pair
    _pair[1].thaw()


def client_of(server: Server, **options: Any) -> redis.Redis:
    return redis.Redis(port=server.port, **options)


def claim(commands: Commands, rid: RecordId, attempt: bytes = A, **changes: Any) -> Any:
    options = {"fingerprint": b"f" * 16, "lease": 30.0, "keep": None, "takeover": True}
    return commands.claim(rid, attempt=attempt, **(options | changes))


class Runs:
    """How often each order was run."""

    def __init__(self) -> None:
        self.of: dict[Any, int] = {}
        lock = threading.Lock()

        def charge(order: Any) -> str:
            with lock:
                self.of[order] = self.of.get(order, 0) + 1
            return f"receipt {order}"

        self.charge = charge


@pytest.fixture
def runs() -> Runs:
    return Runs()


def on_loop(function: Any, orders: range) -> list[Any]:
    async def main() -> list[Any]:
        return [await function(order) for order in orders]

    return asyncio.run(main())


def in_order(colour: Colour, function: Any, orders: range) -> list[Any]:
    """Calls one after the other; the async ones on one loop."""
    return on_loop(function, orders) if colour.is_async else [function(order) for order in orders]


# --------------------------------------------------------------------------------------------------------- the contract


class TestCluster(BackendContract):
    short = 0.25  # the tests' machine is busy

    @pytest.fixture
    def backend(self, cluster: RedisCluster, prefix: str) -> Iterator[Backend]:
        with RedisBackend(cluster.url, prefix=prefix) as backend:
            yield backend


class TestSentinels(BackendContract):
    short = 0.25
    histories = 10

    @pytest.fixture
    def backend(self, sentinels: RedisSentinels, prefix: str) -> Iterator[Backend]:
        with RedisBackend(f"{sentinels.url}?replicas=1", prefix=prefix) as backend:
            yield backend


# ---------------------------------------------------------------------------------------------------- ready-made clients


@contextlib.contextmanager
def cluster_client(colour: Colour, cluster: RedisCluster) -> Iterator[Any]:
    port = cluster.nodes[0].port
    if colour.is_async:  # it has asked nobody yet, and knows what it was told alone
        yield redis.asyncio.RedisCluster(host="127.0.0.1", port=port)
    else:
        with redis.RedisCluster(host="127.0.0.1", port=port) as client:
            yield client


@contextlib.contextmanager
def sentinel_client(colour: Colour, sentinels: RedisSentinels) -> Iterator[Any]:
    places = [("127.0.0.1", server.port) for server in sentinels.sentinels]
    module: Any = redis.asyncio.sentinel if colour.is_async else redis.sentinel
    manager = module.Sentinel(places)
    client = manager.master_for("main", decode_responses=True)
    yield client
    if not colour.is_async:
        client.close()


@pytest.mark.parametrize("kind", ["cluster", "sentinels"])
def test_a_ready_made_client_serves_its_colour_and_the_other_is_refused(
    request: pytest.FixtureRequest,
    kind: str,
    colour: Colour,
    prefix: str,
    runs: Runs,
    opened: Callable[..., RedisBackend],
) -> None:
    servers = request.getfixturevalue(kind)
    made = cluster_client if kind == "cluster" else sentinel_client
    with made(colour, servers) as client:
        backend = opened(client, prefix=prefix)
        work = colour.define(runs.charge, backend=backend, key="{order}", namespace="n")
        expected = [f"receipt {order}" for order in range(20)]
        assert in_order(colour, work, range(20)) == in_order(colour, work, range(20)) == expected
        assert set(runs.of.values()) == {1}
        with Commands(backend, colour) as commands:
            assert {record.key for record in commands.scanned()} == {str(order) for order in range(20)}
        other = COLOURS[not colour.is_async]
        with pytest.raises(BackendError, match="URL"):
            other.call(other.define(runs.charge, backend=backend), 0)


def test_the_client_of_a_replica_is_refused(sentinels: RedisSentinels) -> None:
    manager = redis.sentinel.Sentinel([("127.0.0.1", sentinels.sentinels[0].port)])
    with manager.slave_for("main") as client, pytest.raises(TypeError, match="master_for"):
        RedisBackend(client)


# ----------------------------------------------------------------------------------------------------------- permissions


def rules_of(what: str) -> list[str]:
    """What README says is needed, beginning with the word `what`."""
    found = re.search(rf"`({re.escape(what)}[^`]*)`", README)
    assert found, what
    return found[1].split()


@contextlib.contextmanager
def user_at(servers: Iterable[Server], rules: list[str]) -> Iterator[Callable[[], set[str]]]:
    """A user `app` with these rules alone; what was refused to it."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client_of(server, decode_responses=True)) for server in servers]
        for client in clients:
            client.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *rules)
            client.execute_command("ACL", "LOG", "RESET")

        def refused() -> set[str]:
            found = {entry["object"] for client in clients for entry in client.acl_log()}
            return found - {"client|setinfo"}  # redis-py tells its name, and minds no refusal

        yield refused
        for client in clients:
            client.execute_command("ACL", "DELUSER", "app")


def use_everything(colour: Colour, url: str, opened: Callable[..., RedisBackend], waits: Callable[[], Any]) -> None:
    """Calls, replays, waiters, locks and scans; `waits` tells when the waiter waits as it should."""
    entered, gate = threading.Event(), threading.Event()

    def work(order: int) -> int:
        if order == 9:
            entered.set()
            assert gate.wait(30)
        return order

    options = {"key": "{order}", "namespace": "n"}
    one, other = (colour.define(work, backend=opened(url), **options) for _ in range(2))
    assert in_order(colour, one, range(9)) == in_order(colour, other, range(9)) == list(range(9))
    running = colour.start(one, 9)
    assert entered.wait(30)
    waiting = colour.start(other, 9)
    with Commands(opened(url), colour) as commands:
        assert [record.key for record in commands.scanned(state="running")] == ["9"]
    eventually(waits)
    gate.set()
    assert running.result(30) == waiting.result(30) == 9
    for order in range(10):
        assert colour.call(one.forget, order)
    with Lock("name", backend=opened(url)):
        assert Lock("name", backend=opened(url)).acquire(wait=0) is None


def test_the_minimal_user_of_the_readme_may_do_everything_on_a_cluster(
    cluster: RedisCluster, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    rules = [*rules_of("~idem:* "), *rules_of("+zadd "), *rules_of("+cluster|slots ")]
    with user_at(cluster.nodes, rules) as refused:
        url = cluster.url.replace("://", "://app:secret@")

        def waits() -> bool:
            return any(client.execute_command("PUBSUB", "SHARDCHANNELS", "idem:*") for client in cluster.clients)

        use_everything(colour, url, opened, waits)
        assert refused() == set()


def test_waiters_of_a_cluster_that_does_not_let_them_listen_poll(
    cluster: RedisCluster, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    lacking = ("+ssubscribe", "+spublish")
    rules = [*rules_of("~idem:* "), *rules_of("+zadd "), *rules_of("+cluster|slots ")]
    with user_at(cluster.nodes, [rule for rule in rules if rule not in lacking]) as refused:
        use_everything(colour, cluster.url.replace("://", "://app:secret@"), opened, lambda: "ssubscribe" in refused())


def test_the_minimal_users_of_the_readme_may_do_everything_by_sentinels_with_replicas(
    sentinels: RedisSentinels, colour: Colour, opened: Callable[..., RedisBackend]
) -> None:
    rules = [*rules_of("~idem:* "), *rules_of("+zadd "), *rules_of("+role"), *rules_of("+wait")]
    with (
        user_at([sentinels.primary], rules) as refused,
        user_at(sentinels.sentinels, rules_of("-@all +sentinel")) as refused_there,
        client_of(sentinels.primary) as client,
    ):
        url = sentinels.url.replace("://", "://app:secret@")
        url += "?replicas=1&sentinel_username=app&sentinel_password=secret"
        use_everything(colour, url, opened, lambda: client.pubsub_channels("idem:*"))
        assert refused() == refused_there() == set()
        with pytest.raises(BackendUnavailable):
            COLOURS[0].call(COLOURS[0].define(lambda: 1, backend=opened(url.replace("password=secret", "password=no"))))


def test_a_primary_that_may_not_say_that_it_is_one_is_never_used(
    sentinels: RedisSentinels, colour: Colour, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    with user_at([sentinels.primary], rules_of("~idem:* ")) as refused:
        backend = opened(sentinels.url.replace("://", "://app:secret@") + "?sentinel_username=default")
        work = colour.define(runs.charge, backend=backend, key="{order}", namespace="n")
        for order in range(2):
            with pytest.raises(BackendUnavailable, match="role"):
                colour.call(work, order)
        assert (runs.of, refused()) == ({}, {"role"})


# --------------------------------------------------------------------------------------------------------------- cluster


def test_the_waiters_of_a_cluster_share_one_connection_to_each_node_and_are_woken_by_its_messages(
    cluster: RedisCluster, colour: Colour, prefix: str, opened: Callable[..., RedisBackend]
) -> None:
    entered, go = threading.Semaphore(0), threading.Event()

    def work(order: int) -> int:
        entered.release()
        assert go.wait(30)
        return order

    count = 12
    options = {"key": "{order}", "namespace": "n"}
    runner = COLOURS[0].define(work, backend=opened(cluster.url, prefix=prefix), **options)
    waiter = colour.define(work, backend=opened(cluster.url, prefix=prefix), **options)
    running = [COLOURS[0].start(runner, order) for order in range(count)]
    try:
        for _ in range(count):
            assert entered.acquire(timeout=30)
        waiting = [colour.start(waiter, order) for order in range(count)]

        def heard() -> int:
            found = [client.execute_command("PUBSUB", "SHARDCHANNELS", f"{prefix}:*") for client in cluster.clients]
            assert all(found) or sum(map(len, found)) < count  # the keys are of every node
            return sum(map(len, found))

        eventually(lambda: heard() == count)
        for client in cluster.clients:
            listening = [each for each in client.client_list(_type="pubsub") if int(each.get("ssub", 0))]
            assert len(listening) == 1
    finally:
        opened_at = time.monotonic()
        go.set()
    assert [call.result(30) for call in running] == [call.result(30) for call in waiting] == list(range(count))
    assert time.monotonic() - opened_at < 1  # a look of their own comes a second after the last


def test_scripts_that_a_node_of_a_cluster_has_lost_are_loaded_again(
    cluster: RedisCluster, colour: Colour, prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    work = colour.define(runs.charge, backend=opened(cluster.url, prefix=prefix), key="{order}")
    in_order(colour, work, range(9))
    for client in cluster.clients:
        client.script_flush()
    assert in_order(colour, work, range(18)) == [f"receipt {order}" for order in range(18)]
    assert set(runs.of.values()) == {1}


def test_locks_of_a_cluster_exclude_and_are_handed_over(
    cluster: RedisCluster, prefix: str, opened: Callable[..., RedisBackend]
) -> None:
    one, other = (opened(cluster.url, prefix=prefix) for _ in range(2))
    for name in ("a", "b", "c{d}", "}{"):
        hold = Lock(name, backend=one).acquire()
        assert Lock(name, backend=other).acquire(wait=0) is None
        waiting = COLOURS[0].start(Lock(name, backend=other).acquire, wait=20)
        channels = f"{prefix}:*#*"
        eventually(
            lambda channels=channels: any(
                client.execute_command("PUBSUB", "SHARDCHANNELS", channels) for client in cluster.clients
            )
        )
        released_at = time.monotonic()
        hold.release()
        successor = waiting.result(30)
        assert time.monotonic() - released_at < 0.9
        assert successor.token > hold.token
        successor.release()


class Move:
    """The move of the slot of a key from its node to another, in its steps."""

    def __init__(self, cluster: RedisCluster, key: str) -> None:
        self.slot = int(cluster.clients[0].execute_command("CLUSTER", "KEYSLOT", key))
        ids = [client.execute_command("CLUSTER", "MYID") for client in cluster.clients]
        owns = next(number for number in range(3) if self.slot < (number + 1) * 16_384 // 3)
        others = [number for number in range(len(ids)) if number != owns]
        self.source, self.target = cluster.clients[owns], cluster.clients[others[0]]
        self.third = cluster.clients[others[1]]
        self.ids = ids[owns], ids[others[0]]
        self.port = cluster.nodes[others[0]].port

    def begin(self) -> None:
        self.target.execute_command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", self.ids[0])
        self.source.execute_command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", self.ids[1])

    def keys(self) -> list[str]:
        return self.source.execute_command("CLUSTER", "GETKEYSINSLOT", self.slot, 10_000)

    def move(self, keys: list[str]) -> None:
        for key in keys:
            self.source.execute_command("MIGRATE", "127.0.0.1", self.port, key, 0, 5000)

    def end(self) -> None:
        while keys := self.keys():
            self.move(keys)
        for client in (self.target, self.source, self.third):
            client.execute_command("CLUSTER", "SETSLOT", self.slot, "NODE", self.ids[1])


def test_a_slot_that_moves_during_calls_runs_nothing_twice_and_loses_nothing(
    prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    with RedisCluster() as cluster:
        gate, entered = threading.Event(), threading.Event()

        def work(order: Any) -> str:
            if order == "slow":
                entered.set()
                assert gate.wait(30)
            return runs.charge(order)

        options = {"key": lambda order: f"{{tag}}{order}", "namespace": "n"}
        one, other = (opened(cluster.url, prefix=prefix) for _ in range(2))
        works = [COLOURS[0].define(work, backend=one, **options), COLOURS[1].define(work, backend=one, **options)]
        expected = [f"receipt {order}" for order in range(40)]
        running = COLOURS[0].start(works[0], "slow")
        assert entered.wait(30)
        waiting = [
            COLOURS[0].start(COLOURS[0].define(work, backend=other, **options), "slow"),
            COLOURS[1].start(COLOURS[1].define(work, backend=other, **options), "slow"),
        ]

        # Without a pause: calls that are new, and calls that are not.
        over = threading.Event()
        numbers = iter(range(1000, 1_000_000))

        def stream(colour: Colour, function: Any) -> int:
            count = 0
            while not over.is_set():
                first = next(numbers)
                new = range(first, first + 1)
                assert in_order(colour, function, new) == in_order(colour, function, new) == [f"receipt {first}"]
                count += 1
            return count

        streams = [
            COLOURS[0].start(stream, COLOURS[0], works[0]),
            COLOURS[0].start(stream, COLOURS[1], works[1]),
        ]
        moved = Move(cluster, f"{prefix}:{{tag}}")
        assert in_order(COLOURS[0], works[0], range(20)) == expected[:20]
        moved.begin()
        for colour, function in zip(COLOURS, works, strict=True):
            moved.move([key for key in moved.keys() if key.endswith(tuple("13579"))])
            assert in_order(colour, function, range(30)) == expected[:30]
        moved.end()
        for colour, function in zip(COLOURS, works, strict=True):
            assert in_order(colour, function, range(40)) == expected
        gate.set()
        assert {call.result(30) for call in (running, *waiting)} == {"receipt slow"}
        over.set()
        assert all(each.result(30) > 3 for each in streams)
        assert set(runs.of.values()) == {1}
        with Commands(one, COLOURS[0]) as commands:
            assert len({record.key for record in commands.scanned()}) == len(runs.of)


def test_a_node_of_a_cluster_that_is_killed_is_replaced_by_its_replica_during_calls(
    prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    with RedisCluster(replicas=1) as cluster:
        backend = opened(cluster.url, prefix=prefix, timeout=20)
        works = [colour.define(runs.charge, backend=backend, key="{order}", namespace="n") for colour in COLOURS]
        for colour, function in zip(COLOURS, works, strict=True):
            in_order(colour, function, range(20))
        with client_of(cluster.nodes[0]) as client:
            assert client.execute_command("WAIT", 1, 5000) == 1
        cluster.nodes[0].kill()
        calls = [
            COLOURS[0].start(in_order, colour, function, range(40))
            for colour, function in zip(COLOURS, works, strict=True)
        ]
        assert [call.result(60) for call in calls] == [[f"receipt {order}" for order in range(40)]] * 2
        assert set(runs.of.values()) == {1}


# ------------------------------------------------------------------------------------------------------------- sentinels


def test_the_calls_of_a_killed_primary_go_on_at_the_next_and_nothing_confirmed_is_lost(
    own_sentinels: RedisSentinels, prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    backend = opened(f"{own_sentinels.url}?replicas=1", prefix=prefix, timeout=20)
    options = {"backend": backend, "key": "{order}", "namespace": "n"}
    works = {colour: colour.define(runs.charge, **options) for colour in COLOURS}
    with Commands(backend, COLOURS[0]) as commands:
        tokens = [claim(commands, RecordId("tokens", "k")).token]
        before = works[COLOURS[0]].outcome("before")

        outcomes: dict[Any, Any] = {}
        errors: list[BaseException] = []
        under_way, over = threading.Semaphore(0), threading.Event()

        def stream(colour: Colour) -> None:
            async def ask(order: Any) -> Any:
                outcome = works[colour].outcome(order)
                return await outcome if colour.is_async else outcome

            async def main() -> None:
                number = 0
                while not over.is_set():
                    order = f"{colour}{number}"
                    try:
                        outcomes[order] = await ask(order)
                    except BackendUnavailable as error:  # the claim was not confirmed, so nothing ran
                        errors.append(error)
                    number += 1
                    under_way.release()

            asyncio.run(main())

        streams = [COLOURS[0].start(stream, colour) for colour in COLOURS]
        for _ in range(20):
            assert under_way.acquire(timeout=30)
        own_sentinels.primary.kill()
        known = len(outcomes)
        eventually(lambda: len(outcomes) > known + 20, 60)
        over.set()
        for each in streams:
            each.result(60)
        assert errors == []  # the failover took less than the deadline
        again = works[COLOURS[0]].outcome("before")
        assert (again.replayed, again.value, again.token) == (True, before.value, before.token)
        for order, outcome in outcomes.items():
            found = works[COLOURS[0]].outcome(order)
            if outcome.stored:
                assert (found.replayed, found.value, found.token) == (True, outcome.value, outcome.token)
            assert runs.of[order] == 1
        assert commands.release(RecordId("tokens", "k"), attempt=A, token=tokens[0])
        tokens.append(claim(commands, RecordId("tokens", "k"), B).token)
        assert tokens[1] > tokens[0]


def test_a_frozen_primary_is_left_for_the_next_and_changes_nothing_when_it_is_back(
    own_sentinels: RedisSentinels, prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    backend = opened(own_sentinels.url, prefix=prefix, timeout=10)
    works = [colour.define(runs.charge, backend=backend, key="{order}", namespace=repr(colour)) for colour in COLOURS]
    calls = [
        COLOURS[0].start(in_order, colour, function, range(3)) for colour, function in zip(COLOURS, works, strict=True)
    ]
    assert [call.result(30) for call in calls] == [[f"receipt {order}" for order in range(3)]] * 2
    with client_of(own_sentinels.primary) as client:
        assert client.execute_command("WAIT", 2, 5000) == 2
    own_sentinels.primary.freeze()
    calls = [
        COLOURS[0].start(in_order, colour, function, range(5)) for colour, function in zip(COLOURS, works, strict=True)
    ]
    assert [call.result(60) for call in calls] == [[f"receipt {order}" for order in range(5)]] * 2
    own_sentinels.primary.thaw()
    for colour, function in zip(COLOURS, works, strict=True):
        assert in_order(colour, function, range(5)) == [f"receipt {order}" for order in range(5)]
    assert set(runs.of.values()) == {2}  # once in each namespace


def test_sentinels_that_are_dead_or_frozen_are_passed_over(
    own_sentinels: RedisSentinels, colour: Colour, prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    dead, frozen, _ = own_sentinels.sentinels
    dead.kill()
    frozen.freeze()
    backend = opened(own_sentinels.url, prefix=prefix, timeout=3)
    assert colour.call(colour.define(runs.charge, backend=backend), 1) == "receipt 1"
    frozen.kill()
    own_sentinels.sentinels[2].kill()
    # Who knows the primary needs no sentinel; who does not is told at once.
    assert colour.call(colour.define(runs.charge, backend=backend), 2) == "receipt 2"
    began = time.monotonic()
    with pytest.raises(BackendUnavailable, match="refuses"):
        colour.call(colour.define(runs.charge, backend=opened(own_sentinels.url, timeout=30)), 3)
    assert time.monotonic() - began < 5
    assert 3 not in runs.of


def test_a_replica_that_a_sentinel_takes_for_the_primary_is_not_used(
    pair: tuple[Server, Server], colour: Colour, prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    with start_sentinel(pair[1], 1) as sentinel:
        backend = opened(f"redis+sentinel://127.0.0.1:{sentinel.port}/main", prefix=prefix, timeout=0.5)
        with pytest.raises(BackendUnavailable, match="is a replica"):
            colour.call(colour.define(runs.charge, backend=backend), 1)
    assert runs.of == {}


def test_a_service_that_no_sentinel_knows_runs_nothing(
    sentinels: RedisSentinels, colour: Colour, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    backend = opened(sentinels.url.replace("/main", "/other"), timeout=0.5)
    with pytest.raises(BackendUnavailable, match="no node answers"):
        colour.call(colour.define(runs.charge, backend=backend), 1)
    assert runs.of == {}


# -------------------------------------------------------------------------------------------------------------- replicas


def test_a_claim_that_no_replica_confirms_runs_nothing_and_is_taken_back(
    pair: tuple[Server, Server], colour: Colour, prefix: str, runs: Runs, opened: Callable[..., RedisBackend]
) -> None:
    primary, replica = pair
    backend = opened(f"{primary.url}?replicas=1", prefix=prefix, timeout=2)
    work = colour.define(runs.charge, backend=backend, key="{order}", namespace="n")
    assert colour.call(work.outcome, 1).stored
    replica.freeze()
    with pytest.raises(BackendUnavailable, match="0 of 1 replicas"):
        colour.call(work, 2)
    assert 2 not in runs.of
    alone = colour.define(runs.charge, backend=opened(primary.url, prefix=prefix), key="{order}", namespace="n")
    assert colour.call(alone.peek, 2) is None  # and nobody has to wait for the end of its lease
    with pytest.raises(BackendUnavailable):
        Lock("a", backend=backend).acquire(wait=0)
    assert not Lock("a", backend=opened(primary.url, prefix=prefix)).locked()
    replica.thaw()
    assert colour.call(work, 2) == "receipt 2"


def test_what_a_claim_is_told_again_or_replays_is_confirmed_like_the_first(
    pair: tuple[Server, Server], colour: Colour, prefix: str, opened: Callable[..., RedisBackend]
) -> None:
    primary, replica = pair
    rid = RecordId("n", "k")
    with (
        Commands(opened(primary.url, prefix=prefix), colour) as alone,
        Commands(opened(primary.url, prefix=prefix, replicas=1, timeout=0.5), colour) as safe,
    ):
        assert eventually(lambda: isinstance(_or_none(lambda: claim(safe, RecordId("n", "other"))), Granted))
        replica.freeze()
        granted = claim(alone, rid)
        for _ in range(2):  # the claim wrote nothing for these; their connection had last written what is confirmed
            with pytest.raises(BackendUnavailable):
                claim(safe, rid)
        alone.complete(rid, attempt=A, token=granted.token, codec="c", body=b"x", ttl=60.0)
        with pytest.raises(BackendUnavailable):
            claim(safe, rid, B)
        assert isinstance(claim(alone, rid, B), Settled)
        replica.thaw()
        eventually(lambda: isinstance(_or_none(lambda: claim(safe, rid, B)), Settled))


def _or_none(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except BackendUnavailable:
        return None


@pytest.mark.parametrize("comes_back", [True, False])
def test_an_outcome_is_sent_until_a_replica_confirms_it_or_the_lease_is_over(
    pair: tuple[Server, Server], colour: Colour, prefix: str, comes_back: bool, opened: Callable[..., RedisBackend]
) -> None:
    primary, replica = pair
    lease = 20.0 if comes_back else 1.5

    def work() -> str:
        call = current_call()
        assert call is not None
        replica.freeze()
        threading.Event().wait(0.8)  # a renewal has been needed where the lease is short
        assert not call.lease_lost  # renewals need no confirmation
        if comes_back:
            threading.Timer(1.0, replica.thaw).start()
        return "done"

    backend = opened(f"{primary.url}?replicas=1", prefix=prefix, timeout=0.6)
    work = colour.define(work, backend=backend, lease=lease, namespace="n")
    outcome = colour.call(work.outcome)
    assert (outcome.value, outcome.stored) == ("done", comes_back)
    replica.thaw()


def test_a_claim_that_was_confirmed_outlives_its_primary_and_its_successor_has_a_higher_token(
    prefix: str, opened: Callable[..., RedisBackend]
) -> None:
    with (
        start_redis("--repl-diskless-sync-delay 0") as primary,
        start_redis(f"--replicaof 127.0.0.1 {primary.port}") as replica,
        client_of(replica) as client,
    ):
        eventually(lambda: client.info("replication")["master_link_status"] == "up")
        rid = RecordId("n", "k")
        with Commands(opened(primary.url, prefix=prefix, replicas=1, timeout=20), COLOURS[0]) as commands:
            confirmed = claim(commands, rid)
            replica.freeze()
            with pytest.raises(BackendUnavailable, match="0 of 1 replicas"):
                claim(commands, RecordId("n", "late"), lease=1.0)
        primary.kill()
        replica.thaw()
        client.replicaof("NO", "ONE")
        with Commands(opened(replica.url, prefix=prefix), COLOURS[0]) as commands:
            assert claim(commands, rid, A) == Granted(confirmed.token)
            assert commands.release(rid, attempt=A, token=confirmed.token)
            assert claim(commands, rid, B).token > confirmed.token
