"""Which thread of a warpgroup holds which elements of a block, for targets that want to be told (Mosaic GPU).

Axes whose blocks meet in some value are spread together, once: a value over some of them has that layout with the others left
out, so no value ever moves between threads but in a reduction.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from moekit.compile import tile as t
from moekit.compile.schedule.targets import Target
from moekit.lang.dtypes import itemsize

WIDEST = 16  # bytes of one access
LINE = 128  # bytes that are asked for together: lanes of one warp are to have them all
SUMMED = 4  # elements of a vector that may be added up across warps: what one access of shared memory has of float32


@dataclass(frozen=True)
class Fragment:
    """How blocks over `slots` are spread: of each slot so many `warps`, `lanes` of each, and neighbours (`vector`) in a lane.

    A slot is an axis, or several of one size that never meet. What is left of a slot is in the lane's further registers; where
    there is less than a lane for each thread, threads hold the same.
    """

    slots: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    warps: tuple[int, ...]
    lanes: tuple[int, ...]
    vector: tuple[int, ...]

    def without(self, axes: Iterable[str]) -> tuple[int, ...]:
        """The slots that a value over `axes` does not have."""
        return tuple(i for i, slot in enumerate(self.slots) if not {*slot} & {*axes})

    def threads(self, axes: Iterable[str]) -> int:
        """How many threads hold elements of their own of a value over `axes`."""
        gone = self.without(axes)
        return prod(w * n for i, (w, n) in enumerate(zip(self.warps, self.lanes, strict=True)) if i not in gone)

    def each(self, axis: str) -> int:
        """How many elements along an axis a thread holds."""
        i = next(i for i, slot in enumerate(self.slots) if axis in slot)
        return self.sizes[i] // (self.warps[i] * self.lanes[i])

    def along(self, axis: str) -> int:
        """How many elements of an axis lie side by side in a lane."""
        return next(n for slot, n in zip(self.slots, self.vector, strict=True) if axis in slot)


def fragments(program: t.TileProgram, target: Target) -> dict[str, Fragment]:
    """How each axis's block is spread, by axis; those of axes that meet are one."""
    together = [{*v.axes} for op, _ in t.walk(program.body) for v in _made(op) if v.axes]
    found: dict[str, Fragment] = {}
    for group in _groups(together):
        slots = _slots(program, program.ordered(group), together)
        found |= dict.fromkeys(group, _spread(_group(program, slots, together), target))
    return found


def _made(op: t.Op) -> tuple[t.Value, ...]:
    return (*t.results(op), *op.vars, *op.carries) if isinstance(op, t.Loop) else t.results(op)


def contiguous(program: t.TileProgram) -> dict[str, tuple[int, int]]:
    """Axes along which some access finds neighbours in memory: the elements of the largest such block, and the bytes of one,
    negative; the narrowest where several are as large."""
    found: dict[str, tuple[int, int]] = {}
    for op, _ in t.walk(program.body):
        if isinstance(op, t.Load | t.Store) and (axis := neighbours(program, op.at)) is not None:
            size = itemsize(program.param(op.at.tensor).dtype)
            found[axis] = max(found.get(axis, (0, 0)), (prod(program.block(program.ordered(op.at.axes))), -size))
    return found


def neighbours(program: t.TileProgram, at: t.Access) -> str | None:
    """The axis along which an access has elements that lie side by side; None if there is none."""
    layout = program.param(at.tensor).viewed
    elements = {op.out: op.axis for op, _ in t.walk(program.body) if isinstance(op, t.Elements)}
    for index, axis, step in zip(at.index, layout.axes, layout.steps, strict=True):
        if axis == len(layout.base) - 1 and step == 1:
            ones = [elements[v] for v, own in index.terms if own == 1 and v in elements and v.axes]
            blocks = [v for v in index.values if v.axes]
            return ones[0] if len(ones) == len(blocks) == 1 else None
    return None


def _groups(together: list[set[str]]) -> list[set[str]]:
    """Axes that meet, directly or by way of others."""
    groups: list[set[str]] = []
    for axes in together:
        touched = [g for g in groups if g & axes]
        groups = [g for g in groups if not g & axes] + [axes.union(*touched)]
    return groups


def _slots(program: t.TileProgram, axes: tuple[str, ...], together: list[set[str]]) -> list[tuple[str, ...]]:
    """Axes in order; one of the same size as that before it takes its place where the two never meet."""
    slots: list[tuple[str, ...]] = []
    for axis in axes:
        alike = slots and program.axis(slots[-1][0]).block == program.axis(axis).block
        if alike and not any(axis in met and {*slots[-1]} & met for met in together):
            slots[-1] = (*slots[-1], axis)
        else:
            slots.append((axis,))
    return slots


@dataclass(frozen=True)
class _Group:
    """Slots that meet, their sizes, those of the largest value (`main`), those that something is added up along (`summed`), and

    where elements lie side by side in memory: `near`, the slot, `line`, how many are a line, up to how many a lane is to hold.
    """

    slots: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    main: frozenset[int]
    summed: frozenset[int]
    near: int
    line: int
    most: int


def _group(program: t.TileProgram, slots: list[tuple[str, ...]], together: list[set[str]]) -> _Group:
    """What is to be known of some axes. Not all of one is to be in a vector if something is loaded over it alone: jax 0.11

    takes that register for the block.
    """
    sizes = tuple(program.axis(slot[0]).block for slot in slots)
    within = [axes for axes in together if axes <= {a for slot in slots for a in slot}]
    largest = max(within, key=lambda axes: prod(program.block(program.ordered(axes))))
    main = frozenset(i for i, slot in enumerate(slots) if {*slot} & largest)
    found, ops = contiguous(program), [op for op, _ in t.walk(program.body)]
    reduced = {op.axis for op in ops if isinstance(op, t.Reduce | t.Scan)}
    known = [(*found[a], i) for i in main for a in slots[i] if a in found]
    _, size, near = max(known, default=(0, -WIDEST, max(main)))
    alone = any((a,) == op.out.axes for op in ops if isinstance(op, t.Load) for a in slots[near])
    most = min(WIDEST // -size, sizes[near] // 2 if alone else sizes[near])
    summed = frozenset(i for i, s in enumerate(slots) if {*s} & reduced)
    return _Group(tuple(slots), sizes, main, summed, near, max(1, LINE // -size), most)


def _spread(group: _Group, target: Target) -> Fragment:
    """Neighbours in memory to a lane, then warps along what is not added up, but for what is less than a line of neighbours,
    then lanes along neighbours first: of the largest value's slots, and of others what is left."""
    threads, n, near = target.lanes * target.warps[0], len(group.sizes), group.near
    left, vector, warps, lanes = [*group.sizes], [1] * n, [1] * n, [1] * n
    order = sorted(range(n), key=lambda i: (i in group.main, i == near))  # the last is to be taken first
    first = sorted(range(n), key=lambda i: (i not in group.main, i in group.summed, i == near))
    vector[near] = max(1, min(group.most, prod(left[i] for i in group.main) // threads))
    left[near] //= vector[near]
    if prod(left[i] for i in group.main) >= threads:
        kept = min(left[near], max(1, group.line // vector[near]))
        left[near] //= kept
        _take(left, warps, first, target.warps[0])
        left[near] *= kept
    across = any(warps[i] > 1 for i in group.summed)
    if across and vector[near] > SUMMED and near not in group.summed:
        left[near], vector[near] = left[near] * vector[near] // SUMMED, SUMMED
    _take(left, lanes, order[::-1], target.lanes)
    if prod(warps) == 1:
        _take(left, warps, first, target.warps[0])
    return Fragment(group.slots, group.sizes, tuple(warps), tuple(lanes), tuple(vector))


def _take(left: list[int], taken: list[int], order: list[int], most: int) -> None:
    """Give up to `most` of what is left of each slot, in order; all are powers of two."""
    for i in order:
        some = min(left[i], most // prod(taken))
        taken[i] *= some
        left[i] //= some
