"""Schedules: which axes a program holds whole, loops over or is one block of, and how large the blocks are."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moekit.compile.analysis import AxisUse, axis_uses, gemm_axes
from moekit.errors import ScheduleError
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph

MODES = ("grid", "whole", "loop")
WARPS = (1, 2, 4, 8, 16, 32)
LARGEST_TILE = 2**17
WHOLE_TILE = 2**14
ROW_TILE = 2**11


@dataclass(frozen=True)
class Schedule:
    """How a graph is cut into programs.

    `axes`: for each axis its mode (`grid`, `whole`, `loop`) and block, a power of two. `split`: contracted axes of which
    several programs each do a part, added up in a second launch. `warps` and `stages` are the compiler's.
    """

    axes: tuple[tuple[str, str, int], ...]
    split: tuple[tuple[str, int], ...] = ()
    warps: int = 4
    stages: int = 2

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
        split = "".join(f" split:{a}:{n}" for a, n in self.split)
        return f"{axes}{split} warps:{self.warps} stages:{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read what `str` writes: `T:grid:1 H:loop:1024 split:D:4 warps:4 stages:2`."""
        axes, split, rest = [], [], {}
        try:
            for word in text.split():
                parts = word.split(":")
                if parts[0] == "split":
                    split.append((parts[1], int(parts[2])))
                elif parts[0] in ("warps", "stages"):
                    rest[parts[0]] = int(parts[1])
                else:
                    axes.append((parts[0], parts[1], int(parts[2])))
        except (IndexError, ValueError):
            raise ScheduleError(f"cannot read schedule {text!r}; write AXIS:MODE:BLOCK … warps:N stages:N") from None
        return cls(tuple(axes), tuple(split), **rest)


def pow2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, n - 1).bit_length()


def legal(graph: Graph, schedule: Schedule) -> str | None:
    """None if `schedule` can be used for `graph`, else one sentence saying why not."""
    uses = axis_uses(graph)
    given = [a for a, _, _ in schedule.axes]
    for axis in uses:
        if given.count(axis) != 1:
            return f"{graph.name}: the schedule must say once what is done with axis {axis}; it speaks of {', '.join(given)}"
    for axis, mode, block in schedule.axes:
        if axis not in uses:
            return f"{graph.name}: the schedule names axis {axis}, which the fusion does not use; it has {', '.join(uses)}"
        if problem := _axis_problem(uses[axis], mode, block):
            return f"{graph.name}: axis {axis} cannot be {mode} in blocks of {block}: {problem}"
    if schedule.warps not in WARPS or not 1 <= schedule.stages <= 8:
        return f"{graph.name}: {schedule.warps} warps and {schedule.stages} stages; warps are one of {WARPS}, stages 1 to 8"
    for axis, parts in schedule.split:
        if problem := _split_problem(graph, schedule, axis, parts):
            return f"{graph.name}: axis {axis} cannot be split in {parts}: {problem}"
    for axis in scattered(graph):
        if axis in uses and schedule.block(axis) != 1:
            return f"{graph.name}: an output is put at ids along {axis}, so its block must be 1, not {schedule.block(axis)}"
    tile = largest_tile(graph, schedule)
    if tile > LARGEST_TILE:
        return f"{graph.name}: a block of {tile} elements is over the limit of {LARGEST_TILE}; use smaller blocks or loop"
    return None


def scattered(graph: Graph) -> set[str]:
    """The axes along which `put` ids vary."""
    return {a for w in graph.writes for n in w.ids for a in graph.nodes[n].axes}


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
    if any(axis in graph.nodes[w.value].axes for w in graph.writes):
        return "an output runs along it"
    if len(reduction_levels(graph, {axis})[1]) > 1:
        return "one of its reductions needs the result of another"
    summed = [n for n in (graph.nodes[i] for i in graph.live()) if n.op in ("reduce", "contract") and n.attr("axis") == axis]
    if len({frozenset(a for a in n.axes if schedule.mode(a) == "grid") for n in summed}) > 1:
        return "its reductions vary over different axes of the grid, so programs would write the same partial result"
    return None


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
    return all(schedule.block(a) >= 16 for a in (*rows, *columns, k))


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


def heuristic(graph: Graph) -> Schedule:
    """A good schedule without tuning. It never depends on a dynamic size, so a row's result does not depend on T."""
    uses = axis_uses(graph)
    for node in graph.live():
        gemm = gemm_axes(graph, node)
        if gemm and all(uses[a].parallel for a in (gemm.m, gemm.n)) and (uses[gemm.k].extent or 16) >= 16:
            return _gemm_schedule(graph, uses, gemm, node)
    return _row_schedule(graph, uses)


def _gemm_schedule(graph: Graph, uses: dict[str, AxisUse], gemm, node: int) -> Schedule:
    wide = itemsize(graph.nodes[graph.nodes[node].args[0]].dtype) == 4
    k_block = min(pow2(uses[gemm.k].extent or 64), 32 if wide else 128)
    blocks = {a: 1 if a in scattered(graph) else b for a, b in ((gemm.m, 16), (gemm.n, 32), (gemm.k, max(16, k_block)))}
    axes = []
    for a, use in uses.items():
        if a in (gemm.m, gemm.n):
            axes.append((a, "grid", blocks[a]))
        elif a == gemm.k and not use.whole:
            axes.append((a, "loop", blocks[a]))
        else:
            axes.append(_other_axis(use))
    return _shrunk(graph, Schedule(tuple(axes), warps=4, stages=3))


def _other_axis(use: AxisUse) -> tuple[str, str, int]:
    if use.parallel:
        return use.name, "grid", 1
    if use.extent is not None and (use.whole or pow2(use.extent) <= ROW_TILE):
        return use.name, "whole", pow2(use.extent)
    return use.name, "loop", 64


def _row_schedule(graph: Graph, uses: dict[str, AxisUse]) -> Schedule:
    """Rows: reduced axes whole while they fit, then the innermost parallel axis, then several rows a program."""
    chosen: dict[str, tuple[str, int]] = {}
    tile = 1
    inner = [u for u in uses.values() if not u.parallel]
    for use in sorted(inner, key=lambda u: (not u.whole, u.extent is None, u.extent or 0)):
        if use.extent is not None and (use.whole or tile * pow2(use.extent) <= WHOLE_TILE):
            chosen[use.name] = ("whole", pow2(use.extent))
        else:
            chosen[use.name] = ("loop", max(1, min(pow2(use.extent or 64), ROW_TILE // min(tile, ROW_TILE))))
        tile *= chosen[use.name][1]
    budget = ROW_TILE // 2 if not inner else 2 * ROW_TILE if _contracts(graph) else ROW_TILE // 4
    columns = [u for u in uses.values() if u.parallel]
    for use in reversed(columns):
        extent = use.extent if use.extent is not None else 8
        block = 1 if use.name in scattered(graph) else max(1, min(pow2(extent), budget // tile, 1024))
        chosen[use.name] = ("grid", block)
        tile *= block
    schedule = Schedule(tuple((a, *chosen[a]) for a in uses), stages=1 if all(m != "loop" for m, _ in chosen.values()) else 2)
    return _shrunk(graph, schedule)


def _contracts(graph: Graph) -> bool:
    return any(graph.nodes[i].op == "contract" for i in graph.live())


def _shrunk(graph: Graph, schedule: Schedule) -> Schedule:
    """Smaller grid and loop blocks until the largest block is one a program can hold; warps to match it."""
    while (tile := largest_tile(graph, schedule)) > WHOLE_TILE:
        free = [(b, a) for a, m, b in schedule.axes if m != "whole" and b > 1]
        whole = [(b, a) for a, m, b in schedule.axes if m == "whole" and not axis_uses(graph)[a].whole and b > ROW_TILE]
        if free:
            block, axis = max(free)
            schedule = schedule.with_axis(axis, block=block // 2)
        elif whole:
            schedule = schedule.with_axis(max(whole)[1], mode="loop", block=ROW_TILE)
        else:
            break
    return replace(schedule, warps=_warps(graph, schedule, tile))


def _warps(graph: Graph, schedule: Schedule, tile: int) -> int:
    """Warps for the largest block. Measured with `moekit tune` on an H200: element-wise blocks want 4 elements a lane (0.77 to
    0.87 of the time with 16), reductions 16."""
    live = graph.live()
    if any(graph.nodes[i].op == "contract" and uses_dot(graph, schedule, i) for i in live):
        return 4
    reduces = any(graph.nodes[i].op in ("reduce", "contract", "cumsum", "top_k") for i in live)
    return max(1, min(16, tile // 512)) if reduces else max(1, min(8, tile // 128))
