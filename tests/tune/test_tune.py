"""Candidates, the search and the tables of tuned schedules, without a GPU: times are made up."""

import math

import pytest

from moekit.compile.heuristic import heuristic
from moekit.compile.schedule import Schedule, legal
from moekit.fusions import FUSIONS
from moekit.testing import Call, operands
from moekit.tune import table
from moekit.tune.search import best, candidates, search

SIZES = {
    "gate_gemm": {"D": 2048, "P": 648},
    "silu_and_mul": {"I": 512},
    "topk_softmax": {"E": 512},
    "shared_expert_combine": {"H": 2048},
    "add_rms_norm": {"H": 2048},
    "gated_rms_norm": {"V": 4, "D": 128},
    "delta_rule_step": {"K": 2, "V": 4, "Dk": 128, "Dv": 128},
    "gate_projections": {"D": 2048, "I": 64, "E": 512, "G": 1},
    "gate_block": {"D": 2048, "I": 64, "E": 512, "G": 1},
    "down_combine": {"I": 64, "H": 2048, "H?": 1},
}


def graph(name: str, dtype: str = "bfloat16"):
    """The graph of a fusion at a decode step's sizes."""
    values = operands(FUSIONS[name], {"T": 3, **SIZES[name]}, dtype, "normal", 1)
    return Call(FUSIONS[name], values, {"k": 10} if "k" in FUSIONS[name].params else {}).graph


@pytest.mark.parametrize("name", list(FUSIONS))
def test_candidates_are_legal_and_begin_with_the_heuristic(name):
    """None twice, several of them, and none that makes a row depend on the number of tokens."""
    traced = graph(name)
    found = list(candidates(traced))
    assert found[0] == heuristic(traced)
    assert len(set(found)) == len(found) > 10
    assert all(legal(traced, s) is None for s in found)


def test_search_checks_before_it_times_and_keeps_to_its_budget():
    """A wrong candidate is never timed, a failing one does not end the search, the fastest right one wins."""
    traced = graph("add_rms_norm")
    timed = []

    def measure(schedule: Schedule) -> list[float]:
        timed.append(schedule)
        if schedule.warps == 2:
            raise RuntimeError("out of resources")
        return [float(schedule.warps), 1.0]

    check = lambda s: "wrong" if s.warps == 16 else None  # noqa: E731
    trials = search(traced, measure, check, seconds=60)
    assert len(trials) == len(list(candidates(traced)))
    assert all(s.warps != 16 for s in timed)
    assert {t.problem for t in trials if t.schedule.warps == 16} == {"wrong"}
    assert {t.problem for t in trials if t.schedule.warps == 2} == {"RuntimeError: out of resources"}
    assert best(trials).schedule.warps == 1
    assert math.isclose(best(trials).ratio, math.sqrt(1 / heuristic(traced).warps))
    assert len(search(traced, measure, check, seconds=0)) == 1


def test_tables_are_found_by_device_and_static_sizes(monkeypatch):
    """Dynamic sizes do not matter; other sizes, dtypes and devices have no entry; an illegal entry is not used."""
    traced = graph("add_rms_norm")
    tuned = str(heuristic(traced).with_axis("T", block=4))
    monkeypatch.setattr(table, "table", lambda device: {table.graph_key(traced): tuned} if "H200" in device else {})
    assert str(table.tuned("NVIDIA H200", traced)) == tuned
    assert table.tuned("NVIDIA H100", traced) is None
    assert table.tuned("NVIDIA H200", graph("add_rms_norm", "float16")) is None
    monkeypatch.setattr(table, "table", lambda device: {table.graph_key(traced): "T:grid:1 H:whole:64"})
    assert table.tuned("NVIDIA H200", traced) is None


def test_shipped_tables_are_legal():
    """Every row of every table in the package parses."""
    from importlib import resources
    from json import loads

    for path in (resources.files("moekit.tune") / "tables").iterdir():
        for text in loads(path.read_text())["schedules"].values():
            assert str(Schedule.parse(text)) == text
