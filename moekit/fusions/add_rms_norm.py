"""Residual add and RMSNorm, zero-centred (offset 1) or plain (offset 0)."""

import numpy as np

from moekit.lang import In, InOut, cast, f32, fusion, mean, round_to, rsqrt


def reference(x, residual, weight, *, eps, offset):
    """Hugging Face's order: the sum is rounded to the residual's dtype, the norm is of the rounded sum."""
    total = round_to(x.astype(np.float64) + residual.astype(np.float64), residual.dtype)
    scale = 1 / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + eps)
    return {"out": total * scale * (offset + weight.astype(np.float64)), "residual": total}


@fusion(reference, x=In("T H"), residual=InOut("T H"), weight=In("H"))
def add_rms_norm(x, residual, weight, eps: float = 1e-6, offset: float = 1.0):
    """out = rms_norm(x + residual) * (offset + weight); residual becomes x + residual.

    x, residual [T, H], weight [H]; out has x's dtype. The sum is rounded once, to the residual's dtype, and that is
    what is normalised; everything else is float32. RMSNorm: Zhang and Sennrich 2019.
    """
    total = cast(f32(x) + f32(residual), residual.dtype)
    t = f32(total)
    scale = rsqrt(mean(t * t, over="H") + eps)
    out = t * scale * (f32(weight) + offset)
    return {"out": cast(out, x.dtype), "residual": total}
