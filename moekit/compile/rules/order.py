"""In which order programs add up: what a row's bits depend on beside the row itself.

Two plans of one graph with the same order give the same bits. Schedules that are chosen by the number of tokens have to agree
in it, so that a row's result does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import TypeGuard

from moekit.compile import tile as t
from moekit.lang.dtypes import STORED, is_float

Order = frozenset[tuple]
TALL, WARPGROUP = 64, 4  # rows of a left operand and warps from which on the matrix unit has one instruction for them


def order(programs: Iterable[t.Kernel]) -> Order:
    """What of its programs decides in which order floats are added up.

    - A product on the matrix unit goes along its axis one step after the other, from the beginning of the axis or of each part:
      where parts begin counts, the blocks and the warps do not. (Seen on compute capability 9.0: the instructions for tiles of
      16 rows, and of 64 and more, give the same bits.) But for fewer than 64 rows of a left operand Triton 3.6 takes neighbours
      of a converted operand, one of float8, in another order; and of two float8 operands these instructions are others, whose
      sums have more bits.
    - A sum within a block is a tree over the threads that hold it. Along a block's innermost axis, in the layout of a load, it
      is that of one row (`_lanes`); else the whole block's shape and the number of warps count.
    - A sum over a loop's turns goes turn by turn: the step counts, and how many turns there are.
    """
    return frozenset(said for kernel in programs for p in kernel.sections for said in _said(p, p.body, kernel.warps))


def _said(program: t.TileProgram, body: tuple[t.Op, ...], warps: int) -> Iterator[tuple]:
    products = {op.out for op, _ in t.walk(program.body) if isinstance(op, t.Dot)}
    for op in body:
        if isinstance(op, t.Dot):
            axis = program.axis(op.axis)
            yield "product", axis.name, axis.share if axis.parts > 1 else axis.extent
            if op.left.dtype in STORED:
                yield "float8", axis.name, program.axis(op.out.axes[0]).block >= TALL and not warps % WARPGROUP
            elif _converted(program) & {op.left, op.right}:
                yield "converted", axis.name, program.axis(op.out.axes[0]).block >= TALL and not warps % WARPGROUP
        elif _adds(op):
            loads = [o.out.axes for o in body if isinstance(o, t.Load)]
            if isinstance(op, t.Reduce) and op.axis == op.value.axes[-1] and op.value.axes in loads:
                yield "row", op.axis, *_lanes(program.block(op.value.axes), warps)
            else:
                yield "tree", op.axis, tuple((a, program.axis(a).block) for a in op.value.axes), warps
        elif isinstance(op, t.Loop):
            products |= {out for end in op.body if isinstance(end, t.AtEnd) for out, v in _otherwise(end) if v in products}
            if any(is_float(v.dtype) and v not in products for v in op.yields):
                block = program.axis(op.over[0]) if isinstance(op.over[0], str) else t.AxisBlock("", op.over[0], 1, "loop")
                yield "turns", block.length, block.block
            yield from _said(program, op.body, warps)


def _converted(program: t.TileProgram) -> set[t.Value]:
    """What is cast, once or several times, from a dtype that is only stored."""
    found: set[t.Value] = set()
    for op in (op for op, _ in t.walk(program.body) if isinstance(op, t.Cast)):
        found |= {op.out} if op.value.dtype in STORED or op.value in found else set()
    return found


def _otherwise(end: t.AtEnd) -> Iterator[tuple[t.Value, t.Value]]:
    return zip(end.outs, end.otherwise, strict=True)


def _lanes(shape: tuple[int, ...], warps: int) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    """How long a row is, and how Triton shares it out: elements that lie together, lanes, warps.

    First a lane takes as many as it loads at once, at most 16 bytes and no more than it has in all, then lanes and warps follow
    along the row as far as it goes, and only then other rows. How many are loaded at once is up to alignment and dtype: all
    cases are named. (tests/backends/test_trees.py holds this to what Triton makes of it.)
    """
    row, each, found = shape[-1], max(1, prod(shape) // (32 * warps)), []
    for together in (1, 2, 4, 8, 16):
        if together <= min(each, row):
            lanes = min(32, row // together)
            found.append((together, lanes, min(warps, row // (together * lanes))))
    return row, tuple(found)


def _adds(op: t.Op) -> TypeGuard[t.Reduce | t.Scan]:
    """Whether threads bring floats together: a maximum is the same in any order, and so are integers."""
    return isinstance(op, t.Scan | t.Reduce) and is_float(op.value.dtype) and getattr(op, "op", "sum") == "sum"
