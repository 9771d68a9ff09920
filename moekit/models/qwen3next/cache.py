"""What a sequence remembers between steps.

With kernels, the states of all delta nets stand in one stack, of which a kernel reads and writes its layer's: an array that is
donated costs the host 3 µs and more for each device (`layer.py` has why arguments are few). XLA by itself would write the stack
anew for every layer, so with `kernels="xla"` each layer has arrays of its own; and so have keys and values in any case, since
XLA copies a layer's out of a stack before it multiplies by them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moekit.models.qwen3next.config import ATTENTION, GDN, Config
from moekit.models.qwen3next.sharding import AXIS, kv_heads_per_rank

CUT = P(None, AXIS)  # by heads, which come after the sequences


@partial(jax.tree_util.register_dataclass, data_fields=("conv", "recurrent"), meta_fields=())
@dataclass(frozen=True)
class DeltaState:
    """A gated delta net's memory.

    conv [B, width - 1, channels]: the last inputs of the convolution, the oldest first, in the model's dtype, a rank's channels
    q | k | v. recurrent [B, value heads, key dim, value dim] float32. Both are cut by heads over tp (`delta_specs`). In a stack
    both have the number of the delta net before that.
    """

    conv: Any
    recurrent: Any


@partial(jax.tree_util.register_dataclass, data_fields=("keys", "values"), meta_fields=())
@dataclass(frozen=True)
class KeyValues:
    """An attention layer's memory: keys, values [B, kv heads, length, head dim], cut by kv heads over tp."""

    keys: Any
    values: Any


@partial(jax.tree_util.register_dataclass, data_fields=("deltas", "attentions", "lengths"), meta_fields=())
@dataclass(frozen=True)
class Cache:
    """What all layers remember, and lengths [B] int32: the tokens each sequence has seen.

    deltas: the states of the delta nets in order, in one stack or each by itself (a tuple). attentions: those of the others.
    """

    deltas: DeltaState | tuple[DeltaState, ...]
    attentions: tuple[KeyValues, ...]
    lengths: Any

    @property
    def room(self) -> int | None:
        """How many tokens a sequence may have; None where no layer counts them."""
        return self.attentions[0].keys.shape[2] if self.attentions else None

    @property
    def stacked(self) -> bool:
        """Whether the delta nets share their arrays."""
        return not isinstance(self.deltas, tuple)

    def apart(self) -> Cache:
        """The same memories with the states of each delta net by themselves, copied out of the stack.

        Keys, values and lengths are shared with this cache: a step that donates one of the two takes them from the other.
        """
        held = self.deltas
        if isinstance(held, tuple):
            return self
        states = (DeltaState(held.conv[i], held.recurrent[i]) for i in range(held.conv.shape[0]))
        return Cache(tuple(states), self.attentions, self.lengths)


class Memories:
    """The memories of a cache while a function goes through the layers in order."""

    def __init__(self, config: Config, cache: Cache | None = None, stacked: bool = False):
        self.count = config.layer_types.count(GDN)
        self.stacked = cache.stacked if cache else stacked
        self.deltas: Any = cache.deltas if cache else ()
        self.attentions = cache.attentions if cache else ()
        self.seen = {GDN: 0, ATTENTION: 0}

    def delta(self) -> tuple[DeltaState, jax.Array | None]:
        """The next delta net's own state, or the stack that holds it, and where."""
        at = self.seen[GDN]
        return (self.deltas, jnp.int32(at)) if self.stacked else (self.deltas[at], None)

    def attention(self) -> KeyValues:
        """The next attention's memory."""
        return self.attentions[self.seen[ATTENTION]]

    def keep(self, kind: str, new: Any) -> None:
        """What the next layer of a kind remembers from now on, or the stack that holds it."""
        at = self.seen[kind]
        self.seen[kind] += 1
        if kind == GDN:
            self.deltas = new if self.stacked else (*self.deltas[:at], new, *self.deltas[at + 1 :])
        else:
            self.attentions = (*self.attentions[:at], new, *self.attentions[at + 1 :])

    def first(self, kind: str, new: Any) -> None:
        """What the next layer of a kind remembers of a prompt."""
        if kind == GDN and self.stacked:
            at = self.seen[GDN]
            held = self.deltas or jax.tree.map(lambda a: jnp.zeros((self.count, *a.shape), a.dtype), new)
            new = jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, at, 0), held, new)
        self.keep(kind, new)

    def cache(self, lengths: jax.Array) -> Cache:
        """What all layers remember now."""
        return Cache(self.deltas, self.attentions, lengths)


def cache_specs(config: Config, stacked: bool) -> Cache:
    """The PartitionSpecs of a cache."""
    count = config.layer_types.count(GDN)
    deltas = delta_specs(stacked=True) if stacked and count else (delta_specs(),) * count
    return Cache(deltas, (KeyValues(CUT, CUT),) * (config.num_layers - count), P())


def delta_specs(stacked: bool = False) -> DeltaState:
    """The PartitionSpecs of one delta net's state, or of the stack of them all."""
    before = (None,) * stacked
    return DeltaState(P(*before, None, None, AXIS), P(*before, *CUT))


def cache_shapes(config: Config, mesh: Mesh, batch: int, length: int, dtype: Any, stacked: bool = True) -> Cache:
    """A cache of `batch` sequences of up to `length` tokens: shapes and shardings, without memory.

    stacked: as kernels have it; False as `kernels="xla"` has.
    """
    tp, count = mesh.shape[AXIS], config.layer_types.count(GDN)
    kv = tp * kv_heads_per_rank(config, tp)
    heads, keys = config.linear_num_value_heads, config.linear_key_head_dim
    values = config.linear_value_head_dim
    channels = 2 * config.linear_num_key_heads * keys + heads * values
    before = (count,) if stacked and count else ()

    def struct(shape: tuple[int, ...], kind: Any, cut: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, cut))

    cuts = delta_specs(bool(before))
    conv = struct((*before, batch, config.conv_width - 1, channels), dtype, cuts.conv)
    state = DeltaState(conv, struct((*before, batch, heads, keys, values), jnp.float32, cuts.recurrent))
    memory = KeyValues(*[struct((batch, kv, length, config.head_dim), dtype, CUT)] * 2)
    lengths = struct((batch,), jnp.int32, P())
    return Cache(state if before else (state,) * count, (memory,) * (config.num_layers - count), lengths)
