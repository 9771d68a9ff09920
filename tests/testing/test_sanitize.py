"""The pass under compute-sanitizer: what it covers, that it runs, and that silence is not taken for success."""

import json
import stat
import sys
from collections import Counter

import pytest

from moekit.cli import platform
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS
from moekit.testing import gpu_pass, sanitize
from moekit.testing.executors import FRONT, SHORT, executor
from moekit.testing.gpu_pass import COMPILED, KINDS, cases, cell, counted, mark
from moekit.testing.oracle import Oracle
from moekit.testing.schedules import variants

EVERY = list(cases())

NAMED = {"expert_gate_up": {"rows"}, "unit_lower_inverse": {"dots", "rows", "whole"}}  # that are small enough in smaller sizes

FAKE = """#!{python}
import json, os, sys
tool, log = sys.argv[sys.argv.index("--tool") + 1], sys.argv[sys.argv.index("--log-file") + 1]
line = "RACECHECK SUMMARY: {{}} hazard displayed" if tool == "racecheck" else "ERROR SUMMARY: {{}} errors"
rest = sys.argv[sys.argv.index("moekit.testing.gpu_pass") + 1:]
if rest == ["control"] and os.environ.get("FAKE_SKIP") == "control":
    sys.exit(1)
if rest == ["control"]:
    open(log, "w").write(line.format(os.environ.get("FAKE_CONTROL", 1)))
    sys.exit(99)
errors, skip = int(os.environ.get("FAKE_ERRORS", 0)), os.environ.get("FAKE_SKIP", "nothing")
if skip == "summary":
    sys.exit(0)
open(log, "w").write(line.format(errors))
cells, most = {{}}, int(os.environ.get("FAKE_MOST", 10**6))
mine = [e for e in json.load(open(os.environ["FAKE_CELLS"])) if e[0] in rest[0].split(",")]
for _, name, mark in mine[int(rest[1]) - 1 :: int(rest[2])]:
    taken = os.path.join(rest[3], mark)
    if sum(cells.values()) < most and not os.path.exists(taken):
        open(taken, "x").write(os.path.basename(rest[4]))
        if not name.startswith(skip):
            cells[name] = cells.get(name, 0) + 1
if skip != "report":
    report = {{"cases": sum(cells.values()), "doors": {{"triton front": 1}}, "cells": cells, "problems": [], "slow": []}}
    with open(rest[4], "w") as file:
        json.dump(report, file)
sys.exit(99 if errors else 0)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A program called compute-sanitizer that says what the environment tells it to."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(FAKE.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("FAKE_CELLS", str(tmp_path / "cells.json"))
    (tmp_path / "cells.json").write_text(json.dumps([(c.fusion, cell(i, c), mark(i, c)) for i, c in EVERY]))
    monkeypatch.setattr(platform, "gpu_count", lambda: 1)
    monkeypatch.setattr(sanitize, "cases", lambda names: [e for e in EVERY if e[1].fusion in names])
    return lambda *more: sanitize.main(["--workers", "1", "--tool", "memcheck", "--folder", str(tmp_path / "logs"), *more])


def test_it_covers_every_fusion_dtype_layout_and_schedule():
    cells = Counter(cell(i, c) for i, c in EVERY)
    for implementation in ("triton", "pallas"):
        for name, fusion in FUSIONS.items():
            mine = [c for i, c in EVERY if (i, c.fusion) == (implementation, name)]
            own = [d for d in FLOATS if any(d in s.dtypes for s in fusion.tensors.values())] or FLOATS[:1]
            assert all(cells[f"{implementation} {name} {d}"] >= 3 for d in own)
            assert {c.layout(n).kind for c in mine for n in c.memory()} == set(KINDS)
            assert {c.schedule for c in mine} >= set(variants(mine[0].graph))
            assert {c.schedule for c in mine} >= NAMED.get(name, set())
            assert {c.mode for c in mine} >= {"out", "plain"}
            assert any(s.role == "InOut" for s in fusion.tensors.values()) == any(c.mode == "in place" for c in mine)
    assert not [c.problem() for _, c in EVERY if c.problem()]
    assert {c.params["block"] for _, c in EVERY if c.fusion == "experts"} == {1, 16}


@pytest.mark.parametrize("kind", list(KINDS))
def test_views_lie_as_the_layout_says(kind):
    mine = [c for i, c in EVERY if (i, c.fusion) == ("pallas", "silu_and_mul") and c.layout("gate_up").kind == kind]
    outcome, launched = counted(executor("pallas"), mine[0])
    assert not Oracle.of(mine[0], "pallas").compare(outcome.outputs).problems
    assert launched[COMPILED] > 0


def test_both_doors_are_counted(monkeypatch):
    from moekit.testing import executors
    from moekit.torch import fast, launch

    monkeypatch.setattr(launch, "_start", lambda one, tensors: "kernel")
    monkeypatch.setattr(fast, "_launch", lambda entry, pointers: None)
    monkeypatch.setattr(executors, "launches", Counter())
    executors.Torch("triton", "triton", "cpu")
    assert launch._start(None, {}) == "kernel"
    fast._launch(type("Entry", (), {"ready": (1, 2)}), [])
    assert executors.launches == {FRONT: 1, SHORT: 2, "triton": 3}


def test_clean(fake, tmp_path, capsys):
    assert fake("--json-file", str(tmp_path / "found.json")) == 0
    assert "memcheck: clean" in capsys.readouterr().out
    assert json.loads((tmp_path / "found.json").read_text())[0]["cases"] == len(EVERY)


def test_parts_make_the_whole(fake, tmp_path):
    """Three parts are together every case once."""
    found = Counter()
    for part in ("1/3", "2/3", "3/3"):
        assert fake("--part", part, "--json-file", str(tmp_path / "found.json")) == 0
        found.update(json.loads((tmp_path / "found.json").read_text())[0]["cells"])
    assert found == Counter(cell(i, c) for i, c in EVERY)


def test_what_there_was_no_time_for_is_no_success_and_is_run_by_the_next(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FAKE_MOST", "1000")
    ends, found = [], Counter()
    for _ in range(-(-len(EVERY) // 1000)):
        ends.append(fake("--json-file", str(tmp_path / "found.json")))
        found.update(json.loads((tmp_path / "found.json").read_text())[0]["cells"])
    assert ends == [1] * (len(ends) - 1) + [0]
    assert found == Counter(cell(i, c) for i, c in EVERY)
    assert f"{len(EVERY) - 1000} of {len(EVERY)} cases are left; the same command with --folder" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"FAKE_ERRORS": "2"}, {"FAKE_SKIP": "report"}, {"FAKE_SKIP": "summary"}])
def test_what_was_wrong_is_run_again(fake, tmp_path, monkeypatch, wrong):
    """A second run with one's folder is no success for what the first had found, nor for what its processes left undone."""
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    assert [fake("gate_gemm"), fake("gate_gemm")] == [1, 1]
    for name in wrong:
        monkeypatch.delenv(name)
    assert fake("gate_gemm", "--json-file", str(tmp_path / "found.json")) == 0
    found = json.loads((tmp_path / "found.json").read_text())[0]["cells"]
    assert Counter(found) == Counter(cell(i, c) for i, c in EVERY if c.fusion == "gate_gemm")


def test_a_run_of_nothing_is_no_success(fake, capsys):
    assert [fake("gate_gemm"), fake("gate_gemm")] == [0, 1]
    assert "no case ran; earlier runs with" in capsys.readouterr().out


def test_an_earlier_control_does_not_speak_for_a_later_one(fake, monkeypatch, capsys):
    assert fake("gate_gemm") == 0
    monkeypatch.setenv("FAKE_SKIP", "control")
    assert fake("gate_topk") == 1
    assert "it did not find the planted fault" in capsys.readouterr().out


def test_a_share_ends_after_its_time_and_takes_what_no_other_took(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu_pass, "counted", lambda made, case: ran.append(case) or counted(made, case))
    mine = [e for e in EVERY if e[0] == "pallas" and e[1].fusion == "silu_and_mul"][:4]
    (tmp_path / mark(*mine[1])).touch()
    reports = [gpu_pass.run_share(mine, tmp_path, seconds) for seconds in (0, 600, 600)]
    assert [r["cases"] for r in reports] == [1, 2, 0]
    assert ran == [mine[i][1] for i in (0, 2, 3)]
    assert len(reports[1]["slow"]) == 2


def test_some_fusions_alone(fake, tmp_path):
    mine = Counter(cell(i, c) for i, c in EVERY if c.fusion in ("gate_gemm", "probe_round"))
    assert fake("gate_gemm", "probe_round", "--json-file", str(tmp_path / "found.json")) == 0
    assert Counter(json.loads((tmp_path / "found.json").read_text())[0]["cells"]) == mine
    assert list(cases(["gate_gemm"])) == [e for e in EVERY if e[1].fusion == "gate_gemm"]
    with pytest.raises(SystemExit):
        fake("gate_gem")


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b"])
def test_what_is_no_part_is_refused(fake, part, capsys):
    with pytest.raises(SystemExit):
        fake("--part", part)
    assert f"{part} is no part; give I/N with I from 1 to N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (("FAKE_CONTROL", "0"), "did not find the planted fault"),
        (("FAKE_ERRORS", "3"), "3 found"),
        (("FAKE_SKIP", "pallas gate_gemm"), "no kernel ran for pallas gate_gemm bfloat16"),
        (("FAKE_SKIP", "report"), "its share did not end"),
        (("FAKE_SKIP", "summary"), "has no summary"),
    ],
)
def test_silence_is_no_success(fake, monkeypatch, capsys, setting, said):
    monkeypatch.setenv(*setting)
    assert fake() == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("summary", ["", "ERROR SUMMARY: 0 errors"])
def test_a_share_that_ends_early_says_in_which_case(tmp_path, summary):
    """What a case prints at last may be long: the case is named before the end of it."""
    log, report, output = (tmp_path / name for name in ("log.txt", "report.json", "output.txt"))
    log.write_text(summary)
    report.write_text(json.dumps({"problems": []}))
    output.write_text("case 1: pallas first\ncase 2: triton " + 1000 * "second " + "\n" + 100 * "a trace\n" + "killed\n")
    (said,) = sanitize.judge("memcheck", 1, log, report, output)
    assert "case 2: triton second" in said
    assert "case 1" not in said
    assert said.endswith("a trace\nkilled")
    assert len(said) < 1100
    output.write_text("no module named torch\n")
    (said,) = sanitize.judge("memcheck", 1, log, report, output)
    assert said.endswith(": no module named torch")
    output.unlink()
    assert len(sanitize.judge("memcheck", 1, log, report, output)) == 1


HAZARD = """========= Error: Race reported between {first} access at {kernel}+0x1720 in <moekit triton {text}>:38
=========     and Write access at {kernel}+{second} in <moekit triton {text}>:38 [19369 hazards]
=========
"""


@pytest.mark.parametrize(
    ("changed", "clean"),
    [({}, True), ({"first": "Read"}, False), ({"second": "0x1750"}, False), ({"text": "expert_down b48eadc8ec06 0"}, False)],
)
def test_only_the_hazard_that_is_explained_is_none(tmp_path, changed, clean):
    """One instruction's writes in just this kernel; beside any other hazard they do not hide it."""
    log, report, output = (tmp_path / name for name in ("log.txt", "report.json", "output.txt"))
    report.write_text(json.dumps({"problems": []}))
    known = {"first": "Write", "second": "0x1720", "text": next(iter(sanitize.EXPLAINED)), "kernel": "expert_down_kernel"}
    log.write_text(HAZARD.format(**known) + HAZARD.format(**known | changed) + "RACECHECK SUMMARY: 2 hazards displayed")
    said = sanitize.judge("racecheck", sanitize.FOUND, log, report, output)
    assert (not said) == clean
    assert clean or "1 found" in said[0]


def test_without_a_gpu_or_the_tool(monkeypatch, capsys):
    monkeypatch.setattr(platform, "gpu_count", lambda: 0)
    assert sanitize.main([]) == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err
    monkeypatch.setattr(platform, "gpu_count", lambda: 1)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == 3
