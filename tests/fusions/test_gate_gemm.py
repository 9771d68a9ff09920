"""gate_gemm in every implementation."""

from dataclasses import replace

import numpy as np
import pytest

from moekit.compile.rules import spread
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations, operands, run

FUSION = FUSIONS["gate_gemm"]


class TestGateGemm(FusionSuite):
    """The suite, with widths that fill no block and a contracted axis too short for a matrix unit."""

    fusion = FUSION
    sizes = (
        {"T": 5, "P": 35, "D": 70},
        {"T": 0, "P": 8, "D": 16},
        {"T": 1, "P": 1, "D": 1},
        {"T": 17, "P": 33, "D": 127},
        {"T": 3, "P": 64, "D": 7},
        {"T": 16, "P": 32, "D": 257},
    )


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [31, 32, 200])
def test_split_contraction(parts, size):
    """Partial sums of any number of parts, some of them empty, add up to the whole."""
    values = operands(FUSION, {"T": 3, "P": 20, "D": size}, "float32")
    call = Call(FUSION, values)
    check("interpret", replace(call, schedule=spread(call.graph, f"tile:T:16 loop:D:16 tile:P:16 split:D:{parts}")))


@pytest.mark.parametrize("implementation", implementations())
def test_float32_is_not_rounded_to_tf32(implementation):
    """Operands with more than ten bits of mantissa keep them all."""
    values = operands(FUSION, {"T": 16, "P": 32, "D": 64}, "float32", seed=5)
    assert check(implementation, Call(FUSION, values)).worst < 1


@pytest.mark.parametrize("implementation", implementations())
def test_small_integers_are_exact(implementation):
    """Every order of addition gives the same sum of small integers."""
    values = operands(FUSION, {"T": 9, "P": 40, "D": 300}, "bfloat16", "integers")
    outcome = run(implementation, Call(FUSION, values))
    wanted = values["x"].astype(np.float32) @ values["packed"].astype(np.float32).T
    np.testing.assert_array_equal(outcome.outputs["out"], wanted.astype(values["x"].dtype))
