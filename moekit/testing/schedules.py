"""Legal schedules that differ from the heuristic's in every way the compiler knows."""

from __future__ import annotations

from dataclasses import replace

from moekit.compile.analysis import axis_uses, gemms
from moekit.compile.heuristic import heuristic
from moekit.compile.schedule import Schedule, legal, pow2
from moekit.compile.sections import sections
from moekit.lang.graph import Graph


def variants(graph: Graph) -> dict[str, Schedule | None]:
    """Schedules by name, legal ones only: "heuristic" (None), "looped", "rows", "small", "dots", "whole",
    "split" (in three, blocks of eight), "parts" (the same, one after the other), "single parts" (in two, blocks of one), and
    for products "tall" (blocks of 64 rows, in two parts one after the other); "apart" (on the grid whatever some section
    can have there, which the others then take as the heuristic would).
    """
    base = heuristic(graph)
    found: dict[str, Schedule | None] = {"heuristic": None}
    for name, schedule in (
        ("looped", _reshaped(graph, base, reduced=("loop", 4), parallel=2)),
        ("dots", _reshaped(graph, base, reduced=("loop", 16), parallel=16)),
        ("rows", _reshaped(graph, base, reduced=None, parallel=8)),
        ("small", _reshaped(graph, base, reduced=("loop", 1), parallel=1)),
        ("whole", _reshaped(graph, base, reduced=("whole", 0), parallel=4)),
    ):
        if legal(graph, schedule) is None and schedule not in found.values() and schedule != base:
            found[name] = schedule
    for axis, use in axis_uses(graph).items():
        split = _reshaped(graph, base, reduced=("loop", 8), parallel=4)
        split = Schedule(split.axes, ((axis, 3),), split.warps, split.stages)
        if use.reduced and "split" not in found and legal(graph, split) is None:
            found["split"] = split
            in_a_row = replace(split, split=(), parts=split.split)
            found |= {"parts": in_a_row} if legal(graph, in_a_row) is None else {}
        single = _reshaped(graph, base, reduced=("loop", 1), parallel=2)
        single = Schedule(single.axes, ((axis, 2),), single.warps, single.stages)
        if use.reduced and "single parts" not in found and legal(graph, single) is None:
            found["single parts"] = single
        if use.reduced and "tall" not in found and (tall := _tall(graph, base, axis)):
            found["tall"] = tall
    apart = base
    for use in (use for g in sections(graph) for use in axis_uses(g).values() if use.parallel and not _single(graph, use.name)):
        apart = apart.with_axis(use.name, "grid", 4)
    if apart != base and legal(graph, apart) is None:
        found["apart"] = apart
    return found


def _tall(graph: Graph, base: Schedule, axis: str) -> Schedule | None:
    """As many rows as make twins of products that can be, in parts; None where no product over `axis` has dynamic rows."""
    products = [g for g in gemms(graph).values() if g.k == axis and graph.axes[g.m] is None]
    if not products:
        return None
    dots = _reshaped(graph, base, reduced=("loop", 16), parallel=16).with_axis(products[0].m, block=64)
    for gemm in products:
        dots = dots.with_axis(gemm.n, "grid", 16)
    tall = replace(dots, split=(), parts=((axis, 2),))
    return tall if legal(graph, tall) is None else None


def _reshaped(graph: Graph, base: Schedule, reduced: tuple[str, int] | None, parallel: int) -> Schedule:
    """`base` with reduced axes in the given mode and block, and blocks of `parallel` along the others."""
    uses = axis_uses(graph)
    for axis, mode, _ in base.axes:
        use = uses[axis]
        if use.whole:
            continue
        if use.parallel:
            block = 1 if base.block(axis) == 1 and parallel > 1 and _single(graph, axis) else parallel
            base = base.with_axis(axis, block=block)
        elif reduced is not None:
            kind, block = reduced
            if kind == "whole" and use.extent is None:
                kind, block = "loop", 2
            base = base.with_axis(axis, kind, pow2(use.extent) if kind == "whole" and use.extent is not None else block)
        elif mode == "loop":
            base = base.with_axis(axis, block=max(1, base.block(axis) // 2))
    return base


def _single(graph: Graph, axis: str) -> bool:
    """Whether ids of a `put` run along the axis, so that its blocks must be single elements."""
    return any(axis in graph.nodes[n].axes for w in graph.writes for n in w.ids)
