"""The README's Python blocks run, and its commands are what they say."""

import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from idempotent import _demo, configure, errors, idempotent
from idempotent.errors import IdempotencyError

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


PRINTED = [
    (before, text)
    for (language, before), (after, text) in itertools.pairwise(BLOCKS)
    if (language, after) == ("python", "text") and "print(" in before
]


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_what_a_block_is_said_to_print_it_prints(number: int, tmp_path: Path) -> None:
    code, text = PRINTED[number]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == text


def test_diagrams_are_among_them() -> None:
    assert [text.split(":")[0] for _, text in PRINTED][0] == "charge('o-1', 5)"
    assert len(PRINTED) >= 2


def test_the_first_screen_holds_exactly_two_commands() -> None:
    shell = [code.strip() for language, code in BLOCKS if language in ("sh", "bash", "console")]
    assert len(shell) == 2
    assert shell[0].endswith("-m idempotent demo")
    assert shell[1].endswith("-m pytest -n 2")
    assert README.index(shell[1]) < README.index("\n## ")


def test_every_row_of_the_retention_table_is_there() -> None:
    for row in ("| payments | 24–72 h |", "| orders, messages | 7–30 days |", "| general APIs | 24 h |"):
        assert row in README


def test_the_demos_table_is_what_the_demo_prints() -> None:
    (shown,) = [code.splitlines() for language, code in BLOCKS if language == "text" and "no protection" in code]
    assert shown[0] == next(_demo._table([]))
    rows = {
        name.strip(): list(map(float, cells.split())) for name, cells in ((row[:18], row[18:]) for row in shown[1:])
    }
    assert list(rows) == list(_demo.MODES.values())
    orders = rows["@idempotent"][1]
    for calls, charges, double, replays, *_ in rows.values():
        assert charges == orders + double
        assert calls == charges + replays + 1  # one call met the worker that was killed
    assert rows["@idempotent"][2] == rows["@idempotent"][4] == 0


def test_every_name_that_the_outcome_table_gives_is_an_error_of_ours() -> None:
    table = README.partition("## What callers see")[2].partition("The last column's")[0]
    words = set(re.findall(r"`([A-Z]\w+)`", table))
    missing = {name for name in errors.__all__ if issubclass(getattr(errors, name), IdempotencyError)} - words
    assert {name for name in words if not hasattr(errors, name)} == set()
    # Bases, what decoration and locks raise, and errors of a store that is set up wrongly.
    assert missing == {
        *("IdempotencyError", "CallError", "OutcomeError", "BackendError", "SerializationError"),
        *("LockError", "LockTimeout", "LockLost", "NotHeld"),
    }


def test_the_table_of_options_has_them_all() -> None:
    table = README.partition("\n## Options\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    one_by_one = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    alone = {name for row in rows if "○" in row for name in re.findall(r"`(\w+)`", row)}
    everywhere = set(inspect.signature(configure).parameters)
    assert one_by_one == {*inspect.signature(idempotent).parameters, *everywhere} - {"function"}
    assert alone == one_by_one - everywhere
