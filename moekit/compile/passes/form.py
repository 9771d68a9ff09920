"""Where outputs go: InOut tensors read from one place and written to another, outputs written over an operand."""

from __future__ import annotations

from dataclasses import replace

from moekit.lang.graph import Graph


def written_name(name: str) -> str:
    """The tensor that takes the new value of InOut tensor `name` when it is not updated in place."""
    return f"{name}_new"


def out_of_place(graph: Graph, names: frozenset[str]) -> Graph:
    """`graph` with the InOut tensors `names` only read, and their new values written to `<name>_new`."""
    if not names:
        return graph
    tensors = {n: replace(t, role="In") if n in names else t for n, t in graph.tensors.items()}
    for n in filter(names.__contains__, graph.tensors):
        new = written_name(n)
        tensors[new] = replace(graph.tensors[n], name=new, role="Out")
    writes = tuple(
        replace(w, tensor=written_name(w.tensor), declared=w.output) if w.tensor in names else w for w in graph.writes
    )
    return replace(graph, tensors=tensors, writes=writes)


def may_overwrite(graph: Graph, output: str, operand: str) -> bool:
    """Whether `output` may be the very memory of `operand`: all that is read of it is read where `output` is written."""
    write = next(w for w in graph.writes if w.tensor == output)
    source, target = graph.tensors[operand], graph.tensors[output]
    if source.role != "In" or source.dtype != target.dtype or source.axes != target.axes:
        return False
    reads = (n for n in graph.live_nodes("read") if n.attr("tensor") == operand)
    return all((n.attr("index"), n.args) == (write.index, write.ids) for n in reads)


def over_operand(graph: Graph, pairs: tuple[tuple[str, str], ...]) -> Graph:
    """`graph` with each output of `pairs` written to its operand, which becomes InOut."""
    tensors, writes = dict(graph.tensors), graph.writes
    for output, operand in pairs:
        del tensors[output]
        tensors[operand] = replace(tensors[operand], role="InOut")
        writes = tuple(replace(w, tensor=operand, declared=w.output) if w.tensor == output else w for w in writes)
    return replace(graph, tensors=tensors, writes=writes)
