"""Whether a row has the same lanes whatever the rows beside it: what a schedule chosen by the number of rows rests on."""

from __future__ import annotations

from collections.abc import Mapping

from moekit.compile import tile as t
from moekit.compile.rules.choose import heuristic
from moekit.compile.schedule.directives import Dependent, Schedule
from moekit.compile.schedule.facts import axis_uses
from moekit.lang.graph import Graph


def settled(graph: Graph, schedule: Schedule, layouts: Mapping[str, t.Layout]) -> Schedule:
    """`schedule`, which was chosen by the number of rows, or few rows' where its kernels would add up otherwise than those."""
    few = heuristic(graph)
    return schedule if alike(graph, layouts) or _kernels(schedule) == _kernels(few) else few


def _kernels(schedule: Schedule) -> list:
    return [launch.without(Dependent) for launch in schedule.launches]


def alike(graph: Graph, layouts: Mapping[str, t.Layout]) -> bool:
    """Whether schedules of one order add up alike with these layouts, too.

    An order (order.py) is read off contiguous tensors. Lanes follow memory: where elements of different rows lie side by side
    in place of one row's, Triton gives lanes to these first, and how many are left for a row depends on the number of rows.
    """
    inner = next(reversed(axis_uses(graph)), None)
    sums = any((n.attr("kind"), n.attr("axis")) == ("sum", inner) for n in graph.live_nodes("reduce"))
    if inner is None or not sums or any(graph.live_nodes("contract")):
        return True
    rows = [x for x in graph.tensors.values() if inner in x.axes and x.name in layouts]
    return all(_side_by_side(graph, layouts[x.name], x.axes, inner) for x in rows)


def _side_by_side(graph: Graph, layout: t.Layout, axes: tuple[str | None, ...], inner: str) -> bool:
    at = axes.index(inner)
    if isinstance(layout, t.Viewed):
        return layout.axes[at] == len(layout.base) - 1 and layout.steps[at] == 1
    if not isinstance(layout, t.Strided):
        return False
    others = [k for d, k in enumerate(layout.strides) if d != at and axes[d] is not None and graph.axes[axes[d] or ""] != 1]
    return layout.strides[at] == "unit" and "unit" not in others
