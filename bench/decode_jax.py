"""A decode step of Qwen3-Next-80B in JAX, whole or some layers of it, with moekit's kernels and with XLA's: random weights.

    python bench/decode_jax.py                                       # four layers on one GPU
    python bench/decode_jax.py --layers 48 --tp 2 --vocab full       # the whole model on two

`moekit.models.qwen3next.greedy_step` as a user calls it. Of each step: ms in a stream of steps and of one alone, by the host's
clock; on one device also by its own clock, from the begin of a step's first kernel to the end of its last, with the device kept
busy until the host has dispatched it (`device ms`); the host's time to dispatch one; what the first device's kernels take, by
name; its arguments, memory and compile time; the bytes that it must move, at the rate of a copy measured in the run.

`without collectives` is the same step with its collectives left out (so with another result), and `collectives dispatch ms`
what the host takes for a program of nothing but those: two ways of telling what of a dispatch is not theirs. Without
collectives a step is one command buffer, which XLA records anew whenever one of its arrays has moved; so there the tokens are
donated, too, and none moves. (With collectives it is one buffer of 98 that holds the tokens.) Beside each time
stands the share of sequences that get the same next token from the same cache with either kind of kernels; in bfloat16
near-equal logits fall either way.
"""

from __future__ import annotations

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
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common import numbers
from bench.device_jax import timed
from bench.model_jax import (
    alone,
    configuration,
    copy_rate,
    drawn,
    memory,
    mesh_of,
    moved,
    options,
    profile,
    random_model,
    run,
    stream,
)
from moekit.models.qwen3next import Config, Model, cache_shapes, greedy_step
from moekit.models.qwen3next.kernels import Kernels, named
from moekit.models.qwen3next.sharding import AXIS

ROOM = 1024  # tokens for which a cache has room; half of it is filled
KINDS = ("pallas", "xla")


class Steps:
    """Decode steps one after the other: each goes on from the tokens and the cache of the one before."""

    def __init__(self, model: Model, tokens: jax.Array, cache: Any, kernels: Kernels, donated: bool = False):
        """donated: the tokens as well as the cache, so that no array of the step ever moves."""
        self.model, self.tokens, self.cache = model, tokens, jax.tree.map(jnp.copy, cache)
        step = jax.jit(partial(greedy_step, kernels=kernels), donate_argnums=(1, 2) if donated else 2)
        begin = time.perf_counter()
        self.program = step.lower(model, self.tokens, self.cache).compile()
        self.compile_seconds = time.perf_counter() - begin

    def __call__(self) -> jax.Array:
        """Do the next step."""
        self.tokens, self.cache = self.program(self.model, self.tokens, self.cache)
        return self.tokens

    @property
    def arguments(self) -> int:
        """How many arrays a step is given."""
        return len(jax.tree.leaves((self.model, self.tokens, self.cache)))


def collectives(config: Config, mesh: Mesh, batch: int, dtype: str) -> float:
    """ms that the host takes to dispatch all the all-reduces of a step, with one small kernel before each."""

    def local(x: jax.Array) -> jax.Array:
        for _ in range(2 * config.num_layers):
            x = lax.psum(x * 0.5, AXIS)
        return x

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    x = jax.device_put(jnp.ones((batch, config.hidden_size), dtype), NamedSharding(mesh, P()))
    return stream(partial(run.lower(x).compile(), x), 20)[1]


def begin(config: Config, mesh: Mesh, dtype: str, batch: int, kernels: Kernels) -> tuple[jax.Array, Any]:
    """The last tokens of so many sequences, and a cache that is half full, as such kernels have it."""
    cache = drawn(cache_shapes(config, mesh, batch, ROOM, jnp.dtype(dtype)), jax.random.key(batch))
    tokens = jax.random.randint(jax.random.key(1), (batch,), 0, config.vocab_size)
    cache = replace(cache, lengths=jnp.full((batch,), ROOM // 2, jnp.int32))
    return tokens, cache if kernels.fused else cache.apart()


def steps_of(model: Model, dtype: str, batch: int, kinds: Sequence[str] = KINDS) -> Iterator[tuple[str, Steps]]:
    """Steps with each kind of kernels, from the same weights, tokens and cache; `KIND without collectives` is a kind, too."""
    for kind in kinds:
        name, _, cut = kind.partition(" without ")
        kernels = replace(named(name), all_reduce=lambda x: x, all_gather=lambda x: x[None]) if cut else named(name)
        tokens, cache = begin(model.config, model.mesh, dtype, batch, kernels)
        yield kind, Steps(model, tokens, cache, kernels, donated=bool(cut))


def measured(
    layers: int, vocabulary: str, tp: int, dtype: str, batches: Sequence[int], kinds: Sequence[str], calls: int
) -> list[dict]:
    """One row per batch and kind of kernels."""
    mesh, config = mesh_of(tp), configuration(layers, vocabulary)
    rate, model, rows = copy_rate(), random_model(config, mesh, dtype), []
    for batch in batches:
        bytes_moved, firsts = moved(config, tp, batch, batch, ROOM // 2, dtype), {}
        summing = {"collectives dispatch ms": round(collectives(config, mesh, batch, dtype), 3)} if tp > 1 else {}
        for kind, steps in steps_of(model, dtype, batch, kinds):
            firsts[kind] = np.asarray(steps())
            ms, dispatch = stream(steps, calls)
            row = {"case": f"decode step, {layers} layers", "tp": tp, "T": batch, "dtype": dtype, "side": kind}
            row |= {"ms": round(ms, 3), "us": round(ms * 1e3, 1), "dispatch ms": round(dispatch, 3)}
            row["alone ms"] = round(alone(steps, 8), 3)
            row |= summing | {"tokens/s": round(batch / ms * 1e3, 1)}
            row |= {"floor ms": round(sum(bytes_moved.values()) / rate / 1e9, 3)}
            row |= {"copy TB/s": round(rate, 3), "compile s": round(steps.compile_seconds, 1), "arguments": steps.arguments}
            row |= memory(steps.program)
            if tp == 1:
                row["device ms"] = round(timed({kind: steps}, 1, 15)[kind]["us"] / 1e3, 4)
            if "without" not in kind:
                row["same tokens"] = float(np.mean(firsts[kind] == firsts[kinds[0]]))
            kernels = profile(steps, 4)
            launches, us = (sum(column) for column in zip(*kernels.values(), strict=True))
            row |= {"kernels": round(launches), "kernels ms": round(us / 1e3, 3)}
            parts = {n: round(b / rate / 1e9, 4) for n, b in bytes_moved.items()}
            rows.append(row | {"floor by part": parts, "by name": kernels})
            print(*(f"{k} {v}" for k, v in row.items()), list(kernels.items())[:8], flush=True)
            del steps
    return rows


def main() -> None:
    """Run, print, write JSON."""
    parser = options(__doc__ or "", "pallas,xla", "of kernels; 'pallas without collectives' is one, too")
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--steps", type=int, default=20, help="in a stream")
    args = parser.parse_args()
    run(measured, args, tuple(numbers(args.batch)), args.steps)


if __name__ == "__main__":
    main()
