"""`gate_topk` whose shared expert is in FP8, with a scale for each of its blocks."""

from moekit.fusions.scaled import BLOCK, STORED, counted
from moekit.fusions.scaled_gate_projections import reference as gates
from moekit.fusions.scaled_gate_projections import scaled_gate_projections
from moekit.fusions.topk_softmax import reference as routed
from moekit.fusions.topk_softmax import topk_softmax
from moekit.lang import In, fusion, round_to


def reference(x, gate_up, scale, router, shared_gate, *, k, renormalize, nan_to_zero, columns, inner):
    """float64; logits are rounded before they are ranked."""
    made = gates(x, gate_up, scale, router, shared_gate, columns, inner)
    logits = round_to(made.pop("logits"), x.dtype)
    return made | routed(logits, k=k, renormalize=renormalize, nan_to_zero=nan_to_zero)


@fusion(
    reference,
    x=In("T D"), gate_up=In("2*I D", dtype=STORED), scale=In("2*Ib Db", dtype="float32"), router=In("E D"),
    shared_gate=In("G D"), axes={"Ib": counted("I", "inner"), "Db": counted("D", "columns")},
)  # fmt: skip
def scaled_gate_topk(
    x, gate_up, scale, router, shared_gate, k: int, renormalize: bool = True, nan_to_zero: bool = False,
    columns: int = BLOCK, inner: int = BLOCK,
):  # fmt: skip
    """`scaled_gate_projections`, then `topk_softmax` of its logits, which are not written.

    x [T, D], gate_up [2I, D] in float8_e4m3fn (or a wider float), scale [2⌈I/inner⌉, ⌈D/columns⌉] float32, router [E, D],
    shared_gate [G, D] -> activated [T, I] in x's dtype, share [T, G] float32, weights float32 [T, k], ids int32 [T, k]. Logits
    are rounded to x's dtype before they are ranked, as `gate_topk` has them.
    """
    made = scaled_gate_projections.fn(x, gate_up, scale, router, shared_gate, columns, inner)
    return made | topk_softmax.fn(made.pop("logits"), k, renormalize, nan_to_zero)
