"""Schedules for targets whose programs are warpgroups: rows that a warp or two serve go to a program several at a time, and
each warp has some of a product's columns."""

from __future__ import annotations

from dataclasses import replace

from moekit.compile.rules.choose import heuristic
from moekit.compile.schedule.directives import Launch, Loop, Schedule, Section, Tile, Warps, Whole
from moekit.compile.schedule.facts import gemms
from moekit.compile.schedule.legal import legal
from moekit.compile.schedule.targets import TARGETS
from moekit.lang.graph import Graph

COLUMNS = 8  # that a warp's product has at the least


def warpgroups(graph: Graph) -> Schedule:
    """The rules' schedule for few rows, whatever the number of rows: how a block lies in threads follows from its size, and
    sums with it. Where it has fewer warps than a warpgroup, blocks along the innermost axis in tiles are as many times larger;
    blocks of a product's columns have at least some for each warp.
    """
    few, (warps,) = heuristic(graph), TARGETS["mosaic"].warps
    folded = replace(few, launches=tuple(_folded(_shared(graph, launch, warps), warps) for launch in few.launches))
    return few if legal(graph, folded) else folded


def _shared(graph: Graph, launch: Launch, warps: int) -> Launch:
    return replace(launch, sections=tuple(_columns(graph, section, COLUMNS * warps) for section in launch.sections))


def _columns(graph: Graph, section: Section, least: int) -> Section:
    """A section whose blocks of a product's columns, if it makes one, have at least so many."""
    summed = {d.axis for d in (*section.all(Loop), *section.all(Whole))}
    columns = {g.n for g in gemms(graph).values() if g.k in summed}
    wide = [Tile(d.axis, max(d.block, least)) if isinstance(d, Tile) and d.axis in columns else d for d in section.directives]
    return replace(section, directives=tuple(wide))


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
