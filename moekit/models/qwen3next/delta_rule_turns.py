"""The gated delta rule over whole sequences by a kernel that keeps a head's state while it goes from chunk to chunk.

The same chunks as in `delta_rule.py`, of which only what they add up among themselves is made for all at once; a chunk's state
is never written. Formula: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024), section 3.3.
"""

from __future__ import annotations

from functools import partial
from math import prod

import jax
import jax.numpy as jnp

from moekit.jax import View, view
from moekit.models.qwen3next.delta_rule import CHUNK, Solve, inverse
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.numerics import in_parts, product


def delta_rule_in_turns(
    convolved: jax.Array,
    dims: tuple[int, int],
    decay: jax.Array,
    beta: jax.Array,
    state: jax.Array | None,
    scales: tuple[jax.Array, jax.Array],
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array]:
    """As `chunked_delta_rule`, whose q | k | v are the columns of convolved [B, S, C], in heads of `dims` = (Dk, Dv).

    decay, beta [B, S, V]; scales: of q and of k, [B, S, K] each -> read [B, S, V, Dv] in convolved's dtype, state float32.
    """
    batch, length, _ = convolved.shape
    values, keys = beta.shape[2], scales[0].shape[2]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    cut = partial(_cut, shape=(-(-length // chunk), chunk))
    of_q, of_k = (cut(jnp.repeat(a, values // keys, axis=2)) for a in scales)
    convolved, decay, beta = map(cut, (convolved, decay, beta))
    q, k, v = _heads(convolved, (keys, dims[0]), (keys, dims[0]), (values, dims[1]))
    total = jnp.cumsum(decay, axis=2)  # log of the decay since the chunk began
    solved, attend = _within(q.array(), k.array(), total, beta, of_q, of_k, kernels.unit_lower_inverse)
    last = total[..., -1:, :]
    since, left, asked = of_k * jnp.exp(total), of_k * jnp.exp(last - total), of_q * jnp.exp(total)
    solved, attend = (in_parts(a, convolved.dtype, axis=-2) for a in (solved, attend))
    given = q, k, solved, attend, v, since, left, asked, jnp.exp(last)[..., 0, :]
    begin = jnp.zeros((batch, values, *dims), jnp.float32) if state is None else state
    read, after = kernels.delta_rule_chunks(*given, begin)
    return read.reshape(batch, -1, values, dims[1])[:, :length], after


def _cut(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, S, …] -> [B, *shape, …], the end padded with zeros."""
    missing = prod(shape) - a.shape[1]
    if missing:
        a = jnp.pad(a, ((0, 0), (0, missing)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(a.shape[0], *shape, *a.shape[2:])


def _heads(columns: jax.Array, *parts: tuple[int, int]) -> list[View]:
    """Neighbouring columns [..., C] as heads, [..., count, dim] each: views where all are of one width."""
    if len({dim for _, dim in parts}) > 1:
        ends = [sum(n * d for n, d in parts[:i]) for i in range(1, len(parts))]
        arrays = jnp.split(columns, ends, axis=-1)
        return [view(a.reshape(*a.shape[:-1], *part)) for a, part in zip(arrays, parts, strict=True)]
    whole = view(columns.reshape(*columns.shape[:-1], -1, parts[0][1]))
    starts = [sum(n for n, _ in parts[:i]) for i in range(len(parts))]
    return [whole[..., start : start + n, :] for start, (n, _) in zip(starts, parts, strict=True)]


def _within(
    q: jax.Array,
    k: jax.Array,
    total: jax.Array,
    beta: jax.Array,
    of_q: jax.Array,
    of_k: jax.Array,
    solve: Solve,
) -> tuple[jax.Array, jax.Array]:
    """What a chunk's tokens make of each other: solved and attend, [..., V, c, c], of q and k [..., c, K, D]."""
    times = partial(product, exact=k.dtype == jnp.float32)
    chunk, ratio = k.shape[-3], beta.shape[-1] // k.shape[-2]
    total, beta, of_q, of_k = (jnp.swapaxes(a, -1, -2) for a in (total, beta, of_q, of_k))  # [..., V, c]
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    between = jnp.exp(jnp.where(lower, total[..., :, None] - total[..., None, :], -jnp.inf)) * of_k[..., None, :]
    among, asked = (jnp.repeat(times("...tkd,...skd->...kts", a, k), ratio, axis=-3) for a in (k, q))
    system = among * between * (of_k * beta)[..., None]
    solved = inverse(system.reshape(-1, chunk, chunk), times, solve).reshape(system.shape)
    return solved * beta[..., None, :], asked * between * of_q[..., None]
