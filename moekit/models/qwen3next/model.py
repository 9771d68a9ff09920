"""Qwen3-Next as pure functions: load, prefill, decode_step, greedy_step.

Every function runs under `jax.shard_map` over the mesh axis `tp`. A layer has two all-reduces, one after the
attention or delta-net block and one after the mixture of experts. The blocks are jitted on their own, so that jax
traces and lowers one layer of each kind and not every layer; XLA inlines them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.jax import Link
from moekit.models.qwen3next import attention, checks, gdn
from moekit.models.qwen3next.cache import Cache, Memories, cache_specs
from moekit.models.qwen3next.checkpoint import Checkpoint, load_parameters
from moekit.models.qwen3next.config import GDN, Config, ConfigError, check_tensor_parallel
from moekit.models.qwen3next.exchanged import Exchanged, Gathered, unsummed
from moekit.models.qwen3next.kernels import Kernels, resolve
from moekit.models.qwen3next.layer import Layer
from moekit.models.qwen3next.memory import NO_ROOM, Room
from moekit.models.qwen3next.moe import moe, moe_behind_norm
from moekit.models.qwen3next.numerics import linear
from moekit.models.qwen3next.sharding import AXIS, parameters, specs, vocabulary_spec


@partial(jax.tree_util.register_dataclass, data_fields=("params",), meta_fields=("config", "mesh"))
@dataclass(frozen=True)
class Model:
    """Weights on a mesh. params: the tree that `sharding.parameters` describes; its layers are `layer.Layer`."""

    params: Any
    config: Config
    mesh: Mesh

    @property
    def tp(self) -> int:
        """How many ranks share each block."""
        return self.mesh.shape[AXIS]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the weights and of the residual stream."""
        return self.params["embed_tokens"].dtype


def load(
    checkpoint_dir: str | Path,
    mesh: Mesh,
    dtype: str | None = None,
    *,
    weights: str | None = None,
    activations: str | None = None,
    ep: int = 1,
    room: Room = NO_ROOM,
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Read a Hugging Face checkpoint onto `mesh`, each device its own slices.

    dtype: of the weights, the checkpoint's where None. weights: "float8_e4m3fn" keeps the experts and projections of an FP8
    checkpoint as its files have them, codes beside their scales, "auto" does so where the files are such; None dequantises
    all. activations: "float8_e4m3fn" rounds to float8 what kernels multiply such experts by where tokens are many, which takes
    less time and moves results by some percent (docs/model.md#activations-in-float8). ep: how many groups of ranks the experts
    are dealt to; with 1, every rank has a part of every expert. room: the cache that must fit beside them. progress(done,
    total), in bytes, is called after each share.
    Raises DtypeError (no dtype of weights), ArgumentError (weights or activations is none of these, or does not fit the other)
    and ConfigError (config.json, or a tp or ep that does not divide the model) before any tensor is read, CheckpointError where
    a tensor is missing, extra, mis-shaped, mistyped or truncated, or holds NaN or an infinity in `dtype`, and FitError where a
    device has no room for all of it.
    """
    if AXIS not in mesh.shape:
        raise ConfigError(f"the mesh has axes {tuple(mesh.shape)} where one named {AXIS!r} is needed")
    dtype, weights = checks.weight_dtype("load", dtype), checks.kept_weights("load", weights)
    config = replace(Config.from_json(checkpoint_dir), ep=ep, activations=checks.activations("load", activations))
    check_tensor_parallel(config, mesh.shape[AXIS])
    with Checkpoint(checkpoint_dir, config) as checkpoint:
        if weights:
            checkpoint.keep_float8(weights != "auto", mesh.shape[AXIS])
        checks.multiplied(checkpoint.config)
        params = load_parameters(checkpoint, mesh, dtype, progress, room)
    return Model(params, checkpoint.config, mesh)  # the files say whether there is a head


def abstract_model(config: Config, mesh: Mesh, dtype: str) -> Model:
    """A Model of shapes and shardings, with no memory behind them: to compile for an absent machine."""
    check_tensor_parallel(config, mesh.shape[AXIS])

    def struct(p: Any) -> jax.ShapeDtypeStruct:
        kind = p.dtype(jnp.dtype(dtype))
        return jax.ShapeDtypeStruct(p.shape, kind, sharding=NamedSharding(mesh, p.spec))

    return Model(jax.tree.map(struct, parameters(config, mesh.shape[AXIS])), config, mesh)


@checks.checked(checks.check_prefill)
@partial(jax.jit, static_argnames=("cache_length", "kernels", "every_logit"))
def prefill(
    model: Model,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    cache_length: int,
    kernels: str | Kernels | None = None,
    every_logit: bool = False,
) -> tuple[jax.Array, Cache]:
    """Read whole prompts into a new cache with room for `cache_length` tokens.

    tokens [B, S] int32, padded at the end; lengths [B] int32, each between 1 and S, how many of a row are
    real. Returns logits float32 [B, vocabulary] after each last real token (or [B, S, vocabulary] with
    every_logit) and the cache. The vocabulary of the logits is cut over tp, and no row depends on another's
    padding (but with activations in float8, as tokens of all rows say whether they are many).

    Raises ShapeError, DtypeError or ArgumentError for lengths and real tokens out of range, before anything is
    compiled. In a traced call, whose values nobody can see, the logits of such a row are NaN and its length in the
    cache is -1, which makes it NaN in every step.
    """
    config, kernels = model.config, resolve(kernels)

    def local(params: Any, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, Cache]:
        batch, length = tokens.shape
        tokens, lengths = checks.spoiled_prompts(tokens, lengths, config.vocab_size)

        memories = Memories(config, stacked=kernels.fused)

        def mix(kind: str, x: jax.Array, layer: Layer) -> jax.Array:
            x = x.reshape(batch, length, -1)
            if kind == GDN:
                made = gdn.prefill(x, layer, lengths, config, kernels)
            else:
                made = attention.prefill(x, layer, cache_length, config, kernels)
            # Both before the next layer begins, or XLA keeps what all layers' memories are made of to the end.
            out, memory = lax.optimization_barrier(made)
            memories.first(kind, memory)
            return out.reshape(batch * length, -1)

        hidden = through_layers(params, tokens.reshape(-1), mix, config, kernels)
        hidden = hidden.reshape(batch, length, -1)
        if not every_logit:
            hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        return linear(hidden, params["lm_head"], jnp.float32), memories.cache(lengths)

    leading = P(None, None) if every_logit else P(None)
    places = (logit_spec(model, leading), cache_specs(config, kernels.fused))
    return sharded(model, local, (P(), P()), places)(model.params, tokens, lengths)


@checks.checked(checks.check_step)
@partial(jax.jit, static_argnames=("kernels",), donate_argnames=("cache", "link"))
def decode_step(
    model: Model, tokens: jax.Array, cache: Cache, *, kernels: str | Kernels | None = None, link: Link | None = None
) -> tuple[Any, ...]:
    """One token of each sequence: tokens [B] int32 -> logits float32 [B, vocabulary], cut over tp; new cache.

    The cache is donated: its buffers become the new one's. A row whose memory is full (its length is the cache's)
    or whose token is outside the vocabulary gets NaN logits and the length -1, now and in every later step; the
    others are as without it. Such a token in a numpy array is refused (ArgumentError) before anything runs; what a
    device holds is not looked at, so that a step never waits.

    link: a channel's, by which each all-reduce is one kernel with the norm behind it (docs/collectives.md); it is donated, and
    the link for the next step then comes third.
    """
    kernels = resolve(kernels)
    step = partial(_decode, config=model.config, kernels=kernels)
    specs, way = cache_specs(model.config, cache.stacked), link.specs if link else P()
    run = sharded(model, step, (P(), specs, way), (logit_spec(model, P(None)), specs, way))
    logits, cache, link = run(model.params, tokens, cache, link)
    return (logits, cache, link) if link else (logits, cache)


@checks.checked(checks.check_step)
@partial(jax.jit, static_argnames=("kernels",), donate_argnames=("cache", "link"))
def greedy_step(
    model: Model, tokens: jax.Array, cache: Cache, *, kernels: str | Kernels | None = None, link: Link | None = None
) -> tuple[Any, ...]:
    """decode_step, then the most likely next token of each sequence, [B] int32; the cache is donated. link: as there.

    The token is -1 where a logit is NaN or infinite, as in a row that decode_step spoils.
    """
    kernels = resolve(kernels)
    cut = vocabulary_spec(model.config, model.tp) != P()

    def step(params: Any, tokens: jax.Array, cache: Cache, link: Link | None) -> tuple[jax.Array, Cache, Link | None]:
        logits, cache, link = _decode(params, tokens, cache, link, config=model.config, kernels=kernels)
        gather = Gathered(link, kernels.name) if link else kernels.all_gather
        tokens = _most_likely(logits, cut and model.tp > 1, gather)
        return tokens, cache, gather.link if isinstance(gather, Gathered) else None

    specs, way = cache_specs(model.config, cache.stacked), link.specs if link else P()
    tokens, cache, link = sharded(model, step, (P(), specs, way), (P(), specs, way))(model.params, tokens, cache, link)
    return (tokens, cache, link) if link else (tokens, cache)


@jax.jit
def most_likely(model: Model, logits: jax.Array) -> jax.Array:
    """The most likely token of each row of logits [B, vocabulary]: [B] int32, the lower of equals.

    It is -1 where a logit of the row is NaN or infinite.
    """
    cut = vocabulary_spec(model.config, model.tp) != P()
    local = partial(_most_likely, cut=cut and model.tp > 1, gather=partial(lax.all_gather, axis_name=AXIS))
    return jax.shard_map(local, mesh=model.mesh, in_specs=logit_spec(model, P(None)), out_specs=P(), check_vma=False)(logits)


def _decode(
    params: Any, tokens: jax.Array, cache: Cache, link: Link | None, *, config: Config, kernels: Kernels
) -> tuple[jax.Array, Cache, Link | None]:
    norm = Exchanged(_norm(config, kernels), link, config.rms_norm_eps, kernels.name) if link else None
    kernels = unsummed(kernels) if norm else kernels
    memories = Memories(config, cache)

    def mix(kind: str, x: jax.Array, layer: Layer) -> jax.Array:
        if kind == GDN:
            out, memory = gdn.decode(x, layer, *memories.delta(), config, kernels)
        else:
            out, memory = attention.decode(x, layer, memories.attention(), cache.lengths, config, kernels)
        memories.keep(kind, memory)
        return out

    tokens, lengths = checks.spoiled_steps(tokens, cache, config.vocab_size)
    hidden = through_layers(params, tokens, mix, config, kernels, norm)
    if kernels.fused and len(tokens) == 1:
        logits = kernels.row_product(hidden, params["lm_head"], wide=True)
    else:
        logits = linear(hidden, params["lm_head"], jnp.float32)
    return logits, memories.cache(lengths), norm.link if norm else None


def through_layers(
    params: Any,
    tokens: jax.Array,
    mix: Callable[[str, jax.Array, Layer], jax.Array],
    config: Config,
    kernels: Kernels,
    norm: Callable[..., Any] | None = None,
) -> jax.Array:
    """All layers over tokens [T]: the normed hidden states [T, H].

    mix(kind, x, layer) is one rank's share of the next layer's attention or delta net. norm: of the layers, if it is not the
    kernels' own.
    """
    norm = norm or _norm(config, kernels)
    hidden = checks.embedded(params["embed_tokens"], tokens)
    residual = jnp.zeros_like(hidden)
    for kind, layer in zip(config.layer_types, params["layers"], strict=True):
        hidden, residual = through_layer(layer, hidden, residual, partial(mix, kind), norm, config, kernels)
    return norm(hidden, residual, params["norm"])[0]


def through_layer(
    layer: Layer,
    hidden: jax.Array,
    residual: jax.Array,
    mix: Callable[[jax.Array, Layer], jax.Array],
    norm: Callable[..., Any],
    config: Config,
    kernels: Kernels,
) -> tuple[jax.Array, jax.Array]:
    """One layer: what it adds to the residual stream [T, H], and the stream before that, to which `hidden` was to be added."""
    normed, residual = norm(hidden, residual, layer.view("input_layernorm"))
    partial_sum = mix(normed, layer)
    if kernels.fused and len(hidden) == 1 and not isinstance(norm, Exchanged):
        made, residual = moe_behind_norm(kernels.all_reduce(partial_sum), residual, layer, config, kernels)
        return kernels.all_reduce(made), residual
    normed, residual = norm(kernels.all_reduce(partial_sum), residual, layer.view("post_attention_layernorm"))
    return kernels.all_reduce(moe(normed, layer, config, kernels)), residual


def _norm(config: Config, kernels: Kernels) -> Callable[..., Any]:
    return jax.jit(partial(kernels.add_rms_norm, eps=config.rms_norm_eps, offset=1.0))


@partial(jax.jit, static_argnames=("at", "kernels"))
def layer_output(model: Model, hidden: jax.Array, *, at: int, kernels: str | Kernels | None = None) -> jax.Array:
    """The residual stream after layer `at` alone, float32 [B, S, H], from that before it, [B, S, H] of whole prompts.

    For comparisons of one layer with a reference: nothing is remembered.
    """
    config, kernels = model.config, resolve(kernels)
    batch, length, _ = hidden.shape

    def local(params: Any, hidden: jax.Array) -> jax.Array:
        lengths = jnp.full(batch, length, jnp.int32)

        def mix(x: jax.Array, layer: Layer) -> jax.Array:
            x = x.reshape(batch, length, -1)
            made = (
                gdn.prefill(x, layer, lengths, config, kernels)
                if config.layer_types[at] == GDN
                else attention.prefill(x, layer, length, config, kernels)
            )
            return made[0].reshape(batch * length, -1)

        rows = hidden.reshape(batch * length, -1)
        layer, norm = params["layers"][at], _norm(config, kernels)
        added, residual = through_layer(layer, rows, jnp.zeros_like(rows), mix, norm, config, kernels)
        return (added.astype(jnp.float32) + residual.astype(jnp.float32)).reshape(hidden.shape)

    return sharded(model, local, (P(),), P())(model.params, hidden)


def _most_likely(logits: jax.Array, cut: bool, gather: Callable[..., Any]) -> jax.Array:
    """Arg-max of one rank's logits [B, V / tp], over all ranks where the vocabulary is cut; LOST where one is not finite."""
    best, token = checks.best(logits)
    if not cut:
        return token
    token = jnp.where(token < 0, token, token + lax.axis_index(AXIS) * logits.shape[-1])
    best, token = jnp.unstack(gather(jnp.stack([best, token.astype(jnp.float32)])), axis=1)  # exact below 2²⁴
    return jnp.take_along_axis(token, jnp.argmax(best, axis=0)[None], axis=0)[0].astype(jnp.int32)


def sharded(model: Model, local: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> Callable[..., Any]:
    own = specs(model.params, model.config, model.tp)
    return jax.shard_map(local, mesh=model.mesh, in_specs=(own, *inputs), out_specs=outputs, check_vma=False)


def logit_spec(model: Model, leading: P) -> P:
    return P(*leading, *vocabulary_spec(model.config, model.tp))
