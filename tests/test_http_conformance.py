"""The README's conformance table names tests that there are."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
README = (TESTS.parent / "README.md").read_text("utf-8")
TABLE = README.partition("### Conformance\n")[2].partition("\n## ")[0]
ROWS = [line.split(" | ") for line in TABLE.splitlines() if re.match(r"\| \d", line)]


def test_each_requirement_has_tests_and_each_of_them_is_there() -> None:
    defined = {
        name
        for path in TESTS.glob("test_http_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text("utf-8"), re.MULTILINE)
    }
    assert len(ROWS) >= 19
    for section, requirement, tests in ROWS:
        named = re.findall(r"`(test_\w+)`", tests)
        assert named, f"{section}: {requirement}"
        assert set(named) <= defined, f"{section}: {requirement}"


def test_every_section_with_requirements_is_in_the_table() -> None:
    assert {row[0].strip("| ") for row in ROWS} == {"2.1", "2.2", "2.3", "2.4", "2.5", "2.6", "2.7", "5"}
