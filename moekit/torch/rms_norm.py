"""RMSNorm without a residual: what patched models need beside `add_rms_norm`, declared like every fusion."""

import numpy as np

from moekit.lang import In, cast, f32, fusion, mean, rsqrt
from moekit.torch.face import op
from moekit.torch.ops import register


def reference(x, weight, *, eps, offset):
    """float64, rounded once by the caller."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    return {"out": x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (offset + weight)}


@fusion(reference, x=In("T H"), weight=In("H"))
def rms_norm(x, weight, eps: float = 1e-6, offset: float = 1.0):
    """out = rms_norm(x) * (offset + weight).

    x [T, H], weight [H] -> out [T, H] in x's dtype; float32 inside, rounded once. Zhang and Sennrich 2019.
    """
    x32 = f32(x)
    out = x32 * rsqrt(mean(x32 * x32, over="H") + eps) * (f32(weight) + offset)
    return cast(out, x.dtype)


register(rms_norm)
norm = op(rms_norm)
