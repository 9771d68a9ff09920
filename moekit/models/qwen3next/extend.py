"""More of a prompt behind what a cache holds: a long prompt in pieces, or a new turn of a conversation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.models.qwen3next import attention, checks, gdn
from moekit.models.qwen3next.cache import Cache, Memories, cache_shapes, cache_specs
from moekit.models.qwen3next.config import GDN
from moekit.models.qwen3next.kernels import Kernels, resolve
from moekit.models.qwen3next.layer import Layer
from moekit.models.qwen3next.model import Model, logit_spec, sharded, through_layers
from moekit.models.qwen3next.numerics import linear


def empty_cache(model: Model, batch: int, length: int, kernels: str | Kernels | None = None) -> Cache:
    """The cache of `batch` sequences that have no token yet, with room for `length` of each."""
    shapes = cache_shapes(model.config, model.mesh, batch, length, model.dtype, resolve(kernels).fused)
    alone = NamedSharding(model.mesh, P())  # as jax has what one rank computes: another would compile every program twice
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding if model.tp > 1 else alone), shapes)


@checks.checked(checks.check_extend)
@partial(jax.jit, static_argnames=("kernels",), donate_argnames=("cache",))
def extend(
    model: Model, tokens: jax.Array, lengths: jax.Array, cache: Cache, *, kernels: str | Kernels | None = None
) -> tuple[jax.Array, Cache]:
    """Read more of each sequence: tokens [B, S] int32, padded at the end, of which lengths [B] are real, at least 1.

    -> logits float32 [B, vocabulary] after each last real token, cut over tp, and the cache, which is donated. A row for
    which the cache has no room gets NaN logits and the length -1, now and in every later step. Raises as `prefill` does.
    """
    config, kernels = model.config, resolve(kernels)

    def local(params: Any, tokens: jax.Array, lengths: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        batch, size = tokens.shape
        starts = cache.lengths
        good = (starts >= 0) if cache.room is None else (starts >= 0) & (starts + lengths <= cache.room)
        tokens, lengths = checks.spoiled_prompts(tokens, jnp.where(good, lengths, checks.LOST), config.vocab_size)
        memories = Memories(config, cache)

        def mix(kind: str, x: jax.Array, layer: Layer) -> jax.Array:
            x = x.reshape(batch, size, -1)
            if kind == GDN:
                held, at = memories.delta()
                before = held if at is None else jax.tree.map(lambda a: a[at], held)
                out, new = lax.optimization_barrier(gdn.prefill(x, layer, lengths, config, kernels, before))  # as in `prefill`
                new = new if at is None else jax.tree.map(lambda a, b: a.at[at].set(b), held, new)
            else:
                out, new = attention.extend(x, layer, memories.attention(), starts, lengths, config, kernels)
            memories.keep(kind, new)
            return out.reshape(batch * size, -1)

        hidden = through_layers(params, tokens.reshape(-1), mix, config, kernels).reshape(batch, size, -1)
        hidden = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
        total = jnp.where(lengths < 0, checks.LOST, starts + lengths)
        return linear(hidden, params["lm_head"], jnp.float32), memories.cache(total)

    held = cache_specs(config, cache.stacked)
    places = (logit_spec(model, P(None)), held)
    return sharded(model, local, (P(), P(), held), places)(model.params, tokens, lengths, cache)
