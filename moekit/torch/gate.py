"""The gate GEMM's weights and outputs in PyTorch: packed once, handed on as views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moekit.errors import ShapeError
from moekit.fusions import gate_gemm as declaration
from moekit.fusions.packing import GateWidths, gate_refusal, gate_widths
from moekit.torch.face import op

_gemm = op(declaration)


@dataclass(frozen=True)
class PackedGate:
    """gate_up [2I, D], router [E, D] and shared gate [G, D] above each other, zero-padded: `weight` [P, D]."""

    weight: torch.Tensor
    widths: GateWidths

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate_up, router and shared gate again, as views: what `gate_projections` takes."""
        gate_up, router, shared_gate = (self.weight[part] for part in self.widths.parts.values())
        return gate_up, router, shared_gate


class GateOutputs(NamedTuple):
    """What the gate GEMM gives: the fused tensor [T, P], and views of its columns."""

    fused: torch.Tensor
    gate_up: torch.Tensor
    router_logits: torch.Tensor
    shared_gate: torch.Tensor


def pack_gate(gate_up: torch.Tensor, router: torch.Tensor, shared_gate: torch.Tensor, multiple: int = 8) -> PackedGate:
    """Concatenate gate_up [2I, D], router [E, D] and shared_gate [G, D]; the width is zero-padded to `multiple`.

    Raises ShapeError with `gate_refusal`'s sentence if they cannot be packed.
    """
    named = [("gate_up", gate_up), ("router", router), ("shared_gate", shared_gate)]
    dtype = lambda w: str(w.dtype).removeprefix("torch.")  # noqa: E731
    if why := gate_refusal(dtype(gate_up), [(n, tuple(w.shape), dtype(w)) for n, w in named]):
        raise ShapeError(why)
    widths = gate_widths(gate_up.shape[0], router.shape[0], shared_gate.shape[0], multiple)
    padding = gate_up.new_zeros(widths.padded - sum(w.shape[0] for _, w in named), gate_up.shape[1])
    return PackedGate(torch.cat([gate_up, router, shared_gate, padding]), widths)


def split_gate(fused: torch.Tensor, widths: GateWidths) -> GateOutputs:
    """Views of the fused output's parts; its padding columns are in none of them."""
    return GateOutputs(fused, *(fused[:, part] for part in widths.parts.values()))


def gate_gemm(x, packed, *, out: torch.Tensor | None = None, implementation: str | None = None, schedule=None):
    """x [T, D] · packedᵀ. With a PackedGate it returns GateOutputs (views, no copy), with a tensor [P, D] the tensor [T, P]."""
    if not isinstance(packed, PackedGate):
        return _gemm(x, packed, out=out, implementation=implementation, schedule=schedule)
    fused = _gemm(x, packed.weight, out=out, implementation=implementation, schedule=schedule)
    return split_gate(fused, packed.widths)
