"""Sections: what of one launch goes into programs of different kinds.

Outputs that vary over different axes (a gate GEMM's activation, its router logits) cannot share programs without some of them
holding whole axes that others are cut along. Each group of outputs that can share becomes a section.
"""

from __future__ import annotations

from moekit.compile.schedule.cuts import part
from moekit.compile.schedule.facts import axis_uses, once, read
from moekit.lang.graph import Graph

Outputs = tuple[str, ...]


@once
def sections(graph: Graph) -> tuple[Graph, ...]:
    """The sections of a graph, those with contractions first; the graph itself if there is one."""
    order = [w.output for w in graph.writes]
    groups: list[Outputs] = [(n,) for n in order]
    while pair := next(((a, b) for a in groups for b in groups if a is not b and _together(graph, a, b)), None):
        merged = tuple(sorted((*pair[0], *pair[1]), key=order.index))
        groups = [merged if g is pair[0] else g for g in groups if g is not pair[1]]
    found = [part(graph, g) for g in groups]
    return tuple(sorted(found, key=lambda g: not any(g.live_nodes("contract"))))


def _together(graph: Graph, a: Outputs, b: Outputs) -> bool:
    """Whether two groups of outputs share programs: those of `b` see all that `a` needs and stay as many; or one group
    overwrites what the other reads, which programs of one launch may not.

    Products written as they are do not: nothing is done with them together, and programs of two have twice the weight to read,
    or half the columns at a time (measured.json: products apart).
    """
    one, other = part(graph, a), part(graph, b)
    if _written(one) & read(other) or _written(other) & read(one):
        return True
    if _products(one) and _products(other):
        return False
    both, mine = axis_uses(part(graph, tuple(w.output for w in graph.writes if w.output in (*a, *b)))), axis_uses(other)
    parallel = {x for x, use in both.items() if use.parallel} == {x for x, use in mine.items() if use.parallel}
    return parallel and set(axis_uses(one)) <= set(mine)


def _written(graph: Graph) -> set[str]:
    """Out of place, too, as if it were in place: both forms are to add up alike."""
    return {name for w in graph.writes for name in (w.tensor, w.output)}


def _products(graph: Graph) -> bool:
    return all(graph.nodes[w.value].op == "contract" for w in graph.writes)
