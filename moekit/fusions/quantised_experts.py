"""`scaled_experts` of rows in float8: products of float8 with float8, for many tokens."""

import numpy as np

from moekit.fusions.experts import blocks as block_count
from moekit.fusions.experts import known
from moekit.fusions.moe_align import align, tables_axes
from moekit.fusions.quantised import coded, columns_of, scaled
from moekit.fusions.scaled import BLOCK, STORED, counted, of_rows, one
from moekit.lang import (
    In,
    blocks,
    cast,
    contract,
    extent,
    f32,
    fusion,
    gather,
    halves,
    iota,
    place,
    round_to,
    silu,
    size,
    sum,
    where,
)


def in_blocks(codes, scale, weight, weight_scale, rows, columns):
    """weight·(codes·scale) of codes [b, columns] and a scale for each b, in float64; past the weight's end it is zero."""
    out, whole = np.zeros(len(weight)), np.zeros((len(weight), len(codes) * columns))
    whole[:, : weight.shape[1]] = weight
    with np.errstate(invalid="ignore", over="ignore"):
        for b, (part, factor) in enumerate(zip(codes, scale, strict=True)):
            each = np.repeat(weight_scale[:, b], rows)[: len(weight)]
            out += whole[:, b * columns : (b + 1) * columns] @ part * (factor * each)
    return out


def reference(codes, codes_scale, ids, weights, gate_up, gate_up_scale, down, down_scale, block, columns, inner, dtype):
    """float64, pair by pair and block by block, rounded where the declaration rounds; a pair of no expert adds nothing."""
    out, width = np.zeros((len(codes), down.shape[1])), down.shape[2]
    for t, k in np.ndindex(*ids.shape):
        if 0 <= (e := int(ids[t, k])) < len(down):
            both, both_scales, weight, scales = (one(stack, e) for stack in (gate_up, gate_up_scale, down, down_scale))
            row = codes[t].astype(np.float64), codes_scale[t].astype(np.float64)
            pairs = zip(np.split(both, 2), np.split(both_scales, 2), strict=True)
            gate, up = (in_blocks(*row, *pair, inner, columns) for pair in pairs)
            parts = np.zeros(-(-width // inner) * inner)
            with np.errstate(invalid="ignore", over="ignore"):
                parts[:width] = round_to(gate / (1 + np.exp(-gate)) * up, dtype)
                active, active_scale = coded(parts.reshape(-1, inner))
                each = in_blocks(active, active_scale[:, 0], weight, scales, columns, inner)
                out[t] += weights[t, k].astype(np.float64) * round_to(each, dtype)
    return {"out": out}


@fusion(
    reference,
    codes=In("T Db Di", dtype=STORED), codes_scale=In("T Db", dtype="float32"),
    ids=In("T K", dtype=("int32", "int64")), weights=In("T K"),
    gate_up=In("E 2*I D", dtype=STORED), gate_up_scale=In("E 2*Ib Db", dtype="float32"),
    down=In("E H I", dtype=STORED), down_scale=In("E Hb Ib", dtype="float32"),
    dynamic="T B C G", axes={**tables_axes(lambda E: E), "B": block_count, "Ib": counted("I", "inner"),
                         "Db": counted("D", "columns"), "Di": columns_of, "Hb": counted("H", "columns")},
)  # fmt: skip
def quantised_experts(
    codes, codes_scale, ids, weights, gate_up, gate_up_scale, down, down_scale,
    block: int = 64, columns: int = BLOCK, inner: int = BLOCK, dtype: str = "bfloat16",
):  # fmt: skip
    """`scaled_experts` of x as `quantised` gives it, with `columns`; what is activated is quantised likewise, by `inner` of I.

    codes [T, Db, columns] in float8_e4m3fn (or a wider float) and codes_scale [T, Db] float32 stand for x; those past the
    end of D are times zero, so they must be numbers. The others are those of `scaled_experts` -> out [T, H] in `dtype`.
    Blocks of what is contracted are multiplied as they are, float8 with float8, scaled in float32 by both scales, and added
    up in their order. What is activated is rounded to `dtype` first, as is what a pair gives. The matrix unit of an NVIDIA
    GPU adds up such a block in fewer bits than float32 (docs/numerics.md).
    `block`: how many of an expert's pairs a program takes together; the bits are the same. An id of no expert adds nothing.
    """
    tables = align(ids, block)
    pairs, chosen = tables.pairs, tables.chosen
    token, slot = where(pairs < 0, -1, pairs // size("K")), pairs % size("K")
    some = known(chosen)

    def product(rows, rows_scale, weight, scale, over):
        outer, inside = over.split()
        own, factor = (gather(a, chosen, over="E") for a in (weight, scale))
        count = where(some, extent(outer), 0)  # a block of no expert has nothing to add up
        return sum(contract(rows, own, over=inside) * (rows_scale * factor), over=outer, upto=count)

    rows = [gather(a, token, over="T") for a in (codes, codes_scale)]
    gate, up = (
        product(*rows, blocks(blocks(part, "D", columns, into="Db Di"), "I", inner, into="Ib Ii"), scale, "Db Di")
        for part, scale in zip(halves(gate_up, "I"), halves(gate_up_scale, "Ib"), strict=True)
    )
    activated = cast(silu(gate) * up, dtype)
    if size("I") % inner:  # past the end, where weights are zero, an infinite scale makes NaN of them
        activated = where(iota("Ib") * inner + iota("Ii") < size("I"), activated, 0.0)
    active = scaled(f32(activated), "Ii")
    each = product(*active, blocks(down, "I", inner, into="Ib Ii"), of_rows(down_scale, "H", "Hb", columns), "Ib Ii")
    placed = place(cast(each, dtype), T=token, K=slot)
    return {"out": cast(sum(where(known(ids), f32(placed) * f32(weights), 0.0), over="K"), dtype)}
