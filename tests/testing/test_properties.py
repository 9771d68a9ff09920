"""The generic properties hold for every fusion on the CPU's implementations, and fail for what breaks them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.fusions import FUSIONS
from moekit.testing import properties
from moekit.testing.batch import run_case
from moekit.testing.case import FuzzCase
from moekit.testing.draw import KINDS
from moekit.testing.executors import Evaluate, executor
from moekit.testing.probes import PROBES
from moekit.testing.strategies import cases
from moekit.testing.tasks import work

SMALL = {"elements": 600, "smallest": 1, "kinds": tuple(k for k in KINDS if k != "far")}
drawn = st.sampled_from((*FUSIONS, *PROBES)).flatmap(lambda name: cases(name, **SMALL)).filter(lambda c: work(c) < 80)


@pytest.mark.parametrize("implementation", ["interpret", "numpy", "eager"])
@given(case=st.sampled_from((*FUSIONS, *PROBES)).flatmap(lambda name: cases(name, elements=600)).filter(lambda c: work(c) < 80))
def test_every_case_agrees_in_guarded_memory(implementation, case):
    assert run_case(executor(implementation), case).problems == []


@pytest.mark.parametrize("name", properties.PROPERTIES)
@given(case=drawn)
def test_properties_hold(name, case):
    for implementation in ("interpret", "eager"):
        if name == "rows are independent" and implementation == "eager":
            continue  # a library's matrix product may add in another order for another number of rows
        assert properties.PROPERTIES[name](executor(implementation), case) == []


@given(case=cases("gate_gemm", **SMALL))
def test_products_scale_by_powers_of_two(case):
    assert properties.scaling(executor("interpret"), case, ("packed",)) == []


@given(case=cases("silu_and_mul", **SMALL, modes=("out",), schedules=("heuristic",)))
def test_pytorch_and_jax_agree_on_the_same_bytes(case):
    pytest.importorskip("jax")
    assert properties.same_in_both_frameworks(case, executor("eager")) == []


class Leaky(Evaluate):
    """Adds to every row a little of the last one."""

    def call(self, case, tensors):
        super().call(case, tensors)
        out = tensors["out"]
        out[...] = (out.astype(np.float64) + 1e-3 * out[-1:].astype(np.float64)).astype(out.dtype)


class Drifting(Evaluate):
    """Another result at every call."""

    turns = 0

    def call(self, case, tensors):
        super().call(case, tensors)
        self.turns += 1
        tensors["out"][...] = tensors["out"] + np.float32(self.turns)


class Straight(Evaluate):
    """Right for contiguous tensors only."""

    def call(self, case, tensors):
        super().call(case, tensors)
        if not tensors["gate_up"].flags.c_contiguous:
            tensors["out"][...] = 0


CASE = FuzzCase("silu_and_mul", {"T": 6, "I": 8}, {"gate_up": "float32"})
STRIDED = FuzzCase.from_json({**CASE.to_json(), "layouts": {"gate_up": {"kind": "strided", "rank": 2, "steps": [1, 2]}}})


@pytest.mark.parametrize(("prop", "wrong", "case"), [
    ("rows are independent", Leaky, CASE), ("repeatable", Drifting, CASE), ("layouts do not matter", Straight, STRIDED),
    ("agreement", Leaky, CASE),
])  # fmt: skip
def test_properties_fail_for_what_breaks_them(prop, wrong, case):
    assert properties.PROPERTIES[prop](wrong("wrong"), case)


def test_integers_must_be_equal_and_not_only_close():
    case = FuzzCase("gate_gemm", {"T": 4, "D": 64, "P": 8}, {"x": "float32", "packed": "float32"}, recipe="integers")

    class Near(Evaluate):
        def call(self, case, tensors):
            super().call(case, tensors)
            tensors["out"][...] = np.nextafter(tensors["out"], np.float32(np.inf))

    assert properties.agreement(Near("near"), case)
