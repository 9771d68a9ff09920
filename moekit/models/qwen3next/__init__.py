"""Qwen3-Next in functional JAX: load, prefill, decode_step, generate."""

from moekit.models.qwen3next.cache import Cache, cache_shapes
from moekit.models.qwen3next.config import Config, ConfigError
from moekit.models.qwen3next.files import CheckpointError
from moekit.models.qwen3next.generate import Generation, Progress, end_tokens, generate
from moekit.models.qwen3next.memory import FitError, Room
from moekit.models.qwen3next.model import (
    Model,
    abstract_model,
    decode_step,
    greedy_step,
    load,
    most_likely,
    prefill,
)
from moekit.models.qwen3next.tiny import TINY, write_random_checkpoint

__all__ = [
    "TINY",
    "Cache",
    "CheckpointError",
    "Config",
    "ConfigError",
    "FitError",
    "Generation",
    "Model",
    "Progress",
    "Room",
    "abstract_model",
    "cache_shapes",
    "decode_step",
    "end_tokens",
    "generate",
    "greedy_step",
    "load",
    "most_likely",
    "prefill",
    "write_random_checkpoint",
]
