"""Gated attention: grouped queries, normed and partly rotated heads, a sigmoid gate on the output.

`decode` and `prefill` compute one rank's partial output from its own heads; the caller sums over ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moekit.jax import view
from moekit.models.qwen3next.cache import KeyValues
from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import SCALE, Layer
from moekit.models.qwen3next.numerics import einsum, rms_norm, round_to
from moekit.models.qwen3next.projected import projected

QKV = "q_proj", "k_proj", "v_proj"
FLASH = 256  # tokens of a prompt from which on cuDNN's attention is taken, where it is there
ROWS = 1024  # queries of a prompt whose scores are held at a time, with all keys up to theirs
LONG = 32768  # tokens of a prompt from which on, for the sake of memory, keys come in blocks as well
BLOCK = 1024  # queries, and keys, whose scores are held at a time


@partial(jax.jit, static_argnames=("config", "kernels"))
def decode(
    x: jax.Array, weights: Layer, memory: KeyValues, lengths: jax.Array, config: Config, kernels: Kernels
) -> tuple[jax.Array, KeyValues]:
    """One token of each sequence: x [B, H], its position lengths [B] -> partial output [B, H], new memory."""
    if kernels.fused:
        return _decode(x, weights, memory, lengths, config, kernels)
    q, gate, k, v = _project(x[:, None], weights, lengths[:, None], config, kernels)
    rows = jnp.arange(x.shape[0])
    memory = KeyValues(
        memory.keys.at[rows, :, lengths].set(k[:, 0]),
        memory.values.at[rows, :, lengths].set(v[:, 0]),
    )
    read = _whole(q, memory.keys, memory.values, lengths[:, None])
    return _output(read, gate, weights, kernels)[:, 0], memory


def _decode(
    x: jax.Array, weights: Layer, memory: KeyValues, lengths: jax.Array, config: Config, kernels: Kernels
) -> tuple[jax.Array, KeyValues]:
    """`decode` by kernels, which read heads where the projection put them, and put keys and values where memory has them."""
    batch, dim = x.shape[0], config.head_dim
    if batch == 1 and QKV[0] + SCALE not in weights.layout:
        columns = kernels.row_product(x, weights.beside(*QKV))
    else:
        columns = projected(x, weights, *QKV, kernels=kernels)
    heads = view(columns.reshape(batch, -1, dim))  # q, its gate, q, its gate, ..., k, v
    queries, keys = (weights.layout[name].shape[0] // dim for name in ("q_proj", "k_proj"))
    q, held, values = kernels.qkv_norm_rope(
        heads[:, :queries:2],
        heads[:, queries : queries + keys],
        heads[:, queries + keys :],
        weights.view("q_norm"),
        weights.view("k_norm"),
        lengths,
        jnp.asarray(_frequencies(config)),
        memory.keys,
        memory.values,
        eps=config.rms_norm_eps,
    )
    grouped = (batch, keys, -1, dim)
    read = kernels.gated_attention_decode(q.reshape(grouped), held, values, lengths + 1, heads[:, 1:queries:2])
    return projected(read.reshape(batch, -1), weights, "o_proj", kernels=kernels), KeyValues(held, values)


@partial(jax.jit, static_argnames=("cache_length", "config", "kernels"))
def prefill(x: jax.Array, weights: Layer, cache_length: int, config: Config, kernels: Kernels) -> tuple[jax.Array, KeyValues]:
    """Whole prompts, padded at the end: x [B, S, H] -> partial output, a memory of cache_length tokens."""
    length = x.shape[1]
    q, gate, k, v = _project(x, weights, jnp.arange(length)[None], config, kernels)
    k, v = (jnp.swapaxes(a, 1, 2) for a in (k, v))
    if kernels.fused and length >= FLASH and _flash_takes(q, k, v):
        read = lax.platform_dependent(q, k, v, cuda=_flash, default=_causal)
    else:
        read = _causal(q, k, v)
    out = _output(read, gate, weights)
    room = ((0, 0), (0, 0), (0, cache_length - length), (0, 0))
    return out, KeyValues(jnp.pad(k, room), jnp.pad(v, room))


@partial(jax.jit, static_argnames=("config", "kernels"))
def extend(
    x: jax.Array, weights: Layer, memory: KeyValues, starts: jax.Array, lengths: jax.Array, config: Config, kernels: Kernels
) -> tuple[jax.Array, KeyValues]:
    """More tokens of each sequence: x [B, S, H], the first lengths [B] real, at positions from starts [B] on.

    -> partial output [B, S, H], new memory. Each token sees what the memory held before it; padding is not remembered.
    """
    batch, length, _ = x.shape
    steps = jnp.arange(length)[None]
    positions = starts[:, None] + steps
    q, gate, k, v = _project(x, weights, positions, config, kernels)
    kept = jnp.where(steps < lengths[:, None], positions, memory.keys.shape[2])  # out of range: dropped
    rows = jnp.arange(batch)[:, None]
    keys, values = (held.at[rows, :, kept].set(new, mode="drop") for held, new in ((memory.keys, k), (memory.values, v)))
    return _output(_behind(q, keys, values, positions), gate, weights, kernels), KeyValues(keys, values)


def _project(
    x: jax.Array, weights: Layer, positions: jax.Array, config: Config, kernels: Kernels | None = None
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q and its gate [B, S, kv heads, queries of each, dim], k and v [B, S, kv heads, dim]; q and k normed and rotated."""
    batch, length, _ = x.shape
    dim, eps = config.head_dim, config.rms_norm_eps
    columns = projected(x, weights, *QKV, kernels=kernels)
    queries, keys = (weights.layout[name].shape[0] for name in ("q_proj", "k_proj"))
    both = columns[..., :queries].reshape(batch, length, -1, 2, dim)
    q, gate = both[..., 0, :], both[..., 1, :]
    k = columns[..., queries : queries + keys].reshape(batch, length, -1, dim)
    v = columns[..., queries + keys :].reshape(batch, length, -1, dim)
    q = _rotate(rms_norm(q, weights["q_norm"], eps), positions, config)
    k = _rotate(rms_norm(k, weights["k_norm"], eps), positions, config)
    grouped = (batch, length, k.shape[2], -1, dim)
    return round_to(q, x.dtype).reshape(grouped), gate.reshape(grouped), round_to(k, x.dtype), v


def _frequencies(config: Config) -> np.ndarray:
    """How far each pair of a head turns from one position to the next, in radians: float32 [rotary_dim / 2]."""
    dim = config.rotary_dim
    return (1.0 / config.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)).astype(np.float32)


def _rotate(x: jax.Array, positions: jax.Array, config: Config) -> jax.Array:
    """Rotary embedding of the first rotary_dim of each head, halves paired; x [B, S, heads, dim] float32."""
    dim = config.rotary_dim
    angles = (positions[..., None].astype(jnp.float32) * _frequencies(config)[None, None])[:, :, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b, rest = x[..., : dim // 2], x[..., dim // 2 : dim], x[..., dim:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _flash(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """What `_causal` gives, by cuDNN, which holds no scores."""
    k, v = (jnp.swapaxes(a, 1, 2) for a in (keys, values))
    asked = q.reshape(*q.shape[:2], -1, q.shape[-1])
    return jax.nn.dot_product_attention(asked, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)


def _flash_takes(q: jax.Array, keys: jax.Array, values: jax.Array) -> bool:
    """Whether cuDNN is there, with a GPU that jax can ask, and takes these dtypes and sizes."""
    if jax.default_backend() != "gpu" or q.dtype == jnp.float32:
        return False
    try:
        jax.eval_shape(_flash, q, keys, values)
    except (NotImplementedError, RuntimeError, ValueError):  # how jax says that it cannot
        return False
    return True


def _causal(q: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """Each of q [B, S, kv heads, queries, dim] reads keys and values [B, kv heads, S, dim] up to its own place."""
    length, positions = q.shape[1], jnp.arange(q.shape[1])[None]
    if length <= BLOCK:
        return _whole(q, keys, values, positions)
    if length > LONG:
        places = np.array([(i, j) for i in range(-(-length // BLOCK)) for j in range(i + 1)], np.int32)
        turn = jax.checkpoint(_turn(q, keys, values, positions), prevent_cse=False)
        return lax.scan(lambda held, place: (turn(held, place), None), _begin(q), places)[0][0]
    some = jax.checkpoint(_whole, prevent_cse=False)  # a gradient keeps no scores either
    out = q  # one block after the other, since each is asked by what is left of the queries: else XLA begins with all of them
    for start in range(0, length, ROWS):
        end = min(start + ROWS, length)
        read = some(out[:, start:end], keys[:, :, :end], values[:, :, :end], positions[:, start:end])
        out = lax.dynamic_update_slice_in_dim(out, read, start, 1)
    return out


def _behind(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Each of q [B, S, kv heads, queries, dim] reads keys and values [B, kv heads, L, dim] up to its position, [B, S]."""
    length, room = q.shape[1], keys.shape[2]
    if max(length, room) <= BLOCK:
        return _whole(q, keys, values, positions)
    # As many keys as the longest sequence has: a row's sums go block by block, whatever the others' lengths.
    seen = jnp.clip(jnp.max(positions) // BLOCK + 1, 1, -(-room // BLOCK))
    turn = _turn(q, keys, values, positions)
    turns = -(-length // BLOCK) * seen
    return lax.fori_loop(0, turns, lambda t, held: turn(held, (t // seen, t % seen)), _begin(q))[0]


def _whole(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> jax.Array:
    """Softmax attention, all scores at once."""
    scores = einsum("bskgd,bkld->bksgl", q, keys) * q.shape[-1] ** -0.5
    visible = jnp.arange(keys.shape[2])[None, None] <= positions[..., None]
    scores = jnp.where(visible[:, None, :, None], scores, -jnp.inf)
    weights = round_to(jax.nn.softmax(scores, axis=-1), values.dtype)
    return round_to(einsum("bksgl,bkld->bskgd", weights, values), values.dtype)


def _begin(q: jax.Array) -> tuple[jax.Array, ...]:
    """What turns carry: the output so far, and of one block of queries the weighted sum, the weights' sum and the top score.

    The output begins as what was asked, which is there by then: zeros XLA would make for all layers at once.
    """
    batch, length, kv, queries, dim = q.shape
    sums = jnp.zeros((batch, kv, queries, min(length, BLOCK)), jnp.float32)
    return q, jnp.zeros((*sums.shape, dim), jnp.float32), sums, sums


def _turn(q: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array) -> Any:
    """A block of queries reads a block of keys, for each i those j from 0 on; what was read is their softmax's at every turn.

    Online softmax: Milakov and Gimelshein 2018. The last block of each may begin before the one before it ends: queries are
    computed again, keys are not looked at again.
    """
    rows, columns = min(q.shape[1], BLOCK), min(keys.shape[2], BLOCK)

    def turn(held: tuple[jax.Array, ...], place: Any) -> tuple[jax.Array, ...]:
        (out, weighed, total, top), (i, j) = held, place
        row, column = jnp.minimum(i * rows, q.shape[1] - rows), jnp.minimum(j * columns, keys.shape[2] - columns)
        asked, at = (lax.dynamic_slice_in_dim(a, row, rows, 1) for a in (q, positions))
        k, v = (lax.dynamic_slice_in_dim(a, column, columns, 2) for a in (keys, values))
        seen = column + jnp.arange(columns)[None, None]
        visible = (seen >= j * columns) & (seen <= at[..., None])
        scores = einsum("bskgd,bkld->bkgsl", asked, k) * q.shape[-1] ** -0.5
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        before = jnp.where(j == 0, -jnp.inf, top)
        top = jnp.maximum(before, lax.stop_gradient(jnp.max(scores, axis=-1)))  # finite: every query sees the first key
        weights, kept = jnp.exp(scores - top[..., None]), jnp.exp(before - top)
        total = jnp.where(j == 0, 0.0, total) * kept + jnp.sum(weights, axis=-1)
        more = einsum("bkgsl,bkld->bkgsd", round_to(weights, v.dtype), v)
        weighed = jnp.where(j == 0, 0.0, weighed) * kept[..., None] + more
        read = jnp.moveaxis(weighed / total[..., None], 3, 1)
        return lax.dynamic_update_slice_in_dim(out, round_to(read, out.dtype), row, 1), weighed, total, top

    return turn


def _output(read: jax.Array, gate: jax.Array, weights: Layer, kernels: Kernels | None = None) -> jax.Array:
    """What was read, [..., kv heads, queries, dim], past its gate and back: [..., H]."""
    open_ = jax.nn.sigmoid(gate.astype(jnp.float32))
    opened = round_to(read * open_, gate.dtype).reshape(*gate.shape[:-3], -1)
    return projected(opened, weights, "o_proj", kernels=kernels)
