"""Prefill of Qwen3-Next-80B in JAX, whole or some layers of it, with moekit's kernels and with XLA's: random weights.

    python bench/prefill_jax.py                                              # four layers on one GPU
    python bench/prefill_jax.py --layers 48 --tp 2 --vocab full --kinds pallas   # the whole model on two

`moekit.models.qwen3next.prefill` as a user calls it, of prompts that are full: ms a call in a stream and alone by the host's
clock, tokens/s, the host's time to dispatch one, the first device's kernels by name, arguments, memory, compile time. Floors
are measured in the run: what the bytes of a call take at the rate of a copy, and its products with weights at that of a large
product.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.model_jax import (
    OPTIONS,
    PATIENCE,
    SMOKE,
    Setting,
    clocked,
    copy_rate,
    model_of,
    moved,
    operations,
    product_rate,
    setting_of,
)
from moekit.models.qwen3next import prefill


def measure(setting: Setting, batch: int, length: int, kinds: Sequence[str], calls: int) -> list[dict]:
    """One row per kind of kernels; one that does not fit says so."""
    model, tp, copied, multiplied = model_of(setting), setting.tp, copy_rate(), product_rate()
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, model.config.vocab_size)
    lengths = jnp.full((batch,), length, jnp.int32)
    bytes_moved = sum(moved(model.config, tp, batch * length, batch, 0, setting.dtype).values())
    products = operations(model.config, tp, batch * length)
    every = {"floor of bytes ms": round(bytes_moved / copied / 1e9, 2)}
    every |= {"floor of products ms": round(products / multiplied / 1e9, 2)}
    every |= {"copy TB/s": round(copied, 3), "product TFLOP/s": round(multiplied)}
    every |= {"arguments": len(jax.tree.leaves(model)) + 2}

    def prepare(kind: str) -> tuple[dict, dict]:
        begin = time.perf_counter()
        program = prefill.lower(model, tokens, lengths, cache_length=length, kernels=kind).compile()
        compiled = {"compile s": round(time.perf_counter() - begin, 1)}
        found = every | compiled | clocked(partial(program, model, tokens, lengths), program, calls, 2, 1)
        return found | {"tokens/s": round(batch * length / found["ms"] * 1e3)}, {}

    return runner.beside(kinds, prepare, dict)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per shape of prompts."""
    setting = setting_of(args)
    for prompts in args.prompts:
        batch, length = map(int, prompts.split("x"))
        head = setting.head("prefill") | {"prompts": f"{batch} × {length}"}
        yield head, (setting, batch, length, args.kinds, args.calls)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke=f"{SMOKE} --prompts 2x16 --calls 1",
    options=(
        *OPTIONS,
        runner.Option("kinds", ("pallas", "xla"), "of kernels"),
        runner.Option("prompts", ("1x512", "1x2048", "8x1024", "1x8192"), "how many x how long"),
        runner.Option("calls", 3, "in a stream"),
    ),
    patience=PATIENCE,
)

if __name__ == "__main__":
    runner.ask(QUESTION)
