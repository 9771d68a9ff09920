"""The schedules of a case: legal ones that differ from the rules' in every way the compiler knows, by name."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

from moekit.compile.passes.form import over_operand
from moekit.compile.rules import heuristic, spread
from moekit.compile.schedule import Abreast, Launch, Loop, Parts, Rounds, Schedule, Section, Split, Tile, Whole, pow2
from moekit.compile.schedule.cuts import launched, sections_of
from moekit.compile.schedule.facts import AxisUse, axis_uses, gemms, scattered
from moekit.compile.schedule.legal import block_size, legal
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph
from moekit.testing.case import FuzzCase

MOST = 2**16  # elements of a warp, of all values of a program: a compiler takes minutes over more


def variants(graph: Graph) -> dict[str, Schedule | None]:
    """Schedules by name, legal ones only: "heuristic" (None), "looped", "rows", "small", "dots", "whole", "rounds" (two
    programs along an axis of more blocks), "split" (in three, blocks of eight), "parts" (the same, one after the other),
    "single parts" (in two, blocks of one), and for products "tall" (blocks of 64 rows, in two parts one after the other);
    "apart" (blocks of four along whatever a section can have programs along). None has more than `MOST` elements a warp.
    """
    found: dict[str, Schedule | None] = {}

    def offer(name: str, schedule: Schedule) -> None:
        new = name not in found and schedule not in (*found.values(), heuristic(graph))
        if new and legal(graph, schedule) is None and elements(graph, schedule) <= MOST:
            found[name] = schedule

    offer("looped", _spread(graph, _loop(4), 2))
    offer("dots", _spread(graph, _loop(16), 16))
    offer("rows", _spread(graph, None, 8))
    offer("small", _spread(graph, _loop(1), 1))
    offer("whole", _spread(graph, _whole, 4))
    offer("rounds", _in_rounds(graph, _spread(graph, _loop(4), 2)))
    for axis, use in axis_uses(graph).items():
        if use.reduced and use.extent is not None:
            offer("split", _spread(graph, _loop(8), 4, Split(axis, 3)))
            if "split" in found:
                offer("parts", _spread(graph, _loop(8), 4, parts=Parts(axis, 3)))
            offer("single parts", _spread(graph, _loop(1), 2, Split(axis, 2)))
            if tall := _tall(graph, axis):
                offer("tall", tall)
    first, *rest = heuristic(graph).launches
    offer("apart", Schedule((replace(first, sections=tuple(_apart(graph, s) for s in first.sections)), *rest)))
    return {"heuristic": None, **found}


def elements(graph: Graph, schedule: Schedule) -> int:
    """Elements that a warp has of all values of a program together, of the launch with most; products as they are summed up."""
    most = 0
    for launch, part, _ in launched(graph, schedule):
        for own, section in sections_of(part, launch):
            most = max(most, sum(block_size(own, section, i) for i in own.live()) // launch.warps)
    return most


def _loop(block: int):
    return lambda use: Loop(use.name, block)


def _whole(use: AxisUse) -> Loop | Whole:
    return Loop(use.name, 2) if use.extent is None else Whole(use.name, pow2(use.extent))


def _spread(graph: Graph, reduced, parallel: int, split: Split | None = None, parts: Parts | None = None) -> Schedule:
    """The rules' schedule with reduced axes as `reduced` says, and blocks of `parallel` along the others."""
    axes = []
    for use in axis_uses(graph).values():
        if not use.whole:
            if reduced is not None and not use.parallel:
                axes.append(reduced(use))
            axes.append(Tile(use.name, 1 if use.name in scattered(graph) else parallel))  # for the sections that can
    section = Section((), (*axes, *([parts] if parts else [])))
    return spread(graph, Launch((section,), (split,) if split else ()))


def _tall(graph: Graph, axis: str) -> Schedule | None:
    """As many rows as make twins of products that can be, in parts; None where no product over `axis` has dynamic rows."""
    products = [g for g in gemms(graph).values() if g.k == axis and graph.axes[g.m] is None]
    if not products:
        return None
    axes = {a: Tile(a, 1 if a in scattered(graph) else 16) if u.parallel else Loop(a, 16) for a, u in axis_uses(graph).items()}
    axes |= {g.n: Tile(g.n, 16) for g in products} | {products[0].m: Tile(products[0].m, 64)}
    return spread(graph, Launch((Section((), (*axes.values(), Parts(axis, 2))),)))


def _in_rounds(graph: Graph, schedule: Schedule) -> Schedule:
    """Two programs along an axis of each section of the first launch that has more blocks of it."""
    first, *rest = schedule.launches
    sections = []
    for section in first.sections:
        several = [d.axis for d in section.all(Tile) if (graph.axes.get(d.axis) or 0) > 2 * d.block]
        sections.append(section.but(Rounds(several[-1], 2)) if several else section)
    return Schedule((replace(first.without(Abreast), sections=tuple(sections)), *rest))


def _apart(graph: Graph, section: Section) -> Section:
    tiles = [Tile(d.axis, 4) for d in section.all(Tile) if d.axis in graph.axes and d.axis not in scattered(graph)]
    return section.but(*tiles)


def static(case: FuzzCase) -> Binding:
    """The case's binding with dynamic sizes blanked: what plans and schedules depend on."""
    b, dynamic = case.binding, case.declaration.dynamic
    return Binding(tuple((a, 1 if a in dynamic else s) for a, s in b.sizes), b.dtypes, b.params, b.ones)


def over(case: FuzzCase) -> tuple[tuple[str, str], ...]:
    """The outputs that go over an operand, each with it."""
    return tuple((o, t) for o, t in case.targets.items() if o not in case.shapes and t != o)


@functools.lru_cache(maxsize=2048)
def _variants(fusion: Fusion, binding: Binding) -> dict[str, Schedule | None]:
    return variants(fusion.trace(binding))


@functools.lru_cache(maxsize=2048)
def _heuristic(fusion: Fusion, binding: Binding) -> Schedule:
    return heuristic(fusion.trace(binding))


def schedule_of(case: FuzzCase) -> Schedule | None:
    """A case's schedule; of a name the heuristic's (None) where it is not legal, be it for what an output goes over."""
    if not isinstance(case.schedule, str):
        return case.schedule
    if case.schedule == "heuristic":
        return None
    if ":" in case.schedule:
        raise ValueError(f"{case.schedule!r} is a schedule's text, and a case takes its name or a Schedule; parse it")
    found = _variants(case.declaration, static(case)).get(case.schedule)
    return None if found and over(case) and legal(over_operand(case.graph, over(case)), found) else found


def _launches(case: FuzzCase) -> tuple[Launch, ...]:
    return (schedule_of(case) or _heuristic(case.declaration, static(case))).launches


def blocks(case: FuzzCase) -> dict[str, int]:
    """The block of every axis under the first launch of the case's schedule."""
    return {d.axis: d.block for section in _launches(case)[0].sections for d in section.axes if d.axis in case.extents}


def work(case: FuzzCase) -> int:
    """Blocks that an interpreter goes through for a case, of all launches."""
    sections = [s for launch in _launches(case) for s in launch.sections]
    extents = [[(case.extents[d.axis], d.block) for d in s.axes if d.axis in case.extents] for s in sections]
    return sum(math.prod(max(1, -(-n // block)) for n, block in axes) for axes in extents)


def tail(case: FuzzCase) -> str:
    """Which axes end within a block: "even" (none), "tokens" (a dynamic one), "static", or "both"."""
    ragged = {axis in case.declaration.dynamic for axis, block in blocks(case).items() if case.extents[axis] % block}
    return {(): "even", (True,): "tokens", (False,): "static"}.get(tuple(ragged), "both")
