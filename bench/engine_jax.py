"""Many sequences through `moekit.models.qwen3next.Engine`, beside the bare step that it runs: random weights, the 80B's widths.

    python bench/engine_jax.py --layers 48 --tp 2 --vocab full --slots 8

Four sequences for each slot, prompts and new tokens of random lengths; they join and leave as slots become free. A row is
tokens/s of all that, reading prompts included, and of the steps alone: the median of those in which every slot got a token.
`bare` is a stream of `greedy_step` over as many rows with the same room.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from bench.decode_jax import ROOM, Steps, begin
from bench.model_jax import OPTIONS, PATIENCE, SMOKE, Setting, model_of, setting_of, stream
from moekit.models.qwen3next import Engine, Model
from moekit.models.qwen3next.kernels import named

ROUNDS = 4  # sequences for each slot


def served(model: Model, slots: int, kernels: str, piece: int, prompts: Sequence[int], new: Sequence[int]) -> dict:
    """What an engine of so many slots makes of ROUNDS times as many sequences, of lengths between those given."""
    engine, rng = Engine(model, slots=slots, length=ROOM, piece=piece, kernels=kernels), np.random.default_rng(slots)
    vocabulary = model.config.vocab_size
    for size in engine.pieces:  # compiles what the timed part runs; `warmup` would compile sampling, too
        engine.add(rng.integers(0, vocabulary, size), max_new_tokens=4)
    engine.results()
    wanted = {}
    for _ in range(ROUNDS * slots):
        most = int(rng.integers(*new))
        wanted[engine.add(rng.integers(0, vocabulary, rng.integers(*prompts)), max_new_tokens=most)] = most
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


def measure(
    setting: Setting, slots: int, kinds: Sequence[str], piece: int, prompts: Sequence[int], new: Sequence[int], calls: int
) -> Iterator[dict]:
    """One row for each kind of kernels."""
    model = model_of(setting)
    for kind in kinds:
        steps = Steps(model, *begin(model.config, model.mesh, setting.dtype, slots, named(kind)), named(kind))
        ms, _ = stream(steps, calls)
        del steps
        row = {"side": kind, "bare ms": round(ms, 3), "bare tokens/s": round(slots / ms * 1e3, 1)}
        yield row | served(model, slots, kind, piece, prompts, new)


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """A case for each number of slots."""
    setting = setting_of(args)
    for slots in args.slots:
        head, lengths = setting.head("engine") | {"slots": slots}, (args.piece, args.prompts, args.new)
        yield head, (setting, slots, args.kinds, *lengths, args.calls)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke=f"{SMOKE} --slots 2 --piece 16 --prompts 4,12 --new 5,12 --calls 1",
    options=(
        *OPTIONS,
        runner.Option("kinds", ("pallas",), "of kernels"),
        runner.Option("slots", (1, 8, 64)),
        runner.Option("piece", 64, "tokens of a prompt that are read at once"),
        runner.Option("prompts", (16, 256), "tokens of a prompt: at least, less than"),
        runner.Option("new", (64, 256), "new tokens: at least, less than"),
        runner.Option("calls", 20, "of the bare step in a stream"),
    ),
    patience=PATIENCE,
)

if __name__ == "__main__":
    runner.ask(QUESTION)
