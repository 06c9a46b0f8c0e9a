"""Statistics, tables and targets, for every benchmark."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks._work import DUPLICATES, UNSEEN

__all__ = ["Target", "commit", "jain", "judge", "machine", "met_or_missed", "quantile", "ratio_text", "say", "table"]


def say(text: str) -> None:
    """Tell of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` (0 to 1) of the values do not exceed, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1.0 if all have the same, 1/n if one has everything."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else 0.0


def ratio_text(ratios: Sequence[float]) -> str:
    """Median and quartiles."""
    low, middle, high = (quantile(ratios, share) for share in (0.25, 0.5, 0.75))
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows under their columns; the first is flush left, the others flush right."""
    lines = [("", *columns), *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    text = [title]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  " + "  ".join(cells).rstrip())
    return "\n".join(text)


@dataclass(frozen=True)
class Target:
    """A figure that is promised, and what was measured."""

    what: str
    measured: float | None
    """None: there is nobody to compare with."""
    sign: str
    """How `measured` must compare with `bound`: "<=", "<" or ">="."""
    bound: float

    @property
    def met(self) -> bool | None:
        """Whether it does; None: it is not asked."""
        if self.measured is None:
            return None
        compare = {
            "<=": self.measured <= self.bound,
            "<": self.measured < self.bound,
            ">=": self.measured >= self.bound,
        }
        return compare[self.sign]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "met": self.met}


def met_or_missed(targets: Sequence[Target]) -> str:
    """The table of all targets."""
    words = {True: "met", False: "MISSED", None: "not asked"}
    rows = [
        (
            target.what,
            "-" if target.measured is None else f"{target.measured:.3g}",
            f"{target.sign} {target.bound:g}",
            words[target.met],
        )
        for target in targets
    ]
    return table("Targets", ("measured", "target", ""), rows)


def judge(sections: dict[str, Any]) -> None:
    """Put beside the calls of each peer what the storms of the same run, store and colour say of it, as "duplicates".

    Who was in none of them, as floors are, has no verdict.
    """
    for title, one in sections.get("calls", {}).items():
        storms = [
            storm["peers"]
            for name, storm in sections.get("storms", {}).items()
            if name.rpartition(", ")[0] == title.rpartition(", ")[0]
        ]
        one["duplicates"] = {}
        for name in one["kinds"]["replay"]:
            peer = name.removesuffix(UNSEEN)
            own = [peers[peer] for peers in storms if peer in peers]
            if own:
                one["duplicates"][name] = {
                    "runs": [runs for each in own for runs in each["runs"]],
                    "errors": [DUPLICATES - answers for each in own for answers in each["answers"]],
                    "correct": all(each["correct"] for each in own),
                }


def _cpu_model() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def commit(folder: Path = Path(__file__).parent.parent) -> str | None:
    """What git calls the code in its checkout `folder`, with "-dirty" behind it if files differ; None: it is no checkout."""
    answers = []
    for command in ("rev-parse --show-toplevel", "rev-parse HEAD", "status --porcelain --untracked-files=no"):
        try:
            done = subprocess.run(["git", *command.split()], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(done.stdout.strip())
    top, head, changed = answers
    if Path(top).resolve() != folder.resolve():  # it lies in somebody else's
        return None
    return head + "-dirty" * bool(changed)


def machine(*packages: str) -> dict[str, str]:
    """What this runs on, and the versions of the packages that are compared."""
    kernel = platform.release().partition("-")[0]
    found = {
        "system": f"{platform.system()} {kernel} {platform.machine()}",
        "cpus": f"{os.cpu_count()} x {_cpu_model()}",
    }
    found["python"] = platform.python_version()
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
