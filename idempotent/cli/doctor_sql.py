"""What `doctor` looks at on SQLite, PostgreSQL, MySQL and MariaDB. The statements that are tried name no row."""

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from idempotent.backends.sql import SQLBackend, _code, _is_transient, _words
from idempotent.cli.schema import differences
from idempotent.cli.verdict import Finding, clock

__all__ = ["examine"]

_FAILURES = (TimeoutError, OSError, exc.SQLAlchemyError)
_DOWN = "no call runs: each gets BackendUnavailable"
_READ_ONLY = "every claim is refused, so no call runs"


async def examine(backend: SQLBackend) -> list[Finding]:
    """Everything that can be found out about the database of `backend`."""
    link: Any = backend._link

    async def ask(work: Callable[[sa.Connection], Any]) -> Any:
        return await link.run(work, time.monotonic() + backend.timeout)

    try:
        findings = [await _round_trip(ask, backend.timeout)]
    except _FAILURES as error:
        remedy = "start it, or mend host, port, user, password or database in the URL"
        return [Finding("reachable", "unsafe", _words(error), _DOWN, remedy)]
    table, look = _table_of(backend), None
    try:
        for look in (_version, _LOOKS[backend.name], table):
            findings += await ask(look)
        if not any(finding.level == "unsafe" and finding.check == "table" for finding in findings):
            findings.append(await _permissions(backend, ask))
    except _FAILURES as error:
        findings.append(await _cut_short(error, ask, is_table=look is table))
    findings.append(Finding("client", "ok", f"a statement is sent again for up to timeout={backend.timeout:g} s"))
    return findings


async def _cut_short(error: Exception, ask: Any, *, is_table: bool) -> Finding:
    """Why not everything could be looked at: something holds a lock, say, or the server has stopped answering."""
    try:
        await ask(_answers)
    except _FAILURES as gone:
        return Finding("reachable", "unsafe", f"it stopped answering: {_words(gone)}", _DOWN, "look after the server")
    if is_table and not isinstance(error, TimeoutError) and not _is_transient(error):
        remedy = "GRANT the user SELECT, INSERT, UPDATE and DELETE on the table, and USAGE on its schema"
        return Finding("table", "unsafe", f"refused: {_words(error)}", "no call can claim a key: nothing runs", remedy)
    why = "what was not seen may endanger records; and if a lock is held, calls wait for it, too"
    remedy = "end the transaction that holds the lock, or give the right that is missing, and ask again"
    return Finding("unseen", "warning", f"not everything could be looked at: {_words(error)}", why, remedy)


def _answers(connection: sa.Connection) -> None:
    connection.execute(sa.select(sa.literal(1))).one()


async def _round_trip(ask: Any, timeout: float) -> Finding:
    def work(connection: sa.Connection) -> float:
        times = []
        for _ in range(7):
            began = time.perf_counter()
            _answers(connection)
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    median = await ask(work)
    found = f"answers; a round trip takes {median * 1000:.1f} ms"
    if median > timeout / 20:
        why, remedy = "a first call takes two or more, and has a deadline", "put it nearer, or give a longer timeout="
        return Finding("reachable", "note", found, why, remedy)
    return Finding("reachable", "ok", found)


_NAMES = {"postgresql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB", "sqlite": "SQLite"}
_OLDEST = {"postgresql": (12,), "mysql": (8, 0), "mariadb": (10, 5), "sqlite": (3, 24)}


def _version(connection: sa.Connection) -> list[Finding]:
    dialect: Any = connection.dialect
    name = "mariadb" if getattr(dialect, "is_mariadb", False) else dialect.name
    version = tuple(part for part in dialect.server_version_info if isinstance(part, int))[:3]
    text = f"{_NAMES[name]} {'.'.join(map(str, version))}"
    if version < _OLDEST[name]:
        why = "it is older than what this is tested with, and may lack what the statements need"
        return [Finding("version", "unsafe", text, why, f"upgrade to {'.'.join(map(str, _OLDEST[name]))} or newer")]
    return [Finding("version", "ok", text)]


def _clock(connection: sa.Connection, now: str) -> Finding:
    before = time.time()
    theirs = float(connection.execute(sa.text(f"SELECT {now}")).scalar_one())
    return clock(theirs - (before + time.time()) / 2)


def _isolation(level: str) -> Finding:
    level = level.replace("-", " ").upper()
    found = f"{level} by default; records are written by single statements outside of any transaction"
    return Finding("isolation", "ok", found)


# -------------------------------------------------------------------------------------------------------- PostgreSQL


def _postgresql(connection: sa.Connection) -> list[Finding]:
    names = (
        *("fsync", "synchronous_commit", "full_page_writes", "default_transaction_isolation"),
        *("default_transaction_read_only", "synchronous_standby_names"),
    )
    asked = sa.text("SELECT name, setting FROM pg_settings WHERE name = ANY(:names)")
    settings: dict[str, str] = {
        str(name): str(value) for name, value in connection.execute(asked, {"names": list(names)})
    }
    found = [_clock(connection, "extract(epoch FROM clock_timestamp())")]
    if connection.execute(sa.text("SELECT pg_is_in_recovery()")).scalar_one():
        found.append(
            Finding("replicas", "unsafe", "it is a read-only standby", _READ_ONLY, "name the primary in the URL")
        )
    elif settings["default_transaction_read_only"] == "on":
        remedy = "ALTER ROLE or ALTER DATABASE ... SET default_transaction_read_only = off"
        found.append(Finding("read-only", "unsafe", "default_transaction_read_only is on", _READ_ONLY, remedy))
    else:
        found.append(_standbys(connection, settings))
    off = [name for name in ("fsync", "full_page_writes") if settings[name] == "off"]
    commit = settings["synchronous_commit"]
    if commit == "off" or (commit == "local" and settings["synchronous_standby_names"]):
        off.append("synchronous_commit")
    if off:
        why = "a crash loses, or damages, what was confirmed: records of calls that have run"
        remedy = f"set {', '.join(f'{name} = on' for name in off)}"
        text = ", ".join(f"{name} {settings[name]}" for name in off)
        found.append(Finding("persistence", "warning", text, why, remedy))
    else:
        found.append(Finding("persistence", "ok", "commits are on disk before they are confirmed"))
    found.append(_isolation(settings["default_transaction_isolation"]))
    return found


def _standbys(connection: sa.Connection, settings: dict[str, str]) -> Finding:
    count = int(connection.execute(sa.text("SELECT count(*) FROM pg_stat_replication")).scalar_one())
    if settings["synchronous_standby_names"]:
        return Finding("replicas", "ok", f"{count} connected, commits wait for {settings['synchronous_standby_names']}")
    if not count:
        return Finding("replicas", "ok", "none, so no failover can lose a record; the machine is a single one")
    why = "standbys are behind by a moment: a failover can lose a claim that was confirmed, and it runs again"
    remedy = "set synchronous_standby_names, if one of them may be promoted"
    return Finding("replicas", "warning", f"{count} connected, and no commit waits for them", why, remedy)


# --------------------------------------------------------------------------------------------------- MySQL, MariaDB


def _mysql(connection: sa.Connection) -> list[Finding]:
    names = (
        *("innodb_flush_log_at_trx_commit", "sync_binlog", "log_bin", "read_only", "sql_mode", "collation_database"),
        *("transaction_isolation", "tx_isolation"),
    )
    asked = sa.text("SHOW VARIABLES WHERE Variable_name IN :names").bindparams(sa.bindparam("names", expanding=True))
    settings: dict[str, str] = {
        str(name): str(value) for name, value in connection.execute(asked, {"names": list(names)})
    }
    found = [_clock(connection, "unix_timestamp(now(6))")]
    if settings.get("read_only", "OFF") != "OFF":
        why = f"{_READ_ONLY}, but for users that may write all the same"
        found.append(Finding("replicas", "unsafe", "it is read-only", why, "name the primary in the URL"))
    flush = settings.get("innodb_flush_log_at_trx_commit", "1")
    logs = settings.get("log_bin") == "ON"
    if logs and settings.get("sync_binlog", "1") != "1":
        why = "after a crash of the machine InnoDB takes back what the binary log has not, though it was confirmed"
        remedy = "SET GLOBAL sync_binlog = 1, and the same in its configuration file"
        found.append(Finding("persistence", "warning", f"sync_binlog {settings['sync_binlog']}", why, remedy))
    if flush != "1":
        why = "a crash loses up to a second of records that were confirmed" + (
            "" if flush == "2" else ", a crash of the server alone, too"
        )
        remedy = "SET GLOBAL innodb_flush_log_at_trx_commit = 1, and the same in its configuration file"
        found.append(Finding("persistence", "warning", f"innodb_flush_log_at_trx_commit {flush}", why, remedy))
    if all(finding.check != "persistence" for finding in found):
        found.append(Finding("persistence", "ok", "commits are on disk before they are confirmed"))
    if logs:
        found.append(_replicas(connection))
    if "STRICT" not in settings.get("sql_mode", ""):
        why = "values that are too long are cut without an error; no column of ours is that short, yours may be"
        found.append(Finding("sql_mode", "note", "not strict", why, "add STRICT_TRANS_TABLES to sql_mode"))
    collation = settings.get("collation_database", "")
    if not collation.endswith(("_bin", "_cs")) and "_as_cs" not in collation:
        why = "a unique column of your own (insert_once) takes Key-1, KEY-1 and Kéy-1 for one; records are compared exactly"
        remedy = "give such columns a _bin collation"
        found.append(Finding("collation", "note", f"the database's is {collation}", why, remedy))
    found.append(_isolation(settings.get("transaction_isolation") or settings.get("tx_isolation") or "not to be seen"))
    return found


def _replicas(connection: sa.Connection) -> Finding:
    asked = "SHOW GLOBAL STATUS WHERE Variable_name LIKE 'Rpl_semi_sync_%' OR Variable_name = 'Slaves_connected'"
    status = {str(name).lower(): str(value) for name, value in connection.execute(sa.text(asked))}
    waits = any(status.get(f"rpl_semi_sync_{side}_status") == "ON" for side in ("master", "source"))
    confirm = max(int(status.get(f"rpl_semi_sync_{side}_clients", 0)) for side in ("master", "source"))
    # MariaDB counts them for everybody; on MySQL a user without PROCESS sees none.
    dumps = sa.text("SELECT count(*) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'")
    count = max(confirm, int(status.get("slaves_connected", 0)), int(connection.execute(dumps).scalar_one()))
    why = "replicas are behind by a moment: a failover can lose a claim that was confirmed, and it runs again"
    remedy = "semi-synchronous replication, if a replica may be promoted"
    if waits and confirm:
        return Finding("replicas", "ok", f"{count} connected, commits wait for one of {confirm} to confirm")
    if count:
        return Finding("replicas", "warning", f"{count} connected, and no commit waits for them", why, remedy)
    return Finding("replicas", "note", "none to be seen, but there is a binary log for them", why, remedy)


# ------------------------------------------------------------------------------------------------------------ SQLite


def _sqlite(connection: sa.Connection) -> list[Finding]:
    level = int(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())
    found = []
    if level < 2:
        why = "if the machine dies, the last commits are lost"
        found.append(Finding("persistence", "warning", f"synchronous {level}", why, "PRAGMA synchronous = FULL"))
    else:
        found.append(Finding("persistence", "ok", "commits are on disk before they are confirmed"))
    path = connection.exec_driver_sql("PRAGMA database_list").one()[2]
    kind = filesystem_of(path)
    if kind in ("tmpfs", "ramfs"):
        why = "a restart of the machine loses every record, and what it answered runs again"
        found.append(Finding("file", "warning", f"on {kind}, which is memory", why, "keep it on a disk"))
    elif kind.startswith(("nfs", "cifs", "smb", "9p", "fuse.sshfs")):
        why = "SQLite's locks do not hold there: two machines can both be granted a claim"
        remedy = "keep it on a disk of this machine; for several machines use PostgreSQL or Redis"
        found.append(Finding("file", "unsafe", f"on {kind}, a network file system", why, remedy))
    else:
        why = "every process that shares it must be on this machine"
        found.append(Finding("file", "ok", f"on {kind or 'this machine'}; {why}"))
    found.append(_isolation("SERIALIZABLE"))
    return found


def filesystem_of(path: str) -> str:
    """The type of the file system that holds `path`; "": not to be seen."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    except OSError:
        return ""
    place = os.path.realpath(path)
    holding = [(point, kind) for point, kind in mounts if os.path.commonpath([place, point]) == point]
    return max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1]


_LOOKS: dict[str, Callable[[sa.Connection], list[Finding]]] = {
    "postgresql": _postgresql,
    "mysql": _mysql,
    "mariadb": _mysql,
    "sqlite": _sqlite,
}


# --------------------------------------------------------------------------------------------------------- the table


def _table_of(backend: SQLBackend) -> Callable[[sa.Connection], list[Finding]]:
    table = backend.table

    def look(connection: sa.Connection) -> list[Finding]:
        wrong = differences(connection, table)
        if wrong is None:
            why = "calls are refused, unless the first one may make it"
            remedy = "idempotent migrate URL, then ask again"
            return [Finding("table", "unsafe", f"there is no table {table.name}", why, remedy)]
        if wrong:
            remedy = "bring it to the form of records_table(metadata), by Alembic for instance"
            return [Finding("table", "unsafe", "; ".join(wrong), "statements fail, or are slow", remedy)]
        return [Finding("table", "ok", f"{table.name}, with its index"), *_kept(connection, table)]

    return look


def _kept(connection: sa.Connection, table: sa.Table) -> list[Finding]:
    """How the table keeps and compares its rows."""
    kind, collation, exact = _COLLATIONS[connection.dialect.name](connection, table)
    found = []
    if not exact:
        why = (
            "the primary key is compared by it, and takes different texts for one: the contract is an exact comparison"
        )
        remedy = f"{_REMEDIES[connection.dialect.name]}; or drop the table and run idempotent migrate URL"
        found.append(Finding("collation", "unsafe", f"the id of records has the collation {collation}", why, remedy))
    else:
        found.append(Finding("collation", "ok", f"ids are compared exactly ({collation})"))
    if kind:
        why = "a crash of the server empties or damages the table, and what it answered runs again"
        found.append(Finding("table", "warning", kind[0], why, kind[1]))
    return found


_REMEDIES = {
    "mysql": "ALTER TABLE ... MODIFY id CHAR(48) CHARACTER SET ascii COLLATE ascii_bin NOT NULL",
    "postgresql": 'ALTER TABLE ... ALTER COLUMN id TYPE varchar(48) COLLATE "C"',
    "sqlite": "make the column id anew, without COLLATE",
}
_REMEDIES["mariadb"] = _REMEDIES["mysql"]

Kept = tuple[tuple[str, str] | None, str, bool]
"""What endangers the rows, with its remedy; the collation of the ids; whether it is an exact one."""


def _kept_by_mysql(connection: sa.Connection, table: sa.Table) -> Kept:
    engine, collation = connection.execute(
        sa.text(
            "SELECT t.engine, c.collation_name FROM information_schema.tables t JOIN information_schema.columns c"
            " ON c.table_schema = t.table_schema AND c.table_name = t.table_name AND c.column_name = 'id'"
            " WHERE t.table_name = :name AND t.table_schema = coalesce(:schema, database())"
        ),
        {"name": table.name, "schema": table.schema},
    ).one()
    kind = None if engine.lower() == "innodb" else (f"the engine is {engine}", "ALTER TABLE ... ENGINE = InnoDB")
    return kind, collation or "binary", (collation or "_bin").endswith("_bin")


def _kept_by_postgresql(connection: sa.Connection, table: sa.Table) -> Kept:
    name, exact, persistence = connection.execute(
        sa.text(
            "SELECT coalesce(l.collname, 'default'), coalesce(l.collisdeterministic, true), c.relpersistence"
            " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'id'"
            " LEFT JOIN pg_collation l ON l.oid = a.attcollation WHERE c.oid = CAST(:name AS regclass)"
        ),
        {"name": f'"{table.name}"' if table.schema is None else f'"{table.schema}"."{table.name}"'},
    ).one()
    kind = ("the table is UNLOGGED", "ALTER TABLE ... SET LOGGED") if persistence == "u" else None
    return kind, name, bool(exact)


def _kept_by_sqlite(connection: sa.Connection, table: sa.Table) -> Kept:
    for _, name, _, origin, _ in connection.exec_driver_sql(f'PRAGMA index_list("{table.name}")').all():
        if origin == "pk":
            columns = connection.exec_driver_sql(f'PRAGMA index_xinfo("{name}")').all()
            collation = next(row[4] for row in columns if row[2] == "id")
            return None, collation, collation == "BINARY"
    return None, "BINARY", True


_COLLATIONS: dict[str, Callable[[sa.Connection, sa.Table], Kept]] = {
    "mysql": _kept_by_mysql,
    "mariadb": _kept_by_mysql,
    "postgresql": _kept_by_postgresql,
    "sqlite": _kept_by_sqlite,
}


async def _permissions(backend: SQLBackend, ask: Any) -> Finding:
    table = backend.table
    names = [column.name for column in table.columns]
    none = sa.select(*table.columns).where(sa.false())
    tried: dict[str, Any] = {
        "SELECT": none,
        "INSERT": table.insert().from_select(names, none),
        "UPDATE": table.update().values(token=table.c.token).where(sa.false()),
        "DELETE": table.delete().where(sa.false()),
    }
    missing, said = [], ""
    for name, statement in tried.items():
        try:
            await ask(lambda connection, statement=statement: connection.execute(statement))
        except exc.SQLAlchemyError as error:
            if _is_transient(error):
                raise  # a lock or a lost connection, and no right
            await ask(_answers)  # else it was not the statement that was refused
            missing.append(name)
            said = f"{_words(error)} ({_code(error)})"
    if not missing:
        return Finding("permissions", "ok", "SELECT, INSERT, UPDATE and DELETE")
    remedy = f"GRANT {', '.join(missing)} ON {table.name} TO the user, unless it is read-only for another reason"
    return Finding("permissions", "unsafe", f"refused: {', '.join(missing)}: {said}", _READ_ONLY, remedy)
