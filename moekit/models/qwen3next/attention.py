"""Gated attention: grouped queries, normed and partly rotated heads, a sigmoid gate on the output.

`decode` and `prefill` compute one rank's partial output from its own heads; the caller sums over ranks.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moekit.models.qwen3next.cache import KeyValues
from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.layer import Layer
from moekit.models.qwen3next.numerics import einsum, linear, rms_norm, round_to

BLOCK = 1024  # query rows whose scores are held at a time


@partial(jax.jit, static_argnames=("config",))
def decode(x: jax.Array, weights: Layer, memory: KeyValues, lengths: jax.Array, config: Config) -> tuple[jax.Array, KeyValues]:
    """One token of each sequence: x [B, H], its position lengths [B] -> partial output [B, H], new memory."""
    q, gate, k, v = _project(x[:, None], weights, lengths[:, None], config)
    rows = jnp.arange(x.shape[0])
    memory = KeyValues(
        memory.keys.at[rows, :, lengths].set(k[:, 0]),
        memory.values.at[rows, :, lengths].set(v[:, 0]),
    )
    visible = jnp.arange(memory.keys.shape[2])[None, None] <= lengths[:, None, None]
    read = _attend(q, memory.keys, memory.values, visible)
    out = _output(read, gate, weights)
    return out[:, 0], memory


@partial(jax.jit, static_argnames=("cache_length", "config"))
def prefill(x: jax.Array, weights: Layer, cache_length: int, config: Config) -> tuple[jax.Array, KeyValues]:
    """Whole prompts, padded at the end: x [B, S, H] -> partial output, a memory of cache_length tokens."""
    length = x.shape[1]
    q, gate, k, v = _project(x, weights, jnp.arange(length)[None], config)
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    reads = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        causal = jnp.arange(stop)[None] <= jnp.arange(start, stop)[:, None]
        reads.append(_attend(q[:, start:stop], k[:, :, :stop], v[:, :, :stop], causal[None]))
    out = _output(jnp.concatenate(reads, axis=1), gate, weights)
    room = ((0, 0), (0, 0), (0, cache_length - length), (0, 0))
    return out, KeyValues(jnp.pad(k, room), jnp.pad(v, room))


@partial(jax.jit, static_argnames=("config",))
def extend(
    x: jax.Array, weights: Layer, memory: KeyValues, starts: jax.Array, lengths: jax.Array, config: Config
) -> tuple[jax.Array, KeyValues]:
    """More tokens of each sequence: x [B, S, H], the first lengths [B] real, at positions from starts [B] on.

    -> partial output [B, S, H], new memory. Each token sees what the memory held before it; padding is not remembered.
    """
    batch, length, _ = x.shape
    steps = jnp.arange(length)[None]
    positions = starts[:, None] + steps
    q, gate, k, v = _project(x, weights, positions, config)
    kept = jnp.where(steps < lengths[:, None], positions, memory.keys.shape[2])  # out of range: dropped
    rows = jnp.arange(batch)[:, None]
    keys, values = (held.at[rows, :, kept].set(new, mode="drop") for held, new in ((memory.keys, k), (memory.values, v)))
    visible = jnp.arange(keys.shape[2])[None, None] <= positions[..., None]
    return _output(_attend(q, keys, values, visible), gate, weights), KeyValues(keys, values)


def _project(
    x: jax.Array, weights: Layer, positions: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q [B, S, heads, dim], its gate, k and v [B, S, kv heads, dim]; q and k normed and rotated."""
    batch, length, _ = x.shape
    dim, eps = config.head_dim, config.rms_norm_eps
    columns = linear(x, weights.together("q_proj", "k_proj", "v_proj"))
    queries, keys = (weights.layout[name].shape[0] for name in ("q_proj", "k_proj"))
    both = columns[..., :queries].reshape(batch, length, -1, 2, dim)
    q, gate = both[..., 0, :], both[..., 1, :]
    k = columns[..., queries : queries + keys].reshape(batch, length, -1, dim)
    v = columns[..., queries + keys :].reshape(batch, length, -1, dim)
    q = _rotate(rms_norm(q, weights["q_norm"], eps), positions, config)
    k = _rotate(rms_norm(k, weights["k_norm"], eps), positions, config)
    return round_to(q, x.dtype), gate, round_to(k, x.dtype), v


def _rotate(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """Rotary embedding of the first rotary_dim of each head, halves paired; x [B, S, heads, dim] float32."""
    dim = config.rotary_dim
    frequencies = 1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    angles = (positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)[None, None])[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _attend(q: jax.Array, keys: jax.Array, values: jax.Array, visible: jax.Array) -> jax.Array:
    """Softmax attention in float32, [B, S, heads·dim].

    q [B, S, heads, dim] reads keys, values [B, kv heads, L, dim] where visible [B or 1, S or 1, L] allows.
    """
    batch, length, heads, dim = q.shape
    kv = keys.shape[1]
    grouped = q.reshape(batch, length, kv, heads // kv, dim)
    scores = einsum("bskgd,bkld->bkgsl", grouped, keys) * dim**-0.5
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = round_to(jax.nn.softmax(scores, axis=-1), values.dtype)
    return einsum("bkgsl,bkld->bskgd", weights, values).reshape(batch, length, heads * dim)


def _output(read: jax.Array, gate: jax.Array, weights: Layer) -> jax.Array:
    open_ = jax.nn.sigmoid(gate.astype(jnp.float32)).reshape(read.shape)
    return linear(round_to(read * open_, gate.dtype), weights["o_proj"])
