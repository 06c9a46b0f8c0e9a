"""`idempotent purge`: drop the rows past their retention, a batch at a time."""

from argparse import ArgumentParser, Namespace

from idempotent._drive import drive
from idempotent.cli.console import Progress, print_json
from idempotent.cli.exits import DONE
from idempotent.cli.store import open_store, url_of

__all__ = ["add_arguments", "run"]

_BATCH = 1000


def add_arguments(parser: ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("url", nargs="?", metavar="URL", help="the backend (default: IDEMPOTENT_URL)")
    parser.add_argument("--json", action="store_true", help='print {"dropped": N}')


def run(options: Namespace) -> int:
    """Drop them all, and say how many; with `remember=`, a row past its ttl loses its outcome, which counts, too."""
    dropped = 0
    with open_store(url_of(options)) as backend, Progress("rows dropped") as progress:
        count = _BATCH
        while count >= _BATCH:  # fewer are the last: what expires meanwhile is another purge's
            count = drive(backend.purge(_BATCH))
            dropped += count
            progress.tell(dropped)
        kept_by_itself = backend.name == "redis"
    if options.json:
        print_json({"dropped": dropped})
    elif kept_by_itself:
        print("nothing to do: Redis drops records past their retention by itself")
    else:
        print(f"{dropped:,} rows past their time dropped, or emptied where their keys are remembered")
    return DONE
