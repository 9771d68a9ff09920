"""What is known of tensors' strides; and the layouts of contiguous tensors, which are compiled and timed ahead of any call."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

from moekit.compile import tile as t
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph

PAIR = 2  # packets that are written and read at once, of the 16 bytes that one access has at most


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


def contiguous(graph: Graph, sizes: Mapping[str, int]) -> dict[str, t.Strided]:
    """The layouts of every tensor of a graph, all contiguous, as a launch has them; `sizes` of all axes, dynamic ones too."""
    sizes, dynamic, found = graph.sizes(sizes), {a for a, s in graph.axes.items() if s is None}, {}
    for x in graph.tensors.values():
        shape = graph.shape(x.name, sizes)
        strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
        found[x.name] = strided(shape, strides, x.axes, dynamic, itemsize(x.dtype))
    return found


def arrays(graph: Graph, sizes: Mapping[str, int]) -> dict[str, t.Viewed]:
    """The layouts of every tensor of a graph, each an array of its own; `sizes` of all axes, dynamic ones too."""
    return {n: t.Viewed.whole(n, graph.shape(n, graph.sizes(sizes))) for n in graph.tensors}


def channels(graph: Graph, sizes: Mapping[str, int] | None) -> dict[str, t.Strided | t.Viewed | t.Mailbox]:
    """The layouts of what sums over ranks go by, if a call has no others: mailboxes as wide as a row, and each row's epoch.

    Epochs are behind a pointer, or in an array where `sizes` says of how many rows.
    """
    found: dict[str, t.Strided | t.Viewed | t.Mailbox] = {}
    for n in graph.live_nodes("all_reduce"):
        (rows, *others), over = graph.nodes[n.args[0]].axes, n.attr("over")
        mail, epochs, width = mail_name(over), epochs_name(over), prod(graph.axes[a] or 1 for a in others)
        known = found.get(mail)
        width = max(width, known.width if isinstance(known, t.Mailbox) else 0)
        extent = None if sizes is None else graph.axes[rows] or sizes[rows]
        lying = t.Strided(("unit",)) if extent is None else t.Viewed.whole(epochs, (extent,))
        found |= {mail: t.Mailbox(mail, n.attr("ranks"), width), epochs: lying}
    return found


def pitch(width: int) -> int:
    """Packets from one slot of a mailbox to the next, for rows of `width` elements: pairs of them are never cut."""
    return -(-width // PAIR) * PAIR


def carried(program: t.TileProgram, mail: t.Param) -> int:
    """How many neighbours along the last axis of a row go in one access of a mailbox: what its 16 bytes have room for.

    One where a row is no longer than that, or has several axes, or is no block's last axis. That follows from the declaration
    and the row's dtype and extents, so that all ranks have as many, whatever their strides and schedules.
    """
    own = [a for a in mail.axes if a is not None]
    if program.ordered(own)[-1] != own[-1]:
        return 1
    if itemsize(mail.dtype) not in (2, 4) or len(own) != 2:
        return 1
    n = PAIR * max(1, 4 // itemsize(mail.dtype))
    return n if (program.axis(own[1]).extent or 0) > n else 1


def mail_name(axis: str) -> str:
    """What a kernel calls the mailboxes of a mesh axis."""
    return f"{axis}_mail"


def epochs_name(axis: str) -> str:
    """What a kernel calls the numbers of the last packets of each row over a mesh axis."""
    return f"{axis}_epochs"
