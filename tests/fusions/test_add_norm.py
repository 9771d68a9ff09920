"""Products with the residual sum and its norm before them, in every implementation, beside what they are made of."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

GATES, SCALED = FUSIONS["add_norm_gate_projections"], FUSIONS["scaled_add_norm_gate_projections"]
GATE_SIZES = {"T": 3, "H": 70, "I": 5, "E": 9, "G": 1}


class TestAddNormGateProjections(FusionSuite):
    """The suite, with widths that fill no block."""

    fusion = GATES
    sizes = (GATE_SIZES, {"T": 0, "H": 16, "I": 4, "E": 4, "G": 1}, {"T": 2, "H": 300, "I": 19, "E": 7, "G": 2})


class TestScaledAddNormGateProjections(FusionSuite):
    """The suite, with blocks that fill no axis."""

    fusion = SCALED
    sizes = (GATE_SIZES, GATE_SIZES | {"T": 0})
    params = ({"columns": 32, "inner": 4},)
    recipes = ("special",)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_is_that_of_its_own_fusion(implementation, dtype):
    """The sum is its, bit by bit; the row may be added up in another order."""
    values = operands(GATES, GATE_SIZES, dtype, seed=5)
    got = run(implementation, Call(GATES, values, {"offset": 0.5})).outputs
    alone = {"x": values["x"], "residual": values["residual"], "weight": values["norm"]}
    wanted = run("interpret", Call(FUSIONS["add_rms_norm"], alone, {"offset": 0.5})).outputs
    np.testing.assert_array_equal(got["total"], wanted["residual"])
    np.testing.assert_allclose(got["normed"].astype(np.float64), wanted["out"].astype(np.float64), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("implementation", implementations())
def test_gates_are_those_of_the_normed_row(implementation):
    """What comes out as normed, given to `gate_projections`, gives the other outputs."""
    values = operands(GATES, GATE_SIZES, "float32", seed=6)
    got = run(implementation, Call(GATES, values)).outputs
    after = {"x": got["normed"]} | {n: values[n] for n in ("gate_up", "router", "shared_gate")}
    wanted = FUSIONS["gate_projections"].reference(**after)
    for name, expected in wanted.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_programs_of_products_have_the_warps_of_products():
    """At the 80B's width: the program that writes the norm has as many lanes as the products' want, not the other way round."""
    graph = GATES.trace(example(GATES, {"T": 1, "H": 2048, "I": 512, "E": 512, "G": 1}, "bfloat16"))
    assert str(heuristic(graph)) == (
        "normed,total(tile:T:1 whole:H:2048) activated(tile:T:1 whole:H:2048 tile:I:2) logits(tile:T:1 whole:H:2048 tile:E:4) "
        "share(tile:T:1 whole:H:2048 tile:G:1) warps:4 stages:1 dependent"
    )
