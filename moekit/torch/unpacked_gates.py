"""`gate_projections` with four weights where they lie, none packed with another: what patched models need."""

import numpy as np

from moekit.lang import In, cast, contract, fusion, sigmoid, silu
from moekit.torch.face import op
from moekit.torch.ops import register


def reference(x, gate, up, router, shared_gate):
    """float64 matrix products, no inner rounding."""
    x, *weights = (t.astype(np.float64) for t in (x, gate, up, router, shared_gate))
    gate, up, logits, share = (x @ w.T for w in weights)
    with np.errstate(over="ignore"):
        return {"activated": gate / (1 + np.exp(-gate)) * up, "logits": logits, "share": 1 / (1 + np.exp(-share))}


@fusion(reference, x=In("T D"), gate=In("I D"), up=In("I D"), router=In("E D"), shared_gate=In("G D"))
def unpacked_gate_projections(x, gate, up, router, shared_gate):
    """activated = silu(x·gateᵀ)·(x·upᵀ), logits = x·routerᵀ, share = sigmoid(x·shared_gateᵀ), in one GEMM.

    x [T, D], gate and up [I, D], router [E, D], shared_gate [G, D] -> activated [T, I] and logits [T, E] in x's dtype,
    share [T, G] in float32. Products are accumulated in float32 and rounded once, where they are written.
    """
    activated = cast(silu(contract(x, gate, over="D")) * contract(x, up, over="D"), x.dtype)
    logits = cast(contract(x, router, over="D"), x.dtype)
    return {"activated": activated, "logits": logits, "share": sigmoid(contract(x, shared_gate, over="D"))}


register(unpacked_gate_projections)
gates = op(unpacked_gate_projections)
