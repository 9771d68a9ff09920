"""conv_projections in every implementation: a product, rounded, and what causal_conv1d_step makes of it."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["conv_projections"]
SIZES = {"T": 3, "D": 70, "C": 37, "P": 9, "S": 3}


class TestConvProjections(FusionSuite):
    """The suite, with widths that fill no block, and one of each."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "D": 16, "C": 8, "P": 4, "S": 3},
        {"T": 1, "D": 1, "C": 1, "P": 1, "S": 1},
        {"T": 2, "D": 300, "C": 19, "P": 5, "S": 7},
    )


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_a_product_and_the_convolution(implementation, dtype):
    """Products of small integers are exact: the state gains them bit by bit, and the rest is them."""
    rng, values = np.random.default_rng(5), operands(FUSION, SIZES, dtype, seed=5)
    for name in ("x", "mixing", "others"):
        values[name] = rng.integers(-2, 3, values[name].shape).astype(values[name].dtype)
    got = run(implementation, Call(FUSION, values)).outputs
    mixed, rest = (
        np.einsum("td,cd->tc", values["x"].astype(np.float64), values[n].astype(np.float64)).astype(values["x"].dtype)
        for n in ("mixing", "others")
    )
    np.testing.assert_array_equal(got["rest"].astype(np.float64), rest.astype(np.float64))
    np.testing.assert_array_equal(got["state"][..., -1].astype(np.float64), mixed.astype(np.float64))
    conv = Call(FUSIONS["causal_conv1d_step"], {"x": mixed, "state": values["state"], "weight": values["weight"]})
    wanted = run(implementation, conv).outputs
    np.testing.assert_allclose(got["out"].astype(np.float64), wanted["out"].astype(np.float64), rtol=2e-2, atol=1e-6)


def test_a_program_has_whole_rows_of_the_matrices():
    """At the 80B's width over two GPUs: four of them, 16 KiB, and the convolution of their channels."""
    graph = FUSION.trace(example(FUSION, {"T": 1, "D": 2048, "C": 4096, "P": 2176, "S": 3}, "bfloat16"))
    assert str(heuristic(graph)) == (
        "rest(tile:T:1 whole:D:2048 tile:P:4) out,state(tile:T:1 whole:D:2048 tile:C:4 whole:S:4 whole:S+1:4) "
        "warps:4 stages:1 dependent"
    )
