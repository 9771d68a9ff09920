"""The rules of values: their blocks, where they are defined, their dtypes and axes."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts
from moekit.compile.tile.verify.fault import fail
from moekit.compile.tile.verify.types import TYPES


def blocks(f: Facts) -> None:
    """A block is a power of two; whole axes fit in theirs; dynamic axes are never whole."""
    for a in f.program.axes:
        if a.block < 1 or a.block & (a.block - 1):
            fail(f, "blocks", None, f"axis {a.name} has blocks of {a.block}, which is no power of two")
        if a.mode == "whole" and (a.extent is None or a.extent > a.block):
            fail(f, "blocks", None, f"axis {a.name} of {a.extent} elements is not whole in a block of {a.block}")
        if a.of is not None and a.block != 2 * f.program.axis(a.of).block:
            fail(
                f,
                "blocks",
                None,
                f"axis {a.name} is {a.of} twice, so its blocks have {2 * f.program.axis(a.of).block} elements",
            )
        if a.mode not in ("grid", "whole", "loop", "gather"):
            fail(f, "blocks", None, f"axis {a.name} has the unknown mode {a.mode!r}")


def defined_once(f: Facts) -> None:
    """Every value is defined once, before it is read, in a scope around the reader."""

    def add(op: t.Op, new: tuple[t.Value, ...], known: set[int]) -> None:
        for v in new:
            if v.number in known:
                fail(f, "defined once", op, f"{v.label} is defined twice")
            known.add(v.number)

    def visit(ops: tuple[t.Op, ...], known: set[int]) -> set[int]:
        for op in ops:
            for v in t.operands(op):
                if v.number not in known:
                    fail(f, "defined once", op, f"{v.label} is read before it is defined")
            if isinstance(op, t.Loop | t.AtEnd):
                inner = set(known)
                add(op, (*op.vars, *op.carries) if isinstance(op, t.Loop) else (), inner)
                visit(op.body, inner)
                if missing := [v for v in op.yields if v.number not in inner]:
                    fail(f, "defined once", op, f"{missing[0].label} is yielded but not defined")
            add(op, t.results(op), known)
        return known

    visit(f.program.body, set())


def types(f: Facts) -> None:
    """Operands are read as what they were defined as and agree in dtype, masks are bool, a result has its operation's dtype and
    axes."""
    defined = {v.number: v for op, _ in f.ops for v in t.results(op)}
    defined |= {v.number: v for op, _ in f.ops if isinstance(op, t.Loop) for v in (*op.vars, *op.carries)}
    for op, _ in f.ops:
        for v in t.operands(op):
            if defined[v.number] != v:
                fail(f, "types", op, f"{v} is defined as {defined[v.number]}")
        check = TYPES.get(type(op))
        if check and (problem := check(f.program, op)):
            fail(f, "types", op, problem)
