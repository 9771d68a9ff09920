"""A product of one row with the residual sum and its norm before it."""

import numpy as np

from moekit.fusions.add_rms_norm import add_rms_norm
from moekit.fusions.add_rms_norm import reference as before
from moekit.lang import In, cast, f32, fusion, round_to, sum


def reference(x, residual, norm, weight, *, eps, offset, wide):
    """float64; the normed row is rounded before it is multiplied."""
    made = before(x, residual, norm, eps=eps, offset=offset)
    return {"total": made["residual"], "out": round_to(made["out"], x.dtype) @ weight.astype(np.float64).T}


@fusion(reference, x=In("T H"), residual=In("T H"), norm=In("H"), weight=In("P H"))
def add_norm_product(x, residual, norm, weight, eps: float = 1e-6, offset: float = 1.0, wide: bool = False):
    """total = x + residual, and out = rms_norm(total)·(offset + norm)·weightᵀ: `add_rms_norm` and a product in one launch.

    x, residual [T, H], norm [H], weight [P, H] -> total [T, H] in residual's dtype, out [T, P] in x's dtype, or in float32 if
    `wide`. The sum and the normed row are rounded as `add_rms_norm` rounds them. Every program makes the norm anew, by lanes
    and not by the matrix unit, and every row reads the weight anew: for one row.
    """
    row, total = add_rms_norm.fn(x, residual, norm, eps, offset).values()
    out = sum(f32(row) * f32(weight), over="H")
    return {"total": total, "out": out if wide else cast(out, x.dtype)}
