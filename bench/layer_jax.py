"""The same block in JAX: a layer per way of computing it, and a chain of layers unrolled in one program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.device_jax import Program, compiled
from bench.layer import Sizes
from bench.sides import EPS
from bench.targets import XLA
from moekit import jax as mj

Layer = Callable[..., tuple]
LAYERS = 24


def weights(sizes: Sizes, dtype, key: jax.Array) -> dict:
    """One layer's weights, as `bench.layer.weights` has them."""
    keys = jax.random.split(key, 5)

    def make(key: jax.Array, out: int, into: int) -> jax.Array:
        return (jax.random.normal(key, (out, into), jnp.float32) * into**-0.5).astype(dtype)

    gates = [make(k, n, sizes.hidden) for k, n in zip(keys, sizes.widths, strict=False)]
    norm, down = make(keys[3], sizes.hidden, 1)[:, 0], make(keys[4], sizes.hidden, sizes.widths[0] // 2)
    return {"norm": norm, "gates": gates, "packed": mj.pack_gate(*gates), "down": down}


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x · wᵀ, accumulated in float32, in x's dtype; IEEE for float32, which XLA on a GPU would round to TF32."""
    exact = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum("td,pd->tp", x, w, precision=exact, preferred_element_type=jnp.float32).astype(x.dtype)


def layer(w: dict, x, residual, k: int, part: str, *, implementation: str | None, packed: bool) -> tuple:
    """A layer by one implementation of moekit's fusions, with one product for the gates or three."""
    use = {"implementation": implementation}
    x, residual = mj.add_rms_norm(x, residual, w["norm"], **use)
    if packed:
        _, gate_up, logits, gate = mj.gate_gemm(x, w["packed"], **use)
    else:
        gate_up, logits, gate = (linear(x, g) for g in w["gates"])
    active, (chosen, ids) = mj.silu_and_mul(gate_up, **use), mj.topk_softmax(logits, k, **use)
    if part == "moe":
        x = mj.shared_expert_combine(x, linear(active, w["down"]), gate, **use)
    return x, residual, active, chosen, ids


def plain(w: dict, x, residual, k: int, part: str, *, packed: bool) -> tuple:
    """A layer as one writes it in jax.numpy, with one product for the gates or three."""
    residual = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(residual.dtype)
    wide = residual.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS)
    x = (wide * scale * (1 + w["norm"].astype(jnp.float32))).astype(x.dtype)
    if packed:
        fused, ends = linear(x, w["packed"].weight), np.cumsum([g.shape[0] for g in w["gates"]])
        gate_up, logits, gate, _ = jnp.split(fused, ends, -1)
    else:
        gate_up, logits, gate = (linear(x, g) for g in w["gates"])
    first, second = (half.astype(jnp.float32) for half in jnp.split(gate_up, 2, -1))
    active = (jax.nn.silu(first) * second).astype(x.dtype)
    chosen, ids = lax.top_k(jax.nn.softmax(logits.astype(jnp.float32)), k)
    if part == "moe":
        shared = linear(active, w["down"]).astype(jnp.float32)
        x = (x.astype(jnp.float32) + jax.nn.sigmoid(gate.astype(jnp.float32)) * shared).astype(x.dtype)
    return x, residual, active, chosen / chosen.sum(-1, keepdims=True), ids


def layer_epilogue(w: dict, x, residual, k: int, part: str) -> tuple:
    """A layer of moekit's with products that carry their epilogues."""
    x, residual = mj.add_rms_norm(x, residual, w["norm"])
    active, logits, share = mj.gate_projections(x, *w["packed"].parts)
    chosen, ids = mj.topk_softmax(logits, k)
    if part == "moe":
        x = mj.down_combine(x, active, w["down"], share)
    return x, residual, active, chosen, ids


def layers() -> dict[str, Layer]:
    """Every way of computing a layer, moekit's first."""
    return {
        "moekit": partial(layer, implementation=None, packed=True),
        "moekit, epilogue": layer_epilogue,
        "xla, three gemms": partial(layer, implementation="xla", packed=False),
        "xla, one gemm": partial(layer, implementation="xla", packed=True),
        "jnp, three gemms": partial(plain, packed=False),
        "jnp, one gemm": partial(plain, packed=True),
    }


def chain(one: Layer, k: int, part: str) -> Callable:
    """One program of as many layers as there are weights, each waiting for all of the one before."""

    def run(stack: Sequence[dict], x, residual):
        kept = []
        for w in stack:
            x, residual, *rest = lax.optimization_barrier(one(w, x, residual, k, part))
            kept.append(rest)
        return x, residual, kept

    return jax.jit(run)


def programs(
    sides: Mapping[str, Layer], stack: Sequence[dict], x, residual, k: int, part: str
) -> dict[tuple[str, int], Program]:
    """For each side a program of the first layer and one of all of them, by name and number of layers."""
    tuned, others = {}, {}
    for name, one in sides.items():
        first = tuned if name in XLA else others
        first[name, 1] = partial(jax.jit(partial(one, k=k, part=part)).lower, stack[0], x, residual)
        others[name, len(stack)] = partial(chain(one, k, part).lower, stack, x, residual)
    return compiled(tuned, at_once=1) | compiled(others)
