"""A layer's weights in four arrays, each read in place.

What a host spends to dispatch a step is its arguments: 0.8 µs each and device beside an H200, whatever they hold. A layer of
a dozen weights and more is therefore four arrays: `rows`, as wide as the hidden states, with one weight above the other;
`small`, float32, for what is no matrix of that width; and, by themselves, `out`, the mixer's projection back, and `down`, that
of the experts. XLA (0.11.2) reads a product's slice of `rows` in place, but copies one that it contracts along the rows, as it
would with those two. Kernels take Views.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from moekit.jax import View, view

ROWS, SMALL, OUT, DOWN = "rows", "small", "out", "down"
HOMES = (ROWS, SMALL, OUT, DOWN)
Shapes = Mapping[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True)
class Part:
    """Where one weight lies: in the array `home`, from row (of `small`: element) `start` on; its shape."""

    home: str
    start: int
    shape: tuple[int, ...]

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


def arranged(weights: Shapes, width: int, kinds: Iterable[Shapes]) -> Layout:
    """The weights of one kind of layer in order, given their shapes and homes.

    Its rows and small elements are as many as the largest of `kinds` has, so that a kernel of one serves the others. A stack of
    matrices is viewed in an array of blocks of its own last two dimensions: it comes first, and the rows are whole blocks.
    """
    parts: list[tuple[str, Part]] = []
    at: dict[str, int] = dict.fromkeys(HOMES, 0)
    alone: dict[str, tuple[int, ...]] = {OUT: (0, 0), DOWN: (0, 0, 0)}
    for name, (shape, home) in weights.items():
        if len(shape) == 3 and home == ROWS and at[home]:
            raise ValueError(f"{name} is a stack of matrices behind other weights; it must come first")
        parts.append((name, Part(home, at[home], shape)))
        at[home] = parts[-1][1].stop
        alone |= {home: shape} if home in alone else {}
    every = [known.values() for known in kinds]
    step = max((shape[1] for known in every for shape, home in known if home == ROWS and len(shape) == 3), default=1)
    most = max(sum(prod(shape[:-1]) for shape, home in known if home == ROWS) for known in every)
    small = max(sum(prod(shape) for shape, home in known if home == SMALL) for known in every)
    return Layout(tuple(parts), ((-(-most // step) * step, width), (small,), alone[OUT], alone[DOWN]))


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True)
class Layer:
    """One layer's weights, or what stands for them: `arrays` by home, float32 the small one, in the model's dtype the others.

    Over a mesh they are cut along their first axis, a rank's share as `layout` says. `layer["q_proj"]` is a weight as an array,
    `layer.view("router")` as a View of what holds it.
    """

    arrays: dict[str, Any]
    layout: Layout

    def __getitem__(self, name: str) -> jax.Array:
        part = self.layout[name]
        if part.home in (OUT, DOWN):
            return self.arrays[part.home]
        return self.arrays[part.home][part.start : part.stop].reshape(part.shape)

    def view(self, name: str) -> View:
        """A weight as it lies, for a kernel."""
        part = self.layout[name]
        held = self.arrays[part.home]
        if part.home in (OUT, DOWN):
            return view(held)
        if part.home == SMALL and len(part.shape) != 1:
            raise ValueError(f"{name} has shape {part.shape} and no View: its array has one dimension")
        if part.home == SMALL or len(part.shape) == 2:
            return view(held)[part.start : part.stop]
        if len(part.shape) == 1:
            return view(held)[part.start]
        count, block, width = part.shape
        first = part.start // block
        return view(held.reshape(-1, block, width))[first : first + count]

    def tree_flatten(self):
        """The arrays, in the order of HOMES."""
        return tuple(self.arrays[home] for home in HOMES), self.layout

    @classmethod
    def tree_unflatten(cls, layout, children) -> Layer:
        """The same layout around other arrays."""
        return cls(dict(zip(HOMES, children, strict=True)), layout)
