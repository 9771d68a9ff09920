"""What a sequence remembers between steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.models.qwen3next.config import GDN, Config
from moekit.models.qwen3next.sharding import AXIS, kv_heads_per_rank


@partial(jax.tree_util.register_dataclass, data_fields=("conv", "recurrent"), meta_fields=())
@dataclass(frozen=True)
class DeltaState:
    """A gated delta net's memory.

    conv [B, channels, width - 1]: the last inputs of the convolution, in the model's dtype, a rank's channels
    q | k | v. recurrent [B, value heads, key dim, value dim] float32. Both are cut by heads over tp.
    """

    conv: Any
    recurrent: Any


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values"), meta_fields=())
@dataclass(frozen=True)
class KeyValues:
    """An attention layer's memory: keys, values [B, kv heads, length, head dim], cut by kv heads over tp."""

    keys: Any
    values: Any


@partial(jax.tree_util.register_dataclass, data_fields=("layers", "lengths"), meta_fields=())
@dataclass(frozen=True)
class Cache:
    """One memory per layer, and lengths [B] int32: the tokens each sequence has seen."""

    layers: list[DeltaState | KeyValues]
    lengths: Any


def cache_specs(config: Config) -> Cache:
    """The PartitionSpecs of a cache."""
    cut = P(None, AXIS)
    return Cache([_kind(config, i)(cut, cut) for i in range(config.num_layers)], P())


def cache_shapes(config: Config, mesh: Mesh, batch: int, length: int, dtype: Any) -> Cache:
    """A cache of `batch` sequences of up to `length` tokens: shapes and shardings, without memory."""
    tp = mesh.shape[AXIS]
    kv = tp * kv_heads_per_rank(config, tp)
    heads, keys = config.linear_num_value_heads, config.linear_key_head_dim
    values = config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * keys + heads * values

    cut = NamedSharding(mesh, P(None, AXIS))

    def struct(shape: tuple[int, ...], kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=cut)

    def memory(i: int) -> DeltaState | KeyValues:
        if config.layer_types[i] == GDN:
            conv = struct((batch, channels, config.conv_width - 1), dtype)
            return DeltaState(conv, struct((batch, heads, keys, values), jnp.float32))
        shape = (batch, kv, length, config.head_dim)
        return KeyValues(struct(shape, dtype), struct(shape, dtype))

    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=NamedSharding(mesh, P()))
    return Cache([memory(i) for i in range(config.num_layers)], lengths)


def _kind(config: Config, i: int) -> type[DeltaState] | type[KeyValues]:
    return DeltaState if config.layer_types[i] == GDN else KeyValues
