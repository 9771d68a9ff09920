"""Splitting a contracted axis: a graph of partial results, the graph that adds them up, and the scratch between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moekit.compile.analysis import once, part_axis
from moekit.lang.graph import Along, Graph, Node, Tensor, Write
from moekit.lang.spec import Dim

PARTIAL = "partial"  # the name of a split's first launch, and of what it leaves to the second


@dataclass(frozen=True)
class Scratch:
    """Memory one launch writes and the next reads; dense, outermost axis first. A None size is dynamic."""

    name: str
    dtype: str
    axes: tuple[str, ...]
    sizes: tuple[int | None, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The extents, with dynamic axes filled in."""
        return tuple(sizes[a] if s is None else s for a, s in zip(self.axes, self.sizes, strict=True))


@once
def cut(graph: Graph, axis: str, parts: int) -> tuple[Graph, Graph, tuple[Scratch, ...]]:
    """Split a graph at its reductions over `axis`: partial results to scratch, then the rest from there."""
    part = part_axis(axis)
    targets = [i for i in graph.live() if graph.nodes[i].op in ("reduce", "contract") and graph.nodes[i].attr("axis") == axis]
    axes = {part: parts, **graph.axes}
    scratch, tensors, writes = (
        [],
        {n: replace(x, role="In") for n, x in graph.tensors.items() if x.role != "Out"},
        [],
    )
    for number, i in enumerate(targets):
        node = graph.nodes[i]
        s = Scratch(f"{PARTIAL}_{number}", node.dtype, (part, *node.axes), (parts, *(graph.axes[a] for a in node.axes)))
        scratch.append(s)
        tensors[s.name] = Tensor(
            s.name, "Out", tuple(Dim.parse(a) if a != part else Dim(a, ((1, a),)) for a in s.axes), s.dtype
        )
        writes.append(Write(s.name, i, tuple(Along(a) for a in s.axes)))
    first = replace(graph, name=f"{graph.name}_{PARTIAL}", axes=axes, tensors=tensors, writes=tuple(writes))
    return first, _rest(graph, targets, scratch, axes, tensors), tuple(scratch)


def _rest(graph: Graph, targets: list[int], scratch: list[Scratch], axes, tensors) -> Graph:
    """The graph with every target replaced by the sum (max, min) of its parts."""
    nodes: list[Node] = []
    moved: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        if i in targets:
            s = scratch[targets.index(i)]
            index = tuple(Along(a) for a in s.axes)
            ordered = tuple(a for a in axes if a in s.axes)
            nodes.append(Node("read", (), (("tensor", s.name), ("index", index)), ordered, s.dtype))
            kind = "sum" if node.op == "contract" else node.attr("kind")
            node = Node("reduce", (len(nodes) - 1,), (("kind", kind), ("axis", s.axes[0])), node.axes, node.dtype)
        else:
            node = replace(node, args=tuple(moved[a] for a in node.args))
        moved[i] = len(nodes)
        nodes.append(node)
    return replace(
        graph,
        name=f"{graph.name}_combine",
        axes=axes,
        tensors={**{s.name: replace(tensors[s.name], role="In") for s in scratch}, **graph.tensors},
        nodes=tuple(nodes),
        writes=tuple(replace(w, value=moved[w.value], ids=tuple(moved[n] for n in w.ids)) for w in graph.writes),
        names={moved[i]: name for i, name in graph.names.items()},
        lines={moved[i]: line for i, line in graph.lines.items()},
    )
