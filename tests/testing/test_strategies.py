"""The strategies draw calls that fit, and shrink a failure to small sizes and contiguous layouts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st

from moekit.fusions import FUSIONS
from moekit.lang import In, f32, fusion
from moekit.testing.case import FuzzCase, find_fusion
from moekit.testing.draw import Limits, draw_call
from moekit.testing.guard import Arena
from moekit.testing.layouts import KINDS, Layout, draw_layout, numpy_source
from moekit.testing.probes import PROBES
from moekit.testing.strategies import cases, layouts

EVERY = (*FUSIONS, *PROBES)


@fusion(lambda a, b: {"out": a.astype(np.float64) * b}, a=In("T N"), b=In("N"))
def mine(a, b):
    """A declaration that is not moekit's own."""
    return f32(a) * f32(b)


@given(st.sampled_from(EVERY).flatmap(cases))
def test_cases_fit_and_come_back_from_json(case):
    assert case.problem() is None
    assert set(case.values()) == set(case.declaration.tensors)
    assert FuzzCase.from_json(json.loads(json.dumps(case.to_json()))) == case


@given(cases(mine))
def test_a_declaration_of_ones_own(case):
    assert find_fusion(case.fusion) is mine
    assert case.values()["a"].shape == (case.sizes["T"], case.sizes["N"])


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4).flatmap(
    lambda shape: st.tuples(st.just(tuple(shape)), layouts(tuple(shape), kinds=[k for k in KINDS if k != "far"]))))  # fmt: skip
def test_elements_of_a_layout_do_not_meet(drawn):
    shape, layout = drawn
    arena = Arena()
    slot = arena.add("x", shape, "float32", layout, np.zeros(shape, np.float32))
    places = slot.places()
    collapsed = places[tuple(slice(0, 1) if d in layout.zero else slice(None) for d in range(len(shape)))]
    assert len(np.unique(collapsed)) == collapsed.size
    assert places.min() >= slot.first + 256
    assert places.max() + 4 <= slot.last - 256 + 4 * layout.shift + 256
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@pytest.mark.parametrize("seed", range(5))
def test_far_layouts_pass_32_bits(seed):
    shape = (3, 5)
    layout = draw_layout("far", shape, 4, numpy_source(seed))
    assert sum((n - 1) * s for n, s in zip(shape, layout.strides(shape), strict=True)) >= 2**31


@given(cases("silu_and_mul"))
def test_values_follow_from_the_seed(case):
    first, second = case.values(), case.values()
    assert all(first[n].tobytes() == second[n].tobytes() for n in first)
    for name, x in first.items():
        for d in case.layout(name).zero:
            one = np.broadcast_to(np.take(x, range(min(1, x.shape[d])), axis=d), x.shape) if x.size else x
            assert one.tobytes() == x.tobytes()


def test_shrinking_leads_to_small_sizes_and_contiguous_layouts():
    quick = settings(max_examples=2000, database=None, derandomize=True, phases=(Phase.generate, Phase.shrink),
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    found = find(cases("shared_expert_combine"), lambda c: c.sizes["H"] > 30 and c.sizes["T"] > 2, settings=quick)
    assert (found.sizes["T"], found.sizes["H"]) == (3, 31)
    assert not found.layouts
    assert found.schedule == "heuristic"
    assert found.mode == "out"


def test_shrinking_keeps_the_one_layout_that_matters():
    quick = settings(max_examples=4000, database=None, derandomize=True, phases=(Phase.generate, Phase.shrink),
                     suppress_health_check=list(HealthCheck))  # fmt: skip
    found = find(cases("add_rms_norm"), lambda c: c.layout("weight").kind == "strided", settings=quick)
    assert list(found.layouts) == ["weight"]
    assert found.layouts["weight"].steps == (2,)
    assert found.sizes == {"T": 1, "H": 1}


def test_limits_are_kept():
    limits = Limits(elements=100, kinds=("dense",), modes=("out",), schedules=("heuristic",), dtypes=("float16",))

    @settings(max_examples=20, database=None)
    @given(cases("silu_and_mul", limits))
    def run(case):
        assert case.elements() <= 100
        assert not case.layouts
        assert set(case.dtypes.values()) == {"float16"}

    run()


@pytest.mark.parametrize("name", FUSIONS)
def test_a_call_is_found_where_no_sizes_by_chance_fit(name):
    """Whatever dtypes were drawn last: of mixed ones a declaration may refuse some in every size."""
    for seed in range(12):
        draw_call(name, numpy_source(seed), Limits(elements=-1))
