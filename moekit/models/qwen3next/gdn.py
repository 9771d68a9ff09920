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
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import SCALE, Layer
from moekit.models.qwen3next.numerics import einsum, linear, round_to
from moekit.models.qwen3next.projected import projected

CHUNK = 64
AT_ONCE = 8192  # tokens, of all sequences, whose chunks are held at a time


@partial(jax.jit, static_argnames=("config", "kernels"))
def decode(
    x: jax.Array, weights: Layer, state: DeltaState, at: jax.Array | None, config: Config, kernels: Kernels
) -> tuple[jax.Array, DeltaState]:
    """One token of each sequence: x [B, H] -> partial output [B, H] and the new state; `at`: where that is in a stack."""
    channels, value_heads = weights.layout["conv1d"].shape[0], weights.layout["A_log"].shape[0]
    key_dim, value_dim = config.linear_key_head_dim, config.linear_value_head_dim
    keys = (channels - value_heads * value_dim) // 2
    mixed, gates, first = _projected(x, weights, value_dim, kernels)
    inputs = state.conv if at is None else lax.dynamic_index_in_dim(state.conv, at, keepdims=False)
    window = jnp.concatenate([inputs, mixed[:, None, :channels]], axis=1)
    convolved = _convolved([window[:, i] for i in range(window.shape[1])], weights["conv1d"], x.dtype)
    q, k, v = _heads(
        convolved,
        (0, keys // key_dim, key_dim),
        (keys, keys // key_dim, key_dim),
        (2 * keys, value_heads, value_dim),
    )
    (z,) = _heads(mixed, (channels, value_heads, value_dim))
    memory = view(state.recurrent) if at is None else view(state.recurrent)[at]
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
    conv = window[:, 1:]
    return out, DeltaState(conv if at is None else lax.dynamic_update_index_in_dim(state.conv, conv, at, 0), recurrent)


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
    gates = gates[..., first : first + 2 * value_heads]
    convolved, conv = _convolve(mixed[..., :channels], weights["conv1d"], lengths, None if before is None else before.conv)
    real = (jnp.arange(length)[None] < lengths[:, None])[..., None]
    state, reads = None if before is None else before.recurrent, []
    for some in _pieces(length, max(1, AT_ONCE // (batch * CHUNK)) * CHUNK):
        given = convolved[:, some], gates[:, some], real[:, some]
        if reads:  # one after the other, or XLA may begin with all of them
            given, state = lax.optimization_barrier((given, state))
        read, state = _remembered(*given, state, weights, config)
        reads.append(read)
    tokens = batch * length
    (z,) = _heads(mixed.reshape(tokens, -1), (channels, value_heads, value_dim))
    read = jnp.concatenate(reads, axis=1).reshape(tokens, value_heads, value_dim)
    normed = kernels.gated_rms_norm(read, z, weights.view("norm"), eps=config.rms_norm_eps)
    out = projected(normed.reshape(batch, length, -1), weights, "out_proj", kernels=kernels)
    return out, DeltaState(conv, state)


def _pieces(length: int, most: int) -> list[slice]:
    return [slice(start, min(start + most, length)) for start in range(0, length, most)]


def _remembered(
    convolved: jax.Array, gates: jax.Array, real: jax.Array, state: jax.Array | None, weights: Layer, config: Config
) -> tuple[jax.Array, jax.Array]:
    """What is read of the memory at each token, [B, S, V, Dv], and the state after the last real one.

    convolved [B, S, C], gates b | a [B, S, 2V], real [B, S, 1].
    """
    batch, length, channels = convolved.shape
    heads, key_dim, value_dim = gates.shape[-1] // 2, config.linear_key_head_dim, config.linear_value_head_dim
    keys = (channels - heads * value_dim) // 2
    q, k, v = jnp.split(convolved.astype(jnp.float32), (keys, 2 * keys), axis=-1)
    gates = gates.astype(jnp.float32)
    beta = jnp.where(real, jax.nn.sigmoid(gates[..., :heads]), 0.0)
    decay = -jnp.exp(weights["A_log"][None, None]) * jax.nn.softplus(gates[..., heads:] + weights["dt_bias"][None, None])
    read, state = chunked_delta_rule(
        _normalised(q.reshape(batch, length, -1, key_dim)) * key_dim**-0.5,
        _normalised(k.reshape(batch, length, -1, key_dim)),
        v.reshape(batch, length, heads, value_dim),
        jnp.where(real, decay, 0.0),
        beta,
        state,
    )
    return round_to(read, convolved.dtype), state


def chunked_delta_rule(
    q: jax.Array, k: jax.Array, v: jax.Array, decay: jax.Array, beta: jax.Array, state: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule over sequences, in chunks of up to CHUNK tokens, from a state, zero where None, in float32.

    q, k [B, S, K, Dk] normalised and scaled; v [B, S, V, Dv]; decay (log, at most 0), beta [B, S, V]
    -> read [B, S, V, Dv], state [B, V, Dk, Dv]. Value head h reads key head h·K // V.
    Formula: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024), section 3.3. What a chunk makes of a state is a product
    and a sum, and two in a row are again; so the states between chunks are a prefix sum (Blelloch 1990), in few large steps.
    """
    batch, length, value_heads, value_dim = v.shape
    ratio, chunk = value_heads // q.shape[2], min(CHUNK, length)
    q, k = (jnp.repeat(a, ratio, axis=2) for a in (q, k))
    q, k, v, decay, beta = (_chunks(a, chunk) for a in (q, k, v, decay[..., None], beta[..., None]))
    total = jnp.cumsum(decay, axis=3)  # log of the decay since the chunk began
    lower = jnp.tril(jnp.ones((chunk, chunk), bool))
    between = jnp.exp(jnp.where(lower[None, None, None], total - jnp.swapaxes(total, 3, 4), -jnp.inf))
    system = einsum("bhntd,bhnsd->bhnts", k * beta, k) * between
    attend = einsum("bhntd,bhnsd->bhnts", q, k) * between
    solved = lax.linalg.triangular_solve(
        system,
        jnp.concatenate([v * beta, k * beta * jnp.exp(total)], axis=-1),
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    fresh, seen = solved[..., :value_dim], solved[..., value_dim:]
    last = total[..., -1:, :]
    fade, k = jnp.exp(last), k * jnp.exp(last - total)
    if state is None:
        state = jnp.zeros((batch, value_heads, q.shape[-1], value_dim), jnp.float32)
    states = _between(state, seen[:, :, :-1], fresh[:, :, :-1], k[:, :, :-1], fade[:, :, :-1])
    update = fresh - einsum("bhntk,bhnkv->bhntv", seen, states)
    read = einsum("bhntk,bhnkv->bhntv", q * jnp.exp(total), states) + einsum("bhnts,bhnsv->bhntv", attend, update)
    state = states[:, :, -1] * fade[:, :, -1] + einsum("bhtk,bhtv->bhkv", k[:, :, -1], update[:, :, -1])
    return jnp.swapaxes(read.reshape(batch, value_heads, -1, value_dim)[:, :, :length], 1, 2), state


def _between(state: jax.Array, seen: jax.Array, fresh: jax.Array, k: jax.Array, fade: jax.Array) -> jax.Array:
    """The state before each chunk, [B, heads, chunks + 1, Dk, Dv], from the first one and what is known of all but the last."""
    if not seen.shape[2]:
        return state[:, :, None]
    kept = fade * jnp.eye(k.shape[-1], dtype=jnp.float32)[None, None, None] - einsum("bhnti,bhntj->bhnij", k, seen)
    added = einsum("bhntk,bhntv->bhnkv", k, fresh)
    added = added.at[:, :, 0].add(einsum("bhij,bhjv->bhiv", kept[:, :, 0], state))

    def both(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (kept, added), (later, more) = one, other
        return einsum("bhnij,bhnjk->bhnik", later, kept), einsum("bhnij,bhnjv->bhniv", later, added) + more

    _, states = lax.associative_scan(both, (kept, added), axis=2)
    return jnp.concatenate([state[:, :, None], states], axis=2)


def _chunks(a: jax.Array, chunk: int) -> jax.Array:
    """[B, S, heads, D] -> [B, heads, chunks, chunk, D], the end padded with zeros."""
    batch, length, heads, dim = a.shape
    a = jnp.pad(a, ((0, 0), (0, -length % chunk), (0, 0), (0, 0)))
    return jnp.swapaxes(a, 1, 2).reshape(batch, heads, -1, chunk, dim)


def _convolve(mixed: jax.Array, weight: jax.Array, lengths: jax.Array, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Depthwise causal convolution, silu, of [B, S, C] after `before` [B, width - 1, C]; and each sequence's last inputs."""
    width, length = weight.shape[1], mixed.shape[1]
    if before is None:
        padded = jnp.pad(mixed, ((0, 0), (width - 1, 0), (0, 0)))
    else:
        padded = jnp.concatenate([before, mixed], axis=1)
    convolved = _convolved([padded[:, i : i + length] for i in range(width)], weight, mixed.dtype)
    positions = lengths[:, None] + jnp.arange(width - 1)[None]
    last = jnp.take_along_axis(padded, positions[..., None], axis=1)
    return convolved, last


def _convolved(window: list[jax.Array], weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """silu of a convolution; its inputs [..., C] from the oldest on, weight [C, width]. As sums, XLA makes it one kernel."""
    taps = [x.astype(jnp.float32) * weight.T[(None,) * (x.ndim - 1) + (i,)] for i, x in enumerate(window)]
    return _silu(sum(taps[1:], taps[0]), dtype)


def _silu(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return round_to(x * jax.nn.sigmoid(x), dtype)


def _normalised(x: jax.Array) -> jax.Array:
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


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
