"""Calls to be tested. `Call` has its operands with it; a `FuzzCase` is plain data from which they follow: it goes to JSON and
back, and has everything that is needed to run the call again.
"""

from __future__ import annotations

import functools
import importlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.compile.passes.form import written_name
from moekit.compile.schedule import Schedule
from moekit.errors import MoekitError, UnavailableError
from moekit.lang.dtypes import itemsize
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph
from moekit.testing.layouts import READ_ONLY, Layout, lay
from moekit.testing.values import make, shapes_of

RANDOM = "random:"
PAST_32_BITS = 2**32


@functools.lru_cache(maxsize=512)
def find_fusion(name: str) -> Fusion:
    """A fusion by name: moekit's own, one of `moekit.testing.probes`, `module:attribute`, or `random:SEED`.

    Raises UnavailableError for a name that is none of these.
    """
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    if name in FUSIONS:
        return FUSIONS[name]
    if name in PROBES:
        return PROBES[name]
    if name.startswith(RANDOM):
        from moekit.testing.random_graphs import random_fusion

        return random_fusion(int(name.removeprefix(RANDOM)))
    if name in _named:
        return _named[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        known = ", ".join((*FUSIONS, *PROBES))
        raise UnavailableError(f"there is no fusion {name!r}; name one of {known}, or module:attribute")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{name}: {error}") from None
    if not isinstance(found, Fusion):
        raise UnavailableError(f"{name} is {type(found).__name__}; it must be a declared fusion")
    return found


_named: dict[str, Fusion] = {}


def name_of(fusion: Fusion) -> str:
    """A name by which `find_fusion` finds a declaration: its own if it is moekit's, `module:attribute` if its module has it.

    One that no module holds is known by its name in this process only.
    """
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    if {**FUSIONS, **PROBES}.get(fusion.name) is fusion:
        return fusion.name
    module = fusion.fn.__module__
    if getattr(sys.modules.get(module), fusion.name, None) is fusion:
        return f"{module}:{fusion.name}"
    _named[f"local:{fusion.name}"] = fusion
    find_fusion.cache_clear()
    return f"local:{fusion.name}"


class AnyCall(ABC):
    """What is known of any call of a declaration, made of what `Call` and `FuzzCase` say.

    `layouts`: of operands by name and of outputs (an InOut operand's output that does not go in place is `<name>_new`);
    contiguous where not said.
    `mode`: "plain" (the face allocates outputs), "out" (every output is given), "in place" (InOut operands are updated,
    other outputs are given), "over:OUT:OPERAND" (OUT is the operand's own memory, where the declaration allows it).
    `woven`: tensors of one shape and dtype take turns in one array, element by element, whatever `layouts` says.
    """

    declaration: Fusion
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    params: Mapping[str, object]
    layouts: Mapping[str, Layout]
    mode: str
    schedule: Schedule | str | None
    recipe: str
    woven: bool

    @abstractmethod
    def values(self) -> dict[str, np.ndarray]:
        """The operands' values; where a stride is 0, elements that are one are equal."""

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
        return dict(self.binding.sizes) | {a: s for a, s in self.graph.axes.items() if s is not None}

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

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand, an output or an output's memory."""
        if name in self.shapes:
            return self.shapes[name]
        found = next((n for n, target in self.targets.items() if target == name), name)
        return self.shapes.get(found) or tuple(self.extents[d.text] for d in self.graph.tensors[found].dims)

    def dtype(self, name: str) -> str:
        """The dtype of an operand, an output or an output's memory."""
        found = next((n for n, target in self.targets.items() if target == name), name)
        return self.graph.tensors[found if found in self.graph.tensors else name].dtype

    def memory(self) -> list[str]:
        """The names of all tensors of the call: operands, then outputs with memory of their own."""
        return list(dict.fromkeys([*self.shapes, *self.targets.values()]))

    def layout(self, name: str) -> Layout:
        """The layout of a tensor, contiguous where none is given."""
        return self.layouts.get(name) or Layout.dense(len(self.shape(name)))

    def weave(self) -> dict[str, tuple[str, int, int]]:
        """For every tensor of a woven case: the array it lies in, its turn there, and how many take turns."""
        groups: dict[tuple, list[str]] = {}
        for n in self.memory():
            groups.setdefault((self.shape(n), self.dtype(n)), []).append(n)
        return {n: (f"{names[0]}_and_others", i, len(names)) for names in groups.values() for i, n in enumerate(names)}


@dataclass(frozen=True)
class Call(AnyCall):
    """One call of `fusion` on operands that are given. `layouts` may name a kind of layout: the one that `lay` makes of it."""

    fusion: Fusion
    operands: Mapping[str, np.ndarray]
    params: Mapping[str, object] = field(default_factory=dict)
    layouts: Mapping[str, Layout | str] = field(default_factory=dict)
    schedule: Schedule | None = None
    mode: str = "out"
    recipe = ""
    woven = False

    @property
    def declaration(self) -> Fusion:
        """The fusion itself."""
        return self.fusion

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        return {n: self.operands[n].shape for n in self.fusion.tensors if n in self.operands}

    @property
    def dtypes(self) -> dict[str, str]:
        """The dtype of every operand."""
        return {n: self.operands[n].dtype.name for n in self.shapes}

    def layout(self, name: str) -> Layout:
        """The layout of a tensor; stride 0 is for operands that are only read."""
        output = next((n for n, target in self.targets.items() if target == name), None)
        kind = self.layouts.get(name) or self.layouts.get(output or name, "dense")
        if not isinstance(kind, str):
            return kind
        written = output is not None or name in self.names
        return lay("dense" if written and kind in READ_ONLY else kind, self.shape(name), itemsize(self.dtype(name)))

    def values(self) -> dict[str, np.ndarray]:
        """The operands; where a stride is 0, elements that are one are equal."""
        return {n: spread(self.operands[n], self.layout(n)) for n in self.shapes}


@dataclass(frozen=True)
class FuzzCase(AnyCall):
    """One call of the fusion named `fusion`, its operands drawn by `recipe` and `seed`. `sizes` are those of the plain axes;
    `schedule` is one of the names of `moekit.testing.schedules.variants`."""

    fusion: str
    sizes: Mapping[str, int]
    dtypes: Mapping[str, str]
    params: Mapping[str, object] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    mode: str = "out"
    recipe: str = "normal"
    seed: int = 0
    schedule: str = "heuristic"
    woven: bool = False

    @property
    def declaration(self) -> Fusion:
        """The fusion itself."""
        return find_fusion(self.fusion)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every operand."""
        return shapes_of(self.declaration, self.sizes)

    def elements(self) -> int:
        """Elements of the largest tensor."""
        return max(int(np.prod(self.shape(n))) for n in self.memory())

    def weight(self) -> int:
        """Elements of the largest tensor, were no axis empty: what its static sizes cost."""
        return max(int(np.prod([max(1, s) for s in self.shape(n)])) for n in self.memory())

    def values(self) -> dict[str, np.ndarray]:
        """The operands' values, by recipe and seed; where a stride is 0, elements that are one are equal."""
        rng = np.random.default_rng([self.seed, len(self.recipe)])
        arrays, ids = {}, unique_ids(self.graph)
        for name, shape in self.shapes.items():
            if name in ids:
                largest = max(self.extents[ids[name]], int(np.prod(shape))) + 2
                x = rng.permutation(largest)[: int(np.prod(shape))].reshape(shape) - 1
                arrays[name] = (x + (x % 3 == 0) * PAST_32_BITS * (self.dtypes[name] == "int64")).astype(self.dtypes[name])
                continue
            x = make(self.recipe, shape, self.dtypes[name], rng)
            if x.dtype.kind == "i" and name not in read_ids(self.graph):
                x = rng.integers(-4, 5, shape).astype(x.dtype)
                x = x * (PAST_32_BITS + 1) if x.dtype == np.int64 else x
            arrays[name] = spread(x, self.layout(name))
        return arrays

    def to_json(self) -> dict:
        """The case as JSON has it."""
        found = {n: getattr(self, n) for n in self.__dataclass_fields__}
        found["layouts"] = {n: v.to_json() for n, v in self.layouts.items()}
        return {n: dict(v) if isinstance(v, Mapping) else v for n, v in found.items()}

    @classmethod
    def from_json(cls, data: Mapping) -> FuzzCase:
        """The case that `to_json` wrote."""
        given: dict[str, Any] = dict(data) | {"layouts": {n: Layout.from_json(v) for n, v in data["layouts"].items()}}
        return cls(**given)

    def problem(self) -> str | None:
        """Why the case is no call at all, None if it is one."""
        try:
            nodes = [n for n in self.graph.nodes if n.op == "reduce" and n.attr("kind") != "sum"]
        except (MoekitError, TypeError) as error:
            return str(error)
        empty = [n.attr("axis") for n in nodes if self.extents[n.attr("axis")] == 0]
        return f"{self.fusion}: {empty[0]} = 0, and nothing is the largest of nothing" if empty else None


def spread(x: np.ndarray, layout: Layout) -> np.ndarray:
    """The array as it is once laid out: elements that are one are equal."""
    if not layout.zero or not x.size:
        return x
    return np.broadcast_to(x[tuple(slice(0, 1) if d in layout.zero else slice(None) for d in range(x.ndim))], x.shape)


def read_ids(graph: Graph) -> set[str]:
    """Operands of which a `gather` takes its ids, as they are: they stay where a reference may index with them."""
    by = {a for n in graph.nodes if n.op == "read" for a in n.args}
    return {graph.nodes[i].attr("tensor") for i in by if graph.nodes[i].op == "read"}


def unique_ids(graph: Graph) -> dict[str, str]:
    """Operands that hold the ids of a `put`, which must be unique, with the axis they count along."""
    found = {}
    for w in graph.writes:
        for i in w.ids:
            while graph.nodes[i].op == "cast":
                i = graph.nodes[i].args[0]
            if graph.nodes[i].op == "read":
                axis = next(
                    d.axis for d, e in zip(graph.tensors[w.tensor].dims, w.index, strict=True) if not hasattr(e, "axis")
                )
                found[graph.nodes[i].attr("tensor")] = axis
    return found
