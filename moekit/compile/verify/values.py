"""The rules of values: their blocks, where they are defined, their dtypes and axes."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.types import TYPES
from moekit.compile.verify.facts import Facts, fail


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

    def visit(ops, known: set[str]) -> None:
        for op in ops:
            for v in t.operands(op):
                if v.name not in known:
                    fail(f, "defined once", op, f"{v.name} is read before it is defined")
            if isinstance(op, t.Loop):
                inner = {op.var.name, *(c.name for c in op.carries)}
                visit(op.body, add(op, inner, known))
                made = inner | known | {made.name for o in op.body if (made := t.result(o))}
                made |= {out.name for o in op.body if isinstance(o, t.Loop) for out in o.outs}
                for v in op.yields:
                    if v.name not in made:
                        fail(f, "defined once", op, f"{v.name} is yielded but not defined in the loop")
                known |= add(op, {o.name for o in op.outs}, known) - known
            elif hasattr(op, "out"):
                known |= add(op, {op.out.name}, known)

    def add(op, names: set[str], known: set[str]) -> set[str]:
        if again := names & known:
            fail(f, "defined once", op, f"{sorted(again)[0]} is defined twice")
        return known | names

    visit(f.program.body, set())


def types(f: Facts) -> None:
    """Operands agree in dtype, conditions and masks are bool, a result has its operation's dtype and axes."""
    for op, _ in f.ops:
        check = TYPES.get(type(op))
        if check and (problem := check(f.program, op)):
            fail(f, "types", op, problem)
