"""Declarations of the tests' own that several folders use, beside moekit's.

`gate_block` is what asks most of the compiler: sections of five outputs, one of them updated in place, and a split whose parts
are products and sums. As a fusion it was slower than `add_rms_norm` and `gate_projections`, so moekit ships these.
"""

import numpy as np

from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.fusions.qkv_norm_rope import rotation
from moekit.lang import (
    In,
    InOut,
    Out,
    cast,
    contract,
    f32,
    fusion,
    halves,
    mean,
    round_to,
    rsqrt,
    sigmoid,
    silu,
    size,
)


def _gate_block(x, residual, weight, gate_up, router, shared_gate, *, eps, offset):
    """Rounded where the declaration rounds: the sum, and the GEMM's operand."""
    total = round_to(x.astype(np.float64) + residual.astype(np.float64), residual.dtype)
    weighted = total * (offset + weight.astype(np.float64))
    scale = 1 / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + eps)
    with np.errstate(over="ignore", invalid="ignore"):
        operand = round_to(weighted, x.dtype)
        gate_up, logits, share = (scale * (operand @ w.astype(np.float64).T) for w in (gate_up, router, shared_gate))
        gate, up = np.split(gate_up, 2, axis=-1)
        activated, share = gate / (1 + np.exp(-gate)) * up, 1 / (1 + np.exp(-share))
    return {"hidden": weighted * scale, "residual": total, "activated": activated, "logits": logits, "share": share}


@fusion(
    _gate_block,
    x=In("T D"), residual=InOut("T D"), weight=In("D"), gate_up=In("2*I D"), router=In("E D"), shared_gate=In("G D"),
)  # fmt: skip
def gate_block(x, residual, weight, gate_up, router, shared_gate, eps: float = 1e-6, offset: float = 1.0):
    """All that stands between the residual stream and the router's top-k and the experts' GEMMs, in two launches.

    residual becomes x + residual; hidden = rms_norm(residual)·(offset + weight); activated = silu(hidden·gateᵀ)·(hidden·upᵀ);
    logits = hidden·routerᵀ; share = sigmoid(hidden·shared_gateᵀ). x, residual [T, D], weight [D], gate_up [2I, D],
    router [E, D], shared_gate [G, D] -> hidden [T, D], residual, activated [T, I] and logits [T, E] in x's dtype,
    share [T, G] float32.

    The products are of residual·(offset + weight), rounded to x's dtype, and each row is scaled by the norm afterwards: the
    sum of squares and the products are then made in one pass. float16 holds no more than 65504 of that.
    """
    total = cast(f32(x) + f32(residual), residual.dtype)
    t = f32(total)
    weighted = t * (f32(weight) + offset)
    operand = cast(weighted, x.dtype)
    scale = rsqrt(mean(t * t, over="D") + eps)
    gate, up = (contract(operand, part, over="D") * scale for part in halves(gate_up, "I"))
    return {
        "hidden": cast(weighted * scale, x.dtype),
        "residual": total,
        "activated": cast(silu(gate) * up, x.dtype),
        "logits": cast(contract(operand, router, over="D") * scale, x.dtype),
        "share": sigmoid(contract(operand, shared_gate, over="D") * scale),
    }


def _qk_norm_rope(q, k, q_weight, k_weight, positions, frequencies, *, eps, offset):
    """Pair by pair. An angle is one float32 product, as in every implementation: far out its rounding is more than a sine's."""
    angles = round_to(positions.astype(np.float64)[:, None] * frequencies.astype(np.float64), frequencies.dtype)[:, None]
    pairs = np.exp(1j * angles)

    def turned(x, weight):
        x, half = x.astype(np.float64), len(frequencies)
        normal = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (offset + weight.astype(np.float64))
        complex_ = (normal[..., :half] + 1j * normal[..., half : 2 * half]) * pairs
        return np.concatenate([complex_.real, complex_.imag, normal[..., 2 * half :]], axis=-1)

    return {"q_out": turned(q, q_weight), "k_out": turned(k, k_weight)}


@fusion(
    _qk_norm_rope,
    q=In("T Q D"), k=In("T K D"), q_weight=In("D"), k_weight=In("D"),
    positions=In("T", dtype=("int32", "int64")), frequencies=In("R", dtype="float32"), k_out=Out("T K D"),
)  # fmt: skip
def qk_norm_rope(q, k, q_weight, k_weight, positions, frequencies, eps: float = 1e-6, offset: float = 1.0):
    """RMSNorm of every head, then rotary embedding of its first 2R elements, halves paired; the rest passes through.

    q [T, Q, D], k [T, K, D], weights [D], positions [T], frequencies [R] (θ^(-i/R)) -> q_out, k_out like q and k.
    In float32 with one rounding, as moekit's Qwen3-Next has it; Hugging Face's rounds the norm, sine and cosine, too.
    """
    half, dim = size("R"), size("D")
    if 2 * half > dim:
        raise ShapeError(f"qk_norm_rope: frequencies has {half} elements, heads have {dim}; pass half as many at most")
    turned = rotation(positions, frequencies, eps, offset, "D")
    return {"q_out": cast(turned(q, q_weight), q.dtype), "k_out": cast(turned(k, k_weight), k.dtype)}


DECLARATIONS = {
    **FUSIONS,
    "gate_block": gate_block,
    "qk_norm_rope": qk_norm_rope,
}
