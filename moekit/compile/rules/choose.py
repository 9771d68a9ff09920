"""The rules: a good schedule for any graph, without tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from moekit.compile.rules.gathers import gathered_product
from moekit.compile.rules.gemm import (
    GEMM_COLUMNS,
    GEMM_TILES,
    Block,
    deeper,
    gemm_launch,
    may_go_in_a_row,
    obliging,
    splitting,
    tiles,
)
from moekit.compile.rules.rows import MANY_ELEMENTS, MANY_SUMMED, elementwise, many_elements, row_launch, short_rows, twice
from moekit.compile.rules.sections import led, sections
from moekit.compile.schedule.cost import runaway
from moekit.compile.schedule.cuts import cut, stageable
from moekit.compile.schedule.directives import (
    Abreast,
    Launch,
    Loop,
    Schedule,
    Section,
    Split,
    Stage,
    Stages,
    Tile,
    Warps,
    Whole,
    pow2,
)
from moekit.compile.schedule.facts import axis_uses, first_gemm, gemms, has_gemm, once, shares
from moekit.compile.schedule.legal import legal, taking_turns
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph


def heuristic(graph: Graph, tokens: int | None = None) -> Schedule:
    """A good schedule without tuning, for a few rows or for the class of `tokens_class` (one of `row_classes`).

    How anything is added up does not depend on it, so a row's result does not depend on T.
    """
    if found := _gathered(graph) or _staged(graph):
        return found
    if tokens and elementwise(graph):
        return Schedule((many_elements(graph),))
    if tokens and _short(graph):
        return Schedule((twice(graph),))
    split, columns = splitting(graph)
    tile = next(x for x in reversed(tiles(graph)) if (tokens or 0) >= x.least)
    if split is None or (tile.in_a_row and may_go_in_a_row(graph)):
        launch = _launch(graph, tile, columns, in_a_row=split)
        if split is None or runaway(graph, launch) is None:
            return Schedule((launch,))
    first, second, _ = cut(graph, split)
    return Schedule((_launch(first, tile, columns).but(split), _launch(second)))


def row_classes(graph: Graph) -> tuple[int, ...]:
    """The least numbers of rows, ascending from 0, from which on a graph has another schedule.

    The tiles of a GEMM's classes add up in the same order, lanes hold short rows alike whatever their number, and where nothing
    is added up there is no order: a row has the same bits whatever the rows beside it.
    """
    if class_axis(graph) is None or _gathered(graph):
        return (0,)
    if gemms(graph):
        return tuple(tile.least for tile in tiles(graph))
    columns = prod(graph.axes[a] or 1 for a in axis_uses(graph))
    if elementwise(graph):
        return 0, max(2, -(-MANY_ELEMENTS // columns))
    return (0, max(2, -(-MANY_SUMMED // columns))) if _short(graph) else (0,)


def tokens_class(graph: Graph, sizes: Mapping[str, int]) -> int | None:
    """The class of rows that a call belongs to, None where the rules do not look at sizes."""
    classes, rows = row_classes(graph), class_axis(graph)
    if rows is None or len(classes) == 1:
        return None
    return max(least for least in classes if sizes[rows] >= least)


def class_axis(graph: Graph) -> str | None:
    """The dynamic axis whose size says which class a call belongs to: a GEMM's rows, or the only one there is."""
    found = [g.m for g in gemms(graph).values()]
    found = found or [a for a, use in axis_uses(graph).items() if use.extent is None and use.parallel]
    return next((a for a in found if graph.axes[a] is None), None)


def spread(graph: Graph, wish: Launch | str) -> Schedule:
    """One wish for all sections, as a schedule.

    Each section of the first launch holds an axis as is said where that is legal, and as the rules would have it where it is
    not, or where nothing is said. The launches after a split or stage are the rules'.
    `wish`: a launch of one section, or its text, with only what matters: `tile:T:16 loop:D:64 split:D:2`.
    """
    wish = Schedule.parse(wish).launches[0] if isinstance(wish, str) else wish
    first, *rest = cut(graph, wish.cut)[:2] if wish.cut else [graph]
    launch = _launch(first).without(Abreast).but(*wish.directives)
    parts, made = sections(first), []
    for g, section in zip(parts, launch.sections, strict=True):
        if g in led(parts):
            section = obliging(g, _taking(g, section, wish.sections[0]), launch.warps)
        made.append(section)
    return Schedule((_abreast(first, replace(launch, sections=tuple(made))), *map(_launch, rest)))


def _taking(graph: Graph, section: Section, wish: Section) -> Section:
    """`section` with what is wanted of its axes, as far as it can take that."""
    for d in wish.directives:
        use = axis_uses(graph).get(getattr(d, "axis", ""))
        tiled = isinstance(d, Tile) and use is not None and not use.parallel
        held = isinstance(d, Whole) and use is not None and (use.extent is None or use.extent > d.block)
        if use is not None and not tiled and not held and (isinstance(d, Whole) or not use.whole):
            section = section.but(d)
    return section


def _gathered(graph: Graph) -> Schedule | None:
    if (found := gathered_product(graph)) is None:
        return None
    split, launch = found
    schedule = spread(graph, launch.but(split))
    return schedule if legal(graph, schedule) is None else None


@once
def _staged(graph: Graph) -> Schedule | None:
    """Products of products: a value between them staged, the smallest that will do, where they would be made anew too often."""
    along = {graph.nodes[i].attr("axis") for i in graph.live() if graph.nodes[i].op == "contract"}
    if len(along) < 2 or runaway(graph, _launch(graph)) is None:
        return None
    stageables = stageable(graph)
    for value in sorted(stageables, key=lambda v: _size(graph, stageables[v])):
        first, rest, _ = cut(graph, Stage(value))
        before, after = heuristic(first), heuristic(rest)
        launches = (*before.launches[:-1], before.launches[-1].but(Stage(value)), *after.launches)
        if legal(graph, Schedule(launches)) is None:
            return Schedule(launches)
    return None


def _size(graph: Graph, node: int) -> tuple[int, int]:
    """Bytes of a value for each row; of equals, the later one."""
    n = graph.nodes[node]
    return prod(graph.axes[a] or 1 for a in n.axes) * itemsize(n.dtype), -node


def _short(graph: Graph) -> bool:
    return len(sections(graph)) == 1 and short_rows(graph)


def _launch(graph: Graph, tile: Block = GEMM_TILES[0], columns: int = GEMM_COLUMNS[0], in_a_row: Split | None = None) -> Launch:
    """One launch: each section by the rule for its kind, a GEMM's by the class of rows, with the most warps any wants."""
    parts = sections(graph)
    meant = led(parts)
    pieces = [_piece(g, tile, columns, in_a_row) if g in meant else _piece(g) for g in parts]
    if len(pieces) == 1:
        (piece,) = pieces
        return replace(piece, sections=(obliging(graph, piece.sections[0], piece.warps),))
    several = [min((p.stages for g, p in zip(parts, pieces, strict=True) if first_gemm(g)), default=pieces[0].stages)]
    if shares(graph) and sum(map(has_gemm, parts)) > 1 and several == [6]:
        several = [7]  # with 6, ptxas (12.8) spills a register of several sections' loops
    stages = max(*several, *(p.stages for g, p in zip(parts, pieces, strict=True) if g not in meant), 0)
    made = []
    for g, piece in zip(parts, pieces, strict=True):
        section = obliging(g, piece.sections[0], piece.warps)
        section = deeper(g, section, stages) if g in meant else section
        made.append(replace(section, outputs=tuple(w.output for w in g.writes)))
    launch = Launch(tuple(made), (Warps(joined_warps(parts, pieces)), Stages(stages)))
    return _abreast(graph, launch)


def _piece(graph: Graph, tile: Block = GEMM_TILES[0], columns: int = GEMM_COLUMNS[0], in_a_row: Split | None = None) -> Launch:
    """One section's programs; an axis that is split is looped over."""
    gemm = first_gemm(graph)
    launch = gemm_launch(graph, gemm, tile, columns, in_a_row) if gemm else row_launch(graph)
    (section,) = launch.sections
    for axis, count in shares(graph).items():
        if axis in axis_uses(graph) and isinstance(section.axis(axis), Whole):
            section = section.but(Loop(axis, pow2(-(-(graph.axes[axis] or 1) // count))))
    return replace(launch, sections=(section,))


def _abreast(graph: Graph, launch: Launch) -> Launch:
    """Sections with GEMMs take turns, block of rows by block of rows, where they have the same blocks."""
    parts = sections(graph)
    if len(launch.sections) < 2 or shares(graph) or not all(map(has_gemm, parts)):
        return launch
    axis = taking_turns(graph, launch)
    return launch.but(Abreast(axis)) if axis else launch


def joined_warps(parts: Sequence[Graph], pieces: Sequence[Launch]) -> int:
    """Warps of a launch of several sections: the most that one wants, but a top_k (a chain of reductions) has its own.

    How a row is added up depends on them, so beside a GEMM, which has more with more rows, a sum has those of the largest.
    """
    chain = [p.warps for g, p in zip(parts, pieces, strict=True) if any(g.nodes[i].op == "top_k" for i in g.live())]
    found = [has_gemm(g) for g in parts]
    least = max(tile.warps for tile in GEMM_TILES) if any(found) and not all(found) else 1
    return min(chain) if chain else max(least, *(p.warps for p in pieces))
