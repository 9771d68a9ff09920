"""A choice between what is loaded and a number becomes the load's mask: what is not wanted is not read, nor moved about."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.tile.facts import facts_of


def choices(program: t.TileProgram) -> t.TileProgram:
    """The program with loads that only a choice reads behind its condition.

    Not where the condition varies along elements that lie side by side: these would then be loaded one by one.
    """
    f = facts_of(program)
    uses = Counter(v for op, _ in f.ops for v in t.reads(op))
    around = {v: outside for op, outside in f.ops for v in t.results(op)}
    gone: set[t.Value] = set()

    def rule(op: t.Op) -> list[t.Op] | None:
        if not isinstance(op, t.Where) or not isinstance(load := f.made_by.get(op.yes), t.Load) or uses[op.yes] > 1:
            return None
        other, along = f.constant(op.no), set(op.condition.axes)
        alike = other is not None and (not load.at.mask or load.fill == other) and around[op.out] == around[op.yes]
        if not alike or not along <= load.at.axes or along & _side_by_side(program, load) or load.out.axes != op.out.axes:
            return None
        gone.add(load.out)
        return [
            replace(
                load,
                out=replace(op.out, name=load.out.name),
                at=replace(load.at, mask=(*load.at.mask, op.condition)),
                fill=other,
            )
        ]

    body = t.rewrite(program.body, rule)
    return replace(program, body=t.rewrite(body, lambda op: [] if isinstance(op, t.Load) and op.out in gone else None))


def _side_by_side(program: t.TileProgram, load: t.Load) -> set[str]:
    """The axes along which a load's elements lie side by side in memory."""
    param = program.param(load.at.tensor)
    if isinstance(layout := param.layout, t.Viewed):
        near = [a == len(layout.base) - 1 for a in layout.axes]
    else:
        near = [s == "unit" for s in param.strided.strides]
    return {a for i, unit in zip(load.at.index, near, strict=True) if unit for v in i.values for a in v.axes}
