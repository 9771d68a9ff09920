"""The layouts of contiguous tensors: what is compiled and timed where nothing else is known."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from moekit.compile import tile as t
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Tensor


def contiguous(graph: Graph, sizes: Mapping[str, int]) -> dict[str, t.Strided]:
    """The stride classes of every tensor of a graph, all contiguous; `sizes` of all axes, dynamic ones too."""
    extents = dict(sizes) | {a: s for a, s in graph.axes.items() if s is not None}
    return {x.name: _strided(x, extents) for x in graph.tensors.values()}


def _strided(x: Tensor, extents: Mapping[str, int]) -> t.Strided:
    shape = [1 if a is None else extents[a] for a in x.axes]
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    kinds = (
        "unit" if s == 1 or x.axes[d] is None else "any" if s * itemsize(x.dtype) % 16 else "aligned"
        for d, s in enumerate(strides)
    )
    return t.Strided(tuple(kinds))
