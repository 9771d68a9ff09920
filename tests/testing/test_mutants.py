"""The mutants still fit the sources, and the numerical properties kill one of each stage and every kind of patch."""

from __future__ import annotations

import ast
import shutil

import pytest
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.errors import MoekitError
from moekit.testing.mutants import HISTORICAL, TABLE, mutate, try_mutant
from moekit.testing.mutants.score import PACKAGE, apply_patch, copy_package, stages_of, try_patch
from moekit.testing.mutants.table import Mutant

NAMED = {m.name: m for m in TABLE}

PATCH = """--- a/moekit/compile/reductions.py
+++ b/moekit/compile/reductions.py
@@ -{line},1 +{line},1 @@
-    ("max", "float32"): float("-inf"),
+    ("max", "float32"): 0.0,
"""


def test_there_are_enough_of_every_kind():
    assert len(NAMED) == len(TABLE) >= 60
    assert len(HISTORICAL) == 5
    for folder in ("compile/", "backends/triton", "backends/pallas"):
        assert sum(m.file.startswith(folder) for m in TABLE) >= 10


@pytest.mark.parametrize("name", NAMED)
def test_it_fits_the_source(name, tmp_path):
    mutant = NAMED[name]
    (tmp_path / mutant.file).parent.mkdir(parents=True)
    shutil.copy(PACKAGE / mutant.file, tmp_path / mutant.file)
    mutate(mutant, tmp_path)
    changed = (tmp_path / mutant.file).read_text()
    assert changed != (PACKAGE / mutant.file).read_text()
    ast.parse(changed)


@pytest.mark.parametrize("name", ["no-mask-dynamic", "offsets-32-bit", "experts-past-256", "nan-is-padding",
                                  "row-stride-ignored", "pallas-step-lost"])  # fmt: skip
def test_it_is_killed(name):
    outcome = try_mutant(NAMED[name], seconds=60)
    assert outcome.killed, outcome
    assert outcome.cases < 10_000


def test_a_patch_from_outside(tmp_path):
    lines = (PACKAGE / "compile/reductions.py").read_text().splitlines()
    number = lines.index('    ("max", "float32"): float("-inf"),') + 1
    patch = tmp_path / "theirs.patch"
    patch.write_text(PATCH.format(line=number))
    outcome = try_patch(patch, seconds=60)
    assert outcome.killed
    assert outcome.file == "compile/reductions.py"


def test_what_does_not_fit_is_said(tmp_path):
    copy_package(tmp_path)
    (tmp_path / "bad.patch").write_text("no diff")
    with pytest.raises(MoekitError, match="does not apply"):
        apply_patch(tmp_path / "bad.patch", tmp_path)
    with pytest.raises(MoekitError, match="write the mutant anew"):
        mutate(Mutant("gone", "compile/tile.py", (("no such text", ""),), ""), tmp_path / "moekit")


def test_stages_follow_from_the_files():
    assert stages_of(["backends/triton.py"]) == ("triton-interpreter",)
    assert stages_of(["backends/pallas.py"]) == ("pallas",)
    assert stages_of(["backends/pallas.py", "compile/lower.py"])[0] == "interpret"


def test_the_command_lists_them():
    done = CliRunner().invoke(cli, ["mutants", "--list"])
    assert done.exit_code == 0
    assert all(name in done.output for name in NAMED)
    assert CliRunner().invoke(cli, ["mutants", "no-such-mutant"]).exit_code == 2
