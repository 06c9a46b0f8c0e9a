"""What commands print and ask: lines for people, JSON for programs, never a control character of a record's."""

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

from idempotent.cli.exits import Refused

__all__ = ["Progress", "Table", "confirm", "lines", "plain", "print_json", "print_line", "span"]

_STYLES = {
    "completed": "green",
    "ok": "green",
    "failed": "yellow",
    "warning": "yellow",
    "unknown": "bold red",
    "unsafe": "bold red",
    "lapsed": "bold red",
    "running": "cyan",
}
"""Colours of words, where there is rich and a terminal."""


def plain(text: str) -> str:
    """`text` without what could steer a terminal: control characters are shown by their escapes."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def span(seconds: float) -> str:
    """A duration for people: "12 s", "3 min", "5 h", "2 d"."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _rich() -> Any:
    """The console of rich on standard output; None: it is not installed, or there is no terminal."""
    if not sys.stdout.isatty():
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(highlight=False)


class Table:
    """Lines in columns, printed as they come: the last column is as wide as it likes.

    Args:
        titles: the columns' titles.
        widths: how wide the columns but the last are at the least; a longer cell widens its column from then on.
        key: the number of the column whose word gives the line its colour.
    """

    def __init__(self, titles: Sequence[str], widths: Sequence[int], key: int = 0) -> None:
        self._titles = titles
        self._widths = [max(len(title), width) for title, width in zip(titles, widths, strict=False)]
        self._key = key
        self._console = _rich()
        self._begun = False

    def add(self, *cells: str) -> None:
        """Print one line, below the titles."""
        if not self._begun:
            self._begun = True
            self._print(self._titles, "bold")
        self._print([plain(cell) for cell in cells], None)

    def _print(self, cells: Sequence[str], style: str | None) -> None:
        for number, cell in enumerate(cells[:-1]):
            self._widths[number] = max(self._widths[number], len(cell))
        padded = [f"{cell:<{width}}  " for cell, width in zip(cells, self._widths, strict=False)] + [cells[-1]]
        if self._console is None:
            print("".join(padded).rstrip())
            return
        from rich.text import Text

        line = Text(no_wrap=True)
        for number, cell in enumerate(padded):
            word = "lapsed" if "lease over" in cell else cell.strip()
            line.append(cell, style or (_STYLES.get(word, "") if number == self._key else ""))
        self._console.print(line, soft_wrap=True)


def print_line(text: str) -> None:
    """One line of the answer, on standard output."""
    print(plain(text))


def print_json(value: Any) -> None:
    """One JSON document; an iterator becomes an array whose items are printed as they come, one a line."""
    if not isinstance(value, Iterator):
        print(json.dumps(value, indent=2))
        return
    print("[", end="")
    between = "\n"
    for item in value:
        print(between + json.dumps(item), end="")
        between = ",\n"
    print("\n]")


class Progress:
    """How far a long command has come: one line on standard error, where that is a terminal."""

    def __init__(self, doing: str) -> None:
        self._doing = doing
        self._shown = False
        self._next = time.monotonic() + 0.5
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()

    def tell(self, count: int) -> None:
        """So many are done."""
        now = time.monotonic()
        if self._terminal and now >= self._next:
            self._next = now + 0.2
            self._shown = True
            print(f"\r{self._doing}: {count:,}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for what is printed next."""
        if self._shown:
            self._shown = False
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def confirm(question: str, *, yes: bool) -> None:
    """Return if it is to be done: `yes`, or so answered at the terminal. Raises Refused."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refused(f"{question} There is no terminal to ask at; --yes does it without asking")
    print(f"{plain(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise Refused("nothing was changed")


def lines(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and what they are, one a line."""
    for name, value in pairs:
        print(f"{name:<12} {plain(value)}".rstrip())
