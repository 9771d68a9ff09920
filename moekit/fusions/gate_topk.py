"""All gates of a mixture of experts, and the choice that the router makes: nothing but what the experts read is written."""

from moekit.fusions.gate_projections import gate_projections
from moekit.fusions.gate_projections import reference as gates
from moekit.fusions.topk_softmax import reference as routed
from moekit.fusions.topk_softmax import topk_softmax
from moekit.lang import In, fusion, round_to


def reference(x, gate_up, router, shared_gate, *, k, renormalize, nan_to_zero):
    """float64; logits are rounded before they are ranked."""
    made = gates(x, gate_up, router, shared_gate)
    logits = round_to(made.pop("logits"), x.dtype)
    return made | routed(logits, k=k, renormalize=renormalize, nan_to_zero=nan_to_zero)


@fusion(reference, x=In("T D"), gate_up=In("2*I D"), router=In("E D"), shared_gate=In("G D"))
def gate_topk(x, gate_up, router, shared_gate, k: int, renormalize: bool = True, nan_to_zero: bool = False):
    """`gate_projections`, then `topk_softmax` of its logits, which are not written.

    x [T, D], gate_up [2I, D], router [E, D], shared_gate [G, D] -> activated [T, I] in x's dtype, share [T, G] float32,
    weights float32 [T, k], ids int32 [T, k]. Logits are rounded to x's dtype before they are ranked, as Hugging Face has them.
    """
    made = gate_projections.fn(x, gate_up, router, shared_gate)
    return made | topk_softmax.fn(made.pop("logits"), k, renormalize, nan_to_zero)
