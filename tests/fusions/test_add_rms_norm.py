"""add_rms_norm in every implementation."""

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, check, implementations, operands, run

FUSION = FUSIONS["add_rms_norm"]


class TestAddRmsNorm(FusionSuite):
    """The suite, zero-centred and plain."""

    fusion = FUSION
    sizes = (
        {"T": 5, "H": 50},
        {"T": 0, "H": 16},
        {"T": 1, "H": 1},
        {"T": 3, "H": 64},
        {"T": 2, "H": 257},
        {"T": 33, "H": 31},
    )
    params = ({}, {"offset": 0.0, "eps": 1e-5})


@pytest.mark.parametrize("size", [2048, 5120, 16384, 20000])
@pytest.mark.parametrize("implementation", implementations())
def test_wide_rows(implementation, size):
    """Whole rows up to 16384, looped beyond."""
    check(implementation, Call(FUSION, operands(FUSION, {"T": 2, "H": size}, "bfloat16", seed=size)))


@pytest.mark.parametrize("text", ["tile:T:1 loop:H:4096", "tile:T:2 loop:H:1024", "tile:T:1 whole:H:16384"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_looped_and_whole_rows(text, dtype):
    """The same width under schedules that loop and one that does not."""
    values = operands(FUSION, {"T": 3, "H": 10007}, dtype)
    check("interpret", Call(FUSION, values, schedule=Schedule.parse(text)))


@pytest.mark.parametrize("implementation", implementations())
def test_small_weights_survive_the_offset(implementation):
    """1 + w is formed in float32: bfloat16 would lose weights below 1/256."""
    values = operands(FUSION, {"T": 3, "H": 40}, "bfloat16")
    values["weight"] = np.linspace(-2e-3, 2e-3, 40).astype(ml_dtypes.bfloat16)
    check(implementation, Call(FUSION, values))


@pytest.mark.parametrize("implementation", implementations())
def test_residual_is_rounded_like_float32(implementation):
    """Sums on and beside ties of bfloat16 come out as float32 addition and one cast give them, bit for bit."""
    x = np.array([[1.0, 1.0, 1.0, 256.0, 1.0, -1.0]], ml_dtypes.bfloat16)
    step = np.array([[2.0**-8, 3 * 2.0**-8, 2.0**-8 + 2.0**-15, 1.0, 2.0**-30, -(2.0**-8)]], ml_dtypes.bfloat16)
    values = {"x": x, "residual": step, "weight": np.ones(6, ml_dtypes.bfloat16)}
    outcome = run(implementation, Call(FUSION, values))
    expected = (x.astype(np.float32) + step.astype(np.float32)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(outcome.outputs["residual"], expected)
    check(implementation, Call(FUSION, values))


@pytest.mark.parametrize("implementation", implementations())
def test_mixed_dtypes(implementation):
    """A float32 residual and weight beside bfloat16 activations; the residual keeps its own dtype."""
    wanted = {"x": "bfloat16", "residual": "float32", "weight": "float16"}
    check(implementation, Call(FUSION, operands(FUSION, {"T": 4, "H": 65}, wanted)))
