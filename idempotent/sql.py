"""Natural idempotency in a SQL database: writes that may be sent twice because the row itself says whether they were.

`insert_once` leans on a unique key, `compare_and_set` on a version column. Neither needs a record of ours; both work in
the caller's transaction, which the caller commits. For a whole function there is `@idempotent(within="session")`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast, overload

try:
    import sqlalchemy as sa
except ImportError as error:
    raise ImportError(
        "idempotent.sql needs SQLAlchemy: pip install 'idempotent-py[sql]' (or postgres, mysql, sqlite)"
    ) from error
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session
from sqlalchemy.orm import InstrumentedAttribute, Mapper, Session, scoped_session

from idempotent.backends._caller import begun, subject_of
from idempotent.backends.sql import SQLBackend, records_table

__all__ = [
    "SQLBackend",
    "compare_and_set",
    "compare_and_set_async",
    "insert_once",
    "insert_once_async",
    "records_table",
]

M = TypeVar("M")

Column = str | sa.Column[Any] | InstrumentedAttribute[Any]
Place = Session | scoped_session[Any] | sa.Connection
AsyncPlace = AsyncSession | async_scoped_session[Any] | AsyncConnection


@overload
def insert_once(
    session: Place, target: sa.Table, key_column: Column | Sequence[Column], values: Mapping[str, Any]
) -> tuple[sa.Row[Any], bool]: ...
@overload
def insert_once(
    session: Place, target: type[M], key_column: Column | Sequence[Column], values: Mapping[str, Any]
) -> tuple[M, bool]: ...
def insert_once(
    session: Place, target: Any, key_column: Column | Sequence[Column], values: Mapping[str, Any]
) -> tuple[Any, bool]:
    """Insert a row, or find the one that has its key already; sent twice, it inserts once.

    A duplicate in another transaction waits until that one ends, as for any unique key. What fails is undone to a
    savepoint, so the caller's earlier work stays. The caller commits.

    Args:
        session: a Session or Connection.
        target: a mapped class or a Table.
        key_column: the column with the unique constraint, by name or as it is; several for a constraint on several.
        values: the row, by attribute of the class or by column name; the key's among them.

    Returns:
        The row, and whether this call made it. An instance, for a mapped class in a session; else a Row. Where it was
        there already, it is as it is stored, whatever `values` say.

    Raises:
        ValueError: the key is not among `values`, or names no column.
        TypeError: the class is stored in several tables (joined inheritance); nothing was sent.
        sqlalchemy.exc.IntegrityError: the row breaks another constraint.
        sqlalchemy.exc.NoResultFound: the row that has the key was deleted at this moment, or is of another class;
            nothing was inserted.
        sqlalchemy.exc.OperationalError, ProgrammingError: `key_column` has no unique constraint (PostgreSQL, SQLite).
    """
    return _insert_once(subject_of(session, is_async=False), target, _listed(key_column), values)


@overload
async def insert_once_async(
    session: AsyncPlace, target: sa.Table, key_column: Column | Sequence[Column], values: Mapping[str, Any]
) -> tuple[sa.Row[Any], bool]: ...
@overload
async def insert_once_async(
    session: AsyncPlace, target: type[M], key_column: Column | Sequence[Column], values: Mapping[str, Any]
) -> tuple[M, bool]: ...
async def insert_once_async(
    session: AsyncPlace, target: Any, key_column: Column | Sequence[Column], values: Mapping[str, Any]
) -> tuple[Any, bool]:
    """As `insert_once`, for an AsyncSession or AsyncConnection."""
    place = subject_of(session, is_async=True)
    found = await place.run_sync(_insert_once, target, _listed(key_column), values)
    return cast("tuple[Any, bool]", found)


def compare_and_set(
    session: Place, target: Any, where: Mapping[str, Any], values: Mapping[str, Any], version_column: Column
) -> bool:
    """Change a row if it still is in the version that the caller has read; optimistic locking, in one statement.

    The version goes up by one. Sent twice, the second finds another version and changes nothing.

    Args:
        session: a Session or Connection.
        target: a mapped class or a Table.
        where: which row, and the version that was read: `{"id": 7, "version": 3}`.
        values: what to set, without the version.
        version_column: an integer column, by name or as it is.

    Returns:
        True: the row was changed. False: it is in another version by now, or is not there; read it again.

    Raises:
        ValueError: `where` names no version, or more than one row; nothing was changed.
    """
    return _compare_and_set(subject_of(session, is_async=False), target, where, values, version_column)


async def compare_and_set_async(
    session: AsyncPlace, target: Any, where: Mapping[str, Any], values: Mapping[str, Any], version_column: Column
) -> bool:
    """As `compare_and_set`, for an AsyncSession or AsyncConnection."""
    place = subject_of(session, is_async=True)
    return bool(await place.run_sync(_compare_and_set, target, where, values, version_column))


def _listed(columns: Column | Sequence[Column]) -> list[Column]:
    return list(columns) if isinstance(columns, (list, tuple)) else [cast("Column", columns)]


class _Target:
    """A table, and how its columns are called: by a mapped class's attributes, or by their own names."""

    def __init__(self, place: Session | sa.Connection, target: Any) -> None:
        inspected = sa.inspect(target, raiseerr=False)
        if isinstance(target, sa.Table):
            self.table, columns = target, {column.key: column for column in target.c}
            self.entity = False
        elif inspected is not None and inspected.is_mapper:
            self.table = inspected.local_table
            columns = {prop.key: prop.columns[0] for prop in inspected.column_attrs}
            self.entity = isinstance(place, Session)
        else:
            raise TypeError(f"target must be a mapped class or a Table, not {target!r}")
        self.target = target
        self._columns = columns

    def column(self, named: Column) -> sa.Column[Any]:
        """The column of that name. Raises ValueError if there is none."""
        if isinstance(named, sa.Column) and named.table is self.table:
            return named
        name = named if isinstance(named, str) else named.key
        if name not in self._columns:
            raise ValueError(f"{self.table.name} has no column {name!r}; there are {', '.join(self._columns)}")
        return cast("sa.Column[Any]", self._columns[name])

    def kind(self) -> dict[sa.Column[Any], Any]:
        """What tells the rows of this class from those of others in its table. Raises TypeError if it has several."""
        if isinstance(self.target, sa.Table):
            return {}
        mapper = cast("Mapper[Any]", sa.inspect(self.target))
        if len(mapper.tables) > 1:
            raise TypeError(
                f"a {mapper.class_.__name__} is stored in several tables ({', '.join(map(str, mapper.tables))}), and one"
                " insert makes a row of one; insert_once the row that has the key by its Table, the others after it"
            )
        told = mapper.polymorphic_on
        if mapper.polymorphic_identity is None or not isinstance(told, sa.Column) or told.table is not self.table:
            return {}
        return {told: mapper.polymorphic_identity}

    def by_column(self, values: Mapping[str, Any]) -> dict[sa.Column[Any], Any]:
        """`values` by the table's own columns."""
        return {self.column(name): value for name, value in values.items()}


def _dialect(place: Session | sa.Connection) -> str:
    """The dialect's name; its driver has a transaction open, so that a savepoint is one."""
    connection = place.connection() if isinstance(place, Session) else place
    begun(connection)
    return connection.dialect.name


def _insert_once(
    place: Session | sa.Connection, target: Any, key_columns: list[Column], values: Mapping[str, Any]
) -> tuple[Any, bool]:
    aim = _Target(place, target)
    row = {**aim.kind(), **aim.by_column(values)}
    keys = [aim.column(key) for key in key_columns]
    for key in keys:
        if row.get(key) is None:
            raise ValueError(f"values= has nothing for the key {key.name!r}, so no row could be found by it")
    dialect = _dialect(place)
    query = sa.select(aim.target if aim.entity else aim.table).where(*[key == row[key] for key in keys])
    if dialect in ("mysql", "mariadb"):  # any other read may show an older state there
        query = query.with_for_update(read=True)
    if dialect in ("postgresql", "sqlite"):
        insert = postgresql.insert if dialect == "postgresql" else sqlite.insert
        statement = insert(aim.table).values(row).on_conflict_do_nothing(index_elements=keys).returning(*keys)
        with place.begin_nested():
            created = place.execute(statement).first() is not None
            found = _found(place, aim, query)
    else:
        try:
            with place.begin_nested():
                place.execute(sa.insert(aim.table).values(row))
                found = _found(place, aim, query)
            created = True
        except exc.IntegrityError:
            created = False
            found = _one(place, aim, query)
            if found is None:
                raise  # it is another constraint that the row breaks
    return found, created


def _found(place: Session | sa.Connection, aim: _Target, query: Any) -> Any:
    """The row; inside the insert's savepoint, so that one which the class does not show is not left behind."""
    found = _one(place, aim, query)
    if found is None:
        raise exc.NoResultFound(
            f"no row of {aim.table.name} with this key is seen: it was deleted at this moment (then retry the"
            " transaction), or is of another class than the one that was given"
        )
    return found


def _one(place: Session | sa.Connection, aim: _Target, query: Any) -> Any:
    if aim.entity:
        return place.scalars(query, execution_options={"populate_existing": True}).first()
    return place.execute(query).first()


def _compare_and_set(
    place: Session | sa.Connection,
    target: Any,
    where: Mapping[str, Any],
    values: Mapping[str, Any],
    version_column: Column,
) -> bool:
    aim = _Target(place, target)
    version = aim.column(version_column)
    condition, change = aim.by_column(where), aim.by_column(values)
    if condition.get(version) is None:
        raise ValueError(f"where= must name the version that was read, in {version.name!r}; else nothing is compared")
    if version in change:
        raise ValueError(f"values= must leave {version.name!r} out: it goes up by one")
    dialect = _dialect(place)
    statement = sa.update(aim.target if aim.entity else aim.table)
    statement = statement.where(*[column == value for column, value in condition.items()])
    statement = statement.values({**change, version: version + 1})
    primary = list(aim.table.primary_key)
    asked = sa.select(*primary).where(*[column == value for column, value in condition.items()]).with_for_update()
    found: list[Any] = []
    with place.begin_nested():
        if not isinstance(place, Session) or not aim.entity:
            changed = cast("sa.CursorResult[Any]", place.execute(statement)).rowcount
        else:
            # Not by SQLAlchemy's own synchronization: without RETURNING it looks for the rows in the transaction's
            # snapshot, and would give the session's copies values that the table has not got.
            alone = {"synchronize_session": False}
            if dialect in ("mysql", "mariadb"):
                found = list(place.execute(asked).all())
                changed = cast("sa.CursorResult[Any]", place.execute(statement, execution_options=alone)).rowcount
            else:
                found = list(place.execute(statement.returning(*primary), execution_options=alone).all())
                changed = len(found)
        if changed > 1:
            raise ValueError(f"where= names {changed} rows of {aim.table.name}, and not one")
    if changed == 1 and isinstance(place, Session):
        for key in found:
            _follow(place, aim, tuple(key))
    return changed == 1


def _follow(session: Session, aim: _Target, key: tuple[Any, ...]) -> None:
    """Read the session's own copy of that row again, if it has one."""
    mapper = cast("Mapper[Any]", sa.inspect(aim.target))
    copy = session.identity_map.get(mapper.identity_key_from_primary_key(key))
    if copy is not None:
        session.refresh(copy)
