"""Attention of one new token of each sequence over what a cache holds of it."""

from __future__ import annotations

import numpy as np

from moekit.lang import In, cast, contract, fusion, size, softmax_sum


def reference(q, k_cache, v_cache, lengths, *, scale):
    """float64, head by head over a sequence's own positions."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    out = np.zeros((*q.shape[:3], v_cache.shape[3]))
    for t, n in enumerate(np.clip(lengths.astype(np.int64), 0, k_cache.shape[2])):
        for head in range(q.shape[1] if n else 0):
            keys, values = (cache[t, head, :n].astype(np.float64) for cache in (k_cache, v_cache))
            scores = q[t, head].astype(np.float64) @ keys.T * scale
            top = scores.max(-1, keepdims=True)
            weights = np.exp(scores - np.where(top == -np.inf, 0, top))
            total = weights.sum(-1, keepdims=True)
            out[t, head] = np.where(total == 0, 0, weights @ values / np.where(total == 0, 1, total))
    return {"out": out}


@fusion(
    reference,
    q=In("T K G D"), k_cache=In("T K L D"), v_cache=In("T K L Dv"), lengths=In("T", dtype=("int32", "int64")),
)  # fmt: skip
def attention_decode(q, k_cache, v_cache, lengths, scale: float | None = None):
    """out[t, k, g] = softmax(scale · q[t, k, g]·k_cache[t, k, :n]) · v_cache[t, k, :n] with n = lengths[t].

    q [T, K, G, D]: the G query heads of each of K key heads; k_cache [T, K, L, D], v_cache [T, K, L, Dv] with room for L
    positions, of which the first lengths[t] (int32 or int64) are there: what stands behind them is not read, or does not
    matter. scale: D^-½ if None. out [T, K, G, Dv] in v_cache's dtype; zero for a length of nothing. Sums in float32; weights
    are rounded to the dtype of a narrow v_cache. Online softmax: Milakov and Gimelshein 2018; over parts of a cache: Dao et
    al. 2023 (Flash-Decoding).
    """
    scores = contract(q, k_cache, over="D") * (size("D") ** -0.5 if scale is None else scale)
    return {"out": cast(softmax_sum(scores, v_cache, over="L", upto=lengths), v_cache.dtype)}
