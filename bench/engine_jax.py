"""Many sequences through `moekit.models.qwen3next.Engine`, beside the bare step that it runs: random weights, the 80B's widths.

    python bench/engine_jax.py --layers 48 --tp 2 --vocab full --slots 8

Four sequences for each slot, prompts and new tokens of random lengths; they join and leave as slots become free. A row is
tokens/s of all that, reading prompts included, and of the steps alone: the median of those in which every slot got a token.
`bare` is a stream of `greedy_step` over as many rows with the same room.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.common import numbers
from bench.decode_jax import Steps, begin
from bench.model_jax import configuration, mesh_of, options, random_model, run, stream
from moekit.models.qwen3next import Engine, Model
from moekit.models.qwen3next.kernels import named

ROOM = 1024  # tokens for which a slot has room, as bench/decode_jax.py has it
PIECE = 64
PROMPTS, NEW = (16, 256), (64, 256)  # lengths are drawn between these
ROUNDS = 4  # sequences for each slot


def served(model: Model, slots: int, rng: np.random.Generator, kernels: str) -> dict:
    """What an engine of so many slots makes of ROUNDS times as many sequences."""
    engine = Engine(model, slots=slots, length=ROOM, piece=PIECE, kernels=kernels)
    vocabulary = model.config.vocab_size
    for size in engine.pieces:  # compiles what the timed part runs; `warmup` would compile sampling, too
        engine.add(rng.integers(0, vocabulary, size), max_new_tokens=4)
    engine.results()
    wanted = {}
    for _ in range(ROUNDS * slots):
        most = int(rng.integers(*NEW))
        wanted[engine.add(rng.integers(0, vocabulary, rng.integers(*PROMPTS)), max_new_tokens=most)] = most
    made, start, quiet = Counter(), time.perf_counter(), []
    while engine.busy:
        before, found = time.perf_counter(), engine.step()
        made.update(token.sequence for token in found if token.token >= 0)
        if len(found) == slots:
            quiet.append(time.perf_counter() - before)
    seconds = time.perf_counter() - start
    assert made == wanted, "a sequence has not the tokens that it was to have"
    row = {"sequences": len(wanted), "tokens": made.total(), "tokens/s": round(made.total() / seconds, 1)}
    return row | ({"steps alone tokens/s": round(slots / statistics.median(quiet), 1)} if quiet else {})


def measured(
    layers: int, vocabulary: str, tp: int, dtype: str, slots: tuple[int, ...], kinds: tuple[str, ...], calls: int
) -> list[dict]:
    """One row for each number of slots and kind of kernels."""
    config, mesh = configuration(layers, vocabulary), mesh_of(tp)
    model, rows = random_model(config, mesh, dtype), []
    for count in slots:
        for kind in kinds:
            steps = Steps(model, *begin(config, mesh, dtype, count, named(kind)), named(kind))
            ms, _ = stream(steps, calls)
            del steps
            row = {"case": f"engine, {layers} layers", "tp": tp, "slots": count, "dtype": dtype, "side": kind}
            row |= {"bare ms": round(ms, 3), "bare tokens/s": round(count / ms * 1e3, 1)}
            row |= served(model, count, np.random.default_rng(count), kind)
            rows.append(row)
            print(*(f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def main() -> None:
    """Run, print, write JSON."""
    parser = options(__doc__ or "", "pallas", "of kernels")
    parser.add_argument("--slots", default="1,8,64")
    args = parser.parse_args()
    run(measured, args, tuple(numbers(args.slots)), 20)


if __name__ == "__main__":
    main()
