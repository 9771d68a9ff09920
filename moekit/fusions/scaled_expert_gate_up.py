"""`expert_gate_up` of weights in FP8, with a scale for each of their blocks."""

import numpy as np

from moekit.fusions.scaled import BLOCK, STORED, counted, gated, of_rows, one, products
from moekit.lang import In, cast, fusion, gather, halves, silu


def reference(x, gate_up, scale, ids, columns, inner):
    """float64, pair by pair and block by block; an expert that does not exist has weights and scales of zero."""
    gate_up, scale, ids = gate_up.astype(np.float64), scale.astype(np.float64), ids.astype(np.int64)
    out = np.empty((*ids.shape, gate_up.shape[1] // 2))
    for t, k in np.ndindex(*ids.shape):
        weight, scales = (one(stack, ids[t, k]) for stack in (gate_up, scale))
        out[t, k] = gated(x[t].astype(np.float64), weight, scales, inner, columns)
    return {"activated": out}


@fusion(
    reference,
    x=In("T D"), gate_up=In("E 2*I D", dtype=STORED), scale=In("E 2*Ib Db", dtype="float32"),
    ids=In("T K", dtype=("int32", "int64")), axes={"Ib": counted("I", "inner"), "Db": counted("D", "columns")},
)  # fmt: skip
def scaled_expert_gate_up(x, gate_up, scale, ids, columns: int = BLOCK, inner: int = BLOCK):
    """activated[t, k] = silu(x[t]·gateᵀ)·(x[t]·upᵀ) with the weights, times their scales, of expert ids[t, k].

    x [T, D], gate_up [E, 2I, D] = [gate | up] in float8_e4m3fn (or a wider float), scale [E, 2⌈I/inner⌉, ⌈D/columns⌉] float32:
    one for every `inner` rows of gate, or of up, and `columns` columns; ids [T, K] -> activated [T, K, I] in x's dtype. Blocks
    of D are multiplied as they are, scaled in float32 and added up in their order; rounded once. For few tokens; an id of no
    expert stands for weights of zero.
    """

    def product(half, part):
        scales = of_rows(scale, "I", "2*Ib", inner, half)
        return products(x, *(gather(a, ids, over="E") for a in (part, scales)), "D", "Db Di", columns)

    gate, up = (product(*each) for each in enumerate(halves(gate_up, "I")))
    return {"activated": cast(silu(gate) * up, x.dtype)}
