"""Schedules: which axes a program holds whole, loops over or is one block of, and how large the blocks are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moekit.compile.analysis import AxisUse, axis_uses, reach, scattered
from moekit.compile.sections import meant, sections
from moekit.compile.split import cut
from moekit.compile.stores import in_order
from moekit.errors import ScheduleError
from moekit.lang.graph import Graph

MODES = ("grid", "whole", "loop")
WARPS = (1, 2, 4, 8, 16, 32)
LARGEST_TILE = 2**17
MATRIX = 16  # elements of each axis from which on the matrix unit takes a product


@dataclass(frozen=True)
class Schedule:
    """How a graph is cut into programs.

    `axes`: for each axis its mode (`grid`, `whole`, `loop`) and block, a power of two. `split`: a contracted axis of which
    several programs each do a part, added up in a second launch; `parts`: one of which each program does the parts one after
    the other, which gives the same bits. `warps` and `stages` are the compiler's. Where a launch has several sections
    (sections.py), one that cannot take an axis as it is written here takes it as the heuristic would, one without a GEMM beside
    a GEMM takes all of them so, and one whose programs do all parts of few columns loops over them in twice the depth.
    """

    axes: tuple[tuple[str, str, int], ...]
    split: tuple[tuple[str, int], ...] = ()
    warps: int = 4
    stages: int = 2
    parts: tuple[tuple[str, int], ...] = ()

    def mode(self, axis: str) -> str:
        """`grid`, `whole` or `loop`."""
        return next(m for a, m, _ in self.axes if a == axis)

    def block(self, axis: str) -> int:
        """Elements of `axis` that a program holds at a time."""
        return next(b for a, _, b in self.axes if a == axis)

    def with_axis(self, axis: str, mode: str | None = None, block: int | None = None) -> Schedule:
        """The same schedule with one axis changed."""
        changed = tuple((a, mode or m, block or b) if a == axis else (a, m, b) for a, m, b in self.axes)
        return replace(self, axes=changed)

    def __str__(self) -> str:
        axes = " ".join(f"{a}:{m}:{b}" for a, m, b in self.axes)
        split = "".join(f" split:{a}:{n}" for a, n in self.split) + "".join(f" parts:{a}:{n}" for a, n in self.parts)
        return f"{axes}{split} warps:{self.warps} stages:{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what `str` writes: `T:grid:1 H:loop:1024 split:D:4 warps:4 stages:2`."""
        axes, several, rest = [], {"split": [], "parts": []}, {}
        try:
            for word in text.split():
                parts = word.split(":")
                if parts[0] in several:
                    several[parts[0]].append((parts[1], int(parts[2])))
                elif parts[0] in ("warps", "stages"):
                    rest[parts[0]] = int(parts[1])
                else:
                    axes.append((parts[0], parts[1], int(parts[2])))
        except (IndexError, ValueError):
            raise ScheduleError(f"cannot read schedule {text!r}; write AXIS:MODE:BLOCK … warps:N stages:N") from None
        return cls(tuple(axes), tuple(several["split"]), parts=tuple(several["parts"]), **rest)


def pow2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def launches(graph: Graph, schedule: Schedule) -> tuple[tuple[Graph, ...], ...]:
    """The sections of each launch, the first launch's first."""
    if not schedule.split:
        return (sections(graph),)
    first, second, _ = cut(graph, *schedule.split[0])
    return sections(first), sections(second)


def legal(graph: Graph, schedule: Schedule) -> str | None:
    """None if `schedule` can be used for `graph`, else one sentence saying why not."""
    uses = axis_uses(graph)
    given = [a for a, _, _ in schedule.axes]
    for axis in uses:
        if given.count(axis) != 1:
            return f"{graph.name}: the schedule must say once what is done with axis {axis}; it speaks of {', '.join(given)}"
    for axis, _, _ in schedule.axes:
        if axis not in uses:
            return f"{graph.name}: the schedule names axis {axis}, which the fusion does not use; it has {', '.join(uses)}"
    if schedule.warps not in WARPS or not 1 <= schedule.stages <= 8:
        return f"{graph.name}: {schedule.warps} warps and {schedule.stages} stages; warps are one of {WARPS}, stages 1 to 8"
    if len(schedule.split) + len(schedule.parts) > 1:
        return f"{graph.name}: only one axis can be split or done in parts, the schedule says {schedule}"
    for axis, parts in (*schedule.split, *schedule.parts):
        if problem := _split_problem(graph, schedule, axis, parts):
            return f"{graph.name}: axis {axis} cannot be split in {parts}: {problem}"
    every = launches(graph, schedule)
    for axis, mode, block in schedule.axes:
        found = [axis_uses(g) for g in every[0]]
        found = [u[axis] for u in found if axis in u] or [u[axis] for g in every[-1] if axis in (u := axis_uses(g))]
        problems = [_axis_problem(use, mode, block) for use in found]
        if problems and all(problems):
            return f"{graph.name}: axis {axis} cannot be {mode} in blocks of {block}: {problems[0]}"
    for axis in scattered(graph):
        if axis in uses and schedule.block(axis) != 1:
            return f"{graph.name}: an output is put at ids along {axis}, so its block must be 1, not {schedule.block(axis)}"
    tile = max(largest_tile(g, fitted(g, schedule, None)) for g in meant(every[0]))
    if tile > LARGEST_TILE:
        return f"{graph.name}: a block of {tile} elements is over the limit of {LARGEST_TILE}; use smaller blocks or loop"
    said = {(a, mode) for a, mode, _ in schedule.axes}
    try:
        for g in meant(every[0]):
            in_order(g, {a for a, use in axis_uses(g).items() if not use.whole and (a, "loop") in said})
    except ScheduleError as error:
        return str(error)
    return None


def fitted(section: Graph, schedule: Schedule, base: Schedule | None) -> Schedule:
    """`schedule` for one section of a launch: its axes as they are where that is legal, else as `base` has them.

    A part axis, which no schedule speaks of, is on the grid where partial results are made.
    """
    axes = []
    for axis, use in axis_uses(section).items():
        said = next((x for x in schedule.axes if x[0] == axis), (axis, "grid", 1))
        if _axis_problem(use, *said[1:]):
            said = next((x for x in base.axes if x[0] == axis), said) if base else (axis, "loop", 1)
        axes.append(said)
    return replace(schedule, axes=tuple(axes), parts=tuple(p for p in schedule.parts if p[0] in axis_uses(section)))


def _axis_problem(use: AxisUse, mode: str, block: int) -> str | None:
    if mode not in MODES:
        return f"a mode is one of {', '.join(MODES)}"
    if block < 1 or block & (block - 1):
        return "a block is a power of two"
    if mode == "grid" and not use.parallel:
        return "it is reduced, scanned or missing from an output, so one program must see all of it"
    if mode == "whole" and (use.extent is None or block < use.extent):
        return "its size is dynamic" if use.extent is None else f"it has {use.extent} elements"
    if use.whole and mode != "whole":
        return "a scan or top_k runs along it, so it must be whole"
    return None


def _split_problem(graph: Graph, schedule: Schedule, axis: str, parts: int) -> str | None:
    uses = axis_uses(graph)
    if axis not in uses or not uses[axis].reduced or uses[axis].extent is None:
        return "only a reduced axis of static size can be split"
    if schedule.mode(axis) != "loop":
        return "a split axis is looped over"
    if not 2 <= parts <= 64:
        return "the parts are 2 to 64"
    if schedule.parts and any(axis in reach(graph, w) for w in graph.writes):
        return "an output runs along it, so its parts cannot be done one after the other by one program"
    if not legal_split(graph, axis):
        return "one of its reductions needs the result of another"
    return None


def legal_split(graph: Graph, axis: str) -> bool:
    """Whether all reductions over `axis` are equally deep, so that one launch can make partial results of them all."""
    return len(reduction_levels(graph, {axis})[1]) == 1


def reduction_levels(graph: Graph, axes: set[str]) -> tuple[dict[int, int], set[int]]:
    """For every live node how many reductions over `axes` lie beneath it in a row; and the set of reductions' depths."""
    level: dict[int, int] = {}
    depths: set[int] = set()
    for i in graph.live():
        node = graph.nodes[i]
        level[i] = max((level[a] for a in node.args), default=0)
        if node.op in ("reduce", "contract") and node.attr("axis") in axes:
            depths.add(level[i])
            level[i] += 1
    return level, depths


def uses_dot(graph: Graph, schedule: Schedule, node: int) -> bool:
    """Whether a contraction runs on the matrix unit: one wide axis on each side, none shared, 16 or more of each."""
    n = graph.nodes[node]
    left, right = (set(graph.nodes[a].axes) for a in n.args)
    k = n.attr("axis")
    wide = {a for a in left | right if schedule.block(a) > 1}
    rows, columns = (left - right) & wide, (right - left) & wide
    if len(rows) != 1 or len(columns) != 1 or (left & right & wide) - {k}:
        return False
    return all(schedule.block(a) >= MATRIX for a in (*rows, *columns, k))


def largest_tile(graph: Graph, schedule: Schedule) -> int:
    """Elements of the largest block any value needs."""
    largest = 1
    for i in graph.live():
        node = graph.nodes[i]
        axes = set(node.axes)
        if node.op == "contract" and not uses_dot(graph, schedule, i):
            axes.add(node.attr("axis"))
        size = 1
        for a in axes:
            size *= schedule.block(a)
        largest = max(largest, size)
    return largest
