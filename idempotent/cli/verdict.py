"""What `doctor` finds, and what it makes of it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from idempotent.cli.exits import DONE, NOT_SAFE, RETRIES_ONLY

__all__ = ["CODES", "Finding", "Level", "Verdict", "clock", "verdict_of"]

Level = Literal["ok", "note", "warning", "unsafe"]
"""What a finding does to the verdict: nothing, nothing, "safe for retries" at the best, "not safe"."""

Verdict = Literal["safe for money", "safe for retries", "not safe"]

CODES: dict[Verdict, int] = {"safe for money": DONE, "safe for retries": RETRIES_ONLY, "not safe": NOT_SAFE}


class Finding(NamedTuple):
    """One thing that was looked at."""

    check: str
    level: Level
    found: str
    why: str = ""
    """What it may lead to; "": nothing."""
    remedy: str = ""
    """What to do about it; "": nothing."""


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """What the findings amount to.

    Safe for money: nothing that was found can make a recorded outcome or a claim disappear before its time.
    Safe for retries: records can be lost in a crash or a failover; until then duplicates are answered.
    Not safe: records disappear, or cannot be kept, while everything seems to run.
    """
    levels = {finding.level for finding in findings}
    if "unsafe" in levels:
        return "not safe"
    return "safe for retries" if "warning" in levels else "safe for money"


def clock(off: float) -> Finding:
    """How far the server's clock is from this machine's. It alone decides when leases end, so it need not agree."""
    found = f"{abs(off):.1f} s {'ahead of' if off > 0 else 'behind'} this machine's"
    if abs(off) <= 1:
        return Finding("clock", "ok", "within a second of this machine's")
    why = "leases and tokens follow the server's clock alone, so nothing breaks; times in logs will not agree"
    return Finding("clock", "note", found, why, "let both follow NTP")
