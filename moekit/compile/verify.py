"""The rules of the tile IR, as a table. Every program passes them after every lowering; each has a test that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from moekit.compile import tile as t
from moekit.compile.types import TYPES
from moekit.errors import VerifyError

INT32_MAX = 2**31 - 1
NOT_NEGATIVE = "0 <="  # stands for an axis among what a mask keeps in bounds


@dataclass(frozen=True)
class Facts:
    """What the rules look up: where each value comes from, and the operations in program order."""

    program: t.TileProgram
    made_by: dict[str, t.Op]
    carried: dict[str, tuple[t.Loop, int]]
    ops: tuple[tuple[t.Op, tuple[t.Loop, ...]], ...]

    def masks(self, mask: t.Value | None) -> set[tuple[str, str]]:
        """The (axis, index) pairs that a mask keeps in bounds."""
        if mask is None:
            return set()
        op = self.made_by.get(mask.name)
        if isinstance(op, t.InBounds):
            return {(op.axis, op.index.name)}
        if isinstance(op, t.Binary) and op.op == "ge" and self.constant(op.right) == 0:
            return {(NOT_NEGATIVE, op.left.name)}
        if isinstance(op, t.Binary) and op.op == "and":
            return self.masks(op.left) | self.masks(op.right)
        return set()

    def masked_axes(self, mask: t.Value | None) -> set[str]:
        """The axes that a mask keeps in bounds, whatever the index."""
        return {axis for axis, _ in self.masks(mask)}

    def constant(self, value: t.Value):
        """The number a value is, or None."""
        op = self.made_by.get(value.name)
        return op.value if isinstance(op, t.Const | t.Full) else None


def _walk(ops, loops: tuple[t.Loop, ...] = ()) -> Iterator[tuple[t.Op, tuple[t.Loop, ...]]]:
    for op in ops:
        yield op, loops
        if isinstance(op, t.Loop):
            yield from _walk(op.body, (*loops, op))


def facts_of(program: t.TileProgram) -> Facts:
    """Gather the facts once per program."""
    made_by, carried, ops = {}, {}, tuple(_walk(program.body))
    for op, _ in ops:
        if isinstance(op, t.Loop):
            for i, (carry, out) in enumerate(zip(op.carries, op.outs, strict=False)):
                carried[carry.name] = carried[out.name] = (op, i)
        elif made := t.result(op):
            made_by[made.name] = op
    return Facts(program, made_by, carried, ops)


def _fail(f: Facts, rule: str, op, hint: str) -> NoReturn:
    at = t.text_of((op,), 0)[0] if op is not None else ""
    raise VerifyError(f"{f.program.name}: {rule}: {hint}" + (f" in `{at}`" if at else ""))


def blocks(f: Facts) -> None:
    """A block is a power of two; whole axes fit in theirs; dynamic axes are never whole."""
    for a in f.program.axes:
        if a.block < 1 or a.block & (a.block - 1):
            _fail(f, "blocks", None, f"axis {a.name} has blocks of {a.block}, which is no power of two")
        if a.mode == "whole" and (a.extent is None or a.extent > a.block):
            _fail(
                f,
                "blocks",
                None,
                f"axis {a.name} of {a.extent} elements is not whole in a block of {a.block}",
            )
        if a.of is not None and a.block != 2 * f.program.axis(a.of).block:
            _fail(
                f,
                "blocks",
                None,
                f"axis {a.name} is {a.of} twice, so its blocks have {2 * f.program.axis(a.of).block} elements",
            )
        if a.mode not in ("grid", "whole", "loop", "gather"):
            _fail(f, "blocks", None, f"axis {a.name} has the unknown mode {a.mode!r}")


def defined_once(f: Facts) -> None:
    """Every value is defined once, before it is read, in a scope around the reader."""

    def visit(ops, known: set[str]) -> None:
        for op in ops:
            for v in t.operands(op):
                if v.name not in known:
                    _fail(f, "defined once", op, f"{v.name} is read before it is defined")
            if isinstance(op, t.Loop):
                inner = {op.var.name, *(c.name for c in op.carries)}
                visit(op.body, add(op, inner, known))
                made = inner | known | {made.name for o in op.body if (made := t.result(o))}
                made |= {out.name for o in op.body if isinstance(o, t.Loop) for out in o.outs}
                for v in op.yields:
                    if v.name not in made:
                        _fail(f, "defined once", op, f"{v.name} is yielded but not defined in the loop")
                known |= add(op, {o.name for o in op.outs}, known) - known
            elif hasattr(op, "out"):
                known |= add(op, {op.out.name}, known)

    def add(op, names: set[str], known: set[str]) -> set[str]:
        if again := names & known:
            _fail(f, "defined once", op, f"{sorted(again)[0]} is defined twice")
        return known | names

    visit(f.program.body, set())


def types(f: Facts) -> None:
    """Operands agree in dtype, conditions and masks are bool, a result has its operation's dtype and axes."""
    for op, _ in f.ops:
        check = TYPES.get(type(op))
        if check and (problem := check(f.program, op)):
            _fail(f, "types", op, problem)


def memory_masked(f: Facts) -> None:
    """Every load and store of a partial block is masked by each axis its index runs along; gathers by their range."""
    for op, _ in f.ops:
        if isinstance(op, t.Load | t.Store | t.Prefetch):
            kept = f.masks(op.mask)
            for value in op.index:
                for axis, index in _bases(f, value):
                    if f.program.axis(axis).partial and (axis, index) not in kept:
                        _fail(
                            f,
                            "memory masked",
                            op,
                            f"the block of {axis} reaches past its end; mask it with {axis}'s own mask",
                        )
            for dim, value in enumerate(op.index):
                axis = f.program.param(op.tensor).axes[dim]
                checked = {(axis, value.name), (NOT_NEGATIVE, value.name)} <= kept if value is not None else True
                if value is not None and not checked and not _affine(f, value):
                    _fail(f, "memory masked", op, f"{value.name} is data; mask it to the range of {axis}")


def _bases(f: Facts, value: t.Value | None) -> set[tuple[str, str]]:
    """The (axis, index) blocks an index is computed from, loads included."""
    if value is None or value.name not in f.made_by:
        return set()
    op = f.made_by[value.name]
    if isinstance(op, t.Index):
        return {(op.axis, op.out.name)}
    if isinstance(op, t.ProgramId | t.Reduce | t.Scan):
        return set()
    found = set()
    for v in t.operands(op):
        found |= _bases(f, v)
    return found


def _affine(f: Facts, value: t.Value) -> bool:
    """Whether an index is start + step·(index of an axis), which the trace has checked against the tensor; or two starts."""
    op = f.made_by.get(value.name)
    if isinstance(op, t.Index | t.Const):
        return True
    if isinstance(op, t.Binary) and op.op in ("add", "mul"):
        sides = op.op == "add" and isinstance(f.made_by.get(op.right.name), t.Sides)
        return _affine(f, op.left) and (sides or f.constant(op.right) is not None)
    return False


def reductions_masked(f: Facts) -> None:
    """Every reduction and dot over a partial block sees its identity in the lanes past the end."""
    for op, _ in f.ops:
        if isinstance(op, t.Reduce) and f.program.axis(op.axis).partial:
            identity = _identity(op.op, op.value.dtype)
            if not _filled(f, op.value, op.axis, identity, set()):
                _fail(
                    f,
                    "reductions masked",
                    op,
                    f"lanes past the end of {op.axis} may not be {identity}; put where(mask, x, {identity})",
                )
        if isinstance(op, t.Dot) and f.program.axis(op.axis).partial:
            for v in (op.left, op.right):
                if not _filled(f, v, op.axis, 0, set()):
                    _fail(
                        f,
                        "reductions masked",
                        op,
                        f"lanes of {v.name} past the end of {op.axis} may not be 0; mask it",
                    )


def _identity(op: str, dtype: str):
    from moekit.compile.reductions import IDENTITY

    return IDENTITY[op, dtype]


def _filled(f: Facts, v: t.Value, axis: str, identity, seen: set[str]) -> bool:
    """Whether the lanes of `v` past the end of `axis` are known to be `identity`."""
    if v.name in seen or f.constant(v) == identity:
        return True
    seen = seen | {v.name}
    if v.name in f.carried:
        loop, i = f.carried[v.name]
        return _filled(f, loop.inits[i], axis, identity, seen) and _filled(f, loop.yields[i], axis, identity, seen)
    op = f.made_by.get(v.name)
    if isinstance(op, t.Where):
        if axis in f.masked_axes(op.condition):
            return _filled(f, op.no, axis, identity, seen)
        return _filled(f, op.yes, axis, identity, seen) and _filled(f, op.no, axis, identity, seen)
    if isinstance(op, t.Load):
        return op.fill == identity and axis in f.masked_axes(op.mask)
    if isinstance(op, t.Cast | t.Bitcast):
        return identity == 0 and _filled(f, op.value, axis, identity, seen)
    if isinstance(op, t.Binary) and op.op == "shl":
        return identity == 0 and _filled(f, op.left, axis, identity, seen)
    if isinstance(op, t.Binary) and op.op in ("add", "maximum", "minimum"):
        return _filled(f, op.left, axis, identity, seen) and _filled(f, op.right, axis, identity, seen)
    return False


def wide_offsets(f: Facts) -> None:
    """Offsets are 64-bit along dynamic axes, and wherever static extents × strides may pass 2³¹ - 1."""
    for op, _ in f.ops:
        if isinstance(op, t.Load | t.Store | t.Prefetch):
            param = f.program.param(op.tensor)
            if not isinstance(param.layout, t.Strided):
                continue
            for axis, wide in zip(param.axes, op.wide, strict=True):
                extent = None if axis is None else f.program.axis(axis).extent if _known(f, axis) else INT32_MAX + 1
                dynamic = axis is not None and extent is None
                if (dynamic or (param.layout.wide and axis is not None)) and not wide:
                    _fail(
                        f,
                        "wide offsets",
                        op,
                        f"{axis} × its stride may pass 2**31 - 1; compute it in 64 bits",
                    )


def _known(f: Facts, axis: str) -> bool:
    return any(a.name == axis for a in f.program.axes)


def stores_last(f: Facts) -> None:
    """Nothing is loaded from memory this launch has written: an InOut is read only before, and where, it is stored."""
    stored: dict[str, tuple[t.Store, tuple[t.Loop, ...]]] = {}
    for op, loops in f.ops:
        if isinstance(op, t.Load) and op.tensor in stored:
            _fail(
                f,
                "stores last",
                op,
                f"{op.tensor} was stored before by `{t.text_of((stored[op.tensor][0],), 0)[0]}`",
            )
        if isinstance(op, t.Store):
            if op.tensor in stored:
                _fail(f, "stores last", op, f"{op.tensor} is stored twice")
            stored[op.tensor] = (op, loops)
    for op, loops in f.ops:
        if isinstance(op, t.Load) and op.tensor in stored:
            store, around = stored[op.tensor]
            shared = [x for x in loops if x in around]
            if shared and [v and v.name for v in op.index] != [v and v.name for v in store.index]:
                _fail(
                    f,
                    "stores last",
                    op,
                    f"the loop stores {op.tensor} at another index, which a later turn would read",
                )


def hints_first(f: Facts) -> None:
    """Memory is asked for before anything is loaded or stored, outside every loop, and only memory that the launch reads."""
    begun = False
    for op, loops in f.ops:
        begun |= isinstance(op, t.Load | t.Store)
        if isinstance(op, t.Prefetch) and (begun or loops):
            _fail(f, "hints first", op, "it comes after a load or a store, or in a loop; put it first")
        if isinstance(op, t.Prefetch) and f.program.param(op.tensor).role != "In":
            _fail(f, "hints first", op, f"{op.tensor} is no input")


def outputs_written(f: Facts) -> None:
    """Every output is stored once, by every program that owns a part of it, along every axis it has."""
    stores = {op.tensor: (op, loops) for op, loops in f.ops if isinstance(op, t.Store)}
    for param in f.program.params:
        if param.role == "In":
            if param.name in stores:
                _fail(f, "outputs written", stores[param.name][0], f"{param.name} is an input")
            continue
        if param.name not in stores:
            _fail(f, "outputs written", None, f"{param.name} is never stored")
        op, _ = stores[param.name]
        spread = {axis for v in op.index for axis, _ in _bases(f, v)}
        for axis in f.program.grid:
            if axis not in spread:
                _fail(f, "outputs written", op, f"programs along {axis} would all write the same elements")
        for axis, v in zip(param.axes, op.index, strict=True):
            if v is None and axis is not None:
                _fail(f, "outputs written", op, f"only element 0 of {axis} is stored")


def grid(f: Facts) -> None:
    """All programs are on one launch dimension, the dynamic axis outermost; grid axes are in grid mode and no others."""
    modes = {a.name: a.mode for a in f.program.axes}
    if sorted(f.program.grid) != sorted(a for a, m in modes.items() if m == "grid"):
        _fail(f, "grid", None, f"the grid is {f.program.grid}, the axes in grid mode differ")
    dynamic = [f.program.axis(a).extent is None for a in f.program.grid]
    if dynamic != sorted(dynamic, reverse=True):
        _fail(f, "grid", None, f"dynamic axes must be outermost in {f.program.grid}")


def grid_indices(f: Facts) -> None:
    """The blocks of a grid axis start at its program number times its block, so that programs share nothing."""
    for op, _ in f.ops:
        if isinstance(op, t.Index) and (axis := f.program.axis(op.axis)).mode == "grid":
            several = axis.extent is None or axis.extent > axis.block
            if (several or op.start is not None) and not _starts_at_program(f, op.start, axis):
                _fail(f, "grid indices", op, f"it must start at the program number of {op.axis} × {axis.block}")


def _starts_at_program(f: Facts, start: t.Value | None, axis: t.AxisBlock) -> bool:
    op = f.made_by.get(start.name) if start is not None else None
    if axis.block > 1:
        if not isinstance(op, t.Binary) or op.op != "mul" or f.constant(op.right) != axis.block:
            return False
        op = f.made_by.get(op.left.name)
    return isinstance(op, t.ProgramId) and op.axis == axis.name


def reductions_whole(f: Facts) -> None:
    """No reduction, scan or dot runs along a grid axis, of which a program has a part; a scan's axis is whole."""
    for op, _ in f.ops:
        if isinstance(op, t.Reduce | t.Scan | t.Dot):
            mode = f.program.axis(op.axis).mode
            if mode == "grid" or (isinstance(op, t.Scan) and mode != "whole"):
                _fail(f, "reductions whole", op, f"a program holds only a part of {op.axis}, which is in {mode} mode")


def loops_cover(f: Facts) -> None:
    """A loop over an axis steps by its block to the end of the axis (or of its part); index and sums follow the loop."""
    for op, loops in f.ops:
        if not isinstance(op, t.Index) or (axis := f.program.axis(op.axis)).mode != "loop":
            continue
        owner = loops[-1] if loops else None
        if owner is None or op.start is None or not _starts_at(f, op.start, owner.var, axis.parts > 1):
            _fail(f, "loops cover", op, f"{op.axis} is looped over, so its index starts at the loop's variable")
        stop = axis.share if axis.parts > 1 else axis.extent
        if owner.step != axis.block:
            _fail(f, "loops cover", owner, f"it steps by {owner.step}, but blocks of {op.axis} are {axis.block}")
        if isinstance(owner.stop, int) != (stop is not None) or (stop is not None and owner.stop != stop):
            _fail(f, "loops cover", owner, f"it must run from 0 to {stop}, the end of {op.axis}")
    for op, _ in f.ops:
        if not isinstance(op, t.Loop) or not any(isinstance(o, t.Index) for o in op.body):
            continue
        for value in op.yields:
            if not _depends(f, value, op.var.name, set()):
                _fail(f, "loops cover", op, f"{value.name} is the same every turn; it must be made from the loop's own index")


def flat_loops(f: Facts) -> None:
    """A flat loop and the loop in its body are of static size, and what stands around that one touches no memory."""
    for op, _ in f.ops:
        if isinstance(op, t.Loop) and op.flat:
            inner = [o for o in op.body if isinstance(o, t.Loop)]
            if len(inner) != 1 or not isinstance(op.stop, int) or not isinstance(inner[0].stop, int):
                _fail(f, "flat loops", op, "it needs one loop in its body, both of static size")
            if any(isinstance(o, t.Load | t.Store | t.Dot) for o in op.body):
                _fail(f, "flat loops", op, "around the loop in its body there may be no load, store or dot")
            if any(f.made_by.get(v.name) not in op.body or f.constant(v) is None for v in inner[0].inits):
                _fail(f, "flat loops", op, "the loop in its body must begin from constants made beside it")


def _depends(f: Facts, value: t.Value, on: str, seen: set[str]) -> bool:
    """Whether `value` is computed from the value named `on`."""
    if value.name == on or value.name in seen:
        return value.name == on
    seen.add(value.name)
    if value.name in f.carried:
        loop, i = f.carried[value.name]
        return _depends(f, loop.inits[i], on, seen) or _depends(f, loop.yields[i], on, seen)
    op = f.made_by.get(value.name)
    return op is not None and any(_depends(f, v, on, seen) for v in t.operands(op))


def _starts_at(f: Facts, start: t.Value, var: t.Value, in_part: bool) -> bool:
    if not in_part:
        return start.name == var.name
    op = f.made_by.get(start.name)
    return isinstance(op, t.Binary) and op.op == "add" and var.name in (op.left.name, op.right.name)


RULES: dict[str, Callable[[Facts], None]] = {
    rule.__name__: rule
    for rule in (
        blocks,
        defined_once,
        types,
        grid,
        grid_indices,
        loops_cover,
        flat_loops,
        memory_masked,
        reductions_masked,
        reductions_whole,
        wide_offsets,
        stores_last,
        hints_first,
        outputs_written,
    )
}


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
        for rule in RULES.values():
            rule(facts)
