"""`add_norm_gate_projections` whose shared expert is in FP8, with a scale for each of its blocks."""

from moekit.fusions.add_rms_norm import add_rms_norm
from moekit.fusions.add_rms_norm import reference as before
from moekit.fusions.scaled import BLOCK, STORED, counted, of_rows, sums
from moekit.fusions.scaled_gate_projections import reference as gates
from moekit.lang import In, cast, fusion, halves, round_to, sigmoid, silu


def reference(x, residual, norm, gate_up, scale, router, shared_gate, *, columns, inner, eps, offset):
    """float64; the normed row is rounded before it is multiplied."""
    made = before(x, residual, norm, eps=eps, offset=offset)
    row = round_to(made["out"], x.dtype)
    return {"normed": made["out"], "total": made["residual"],
            **gates(row, gate_up, scale, router, shared_gate, columns, inner)}  # fmt: skip


@fusion(
    reference,
    x=In("T H"), residual=In("T H"), norm=In("H"), gate_up=In("2*I H", dtype=STORED), scale=In("2*Ib Hb", dtype="float32"),
    router=In("E H"), shared_gate=In("G H"), axes={"Ib": counted("I", "inner"), "Hb": counted("H", "columns")},
)  # fmt: skip
def scaled_add_norm_gate_projections(
    x, residual, norm, gate_up, scale, router, shared_gate, columns: int = BLOCK, inner: int = BLOCK, eps: float = 1e-6,
    offset: float = 1.0,
):  # fmt: skip
    """`add_norm_gate_projections` whose gate_up is times its scales; router and shared gate are as they were.

    gate_up [2I, H] = [gate | up] in float8_e4m3fn (or a wider float), scale [2⌈I/inner⌉, ⌈H/columns⌉] float32: one for every
    `inner` rows of gate, or of up, and `columns` columns; all else as there. Blocks of H are multiplied as they are, scaled in
    float32 if they have a scale, and added up in their order; rounded once. For one row.
    """
    row, total = add_rms_norm.fn(x, residual, norm, eps, offset).values()

    def product(matrix, scales=None):
        return sums(row, matrix, scales, "H", "Hb Hi", columns)

    gate, up = (product(part, of_rows(scale, "I", "2*Ib", inner, half)) for half, part in enumerate(halves(gate_up, "I")))
    activated, logits = (cast(made, x.dtype) for made in (silu(gate) * up, product(router)))
    share = sigmoid(product(shared_gate))
    return {"normed": row, "total": total, "activated": activated, "logits": logits, "share": share}
