"""`idempotent migrate`: make the table of records, exactly as `SQLBackend.metadata` has it."""

import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING, Any

from idempotent import _config as config
from idempotent._drive import drive
from idempotent.cli.console import print_json, print_line
from idempotent.cli.exits import DONE, Refused, Unusable
from idempotent.cli.store import SQL, open_database, url_of

if TYPE_CHECKING:
    from idempotent.backends.sql import SQLBackend

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="the database (default: IDEMPOTENT_URL)")
    parser.add_argument("--json", action="store_true", help='print {"table": NAME, "made": true or false}')


def run(options: Namespace) -> int:
    """Make the table and its index, or find them as they should be."""
    url = url_of(options)
    try:
        scheme = config.check_url(url)
        if scheme not in SQL:
            raise Unusable(f"{scheme}:// keeps no table, so there is nothing to make; the first call can come")
        backend = open_database(url)
    except (ValueError, ImportError) as error:
        raise Unusable(" ".join(str(error).split())) from error
    with backend:
        made, wrong = drive(_make(backend))
    name = backend.table.name
    if wrong:
        raise Refused(
            f"the table {name} is there and is not as this version has it: {'; '.join(wrong)}. Nothing was changed: bring it"
            " to the form of records_table(metadata), by Alembic for instance, or choose another name with table="
        )
    if options.json:
        print_json({"table": name, "made": made})
    else:
        print_line(f"the table {name} was made" if made else f"the table {name} is there, as it should be")
    return DONE


async def _make(backend: "SQLBackend") -> tuple[bool, list[str]]:
    """Whether the table was made, and what is wrong with one that was there."""
    from sqlalchemy.exc import SQLAlchemyError

    from idempotent.backends.sql import _words
    from idempotent.cli.schema import differences

    def work(connection: Any) -> tuple[bool, list[str]]:
        wrong = differences(connection, backend.table)
        if wrong is not None:
            return False, wrong
        backend.metadata.create_all(connection, checkfirst=True)
        return True, differences(connection, backend.table) or []

    try:
        return await backend._link.run(work, time.monotonic() + backend.timeout)
    except (TimeoutError, OSError, SQLAlchemyError) as error:
        raise Unusable(f"the table could not be made: {' '.join(_words(error).split())}") from error
