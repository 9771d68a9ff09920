"""expert_down_shared in every implementation: two fusions' arithmetic in the launches of one."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["expert_down_shared"]
SIZES = {"T": 5, "H": 50, "I": 24, "J": 20, "E": 9, "K": 3}


class TestExpertDownShared(FusionSuite):
    """The suite; its ids go past the experts there are, which adds nothing."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "H": 16, "I": 8, "J": 8, "E": 4, "K": 2},
        {"T": 1, "H": 1, "I": 1, "J": 1, "E": 1, "K": 1},
        {"T": 9, "H": 127, "I": 33, "J": 17, "E": 5, "K": 4},
        {"T": 2, "H": 70, "I": 600, "J": 300, "E": 12, "K": 10},
    )


def chosen(tokens, experts, k, seed=7):
    """Distinct experts for each token."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)


@pytest.mark.parametrize("implementation", implementations())
def test_against_float64(implementation):
    """The suite's own reference is not the only word on what the output is."""
    values = operands(FUSION, SIZES, "float32", seed=3) | {"ids": chosen(5, 9, 3)}
    wide = {n: x.astype(np.float64) for n, x in values.items() if n != "ids"}
    expected = np.einsum("tk,tki,tkih->th", wide["weights"], wide["activated"], wide["down"][values["ids"]])
    expected += wide["share"] * np.einsum("tj,hj->th", wide["shared"], wide["shared_down"])
    got = run(implementation, Call(FUSION, values)).outputs["out"]
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_as_the_two_fusions_one_after_the_other(implementation, dtype):
    """expert_down, then down_combine, rounded at the same places: exact products, so that no order of sums matters."""
    rng = np.random.default_rng(5)
    values = operands(FUSION, SIZES, dtype, seed=5) | {"ids": chosen(5, 9, 3)}
    for name in ("activated", "down", "shared", "shared_down"):
        values[name] = rng.integers(-8, 9, values[name].shape).astype(values[name].dtype)
    values["weights"] = rng.integers(1, 9, values["weights"].shape).astype(values["weights"].dtype)
    values["share"] = rng.integers(1, 5, values["share"].shape).astype(values["share"].dtype) / 4
    got = run(implementation, Call(FUSION, values)).outputs["out"]
    routed = run(implementation, Call(FUSIONS["expert_down"], {n: values[n] for n in ("activated", "down", "ids", "weights")}))
    rest = {"hidden": routed.outputs["out"], "activated": values["shared"], "down": values["shared_down"]}
    wanted = run(implementation, Call(FUSIONS["down_combine"], rest | {"share": values["share"]})).outputs["hidden"]
    np.testing.assert_array_equal(got.astype(np.float32), wanted.astype(np.float32))


def test_two_launches():
    """At the 80B's width over two GPUs: the pairs and beside them the shared expert's product, then their sum."""
    graph = FUSION.trace(example(FUSION, {"T": 1, "H": 2048, "I": 256, "J": 256, "E": 512, "K": 10}, "bfloat16"))
    assert str(heuristic(graph)) == (
        "staged_product_j(tile:T:16 tile:H:32 loop:J:256 prefetch:shared_down) "
        "staged_rounded(tile:T:1 tile:K:1 whole:I:256 tile:H:64) warps:4 stages:4 dependent stage:product_j,rounded then "
        "tile:T:1 whole:K:16 tile:H:32 warps:2 stages:1 dependent"
    )
