"""The rules of the tile IR, as a table. Every program passes them after every lowering; each has a test that breaks it.

A rule goes through a program and says, of one operation after the other (None: of the program), what must hold and what to do
where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts, depends, facts_of
from moekit.compile.tile.messages import packets
from moekit.compile.tile.types import DEMANDS, RESULT
from moekit.errors import VerifyError
from moekit.lang.elementwise import IDENTITY

Claims = Iterator[tuple[t.Op | None, bool, str]]


def blocks(f: Facts) -> Claims:
    """A block is a power of two; whole axes fit in theirs; dynamic axes are never whole."""
    for a in f.program.axes:
        yield None, a.block >= 1 and not a.block & (a.block - 1), f"axis {a.name} has blocks of {a.block}, no power of two"
        fits = a.mode != "whole" or (a.extent is not None and a.extent <= a.block)
        yield None, fits, f"axis {a.name} of {a.extent} elements is not whole in a block of {a.block}"
        twice = a.of is None or a.block == 2 * f.program.axis(a.of).block
        yield None, twice, f"axis {a.name} is {a.of} twice, so its blocks have twice as many elements, not {a.block}"
        even = (a.strip > 0 and a.block % (2 * a.strip) == 0) if a.of else a.strip == 0
        yield None, even, f"axis {a.name} has {a.strip} elements of either in turn, which do not divide {a.block // 2}"
        yield None, a.mode in ("grid", "whole", "loop", "gather"), f"axis {a.name} has the unknown mode {a.mode!r}"


def defined_once(f: Facts) -> Claims:
    """Every value is defined once, before it is read, in a scope around the reader."""

    def visit(ops: tuple[t.Op, ...], known: set[int]) -> Claims:
        for op in ops:
            for v in t.operands(op):
                yield op, v.number in known, f"{v.label} is read before it is defined"
            if isinstance(op, t.Loop | t.AtEnd):
                begun = (*op.vars, *op.carries) if isinstance(op, t.Loop) else ()
                inner = known | {v.number for v in begun}
                yield op, len(inner) == len(known) + len(begun), "what it begins with is defined before"
                yield from visit(op.body, inner)
                for v in op.yields:
                    yield op, v.number in inner, f"{v.label} is yielded but not defined"
            for v in t.results(op):
                yield op, v.number not in known, f"{v.label} is defined twice"
                known.add(v.number)

    return visit(f.program.body, set())


def types(f: Facts) -> Claims:
    """Operands are read as what they were defined as and agree in dtype, masks are bool, a result has its operation's dtype and
    axes."""
    defined = {v.number: v for op, _ in f.ops for v in t.results(op)}
    defined |= {v.number: v for op, _ in f.ops if isinstance(op, t.Loop) for v in (*op.vars, *op.carries)}
    for op, _ in f.ops:
        for v in t.operands(op):
            yield op, defined[v.number] == v, f"{v} is defined as {defined[v.number]}"
        for holds, hint in DEMANDS[type(op)](f.program, op) if type(op) in DEMANDS else ():
            yield op, holds, hint
        for v in t.results(op) if type(op) in RESULT else ():
            dtype, axes = RESULT[type(op)](f.program, op)
            yield op, (v.dtype, v.axes) == (dtype, axes), f"{v} must be {dtype}[{', '.join(axes)}]"


def grid(f: Facts) -> Claims:
    """All programs are on one launch dimension, the dynamic axis outermost; along a looped axis they take turns."""
    on = sorted(a.name for a in f.program.axes if a.numbered)
    yield None, sorted(f.program.grid) == on, f"the grid is {f.program.grid}, the axes in grid mode are {on}"
    for a in (a for a in f.program.axes if a.beside):
        fits = a.mode == "loop" and a.extent is not None and a.parts == 1 and a.beside <= a.blocks
        yield None, fits, f"{a.beside} programs take turns along {a.name}, which must be static, looped over, of as many blocks"
        loops = [(op, around) for op, around in f.ops if isinstance(op, t.Loop) and a.name in op.over]
        one = len(loops) == 1 and not loops[0][1]
        yield None, one, f"programs take turns along {a.name}, so one loop goes over it, outermost"
        inside = {id(x) for op, _ in loops for x, _ in t.walk(op.body)}
        own = [op for op in f.only(t.Elements) if f.program.bounded(op.axis).name == a.name]
        for op in (*f.only(t.Store), *own):
            yield op, id(op) in inside, f"it is outside of the loop over {a.name}, along which programs take turns"
    dynamic = [f.program.axis(a).extent is None for a in f.program.grid]
    yield None, dynamic == sorted(dynamic, reverse=True), f"dynamic axes must be outermost in {f.program.grid}"


def loops_cover(f: Facts) -> Claims:
    """Elements of a looped axis are those of the turn of the loop over it, and of the part; every turn makes its sums anew."""
    for op, around in f.ops:
        loops = [x for x in around if isinstance(x, t.Loop)]
        if isinstance(op, t.Loop):
            for axis in (a for a in op.over if isinstance(a, str)):
                mode = f.program.axis(axis).mode
                yield op, mode == "loop", f"{axis} is in {mode} mode and is not looped over"
            elements = {e.out for e in op.body if isinstance(e, t.Elements)}
            for v in op.yields if elements else ():
                anew = depends(f, v, elements | {*op.vars}, set())
                yield op, anew, f"{v.label} is the same every turn; it must be made from the loop's own elements"
        elif isinstance(op, t.AtEnd):
            inside = bool(around) and isinstance(around[-1], t.Loop) and op.axis in around[-1].over
            yield op, inside, f"the loop around does not go over {op.axis}, so it has no end"
        elif isinstance(op, t.Elements):
            axis = f.program.axis(op.axis)
            turns = [v for loop in loops[::-1] for v, a in zip(loop.vars, loop.over, strict=True) if a == op.axis]
            begins = op.turn in turns[:1] if axis.mode == "loop" else op.turn is None
            yield op, begins, f"{op.axis} is looped over, so its elements start at the turn of the loop around"
            part = f.made_by.get(op.part) if op.part is not None else None
            numbered = isinstance(part, t.Elements) and part.axis == f"{op.axis}.part"
            known = numbered if axis.parts > 1 else op.part is None
            yield op, known, f"{op.axis} has {axis.parts} parts, so its elements start at the part's number"


def flat_loops(f: Facts) -> Claims:
    """A loop over several axes goes over the parts of an axis and then over a part's blocks, both of static size."""
    for op, _ in f.ops:
        if isinstance(op, t.Loop) and len(op.over) > 1:
            last = str(op.over[-1])
            static = op.over == (f"{last}.part", last) and f.program.axis(last).length is not None
            yield op, static, f"it goes over {op.over}; it may over the parts of a static axis and over that"
            yield op, not any(isinstance(o, t.Loop) for o in op.body), "there may be no loop in its body"
        if isinstance(op, t.AtEnd):
            free = not any(isinstance(o, t.Memory | t.Dot | t.Loop) for o, _ in t.walk(op.body))
            yield op, free, "at the end of an axis there may be no load, store, dot or loop"


def memory_masked(f: Facts) -> Claims:
    """Every access of a partial block is masked by each axis its index runs along; data in an index by their range."""
    for op in f.only(t.Memory):
        kept = f.kept(op.at.mask)
        ranges = [m for m in map(f.made_by.get, op.at.mask) if isinstance(m, t.InBounds) and m.signed]
        for axis, index in zip(f.program.param(op.at.tensor).axes, op.at.index, strict=True):
            if not index.terms:
                continue
            for base in f.bases(*index.values):
                owner = f.program.bounded(base.axis)
                masked = not owner.partial or (owner.name, base.out) in kept
                yield op, masked, f"the block of {owner.name} reaches past its end; mask it with {owner.name}'s own mask"
            checked = f.inside(axis, index) or any((m.axis, m.value) == (axis, index.alone) for m in ranges)
            label = " and ".join(v.label for v in index.values)
            yield op, checked, f"{label} may be no element of {axis}; mask it to its range"


def reductions_masked(f: Facts) -> Claims:
    """Every reduction and dot over a partial block sees its identity in the lanes past the end."""
    for op in f.only(t.Reduce | t.Dot | t.Accumulate):
        identity = 0 if isinstance(op, t.Dot) else IDENTITY[op.op, op.value.dtype]
        for v in (op.left, op.right) if isinstance(op, t.Dot) else (op.value,):
            filled = not f.program.bounded(op.axis).partial or f.filled(v, op.axis, identity)
            hint = f"lanes of {v.label} past the end of {op.axis} may not be {identity}; put where(mask, x, {identity})"
            yield op, filled, hint


def reductions_whole(f: Facts) -> Claims:
    """No reduction, scan or dot runs along a grid axis, of which a program has a part.

    A scan's axis is whole, or looped over, and then what came before the turn is added to it.
    """
    for op, around in f.ops:
        if isinstance(op, t.Reduce | t.Scan | t.Dot | t.Accumulate | t.TopK):
            mode, alone = f.program.axis(op.axis).mode, not f.program.axis(op.axis).numbered
            held = mode == "whole" or (alone and not isinstance(op, t.Scan | t.TopK))
            carried = isinstance(op, t.Scan) and mode == "loop" and alone and _carried(f, op, around)
            yield op, held or carried, f"a program holds only a part of {op.axis}, which is in {mode} mode"


def _carried(f: Facts, op: t.Scan, around: tuple[t.Loop | t.AtEnd, ...]) -> bool:
    """Whether what a loop over its axis carries is added to a scan, which nothing else reads."""
    carries = {v for x in around[-1:] if isinstance(x, t.Loop) and op.axis in x.over for v in x.carries}
    readers = [x for x, _ in f.ops if op.out in t.operands(x)]
    return bool(readers) and all(isinstance(x, t.Binary) and x.op == "add" and {x.left, x.right} & carries for x in readers)


def wide_offsets(f: Facts) -> Claims:
    """Offsets are 64-bit along dynamic axes, and wherever static extents × strides may pass 2³¹ - 1.

    The rule works out for itself what the pass `masks` does: it would not see a fault that it shared.
    """
    dynamic = {a.name for a in f.program.axes if a.extent is None}
    for op in f.only(t.Memory):
        param = f.program.param(op.at.tensor)
        if isinstance(param.layout, t.Strided):
            for axis, wide in zip(param.axes, op.at.wide or (False,) * len(param.axes), strict=True):
                far = axis in dynamic or (param.layout.wide and axis is not None)
                yield op, wide or not far, f"{axis} × its stride may pass 2**31 - 1; compute it in 64 bits"


def stores_last(f: Facts) -> Claims:
    """Nothing is loaded from memory this launch has written: an InOut is read only before it is stored, and where its own

    program and turn store it; behind a barrier where another lane may.
    """
    stored: dict[str, tuple[int, t.Store]] = {}
    for n, (op, _) in enumerate(f.ops):
        if isinstance(op, t.Load | t.Store):
            yield op, op.at.tensor not in stored, f"{op.at.tensor} was stored before"
        if isinstance(op, t.Store):
            stored[op.at.tensor] = n, op
    for n, (op, around) in enumerate(f.ops):
        if not isinstance(op, t.Load) or op.at.tensor not in stored:
            continue
        last, store = stored[op.at.tensor]
        outside = f.ops[last][1]
        pairs = [(i, j) for i, j in zip(op.at.index, store.at.index, strict=True)]
        own = {base.axis for i, j in pairs if i == j for base in f.bases(*i.values)}
        for axis in f.program.grid:
            yield (
                op,
                axis in own,
                f"programs along {axis} store {op.at.tensor} at other elements, which this one reads; hold it whole",
            )
        for axis in (a for x in around if x in outside and isinstance(x, t.Loop) for a in x.over):
            yield op, axis in own, f"the loop stores {op.at.tensor} at another index, which a later turn would read"
        if around == outside and any(i != j for i, j in pairs):
            waits = any(isinstance(x, t.Barrier) and at == outside for x, at in f.ops[n:last])
            yield op, waits, f"{op.at.tensor} is stored at another index by other lanes; put a barrier before the store"


def hints_first(f: Facts) -> Claims:
    """Memory is asked for before anything is loaded or stored, outside every loop, and only memory that the launch reads."""
    begun = False
    for op, around in f.ops:
        begun |= isinstance(op, t.Load | t.Store)
        if isinstance(op, t.Prefetch):
            yield op, not begun and not around, "it comes after a load or a store, or in a loop; put it first"
            yield op, f.program.param(op.at.tensor).role == "In", f"{op.at.tensor} is no input"


def outputs_written(f: Facts) -> Claims:
    """Every output is stored once, by every program that owns a part of it, along every axis it has."""
    stores = {op.at.tensor: op for op in f.only(t.Store)}
    for param in f.program.params:
        op = stores.get(param.name)
        if param.role == "In":
            yield op, op is None, f"{param.name} is an input"
        elif op is None:
            yield None, False, f"{param.name} is never stored"
        else:
            spread = {base.axis for i in op.at.index for base in f.bases(*i.values)}
            for axis in f.program.grid:
                yield op, axis in spread, f"programs along {axis} would all write the same elements"
            for axis, i in zip(param.axes, op.at.index, strict=True):
                yield op, bool(i.terms) or axis is None, f"only element 0 of {axis} is stored"


RULES: dict[str, Callable[[Facts], Claims]] = {
    rule.__name__: rule
    for rule in (
        blocks,
        defined_once,
        types,
        grid,
        loops_cover,
        flat_loops,
        memory_masked,
        reductions_masked,
        reductions_whole,
        wide_offsets,
        stores_last,
        hints_first,
        outputs_written,
        packets,
    )
}


def check(f: Facts, name: str) -> None:
    """Hold a program to the rule `name`; raises VerifyError, in one sentence with the rule, the operation and what to do."""
    for op, holds, hint in RULES[name](f):
        if not holds:
            at = f" in `{t.text_of((op,), 0)[0]}`" if op is not None else ""
            raise VerifyError(f"{f.program.name}: {name.replace('_', ' ')}: {hint}{at}")


def sections_apart(kernel: t.Kernel) -> None:
    """What one section of a launch writes, no other section reads or writes: their programs run in any order."""
    for one in kernel.sections:
        for p in (p for p in one.params if p.role != "In"):
            for other in kernel.sections:
                if other is not one and any(q.name == p.name for q in other.params):
                    hint = f"{p.name} is written by {one.name} and used by {other.name} in the same launch; join the two"
                    raise VerifyError(f"{kernel.name}: sections apart: {hint}")


def abreast(kernel: t.Kernel) -> None:
    """Sections that take turns have the same blocks along their outermost axis, and a known number of programs for each."""
    if not isinstance(kernel, t.Joined) or not kernel.abreast:
        return
    outermost = kernel.sections[0].axis(kernel.sections[0].grid[0])
    for s in kernel.sections:
        if not s.grid or s.axis(s.grid[0]) != outermost or any(s.axis(a).extent is None for a in s.grid[1:]):
            hint = f"{s.name} has other blocks than {kernel.sections[0].name}; let one section follow the other"
            raise VerifyError(f"{kernel.name}: abreast: {hint}")


def verify(kernel: t.Kernel) -> None:
    """Check a kernel against every rule; raises VerifyError naming the rule, the operation and a hint."""
    sections_apart(kernel)
    abreast(kernel)
    for section in kernel.sections:
        facts = facts_of(section)
        for name in RULES:
            check(facts, name)
