"""The fusions that the model calls, bound to one implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from jax import lax

from moekit import jax as face
from moekit.errors import ArgumentError
from moekit.jax.doors import best
from moekit.models.qwen3next.sharding import AXIS

KINDS = ("pallas", "pallas-triton", "triton", "xla")
FUSIONS = (
    "add_rms_norm",
    "row_product",
    "add_norm_gate_projections",
    "gate_projections",
    "topk_softmax",
    "gate_topk",
    "down_combine",
    "expert_gate_up",
    "expert_down_shared",
    "experts",
    "qkv_norm_rope",
    "gated_attention_decode",
    "scaled_expert_gate_up",
    "scaled_expert_down",
    "scaled_experts",
    "quantised",
    "quantised_experts",
    "scaled_product",
    "scaled_conv_projections",
    "scaled_gate_projections",
    "scaled_gate_topk",
    "scaled_add_norm_gate_projections",
    "scaled_down_combine",
    "scaled_expert_down_shared",
    "gated_rms_norm",
    "causal_conv1d_step",
    "conv_projections",
    "delta_rule_step",
    "delta_rule_chunks",
    "unit_lower_inverse",
)


@dataclass(frozen=True)
class Kernels:
    """One callable per fusion. Hashable, so that a compiled step may depend on it.

    fused: whether the gate's three products are one `gate_projections`, the routed experts kernels that read no others than
    those chosen, and the delta nets' states one stack.
    all_reduce: from one rank's part of a sum to the sum over all ranks. all_gather: from a rank's array to a stack of all.
    """

    name: str
    fused: bool
    all_reduce: Callable[..., Any]
    all_gather: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    row_product: Callable[..., Any]
    add_norm_gate_projections: Callable[..., Any]
    gate_projections: Callable[..., Any]
    gate_topk: Callable[..., Any]
    topk_softmax: Callable[..., Any]
    down_combine: Callable[..., Any]
    expert_gate_up: Callable[..., Any]
    expert_down_shared: Callable[..., Any]
    experts: Callable[..., Any]
    qkv_norm_rope: Callable[..., Any]
    gated_attention_decode: Callable[..., Any]
    scaled_expert_gate_up: Callable[..., Any]
    scaled_expert_down: Callable[..., Any]
    scaled_experts: Callable[..., Any]
    quantised: Callable[..., Any]
    quantised_experts: Callable[..., Any]
    scaled_product: Callable[..., Any]
    scaled_conv_projections: Callable[..., Any]
    scaled_gate_projections: Callable[..., Any]
    scaled_gate_topk: Callable[..., Any]
    scaled_add_norm_gate_projections: Callable[..., Any]
    scaled_down_combine: Callable[..., Any]
    scaled_expert_down_shared: Callable[..., Any]
    gated_rms_norm: Callable[..., Any]
    causal_conv1d_step: Callable[..., Any]
    conv_projections: Callable[..., Any]
    delta_rule_step: Callable[..., Any]
    delta_rule_chunks: Callable[..., Any]
    unit_lower_inverse: Callable[..., Any]


@cache
def named(name: str) -> Kernels:
    """`pallas`, `pallas-triton`, `triton`: moekit's kernels, that way. `xla`: array evaluation, three gate products, and
    experts as XLA does them best. Raises ArgumentError for another name."""
    if name not in KINDS:
        raise ArgumentError(f"kernels={name!r} is not known; choose {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}")
    bound = {fusion: partial(getattr(face, fusion), implementation=name) for fusion in FUSIONS}
    collectives = {"all_reduce": partial(lax.psum, axis_name=AXIS), "all_gather": partial(lax.all_gather, axis_name=AXIS)}
    return Kernels(name=name, fused=name != "xla", **collectives, **bound)


def resolve(kernels: str | Kernels | None) -> Kernels:
    """The Kernels of a name, None's are the first that are there; Kernels pass through. Raises ArgumentError for any other name
    or thing."""
    return kernels if isinstance(kernels, Kernels) else named(best() if kernels is None else kernels)
