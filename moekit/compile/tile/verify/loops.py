"""The rules of the grid and of loops: each element of an axis is met once, and what is reduced along it sees no other."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.tile.facts import IDENTITY, Facts
from moekit.compile.tile.verify.fault import fail


def reductions_masked(f: Facts) -> None:
    """Every reduction and dot over a partial block sees its identity in the lanes past the end."""
    for op, _ in f.ops:
        if isinstance(op, t.Reduce | t.Dot | t.Accumulate) and f.program.bounded(op.axis).partial:
            identity = 0 if isinstance(op, t.Dot) else IDENTITY[op.op, op.value.dtype]
            for v in (op.left, op.right) if isinstance(op, t.Dot) else (op.value,):
                if not f.filled(v, op.axis, identity):
                    hint = f"lanes of {v.label} past the end of {op.axis} may not be {identity}; put where(mask, x, {identity})"
                    fail(f, "reductions masked", op, hint)


def grid(f: Facts) -> None:
    """All programs are on one launch dimension, the dynamic axis outermost; grid axes are in grid mode and no others."""
    modes = {a.name: a.mode for a in f.program.axes}
    if sorted(f.program.grid) != sorted(a for a, m in modes.items() if m == "grid"):
        fail(f, "grid", None, f"the grid is {f.program.grid}, the axes in grid mode differ")
    dynamic = [f.program.axis(a).extent is None for a in f.program.grid]
    if dynamic != sorted(dynamic, reverse=True):
        fail(f, "grid", None, f"dynamic axes must be outermost in {f.program.grid}")


def reductions_whole(f: Facts) -> None:
    """No reduction, scan or dot runs along a grid axis, of which a program has a part; a scan's axis is whole."""
    for op, _ in f.ops:
        if isinstance(op, t.Reduce | t.Scan | t.Dot | t.Accumulate | t.TopK):
            mode = f.program.axis(op.axis).mode
            if mode == "grid" or (isinstance(op, t.Scan | t.TopK) and mode != "whole"):
                fail(f, "reductions whole", op, f"a program holds only a part of {op.axis}, which is in {mode} mode")


def loops_cover(f: Facts) -> None:
    """Elements of a looped axis are those of the turn of the loop over it, and of the part; every turn makes its sums anew."""
    for op, around in f.ops:
        if isinstance(op, t.Loop):
            _loop(f, op)
        if isinstance(op, t.AtEnd) and not any(op.axis in loop.over for loop in around[-1:] if isinstance(loop, t.Loop)):
            fail(f, "loops cover", op, f"the loop around does not go over {op.axis}, so it has no end")
        if not isinstance(op, t.Elements):
            continue
        axis, loops = f.program.axis(op.axis), [x for x in around if isinstance(x, t.Loop)]
        turn = next((v for loop in loops[::-1] for v, a in zip(loop.vars, loop.over, strict=True) if a == op.axis), None)
        if op.turn != (turn if axis.mode == "loop" else None) or (turn is None and axis.mode == "loop"):
            fail(f, "loops cover", op, f"{op.axis} is looped over, so its elements start at the turn of the loop around")
        if (axis.parts > 1) != (op.part is not None) or (op.part is not None and not _is_part(f, op.part, op.axis)):
            fail(f, "loops cover", op, f"{op.axis} has {axis.parts} parts, so its elements start at the part's number")


def _is_part(f: Facts, value: t.Value, axis: str) -> bool:
    made = f.made_by.get(value)
    return isinstance(made, t.Elements) and made.axis == f"{axis}.part"


def _loop(f: Facts, op: t.Loop) -> None:
    for axis in op.over:
        if isinstance(axis, str) and f.program.axis(axis).mode != "loop":
            fail(f, "loops cover", op, f"{axis} is in {f.program.axis(axis).mode} mode and is not looped over")
    turning = set(op.vars) | {e.out for e in op.body if isinstance(e, t.Elements)}
    if not any(isinstance(e, t.Elements) for e in op.body):
        return
    for value in op.yields:
        if not _depends(f, value, turning, set()):
            fail(f, "loops cover", op, f"{value.label} is the same every turn; it must be made from the loop's own elements")


def _depends(f: Facts, value: t.Value, on: set[t.Value], seen: set[t.Value]) -> bool:
    """Whether `value` is computed from one of the values `on`."""
    if value in on or value in seen:
        return value in on
    seen.add(value)
    op = f.made_by.get(value)
    sources = f.merged.get(value) or (t.operands(op) if op else ())
    return any(_depends(f, v, on, seen) for v in sources)


def flat_loops(f: Facts) -> None:
    """A loop over several axes goes over the parts of an axis and then over a part's blocks, both of static size."""
    for op, _ in f.ops:
        if isinstance(op, t.Loop) and len(op.over) > 1:
            parts, *rest = op.over
            if len(rest) != 1 or parts != f"{rest[0]}.part" or f.program.axis(str(rest[0])).length is None:
                fail(f, "flat loops", op, f"it goes over {op.over}; it may over the parts of a static axis and over that")
            if any(isinstance(o, t.Loop) for o in op.body):
                fail(f, "flat loops", op, "there may be no loop in its body")
        if isinstance(op, t.AtEnd) and any(isinstance(o, t.Memory | t.Dot | t.Loop) for o, _ in t.walk(op.body)):
            fail(f, "flat loops", op, "at the end of an axis there may be no load, store, dot or loop")
