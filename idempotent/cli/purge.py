"""`idempotent purge`: drop the rows past their retention, a batch at a time."""

from argparse import ArgumentParser, Namespace

from idempotent._drive import drive
from idempotent.cli.console import Progress, print_json
from idempotent.cli.exits import DONE
from idempotent.cli.store import open_store, url_of

__all__ = ["add_arguments", "run"]


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="the backend (default: IDEMPOTENT_URL)")
    parser.add_argument("--json", action="store_true", help='print {"dropped": N}')


def run(options: Namespace) -> int:
    """Drop them all, and say how many."""
    dropped = 0
    with open_store(url_of(options)) as backend, Progress("rows dropped") as progress:
        while count := drive(backend.purge()):
            dropped += count
            progress.tell(dropped)
        kept_by_itself = backend.name == "redis"
    if options.json:
        print_json({"dropped": dropped})
    elif kept_by_itself:
        print("nothing to do: Redis drops records past their retention by itself")
    else:
        print(f"{dropped:,} rows past their retention dropped")
    return DONE
