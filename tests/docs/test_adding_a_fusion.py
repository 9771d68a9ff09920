"""docs/adding_a_fusion.md is true: its code runs, block after block, as one file."""

import re
from pathlib import Path

from moekit.testing import check

PAGE = Path(__file__).parents[2] / "docs" / "adding_a_fusion.md"


def test_the_page_runs(tmp_path, capsys):
    """Every block runs; the class it ends with is the suite, of which the cases that need no compilation are run here."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    path = tmp_path / "page.py"
    path.write_text("\n\n".join(blocks))
    names: dict = {"__name__": "page"}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert "def sigmoid_router_kernel(" in capsys.readouterr().out
    suite = names["TestSigmoidRouter"]
    for case in suite.every_case():
        for implementation in ("interpret", "numpy", "eager"):
            if suite.serves(implementation, case):
                check(implementation, case.case)
