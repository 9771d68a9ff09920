"""Good schedules for tables of integers, such as which pairs of a token and an expert a block has.

Each is made once, by a launch before those that read it: first what is counted along a run-time axis, then what is placed, with
what is read beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from moekit.compile.rules.rows import alone
from moekit.compile.rules.sections import sections
from moekit.compile.schedule.cuts import Scratch, cut, stageable
from moekit.compile.schedule.directives import Axis, Launch, Loop, Section, Stage, Tile, Whole, pow2
from moekit.compile.schedule.facts import axis_uses, once
from moekit.lang.dtypes import INTS
from moekit.lang.graph import Graph, Node

TURN, WARPS = 1024, 4  # integers that a program goes through at a time
LONG_TURN, LONG_WARPS, LONG_FROM = 4096, 8, 1024  # where there are so many rows: fewer turns are waited for
COLUMNS = 256  # of placed rows that a program adds up


@once
def tables(graph: Graph) -> Stage | None:
    """What a graph's first launch makes, where that is a table, or what is placed; None where there is neither."""
    names = {i: name for name, i in stageable(graph).items()}
    counts = [i for i in names if _counts(graph, graph.nodes[i])]
    placed = [i for i in names if graph.nodes[i].op == "place" and not _beneath(graph, graph.nodes[i].args, "place")]
    if counts or not placed:
        return Stage(",".join(names[i] for i in counts)) if counts else None
    first = placed[0]
    beside = _read_beside(graph, first, names) if graph.nodes[first].dtype in INTS else []
    return Stage(",".join(names[i] for i in (first, *beside)))


def _counts(graph: Graph, n: Node) -> bool:
    """Whether integers are added up along a run-time axis, to one number for each element of static ones."""
    runtime = n.op == "reduce" and graph.axes[n.attr("axis")] is None
    return runtime and n.dtype in INTS and all(graph.axes[a] is not None for a in n.axes)


def _beneath(graph: Graph, nodes: Iterable[int], op: str) -> bool:
    """Whether some of `nodes` is made by an `op`, or of what is."""
    return any(graph.nodes[i].op == op or _beneath(graph, graph.nodes[i].args, op) for i in nodes)


def _read_beside(graph: Graph, first: int, names: dict[int, str]) -> list[int]:
    """The reductions of integers, made of nothing that is placed, that what reads `first` needs too: the last ones."""
    found, seen, left = [], set(), [i for w in graph.writes for i in (w.value, *w.ids)]
    while left:
        i = left.pop()
        n = graph.nodes[i]
        if i in seen or i == first:
            continue
        seen.add(i)
        if i in names and n.op == "reduce" and n.dtype in INTS and not _beneath(graph, [i], "place"):
            found.append(i)
        else:
            left += n.args
    return sorted(found)


def along(graph: Graph) -> str | None:
    """The run-time axis along which a graph's tables of integers are made; None where it has none."""
    if (stage := tables(graph)) is None:
        return None
    first, _, left = cut(graph, stage)
    uses = axis_uses(first).values()
    return next((u.name for u in uses if not u.parallel and u.extent is None), None) if integers(left) else None


def integers(left: Iterable[Scratch]) -> bool:
    """Whether what a launch leaves to others is tables of integers, all of it."""
    return all(s.dtype in INTS for s in left)


def table_launch(graph: Graph, many: bool) -> Launch:
    """Programs that make tables: run-time axes that are added up or gone along in turns, static ones in one block.

    many: whether there are many rows. Integers add up to the same in turns of any size.
    """
    made = [_held(g, LONG_TURN if many else TURN) for g in sections(graph)]
    launch = alone(made[0] if len(made) == 1 else (), LONG_WARPS if many else WARPS)
    if len(made) == 1:
        return launch
    named = zip(sections(graph), made, strict=True)
    return replace(launch, sections=tuple(Section(tuple(w.output for w in g.writes), held) for g, held in named))


def _held(graph: Graph, turn: int) -> tuple[Axis, ...]:
    uses, live = axis_uses(graph), [graph.nodes[i] for i in graph.live()]
    chosen: dict[str, Axis] = {a: Tile(a, 1) for a, u in uses.items() if u.parallel}
    chosen |= {a: Whole(a, pow2(u.extent)) for a, u in uses.items() if not u.parallel and u.extent is not None}
    looped = [n.axes for n in live if not set(n.axes) <= set(chosen)]
    wide = max((prod(chosen[a].block for a in axes if a in chosen) for axes in looped), default=1)
    return tuple(chosen.get(a) or Loop(a, max(1, turn // wide)) for a in uses)


def wide(graph: Graph) -> Launch:
    """What adds up placed rows: one after the other, as many columns a program as are worth its few rows."""
    uses = axis_uses(graph).values()
    columns = [Tile(u.name, min(COLUMNS, pow2(u.extent or COLUMNS))) for u in uses if u.parallel][-1:]
    return alone((*columns, *(Loop(u.name, 1) for u in uses if u.reduced)), stages=1)
