"""`python -m idempotent.testing soak --backend URL`: worker processes, killed and frozen, and the verdict on their history."""

import argparse
import signal
import sys

from idempotent.cli.interrupts import Interrupts
from idempotent.testing.soak import add_arguments, run


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (None: the process's own) name; its exit code."""
    with Interrupts() as interrupts:
        try:
            parser = argparse.ArgumentParser(
                prog="python -m idempotent.testing", description="Proofs that calls keep their promises."
            )
            commands = parser.add_subparsers(dest="command", required=True)
            command = commands.add_parser(
                "soak",
                help="worker processes that are killed and frozen, and the verdict on their history",
                description="Worker processes call one function under @idempotent while they are killed and frozen; the"
                " history of every command is judged. Exits with 0 if every promise was kept that a history can show,"
                " with 1 if one was broken, with 2 if it could not run, with 130 when interrupted. What it wrote to the"
                " backend it forgets.",
            )
            add_arguments(command)
            return run(parser.parse_args(arguments), interrupts.welcome)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # main() listens; once it has ended there is nothing to interrupt
    sys.exit(main())
