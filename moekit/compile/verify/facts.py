"""What the rules look up about a program, and how they say that it breaks one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from moekit.compile import tile as t
from moekit.errors import VerifyError

NOT_NEGATIVE = "0 <="  # stands for an axis among what a mask keeps in bounds


@dataclass(frozen=True)
class Facts:
    """What the rules look up: where each value comes from, and the operations in program order."""

    program: t.TileProgram
    made_by: dict[str, t.Op]
    carried: dict[str, tuple[t.Loop, int]]
    ops: tuple[tuple[t.Op, tuple[t.Loop, ...]], ...]

    def masks(self, mask: t.Value | None) -> set[tuple[str, str]]:
        """The (axis, index) pairs that a mask keeps in bounds."""
        if mask is None:
            return set()
        op = self.made_by.get(mask.name)
        if isinstance(op, t.InBounds):
            return {(op.axis, op.index.name)}
        if isinstance(op, t.Binary) and op.op == "ge" and self.constant(op.right) == 0:
            return {(NOT_NEGATIVE, op.left.name)}
        if isinstance(op, t.Binary) and op.op == "and":
            return self.masks(op.left) | self.masks(op.right)
        return set()

    def masked_axes(self, mask: t.Value | None) -> set[str]:
        """The axes that a mask keeps in bounds, whatever the index."""
        return {axis for axis, _ in self.masks(mask)}

    def constant(self, value: t.Value):
        """The number a value is, or None."""
        op = self.made_by.get(value.name)
        return op.value if isinstance(op, t.Const | t.Full) else None


def _walk(ops, loops: tuple[t.Loop, ...] = ()) -> Iterator[tuple[t.Op, tuple[t.Loop, ...]]]:
    for op in ops:
        yield op, loops
        if isinstance(op, t.Loop):
            yield from _walk(op.body, (*loops, op))


def facts_of(program: t.TileProgram) -> Facts:
    """Gather the facts once per program."""
    made_by, carried, ops = {}, {}, tuple(_walk(program.body))
    for op, _ in ops:
        if isinstance(op, t.Loop):
            for i, (carry, out) in enumerate(zip(op.carries, op.outs, strict=False)):
                carried[carry.name] = carried[out.name] = (op, i)
        elif made := t.result(op):
            made_by[made.name] = op
    return Facts(program, made_by, carried, ops)


def fail(f: Facts, rule: str, op, hint: str) -> NoReturn:
    """Raise VerifyError naming the program, the rule, the operation and what to do."""
    at = t.text_of((op,), 0)[0] if op is not None else ""
    raise VerifyError(f"{f.program.name}: {rule}: {hint}" + (f" in `{at}`" if at else ""))
