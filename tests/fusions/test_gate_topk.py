"""gate_topk in every implementation: gates, and the choice that the router makes, with no logits between."""

import numpy as np
import pytest

from moekit.compile.rules import heuristic
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["gate_topk"]
SIZES = {"T": 5, "I": 12, "E": 21, "G": 1, "D": 72}


class TestGateTopk(FusionSuite):
    """The suite, with widths that fill no block, one of each, and a shared gate of several columns."""

    fusion = FUSION
    sizes = (
        {"T": 5, "I": 9, "E": 21, "G": 1, "D": 70},
        {"T": 0, "I": 4, "E": 8, "G": 1, "D": 16},
        {"T": 1, "I": 1, "E": 4, "G": 1, "D": 1},
        {"T": 3, "I": 16, "E": 130, "G": 3, "D": 300},
    )
    params = ({"k": 4}, {"k": 3, "renormalize": False}, {"k": 4, "nan_to_zero": True})


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_as_the_two_fusions_one_after_the_other(implementation, dtype):
    """Exact products, and a softmax of the same logits: the same ids, ties to the lower, and weights within a few ulps."""
    rng, values = np.random.default_rng(5), operands(FUSION, SIZES, dtype, seed=5)
    values = {n: (rng.integers(-2, 3, x.shape) / (8 if n == "x" else 1)).astype(x.dtype) for n, x in values.items()}
    got = run(implementation, Call(FUSION, values, {"k": 7})).outputs
    gates = run(implementation, Call(FUSIONS["gate_projections"], values)).outputs
    chosen = run(implementation, Call(FUSIONS["topk_softmax"], {"logits": gates.pop("logits")}, {"k": 7})).outputs
    np.testing.assert_array_equal(got["ids"], chosen["ids"])
    for name, wanted in (gates | {"weights": chosen["weights"]}).items():
        np.testing.assert_allclose(got[name].astype(np.float64), wanted.astype(np.float64), rtol=1e-6, err_msg=name)


def test_two_launches():
    """At the 80B's width over two GPUs: a row's choice is made by the program that adds up its logits."""
    graph = FUSION.trace(example(FUSION, {"T": 1, "I": 256, "D": 2048, "E": 512, "G": 1}, "bfloat16", {"k": 10}))
    first, second = heuristic(graph).launches
    assert [s.outputs for s in second.sections] == [("activated",), ("share",), ("weights", "ids")]
    assert len(first.sections) == 4
