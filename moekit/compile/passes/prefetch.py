"""Weights asked for ahead: what a product's programs read of one comes from memory while the launch before them still runs.

A launch waits for all that stands before it on the stream, and only then for memory, which takes longer than a small product.
A weight rarely depends on what runs just before, but nothing says so: a launch may write any memory. So a weight is not read
early; its lines are asked for, which is right whoever writes them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts, facts_of
from moekit.lang.dtypes import itemsize

BEFORE = (t.Const, t.Extent, t.Elements)


def prefetch(program: t.TileProgram, tensors: Collection[str]) -> t.TileProgram:
    """The program, which asks first for those weights of matrix products that are among `tensors`."""
    f = facts_of(program)
    dots = [op for op, around in f.ops if isinstance(op, t.Dot) and around]
    read = [(f.made_by.get(v), op.axis) for op in dots for v in (op.left, op.right)]
    weights = dict.fromkeys((made, axis) for made, axis in read if isinstance(made, t.Load) and made.at.tensor in tensors)
    hints = [hint for load, axis in weights for hint in _asked(f, load, axis)]
    first = next((i for i, op in enumerate(program.body) if not isinstance(op, BEFORE)), len(program.body))
    return replace(program, body=(*program.body[:first], *hints, *program.body[first:]))


def _asked(f: Facts, load: t.Load, axis: str) -> Iterator[t.Prefetch]:
    """All that a program reads of a weight along a product's looped axis, in powers of two of lines.

    Nothing where the axis does not run along it element by element, in blocks that divide it, or where another index waits for
    ids or a loop: a schedule speaks of a tensor, of which a program may have other reads beside the one that makes it legal.
    """
    p, param = f.program, f.program.param(load.at.tensor)
    block, line = p.axis(axis), t.LINE // itemsize(param.dtype)
    if any(len(i.terms) > 1 for i in load.at.index):
        return
    made = {d: f.made_by.get(i.values[0]) for d, i in enumerate(load.at.index) if i.terms}
    elements = {d: op for d, op in made.items() if isinstance(op, t.Elements)}
    looped = [d for d, op in elements.items() if p.axis(op.axis).mode == "loop"]
    if len(elements) < len(made) or [elements[d].axis for d in looped] != [axis] or block.partial:
        return
    (d,), layout = looped, param.layout
    if load.at.index[d].terms[0][1] != 1 or not isinstance(layout, t.Strided) or layout.strides[d] != "unit":
        return
    part, start = elements[d].part, load.at.index[d].start
    shared = part is not None and p.axis(f"{axis}.part").mode == "grid"
    size = block.share if shared else block.extent or 0
    while size >= line:
        some = line << (size // line).bit_length() - 1  # the largest power of two of lines
        begin = t.Index.of(part, start, block.share) if part and shared else t.Index((), start)
        index = tuple(begin if i == d else each for i, each in enumerate(load.at.index))
        yield t.Prefetch(t.Access(load.at.tensor, index), d, some)
        start, size = start + some, size - some
