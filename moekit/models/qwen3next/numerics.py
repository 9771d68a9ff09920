"""Products, rounding points and norms that the layers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moekit.backends.rounding import rounded

PARTS = lax.DotAlgorithmPreset.BF16_BF16_F32_X3
_EXPONENTS = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80),
              "float8_e4m3fn": (np.uint8, 0x7F)}  # fmt: skip
_AT_ONCE = 1 << 18  # values of an array that are looked at together: they stay in a cache


def round_to(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` in `dtype`, rounded for certain: XLA may drop a narrowing cast that a widening one follows."""
    return rounded(x, jnp.dtype(dtype).name).astype(dtype)


def in_parts(x: jax.Array, dtype: jnp.dtype, axis: int) -> jax.Array:
    """Two that add up to a float32 x, one after the other along an axis: x rounded to a dtype, and what that leaves."""
    high = round_to(x, dtype)
    return jnp.concatenate([high, round_to(x - high.astype(jnp.float32), dtype)], axis=axis)


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """IEEE products for float32 operands, which GPUs would otherwise round to TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def linear(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., D] times weight [N, D] transposed: [..., N] in `out_dtype`, x's by default; float32 sums."""
    dot = partial(
        lax.dot_general,
        dimension_numbers=(((x.ndim - 1,), (1,)), ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=x.dtype if out_dtype is None else out_dtype,
    )
    return dot(x, weight) if out_dtype is None else _widened_on_cpu(dot, x, weight)


def einsum(subscripts: str, *operands: jax.Array) -> jax.Array:
    """jnp.einsum with a float32 result, IEEE for float32 operands."""
    kind = precision(operands[0].dtype)
    product = partial(jnp.einsum, subscripts, precision=kind, preferred_element_type=jnp.float32)
    return _widened_on_cpu(product, *operands)


def product(subscripts: str, *operands: jax.Array, exact: bool = False) -> jax.Array:
    """jnp.einsum of two operands of any dtypes with a float32 result.

    Products of float32 are IEEE where exact, and on a CPU; else of bfloat16 parts, three for each: an error of 2⁻¹⁶ of the
    factors, where a GPU has no unit that multiplies matrices of float32.
    """
    if all(a.dtype == jnp.bfloat16 for a in operands):
        return einsum(subscripts, *operands)
    wide = [a.astype(jnp.float32) for a in operands]

    def of(kind: Any) -> Callable[..., jax.Array]:
        return lambda *a: jnp.einsum(subscripts, *a, precision=kind, preferred_element_type=jnp.float32)

    ieee = of(lax.Precision.HIGHEST)
    return ieee(*wide) if exact else lax.platform_dependent(*wide, cpu=ieee, default=of(PARTS))


def _widened_on_cpu(product: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """XLA on CPU lacks products of narrow operands with a float32 result; widening them is the same."""
    if operands[0].dtype == jnp.float32:
        return product(*operands)
    return lax.platform_dependent(
        *operands, cpu=lambda *narrow: product(*(a.astype(jnp.float32) for a in narrow)), default=product
    )


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """Zero-centred RMSNorm over the last axis, x·rsqrt(mean x² + eps)·(1 + weight), in float32."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return wide * scale * (1.0 + jnp.expand_dims(weight, range(x.ndim - 1)).astype(jnp.float32))


def finite(values: np.ndarray) -> bool:
    """Whether an array of float32, float16, bfloat16 or float8 holds neither NaN nor an infinity: read once, by its bits."""
    width, exponent = _EXPONENTS[values.dtype.name]  # all bits of the exponent are set in NaN and infinities alone
    bits = values.reshape(-1).view(width)
    return all((bits[at : at + _AT_ONCE] & width(exponent)).max() < exponent for at in range(0, bits.size, _AT_ONCE))
