"""Calls to be tested: plain data that goes to JSON and back, from which the operands follow. `Call` makes one of operands."""

from __future__ import annotations

import functools
import importlib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.compile.passes.form import written_name
from moekit.compile.schedule import Schedule
from moekit.errors import MoekitError, UnavailableError
from moekit.lang.dtypes import itemsize
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph, made_of
from moekit.testing.layouts import READ_ONLY, Layout, lay
from moekit.testing.values import make, shapes_of

RANDOM = "random:"
COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")
PAST_32_BITS = 2**32
_named: dict[str, Fusion] = {}


def _declared() -> dict[str, Fusion]:
    """Moekit's own declarations, and the probes."""
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    return {**PROBES, **FUSIONS}


@functools.lru_cache(maxsize=512)
def find_fusion(name: str) -> Fusion:
    """A fusion by name: moekit's own, one of `moekit.testing.probes`, `module:attribute`, or `random:SEED`.

    Raises UnavailableError for a name that is none of these.
    """
    if name.startswith(RANDOM):
        from moekit.testing.random_graphs import random_fusion

        return random_fusion(int(name.removeprefix(RANDOM)))
    known = {**_named, **_declared()}
    if name in known:
        return known[name]
    if ":" not in name:
        raise UnavailableError(f"there is no fusion {name!r}; name one of {', '.join(_declared())}, or module:attribute")
    found = attribute_of(name)
    if not isinstance(found, Fusion):
        raise UnavailableError(f"{name} is {type(found).__name__}; it must be a declared fusion")
    return found


def attribute_of(name: str) -> Any:
    """What `module:attribute` names; raises UnavailableError where there is none."""
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{name}: {error}") from None


def name_of(fusion: Fusion) -> str:
    """A name by which `find_fusion` finds a declaration: its own if it is moekit's, `module:attribute` if its module has it.

    One that no module holds is known by its name in this process only.
    """
    if _declared().get(fusion.name) is fusion:
        return fusion.name
    module = fusion.fn.__module__
    if getattr(sys.modules.get(module), fusion.name, None) is fusion:
        return f"{module}:{fusion.name}"
    _named[f"local:{fusion.name}"] = fusion
    find_fusion.cache_clear()
    return f"local:{fusion.name}"


@dataclass(frozen=True)
class FuzzCase:
    """One call of the fusion named `fusion`. `sizes` are those of the plain axes.

    `layouts`: of operands by name and of outputs (an InOut operand's output that does not go in place is `<name>_new`);
    contiguous where not said. One that is only named is the one that `lay` makes.
    `mode`: "plain" (the face allocates outputs), "out" (every output is given), "in place" (InOut operands are updated,
    other outputs are given), "over:OUT:OPERAND" (OUT is the operand's own memory, where the declaration allows it).
    `schedule`: one of the names of `moekit.testing.schedules.variants`, or a schedule (None: the heuristic's).
    `woven`: tensors of one shape and dtype take turns in one array, element by element, whatever `layouts` says.
    `operands`: what they hold; else that follows from `recipe` and `seed`. `own`: the fusion, where nothing finds it by name.
    Neither goes to JSON.
    """

    fusion: str
    sizes: Mapping[str, int]
    dtypes: Mapping[str, str]
    params: Mapping[str, object] = field(default_factory=dict)
    layouts: Mapping[str, Layout | str] = field(default_factory=dict)
    mode: str = "out"
    recipe: str = "normal"
    seed: int = 0
    schedule: Schedule | str | None = "heuristic"
    woven: bool = False
    operands: Mapping[str, np.ndarray] | None = field(default=None, compare=False)
    own: Fusion | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What travels between processes: not what was worked out of it, as a declaration may have no name to be found by."""
        return {n: getattr(self, n) for n in self.__dataclass_fields__}

    @functools.cached_property
    def declaration(self) -> Fusion:
        """The fusion itself."""
        return self.own or find_fusion(self.fusion)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        if self.operands is not None:
            return {n: self.operands[n].shape for n in self.dtypes}
        return shapes_of(self.declaration, self.sizes, self.params)

    @functools.cached_property
    def binding(self) -> Binding:
        """The call bound to the declaration; raises MoekitError where it does not fit."""
        fusion = self.declaration
        return fusion.bind(self.shapes, dict(self.dtypes), fusion.bind_params(dict(self.params)))

    @functools.cached_property
    def graph(self) -> Graph:
        """The traced graph."""
        return self.declaration.trace(self.binding)

    @functools.cached_property
    def extents(self) -> dict[str, int]:
        """The size of every axis of the graph."""
        return self.graph.sizes(dict(self.binding.sizes))

    @property
    def names(self) -> list[str]:
        """The outputs, in the order they are returned."""
        return [w.tensor for w in self.graph.writes]

    @functools.cached_property
    def targets(self) -> dict[str, str]:
        """For every output the name of the memory it is written to."""
        over = dict([self.mode.split(":")[1:]]) if self.mode.startswith("over:") else {}
        in_place = self.mode == "in place"
        return {n: over.get(n, written_name(n) if n in self.shapes and not in_place else n) for n in self.names}

    def memory(self) -> list[str]:
        """The names of all tensors of the call: operands, then outputs with memory of their own."""
        return list(dict.fromkeys([*self.shapes, *self.targets.values()]))

    def _written(self, name: str) -> str:
        """The output that is written to memory `name`; the name itself where none is."""
        return next((n for n, target in self.targets.items() if target == name), name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand, an output or an output's memory."""
        found = name if name in self.shapes else self._written(name)
        return self.shapes.get(found) or tuple(self.extents[d.text] for d in self.graph.tensors[found].dims)

    def dtype(self, name: str) -> str:
        """The dtype of an operand, an output or an output's memory."""
        return self.graph.tensors[self._written(name)].dtype

    def layout(self, name: str) -> Layout:
        """The layout of a tensor; of layouts that are only named, stride 0 is for operands that are only read."""
        output, kind = self._written(name), self.layouts.get(name)
        if isinstance(kind, Layout):
            return kind
        if not isinstance(kind := kind or self.layouts.get(output), str):
            return Layout.dense(len(self.shape(name)))
        writable = output != name or name in self.names
        return self.laid(name, "dense" if writable and kind in READ_ONLY else kind)

    def laid(self, name: str, kind: str) -> Layout:
        """The layout of a kind that a tensor always gets."""
        return lay(kind, self.shape(name), itemsize(self.dtype(name)))

    def weave(self) -> dict[str, tuple[str, int, int]]:
        """For every tensor of a woven case: the array it lies in, its turn there, and how many take turns."""
        groups: dict[tuple, list[str]] = {}
        for n in self.memory():
            groups.setdefault((self.shape(n), self.dtype(n)), []).append(n)
        return {n: (f"{names[0]}_and_others", i, len(names)) for names in groups.values() for i, n in enumerate(names)}

    def elements(self, least: int = 0) -> int:
        """Elements of the largest tensor, every axis counted as `least` at least: with 1, what its static sizes cost."""
        return max(math.prod(max(least, s) for s in self.shape(n)) for n in self.memory())

    def values(self) -> dict[str, np.ndarray]:
        """The operands' values; where a stride is 0, elements that are one are equal."""
        given = self._drawn() if self.operands is None else self.operands
        return {n: spread(given[n], self.layout(n)) for n in self.shapes}

    def _drawn(self) -> dict[str, np.ndarray]:
        """The operands by recipe and seed."""
        rng = np.random.default_rng([self.seed, len(self.recipe)])
        found, unique, read = {}, unique_ids(self.graph), read_ids(self.graph)
        for name, shape in self.shapes.items():
            dtype, wide = self.dtypes[name], self.dtypes[name] == "int64"
            if name in unique:
                count = math.prod(shape)
                x = rng.permutation(max(self.extents[unique[name]], count) + 2)[:count].reshape(shape) - 1
                found[name] = (x + (x % 3 == 0) * PAST_32_BITS * wide).astype(dtype)
                continue
            found[name] = make(self.recipe, shape, dtype, rng)
            if found[name].dtype.kind == "i" and name not in read:
                found[name] = rng.integers(-4, 5, shape).astype(dtype) * (PAST_32_BITS + 1 if wide else 1)
        return found

    def to_json(self) -> dict:
        """The case as JSON has it."""
        found = {n: getattr(self, n) for n in self.__dataclass_fields__ if n not in ("operands", "own")}
        found["layouts"] = {n: v.to_json() for n, v in self.layouts.items() if isinstance(v, Layout)}
        return {n: dict(v) if isinstance(v, Mapping) else v for n, v in found.items()}

    @classmethod
    def from_json(cls, data: Mapping) -> FuzzCase:
        """The case that `to_json` wrote."""
        given: dict[str, Any] = dict(data) | {"layouts": {n: Layout.from_json(v) for n, v in data["layouts"].items()}}
        return cls(**given)

    def problem(self) -> str | None:
        """Why the case is no call at all, None if it is one."""
        try:
            nodes = [self.graph.nodes[i] for i in sorted(self.graph.needy)]
        except (MoekitError, TypeError) as error:
            return str(error)
        empty = [n.attr("axis") for n in nodes if self.extents[n.attr("axis")] == 0]
        return f"{self.fusion}: {empty[0]} = 0, and nothing is the largest of nothing" if empty else None


def Call(
    fusion: Fusion,
    operands: Mapping[str, np.ndarray],
    params: Mapping[str, object] | None = None,
    layouts: Mapping[str, Layout | str] | None = None,
    schedule: Schedule | None = None,
    mode: str = "out",
) -> FuzzCase:
    """The case of one call of `fusion` on operands that are given."""
    dtypes = {n: operands[n].dtype.name for n in fusion.tensors if n in operands}
    return FuzzCase(fusion.name, {}, dtypes, params or {}, layouts or {}, mode, "", 0, schedule, False, operands, fusion)


def spread(x: np.ndarray, layout: Layout) -> np.ndarray:
    """The array as it is once laid out: elements that are one are equal."""
    if not layout.zero or not x.size:
        return x
    return np.broadcast_to(x[tuple(slice(0, 1) if d in layout.zero else slice(None) for d in range(x.ndim))], x.shape)


def read_ids(graph: Graph) -> set[str]:
    """Operands that decide what a `gather` reads, where a `place` puts or how far `upto` goes: references index with them."""
    nodes = graph.nodes
    counted = [n for n in nodes if n.op in COMPARED and "iota" in {nodes[a].op for a in n.args}]
    left = [a for n in counted for a in n.args] + [a for n in nodes if n.op == "read" for a in n.args]
    left += [a for n in nodes if n.op == "place" for a in n.args[1:]]
    return {nodes[i].attr("tensor") for i in made_of(nodes, *left) if nodes[i].op == "read"}


def unique_ids(graph: Graph) -> dict[str, str]:
    """Operands that hold the ids of a `put`, which must be unique, with the axis they count along."""
    found = {}
    for w in graph.writes:
        for node in (graph.nodes[i] for i in w.ids):
            while node.op == "cast":
                node = graph.nodes[node.args[0]]
            if node.op == "read":
                dims = zip(graph.tensors[w.tensor].dims, w.index, strict=True)
                found[node.attr("tensor")] = next(d.axis for d, e in dims if e.operands)
    return found
