"""A Plan: the launches that compute a graph under a schedule, and the scratch between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from moekit.compile import tile as t
from moekit.compile.passes import lower
from moekit.compile.rules.choose import heuristic
from moekit.compile.schedule.cuts import Scratch, launched, sections_of
from moekit.compile.schedule.directives import Abreast, Launch, Schedule
from moekit.compile.schedule.legal import legal
from moekit.compile.schedule.targets import TARGETS
from moekit.compile.tile.layouts import channels
from moekit.compile.tile.verify import verify
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
    layouts: Mapping[str, t.Layout],
    sizes: Mapping[str, int] | None = None,
    target: str | None = None,
) -> Plan:
    """Lower `graph` under `schedule` (the rules' if None) and verify every program.

    `target`: a row of `TARGETS`; where it has one number of warps, kernels have that whatever the schedule says.

    Raises ScheduleError, in one sentence, for a schedule that is not legal here.
    """
    schedule = schedule or heuristic(graph)
    if why := legal(graph, schedule):
        raise ScheduleError(why)
    viewed = any(isinstance(layout, t.Viewed) for layout in layouts.values())
    known = channels(graph, (sizes or {}) if viewed else None) | dict(layouts)
    kernels, scratch, digest = [], [], graph.digest()
    for launch, g, left in launched(graph, schedule):
        known |= {s.name: _dense(s, viewed, sizes or {}) for s in left}
        scratch += left
        kernels.append(_kernel(g, launch, known, sizes, digest, target))
    return Plan(graph, schedule, tuple(kernels), tuple(scratch))


def _kernel(graph: Graph, launch: Launch, layouts, sizes, digest: str, target: str | None) -> t.Kernel:
    """One launch: a program, or several side by side where it has several sections."""
    warps = only[0] if target and len(only := TARGETS[target].warps) == 1 else launch.warps
    programs = tuple(lower(g, s, layouts, sizes, digest, warps, launch.stages, target) for g, s in sections_of(graph, launch))
    kernel = programs[0]
    if len(programs) > 1:
        kernel = t.Joined(graph.name, programs, warps, launch.stages, digest, bool(launch.all(Abreast)))
    verify(kernel)
    return kernel


def _dense(s: Scratch, viewed: bool, sizes: Mapping[str, int]) -> t.Strided | t.Viewed:
    if viewed:
        return t.Viewed.whole(s.name, s.shape(sizes))
    kinds = []
    for d in range(len(s.axes) - 1):  # a row's stride is known, but for the dynamic sizes in it
        known = prod(n for n in s.sizes[d + 1 :] if n is not None) * itemsize(s.dtype)
        kinds.append("aligned" if known % 16 == 0 else "any")
    return t.Strided((*kinds, "unit") if s.axes else (), wide=True)
