"""Searching the legal schedules of a graph: candidates around the heuristic, each checked before it is timed."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from moekit.compile.analysis import axis_uses, gemm_axes
from moekit.compile.heuristic import heuristic
from moekit.compile.schedule import Schedule, legal, pow2
from moekit.errors import MoekitError
from moekit.lang.graph import Graph


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried: its time over the heuristic's (geometric mean over sizes), or why it was refused."""

    schedule: Schedule
    ratio: float
    problem: str | None = None


def candidates(graph: Graph) -> Iterator[Schedule]:
    """Legal schedules worth timing, the heuristic's first."""
    base = heuristic(graph)
    gemm = next((g for g in (gemm_axes(graph, i) for i in graph.live()) if g), None)
    options = _gemm_options(graph, base, gemm) if gemm else _row_options(graph, base)
    seen = set()
    for schedule in itertools.chain([base], options):
        if schedule not in seen and legal(graph, schedule) is None:
            seen.add(schedule)
            yield schedule


def _row_options(graph: Graph, base: Schedule) -> Iterator[Schedule]:
    """Rows per program, the block of the innermost parallel axis, warps."""
    uses = axis_uses(graph)
    parallel = [a for a, u in uses.items() if u.parallel]
    rows = [a for a in parallel if uses[a].extent is None]
    columns = [a for a in parallel if uses[a].extent is not None]
    inner = columns[-1:] if columns else []
    row_blocks = (1, 2, 4, 8)
    widest = pow2(uses[inner[0]].extent or 1) if inner else 1
    column_blocks = [b for b in (512, 256, 1024, 128, 64, 32, 16, 8, 4, 2, 1) if b <= widest]
    for warps, r, c in itertools.product((4, 8, 2, 1, 16), row_blocks, column_blocks if inner else (1,)):
        schedule = replace(base, warps=warps)
        for a in rows[:1]:
            schedule = schedule.with_axis(a, block=r)
        for a in inner:
            schedule = schedule.with_axis(a, block=c)
        yield schedule


def _gemm_options(graph: Graph, base: Schedule, gemm) -> Iterator[Schedule]:
    """Column blocks, depth of the contracted block, warps and stages, at the smallest tile of rows.

    The split stays, and where its parts begin: other numbers of rows have tiles of their own, which add up alike.
    """
    depth, parts = graph.axes[gemm.k] or 0, dict(base.split).get(gemm.k, 1)
    deep = [k for k in (256, 128, 64) if depth % (parts * k) == 0] or [base.block(gemm.k)]
    for k, n, warps, stages in itertools.product(deep, (32, 16, 64), (4, 2, 8), (3, 2, 4)):
        yield replace(base.with_axis(gemm.n, block=n).with_axis(gemm.k, block=k), warps=warps, stages=stages)


def search(
    graph: Graph,
    measure: Callable[[Schedule], list[float]],
    check: Callable[[Schedule], str | None],
    seconds: float,
    progress: Callable[[Trial, float], None] = lambda trial, spent: None,
) -> list[Trial]:
    """Trials in the order they were made, within a time budget; `measure` gives a time per size, `check` a problem or None."""
    trials: list[Trial] = []
    start, base = time.monotonic(), None
    for schedule in candidates(graph):
        if trials and time.monotonic() - start > seconds:
            break
        trials.append(_try(schedule, measure, check, base))
        if base is None:
            base = measure(schedule)
            trials[-1] = Trial(schedule, 1.0)
        progress(trials[-1], time.monotonic() - start)
    return trials


def _try(schedule: Schedule, measure, check, base: list[float] | None) -> Trial:
    try:
        if problem := check(schedule):
            return Trial(schedule, math.inf, problem)
        if base is None:
            return Trial(schedule, 1.0)
        times = measure(schedule)
    except MoekitError as error:
        return Trial(schedule, math.inf, str(error))
    except Exception as error:  # a schedule the compiler cannot serve (shared memory, registers) is a refused one
        return Trial(schedule, math.inf, f"{type(error).__name__}: {error}".splitlines()[0])
    logs = [math.log(t / b) for t, b in zip(times, base, strict=True)]
    return Trial(schedule, math.exp(sum(logs) / len(logs)))


def best(trials: list[Trial]) -> Trial:
    """The fastest trial without a problem."""
    return min((t for t in trials if t.problem is None), key=lambda t: t.ratio)
