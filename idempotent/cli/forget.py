"""`idempotent forget`: remove a record and its steps, so that the next call runs."""

import logging
from argparse import ArgumentParser, Namespace

from idempotent.cli import find
from idempotent.cli.console import confirm, print_json, print_line
from idempotent.cli.exits import DONE, Refused
from idempotent.cli.store import as_json, digest_of, open_store, url_of
from idempotent.errors import InProgress

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    find.add_arguments(parser)
    parser.add_argument(
        "--force", action="store_true", help="a running record too: then the next call runs beside the running one"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--json", action="store_true", help="print what was forgotten as a JSON object")


def run(options: Namespace) -> int:
    """Forget the record, if that is allowed and confirmed."""
    name = find.parse(options)
    logging.basicConfig(format="%(message)s")  # for what the backend warns of
    with open_store(url_of(options)) as backend:
        record = find.find(backend, name, options.namespace)
        confirm(
            f"Forget the {find.state_of(record)} record of {find.named(record)} ({digest_of(record)[:12]}) and its steps?"
            " The next call runs.",
            yes=options.yes,
        )
        found = find.on_behalf_of(backend, record.namespace).with_key(record.key)
        now = found.peek()
        if now is not None and (now.state, now.token) != (record.state, record.token):
            raise Refused(f"it has changed meanwhile, was {record.state} and is {now.state}, and was not forgotten")
        try:
            there = found.forget(force=options.force)
        except InProgress as error:
            raise Refused(f"it is running, and was not forgotten: {error}. --force does it all the same") from None
    if not there:
        raise Refused("it has gone meanwhile: there was nothing to forget")
    if options.json:
        print_json(as_json(record))
    else:
        print_line(f"forgotten: {find.named(record)}; the next call runs")
    return DONE
