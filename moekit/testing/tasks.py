"""The work of a campaign in pieces that a worker process can take: which cases a piece has follows from its numbers alone."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, field, replace

from moekit.lang.dtypes import itemsize
from moekit.testing.batch import Verdict, run_cases
from moekit.testing.case import FuzzCase, find_fusion
from moekit.testing.coverage import Cell, Coverage, blocks, cell
from moekit.testing.draw import (
    Limits,
    draw_call,
    draw_kinds,
    draw_layouts,
    draw_mode,
    draw_schedule,
    redraw_dynamic,
)
from moekit.testing.executors import JAX, Executor, executor, schedule_of
from moekit.testing.layouts import KINDS, VIEWS, Layout, Source, numpy_source
from moekit.testing.oracle import Oracle
from moekit.testing.peers import PEERS
from moekit.testing.values import RECIPES

ON_CPU = frozenset({"interpret", "numpy", "eager", "triton-interpreter", "pallas", "xla"})
SLOW_BLOCKS = 160  # blocks of work beyond which the interpreters are too slow for a campaign
EDGE_TURN = 25  # every so manieth turn of a call may have fewer elements than count
DRAWS = 60  # how often sizes are drawn to meet a wanted cell


@dataclass(frozen=True)
class Task:
    """Cases `start` to `stop` of one batch: call number `combo` of a fusion (what costs a compilation), turn `turn` of it.

    A batch has `groups` sets of sizes and values, each run with `layouts` sets of strides; where strides come out as before,
    the values are new, so that no case is another's twin. `accelerated`: on a GPU. `wanted`: sizes and strides are drawn to
    fall into that cell.
    """

    fusion: str
    implementation: str
    seed: int
    combo: int
    turn: int
    groups: int = 8
    layouts: int = 8
    accelerated: bool = False
    start: int = 0
    stop: int = 1_000_000
    wanted: Cell | None = None

    @property
    def size(self) -> int:
        """How many cases it has."""
        return min(self.stop, self.groups * self.layouts) - self.start

    def halves(self) -> list[Task]:
        """The task in two, or nothing if it is one case."""
        if self.size < 2:
            return []
        stop = self.start + self.size
        middle = (self.start + stop) // 2
        return [replace(self, stop=middle), replace(self, start=middle, stop=stop)]


@dataclass
class Report:
    """What a worker sends back for a task."""

    task: Task
    coverage: Coverage = field(default_factory=Coverage)
    failures: list[tuple[FuzzCase, list[str]]] = field(default_factory=list)


def limits_of(task: Task) -> Limits:
    """How far the cases of a task may go."""
    edge = task.wanted is None and task.turn % EDGE_TURN == EDGE_TURN - 1
    elements = 5_000 if task.accelerated else 2500
    name, kinds, modes = task.implementation, KINDS, ("out", "in place", "over", "plain")
    schedules: tuple[str, ...] = Limits().schedules
    dtypes: tuple[str, ...] = Limits().dtypes
    if name in JAX:
        kinds, modes = VIEWS, ("out", "in place", "plain")
    if name in ("numpy", "eager", "xla"):
        schedules = ("heuristic",)
    if name in PEERS:
        kinds, dtypes, schedules = PEERS[name].kinds, PEERS[name].dtypes, ("heuristic",)
    integers = tuple(d for d in Limits().integers if name not in JAX or d != "int64")  # which JAX has only if told to
    return Limits(elements, 0 if edge else 64, kinds, modes, schedules, dtypes, integers)


@functools.lru_cache(maxsize=512)
def template(task: Task) -> tuple[FuzzCase, tuple[tuple[str, str], ...]]:
    """The call that a combo stands for, and the kind of layout of each of its tensors."""
    limits = limits_of(replace(task, turn=0))
    source = numpy_source(task.seed, zlib.crc32(task.fusion.encode()), task.combo)
    fusion = find_fusion(task.fusion)
    case = draw_call(fusion, task.fusion, source, limits)
    case = replace(case, mode=draw_mode(case, source, limits))
    case = replace(case, schedule=draw_schedule(case, source, limits))
    return case, tuple(draw_kinds(case, source, limits).items())


def work(case: FuzzCase) -> int:
    """Blocks that an interpreter goes through for a case."""
    total = 1
    for axis, block in blocks(case).items():
        total *= max(1, -(-case.extents[axis] // block))
    return total


def _affordable(case: FuzzCase, task: Task) -> FuzzCase:
    if task.accelerated or task.implementation not in ("interpret", "triton-interpreter", "pallas"):
        return case
    most = SLOW_BLOCKS if task.implementation == "interpret" else SLOW_BLOCKS // 4
    if work(case) > most and case.schedule != "heuristic":
        case = replace(case, schedule="heuristic")
    while work(case) > most and any(case.sizes[a] > 1 for a in case.sizes if a in case.declaration.dynamic):
        case = replace(case, sizes={a: max(1, n // 2) if a in case.declaration.dynamic else n for a, n in case.sizes.items()})
    return case


def cases(task: Task) -> list[list[FuzzCase]]:
    """All cases of a task's batch, in groups that share their sizes."""
    base, kinds = template(replace(task, turn=0, start=0, stop=1, wanted=None))
    source = numpy_source(task.seed, zlib.crc32(task.fusion.encode()), task.combo, task.turn + 1)
    odd = {**base.sizes, **{a: 7 for a in base.sizes if a in base.declaration.dynamic}}
    first = replace(base, sizes=odd)
    first = replace(first, layouts=draw_layouts(first, dict(kinds), numpy_source(task.seed, task.combo)))
    found: list[list[FuzzCase]] = []
    for _ in range(task.groups):
        if task.implementation not in JAX or not found:
            call = _resized(base, dict(kinds), task, source)
            layouts = draw_layouts(call, dict(kinds), source)
        call = replace(call, recipe=source.choose([*RECIPES, "normal", "integers"]), seed=source.integer(0, 2**30))
        group, seen = [], set()
        for _ in range(task.layouts):
            if task.implementation not in JAX:
                layouts = steady_layouts(call, dict(kinds), first, source)
            if (key := tuple(layouts.items())) in seen:
                call = replace(call, seed=source.integer(0, 2**30))
            seen.add(key)
            group.append(replace(call, layouts=layouts))
        found.append(group)
    return found


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
    report = Report(task)
    made = _executor(task.implementation)
    number, pairs = 0, []
    for group in cases(task):
        oracles: dict[int, Oracle] = {}
        for case in group:
            if task.start <= number < task.stop and made.supports(case):
                if case.seed not in oracles:
                    oracles[case.seed] = Oracle.of(case, task.implementation, made.standard)
                pairs.append((case, oracles[case.seed]))
            number += 1
    for (case, _), verdict in zip(pairs, run_cases(made, pairs), strict=True):
        _note(report, case, verdict)
    return report


def _note(report: Report, case: FuzzCase, verdict: Verdict) -> None:
    coverage = report.coverage
    if verdict.problems:
        report.failures.append((case, verdict.problems))
        coverage.ran += 1
        return
    coverage.note(case, verdict.launched, verdict.ratio)
    every = report.task.implementation in JAX  # where any shape and layout is a compilation of its own
    sizes = [(a, n) for a, n in case.extents.items() if every or a not in case.declaration.dynamic]
    layouts = [(n, case.layout(n) if every else case.layout(n).kind) for n in case.memory()]
    text = repr((sizes, case.dtypes, case.params, case.mode, schedule_of(case), layouts))
    coverage.compiled.add(f"{case.fusion} {zlib.crc32(text.encode()):08x}")
