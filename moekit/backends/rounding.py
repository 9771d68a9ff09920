"""Rounding float32 to a narrower float in JAX for certain: XLA may drop a narrowing cast that a widening one follows."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

BITS = {"bfloat16": (8, 7), "float16": (5, 10)}  # exponent and mantissa bits
NORMAL, STEP = 2.0**-14, 2.0**-24  # of float16: its smallest normal number, and how far apart the subnormal ones are
TO_EVEN = lax.RoundingMethod.TO_NEAREST_EVEN


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """float32 `x` with the values that `dtype` has, still float32; as it is where that is neither bfloat16 nor float16.

    XLA's reduce_precision makes zero of what is subnormal in float16; that is rounded to a multiple of the step between such
    numbers. bfloat16's subnormal numbers are float32's, which may read as zero anyhow. Derivatives pass as they are.
    """
    if dtype not in BITS:
        return x
    exponent, mantissa = BITS[dtype]
    near = lax.reduce_precision(x, exponent_bits=exponent, mantissa_bits=mantissa)
    if dtype == "bfloat16":
        return near
    return jnp.where(jnp.abs(x) < NORMAL, lax.round(x / STEP, TO_EVEN) * STEP, near)


@rounded.defjvp
def _passed(dtype: str, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return rounded(*primals, dtype), *tangents
