"""Weights for `gate_gemm`: three matrices in one, and the rule for when that may be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moekit.errors import ShapeError
from moekit.lang.dtypes import FLOATS


@dataclass(frozen=True)
class GateWidths:
    """Where gate_up, router and shared gate lie along the packed axis P: their widths, then the padding."""

    gate_up: int
    router: int
    shared_gate: int
    padded: int

    @property
    def parts(self) -> dict[str, slice]:
        """The columns of each part of the fused output."""
        first, second = self.gate_up, self.gate_up + self.router
        third = second + self.shared_gate
        return {
            "gate_up": slice(0, first),
            "router_logits": slice(first, second),
            "shared_gate": slice(second, third),
        }


def gate_widths(gate_up: int, router: int, shared_gate: int, multiple: int = 8) -> GateWidths:
    """Widths of the parts and of the whole, padded up to a multiple of `multiple`."""
    if multiple < 1:
        raise ShapeError(f"pack_gate: multiple = {multiple}; it must be at least 1")
    total = gate_up + router + shared_gate
    return GateWidths(gate_up, router, shared_gate, -(-total // multiple) * multiple)


def gate_refusal(x_dtype: str, weights: Sequence[tuple[str, tuple[int, ...], str]], biased: Sequence[str] = ()) -> str | None:
    """None if three gate weights may be packed into one GEMM, else one sentence saying why not.

    `weights`: (name, shape, dtype) of gate_up, router and shared gate; `biased`: names of those with a bias.
    The dtype must be float32, float16 or bfloat16 (unquantised) and the same for all and for x; all share the input width.
    """
    if biased:
        return f"gate_gemm: {biased[0]} has a bias; the fused path has none, so run three GEMMs"
    for name, shape, dtype in weights:
        if dtype not in FLOATS:
            why = f"gate_gemm: {name} is {dtype}; only unquantised float32, float16 and bfloat16 weights can be packed"
            other = "; scaled_gate_projections takes it with its scales, and the others as they are"
            return why + other * ((name, dtype) == ("gate_up", "float8_e4m3fn"))
        if len(shape) != 2:
            return f"gate_gemm: {name} has shape {list(shape)}; it must be [outputs, hidden]"
        if dtype != x_dtype:
            return f"gate_gemm: {name} is {dtype} but its input is {x_dtype}; they must match"
        if shape[1] != weights[0][1][1]:
            return f"gate_gemm: {name} has {shape[1]} inputs, {weights[0][0]} has {weights[0][1][1]}; they must match"
    return None
