"""The sum over ranks alone: what a channel between them is proved with before it is used."""

import numpy as np

from moekit.lang import In, all_reduce, fusion


def reference(x, *, tp):
    """float64; `x` has every rank's, first axis tp (none where tp is 1)."""
    return {"out": x.astype(np.float64).reshape(tp, -1, x.shape[-1]).sum(0)}


@fusion(reference, mesh="tp", x=In("T H"))
def added(x, tp: int = 1):
    """out = Σ x over the tp ranks of mesh axis tp, in float32 and in their order; x [T, H] is one rank's."""
    return all_reduce(x, over="tp")
