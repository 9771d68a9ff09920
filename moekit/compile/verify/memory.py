"""The rules of memory: what a program may load, store and ask for, behind which masks and with what offsets."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.verify.facts import NOT_NEGATIVE, Facts, fail

INT32_MAX = 2**31 - 1


def memory_masked(f: Facts) -> None:
    """Every load and store of a partial block is masked by each axis its index runs along; gathers by their range."""
    for op, _ in f.ops:
        if isinstance(op, t.Load | t.Store | t.Prefetch):
            kept = f.masks(op.mask)
            for value in op.index:
                for axis, index in _bases(f, value):
                    if f.program.axis(axis).partial and (axis, index) not in kept:
                        fail(
                            f, "memory masked", op, f"the block of {axis} reaches past its end; mask it with {axis}'s own mask"
                        )
            for dim, value in enumerate(op.index):
                axis = f.program.param(op.tensor).axes[dim]
                checked = {(axis, value.name), (NOT_NEGATIVE, value.name)} <= kept if value is not None else True
                if value is not None and not checked and not _affine(f, value):
                    fail(f, "memory masked", op, f"{value.name} is data; mask it to the range of {axis}")


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
                    fail(f, "wide offsets", op, f"{axis} × its stride may pass 2**31 - 1; compute it in 64 bits")


def _known(f: Facts, axis: str) -> bool:
    return any(a.name == axis for a in f.program.axes)


def stores_last(f: Facts) -> None:
    """Nothing is loaded from memory this launch has written: an InOut is read only before, and where, it is stored."""
    stored: dict[str, tuple[t.Store, tuple[t.Loop, ...]]] = {}
    for op, loops in f.ops:
        if isinstance(op, t.Load) and op.tensor in stored:
            fail(f, "stores last", op, f"{op.tensor} was stored before by `{t.text_of((stored[op.tensor][0],), 0)[0]}`")
        if isinstance(op, t.Store):
            if op.tensor in stored:
                fail(f, "stores last", op, f"{op.tensor} is stored twice")
            stored[op.tensor] = (op, loops)
    for op, loops in f.ops:
        if isinstance(op, t.Load) and op.tensor in stored:
            store, around = stored[op.tensor]
            shared = [x for x in loops if x in around]
            if shared and [v and v.name for v in op.index] != [v and v.name for v in store.index]:
                fail(f, "stores last", op, f"the loop stores {op.tensor} at another index, which a later turn would read")


def hints_first(f: Facts) -> None:
    """Memory is asked for before anything is loaded or stored, outside every loop, and only memory that the launch reads."""
    begun = False
    for op, loops in f.ops:
        begun |= isinstance(op, t.Load | t.Store)
        if isinstance(op, t.Prefetch) and (begun or loops):
            fail(f, "hints first", op, "it comes after a load or a store, or in a loop; put it first")
        if isinstance(op, t.Prefetch) and f.program.param(op.tensor).role != "In":
            fail(f, "hints first", op, f"{op.tensor} is no input")


def outputs_written(f: Facts) -> None:
    """Every output is stored once, by every program that owns a part of it, along every axis it has."""
    stores = {op.tensor: (op, loops) for op, loops in f.ops if isinstance(op, t.Store)}
    for param in f.program.params:
        if param.role == "In":
            if param.name in stores:
                fail(f, "outputs written", stores[param.name][0], f"{param.name} is an input")
            continue
        if param.name not in stores:
            fail(f, "outputs written", None, f"{param.name} is never stored")
        op, _ = stores[param.name]
        spread = {axis for v in op.index for axis, _ in _bases(f, v)}
        for axis in f.program.grid:
            if axis not in spread:
                fail(f, "outputs written", op, f"programs along {axis} would all write the same elements")
        for axis, v in zip(param.axes, op.index, strict=True):
            if v is None and axis is not None:
                fail(f, "outputs written", op, f"only element 0 of {axis} is stored")
