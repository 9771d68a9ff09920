"""The rules: a good schedule for any graph and any number of rows, without tuning."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from math import prod

from moekit.compile.rules.chains import chained
from moekit.compile.rules.folds import weighed
from moekit.compile.rules.gathers import coded, coding, gathered_product, gathered_rows, grouped, summands
from moekit.compile.rules.gemm import GEMM_COLUMNS, GEMM_TILES, Block, deeper, gemm_launch, obliging, splitting, tiles
from moekit.compile.rules.rows import many_rows, row_launch
from moekit.compile.rules.sections import sections
from moekit.compile.rules.tables import integers, table_launch, tables, wide
from moekit.compile.rules.vectors import vector_launch
from moekit.compile.schedule.cost import programs, runaway
from moekit.compile.schedule.cuts import cut, launched, stageable
from moekit.compile.schedule.directives import (
    Abreast,
    Axis,
    Dependent,
    Launch,
    Loop,
    Schedule,
    Section,
    Split,
    Stage,
    Stages,
    Warps,
    Whole,
    pow2,
)
from moekit.compile.schedule.facts import axis_uses, first_gemm, gemms, once, shares
from moekit.compile.schedule.legal import axis_problem, legal, taking_turns
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph

MANY_PROGRAMS = 2048  # of one warp: each has to wait, which from here on costs more than is saved once for the launch
MOST_ROWS = 2**31


def heuristic(graph: Graph, rows: int | None = None) -> Schedule:
    """A good schedule without tuning, for so many rows (few where nothing is said).

    How anything is added up does not depend on it, so a row's result does not depend on the rows beside it.
    """
    found = _classes(graph)
    return found[max(least for least in found if least <= (rows or 0))]


def row_classes(graph: Graph) -> tuple[int, ...]:
    """The least numbers of rows, ascending from 0, from which on a graph has another schedule.

    The tiles of a GEMM's classes add up in the same order, lanes hold short rows alike whatever their number, and where nothing
    is added up there is no order: a row has the same bits whatever the rows beside it.
    """
    return tuple(_classes(graph))


def class_axis(graph: Graph) -> str | None:
    """The dynamic axis whose size says which class a call belongs to: a GEMM's rows, or the only one there is.

    The rows of a product with scores are heads, of which a row of the fusion has some. Tables have one schedule.
    """
    if tables(graph):
        return None
    found = [] if weighed(graph) else [g.m for g in gemms(graph).values()]
    found = found or [a for a, use in axis_uses(graph).items() if use.extent is None and use.parallel]
    return next((a for a in found if graph.axes[a] is None), None)


@once
def _classes(graph: Graph) -> dict[int, Schedule]:
    """The schedules by the least number of rows, each from where it differs from the one before."""
    axis = class_axis(graph)
    chosen = dict(_by_kernels(graph)) if axis else {0: next(_by_kernels(graph))[1]}
    crowded = {least: _crowded_from(graph, schedule, axis) for least, schedule in chosen.items()}
    found: dict[int, Schedule] = {}
    for least in sorted({*chosen, *(n for each in crowded.values() for n in each if n < MOST_ROWS)}):
        base = max(n for n in chosen if n <= least)
        pairs = zip(chosen[base].launches, crowded[base], strict=True)
        schedule = Schedule(tuple(launch if least < n else launch.without(Dependent) for launch, n in pairs))
        if schedule not in list(found.values())[-1:]:
            found[least] = schedule
    return found


def _by_kernels(graph: Graph) -> Iterator[tuple[int, Schedule]]:
    """Numbers of rows from which on there are other kernels, ascending from 0, with their schedules."""
    if launch := chained(graph):
        yield 0, Schedule((launch,))
    elif found := _tabled(graph) or _gathered(graph):
        yield 0, found
    elif several := weighed(graph):
        yield from several.items()
    elif found := _staged(graph) or _coded(graph):
        yield 0, found
    elif launch := coding(graph) or grouped(graph):
        yield 0, Schedule((launch,))
    elif gemms(graph):
        yield from ((tile.least, _tiled(graph, tile)) for tile in tiles(graph))
    else:
        yield 0, Schedule((_launch(graph),))
        many = many_rows(graph) if len(sections(graph)) == 1 else None
        if many:
            elements, launch = many
            yield max(2, -(-elements // prod(graph.axes[a] or 1 for a in axis_uses(graph)))), Schedule((launch,))


def _crowded_from(graph: Graph, schedule: Schedule, axis: str | None) -> list[int]:
    """For each launch the number of rows from which on it has very many programs of one warp."""

    def least(g: Graph, launch: Launch) -> int:
        return bisect_left(range(MOST_ROWS), MANY_PROGRAMS, key=lambda rows: programs(g, launch, {axis or "": rows}))

    return [least(g, launch) if launch.warps == 1 else MOST_ROWS for launch, g, _ in launched(graph, schedule)]


def spread(graph: Graph, wish: Launch | str) -> Schedule:
    """One wish for all sections, as a schedule.

    Each section of the first launch holds an axis as is said where that is legal, and as the rules would have it where it is
    not, or where nothing is said. The launches after a split or stage are the rules'.
    `wish`: a launch of one section, or its text, with only what matters: `tile:T:16 loop:D:64 split:D:2`.
    """
    wish = Schedule.parse(wish).launches[0] if isinstance(wish, str) else wish
    first, *rest = cut(graph, wish.cut)[:2] if wish.cut else [graph]
    launch = _launch(first).without(Abreast).but(*wish.directives)
    pairs = zip(sections(first), launch.sections, strict=True)
    made = tuple(obliging(g, _taking(g, section, wish.sections[0]), launch.warps) for g, section in pairs)
    return Schedule((_abreast(first, replace(launch, sections=made)), *map(_launch, rest)))


def _taking(graph: Graph, section: Section, wish: Section) -> Section:
    """`section` with what is wanted of its axes, as far as it can take that."""
    for d in wish.directives:
        use = axis_uses(graph).get(getattr(d, "axis", ""))
        if use is not None and not (isinstance(d, Axis) and axis_problem(use, d)):
            section = section.but(d)
    return section


def _gathered(graph: Graph) -> Schedule | None:
    stage = summands(graph)
    if stage and legal(graph, beside := _beside(graph, stage)) is None:
        return beside
    if (launch := gathered_product(graph) or gathered_rows(graph)) is None:
        return None
    schedule = spread(graph, launch)
    return schedule if legal(graph, schedule) is None else None


def _beside(graph: Graph, stage: Stage) -> Schedule:
    """What is added up made in one launch, a product of rows beside each pair's; not in parts, which would take another."""
    first, rest, _ = cut(graph, stage)
    pieces = [(g, _launch(g, columns=splitting(g)[1]) if first_gemm(g) else heuristic(g).launches[0]) for g in sections(first)]
    made = tuple(replace(p.sections[0], outputs=tuple(w.output for w in g.writes)) for g, p in pieces)
    most = Warps(max(p.warps for _, p in pieces)), Stages(max(p.stages for _, p in pieces))
    return Schedule((Launch(made, (*most, Dependent())).but(stage), *heuristic(rest).launches))


def _tabled(graph: Graph) -> Schedule | None:
    """Tables of integers, and what is placed, in launches before those that read them."""
    if (stage := tables(graph)) is None:
        return None
    first, rest, left = cut(graph, stage)
    counted = integers(left)
    before = Schedule((table_launch(first),)) if counted else heuristic(first)
    after = heuristic(rest) if counted or gemms(rest) else spread(rest, wide(rest))
    return Schedule((*before.launches[:-1], before.launches[-1].but(stage), *after.launches))


@once
def _staged(graph: Graph) -> Schedule | None:
    """Products of products: a value between them staged, the smallest that will do, where they would be made anew too often."""
    along = {n.attr("axis") for n in graph.live_nodes("contract")}
    if len(along) < 2 or runaway(graph, grouped(graph) or _launch(graph)) is None:
        return None
    stageables = stageable(graph)
    for value in sorted(stageables, key=lambda v: _size(graph, stageables[v])):
        first, rest, _ = cut(graph, Stage(value))
        before, after = heuristic(first), heuristic(rest)
        launches = (*before.launches[:-1], before.launches[-1].but(Stage(value)), *after.launches)
        if legal(graph, Schedule(launches)) is None:
            return Schedule(launches)
    return None


def _coded(graph: Graph) -> Schedule | None:
    """What is rounded to float8 for a product in a launch before it, with the folds that it takes: once for all columns."""
    if (stage := coded(graph)) is None:
        return None
    first, rest, _ = cut(graph, stage)
    before, after = heuristic(first), heuristic(rest)
    schedule = Schedule((*before.launches[:-1], before.launches[-1].but(stage), *after.launches))
    return schedule if legal(graph, schedule) is None else None


def _size(graph: Graph, node: int) -> tuple[int, int]:
    """Bytes of a value for each row; of equals, the later one."""
    n = graph.nodes[node]
    return prod(graph.axes[a] or 1 for a in n.axes) * itemsize(n.dtype), -node


def _tiled(graph: Graph, tile: Block) -> Schedule:
    """A GEMM by one tile, in two launches where its contracted axis is split."""
    split, columns = splitting(graph)
    if split is None or tile.in_a_row:
        launch = _launch(graph, tile, columns, split)
        if split is None or runaway(graph, launch) is None:
            return Schedule((launch,))
    first, second, _ = cut(graph, split)
    return Schedule((_launch(first, tile, columns).but(split), _launch(second)))


def _launch(graph: Graph, tile: Block = GEMM_TILES[0], columns: int = GEMM_COLUMNS[0], in_a_row: Split | None = None) -> Launch:
    """One launch: each section by the rule for its kind, with the most warps any wants."""
    parts = sections(graph)
    pieces = [_piece(g, tile, columns, in_a_row) for g in parts]
    if len(pieces) == 1:
        (piece,) = pieces
        return replace(piece, sections=(obliging(graph, piece.sections[0], piece.warps),))
    products = [p.stages for g, p in zip(parts, pieces, strict=True) if first_gemm(g)]
    stages = min(products) if products else max(p.stages for p in pieces)
    if shares(graph) and len(products) > 1 and stages == 6:
        stages = 7  # with 6, ptxas (12.8) spills a register of several sections' loops
    made = []
    for g, piece in zip(parts, pieces, strict=True):
        section = deeper(g, obliging(g, piece.sections[0], piece.warps), stages)
        made.append(replace(section, outputs=tuple(w.output for w in g.writes)))
    choosing = [p.warps for g, p in zip(parts, pieces, strict=True) if any(g.live_nodes("top_k"))]
    summed = [] if products else [p.warps for g, p in zip(parts, pieces, strict=True) if vector_launch(g)]  # most programs
    warps = min(choosing) if choosing and not products else max(summed or [p.warps for p in pieces])  # one warp: no barrier
    return _abreast(graph, Launch(tuple(made), (Warps(warps), Stages(stages), Dependent())))


def _piece(graph: Graph, tile: Block, columns: int, in_a_row: Split | None) -> Launch:
    """One section's programs; an axis that is split is looped over."""
    gemm = first_gemm(graph)
    launch = gemm_launch(graph, gemm, tile, columns, in_a_row) if gemm else vector_launch(graph) or row_launch(graph)
    (section,) = launch.sections
    for axis, count in shares(graph).items():
        if axis in axis_uses(graph) and isinstance(section.axis(axis), Whole):
            section = section.but(Loop(axis, pow2(-(-(graph.axes[axis] or 1) // count))))
    return replace(launch, sections=(section,))


def _abreast(graph: Graph, launch: Launch) -> Launch:
    """Sections with GEMMs take turns, block of rows by block of rows, where they have the same blocks."""
    parts = sections(graph)
    if len(launch.sections) < 2 or shares(graph) or not all(map(first_gemm, parts)):
        return launch
    axis = taking_turns(graph, launch)
    return launch.but(Abreast(axis)) if axis else launch
