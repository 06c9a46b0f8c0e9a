"""The table of records as it is in a database, compared with what it should be."""

from typing import Any

import sqlalchemy as sa

__all__ = ["differences"]


def differences(connection: sa.Connection, table: sa.Table) -> list[str] | None:
    """What is wrong with the table in the database, in words; None: there is no such table."""
    look: Any = sa.inspect(connection)
    if not look.has_table(table.name, schema=table.schema):
        return None
    there = {column["name"]: column for column in look.get_columns(table.name, schema=table.schema)}
    wrong = [f"the column {column.name} is missing" for column in table.columns if column.name not in there]
    wrong += [
        f"the column {column.name} is NOT NULL"
        for column in table.columns
        if column.name in there and column.nullable and not there[column.name]["nullable"]
    ]
    known = {column.name for column in table.columns}
    wrong += [
        f"the column {name}, which is not ours, must be given a value"
        for name, column in there.items()
        if name not in known and not column["nullable"] and column.get("default") is None
    ]
    key = look.get_pk_constraint(table.name, schema=table.schema)["constrained_columns"]
    if key != ["id"]:
        wrong.append(f"the primary key is ({', '.join(key) or 'none'}) and not (id)")
    indexed = [index["column_names"][:1] for index in look.get_indexes(table.name, schema=table.schema)]
    if ["expires"] not in indexed:
        wrong.append("there is no index on expires, which purge needs")
    return wrong
