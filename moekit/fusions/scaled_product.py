"""A linear layer whose weight has a scale for each of its blocks, as FP8 checkpoints have them."""

import numpy as np

from moekit.fusions.scaled import BLOCK, STORED, block_by_block, counted, of_rows, products, sums
from moekit.lang import In, cast, fusion


def reference(x, weight, scale, rows, columns, lanes=False):
    """float64, row by row of x and block by block."""
    wide, kept, scales = (a.astype(np.float64) for a in (x, weight, scale))
    out = [block_by_block(row, kept, scales, rows, columns) for row in wide]
    return {"out": np.stack(out) if out else np.zeros((0, weight.shape[0]))}


@fusion(
    reference,
    x=In("T D"), weight=In("P D", dtype=STORED), scale=In("Pb Db", dtype="float32"),
    axes={"Pb": counted("P", "rows"), "Db": counted("D", "columns")},
)  # fmt: skip
def scaled_product(x, weight, scale, rows: int = BLOCK, columns: int = BLOCK, lanes: bool = False):
    """x·(weight·scale)ᵀ, with a scale for every rows × columns elements of the weight, as FP8 checkpoints have it.

    x [T, D], weight [P, D] in float8_e4m3fn (or a wider float), scale [⌈P/rows⌉, ⌈D/columns⌉] float32 -> out [T, P] in x's
    dtype, rounded once. Blocks of D are multiplied as they are and scaled in float32, then added up in their order. `lanes`: by
    lanes and not by the matrix unit, which one row would not fill; every row then reads the weight anew.
    """
    multiplied = sums if lanes else products
    return cast(multiplied(x, weight, of_rows(scale, "P", "Pb", rows), "D", "Db I", columns), x.dtype)
