"""What a model takes of each device's memory, known before anything is placed there."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from moekit.errors import MoekitError
from moekit.models.qwen3next.attention import BLOCK, LONG, ROWS
from moekit.models.qwen3next.cache import cache_shapes
from moekit.models.qwen3next.config import ATTENTION, GDN, Config
from moekit.models.qwen3next.delta_rule import CHUNK
from moekit.models.qwen3next.gdn import AT_ONCE
from moekit.models.qwen3next.moe import DENSE, SORTED, TOGETHER
from moekit.models.qwen3next.sharding import AXIS, Parameter, kv_heads_per_rank, parameters

MEMINFO = Path("/proc/meminfo")


class FitError(MoekitError, MemoryError):
    """A model, its cache and its temporaries that a device has no room for."""


@dataclass(frozen=True)
class Room:
    """A cache to make room for: of `batch` sequences of up to `length` tokens, and what is to be done with it beside steps.

    prompt: tokens of each sequence that `prefill` reads at once. piece: tokens of one sequence that `extend` reads at once,
    behind up to `length` others, as an engine does. 0: it is not done.
    """

    batch: int = 1
    length: int = 0
    prompt: int = 0
    piece: int = 0


NO_ROOM = Room()
SLACK = 2  # XLA's temporaries were 1.1 to 1.6 times the arrays counted here


@dataclass(frozen=True)
class Need:
    """Bytes of one rank. copied: those of the weights that every rank holds whole."""

    weights: int
    copied: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.cache + self.temporaries


def needed(config: Config, tp: int, dtype: Any, room: Room = NO_ROOM) -> Need:
    """What one of `tp` ranks needs, with room for a cache. dtype: of the weights.

    Temporaries are an estimate from the largest arrays that are alive together; the others are exact.
    """
    kind = np.dtype(dtype)
    leaves: list[Parameter] = jax.tree.leaves(parameters(config, tp))
    sizes = [p.dtype(kind).itemsize for p in leaves]
    weights = sum(prod(p.local_shape(tp)) * size for p, size in zip(leaves, sizes, strict=True))
    copied = sum(
        prod(weight.shape) * size for p, size in zip(leaves, sizes, strict=True) for weight, _ in p.weights if weight.copied
    )
    return Need(weights, copied, cache_bytes(config, tp, kind, room), temporaries(config, tp, kind, room))


def cache_bytes(config: Config, tp: int, dtype: Any, room: Room) -> int:
    """What one rank's part of a cache takes."""
    mesh: Any = AbstractMesh((tp,), (AXIS,))
    shapes = cache_shapes(config, mesh, room.batch, room.length, np.dtype(dtype))
    return sum(prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(shapes))


def temporaries(config: Config, tp: int, dtype: Any, room: Room) -> int:
    """About what a rank holds besides weights and cache: the most of a step, a prefill and a piece of a prompt."""
    batch, prompt, piece, length = room.batch, room.prompt, room.piece, room.length
    step = _alive(config, tp, dtype, batch, 1, length)
    whole = _alive(config, tp, dtype, batch, prompt, prompt) if prompt else 0
    part = _alive(config, tp, dtype, 1, piece, length) if piece else 0
    return max(step, whole, part)


def _alive(config: Config, tp: int, dtype: Any, batch: int, new: int, seen: int) -> int:
    """About the bytes that are alive together as a call reads `new` tokens of each of `batch` sequences, the last of `seen`."""
    size, wide, tokens = np.dtype(dtype).itemsize, 4, batch * new
    heads, keys, values = config.linear_num_value_heads // tp, config.linear_key_head_dim, config.linear_value_head_dim
    together = min(tokens, max(AT_ONCE, batch * CHUNK))
    states = 4 * keys * (keys + values) // CHUNK
    delta = together * heads * wide * (6 * keys + 5 * values + 4 * CHUNK + states) if new > 1 else 0
    rows, columns, held = min(new, BLOCK), min(seen, BLOCK), 2  # held: scores, and what is made of them
    if new == 1:
        rows, columns = 1, seen
    elif new == seen <= LONG:
        rows, columns, held = min(new, ROWS), seen, 3  # a softmax of whole rows
    scores = held * wide * batch * config.num_attention_heads // tp * rows * columns
    copied = 2 * size * kv_heads_per_rank(config, tp) * config.head_dim * seen  # XLA does so where there is one sequence
    kinds = [_routed(config, tp, size, tokens)]
    kinds += [delta] * (GDN in config.layer_types) + [scores + copied] * (ATTENTION in config.layer_types)
    logits = 2 * wide * batch * config.vocab_size // tp
    return SLACK * (max(kinds) + logits + 6 * tokens * config.hidden_size * size)


def _routed(config: Config, tp: int, size: int, tokens: int) -> int:
    """Of the routed experts, in the form that takes most of those that may be chosen."""
    c, pairs = config, tokens * config.num_experts_per_tok
    held, own = c.num_experts // c.ep, c.moe_intermediate_size * c.ep // tp
    wide = 3 * own * c.hidden_size * size if c.float8 else 0  # of an expert, in the model's dtype
    if pairs <= c.num_experts:
        return pairs * ((c.hidden_size + 3 * own) * 4 + wide)
    if tokens <= SORTED or c.num_experts <= DENSE * c.num_experts_per_tok:
        return tokens * held * 2 * own * (size + 4) + held * wide
    turn = TOGETHER // SORTED * 3 * own * c.hidden_size * size
    return (2 * pairs + min(held, pairs) * SORTED) * c.hidden_size * size + turn


def free_bytes(devices: Iterable[Any]) -> int | None:
    """The least memory that is free on one of these devices; None where nobody says."""
    found, devices = [], list(devices)
    for device in devices:
        stats = device.memory_stats()
        if stats and "bytes_limit" in stats:
            found.append(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    if not found and all(device.platform == "cpu" for device in devices) and MEMINFO.exists():
        (available,) = re.findall(r"^MemAvailable: +(\d+) kB$", MEMINFO.read_text(encoding="utf-8"), re.MULTILINE)
        found.append(int(available) * 1024 // max(1, len(devices)))  # they share the host's
    return min(found, default=None)


def check_fits(config: Config, mesh: Mesh, dtype: Any, room: Room = NO_ROOM) -> None:
    """Raise FitError where the devices of a mesh have no room for the model with such a cache."""
    tp, here = mesh.shape[AXIS], [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    need, free = needed(config, tp, dtype, room), free_bytes(here)
    if free is not None and need.total > free:
        parts = f"{gb(need.weights)} of weights, {gb(need.cache)} of cache and about {gb(need.temporaries)} of temporaries"
        raise FitError(
            f"load: each of {tp} ranks needs {parts}, and {gb(free)} are free on a device; give more devices (tp), a narrower "
            "dtype, or fewer and shorter sequences"
        )


def check_rows_fit(config: Config, mesh: Mesh, dtype: Any, slots: int, length: int, piece: int) -> None:
    """Raise FitError where devices that hold the weights have no room for an engine's rows, one to read into, and its steps."""
    tp, here = mesh.shape[AXIS], [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    rows, free = cache_bytes(config, tp, dtype, Room(slots + 1, length)), free_bytes(here)
    more = temporaries(config, tp, dtype, Room(slots, length, piece=piece))
    if free is not None and rows + more > free:
        raise FitError(
            f"engine: {slots} + 1 rows of {length} tokens take {gb(rows)} on each rank and steps about {gb(more)} more, and "
            f"{gb(free)} are free on a device; give fewer slots, a shorter length, smaller pieces or more devices (tp)"
        )


def gb(count: float) -> str:
    """A number of bytes in a sentence."""
    return f"{count / 1e9:.2f} GB"
