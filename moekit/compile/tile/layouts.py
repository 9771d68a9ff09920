"""What is known of tensors' strides; and the layouts of contiguous tensors, which are compiled and timed ahead of any call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from moekit.compile import tile as t
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph


def strided(
    shape: Sequence[int], strides: Sequence[int], axes: Sequence[str | None], dynamic: Collection[str], size: int
) -> t.Strided:
    """What a kernel knows of a tensor with elements of `size` bytes: which strides are 1, or do not matter for the one element

    there ever is; which are multiples of 16 bytes; and whether offsets along static axes need 64 bits.
    """
    kinds, reach = [], 0
    for n, stride, axis in zip(shape, strides, axes, strict=True):
        if stride == 1 or (n == 1 and axis not in dynamic):
            kinds.append("unit")
        else:
            kinds.append("aligned" if stride * size % 16 == 0 and stride < 2**31 else "any")
        if axis not in dynamic:
            reach += max(0, n - 1) * stride
    return t.Strided(tuple(kinds), wide=reach >= 2**31)


def contiguous(graph: Graph, sizes: Mapping[str, int]) -> dict[str, t.Strided | t.Mailbox]:
    """The layouts of every tensor of a graph, all contiguous, as a launch has them; `sizes` of all axes, dynamic ones too."""
    extents = dict(sizes) | {a: s for a, s in graph.axes.items() if s is not None}
    dynamic, found = {a for a, s in graph.axes.items() if s is None}, {}
    for x in graph.tensors.values():
        shape = [1 if a is None else extents[a] for a in x.axes]
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        found[x.name] = strided(shape, strides, x.axes, dynamic, itemsize(x.dtype))
    return found | channels(graph)


def channels(graph: Graph) -> dict[str, t.Strided | t.Mailbox]:
    """The layouts of what all-reduces go by: mailboxes as wide as a row, and the epoch of each row."""
    found: dict[str, t.Strided | t.Mailbox] = {}
    for n in (graph.nodes[i] for i in graph.live() if graph.nodes[i].op == "all_reduce"):
        mail, width = mail_name(n.attr("over")), prod(graph.axes[a] or 1 for a in graph.nodes[n.args[0]].axes[1:])
        known = found.get(mail)
        width = max(width, known.width if isinstance(known, t.Mailbox) else 0)
        found |= {mail: t.Mailbox(mail, n.attr("ranks"), width), epochs_name(n.attr("over")): t.Strided(("unit",))}
    return found


def mail_name(axis: str) -> str:
    """What a kernel calls the mailboxes of a mesh axis."""
    return f"{axis}_mail"


def epochs_name(axis: str) -> str:
    """What a kernel calls the numbers of the last packets of each row over a mesh axis."""
    return f"{axis}_epochs"
