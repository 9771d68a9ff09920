"""Rounding in JAX that XLA does not drop: the values of a narrow float, subnormal ones too."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moekit.models.qwen3next.numerics import round_to


def between_neighbours(dtype) -> np.ndarray:
    """float32: every finite number of a float of 16 bits, what stands half way to the next, and both sides of that."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    halves = ((every[:-1].astype(np.float64) + every[1:]) / 2).astype(np.float32)
    halves = halves[halves != 0]
    beside = (np.nextafter(halves, np.float32(way)) for way in (-np.inf, np.inf))
    return np.concatenate([every, halves, *beside])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_it_is_numpy_s_rounding(dtype):
    """To the nearest, ties to even. What is subnormal in float32 may read as zero."""
    x = between_neighbours(dtype)
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)]
    with np.errstate(over="ignore"):
        wanted = x.astype(dtype).astype(np.float32)
    got = jax.jit(lambda x: round_to(x, dtype).astype(jnp.float32))(x)
    kept = np.abs(wanted) >= 2.0**-126
    np.testing.assert_array_equal(np.asarray(got)[kept], wanted[kept])
    np.testing.assert_array_equal(np.signbit(got), np.signbit(wanted))
    assert np.abs(np.asarray(got)[~kept]).max() <= 2.0**-126


def test_what_float16_leaves_of_a_number_is_not_lost():
    """Two parts of a number hold about 21 of its bits; the second of a small one is subnormal."""
    x = np.random.default_rng(0).uniform(2**-5, 0.5, 1000).astype(np.float32)

    def parts(x):
        high = round_to(x, jnp.float16).astype(jnp.float32)
        return high, round_to(x - high, jnp.float16).astype(jnp.float32)

    high, low = jax.jit(parts)(x)
    assert np.abs(np.asarray(high) + np.asarray(low) - x).max() <= 2.0**-25


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_its_derivative_is_that_of_a_cast(dtype):
    """Also where a number, or what is propagated back to it, is subnormal in the dtype."""
    x = jnp.asarray([2.0**-20, 3e-5, 0.3, -7.0, 0.0], jnp.float32)
    for scale in (1.0, 2.0**-16, 2.0**-20):
        _, back = jax.vjp(lambda x: round_to(x, dtype).astype(jnp.float32), x)
        assert list(back(jnp.full_like(x, scale))[0]) == [scale] * 5
        _, ahead = jax.jvp(lambda x: round_to(x, dtype).astype(jnp.float32), (x,), (jnp.full_like(x, scale),))
        assert list(ahead) == [scale] * 5
