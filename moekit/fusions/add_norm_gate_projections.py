"""The gates of one row with the residual sum and its norm before them."""

from moekit.fusions.add_rms_norm import add_rms_norm
from moekit.fusions.add_rms_norm import reference as before
from moekit.fusions.gate_projections import reference as gates
from moekit.lang import In, cast, f32, fusion, halves, round_to, sigmoid, silu, sum


def reference(x, residual, norm, gate_up, router, shared_gate, *, eps, offset):
    """float64; the normed row is rounded before it is multiplied."""
    made = before(x, residual, norm, eps=eps, offset=offset)
    return {"normed": made["out"], "total": made["residual"],
            **gates(round_to(made["out"], x.dtype), gate_up, router, shared_gate)}  # fmt: skip


@fusion(
    reference,
    x=In("T H"), residual=In("T H"), norm=In("H"), gate_up=In("2*I H"), router=In("E H"), shared_gate=In("G H"),
)  # fmt: skip
def add_norm_gate_projections(
    x, residual, norm, gate_up, router, shared_gate, eps: float = 1e-6, offset: float = 1.0
):  # fmt: skip
    """total = x + residual, normed = rms_norm(total)·(offset + norm), and `gate_projections` of normed, in one launch.

    x, residual [T, H], norm [H], gate_up [2I, H] = [gate | up], router [E, H], shared_gate [G, H] -> normed [T, H] and
    activated [T, I] and logits [T, E] in x's dtype, total [T, H] in residual's, share [T, G] in float32. Sums and rounding are
    those of `add_rms_norm`, products float32, rounded once. Every program makes the norm anew, by lanes and not by the matrix
    unit, and every row reads the matrices anew: for one row.
    """
    row, total = add_rms_norm.fn(x, residual, norm, eps, offset).values()

    def product(matrix):
        return sum(f32(row) * f32(matrix), over="H")

    gate, up = map(product, halves(gate_up, "I"))
    activated, logits = (cast(made, x.dtype) for made in (silu(gate) * up, product(router)))
    share = sigmoid(product(shared_gate))
    return {"normed": row, "total": total, "activated": activated, "logits": logits, "share": share}
