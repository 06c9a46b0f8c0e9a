"""`python -m idempotent`: the same as the script `idempotent`."""

import sys

from idempotent.cli.main import main, script

if __name__ == "__main__":
    sys.exit(script())

__all__ = ["main"]
