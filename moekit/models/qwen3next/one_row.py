"""A step of one sequence: a norm is made in the launch of the products that read it, but before a delta net.

A delta net's products are many programs, in each of which the norm would come before anything is multiplied: what that takes is
what the launch of its own takes (docs/performance_tried.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from moekit.models.qwen3next import attention, checks, gdn, moe
from moekit.models.qwen3next.cache import KeyValues, Memories
from moekit.models.qwen3next.config import GDN, Config
from moekit.models.qwen3next.kernels import Kernels
from moekit.models.qwen3next.layer import SCALE, Layer
from moekit.models.qwen3next.projected import projected


def logits(
    params: Any, tokens: jax.Array, memories: Memories, lengths: jax.Array, config: Config, kernels: Kernels
) -> jax.Array:
    """All layers over one token, and the head: float32 [1, V / tp]. lengths: of what the memories hold."""
    hidden = checks.embedded(params["embed_tokens"], tokens)
    residual = jnp.zeros_like(hidden)
    for kind, layer in zip(config.layer_types, params["layers"], strict=True):
        if kind == GDN:
            normed, residual = _normed(hidden, residual, layer, config=config, kernels=kernels)
            hidden, memory = gdn.decode(normed, layer, *memories.delta(), config, kernels)
        else:
            hidden, residual, memory = _attention(hidden, residual, layer, memories.attention(), lengths, config, kernels)
        memories.keep(kind, memory)
        hidden, residual = _experts(kernels.all_reduce(hidden), residual, layer, config, kernels)
        hidden = kernels.all_reduce(hidden)
    head = kernels.add_norm_product
    return head(hidden, residual, params["norm"], params["lm_head"], eps=config.rms_norm_eps, wide=True)[1]


@partial(jax.jit, static_argnames=("config", "kernels"))
def _normed(
    hidden: jax.Array, residual: jax.Array, weights: Layer, config: Config, kernels: Kernels
) -> tuple[jax.Array, jax.Array]:
    return kernels.add_rms_norm(hidden, residual, weights.view("input_layernorm"), eps=config.rms_norm_eps)


@partial(jax.jit, static_argnames=("config", "kernels"))
def _attention(
    hidden: jax.Array,
    residual: jax.Array,
    weights: Layer,
    memory: KeyValues,
    lengths: jax.Array,
    config: Config,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array, KeyValues]:
    """`attention.decode` of a row that is not normed: its partial output, the stream before it, new memory."""
    if attention.QKV[0] + SCALE in weights.layout:
        normed, residual = _normed(hidden, residual, weights, config, kernels)
        columns = projected(normed, weights, *attention.QKV, kernels=kernels)
    else:
        norm, eps = weights.view("input_layernorm"), config.rms_norm_eps
        residual, columns = kernels.add_norm_product(hidden, residual, norm, weights.beside(*attention.QKV), eps=eps)
    out, memory = attention.attended(columns, weights, memory, lengths, config, kernels)
    return out, residual, memory


@partial(jax.jit, static_argnames=("config", "kernels"))
def _experts(
    hidden: jax.Array, residual: jax.Array, weights: Layer, config: Config, kernels: Kernels
) -> tuple[jax.Array, jax.Array]:
    """`moe.moe` of a row that is not normed: one rank's partial sum, and the stream before it."""
    before = hidden, residual, weights.view("post_attention_layernorm")
    made, eps = moe.gate_weights(weights), config.rms_norm_eps
    if "gate_up" + SCALE in weights.layout:
        made = kernels.scaled_add_norm_gate_projections(*before, *made, **moe.gate_blocks(weights), eps=eps)
    else:
        made = kernels.add_norm_gate_projections(*before, *made, eps=eps)
    normed, residual, activated, scores, share = made
    chosen, ids = kernels.topk_softmax(scores, config.num_experts_per_tok, renormalize=config.norm_topk_prob)
    return moe.of_routed(normed, (activated, share, chosen, ids), weights, config, kernels), residual
