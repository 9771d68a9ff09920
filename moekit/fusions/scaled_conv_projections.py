"""`conv_projections` of weights in FP8, with a scale for each of their blocks, and of a few rows that are as they were."""

import numpy as np

from moekit.fusions.causal_conv1d_step import causal_conv1d_step
from moekit.fusions.causal_conv1d_step import reference as convolved
from moekit.fusions.scaled import BLOCK, STORED, counted, of_rows, products, sums
from moekit.fusions.scaled_product import reference as blocked
from moekit.lang import In, InOut, cast, fusion, round_to


def reference(x, mixing, mixing_scale, others, others_scale, gates, state, weight, rows, columns, lanes):
    """float64, block by block where there are scales; a projection is rounded before the convolution."""
    mixed = blocked(x, mixing, mixing_scale, rows, columns)["out"]
    rest = blocked(x, others, others_scale, rows, columns)["out"]
    plain = x.astype(np.float64) @ gates.astype(np.float64).T
    return {"rest": rest, "gated": plain, **convolved(round_to(mixed, x.dtype), state, weight)}


@fusion(
    reference,
    x=In("T D"), mixing=In("C D", dtype=STORED), mixing_scale=In("Cb Db", dtype="float32"),
    others=In("P D", dtype=STORED), others_scale=In("Pb Db", dtype="float32"), gates=In("Q D"),
    state=InOut("T C S"), weight=In("C S+1"),
    axes={"Cb": counted("C", "rows"), "Pb": counted("P", "rows"), "Db": counted("D", "columns")},
)  # fmt: skip
def scaled_conv_projections(
    x, mixing, mixing_scale, others, others_scale, gates, state, weight, rows: int = BLOCK, columns: int = BLOCK,
    lanes: bool = False,
):  # fmt: skip
    """rest = x·othersᵀ, gated = x·gatesᵀ, and `causal_conv1d_step` of x·mixingᵀ; mixing and others times their scales.

    x [T, D], mixing [C, D] and others [P, D] in float8_e4m3fn (or a wider float), their scales float32, one for every `rows`
    rows and `columns` columns, gates [Q, D] in a dtype of its own, state [T, C, S], weight [C, S+1] -> rest [T, P], gated
    [T, Q], out [T, C] in x's dtype; state in place. Blocks of D are multiplied as they are, scaled in float32, if they have a
    scale, added up in their order and rounded to x's dtype, then again where they are convolved. `lanes`: by lanes and
    not by the matrix unit, for one row, as `conv_projections`.
    """

    def made(matrix, scale):
        return cast((sums if lanes else products)(x, matrix, scale, "D", "Db I", columns), x.dtype)

    mixed = made(mixing, of_rows(mixing_scale, "C", "Cb", rows))
    rest = made(others, of_rows(others_scale, "P", "Pb", rows))
    return {"rest": rest, "gated": made(gates, None), **causal_conv1d_step.fn(mixed, state, weight)}
