"""A Plan: the launches that compute a graph, and the scratch between them. One launch, or two where an axis is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moekit.compile import tile as t
from moekit.compile.analysis import has_gemm
from moekit.compile.gemm import deeper
from moekit.compile.heuristic import heuristic, joined_warps, section_schedule
from moekit.compile.lower import lower
from moekit.compile.schedule import Schedule, fitted, legal
from moekit.compile.sections import meant, sections
from moekit.compile.split import Scratch, cut
from moekit.compile.verify import verify
from moekit.errors import ScheduleError
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph


@dataclass(frozen=True)
class Plan:
    """Kernels in launch order, and their scratch."""

    graph: Graph
    schedule: Schedule
    programs: tuple[t.Kernel, ...]
    scratch: tuple[Scratch, ...]

    def __str__(self) -> str:
        return "\n\n".join(str(p) for p in self.programs)


def plan(
    graph: Graph,
    schedule: Schedule | None,
    layouts: Mapping[str, t.Strided | t.Viewed],
    sizes: Mapping[str, int] | None = None,
) -> Plan:
    """Lower `graph` under `schedule` (the heuristic's if None) and verify every program.

    Raises ScheduleError, in one sentence, for a schedule that is not legal here.
    """
    schedule = schedule or heuristic(graph)
    if why := legal(graph, schedule):
        raise ScheduleError(why)
    digest = graph.digest()
    if not schedule.split:
        return Plan(graph, schedule, (_kernel(graph, schedule, (), layouts, sizes, digest),), ())
    first, second, scratch = cut(graph, *schedule.split[0])
    viewed = any(isinstance(layout, t.Viewed) for layout in layouts.values())
    layouts = dict(layouts) | {s.name: _dense(s, viewed, sizes or {}) for s in scratch}
    programs = (
        _kernel(first, schedule, schedule.split, layouts, sizes, digest),
        _kernel(second, None, (), layouts, sizes, digest),
    )
    return Plan(graph, schedule, programs, scratch)


def _kernel(graph: Graph, schedule: Schedule | None, split, layouts, sizes, digest: str) -> t.Kernel:
    """One launch: a program, or several side by side where outputs vary over different axes."""
    pairs = scheduled(graph, schedule, split)
    programs = tuple(lower(g, s, layouts, sizes, digest) for g, s in pairs)
    kernel = programs[0]
    if len(programs) > 1:
        abreast = not split and all(has_gemm(g) for g, _ in pairs) and _same_rows(programs)
        stages = max(s.stages for _, s in pairs)
        kernel = t.Joined(graph.name, programs, joined_warps(pairs), stages, digest, abreast)
    verify(kernel)
    return kernel


def _same_rows(programs: tuple[t.TileProgram, ...]) -> bool:
    """Whether programs share the blocks of their outermost axis, and nothing else that they are numbered by is dynamic."""
    outermost = {p.axis(p.grid[0]) if p.grid else None for p in programs}
    return len(outermost) == 1 and None not in outermost and all(p.axis(a).extent for p in programs for a in p.grid[1:])


def scheduled(graph: Graph, schedule: Schedule | None, split) -> list[tuple[Graph, Schedule]]:
    """The sections of one launch, each with its schedule: the one given where it is meant, else the heuristic's.

    Beside a GEMM, sections without one go their own way: how they add up may then not depend on the GEMM's block of rows, which
    is chosen by T.
    """
    parts = sections(graph)
    own = [section_schedule(g, split) for g in parts]
    if schedule is None:
        return list(zip(parts, own, strict=True))
    led = meant(parts)
    said = [fitted(g, schedule, s) if g in led else s for g, s in zip(parts, own, strict=True)]
    return [(g, deeper(g, s) if len(parts) > 1 and g in led else s) for g, s in zip(parts, said, strict=True)]


def _dense(s: Scratch, viewed: bool, sizes: Mapping[str, int]) -> t.Strided | t.Viewed:
    if viewed:
        shape, n = s.shape(sizes), len(s.axes)
        return t.Viewed(s.name, shape, tuple(range(n)), (0,) * n, (1,) * n)
    kinds = []
    for d in range(len(s.axes) - 1):  # a row's stride is known, but for the dynamic sizes in it
        known = prod(n for n in s.sizes[d + 1 :] if n is not None) * itemsize(s.dtype)
        kinds.append("aligned" if known % 16 == 0 else "any")
    return t.Strided((*kinds, "unit"), wide=True)
