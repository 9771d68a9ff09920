"""Which operands of products come by way of shared memory, for targets that want to be told which thread holds what.

A lane's registers would hold both operands of a turn until the last of them has come: of few rows that is little. Of more rows
they are asked for all at once, each by one of the threads that hold it, and are read from shared memory slice by slice.
"""

from __future__ import annotations

from collections import Counter

from moekit.compile import tile as t
from moekit.compile.schedule.matrix import SLICE, STEP
from moekit.compile.schedule.targets import Target
from moekit.lang.dtypes import itemsize

REDUCTIONS = 16384  # bytes of shared memory that are left for what warps add up


def staged(program: t.TileProgram, target: Target) -> frozenset[t.Value]:
    """What is loaded for products of more than the matrix unit's rows, and for nothing else, if shared memory has room; not of
    one slice, which would be waited for as a whole."""
    ops = [op for op, _ in t.walk(program.body)]
    loads = {op.out for op in ops if isinstance(op, t.Load) and not op.fill and itemsize(op.out.dtype) == 2}
    uses = Counter(v for op in ops for v in t.operands(op))
    found: set[t.Value] = set()
    for op in (op for op in ops if isinstance(op, t.Dot)):
        rows, columns, depth = program.block((*op.out.axes, op.axis))
        both, room = {op.left, op.right}, 2 * (rows + columns) * depth <= target.shared_memory - REDUCTIONS
        if rows > STEP and depth % SLICE == 0 and depth > SLICE and room and both <= loads and all(uses[v] == 1 for v in both):
            found |= both
    return frozenset(found)
