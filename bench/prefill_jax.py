"""Prefill of Qwen3-Next-80B in JAX, whole or some layers of it, with moekit's kernels and with XLA's: random weights.

    python bench/prefill_jax.py                                              # four layers on one GPU
    python bench/prefill_jax.py --layers 48 --tp 2 --vocab full --kinds pallas   # the whole model on two

`moekit.models.qwen3next.prefill` as a user calls it, of prompts that are full, or `extend` where they are read in pieces
(`1x32768/8192`; memory is then of one piece): ms of all of it in a stream and alone by the host's clock, tokens/s, the host's
time to dispatch it, the first device's kernels by name, arguments, memory, compile time. Floors are measured in the run: what
the bytes take at the rate of a copy, and the products with weights at that of a large product.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

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
from moekit.models.qwen3next import Model, empty_cache, extend, prefill


def whole(model: Model, tokens: jax.Array, kind: str) -> tuple[Any, jax.stages.Compiled]:
    """A call that reads prompts at once, and its program."""
    lengths = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32)
    program = prefill.lower(model, tokens, lengths, cache_length=tokens.shape[1], kernels=kind).compile()
    return partial(program, model, tokens, lengths), program


def in_pieces(model: Model, tokens: jax.Array, piece: int, kind: str) -> tuple[Any, jax.stages.Compiled]:
    """A call that reads prompts so many tokens at a time into a cache that has room for all, and a piece's program."""
    batch, length = tokens.shape
    if length % piece:
        raise ValueError(f"pieces of {piece} tokens do not make {length}; take a divisor")
    pieces, lengths = jnp.split(tokens, length // piece, axis=1), jnp.full((batch,), piece, jnp.int32)
    program = extend.lower(model, pieces[0], lengths, empty_cache(model, batch, length, kind), kernels=kind).compile()

    def call() -> Any:
        logits, cache = None, empty_cache(model, batch, length, kind)
        for some in pieces:
            logits, cache = program(model, some, lengths, cache)
        return logits, cache

    return call, program


def measure(setting: Setting, batch: int, length: int, piece: int, kinds: Sequence[str], calls: int) -> list[dict]:
    """One row per kind of kernels; one that does not fit says so. piece: tokens read at a time, 0 for all of them."""
    model, tp, copied, multiplied = model_of(setting), setting.tp, copy_rate(), product_rate()
    tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, model.config.vocab_size)
    read = [piece] * (length // piece) if piece else [length]
    bytes_moved = sum(sum(moved(model.config, tp, batch * n, batch, 0, setting.dtype).values()) for n in read)
    products = operations(model.config, tp, batch * length)
    every = {"floor of bytes ms": round(bytes_moved / copied / 1e9, 2)}
    every |= {"floor of products ms": round(products / multiplied / 1e9, 2)}
    every |= {"copy TB/s": round(copied, 3), "product TFLOP/s": round(multiplied)}
    every |= {"arguments": len(jax.tree.leaves(model)) + 2}

    def prepare(kind: str) -> tuple[dict, dict]:
        begin = time.perf_counter()
        call, program = in_pieces(model, tokens, piece, kind) if piece else whole(model, tokens, kind)
        compiled = {"compile s": round(time.perf_counter() - begin, 1)}
        found = every | compiled | clocked(call, program, calls, 2, 1)
        return found | {"tokens/s": round(batch * length / found["ms"] * 1e3)}, {}

    return runner.beside(kinds, prepare, dict)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case per shape of prompts: 8x1024, or 1x32768/8192 in pieces of 8192."""
    setting = setting_of(args)
    for prompts in args.prompts:
        shape, _, piece = prompts.partition("/")
        batch, length = map(int, shape.split("x"))
        named = f"{batch} × {length}" + (f" in pieces of {piece}" if piece else "")
        yield setting.head("prefill") | {"prompts": named}, (setting, batch, length, int(piece or 0), args.kinds, args.calls)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke=f"{SMOKE} --prompts 2x16,1x16/8 --calls 1",
    options=(
        *OPTIONS,
        runner.Option("kinds", ("pallas", "xla"), "of kernels"),
        runner.Option("prompts", ("1x512", "1x2048", "1x8192", "8x1024", "1x32768/8192"), "how many x how long / in pieces of"),
        runner.Option("calls", 3, "in a stream"),
    ),
    patience=PATIENCE,
)

if __name__ == "__main__":
    runner.ask(QUESTION)
