"""The second half of the routed experts, for few tokens: down projections and their weighted sum."""

import numpy as np

from moekit.lang import In, cast, contract, f32, fusion, gather, round_to, sum


def reference(activated, down, ids, weights):
    """float64, pair by pair, each rounded to activated's dtype before it is weighted; the sum is rounded by the caller.

    An expert that does not exist has weights of zero.
    """
    rows, down, ids, weights = (activated.astype(np.float64), down.astype(np.float64), ids.astype(np.int64),
                                weights.astype(np.float64))  # fmt: skip
    out = np.zeros((rows.shape[0], down.shape[2]))
    for t, k in np.ndindex(*ids.shape):
        weight = down[ids[t, k]] if 0 <= ids[t, k] < down.shape[0] else np.zeros(down.shape[1:])
        out[t] += weights[t, k] * round_to(rows[t, k] @ weight, activated.dtype)
    return {"out": out}


@fusion(
    reference,
    activated=In("T K I"), down=In("E I H"), ids=In("T K", dtype=("int32", "int64")), weights=In("T K"),
)  # fmt: skip
def expert_down(activated, down, ids, weights):
    """out[t] = Σ over k of weights[t, k]·(activated[t, k]·down[ids[t, k]]).

    activated [T, K, I], down [E, I, H], ids and weights [T, K] -> out [T, H] in activated's dtype. A pair's product is
    accumulated in float32 and rounded to that dtype, as Hugging Face rounds it; the weighted sum is float32 again. An id of
    no expert stands for weights of zero.
    """
    each = cast(contract(activated, gather(down, ids, over="E"), over="I"), activated.dtype)
    return {"out": cast(sum(f32(each) * f32(weights), over="K"), activated.dtype)}
