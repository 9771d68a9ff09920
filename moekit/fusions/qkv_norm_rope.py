"""Heads of one new token made ready for attention: q and k normed and rotated, k and v put where the cache wants them."""

import numpy as np

from moekit.lang import (
    In,
    InOut,
    cast,
    concat,
    cos,
    f32,
    fusion,
    gather,
    iota,
    mean,
    put,
    round_to,
    rsqrt,
    sin,
    size,
    slice,
    where,
)


def reference(q, k, v, q_weight, k_weight, positions, frequencies, k_cache, v_cache, *, eps, offset):
    """float64, but for the angles, which are rounded as their frequencies are: far out that is more than a sine's rounding."""
    angles = round_to(positions.astype(np.float64)[:, None] * frequencies.astype(np.float64), frequencies.dtype)[:, None]
    half = frequencies.shape[0]

    def turned(x, weight):
        x = x.astype(np.float64)
        normal = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * (offset + weight.astype(np.float64))
        a, b, rest = np.split(normal, (half, 2 * half), axis=-1)
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles), rest], axis=-1)

    keys, values, new = k_cache.astype(np.float64), v_cache.astype(np.float64), v.astype(np.float64)
    for t, (at, key) in enumerate(zip(positions.astype(np.int64), turned(k, k_weight), strict=True)):
        if 0 <= at < keys.shape[2]:
            keys[t, :, at], values[t, :, at] = key, new[t]
    return {"q_out": turned(q, q_weight), "k_cache": keys, "v_cache": values}


@fusion(
    reference,
    q=In("T Q 2*R+N"), k=In("T K 2*R+N"), v=In("T K Dv"), q_weight=In("2*R+N"), k_weight=In("2*R+N"),
    positions=In("T", dtype=("int32", "int64")), frequencies=In("R", dtype="float32"),
    k_cache=InOut("T K L 2*R+N"), v_cache=InOut("T K L Dv"),
)  # fmt: skip
def qkv_norm_rope(
    q, k, v, q_weight, k_weight, positions, frequencies, k_cache, v_cache, eps: float = 1e-6, offset: float = 1.0
):
    """RMSNorm of every head of q and k, then rotary embedding of its first 2R elements, halves paired; the rest stays.

    q [T, Q, D], k [T, K, D], v [T, K, Dv], weights [D], positions [T], frequencies [R] (θ^(-i/R)), caches [T, K, L, D] and
    [T, K, L, Dv], D at least 2R -> q_out like q, and k and v in their caches at row t's position; one outside the cache is put
    nowhere. In float32 with one rounding, as moekit's Qwen3-Next has it; Hugging Face's rounds the norm, sine and cosine, too.
    """
    turned = rotation(positions, frequencies, eps, offset, "2*R+N")
    return {
        "q_out": cast(turned(q, q_weight), q.dtype),
        "k_cache": put(cast(turned(k, k_weight), k_cache.dtype), positions, over="L"),
        "v_cache": put(cast(v, v_cache.dtype), positions, over="L"),
    }


def rotation(positions, frequencies, eps, offset, head):
    """turned(x, weight): what is along axis `head` normed by its weight and rotated by its row's position, in float32."""
    half, dim = size("R"), size(head)
    angle = f32(positions) * gather(frequencies, iota(head) % half, over="R")
    cosine, sine = cos(angle), sin(angle)

    def turned(x, weight):
        x32 = f32(x)
        normal = x32 * rsqrt(mean(x32 * x32, over=head) + eps) * (f32(weight) + offset)
        first, second = (slice(normal, head, start, half, into="R") for start in (0, half))
        rest = slice(normal, head, 2 * half, dim - 2 * half, into="P")
        across = concat(-second, first, rest, over="R R P", into=head)
        return where(iota(head) < 2 * half, normal * cosine + across * sine, normal)

    return turned
