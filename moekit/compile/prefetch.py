"""Weights asked for ahead: what a product's programs read of one comes from memory while the launch before them still runs.

A launch waits for all that stands before it on the stream, and only then for memory, which takes longer than a small product.
A weight rarely depends on what runs just before, but nothing says so: a launch may write any memory. So a weight is not read
early; its lines are asked for, which is right whoever writes them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.schedule.directives import Prefetch
from moekit.compile.schedule.legal import prefetchable
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering


def prefetch(low: Lowering) -> None:
    """Ask for each weight that the schedule wants ahead, where its elements lie side by side along the product's axis."""
    possible = prefetchable(low.graph, low.schedule)
    for directive in low.schedule.all(Prefetch):
        for read, along in possible.get(directive.tensor, ()):
            layout = low.layouts[directive.tensor]
            if isinstance(layout, t.Strided) and layout.strides[along] == "unit":
                _ask(low, low.graph.nodes[read], along)


def _ask(low: Lowering, read: Node, along: int) -> None:
    tensor, index, root = read.attr("tensor"), read.attr("index"), low.root
    axis, layout = index[along].axis, low.layouts[tensor]
    block, line = low.blocks[axis], t.LINE // itemsize(read.dtype)
    split = block.parts > 1 and axis not in low.schedule.parts
    size = block.share if split else block.extent or 0
    values = [low.along(root, e) if d != along and (e.axis or e.start) else None for d, e in enumerate(index)]
    masks = [low.bound(root, e.axis)[1] for d, e in enumerate(index) if d != along and e.axis]
    first, start = low.first(root, axis) if split else None, index[along].start
    while size >= line:
        some = line << (size // line).bit_length() - 1  # the largest power of two of lines
        values[along] = low.const(root, start) if start else None
        if first is not None:
            values[along] = low.binary(root, "add", first, low.const(root, start)) if start else first
        wide = tuple(isinstance(layout, t.Strided) and layout.wide for _ in values)
        root.ops.append(t.Prefetch(tensor, tuple(values), wide, low.all(root, masks), along, some))
        start, size = start + some, size - some
