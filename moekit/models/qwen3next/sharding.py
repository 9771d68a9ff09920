"""Where every weight lives: the arrays of a model, their cut over the mesh axis `tp`, and what each rank reads.

The layers' weights stand in few arrays (`layer.py`). All are cut rank-major: the block of rank r holds what rank r computes
with, in the order in which it does. So its rows are stripes of the checkpoint's: the channels of the convolution, for example,
are q | k | v of rank 0, then q | k | v of rank 1. `Weight.slabs(rank)` names the blocks of the checkpoint that make up one
rank's share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import gcd, prod
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec as P

from moekit.models.qwen3next.config import ATTENTION, GDN, Config
from moekit.models.qwen3next.layer import DOWN, HOMES, OUT, ROWS, ROWS8, SCALE, SMALL, STACK, STACKED, Layers, Layout, arranged

AXIS = "tp"
REPLICATED, CUT = P(), P(AXIS)
FLOAT32 = ("A_log", "dt_bias")  # whatever the model's dtype
ROUTED = ("experts_gate_up", "experts_down")  # these may stay float8, together, and beside them so may the others below
SHARED = ("gate_up", "shared_down")
MIXERS = {GDN: ("in_proj_qkvz", "out_proj"), ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj")}


@dataclass(frozen=True)
class Slab:
    """The block `key[rows, columns]` of a checkpoint tensor; None takes the whole axis.

    scales: not its elements, but the scales of an FP8 tensor's, one for every so many rows and columns of the block.
    """

    key: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    scales: tuple[int, int] | None = None


@dataclass(frozen=True)
class Weight:
    """One weight of the model.

    name: in its layer. shape: of one rank's share. slabs: from a rank to the blocks that make up its share, concatenated
    along the rows and, if `transposed`, turned; where `stacked`, one such list per expert. `copied`: every rank has all of it.
    home: the array of its layer in which it stands. block: of scales, the rows and columns that each is of.
    """

    name: str
    shape: tuple[int, ...]
    slabs: Callable[[int], Sequence[Any]]
    stacked: bool = False
    transposed: bool = False
    copied: bool = False
    home: str = ROWS
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Parameter:
    """One array of the model.

    shape: over all ranks. spec: its cut, along the first axis or not at all. weights: what stands in one rank's share, and
    from which element on; zeros between. narrow: whether it has the model's dtype, else float32, to which weights come by
    way of the model's dtype, but for those of FLOAT32. float8: whether it holds an FP8 checkpoint's own codes.
    """

    shape: tuple[int, ...]
    spec: P
    weights: tuple[tuple[Weight, int], ...]
    narrow: bool = True
    float8: bool = False

    def dtype(self, model: Any) -> np.dtype:
        """Of its elements, in a model of this dtype."""
        return np.dtype(ml_dtypes.float8_e4m3fn if self.float8 else model if self.narrow else np.float32)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The shape of one rank's share."""
        return (self.shape[0] // tp, *self.shape[1:]) if self.spec == CUT else self.shape


def parameters(config: Config, tp: int) -> dict[str, Any]:
    """The tree of Parameters of a model over `tp` ranks."""
    vocab, hidden = config.vocab_size, config.hidden_size
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    spec = vocabulary_spec(config, tp)
    own = vocab // tp if spec == CUT else vocab
    tree: dict[str, Any] = {"layers": _layers_parameters(config, tp)}
    top = _rows("lm_head", head, (own, hidden)) if spec == CUT else _whole("lm_head", head, (vocab, hidden))
    tree["lm_head"] = _alone(top, tp)
    for name, key, shape in (("embed_tokens", "embed_tokens", (vocab, hidden)), ("norm", "norm", (hidden,))):
        tree[name] = _alone(_whole(name, f"model.{key}.weight", shape), tp)
    return tree


def _alone(weight: Weight, tp: int) -> Parameter:
    """A weight that is an array of its own."""
    first, *rest = weight.shape
    shape, spec = (weight.shape, REPLICATED) if weight.copied else ((first * tp, *rest), CUT)
    return Parameter(shape, spec, ((weight, 0),))


def _layers_parameters(config: Config, tp: int) -> Layers:
    """The arrays of all layers; what stands in an array of several layers, or of all, is one rank's layers in order."""
    kinds = config.layer_types
    layouts = tuple(layout_of(config, tp, kind) for kind in kinds)
    held = [layer_weights(config, tp, i) for i in range(len(kinds))]

    def stored(home: str, members: Sequence[int]) -> Parameter:
        shape = layouts[members[0]].shapes[HOMES.index(home)]
        unit, parts = shape[-1] if home in (ROWS, ROWS8) else 1, []
        for nth, i in enumerate(members):
            mine = [(held[i][name], part) for name, part in layouts[i].parts if part.home == home]
            parts += [(weight, nth * prod(shape) + part.start * unit) for weight, part in mine]
        stack = (len(members), *shape) if home in STACKED else shape
        float8 = home == ROWS8 or (config.float8 is not None and all(weight.name in config.float8.names for weight, _ in parts))
        return Parameter((tp * stack[0], *stack[1:]), CUT, tuple(parts), narrow=home != SMALL, float8=float8)

    def stack(name: str) -> Parameter:
        weights = [mine[name] for mine in held if name in mine]
        first, *_ = weights
        parts = tuple((weight, nth * prod(first.shape)) for nth, weight in enumerate(weights))
        return Parameter((tp * len(weights), *first.shape), CUT, parts, narrow=False, float8=first.block is None)

    own = {home: tuple(stored(home, (i,)) for i in range(len(kinds))) for home in (ROWS, DOWN)}
    out = {kind: stored(OUT, [i for i, other in enumerate(kinds) if other == kind]) for kind in sorted(set(kinds))}
    rows8 = tuple(stored(ROWS8, (i,)) for i in range(len(kinds))) if layouts[0].shapes[HOMES.index(ROWS8)][0] else ()
    stacks = {name: stack(name) for name in sorted({n for mine in held for n, w in mine.items() if w.home == STACK})}
    return Layers(own[ROWS], stored(SMALL, range(len(kinds))), out, own[DOWN], layouts, kinds, rows8, stacks)


@cache
def layout_of(config: Config, tp: int, kind: str) -> Layout:
    """Where a rank's weights lie in the arrays of a layer of a kind.

    Both kinds of layers have their experts and gates at the same places and as many rows, so that one kernel serves both.
    """
    known, blocks = {}, {}
    for other in set(config.layer_types):
        weights = layer_weights(config, tp, config.layer_types.index(other))
        known[other] = {name: (w.shape, w.home) for name, w in weights.items()}
        blocks[other] = {name: w.block for name, w in weights.items() if w.block}
    return arranged(known[kind], config.hidden_size, known.values(), config.linear_value_head_dim - 1, blocks[kind])


def vocabulary_spec(config: Config, tp: int) -> P:
    """How the head, and so the logits' vocabulary, is cut; replicated where tp does not divide it."""
    return CUT if config.vocab_size % tp == 0 else REPLICATED


def specs(params: dict[str, Any], config: Config, tp: int) -> dict[str, Any]:
    """The PartitionSpecs of a parameter tree, in its structure."""
    layers = jax.tree.map(lambda _: CUT, params["layers"])
    return {"embed_tokens": REPLICATED, "norm": REPLICATED, "lm_head": vocabulary_spec(config, tp), "layers": layers}


def kv_heads_per_rank(config: Config, tp: int) -> int:
    """Key-value heads a rank holds: its share, or a copy of one where there are more ranks than heads."""
    return max(1, config.num_key_value_heads // tp)


def checkpoint_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a checkpoint must hold."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    for i, kind in enumerate(config.layer_types):
        layer = {**_norm_shapes(config), **_moe_shapes(config)}
        layer |= _gdn_shapes(config) if kind == GDN else _attention_shapes(config)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _norm_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (c.hidden_size,) for name in ("input_layernorm", "post_attention_layernorm")}


def _gdn_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    heads = c.linear_num_value_heads
    return {
        "linear_attn.in_proj_qkvz.weight": (2 * keys + 2 * values, c.hidden_size),
        "linear_attn.in_proj_ba.weight": (2 * heads, c.hidden_size),
        "linear_attn.conv1d.weight": (2 * keys + values, 1, c.conv_width),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (c.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (c.hidden_size, values),
    }


def _attention_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    queries, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    return {
        "self_attn.q_proj.weight": (2 * queries, c.hidden_size),
        "self_attn.k_proj.weight": (kv, c.hidden_size),
        "self_attn.v_proj.weight": (kv, c.hidden_size),
        "self_attn.q_norm.weight": (c.head_dim,),
        "self_attn.k_norm.weight": (c.head_dim,),
        "self_attn.o_proj.weight": (c.hidden_size, queries),
    }


def _moe_shapes(c: Config) -> dict[str, tuple[int, ...]]:
    shapes = {
        "mlp.gate.weight": (c.num_experts, c.hidden_size),
        "mlp.shared_expert_gate.weight": (1, c.hidden_size),
    }
    widths = {f"mlp.experts.{e}": c.moe_intermediate_size for e in range(c.num_experts)}
    widths["mlp.shared_expert"] = c.shared_expert_intermediate_size
    for name, width in widths.items():
        shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, c.hidden_size)
        shapes[f"{name}.down_proj.weight"] = (c.hidden_size, width)
    return shapes


def layer_weights(config: Config, tp: int, i: int) -> dict[str, Weight]:
    """The weights of layer i by name, the mixture's first."""
    prefix, hidden = f"model.layers.{i}.", (config.hidden_size,)
    mixer = _gdn if config.layer_types[i] == GDN else _attention
    weights = [
        *_moe(config, tp, prefix + "mlp."),
        *(_whole(n, f"{prefix}{n}.weight", hidden) for n in ("input_layernorm", "post_attention_layernorm")),
        *mixer(config, tp, prefix + ("linear_attn." if config.layer_types[i] == GDN else "self_attn.")),
    ]
    return {w.name: w for w in weights}


def _gdn(c: Config, tp: int, prefix: str) -> list[Weight]:
    """By key heads; a value head goes with its key head."""
    heads, ratio = c.linear_num_key_heads // tp, c.values_per_key
    dim, wide = c.linear_key_head_dim, ratio * c.linear_value_head_dim
    keys, hidden, own = c.linear_num_key_heads * dim, c.hidden_size, heads * ratio

    def grouped(key: str, widths: Sequence[int]) -> Callable[[int], list[Slab]]:
        """Rows grouped by key head in the checkpoint, taken component by component."""

        def slabs(rank: int) -> list[Slab]:
            ranges = []
            for part, width in enumerate(widths):
                for head in range(rank * heads, (rank + 1) * heads):
                    start = head * sum(widths) + sum(widths[:part])
                    ranges.append((start, start + width))
            return [Slab(prefix + key, rows) for rows in _merged(ranges)]

        return slabs

    def channels(rank: int) -> list[Slab]:
        parts = ((0, heads * dim), (keys, heads * dim), (2 * keys, heads * wide))
        starts = ((base + rank * width, width) for base, width in parts)
        return [Slab(prefix + "conv1d.weight", rows) for rows in _merged([(s, s + w) for s, w in starts])]

    qkvz, ba = grouped("in_proj_qkvz.weight", (dim, dim, wide, wide)), grouped("in_proj_ba.weight", (ratio, ratio))
    joined = [Weight("in_proj_qkvz", (2 * heads * (dim + wide), hidden), qkvz)]  # a rank's rows are q | k | v | z
    out = [Weight("out_proj", (hidden, heads * wide), _columns(prefix + "out_proj.weight", heads * wide), home=OUT)]
    return [
        *_short(c, joined, rows=gcd(dim, wide)),
        Weight("in_proj_ba", (2 * own, hidden), ba),  # b | a
        *_short(c, out, columns=heads * wide),
        Weight("conv1d", (heads * (2 * dim + wide), c.conv_width), channels, home=SMALL),  # striped: channels are q | k | v
        _rows("A_log", prefix + "A_log", (own,), home=SMALL),
        _rows("dt_bias", prefix + "dt_bias", (own,), home=SMALL),
        _whole("norm", prefix + "norm.weight", (c.linear_value_head_dim,), home=SMALL),
    ]


def _attention(c: Config, tp: int, prefix: str) -> list[Weight]:
    """By query heads; a key-value head is copied where there are more ranks than heads."""
    dim, hidden, kv = c.head_dim, c.hidden_size, kv_heads_per_rank(c, tp)
    queries = c.num_attention_heads // tp * dim

    def own_kv(key: str) -> Callable[[int], list[Slab]]:
        def slabs(rank: int) -> list[Slab]:
            first = rank * c.num_key_value_heads // tp
            return [Slab(prefix + key, (first * dim, (first + kv) * dim))]

        return slabs

    joined = [
        _rows("q_proj", prefix + "q_proj.weight", (2 * queries, hidden)),  # each head's rows are query | gate
        *(Weight(name, (kv * dim, hidden), own_kv(f"{name}.weight")) for name in ("k_proj", "v_proj")),
    ]
    out = [Weight("o_proj", (hidden, queries), _columns(prefix + "o_proj.weight", queries), home=OUT)]
    return [
        *_short(c, joined, rows=dim),
        *_short(c, out, columns=queries),
        *(_whole(name, f"{prefix}{name}.weight", (dim,), home=SMALL) for name in ("q_norm", "k_norm")),
    ]


def _moe(c: Config, tp: int, prefix: str) -> list[Weight]:
    """Experts are dealt to `ep` groups of ranks, and within a group cut by their width, as the shared one is over all ranks.

    Routers are replicated: every rank knows of every expert, and those of other groups add nothing to its part of the sum.
    """
    hidden, experts, group = c.hidden_size, c.num_experts // c.ep, tp // c.ep
    own, shared = c.moe_intermediate_size // group, c.shared_expert_intermediate_size // tp

    def gate_up(key: str, width: int, rank: int) -> list[Slab]:
        return [Slab(f"{prefix}{key}.{name}.weight", _block(rank, width)) for name in ("gate_proj", "up_proj")]

    def both(expert: int, rank: int) -> list[Slab]:
        return gate_up(f"experts.{expert}", own, rank % group)

    def down(expert: int, rank: int) -> list[Slab]:
        return [Slab(f"{prefix}experts.{expert}.down_proj.weight", None, _block(rank % group, own))]

    def every(one: Callable[[int, int], list[Slab]]) -> Callable[[int], list[list[Slab]]]:
        return lambda rank: [one(e, rank) for e in range(*_block(rank // group, experts))]

    routed = [
        Weight("experts_gate_up", (experts, 2 * own, hidden), every(both), stacked=True),
        Weight("experts_down", (experts, own, hidden), every(down), stacked=True, transposed=True, home=DOWN),
    ]
    if c.float8 and {*ROUTED} <= c.float8.names:
        routed = [
            *_kept("experts_gate_up", (experts, 2 * own, hidden), (c.float8.cut(own), c.float8.block), every(both), ROWS8),
            *_kept("experts_down", (experts, hidden, own), (c.float8.block, c.float8.cut(own)), every(down), DOWN),
        ]
    back = _columns(f"{prefix}shared_expert.down_proj.weight", shared)
    joined = [Weight("gate_up", (2 * shared, hidden), lambda rank: gate_up("shared_expert", shared, rank))]
    shared_down = [Weight("shared_down", (shared, hidden), back, transposed=True)]
    if c.float8 and {*SHARED} <= c.float8.names:
        shared_down = [Weight("shared_down", (hidden, shared), back, home=STACK)]
    return [
        *routed,
        *_short(c, joined, rows=shared),
        _whole("router", prefix + "gate.weight", (c.num_experts, hidden)),
        _whole("shared_gate", prefix + "shared_expert_gate.weight", (1, hidden)),
        *_short(c, shared_down, columns=shared),
    ]


def _kept(
    name: str, shape: tuple[int, ...], block: tuple[int, int], slabs: Callable[[int], list[list[Slab]]], home: str
) -> list[Weight]:
    """A stack of matrices that stays float8, and its scales, for blocks of so many rows and columns.

    Where ranks cut the files' blocks they have smaller ones, several with the same scale.
    """
    rows, columns = block

    def scales(rank: int) -> list[list[Slab]]:
        return [[replace(slab, scales=(rows, columns)) for slab in matrix] for matrix in slabs(rank)]

    grid = (shape[0], -(-shape[1] // rows), -(-shape[2] // columns))
    return [Weight(name, shape, slabs, True, home=home), Weight(name + SCALE, grid, scales, True, home=STACK, block=block)]


def _short(c: Config, weights: list[Weight], rows: int = 0, columns: int = 0) -> list[Weight]:
    """Matrices one above the other, as they are, or float8 where the config keeps them so, with scales for all of them.

    rows, columns: of which what ranks and files cut has whole multiples; 0 where nothing is cut. Scales are named by the first.
    """
    if c.float8 is None or not {w.name for w in weights} <= c.float8.names:
        return weights
    tall, wide = (c.float8.cut(n) if n else c.float8.block for n in (rows, columns))
    count, width = sum(w.shape[0] for w in weights), weights[0].shape[1]

    def scales(rank: int) -> list[Slab]:
        return [replace(slab, scales=(tall, wide)) for w in weights for slab in w.slabs(rank)]

    grid = (-(-count // tall), -(-width // wide))
    kept = [replace(w, home=ROWS8) if w.home == ROWS else w for w in weights]
    return [*kept, Weight(weights[0].name + SCALE, grid, scales, home=STACK, block=(tall, wide))]


def _block(rank: int, width: int) -> tuple[int, int]:
    return rank * width, (rank + 1) * width


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows with neighbouring ranges joined."""
    merged: list[tuple[int, int]] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return merged


def _whole(name: str, key: str, shape: tuple[int, ...], home: str = ROWS) -> Weight:
    return Weight(name, shape, lambda rank: [Slab(key)], copied=True, home=home)


def _rows(name: str, key: str, shape: tuple[int, ...], home: str = ROWS) -> Weight:
    return Weight(name, shape, lambda rank: [Slab(key, _block(rank, shape[0]))], home=home)


def _columns(key: str, own: int) -> Callable[[int], list[Slab]]:
    return lambda rank: [Slab(key, None, _block(rank, own))]
