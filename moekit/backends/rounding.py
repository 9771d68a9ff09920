"""Rounding float32 to a narrower float in JAX for certain: XLA may drop a narrowing cast that a widening one follows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moekit.backends.libraries import NO_DERIVATIVE
from moekit.errors import UnavailableError

# Exponent and mantissa bits; of float8_e4m3fn one more than it has, whose largest exponent is that of numbers, too.
BITS = {"bfloat16": (8, 7), "float16": (5, 10), "float8_e4m3fn": (5, 3)}
# The smallest normal number, and how far apart the subnormal ones are.
SMALL = {"float16": (2.0**-14, 2.0**-24), "float8_e4m3fn": (2.0**-6, 2.0**-9)}
TO_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """float32 `x` with the values that `dtype` has, still float32; as it is where that is no narrower float.

    XLA's reduce_precision makes zero of what is subnormal in float16; that is rounded to a multiple of the step between such
    numbers, as it is in float8_e4m3fn, whose numbers end at 448 before. bfloat16's subnormal numbers are float32's, which may
    read as zero anyhow. Derivatives pass as they are.
    """
    if dtype not in BITS:
        return x
    exponent, mantissa = BITS[dtype]
    near = lax.reduce_precision(x, exponent_bits=exponent, mantissa_bits=mantissa)
    if dtype not in SMALL:
        return near
    normal, step = SMALL[dtype]
    return jnp.where(jnp.abs(x) < normal, lax.round(x / step, TO_EVEN) * step, near)


@rounded.defjvp
def _passed(dtype: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return rounded(*primals, dtype), *tangents


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def narrowed(x: jax.Array, dtype: str) -> jax.Array:
    """float32 `x` rounded to a dtype that nothing is computed in, gradients neither: it has no derivative."""
    return rounded(x, dtype).astype(dtype)


@narrowed.defjvp
def _refused(dtype: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    raise UnavailableError(NO_DERIVATIVE)
