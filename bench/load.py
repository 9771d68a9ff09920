"""How fast a checkpoint is read: one layer of Qwen3-Next-80B's sizes, over as many ranks, from the page cache.

    python bench/load.py --tp 8 --experts 128

It writes the layer to a temporary folder (2 GB for 512 experts and more: `--experts` makes it smaller), reads it once to warm
the cache, and prints the seconds and GB/s of a second reading, in bytes of the files.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

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


def main() -> None:
    """Write, read twice, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--experts", type=int, default=512)
    options = parser.parse_args()
    prepare_jax()
    import jax

    from moekit.cli.run import mesh_of
    from moekit.models.qwen3next import TINY, load, write_random_checkpoint

    with tempfile.TemporaryDirectory() as scratch:
        config = replace(TINY, **LAYER, num_experts=options.experts)
        directory = write_random_checkpoint(Path(scratch) / "layer", config, dtype="bfloat16")
        gigabytes = sum(file.stat().st_size for file in directory.glob("*.safetensors")) / 1e9
        for _ in range(2):
            start = time.perf_counter()
            model = load(directory, mesh_of(options.tp))
            jax.block_until_ready(model.params)
            seconds = time.perf_counter() - start
            del model
    print(f"tp {options.tp}: {gigabytes:.2f} GB in {seconds:.2f} s, {gigabytes / seconds:.2f} GB/s")


if __name__ == "__main__":
    main()
