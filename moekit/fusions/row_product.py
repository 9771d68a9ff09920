"""A product of one row with a matrix, by lanes."""

import numpy as np

from moekit.lang import In, cast, f32, fusion, sum


def reference(x, weight, *, wide):
    """float64."""
    return {"out": x.astype(np.float64) @ weight.astype(np.float64).T}


@fusion(reference, x=In("T D"), weight=In("P D"))
def row_product(x, weight, wide: bool = False):
    """out = x·weightᵀ, by lanes and not by the matrix unit, which would be filled up for one row.

    x [T, D], weight [P, D] -> out [T, P] in x's dtype, or in float32 if `wide`. Products are accumulated in float32 and rounded
    once, if at all. Every row reads the weight anew.
    """
    out = sum(f32(x) * f32(weight), over="D")
    return {"out": out if wide else cast(out, x.dtype)}
