"""Qwen3-Next and Qwen3.5 MoE in functional JAX: load, save, prefill, extend, decode_step, generate; and an Engine."""

from moekit.models.qwen3next.cache import Cache, cache_shapes
from moekit.models.qwen3next.config import Config, ConfigError
from moekit.models.qwen3next.engine import Engine, FullError, Result, Token
from moekit.models.qwen3next.exchanged import channel_of
from moekit.models.qwen3next.extend import empty_cache, extend
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
from moekit.models.qwen3next.quantize import Quantised, quantize
from moekit.models.qwen3next.sampling import Sampling
from moekit.models.qwen3next.save import save
from moekit.models.qwen3next.tiny import SHIPPED, TINY, write_random_checkpoint

__all__ = [
    "SHIPPED",
    "TINY",
    "Cache",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Engine",
    "FitError",
    "FullError",
    "Generation",
    "Model",
    "Progress",
    "Quantised",
    "Result",
    "Room",
    "Sampling",
    "Token",
    "abstract_model",
    "cache_shapes",
    "channel_of",
    "decode_step",
    "empty_cache",
    "end_tokens",
    "extend",
    "generate",
    "greedy_step",
    "load",
    "most_likely",
    "prefill",
    "quantize",
    "save",
    "write_random_checkpoint",
]
