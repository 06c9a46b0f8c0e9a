"""`python -m idempotent demo`: a retry storm against three versions of one charge function."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self


class Interrupts:
    """Ctrl-C, put off to where a command welcomes it: never while modules load, processes start, or it tidies up."""

    def __init__(self) -> None:
        self._seen = self._welcome = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self._seen = True
        if self._welcome:
            self._welcome = False  # a second one must not strike what the first has set off
            raise KeyboardInterrupt

    @contextmanager
    def welcome(self) -> Iterator[None]:
        """Where KeyboardInterrupt is raised, also for a Ctrl-C that came before."""
        self._welcome = True
        try:
            if self._seen:
                raise KeyboardInterrupt
            yield
        finally:
            self._welcome = False


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (None: the process's own) name; its exit code."""
    with Interrupts() as interrupts:
        try:
            return _main(arguments, interrupts)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130


def _main(arguments: list[str] | None, interrupts: Interrupts) -> int:
    import argparse

    from idempotent import __version__, _demo

    parser = argparse.ArgumentParser(prog="python -m idempotent", description="Functions that are safe to call twice.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="a retry storm against three versions of one charge function",
        description="Three versions of one charge function in the same retry storm: undecorated, behind a get-run-set"
        " cache, and decorated with @idempotent. Exits with 0 if @idempotent charged every order exactly once and all"
        " callers agree, with 1 if not, with 2 if the backend could not be used, with 130 when interrupted.",
    )
    _demo.add_arguments(demo)
    return _demo.main(parser.parse_args(arguments), interrupts.welcome)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # main() listens; once it has ended there is nothing to interrupt
    sys.exit(main())
