"""Which of JAX's two ways from Pallas to a GPU is faster for a call, its Triton lowering or Mosaic GPU: tables of measurements.

A row of a GPU's table is of a graph, with its static sizes and dtypes; it has both's microseconds at several numbers of tokens,
for operands that are whole arrays and for such as are columns of larger ones. Each way adds up in an order of its own and has
functions of its own, so one serves all of these: a row's bits do not depend on the rows beside it. What was not measured goes
by the Triton lowering.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib import metadata, resources
from math import gcd, prod

from moekit.backends.mosaic import unprinted
from moekit.compat import release
from moekit.compile import tile as t
from moekit.compile.schedule.facts import once
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Tensor
from moekit.tune.table import graph_key

TRITON, MOSAIC = "pallas-triton", "mosaic"
LAYOUTS = ("whole", "columns")  # that a row needs
ALIGNED = 16  # bytes
WON, LOST = 0.95, 1.1  # of the Triton lowering's time: so little over all numbers of tokens, and no more at any
Times = Mapping[str, Sequence[float]]
Placed = tuple[t.Viewed, Tensor]  # where a tensor lies


@lru_cache(maxsize=16)
def table(device: str) -> Mapping[str, Mapping[str, Times]]:
    """The shipped table of a device, by graph key and kind of layout; empty for a device nobody measured, and under a jax of
    another release, whose compilers are others."""
    made = _shipped().get(device, {})
    return made["entries"] if made and release(made["made with"]["jax"]) == release(_jax()) else {}


@cache
def _shipped() -> Mapping[str, Mapping]:
    """All tables, by device."""
    files = (p for p in (resources.files("moekit.tune") / "ways").iterdir() if p.name.endswith(".json"))
    return {made["gpu"]: made for made in (json.loads(p.read_text(encoding="utf-8")) for p in files)}


def served_by_mosaic(graph: Graph) -> list[str]:
    """The GPUs on which calls of a graph whose operands lie in rows go by Mosaic GPU."""
    return [device for device in _shipped() if way(device, graph) == MOSAIC]


def _jax() -> str:
    try:
        return metadata.version("jax")
    except metadata.PackageNotFoundError:
        return "0"


def faster(times: Times) -> bool:
    """Whether Mosaic GPU wins a row of a table: clearly by the geometric mean over the numbers of tokens, and nowhere by far
    behind."""
    ratios = [mine / other for mine, other in zip(times[MOSAIC], times[TRITON], strict=True)]
    return prod(ratios) <= WON ** len(ratios) and max(ratios) <= LOST


def way(device: str, graph: Graph) -> str:
    """What serves calls of a graph on a device whose operands lie in rows, whatever their number: `TRITON` or `MOSAIC`."""
    row = table(device).get(_key(graph), {}) if table(device) else {}
    return MOSAIC if _won(row) and _printed(graph) else TRITON


def won(device: str) -> list[str]:
    """The fusions of which a device's table has rows that Mosaic GPU wins, at some sizes and dtypes."""
    rows = table(device).items()
    return list(dict.fromkeys(key.split()[0] for key, row in rows if _won(row)))


def _won(row: Mapping[str, Times]) -> bool:
    return all(layout in row and faster(row[layout]) for layout in LAYOUTS)


_key = once(graph_key)


@once
def _printed(graph: Graph) -> bool:
    return unprinted(graph, {a: 8 for a, n in graph.axes.items() if n is None}) is None


def in_rows(graph: Graph, placed: Iterable[Placed]) -> bool:
    """Whether every tensor of a call lies as aligned as an array of its own: elements of its last static axis side by side,
    and all else at multiples of 16 bytes, or of what such an array has. Other tokens of the same arrays do so, too."""
    return all(_in_rows(graph, at, tensor) for at, tensor in placed)


def _in_rows(graph: Graph, at: t.Viewed, tensor: Tensor) -> bool:
    sizes = [1 if axis is None else graph.axes[axis] or 1 for axis in tensor.axes]
    inner = max((d for d, size in enumerate(sizes) if size > 1), default=None)
    if inner is None:
        return True  # one element of a token, wherever it is
    if (at.axes[inner], at.steps[inner]) != (len(at.base) - 1, 1):
        return False
    pitch = [prod(at.base[axis + 1 :]) for axis in range(len(at.base))]
    begins = [index * pitch[axis] for axis, index in at.fixed] + [pitch[axis] for axis, _ in at.picked]
    for d, axis in enumerate(tensor.axes):
        one = pitch[at.axes[d]]
        if axis is not None and graph.axes[axis] is None:
            begins.append(one)  # of tokens every one counts, or which of them there are would decide
        else:
            begins += [at.starts[d] * one, *([at.steps[d] * one] if d != inner else [])]
    size = itemsize(tensor.dtype)
    return not any(b * size % gcd(ALIGNED, sizes[inner] * size) for b in begins)
