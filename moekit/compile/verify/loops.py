"""The rules of the grid and of loops: each element of an axis is met once, and what is reduced along it sees no other."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.reductions import IDENTITY
from moekit.compile.verify.facts import Facts, fail


def reductions_masked(f: Facts) -> None:
    """Every reduction and dot over a partial block sees its identity in the lanes past the end."""
    for op, _ in f.ops:
        if isinstance(op, t.Reduce) and f.program.axis(op.axis).partial:
            identity = IDENTITY[op.op, op.value.dtype]
            if not _filled(f, op.value, op.axis, identity, set()):
                fail(
                    f,
                    "reductions masked",
                    op,
                    f"lanes past the end of {op.axis} may not be {identity}; put where(mask, x, {identity})",
                )
        if isinstance(op, t.Dot) and f.program.axis(op.axis).partial:
            for v in (op.left, op.right):
                if not _filled(f, v, op.axis, 0, set()):
                    fail(f, "reductions masked", op, f"lanes of {v.name} past the end of {op.axis} may not be 0; mask it")


def _filled(f: Facts, v: t.Value, axis: str, identity, seen: set[str]) -> bool:
    """Whether the lanes of `v` past the end of `axis` are known to be `identity`."""
    if v.name in seen or f.constant(v) == identity:
        return True
    seen = seen | {v.name}
    if v.name in f.carried:
        loop, i = f.carried[v.name]
        return _filled(f, loop.inits[i], axis, identity, seen) and _filled(f, loop.yields[i], axis, identity, seen)
    op = f.made_by.get(v.name)
    if isinstance(op, t.Where):
        if axis in f.masked_axes(op.condition):
            return _filled(f, op.no, axis, identity, seen)
        return _filled(f, op.yes, axis, identity, seen) and _filled(f, op.no, axis, identity, seen)
    if isinstance(op, t.Load):
        return op.fill == identity and axis in f.masked_axes(op.mask)
    if isinstance(op, t.Cast | t.Bitcast):
        return identity == 0 and _filled(f, op.value, axis, identity, seen)
    if isinstance(op, t.Binary) and op.op == "shl":
        return identity == 0 and _filled(f, op.left, axis, identity, seen)
    if isinstance(op, t.Binary) and op.op in ("add", "maximum", "minimum"):
        return _filled(f, op.left, axis, identity, seen) and _filled(f, op.right, axis, identity, seen)
    return False


def grid(f: Facts) -> None:
    """All programs are on one launch dimension, the dynamic axis outermost; grid axes are in grid mode and no others."""
    modes = {a.name: a.mode for a in f.program.axes}
    if sorted(f.program.grid) != sorted(a for a, m in modes.items() if m == "grid"):
        fail(f, "grid", None, f"the grid is {f.program.grid}, the axes in grid mode differ")
    dynamic = [f.program.axis(a).extent is None for a in f.program.grid]
    if dynamic != sorted(dynamic, reverse=True):
        fail(f, "grid", None, f"dynamic axes must be outermost in {f.program.grid}")


def grid_indices(f: Facts) -> None:
    """The blocks of a grid axis start at its program number times its block, so that programs share nothing."""
    for op, _ in f.ops:
        if isinstance(op, t.Index) and (axis := f.program.axis(op.axis)).mode == "grid":
            several = axis.extent is None or axis.extent > axis.block
            if (several or op.start is not None) and not _starts_at_program(f, op.start, axis):
                fail(f, "grid indices", op, f"it must start at the program number of {op.axis} × {axis.block}")


def _starts_at_program(f: Facts, start: t.Value | None, axis: t.AxisBlock) -> bool:
    op = f.made_by.get(start.name) if start is not None else None
    if axis.block > 1:
        if not isinstance(op, t.Binary) or op.op != "mul" or f.constant(op.right) != axis.block:
            return False
        op = f.made_by.get(op.left.name)
    return isinstance(op, t.ProgramId) and op.axis == axis.name


def reductions_whole(f: Facts) -> None:
    """No reduction, scan or dot runs along a grid axis, of which a program has a part; a scan's axis is whole."""
    for op, _ in f.ops:
        if isinstance(op, t.Reduce | t.Scan | t.Dot):
            mode = f.program.axis(op.axis).mode
            if mode == "grid" or (isinstance(op, t.Scan) and mode != "whole"):
                fail(f, "reductions whole", op, f"a program holds only a part of {op.axis}, which is in {mode} mode")


def loops_cover(f: Facts) -> None:
    """A loop over an axis steps by its block to the end of the axis (or of its part); index and sums follow the loop."""
    for op, loops in f.ops:
        if not isinstance(op, t.Index) or (axis := f.program.axis(op.axis)).mode != "loop":
            continue
        owner = loops[-1] if loops else None
        if owner is None or op.start is None or not _starts_at(f, op.start, owner.var, axis.parts > 1):
            fail(f, "loops cover", op, f"{op.axis} is looped over, so its index starts at the loop's variable")
        stop = axis.share if axis.parts > 1 else axis.extent
        if owner.step != axis.block:
            fail(f, "loops cover", owner, f"it steps by {owner.step}, but blocks of {op.axis} are {axis.block}")
        if isinstance(owner.stop, int) != (stop is not None) or (stop is not None and owner.stop != stop):
            fail(f, "loops cover", owner, f"it must run from 0 to {stop}, the end of {op.axis}")
    for op, _ in f.ops:
        if not isinstance(op, t.Loop) or not any(isinstance(o, t.Index) for o in op.body):
            continue
        for value in op.yields:
            if not _depends(f, value, op.var.name, set()):
                fail(f, "loops cover", op, f"{value.name} is the same every turn; it must be made from the loop's own index")


def flat_loops(f: Facts) -> None:
    """A flat loop and the loop in its body are of static size, and what stands around that one touches no memory."""
    for op, _ in f.ops:
        if isinstance(op, t.Loop) and op.flat:
            inner = [o for o in op.body if isinstance(o, t.Loop)]
            if len(inner) != 1 or not isinstance(op.stop, int) or not isinstance(inner[0].stop, int):
                fail(f, "flat loops", op, "it needs one loop in its body, both of static size")
            if any(isinstance(o, t.Load | t.Store | t.Dot) for o in op.body):
                fail(f, "flat loops", op, "around the loop in its body there may be no load, store or dot")
            if any(f.made_by.get(v.name) not in op.body or f.constant(v) is None for v in inner[0].inits):
                fail(f, "flat loops", op, "the loop in its body must begin from constants made beside it")


def _depends(f: Facts, value: t.Value, on: str, seen: set[str]) -> bool:
    """Whether `value` is computed from the value named `on`."""
    if value.name == on or value.name in seen:
        return value.name == on
    seen.add(value.name)
    if value.name in f.carried:
        loop, i = f.carried[value.name]
        return _depends(f, loop.inits[i], on, seen) or _depends(f, loop.yields[i], on, seen)
    op = f.made_by.get(value.name)
    return op is not None and any(_depends(f, v, on, seen) for v in t.operands(op))


def _starts_at(f: Facts, start: t.Value, var: t.Value, in_part: bool) -> bool:
    if not in_part:
        return start.name == var.name
    op = f.made_by.get(start.name)
    return isinstance(op, t.Binary) and op.op == "add" and var.name in (op.left.name, op.right.name)
