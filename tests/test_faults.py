"""Faults of servers that the backends' own tests do not inject; the README's table names all there are, by fault."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import threading
from collections import Counter as Tally
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pymysql
import pytest
import redis
import servers
from clocks import SteppedClock
from colours import COLOURS, Colour, on_one_loop
from differential import Commands
from probes import Counter, eventually
from proxy import Proxy
from redis.backoff import NoBackoff
from redis.retry import Retry
from servers import Server, start_mariadb, start_postgres, start_redis

from idempotent import (
    Backend,
    BackendError,
    BackendUnavailable,
    InProgress,
    ResultUnavailable,
    current_call,
    open_backend,
)
from idempotent._record import Answer, Busy, Granted, RecordId, Settled

A, B = b"attemptA", b"attemptB"


@pytest.fixture
def count() -> Counter:
    return Counter()


@pytest.fixture(params=["redis", "postgres", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> Server:
    """A server to freeze and kill."""
    return request.getfixturevalue(f"own_{request.param}")


@pytest.fixture(params=["postgres", "mariadb"])
def own_database(request: pytest.FixtureRequest) -> Server:
    """The same of SQL servers."""
    return request.getfixturevalue(f"own_{request.param}")


@pytest.fixture
def opened(_fresh: contextlib.ExitStack) -> Callable[..., Backend]:
    """Makes backends that are closed after the test, on records of the test's own."""
    name = f"t{secrets.token_hex(6)}"

    def make(url: str, **options: Any) -> Backend:
        option = "prefix" if url.startswith("redis") else "table"
        words = "&".join(f"{word}={value}" for word, value in {option: name, **options}.items())
        backend = open_backend(f"{url}{'&' if '?' in url else '?'}{words}")
        _fresh.callback(backend.close)
        return backend

    make.name = name  # type: ignore[attr-defined]
    return make


def through(proxy: Proxy, server: Server) -> str:
    return server.url.replace(f":{server.port}", f":{proxy.port}")


def claim(commands: Commands, rid: RecordId, attempt: bytes = A, **changes: Any) -> Any:
    options = {"fingerprint": b"", "lease": 30.0, "keep": None, "takeover": True}
    return commands.claim(rid, attempt=attempt, **(options | changes))


def complete(commands: Commands, rid: RecordId, token: int, attempt: bytes = A) -> Any:
    return commands.complete(rid, attempt=attempt, token=token, codec="json", body=b"1", ttl=600.0)


def client_of(server: Server, **options: Any) -> redis.Redis:
    return redis.Redis.from_url(server.url, **options)


def execute(server: Server, *statements: str) -> None:
    """Run statements as the database's owner."""
    if server.url.startswith("postgres"):
        with psycopg.connect(server.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())
        return
    with pymysql.connect(host="127.0.0.1", port=server.port, user="root", database="test") as mysql:
        for statement in statements:
            mysql.cursor().execute(statement)


# ----------------------------------------------------------------------------------------------------- servers that end


def test_a_killed_process_of_postgresql_ends_all_connections_and_they_are_made_again(
    own_postgres: Server, colour: Colour, count: Counter, opened: Any
) -> None:
    """The main process ends the others and recovers: for a moment it refuses, or says that it is starting up."""

    def kill() -> None:
        with psycopg.connect(own_postgres.url, autocommit=True) as connection:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
            ).fetchall()
            os.kill(found[0][0] if found else connection.info.backend_pid, signal.SIGKILL)

    def work(order: int) -> int:
        kill()
        return count.hit()

    work = colour.define(work, backend=opened(own_postgres.url, timeout=10), key="{order}", lease=60)
    with on_one_loop(colour) as call:
        assert call(work, 1) == 1  # its completion meets the server in recovery
        assert own_postgres.alive
        answer = eventually(lambda: call_until_served(call, work, 2))
        assert answer == 2
        assert [call(work, 1), call(work, 2)] == [1, 2]


def call_until_served(call: Any, function: Any, *arguments: Any) -> Any:
    """The answer; None while the backend is unavailable."""
    with contextlib.suppress(BackendUnavailable):
        return call(function, *arguments)


def test_two_thousand_records_survive_a_killed_redis_that_appends_to_a_file(own_redis: Server, opened: Any) -> None:
    backend = opened(own_redis.url)
    with Commands(backend, COLOURS[0]) as commands:
        tokens = {}
        for number in range(2000):
            rid = RecordId("n", str(number))
            tokens[number] = claim(commands, rid).token
            assert complete(commands, rid, tokens[number]) is Answer.DONE
        own_redis.kill()
        own_redis.restart()
        survivors = [claim(commands, RecordId("n", str(number)), B) for number in range(2000)]
    assert [(type(reply), reply.token) for reply in survivors] == [(Settled, token) for token in tokens.values()]


def test_a_storm_over_a_server_that_is_killed_and_comes_back_runs_nothing_twice(
    own_server: Server, colour: Colour, opened: Any
) -> None:
    runs: Tally[int] = Tally()
    half_done = threading.Event()

    def work(order: int) -> int:
        runs[order] += 1
        if len(runs) >= 20:
            half_done.set()
        return order

    function = colour.define(work, backend=opened(own_server.url, timeout=3), key="{order}", lease=120, wait=0)

    def storm(first: int) -> set[int]:
        answered = set()
        for order in range(first, first + 12):
            for _ in range(3):
                with contextlib.suppress(BackendUnavailable, InProgress):
                    assert colour.call(function, order % 40) == order % 40
                    answered.add(order % 40)
        return answered

    calls = [COLOURS[0].start(storm, first) for first in range(0, 40, 10)]
    assert half_done.wait(30)
    own_server.kill()
    own_server.restart()
    answered = set().union(*(call.result(90) for call in calls))
    assert len(answered) >= 20
    assert [colour.call(function, order) for order in sorted(answered)] == sorted(answered)
    assert set(runs.values()) == {1}


# ------------------------------------------------------------------------------------------------- servers that cannot


@pytest.mark.parametrize("own_database", ["postgres", "mariadb"], indirect=True)
def test_a_database_whose_writes_stall_confirms_nothing_and_holds_no_lease(
    own_database: Server, colour: Colour, count: Counter, opened: Any
) -> None:
    backend = opened(own_database.url, timeout=0.4)
    other = COLOURS[0].define(count.hit, backend=backend, key="other", wait=0)
    held = threading.Event()
    holding = threading.Event()

    def hold() -> None:
        if own_database.url.startswith("postgres"):
            with psycopg.connect(own_database.url) as connection:
                connection.execute(f'LOCK TABLE "{opened.name}" IN EXCLUSIVE MODE'.encode())
                holding.set()
                assert held.wait(30)
            return
        with pymysql.connect(host="127.0.0.1", port=own_database.port, user="root", database="test") as connection:
            connection.cursor().execute(f"LOCK TABLES {opened.name} READ")
            holding.set()
            assert held.wait(30)

    def work() -> int:
        call = current_call()
        assert call is not None
        call.check()
        thread.start()
        assert holding.wait(30)
        eventually(lambda: call.lease_lost)  # at its local deadline, as no renewal is confirmed
        with pytest.raises(BackendUnavailable):
            other()
        held.set()
        return count.hit()

    thread = threading.Thread(target=hold)
    work = colour.define(work, backend=backend, key="k", namespace="n", lease=1.5)
    try:
        with Commands(backend, COLOURS[0]) as commands:
            commands.read(RecordId("n", "k"))
        outcome = colour.call(work.outcome)
    finally:
        held.set()
        thread.join(30)
    assert (outcome.value, count.count) == (1, 1)
    # Told late, but nobody had taken over; or too late to be recorded, and then the lease has lapsed.
    assert outcome.stored or colour.call(work.peek).state in ("running", "completed")


def test_a_redis_that_sleeps_is_given_up_by_the_own_deadline(colour: Colour, count: Counter, opened: Any) -> None:
    with start_redis("--enable-debug-command yes") as server, client_of(server, socket_timeout=30) as client:
        work = colour.define(lambda order: count.hit(), backend=opened(server.url, timeout=0.4), key="{order}")
        assert colour.call(work, 1) == 1
        client.ping()
        sleeping = threading.Thread(target=lambda: client.execute_command("DEBUG", "SLEEP", "2.5"))
        sleeping.start()
        probe = redis.Redis(port=server.port, socket_timeout=0.7, retry=Retry(NoBackoff(), 0))
        eventually(lambda: not answers(probe))
        with pytest.raises(BackendUnavailable):
            colour.call(work, 2)
        assert count.count == 1
        sleeping.join()
        assert colour.call(work, 1) == 1
        probe.close()


def answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def test_an_evicted_record_is_a_lost_one_but_its_owner_is_told_and_tokens_grow(colour: Colour, opened: Any) -> None:
    """What `allkeys-lru` does to a record that is in use: the reason why the README asks for `noeviction`."""
    with start_redis("--maxmemory-policy allkeys-lru") as server, client_of(server) as client:
        with Commands(opened(server.url), colour) as commands:
            rid = RecordId("n", "k")
            token = claim(commands, rid).token
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory", used + 200_000)
            number = 0
            while client.exists(f"{opened.name}:{rid.text}"):
                with contextlib.suppress(redis.ResponseError):
                    client.set(f"filler{(number := number + 1)}", "x" * 20_000)
            assert commands.renew(rid, attempt=A, token=token, lease=30.0) is Answer.GONE
            client.config_set("maxmemory", 0)
            successor = claim(commands, rid, B)
            assert successor.token > token
            assert complete(commands, rid, token) is Answer.STALE
            assert complete(commands, rid, successor.token, B) is Answer.DONE


# -------------------------------------------------------------------------------------------------------------- failover


def test_after_a_failover_what_was_replicated_replays_and_tokens_grow(
    colour: Colour, count: Counter, opened: Any
) -> None:
    """Without `replicas=` nothing more is promised: a claim that the replica never saw is lost, and its run may double."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(start_redis())
        with client_of(primary) as client:
            client.config_set("repl-diskless-sync-delay", 0)
        link = stack.enter_context(Proxy("127.0.0.1", primary.port))
        replica = stack.enter_context(start_redis(f"--replicaof 127.0.0.1 {link.port}"))
        # Who connects by name finds the new primary there.
        proxy = stack.enter_context(Proxy("127.0.0.1", primary.port))
        client = stack.enter_context(client_of(replica))
        eventually(lambda: client.info("replication")["master_link_status"] == "up")
        backend = opened(through(proxy, primary), timeout=3)
        work = colour.define(lambda order: count.hit(), backend=backend, key="{order}", namespace="n")
        with Commands(backend, colour) as commands:
            assert colour.call(work, "replicated") == 1
            kept = claim(commands, RecordId("n", "kept"))
            eventually(lambda: len(client.keys(f"{opened.name}:*")) == 2)
            link.stall = True
            lost = claim(commands, RecordId("n", "lost"))
            assert colour.call(work, "acknowledged") == 2
            primary.kill()
            client.replicaof("NO", "ONE")
            proxy.retarget(replica.port)
            assert colour.call(work, "replicated") == 1
            assert isinstance(claim(commands, RecordId("n", "kept"), B), Busy)
            assert complete(commands, RecordId("n", "kept"), kept.token) is Answer.DONE
            # The old owner of a lost claim cannot touch its successor's record.
            successor = claim(commands, RecordId("n", "lost"), B)
            assert successor.token > lost.token
            assert complete(commands, RecordId("n", "lost"), lost.token) is Answer.STALE
            assert complete(commands, RecordId("n", "lost"), successor.token, B) is Answer.DONE
            assert colour.call(work, "acknowledged") == 3  # lost with the primary: it ran again


def test_after_a_failover_to_a_synchronous_standby_of_postgresql_nothing_confirmed_is_lost(
    colour: Colour, count: Counter, opened: Any
) -> None:
    """The standby refuses before the run until it is promoted; a primary that cannot reach it confirms nothing."""
    with contextlib.ExitStack() as stack:
        primary = stack.enter_context(start_postgres())
        standby = stack.enter_context(start_postgres(standby_of=primary))
        proxy = stack.enter_context(Proxy("127.0.0.1", primary.port))
        execute(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")
        streams = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        with psycopg.connect(primary.url, autocommit=True) as connection:
            eventually(lambda: connection.execute(streams).fetchall() == [(1,)])
        backend = opened(through(proxy, primary), timeout=3)
        work = colour.define(lambda order: count.hit(), backend=backend, key="{order}", namespace="n", wait=0)
        with Commands(backend, colour) as commands:
            assert [colour.call(work, order) for order in range(20)] == list(range(1, 21))
            kept = claim(commands, RecordId("n", "kept"))
            following = colour.define(count.hit, backend=opened(standby.url), key="19", namespace="n")
            # A commit is confirmed when the standby has it in its log, and is to be seen there a moment later.
            assert eventually(lambda: colour.call(following.peek)).state == "completed"
            with pytest.raises(BackendUnavailable, match="read-only"):
                colour.call(following)
            hasty = colour.define(count.hit, backend=opened(primary.url, timeout=0.7), key="unconfirmed", namespace="n")
            assert colour.call(hasty.peek) is None
            standby.freeze()
            with pytest.raises(BackendUnavailable):
                colour.call(hasty)
            assert count.count == 20
            primary.kill()
            standby.thaw()
            execute(standby, "ALTER SYSTEM SET synchronous_standby_names = ''", "SELECT pg_promote()")
            proxy.retarget(standby.port)
            assert [colour.call(work, order) for order in range(20)] == list(range(1, 21))
            assert isinstance(claim(commands, RecordId("n", "kept"), B), Busy)
            assert complete(commands, RecordId("n", "kept"), kept.token) is Answer.DONE
            later = claim(commands, RecordId("n", "later"))
            assert later.token > kept.token
        assert count.count == 20


# ---------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture(scope="module")
def tiny_disk() -> Iterator[Path]:
    """A file system of some megabytes, mounted where every account may go."""
    if os.geteuid() != 0:
        pytest.skip("a full disk takes a file system of its own, and mounting one takes root")
    folder = Path(servers._make_directory(None))
    folder.chmod(0o755)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m,mode=777", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    folder.rmdir()


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """No room on the disk."""
    filler = disk / f"filler-{secrets.token_hex(4)}"
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    try:
        yield
    finally:
        filler.unlink()


def refused_until_there_is_room(
    colour: Colour, backend: Backend, disk: Path, *, replays: bool, size: int = 200
) -> None:
    """Calls of new keys are refused on a full disk, sooner or later, with nothing run; with room again all is well."""
    runs: Tally[str] = Tally()

    def work(order: str) -> str:
        runs[order] += 1
        return "x" * size

    work = colour.define(work, backend=backend, key="{order}", namespace="n", lease=3)
    with on_one_loop(colour) as call:
        call(work, "before")
        confirmed, refused = ["before"], "refused".ljust(size, "k")
        with full(disk):
            for number in range(300):
                order = f"{number}-".ljust(size, "k")
                try:
                    outcome = call(work.outcome, order)
                except BackendError:
                    assert runs[order] == 0
                    break
                except ResultUnavailable:  # claimed and run before the disk was full: recorded as done
                    assert runs[order] == 1
                    continue
                assert runs[order] == 1
                if outcome.stored:  # else another claim may still fit, which is smaller
                    confirmed.append(order)
            else:
                pytest.fail("it took everything on a full disk")
            with pytest.raises(BackendError):
                call(work, refused)
            assert runs[refused] == 0
            if replays:
                assert call(work.outcome, "before").replayed
        assert eventually(lambda: call_until_served(call, work, refused))
        for order in confirmed:
            assert call(work.outcome, order).replayed
    assert set(runs.values()) == {1}


def test_redis_on_a_full_disk_refuses_before_the_run_and_replays(tiny_disk: Path, colour: Colour, opened: Any) -> None:
    folder = tiny_disk / f"redis{secrets.token_hex(4)}"
    folder.mkdir()
    with start_redis(f"--appendonly yes --appendfsync everysec --dir {folder}") as server:
        refused_until_there_is_room(colour, opened(server.url, timeout=3), tiny_disk, replays=True)
    for file in sorted(folder.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()


def test_sqlite_on_a_full_disk_refuses_before_the_run_and_replays(tiny_disk: Path, colour: Colour) -> None:
    path = tiny_disk / f"{secrets.token_hex(4)}.db"
    with open_backend(f"sqlite:///{path}?timeout=3") as backend:
        refused_until_there_is_room(colour, backend, tiny_disk, replays=True)


def test_postgresql_on_a_full_disk_refuses_before_the_run_and_replays(
    own_postgres: Server, tiny_disk: Path, colour: Colour, opened: Any
) -> None:
    folder = tiny_disk / f"postgres{secrets.token_hex(4)}"
    folder.mkdir()
    account = servers._account("postgres")
    os.chown(folder, servers.pwd.getpwnam(account["user"]).pw_uid, account["group"])
    name = folder.name
    execute(own_postgres, f"CREATE TABLESPACE {name} LOCATION '{folder}'")
    url = f"{own_postgres.url}?options=-c%20default_tablespace%3D{name}"
    refused_until_there_is_room(colour, opened(url, timeout=3), tiny_disk, replays=True)
    execute(own_postgres, f'DROP TABLE "{opened.name}"', f"DROP TABLESPACE {name}")


def test_mariadb_on_a_full_disk_refuses_before_the_run_and_replays(
    own_mariadb: Server, tiny_disk: Path, colour: Colour, opened: Any
) -> None:
    folder = tiny_disk / f"mariadb{secrets.token_hex(4)}"
    folder.mkdir()
    account = servers._account("mysql")
    os.chown(folder, servers.pwd.getpwnam(account["user"]).pw_uid, account["group"])
    backend = opened(own_mariadb.url, timeout=3)
    with Commands(backend, COLOURS[0]) as commands:
        commands.read(RecordId("n", "k"))
    with pymysql.connect(host="127.0.0.1", port=own_mariadb.port, user="root", database="test") as connection:
        cursor = connection.cursor()
        cursor.execute(f"SHOW CREATE TABLE {opened.name}")
        made = cursor.fetchall()[0][1]
    execute(own_mariadb, f"DROP TABLE {opened.name}", f"{made} DATA DIRECTORY='{folder}'")
    refused_until_there_is_room(colour, backend, tiny_disk, replays=True)
    execute(own_mariadb, f"DROP TABLE {opened.name}")


# ------------------------------------------------------------------------------------------------------------- partition


@pytest.mark.parametrize("own_database", ["postgres", "mariadb"], indirect=True)
def test_a_partition_from_the_database_confirms_nothing_and_heals(
    own_database: Server, colour: Colour, count: Counter, opened: Any
) -> None:
    def work(order: str) -> int:
        if order == "parted while it runs":
            proxy.stall = True
            healing.start()
        return count.hit()

    def heal() -> None:
        proxy.drop()
        proxy.stall = False

    healing = threading.Timer(1.0, heal)  # past the first deadline: the flow itself sends again
    options: dict[str, Any] = {"key": "{order}", "namespace": "n"}
    with Proxy("127.0.0.1", own_database.port) as proxy:
        backend = opened(through(proxy, own_database), timeout=0.7)
        work = colour.define(work, backend=backend, lease=30, **options)
        with on_one_loop(colour) as call:
            assert eventually(lambda: call_until_served(call, work, "before")) == 1
            proxy.stall = True
            for order in ("before", "parted before it runs"):
                with pytest.raises(BackendUnavailable):
                    call(work, order)
            assert count.count == 1
            heal()
            assert eventually(lambda: call_until_served(call, work, "before")) == 1
            assert eventually(lambda: call_until_served(call, work, "parted before it runs")) == 2
            outcome = eventually(lambda: call_until_served(call, work.outcome, "parted while it runs"))
            assert (outcome.value, outcome.stored) == (3, True)
            healing.join()

    def again(order: str) -> int:
        return count.hit()

    beyond = COLOURS[0].define(again, backend=opened(own_database.url), **options)
    assert [beyond(order) for order in ("before", "parted before it runs", "parted while it runs")] == [1, 2, 3]
    assert count.count == 3


# ----------------------------------------------------------------------------------------------- limits of the database


LIMITS = {
    "postgres": ["lock_timeout = '30ms'", "statement_timeout = '400ms'"],
    "mariadb": ["innodb_lock_wait_timeout = 1"],
}


@pytest.mark.parametrize(
    ("own_database", "limit"),
    [(kind, limit) for kind, limits in LIMITS.items() for limit in limits],
    indirect=["own_database"],
)
def test_a_lock_that_the_database_gives_up_waiting_for_is_asked_for_again_or_told(
    own_database: Server, limit: str, colour: Colour, opened: Any
) -> None:
    rid = RecordId("n", "k")
    is_postgres = own_database.url.startswith("postgres")
    with contextlib.ExitStack() as stack:
        name = f"u{secrets.token_hex(4)}"
        if is_postgres:
            execute(own_database, f"CREATE USER {name} SUPERUSER", f"ALTER USER {name} SET {limit}")
            url = own_database.url.replace("postgres@", f"{name}@")
        else:
            execute(own_database, f"SET GLOBAL {limit}")
            stack.callback(execute, own_database, "SET GLOBAL innodb_lock_wait_timeout = 50")
            url = own_database.url
        commands = stack.enter_context(Commands(opened(url, timeout=10), colour))
        commands.read(rid)
        token = claim(commands, rid).token
        locker = (
            psycopg.connect(own_database.url)
            if is_postgres
            else pymysql.connect(host="127.0.0.1", port=own_database.port, user="root", database="test")
        )
        with locker as connection:
            connection.cursor().execute(f"SELECT id FROM {opened.name} WHERE id = '{rid.digest}' FOR UPDATE")
            unlocking = threading.Timer(1.3, connection.rollback)  # longer than the database itself would wait
            unlocking.start()
            if limit.startswith("statement"):  # which may be meant for us: told, and not asked for again
                with pytest.raises(BackendUnavailable):
                    complete(commands, rid, token)
                unlocking.join()
            assert complete(commands, rid, token) is Answer.DONE
            unlocking.join()
        assert isinstance(claim(commands, rid, B), Settled)


IDLE = {
    "postgres": ["idle_session_timeout = '150ms'", "idle_in_transaction_session_timeout = '150ms'"],
    "mariadb": ["wait_timeout = 1"],
}


@pytest.mark.parametrize(
    ("own_database", "limit"),
    [(kind, limit) for kind, limits in IDLE.items() for limit in limits],
    indirect=["own_database"],
)
def test_connections_that_the_database_ends_for_idling_are_made_again(
    own_database: Server, limit: str, colour: Colour, count: Counter, opened: Any
) -> None:
    with contextlib.ExitStack() as stack:
        url = own_database.url
        if url.startswith("postgres"):
            name = f"u{secrets.token_hex(4)}"
            execute(own_database, f"CREATE USER {name} SUPERUSER", f"ALTER USER {name} SET {limit}")
            url = url.replace("postgres@", f"{name}@")
        else:
            execute(own_database, f"SET GLOBAL {limit}")
            stack.callback(execute, own_database, "SET GLOBAL wait_timeout = 28800")

        def work(order: int) -> int:
            threading.Event().wait(0.3 if "ms" in limit else 1.2)  # what is tested is that the limit passes
            return count.hit()

        work = colour.define(work, backend=opened(url), key="{order}", lease=60)
        with on_one_loop(colour) as call:
            assert [call(work, order) for order in (1, 2, 1)] == [1, 2, 1]
    assert count.count == 2


# ---------------------------------------------------------------------------------------------------------- clock steps


@pytest.fixture(scope="module")
def clock() -> Iterator[SteppedClock]:
    folder = servers._make_directory(None)
    yield SteppedClock(folder)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["redis", "postgres", "mariadb"])
def stepped(request: pytest.FixtureRequest, clock: SteppedClock) -> Iterator[Server]:
    """A server whose clock `clock` steps."""
    start: Any = {"redis": start_redis, "postgres": start_postgres, "mariadb": start_mariadb}[request.param]
    with start(environment=clock.environment) as server:
        yield server


def test_a_server_clock_that_jumps_ahead_ends_leases_and_the_fence_holds(
    stepped: Server, clock: SteppedClock, colour: Colour, opened: Any
) -> None:
    clock.step(0)
    rid = RecordId("n", "k")
    with Commands(opened(stepped.url), colour) as commands:
        commands.read(rid)
        first = claim(commands, rid, lease=600.0)
        assert isinstance(claim(commands, rid, B), Busy)
        clock.step(3600)
        taken = claim(commands, rid, B)
        assert taken == Granted(taken.token, took_over=True)
        assert taken.token > first.token + 3000 * 10**6  # the server's clock, and no other
        assert complete(commands, rid, first.token) is Answer.STALE
        assert commands.renew(rid, attempt=A, token=first.token, lease=30.0) is Answer.STALE
        assert complete(commands, rid, taken.token, B) is Answer.DONE
        assert isinstance(claim(commands, rid), Settled)


def test_a_server_clock_that_steps_back_caps_what_is_left_of_a_lease_and_tokens_grow(
    stepped: Server, clock: SteppedClock, colour: Colour, opened: Any
) -> None:
    clock.step(7200)
    rid, other = RecordId("n", "k"), RecordId("n", "other")
    with Commands(opened(stepped.url), colour) as commands:
        commands.read(rid)
        first = claim(commands, rid, lease=0.5)
        released = claim(commands, other)
        clock.step(0)
        busy = claim(commands, rid, B)
        assert isinstance(busy, Busy)
        assert 0 < busy.lease_left <= 0.5  # and not two hours
        taken = eventually(lambda: claim_granted(commands, rid, B))
        assert taken.token > first.token
        assert complete(commands, rid, first.token) is Answer.STALE
        assert complete(commands, rid, taken.token, B) is Answer.DONE
        assert isinstance(claim(commands, rid), Settled)
        commands.release(other, attempt=A, token=released.token)
        assert claim(commands, other, B).token > released.token


def claim_granted(commands: Commands, rid: RecordId, attempt: bytes) -> Any:
    reply = claim(commands, rid, attempt, lease=30.0)
    return reply if isinstance(reply, Granted) else None
