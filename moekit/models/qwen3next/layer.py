"""The weights of all layers in few arrays, each read in place.

What a host spends to dispatch a step is its arguments: about 2 µs for each array beside two H200s, whatever it holds
(docs/performance_tried.md). A layer has a dozen weights and more, so they share arrays. `rows`, one for each layer: as wide as
the hidden states, with one weight above the other. `down`, one for each layer: the experts' projections back. `out`, one for
each kind of layer: its mixers' projections back, stacked. `small`, float32, one for all: a row for each layer, of what is no
matrix of the hidden states' width. XLA (0.11.2) reads a product's slice of an array in place, but copies one that it contracts
along the rows that it slices, as it would `down`. Kernels take Views; what they pick out of `small` is a number at run time, so
that one kernel serves every layer. Where weights stay float8, `rows8` are to them what `rows` are to the others, and each
kind of scales, and the shared experts' projections back, is one stack over the layers that have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moekit.jax import View, view

ROWS, SMALL, OUT, DOWN, ROWS8, STACK = "rows", "small", "out", "down", "rows8", "stack"
HOMES = (ROWS, SMALL, OUT, DOWN, ROWS8)
STACKED = (SMALL, OUT, STACK)  # arrays of several layers
SCALE = "_scale"  # what the name of a weight's scales ends with, behind the weight's
Shapes = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Part:
    """Where one weight lies: in the array `home`, from row (of `small`: element of its layer's) `start` on; its shape.

    What has a stack of its own is told by name. block: of scales, the rows and columns of a matrix that each is of.
    """

    home: str
    start: int
    shape: tuple[int, ...]
    block: tuple[int, int] | None = None

    @property
    def stop(self) -> int:
        """The row or element after its last."""
        return self.start + prod(self.shape if self.home == SMALL else self.shape[:-1])


@dataclass(frozen=True)
class Layout:
    """Where all weights of a layer lie in one rank's share, and the shapes of its arrays, in the order of HOMES."""

    parts: tuple[tuple[str, Part], ...]
    shapes: tuple[tuple[int, ...], ...]

    def __getitem__(self, name: str) -> Part:
        return dict(self.parts)[name]

    def __contains__(self, name: str) -> bool:
        return any(known == name for known, _ in self.parts)


def arranged(
    weights: Shapes, width: int, kinds: Iterable[Shapes], spare: int = 0, blocks: Mapping[str, tuple[int, int]] | None = None
) -> Layout:
    """The weights of one kind of layer in order, given their shapes and homes.

    Its rows and small elements are as many as the largest of `kinds` has, so that a kernel of one serves the others. A stack of
    matrices is viewed in an array of blocks of its own last two dimensions: it comes first, and the rows are whole blocks. A
    matrix of `small` is viewed in rows of its own width, likewise.
    spare: rows behind the last weight, for `Layer.together`. blocks: what each of the scales is of, by name.
    """
    parts: list[tuple[str, Part]] = []
    at: dict[str, int] = dict.fromkeys(HOMES, 0)
    alone: dict[str, tuple[int, ...]] = {OUT: (0, 0), DOWN: (0, 0, 0)}
    for name, (shape, home) in weights.items():
        if len(shape) == (2 if home == SMALL else 3) and home in (ROWS, ROWS8, SMALL) and at[home]:
            raise ValueError(
                f"{name} has {len(shape)} dimensions and comes behind other weights of its array; it must come first"
            )
        parts.append((name, Part(home, at.get(home, 0), shape, (blocks or {}).get(name))))
        at |= {home: parts[-1][1].stop} if home in at else {}
        alone |= {home: shape} if home in alone else {}
    every = [known.values() for known in kinds]

    def rows(home: str, more: int) -> int:
        step = max((shape[1] for known in every for shape, own in known if own == home and len(shape) == 3), default=1)
        most = max(sum(prod(shape[:-1]) for shape, own in known if own == home) for known in every)
        return -(-(most + more) // step) * step

    wide = max((shape[1] for known in every for shape, home in known if home == SMALL and len(shape) == 2), default=1)
    small = max(sum(prod(shape) for shape, home in known if home == SMALL) for known in every)
    shapes = ((rows(ROWS, spare), width), (-(-small // wide) * wide,), alone[OUT], alone[DOWN], (rows(ROWS8, 0), width))
    return Layout(tuple(parts), shapes)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "small", "out", "down", "at", "rows8", "stacks"), meta_fields=("layout",),
)  # fmt: skip
@dataclass(frozen=True)
class Layer:
    """One rank's weights of one layer.

    rows [R, H], out [H, W] and down [E, I, H] are its own, small [L, S] float32 is that of all layers, of which it is number
    `at`, an int32. `layer["q_proj"]` is a weight as an array, `layer.view("router")` as a View of what holds it.
    rows8 [R8, H] float8, or none; stacks: by name, scales, float32 [n, …], and what else kernels pick out of an array of
    several layers, with the layer's place there.
    """

    rows: Any
    small: Any
    out: Any
    down: Any
    at: Any
    layout: Layout
    rows8: Any = None
    stacks: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> jax.Array:
        part = self.layout[name]
        if part.home == STACK:
            held, at = self.stacks[name]
            return lax.dynamic_index_in_dim(held, at, keepdims=False)
        if part.home == SMALL:
            held = lax.dynamic_index_in_dim(self.small, self.at, keepdims=False)
        else:
            held = getattr(self, part.home)
        return held if part.home in (OUT, DOWN) else held[part.start : part.stop].reshape(part.shape)

    def block(self, name: str) -> tuple[int, int]:
        """Rows and columns of a weight that share a scale."""
        block = self.layout[name + SCALE].block
        assert block is not None, name
        return block

    def together(self, *names: str, multiple: int = 1) -> jax.Array:
        """Matrices that are neighbours as one, and rows of any content after them up to a multiple."""
        return self.beside(*names, multiple=multiple).array()

    def beside(self, *names: str, multiple: int = 1) -> View:
        """The same as they lie, for a kernel."""
        if len(names) == 1 and multiple == 1:
            return self.view(*names)
        parts = [self.layout[name] for name in names]
        if any(a.home not in (ROWS, ROWS8) or (a.home, a.stop) != (b.home, b.start) for a, b in pairwise(parts)):
            raise ValueError(f"{', '.join(names)} are no neighbours among the rows")
        start, count = parts[0].start, parts[-1].stop - parts[0].start
        rows = self.rows8 if parts[0].home == ROWS8 else self.rows
        return view(rows)[start : start + -(-count // multiple) * multiple]

    def view(self, name: str) -> View:
        """A weight as it lies, for a kernel."""
        part = self.layout[name]
        if name in self.stacks:
            held, at = self.stacks[name]
            return view(held)[at]
        rows = self.rows8 if part.home == ROWS8 else self.rows
        if part.home in (OUT, DOWN):
            return view(getattr(self, part.home))
        if part.home == SMALL:
            if len(part.shape) == 1:
                return view(self.small)[self.at, part.start : part.stop]
            count, width = part.shape
            first = part.start // width
            return view(self.small.reshape(self.small.shape[0], -1, width))[self.at, first : first + count]
        if len(part.shape) == 1:
            return view(rows)[part.start]
        if len(part.shape) == 2:
            return view(rows)[part.start : part.stop]
        count, block, width = part.shape
        first = part.start // block
        return view(rows.reshape(-1, block, width))[first : first + count]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "small", "out", "down", "rows8", "stacks"), meta_fields=("layouts", "kinds"),
)  # fmt: skip
@dataclass(frozen=True)
class Layers:
    """The weights of all layers, or what stands for them: arrays cut along their first axis, a rank's share as layouts say.

    rows, down: an array for each layer. out: one for each kind of layer. small: one. They are float32 if small, in the model's
    dtype the others. layouts, kinds: of each layer. A Layer is one rank's: `layers[i]` is for code that runs on every rank.
    Weights that stay float8 are in rows8, an array for each layer, in down and out; their scales, float32, and what else stands
    in none of these, in stacks, one for each name.
    """

    rows: tuple[Any, ...]
    small: Any
    out: dict[str, Any]
    down: tuple[Any, ...]
    layouts: tuple[Layout, ...]
    kinds: tuple[str, ...]
    rows8: tuple[Any, ...] = ()
    stacks: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Layer:
        out = self.out[self.kinds[i]][self.place(i)]
        rows8 = self.rows8[i] if self.rows8 else None
        stacks = {n: (a, jnp.int32(self.nth(n, i))) for n, a in self.stacks.items() if n in self.layouts[i]}
        for name, part in self.layouts[i].parts if self.stacks else ():
            if part.home == OUT:
                stacks[name] = (self.out[self.kinds[i]], jnp.int32(self.place(i)))
        return Layer(self.rows[i], self.small, out, self.down[i], jnp.int32(i), self.layouts[i], rows8, stacks)

    def __iter__(self) -> Iterator[Layer]:
        return (self[i] for i in range(len(self)))

    def nth(self, name: str, i: int) -> int:
        """Which layer i is of those that have a weight of this name."""
        return sum(name in layout for layout in self.layouts[:i])

    def place(self, i: int) -> int:
        """Which of its kind layer i is."""
        return self.kinds[:i].count(self.kinds[i])
