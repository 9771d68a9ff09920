"""What a campaign has covered, in cells: fusion × dtypes × kind of layout per tensor × class of tail."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from moekit.compile.rules import heuristic
from moekit.compile.schedule import Schedule
from moekit.lang.dtypes import is_float
from moekit.lang.fusion import Binding, Fusion
from moekit.testing.case import FuzzCase
from moekit.testing.executors import schedule_of, static

LEAST = 64  # elements a case's largest tensor must have to count in full
EDGES = 0.05  # the share of counted cases that may be smaller

Cell = tuple[str, str, str, str]


@functools.lru_cache(maxsize=2048)
def _heuristic(fusion: Fusion, binding: Binding) -> Schedule:
    return heuristic(fusion.trace(binding))


def blocks(case: FuzzCase) -> dict[str, int]:
    """The block of every axis under the case's schedule."""
    schedule = schedule_of(case) or _heuristic(case.declaration, static(case))
    return {d.axis: d.block for section in schedule.launches[0].sections for d in section.axes if d.axis in case.extents}


def tail(case: FuzzCase) -> str:
    """Which axes end within a block: "even" (none), "tokens" (a dynamic one), "static", or "both"."""
    ragged = {axis in case.declaration.dynamic for axis, block in blocks(case).items() if case.extents[axis] % block}
    return {(): "even", (True,): "tokens", (False,): "static"}.get(tuple(ragged), "both")


def dtype_label(case: FuzzCase) -> str:
    """The float dtypes of the operands, each once."""
    return "/".join(dict.fromkeys(d for d in case.dtypes.values() if is_float(d))) or "integers"


def cell(case: FuzzCase) -> Cell:
    """The cell a case falls into."""
    kinds = ", ".join(f"{n} {case.layout(n).kind}" for n in case.memory())
    return case.fusion, dtype_label(case), kinds, tail(case)


@dataclass
class Coverage:
    """Counts of one implementation. `cells` has the cases of full size, `edge_cells` those smaller than `LEAST`."""

    ran: int = 0
    cells: Counter[Cell] = field(default_factory=Counter)
    edge_cells: Counter[Cell] = field(default_factory=Counter)
    compiled: set[str] = field(default_factory=set)
    worst: dict[str, float] = field(default_factory=dict)

    @property
    def counted(self) -> int:
        """Cases that count: those of full size, and edges up to their quota."""
        full = self.cells.total()
        return full + min(self.edge_cells.total(), int(EDGES * full))

    def below(self, least: int) -> dict[Cell, int]:
        """The cells with fewer than `least` cases, and how many they lack. What only edges reach is no cell."""
        return {c: least - n for c, n in self.cells.items() if n < least}

    def add(self, other: Coverage) -> None:
        """Take in what another process has covered."""
        self.ran += other.ran
        self.cells.update(other.cells)
        self.edge_cells.update(other.edge_cells)
        self.compiled |= other.compiled
        for name, ratio in other.worst.items():
            self.worst[name] = max(ratio, self.worst.get(name, 0.0))

    def note(self, case: FuzzCase, launched: bool, ratio: float) -> None:
        """Count a case that ran and was right."""
        self.ran += 1
        if not launched:
            return
        (self.cells if case.elements() >= LEAST else self.edge_cells)[cell(case)] += 1
        self.worst[case.fusion] = max(ratio, self.worst.get(case.fusion, 0.0))

    def table(self, least: int = 0) -> list[dict]:
        """One row per fusion: cases of full size, cells, the cell with the fewest cases, how many have fewer than `least`,
        distinct compilations, the worst ratio."""
        rows, below = [], self.below(least)
        for fusion in dict.fromkeys(c[0] for c in sorted(self.cells)):
            mine: Mapping[Cell, int] = {c: n for c, n in self.cells.items() if c[0] == fusion}
            rows.append(
                {
                    "fusion": fusion,
                    "cases": sum(mine.values()),
                    "cells": len(mine),
                    "least": min(mine.values()),
                    "below": sum(c[0] == fusion for c in below),
                    "edges": sum(n for c, n in self.edge_cells.items() if c[0] == fusion),
                    "dtypes": len({c[1] for c in mine}),
                    "layouts": len({c[2] for c in mine}),
                    "tails": sorted({c[3] for c in mine}),
                    "compiled": sum(k.startswith(f"{fusion} ") for k in self.compiled),
                    "worst": round(self.worst.get(fusion, 0.0), 4),
                }
            )
        return rows
