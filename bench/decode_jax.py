"""A decode step of Qwen3-Next-80B in JAX, whole or some layers of it, with moekit's kernels and with XLA's: random weights.

    python bench/decode_jax.py                                       # four layers on one GPU
    python bench/decode_jax.py --layers 48 --tp 2 --vocab full       # the whole model on two

`moekit.models.qwen3next.greedy_step` as a user calls it. Of each step: ms in a stream of steps and of one alone, by the host's
clock; on one device also by its own clock, from the begin of a step's first kernel to the end of its last, with the device kept
busy until the host has dispatched it (`device ms`); the host's time to dispatch one; what the first device's kernels take, by
name; its arguments, memory and compile time; the bytes that it must move, at the rate of a copy measured in the run.

`without collectives` is the same step with its collectives left out (so with another result): what it saves is theirs. It is
one command buffer, which XLA records anew whenever one of its arrays has moved; so there the tokens are donated, too, and none
moves. (With collectives it is one buffer of 98 that holds the tokens.) `pallas with packets` is the step that has a
channel's link, so that each sum over ranks is one kernel with the norm behind it (docs/collectives.md), where the others have
`psum`; where ranks cannot have that, its row says why. Beside each time stands the share of sequences that get
the same next token from the same cache with either kind of kernels; in bfloat16 near-equal logits fall either way.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.child import said
from bench.device_jax import timed
from bench.model_jax import OPTIONS, PATIENCE, SMOKE, Setting, clocked, copy_rate, drawn, model_of, moved, setting_of
from moekit.errors import UnavailableError
from moekit.jax import Channel
from moekit.models.qwen3next import Config, Model, cache_shapes, channel_of, greedy_step
from moekit.models.qwen3next.kernels import Kernels, named

ROOM = 1024  # tokens for which a cache has room; half of it is filled
KINDS = ("pallas", "xla")
CUT, PACKETS = " without collectives", " with packets"


class Steps:
    """Decode steps one after the other: each goes on from the tokens and the cache of the one before."""

    def __init__(
        self, model: Model, tokens: jax.Array, cache: Any, kernels: Kernels, donated: bool = False,
        channel: Channel | None = None,
    ):  # fmt: skip
        """donated: the tokens as well as the cache, so that no array of the step ever moves. channel: what ranks add up by."""
        self.model, self.tokens, self.cache, self.channel = model, tokens, jax.tree.map(jnp.copy, cache), channel
        step = jax.jit(partial(greedy_step, kernels=kernels), donate_argnums=(1, 2) if donated else 2)
        begin = time.perf_counter()
        self.program = step.lower(model, self.tokens, self.cache, **self._link()).compile()
        self.compile_seconds = time.perf_counter() - begin

    def _link(self) -> dict[str, Any]:
        return {"link": self.channel.link} if self.channel else {}

    def __call__(self) -> jax.Array:
        """Do the next step."""
        if self.channel is None:
            self.tokens, self.cache = self.program(self.model, self.tokens, self.cache)
            return self.tokens
        with self.channel.lock:
            self.tokens, self.cache, link = self.program(self.model, self.tokens, self.cache, **self._link())
            self.channel.keep(link)
        return self.tokens

    @property
    def arguments(self) -> int:
        """How many arrays a step is given."""
        return len(jax.tree.leaves((self.model, self.tokens, self.cache, self._link())))


def begin(config: Config, mesh: Mesh, dtype: str, batch: int, kernels: Kernels) -> tuple[jax.Array, Any]:
    """The last tokens of so many sequences, and a cache that is half full, as such kernels have it."""
    cache = drawn(cache_shapes(config, mesh, batch, ROOM, jnp.dtype(dtype)), jax.random.key(batch))
    tokens = jax.random.randint(jax.random.key(1), (batch,), 0, config.vocab_size)
    cache = replace(cache, lengths=jnp.full((batch,), ROOM // 2, jnp.int32))
    return tokens, cache if kernels.fused else cache.apart()


def steps_of(model: Model, dtype: str, batch: int, kind: str) -> Steps:
    """Steps with a kind of kernels, of all kinds from the same weights, tokens and cache.

    `KIND without collectives` is a kind, too, and so is `pallas with packets`; raises UnavailableError where there are none.
    """
    name = kind.removesuffix(CUT).removesuffix(PACKETS)
    kernels, cut, channel = named(name), kind.endswith(CUT), None
    if kind.endswith(PACKETS):
        channel, how = channel_of(model.mesh, batch, model.config.hidden_size, name)
        if channel is None:
            raise UnavailableError(f"no packets: {how}")
    if cut:
        kernels = replace(kernels, all_reduce=lambda x: x, all_gather=lambda x: x[None])
    tokens, cache = begin(model.config, model.mesh, dtype, batch, kernels)
    return Steps(model, tokens, cache, kernels, donated=cut, channel=channel)


def measure(setting: Setting, batch: int, kinds: Sequence[str], calls: int) -> list[dict]:
    """One row per kind of kernels."""
    rate, model, tp, dtype = copy_rate(), model_of(setting), setting.tp, setting.dtype
    config, rows, first = model.config, [], None
    bytes_moved = moved(config, tp, batch, batch, ROOM // 2, dtype)
    every = {"copy TB/s": round(rate, 3), "floor ms": round(sum(bytes_moved.values()) / rate / 1e9, 3)}
    every["floor by part"] = {n: round(b / rate / 1e9, 4) for n, b in bytes_moved.items()}
    for kind in kinds:
        try:
            steps = steps_of(model, dtype, batch, kind)
        except UnavailableError as error:
            rows.append({"side": kind, "problem": said(error)})
            continue
        tokens = np.asarray(steps())
        first = tokens if first is None else first
        row = {"side": kind, "compile s": round(steps.compile_seconds, 1), "arguments": steps.arguments}
        row |= clocked(steps, steps.program, calls, 8, 4) | every
        row["tokens/s"] = round(batch / row["ms"] * 1e3, 1)
        if tp == 1:
            row["device ms"] = round(timed({kind: steps}, 1, 15)[kind]["us"] / 1e3, 4)
        if not kind.endswith(CUT):
            row["same tokens"] = float(np.mean(tokens == first))
        if steps.channel:
            steps.channel.check()
        rows.append(row)
        del steps
    return rows


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per number of sequences."""
    setting = setting_of(args)
    for batch in args.batch:
        yield setting.head("decode step") | {"T": batch}, (setting, batch, args.kinds, args.steps)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke=f"{SMOKE} --batch 2 --steps 2",
    options=(
        *OPTIONS,
        runner.Option("kinds", KINDS, "of kernels; 'pallas with packets', 'pallas without collectives' are, too"),
        runner.Option("batch", (1, 16, 64), "sequences"),
        runner.Option("steps", 20, "in a stream"),
    ),
    patience=PATIENCE,
)

if __name__ == "__main__":
    runner.ask(QUESTION)
