"""row_product in every implementation."""

import numpy as np
import pytest

from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["row_product"]
SIZES = {"T": 3, "D": 70, "P": 9}


class TestRowProduct(FusionSuite):
    """The suite, with widths that fill no block, and one of each."""

    fusion = FUSION
    sizes = (SIZES, {"T": 0, "D": 16, "P": 4}, {"T": 1, "D": 1, "P": 1}, {"T": 2, "D": 300, "P": 19})
    params = ({}, {"wide": True})


@pytest.mark.parametrize("implementation", implementations())
def test_a_wide_product_is_not_rounded(implementation):
    """Products of small integers are exact in float32 where bfloat16 could not hold their sums."""
    rng, values = np.random.default_rng(5), operands(FUSION, SIZES, "bfloat16", seed=5)
    for name in values:
        values[name] = rng.integers(0, 8, values[name].shape).astype(values[name].dtype)
    got = run(implementation, Call(FUSION, values, {"wide": True})).outputs["out"]
    wanted = values["x"].astype(np.float64) @ values["weight"].astype(np.float64).T
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, wanted)
    assert (wanted.astype(values["x"].dtype).astype(np.float64) != wanted).any()
