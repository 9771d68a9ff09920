"""expert_gate_up in every implementation: each token's own experts."""

import ml_dtypes
import numpy as np
import pytest

from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations, operands, run

FUSION = FUSIONS["expert_gate_up"]
SIZES = {"T": 5, "D": 50, "I": 24, "E": 9, "K": 3}


class TestExpertGateUp(FusionSuite):
    """The suite; its ids go past the experts there are, which gives zeros."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "D": 8, "I": 16, "E": 4, "K": 2},
        {"T": 1, "D": 1, "I": 1, "E": 1, "K": 1},
        {"T": 17, "D": 127, "I": 33, "E": 5, "K": 4},
        {"T": 2, "D": 300, "I": 8, "E": 70, "K": 10},
    )


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("ids", ["int32", "int64"])
def test_against_float64(implementation, ids):
    """The suite's own reference is not the only word on what the output is."""
    values = operands(FUSION, SIZES, "float32", seed=3)
    rng = np.random.default_rng(7)
    values["ids"] = np.stack([rng.permutation(9)[:3] for _ in range(5)]).astype(ids)
    x, weight = (values[n].astype(np.float64) for n in ("x", "gate_up"))
    both = np.einsum("td,tknd->tkn", x, weight[values["ids"]])
    gate, up = both[..., :24], both[..., 24:]
    got = run(implementation, Call(FUSION, values)).outputs["activated"]
    np.testing.assert_allclose(got, gate / (1 + np.exp(-gate)) * up, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_an_expert_that_does_not_exist(implementation):
    """As padding has it: -1, or one past the last."""
    values = operands(FUSION, SIZES, "bfloat16", seed=4)
    values["ids"] = np.array([[0, -1, 8]] * 4 + [[9, 3, 2**31 - 1]], np.int32)
    got = run(implementation, Call(FUSION, values)).outputs["activated"]
    for at in ((0, 1), (4, 0), (4, 2)):
        np.testing.assert_array_equal(got[at], np.zeros(24, ml_dtypes.bfloat16))
    assert np.all(got[4, 1] != 0)
    check(implementation, Call(FUSION, values))
