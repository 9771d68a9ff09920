"""The first half of the routed experts, for few tokens: each token's own experts, their weights gathered as they are read."""

import numpy as np

from moekit.lang import In, cast, contract, fusion, gather, halves, silu


def reference(x, gate_up, ids):
    """float64, pair by pair; an expert that does not exist has weights of zero."""
    x, gate_up, ids = x.astype(np.float64), gate_up.astype(np.float64), ids.astype(np.int64)
    out = np.empty((*ids.shape, gate_up.shape[1] // 2))
    for t, k in np.ndindex(*ids.shape):
        weight = gate_up[ids[t, k]] if 0 <= ids[t, k] < gate_up.shape[0] else np.zeros(gate_up.shape[1:])
        gate, up = np.split(weight @ x[t], 2)
        with np.errstate(over="ignore"):
            out[t, k] = gate / (1 + np.exp(-gate)) * up
    return {"activated": out}


@fusion(reference, x=In("T D"), gate_up=In("E 2*I D"), ids=In("T K", dtype=("int32", "int64")))
def expert_gate_up(x, gate_up, ids):
    """activated[t, k] = silu(x[t]·gateᵀ)·(x[t]·upᵀ) with the weights of expert ids[t, k].

    x [T, D], gate_up [E, 2I, D] = [gate | up] of each expert, ids [T, K] -> activated [T, K, I] in x's dtype. Products are
    accumulated in float32 and rounded once. Every pair reads its expert's weights anew: for few tokens. An id of no expert
    stands for weights of zero.
    """
    gate, up = (contract(x, gather(part, ids, over="E"), over="D") for part in halves(gate_up, "I"))
    return {"activated": cast(silu(gate) * up, x.dtype)}
