"""`experts` of weights in FP8, with a scale for each of their blocks: for few tokens and for many."""

import numpy as np

from moekit.fusions.experts import blocks, known
from moekit.fusions.moe_align import align, tables_axes
from moekit.fusions.scaled import BLOCK, STORED, block_by_block, counted, gated, of_rows, one, products
from moekit.lang import In, cast, extent, f32, fusion, gather, halves, iota, place, round_to, silu, size, sum, where


def reference(x, ids, weights, gate_up, gate_up_scale, down, down_scale, block, columns, inner):
    """float64, pair by pair and block by block, rounded where the declaration rounds; a pair of no expert adds nothing."""
    out = np.zeros((len(x), down.shape[1]))
    for t, k in np.ndindex(*ids.shape):
        if 0 <= (e := int(ids[t, k])) < len(down):
            both, both_scales, weight, scales = (one(stack, e) for stack in (gate_up, gate_up_scale, down, down_scale))
            activated = round_to(gated(x[t].astype(np.float64), both, both_scales, inner, columns), x.dtype)
            product = block_by_block(activated, weight, scales, columns, inner)
            with np.errstate(invalid="ignore"):
                out[t] += weights[t, k].astype(np.float64) * round_to(product, x.dtype)
    return {"out": out}


@fusion(
    reference,
    x=In("T D"), ids=In("T K", dtype=("int32", "int64")), weights=In("T K"),
    gate_up=In("E 2*I D", dtype=STORED), gate_up_scale=In("E 2*Ib Db", dtype="float32"),
    down=In("E H I", dtype=STORED), down_scale=In("E Hb Ib", dtype="float32"),
    dynamic="T B C G", axes={**tables_axes(lambda E: E), "B": blocks, "Ib": counted("I", "inner"),
                         "Db": counted("D", "columns"), "Hb": counted("H", "columns")},
)  # fmt: skip
def scaled_experts(
    x, ids, weights, gate_up, gate_up_scale, down, down_scale, block: int = 1, columns: int = BLOCK, inner: int = BLOCK
):
    """out[t] = Σ over k of weights[t, k]·expert ids[t, k] of x[t], as `experts`, whose weights are times their scales.

    x [T, D], ids and weights [T, K], gate_up [E, 2I, D] = [gate | up] and down [E, H, I] in float8_e4m3fn (or a wider
    float), gate_up_scale [E, 2⌈I/inner⌉, ⌈D/columns⌉] and down_scale [E, ⌈H/columns⌉, ⌈I/inner⌉] float32: one for every
    `inner` of I and `columns` of D, or of H -> out [T, H] in x's dtype. Blocks of what is contracted are multiplied as they
    are, scaled in float32 and added up in their order; roundings and `block` are those of `experts`. A row's bits are the same
    whatever the rows beside it; on an NVIDIA GPU blocks of up to 16 pairs of float8 weights add up in another order than larger
    ones, and so may blocks of scales of fewer than 64 columns in each. An id of no expert adds nothing.
    """
    if block == 1:
        pairs = iota("B") + iota("J")
        token, slot = iota("B") // size("K"), iota("B") % size("K")
        chosen = gather(gather(ids, token, over="T"), slot, over="K")
    else:
        tables = align(ids, block)
        pairs, chosen = tables.pairs, tables.chosen
    token, slot = where(pairs < 0, -1, pairs // size("K")), pairs % size("K")
    rows = gather(x, token, over="T")
    some = known(chosen)

    def product(rows, weight, scales, over, into, length):
        deep = where(some, extent(into.split()[0]), 0)  # a block of no expert has nothing to add up
        return products(rows, *(gather(a, chosen, over="E") for a in (weight, scales)), over, into, length, deep)

    gate, up = (
        product(rows, part, of_rows(gate_up_scale, "I", "2*Ib", inner, half), "D", "Db Di", columns)
        for half, part in enumerate(halves(gate_up, "I"))
    )
    activated = cast(silu(gate) * up, x.dtype)
    if size("I") % inner:  # past the end, where weights are zero, an infinite scale makes NaN of them
        activated = where(iota("I") < size("I"), activated, 0.0)
    each = cast(product(activated, down, of_rows(down_scale, "H", "Hb", columns), "I", "Ib Ii", inner), x.dtype)
    placed = place(each, T=token, K=slot)
    return {"out": cast(sum(where(known(ids), f32(placed) * f32(weights), 0.0), over="K"), x.dtype)}
