"""A block's projections: products with weights in the model's dtype, or with float8 ones and their scales."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import OUT, SCALE, STACK, Layer
from moekit.models.qwen3next.numerics import linear

MOST = 256  # rows up to which the kernel is used; for more XLA's product of widened weights is faster than it


def projected(x: jax.Array, weights: Layer, *names: str, kernels: Kernels | None = None) -> jax.Array:
    """x [..., D] times matrices that are neighbours, transposed: [..., N] in x's dtype.

    Of float8 weights by kernels, of one row by lanes, where there are kernels; else these are widened to x's dtype.
    """
    if names[0] + SCALE not in weights.layout:
        return linear(x, weights[names[0]] if len(names) == 1 else weights.together(*names))
    if kernels is None or not kernels.fused or x.size // x.shape[-1] > MOST:
        return linear(x, widened(weights, *names, dtype=x.dtype))
    rows, columns = weights.block(names[0])
    flat, scale = x.reshape(-1, x.shape[-1]), weights.view(names[0] + SCALE)
    how = {"rows": rows, "columns": columns, "lanes": len(flat) == 1}
    out = kernels.scaled_product(flat, weights.beside(*names), scale, **how)
    return out.reshape(*x.shape[:-1], -1)


def widened(weights: Layer, *names: str, dtype: jnp.dtype) -> jax.Array:
    """Neighbouring float8 matrices times their scales, in a dtype that kernels are not needed for."""
    codes = weights[names[0]] if weights.layout[names[0]].home in (OUT, STACK) else weights.together(*names)
    rows, columns = weights.block(names[0])
    scales = jnp.repeat(jnp.repeat(weights[names[0] + SCALE], rows, axis=0), columns, axis=1)
    return (codes.astype(jnp.float32) * scales[: codes.shape[0], : codes.shape[1]]).astype(dtype)
