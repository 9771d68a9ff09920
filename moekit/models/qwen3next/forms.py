"""The forms in which files hold one model: from the tensors that `sharding` names to those of a checkpoint.

`sharding` speaks of Qwen3-Next's own layout: experts one by one, `in_proj_qkvz` and `in_proj_ba` grouped by key head. Files may
hold all experts of a layer in two tensors, and those of Qwen3.5 and 3.6 hold the delta net's projections component by
component, under a longer prefix, beside a vision tower. A form says where a block of the one lies in the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from moekit.models.qwen3next.config import QWEN3_NEXT, Config
from moekit.models.qwen3next.sharding import Slab, checkpoint_shapes

PREFIX, LONG_PREFIX = "model.", "model.language_model."
FUSED = "mlp.experts.gate_up_proj"
EXPERT = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
MTP, VISION = "mtp.", "model.visual."  # the multi-token-prediction layer; the tower
Range = tuple[int, int]


@dataclass(frozen=True)
class Piece:
    """The block `key[expert][rows, columns]` of a tensor in a file; without `expert` where that is None."""

    key: str
    expert: int | None
    rows: Range | None
    columns: Range | None


@dataclass(frozen=True)
class Component:
    """A part of a grouped projection: the tensor of its own `name`, its first row there, and its rows of each key head.

    begin, width: where in a head's group its rows begin, and how many they are.
    """

    name: str
    first: int
    begin: int
    width: int


@dataclass(frozen=True)
class Form:
    """How the files of one checkpoint hold the model of `config`.

    prefix: of every tensor but the head. fused: all experts of a layer in two tensors. The delta net's projections are
    apart in every family but the first.
    """

    config: Config
    prefix: str
    fused: bool

    @classmethod
    def of(cls, config: Config, names: Iterable[str]) -> Form:
        """The form that the names of a checkpoint's tensors speak of."""
        names = [name for name in names if not name.startswith((MTP, VISION))]  # which may have a form of their own
        long = config.model_type != QWEN3_NEXT and any(name.startswith(LONG_PREFIX) for name in names)
        return cls(config, LONG_PREFIX if long else PREFIX, any(name.endswith(FUSED) for name in names))

    @property
    def apart(self) -> bool:
        """Whether q | k | v, z, b and a of a delta net are tensors of their own."""
        return self.config.model_type != QWEN3_NEXT

    @property
    def skipped(self) -> tuple[str, ...]:
        """How the names of tensors begin that are no part of the text model."""
        return (MTP, VISION) if self.apart else (MTP,)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every tensor that the files must hold."""
        found: dict[str, tuple[int, ...]] = {}
        for key, shape in checkpoint_shapes(self.config).items():
            found |= self._stored(key, shape)
        return found

    def pieces(self, slab: Slab) -> list[Piece]:
        """Where a block lies; several pieces are joined along the rows."""
        expert = EXPERT.fullmatch(slab.key) if self.fused else None
        if expert:
            return [self._of_fused(slab, *expert.groups())]
        if self.apart and slab.key.endswith("in_proj_qkvz.weight"):
            return self._ungrouped(slab, self._qkvz())
        if self.apart and slab.key.endswith("in_proj_ba.weight"):
            return self._ungrouped(slab, self._ba())
        return [Piece(self._named(slab.key), None, slab.rows, slab.columns)]

    def _named(self, key: str) -> str:
        return self.prefix + key.removeprefix(PREFIX) if key.startswith(PREFIX) else key

    def _stored(self, key: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        expert = EXPERT.fullmatch(key) if self.fused else None
        if expert:
            c, base = self.config, self._named(expert[1])
            sizes = {"gate_up_proj": (2 * c.moe_intermediate_size, c.hidden_size)}
            sizes["down_proj"] = (c.hidden_size, c.moe_intermediate_size)
            return {base + name: (c.num_experts, *size) for name, size in sizes.items()}
        if self.apart and key.endswith(("in_proj_qkvz.weight", "in_proj_ba.weight")):
            parts = self._qkvz() if key.endswith("qkvz.weight") else self._ba()
            heads, sizes = self.config.linear_num_key_heads, {}
            for part in parts:
                sizes[part.name] = sizes.get(part.name, 0) + heads * part.width
            base = self._named(key.rpartition("in_proj_")[0]) + "in_proj_"
            return {f"{base}{name}.weight": (rows, shape[1]) for name, rows in sizes.items()}
        return {self._named(key): shape}

    def _of_fused(self, slab: Slab, base: str, expert: str, name: str) -> Piece:
        """An expert's block in the tensor of all: up's rows follow gate's."""
        if name == "down":
            return Piece(f"{self._named(base)}down_proj", int(expert), slab.rows, slab.columns)
        own = self.config.moe_intermediate_size
        start, stop = slab.rows or (0, own)
        first = own if name == "up" else 0
        return Piece(f"{self._named(base)}gate_up_proj", int(expert), (first + start, first + stop), slab.columns)

    def _qkvz(self) -> list[Component]:
        c = self.config
        dim, wide = c.linear_key_head_dim, c.values_per_key * c.linear_value_head_dim
        keys = c.linear_num_key_heads * dim
        q, k, v = Component("qkv", 0, 0, dim), Component("qkv", keys, dim, dim), Component("qkv", 2 * keys, 2 * dim, wide)
        return [q, k, v, Component("z", 0, 2 * dim + wide, wide)]

    def _ba(self) -> list[Component]:
        ratio = self.config.values_per_key
        return [Component("b", 0, 0, ratio), Component("a", 0, ratio, ratio)]

    def _ungrouped(self, slab: Slab, parts: list[Component]) -> list[Piece]:
        """Rows of a projection grouped by key head as the rows of its components, neighbours joined."""
        base = self._named(slab.key.rpartition("in_proj_")[0]) + "in_proj_"
        each = sum(part.width for part in parts)
        start, stop = slab.rows or (0, self.config.linear_num_key_heads * each)
        ranges: list[tuple[str, int, int]] = []
        while start < stop:
            head, within = divmod(start, each)
            part = next(part for part in parts if within < part.begin + part.width)
            row = part.first + head * part.width + within - part.begin
            count = min(part.begin + part.width - within, stop - start)
            ranges.append((base + part.name, row, row + count))
            start += count
        return [Piece(f"{key}.weight", None, (row, end), slab.columns) for key, row, end in _joined(ranges)]


def _joined(ranges: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """The same rows of tensors with neighbouring ranges joined."""
    found: list[tuple[str, int, int]] = []
    for key, start, stop in ranges:
        if found and (found[-1][0], found[-1][2]) == (key, start):
            start = found.pop()[1]
        found.append((key, start, stop))
    return found
