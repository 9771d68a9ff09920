"""What operations read and define."""

from __future__ import annotations

from collections.abc import Iterator

from moekit.compile.tile.operations import (
    Access,
    AtEnd,
    Barrier,
    Deinterleave,
    Halves,
    Loop,
    Op,
    Prefetch,
    Receive,
    Store,
    TopK,
    Value,
    Ways,
)  # fmt: skip
from moekit.lang.graph import Index


def results(op: Op) -> tuple[Value, ...]:
    """The values an operation defines for those after it."""
    if isinstance(op, Halves | Deinterleave | TopK | Loop | AtEnd | Ways | Receive):
        return op.outs
    return () if isinstance(op, Store | Prefetch | Barrier) else (op.out,)


def operands(op: Op) -> tuple[Value, ...]:
    """The values an operation reads: of a loop its inits and end, of `AtEnd` what it gives otherwise; nothing of bodies."""
    if isinstance(op, Loop):
        return (*op.inits, op.end) if op.end is not None else op.inits
    if isinstance(op, AtEnd):
        return op.otherwise
    return tuple(v for name in op.__dataclass_fields__ if name not in ("out", "outs") for v in values_in(getattr(op, name)))


def reads(op: Op) -> tuple[Value, ...]:
    """The values that are read at an operation: its operands, and what a body yields."""
    return (*operands(op), *op.yields) if isinstance(op, Loop | AtEnd) else operands(op)


def values_in(part) -> Iterator[Value]:
    """The values in a field of an operation."""
    if isinstance(part, Value):
        yield part
    elif isinstance(part, Index):
        yield from part.values
    elif isinstance(part, Access):
        yield from values_in((*part.index, *part.mask))
    elif isinstance(part, tuple):
        for each in part:
            yield from values_in(each)
