"""One step of the gated delta rule: the recurrent state of a linear-attention head is decayed, corrected and read."""

import numpy as np

from moekit.errors import ShapeError
from moekit.lang import (
    In,
    InOut,
    cast,
    contract,
    exp,
    f32,
    fusion,
    gather,
    iota,
    rsqrt,
    sigmoid,
    size,
    softplus,
    sum,
)


def reference(q, k, v, a, b, A_log, dt_bias, state, *, eps):
    """float64, head by head in the textbook order (decay, correct, read)."""
    q, k, v, a, b, A_log, dt_bias = (t.astype(np.float64) for t in (q, k, v, a, b, A_log, dt_bias))
    heads = np.arange(v.shape[1]) // max(1, v.shape[1] // max(1, q.shape[1]))
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + eps) / np.sqrt(q.shape[-1])
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + eps)
    q, k = q[:, heads], k[:, heads]
    decay = np.exp(-np.exp(A_log) * np.logaddexp(0, a + dt_bias))
    beta = 1 / (1 + np.exp(-b))
    s = state.astype(np.float64) * decay[..., None, None]
    delta = (v - np.einsum("tvk,tvkd->tvd", k, s)) * beta[..., None]
    s = s + k[..., None] * delta[..., None, :]
    return {"out": np.einsum("tvk,tvkd->tvd", q, s), "state": s}


@fusion(
    reference,
    q=In("T K Dk"), k=In("T K Dk"), v=In("T V Dv"), a=In("T V"), b=In("T V"),
    A_log=In("V"), dt_bias=In("V"), state=InOut("T V Dk Dv", dtype="float32"),
)  # fmt: skip
def delta_rule_step(q, k, v, a, b, A_log, dt_bias, state, eps: float = 1e-6):
    """S becomes S·e^g + k⊗δ with δ = β·(v - kᵀ(S·e^g)), and out = qᵀS; g = -exp(A_log)·softplus(a + dt_bias), β = sigmoid(b).

    q, k [T, K, Dk] are l2-normalised here and q is scaled by Dk^-½; v [T, V, Dv], a, b [T, V], A_log, dt_bias [V], state
    float32 [T, V, Dk, Dv]; value head h uses key head h·K//V. out [T, V, Dv] in v's dtype; all in float32.
    Gated delta networks: Yang, Kautz and Hatamizadeh 2024.
    """
    if size("V") % size("K"):
        raise ShapeError(f"delta_rule_step: v has {size('V')} heads and k has {size('K')}; V must be a multiple of K")
    head = iota("V") // (size("V") // size("K"))
    q32, k32 = f32(gather(q, head, over="K")), f32(gather(k, head, over="K"))
    q32 = q32 * (rsqrt(sum(q32 * q32, over="Dk") + eps) * size("Dk") ** -0.5)
    k32 = k32 * rsqrt(sum(k32 * k32, over="Dk") + eps)
    decay = exp(-exp(A_log) * softplus(f32(a) + f32(dt_bias)))
    decayed = state * decay
    delta = (f32(v) - contract(k32, decayed, over="Dk")) * sigmoid(b)
    new = decayed + k32 * delta
    return {"out": cast(contract(q32, new, over="Dk"), v.dtype), "state": new}
