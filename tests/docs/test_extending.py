"""docs/extending.md is true: its rows are put into a copy of the package, and its blocks run there as one program."""

import re
import subprocess
import sys
from pathlib import Path

from moekit.testing.mutants.score import planted

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ROW = re.compile(r"<!-- add to moekit/(\S+) (after|before) (.*?) -->\n```python\n(.*?)```\n", re.S)


def test_the_page_runs():
    """Every row stands where the page says, every block runs, and the text that it ends with is what the page shows."""
    page = PAGE.read_text()
    rows = ROW.findall(page)
    assert {file for file, *_ in rows} == {
        "lang/elementwise.py", "lang/ops.py", "backends/triton.py", "backends/pallas.py"
    }  # fmt: skip
    with planted() as (folder, _):
        for file, where, line, row in rows:
            path = folder / "moekit" / file
            text = path.read_text()
            assert text.count(f"\n{line}") == 1, line
            at = text.index(f"\n{line}") + 1
            at = text.index("\n", at) + 1 if where == "after" else at
            path.write_text(text[:at] + row + text[at:])
        program = folder / "page.py"
        program.write_text("\n\n".join(re.findall(r"```python\n(.*?)```", ROW.sub("", page), re.S)))
        done = subprocess.run(
            [sys.executable, str(program)], cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, encoding="utf-8"
        )
    assert done.returncode == 0, done.stderr
    (shown,) = re.findall(r"```text\n(.*?)```", page, re.S)
    assert shown in done.stdout
