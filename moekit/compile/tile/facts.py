"""What can be looked up about a program's values: where they come from, and what is known of the lanes past an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moekit.compile.tile.operations import (
    Accumulate,
    At,
    AtEnd,
    Binary,
    Bitcast,
    Cast,
    Const,
    Elements,
    InBounds,
    Load,
    Loop,
    Op,
    Reduce,
    Scan,
    Value,
    Where,
    operands,
    results,
)
from moekit.compile.tile.program import TileProgram
from moekit.compile.tile.walk import walk

SIDES = {"add": ("left", "right"), "maximum": ("left", "right"), "minimum": ("left", "right"), "shl": ("left",)}


@dataclass(frozen=True)
class Facts:
    """A program, its operations in order with what stands around each, and where each value comes from.

    `merged` has the values that are one of several by turn: the carries and results of loops, the results of `AtEnd`.
    """

    program: TileProgram
    ops: tuple[tuple[Op, tuple[Loop | AtEnd, ...]], ...]
    made_by: dict[Value, Op]
    merged: dict[Value, tuple[Value, ...]]

    def constant(self, value: Value) -> bool | int | float | None:
        """The number a value is, None if it is no constant."""
        op = self.made_by.get(value)
        return op.value if isinstance(op, Const) else None

    def only(self, kinds) -> Iterator[Any]:
        """The operations of some kinds, in order."""
        return (op for op, _ in self.ops if isinstance(op, kinds))

    def bases(self, value: Value | None) -> set[Elements]:
        """The elements of axes that a value is computed from, loads included; a reduction is none of them any more."""
        op = self.made_by.get(value) if value is not None else None
        if isinstance(op, Elements):
            return {op}
        if op is None or isinstance(op, Reduce | Scan):
            return set()
        return {base for v in operands(op) for base in self.bases(v)}

    def kept(self, masks: Iterable[Value]) -> set[tuple[str, Value]]:
        """The (axis, index) pairs that all of some masks keep in bounds."""
        found = set()
        for mask in masks:
            op = self.made_by.get(mask)
            if isinstance(op, InBounds):
                found.add((op.axis, op.value))
            elif isinstance(op, Binary) and op.op == "and":
                found |= self.kept((op.left, op.right))
        return found

    def inside(self, axis: str | None, at: At) -> bool:
        """Whether an index of an access stays within dimension `axis` of its tensor where its block's own axis has elements.

        Data need not; elements of another axis do where that is short enough. What the program says nothing of is sliced, and
        tracing has looked at that.
        """
        op = self.made_by.get(at.value) if at.value else None
        full = next((a for a in self.program.axes if a.name == axis), None)
        if not isinstance(op, Elements):
            return False
        own = self.program.bounded(op.axis)
        if full is None or own == full:
            return True
        if own.extent is None or full.extent is None:
            return False
        return at.start >= 0 and at.start + at.side + at.step * (own.extent - 1) < full.extent

    def masks(self, masks: Iterable[Value]) -> set[str]:
        """The axes of which some masks keep out what lies past the end of the block along them."""
        owns = ((axis, self.made_by.get(value)) for axis, value in self.kept(masks))
        return {axis for axis, op in owns if isinstance(op, Elements) and self.program.bounded(op.axis).name == axis}

    def filled(self, value: Value, axis: str, identity: float, seen: frozenset[Value] = frozenset()) -> bool:
        """Whether the lanes of `value` past the end of `axis` are known to be `identity`."""
        if value in seen or self.constant(value) == identity:
            return True
        seen = seen | {value}

        def known(*values: Value) -> bool:
            return all(self.filled(v, axis, identity, seen) for v in values)

        if value in self.merged:
            return known(*self.merged[value])
        op, name = self.made_by.get(value), self.program.bounded(axis).name
        if isinstance(op, Where):
            return known(op.no) and (name in self.masks((op.condition,)) or known(op.yes))
        if isinstance(op, Load):
            return op.fill == identity and name in self.masks(op.at.mask)
        if isinstance(op, Accumulate):
            return known(op.acc, op.value)
        if isinstance(op, Cast | Bitcast):
            return identity == 0 and known(op.value)
        if isinstance(op, Binary) and op.op in SIDES and (op.op != "shl" or identity == 0):
            return known(*(getattr(op, side) for side in SIDES[op.op]))
        return False


def facts_of(program: TileProgram) -> Facts:
    """Gather the facts, once per program."""
    ops, made_by, merged = tuple(walk(program.body)), {}, {}
    for op, _ in ops:
        if isinstance(op, Loop):
            for carry, out, *values in zip(op.carries, op.outs, op.inits, op.yields, strict=False):
                merged[carry] = merged[out] = tuple(values)
        elif isinstance(op, AtEnd):
            merged |= {out: both for out, *both in zip(op.outs, op.yields, op.otherwise, strict=False)}
        else:
            made_by |= dict.fromkeys(results(op), op)
    return Facts(program, ops, made_by, merged)
