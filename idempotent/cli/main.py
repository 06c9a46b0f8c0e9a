"""The command line: which command is asked for, and how it ends."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from idempotent.cli.exits import BROKEN_PIPE, INTERRUPTED, REFUSED, UNUSABLE, Refused
from idempotent.cli.interrupts import Interrupts

__all__ = ["main", "script"]

_CODES = """exit codes:
  0    done; doctor: safe for money
  1    not done: no such record, a state that does not allow it, or the answer was no
  2    wrong arguments, or the backend could not be used
  3    doctor: safe for retries, not for money
  4    doctor: not safe
  130  interrupted by Ctrl-C
  141  whoever read the output went away
"""

_COMMANDS = {
    "doctor": ("doctor", "whether a backend is set up so that money can rely on it"),
    "list": ("listing", "the records of a backend"),
    "show": ("show", "all that is known of one record"),
    "forget": ("forget", "remove a record, so that the next call runs"),
    "resolve": ("resolve", "settle by hand what a dead run left in doubt"),
    "purge": ("purge", "drop the rows past their retention"),
    "migrate": ("migrate", "make the table of records"),
}
"""Commands with their modules and what they do."""


def script() -> int:
    """The script `idempotent`: run the command that the process was given; its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # main() listens; once it has ended there is nothing to interrupt
    return main()


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (None: the process's own) name; its exit code."""
    with Interrupts() as interrupts:
        try:
            code = _main(arguments, interrupts)
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:
            # What is left in the buffer goes nowhere, and is not to be complained of at the exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        return code


def _main(arguments: list[str] | None, interrupts: Interrupts) -> int:
    parser, runs = _parser(interrupts)
    options, left = parser.parse_known_args(arguments)
    if left and "words" in options and not any(word.startswith("-") for word in left):
        options.words += left  # `show URL --payload KEY`: argparse takes the words before the first option alone
    elif left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if options.command == "demo":
        return runs["demo"](options)
    return _run(options, runs[options.command], interrupts)


def _run(options: argparse.Namespace, run: Callable[[argparse.Namespace], int], interrupts: Interrupts) -> int:
    """Run a command, and tell in one line what kept it from being done."""
    from idempotent.cli.store import censored
    from idempotent.errors import BackendError, IdempotencyError

    def told(error: Exception, code: int) -> int:
        url = getattr(options, "url", None) or os.environ.get("IDEMPOTENT_URL")
        sys.stdout.flush()
        text = str(error) if isinstance(error, Refused) else " ".join(str(error).split())  # drivers like many lines
        print(f"idempotent {options.command}: {censored(text, url)}", file=sys.stderr)
        return code

    try:
        with interrupts.welcome():
            return run(options)
    except Refused as error:
        return told(error, error.code)
    except IdempotencyError as error:
        return told(error, UNUSABLE if isinstance(error, BackendError) else REFUSED)


class _Parser(argparse.ArgumentParser):
    """A parser that tells what is wrong without the passwords in it."""

    def error(self, message: str) -> NoReturn:
        super().error(re.sub(r"://.*@", "://***@", message, flags=re.DOTALL))


def _parser(
    interrupts: Interrupts,
) -> tuple[argparse.ArgumentParser, dict[str, Callable[[argparse.Namespace], int]]]:
    """The parser, and what runs each command."""
    from importlib import import_module

    from idempotent import __version__, _demo

    name = "idempotent" if os.path.basename(sys.argv[0]) in ("idempotent", "idempotent.exe") else "python -m idempotent"  # noqa: PTH119
    parser = _Parser(
        prog=name,
        description="Functions that are safe to call twice.",
        epilog=_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    runs: dict[str, Callable[[argparse.Namespace], int]] = {}
    for command, (module, does) in _COMMANDS.items():
        made = import_module(f"idempotent.cli.{module}")
        made.add_arguments(commands.add_parser(command, help=does, description=made.__doc__))
        runs[command] = made.run
    demo = commands.add_parser(
        "demo",
        help="a retry storm against three versions of one charge function",
        description="Three versions of one charge function in the same retry storm: undecorated, behind a get-run-set"
        " cache, and decorated with @idempotent. Exits with 0 if @idempotent charged every order exactly once and all"
        " callers agree, with 1 if not, with 2 if the backend could not be used, with 130 when interrupted.",
    )
    _demo.add_arguments(demo)
    runs["demo"] = lambda options: _demo.main(options, interrupts.welcome)
    return parser, runs
