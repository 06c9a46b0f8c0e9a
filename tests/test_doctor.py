"""`idempotent doctor`: the right verdict on each set-up, with the reason and the remedy, and nothing written."""

import contextlib
import json
import re
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psycopg
import pymysql
import pytest
import redis
import sqlalchemy as sa
from servers import RedisCluster, Server, start_mariadb, start_postgres, start_redis, start_sentinel

from idempotent import idempotent
from idempotent.cli import doctor_sql
from idempotent.cli.doctor_redis import NEEDS, _version
from idempotent.cli.main import main
from idempotent.cli.verdict import Finding, clock, verdict_of

ROOT = Path(__file__).parent.parent
MONEY, RETRIES, UNSAFE = "safe for money", "safe for retries", "not safe"
CODE = {MONEY: 0, RETRIES: 3, UNSAFE: 4}


class Report(NamedTuple):
    verdict: str
    findings: dict[str, Finding]
    """The worst finding of each check."""
    text: str

    @property
    def reasons(self) -> set[str]:
        return {check for check, finding in self.findings.items() if finding.level in ("warning", "unsafe")}


Doctor = Callable[[str], Report]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Examine a backend, once as JSON and once as text: both say the same, and the exit code is the verdict's."""

    def examine(url: str) -> Report:
        capsys.readouterr()
        code = main(["doctor", url, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert code == CODE[report["verdict"]]
        assert main(["doctor", url]) == code
        text, err = capsys.readouterr()
        assert err == ""
        found = [Finding(**each) for each in report["findings"]]
        assert re.search(rf"^verdict: {report['verdict']}(, because of: .+)?$", text, re.MULTILINE)
        for finding in found:
            assert finding.level in ("ok", "note") or (finding.why and finding.remedy), finding
            assert (finding.level == "ok") <= (not finding.remedy), finding
            for part in (finding.check, finding.remedy, finding.why):
                assert part in text
        worst = sorted(found, key=lambda finding: ("ok", "note", "warning", "unsafe").index(finding.level))
        return Report(report["verdict"], {finding.check: finding for finding in worst}, text)

    return examine


# ------------------------------------------------------------------------------------------------------------ Redis


@pytest.fixture(scope="module")
def durable() -> Iterator[Server]:
    with start_redis("--appendonly yes --repl-diskless-sync-delay 0") as server:
        yield server


@pytest.fixture
def redis_with(durable: Server) -> Iterator[Callable[..., str]]:
    """Changes settings of a Redis that is set up well, until the end of the test; its URL."""
    with redis.Redis(port=durable.port, decode_responses=True) as client:
        before: dict[str, str] = {}

        def change(**settings: str) -> str:
            for name, value in settings.items():
                name = name.replace("_", "-")
                before.setdefault(name, client.config_get(name)[name])
                client.config_set(name, value)
            return durable.url

        yield change
        for name, value in reversed(before.items()):
            client.config_set(name, value)


def test_a_redis_that_is_set_up_well_is_safe_for_money(durable: Server, doctor: Doctor) -> None:
    with redis.Redis(port=durable.port) as client:
        writes = client.info("persistence")["rdb_changes_since_last_save"]
        report = doctor(durable.url)
        assert (report.verdict, report.reasons) == (MONEY, set())
        assert client.dbsize() == 0
        assert client.info("persistence")["rdb_changes_since_last_save"] == writes
    for check in (
        "reachable",
        "version",
        "clock",
        "eviction",
        "replicas",
        "permissions",
        "writes",
        "pub/sub",
        "client",
    ):
        assert report.findings[check].level == "ok", check
    assert report.findings["persistence"].level == "note"  # everysec
    assert "verdict: safe for money\n" in report.text


def test_valkey_is_served_too(doctor: Doctor) -> None:
    with start_redis("--appendonly yes", prefers="valkey") as server:
        report = doctor(server.url)
    assert report.verdict == MONEY
    assert report.findings["version"].found.startswith(("Valkey", "Redis"))


@pytest.mark.parametrize(
    ("settings", "verdict", "reasons"),
    [
        ({"appendfsync": "always"}, MONEY, set()),
        ({"appendfsync": "no"}, RETRIES, {"persistence"}),
        ({"appendonly": "no"}, RETRIES, {"persistence"}),
        ({"appendonly": "no", "save": "60 1"}, RETRIES, {"persistence"}),
        ({"maxmemory": "100mb", "maxmemory_policy": "allkeys-lru"}, UNSAFE, {"eviction"}),
        ({"maxmemory": "100mb", "maxmemory_policy": "volatile-ttl"}, UNSAFE, {"eviction"}),
        ({"maxmemory_policy": "allkeys-lru"}, RETRIES, {"eviction"}),
        ({"maxmemory": "100mb"}, MONEY, set()),
        ({"maxmemory": "1kb"}, UNSAFE, {"writes"}),
        ({"min_replicas_to_write": "1"}, UNSAFE, {"writes"}),
    ],
    ids=str,
)
def test_each_setting_of_redis_gets_its_verdict(
    settings: dict[str, str], verdict: str, reasons: set[str], redis_with: Callable[..., str], doctor: Doctor
) -> None:
    report = doctor(redis_with(**settings))
    assert (report.verdict, report.reasons) == (verdict, reasons)
    assert report.text.splitlines()[-1] == f"verdict: {verdict}" + (
        f", because of: {', '.join(reasons)}" if reasons else ""
    )


def test_a_replica_is_not_safe_and_its_primary_is_for_retries_alone(durable: Server, doctor: Doctor) -> None:
    with start_redis(f"--replicaof 127.0.0.1 {durable.port}") as replica:
        with redis.Redis(port=replica.port, decode_responses=True) as client:
            while client.info("replication")["master_link_status"] != "up":
                time.sleep(0.01)
        report = doctor(replica.url)
        assert (report.verdict, report.findings["replicas"].level) == (UNSAFE, "unsafe")
        assert "READONLY" in report.findings["replicas"].why
        report = doctor(durable.url)
        assert (report.verdict, report.reasons) == (RETRIES, {"replicas"})


@pytest.mark.parametrize("by", ["server", "sentinel"])
def test_what_replicas_asks_for_must_be_there(by: str, durable: Server, doctor: Doctor) -> None:
    with contextlib.ExitStack() as started:
        replica = started.enter_context(start_redis(f"--replicaof 127.0.0.1 {durable.port}"))
        with redis.Redis(port=replica.port, decode_responses=True) as client:
            while client.info("replication")["master_link_status"] != "up":
                time.sleep(0.01)
        url = durable.url
        if by == "sentinel":
            url = f"redis+sentinel://127.0.0.1:{started.enter_context(start_sentinel(durable, 1)).port}/main"
        assert doctor(url).reasons == {"replicas"}
        report = doctor(f"{url}?replicas=1")
        assert (report.verdict, report.findings["replicas"].found) == (
            MONEY,
            "1 of the 1 that replicas= asks for confirm",
        )
        assert report.findings["pub/sub"].level == "ok"
        report = doctor(f"{url}?replicas=2")
        assert (report.verdict, report.reasons) == (UNSAFE, {"replicas"})
        assert report.findings["replicas"].found == "1 of the 2 that replicas= asks for confirm"


def test_who_may_not_wait_for_replicas_or_find_the_primary_is_told(
    durable: Server, user: Callable[..., str], doctor: Doctor
) -> None:
    url = user(*minimal(), "+info")
    report = doctor(f"{url}?replicas=1")
    assert (report.verdict, "+wait" in report.findings["replicas"].remedy) == (UNSAFE, True)
    with start_sentinel(durable, 1) as sentinel:
        report = doctor(f"redis+sentinel://app:hunter2@127.0.0.1:{sentinel.port}/main")
        assert (report.verdict, "+role" in report.findings["permissions"].remedy) == (UNSAFE, True)
        user(*minimal(), "+info", "+role")
        assert doctor(f"redis+sentinel://app:hunter2@127.0.0.1:{sentinel.port}/main").verdict == MONEY
        sentinel.kill()
        report = doctor(f"redis+sentinel://127.0.0.1:{sentinel.port}/main")
        assert (report.verdict, report.reasons) == (UNSAFE, {"reachable"})


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster("--appendonly yes", replicas=1) as cluster:
        yield cluster


def test_a_node_of_a_cluster_is_to_be_named_as_one(cluster: RedisCluster, doctor: Doctor) -> None:
    report = doctor(cluster.nodes[0].url)
    assert (report.verdict, report.findings["mode"].level) == (UNSAFE, "unsafe")


def test_each_node_of_a_cluster_is_looked_at(cluster: RedisCluster, doctor: Doctor) -> None:
    report = doctor(cluster.url)
    assert (report.verdict, report.reasons) == (RETRIES, {"replicas"})
    first, second, third = (f"127.0.0.1:{node.port}: " for node in cluster.nodes)
    assert report.findings["replicas"].found.startswith(f"{first}1 connected")
    for check in ("reachable", "version", "clock", "eviction", "permissions", "writes", "pub/sub", "client"):
        assert report.findings[check].level == "ok", check
        assert all(name in report.text for name in (first, second, third))
    report = doctor(f"{cluster.url}?replicas=1")  # the other two have none
    assert (report.verdict, report.reasons) == (UNSAFE, {"replicas"})
    cluster.clients[2].config_set("maxmemory", "1kb")
    try:
        report = doctor(cluster.url)
    finally:
        cluster.clients[2].config_set("maxmemory", "0")
    assert (report.verdict, report.reasons) == (UNSAFE, {"replicas", "writes"})
    assert report.findings["writes"].found.startswith(f"{third}refused")


def test_what_the_user_of_a_cluster_lacks_is_named(cluster: RedisCluster, doctor: Doctor) -> None:
    (more,) = re.findall(r"`(\+cluster\|slots [^`]*)`", (ROOT / "README.md").read_text("utf-8"))
    url = cluster.url.replace("://", "://app:hunter2@")

    def findings(*rules: str) -> dict[str, Finding]:
        for client in cluster.clients:
            client.execute_command("ACL", "SETUSER", "app", "reset", "on", ">hunter2", *minimal(), *rules)
        return doctor(url).findings

    try:
        found = findings(*more.split())
        assert found["permissions"].level == found["pub/sub"].level == "ok"
        found = findings(*more.split(), "-asking", "-ssubscribe")
        assert (found["permissions"].level, "asking" in found["permissions"].found) == ("note", True)
        assert (found["pub/sub"].level, "+ssubscribe" in found["pub/sub"].remedy) == ("note", True)
        found = findings()
        assert (found["permissions"].level, "+cluster|slots" in found["permissions"].remedy) == ("unsafe", True)
    finally:
        for client in cluster.clients:
            client.execute_command("ACL", "DELUSER", "app")


def test_a_cluster_that_has_lost_slots_is_not_safe(cluster: RedisCluster, doctor: Doctor) -> None:
    for client in cluster.clients:
        client.execute_command("CLUSTER", "DELSLOTS", 16_383)
    try:
        report = doctor(f"{cluster.url}?timeout=0.5")
    finally:
        cluster.clients[2].execute_command("CLUSTER", "ADDSLOTS", 16_383)
    assert (report.verdict, report.reasons) == (UNSAFE, {"reachable"})
    assert "slot" in report.findings["reachable"].remedy


@pytest.mark.parametrize(
    ("hello", "level"),
    [
        ({"server": "redis", "version": "6.0.20"}, "unsafe"),
        ({"server": "redis", "version": "6.2.0"}, "ok"),
        ({"server": "redis", "version": "10.0.0"}, "ok"),
        ({"server": "valkey", "version": "8.0.1"}, "ok"),
        ({}, "note"),
    ],
    ids=str,
)
def test_a_redis_that_is_too_old_is_not_safe(hello: dict[str, str], level: str) -> None:
    assert _version(hello).level == level


MINIMAL = re.search(
    r"`(~idem:\* &idem:\* -@all [^`]*)`;\nlocks need `([^`]*)`", (ROOT / "README.md").read_text("utf-8")
)


@pytest.fixture
def user(durable: Server) -> Iterator[Callable[..., str]]:
    """Makes the user "app" with these rules; its URL, with a password in it."""
    with redis.Redis(port=durable.port) as client:

        def make(*rules: str) -> str:
            client.execute_command("ACL", "SETUSER", "app", "reset", "on", ">hunter2", *rules)
            return f"redis://app:hunter2@127.0.0.1:{durable.port}/0"

        yield make
        client.execute_command("ACL", "DELUSER", "app")


def minimal() -> list[str]:
    assert MINIMAL is not None
    return [*MINIMAL[1].split(), *MINIMAL[2].split()]


def test_the_minimal_user_may_do_all_that_is_needed_but_not_be_told_how_the_server_is_set_up(
    user: Callable[..., str], doctor: Doctor
) -> None:
    report = doctor(user(*minimal()))
    assert report.findings["permissions"].level == report.findings["pub/sub"].level == "ok"
    assert (report.verdict, report.reasons) == (RETRIES, {"persistence", "eviction", "replicas"})
    assert "+info" in report.findings["eviction"].remedy
    assert "hunter2" not in report.text
    assert doctor(user(*minimal(), "+info")).verdict == MONEY


def test_what_readme_and_doctor_ask_for_is_the_same() -> None:
    asked = {name for _, _, names in NEEDS for name in names}
    named = {rule[1:] for rule in minimal() if rule.startswith("+")}
    assert asked - {"spublish", "asking"} == named - {"subscribe", "unsubscribe"}  # of a cluster; and tried elsewhere


@pytest.mark.parametrize("missing", ["evalsha", "eval", "get", "set", "time"])
def test_a_permission_that_calls_lack_is_named(missing: str, user: Callable[..., str], doctor: Doctor) -> None:
    report = doctor(user(*minimal(), f"-{missing}", "+info"))
    assert (report.verdict, report.findings["permissions"].found) == (UNSAFE, f"missing: {missing}")
    assert f"+{missing}" in report.findings["permissions"].remedy


@pytest.mark.parametrize(
    ("missing", "what"),
    [("pttl", "peek"), ("scan", "command line"), ("publish", "polls"), ("ping", "polls"), ("zadd", "lock")],
)
def test_a_permission_that_calls_do_without_is_a_note(
    missing: str, what: str, user: Callable[..., str], doctor: Doctor
) -> None:
    url = user(*minimal(), f"-{missing}", "+info")
    report = doctor(url)
    assert (report.verdict, report.findings["permissions"].level) == (MONEY, "note")
    assert report.findings["permissions"].found == f"missing: {missing}"
    assert what in report.findings["permissions"].why
    work = idempotent(backend=f"{url}?prefix=idem", namespace="doctor", key="k")(lambda: 1)
    assert work() == work() == 1


def test_another_database_needs_select(user: Callable[..., str], doctor: Doctor) -> None:
    url = user(*minimal(), "-select", "+info")
    assert doctor(url).verdict == MONEY
    report = doctor(url.replace("/0", "/1"))
    assert (report.verdict, "select" in report.findings["permissions"].found) == (UNSAFE, True)


def test_who_may_not_subscribe_polls(user: Callable[..., str], doctor: Doctor) -> None:
    report = doctor(user(*minimal(), "-subscribe", "+info"))
    assert (report.verdict, report.findings["pub/sub"].level) == (MONEY, "note")


def test_keys_that_the_user_may_not_touch_are_not_safe(user: Callable[..., str], doctor: Doctor) -> None:
    report = doctor(f"{user(*minimal(), '+info')}?prefix=other")
    assert (report.verdict, report.reasons) == (UNSAFE, {"permissions"})
    assert "~other:* &other:*" in report.findings["permissions"].remedy


# --------------------------------------------------------------------------------------------------------------- SQL


@pytest.fixture(scope="module")
def postgres() -> Iterator[Server]:
    with start_postgres(fsync="on") as server:
        yield server


@pytest.fixture
def on_postgres(postgres: Server) -> Iterator[Callable[..., str]]:
    """Runs statements as its administrator, and makes the table unless told not to; the URL."""
    undo: list[str] = ["DROP TABLE IF EXISTS idempotent_records"]

    def run(*statements: str, table: bool = True, after: tuple[str, ...] = ()) -> str:
        if table:
            assert main(["migrate", postgres.url]) == 0
        undo.extend(after)
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())
        return postgres.url

    yield run
    with psycopg.connect(postgres.url, autocommit=True, options="-c default_transaction_read_only=off") as connection:
        for statement in undo:
            connection.execute(statement.encode())


def test_a_postgresql_without_the_table_is_not_safe_and_with_it_it_is(
    on_postgres: Callable[..., str], doctor: Doctor
) -> None:
    report = doctor(on_postgres(table=False))
    assert (report.verdict, report.reasons) == (UNSAFE, {"table"})
    assert "idempotent migrate" in report.findings["table"].remedy
    assert doctor(on_postgres(table=False)).verdict == UNSAFE  # asking made none
    report = doctor(on_postgres())
    assert (report.verdict, report.reasons) == (MONEY, set())
    for check in ("reachable", "version", "clock", "persistence", "isolation", "table", "collation", "permissions"):
        assert report.findings[check].level == "ok", check


@pytest.mark.parametrize(
    ("statements", "after", "verdict", "reasons"),
    [
        (
            ["ALTER DATABASE postgres SET synchronous_commit = off"],
            ["ALTER DATABASE postgres RESET synchronous_commit"],
            RETRIES,
            {"persistence"},
        ),
        (
            ["ALTER DATABASE postgres SET default_transaction_read_only = on"],
            ["ALTER DATABASE postgres RESET default_transaction_read_only"],
            UNSAFE,
            {"read-only", "permissions"},
        ),
        (["ALTER TABLE idempotent_records SET UNLOGGED"], [], RETRIES, {"table"}),
        (["DROP INDEX ix_idempotent_records_expires"], [], UNSAFE, {"table"}),
        (
            [
                "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
                "ALTER TABLE idempotent_records ALTER COLUMN id TYPE varchar(48) COLLATE loose",
            ],
            ["DROP COLLATION loose"],
            UNSAFE,
            {"collation"},
        ),
    ],
    ids=["synchronous_commit", "read-only", "unlogged", "no index", "collation"],
)
def test_each_setting_of_postgresql_gets_its_verdict(
    statements: list[str],
    after: list[str],
    verdict: str,
    reasons: set[str],
    on_postgres: Callable[..., str],
    doctor: Doctor,
) -> None:
    report = doctor(on_postgres(*statements, after=tuple(after)))
    assert (report.verdict, report.reasons) == (verdict, reasons)


def test_rights_that_are_missing_are_named(on_postgres: Callable[..., str], doctor: Doctor) -> None:
    url = on_postgres(
        "CREATE ROLE reader LOGIN",
        "GRANT SELECT, INSERT ON idempotent_records TO reader",
        after=("DROP ROLE reader",),
    )
    report = doctor(url.replace("postgres@", "reader@"))
    assert (report.verdict, report.reasons) == (UNSAFE, {"permissions"})
    assert report.findings["permissions"].found.startswith("refused: UPDATE, DELETE:")


def test_a_standby_of_postgresql_is_not_safe_and_its_primary_is_for_retries_alone(doctor: Doctor) -> None:
    with start_postgres(fsync="on") as primary:
        assert main(["migrate", primary.url]) == 0
        with start_postgres(standby_of=primary, fsync="on") as standby:
            report = doctor(standby.url)
            assert (report.verdict, report.reasons) == (UNSAFE, {"replicas", "permissions"})
            report = doctor(primary.url)
            assert (report.verdict, report.reasons) == (RETRIES, {"replicas"})


@pytest.fixture(scope="module")
def mariadb() -> Iterator[Server]:
    with start_mariadb("--innodb-flush-log-at-trx-commit=1 --log-bin=binlog --server-id=1 --sync-binlog=1") as server:
        yield server


@pytest.mark.parametrize(
    ("statements", "after", "verdict", "reasons"),
    [
        ([], [], MONEY, set()),
        (
            ["ALTER TABLE idempotent_records MODIFY id VARCHAR(48) COLLATE utf8mb4_general_ci NOT NULL"],
            [],
            UNSAFE,
            {"collation"},
        ),
        (["ALTER TABLE idempotent_records ENGINE = Aria"], [], RETRIES, {"table"}),
        (["SET GLOBAL read_only = 1"], ["SET GLOBAL read_only = 0"], UNSAFE, {"replicas"}),
        (
            ["SET GLOBAL innodb_flush_log_at_trx_commit = 2"],
            ["SET GLOBAL innodb_flush_log_at_trx_commit = 1"],
            RETRIES,
            {"persistence"},
        ),
        (["SET GLOBAL sync_binlog = 0"], ["SET GLOBAL sync_binlog = 1"], RETRIES, {"persistence"}),
    ],
    ids=["well", "case-insensitive", "Aria", "read-only", "flush", "sync_binlog"],
)
def test_each_setting_of_mariadb_gets_its_verdict(
    statements: list[str], after: list[str], verdict: str, reasons: set[str], mariadb: Server, doctor: Doctor
) -> None:
    assert main(["migrate", mariadb.url]) == 0
    options: dict[str, Any] = {"host": "127.0.0.1", "port": mariadb.port, "user": "root", "database": "test"}
    with pymysql.connect(**options, autocommit=True) as connection, connection.cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)
        report = doctor(mariadb.url)
        for statement in (*after, "DROP TABLE idempotent_records"):
            cursor.execute(statement)
    assert (report.verdict, report.reasons) == (verdict, reasons)
    if verdict == MONEY:
        assert report.findings["isolation"].level == report.findings["table"].level == "ok"
        assert report.findings["collation"].level == "note"  # the database's own
        assert report.findings["collation"].found.endswith("_ci")
        assert report.findings["replicas"].level == "note"  # a binary log, and nobody reads it


def test_a_mariadb_whose_replicas_no_commit_waits_for_is_for_retries_alone(mariadb: Server, doctor: Doctor) -> None:
    options: dict[str, Any] = {"host": "127.0.0.1", "port": mariadb.port, "user": "root", "database": "test"}
    assert main(["migrate", mariadb.url]) == 0
    with pymysql.connect(**options, autocommit=True) as connection, connection.cursor() as cursor:
        cursor.execute("SHOW MASTER STATUS")
        log = cursor.fetchone()[0].encode()
        reader: Any = pymysql.connect(**options)  # which asks for the binary log as replicas do
        reader.cursor().execute("SET @master_binlog_checksum = 'CRC32'")
        reader._execute_command(0x12, struct.pack("<IHI", 4, 0, 99) + log)  # COM_BINLOG_DUMP
        reader._read_packet()
        report = doctor(mariadb.url)
        reader._force_close()
        cursor.execute("DROP TABLE idempotent_records")
    assert (report.verdict, report.reasons) == (RETRIES, {"replicas"})
    assert report.findings["replicas"].found == "1 connected, and no commit waits for them"


@pytest.mark.parametrize(
    ("status", "seen", "level"),
    [
        ({}, 0, "note"),
        ({"Slaves_connected": "1"}, 0, "warning"),  # without the right to see its thread
        ({}, 1, "warning"),
        ({"Rpl_semi_sync_master_status": "ON", "Rpl_semi_sync_master_clients": "1"}, 2, "ok"),
        ({"Rpl_semi_sync_source_status": "ON", "Rpl_semi_sync_source_clients": "1"}, 0, "ok"),
        ({"Rpl_semi_sync_master_status": "OFF", "Rpl_semi_sync_master_clients": "1"}, 1, "warning"),
        ({"Rpl_semi_sync_master_status": "ON", "Rpl_semi_sync_master_clients": "0"}, 1, "warning"),
    ],
    ids=str,
)
def test_replicas_of_mysql_are_trusted_if_commits_wait_for_one(status: dict[str, str], seen: int, level: str) -> None:
    class Connection:
        def execute(self, statement: Any) -> Any:
            if "STATUS" in str(statement):
                return list(status.items())
            return SimpleNamespace(scalar_one=lambda: seen)

    connection: Any = Connection()
    assert doctor_sql._replicas(connection).level == level


@pytest.mark.parametrize(
    ("kind", "verdict", "reasons"),
    [("ext4", MONEY, set()), ("", MONEY, set()), ("tmpfs", RETRIES, {"file"}), ("nfs4", UNSAFE, {"file"})],
)
def test_an_sqlite_file_is_as_safe_as_where_it_lies(
    kind: str, verdict: str, reasons: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doctor: Doctor
) -> None:
    monkeypatch.setattr(doctor_sql, "filesystem_of", lambda path: kind)
    url = f"sqlite:///{tmp_path}/records.db"
    report = doctor(url)
    assert (report.verdict, report.reasons) == (UNSAFE, {"table"})
    assert list(tmp_path.iterdir()) == []  # asking made no file
    idempotent(backend=url, key="k", namespace="n")(lambda: 1)()
    report = doctor(url)
    assert (report.verdict, report.reasons) == (verdict, reasons)


@pytest.mark.parametrize("mode", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_file_that_another_has_locked_is_not_taken_for_a_right_that_is_missing(
    mode: str, tmp_path: Path, doctor: Doctor
) -> None:
    url = f"sqlite:///{tmp_path}/records.db"
    assert main(["migrate", url]) == 0
    with contextlib.closing(sqlite3.connect(tmp_path / "records.db", isolation_level=None)) as other:
        other.execute(f"BEGIN {mode}")
        report = doctor(f"{url}?timeout=1")
    assert (report.verdict, report.reasons) == (RETRIES, {"unseen"})
    assert "permissions" not in report.findings
    assert "locked" in report.findings["unseen"].found


def test_a_table_that_another_has_locked_is_not_taken_for_a_right_that_is_missing(
    on_postgres: Callable[..., str], doctor: Doctor
) -> None:
    url = on_postgres()
    with psycopg.connect(url) as other:
        other.execute("LOCK TABLE idempotent_records")
        report = doctor(f"{url}?timeout=1")
    assert (report.verdict, report.reasons) == (RETRIES, {"unseen"})


def test_a_table_that_the_user_may_not_even_look_at_is_not_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doctor: Doctor
) -> None:
    def refused(backend: Any) -> Any:
        def look(connection: Any) -> Any:
            raise sa.exc.OperationalError("DESCRIBE", {}, Exception(1142, "DESCRIBE command denied to user"))

        return look

    monkeypatch.setattr(doctor_sql, "_table_of", refused)
    report = doctor(f"sqlite:///{tmp_path}/records.db")
    assert (report.verdict, report.reasons) == (UNSAFE, {"table"})


def test_a_server_that_stops_answering_midway_is_told_with_what_was_found_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doctor: Doctor
) -> None:
    def frozen(*_: Any) -> Any:
        raise TimeoutError

    async def answers_no_more(*_: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(doctor_sql, "_answers", frozen)
            return await cut_short(*_, **options)

    cut_short = doctor_sql._cut_short
    monkeypatch.setattr(doctor_sql, "_permissions", frozen)
    monkeypatch.setattr(doctor_sql, "_cut_short", answers_no_more)
    url = f"sqlite:///{tmp_path}/records.db"
    assert main(["migrate", url]) == 0
    report = doctor(url)
    assert (report.verdict, report.reasons) == (UNSAFE, {"reachable"})
    assert report.findings["table"].level == "ok"


def test_where_a_file_lies_is_read_from_the_mounts() -> None:
    assert doctor_sql.filesystem_of("/proc/self") == "proc"


# ------------------------------------------------------------------------------------------------------------- others


@pytest.mark.parametrize(
    "url",
    ["redis://:hunter2@127.0.0.1:1/0", "postgresql://ann:hunter2@127.0.0.1:1/db", "mysql://ann:hunter2@127.0.0.1:1/db"],
)
def test_a_backend_that_cannot_be_reached_is_not_safe(url: str, doctor: Doctor) -> None:
    report = doctor(url)
    assert (report.verdict, report.reasons) == (UNSAFE, {"reachable"})
    assert "hunter2" not in report.text


@pytest.mark.parametrize("kind", ["redis", "postgres", "mariadb"])
def test_a_wrong_password_is_not_safe_and_not_shown(kind: str, request: pytest.FixtureRequest, doctor: Doctor) -> None:
    scheme, _, rest = request.getfixturevalue(f"{kind}_server").url.partition("://")
    report = doctor(f"{scheme}://nobody_of_this_name:hunter2@{rest.rpartition('@')[2]}")
    assert report.verdict == UNSAFE
    assert "hunter2" not in report.text


def test_the_memory_of_one_process_is_not_safe(doctor: Doctor) -> None:
    report = doctor("local://")
    assert (report.verdict, report.reasons) == (UNSAFE, {"reachable"})


def test_a_url_that_no_backend_serves_is_a_mistake_and_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "mongodb://host/db"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("off", "level"), [(0.9, "ok"), (-0.9, "ok"), (90.0, "note"), (-90.0, "note")])
def test_a_clock_that_is_off_is_told_and_is_no_danger(off: float, level: str) -> None:
    assert clock(off).level == level


def test_the_worst_finding_makes_the_verdict() -> None:
    def of(*levels: Any) -> str:
        return verdict_of([Finding("c", level, "f") for level in levels])

    assert of("ok", "note") == MONEY
    assert of("ok", "warning", "note") == RETRIES
    assert of("warning", "unsafe", "ok") == UNSAFE
