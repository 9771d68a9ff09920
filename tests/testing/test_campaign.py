"""Campaigns: deterministic, complete in their counting, and alive after a worker's death."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.errors import UnavailableError
from moekit.testing import campaign
from moekit.testing.case import FuzzCase, Layout
from moekit.testing.coverage import Coverage, cell, tail
from moekit.testing.executors import executor
from moekit.testing.regressions import Regression, append, load, pasteable
from moekit.testing.shrink import shrink
from moekit.testing.tasks import Task, cases, run_task

CASE = FuzzCase("silu_and_mul", {"T": 9, "I": 40}, {"gate_up": "float16"}, recipe="special", seed=5,
                layouts={"gate_up": Layout("padded", (0, 1), (0, 0), (1, 1), (0, 3))})  # fmt: skip


def broken(gate_up):
    """silu_and_mul that is wrong from the third token on, and kills its process at 16 tokens."""
    if gate_up.shape[0] == 16:
        os._exit(3)
    half = gate_up.shape[1] // 2
    gate, up = gate_up[:, :half].float(), gate_up[:, half:].float()
    out = gate.sigmoid() * gate * up
    out[2:] += 1.0
    return out.to(gate_up.dtype)


def test_a_task_is_the_same_every_time():
    task = Task("add_rms_norm", "interpret", 3, 1, 2, 2, 2)
    assert cases(task) == cases(task)
    assert [c for half in task.halves() for g in cases(half) for c in g] == [c for g in cases(task) for c in g] * 2


def test_a_task_runs_and_counts():
    report = run_task(Task("silu_and_mul", "numpy", 0, 0, 0, 3, 4))
    assert report.coverage.ran == 12
    assert not report.failures
    assert sum(report.coverage.cells.values()) == report.coverage.full + report.coverage.edges


def test_cells_name_dtype_layouts_and_tail():
    assert cell(CASE)[1:3] == ("float16", "gate_up padded, out dense")
    assert tail(CASE) in ("both", "static", "tokens")


def test_edges_count_up_to_their_quota():
    coverage = Coverage(full=100, edges=50)
    assert coverage.counted == 105


def test_a_campaign_survives_a_worker_that_dies():
    name = f"{__name__}:broken" if "." not in __name__ else "tests.testing.test_campaign:broken"
    plan = campaign.Plan(["silu_and_mul"], [name], seed=1, examples=400, workers=1, combos=2, groups=6, layouts=2)
    result = campaign.run(plan)
    texts = [p for f in result.failures for p in f.problems]
    assert any("out of bounds" in t for t in texts)
    assert any("died with exit code 3" in t for t in texts)
    assert all(f.case.sizes["T"] == 16 for f in result.failures if "died" in f.problems[0])


def test_shrinking_finds_the_first_wrong_token():
    name = "tests.testing.test_campaign:broken"
    found = shrink(FuzzCase.from_json(CASE.to_json()), lambda c: c.sizes["T"] != 16 and bool(campaign.replay(c, name)))
    assert found.sizes == {"T": 3, "I": 1}
    assert not found.layouts


def test_regressions_come_back(tmp_path):
    regression = Regression(CASE, "interpret", ("wrong",), "a note")
    append(tmp_path, regression)
    path = append(tmp_path, regression)
    assert load(path) == load(tmp_path) == [regression]
    names: dict = {}
    exec(pasteable(CASE, "interpret"), names)
    names["test_silu_and_mul_interpret"]()


def test_an_implementation_that_is_none():
    with pytest.raises(UnavailableError):
        executor("cobol")


def run(*arguments: str):
    return CliRunner().invoke(cli, ["fuzz", *arguments])


def test_the_command_in_json(tmp_path):
    done = run("silu_and_mul", "--impl", "numpy", "--examples", "40", "--workers", "1", "--combos", "2", "--batch", "2",
               "--json", "--json-file", str(tmp_path / "out.json"))  # fmt: skip
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["counted"] >= 40
    assert written["failed"] == 0
    assert written["by_cell"]["numpy"]


def test_the_command_reports_failures(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    done = run("silu_and_mul", "--impl", "tests.testing.test_campaign:broken", "--examples", "50", "--workers", "1",
               "--combos", "1", "--batch", "1", "--save", str(kept))  # fmt: skip
    assert done.exit_code == 1
    assert "def test_silu_and_mul" in done.output
    assert load(kept)
    again = run("--replay", str(kept))
    assert again.exit_code == 1


def test_replay(tmp_path):
    append(tmp_path, Regression(CASE, "interpret", ()))
    done = run("--replay", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    (tmp_path / "bad.json").write_text('{"no": "case"}')
    assert run("--replay", str(tmp_path / "bad.json")).exit_code == 2


@pytest.mark.parametrize(("arguments", "code"), [(("nothing",), 3), (("--impl", "cobol"), 2), (("--what",), 2),
                                                 (("--impl", "no_module:f"), 3)])  # fmt: skip
def test_exit_codes(arguments, code):
    assert run(*arguments).exit_code == code
