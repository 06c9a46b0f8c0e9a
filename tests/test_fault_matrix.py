"""The README's table of injected faults: every fault has its row, and every test that it names is there."""

import re
from pathlib import Path

HERE = Path(__file__).parent
SECTION = (HERE.parent / "README.md").read_text("utf-8").partition("### Faults that are injected in CI")[2]
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| ([^|]+) \|$", SECTION, re.MULTILINE)

FAULTS = [
    *("request or reply cut at a byte", "server frozen", "writes stall", "connections killed", "script cache lost"),
    *("server killed and restarted", "failover", "read-only node", "memory full, eviction", "disk full"),
    *("server busy with a script", "worker killed at each step", "worker frozen past its lease", "clock steps"),
    *("network partition", "SQL contention", "pool and limits", "cancellation, Ctrl-C", "fork, closed loop, exit"),
]


def named(cell: str) -> list[tuple[str, str]]:
    """The pairs of a file and a test that a cell names."""
    pairs = []
    for part in cell.split("; "):
        files, _, tests = part.rpartition(": ")
        pairs += [(file, test) for file in re.findall(r"`(\w+\.py)`", files) for test in re.findall(r"`(\w+)`", tests)]
    return pairs


def test_every_fault_has_its_row() -> None:
    assert [fault for fault, _ in ROWS if fault != "fault"] == FAULTS


def test_every_test_that_a_row_names_exists() -> None:
    missing = []
    for fault, cell in ROWS:
        if fault == "fault":
            continue
        assert named(cell), fault
        assert len({test for _, test in named(cell)}) == len(set(re.findall(r"`(test_\w+)`", cell))), fault
        for file, test in named(cell):
            if not re.search(rf"^def {test}\(", (HERE / file).read_text("utf-8"), re.MULTILINE):
                missing.append(f"{fault}: {file}::{test}")
    assert missing == []
