"""What a schedule may say of a graph: None, or one sentence that says why not, before anything is compiled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

from moekit.compile.schedule.cost import runaway
from moekit.compile.schedule.cuts import cut, sections_of, stageable
from moekit.compile.schedule.directives import (
    Abreast,
    Axis,
    Launch,
    Loop,
    Pair,
    Prefetch,
    Rounds,
    Schedule,
    Section,
    Split,
    Stage,
    Tile,
    Whole,
    subject,
    text_of,
)
from moekit.compile.schedule.facts import (
    PRODUCTS,
    AxisUse,
    Twins,
    axis_uses,
    equally_deep,
    folded,
    operands,
    paired,
    part_axis,
    reach,
    read,
    reduction_levels,
    scattered,
    shares,
    within_turns,
)
from moekit.compile.schedule.stores import in_order
from moekit.compile.schedule.targets import MEASURED
from moekit.errors import ScheduleError
from moekit.lang.dtypes import itemsize
from moekit.lang.graph import Graph, Index

MOST_PARTS = 64


def legal(graph: Graph, schedule: Schedule) -> str | None:
    """None if `schedule` can be used for `graph`, else one sentence saying why not."""
    return next((f"{graph.name}: {why}" for why in _problems(graph, schedule)), None)


def _problems(graph: Graph, schedule: Schedule) -> Iterator[str]:
    """What is wrong, of which nobody asks for more than the first: what comes after rests on what comes before."""
    for n, launch in enumerate(schedule.launches):
        last = n == len(schedule.launches) - 1
        if (launch.cut is None) != last:
            yield "a launch that is not the last ends with split or stage, the last one with neither"
        first = graph
        if launch.cut is not None:
            if why := _cut_problem(graph, launch.cut):
                yield why
            first, graph, _ = cut(graph, launch.cut)
        yield from _launch_problems(first, launch)


def _launch_problems(graph: Graph, launch: Launch) -> Iterator[str]:
    if launch.warps not in MEASURED.warps or not 1 <= launch.stages <= MEASURED.most_stages:
        most = MEASURED.most_stages
        yield f"{launch.warps} warps and {launch.stages} stages; warps are one of {MEASURED.warps}, stages 1 to {most}"
    if why := _said_twice(launch) or _outputs_problem(graph, launch):
        yield why
    for g, section in sections_of(graph, launch):
        yield from _section_problems(g, section, launch)
    if len(launch.sections) > 1 and graph.ranks:
        yield f"a launch that adds up over {', '.join(graph.ranks)} has one section, not {len(launch.sections)}"
    if (why := runaway(graph, launch)) is not None:
        yield why
    for d in launch.all(Abreast):
        if d.axis != taking_turns(graph, launch):
            need = "they need the same blocks of it, outermost, and no other axis of dynamic size"
            yield f"sections cannot be abreast along {d.axis}: {need}"


def taking_turns(graph: Graph, launch: Launch) -> str | None:
    """The axis by whose blocks the sections of a launch can take turns: outermost and in the same blocks in all, the only one

    of dynamic size; None if there is none.
    """
    tiles = [[d for d in map(s.axis, axis_uses(g)) if isinstance(d, Tile)] for g, s in sections_of(graph, launch)]
    grids = [sorted(each, key=lambda d: graph.axes[d.axis] is not None) for each in tiles]
    outer = {grid[0] if grid else None for grid in grids}
    if len(outer) != 1 or None in outer or any(graph.axes[d.axis] is None for grid in grids for d in grid[1:]):
        return None
    return grids[0][0].axis


def _said_twice(of: Launch | Section) -> str | None:
    """Only one directive can be about an axis's place, a tensor's pairing, a launch's warps."""
    said: dict[tuple, str] = {}
    for d in of.directives:
        if subject(d) in said:
            return f"{said[subject(d)]} and {text_of(d)} cannot both be said; say one"
        said[subject(d)] = text_of(d)
    return None


def _outputs_problem(graph: Graph, launch: Launch) -> str | None:
    """Each output is of one section, and none reads what another one writes."""
    outputs = [w.output for w in graph.writes]
    said = [n for s in launch.sections for n in (s.outputs or outputs)]
    if Counter(said) != Counter(outputs):
        return f"each output is of one section; the launch makes {', '.join(outputs)}, the sections say {', '.join(said)}"
    if len(launch.sections) > 1:
        for g, one in sections_of(graph, launch):
            others = {w.tensor for w in graph.writes if w.output not in one.outputs}
            if met := sorted(others & read(g)):
                return f"the section of {', '.join(one.outputs)} reads {met[0]}, which another section of the launch writes"
    return None


def _axes_problem(uses: Mapping[str, AxisUse], section: Section) -> str | None:
    """Each axis is held in one way, which it can be."""
    given = [d.axis for d in section.axes]
    if lacking := [axis for axis in uses if given.count(axis) != 1]:
        return f"the schedule must say once what is done with axis {lacking[0]}; it speaks of {', '.join(given)}"
    for d in section.axes:
        if d.axis not in uses:
            who = f"the section of {', '.join(section.outputs)}" if section.outputs else "the fusion"
            return f"the schedule names axis {d.axis}, which {who} does not use; it has {', '.join(uses)}"
        if why := axis_problem(uses[d.axis], d):
            return f"axis {d.axis} cannot be {type(d).__name__.lower()} in blocks of {d.block}: {why}"
    return _said_twice(section)


def _section_problems(graph: Graph, section: Section, launch: Launch) -> Iterator[str]:
    uses = axis_uses(graph)
    if why := _axes_problem(uses, section):
        yield why
    yield from _parts_problems(graph, section, launch)
    yield from _rounds_problems(graph, section, launch)
    yield from _running_problems(graph, section)
    yield from _exchange_problems(graph, section)
    for axis in scattered(graph):
        if axis in uses and section.block(axis) != 1:
            yield f"an output is put at ids along {axis}, so its block must be 1, not {section.block(axis)}"
    for axis in map(part_axis, shares(graph)):
        if section.axis(axis) != Tile(axis, 1):
            yield f"a program does one part of a split axis, so {axis} must be tile:{axis}:1, not {text_of(section.axis(axis))}"
    if (tile := largest_tile(graph, section)) > MEASURED.largest_tile:
        yield f"a block of {tile} elements is over the limit of {MEASURED.largest_tile}; use smaller blocks or loop"
    for pair in section.all(Pair):
        if not pairable(graph, section, pair.tensor):
            need = "they have one left operand of 16 bits, run on the matrix unit and along a looped axis"
            yield f"no two products with {pair.tensor} can be paired; {need}"
    for ahead in section.all(Prefetch):
        if ahead.tensor not in prefetchable(graph, section):
            need = "a weight of static size can, in a product along a looped axis that its blocks divide"
            yield f"{ahead.tensor} cannot be prefetched; {need}"
        elif not launch.dependent:
            yield f"{ahead.tensor} cannot be prefetched by a launch that begins when the one before it has ended; add dependent"
    try:
        in_order(graph, {a for a, use in uses.items() if isinstance(section.axis(a), Loop)})
    except ScheduleError as error:
        yield str(error).removeprefix(f"{graph.name}: ")


def axis_problem(use: AxisUse, d: Axis) -> str | None:
    """Why an axis cannot be held so; None if it can."""
    if d.block < 1 or d.block & (d.block - 1):
        return "a block is a power of two"
    if use.whole and not isinstance(d, Whole):
        return "a scan or top_k runs along it, an update reads other elements of it, or ranks add up its rows: it must be whole"
    if use.in_turns and d != Loop(d.axis, 1):
        return f"values are handed on along it, so it must be loop:{d.axis}:1"
    if isinstance(d, Tile) and not use.parallel:
        return "it is reduced, scanned or missing from an output, so one program must see all of it"
    if isinstance(d, Whole) and (use.extent is None or d.block < use.extent):
        return "its size is dynamic" if use.extent is None else f"it has {use.extent} elements"
    return None


def _parts_problems(graph: Graph, section: Section, launch: Launch) -> Iterator[str]:
    if section.parts and launch.cut is not None:
        yield f"only one axis can be split or done in parts, the schedule says {launch}"
    for axis, count in section.parts.items():
        why = _divisible(graph, axis, count, section.each.get(axis, 0))
        if why is None and any(axis in reach(graph, w) for w in graph.writes):
            why = "an output runs along it, so its parts cannot be done one after the other by one program"
        if why:
            yield f"axis {axis} cannot be split in {count}: {why}"
    split = {launch.cut.axis: launch.cut.count} if isinstance(launch.cut, Split) else {}
    for axis, count in {**section.parts, **split}.items():
        if axis in axis_uses(graph) and not isinstance(section.axis(axis), Loop):
            yield f"axis {axis} cannot be split in {count}: a split axis is looped over"
    for axis, each in {**graph.each, **section.each}.items():
        if axis in axis_uses(graph) and each % section.block(axis):
            yield f"axis {axis} cannot be cut every {each} elements: its blocks of {section.block(axis)} do not divide that"


def _rounds_problems(graph: Graph, section: Section, launch: Launch) -> Iterator[str]:
    """Programs take turns along one axis, all of what they do in one loop over it."""
    for d in section.all(Rounds):
        held = next((x for x in section.axes if x.axis == d.axis), None)
        extent = graph.axes.get(d.axis) if isinstance(held, Tile) else None
        if held is None or extent is None or not 0 < d.programs < -(-extent // held.block):
            yield f"{text_of(d)} needs a tile of {d.axis}, of static size, in more than {d.programs} blocks"
        elif section.all(Prefetch) or section.all(Pair) or launch.all(Abreast) or graph.ranks:
            yield f"{text_of(d)} cannot stand beside pair, prefetch or abreast, nor where ranks add up"


def _running_problems(graph: Graph, section: Section) -> Iterator[str]:
    """What goes from turn to turn of one loop begins at the axis's first element, and has no other loop within."""
    looped, what = {d.axis for d in section.all(Loop)}, {"cumsum": "a running sum", "before": "what is handed on"}
    for n in graph.live_nodes(*what):
        if n.attr("axis") in looped and (others := sorted(looped & set(n.axes) - {n.attr("axis")})):
            along = f"{what[n.op]} along {n.attr('axis')}"
            yield f"{along} also varies over {others[0]}, which cannot be looped over beside it"
    for n in graph.live_nodes("place"):
        yield f"a value is placed along {', '.join(n.attr('over'))}, which a launch of its own does; stage it"


def _exchange_problems(graph: Graph, section: Section) -> Iterator[str]:
    """A program sends all of its rows, which are its own, before it waits for those of others; once."""
    exchanges = [*graph.live_nodes("all_reduce")]
    for n in exchanges:
        rows, over = graph.nodes[n.args[0]].axes[0], n.attr("over")
        if not isinstance(section.axis(rows), Tile):
            yield f"ranks add up rows along {rows} over {over}, so it must be tiled, not {text_of(section.axis(rows))}"
        if others := [d.axis for d in section.all(Tile) if d.axis != rows]:
            yield f"programs along {others[0]} would each send the same rows over {over}; it must be whole"
    if len(exchanges) > 1:
        yield f"a launch adds up {len(exchanges)} values over {exchanges[0].attr('over')}, and may one; stage the first sum"


def _cut_problem(graph: Graph, how: Split | Stage) -> str | None:
    if isinstance(how, Split):
        why = _divisible(graph, how.axis, how.count, how.each)
        return f"axis {how.axis} cannot be split in {how.count}: {why}" if why else None
    if not (unknown := [v for v in how.values if v not in stageable(graph)]):
        return None
    may = ", ".join(stageable(graph)) or "nothing here"
    return f"{unknown[0]} cannot be staged; results of products and sums and narrowing casts can, and what is placed: {may}"


def _divisible(graph: Graph, axis: str, count: int, each: int) -> str | None:
    uses = axis_uses(graph)
    if axis not in uses or not uses[axis].reduced or uses[axis].extent is None:
        return "only a reduced axis of static size can be split"
    if any(folded(graph.nodes[i]) == axis for i in within_turns(graph)):
        return "turns add up along it what is handed on to the next"
    if each and (each < 1 or count < 2 or count != -(-(uses[axis].extent or 0) // each)):
        return f"its {uses[axis].extent} elements are not that many parts of {each}, two or more"
    if not each and not 2 <= count <= MOST_PARTS:
        return f"the parts are 2 to {MOST_PARTS}"
    return None if equally_deep(graph, axis) else "one of its reductions needs the result of another"


def uses_dot(graph: Graph, section: Section, node: int) -> bool:
    """Whether a contraction runs on the matrix unit: one wide axis on each side, none shared, and enough of each."""
    n = graph.nodes[node]
    left, right = (set(graph.nodes[a].axes) for a in operands(n))
    k = n.attr("axis")
    wide = {a for a in left | right if section.block(a) > 1}
    rows, columns = (left - right) & wide, (right - left) & wide
    if len(rows) != 1 or len(columns) != 1 or (left & right & wide) - {k}:
        return False
    return all(section.block(a) >= MEASURED.matrix for a in (*rows, *columns)) and section.block(k) >= least_depth(graph, node)


def least_depth(graph: Graph, node: int) -> int:
    """How much of a contracted axis an instruction of the matrix unit takes: more of one-byte operands."""
    return max(MEASURED.matrix, 2 * MEASURED.matrix // itemsize(graph.nodes[graph.nodes[node].args[0]].dtype))


def largest_tile(graph: Graph, section: Section) -> int:
    """Elements of the largest block any value needs."""
    return max((block_size(graph, section, i) for i in graph.live()), default=1)


def block_size(graph: Graph, section: Section, node: int) -> int:
    """Elements of a value's block; of a product that is summed up, of what is added."""
    n = graph.nodes[node]
    summed = n.op in PRODUCTS and not uses_dot(graph, section, node)
    return prod(map(section.block, {*n.axes, n.attr("axis")} if summed else n.axes))


def pairable(graph: Graph, section: Section, tensor: str) -> Twins | None:
    """The two products of one left operand with two blocks of columns of `tensor`, if they can be made as one."""
    if (pair := paired(graph).get(tensor)) is None:
        return None
    (a, b), left, column = pair.nodes, graph.nodes[pair.left], pair.column
    looped = {d.axis for d in section.all(Loop)}
    level, _ = reduction_levels(graph, looped)
    over = graph.nodes[a].attr("axis")
    fits = (over in looped or isinstance(section.axis(over), Whole)) and level[a] == level[b] and column not in looped
    fits = fits and column not in left.axes and section.block(column) > 1
    wide = itemsize(left.dtype) <= 2 and all(uses_dot(graph, section, i) for i in (a, b))
    return pair if fits and wide else None


def prefetchable(graph: Graph, section: Section) -> dict[str, list[tuple[int, int]]]:
    """The weights of products along looped axes that can be asked for ahead: their reads, each with

    the dimension of that axis."""
    found = {}
    looped = {d.axis for d in section.all(Loop)}
    for i in graph.live():
        node = graph.nodes[i]
        if node.op == "contract" and node.attr("axis") in looped and uses_dot(graph, section, i):
            for arg in node.args:
                if (along := _along(graph, section, arg, node.attr("axis"), looped)) is not None:
                    found.setdefault(graph.nodes[arg].attr("tensor"), []).append((arg, along))
    return found


def _along(graph: Graph, section: Section, node: int, axis: str, looped: set[str]) -> int | None:
    """The dimension of a weight (an operand of static size) along which a product runs element by element; else None."""
    n = graph.nodes[node]
    if n.op != "read" or any(graph.axes[a] is None for a in n.axes) or graph.tensors[n.attr("tensor")].role != "In":
        return None
    parts = {**shares(graph), **section.parts}.get(axis, 1)
    if {**graph.each, **section.each}.get(axis):
        return None
    index = n.attr("index")
    along = [d for d, e in enumerate(index) if e.terms == Index.of(axis).terms]
    free = all(graph.inside(n.attr("tensor"), d, e) and not looped & {*e.axes} - {axis} for d, e in enumerate(index))
    return along[0] if len(along) == 1 and free and (graph.axes[axis] or 0) % (section.block(axis) * parts) == 0 else None
