"""Attention of one new token of each sequence, each of its outputs behind a sigmoid gate."""

from __future__ import annotations

import numpy as np

from moekit.fusions.attention_decode import attention_decode
from moekit.fusions.attention_decode import reference as ungated
from moekit.lang import In, cast, f32, fusion, gather, iota, round_to, sigmoid, size


def reference(q, k_cache, v_cache, lengths, gate, *, scale):
    """float64; what was read is rounded before its gate."""
    read = round_to(ungated(q, k_cache, v_cache, lengths, scale=scale)["out"], v_cache.dtype)
    with np.errstate(over="ignore"):
        return {"out": read / (1 + np.exp(-gate.astype(np.float64).reshape(read.shape)))}


@fusion(
    reference,
    q=In("T K G D"), k_cache=In("T K L D"), v_cache=In("T K L Dv"), lengths=In("T", dtype=("int32", "int64")),
    gate=In("T Q Dv"), axes={"Q": lambda K, G: K * G},
)  # fmt: skip
def gated_attention_decode(q, k_cache, v_cache, lengths, gate, scale: float | None = None):
    """out = attention_decode(q, k_cache, v_cache, lengths, scale)·sigmoid(gate).

    Operands as `attention_decode` has them, gate [T, K·G, Dv] by query heads -> out [T, K, G, Dv] in v_cache's dtype. What was
    read is rounded to that before it is gated, as Hugging Face rounds it, and the product is rounded again.
    """
    gate = gather(gate, iota("K") * size("G") + iota("G"), over="Q")
    read = attention_decode.fn(q, k_cache, v_cache, lengths, scale)["out"]
    return {"out": cast(f32(read) * sigmoid(gate), v_cache.dtype)}
