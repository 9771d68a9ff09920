"""What a schedule costs, launch by launch, without a GPU: programs, bytes, work done again, shared memory.

The model counts what the directives say. It knows nothing of latency, and no time comes of it: it tells schedules that cannot
be good from those worth timing, and refuses one that makes products anew for every program that needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from moekit.compile.schedule.cuts import launched, sections_of
from moekit.compile.schedule.directives import Launch, Loop, Rounds, Schedule, Section, Tile
from moekit.compile.schedule.facts import PART, axis_uses, loaded, reach, shares
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Index, Node

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


def programs(graph: Graph, launch: Launch, sizes: Mapping[str, int]) -> int:
    """How many programs a launch has."""
    extents = _extents(graph, launch, sizes)
    return sum(_programs(section, extents, {d.axis: d.programs for d in section.all(Rounds)}) for section in launch.sections)


def runaway(graph: Graph, launch: Launch) -> str | None:
    """One sentence if a launch makes products anew for program after program that needs them, else None."""
    made = _made(graph, launch, _extents(graph, launch, {}))
    products, done = _in_all(made)
    rows = prod(_block(launch, a) for a, n in graph.axes.items() if n is None)
    if done <= MOST_AGAIN * products or done - products <= SMALL * rows:
        return None
    worst = max(made, key=lambda product: product.times)
    axes = " and ".join(d.axis for d in worst.section.all(Tile) if d.axis not in _spread(graph.nodes[worst.node]))
    what = graph.names.get(worst.node, f"the product over {graph.nodes[worst.node].attr('axis')}")
    return f"{what} would be made {worst.times} times over, anew for every block of {axes}; stage it, or what is made of it"


@dataclass(frozen=True)
class _Product:
    """A contraction in a section: its multiplications, and how many programs do the same ones."""

    node: int
    section: Section
    multiplications: int
    times: int


def _made(graph: Graph, launch: Launch, extents: Mapping[str, int]) -> list[_Product]:
    """Every product of every section."""
    products = [(i, section) for g, section in sections_of(graph, launch) for i in g.live() if g.nodes[i].op == "contract"]
    return [_product(i, _spread(graph.nodes[i]), section, extents) for i, section in products]


def _product(node: int, spread: set[str], section: Section, extents: Mapping[str, int]) -> _Product:
    again = [d for d in section.all(Tile) if d.axis not in spread and not d.axis.endswith(PART)]
    times = prod(-(-extents[d.axis] // d.block) for d in again)
    return _Product(node, section, prod(extents[a] for a in spread), times)


def _in_all(made: list[_Product]) -> tuple[int, int]:
    """Multiplications of the products, each once; and those that programs do."""
    once = {product.node: product.multiplications for product in made}
    return sum(once.values()), sum(product.multiplications * product.times for product in made)


def _launch_cost(graph: Graph, launch: Launch, sizes: Mapping[str, int]) -> LaunchCost:
    extents = _extents(graph, launch, sizes)
    pairs = sections_of(graph, launch)
    asked = sum(_programs(s, extents) * _held(g, s, extents) for g, s in pairs)
    shared = max(launch.stages * in_flight(g, s) for g, s in pairs)
    moved = sum(size * prod(extents[a] for a in axes) for size, axes in _accesses(graph))
    count = programs(graph, launch, sizes)
    return LaunchCost(graph.name, count, moved, asked, *_in_all(_made(graph, launch, extents)), shared)


def _extents(graph: Graph, launch: Launch, sizes: Mapping[str, int]) -> dict[str, int]:
    """The size of every axis; one block of a dynamic one that is not among `sizes`."""
    return {a: sizes.get(a, _block(launch, a)) if n is None else n for a, n in graph.axes.items()}


def _spread(node: Node) -> set[str]:
    """The axes that a value varies over, and those it is summed over."""
    return {*node.axes, node.attr("axis")} if node.op == "contract" else set(node.axes)


def _block(launch: Launch, axis: str) -> int:
    return max((d.block for s in launch.sections for d in s.axes if d.axis == axis), default=1)


def _programs(section: Section, extents: Mapping[str, int], most: Mapping[str, int] | None = None) -> int:
    """Programs of a section; at `most` so many along some axes, whose blocks they take in turn."""
    counts = {d.axis: -(-extents[d.axis] // d.block) for d in section.all(Tile)}
    return prod(min(n, (most or {}).get(axis, n)) for axis, n in counts.items())


def _held(graph: Graph, section: Section, extents: Mapping[str, int]) -> int:
    """Bytes that one program reads and writes."""
    return sum(size * prod(_share(graph, section, a, extents) for a in axes) for size, axes in _accesses(graph))


def _share(graph: Graph, section: Section, axis: str, extents: Mapping[str, int]) -> int:
    """Elements of an axis that one program goes through."""
    held = section.axis(axis)
    if isinstance(held, Tile):
        return min(held.block, extents[axis])
    return -(-extents[axis] // shares(graph).get(axis, 1))


def _accesses(graph: Graph) -> list[tuple[int, Iterable[str]]]:
    """Bytes of an element, and the axes, of every read (each once) and write; of what ids choose, what is chosen."""
    nodes = graph.live_nodes("read")
    reads = {(n.attr("tensor"), n.attr("index"), n.args): (itemsize(n.dtype), n.axes) for n in nodes}
    return [*reads.values(), *((itemsize(graph.nodes[w.value].dtype), reach(graph, w)) for w in graph.writes)]


def in_flight(graph: Graph, section: Section) -> int:
    """Bytes of one turn's loads of the operands of products in loops; of what is the same along two axes once."""
    found, uses = {}, axis_uses(graph).values()
    looped = {use.name for use in uses if use.in_turns or isinstance(section.axis(use.name), Loop)}
    for n in graph.live_nodes("contract"):
        some = (x for a in n.args if (x := loaded(graph, a)).op == "read" and looped & set(x.axes))
        found |= {(x.attr("tensor"), *(_place(graph, section, x, i) for i in x.attr("index"))): x for x in some}
    return sum(prod(map(section.block, x.axes)) * itemsize(x.dtype) for x in found.values())


def _place(graph: Graph, section: Section, n: Node, index: Index) -> tuple:
    """Which elements an index says, those of an axis by their blocks."""
    found: list[object] = [index.start]
    for term, step in index.terms:
        if isinstance(term, str):
            found.append((section.block(term), step))
        elif (other := graph.nodes[n.args[term]]).op == "iota":
            found += _place(graph, section, other, other.attr("index"))[1:]
        else:
            found.append((f"%{n.args[term]}", step))
    return tuple(found)


def _bytes(n: int) -> str:
    return f"{n} B" if n < 2**10 else f"{n / 2**10:.3g} KiB" if n < 2**20 else f"{n / 2**20:.3g} MiB"
