"""Loads that wait for nothing, and stores of what is there already, come before threads are first brought together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from moekit.compile import tile as t

WAITS = (t.Reduce, t.Scan, t.Dot, t.Loop)
MOST_LANES = 1024  # of a program: 32 warps
FREE = (t.Load, t.Const, t.Extent, t.Index, t.InBounds, t.Binary)


def early_memory(ops: list, blocks: Mapping[str, int]) -> list:
    """The operations of a program in an order in which memory is busy while threads wait for each other."""
    return _stores_early(_loads_first(ops), blocks)


def memory_ops(ops: Iterable[t.Op]) -> Iterator[t.Load | t.Store]:
    """All loads and stores, those in loops among them."""
    for op in ops:
        if isinstance(op, t.Loop):
            yield from memory_ops(op.body)
        elif isinstance(op, t.Load | t.Store):
            yield op


def _loads_first(ops: list) -> list:
    """The operations, with every load that waits for nothing before the first operation that brings threads together.

    A norm's weight is then on its way while the squares are summed up: of two memory latencies in a row one is left.
    """
    first = next((i for i, op in enumerate(ops) if isinstance(op, WAITS)), len(ops))
    known = {v.name for op in ops[:first] if (v := t.result(op))}
    early, late = [], []
    for op in ops[first:]:
        free = isinstance(op, FREE) and {v.name for v in t.operands(op)} <= known
        (early if free else late).append(op)
        known |= {op.out.name} if free else set()
    wanted = {v.name for op in early if isinstance(op, t.Load) for v in t.operands(op)}
    for op in reversed(early):
        if op.out.name in wanted:
            wanted |= {v.name for v in t.operands(op)}
    moved = [op for op in early if isinstance(op, t.Load) or op.out.name in wanted]
    return [*ops[:first], *moved, *(op for op in ops[first:] if op not in moved)]


def _stores_early(ops: list, blocks: Mapping[str, int]) -> list:
    """The operations, with every store whose value is there before threads are first brought together done before that.

    Memory then writes while a sum is taken, and not all at once at the end. A tensor that is also loaded is loaded before, by
    the same indices, so that no lane writes what another one has still to read; and its block has an element for every lane
    there may be, since Triton gives what is over copies of elements, to load when they will. A norm that keeps its sum, in
    bfloat16 on an H200, with the store before the sum over the row and after it, us, of the mean of two runs at T = 16384: 2048
    columns at T = 16, 64, 256, 16384: 1.42 and 1.45, 1.68 and 1.78, 2.59 and 2.47, 64.5 and 64.9; 4096 columns: 1.65 and 1.76,
    2.35 and 2.50, 3.46 and 3.64, 130.6 and 132.0.
    """
    first = next((i for i, op in enumerate(ops) if isinstance(op, WAITS)), len(ops))
    known = {v.name for op in ops[:first] if (v := t.result(op))}
    loads = [op for op in memory_ops(ops) if isinstance(op, t.Load)]
    early = [
        op
        for op in ops[first:]
        if isinstance(op, t.Store)
        and {v.name for v in t.operands(op)} <= known
        and all(
            x.index == op.index and x in ops[:first] and prod(blocks.get(a, 1) for a in op.value.axes) >= MOST_LANES
            for x in loads
            if x.tensor == op.tensor
        )
    ]
    return [*ops[:first], *early, *(op for op in ops[first:] if op not in early)]
