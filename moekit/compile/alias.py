"""Out-of-place forms: an InOut tensor read from one place and written to another."""

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
    for n in names:
        new = written_name(n)
        tensors[new] = replace(graph.tensors[n], name=new, role="Out")
    writes = tuple(replace(w, tensor=written_name(w.tensor)) if w.tensor in names else w for w in graph.writes)
    return replace(graph, tensors=tensors, writes=writes)
