"""In which order outputs are stored: loop by loop, and what overwrites an operand after every loop that loads it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moekit.compile.schedule.facts import FOLDS, axis_uses, reach
from moekit.errors import ScheduleError
from moekit.lang.graph import Graph, Write


@dataclass(frozen=True)
class Stores:
    """Outputs that are stored in the same loops, those over `axes`, which load the tensors `loads`."""

    axes: tuple[str, ...]
    writes: tuple[Write, ...]
    loads: frozenset[str]

    @property
    def tensors(self) -> list[str]:
        """What is stored."""
        return [w.tensor for w in self.writes]


def in_order(graph: Graph, looped: Collection[str]) -> list[Stores]:
    """The outputs in an order in which none overwrites what a later one loads.

    Else new tensors come before updated ones, and those along more loops before those along fewer. Raises ScheduleError where
    outputs wait for each other, or where one goes over an operand of which its own loops read more later on.
    """
    groups: dict[tuple[str, ...], list[Write]] = {}
    for w in graph.writes:
        groups.setdefault(tuple(a for a in axis_uses(graph) if a in looped and a in reach(graph, w)), []).append(w)
    left = []
    for axes, writes in groups.items():
        reads = _reads(graph, looped, writes)
        if axes and (tensor := _reread(graph, reads, writes)):
            hint = f"loop over one of {' and '.join(axes)} at most" if len(axes) > 1 else f"do not loop over {', '.join(axes)}"
            what = f"{tensor} is overwritten in a loop that reads other elements of it later"
            raise ScheduleError(f"{graph.name}: {what}; {hint}")
        left.append(Stores(axes, tuple(writes), frozenset(graph.nodes[i].attr("tensor") for i, _ in reads)))
    updated = {n for n, x in graph.tensors.items() if x.role == "InOut"}
    left.sort(key=lambda s: (not updated.isdisjoint(s.tensors), -len(s.axes)))
    ordered = []
    while left:
        free = next((s for s in left if not any(o.loads & set(s.tensors) for o in left if o is not s)), None)
        if free is None:
            tensors = " and ".join(n for s in left if s.axes for n in s.tensors)
            loops = " and ".join(dict.fromkeys(a for s in left for a in s.axes))
            hint = f"loop over one of {loops} at most"
            raise ScheduleError(f"{graph.name}: {tensors} are stored in loops that load what the others overwrite; {hint}")
        left.remove(free)
        ordered.append(free)
    return ordered


def _reads(graph: Graph, looped: Collection[str], writes: list[Write]) -> set[tuple[int, bool]]:
    """What is read within the loops that store some outputs, and whether a reduction along a loop is made of it.

    Values that vary along no looped axis were made before.
    """
    seen, left = set(), [(node, False) for w in writes for node in (w.value, *w.ids)]
    while left:
        node, reduced = left.pop()
        n = graph.nodes[node]
        if (node, reduced) not in seen and set(looped) & set(n.axes):
            seen.add((node, reduced))
            reduced = reduced or (n.op in FOLDS and n.attr("axis") in looped)
            left += [(arg, reduced) for arg in n.args]
    return {(node, reduced) for node, reduced in seen if graph.nodes[node].op == "read"}


def _reread(graph: Graph, reads: set[tuple[int, bool]], writes: list[Write]) -> str | None:
    """What outputs overwrite in their loops, and read there at another place too: by another index, or in a reduction."""
    own = {w.tensor: (w.index, w.ids) for w in writes}
    for n, reduced in ((graph.nodes[node], reduced) for node, reduced in sorted(reads)):
        tensor = n.attr("tensor")
        if tensor in own and (reduced or own[tensor] != (n.attr("index"), n.args)):
            return tensor
    return None
