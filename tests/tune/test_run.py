"""`moekit tune` from the command line to the table, with times made up; and on a GPU for a moment."""

import contextlib
import json

import pytest
import torch
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS
from moekit.tune import run, table
from moekit.tune.search import Timed, Trial
from moekit.tune.table import Entry

BUCKETS = {1: (1, 16), 17: (64,), 128: (256,)}
FASTER = "tile:T:4 tile:I:512 warps:8 stages:1"


@pytest.fixture
def tuning(monkeypatch):
    """A machine that finds one schedule for silu_and_mul at 512 and none elsewhere."""

    def tune(name, sizes, dtype, seconds, checkers, tell):
        schedule = Schedule.parse(FASTER)
        tell(Trial(17, schedule, 0.8), 0.1)
        entry = Entry({17: schedule}, "0123") if sizes == {"I": 512} else None
        times = [Timed(b, r, {"heuristic": 2.0, "tuned": 1.6, "free": 1.5}, {}) for b, rows in BUCKETS.items() for r in rows]
        return run.Tuned(f"{name} {sizes} {dtype}", entry, times, [Trial(17, schedule, 0.8)])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "device", lambda: "NVIDIA Test")
    monkeypatch.setattr(run, "Checkers", contextlib.nullcontext)
    monkeypatch.setattr(run, "tune", tune)
    return lambda *arguments: CliRunner().invoke(cli, ["tune", *arguments])


def test_what_is_found_goes_to_the_table_and_is_shown(tuning, tmp_path):
    """One entry of three sizes; entries of other graphs stay; the same as JSON."""
    path = tmp_path / "table.json"
    done = tuning("silu_and_mul", "-o", str(path), "--json-file", str(tmp_path / "report.json"))
    assert done.exit_code == 0, done.output
    assert "silu_and_mul I=512 bfloat16" in done.output
    assert f"from 17 rows on: {FASTER}" in done.output
    assert done.output.count("1.25") == 3 * sum(map(len, BUCKETS.values()))
    entries = json.loads(path.read_text())["entries"]
    assert list(entries) == ["silu_and_mul {'I': 512} bfloat16"]
    (entry,) = entries.values()
    assert entry == {"kernels": "0123", "schedules": {"17": FASTER}, "time over the heuristic's": {"64": 0.8}}
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["entry"] for row in report["rows"]] == [{}, {"17": FASTER}, {}]
    assert report["device"] == "NVIDIA Test"
    assert "trials" not in report["rows"][0]
    again = tuning("silu_and_mul", "--sizes", "I=64", "--dtype", "float16", "-o", str(path), "--json", "--json-file",
                   str(tmp_path / "report.json"))  # fmt: skip
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 4
    assert json.loads(again.stdout)["rows"][0]["trials"][0] == {
        "rows from": 17, "schedule": FASTER, "ratio": 0.8, "problem": None,
    }  # fmt: skip
    assert json.loads(again.stdout)["rows"][0]["times"][0]["us"] == {"heuristic": 2.0, "tuned": 1.6, "free": 1.5}
    assert list(json.loads(path.read_text())["entries"]) == list(entries)


def test_a_graph_that_loses_its_entry(tuning, tmp_path):
    """What is tuned again and no longer worth an entry has none; what another Triton found is dropped."""
    path = tmp_path / "table.json"
    left = {"silu_and_mul {'I': 64} bfloat16": {"kernels": "", "schedules": {}}, "other": {"kernels": "", "schedules": {}}}
    made = {"made with": {"triton": run.triton.__version__}, "entries": left}
    path.write_text(json.dumps(made))
    tuning("silu_and_mul", "--sizes", "I=64", "-o", str(path))
    assert list(json.loads(path.read_text())["entries"]) == ["other"]
    path.write_text(json.dumps(made | {"made with": {"triton": "0.1"}}))
    tuning("silu_and_mul", "--sizes", "I=64", "-o", str(path))
    assert json.loads(path.read_text())["entries"] == {}


def test_asked_wrongly(tuning):
    """Sizes that the model does not have, and no GPU."""
    assert "none of the model's sizes has I=3" in tuning("silu_and_mul", "--sizes", "I=3").output


def test_what_cannot_be_timed_is_passed_over(tuning, tmp_path):
    """It is named; others are tuned, and where there is no other nothing is written."""
    path, untimed = tmp_path / "table.json", [n for n in FUSIONS if n not in run.SIZES]
    assert {"experts", "moe_align"} <= set(untimed)
    alone = tuning("experts", "moe_align", "-o", str(path))
    assert alone.exit_code == 2
    assert "there is nothing to tune; name one of gate_gemm" in alone.output
    assert not path.exists()
    done = tuning("-o", str(path))
    assert done.exit_code == 0, done.output
    assert f"operands to time them on: {', '.join(untimed)}\n" in done.stderr


def test_without_a_gpu(monkeypatch):
    """It says what is missing, with the exit code for that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(cli, ["tune"])
    assert done.exit_code == 3
    assert "there is no CUDA device here" in done.output


@pytest.mark.gpu
def test_on_a_gpu(tmp_path, monkeypatch):
    """A search of a few seconds ends, its check sees wrong outputs, and what it writes holds and is used."""
    monkeypatch.setattr(table, "_checked", {})
    with run.Checkers(0) as checkers:
        tuned = run.tune("silu_and_mul", {"I": 64}, "bfloat16", 4.0, checkers, lambda trial, spent: None)
    assert tuned.problem is None
    assert len(tuned.trials) > 3
    assert all(us > 0.1 for t in tuned.times for us in t.us.values())
    target = run.Target("silu_and_mul", {"I": 64}, "bfloat16")
    schedules = [t.schedule for t in tuned.trials if t.problem is None]
    assert target.check(schedules[0]) is None
    assert target.differ(schedules[:4]) is None
    monkeypatch.setattr(
        run.Target, "_outputs", lambda self, given, schedule: (given[0][:, :64] * (1 + schedule.launches[0].warps),)
    )
    assert "out of bounds" in (target.check(schedules[0]) or "")
    assert "other bits" in (target.differ([Schedule.parse(FASTER), Schedule.parse(FASTER.replace("warps:8", "warps:4"))]) or "")
    run.write(tmp_path / "table.json", [tuned])
    assert json.loads((tmp_path / "table.json").read_text())["made with"]["device"] == torch.cuda.get_device_name()
