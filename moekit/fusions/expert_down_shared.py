"""The end of a mixture of experts for few tokens: all down projections and their weighted sum."""

import numpy as np

from moekit.fusions.expert_down import expert_down
from moekit.fusions.expert_down import reference as routed_alone
from moekit.lang import In, cast, contract, f32, fusion, round_to


def reference(activated, down, ids, weights, shared, shared_down, share):
    """float64, rounded where the declaration rounds: each pair, and the routed experts' sum."""
    routed = round_to(routed_alone(activated, down, ids, weights)["out"], activated.dtype)
    return {"out": routed + share.astype(np.float64) * (shared.astype(np.float64) @ shared_down.astype(np.float64).T)}


@fusion(
    reference,
    activated=In("T K I"), down=In("E I H"), ids=In("T K", dtype=("int32", "int64")), weights=In("T K"),
    shared=In("T J"), shared_down=In("H J"), share=In("T H?"),
)  # fmt: skip
def expert_down_shared(activated, down, ids, weights, shared, shared_down, share):
    """out = expert_down(activated, down, ids, weights) + share·(shared·shared_downᵀ), in no more launches than `expert_down`.

    activated [T, K, I], down [E, I, H], ids and weights [T, K], shared [T, J], shared_down [H, J], share [T, 1] or [T, H]
    -> out [T, H] in activated's dtype. A pair's product and the routed experts' sum are rounded to that dtype, as Hugging Face
    rounds them, and so is what is returned.
    """
    routed = expert_down.fn(activated, down, ids, weights)["out"]
    return {"out": cast(f32(routed) + f32(share) * contract(shared, shared_down, over="J"), activated.dtype)}
