"""The gate GEMM with its epilogue: nothing but what the next kernels read is written."""

import numpy as np

from moekit.lang import In, cast, contract, fusion, halves, sigmoid, silu


def reference(x, gate_up, router, shared_gate):
    """float64 matrix products, no inner rounding."""
    x, gate_up, router, shared_gate = (t.astype(np.float64) for t in (x, gate_up, router, shared_gate))
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    with np.errstate(over="ignore"):
        activated, share = gate / (1 + np.exp(-gate)) * up, 1 / (1 + np.exp(-(x @ shared_gate.T)))
    return {"activated": activated, "logits": x @ router.T, "share": share}


@fusion(reference, x=In("T D"), gate_up=In("2*I D"), router=In("E D"), shared_gate=In("G D"))
def gate_projections(x, gate_up, router, shared_gate):
    """activated = silu(x·gateᵀ)·(x·upᵀ), logits = x·routerᵀ, share = sigmoid(x·shared_gateᵀ), in one GEMM.

    x [T, D], gate_up [2I, D] = [gate | up], router [E, D], shared_gate [G, D] (G is 1 in Qwen3-Next), slices of one packed
    weight or not -> activated [T, I] and logits [T, E] in x's dtype, share [T, G] in float32. Products are accumulated in
    float32 and rounded once, where they are written.
    """
    gate, up = (contract(x, part, over="D") for part in halves(gate_up, "I"))
    activated = cast(silu(gate) * up, x.dtype)
    logits = cast(contract(x, router, over="D"), x.dtype)
    return {"activated": activated, "logits": logits, "share": sigmoid(contract(x, shared_gate, over="D"))}
