"""Masks and widths are derived: which lanes of an access exist, what a reduction sees past an end, what needs 64 bits.

Every axis owns its mask. An access is masked by those of all axes its indices run along, and data in an index by their range;
a reduction sees its identity in the lanes past the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.tile.facts import facts_of
from moekit.lang.elementwise import COMBINE, IDENTITY


def masks(program: t.TileProgram) -> t.TileProgram:
    """The program with every access and reduction masked, and offsets as wide as they need to be."""
    deriving = _Masks(program)
    return replace(program, body=deriving.visit(program.body, {}, {}))


class _Masks:
    """One derivation. In a scope, `elements` are those of each axis at hand, `masks` where they exist."""

    def __init__(self, program: t.TileProgram):
        self.program, self.numbers, self.facts = program, t.Numbers(program.body), facts_of(program)

    def visit(self, ops: Iterable[t.Op], elements: dict[str, t.Value], masks: dict[t.Value, t.Value]) -> tuple[t.Op, ...]:
        elements, masks, found = dict(elements), dict(masks), []
        for op in ops:
            new: list[t.Op] = [op]
            if isinstance(op, t.Elements):
                elements[op.axis] = op.out
                if (bounded := self.program.bounded(op.axis)).partial:
                    masks[op.out] = self.numbers.value("bool", op.out.axes, f"{op.out.name}_mask")
                    new.append(t.InBounds(masks[op.out], op.out, bounded.name))
            elif isinstance(op, t.Memory):
                new = self.access(op, elements, masks)
            elif isinstance(op, t.Loop | t.AtEnd):
                new = [replace(op, body=self.visit(op.body, elements, masks))]
            elif isinstance(op, t.Reduce | t.Accumulate | t.Dot) and self.program.bounded(op.axis).partial:
                new = self.masked(op, lambda axis=op.axis: masks[elements[axis]])
            if isinstance(op, t.Accumulate) and isinstance(last := new[-1], t.Accumulate):
                new[-1] = t.Binary(op.out, COMBINE[op.op], last.acc, last.value)
            self.facts.made_by.update({v: x for x in new if not isinstance(x, t.Loop | t.AtEnd) for v in t.results(x)})
            found += new
        return tuple(found)

    def access(self, op: t.Memory, elements: dict[str, t.Value], masks: dict[t.Value, t.Value]) -> list[t.Op]:
        """A load, store or prefetch behind its masks, after those of them that are its own."""
        param, f, needed, own = self.program.param(op.at.tensor), self.facts, [], []
        for axis, index in zip(param.axes, op.at.index, strict=True):
            if not index.terms:
                continue
            bases = {*(base.out for base in f.bases(*index.values)), *(elements[a] for v in index.values for a in v.axes)}
            along = sorted(bases, key=lambda v: v.number)
            needed += [masks[v] for v in along if v in masks]
            if (value := index.alone) is not None and not f.inside(axis, index):
                valid = self.numbers.value("bool", value.axes, f"{value.name or 'index'}_valid")
                own.append(t.InBounds(valid, value, axis or "", signed=True))
                needed.append(valid)
        at = replace(op.at, mask=tuple(dict.fromkeys(needed)), wide=wide(self.program, param))
        return [*own, replace(op, at=at)]

    def masked(self, op: t.Reduce | t.Accumulate | t.Dot, mask: Callable[[], t.Value]) -> list[t.Op]:
        """A reduction that sees its identity past the end of its axis."""
        draft, self.numbers.line = t.Draft(self.program, self.numbers), op.out.line
        identity = 0 if isinstance(op, t.Dot) else IDENTITY[op.op, op.value.dtype]
        new = {}
        for value in (op.left, op.right) if isinstance(op, t.Dot) else (op.value,):
            if not self.facts.filled(value, op.axis, identity):
                new[value] = draft.where(mask(), value, draft.const(identity, value.dtype))
        changed = {n: new[v] for n in ("left", "right", "value") if (v := getattr(op, n, None)) in new}
        return [*draft.ops, replace(op, **changed)]


def wide(program: t.TileProgram, param: t.Param) -> tuple[bool, ...]:
    """Per dimension of a tensor whether an offset along it may pass 2³¹ - 1."""
    if not isinstance(param.layout, t.Strided):
        return (False,) * len(param.axes)
    dynamic = {a.name for a in program.axes if a.extent is None}
    return tuple(axis is not None and (param.layout.wide or axis in dynamic) for axis in param.axes)
