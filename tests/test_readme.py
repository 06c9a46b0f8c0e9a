"""The README's Python blocks run, and its commands are what they say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_a_block_runs_as_it_stands(number: int, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(PYTHON[number], "utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_first_screen_holds_exactly_two_commands() -> None:
    shell = [code.strip() for language, code in BLOCKS if language in ("sh", "bash", "console")]
    assert len(shell) == 2
    assert shell[0].endswith("-m idempotent demo")
    assert shell[1].endswith("-m pytest")
    assert README.index(shell[1]) < README.index("\n## ")


def test_every_row_of_the_retention_table_is_there() -> None:
    for row in ("| payments | 24–72 h |", "| orders, messages | 7–30 days |", "| general APIs | 24 h |"):
        assert row in README
