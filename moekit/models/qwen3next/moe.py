"""The mixture of experts: router, routed experts and the gated shared expert.

`moe` computes one rank's partial output from its slice of every expert; the caller sums over ranks, once,
since the shared and the routed part are added before.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moekit.models.qwen3next.config import Config
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import Layer
from moekit.models.qwen3next.numerics import einsum, linear, round_to
from moekit.models.qwen3next.sharding import AXIS

CHUNK_ELEMENTS = 1 << 26  # of the products of all experts that are held at a time


@partial(jax.jit, static_argnames=("config", "kernels"))
def moe(x: jax.Array, weights: Layer, config: Config, kernels: Kernels) -> jax.Array:
    """x [T, H] -> one rank's partial sum of the routed and the shared experts, [T, H]."""
    activated, logits, share = gate(x, weights, kernels)
    chosen, ids = kernels.topk_softmax(logits, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
    x, chosen, ids = lax.optimization_barrier((x, chosen, ids))  # the logits are dead while the routed experts run
    routed = experts(x, chosen, _among_held(ids, config), weights, kernels, config.ep)
    return kernels.down_combine(routed, activated, weights.view("shared_down").T, share)


def gate(x: jax.Array, weights: Layer, kernels: Kernels) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The shared expert's activation [T, I], the router's logits [T, E] and the shared expert's share [T, 1], float32."""
    names = ("gate_up", "router", "shared_gate")
    if kernels.fused:
        return kernels.gate_projections(x, *map(weights.view, names))
    gate_up, logits, shared_gate = (linear(x, weights[name]) for name in names)
    return _activation(gate_up, 1.0, x.dtype), logits, jax.nn.sigmoid(shared_gate.astype(jnp.float32))


def _among_held(ids: jax.Array, config: Config) -> jax.Array:
    """The numbers of experts among those that this rank's group holds; of another group's, the first that is none."""
    if config.ep == 1:
        return ids
    held = config.num_experts // config.ep
    own = ids - held * (lax.axis_index(AXIS) * config.ep // lax.axis_size(AXIS))
    return jnp.where((own >= 0) & (own < held), own, held)


def experts(x: jax.Array, chosen: jax.Array, ids: jax.Array, weights: Layer, kernels: Kernels, ep: int = 1) -> jax.Array:
    """Weighted sum of the chosen experts, [T, H] in x's dtype.

    x [T, H]; chosen, ids [T, k]: their weights and numbers among the experts of this rank; those of no expert here add
    nothing. Few tokens gather the weights of their experts; many run every expert, which then reads each weight once, some
    tokens at a time.
    """
    names = ("experts_gate_up", "experts_down")  # [E, 2I, H] and [E, I, H]
    few = ids.size <= weights.layout[names[0]].shape[0] * ep
    if few and kernels.fused:
        gate_up, down = map(weights.view, names)
        return kernels.expert_down(kernels.expert_gate_up(x, gate_up, ids), down, ids, chosen)
    if few:
        return round_to(_gathered(x, chosen, ids, weights[names[0]], weights[names[1]], ep > 1), x.dtype)
    return round_to(_in_chunks(x, chosen, ids, weights), x.dtype)


def _in_chunks(x: jax.Array, chosen: jax.Array, ids: jax.Array, weights: Layer) -> jax.Array:
    tokens = x.shape[0]
    count, width, _ = weights.layout["experts_gate_up"].shape
    chunk = max(16, CHUNK_ELEMENTS // (count * width))

    if tokens <= chunk:
        return _dense(x, chosen, ids, weights["experts_gate_up"], weights["experts_down"])

    def dense(piece: tuple[jax.Array, ...]) -> jax.Array:
        # In a loop XLA (0.11.2) copies the slice of `rows` that a product reads; all rows are 3 % more than the experts'.
        x, chosen, ids = piece
        return _dense(x, chosen, ids, weights.rows, weights["experts_down"])

    blocks = -(-tokens // chunk)
    pieces = tuple(jnp.pad(a, ((0, blocks * chunk - tokens), (0, 0))).reshape(blocks, chunk, -1) for a in (x, chosen, ids))
    out = lax.map(dense, pieces)
    return out.reshape(blocks * chunk, -1)[:tokens]


def _gathered(
    x: jax.Array, chosen: jax.Array, ids: jax.Array, gate_up: jax.Array, down: jax.Array, elsewhere: bool = False
) -> jax.Array:
    """elsewhere: whether an id may be of no expert here, which stands for weights of zero."""
    # Sums of products, not dots: XLA then multiplies while it gathers rows, and stores none of them. To that end it wants a
    # flat list of experts, and each expert's sum for itself, which for one token it would merge with the last.
    flat, wide = ids.reshape(-1), jnp.float32
    take = partial(jnp.take, axis=0, mode="fill", fill_value=0) if elsewhere else partial(jnp.take, axis=0, mode="clip")
    rows = take(gate_up, flat).astype(wide)
    both = jnp.sum(jnp.repeat(x, ids.shape[1], axis=0)[:, None].astype(wide) * rows, axis=2)
    active = _activation(round_to(both, x.dtype), chosen.reshape(-1, 1), x.dtype).astype(wide)
    rows = take(down, flat).astype(wide)
    each = lax.optimization_barrier(jnp.sum(active[..., None] * rows, axis=1))
    return jnp.sum(each.reshape(*ids.shape, -1), axis=1)


def _dense(x: jax.Array, chosen: jax.Array, ids: jax.Array, rows: jax.Array, down: jax.Array) -> jax.Array:
    """rows: experts_gate_up [E, 2I, H], or [R, H] that begin with it."""
    count, width = down.shape[:2]
    hit = ids[:, :, None] == jnp.arange(count)[None, None]
    share = jnp.sum(jnp.where(hit, chosen[:, :, None], 0.0), axis=1)[..., None]
    both = linear(x, rows.reshape(-1, x.shape[1]))[:, : count * 2 * width].reshape(x.shape[0], count, -1)
    active = jnp.where(hit.any(axis=1)[..., None], _activation(both, share, x.dtype), 0)
    return einsum("tn,nh->th", active.reshape(x.shape[0], -1), down.reshape(-1, x.shape[1]))


def _activation(both: jax.Array, share: jax.Array | float, dtype: jnp.dtype) -> jax.Array:
    """silu(gate)·up·share of both [..., 2I], rounded once."""
    half = both.shape[-1] // 2
    first, second = both[..., :half].astype(jnp.float32), both[..., half:].astype(jnp.float32)
    return round_to(first * jax.nn.sigmoid(first) * second * share, dtype)
