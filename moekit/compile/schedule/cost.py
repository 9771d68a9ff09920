"""What a schedule costs, launch by launch, without a GPU: programs, bytes, work done again, shared memory.

The model counts what the directives say. It knows nothing of latency, and no time comes of it: it tells schedules that cannot
be good from those worth timing, and refuses one that makes products anew for every program that needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from moekit.compile.schedule.cuts import launched, part, section_graphs
from moekit.compile.schedule.directives import Launch, Loop, Schedule, Section, Tile
from moekit.compile.schedule.facts import PART, reach, shares
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Node

MOST_AGAIN = 8  # times the products of a launch may be made, all in all
SMALL = 2**20  # multiplications for each row that may be done again in any case


@dataclass(frozen=True)
class LaunchCost:
    """One launch.

    `moved`: bytes of the elements it reads and writes, each once; `asked`: bytes that its programs read and write in all, from
    wherever they are; `products`: multiplications of its contractions; `done`: those that its programs do; `shared`: bytes that
    a program's loops have on their way.
    """

    name: str
    programs: int
    moved: int
    asked: int
    products: int
    done: int
    shared: int

    @property
    def again(self) -> float:
        """How often the products are made: 1 where none is made twice."""
        return self.done / self.products if self.products else 1.0

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.programs} programs, {_bytes(self.moved)} moved ({_bytes(self.asked)} asked for), "
            f"products made {self.again:.3g} times, {_bytes(self.shared)} of shared memory"
        )


def cost(graph: Graph, schedule: Schedule, sizes: Mapping[str, int] | None = None) -> list[LaunchCost]:
    """The cost of each launch of a legal schedule; `sizes` of dynamic axes (one block of each where nothing is said)."""
    return [_launch_cost(g, launch, sizes or {}) for launch, g, _ in launched(graph, schedule)]


def runaway(graph: Graph, launch: Launch) -> str | None:
    """One sentence if a launch makes products anew for program after program that needs them, else None."""
    found = _launch_cost(graph, launch, {})
    rows = prod(_block(launch, a) for a, n in graph.axes.items() if n is None)
    if found.again <= MOST_AGAIN or found.done - found.products <= SMALL * rows:
        return None
    node, section, times = max(_repeated(graph, launch), key=lambda x: x[2])
    axes = " and ".join(d.axis for d in section.all(Tile) if d.axis not in _spread(graph.nodes[node]))
    what = graph.names.get(node, f"the product over {graph.nodes[node].attr('axis')}")
    return f"{what} would be made {times} times over, anew for every block of {axes}; stage it, or what is made of it"


def _launch_cost(graph: Graph, launch: Launch, sizes: Mapping[str, int]) -> LaunchCost:
    extents = {a: sizes.get(a, _block(launch, a)) if n is None else n for a, n in graph.axes.items()}
    pairs = list(zip(section_graphs(graph, launch), launch.sections, strict=True))
    counts = [_programs(section, extents) for _, section in pairs]
    asked = sum(n * _held(g, s, extents) for n, (g, s) in zip(counts, pairs, strict=True))
    products = [i for i in graph.live() if graph.nodes[i].op == "contract"]
    once = sum(prod(extents[a] for a in _spread(graph.nodes[i])) for i in products)
    done = sum(_programs(s, extents) * _work(g, s, i, extents) for g, s in pairs for i in products if i in g.live())
    shared = max(launch.stages * _in_flight(g, s) for g, s in pairs)
    moved = sum(size * prod(extents[a] for a in axes) for size, axes in _accesses(graph))
    return LaunchCost(graph.name, sum(counts), moved, asked, once, done, shared)


def _repeated(graph: Graph, launch: Launch) -> list[tuple[int, Section, int]]:
    """Each product of each section, and how many programs make the same elements of it."""
    extents = {a: n or _block(launch, a) for a, n in graph.axes.items()}
    found = []
    for section in launch.sections:
        for i in part(graph, section.outputs).live():
            if graph.nodes[i].op == "contract":
                tiles = [d for d in section.all(Tile) if d.axis not in _spread(graph.nodes[i]) and not d.axis.endswith(PART)]
                found.append((i, section, prod(-(-extents[d.axis] // d.block) for d in tiles)))
    return found


def _spread(node: Node) -> set[str]:
    """The axes that a value varies over, and those it is summed over."""
    return {*node.axes, node.attr("axis")} if node.op == "contract" else set(node.axes)


def _block(launch: Launch, axis: str) -> int:
    return max((d.block for s in launch.sections for d in s.axes if d.axis == axis), default=1)


def _programs(section: Section, extents: Mapping[str, int]) -> int:
    return prod(-(-extents[d.axis] // d.block) for d in section.all(Tile))


def _held(graph: Graph, section: Section, extents: Mapping[str, int]) -> int:
    """Bytes that one program reads and writes."""
    return sum(size * prod(_share(graph, section, a, extents) for a in axes) for size, axes in _accesses(graph))


def _share(graph: Graph, section: Section, axis: str, extents: Mapping[str, int]) -> int:
    """Elements of an axis that one program goes through."""
    held = section.axis(axis)
    if isinstance(held, Tile):
        return min(held.block, extents[axis])
    return -(-extents[axis] // shares(graph).get(axis, 1))


def _work(graph: Graph, section: Section, node: int, extents: Mapping[str, int]) -> int:
    return prod(_share(graph, section, a, extents) for a in _spread(graph.nodes[node]))


def _accesses(graph: Graph) -> list[tuple[int, Iterable[str]]]:
    """Bytes of an element, and the axes, of every read (each once) and write; of what ids choose, what is chosen."""
    nodes = [graph.nodes[i] for i in graph.live() if graph.nodes[i].op == "read"]
    reads = {(n.attr("tensor"), n.attr("index"), n.args): (itemsize(n.dtype), n.axes) for n in nodes}
    return [*reads.values(), *((itemsize(graph.nodes[w.value].dtype), reach(graph, w)) for w in graph.writes)]


def _in_flight(graph: Graph, section: Section) -> int:
    """Bytes of one turn's loads of the operands of products in loops."""
    found = set()
    for n in map(graph.nodes.__getitem__, graph.live()):
        if n.op == "contract" and isinstance(section.axis(n.attr("axis")), Loop):
            found |= {a for a in n.args if graph.nodes[a].op == "read"}
    return sum(prod(map(section.block, graph.nodes[a].axes)) * itemsize(graph.nodes[a].dtype) for a in found)


def _bytes(n: int) -> str:
    return f"{n} B" if n < 2**10 else f"{n / 2**10:.3g} KiB" if n < 2**20 else f"{n / 2**20:.3g} MiB"
