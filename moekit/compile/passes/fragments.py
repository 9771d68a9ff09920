"""Which thread of a warpgroup holds which elements of a block, for targets that want to be told (Mosaic GPU).

Axes whose blocks meet in some value are spread together, once: a value over some of them has that layout with the others left
out, so no value ever moves between threads but in a reduction. Of a product's axes any two are spread as the matrix unit has
them, which agrees along all axes but one: columns lie in a right operand as rows do, so what that is made of is its own
(`apart.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import gcd, prod

from moekit.compile import tile as t
from moekit.compile.passes.apart import rights
from moekit.compile.schedule.matrix import COLUMNS, STEP, shared
from moekit.compile.schedule.targets import Target
from moekit.lang.dtypes import itemsize

WIDEST = 16  # bytes of one access
LINE = 128  # bytes that are asked for together: lanes of one warp are to have them all
PER_ROW = 4  # lanes of a warp along neighbours in a row of the matrix unit's blocks
SUMMED = 4  # elements of a vector that may be added up across warps: what one access of shared memory has of float32


@dataclass(frozen=True)
class Fragment:
    """How blocks over `slots` are spread: of each slot so many `warps`, `lanes` of each, and neighbours (`vector`) in a lane.

    A slot is an axis, or several of one size that never meet. What is left of a slot is in the lane's further registers; where
    there is less than a lane for each thread, threads hold the same. `turned`: lanes go along the last slot last, not first.
    `copies_first`: of warps neighbours hold other elements, and those further apart the same; else the other way about.
    """

    slots: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    warps: tuple[int, ...]
    lanes: tuple[int, ...]
    vector: tuple[int, ...]
    turned: bool = False
    copies_first: bool = False

    def has(self, axes: Iterable[str]) -> bool:
        """Whether a value over `axes` lies so, the other slots left out."""
        return {*axes} <= {a for slot in self.slots for a in slot}

    def along_slot(self, axis: str) -> tuple[int, int, int]:
        """Warps, lanes and neighbours along an axis."""
        i = next(i for i, slot in enumerate(self.slots) if axis in slot)
        return self.warps[i], self.lanes[i], self.vector[i]

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


@dataclass(frozen=True)
class Fragments:
    """How a program's blocks are spread: as one of `held` that has a value's axes; as one of `turned` where it is of `right`,
    what right operands of products are made of, or has their axes. Axes in `multiplied` are a product's."""

    held: tuple[Fragment, ...]
    turned: tuple[Fragment, ...] = ()
    right: frozenset[t.Value] = frozenset()
    multiplied: frozenset[str] = frozenset()

    def of(self, axes: Iterable[str], value: t.Value | None = None) -> Fragment:
        """How a block over `axes` is spread, that of `value`; StopIteration if the axes do not meet."""
        return next(f for f in self.among(value) if f.has(axes))

    def among(self, value: t.Value | None) -> tuple[Fragment, ...]:
        """What there is to choose from."""
        return (*self.turned, *self.held) if value in self.right else (*self.held, *self.turned)


def fragments(program: t.TileProgram, target: Target) -> Fragments:
    """How each value's block is spread; those over axes that meet, and are not multiplied, are one."""
    together = [{*v.axes} for op, _ in t.walk(program.body) for v in _made(op) if v.axes]
    products = [op for op, _ in t.walk(program.body) if isinstance(op, t.Dot)]
    held, turned = [], []
    for op in products:
        left, right, out = _multiplied(program, op, target)
        held, turned = [*held, left, out], [*turned, right]
    multiplied = frozenset(a for f in held for slot in f.slots for a in slot)
    for group in _groups(together):
        if not group & multiplied:
            slots = _slots(program, program.ordered(group), together)
            held += _crossed(_spread(_group(program, slots, together), target), together, target)
    return Fragments(tuple(dict.fromkeys(held)), tuple(dict.fromkeys(turned)), rights(program), multiplied)


def _multiplied(program: t.TileProgram, op: t.Dot, target: Target) -> tuple[Fragment, Fragment, Fragment]:
    """A product's operands and its sum, as `mma.sync` has them: rows in eight groups of lanes, and of a row's neighbours along
    the summed axis up to 16 bytes in each of a group's four, for within a step they may have any order that both operands have.
    Warps have other rows or other columns each."""
    m, n = op.out.axes
    near = min(WIDEST // itemsize(op.left.dtype), program.axis(op.axis).block // PER_ROW)
    high, wide = shared(*program.block((m, n)), target.warps[0])

    def spread(major: str, minor: str, own: tuple[int, int], vector: int, copies_first: bool = False) -> Fragment:
        both, turned = program.ordered((major, minor)), program.ordered((major, minor)) != (major, minor)
        order = slice(None, None, -1 if turned else 1)
        counts = own[order], (COLUMNS, PER_ROW)[order], (1, vector)[order]
        return Fragment(tuple((a,) for a in both), program.block(both), *counts, turned, copies_first)

    right = spread(n, op.axis, (wide, 1), near, copies_first=min(high, wide) > 1)
    return spread(m, op.axis, (high, 1), near), right, spread(m, n, (high, wide), 2)


def unspread(program: t.TileProgram, target: Target) -> str | None:
    """What of a program's products has no place in the matrix unit, as `mma.sync` has it; None if all have one."""
    products = [op for op, _ in t.walk(program.body) if isinstance(op, t.Dot)]
    for op in products:
        if {op.left.dtype, op.right.dtype} not in ({"float16"}, {"bfloat16"}):
            return f"products of {op.left.dtype}"
        m, n, k = program.block((*op.out.axes, op.axis))
        high, wide = shared(m, n, target.warps[0])
        if m % (STEP * high) or n % (COLUMNS * wide) or k % STEP:
            return f"products of blocks of {m} × {n} × {k}"
    found = fragments(program, target)
    every = (*found.held, *found.turned) if products else ()
    for axis in {a for f in every for slot in f.slots for a in slot}:
        if len({f.along_slot(axis) for f in found.held if f.has((axis,))}) > 1:
            return "products of products"
    made = [v for op, _ in t.walk(program.body) for v in _made(op) if v.axes]
    alone = all(any(f.has(v.axes) for f in (found.turned if v in found.right else found.held)) for v in made)
    return None if alone else "products whose operands are read otherwise, too,"


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


def following(program: t.TileProgram) -> dict[t.Value, tuple[str, int]]:
    """Integers that go up one by one along an axis, and in groups of how many: each begins at a multiple of that. Elements of
    an axis, some number of elements further on or back, and remainders of what is not negative."""
    ops = [op for op, _ in t.walk(program.body)]
    numbers = {op.out: op.value for op in ops if isinstance(op, t.Const)}
    found = {op.out: (op.axis, program.axis(op.axis).block) for op in ops if isinstance(op, t.Elements) and op.out.axes}
    least = dict.fromkeys(found, 0)
    for op in ops:
        if not (isinstance(op, t.Binary) and op.left in found and isinstance(number := numbers.get(op.right), int)):
            continue
        if op.op in ("add", "sub") or (op.op == "rem" and number > 0 and least[op.left] >= 0):
            axis, group = found[op.left]
            found[op.out] = axis, gcd(group, number)
            least[op.out] = {"add": least[op.left] + number, "sub": least[op.left] - number, "rem": 0}[op.op]
    return found


def neighbours(program: t.TileProgram, at: t.Access, groups: Mapping[t.Value, tuple[str, int]] | None = None) -> str | None:
    """The axis along which an access has elements that lie side by side, of all of a block or, by `following`, of groups;
    None if there is none."""
    layout = program.param(at.tensor).viewed
    if groups is None:
        groups = {op.out: (op.axis, 0) for op, _ in t.walk(program.body) if isinstance(op, t.Elements)}
    for index, axis, step in zip(at.index, layout.axes, layout.steps, strict=True):
        if axis == len(layout.base) - 1 and step == 1:
            ones = [groups[v][0] for v, own in index.terms if own == 1 and v in groups and v.axes]
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
    _take(left, lanes, order[::-1], target.lanes)
    if prod(warps) == 1:
        _take(left, warps, first, target.warps[0])
    if any(warps[i] > 1 for i in group.summed if i != near) and vector[near] > SUMMED:
        return _spread(replace(group, most=SUMMED), target)
    return Fragment(group.slots, group.sizes, tuple(warps), tuple(lanes), tuple(vector))


def _crossed(found: Fragment, together: list[set[str]], target: Target) -> list[Fragment]:
    """A slot that would be in registers alone has the lanes, too, if it never meets the slot that they are along, and is as
    many as they: as a fragment of its own, in which the slots of both lie alike."""

    def only(slots: list[int], **changed) -> Fragment:
        kept = {n: tuple(getattr(found, n)[i] for i in slots) for n in ("slots", "sizes", "warps", "lanes", "vector")}
        return replace(found, **kept | changed)

    every = range(len(found.slots))
    for along in (i for i in every if found.lanes[i] == target.lanes):
        for i in every:
            alone = found.warps[i] == found.lanes[i] == found.vector[i] == 1 and found.sizes[i] == target.lanes
            if alone and not any({*found.slots[i]} & met and {*found.slots[along]} & met for met in together):
                rest, own = [j for j in every if j != i], [j for j in every if j != along]
                return [only(rest), only(own, lanes=tuple(target.lanes if j == i else found.lanes[j] for j in own))]
    return [found]


def _take(left: list[int], taken: list[int], order: list[int], most: int) -> None:
    """Give up to `most` of what is left of each slot, in order; all are powers of two."""
    for i in order:
        some = min(left[i], most // prod(taken))
        taken[i] *= some
        left[i] //= some
