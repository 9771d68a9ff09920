"""Cutting a graph into launches, and launches into sections: the graphs of each, and the scratch between launches."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from moekit.compile.schedule.directives import Launch, Schedule, Section, Split, Stage
from moekit.compile.schedule.facts import FOLDS, ends, folded, once, part_axis, within_turns
from moekit.lang.elementwise import IDENTITY
from moekit.lang.graph import Graph, Index, Node, Tensor, Write
from moekit.lang.spec import Dim

PARTIAL, STAGED = "partial", "staged"  # what a cut leaves to the next launch is called so
NOUNS = {"contract": "product", "exp_sum": "weighed", "place": "placed", "cast": "rounded"}


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


def launched(graph: Graph, schedule: Schedule) -> Iterator[tuple[Launch, Graph, tuple[Scratch, ...]]]:
    """Each launch with the graph it computes and the scratch that it leaves to the next."""
    for launch in schedule.launches:
        if launch.cut is None:
            yield launch, graph, ()
        else:
            first, graph, scratch = cut(graph, launch.cut)
            yield launch, first, scratch


def sections_of(graph: Graph, launch: Launch) -> list[tuple[Graph, Section]]:
    """The sections of a launch that computes `graph`, each with its own part of it."""
    return [(part(graph, s.outputs), s) for s in launch.sections]


@once
def part(graph: Graph, outputs: tuple[str, ...]) -> Graph:
    """The graph with some of its outputs (none said: all); an InOut tensor that is not among them is only read."""
    if not outputs or len(outputs) == len(graph.writes):
        return graph
    writes = tuple(w for w in graph.writes if w.output in outputs)
    mine = {w.tensor for w in writes}
    tensors = {n: t for n, t in graph.tensors.items() if t.role != "Out" or n in mine}
    tensors = {n: replace(t, role="In") if t.role == "InOut" and n not in mine else t for n, t in tensors.items()}
    first = writes[0].tensor
    name = graph.name.removesuffix(f"_{PARTIAL}") if first.startswith(f"{PARTIAL}_") else graph.name
    return replace(graph, name=f"{name}_{first}", tensors=tensors, writes=writes)


def stageable(graph: Graph) -> dict[str, int]:
    """The values that may be staged, by name: products, sums, narrowing casts, and what is placed.

    One that the declaration does not name is called by what it is, and along what (`sum_d`), with a number behind it where
    several are.
    """
    kept = {w.value for w in graph.writes} | {n.args[2] for n in graph.live_nodes("exp_sum")}
    wider = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
    found: dict[str, int] = {}
    taken = {*graph.names.values()}
    for i in graph.live():
        node = graph.nodes[i]
        narrows = node.op == "cast" and wider.get(graph.nodes[node.args[0]].dtype, 0) > wider.get(node.dtype, 9)
        if i not in kept and i not in within_turns(graph) and (node.op in (*FOLDS, "place") or narrows):
            found[graph.names.get(i) or _free(_noun(node), taken | {*found})] = i
    return found


def _noun(node: Node) -> str:
    """What a value is, and along what it was added up: `sum_d`, `rounded`."""
    said = dict(node.attrs)
    along = f"_{said['axis']}" if "axis" in said else ""
    return re.sub(r"\W", "_", f"{NOUNS.get(node.op) or said['kind']}{along}").lower()


@once
def cut(graph: Graph, how: Split | Stage) -> tuple[Graph, Graph, tuple[Scratch, ...]]:
    """The graph of one launch, that of the rest, and the scratch between.

    A `Split` cuts at all reductions over its axis: partial results, then their sums. A `Stage` cuts at values.
    """
    if isinstance(how, Stage):
        names = {stageable(graph)[v]: _free(f"{STAGED}_{v}", graph.tensors) for v in how.values}
        first = "_".join((STAGED, *how.values)) if len(names) > 1 else next(iter(names.values()))
        return _cut(graph, names, first, None)
    targets = [i for i in graph.live() if folded(graph.nodes[i]) == how.axis]
    names = {i: _free(f"{PARTIAL}_{n}", graph.tensors) for n, i in enumerate(targets)}
    return _cut(graph, names, PARTIAL, (part_axis(how.axis), how.count), how)


def _free(name: str, taken: Collection[str]) -> str:
    """`name`, or with a number behind it where it is taken."""
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _cut(graph: Graph, targets: dict[int, str], first_name: str, parts: tuple[str, int] | None, how: Split | None = None):
    """Nodes `targets` to scratch of these names, one for each part where there are parts; and the rest from there.

    Of parts of a number of elements each, where all targets end at one element of the axis, those past that are not read, nor
    written: what is put at the number of no part is not.
    """
    extra = dict([parts] if parts else [])
    axes = {**extra, **graph.axes}
    scratch = {}
    for i, name in targets.items():
        node = graph.nodes[i]
        scratch[i] = Scratch(name, node.dtype, (*extra, *node.axes), (*extra.values(), *(graph.axes[a] for a in node.axes)))
    made = {s.name: _tensor(s, "Out", extra) for s in scratch.values()}
    tensors = {n: replace(x, role="In") for n, x in graph.tensors.items() if x.role != "Out"} | made
    writes = tuple(_made(graph, i, s) for i, s in scratch.items())
    ending = _ending(graph, targets, how)
    nodes = list(graph.nodes)
    if ending:
        number, begun = _begun(nodes, axes, *ending)
        place = _node(nodes, axes, "where", (begun, number, _node(nodes, axes, "const", attrs=(("value", -1),))))
        writes = tuple(replace(w, index=(Index.of(0), *w.index[1:]), ids=(place,)) for w in writes)
    each = {how.axis: how.each} if how and how.each else {}
    named = f"{graph.name}_{first_name}"
    first = replace(graph, name=named, axes=axes, tensors=tensors, nodes=tuple(nodes), writes=writes, each=each)
    return first, _rest(graph, scratch, axes, extra, ending), tuple(scratch.values())


def _ending(graph: Graph, targets: Iterable[int], how: Split | None) -> tuple[Split, int] | None:
    """A split in parts of a number of elements with the node of the element where all that it cuts ends, if it does."""
    found = {ends(graph, i) for i in targets} if how and how.each else set()
    end = found.pop() if len(found) == 1 else None
    return None if how is None or end is None else (how, end)


def _node(nodes: list[Node], order: Iterable[str], op: str, args: tuple = (), attrs: tuple = (), dtype: str = "int32") -> int:
    """The number of a new node, which varies over what its operands, or its index, vary over."""
    varies = {a for i in args for a in nodes[i].axes} | {a for _, x in attrs if isinstance(x, Index) for a in x.axes}
    nodes.append(Node(op, args, attrs, tuple(a for a in order if a in varies), dtype))
    return len(nodes) - 1


def _begun(nodes: list[Node], axes: Mapping[str, int | None], how: Split, end: int) -> tuple[int, int]:
    """The number of a part, and whether one of so many elements begins before element `end`."""

    def const(value: int) -> int:
        return _node(nodes, axes, "const", attrs=(("value", value),))

    number = _node(nodes, axes, "iota", attrs=(("index", Index.of(part_axis(how.axis))),))
    there = _node(nodes, axes, "minimum", (end, const(axes[how.axis] or 0)))
    parts = _node(nodes, axes, "floordiv", (_node(nodes, axes, "add", (there, const(how.each - 1))), const(how.each)))
    return number, _node(nodes, axes, "lt", (number, parts), dtype="bool")


def _of_parts(node: Node, axis: str, reads: Mapping[int, int], moved: Mapping[int, int]) -> Node:
    """The last of `reads` folded over the parts as `node` folds elements.

    A part's sum of exponentials counts from its own largest score.
    """
    part = max(reads.values())
    if node.op == "exp_sum":
        top = node.args[2]
        return Node("exp_sum", (reads[top], part, moved[top]), (("axis", axis), ("weights", "float32")), node.axes, node.dtype)
    kind = "sum" if node.op == "contract" else node.attr("kind")
    return Node("reduce", (part,), (("kind", kind), ("axis", axis)), node.axes, node.dtype)


def _made(graph: Graph, node: int, s: Scratch) -> Write:
    """How a value is written to its scratch: along its axes, or where it is placed."""
    n = graph.nodes[node]
    if n.op != "place":
        return Write(s.name, node, tuple(Index.of(a) for a in s.axes))
    over = n.attr("over")
    return Write(s.name, n.args[0], tuple(Index.of(over.index(a) if a in over else a) for a in s.axes), n.args[1:])


def _tensor(s: Scratch, role: str, parts: Mapping[str, int]) -> Tensor:
    dims = tuple(Dim(a, ((1, a),)) if a in parts else Dim.parse(a) for a in s.axes)
    return Tensor(s.name, role, dims, s.dtype)


def _rest(graph: Graph, scratch: Mapping[int, Scratch], axes, parts: Mapping[str, int], ending: tuple[Split, int] | None):
    """The graph with every target read from scratch: its parts folded, where there are parts; of `_ending` those there are."""
    nodes: list[Node] = []
    moved: dict[int, int] = {}
    reads: dict[int, int] = {}
    begun: int | None = None
    for i, node in enumerate(graph.nodes):
        if i in scratch:
            s = scratch[i]
            index = tuple(Index.of(a) for a in s.axes)
            ordered = tuple(a for a in axes if a in s.axes)
            nodes.append(Node("read", (), (("tensor", s.name), ("index", index)), ordered, s.dtype))
            reads[i] = len(nodes) - 1
            if ending:
                begun = _begun(nodes, axes, ending[0], moved[ending[1]])[1] if begun is None else begun
                kind = node.attr("kind") if node.op == "reduce" else "sum"
                nothing = _node(nodes, axes, "const", attrs=(("value", IDENTITY[kind, node.dtype]),), dtype=node.dtype)
                reads[i] = _node(nodes, axes, "where", (begun, reads[i], nothing), dtype=node.dtype)
            nodes += [_of_parts(node, a, reads, moved) for a in parts]
        else:
            nodes.append(replace(node, args=tuple(moved[a] for a in node.args)))
        moved[i] = len(nodes) - 1
    return replace(
        graph,
        name=f"{graph.name}_combine" if parts else graph.name,
        axes=axes,
        tensors={**{s.name: _tensor(s, "In", parts) for s in scratch.values()}, **graph.tensors},
        nodes=tuple(nodes),
        writes=tuple(replace(w, value=moved[w.value], ids=tuple(moved[n] for n in w.ids)) for w in graph.writes),
        names={moved[i]: name for i, name in graph.names.items()},
        lines={moved[i]: line for i, line in graph.lines.items()},
    )
