"""The MoE block of one rank without its routed experts, in PyTorch: float64, and a layer per way of computing it.

norm → gates → activation → router (the `gate` part), then the shared expert's down-projection and the combine (the
`moe` part). A layer takes operands by name and returns x, residual and what the experts would be called with; those of peers
and moekit write over residual, and most over x.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import linear

from bench import eager
from bench.cases import EPS, empty
from moekit import torch as mt
from moekit.lang.dtypes import round_to
from moekit.testing import others

GATES = ("gate_up", "router", "shared_gate")
Layer = Callable[..., tuple]


def packed(o: dict) -> dict:
    """Operands with the packed weight of the gates, which a model makes once."""
    return o | {"packed": mt.pack_gate(*(o[n] for n in GATES))}


def reference(o: dict[str, np.ndarray], k: int, part: str) -> list[np.ndarray]:
    """float64 of what a layer returns, with the sum and the normalised rows rounded to x's dtype."""
    dtype, wide = o["x"].dtype.name, {n: x.astype(np.float64) for n, x in o.items()}
    total = round_to(wide["x"] + wide["residual"], dtype)
    rows = round_to(total / np.sqrt((total * total).mean(-1, keepdims=True) + EPS) * (1 + wide["weight"]), dtype)
    gate_up, logits, gate = (rows @ wide[n].T for n in GATES)
    first, second = np.split(gate_up, 2, -1)
    active = first / (1 + np.exp(-first)) * second
    ids = np.argsort(-logits, -1, kind="stable")[:, :k]
    chosen = np.exp(np.take_along_axis(logits, ids, -1) - logits.max(-1, keepdims=True))
    out = rows + active @ wide["down"].T / (1 + np.exp(-gate)) if part == "moe" else rows
    return [out, total, active, chosen / chosen.sum(-1, keepdims=True), ids]


def plain(o: dict, k: int, part: str) -> tuple:
    """PyTorch as Hugging Face writes it: three products."""
    x, residual = eager.add_rms_norm(o["x"], o["residual"], o["weight"])
    gate_up, logits, gate = (linear(x, o[n]) for n in GATES)
    active, (chosen, ids) = eager.silu_and_mul(gate_up), eager.topk_softmax(logits, k)
    if part == "moe":
        x = eager.shared_expert_combine(x, linear(active, o["down"]), gate)
    return x, residual, active, chosen, ids


def moekit(o: dict, k: int, part: str) -> tuple:
    """moekit's fusions, one after the other."""
    x, residual = mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"])
    got = mt.gate_gemm(x, o["packed"])
    active, (chosen, ids) = mt.silu_and_mul(got.gate_up), mt.topk_softmax(got.router_logits, k)
    if part == "moe":
        mt.shared_expert_combine_(x, linear(active, o["down"]), got.shared_gate)
    return x, residual, active, chosen, ids


def epilogue(o: dict, k: int, part: str) -> tuple:
    """moekit with products that carry their epilogues."""
    x, residual = mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"])
    active, logits, share = mt.gate_projections(x, *o["packed"].parts)
    chosen, ids = mt.topk_softmax(logits, k)
    if part == "moe":
        mt.down_combine_(x, active, o["down"], share)
    return x, residual, active, chosen, ids


def peers(norm: Callable, one: bool) -> Layer:
    """A peer's norm, cuBLAS, FlashInfer's activation, sgl-kernel's router; `one`: a padded product, copies of its columns."""

    def layer(o: dict, k: int, part: str) -> tuple:
        x, residual, widths = o["x"], o["residual"], [len(o[n]) for n in GATES]
        norm(x, residual, o["weight"], EPS, 1.0)
        if one:
            gate_up, logits, gate = linear(x, o["packed"].weight)[:, : sum(widths)].split(widths, -1)
            gate_up, logits = gate_up.contiguous(), logits.contiguous()
        else:
            gate_up, logits, gate = (linear(x, o[n]) for n in GATES)
        active, chosen = empty(x, len(x), widths[0] // 2), empty(x, len(x), k, dtype=torch.float32)
        ids = empty(x, len(x), k, dtype=torch.int32)
        others.flashinfer_silu_and_mul(gate_up, active)
        others.sgl_topk_softmax(logits, chosen, ids, True)
        if part == "moe":
            x = combine(x, linear(active, o["down"]), gate)
        return x, residual, active, chosen, ids

    return layer


combine = eager.compiled(eager.shared_expert_combine)  # no peer has this kernel


def layers() -> dict[str, Layer]:
    """Every way of computing a layer, moekit's first."""
    norms = {"sgl": others.sgl_add_rms_norm, "flashinfer": others.flashinfer_add_rms_norm}
    gemms = {"three gemms": False, "one padded gemm": True}
    theirs = {f"peers: {n} norm, {g}": peers(norm, one) for n, norm in norms.items() for g, one in gemms.items()}
    return {"moekit": moekit, "moekit, epilogue": epilogue} | theirs | {"torch.compile": eager.compiled(plain), "eager": plain}
