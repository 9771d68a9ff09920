"""Which operand of a product stands left, where one is converted from what it is stored as (float8), and data choose it.

The matrix unit takes a left operand from registers, where a conversion leaves it; a right one would go to shared memory first.
And Triton 3.6 turns converted operands of `mma.sync`, which it takes for blocks of fewer than 64 rows, along the summed axis: a
row would have other bits in them than in larger blocks. With 64 columns or more on the left there are always enough rows.
Blocks of few rows wait for the weight's bytes alone: they have it right, and the order of `mma.sync`.

Two float8 operands are not converted: the weight stands left of fewer rows than an instruction takes, so that all have it.
"""

from __future__ import annotations

from collections.abc import Collection

from moekit.compile.schedule.directives import Section
from moekit.compile.schedule.facts import axis_uses, loaded
from moekit.compile.schedule.legal import uses_dot
from moekit.lang.dtypes import STORED
from moekit.lang.graph import Graph, Node

LEAST = 64  # rows of a left operand that the matrix unit takes at once
FEW = 16  # rows of a block that waits for memory


def placed(graph: Graph, section: Section, doubled: Collection[str]) -> tuple[tuple[str, ...], set[str]]:
    """A graph's axes in the order that blocks have them, and the columns of converted weights, before the rows they multiply.

    doubled: axes of columns of which a program holds two blocks.
    """
    order, left = list(axis_uses(graph)), set()
    for i in graph.live():
        n = graph.nodes[i]
        if n.op != "contract" or not uses_dot(graph, section, i):
            continue
        rows, weight = sorted(n.args, key=lambda a: (_chosen(loaded(graph, a)), a == n.args[1]))
        short = graph.nodes[weight].dtype in STORED
        if not _chosen(loaded(graph, weight)) or (_chosen(loaded(graph, rows)) and not short):
            continue
        own, other = (
            next(a for a in graph.nodes[x].axes if section.block(a) > 1 and a not in graph.nodes[y].axes)
            for x, y in ((weight, rows), (rows, weight))
        )
        fits = section.block(other) < LEAST if short else section.block(other) > FEW
        wide = section.block(own) * (1 + (own in doubled)) >= LEAST and fits
        if wide and order.index(own) > order.index(other):
            order.remove(own)
            order.insert(order.index(other), own)
            left.add(own)
    return tuple(order), left


def _chosen(read: Node) -> bool:
    return read.op == "read" and read.dtype in STORED and any(i.operands for i in read.attr("index"))
