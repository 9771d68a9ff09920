"""Loads that wait for nothing, and stores of what is there already, come before threads are first brought together."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from moekit.compile import tile as t
from moekit.lang.dtypes import itemsize

WAITS = (t.Reduce, t.Scan, t.Dot, t.Loop, t.Receive)  # for other threads, or ranks
FREE = (t.Load, t.Const, t.Extent, t.Elements, t.InBounds, t.Binary)
HANDED_ON = (t.Load, t.Cast, t.Binary, t.Unary, t.Where, t.Const, t.Along)  # what operands of products are made by
MOST_LANES = 1024  # of a program: 32 warps
MOST_EARLY = 512  # for each lane, of what is loaded before: more would wait in registers for its turn
ELEMENT = 2  # that an element counts as; one of a byte as its target says


def motion(program: t.TileProgram, byte: int = ELEMENT) -> t.TileProgram:
    """The program's operations in an order in which memory is busy while threads wait for each other.

    byte: what an element of one byte counts as.
    """
    ops = _stores_early(program, _loads_first(program, list(program.body), byte))
    return replace(program, body=tuple(_operands_first(program, ops, set())))


def _operands_first(program: t.TileProgram, ops: list[t.Op], carried: set[t.Value]) -> list[t.Op]:
    """The operations of a run, and of its loops, with what products take before the first product that it need not wait for.

    Where products follow from products, threads meet to hand an operand on: so they do once for all operands that are there.
    """
    ops = [
        replace(op, body=tuple(_operands_first(program, list(op.body), {*op.carries}))) if isinstance(op, t.Loop) else op
        for op in ops
    ]
    made = {op.out: op for op in ops if isinstance(op, HANDED_ON)}
    follows = set(carried)
    for op in ops:
        follows |= {*t.results(op)} if isinstance(op, t.Dot) or follows & {*t.operands(op)} else set()
    left = [v for op in ops if isinstance(op, t.Dot) for v in (op.left, op.right) if v in follows]
    wanted: set[t.Value] = set()
    while left:
        if (value := left.pop()) in made and value not in wanted:
            wanted.add(value)
            left += t.operands(made[value])
    stored = {op.at.tensor for op, _ in t.walk(program.body) if isinstance(op, t.Store)}
    early = [op for v, op in made.items() if v in wanted and not (isinstance(op, t.Load) and op.at.tensor in stored)]
    waits, found = {v for op in ops for v in t.results(op)}, []
    for op in ops:
        ready = early if isinstance(op, t.Dot) else []
        for x in (*ready, op):
            if x is op or not waits & {*t.operands(x)}:
                found += [x] if x not in found else []
                waits -= {*t.results(x)}
        early = [x for x in early if waits & {*t.results(x)}]
    return found


def _split(ops: list[t.Op]) -> tuple[list[t.Op], list[t.Op]]:
    """What comes before threads are first brought together, and the rest."""
    first = next((i for i, op in enumerate(ops) if isinstance(op, WAITS)), len(ops))
    return ops[:first], ops[first:]


def _loads_first(program: t.TileProgram, ops: list[t.Op], byte: int) -> list[t.Op]:
    """The operations, with every load that waits for nothing before the first operation that brings threads together.

    A norm's weight is then on its way while the squares are summed up: of two memory latencies in a row one is left. Of a
    program of many steps, each with loads of its own, the first ones.
    """
    before, after = _split(ops)
    known = {v for op in before for v in t.results(op)}
    early: list[t.Op] = []
    room = MOST_EARLY * 32 * program.warps - sum(_loaded(program, op, byte) for op in before)
    for op in after:
        if isinstance(op, FREE) and set(t.operands(op)) <= known:
            room -= _loaded(program, op, byte)
            if room < 0:
                break
            early.append(op)
            known.add(op.out)
    wanted = {v for op in early if isinstance(op, t.Load) for v in t.operands(op)}
    for op in reversed(early):
        if wanted & set(t.results(op)):
            wanted |= set(t.operands(op))
    moved = [op for op in early if isinstance(op, t.Load) or wanted & set(t.results(op))]
    return [*before, *moved, *(op for op in after if op not in moved)]


def _loaded(program: t.TileProgram, op: t.Op, byte: int) -> int:
    """What a load brings, as it counts."""
    if not isinstance(op, t.Load):
        return 0
    return prod(program.block(op.out.axes)) * (byte if itemsize(op.out.dtype) == 1 else ELEMENT)


def _stores_early(program: t.TileProgram, ops: list[t.Op]) -> list[t.Op]:
    """The operations, with every store whose value is there before threads are first brought together done before that.

    Memory then writes while a sum is taken, and not all at once at the end. A tensor that is also loaded is loaded before, by
    the same indices, so that no lane writes what another one has still to read; and its block has an element for every lane
    there may be, since Triton gives what is over copies of elements, to load when they will.
    """
    before, after = _split(ops)
    known = {v for op in before for v in t.results(op)}
    loads = [op for op, _ in t.walk(ops) if isinstance(op, t.Load)]

    def early(op: t.Op) -> bool:
        if not isinstance(op, t.Store) or not set(t.operands(op)) <= known:
            return False
        read = [x for x in loads if x.at.tensor == op.at.tensor]
        enough = not read or prod(program.block(op.value.axes)) >= MOST_LANES
        return enough and all(x.at.index == op.at.index and x in before for x in read)

    moved = [op for op in after if early(op)]
    return [*before, *moved, *(op for op in after if op not in moved)]
