"""The generic properties hold for every fusion on the CPU's implementations, and fail for what breaks them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moekit.fusions import FUSIONS
from moekit.testing import properties
from moekit.testing.batch import run_case
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Evaluate, executor
from moekit.testing.layouts import KINDS
from moekit.testing.probes import PROBES
from moekit.testing.schedules import work
from moekit.testing.strategies import cases

SMALL = {"elements": 600, "smallest": 1, "kinds": tuple(k for k in KINDS if k != "far")}
COMPILED = ("interpret", "pallas", "triton", "triton-interpreter")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def implementation(name: str, *marks):
    """An implementation as a parameter, skipped where it cannot run."""
    here = (name == "triton-interpreter") == INTERPRETED
    return pytest.param(name, marks=[*marks, pytest.mark.skipif(not here, reason="Triton is interpreted, or is not")])


FAST = [implementation(n) for n in ("interpret", "numpy", "eager")]
SLOW = [implementation("xla"), implementation("pallas"), implementation("triton-interpreter"),
        implementation("triton", pytest.mark.gpu)]  # fmt: skip
slowly = settings(max_examples=max(3, settings.default.max_examples // 6))
rarely = settings(max_examples=max(2, settings.default.max_examples // 12))  # of each of many fusions


def drawn(name: str, fusions: Sequence[str] = (*FUSIONS, *PROBES), **limits) -> st.SearchStrategy[FuzzCase]:
    """Cases of the fusions that an implementation can be asked to serve."""
    made = st.sampled_from(fusions).flatmap(lambda fusion: cases(fusion, **limits))
    return made.filter(lambda c: work(c) < 80 and executor(name).supports(c))


@pytest.mark.parametrize("name", FAST)
@given(data=st.data())
def test_every_case_agrees_in_guarded_memory(name, data):
    assert run_case(executor(name), data.draw(drawn(name, elements=600))).problems == []


def holds(prop: str, name: str, case: FuzzCase) -> None:
    if prop == "rows are independent" and name not in COMPILED:
        return  # a library may compute the last rows of a block another way
    assert properties.PROPERTIES[prop](executor(name), case) == []


@pytest.mark.parametrize("prop", properties.PROPERTIES)
@pytest.mark.parametrize("name", FAST)
@given(data=st.data())
def test_properties_hold(name, prop, data):
    holds(prop, name, data.draw(drawn(name, **SMALL)))


@pytest.mark.parametrize("prop", properties.PROPERTIES)
@pytest.mark.parametrize("name", SLOW)
@slowly
@given(data=st.data())
def test_properties_hold_where_each_case_is_compiled(name, prop, data):
    holds(prop, name, data.draw(drawn(name, **SMALL)))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_properties_hold_in_tritons_interpreter():
    """Triton is interpreted or not for a whole process: the tests above that want it run in one of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton-interpreter"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    limit = None if environment.get("HYPOTHESIS_PROFILE") == "nightly" else 600
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=limit, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert f"{len(properties.PROPERTIES) + 1} passed" in done.stdout  # the powers of two, besides


def test_two_shapes_of_an_operand_are_two_programs():
    """An optional dimension is in no axis: what was compiled for a gate per token served, and failed, a gate per element."""
    for sizes in ({"T": 2, "H": 5}, {"T": 2, "H": 5, "H?": 1}):
        case = FuzzCase("shared_expert_combine", sizes, dict.fromkeys(("hidden", "shared", "gate"), "float32"))
        assert properties.agreement(executor("xla"), case) == []


LINEAR = {"gate_gemm": (("x",), ("packed",)), "gated_rms_norm": (("weight",),),
          "shared_expert_combine": (("hidden", "shared"),),
          "delta_rule_step": (("v", "state"),)}  # fmt: skip


@pytest.mark.parametrize("name", [*FAST, *SLOW])
@slowly
@given(data=st.data())
def test_powers_of_two_pass_through_what_is_linear(name, data):
    fusion = data.draw(st.sampled_from(list(LINEAR)))
    case = data.draw(drawn(name, (fusion,), **SMALL))
    for operands in LINEAR[fusion]:
        assert properties.scaling(executor(name), case, operands) == []


PAIRS = [("eager", "xla"), ("eager", "pallas"), pytest.param("triton", "pallas", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(("torch", "jax"), PAIRS)
@rarely
@given(data=st.data())
def test_pytorch_and_jax_agree_on_the_same_bytes(torch, jax, fusion, data):
    case = data.draw(cases(fusion, **SMALL, modes=("out",), schedules=("heuristic",)))
    assert properties.same_in_both_frameworks(case, executor(torch), jax) == []


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


class Clearing(Evaluate):
    """Right for operands that are apart only."""

    def call(self, case, tensors):
        if np.shares_memory(tensors["hidden"], tensors["shared"]):
            tensors["shared"][...] = 0
        super().call(case, tensors)


TWO = FuzzCase("shared_expert_combine", {"T": 2, "H": 3}, dict.fromkeys(("hidden", "shared", "gate"), "float32"))
CASE = FuzzCase("silu_and_mul", {"T": 6, "I": 8}, {"gate_up": "float32"})
STRIDED = FuzzCase.from_json({**CASE.to_json(), "layouts": {"gate_up": {"kind": "strided", "rank": 2, "steps": [1, 2]}}})


@pytest.mark.parametrize(("prop", "wrong", "case"), [
    ("rows are independent", Leaky, CASE), ("repeatable", Drifting, CASE), ("layouts do not matter", Straight, STRIDED),
    ("agreement", Leaky, CASE), ("operands may be one", Clearing, TWO),
])  # fmt: skip
def test_properties_fail_for_what_breaks_them(prop, wrong, case):
    assert properties.PROPERTIES[prop](wrong("wrong"), case)


def test_views_that_touch_are_refused(monkeypatch):
    pytest.importorskip("jax")
    from moekit.jax import View

    assert properties.overlap_is_refused(executor("xla"), TWO) == []
    monkeypatch.setattr(View, "overlaps", lambda mine, other: False)
    assert len(properties.overlap_is_refused(executor("xla"), TWO)) == 3


def test_integers_must_be_equal_and_not_only_close():
    case = FuzzCase("gate_gemm", {"T": 4, "D": 64, "P": 8}, {"x": "float32", "packed": "float32"}, recipe="integers")

    class Near(Evaluate):
        def call(self, case, tensors):
            super().call(case, tensors)
            tensors["out"][...] = np.nextafter(tensors["out"], np.float32(np.inf))

    assert properties.agreement(Near("near"), case)
