"""The rules of memory: what a program may load, store and ask for, behind which masks and with what offsets."""

from __future__ import annotations

from moekit.compile import tile as t
from moekit.compile.tile.facts import Facts
from moekit.compile.tile.verify.fault import fail


def memory_masked(f: Facts) -> None:
    """Every access of a partial block is masked by each axis its index runs along; data in an index by their range."""
    for op, _ in f.ops:
        if not isinstance(op, t.Memory):
            continue
        kept = f.kept(op.at.mask)
        for axis, index in zip(f.program.param(op.at.tensor).axes, op.at.index, strict=True):
            for base in f.bases(index.value):
                owner = f.program.bounded(base.axis)
                if owner.partial and (owner.name, base.out) not in kept:
                    hint = f"the block of {owner.name} reaches past its end; mask it with {owner.name}'s own mask"
                    fail(f, "memory masked", op, hint)
            if index.value is not None and not _checked(f, op.at, index.value, axis):
                fail(f, "memory masked", op, f"{index.value.label} is data; mask it to the range of {axis}")


def _checked(f: Facts, at: t.Access, index: t.Value, axis: str | None) -> bool:
    """Whether an index is the elements of an axis, which the trace has checked against the tensor, or kept in its range."""
    if isinstance(f.made_by.get(index), t.Elements):
        return True
    made = [f.made_by.get(mask) for mask in at.mask]
    return any(isinstance(m, t.InBounds) and m.signed and (m.axis, m.value) == (axis, index) for m in made)


def wide_offsets(f: Facts) -> None:
    """Offsets are 64-bit along dynamic axes, and wherever static extents × strides may pass 2³¹ - 1."""
    dynamic = {a.name for a in f.program.axes if a.extent is None}
    for op, _ in f.ops:
        if isinstance(op, t.Memory) and isinstance(layout := f.program.param(op.at.tensor).layout, t.Strided):
            axes = f.program.param(op.at.tensor).axes
            for axis, wide in zip(axes, op.at.wide or [False] * len(axes), strict=True):
                if (axis in dynamic or (layout.wide and axis is not None)) and not wide:
                    fail(f, "wide offsets", op, f"{axis} × its stride may pass 2**31 - 1; compute it in 64 bits")


def stores_last(f: Facts) -> None:
    """Nothing is loaded from memory this launch has written: an InOut is read only before, and where, it is stored."""
    stored: dict[str, tuple[t.Store, tuple]] = {}
    for op, around in f.ops:
        if isinstance(op, t.Load) and op.at.tensor in stored:
            before = t.text_of((stored[op.at.tensor][0],), 0)[0]
            fail(f, "stores last", op, f"{op.at.tensor} was stored before by `{before}`")
        if isinstance(op, t.Store):
            if op.at.tensor in stored:
                fail(f, "stores last", op, f"{op.at.tensor} is stored twice")
            stored[op.at.tensor] = (op, around)
    for op, around in f.ops:
        if isinstance(op, t.Load) and op.at.tensor in stored:
            store, outside = stored[op.at.tensor]
            if any(x in outside for x in around) and op.at.index != store.at.index:
                hint = f"the loop stores {op.at.tensor} at another index, which a later turn would read"
                fail(f, "stores last", op, hint)


def hints_first(f: Facts) -> None:
    """Memory is asked for before anything is loaded or stored, outside every loop, and only memory that the launch reads."""
    begun = False
    for op, around in f.ops:
        begun |= isinstance(op, t.Load | t.Store)
        if isinstance(op, t.Prefetch) and (begun or around):
            fail(f, "hints first", op, "it comes after a load or a store, or in a loop; put it first")
        if isinstance(op, t.Prefetch) and f.program.param(op.at.tensor).role != "In":
            fail(f, "hints first", op, f"{op.at.tensor} is no input")


def outputs_written(f: Facts) -> None:
    """Every output is stored once, by every program that owns a part of it, along every axis it has."""
    stores = {op.at.tensor: op for op, _ in f.ops if isinstance(op, t.Store)}
    for param in f.program.params:
        op = stores.get(param.name)
        if param.role == "In":
            if op is not None:
                fail(f, "outputs written", op, f"{param.name} is an input")
            continue
        if op is None:
            fail(f, "outputs written", None, f"{param.name} is never stored")
        spread = {base.axis for i in op.at.index for base in f.bases(i.value)}
        for axis in f.program.grid:
            if axis not in spread:
                fail(f, "outputs written", op, f"programs along {axis} would all write the same elements")
        for axis, i in zip(param.axes, op.at.index, strict=True):
            if i.value is None and axis is not None:
                fail(f, "outputs written", op, f"only element 0 of {axis} is stored")
