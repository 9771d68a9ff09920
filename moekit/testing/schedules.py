"""Legal schedules that differ from the rules' in every way the compiler knows."""

from __future__ import annotations

from dataclasses import replace

from moekit.compile.rules import heuristic, spread
from moekit.compile.schedule import Launch, Loop, Parts, Schedule, Section, Split, Tile, Whole, pow2
from moekit.compile.schedule.facts import AxisUse, axis_uses, gemms, scattered
from moekit.compile.schedule.legal import legal
from moekit.lang.graph import Graph


def variants(graph: Graph) -> dict[str, Schedule | None]:
    """Schedules by name, legal ones only: "heuristic" (None), "looped", "rows", "small", "dots", "whole",
    "split" (in three, blocks of eight), "parts" (the same, one after the other), "single parts" (in two, blocks of one), and
    for products "tall" (blocks of 64 rows, in two parts one after the other); "apart" (blocks of four along whatever a section
    can have programs along).
    """
    found: dict[str, Schedule | None] = {}

    def offer(name: str, schedule: Schedule) -> None:
        new = name not in found and schedule not in (*found.values(), heuristic(graph))
        if new and legal(graph, schedule) is None:
            found[name] = schedule

    offer("looped", _spread(graph, _loop(4), 2))
    offer("dots", _spread(graph, _loop(16), 16))
    offer("rows", _spread(graph, None, 8))
    offer("small", _spread(graph, _loop(1), 1))
    offer("whole", _spread(graph, _whole, 4))
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


def _loop(block: int):
    return lambda use: Loop(use.name, block)


def _whole(use: AxisUse) -> Loop | Whole:
    return Loop(use.name, 2) if use.extent is None else Whole(use.name, pow2(use.extent))


def _spread(graph: Graph, reduced, parallel: int, split: Split | None = None, parts: Parts | None = None) -> Schedule:
    """The rules' schedule with reduced axes as `reduced` says, and blocks of `parallel` along the others."""
    axes = []
    for use in axis_uses(graph).values():
        if not use.whole:
            held = [] if reduced is None else [reduced(use)]
            axes += held if not use.parallel else []
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


def _apart(graph: Graph, section: Section) -> Section:
    tiles = [Tile(d.axis, 4) for d in section.all(Tile) if d.axis in graph.axes and d.axis not in scattered(graph)]
    return section.but(*tiles)
