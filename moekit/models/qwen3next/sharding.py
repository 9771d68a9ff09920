"""Where every parameter lives: one table from its name to its cut over the mesh axis `tp`.

A model's parameters are a tree of dicts and lists whose leaves are global arrays. An array that is cut over
`tp` is stored rank-major: the block of rank r holds what rank r computes with, in the order in which it does.
So its rows are stripes of the checkpoint's: the channels of the convolution, for example, are q | k | v of
rank 0, then q | k | v of rank 1. `Parameter.slabs(rank)` names the blocks of the checkpoint that make up one
rank's share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec as P

from moekit.models.qwen3next.config import GDN, Config

AXIS = "tp"
REPLICATED, ROWS, COLUMNS = P(), P(AXIS), P(None, AXIS)

# name in the parameter tree (layers without their number) -> how it is cut
TABLE: dict[str, P] = {
    "embed_tokens": REPLICATED,
    "norm": REPLICATED,
    "lm_head": ROWS,  # by vocabulary; replicated where tp does not divide it
    "layers.input_layernorm": REPLICATED,
    "layers.post_attention_layernorm": REPLICATED,
    "layers.linear_attn.in_proj_qkvz": ROWS,  # by key head; a rank's rows are q | k | v | z
    "layers.linear_attn.in_proj_ba": ROWS,  # by key head; a rank's rows are b | a
    "layers.linear_attn.conv1d": ROWS,  # striped: a rank's channels are q | k | v
    "layers.linear_attn.A_log": ROWS,
    "layers.linear_attn.dt_bias": ROWS,
    "layers.linear_attn.norm": REPLICATED,
    "layers.linear_attn.out_proj": COLUMNS,
    "layers.self_attn.q_proj": ROWS,  # by query head; each head's rows are query | gate
    "layers.self_attn.k_proj": ROWS,  # by kv head; a head is copied tp / heads times where tp exceeds them
    "layers.self_attn.v_proj": ROWS,
    "layers.self_attn.q_norm": REPLICATED,
    "layers.self_attn.k_norm": REPLICATED,
    "layers.self_attn.o_proj": COLUMNS,
    "layers.mlp.gate": ROWS,  # packed: a rank's gate | up, then the router, the shared gate and zeros
    "layers.mlp.gate.gate_up": ROWS,  # striped: a rank's rows are gate | up of the shared expert
    "layers.mlp.gate.router": REPLICATED,
    "layers.mlp.gate.shared_gate": REPLICATED,
    "layers.mlp.shared_down": COLUMNS,
    "layers.mlp.experts_gate_up": COLUMNS,  # [E, 2I, H], striped like gate_up
    "layers.mlp.experts_down": COLUMNS,  # [E, I, H]
}

FLOAT32 = ("layers.linear_attn.A_log", "layers.linear_attn.dt_bias")  # whatever the model's dtype


@dataclass(frozen=True)
class Slab:
    """The block `key[rows, columns]` of a checkpoint tensor; None takes the whole axis."""

    key: str
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Parameter:
    """One array of the model.

    name: its name in TABLE. shape: over all ranks. spec: its cut. slabs: from a rank to the blocks that make
    up its share, concatenated along the rows; where `stacked`, to one such list per expert, each transposed
    if `transposed`.
    """

    name: str
    shape: tuple[int, ...]
    spec: P
    slabs: Callable[[int], Sequence[Any]]
    stacked: bool = False
    transposed: bool = False

    def local_shape(self, tp: int) -> tuple[int, ...]:
        """The shape of one rank's share."""
        cut = self.cut_axis
        return tuple(n // tp if axis == cut else n for axis, n in enumerate(self.shape))

    @property
    def cut_axis(self) -> int | None:
        """The axis cut over tp, or None where the array is replicated."""
        return self.spec.index(AXIS) if AXIS in self.spec else None


def parameters(config: Config, tp: int) -> dict[str, Any]:
    """The tree of Parameters of a model over `tp` ranks, gates unpacked."""
    vocab, hidden = config.vocab_size, config.hidden_size
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    head_spec = vocabulary_spec(config, tp)
    head_rows = vocab // tp if head_spec == ROWS else vocab
    return {
        "embed_tokens": _whole("embed_tokens", "model.embed_tokens.weight", (vocab, hidden)),
        "norm": _whole("norm", "model.norm.weight", (hidden,)),
        "lm_head": Parameter(
            "lm_head",
            (vocab, hidden),
            head_spec,
            lambda rank: [Slab(head, _block(rank, head_rows) if head_spec == ROWS else None)],
        ),
        "layers": [_layer(config, tp, i) for i in range(config.num_layers)],
    }


def vocabulary_spec(config: Config, tp: int) -> P:
    """How the head, and so the logits' vocabulary, is cut."""
    return TABLE["lm_head"] if config.vocab_size % tp == 0 else REPLICATED


def specs(tree: Any, config: Config, tp: int, name: str = "") -> Any:
    """The PartitionSpecs of a parameter tree, gates packed or not, in its structure."""
    if isinstance(tree, dict):
        return {key: specs(value, config, tp, f"{name}.{key}" if name else key) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [specs(value, config, tp, name) for value in tree]
    return vocabulary_spec(config, tp) if name == "lm_head" else TABLE[name]


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


def _layer(config: Config, tp: int, i: int) -> dict[str, Any]:
    prefix, hidden = f"model.layers.{i}.", config.hidden_size
    layer: dict[str, Any] = {
        name: _whole(f"layers.{name}", f"{prefix}{name}.weight", (hidden,))
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    if config.layer_types[i] == GDN:
        layer["linear_attn"] = _gdn(config, tp, prefix + "linear_attn.")
    else:
        layer["self_attn"] = _attention(config, tp, prefix + "self_attn.")
    layer["mlp"] = _moe(config, tp, prefix + "mlp.")
    return layer


def _gdn(c: Config, tp: int, prefix: str) -> dict[str, Parameter]:
    heads, ratio = c.linear_num_key_heads // tp, c.values_per_key
    dim, wide = c.linear_key_head_dim, ratio * c.linear_value_head_dim
    keys, values = c.linear_num_key_heads * dim, c.linear_num_key_heads * wide
    value_heads, hidden = heads * ratio, c.hidden_size

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

    qkvz = grouped("in_proj_qkvz.weight", (dim, dim, wide, wide))
    return {
        "in_proj_qkvz": _cut("layers.linear_attn.in_proj_qkvz", (2 * keys + 2 * values, hidden), qkvz),
        "in_proj_ba": _cut(
            "layers.linear_attn.in_proj_ba",
            (2 * c.linear_num_value_heads, hidden),
            grouped("in_proj_ba.weight", (ratio, ratio)),
        ),
        "conv1d": _cut("layers.linear_attn.conv1d", (2 * keys + values, c.conv_width), channels),
        "A_log": _rows("layers.linear_attn.A_log", prefix + "A_log", (c.linear_num_value_heads,), value_heads),
        "dt_bias": _rows("layers.linear_attn.dt_bias", prefix + "dt_bias", (c.linear_num_value_heads,), value_heads),
        "norm": _whole("layers.linear_attn.norm", prefix + "norm.weight", (c.linear_value_head_dim,)),
        "out_proj": _columns("layers.linear_attn.out_proj", prefix + "out_proj.weight", (hidden, values), tp),
    }


def _attention(c: Config, tp: int, prefix: str) -> dict[str, Parameter]:
    dim, hidden, kv = c.head_dim, c.hidden_size, kv_heads_per_rank(c, tp)
    queries = c.num_attention_heads * dim

    def own_kv(key: str) -> Callable[[int], list[Slab]]:
        def slabs(rank: int) -> list[Slab]:
            first = rank * c.num_key_value_heads // tp
            return [Slab(prefix + key, (first * dim, (first + kv) * dim))]

        return slabs

    tree = {
        "q_proj": _rows("layers.self_attn.q_proj", prefix + "q_proj.weight", (2 * queries, hidden), 2 * queries // tp),
        "o_proj": _columns("layers.self_attn.o_proj", prefix + "o_proj.weight", (hidden, queries), tp),
    }
    for name in ("k_proj", "v_proj"):
        tree[name] = _cut(f"layers.self_attn.{name}", (tp * kv * dim, hidden), own_kv(f"{name}.weight"))
    for name in ("q_norm", "k_norm"):
        tree[name] = _whole(f"layers.self_attn.{name}", f"{prefix}{name}.weight", (dim,))
    return tree


def _moe(c: Config, tp: int, prefix: str) -> dict[str, Any]:
    hidden, experts, wide = c.hidden_size, c.num_experts, c.moe_intermediate_size
    shared, own = c.shared_expert_intermediate_size, wide // tp

    def gate_up(key: str, width: int, rank: int) -> list[Slab]:
        return [Slab(f"{prefix}{key}.{name}.weight", _block(rank, width)) for name in ("gate_proj", "up_proj")]

    def down(expert: int, rank: int) -> list[Slab]:
        return [Slab(f"{prefix}experts.{expert}.down_proj.weight", None, _block(rank, own))]

    return {
        "gate": {
            "gate_up": _cut(
                "layers.mlp.gate.gate_up",
                (2 * shared, hidden),
                lambda rank: gate_up("shared_expert", shared // tp, rank),
            ),
            "router": _whole("layers.mlp.gate.router", prefix + "gate.weight", (experts, hidden)),
            "shared_gate": _whole("layers.mlp.gate.shared_gate", prefix + "shared_expert_gate.weight", (1, hidden)),
        },
        "shared_down": _columns("layers.mlp.shared_down", prefix + "shared_expert.down_proj.weight", (hidden, shared), tp),
        "experts_gate_up": _cut(
            "layers.mlp.experts_gate_up",
            (experts, 2 * wide, hidden),
            lambda rank: [gate_up(f"experts.{e}", own, rank) for e in range(experts)],
            stacked=True,
        ),
        "experts_down": _cut(
            "layers.mlp.experts_down",
            (experts, wide, hidden),
            lambda rank: [down(e, rank) for e in range(experts)],
            stacked=True,
            transposed=True,
        ),
    }


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


def _cut(name: str, shape: tuple[int, ...], slabs: Callable[[int], Sequence[Any]], **how: bool) -> Parameter:
    return Parameter(name, shape, TABLE[name], slabs, **how)


def _whole(name: str, key: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(name, shape, REPLICATED, lambda rank: [Slab(key)])


def _rows(name: str, key: str, shape: tuple[int, ...], width: int) -> Parameter:
    return Parameter(name, shape, TABLE[name], lambda rank: [Slab(key, _block(rank, width))])


def _columns(name: str, key: str, shape: tuple[int, int], tp: int) -> Parameter:
    return Parameter(name, shape, TABLE[name], lambda rank: [Slab(key, None, _block(rank, shape[1] // tp))])
