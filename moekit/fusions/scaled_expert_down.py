"""`expert_down` of weights in FP8, with a scale for each of their blocks."""

import numpy as np

from moekit.fusions.scaled import BLOCK, STORED, block_by_block, counted, of_rows, one, products
from moekit.lang import In, cast, f32, fusion, gather, round_to, sum


def reference(activated, down, scale, ids, weights, columns, inner):
    """float64, pair by pair and block by block, each rounded to activated's dtype before it is weighted."""
    down, scale, ids = down.astype(np.float64), scale.astype(np.float64), ids.astype(np.int64)
    out = np.zeros((activated.shape[0], down.shape[1]))
    for t, k in np.ndindex(*ids.shape):
        weight, scales = (one(stack, ids[t, k]) for stack in (down, scale))
        product = block_by_block(activated[t, k].astype(np.float64), weight, scales, columns, inner)
        with np.errstate(invalid="ignore"):
            out[t] += weights[t, k].astype(np.float64) * round_to(product, activated.dtype)
    return {"out": out}


@fusion(
    reference,
    activated=In("T K I"), down=In("E H I", dtype=STORED), scale=In("E Hb Ib", dtype="float32"),
    ids=In("T K", dtype=("int32", "int64")), weights=In("T K"),
    axes={"Ib": counted("I", "inner"), "Hb": counted("H", "columns")},
)  # fmt: skip
def scaled_expert_down(activated, down, scale, ids, weights, columns: int = BLOCK, inner: int = BLOCK):
    """out[t] = Σ over k of weights[t, k]·(activated[t, k]·down[ids[t, k]]ᵀ), down times its scales.

    activated [T, K, I], down [E, H, I] in float8_e4m3fn (or a wider float), scale float32 [E, ⌈H/columns⌉, ⌈I/inner⌉], ids and
    weights [T, K] -> out [T, H] in activated's dtype. Blocks of I are multiplied as they are, scaled in float32 and added up in
    their order; a pair's product is then rounded to that dtype; the weighted sum is float32 again. An id of no expert stands
    for weights of zero.
    """
    scales = of_rows(scale, "H", "Hb", columns)
    chosen = (gather(a, ids, over="E") for a in (down, scales))
    each = cast(products(activated, *chosen, "I", "Ib Ii", inner), activated.dtype)
    return {"out": cast(sum(f32(each) * f32(weights), over="K"), activated.dtype)}
