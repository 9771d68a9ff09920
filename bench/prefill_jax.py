"""Prefill of Qwen3-Next-80B in JAX, whole or some layers of it, with moekit's kernels and with XLA's: random weights.

    python bench/prefill_jax.py                                              # four layers on one GPU
    python bench/prefill_jax.py --layers 48 --tp 2 --vocab full --kinds pallas   # the whole model on two

`moekit.models.qwen3next.prefill` as a user calls it, of prompts that are full: ms a call in a stream and alone by the host's
clock, tokens/s, the host's time to dispatch one, the first device's kernels by name, arguments, memory, compile time. Floors
are measured in the run: what the bytes of a call take at the rate of a copy, and its products with weights at that of a large
product.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.model_jax import (
    alone,
    configuration,
    copy_rate,
    memory,
    mesh_of,
    moved,
    operations,
    options,
    product_rate,
    profile,
    random_model,
    run,
    stream,
)
from moekit.models.qwen3next import prefill


def measured(
    layers: int, vocabulary: str, tp: int, dtype: str, prompts: Sequence[tuple[int, int]], kinds: Sequence[str], calls: int
) -> list[dict]:
    """One row per shape of prompts and kind of kernels; one that does not fit says so."""
    mesh, config = mesh_of(tp), configuration(layers, vocabulary)
    copied, multiplied = copy_rate(), product_rate()
    model, rows = random_model(config, mesh, dtype), []
    for batch, length in prompts:
        tokens = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
        lengths = jnp.full((batch,), length, jnp.int32)
        bytes_moved = sum(moved(config, tp, batch * length, batch, 0, dtype).values())
        floors = {"bytes": bytes_moved / copied / 1e9, "products": operations(config, tp, batch * length) / multiplied / 1e9}
        for kind in kinds:
            row = {"case": f"prefill, {layers} layers", "tp": tp, "prompts": f"{batch} × {length}", "side": kind}
            begin = time.perf_counter()
            try:
                lowered = prefill.lower(model, tokens, lengths, cache_length=length, kernels=kind)
                program = lowered.compile()
                row |= {"compile s": round(time.perf_counter() - begin, 1)} | memory(program)
                call = partial(program, model, tokens, lengths)
                ms, dispatch = stream(call, calls)
                kernels = profile(call, 1)
            except jax.errors.JaxRuntimeError as error:
                rows.append(row | {"problem": str(error).splitlines()[0][:200]})
                print(*(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
                continue
            row |= {"ms": round(ms, 2), "us": round(ms * 1e3), "dispatch ms": round(dispatch, 3)}
            row["alone ms"] = round(alone(call, 2), 2)
            row |= {"tokens/s": round(batch * length / ms * 1e3)}
            row |= {f"floor of {name} ms": round(value, 2) for name, value in floors.items()}
            row |= {"copy TB/s": round(copied, 3), "product TFLOP/s": round(multiplied)}
            row |= {"arguments": len(jax.tree.leaves(model)) + 2}
            launches, us = (sum(column) for column in zip(*kernels.values(), strict=True))
            row |= {"kernels": round(launches), "kernels ms": round(us / 1e3, 2)}
            rows.append(row | {"by name": kernels})
            print(*(f"{k} {v}" for k, v in row.items()), list(kernels.items())[:8], flush=True)
    return rows


def _prompts(text: str) -> list[tuple[int, int]]:
    """`1x512,8x1024` as pairs of a number of prompts and their length."""
    return [(int(n), int(length)) for n, _, length in (part.partition("x") for part in text.split(","))]


def main() -> None:
    """Run, print, write JSON."""
    parser = options(__doc__ or "", "pallas,xla", "of kernels")
    parser.add_argument("--prompts", default="1x512,1x2048,8x1024,1x8192", help="how many x how long")
    parser.add_argument("--calls", type=int, default=3, help="in a stream")
    args = parser.parse_args()
    run(measured, args, tuple(_prompts(args.prompts)), args.calls)


if __name__ == "__main__":
    main()
