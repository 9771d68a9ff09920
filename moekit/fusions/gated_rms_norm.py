"""The output norm of a gated delta net: RMSNorm per head, times silu(z)."""

import numpy as np

from moekit.lang import In, cast, f32, fusion, mean, round_to, rsqrt, silu


def reference(x, z, weight, *, eps):
    """Hugging Face's order: the normalised value is rounded to x's dtype before the weight."""
    x64, z64 = x.astype(np.float64), z.astype(np.float64)
    normal = round_to(x64 / np.sqrt(np.mean(x64 * x64, axis=-1, keepdims=True) + eps), x.dtype)
    with np.errstate(over="ignore"):
        return {"out": normal * weight.astype(np.float64) * z64 / (1 + np.exp(-z64))}


@fusion(reference, x=In("T V D"), z=In("T V D"), weight=In("D"))
def gated_rms_norm(x, z, weight, eps: float = 1e-6):
    """out = rms_norm(x)·weight·silu(z) for every head.

    x, z [T, V, D], weight [D] -> out [T, V, D] in x's dtype; float32 inside, with one rounding to x's dtype after the
    normalisation, as Hugging Face's Qwen3NextRMSNormGated has it.
    """
    x32 = f32(x)
    normal = cast(x32 * rsqrt(mean(x32 * x32, over="D") + eps), x.dtype)
    return cast(f32(normal) * f32(weight) * silu(z), x.dtype)
