"""What peers' kernels are held to: declarations with the roundings that each documents, and what a router's ids may be.

A bound follows from a declaration, so a peer that rounds elsewhere needs one of its own: with a reference alone, it would be
judged by the errors that moekit's roundings may bring, and not by those of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moekit.fusions import delta_rule_step as delta
from moekit.lang import (
    In,
    InOut,
    cast,
    contract,
    exp,
    f32,
    fusion,
    gather,
    halves,
    iota,
    log,
    mean,
    minimum,
    round_to,
    rsqrt,
    sigmoid,
    silu,
    size,
    sum,
    where,
)
from moekit.testing.evaluation import TINY, UNIT
from moekit.testing.oracle import Standard


def _add_rms_norm(x, residual, weight, *, eps, offset):
    total = x.astype(np.float64) + residual.astype(np.float64)
    scale = 1 / np.sqrt(np.mean(total * total, axis=-1, keepdims=True) + eps)
    return {"out": total * scale * (offset + weight.astype(np.float64)), "residual": round_to(total, residual.dtype)}


@fusion(_add_rms_norm, x=In("T H"), residual=InOut("T H"), weight=In("H"))
def unrounded_add_rms_norm(x, residual, weight, eps: float = 1e-6, offset: float = 1.0):
    """Add-RMSNorm as FlashInfer, SGLang and QuACK have it: the variance and the output are of the unrounded sum."""
    total = f32(x) + f32(residual)
    out = total * rsqrt(mean(total * total, over="H") + eps) * (f32(weight) + offset)
    return {"out": cast(out, x.dtype), "residual": cast(total, residual.dtype)}


def _silu_and_mul(gate_up):
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    return {"out": round_to(gate / (1 + np.exp(-gate)), gate_up.dtype) * up}


@fusion(_silu_and_mul, gate_up=In("T 2*I"))
def rounded_silu_and_mul(gate_up):
    """silu·mul as Liger has it: silu is rounded before the product."""
    gate, up = halves(gate_up, "I")
    return cast(f32(cast(silu(gate), gate_up.dtype)) * f32(up), gate_up.dtype)


def _gated_rms_norm(x, z, weight, *, eps):
    x, z = x.astype(np.float64), z.astype(np.float64)
    gate = z / (1 + np.exp(-z))
    return {"out": x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(np.float64) * gate}


@fusion(_gated_rms_norm, x=In("T V D"), z=In("T V D"), weight=In("D"))
def unrounded_gated_rms_norm(x, z, weight, eps: float = 1e-6):
    """The gated norm as fla has it: nothing is rounded before the end."""
    x32 = f32(x)
    return cast(x32 * rsqrt(mean(x32 * x32, over="D") + eps) * f32(weight) * silu(z), x.dtype)


@fusion(
    delta.reference,
    q=In("T K Dk"), k=In("T K Dk"), v=In("T V Dv"), a=In("T V"), b=In("T V"),
    A_log=In("V"), dt_bias=In("V"), state=InOut("T V Dk Dv", dtype="float32"),
)  # fmt: skip
def fla_delta_rule_step(q, k, v, a, b, A_log, dt_bias, state, eps: float = 1e-6):
    """The delta rule's step with fla's softplus: log(1 + exp(x)) below 20, where 1 + exp(x) is rounded, and x from there on."""
    head = iota("V") // (size("V") // size("K"))
    q32, k32 = f32(gather(q, head, over="K")), f32(gather(k, head, over="K"))
    q32 = q32 * (rsqrt(sum(q32 * q32, over="Dk") + eps) * size("Dk") ** -0.5)
    k32 = k32 * rsqrt(sum(k32 * k32, over="Dk") + eps)
    x = f32(a) + f32(dt_bias)
    softplus = where(x < 20.0, log(exp(minimum(x, 20.0)) + 1.0), x)
    decayed = state * exp(-exp(A_log) * softplus)
    correction = (f32(v) - contract(k32, decayed, over="Dk")) * sigmoid(b)
    new = decayed + k32 * correction
    return {"out": cast(contract(q32, new, over="Dk"), v.dtype), "state": new}


def wrong_ids(values: Mapping[str, np.ndarray], want: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Where a router's ids are wrong if nothing is promised of ties: bools [T, k].

    Ids are in range and unique in their row, and stand for the same softmax as the reference's ids: the same but for what
    float32 may err by, so that a router may compare logits or their softmax, and may take any of those that are equal.
    """
    logits = values["logits"].astype(np.float64)
    experts = logits.shape[-1]
    valid = (got >= 0) & (got < experts) & (np.diff(np.sort(got, axis=-1)) != 0).all(-1, keepdims=True)
    below = logits - logits.max(-1, keepdims=True)
    share = np.exp(below) / np.exp(below).sum(-1, keepdims=True)
    noise = (9 + 2 * np.abs(below)) * UNIT * share  # of the difference, its exponential and the division
    there, here = (np.clip(ids, 0, experts - 1) for ids in (want, got))
    take = np.take_along_axis
    apart = np.abs(take(share, there, -1) - take(share, here, -1))
    reach = Standard.constant * (take(noise, there, -1) + take(noise, here, -1)) + TINY
    return (got != want) & ~(valid & (apart <= reach))


DECLARED = Standard()
UNROUNDED_NORM = Standard(unrounded_add_rms_norm)
ROUNDED_SILU = Standard(rounded_silu_and_mul)
UNROUNDED_GATED_NORM = Standard(unrounded_gated_rms_norm)
FLA_DELTA = Standard(fla_delta_rule_step)
ANY_TIES = Standard(wrong={"ids": wrong_ids})
