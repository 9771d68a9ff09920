"""`down_combine` of a weight in FP8, with a scale for each of its blocks."""

import numpy as np

from moekit.fusions.scaled import BLOCK, STORED, block_by_block, counted, of_rows, products
from moekit.lang import In, InOut, cast, f32, fusion


def reference(hidden, activated, down, scale, share, columns, inner):
    """float64, row by row and block by block; rounded once by the caller."""
    rows, down, scale = (a.astype(np.float64) for a in (activated, down, scale))
    out = hidden.astype(np.float64)
    for t, row in enumerate(rows):
        with np.errstate(invalid="ignore"):
            out[t] += share[t].astype(np.float64) * block_by_block(row, down, scale, columns, inner)
    return {"hidden": out}


@fusion(
    reference,
    hidden=InOut("T H"), activated=In("T I"), down=In("H I", dtype=STORED), scale=In("Hb Ib", dtype="float32"),
    share=In("T H?"), axes={"Hb": counted("H", "columns"), "Ib": counted("I", "inner")},
)  # fmt: skip
def scaled_down_combine(hidden, activated, down, scale, share, columns: int = BLOCK, inner: int = BLOCK):
    """hidden becomes hidden + share·(activated·downᵀ), down times its scales.

    hidden [T, H], activated [T, I], down [H, I] in float8_e4m3fn (or a wider float), scale [⌈H/columns⌉, ⌈I/inner⌉] float32,
    share [T, 1] or [T, H]. Blocks of I are multiplied as they are, scaled in float32 and added up in their order; rounded once,
    to hidden's dtype.
    """
    made = products(activated, down, of_rows(scale, "H", "Hb", columns), "I", "Ib Ii", inner)
    return {"hidden": cast(f32(hidden) + f32(share) * made, hidden.dtype)}
