"""The routed experts: pairs of a token and an expert in blocks of one expert each, for few tokens and for many."""

import numpy as np

from moekit.fusions.moe_align import align, most_blocks, tables_axes
from moekit.lang import In, cast, contract, extent, f32, fusion, gather, halves, iota, place, round_to, silu, size, sum, where


def reference(x, ids, weights, gate_up, down, block=1):
    """float64, pair by pair, rounded where the declaration rounds; a pair of no expert adds nothing."""
    rows, gate_up, down = (a.astype(np.float64) for a in (x, gate_up, down))
    out = np.zeros((x.shape[0], down.shape[2]))
    for t, k in np.ndindex(*ids.shape):
        if 0 <= (e := int(ids[t, k])) < len(down):
            gate, up = np.split(gate_up[e] @ rows[t], 2)
            with np.errstate(over="ignore"):
                activated = round_to(gate / (1 + np.exp(-gate)) * up, x.dtype)
            out[t] += weights[t, k].astype(np.float64) * round_to(activated @ down[e], x.dtype)
    return {"out": out}


def blocks(T, K, F, block):
    """As many as there are pairs, or as `moe_align` makes of them."""
    return T * K if block == 1 else most_blocks(T, K, F, block)


def known(ids):
    """Whether an id is an expert's."""
    return (ids >= 0) & (ids < size("E"))


@fusion(
    reference,
    x=In("T D"), ids=In("T K", dtype=("int32", "int64")), weights=In("T K"), gate_up=In("E 2*I D"), down=In("E I H"),
    dynamic="T B C G", axes={**tables_axes(lambda E: E), "B": blocks},
)  # fmt: skip
def experts(x, ids, weights, gate_up, down, block: int = 1):
    """out[t] = Σ over k of weights[t, k]·expert ids[t, k] of x[t]: down·(silu(gate·x)·(up·x)).

    x [T, D], ids and weights [T, K], gate_up [E, 2I, D] = [gate | up], down [E, I, H] -> out [T, H] in x's dtype. Products are
    accumulated in float32; what is activated, and what a pair gives, is rounded to that dtype, the weighted sum is float32.
    An id of no expert adds nothing. `block`: how many of an expert's pairs a program takes together: 1, which needs no sorting,
    for few tokens, 16, 64 or 128 for more. The bits are the same.
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
    deep, wide = where(some, extent("D"), 0), where(some, extent("I"), 0)  # a block of no expert has nothing to add up
    gate, up = (contract(rows, gather(part, chosen, over="E"), over="D", upto=deep) for part in halves(gate_up, "I"))
    activated = cast(silu(gate) * up, x.dtype)
    each = cast(contract(activated, gather(down, chosen, over="E"), over="I", upto=wide), x.dtype)
    placed = place(each, T=token, K=slot)
    return {"out": cast(sum(where(known(ids), f32(placed) * f32(weights), 0.0), over="K"), x.dtype)}
