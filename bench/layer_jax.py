"""The same block in JAX: a layer per way of computing it, and its time as the slope over the length of an unrolled chain."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from bench.layer import Sizes
from moekit import jax as mj

Layer = Callable[..., tuple]
FLUSHED = 2**26  # float32 numbers: 256 MiB, more than the L2 holds


def weights(sizes: Sizes, dtype, key: jax.Array) -> dict:
    """One layer's weights, as `bench.layer.weights` has them."""
    keys = jax.random.split(key, 5)

    def make(key: jax.Array, out: int, into: int) -> jax.Array:
        return (jax.random.normal(key, (out, into), jnp.float32) * into**-0.5).astype(dtype)

    gates = [make(k, n, sizes.hidden) for k, n in zip(keys, sizes.widths, strict=False)]
    norm, down = make(keys[3], sizes.hidden, 1)[:, 0], make(keys[4], sizes.hidden, sizes.widths[0] // 2)
    return {"norm": norm, "gates": gates, "packed": mj.pack_gate(*gates), "down": down}


def linear(x: jax.Array, w: jax.Array) -> jax.Array:
    """x · wᵀ, accumulated in float32, in x's dtype."""
    return jnp.einsum("td,pd->tp", x, w, preferred_element_type=jnp.float32).astype(x.dtype)


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


def layer_epilogue(w: dict, x, residual, k: int, part: str) -> tuple:
    """A layer of moekit's with products that carry their epilogues."""
    x, residual = mj.add_rms_norm(x, residual, w["norm"])
    active, logits, share = mj.gate_projections(x, *w["packed"].parts)
    chosen, ids = mj.topk_softmax(logits, k)
    if part == "moe":
        x = mj.down_combine(x, active, w["down"], share)
    return x, residual, active, chosen, ids


def layer_block(w: dict, x, residual, k: int, part: str) -> tuple:
    """A layer of moekit's with the gate part as one fusion and the router."""
    x, residual, active, logits, share = mj.gate_block(x, residual, w["norm"], *w["packed"].parts)
    chosen, ids = mj.topk_softmax(logits, k)
    if part == "moe":
        x = mj.down_combine(x, active, w["down"], share)
    return x, residual, active, chosen, ids


def layers() -> dict[str, Layer]:
    """Every way of computing a layer, moekit's first."""
    return {
        "moekit": partial(layer, implementation=None, packed=True),
        "moekit, epilogue": layer_epilogue,
        "moekit, one block": layer_block,
        "xla, three gemms": partial(layer, implementation="xla", packed=False),
        "xla, one gemm": partial(layer, implementation="xla", packed=True),
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


def slopes(sides: Mapping[str, Layer], stack: Sequence[dict], x, residual, k: int, part: str, lengths: tuple[int, int],
           rounds: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """µs per layer by side."""
    programs = {name: chain(one, k, part) for name, one in sides.items()}
    return slopes_of(programs, lambda n: (stack[:n], x, residual), lengths, rounds)


def slopes_of(programs: Mapping[str, Callable], operands: Callable[[int], tuple], lengths: tuple[int, int],
              rounds: int) -> dict[str, dict[str, float]]:  # fmt: skip
    """µs per link by program: the slope between two lengths of chain, all in turn, the L2 filled before each call.

    `us` and `spread` (interquartile range over rounds) of the slope; `call us` of the longer chain, dispatch included.
    """
    flush, filler = jax.jit(jnp.sum), jnp.ones(FLUSHED, jnp.float32)
    short, long = lengths
    seconds: dict[tuple[str, int], list[float]] = {(name, n): [] for name in programs for n in lengths}
    for name, n in seconds:
        for _ in range(3):
            jax.block_until_ready(programs[name](*operands(n)))
    for _ in range(rounds):
        for (name, n), spent in seconds.items():
            flush(filler).block_until_ready()
            begin = time.perf_counter()
            jax.block_until_ready(programs[name](*operands(n)))
            spent.append(time.perf_counter() - begin)
    found = {}
    for name in programs:
        each = [(b - a) / (long - short) * 1e6 for a, b in zip(seconds[name, short], seconds[name, long], strict=True)]
        quarters = statistics.quantiles(each, n=4)
        call = statistics.median(seconds[name, long]) * 1e6
        slope = (call - statistics.median(seconds[name, short]) * 1e6) / (long - short)
        found[name] = {"us": round(slope, 3), "spread": round(quarters[2] - quarters[0], 3), "call us": round(call, 1)}
    return found
