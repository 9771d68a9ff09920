"""The same block in JAX: a layer per way of computing it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bench.cases import EPS
from bench.layer import GATES
from moekit import jax as mj

Layer = Callable[..., tuple]


def packed(o: dict) -> dict:
    """Operands with the packed weight of the gates, which a model makes once."""
    return o | {"packed": mj.pack_gate(*(o[n] for n in GATES))}


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x · wᵀ, accumulated in float32, in x's dtype; IEEE for float32, which XLA on a GPU would round to TF32."""
    exact = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum("td,pd->tp", x, w, precision=exact, preferred_element_type=jnp.float32).astype(x.dtype)


def layer(o: dict, k: int, part: str, *, implementation: str | None, one: bool) -> tuple:
    """A layer by one implementation of moekit's fusions, with one product for the gates or three."""
    use = {"implementation": implementation}
    x, residual = mj.add_rms_norm(o["x"], o["residual"], o["weight"], **use)
    gate_up, logits, gate = mj.gate_gemm(x, o["packed"], **use)[1:] if one else (linear(x, o[n]) for n in GATES)
    active, (chosen, ids) = mj.silu_and_mul(gate_up, **use), mj.topk_softmax(logits, k, **use)
    if part == "moe":
        x = mj.shared_expert_combine(x, linear(active, o["down"]), gate, **use)
    return x, residual, active, chosen, ids


def epilogue(o: dict, k: int, part: str) -> tuple:
    """A layer of moekit's with products that carry their epilogues."""
    x, residual = mj.add_rms_norm(o["x"], o["residual"], o["weight"])
    active, logits, share = mj.gate_projections(x, *o["packed"].parts)
    chosen, ids = mj.topk_softmax(logits, k)
    if part == "moe":
        x = mj.down_combine(x, active, o["down"], share)
    return x, residual, active, chosen, ids


def plain(o: dict, k: int, part: str, *, one: bool) -> tuple:
    """A layer as one writes it in jax.numpy, with one product for the gates or three."""
    residual = (o["x"].astype(jnp.float32) + o["residual"].astype(jnp.float32)).astype(o["residual"].dtype)
    wide = residual.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + EPS)
    x = (wide * scale * (1 + o["weight"].astype(jnp.float32))).astype(o["x"].dtype)
    ends = np.cumsum([len(o[n]) for n in GATES])
    products = jnp.split(linear(x, o["packed"].weight), ends, -1)[:3] if one else [linear(x, o[n]) for n in GATES]
    gate_up, logits, gate = (p.astype(jnp.float32) for p in products)
    first, second = jnp.split(gate_up, 2, -1)
    active = (jax.nn.silu(first) * second).astype(x.dtype)
    chosen, ids = lax.top_k(jax.nn.softmax(logits), k)
    if part == "moe":
        shared = linear(active, o["down"]).astype(jnp.float32)
        x = (x.astype(jnp.float32) + jax.nn.sigmoid(gate) * shared).astype(x.dtype)
    return x, residual, active, chosen / chosen.sum(-1, keepdims=True), ids


def layers() -> dict[str, Layer]:
    """Every way of computing a layer, moekit's first."""
    return {
        "moekit": partial(layer, implementation=None, one=True),
        "moekit, epilogue": epilogue,
        "xla, three gemms": partial(layer, implementation="xla", one=False),
        "xla, one gemm": partial(layer, implementation="xla", one=True),
        "jnp, three gemms": partial(plain, one=False),
        "jnp, one gemm": partial(plain, one=True),
    }
