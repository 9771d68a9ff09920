"""`scaled_product` of one row, or of a few."""

from moekit.fusions.scaled import BLOCK, STORED, counted, of_rows, sums
from moekit.fusions.scaled_product import reference
from moekit.lang import In, cast, fusion


@fusion(
    reference,
    x=In("T D"), weight=In("P D", dtype=STORED), scale=In("Pb Db", dtype="float32"),
    axes={"Pb": counted("P", "rows"), "Db": counted("D", "columns")},
)  # fmt: skip
def scaled_row_product(x, weight, scale, rows: int = BLOCK, columns: int = BLOCK):
    """x·(weight·scale)ᵀ as `scaled_product`, by lanes and not by the matrix unit, which would be filled up for one row.

    x [T, D], weight [P, D] in float8_e4m3fn (or a wider float), scale [⌈P/rows⌉, ⌈D/columns⌉] float32 -> out [T, P] in x's
    dtype, rounded once. Blocks of D are multiplied as they are and scaled in float32, then added up in their order. Every row
    reads the weight anew.
    """
    return cast(sums(x, weight, of_rows(scale, "P", "Pb", rows), "D", "Db I", columns), x.dtype)
