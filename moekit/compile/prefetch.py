"""Weights asked for ahead: what a product's programs read of one comes from memory while the launch before them still runs.

A launch waits for all that stands before it on the stream, and only then for memory, which takes longer than a small product.
A weight rarely depends on what runs just before, but nothing says so: a launch may write any memory. So a weight is not read
early; its lines are asked for, which is right whoever writes them.
Measured on an H200, a gate GEMM at T = 1 and 16, us: 2048 to 648 in 4 parts 3.2 and 3.5, without 3.9 and 4.0; 2048 to 1544 in 2
parts 4.2 and 4.4, without 4.6 and 5.0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moekit.compile import tile as t
from moekit.compile.schedule import uses_dot
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Along, Node

if TYPE_CHECKING:
    from moekit.compile.lower import Lowering

MOST_LINES = 4  # a lane asks for: larger blocks are those of many rows, whose programs share a weight


def prefetch(low: Lowering) -> None:
    """Ask for each weight of a matrix product of which a program reads few enough lines."""
    done = set()
    for i in low.graph.live():
        node = low.graph.nodes[i]
        if node.op != "contract" or node.attr("axis") not in low.looped or not uses_dot(low.graph, low.schedule, i):
            continue
        for arg in node.args:
            if arg not in done and (along := _along(low, low.graph.nodes[arg], node.attr("axis"))) is not None:
                done.add(arg)
                _ask(low, low.graph.nodes[arg], along)


def _along(low: Lowering, read: Node, axis: str) -> int | None:
    """The dimension of a weight (an operand of static size) along which a product's elements lie side by side; else None."""
    if read.op != "read" or any(low.graph.axes[a] is None for a in read.axes) or low.blocks[axis].partial:
        return None
    layout, index = low.layouts[read.attr("tensor")], read.attr("index")
    if low.graph.tensors[read.attr("tensor")].role != "In" or not isinstance(layout, t.Strided):
        return None
    along = [d for d, e in enumerate(index) if isinstance(e, Along) and e.axis == axis and e.step == 1]
    free = all(isinstance(e, Along) and (e.axis == axis or e.axis not in low.looped) for e in index)
    return along[0] if len(along) == 1 and free and layout.strides[along[0]] == "unit" else None


def _ask(low: Lowering, read: Node, along: int) -> None:
    tensor, index, root = read.attr("tensor"), read.attr("index"), low.root
    axis, layout = index[along].axis, low.layouts[tensor]
    block, line = low.blocks[axis], t.LINE // itemsize(read.dtype)
    split = block.parts > 1 and axis not in dict(low.schedule.parts)
    size = block.share if split else block.extent or 0
    rows = 1
    for a in set(read.axes) - {axis}:
        rows *= low.blocks[a].block
    if rows * size > MOST_LINES * line * 32 * low.schedule.warps:
        return
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
