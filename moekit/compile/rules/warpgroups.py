"""Schedules for targets whose programs are warpgroups: rows that a warp or two serve go to a program several at a time."""

from __future__ import annotations

from dataclasses import replace

from moekit.compile.rules.choose import heuristic
from moekit.compile.schedule.directives import Launch, Schedule, Tile, Warps
from moekit.compile.schedule.legal import legal
from moekit.compile.schedule.targets import TARGETS
from moekit.lang.graph import Graph


def warpgroups(graph: Graph) -> Schedule:
    """The rules' schedule for few rows, whatever the number of rows: how a block lies in threads follows from its size, and
    sums with it. Where it has fewer warps than a warpgroup, blocks along the innermost axis in tiles are as many times larger.
    """
    few, (warps,) = heuristic(graph), TARGETS["mosaic"].warps
    folded = replace(few, launches=tuple(_folded(launch, warps) for launch in few.launches))
    return few if legal(graph, folded) else folded


def _folded(launch: Launch, warps: int) -> Launch:
    if launch.warps >= warps or len(launch.sections) != 1:
        return launch
    (section,) = launch.sections
    tiles = section.all(Tile)
    if not tiles:
        return launch
    last = tiles[-1]
    larger = Tile(last.axis, last.block * warps // launch.warps)
    section = replace(section, directives=tuple(larger if d == last else d for d in section.directives))
    own = tuple(Warps(warps) if isinstance(d, Warps) else d for d in launch.directives)
    return replace(launch, sections=(section,), directives=own)
