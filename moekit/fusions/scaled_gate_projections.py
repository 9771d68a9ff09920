"""`gate_projections` whose shared expert is in FP8, with a scale for each of its blocks."""

import numpy as np

from moekit.fusions.scaled import BLOCK, STORED, counted, gated, of_rows, products
from moekit.lang import In, cast, fusion, halves, sigmoid, silu


def reference(x, gate_up, scale, router, shared_gate, columns, inner):
    """float64, row by row of x; the shared expert's block by block."""
    rows, gate_up, scale, router, shared_gate = (a.astype(np.float64) for a in (x, gate_up, scale, router, shared_gate))
    activated = np.zeros((len(rows), gate_up.shape[0] // 2))
    for t, row in enumerate(rows):
        activated[t] = gated(row, gate_up, scale, inner, columns)
    with np.errstate(over="ignore"):
        share = 1 / (1 + np.exp(-(rows @ shared_gate.T)))
    return {"activated": activated, "logits": rows @ router.T, "share": share}


@fusion(
    reference,
    x=In("T D"), gate_up=In("2*I D", dtype=STORED), scale=In("2*Ib Db", dtype="float32"), router=In("E D"),
    shared_gate=In("G D"), axes={"Ib": counted("I", "inner"), "Db": counted("D", "columns")},
)  # fmt: skip
def scaled_gate_projections(x, gate_up, scale, router, shared_gate, columns: int = BLOCK, inner: int = BLOCK):
    """`gate_projections` whose gate_up is times its scales, in one launch: router and shared gate are as they were.

    x [T, D], gate_up [2I, D] = [gate | up] in float8_e4m3fn (or a wider float), scale [2⌈I/inner⌉, ⌈D/columns⌉] float32: one
    for every `inner` rows of gate, or of up, and `columns` columns; router [E, D], shared_gate [G, D] -> activated [T, I] and
    logits [T, E] in x's dtype, share [T, G] in float32. Blocks of D are multiplied as they are, scaled in float32 if they have
    a scale, and added up in their order; rounded once.
    """
    gate, up = (
        products(x, part, of_rows(scale, "I", "2*Ib", inner, half), "D", "Db Di", columns)
        for half, part in enumerate(halves(gate_up, "I"))
    )
    logits, share = (products(x, weight, None, "D", "Db Di", columns) for weight in (router, shared_gate))
    return {"activated": cast(silu(gate) * up, x.dtype), "logits": cast(logits, x.dtype), "share": sigmoid(share)}
