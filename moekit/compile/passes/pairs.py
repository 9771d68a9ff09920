"""Pairs: two products of one left operand with two blocks of columns of one tensor, done as one product twice as wide.

A gate and an up projection are such a pair. The matrix unit reads its left operand from shared memory for each product anew,
and two accumulators in a loop without gaps keep Triton 3.6's products from overlapping. The two halves of each column's sums
are the same numbers as apart, in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

from moekit.compile.schedule.directives import Pair, Section
from moekit.compile.schedule.facts import apart, innermost, loaded
from moekit.compile.schedule.legal import pairable
from moekit.lang.graph import Graph, Index


@dataclass(frozen=True)
class Twins:
    """Contractions `nodes` of node `left` with node `right`, a read behind choices or not, and with another one, which begins

    elsewhere in dimension `dim`.
    """

    nodes: tuple[int, int]
    left: int
    right: int
    dim: int
    first: Index
    second: Index

    @property
    def column(self) -> str:
        """The axis of the columns, of which a program holds two blocks."""
        return innermost(self.first)[0]


def paired(graph: Graph, section: Section) -> list[Twins]:
    """The products that a section pairs."""
    found = (pairable(graph, section, directive.tensor) for directive in section.all(Pair))
    return [_twins(graph, *both) for both in found if both is not None]


def _twins(graph: Graph, a: int, b: int) -> Twins:
    nodes = graph.nodes
    (left,) = set(nodes[a].args) & set(nodes[b].args)
    right, other = (next(x for x in nodes[m].args if x != left) for m in (a, b))
    one, two = loaded(graph, right), loaded(graph, other)
    dim = apart(graph, one, two)
    if dim is None:
        raise ValueError(f"{graph.name}: products {a} and {b} are no pair")
    return Twins((a, b), left, right, dim, one.attr("index")[dim], two.attr("index")[dim])
