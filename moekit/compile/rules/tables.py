"""Good schedules for tables of integers, such as which pairs of a token and an expert a block has.

Each is made once, by launches before those that read it: first what is counted, level by level where counts are added up in
turn, then what is placed, with what is read beside it.

What was measured stands in measured.json, by the name of the constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from moekit.compile.rules.rows import alone
from moekit.compile.rules.sections import sections
from moekit.compile.schedule.cuts import Scratch, stageable
from moekit.compile.schedule.directives import Axis, Launch, Loop, Section, Stage, Tile, Whole, pow2
from moekit.compile.schedule.facts import axis_uses, once
from moekit.lang.dtypes import INTS
from moekit.lang.graph import Graph, made_of

WARPS = 4
BLOCK = 2**15  # integers of a program's block
FEW_BLOCK = 2**13  # of one in turns, or one that has several elements of a run-time axis: few programs would be left
TURN, TURN_COLUMNS = 32, 64  # along a run-time axis that is added up, and along a static one beside it
COLUMNS = 256  # of placed rows that a program, of one warp, adds up


@once
def tables(graph: Graph) -> Stage | None:
    """What a graph's first launch makes, where that is a table, or what is placed; None where there is neither."""
    names = {i: name for name, i in stageable(graph).items()}
    counted = [i for i in names if graph.nodes[i].op == "reduce" and graph.nodes[i].dtype in INTS]
    if any(graph.axes[graph.nodes[i].attr("axis")] is None for i in counted):
        lowest = [i for i in counted if not _beneath(graph, graph.nodes[i].args, counted)]
        return Stage(",".join(names[i] for i in lowest))
    placed = [i for i in names if graph.nodes[i].op == "place"]
    placed = [i for i in placed if not _beneath(graph, graph.nodes[i].args, placed)]
    if not placed:
        return None
    first = placed[0]
    beside = _read_beside(graph, first, names) if graph.nodes[first].dtype in INTS else []
    return Stage(",".join(names[i] for i in (first, *beside)))


def _beneath(graph: Graph, nodes: Iterable[int], which: Iterable[int]) -> bool:
    """Whether some of `nodes` is one of `which`, or made of one."""
    return not made_of(graph.nodes, *nodes).isdisjoint(which)


def _read_beside(graph: Graph, first: int, names: dict[int, str]) -> list[int]:
    """The reductions of integers, made of nothing that is placed, that what reads `first` needs too: the last ones."""
    found, seen, left = [], set(), [i for w in graph.writes for i in (w.value, *w.ids)]
    placed = [i for i in names if graph.nodes[i].op == "place"]
    while left:
        i = left.pop()
        n = graph.nodes[i]
        if i in seen or i == first:
            continue
        seen.add(i)
        if i in names and n.op == "reduce" and n.dtype in INTS and not _beneath(graph, [i], placed):
            found.append(i)
        else:
            left += n.args
    return sorted(found)


def integers(left: Iterable[Scratch]) -> bool:
    """Whether what a launch leaves to others is tables of integers, all of it."""
    return all(s.dtype in INTS for s in left)


def table_launch(graph: Graph) -> Launch:
    """Programs that make tables, of any number of rows: integers add up to the same in blocks and turns of any size."""
    made = [_held(g) for g in sections(graph)]
    launch = alone(made[0] if len(made) == 1 else (), WARPS, stages=1)
    if len(made) == 1:
        return launch
    named = zip(sections(graph), made, strict=True)
    return replace(launch, sections=tuple(Section(tuple(w.output for w in g.writes), held) for g, held in named))


def _held(graph: Graph) -> tuple[Axis, ...]:
    """Static axes that are added up whole, run-time ones in turns; what is parallel, static first, as a block has room."""
    uses = axis_uses(graph)
    added = [u for u in uses.values() if not u.parallel]
    said: dict[str, Axis] = {u.name: Loop(u.name, TURN) if u.extent is None else Whole(u.name, pow2(u.extent)) for u in added}
    turns = any(u.extent is None for u in added)
    for use in sorted((u for u in reversed(uses.values()) if u.parallel), key=lambda u: u.extent is None):
        held = prod(d.block for d in said.values())
        room = max(1, (FEW_BLOCK if turns or use.extent is None else BLOCK) // held)
        most = room if use.extent is None else min(room, pow2(use.extent), TURN_COLUMNS if turns else room)
        said[use.name] = Tile(use.name, most)
    return tuple(said[a] for a in uses)


def wide(graph: Graph) -> Launch:
    """What adds up placed rows: one after the other, as many columns a program as are worth its few rows."""
    uses = axis_uses(graph).values()
    columns = [Tile(u.name, min(COLUMNS, pow2(u.extent or COLUMNS))) for u in uses if u.parallel][-1:]
    return alone((*columns, *(Loop(u.name, 1) for u in uses if u.reduced)), warps=1, stages=1)
