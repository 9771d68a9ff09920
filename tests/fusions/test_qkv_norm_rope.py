"""qkv_norm_rope in every implementation: heads normed and rotated, keys and values in their caches and nowhere else."""

import numpy as np
import pytest

from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.testing import Call, FusionSuite, implementations, operands, run

FUSION = FUSIONS["qkv_norm_rope"]
SIZES = {"T": 5, "Q": 3, "K": 2, "L": 7, "R": 4, "N": 12, "Dv": 12}


class TestQkvNormRope(FusionSuite):
    """The suite, with heads that turn in part, whole and by one pair; no tokens; heads and sizes that fill no block."""

    fusion = FUSION
    sizes = (
        SIZES,
        {"T": 0, "Q": 2, "K": 1, "L": 4, "R": 2, "N": 4, "Dv": 8},
        {"T": 1, "Q": 1, "K": 1, "L": 1, "R": 1, "N": 0, "Dv": 1},
        {"T": 2, "Q": 5, "K": 1, "L": 9, "R": 8, "N": 0, "Dv": 16},
        {"T": 2, "Q": 2, "K": 3, "L": 3, "R": 11, "N": 45, "Dv": 5},
    )
    recipes = ("tiny", "special")


def frequencies(theta: float, half: int) -> np.ndarray:
    """θ^(-i/half) as models hold them."""
    return (1.0 / theta ** (np.arange(half, dtype=np.float32) / np.float32(half))).astype(np.float32)


@pytest.mark.parametrize("implementation", implementations())
def test_only_a_rows_own_position_is_written(implementation):
    """Positions before a cache and past it are put nowhere; two rows may have the same one, in caches of their own."""
    values = operands(FUSION, SIZES, "float32", seed=2)
    values["positions"] = np.array([3, 3, -1, 7, 6], values["positions"].dtype)
    values["frequencies"] = frequencies(1e7, SIZES["R"])
    before = {n: values[n].copy() for n in ("k_cache", "v_cache")}
    got = run(implementation, Call(FUSION, values)).outputs
    expected = FUSION.reference(**values, eps=1e-6, offset=1.0)
    at = np.zeros((5, 1, 7, 1), bool)
    at[[0, 1, 4], :, [3, 3, 6]] = True
    for name, old in before.items():
        np.testing.assert_array_equal(np.where(at, 0, got[name]), np.where(at, 0, old))
        np.testing.assert_allclose(got[name], expected[name], rtol=3e-6, atol=1e-5)
    np.testing.assert_array_equal(got["v_cache"][4, :, 6], values["v"][4])
    np.testing.assert_allclose(got["q_out"], expected["q_out"], rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("implementation", implementations())
def test_far_positions(implementation):
    """At a position of 131072 the fastest pair has turned by as many radians, and is turned by them to float32's accuracy."""
    values = operands(FUSION, SIZES, "float32", seed=2)
    values["positions"] = np.array([0, 1, 131071, 131072, 1000003], values["positions"].dtype)
    values["frequencies"] = frequencies(1e7, SIZES["R"])
    got = run(implementation, Call(FUSION, values)).outputs["q_out"]
    wanted = FUSION.reference(**values, eps=1e-6, offset=1.0)["q_out"]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("implementation", implementations())
def test_an_infinite_weight_is_one_of_its_pair_alone(implementation):
    """It makes both of a pair infinite, and no number of them: what is finite is not multiplied by zero."""
    values = operands(FUSION, SIZES, "float32", seed=7)
    values |= {"positions": np.full(5, 3, values["positions"].dtype), "frequencies": frequencies(1e2, SIZES["R"])}
    values["q_weight"][2] = np.inf
    got = run(implementation, Call(FUSION, values)).outputs["q_out"]
    assert np.isinf(got[..., [2, 6]]).all()
    assert np.isfinite(np.delete(got, [2, 6], axis=-1)).all()


def test_more_pairs_than_a_head_has():
    """One sentence, before anything is compiled."""
    with pytest.raises(ShapeError, match=r"q has 20 elements in dimension 2; it must be 2\*R\+N"):
        Call(FUSION, operands(FUSION, SIZES) | {"frequencies": np.ones(11, np.float32)}).graph  # noqa: B018
