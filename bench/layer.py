"""The MoE block of one rank without its routed experts, in PyTorch: weights, float64, and a layer per way of computing it.

norm → gates → activation → router (the `gate` part), then the shared expert's down-projection and the combine (the
`moe` part). The normalised rows stand in for what the routed experts add up to. A layer takes weights, x and residual and
returns x, residual and what the experts would be called with; those of peers and moekit write over residual, and most
over x.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import linear

from bench import eager
from bench.cases import weight
from bench.sides import EPS, empty
from moekit import torch as mt
from moekit.testing import others

Layer = Callable[..., tuple]


@dataclass(frozen=True)
class Sizes:
    """One rank of `tp`: hidden, experts and how many are chosen, and the rank's share of the shared expert."""

    tp: int
    hidden: int = 2048
    experts: int = 512
    k: int = 10
    intermediate: int = 512

    @property
    def widths(self) -> tuple[int, int, int]:
        """Rows of gate_up, router and shared gate."""
        return 2 * self.intermediate // self.tp, self.experts, 1


def weights(sizes: Sizes, dtype: torch.dtype) -> dict:
    """One layer's weights: the three gates apart, packed for moekit and for cuBLAS, the norm and the down-projection."""
    gates = [weight(n, sizes.hidden, dtype) for n in sizes.widths]
    packed = mt.pack_gate(*gates)
    norm = weight(sizes.hidden, 1, dtype)[:, 0].contiguous()
    return {"norm": norm, "gates": gates, "packed": packed, "down": weight(sizes.hidden, sizes.widths[0] // 2, dtype)}


def reference(w: dict[str, np.ndarray], x: np.ndarray, residual: np.ndarray, k: int, round_to: Callable) -> list[np.ndarray]:
    """float64, with the sum and the normalised rows rounded: x after the combine, residual, activation, weights, ids."""
    total = round_to(x.astype(np.float64) + residual.astype(np.float64))
    rows = round_to(total / np.sqrt((total * total).mean(-1, keepdims=True) + EPS) * (1 + w["norm"].astype(np.float64)))
    gate_up, logits, gate = (rows @ w[n].astype(np.float64).T for n in ("gate_up", "router", "shared_gate"))
    first, second = np.split(gate_up, 2, -1)
    active = first / (1 + np.exp(-first)) * second
    ids = np.argsort(-logits, -1, kind="stable")[:, :k]
    chosen = np.exp(np.take_along_axis(logits, ids, -1) - logits.max(-1, keepdims=True))
    out = rows + active @ w["down"].astype(np.float64).T / (1 + np.exp(-gate))
    return [out, total, active, chosen / chosen.sum(-1, keepdims=True), ids]


def plain(w: dict, x, residual, k: int, part: str) -> tuple:
    """PyTorch as Hugging Face writes it: three products."""
    x, residual = eager.add_rms_norm(x, residual, w["norm"])
    gate_up, logits, gate = (linear(x, g) for g in w["gates"])
    active, (chosen, ids) = eager.silu_and_mul(gate_up), eager.topk_softmax(logits, k)
    if part == "moe":
        x = eager.shared_expert_combine(x, linear(active, w["down"]), gate)
    return x, residual, active, chosen, ids


def moekit(w: dict, x, residual, k: int, part: str) -> tuple:
    """moekit's fusions, one after the other."""
    mt.add_rms_norm_(x, residual, w["norm"], out=x)
    got = mt.gate_gemm(x, w["packed"])
    active, (chosen, ids) = mt.silu_and_mul(got.gate_up), mt.topk_softmax(got.router_logits, k)
    if part == "moe":
        mt.shared_expert_combine_(x, linear(active, w["down"]), got.shared_gate)
    return x, residual, active, chosen, ids


def moekit_epilogue(w: dict, x, residual, k: int, part: str) -> tuple:
    """moekit with products that carry their epilogues."""
    mt.add_rms_norm_(x, residual, w["norm"], out=x)
    active, logits, share = mt.gate_projections(x, *w["packed"].parts)
    chosen, ids = mt.topk_softmax(logits, k)
    if part == "moe":
        mt.down_combine_(x, active, w["down"], share)
    return x, residual, active, chosen, ids


def peers(one: bool) -> Layer:
    """sgl-kernel's norm and router, cuBLAS, FlashInfer's activation; `one`: a padded product and copies of its columns."""

    def layer(w: dict, x, residual, k: int, part: str) -> tuple:
        tokens, wide = x.shape[0], w["gates"][0].shape[0]
        others.sgl_add_rms_norm(x, residual, w["norm"], EPS, 1.0)
        if one:
            fused, experts = linear(x, w["packed"].weight), w["gates"][1].shape[0]
            gate_up, logits = fused[:, :wide].contiguous(), fused[:, wide : wide + experts].contiguous()
            gate = fused[:, wide + experts : wide + experts + 1]
        else:
            gate_up, logits, gate = (linear(x, g) for g in w["gates"])
        active, chosen = empty(x, tokens, wide // 2), empty(x, tokens, k, dtype=torch.float32)
        ids = empty(x, tokens, k, dtype=torch.int32)
        others.flashinfer_silu_and_mul(gate_up, active)
        others.sgl_topk_softmax(logits, chosen, ids, True)
        if part == "moe":
            x = combine(x, linear(active, w["down"]), gate)
        return x, residual, active, chosen, ids

    return layer


combine = eager.compiled(eager.shared_expert_combine)  # no peer has this kernel


def layers() -> dict[str, Layer]:
    """Every way of computing a layer, moekit's first."""
    return {
        "moekit": moekit,
        "moekit, epilogue": moekit_epilogue,
        "peers, three gemms": peers(False),
        "peers, one padded gemm": peers(True),
        "torch.compile": eager.compiled(plain),
        "eager": plain,
    }
