"""Campaigns: deterministic, complete in their counting, and alive after a worker's death."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import pytest
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.testing import campaign, replay
from moekit.testing.campaign import EXTRA, Campaign
from moekit.testing.case import FuzzCase
from moekit.testing.executors import executor
from moekit.testing.failures import Failure, append, load, pasteable, shrink
from moekit.testing.layouts import Layout
from moekit.testing.processes import Trouble
from moekit.testing.schedules import tail, work
from moekit.testing.tasks import Coverage, Report, Task, cases, cell, run_task

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
    assert [c for one in task.singles() for c in cases(one)] == cases(task)
    assert len(cases(task)) == task.size == 4


def test_a_task_runs_and_counts():
    report = run_task(Task("silu_and_mul", "numpy", 0, 0, 0, 3, 4))
    assert report.coverage.ran == 12
    assert not report.failures
    assert report.coverage.cells.total() + report.coverage.edge_cells.total() == 12


def test_no_case_is_anothers_twin():
    for fusion in ("silu_and_mul", "gate_gemm"):  # most of their calls have layouts that come out the same each time
        for combo in range(8):
            every = [json.dumps(c.to_json()) for c in cases(Task(fusion, "interpret", 1, combo, 1, 4, 8))]
            assert len(set(every)) == len(every)


def test_a_wanted_cell_is_met():
    task = Task("silu_and_mul", "interpret", 1, 3, 0, 8, 4)
    for wanted in {cell(c) for c in cases(task)}:
        extra = replace(task, turn=EXTRA, wanted=wanted)
        assert {cell(c) for c in cases(extra)} == {wanted}


def test_a_campaign_ends_with_enough_cases_in_every_cell():
    least = {"numpy": 60}
    plan = campaign.Plan(["silu_and_mul", "topk_softmax"], ["numpy"], examples=100, workers=1, combos=3, groups=2, layouts=4,
                         least=least)  # fmt: skip
    result = campaign.run(plan)
    assert min(result.coverage["numpy"].cells.values()) >= 60
    assert not result.left


def test_cells_name_dtype_layouts_and_tail():
    assert cell(CASE)[1:3] == ("float16", "gate_up padded, out dense")
    assert tail(CASE) in ("both", "static", "tokens")


def test_edges_count_up_to_their_quota():
    coverage = Coverage(cells=Counter({cell(CASE): 100}), edge_cells=Counter({cell(CASE): 50}))
    assert coverage.counted == 105


def test_a_campaign_survives_a_worker_that_dies(monkeypatch):
    monkeypatch.setattr(campaign, "MOST_FAILURES", 3)
    name = f"{__name__}:broken" if "." not in __name__ else "tests.testing.test_campaign:broken"
    plan = campaign.Plan(["silu_and_mul"], [name], seed=5, examples=400, workers=1, combos=1, groups=2, layouts=1)
    result = campaign.run(plan)
    texts = [p for f in result.failures for p in f.problems]
    assert any("out of bounds" in t for t in texts)
    assert any("died with exit code 3" in t for t in texts)
    assert all(f.case.sizes["T"] == 16 for f in result.failures if "died" in f.problems[0])


def campaign_of(**how) -> Campaign:
    return Campaign(campaign.Plan(["silu_and_mul"], ["numpy"], groups=2, layouts=2, **how))


class Scripted:
    """In place of a process: what becomes of a task is a function of it."""

    def __init__(self, answer):
        self.answer = answer

    def ask(self, work, task, patience):
        return self.answer(task) or Report()


@pytest.mark.parametrize(("examples", "fusions", "least"), [(300, 1, 16), (2000, 10, 12), (100_000, 1, 64)])
def test_a_small_budget_reaches_many_calls(examples, fusions, least):
    plan = campaign.Plan(list(FUSIONS)[:fusions], ["eager"], examples=examples, groups=8, layouts=8)
    tasks = itertools.islice(plan.tasks("eager"), examples)
    sizes = itertools.accumulate(t.size for t in tasks)
    assert sum(size < examples for size in sizes) + 1 >= least * fusions
    assert campaign.Plan(list(FUSIONS), ["pallas"], examples=examples, groups=8, layouts=8).batch("pallas") == (8, 8)


def test_a_fusion_whose_cases_take_long_does_not_take_the_others_time():
    seconds = {"silu_and_mul": 0.01, "experts": 10.0, "gate_gemm": 0.02}
    made, taken = Campaign(campaign.Plan(list(seconds), ["numpy"], combos=2)), Counter()
    made.result.coverage["numpy"].ran = 1  # it can serve them
    for _ in range(60):
        task = made.next()
        made.spent["numpy", task.fusion] += seconds[task.fusion]
        taken[task.fusion, task.turn > 0] += 1
    assert taken["experts", False] == 2, "the first turn is everyone's"
    assert not taken["experts", True]
    assert min(taken["silu_and_mul", True], taken["gate_gemm", True]) >= 20


def test_fusions_that_are_not_served_take_no_time_from_others():
    """An answer without a case is no share of the time: what can be served need not wait for it."""
    made, taken = Campaign(campaign.Plan(["silu_and_mul", "experts", "gate_gemm"], ["numpy"], combos=2)), Counter()
    made.result.coverage["numpy"].ran = 1
    for _ in range(60):
        task = made.next()
        served = task.fusion == "silu_and_mul"
        if served:
            made.spent["numpy", task.fusion] += 10.0
        made.run(Scripted(lambda task, served=served: Report(Coverage(ran=served))), task)
        taken[task.fusion] += 1
    assert taken == {"silu_and_mul": 20, "experts": 20, "gate_gemm": 20}


def test_an_interpreters_work_is_that_of_all_launches():
    tokens = lambda n: FuzzCase("experts", {"T": n, "D": 16, "K": 4, "E": 4, "I": 16, "H": 16}, dict.fromkeys(  # noqa: E731
        ("x", "weights", "gate_up", "down"), "float32") | {"ids": "int32"}, {"block": 1})  # fmt: skip
    assert work(tokens(64)) >= work(tokens(1)) + 64 * 4  # a block of each pair, and then their sums


def test_a_batch_whose_references_are_slow_ends(monkeypatch):
    monkeypatch.setattr("moekit.testing.tasks.LONG", 0.0)
    report = run_task(Task("silu_and_mul", "numpy", 0, 0, 0, 3, 4))
    assert report.coverage.ran == 1
    assert not report.failures


def test_an_implementation_that_can_serve_no_call_ends_its_part():
    made = campaign_of(examples=4, combos=3)
    for _ in range(3):
        made.run(Scripted(lambda task: None), made.next())
    assert made.next() is None
    made.close()
    assert made.result.left == ["numpy: it can be asked for none of these calls"]


def test_a_death_is_narrowed_down_to_one_case():
    made = campaign_of(examples=4)
    task = made.next()
    made.run(Scripted(lambda t: Trouble("ended", "it died") if t.only in (None, 2) else None), task)
    (failure,) = made.result.failures
    assert failure.problems == ("it died",)
    assert failure.fatal
    assert failure.case == cases(task)[2]


def test_a_death_that_does_not_happen_again_is_a_failure_all_the_same():
    made = campaign_of(examples=4)
    deaths = iter([Trouble("ended", "it died")])
    made.run(Scripted(lambda task: next(deaths, None)), made.next())
    assert [f.problems for f in made.result.failures] == [
        ("it died; it did not happen again to any of the 4 cases from this one on",)
    ]


def test_a_death_that_is_not_narrowed_down_in_time_is_a_failure_all_the_same():
    made = campaign_of(examples=4)

    def late(task):
        made.over = task.size < 4
        return Trouble("ended", "it died")

    made.run(Scripted(late), made.next())
    (failure,) = made.result.failures
    assert failure.problems[0].startswith("it died; the time did not suffice")
    made.close()
    assert made.result.left[0] == "1 cases of 1 tasks were cut off when the time was over"


def test_too_little_memory_is_no_failure_and_tried_once_more_alone():
    made = campaign_of(examples=4)
    task, full = made.next(), Scripted(lambda task: Trouble("memory", "CUDA out of memory"))
    made.run(full, task)
    made.result.coverage["numpy"].cells[cell(CASE)] = 4  # all that was asked for has run
    made.running.append(replace(task, turn=1))
    assert made.next() is None
    made.running.clear()
    assert made.next() is task
    assert made.next() is None
    made.run(full, task)
    made.close()
    assert not made.result.failures
    assert made.result.left == ["4 cases of silu_and_mul (numpy) were not run: CUDA out of memory"]


@pytest.mark.parametrize(("text", "kind"), [
    ("CUDA out of memory. Tried to allocate 8 GiB", "memory"), ("Triton Error [CUDA]: out of memory", "memory"),
    ("CUDA error: an illegal memory access was encountered", "device"),
    ("Triton Error [CUDA]: misaligned address", "device"), ("no such thing", "error"),
])  # fmt: skip
def test_errors_are_told_apart(text, kind):
    trouble = Trouble.of(RuntimeError(f"{text}\nCompile with TORCH_USE_CUDA_DSA"))
    assert trouble.kind == kind
    assert trouble.text.splitlines()[0] == f"RuntimeError: {text}"


def test_shrinking_finds_the_first_wrong_token():
    name = "tests.testing.test_campaign:broken"
    found = shrink(FuzzCase.from_json(CASE.to_json()), lambda c: c.sizes["T"] != 16 and bool(replay(c, name)))
    assert found.sizes == {"T": 3, "I": 1}
    assert not found.layouts


def test_regressions_come_back(tmp_path):
    regression = Failure(CASE, "interpret", ("wrong",), "a note")
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


def test_the_command_reports_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(campaign, "MOST_FAILURES", 4)
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
    append(tmp_path, Failure(CASE, "interpret", ()))
    done = run("--replay", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    (tmp_path / "bad.json").write_text('{"no": "case"}')
    assert run("--replay", str(tmp_path / "bad.json")).exit_code == 2


def test_a_case_travels_between_processes_whatever_was_asked_of_it():
    """A declaration drawn at random has no name in a module: what a case has worked out stays behind."""
    case = FuzzCase("random:5", {"T": 5, "A": 9, "B": 3}, {}, seed=1)
    case = replace(case, dtypes=dict.fromkeys(case.declaration.tensors, "float32"))
    assert case.declaration is pickle.loads(pickle.dumps(case)).declaration


def test_a_planted_tail_mask_bug_is_found_by_the_same_command(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    done = run("silu_and_mul", "gate_gemm", "--impl", "interpret", "--mutant", "no-mask-dynamic", "--examples", "10000",
               "--time", "40", "--workers", "1", "--combos", "4", "--batch", "2", "--save", str(kept), "--json-file",
               str(tmp_path / "out.json"))  # fmt: skip
    assert done.exit_code == 1, done.output
    assert json.loads((tmp_path / "out.json").read_text())["first_failure"] < 200
    assert not list(kept.iterdir())  # what is wrong with a mutant is no regression of the package
    assert "moekit-planted" not in str(sys.path)


def test_the_time_is_kept_and_what_was_left_is_said(tmp_path):
    begin = time.monotonic()
    done = run("silu_and_mul", "--impl", "numpy", "--time", "4", "--workers", "1", "--combos", "4", "--least", "100000",
               "--save", str(tmp_path), "--json-file", str(tmp_path / "out.json"))  # fmt: skip
    assert 4 <= time.monotonic() - begin < 16
    assert done.exit_code == 0
    assert "cells have fewer than 100000" in json.loads((tmp_path / "out.json").read_text())["left"][0]


def test_each_implementation_may_have_its_own_number(tmp_path):
    done = run("silu_and_mul", "--impl", "numpy", "--impl", "interpret", "--examples", "40", "--examples", "interpret=8",
               "--workers", "1", "--combos", "2", "--batch", "1", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    counted = {n: v["counted"] for n, v in json.loads(done.stdout)["implementations"].items()}
    assert 40 <= counted["numpy"] < 64
    assert 8 <= counted["interpret"] < 32


def test_ctrl_c_ends_with_the_summary():
    command = [sys.executable, "-m", "moekit.cli", "fuzz", "silu_and_mul", "--impl", "numpy", "--time", "300", "--workers", "1",
               "--json"]  # fmt: skip
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=heard)  # fmt: skip
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and its workers
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert json.loads(out)["stopped"] == "interrupted"
    assert "Traceback" not in errors


@pytest.mark.parametrize(("arguments", "code"), [
    (("nothing",), 3), (("--impl", "cobol"), 2), (("--what",), 2), (("--impl", "no_module:f"), 3),
    (("--examples", "-1"), 2), (("--examples", "numpy=x"), 2), (("--examples", "pallas=4"), 2), (("--time", "0"), 2),
    (("--workers", "0"), 2), (("--mutant", "nothing"), 2),
])  # fmt: skip
def test_exit_codes(arguments, code):
    assert run(*arguments).exit_code == code


def test_an_implementation_that_cannot_run_here_is_refused_before_a_campaign(monkeypatch):
    """Triton's interpreter and the kernels that XLA compiles need opposite settings: neither is a failure of a case."""
    asked = ["fuzz", "silu_and_mul", "--examples", "8", "--impl"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = CliRunner().invoke(cli, [*asked, "triton-jax"])
    assert said.exit_code == 3
    assert "triton-jax: TRITON_INTERPRET is set, and XLA takes what Triton compiles; unset it" in " ".join(said.output.split())
    monkeypatch.delenv("TRITON_INTERPRET")
    said = CliRunner().invoke(cli, [*asked, "triton-interpreter"])
    assert said.exit_code == 3
    assert "needs TRITON_INTERPRET=1" in said.output
