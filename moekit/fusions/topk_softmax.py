"""The router: softmax over all experts, and the k best of them."""

import numpy as np

from moekit.lang import In, exp, f32, fusion, isnan, max, sum, top_k, where


def reference(logits, *, k, renormalize, nan_to_zero):
    """float64 softmax; ids by a stable sort of the logits, NaN last."""
    x = logits.astype(np.float64)
    ids = np.argsort(np.where(np.isnan(x), np.inf, -x), axis=-1, kind="stable")
    nan_last = np.argsort(np.take_along_axis(np.isnan(x), ids, -1), axis=-1, kind="stable")
    ids = np.take_along_axis(ids, nan_last, -1)[..., :k]
    with np.errstate(invalid="ignore", over="ignore"):
        best = np.max(x, axis=-1, keepdims=True)
        e = np.exp(x - best)
        weights = np.take_along_axis(e / e.sum(-1, keepdims=True), ids, -1)
        if renormalize:
            weights = weights / weights.sum(-1, keepdims=True)
    weights = np.where(np.isnan(weights), 0, weights) if nan_to_zero else weights
    return {"weights": weights, "ids": ids.astype(np.int32)}


@fusion(reference, logits=In("T E"))
def topk_softmax(logits, k: int, renormalize: bool = True, nan_to_zero: bool = False):
    """weights, ids = the k largest of softmax(logits) per row, best first, weights summing to 1 if `renormalize`.

    logits [T, E] -> weights float32 [T, k], ids int32 [T, k]; softmax in float32 over all E. Ties go to the lower id.
    A row whose softmax is NaN has NaN weights (0 with `nan_to_zero`) and ids that are still valid and unique.
    """
    best, ids = top_k(logits, k, over="E", into="K")
    largest = max(f32(logits), over="E")
    chosen = exp(f32(best) - largest)
    if renormalize:  # the softmax's own denominator cancels; the others' exponentials are not needed
        weights = chosen / sum(chosen, over="K")
    else:
        weights = chosen / sum(exp(f32(logits) - largest), over="E")
    if nan_to_zero:
        weights = where(isnan(weights), 0.0, weights)
    return {"weights": weights, "ids": ids}
