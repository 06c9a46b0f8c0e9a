"""The picture of a run: what `python -m benchmarks --json FILE` wrote, as an SVG.

python -m benchmarks.plot FILE [SVG]

A panel for each store and colour with the ratios of first calls and replays to the store's floor, and one for each storm
with the milliseconds until the last of 200 duplicates has its answer, all on a logarithmic scale. Hatched and WRONG is a
peer that failed a storm: that one, or, beside calls, any of the same store and colour. One whose function never ran has
"-" and no bar.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._report import judge
from benchmarks._work import UNSEEN

__all__ = ["drawn"]

_WIDTH, _PANEL, _LABEL, _WORDS, _ROW = 1220, 600, 210, 240, 15
_INK, _QUIET, _OURS, _FIRST, _REPLAY = "#222", "#888", "#0b5", "#8ab", "#357"

_KEY = "logarithmic scale, each panel's own; dotted line: 1; green: ours; hatched: WRONG in a storm of 200 duplicates"

_HATCHED = "url(#wrong)"
_HATCH = (
    f'<defs><pattern id="wrong" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    f'<rect width="4" height="4" fill="#ddd"/><rect width="1.5" height="4" fill="{_QUIET}"/></pattern></defs>'
)

Bar = tuple[str, float | None, str, str]
"""Label, value, colour, text beside it; no value, no bar."""


def drawn(found: dict[str, Any]) -> str:
    """The SVG of a run."""
    judge(found["sections"])
    panels = [*_call_panels(found["sections"].get("calls", {})), *_storm_panels(found["sections"].get("storms", {}))]
    told = {"commit": found.get("commit")} | found["machine"]
    about = ", ".join(f"{name} {value}" for name, value in told.items() if value not in (None, "not installed"))
    words = [f"python -m benchmarks{' --quick' if found['quick'] else ''}: {about}"]
    while len(words[-1]) > 150:  # no line wraps in an SVG
        cut = words[-1].rfind(", ", 0, 150) + 2
        words[-1:] = [words[-1][:cut], words[-1][cut:]]
    words.append(_KEY)
    parts: list[str] = []
    tops = [26 + 12 * len(words)] * 2
    for title, bars in panels:
        column = tops.index(min(tops))
        left, top = 10 + column * (_PANEL + 10), tops[column]
        parts.append(_panel(title, bars, left, top))
        tops[column] = top + (len(bars) + 3) * _ROW
    height = max(tops) + 20
    head = "".join(_text(10, 14 + 12 * number, line, _QUIET, size=9) for number, line in enumerate(words))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="sans-serif"><rect width="100%" height="100%" fill="#fff"/>\n{_HATCH}\n{head}\n'
        + "\n".join(parts)
        + "</svg>\n"
    )


def _call_panels(calls: dict[str, Any]) -> list[tuple[str, list[Bar]]]:
    panels = []
    for title, one in calls.items():
        bars: list[Bar] = []
        kinds = one["kinds"]
        for name in sorted(kinds["replay"], key=lambda name: kinds["replay"][name]["ratio"][1]):
            for kind, colour in (("first", _FIRST), ("replay", _REPLAY)):
                if name not in kinds[kind]:
                    continue
                ratio = kinds[kind][name]["ratio"][1]
                right = one["duplicates"].get(name, {"correct": True})["correct"]
                shade = _HATCHED if not right else _OURS if name.startswith("idempotent") else colour
                label = name if name.endswith(UNSEEN) else f"{name}, {kind}"
                bars.append((label, ratio, shade, f"{ratio:.2f}" + " WRONG" * (not right)))
        panels.append((f"{title}: ratio to {one['floor']}", bars))
    return panels


def _storm_panels(storms: dict[str, Any]) -> list[tuple[str, list[Bar]]]:
    panels = []
    for title, one in storms.items():
        bars: list[Bar] = []
        for name, own in one["peers"].items():
            wait = median(own["last_ms"]) if own["last_ms"] else None
            runs, answers = max(own["runs"]), min(own["answers"])
            colour = _HATCHED if not own["correct"] else _OURS if name == "idempotent" else _REPLAY
            time = "-" if wait is None else f"{wait:.1f} ms"
            commands = f", {median(own['commands']):.0f} commands" if own["commands"] else ""
            wrong = "" if own["correct"] else f" WRONG: ran {runs} x, {answers} answers"
            bars.append((name, wait, colour, time + commands + wrong))
        bars.sort(key=lambda bar: math.inf if bar[1] is None else bar[1])
        panels.append((f"Storm, {title} duplicates: ms to the last answer", bars))
    return panels


def _panel(title: str, bars: Sequence[Bar], left: int, top: int) -> str:
    """Bars on a logarithmic scale, from a tenth of a decade below the least."""
    parts = [_text(left, top, title, _INK, size=11, bold=True)]
    values = [None if value is None else math.log10(max(value, 1e-3)) for _, value, _, _ in bars]
    known = [value for value in values if value is not None]
    low, high = min([*known, 0.0]) - 0.1, max([*known, 0.3])
    room = _PANEL - _LABEL - _WORDS
    for number, ((label, _, colour, words), value) in enumerate(zip(bars, values, strict=False), 1):
        y = top + number * _ROW
        width = 0.0 if value is None else max(1.0, (value - low) / (high - low) * room)
        parts.append(_text(left + _LABEL - 6, y + 4, label, _INK, size=9, end=True))
        if width:
            parts.append(f'<rect x="{left + _LABEL}" y="{y - 5}" width="{width:.1f}" height="10" fill="{colour}"/>')
        parts.append(_text(int(left + _LABEL + width + 4), y + 4, words, _INK, size=9))
    one = left + _LABEL + (0.0 - low) / (high - low) * room
    bottom = top + len(bars) * _ROW + 8
    parts.append(
        f'<line x1="{one:.1f}" x2="{one:.1f}" y1="{top + 6}" y2="{bottom}" stroke="{_QUIET}" stroke-dasharray="2 2"/>'
    )
    return "\n".join(parts)


def _text(x: int, y: int, words: str, colour: str, *, size: int, bold: bool = False, end: bool = False) -> str:
    more = ' font-weight="bold"' * bold + ' text-anchor="end"' * end
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}"{more}>{escape(words)}</text>'


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="what --json wrote")
    parser.add_argument("svg", type=Path, nargs="?", help="default: beside it, with the suffix .svg")
    options = parser.parse_args(arguments)
    target = options.svg or options.file.with_suffix(".svg")
    target.write_text(drawn(json.loads(options.file.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
