"""The gate GEMM's weights and outputs in JAX: packed once, handed on as Views."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moekit.errors import ShapeError
from moekit.fusions import gate_gemm as declaration
from moekit.fusions.packing import GateWidths, gate_refusal, gate_widths
from moekit.jax.face import op
from moekit.jax.view import View, view

_gemm = op(declaration)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class PackedGate:
    """gate_up [2I, D], router [E, D] and shared gate [G, D] above each other, zero-padded: `weight` [P, D]. A pytree."""

    weight: jax.Array
    widths: GateWidths

    @property
    def parts(self) -> tuple[View, View, View]:
        """gate_up, router and shared gate again, as Views: what `gate_projections` takes."""
        gate_up, router, shared_gate = (view(self.weight)[part] for part in self.widths.parts.values())
        return gate_up, router, shared_gate

    def tree_flatten(self):
        """The weight as the only leaf."""
        return (self.weight,), self.widths

    @classmethod
    def tree_unflatten(cls, widths, children) -> PackedGate:
        """The same widths around another weight."""
        return cls(children[0], widths)


class GateOutputs(NamedTuple):
    """What the gate GEMM gives: the fused array [T, P], and Views of its columns."""

    fused: jax.Array
    gate_up: View
    router_logits: View
    shared_gate: View


def pack_gate(gate_up: jax.Array, router: jax.Array, shared_gate: jax.Array, multiple: int = 8) -> PackedGate:
    """Concatenate gate_up [2I, D], router [E, D] and shared_gate [G, D]; the width is zero-padded to `multiple`.

    Raises ShapeError with `gate_refusal`'s sentence if they cannot be packed.
    """
    named = [("gate_up", gate_up), ("router", router), ("shared_gate", shared_gate)]
    if why := gate_refusal(gate_up.dtype.name, [(n, w.shape, w.dtype.name) for n, w in named]):
        raise ShapeError(why)
    widths = gate_widths(gate_up.shape[0], router.shape[0], shared_gate.shape[0], multiple)
    padding = jnp.zeros((widths.padded - sum(w.shape[0] for _, w in named), gate_up.shape[1]), gate_up.dtype)
    return PackedGate(jnp.concatenate([gate_up, router, shared_gate, padding]), widths)


def split_gate(fused: jax.Array, widths: GateWidths) -> GateOutputs:
    """Views of the fused output's parts; its padding columns are in none of them."""
    return GateOutputs(fused, *(view(fused)[:, part] for part in widths.parts.values()))


def gate_gemm(x, packed, *, implementation: str | None = None, out: View | None = None, schedule=None):
    """x [T, D] · packedᵀ. With a PackedGate it returns GateOutputs (Views, no copy); with an array [P, D], the array [T, P]."""
    if not isinstance(packed, PackedGate):
        return _gemm(x, packed, implementation=implementation, out=out, schedule=schedule)
    fused = _gemm(x, packed.weight, implementation=implementation, out=out, schedule=schedule)
    return split_gate(fused, packed.widths)
