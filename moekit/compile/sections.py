"""Sections: what of one launch goes into programs of different kinds.

Outputs that vary over different axes (a gate GEMM's activation, its router logits) cannot share programs without some of them
holding whole axes that others are cut along. Each group of outputs that can share becomes a section: a graph of its own with
those outputs only. A launch runs the sections' programs side by side.
"""

from __future__ import annotations

from dataclasses import replace

from moekit.compile.analysis import axis_uses, has_gemm, once
from moekit.compile.split import PARTIAL
from moekit.lang.graph import Graph, Write


@once
def sections(graph: Graph) -> tuple[Graph, ...]:
    """The sections of a graph, those with contractions first; the graph itself if there is one."""
    groups = [_part(graph, (w,)) for w in graph.writes]
    while pair := next(((a, b) for a in groups for b in groups if a is not b and _together(graph, a, b)), None):
        merged = [w for w in graph.writes if w in (*pair[0].writes, *pair[1].writes)]
        groups = [_part(graph, tuple(merged)) if g is pair[0] else g for g in groups if g is not pair[1]]
    if len(groups) == 1:
        return (graph,)
    return tuple(sorted(groups, key=lambda g: not any(g.nodes[i].op == "contract" for i in g.live())))


def meant(parts: tuple[Graph, ...]) -> tuple[Graph, ...]:
    """The sections of a launch that its schedule is for: beside a GEMM, sections without one go their own way."""
    return tuple(g for g in parts if has_gemm(g)) or parts


def _part(graph: Graph, writes: tuple[Write, ...]) -> Graph:
    """The graph with some of its outputs; an InOut tensor that is not among them is only read."""
    mine = {w.tensor for w in writes}
    tensors = {n: t for n, t in graph.tensors.items() if t.role != "Out" or n in mine}
    tensors = {n: replace(t, role="In") if t.role == "InOut" and n not in mine else t for n, t in tensors.items()}
    first = writes[0].tensor
    name = graph.name.removesuffix(f"_{PARTIAL}") if first.startswith(f"{PARTIAL}_") else graph.name
    return replace(graph, name=f"{name}_{first}", tensors=tensors, writes=writes)


def _together(graph: Graph, a: Graph, b: Graph) -> bool:
    """Whether two groups of outputs share programs: those of `b` see all that `a` needs and stay as many; or one group
    overwrites what the other reads, which programs of one launch may not.

    Products written as they are do not: nothing is done with them together, and programs of two have twice the weight to read,
    or half the columns at a time (a split GEMM with two products over the same columns, 648 in all, at T = 1, 16 and 64 on an
    H200, us: 3.3, 3.6 and 4.4 apart, 3.7, 4.2 and 5.0 together).
    """
    if _written(a) & _read(b) or _written(b) & _read(a):
        return True
    if _products(a) and _products(b):
        return False
    both, mine = axis_uses(_part(graph, (*a.writes, *b.writes))), axis_uses(b)
    parallel = {x for x, use in both.items() if use.parallel} == {x for x, use in mine.items() if use.parallel}
    return parallel and set(axis_uses(a)) <= set(mine)


def _products(graph: Graph) -> bool:
    return all(graph.nodes[w.value].op == "contract" for w in graph.writes)


def _written(graph: Graph) -> set[str]:
    return {w.tensor for w in graph.writes}


def _read(graph: Graph) -> set[str]:
    return {graph.nodes[i].attr("tensor") for i in graph.live() if graph.nodes[i].op == "read"}
