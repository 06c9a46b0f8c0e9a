"""How commands end: the exit codes, and what ends one early."""

__all__ = [
    "BROKEN_PIPE",
    "DONE",
    "INTERRUPTED",
    "NOT_SAFE",
    "REFUSED",
    "RETRIES_ONLY",
    "UNUSABLE",
    "Refused",
    "Unusable",
]

DONE = 0
"""Done. Of `doctor`: safe for money. Of `demo`: the promise held."""
REFUSED = 1
"""It was not done: no such record, or several; a state that does not allow it; "no" was the answer. Of `demo`: the promise broke."""
UNUSABLE = 2
"""Wrong arguments, or a backend that could not be used."""
RETRIES_ONLY = 3
"""Of `doctor`: safe for retries, not for money."""
NOT_SAFE = 4
"""Of `doctor`: not safe."""
INTERRUPTED = 130
"""Ctrl-C."""
BROKEN_PIPE = 141
"""Whoever read the output went away (`| head`), as a shell reports it."""


class Refused(Exception):
    """The command was understood and not done; the message says why and what to do."""

    code = REFUSED


class Unusable(Refused):
    """The command cannot be served: wrong arguments, or a backend that could not be used."""

    code = UNUSABLE
