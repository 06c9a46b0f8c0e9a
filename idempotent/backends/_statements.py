"""The table of records and the SQL on it, made once for one table and dialect."""

import re
import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Connection

from idempotent import _machine as machine
from idempotent._record import Granted, RecordId, Row, State
from idempotent.backends import _notify as notify
from idempotent.errors import BackendError

__all__ = ["Statements", "records_table"]

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,47}")


def records_table(metadata: sa.MetaData, name: str = "idempotent_records", schema: str | None = None) -> sa.Table:
    """The table of records, as part of `metadata`: for Alembic, and for whoever wants to query it.

    Args:
        metadata: where the table is registered.
        name: 1 to 48 ASCII letters, digits and underscores, no digit first.
        schema: the database schema; None: the connection's default.

    Raises:
        ValueError: the name or the schema is no such identifier.
    """
    for identifier in (name, schema):
        if identifier is not None and not _IDENTIFIER.fullmatch(identifier):
            raise ValueError(
                f"the table's name or schema {identifier!r} must be 1 to 48 ASCII letters, digits and underscores, no digit first"
            )
    ascii_digest = mysql.CHAR(48, charset="ascii", collation="ascii_bin")
    short_bytes = sa.LargeBinary(16).with_variant(mysql.VARBINARY(16), "mysql", "mariadb")
    return sa.Table(
        name,
        metadata,
        sa.Column("id", sa.String(48).with_variant(ascii_digest, "mysql", "mariadb"), primary_key=True),
        sa.Column("space", sa.String(1), nullable=False),
        sa.Column("namespace", sa.Text, nullable=False),
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("state", sa.String(1), nullable=False),
        sa.Column("token", sa.BigInteger, nullable=False),
        sa.Column("attempt", short_bytes, nullable=False),
        sa.Column("fingerprint", short_bytes, nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False, comment="microseconds since 1970, as all of these"),
        sa.Column("lease", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        sa.Column("expires", sa.BigInteger, index=True, comment="NULL: kept until it is settled"),
        sa.Column("codec", sa.String(100), nullable=False),
        sa.Column("body", sa.LargeBinary().with_variant(mysql.LONGBLOB, "mysql", "mariadb"), nullable=False),
        schema=schema,
        mysql_charset="utf8mb4",
        mariadb_charset="utf8mb4",
    )


class Statements:
    """The statements on one table, for one dialect.

    `notifies`: whether those who wait on PostgreSQL are told; the locks that this takes last as long as the transaction.
    """

    def __init__(self, table: sa.Table, dialect: str, *, notifies: bool = True) -> None:
        self._dialect = dialect
        self._notifies = notifies and dialect == "postgresql"
        # As text: aiomysql 0.3 breaks on bytes under PyMySQL 1.2, where a name that it imports is no function any more.
        self._hex = dialect in ("mysql", "mariadb")
        c = table.c
        columns = (
            c.state,
            c.token,
            c.attempt,
            c.fingerprint,
            c.since,
            c.lease,
            c.lease_until,
            c.expires,
            c.codec,
            c.body,
        )
        now: sa.ColumnElement[int]
        if dialect == "postgresql":
            now = sa.cast(sa.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, sa.BigInteger)
        elif dialect == "sqlite":
            # The file and its users are on one machine and share its clock.
            now = sa.bindparam("now", type_=sa.BigInteger)
        else:  # UTC, so that no change to or from summer time moves a lease
            now = sa.func.timestampdiff(sa.text("MICROSECOND"), "1970-01-01", sa.func.utc_timestamp(6))
        here = c.id == sa.bindparam("b_id")
        clock = sa.select(now.label("now")).subquery("clock")
        self._read = sa.select(clock.c.now, *columns).select_from(clock.outerjoin(table, here))
        owned = sa.and_(
            here,
            c.token == sa.bindparam("b_token"),
            c.attempt == self._binary("b_attempt"),
            sa.or_(c.expires.is_(None), c.expires > now),
        )
        span = sa.bindparam("b_span", type_=sa.BigInteger)
        # MySQL assigns from left to right and reads what it has assigned: `expires` first.
        self._renew = (
            table.update()
            .where(owned, c.state == "R")
            .ordered_values(
                (c.expires, now + span + (c.expires - c.lease_until)), (c.lease, span), (c.lease_until, now + span)
            )
        )
        self._settle = (
            table.update()
            .where(owned, c.state.in_(("R", "U")))
            .values(
                state=sa.bindparam("b_state"),
                since=now,
                lease=sa.bindparam("b_past", type_=sa.BigInteger),
                lease_until=0,
                expires=now + span,
                codec=sa.bindparam("b_codec"),
                body=self._binary("b_body"),
            )
        )
        self._release = (
            table.update()
            .where(owned, c.state.in_(("R", "U")))
            .values(
                state=State.WITHDRAWN.value,
                since=now,
                lease=0,
                lease_until=0,
                expires=now + machine.TOMBSTONE,
                body=sa.literal_column("''" if dialect == "postgresql" else "x''"),
            )
        )
        unchanged = sa.and_(
            here,
            c.state == sa.bindparam("b_state"),
            c.token == sa.bindparam("b_token"),
            c.attempt == self._binary("b_attempt"),
            c.lease_until == sa.bindparam("b_until"),
        )
        values: dict[str, Any] = {
            column.name: self._binary(column.name)
            if column.name in ("attempt", "fingerprint", "body")
            else sa.bindparam(column.name, type_=column.type)
            for column in columns
        }
        self._swap = table.update().where(unchanged).values(values)
        if self._notifies:
            self._settle = self._settle.returning(notify.notifying())
            self._release = self._release.returning(notify.notifying())
            self._swap = self._swap.returning(notify.notifying(unless=c.state == "R"))
        named: dict[str, Any] = {name: sa.bindparam(name) for name in ("id", "space", "namespace", "key")}
        self._insert = table.insert().values({**named, **values})
        self._runs = sa.select(sa.literal(1)).where(here, c.state == "R", c.token == sa.bindparam("b_token"))
        self._page = (
            sa.select(now.label("now"), c.id, c.namespace, c.key, *columns)
            .where(c.id > sa.bindparam("b_id"), c.space == "c")
            .order_by(c.id)
            .limit(500)
        )
        # As a subquery, as no index is looked up by the value of a function that changes within a statement.
        self._over = sa.select(c.id).where(c.expires <= sa.select(now).scalar_subquery()).limit(sa.bindparam("b_limit"))
        self._over_free = self._over.with_for_update(skip_locked=True)
        # With a sum, lest MySQL look `expires` up, and wait for rows beside these.
        these = sa.and_(c.id.in_(sa.bindparam("b_ids", expanding=True)), c.expires + 0 <= now)
        remembered = sa.and_(c.state == State.COMPLETED.value, c.lease > 0)
        self._purge = table.delete().where(these, sa.or_(sa.not_(remembered), c.expires + c.lease <= now))
        nothing: Any = sa.literal_column("''" if dialect == "postgresql" else "x''")
        # As above: MySQL reads what it has assigned.
        self._cut = (
            table.update()
            .where(these, remembered)
            .ordered_values(
                (c.since, c.expires),
                (c.expires, c.expires + c.lease),
                (c.state, State.EXPIRED.value),
                (c.lease, 0),
                (c.codec, ""),
                (c.body, nothing),
            )
        )
        self._fresh = self._fresh_postgresql(table, columns) if dialect == "postgresql" else None

    @staticmethod
    def _fresh_postgresql(table: sa.Table, columns: tuple[sa.Column[Any], ...]) -> sa.TextClause:
        """Insert where there is nothing, and read what there is: one statement, one round trip."""
        name = f'"{table.name}"' if table.schema is None else f'"{table.schema}"."{table.name}"'
        shown = ", ".join(f"record.{column.name}" for column in columns)
        return sa.text(
            f"""
            WITH clock AS MATERIALIZED (
                SELECT CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS bigint) AS now
            ), fresh AS (
                INSERT INTO {name} (id, space, namespace, "key", state, token, attempt, fingerprint,
                                    since, lease, lease_until, expires, codec, body)
                SELECT CAST(:b_id AS varchar), CAST(:space AS varchar), CAST(:namespace AS text), CAST(:key AS text),
                       'R', now, CAST(:attempt AS bytea), CAST(:fingerprint AS bytea), now, CAST(:lease AS bigint),
                       now + CAST(:lease AS bigint), now + CAST(:lease AS bigint) + CAST(:keep AS bigint),
                       '', CAST(:owner AS bytea)
                FROM clock
                ON CONFLICT (id) DO NOTHING
                RETURNING token
            )
            SELECT clock.now, fresh.token AS fresh, {shown}
            FROM clock LEFT JOIN fresh ON true LEFT JOIN {name} AS record ON record.id = CAST(:b_id AS varchar)
            """  # noqa: S608  the name was checked and is quoted
        )

    def _binary(self, name: str) -> sa.ColumnElement[bytes]:
        if self._hex:
            return sa.func.unhex(sa.bindparam(name, type_=sa.String), type_=sa.LargeBinary)
        return sa.bindparam(name, type_=sa.LargeBinary)

    def _bytes(self, value: bytes) -> bytes | str:
        return value.hex() if self._hex else value

    def check_size(self, connection: Connection, body: bytes) -> None:
        """Refuse what MySQL and MariaDB would close the connection for. Raises BackendError."""
        if self._hex and len(body) > 250_000:
            limit = connection.execute(sa.text("SELECT @@max_allowed_packet")).scalar_one()
            if 2 * len(body) + 4096 > limit:
                raise BackendError(f"an outcome of {len(body):,} bytes does not fit into max_allowed_packet={limit:,}")

    def _clocked(self, values: dict[str, Any]) -> dict[str, Any]:
        if self._dialect == "sqlite":
            values["now"] = time.time_ns() // 1000
        return values

    def _bucket(self, rid: RecordId) -> dict[str, Any]:
        return {"b_bucket": notify.bucket_of(rid.digest)} if self._notifies else {}

    def fresh(self, connection: Connection, rid: RecordId, ask: machine.Ask) -> tuple[int | None, Row | None, int]:
        """Claim a record that is not there: its token. Else None, the row that is there, and the time."""
        if self._fresh is not None:
            values = {
                "b_id": rid.digest,
                "space": rid.space,
                "namespace": rid.namespace,
                "key": rid.key,
                "attempt": ask.attempt,
                "fingerprint": ask.fingerprint,
                "lease": ask.lease,
                "keep": ask.keep,
                "owner": ask.owner,
            }
            while True:
                now, token, *found = connection.execute(self._fresh, values).one()
                if token is not None:
                    return int(token), None, now
                if found[0] is not None:
                    return None, _row(found), now
                # Another inserted it after this statement's snapshot was taken.
        while True:
            row, now = self.read(connection, rid)
            if row is not None:
                return None, row, now
            reply, granted = machine.on_claim(None, ask, now)
            assert isinstance(reply, Granted)
            assert granted is not None
            if self.swap(connection, rid, None, granted):
                return reply.token, None, now

    def read(self, connection: Connection, rid: RecordId) -> tuple[Row | None, int]:
        """The row, and the backend's time."""
        now, *found = connection.execute(self._read, self._clocked({"b_id": rid.digest})).one()
        return (None if found[0] is None else _row(found)), int(now)

    def swap(self, connection: Connection, rid: RecordId, row: Row | None, changed: Row) -> bool:
        """Put `changed` where `row` is, if it still is; whether it was."""
        values: dict[str, Any] = {
            "b_id": rid.digest,
            **changed._asdict(),
            "state": changed.state.value,
            "attempt": self._bytes(changed.attempt),
            "fingerprint": self._bytes(changed.fingerprint),
            "body": self._bytes(changed.body),
        }
        if row is None:
            del values["b_id"]
            values |= {"id": rid.digest, "space": rid.space, "namespace": rid.namespace, "key": rid.key}
            try:
                connection.execute(self._insert, values)
            except exc.IntegrityError:
                if self.read(connection, rid)[0] is None:
                    raise  # nobody was quicker: something else in the database refuses the row
                return False
            return True
        values |= self._bucket(rid) | {
            "b_state": row.state.value,
            "b_token": row.token,
            "b_attempt": self._bytes(row.attempt),
            "b_until": row.lease_until,
        }
        return connection.execute(self._swap, values).rowcount == 1

    def renew(self, connection: Connection, rid: RecordId, attempt: bytes, token: int, lease: int) -> bool:
        """Renew a running record that is this attempt's; whether it was."""
        values = self._clocked(
            {"b_id": rid.digest, "b_attempt": self._bytes(attempt), "b_token": token, "b_span": lease}
        )
        return connection.execute(self._renew, values).rowcount == 1

    def settle(
        self,
        connection: Connection,
        rid: RecordId,
        state: State,
        attempt: bytes,
        token: int,
        codec: str,
        body: bytes,
        ttl: int,
        past: int,
    ) -> bool:
        """Settle an unsettled record that is this attempt's, its key remembered for `past` after `ttl`; whether it was."""
        values = self._clocked(
            {
                "b_id": rid.digest,
                "b_attempt": self._bytes(attempt),
                "b_token": token,
                "b_span": ttl,
                "b_past": past,
                "b_state": state.value,
                "b_codec": codec,
                "b_body": self._bytes(body),
                **self._bucket(rid),
            }
        )
        return connection.execute(self._settle, values).rowcount == 1

    def release(self, connection: Connection, rid: RecordId, attempt: bytes, token: int) -> bool:
        """Withdraw an unsettled record that is this attempt's; whether it was."""
        values = self._clocked(
            {"b_id": rid.digest, "b_attempt": self._bytes(attempt), "b_token": token, **self._bucket(rid)}
        )
        return connection.execute(self._release, values).rowcount == 1

    def runs(self, connection: Connection, rid: RecordId, token: int) -> bool:
        """Whether the record is running under `token`."""
        return connection.execute(self._runs, {"b_id": rid.digest, "b_token": token}).first() is not None

    def page(self, connection: Connection, after: str) -> list[tuple[str, RecordId, Row, int]]:
        """The next records of the call space, in the order of their digests."""
        rows = connection.execute(self._page, self._clocked({"b_id": after})).all()
        return [
            (digest, RecordId(namespace, key), _row(found), int(now)) for now, digest, namespace, key, *found in rows
        ]

    def purge(self, connection: Connection, limit: int) -> int:
        """Drop at most `limit` rows past their retention, or their bodies where the keys are remembered; how many.

        None that a transaction has locked, where the database can tell.
        """
        server: Any = connection.dialect
        if self._hex:
            can_skip = server.server_version_info >= ((10, 6) if server.is_mariadb else (8,))
        else:
            can_skip = self._dialect == "postgresql"
        over = self._over_free if can_skip else self._over
        ids = connection.execute(over, self._clocked({"b_limit": limit})).scalars().all()
        if not ids:
            return 0
        values = self._clocked({"b_ids": list(ids)})
        dropped = int(connection.execute(self._purge, values).rowcount)
        return dropped if dropped == len(ids) else dropped + int(connection.execute(self._cut, values).rowcount)


def _row(found: list[Any]) -> Row:
    letter, token, attempt, fingerprint, since, lease, lease_until, expires, codec, body = found
    try:
        state = State(letter)
    except ValueError:
        raise BackendError(
            f"the row is no record of ours (its state is {letter!r}); nothing ran and nothing was overwritten."
            " Give the backend a table= of its own"
        ) from None
    return Row(state, token, bytes(attempt), bytes(fingerprint), since, lease, lease_until, expires, codec, bytes(body))
