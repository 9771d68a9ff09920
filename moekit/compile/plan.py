"""A Plan: the launches that compute a graph, and the scratch between them. One launch, or two where an axis is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moekit.compile import tile as t
from moekit.compile.lower import lower
from moekit.compile.schedule import Schedule, heuristic, legal, pow2
from moekit.compile.scope import part_axis
from moekit.compile.verify import verify
from moekit.errors import ScheduleError
from moekit.lang.graph import Along, Graph, Node, Tensor, Write
from moekit.lang.spec import Dim


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


@dataclass(frozen=True)
class Plan:
    """Programs in launch order, and their scratch."""

    graph: Graph
    schedule: Schedule
    programs: tuple[t.TileProgram, ...]
    scratch: tuple[Scratch, ...]

    def __str__(self) -> str:
        return "\n\n".join(str(p) for p in self.programs)


def plan(
    graph: Graph,
    schedule: Schedule | None,
    layouts: Mapping[str, t.Strided | t.Viewed],
    sizes: Mapping[str, int] | None = None,
) -> Plan:
    """Lower `graph` under `schedule` (the heuristic's if None) and verify every program.

    Raises ScheduleError, in one sentence, for a schedule that is not legal here.
    """
    schedule = schedule or heuristic(graph)
    if why := legal(graph, schedule):
        raise ScheduleError(why)
    digest = f"{graph.digest()}"
    if not schedule.split:
        return Plan(graph, schedule, (_verified(graph, schedule, layouts, sizes, digest),), ())
    first, second, scratch = cut(graph, schedule)
    viewed = any(isinstance(layout, t.Viewed) for layout in layouts.values())
    layouts = dict(layouts) | {s.name: _dense(s, viewed, sizes or {}) for s in scratch}
    programs = (
        _verified(first, _first_schedule(first, schedule), layouts, sizes, digest),
        _verified(second, _second_schedule(second, schedule), layouts, sizes, digest),
    )
    return Plan(graph, schedule, programs, scratch)


def _verified(graph: Graph, schedule: Schedule, layouts, sizes, digest: str) -> t.TileProgram:
    program = lower(graph, schedule, layouts, sizes, digest)
    verify(program)
    return program


def _dense(s: Scratch, viewed: bool, sizes: Mapping[str, int]) -> t.Strided | t.Viewed:
    if viewed:
        shape, n = s.shape(sizes), len(s.axes)
        return t.Viewed(s.name, shape, tuple(range(n)), (0,) * n, (1,) * n)
    return t.Strided(("any",) * (len(s.axes) - 1) + ("unit",), wide=True)


def _first_schedule(graph: Graph, schedule: Schedule) -> Schedule:
    parts = tuple((part_axis(a), "grid", 1) for a, _ in schedule.split)
    kept = tuple(x for x in schedule.axes if x[0] in _used(graph))
    return replace(schedule, axes=(*parts, *kept))


def _used(graph: Graph) -> set[str]:
    from moekit.compile.analysis import axis_uses

    return set(axis_uses(graph))


def _second_schedule(graph: Graph, schedule: Schedule) -> Schedule:
    """The epilogue: its own heuristic, with the parts held whole so that they are added in one fixed order."""
    chosen = heuristic(graph)
    for axis, parts in schedule.split:
        chosen = chosen.with_axis(part_axis(axis), "whole", pow2(parts))
    return chosen


def cut(graph: Graph, schedule: Schedule) -> tuple[Graph, Graph, tuple[Scratch, ...]]:
    """Split a graph at its reductions over the split axis: partial results to scratch, then the rest from there."""
    (axis, parts), *more = schedule.split
    if more:
        raise ScheduleError(f"{graph.name}: only one axis can be split, the schedule splits {len(schedule.split)}")
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
        s = Scratch(f"partial_{number}", node.dtype, (part, *node.axes), (parts, *(graph.axes[a] for a in node.axes)))
        scratch.append(s)
        tensors[s.name] = Tensor(
            s.name, "Out", tuple(Dim.parse(a) if a != part else Dim(a, ((1, a),)) for a in s.axes), s.dtype
        )
        writes.append(Write(s.name, i, tuple(Along(a) for a in s.axes)))
    first = replace(graph, name=f"{graph.name}_partial", axes=axes, tensors=tensors, writes=tuple(writes))
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
