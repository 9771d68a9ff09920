"""One layer of the model in numpy and float64, token by token where the model goes in chunks: what an evaluation compares with.

It reads a checkpoint's tensors by their names and knows nothing of shares, kernels or caches. Formulas: transformers'
`modeling_qwen3_next` and, of the gated delta net, Yang, Kautz and Hatamizadeh (2024).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moekit.models.qwen3next.config import GDN, Config

Tensors = Mapping[str, np.ndarray]


def layer_output(tensors: Tensors, config: Config, at: int, hidden: np.ndarray) -> np.ndarray:
    """The residual stream after layer `at`, float64 [B, S, H], from that before it."""
    start = f"model.layers.{at}."
    own = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    weights = {name: value.astype(np.float64) for name, value in own.items()}
    hidden = hidden.astype(np.float64)
    mixer = _delta_net if config.layer_types[at] == GDN else _attention
    hidden = hidden + mixer(_norm(hidden, weights["input_layernorm.weight"], config), weights, config)
    return hidden + _experts(_norm(hidden, weights["post_attention_layernorm.weight"], config), weights, config)


def _norm(x: np.ndarray, weight: np.ndarray, config: Config) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + config.rms_norm_eps) * (1 + weight)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _delta_net(x: np.ndarray, w: Tensors, c: Config) -> np.ndarray:
    batch, length, _ = x.shape
    heads, ratio, dim, wide = c.linear_num_key_heads, c.values_per_key, c.linear_key_head_dim, c.linear_value_head_dim
    grouped = (x @ w["linear_attn.in_proj_qkvz.weight"].T).reshape(batch, length, heads, -1)
    q, k, v, z = np.split(grouped, np.cumsum([dim, dim, ratio * wide]), axis=-1)
    b, a = np.split((x @ w["linear_attn.in_proj_ba.weight"].T).reshape(batch, length, heads, -1), 2, axis=-1)
    flat = np.concatenate([part.reshape(batch, length, -1) for part in (q, k, v)], axis=-1)
    flat = _silu(_convolved(flat, w["linear_attn.conv1d.weight"][:, 0]))
    q, k, v = np.split(flat, np.cumsum([heads * dim] * 2), axis=-1)
    q, k = (_normalised(part.reshape(batch, length, heads, dim)).repeat(ratio, axis=2) for part in (q, k))
    v, z = (part.reshape(batch, length, heads * ratio, wide) for part in (v, z))
    a, b = (part.reshape(batch, length, heads * ratio) for part in (a, b))
    decay = np.exp(-np.exp(w["linear_attn.A_log"]) * np.logaddexp(0, a + w["linear_attn.dt_bias"]))
    read = _delta_rule(q * dim**-0.5, k, v, decay, _sigmoid(b))
    read = read / np.sqrt(np.mean(read * read, axis=-1, keepdims=True) + c.rms_norm_eps)
    read = read * w["linear_attn.norm.weight"] * _silu(z)
    return read.reshape(batch, length, -1) @ w["linear_attn.out_proj.weight"].T


def _convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A depthwise causal convolution of [B, S, C] with [C, width]."""
    width = weight.shape[1]
    padded = np.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
    return sum((padded[:, i : i + x.shape[1]] * weight[:, i] for i in range(width)), np.zeros_like(x))


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _delta_rule(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """What each token [B, S, V, Dv] reads: the state is decayed, corrected towards v at k, and read at q."""
    state = np.zeros((*v.shape[:1], *v.shape[2:3], k.shape[-1], v.shape[-1]))
    read = np.empty_like(v)
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None, None]
        missing = (v[:, t] - np.einsum("bhk,bhkv->bhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + k[:, t, ..., None] * missing[..., None, :]
        read[:, t] = np.einsum("bhk,bhkv->bhv", q[:, t], state)
    return read


def _attention(x: np.ndarray, w: Tensors, c: Config) -> np.ndarray:
    batch, length, _ = x.shape
    dim, groups = c.head_dim, c.num_attention_heads // c.num_key_value_heads
    both = (x @ w["self_attn.q_proj.weight"].T).reshape(batch, length, -1, 2 * dim)
    q, gate = both[..., :dim], both[..., dim:]
    k, v = ((x @ w[f"self_attn.{name}.weight"].T).reshape(batch, length, -1, dim) for name in ("k_proj", "v_proj"))
    q = _rotated(_norm(q, w["self_attn.q_norm.weight"], c), c)
    k = _rotated(_norm(k, w["self_attn.k_norm.weight"], c), c)
    k, v = (part.repeat(groups, axis=2) for part in (k, v))
    scores = np.einsum("bshd,blhd->bhsl", q, k) * dim**-0.5
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    read = np.einsum("bhsl,blhd->bshd", _softmax(scores), v) * _sigmoid(gate)
    return read.reshape(batch, length, -1) @ w["self_attn.o_proj.weight"].T


def _rotated(x: np.ndarray, c: Config) -> np.ndarray:
    half = c.rotary_dim // 2
    angles = np.arange(x.shape[1])[:, None] * c.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _experts(x: np.ndarray, w: Tensors, c: Config) -> np.ndarray:
    share = _softmax(x @ w["mlp.gate.weight"].T)
    least = np.sort(share, axis=-1)[..., -c.num_experts_per_tok, None]
    share = np.where(share >= least, share, 0)
    share = share / share.sum(axis=-1, keepdims=True) if c.norm_topk_prob else share
    out = _sigmoid(x @ w["mlp.shared_expert_gate.weight"].T) * _expert(x, w, "mlp.shared_expert")
    for e in range(c.num_experts):
        out = out + share[..., e, None] * _expert(x, w, f"mlp.experts.{e}")
    return out


def _expert(x: np.ndarray, w: Tensors, name: str) -> np.ndarray:
    gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T
