"""`python -m idempotent demo`: a retry storm against three versions of one charge function."""

import argparse
import sys

from idempotent import __version__, _demo


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` (None: the process's own) name; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m idempotent", description="Functions that are safe to call twice.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="a retry storm against three versions of one charge function",
        description="Three versions of one charge function in the same retry storm: undecorated, behind a get-run-set"
        " cache, and decorated with @idempotent. Exits with 0 if @idempotent charged nobody twice, with 1 if it did,"
        " with 2 if the backend could not be used, with 130 when interrupted.",
    )
    _demo.add_arguments(demo)
    return _demo.main(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
