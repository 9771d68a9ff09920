"""What can be looked up about a program's values: where they come from, and what is known of the lanes past an end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from moekit.compile.tile.flow import operands, results
from moekit.compile.tile.operations import (
    Accumulate,
    Along,
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
    Sides,
    Value,
    Where,
)
from moekit.compile.tile.program import AxisBlock, TileProgram
from moekit.compile.tile.walk import walk
from moekit.lang.graph import Index

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

    def bases(self, *values: Value) -> set[Elements]:
        """The elements of axes that values are computed from, loads included; a reduction is none of them any more."""
        found, seen, left = set(), set(), [*values]
        while left:
            op = self.made_by.get(value := left.pop())
            if isinstance(op, Elements):
                found.add(op)
            elif op is not None and value not in seen and not isinstance(op, Reduce | Scan):
                seen.add(value)
                left += operands(op)
        return found

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

    def inside(self, axis: str | None, at: Index[Value]) -> bool:
        """Whether an index of an access stays within dimension `axis` of its tensor where its block's own axes have elements.

        Data need not; elements of other axes do where these are short enough. What the program says nothing of is sliced, or in
        blocks, and tracing has looked at that.
        """
        full = next((a for a in self.program.axes if a.name == axis), None)
        own: list[AxisBlock] = []
        last = at.start
        for value, step in at.terms:
            op = self.made_by.get(value)
            if isinstance(op, Elements):
                own.append(self.program.bounded(op.axis))
                last += step * ((own[-1].extent or 0) - 1)
            elif isinstance(op, Sides):
                last += step * op.apart
            else:
                return False
        if full is None or (own == [full] and at.alone is not None):
            return True
        static = all(a.extent is not None for a in (full, *own))
        return static and at.start >= 0 and last < (full.extent or 0)

    def masks(self, masks: Iterable[Value]) -> set[str]:
        """The axes of which some masks keep out what lies past the end of the block along them."""
        owns = ((axis, self.made_by.get(value)) for axis, value in self.kept(masks))
        return {axis for axis, op in owns if isinstance(op, Elements) and self.program.bounded(op.axis).name == axis}

    def filled(self, value: Value, axis: str, identity: float, seen: set[tuple[Value, str]] | None = None) -> bool:
        """Whether the lanes of `value` past the end of `axis` are known to be `identity`.

        All that it is made of has to be so: of `seen`, which have been or are being looked at, nothing more is asked.
        """
        seen = set() if seen is None else seen
        if (value, axis) in seen or self.constant(value) == identity:
            return True
        seen.add((value, axis))

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
        if isinstance(op, Along):
            return self.filled(op.value, op.value.axes[value.axes.index(axis)], identity, seen)
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


def depends(f: Facts, value: Value, on: set[Value], seen: set[Value]) -> bool:
    """Whether `value` is computed from one of the values `on`."""
    if value in on or value in seen:
        return value in on
    seen.add(value)
    op = f.made_by.get(value)
    sources = f.merged.get(value) or (operands(op) if op else ())
    return any(depends(f, v, on, seen) for v in sources)
