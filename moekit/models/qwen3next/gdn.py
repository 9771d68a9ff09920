"""The gated delta net: a causal convolution, the gated delta rule, a gated norm.

`decode` and `prefill` compute one rank's partial output; the caller sums over ranks. A rank's weights hold its own
heads: K key heads, V value heads, C = 2·K·Dk + V·Dv channels of the convolution, in the order q | k | v.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moekit.jax import view
from moekit.models.qwen3next.cache import DeltaState
from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.delta_rule import CHUNK, chunked_delta_rule
from moekit.models.qwen3next.delta_rule_turns import delta_rule_in_turns
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import SCALE, Layer
from moekit.models.qwen3next.numerics import linear, round_to
from moekit.models.qwen3next.projected import projected

AT_ONCE = 8192  # tokens, of all sequences, whose chunks are held at a time
ROWS = 16  # up to which a step's convolution is where float8 projections are added up: one block of the matrix unit's


@partial(jax.jit, static_argnames=("config", "kernels"))
def decode(
    x: jax.Array, weights: Layer, state: DeltaState, at: jax.Array | None, config: Config, kernels: Kernels
) -> tuple[jax.Array, DeltaState]:
    """One token of each sequence: x [B, H] -> partial output [B, H] and the new state; `at`: where that is in a stack."""
    channels, value_heads = weights.layout["conv1d"].shape[0], weights.layout["A_log"].shape[0]
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    keys = (channels - value_heads * value_dim) // 2
    inputs, memory = (view(held) if at is None else view(held)[at] for held in (state.conv, state.recurrent))
    inputs = inputs.transpose(0, 2, 1)  # channels before what each remembers
    if kernels.fused and x.shape[0] <= ROWS and "in_proj_qkvz" + SCALE in weights.layout:
        every, scales = weights.view("in_proj_qkvz"), weights.view("in_proj_qkvz" + SCALE)
        rows, columns = weights.block("in_proj_qkvz")
        end = channels // rows  # no block has channels and others
        given = every[:channels], scales[:end], every[channels:], scales[end:], weights.view("in_proj_ba")
        how = {"rows": rows, "columns": columns, "lanes": x.shape[0] == 1, "out": (None, None, None, inputs)}
        mixed, gates, convolved, conv = kernels.scaled_conv_projections(x, *given, inputs, weights.view("conv1d"), **how)
        behind, first = 0, 0
    elif kernels.fused and x.shape[0] == 1:
        every = weights.beside("in_proj_qkvz", "in_proj_ba", multiple=value_dim)
        given = every[:channels], every[channels:], inputs, weights.view("conv1d")
        mixed, convolved, conv = kernels.conv_projections(x, *given, out=(None, None, inputs))
        gates, behind, first = mixed, 0, value_heads * value_dim
    else:
        (mixed, gates, first), behind = _projected(x, weights, value_dim, kernels), channels
        convolved, conv = kernels.causal_conv1d_step(
            view(mixed)[:, :channels], inputs, weights.view("conv1d"), out=(None, inputs)
        )
    q, k, v = _heads(
        convolved,
        (0, keys // key_dim, key_dim),
        (keys, keys // key_dim, key_dim),
        (2 * keys, value_heads, value_dim),
    )
    (z,) = _heads(mixed, (behind, value_heads, value_dim))
    read, recurrent = kernels.delta_rule_step(
        q,
        k,
        v,
        view(gates)[:, first + value_heads : first + 2 * value_heads],
        view(gates)[:, first : first + value_heads],
        weights.view("A_log"),
        weights.view("dt_bias"),
        memory,
        out=None if at is None else (None, memory),
    )
    normed = kernels.gated_rms_norm(read, z, weights.view("norm"), eps=config.rms_norm_eps)
    out = projected(normed.reshape(x.shape[0], -1), weights, "out_proj", kernels=kernels)
    return out, DeltaState(conv, recurrent)


@partial(jax.jit, static_argnames=("config", "kernels"))
def prefill(
    x: jax.Array, weights: Layer, lengths: jax.Array, config: Config, kernels: Kernels, before: DeltaState | None = None
) -> tuple[jax.Array, DeltaState]:
    """Many tokens of each sequence: x [B, S, H], the first lengths [B] of each real -> partial output, state after them.

    Padding stands at the end; it neither decays nor updates the state. before: the state they begin with, zeros where None.
    """
    batch, length, _ = x.shape
    channels, value_heads = weights.layout["conv1d"].shape[0], weights.layout["A_log"].shape[0]
    value_dim = config.linear_value_head_dim
    mixed, gates, first = _projected(x, weights, value_dim, kernels)
    convolved, conv = _convolve(mixed, weights["conv1d"], lengths, None if before is None else before.conv)
    real = (jnp.arange(length)[None] < lengths[:, None])[..., None]
    state, reads = None if before is None else before.recurrent, []
    for some in _pieces(length, max(1, AT_ONCE // (batch * CHUNK)) * CHUNK):
        given = convolved[:, some], gates[:, some, first : first + 2 * value_heads], real[:, some]
        if reads:  # one after the other, or XLA may begin with all of them
            given, state = lax.optimization_barrier((given, state))
        read, state = remembered(*given, state, weights, config, kernels)
        reads.append(read)
    tokens = batch * length
    (z,) = _heads(mixed.reshape(tokens, -1), (channels, value_heads, value_dim))
    read = jnp.concatenate(reads, axis=1).reshape(tokens, value_heads, value_dim)
    normed = kernels.gated_rms_norm(read, z, weights.view("norm"), eps=config.rms_norm_eps)
    out = projected(normed.reshape(batch, length, -1), weights, "out_proj", kernels=kernels)
    return out, DeltaState(conv, state)


def _pieces(length: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, length)) for start in range(0, length, most)]


def remembered(
    convolved: jax.Array,
    gates: jax.Array,
    real: jax.Array,
    state: jax.Array | None,
    weights: Layer,
    config: Config,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array]:
    """What is read of the memory at each token, [B, S, V, Dv], and the state after the last real one.

    convolved [B, S, C], gates b | a [B, S, 2V], real [B, S, 1].
    """
    batch, length, channels = convolved.shape
    heads, key_dim, value_dim = gates.shape[-1] // 2, config.linear_key_head_dim, config.linear_value_head_dim
    keys = (channels - heads * value_dim) // 2
    q, k, v = jnp.split(convolved, (keys, 2 * keys), axis=-1)
    q, k = (a.reshape(batch, length, -1, key_dim) for a in (q, k))
    gates = gates.astype(jnp.float32)
    beta = jnp.where(real, jax.nn.sigmoid(gates[..., :heads]), 0.0)
    decay = -jnp.exp(weights["A_log"][None, None]) * jax.nn.softplus(gates[..., heads:] + weights["dt_bias"][None, None])
    decay, scales = jnp.where(real, decay, 0.0), (_inverse_norm(q) * key_dim**-0.5, _inverse_norm(k))
    if kernels.fused:
        return delta_rule_in_turns(convolved, (key_dim, value_dim), decay, beta, state, scales, kernels)
    read, state = chunked_delta_rule(q, k, v.reshape(batch, length, heads, value_dim), decay, beta, state, scales)
    return round_to(read, convolved.dtype), state


def _convolve(mixed: jax.Array, weight: jax.Array, lengths: jax.Array, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution, silu, of the first C columns of mixed [B, S, W] after `before` [B, width - 1, C].

    And each sequence's last inputs. Every tap reads its own shift of mixed: of a padded copy XLA would make an array.
    """
    (channels, width), (batch, length, _) = weight.shape, mixed.shape
    mixed, seen = mixed[..., :channels], width - 1
    head = jnp.zeros((batch, seen, channels), mixed.dtype) if before is None else before
    shifted = [
        jnp.concatenate([head[:, tap : tap + length], mixed[:, : max(0, length - seen + tap)]], axis=1) for tap in range(width)
    ]
    places = lengths[:, None] + jnp.arange(seen)[None]  # of the last inputs, among those before and these
    old = jnp.take_along_axis(head, jnp.minimum(places, seen - 1)[..., None], axis=1)
    new = jnp.take_along_axis(mixed, jnp.maximum(places - seen, 0)[..., None], axis=1)
    last = jnp.where((places < seen)[..., None], old, new)
    return _convolved(shifted, weight, mixed.dtype), last


def _convolved(window: list[jax.Array], weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """silu of a convolution; its inputs [..., C] from the oldest on, weight [C, width]. As sums, XLA makes it one kernel."""
    taps = [x.astype(jnp.float32) * weight.T[(None,) * (x.ndim - 1) + (i,)] for i, x in enumerate(window)]
    return _silu(sum(taps[1:], taps[0]), dtype)


def _silu(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return round_to(x * jax.nn.sigmoid(x), dtype)


def _inverse_norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return lax.rsqrt(jnp.sum(wide * wide, axis=-1) + 1e-6)


def _projected(x: jax.Array, weights: Layer, dim: int, kernels: Kernels) -> tuple[jax.Array, jax.Array, int]:
    """q | k | v | z, what holds b | a, and where b begins there: both projections of x are one product.

    That has up to `dim` - 1 columns more, so that they are whole heads and z is a View of them. Where the first is float8, it
    is a product of its own.
    """
    if "in_proj_qkvz" + SCALE in weights.layout:
        return projected(x, weights, "in_proj_qkvz", kernels=kernels), linear(x, weights["in_proj_ba"]), 0
    both = weights.together("in_proj_qkvz", "in_proj_ba", multiple=dim)
    mixed = linear(x, both)
    return mixed, mixed, weights.layout["in_proj_qkvz"].shape[0]


def _heads(base: jax.Array, *parts: tuple[int, int, int]) -> list[Any]:
    """Parts (first column, heads, dim) of base [T, W] as [T, heads, dim]; views where dims allow."""
    dim = parts[0][2]
    if base.shape[1] % dim == 0 and all(start % dim == 0 and part == dim for start, _, part in parts):
        whole = view(base.reshape(base.shape[0], -1, dim))
        return [whole[:, start // dim : start // dim + heads] for start, heads, _ in parts]
    rows = base.shape[0]
    return [base[:, start : start + heads * dim].reshape(rows, heads, dim) for start, heads, dim in parts]
