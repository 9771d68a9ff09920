"""Random declarations: every implementation agrees with the float64 evaluation, and every legal schedule can be planned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.compile.plan import plan
from moekit.compile.tile.layouts import contiguous
from moekit.testing.batch import run_case
from moekit.testing.case import FuzzCase, find_fusion
from moekit.testing.executors import executor
from moekit.testing.layouts import KINDS
from moekit.testing.schedules import variants, work
from moekit.testing.strategies import cases

SMALL = {"elements": 400, "smallest": 1, "kinds": tuple(k for k in KINDS if k != "far")}
drawn = st.integers(0, 2000).flatmap(lambda n: cases(f"random:{n}", **SMALL)).filter(lambda c: work(c) < 60)


@pytest.mark.parametrize("implementation", ["interpret", "numpy", "eager"])
@given(case=drawn)
def test_implementations_agree(implementation, case):
    assert run_case(executor(implementation), case).problems == []


@pytest.mark.parametrize("implementation", ["xla", "pallas", pytest.param("triton", marks=pytest.mark.gpu)])
@settings(max_examples=max(5, settings.default.max_examples // 4))
@given(data=st.data())
def test_implementations_that_compile_agree(implementation, data):
    made = executor(implementation)
    assert run_case(made, data.draw(drawn.filter(made.supports))).problems == []


@given(case=drawn)
def test_legal_schedules_can_be_planned(case):
    every_variant_can_be_planned(case)


def every_variant_can_be_planned(case: FuzzCase) -> None:
    """Lower and verify a case under each schedule that `legal` allows."""
    layouts = contiguous(case.graph, case.extents)
    for schedule in variants(case.graph).values():
        assert plan(case.graph, schedule, layouts).programs


@pytest.mark.parametrize("number", [174, 119, 34, 66])
def test_the_same_number_is_the_same_declaration(number):
    first = find_fusion(f"random:{number}")
    find_fusion.cache_clear()
    assert list(first.tensors) == list(find_fusion(f"random:{number}").tensors)


def test_what_another_output_loads_is_overwritten_last():
    """Of two tensors updated in loops the one goes first whose loop loads the other: the verifier refused the old order."""
    tensors = find_fusion("probe_states").tensors
    every_variant_can_be_planned(FuzzCase("probe_states", {"T": 4, "A": 6, "H": 15}, dict.fromkeys(tensors, "float32")))


def test_partial_results_over_different_axes_are_no_split():
    """Their programs would write the same elements: `legal` once allowed it, and the verifier refused the program."""
    tensors = find_fusion("random:174").tensors
    every_variant_can_be_planned(FuzzCase("random:174", {"T": 5, "A": 6, "B": 3}, dict.fromkeys(tensors, "float32")))
