"""A decode step of Qwen3-Next in JAX, with moekit's kernels and with XLA's: some layers of the 80B's widths, random weights.

    python bench/decode_jax.py [--layers 4] [--batch 1,16,64] [--dtype bfloat16] [--json FILE]

`moekit.models.qwen3next.greedy_step` as a user calls it, on one GPU, by the device's clock (bench/device_jax.py): from the
begin of a step's first kernel to the end of its last. Beside each time stands the share of sequences that get the same next
token from the same cache with either kind of kernels; in bfloat16 near-equal logits fall either way.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.child import Child
from bench.common import environment, numbers, write
from bench.device_jax import compiled, made, timed
from moekit.models.qwen3next import TINY, Config, Model, abstract_model, cache_shapes, greedy_step, unpack_gates
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.model import pack_gates

WIDTHS = replace(  # Qwen3-Next-80B-A3B, but for the vocabulary: four layers would be lost beside its head
    TINY,
    vocab_size=32768,
    hidden_size=2048,
    num_attention_heads=16,
    head_dim=256,
    rotary_dim=64,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    num_experts=512,
    num_experts_per_tok=10,
    moe_intermediate_size=512,
    shared_expert_intermediate_size=512,
)
ROOM = 1024  # tokens for which a cache has room; half of it is filled


def drawn(like: Any, key: jax.Array) -> Any:
    """Random numbers of the shapes of a tree, scaled by the last axis, so that products stay near 1; integers are zero."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    drawn = (jax.device_put(_drawn(k, x.shape, x.dtype), x.sharding) for k, x in zip(keys, leaves, strict=True))
    return tree.unflatten(list(drawn))


@partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return (jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5).astype(dtype)


def random_model(config: Config, mesh: Mesh, dtype: str) -> Model:
    """A model with random weights, its gates packed."""
    like = abstract_model(config, mesh, dtype, packed=False)
    return pack_gates(Model(drawn(like.params, jax.random.key(0)), config, mesh))


class Steps:
    """Decode steps one after the other: each goes on from the tokens and the cache of the one before."""

    def __init__(self, program: jax.stages.Compiled, model: Model, tokens: jax.Array, cache: Any):
        self.program, self.model = program, model
        self.tokens, self.cache = tokens, jax.tree.map(jnp.copy, cache)

    def __call__(self) -> jax.Array:
        """Do the next step."""
        self.tokens, self.cache = self.program(self.model, self.tokens, self.cache)
        return self.tokens


def begin(config: Config, mesh: Mesh, dtype: str, batch: int) -> tuple[jax.Array, Any]:
    """The last tokens of so many sequences, and a cache that is half full."""
    cache = drawn(cache_shapes(config, mesh, batch, ROOM, jnp.dtype(dtype)), jax.random.key(batch))
    tokens = jax.random.randint(jax.random.key(1), (batch,), 0, config.vocab_size)
    return tokens, replace(cache, lengths=jnp.full((batch,), ROOM // 2, jnp.int32))


def both(config: Config, mesh: Mesh, dtype: str, batches: Sequence[int]) -> Iterator[tuple[int, dict[str, Steps]]]:
    """For each batch the steps with either kind of kernels, from the same weights, tokens and cache."""
    packed = random_model(config, mesh, dtype)
    models = {"pallas": packed, "xla": unpack_gates(packed)}
    for batch in batches:
        tokens, cache = begin(config, mesh, dtype, batch)
        lowered = {k: partial(greedy_step.lower, m, tokens, cache, kernels=k) for k, m in models.items()}
        programs = compiled(lowered, at_once=1)
        yield batch, {k: Steps(made(programs[k]), m, tokens, cache) for k, m in models.items()}


def measured(config: Config, dtype: str, batches: Sequence[int], rounds: int) -> Iterator[dict]:
    """One row per batch and kind of kernels."""
    mesh = Mesh(np.array(jax.devices()[:1]), ("tp",))
    for batch, steps in both(config, mesh, dtype, batches):
        first, second = (np.asarray(step()) for step in steps.values())
        for kind, timing in timed(steps, 1, rounds).items():
            row = {"case": f"decode step, {config.num_layers} layers", "T": batch, "dtype": dtype, "side": kind}
            row |= {"same tokens": float(np.mean(first == second)), "tokens/s": round(batch / timing["us"] * 1e6, 1)}
            yield row | timing


def main() -> None:
    """Run, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="every fourth is attention, the others gated delta nets")
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json")
    args = parser.parse_args()
    child, begin = Child(measured), time.monotonic()  # JAX's profiler and PyTorch's CUDA context are not for one process
    kinds = tuple(ATTENTION if i % 4 == 3 else GDN for i in range(args.layers))
    rows = child.rows(replace(WIDTHS, layer_types=kinds), args.dtype, tuple(numbers(args.batch)), args.rounds)
    child.close()
    for row in rows:
        longest = list(row.get("kernels", {}).items())[:6]
        print(*(f"{k} {v}" for k, v in row.items() if k != "kernels"), longest, flush=True)
    print(f"{time.monotonic() - begin:.0f} s")
    if args.json:
        write(args.json, environment() | {"rows": rows})


if __name__ == "__main__":
    main()
