"""bench/compare.py on files made up here."""

import pytest

from bench.common import write
from bench.compare import main


@pytest.fixture
def files(tmp_path):
    """Write rows as two result files and compare them."""

    def compare(before: list[dict], after: list[dict], *options: str) -> int:
        for name, rows in (("before", before), ("after", after)):
            write(tmp_path / f"{name}.json", {"device": "NVIDIA H200", "rows": rows})
        return main([str(tmp_path / "before.json"), str(tmp_path / "after.json"), *options])

    return compare


def row(us: float | None, side: str = "moekit", spread: float = 0.01, t: int = 1) -> dict:
    """A measured row; without a time, one that failed."""
    measured = {"problem": "out of resources"} if us is None else {"us": us, "spread": spread}
    return {"case": "silu_and_mul 64", "T": t, "dtype": "bfloat16", "side": side, "error": 0.9} | measured


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [
        (row(2.0), row(2.0), 0),
        (row(2.0), row(2.05), 0),  # within the tolerance
        (row(2.0), row(2.2), 1),
        (row(2.0), row(1.5), 0),  # faster
        (row(2.0, spread=0.2), row(2.2, spread=0.1), 0),  # beyond the tolerance, within the spreads
        (row(2.0, spread=0.05), row(2.2, spread=0.05), 1),
        (row(2.0), row(None), 1),  # it no longer runs
        (row(None), row(2.0), 0),
        (row(None), row(None), 0),
        (row(2.0, "liger"), row(9.0, "liger"), 0),  # a peer's time is no regression of ours
    ],
)
def test_exit_code(files, before, after, code):
    """1 exactly where ours became slower beyond noise."""
    assert files([before], [after]) == code


def test_rows_are_matched_by_what_they_are_of(files, capsys):
    """Another T is another row; a row that one file lacks is left out; without any in common the code is 2."""
    assert files([row(2.0, t=1), row(5.0, t=16)], [row(5.0, t=16), row(9.0, t=64)], "--all") == 0
    assert "1 rows in both" in capsys.readouterr().out
    assert files([row(2.0, t=1)], [row(2.0, t=16)]) == 2


def test_options(files, capsys):
    """A wider tolerance, and the sides that count."""
    assert files([row(2.0)], [row(2.2)], "--tolerance", "0.2") == 0
    assert files([row(2.0, "liger")], [row(9.0, "liger")], "--side", "liger") == 1
    assert "slower" in capsys.readouterr().out
