"""The mutants still fit the sources, and the numerical properties kill one of each stage and every kind of patch."""

from __future__ import annotations

import ast
import itertools
import json
import math
import shutil
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.errors import MoekitError
from moekit.fusions import FUSIONS
from moekit.testing.mutants import EQUIVALENT, HISTORICAL, TABLE, hunt, killer, mutate, score
from moekit.testing.mutants.killer import ARRAYS, RANDOM, SCHEDULED, SCHEDULES, STAGES, directed, problems, tasks
from moekit.testing.mutants.score import PACKAGE, Outcome, planted, stages_of
from moekit.testing.mutants.table import Mutant
from moekit.testing.probes import PROBES
from moekit.testing.random_graphs import WIDER
from moekit.testing.tasks import template

NAMED = {m.name: m for m in TABLE}

PATCH = """--- a/moekit/lang/elementwise.py
+++ b/moekit/lang/elementwise.py
@@ -{line},1 +{line},1 @@
-    ("max", "float32"): float("-inf"),
+    ("max", "float32"): 0.0,
"""


def test_the_documentation_has_their_number():
    text = (Path(__file__).parents[2] / "docs" / "fuzzing.md").read_text()
    assert f"`moekit mutants` plants {len(TABLE)} faults" in text


def test_there_are_enough_of_every_kind():
    assert len(NAMED) == len(TABLE) >= 60
    assert len(HISTORICAL) == 5
    for folder in ("compile/", "backends/triton", "backends/pallas"):
        assert sum(m.file.startswith(folder) for m in TABLE) >= 10


def test_what_changes_no_result_is_proven_and_not_counted():
    assert all(m.proof for m in EQUIVALENT)
    assert not {m.name for m in EQUIVALENT} & set(NAMED)
    assert not any(m.proof for m in TABLE)
    listed = CliRunner().invoke(cli, ["mutants", "--list"]).output
    assert all(f"not counted: {m.name}" in listed and m.proof in listed for m in EQUIVALENT)


@pytest.mark.parametrize("mutant", [*TABLE, *EQUIVALENT], ids=lambda m: m.name)
def test_it_fits_the_source(mutant, tmp_path):
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    shutil.copy(PACKAGE / mutant.file, tmp_path / mutant.file)
    mutate(mutant, tmp_path)
    changed = (tmp_path / mutant.file).read_text()
    assert changed != (PACKAGE / mutant.file).read_text()
    ast.parse(changed)


@pytest.mark.parametrize("name", ["no-mask-dynamic", "offsets-32-bit", "experts-past-256", "nan-is-padding",
                                  "row-stride-ignored", "pallas-step-lost"])  # fmt: skip
def test_it_is_killed(name):
    outcome = hunt(NAMED[name], seconds=60)
    assert outcome.killed, outcome
    assert outcome.cases < 10_000


def test_a_patch_from_outside(tmp_path):
    lines = (PACKAGE / "lang/elementwise.py").read_text().splitlines()
    number = lines.index('    ("max", "float32"): float("-inf"),') + 1
    patch = tmp_path / "theirs.patch"
    patch.write_text(PATCH.format(line=number))
    outcome = hunt(patch, seconds=60)
    assert outcome.killed
    assert outcome.file == "lang/elementwise.py"


def test_what_does_not_fit_is_said(tmp_path):
    (tmp_path / "bad.patch").write_text("no diff")
    gone = Mutant("gone", "compile/tile/program.py", (("no such text", ""),), "")
    for change, said in ((tmp_path / "bad.patch", "does not apply"), (gone, "write the mutant anew")):
        with pytest.raises(MoekitError, match=said), planted(change):
            pass


def test_stages_follow_from_the_files():
    assert stages_of(["backends/triton.py"]) == ("triton-interpreter",)
    assert stages_of(["backends/pallas.py"]) == ("pallas",)
    assert stages_of(["backends/pallas.py", "compile/passes/nest.py"])[0] == "interpret"
    assert stages_of(["backends/array.py"]) == stages_of(["backends/libraries.py"]) == ("numpy", "eager", "xla")
    assert stages_of(["torch/call.py", "backends/triton.py"]) == ("triton-interpreter", "eager")
    assert stages_of(["torch/overlap.py"]) == ("eager", "triton-interpreter")
    assert stages_of(["jax/view.py"]) == ("pallas", "xla")
    assert stages_of(["backends/printer.py"]) == ("triton-interpreter", "pallas")
    assert set(stages_of(["compile/passes/nest.py", "backends/array.py"])) == {*STAGES, *ARRAYS}
    assert "numpy" not in stages_of(["compile/passes/nest.py"])


def test_the_command_lists_them():
    done = CliRunner().invoke(cli, ["mutants", "--list"])
    assert done.exit_code == 0
    assert all(name in done.output for name in NAMED)
    assert CliRunner().invoke(cli, ["mutants", "no-such-mutant"]).exit_code == 2


@pytest.mark.parametrize("stage", [*STAGES, *ARRAYS])
def test_every_stage_has_cases_of_everything(stage):
    """Every fusion and probe before any comes again, random declarations of both kinds, every dtype, every mode of outputs."""
    first = [t.fusion for t in itertools.islice(tasks(stage), len(FUSIONS) + len(PROBES))]
    assert set(first) == {*FUSIONS, *PROBES}
    rounds = itertools.islice(tasks(stage), 3 * (len(FUSIONS) + len(PROBES) + RANDOM[stage]))
    asked = [template(task)[0] for task in rounds]
    numbers = {int(c.fusion.removeprefix("random:")) for c in asked if c.fusion.startswith("random:")}
    assert min(numbers) < WIDER < max(numbers)
    assert {d for c in asked for d in c.dtypes.values()} >= {"float32", "float16", "bfloat16"}
    assert {c.mode for c in asked} >= {"out", "in place", "plain"}


def test_directed_cases_end_and_hold():
    """The first few of each kind, on the package as it is."""
    assert [problems("numpy", attempt)[0] for attempt in itertools.islice(directed("numpy"), 40)] == [[]] * 40
    assert sum(1 for _ in directed("interpret")) > 500
    assert math.gcd(len(SCHEDULES), len(SCHEDULED)) == 1  # so that a diagonal meets every pair


def test_the_package_as_it_is_survives(monkeypatch):
    """One stage in a process of its own, all that can run here in this one."""
    monkeypatch.setattr(score, "stages_of", lambda files: ("numpy",))
    outcome = hunt(None, seconds=1)
    assert not outcome.killed, outcome
    assert outcome.cases > 4
    found = [killer.hunt(stage, 1) for stage in (*STAGES, *ARRAYS) if stage != "triton-interpreter"]
    assert not any(f["killed"] for f in found), found
    assert sum(f["ran"] for f in found) > 12


@pytest.fixture
def outcomes(monkeypatch):
    """Mutants whose end is known at once: those in the set survive, the package as it is has a cause of death or none."""
    surviving, cause = set(), []

    def made(name, killed, by=""):
        return Outcome(name, "compile/passes/nest.py", "about it", killed, "interpret" if killed else "", 7, 0.1, by)

    def ended(change, seconds):
        return made("unchanged", bool(cause), *cause) if change is None else made(change.name, change.name not in surviving)

    monkeypatch.setattr(score, "hunt", ended)
    return surviving, cause


def test_the_command_counts_writes_and_prints(outcomes, tmp_path):
    path = tmp_path / "found.json"
    done = CliRunner().invoke(cli, ["mutants", "--workers", "3", "--json-file", str(path)])
    assert done.exit_code == 0
    assert f"{len(TABLE)} of {len(TABLE)} killed (100.0 %)" in done.output
    assert f"{len(TABLE) + 1}/{len(TABLE) + 1} " in done.output
    found = json.loads(path.read_text())
    assert [o["name"] for o in found["outcomes"]] == list(NAMED)
    assert not found["unchanged"]["killed"]
    shown = CliRunner().invoke(cli, ["mutants", "--markdown", str(path)]).output.splitlines()
    assert shown[0].startswith("| mutant |")
    assert shown[2] == f"| {TABLE[0].name} | compile/passes/nest.py | interpret | 7 | about it |"
    assert len(shown) == len(TABLE) + 2


def test_survivors_and_a_failing_package_are_failures(outcomes):
    surviving, cause = outcomes
    surviving.add(TABLE[0].name)
    assert CliRunner().invoke(cli, ["mutants"]).exit_code == 0  # 74 of 75 are more than 98 %
    assert CliRunner().invoke(cli, ["mutants", "--historical"]).exit_code == 1
    surviving.clear()
    cause.append("add_rms_norm: wrong")
    done = CliRunner().invoke(cli, ["mutants"])
    assert done.exit_code == 1
    assert "add_rms_norm: wrong" in done.output
    assert CliRunner().invoke(cli, ["mutants", TABLE[0].name]).exit_code == 0  # a named one goes without


def test_several_at_a_time(monkeypatch):
    """Three workers meet: each waits for the others."""
    meeting = threading.Barrier(3, timeout=20)

    def try_one(mutant, seconds):
        meeting.wait()
        return Outcome(mutant.name, "", "", True, "interpret", 1, 0.0, "")

    monkeypatch.setattr(score, "hunt", try_one)
    assert [o.name for o in score.score_all(TABLE[:6], workers=3)] == [m.name for m in TABLE[:6]]
