"""All-reduce over the ranks of a tensor-parallel layer, residual add and RMSNorm: what stands between two blocks."""

import numpy as np

from moekit.lang import In, InOut, all_reduce, cast, f32, fusion, mean, round_to, rsqrt


def reference(partial, residual, weight, *, eps, offset, tp):
    """Of one rank's operands, but that `partial` has every rank's, first axis tp (none where tp is 1); float64."""
    parts = partial.astype(np.float64).reshape(tp, *residual.shape)
    total = round_to(parts.sum(0) + residual.astype(np.float64), residual.dtype)
    scale = 1 / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + eps)
    return {"out": total * scale * (offset + weight.astype(np.float64)), "residual": total}


@fusion(reference, mesh="tp", partial=In("T H"), residual=InOut("T H"), weight=In("H"))
def all_reduce_add_rms_norm(partial, residual, weight, eps: float = 1e-6, offset: float = 1.0, tp: int = 1):
    """out = rms_norm(Σ partial + residual) * (offset + weight); residual becomes Σ partial + residual, the sum over tp ranks.

    partial [T, H]: this rank's part of a sum over mesh axis tp, of tp ranks (1: the sum itself, as add_rms_norm takes it);
    residual [T, H] and weight [H] are the same on every rank; out has partial's dtype. The parts are added up in float32 in the
    order of ranks, the residual to that, and the sum is rounded once, to the residual's dtype, which is what is normalised: all
    ranks have the same bits.
    """
    total = cast(all_reduce(partial, over="tp") + f32(residual), residual.dtype)
    t = f32(total)
    scale = rsqrt(mean(t * t, over="H") + eps)
    out = t * scale * (f32(weight) + offset)
    return {"out": cast(out, partial.dtype), "residual": total}
