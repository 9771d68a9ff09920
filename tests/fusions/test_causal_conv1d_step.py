"""causal_conv1d_step in every implementation: outputs of a window, and what is left of it."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["causal_conv1d_step"]


class TestCausalConv1dStep(FusionSuite):
    """The suite, with widths of 2 to 9; blocks that channels and taps do not fill, and one of each."""

    fusion = FUSION
    sizes = (
        {"T": 5, "C": 37, "S": 3},
        {"T": 0, "C": 8, "S": 3},
        {"T": 1, "C": 1, "S": 1},
        {"T": 3, "C": 130, "S": 7},
        {"T": 9, "C": 16, "S": 8},
    )


@pytest.mark.parametrize("implementation", implementations())
def test_a_sequence_token_by_token(implementation):
    """After S tokens the state is these inputs, bit by bit, and the last output the whole convolution's."""
    values, rng = operands(FUSION, {"T": 5, "C": 37, "S": 3}, "float32"), np.random.default_rng(3)
    inputs = [values["state"][..., i] for i in range(3)] + [rng.standard_normal((5, 37)).astype(np.float32) for _ in range(4)]
    for token in range(3, 7):
        got = run(implementation, Call(FUSION, values | {"x": inputs[token]})).outputs
        np.testing.assert_array_equal(got["state"], np.stack(inputs[token - 2 : token + 1], axis=-1))
        values["state"] = got["state"]
    summed = sum(x.astype(np.float64) * w for x, w in zip(inputs[3:], values["weight"].T, strict=True))
    np.testing.assert_allclose(got["out"], summed / (1 + np.exp(-summed)), rtol=1e-5, atol=1e-6)


def test_no_program_holds_channels_of_two_rows():
    """At the 80B's width over two GPUs: 128 programs a row, so that one sequence alone has as many as there are SMs."""
    graph = FUSION.trace(example(FUSION, {"T": 1, "C": 4096, "S": 3}, "bfloat16"))
    assert str(heuristic(graph)) == "tile:T:1 tile:C:32 whole:S:4 whole:S+1:4 warps:1 stages:1 dependent"
