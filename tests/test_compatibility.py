"""docs/compatibility.md says what keeps working, docs/libraries.md what other libraries need. Every
row of their tables names a test, and the test is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def named_tests(text: str) -> list[str]:
    """The last column of the table."""
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    return [re.search(r"`([^`]+)`(?: \*)? \|$", row).group(1) for row in rows]


@pytest.mark.parametrize(("page", "rows"), [("compatibility", 40), ("libraries", 20)])
def test_every_row_of_the_table_is_a_test(page, rows):
    tests = [f"tests/{name}" for name in named_tests((ROOT / f"docs/{page}.md").read_text())]
    assert len(tests) > rows and len(set(tests)) == len(tests)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
