"""Guarded memory sees what must not happen: writes beside a tensor, reads beyond it, outputs that nobody wrote."""

from __future__ import annotations

import numpy as np
import pytest

from moekit.compile.plan import plan
from moekit.compile.schedule import Schedule
from moekit.compile.tile import Strided, interpret
from moekit.errors import ScheduleError
from moekit.testing.batch import run_case, run_cases
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Executor, executor
from moekit.testing.guard import POISONS, Arena, place
from moekit.testing.layouts import Layout
from moekit.testing.oracle import Oracle

STRIDED = Layout("strided", (0, 1), (0, 1), (1, 2), (0, 0))
CASE = FuzzCase("silu_and_mul", {"T": 5, "I": 16}, {"gate_up": "float32"}, layouts={"gate_up": STRIDED, "out": STRIDED})


class Wrong(Executor):
    """silu_and_mul by numpy, with a fault."""

    def __init__(self, fault):
        super().__init__("wrong")
        self.fault = fault

    def call(self, case, tensors):
        x, out = tensors["gate_up"], tensors["out"]
        gate, up = np.split(x.astype(np.float64), 2, -1)
        out[...] = gate / (1 + np.exp(-gate)) * up
        self.fault(x, out)


def wide(x: np.ndarray, extra: int = 1) -> np.ndarray:
    """`x` with some columns more than it has."""
    return np.lib.stride_tricks.as_strided(x, (x.shape[0], x.shape[1] + extra), x.strides)


def flat(x: np.ndarray) -> np.ndarray:
    """`x` without the gaps left out: what lies between its elements too."""
    return np.lib.stride_tricks.as_strided(x, (x.shape[0], 2 * x.shape[1]), (x.strides[0], x.itemsize))


def test_a_right_one_passes():
    assert run_case(Wrong(lambda x, out: None), CASE).problems == []


@pytest.mark.parametrize("fault", [
    pytest.param(lambda x, out: wide(out).__setitem__((-1, -1), 1.0), id="behind the output"),
    pytest.param(lambda x, out: flat(out).__setitem__((2, 3), 1.0), id="in a gap of the output"),
    pytest.param(lambda x, out: flat(x).__setitem__((2, 3), 1.0), id="in a gap of the input"),
    pytest.param(lambda x, out: x.__setitem__((0, 0), 1.0), id="the input"),
])  # fmt: skip
def test_writes_are_seen(fault):
    assert any("must not be" in p for p in run_case(Wrong(fault), CASE).problems)


@pytest.mark.parametrize("fault", [
    pytest.param(lambda x, out: out.__setitem__((-1, 0), wide(x)[-1, -1]), id="a read behind the input"),
    pytest.param(lambda x, out: out.__setitem__((0, 0), flat(x)[1, 1] * 0 + out[0, 0]), id="a read in a gap, times zero"),
])  # fmt: skip
def test_reads_are_seen(fault):
    assert run_case(Wrong(fault), CASE).problems


class Lazy(Executor):
    """Writes all but one element."""

    def call(self, case, tensors):
        right = case.declaration.reference(tensors["gate_up"])["out"]
        tensors["out"][1:] = right[1:]
        tensors["out"][0, 1:] = right[0, 1:]


def test_an_element_nobody_wrote_is_found():
    assert any("out[0, 0]" in p for p in run_case(Lazy("lazy"), CASE).problems)


def test_damage_is_laid_to_the_right_case():
    cases = [CASE, FuzzCase("silu_and_mul", {"T": 3, "I": 8}, {"gate_up": "float32"})]

    class OnlySecond(Wrong):
        def call(self, case, tensors):
            super().call(case, tensors)
            if case.sizes["T"] == 3:
                wide(tensors["out"])[-1, -1] = 7

    first, second = run_cases(OnlySecond(lambda x, out: None), [(c, Oracle.of(c)) for c in cases])
    assert not first.problems
    assert second.problems


def test_images_differ_only_in_poison():
    arena = Arena()
    placed = place(arena, CASE, CASE.values())
    first, second = (arena.image(p) for p in POISONS)
    assert placed.slots["gate_up"].view(first).tobytes() == placed.slots["gate_up"].view(second).tobytes()
    assert placed.differing(first, second)


def test_far_memory_touches_what_it_must_only():
    case = FuzzCase("silu_and_mul", {"T": 3, "I": 8}, {"gate_up": "float16"},
                    layouts={"gate_up": Layout("far", (0, 1), (0, 0), (2**27 + 5, 1), (0, 0))})  # fmt: skip
    arena = Arena()
    place(arena, case, case.values())
    assert arena.end > 2**33
    assert arena.index.size < 10_000
    assert run_case(executor("interpret"), case).problems == []


def test_a_race_between_programs_is_seen_in_one_order_at_least():
    """Each row is the next one, written over where it was read by a plan that knows no alias: right from the first row on."""
    case = FuzzCase("probe_shuffled", {"T": 4, "H": 3}, {"x": "float32", "ids": "int32"})
    layouts = {**dict.fromkeys(("x", "out", "turned"), Strided(("any", "unit"))), "ids": Strided(("unit",))}
    made = plan(case.graph, Schedule.parse("tile:T:1 whole:H:4 warps:1 stages:1"), layouts)
    wanted = {}
    for backwards in (False, True):
        x = np.arange(12, dtype=np.float32).reshape(4, 3)
        tensors = {"x": x, "out": x, "turned": np.empty_like(x), "ids": np.array([1, 2, 3, 3], np.int32)}
        interpret.run(made, tensors, case.extents, backwards)
        wanted[backwards] = x[:, 0].tolist()
    assert wanted[False] == [3, 6, 9, 9]
    assert wanted[True] == [9, 9, 9, 9]


def test_the_plan_that_knows_of_the_alias_is_refused():
    case = FuzzCase("probe_shuffled", {"T": 4, "H": 3}, {"x": "float32", "ids": "int32"}, mode="over:out:x", schedule="small")
    tensors = {"x": np.ones((4, 3), np.float32), "ids": np.zeros(4, np.int32), "turned": np.ones((4, 3), np.float32)}
    with pytest.raises(ScheduleError, match="an update reads other elements of it"):
        executor("interpret").call(case, tensors)


def test_tensors_that_take_turns_have_their_own_elements():
    """Woven: one array for tensors of one shape and dtype, and nothing of another is written."""
    case = FuzzCase("add_rms_norm", {"T": 5, "H": 12}, dict.fromkeys(("x", "residual", "weight"), "float32"),
                    {"eps": 1e-6, "offset": 1.0}, woven=True)  # fmt: skip
    placed = place(arena := Arena(), case, case.values())
    weave = case.weave()
    assert len({weave[n][0] for n in ("x", "residual", "out", "residual_new")}) == 1
    places = [set(placed.slots[n].places().ravel().tolist()) for n in ("x", "residual", "out", "residual_new")]
    assert all(not a & b for i, a in enumerate(places) for b in places[:i])
    assert min(places[1]) == min(places[0]) + 4
    assert arena.end > max(places[3])
    assert run_case(executor("interpret"), case).problems == []
