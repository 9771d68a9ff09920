"""How fast a checkpoint is read: one layer of Qwen3-Next-80B's sizes, over as many ranks, from the page cache.

    python bench/load.py --tp 8 --experts 128

It writes the layer to a temporary folder (2 GB for 512 experts and more: `--experts` makes it smaller), reads it once to warm
the cache, and tells the seconds and GB/s of a second reading, in bytes of the files.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, __file__.rpartition("/bench/")[0])

from bench import runner
from moekit.cli.platform import prepare_jax

LAYER = {
    "hidden_size": 2048,
    "layer_types": ("linear_attention",),
    "num_attention_heads": 16,
    "head_dim": 256,
    "rotary_dim": 64,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "vocab_size": 4096,
}


def measure(tp: int, experts: int) -> Iterator[dict]:
    """Write, read twice; the second reading."""
    prepare_jax()
    import jax

    from moekit.cli.run import mesh_of
    from moekit.models.qwen3next import TINY, load, write_random_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        config = replace(TINY, **LAYER, num_experts=experts)
        directory = write_random_checkpoint(Path(scratch) / "layer", config, dtype="bfloat16")
        gigabytes = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
        for _ in range(2):
            start = time.perf_counter()
            model = load(directory, mesh_of(tp))
            jax.block_until_ready(model.params)
            seconds = time.perf_counter() - start
            del model
    yield {"GB": round(gigabytes, 3), "s": round(seconds, 3), "GB/s": round(gigabytes / seconds, 3)}


def cases(args: argparse.Namespace) -> Iterator[runner.Case]:
    """One layer per number of ranks."""
    for tp in args.tp:
        yield {"case": "load", "tp": tp, "experts": args.experts}, (tp, args.experts)


QUESTION = runner.Question(
    __doc__,
    cases,
    measure,
    smoke="--tp 1 --experts 10",
    options=(runner.Option("tp", (8,), "ranks"), runner.Option("experts", 512)),
    gpu=False,
)

if __name__ == "__main__":
    runner.ask(QUESTION)
