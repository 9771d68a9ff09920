"""Tiny Qwen3-Next models in the real checkpoint layout: the trained one that moekit ships, and random ones for tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from moekit.files import write_text
from moekit.models.qwen3next.config import ATTENTION, DTYPES, GDN, Config
from moekit.models.qwen3next.files import INDEX, SINGLE
from moekit.models.qwen3next.sharding import checkpoint_shapes

SHIPPED = Path(__file__).parent / "shipped"  # the checkpoint that `train_tiny` made; `questions` has what it answers

TINY = Config(
    vocab_size=512,
    hidden_size=64,
    layer_types=(GDN, GDN, GDN, ATTENTION),
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    rotary_dim=8,
    rope_theta=10_000_000.0,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    conv_width=4,
    num_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
)

GAINS = {
    "mlp.gate.weight": 4.0,
    "shared_expert_gate.weight": 2.0,
    "in_proj_ba.weight": 2.0,
}
OUTPUTS = ("o_proj.weight", "out_proj.weight", "down_proj.weight")  # added to the residual stream


def write_random_checkpoint(
    directory: str | Path,
    config: Config = TINY,
    seed: int = 0,
    dtype: str = "float32",
    files: int = 1,
) -> Path:
    """Write `config.json` and random weights of `dtype` under `directory`, and return it.

    The weights are scaled so that every part of a layer changes the logits and greedy tokens vary. files: how
    many safetensors files to spread them over; more than one writes an index as well. A_log and dt_bias are
    float32, of values that `dtype` holds.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    description = replace(config, dtype=dtype).to_json()
    write_text(directory / "config.json", json.dumps(description, indent=2) + "\n")
    tensors = dict(random_tensors(config, seed, dtype))
    if files == 1:
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    else:
        _save_sharded(directory, tensors, files)
    return directory


def random_tensors(config: Config, seed: int, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """The name and value of every tensor of a random model."""
    rng = np.random.default_rng(seed)
    narrow = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for name, shape in checkpoint_shapes(config).items():
        value = _random(rng, name, shape, config)
        value = value.astype(narrow)
        yield name, value.astype(np.float32) if name.endswith(("A_log", "dt_bias")) else value


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], config: Config) -> np.ndarray:
    """Float32 values of the size that the named parameter has in a trained model."""
    if name.endswith("A_log"):
        value = np.log(rng.uniform(0.05, 4.0, shape))
    elif name.endswith("dt_bias"):
        value = rng.uniform(-3.0, 0.5, shape)
    elif name.endswith("linear_attn.norm.weight"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("norm.weight"):
        value = rng.uniform(-0.4, 0.4, shape)
    elif "embed_tokens" in name:
        value = rng.standard_normal(shape) * (0.3 if config.tie_word_embeddings else 1.0)
    elif "conv1d" in name:
        value = rng.standard_normal(shape) * 0.6
    else:  # a projection: unit input gives about unit output, and more before a sigmoid or a softmax
        gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
        gain *= config.num_layers**-0.5 if name.endswith(OUTPUTS) else 1.0
        value = rng.standard_normal(shape) * gain * shape[-1] ** -0.5
    return np.asarray(value, np.float32)


def _save_sharded(directory: Path, tensors: Mapping[str, np.ndarray], files: int) -> None:
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {key: names[i * files // len(tensors)] for i, key in enumerate(tensors)}
    for name in names:
        part = {key: tensors[key] for key, place in weight_map.items() if place == name}
        save_file(part, directory / name, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in tensors.values())},
        "weight_map": weight_map,
    }
    write_text(directory / INDEX, json.dumps(index, indent=2) + "\n")
