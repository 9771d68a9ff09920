"""The work of a campaign in pieces that a worker process can take: which cases a piece has follows from its numbers alone; and
what was covered, in cells: fusion × dtypes × kind of layout of every tensor × class of tail.
"""

from __future__ import annotations

import functools
import time
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace

from moekit.lang.dtypes import is_float, itemsize
from moekit.testing.batch import run_cases
from moekit.testing.case import FuzzCase
from moekit.testing.draw import Limits, draw_call, draw_kinds, draw_layouts, draw_mode, draw_schedule, redraw_dynamic
from moekit.testing.executors import JAX, Executor, executor
from moekit.testing.failures import Failure
from moekit.testing.layouts import VIEWS, Layout, Source, numpy_source
from moekit.testing.oracle import Oracle
from moekit.testing.peers import PEERS
from moekit.testing.schedules import schedule_of, tail, work
from moekit.testing.values import RECIPES

SLOW_BLOCKS = {"interpret": 160, "triton-interpreter": 40, "pallas": 40}  # blocks of work that an interpreter can afford
EDGE_TURN = 25  # every so manieth turn of a call may have fewer elements than count
DRAWS = 60  # how often sizes are drawn to meet a wanted cell
LEAST = 64  # elements a case's largest tensor must have to count in full
LONG = 40.0  # seconds after which a batch takes in no more cases: some references are slow
EDGES = 0.05  # the share of counted cases that may be smaller

Cell = tuple[str, str, str, str]


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
            mine = {c: n for c, n in self.cells.items() if c[0] == fusion}
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


@dataclass(frozen=True)
class Task:
    """One batch of cases: call number `combo` of a fusion (what costs a compilation), turn `turn` of it.

    A batch has `groups` sets of sizes and values, each run with `layouts` sets of strides; where strides come out as before,
    the values are new, so that no case is another's twin. `only`: one of its cases by number. `accelerated`: on a GPU.
    `wanted`: sizes and strides are drawn to fall into that cell.
    """

    fusion: str
    implementation: str
    seed: int
    combo: int
    turn: int
    groups: int = 8
    layouts: int = 8
    accelerated: bool = False
    only: int | None = None
    wanted: Cell | None = None

    @property
    def size(self) -> int:
        """How many cases it has."""
        return self.groups * self.layouts if self.only is None else 1

    def singles(self) -> list[Task]:
        """Its cases, each as a task."""
        return [replace(self, only=i) for i in range(self.size)] if self.only is None else [self]


@dataclass
class Report:
    """What a worker sends back for a task."""

    coverage: Coverage = field(default_factory=Coverage)
    failures: list[Failure] = field(default_factory=list)


def limits_of(task: Task) -> Limits:
    """How far the cases of a task may go."""
    edge, name = task.wanted is None and task.turn % EDGE_TURN == EDGE_TURN - 1, task.implementation
    limits = Limits(5_000 if task.accelerated else 2500, 0 if edge else LEAST)
    if name in JAX:  # int64 is had there only by who asks for it
        no_over, narrow = tuple(m for m in limits.modes if m != "over"), tuple(d for d in limits.integers if d != "int64")
        limits = replace(limits, kinds=VIEWS, modes=no_over, integers=narrow)
    if name in ("numpy", "eager", "xla"):
        limits = replace(limits, schedules=("heuristic",))
    if name in PEERS:
        limits = replace(limits, kinds=PEERS[name].kinds, dtypes=PEERS[name].dtypes, schedules=("heuristic",))
    return limits


@functools.lru_cache(maxsize=512)
def template(task: Task) -> tuple[FuzzCase, dict[str, str]]:
    """The call that a combo stands for, and the kind of layout of each of its tensors."""
    limits = limits_of(replace(task, turn=0))
    source = numpy_source(task.seed, zlib.crc32(task.fusion.encode()), task.combo)
    case = draw_call(task.fusion, source, limits)
    case = replace(case, mode=draw_mode(case, source, limits))
    case = replace(case, schedule=draw_schedule(case, source, limits))
    return case, draw_kinds(case, source, limits)


def _affordable(case: FuzzCase, task: Task) -> FuzzCase:
    most = SLOW_BLOCKS.get(task.implementation)
    if task.accelerated or most is None:
        return case
    if work(case) > most:
        case = replace(case, schedule="heuristic")
    dynamic = [a for a in case.sizes if a in case.declaration.dynamic]
    while work(case) > most and any(case.sizes[a] > 1 for a in dynamic):
        case = replace(case, sizes={**case.sizes, **{a: max(1, case.sizes[a] // 2) for a in dynamic}})
    return case


def cases(task: Task) -> list[FuzzCase]:
    """All cases of a task's batch, those with the same sizes one after the other."""
    base, kinds = template(replace(task, turn=0, only=None, wanted=None))
    source = numpy_source(task.seed, zlib.crc32(task.fusion.encode()), task.combo, task.turn + 1)
    first = replace(base, sizes={a: 7 if a in base.declaration.dynamic else n for a, n in base.sizes.items()})
    first = replace(first, layouts=draw_layouts(first, kinds, numpy_source(task.seed, task.combo)))
    found: list[FuzzCase] = []
    for group in range(task.groups):
        if task.implementation not in JAX or group == 0:
            call = _resized(base, kinds, task, source)
            layouts = draw_layouts(call, kinds, source)
        call = replace(call, recipe=source.choose([*RECIPES, "normal", "integers"]), seed=source.integer(0, 2**30))
        seen = set()
        for _ in range(task.layouts):
            if task.implementation not in JAX:
                layouts = steady_layouts(call, kinds, first, source)
            if (key := tuple(layouts.items())) in seen:
                call = replace(call, seed=source.integer(0, 2**30))
            seen.add(key)
            found.append(replace(call, layouts=layouts))
    return found if task.only is None else found[task.only : task.only + 1]


def _resized(base: FuzzCase, kinds: dict[str, str], task: Task, source: Source) -> FuzzCase:
    """The call with other dynamic sizes: with such as meet the cell that is wanted, if one is and chance finds them."""
    limits, call = limits_of(task), base
    for _ in range(DRAWS):
        call = _affordable(redraw_dynamic(base, source, limits), task)
        if call.problem():
            call = base
        if task.wanted is None or cell(replace(call, layouts=draw_layouts(call, kinds, source))) == task.wanted:
            break
    return call


def signature(case: FuzzCase, name: str, layout: Layout) -> tuple:
    """What of a tensor's layout a compiled kernel depends on: classes of strides, and whether the first element is aligned."""
    shape, size = case.shape(name), itemsize(case.dtype(name))
    kinds = ["unit" if s == 1 else s * size % 16 == 0 for s in layout.strides(shape)]
    return (*kinds, layout.offset(shape) * size % 16 == 0)


def steady_layouts(call: FuzzCase, kinds: dict[str, str], first: FuzzCase, source: Source) -> dict[str, Layout]:
    """Layouts of the given kinds for which the kernel of `first` serves, so that random strides compile nothing anew."""
    found = {}
    for name, kind in kinds.items():
        wanted = signature(first, name, first.layout(name))
        for _ in range(16):
            drawn = draw_layouts(call, {name: kind}, source).get(name)
            if drawn is None or signature(call, name, drawn) == wanted:
                break
        else:
            drawn = first.layout(name) if kind not in ("far", "padded 16") else drawn
        if drawn is not None:
            found[name] = drawn
    return found


@functools.lru_cache(maxsize=16)
def _executor(name: str) -> Executor:
    return executor(name)


def run_task(task: Task) -> Report:
    """Run a task in this process."""
    report, made, pairs = Report(), _executor(task.implementation), []
    oracles: dict[tuple, Oracle] = {}
    begin = time.monotonic()
    for case in filter(made.supports, cases(task)):
        if pairs and time.monotonic() - begin > LONG:
            break
        key = (case.seed, *case.sizes.values())
        if key not in oracles:
            oracles[key] = Oracle.of(case, task.implementation, made.standard)
        pairs.append((case, oracles[key]))
    for verdict in run_cases(made, pairs):
        case = verdict.case
        if verdict.problems:
            report.failures.append(Failure(case, task.implementation, tuple(verdict.problems)))
            report.coverage.ran += 1
        else:
            report.coverage.note(case, verdict.launched, verdict.ratio)
            report.coverage.compiled.add(_compiled(case, task.implementation in JAX))
    return report


def _compiled(case: FuzzCase, every: bool) -> str:
    """What stands for the kernels of a case; `every` shape and layout is a compilation of its own in JAX."""
    sizes = [(a, n) for a, n in case.extents.items() if every or a not in case.declaration.dynamic]
    layouts = [(n, case.layout(n) if every else case.layout(n).kind) for n in case.memory()]
    text = repr((sizes, case.dtypes, case.params, case.mode, schedule_of(case), layouts))
    return f"{case.fusion} {zlib.crc32(text.encode()):08x}"
