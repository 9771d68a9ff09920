"""What rules of errors (`moekit.testing.propagate`) take and give: an evaluation of a Graph, and values with their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moekit.lang.dtypes import numpy_dtype
from moekit.lang.graph import Graph

UNIT = 2.0**-24  # half an ulp of float32, relative
LARGEST = float(np.finfo(np.float32).max)
TINY = 2.0**-126  # its smallest normal number: anything smaller may read as zero


class Evaluation:
    """One evaluation of a graph. Every array has a dimension for each axis of the graph, of size 1 where it does not vary."""

    def __init__(self, graph: Graph, inputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]):
        self.graph, self.inputs = graph, inputs
        self.sizes = {a: sizes[a] if s is None else s for a, s in graph.axes.items()}
        self.order = {a: i for i, a in enumerate(self.sizes)}
        self.nodes: dict[int, Bound] = {}

    def along(self, x: np.ndarray, axis: str | None) -> np.ndarray:
        """The one-dimensional `x` as an array that varies along `axis`."""
        return x.reshape([x.size if a == axis else 1 for a in self.order])

    def whole(self, x: Bound, axis: str) -> Bound:
        """`x` with axis `axis` at its full size."""
        size, at = self.sizes[axis], self.order[axis]
        return x.each(lambda v: np.broadcast_to(v, (*v.shape[:at], size, *v.shape[at + 1 :])))

    def full(self, value: float, dtype: str) -> np.ndarray:
        """An array of one value, which varies along no axis."""
        return np.full((1,) * len(self.order), value, numpy_dtype(dtype))


@dataclass(frozen=True)
class Bound:
    """A value with its errors, in arrays that broadcast together; `exact` is None where bits are not
    determined.

    `product` says that a compiler may fuse the value into an addition. `terms`: of a contraction, or of what it was added to,
    the terms' magnitudes added up, as one may begin where another ended. An infinite error: nothing is known of the value, as
    float32 overflowed on the way.
    """

    value: np.ndarray
    noise: np.ndarray
    flips: np.ndarray
    exact: np.ndarray | None = None
    product: bool = False
    terms: np.ndarray | None = None

    def error(self, constant: float = 1.0) -> np.ndarray:
        """The total for a given constant."""
        return constant * self.noise + self.flips

    def each(self, f: Callable) -> Bound:
        """`f` applied to every array."""
        exact, terms = (None if x is None else f(x) for x in (self.exact, self.terms))
        return Bound(f(self.value), f(self.noise), f(self.flips), exact, self.product, terms)
