"""expert_down in every implementation: a rounding of each pair, then a sum over a token's experts."""

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["expert_down"]
SIZES = {"T": 5, "H": 50, "I": 24, "E": 9, "K": 3}


def chosen(tokens, experts, k, seed=7):
    """Distinct experts for each token."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)


class TestExpertDown(FusionSuite):
    """The suite; its ids go past the experts there are, which adds nothing."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "H": 16, "I": 8, "E": 4, "K": 2},
        {"T": 1, "H": 1, "I": 1, "E": 1, "K": 1},
        {"T": 9, "H": 127, "I": 33, "E": 5, "K": 4},
        {"T": 2, "H": 70, "I": 600, "E": 12, "K": 10},
    )


@pytest.mark.parametrize("implementation", implementations())
def test_against_float64(implementation):
    """The suite's own reference is not the only word on what the output is."""
    values = operands(FUSION, SIZES, "float32", seed=3) | {"ids": chosen(5, 9, 3)}
    activated, down, weights = (values[n].astype(np.float64) for n in ("activated", "down", "weights"))
    expected = np.einsum("tk,tki,tkih->th", weights, activated, down[values["ids"]])
    got = run(implementation, Call(FUSION, values)).outputs["out"]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_each_pair_is_rounded_before_the_sum(implementation):
    """1 + 2⁻⁹ is 1 in bfloat16, so four experts that give it give 4, where an unrounded sum would give 4 + 2⁻⁷ (4.03 after

    one with weight 4, which is 2⁻⁵ more than bfloat16 can tell at 4)."""
    kind = ml_dtypes.bfloat16
    values = {
        "activated": np.array([[[1, 2**-9]] * 4], kind),
        "down": np.ones((4, 2, 3), kind),
        "ids": np.arange(4, dtype=np.int32)[None],
        "weights": np.array([[1, 1, 1, 5]], np.float32) * np.float32(8),
    }
    got = run(implementation, Call(FUSION, values)).outputs["out"]
    np.testing.assert_array_equal(got.astype(np.float32), np.full((1, 3), 64, np.float32))


@pytest.mark.parametrize("implementation", implementations())
def test_an_expert_that_does_not_exist_adds_nothing(implementation):
    values = operands(FUSION, SIZES, "float32", seed=4) | {"ids": chosen(5, 9, 3)}
    alone = {**values, "weights": values["weights"] * np.array([1, 0, 1], np.float32)}
    missing = {**values, "ids": np.where(np.arange(3) == 1, -1, values["ids"]).astype(np.int32)}
    results = [run(implementation, Call(FUSION, v)).outputs["out"] for v in (alone, missing)]
    np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)


def test_every_pair_has_programs_of_its_own():
    """At the 80B's width over two GPUs: one program for each pair and 64 columns, and one launch that adds up."""
    graph = FUSION.trace(example(FUSION, {"T": 1, "H": 2048, "I": 256, "E": 512, "K": 10}, "bfloat16"))
    assert str(heuristic(graph)) == (
        "tile:K.part:1 tile:T:1 loop:K:1 whole:I:256 tile:H:64 warps:4 stages:1 dependent split:K:10 then "
        "loop:K.part:1 tile:T:1 tile:H:256 warps:4 stages:1 dependent"
    )
