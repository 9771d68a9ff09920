"""Programs that each had one block of an axis become fewer, each of which goes from block to block.

Rows that end at elements of their own leave most programs along a long axis without anything to do, and each of those has to
be begun all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.passes.names import identifier


def rounds(program: t.TileProgram, counts: Mapping[str, int]) -> t.TileProgram:
    """The program with so many programs along each of some axes, which take every so manieth block."""
    for axis, count in counts.items():
        program = _in_rounds(program, axis, count)
    return program


def _in_rounds(program: t.TileProgram, name: str, count: int) -> t.TileProgram:
    """What varies along an axis in a loop over it, behind all that does not."""
    numbers, axis = t.Numbers(program.body), program.axis(name)
    varies: set[t.Value] = set()
    outside: list[t.Op] = []
    inside: list[t.Op] = []
    for op in program.body:
        used = {v for o, _ in t.walk([op]) for v in t.reads(o)}
        own = any(isinstance(o, t.Elements) and o.axis == name for o, _ in t.walk([op]))
        if own or used & varies or isinstance(op, t.Store | t.Barrier):
            inside.append(op)
            varies |= set(t.results(op))
        else:
            outside.append(op)
    end = _last(t.Draft(program, numbers, outside), inside, axis)
    turn = numbers.value("int32", (), identifier(name) + ("_start" if axis.block > 1 else ""))
    body = tuple(replace(op, turn=turn) if isinstance(op, t.Elements) and op.axis == name else op for op in inside)
    loop = t.Loop((turn,), (name,), (), (), body, (), (), end=end)
    axes = tuple(replace(a, mode="loop", beside=count) if a.name == name else a for a in program.axes)
    return replace(program, axes=axes, body=(*outside, loop))


def _last(d: t.Draft, ops: list[t.Op], axis: t.AxisBlock) -> t.Value | None:
    """The element from which on nothing is stored, where all stores are at `where(element < that, …, -1)`; else None."""
    made = {v: op for op in (*d.ops, *ops) for v in t.results(op)}
    ends = set()
    for op in (op for op in ops if isinstance(op, t.Store)):
        chosen = [made.get(i.alone) for i in op.at.index if i.alone is not None]
        ends |= {_end(made, where, axis.name) for where in chosen if isinstance(where, t.Where)} or {None}
    end = ends.pop() if len(ends) == 1 else None
    if end is None or end.axes or made.get(end) not in d.ops:
        return None
    known = d.binary("minimum", end, d.const(axis.extent or 0))
    return d.binary("maximum", known, d.const(0), f"{identifier(axis.name)}_end")


def _end(made: Mapping[t.Value, t.Op], where: t.Where, axis: str) -> t.Value | None:
    """Up to which element of an axis a choice is not that of no element."""
    less, none = made.get(where.condition), made.get(where.no)
    if not isinstance(less, t.Binary) or less.op != "lt" or not isinstance(none, t.Const) or none.value != -1:
        return None
    begin = made.get(less.left)
    return less.right if isinstance(begin, t.Elements) and begin.axis == axis else None
