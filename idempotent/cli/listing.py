"""`idempotent list`: the records of a backend, in no order."""

import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator

from idempotent._record import Record
from idempotent.cli.console import Progress, Table, print_json, span
from idempotent.cli.exits import DONE
from idempotent.cli.find import state_of
from idempotent.cli.store import as_json, digest_of, each, open_store, url_of

__all__ = ["add_arguments", "run"]

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3_600, "d": 86_400}


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="the backend (default: IDEMPOTENT_URL)")
    parser.add_argument("--state", choices=("running", "completed", "failed", "unknown", "expired"), help="only those")
    parser.add_argument("--namespace", metavar="NAME", help="only those of this namespace")
    parser.add_argument(
        "--older-than",
        type=_seconds,
        default=0.0,
        metavar="AGE",
        help="only those that have been in their state for longer: seconds, or a number with s, m, h or d",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if found is None:
        raise ArgumentTypeError("must be seconds, or a number with s, m, h or d, such as 15m")
    return float(found[1]) * _UNITS[found[2]]


def run(options: Namespace) -> int:
    """Print what was asked for."""
    with open_store(url_of(options)) as backend, Progress("records looked at") as progress:

        def wanted() -> Iterator[Record]:
            for number, record in enumerate(each(backend, namespace=options.namespace)):
                progress.tell(number)
                if options.state in (None, record.state) and record.age >= options.older_than:
                    progress.clear()
                    yield record

        if options.json:
            print_json(as_json(record) for record in wanted())
            return DONE
        table = Table(("STATE", "AGE", "KEPT FOR", "DIGEST", "NAMESPACE", "KEY"), (9, 6, 12, 12, 16))
        count = 0
        for record in wanted():
            count += 1
            kept = "till settled" if record.expires_in is None else span(record.expires_in)
            table.add(state_of(record), span(record.age), kept, digest_of(record)[:12], record.namespace, record.key)
        if not count:
            print("no records")
    return DONE
