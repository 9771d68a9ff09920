"""The fusions that the model calls, bound to one implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from moekit import jax as face

FUSIONS = (
    "add_rms_norm",
    "gate_projections",
    "topk_softmax",
    "down_combine",
    "gated_rms_norm",
    "delta_rule_step",
)


@dataclass(frozen=True)
class Kernels:
    """One callable per fusion. Hashable, so that a compiled step may depend on it.

    packed: whether the gate's three products are one `gate_projections` on the packed weight.
    """

    name: str
    packed: bool
    add_rms_norm: Callable[..., Any]
    gate_projections: Callable[..., Any]
    topk_softmax: Callable[..., Any]
    down_combine: Callable[..., Any]
    gated_rms_norm: Callable[..., Any]
    delta_rule_step: Callable[..., Any]


@cache
def named(name: str) -> Kernels:
    """`pallas`: Pallas kernels and the packed gate. `xla`: array evaluation and three gate products."""
    if name not in ("pallas", "xla"):
        raise ValueError(f"kernels={name!r} is not known; choose 'pallas' or 'xla'")
    bound = {fusion: partial(getattr(face, fusion), implementation=name) for fusion in FUSIONS}
    return Kernels(name=name, packed=name == "pallas", **bound)


def resolve(kernels: str | Kernels) -> Kernels:
    """The Kernels of a name; Kernels pass through."""
    return named(kernels) if isinstance(kernels, str) else kernels
