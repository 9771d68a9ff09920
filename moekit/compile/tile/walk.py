"""Going through programs, and writing them anew: what passes and rules are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moekit.compile.tile.flow import reads, results
from moekit.compile.tile.operations import (
    AtEnd,
    Barrier,
    Binary,
    Cast,
    Const,
    Loop,
    Op,
    Prefetch,
    Store,
    Unary,
    Value,
    Where,
)
from moekit.compile.tile.program import TileProgram
from moekit.compile.tile.types import RESULT


def walk(ops: Iterable[Op], around: tuple[Loop | AtEnd, ...] = ()) -> Iterator[tuple[Op, tuple[Loop | AtEnd, ...]]]:
    """Every operation in program order, with what stands around it, outermost first."""
    for op in ops:
        yield op, around
        if isinstance(op, Loop | AtEnd):
            yield from walk(op.body, (*around, op))


def rewrite(ops: Iterable[Op], rule: Callable[[Op], Sequence[Op] | None]) -> tuple[Op, ...]:
    """The operations with each replaced by what `rule` makes of it (None: it stays); bodies first."""
    found: list[Op] = []
    for op in ops:
        if isinstance(op, Loop | AtEnd):
            op = replace(op, body=rewrite(op.body, rule))
        new = rule(op)
        found += [op] if new is None else new
    return tuple(found)


def rebuilt(part: Any, change: Callable[[Any], Any]) -> Any:
    """An operation, or a part of one, in which everything down to its values is what `change` makes of it, outermost first."""
    part = change(part)
    if isinstance(part, tuple):
        return tuple(rebuilt(x, change) for x in part)
    if isinstance(part, Value) or not hasattr(part, "__dataclass_fields__"):
        return part
    return replace(part, **{n: rebuilt(getattr(part, n), change) for n in part.__dataclass_fields__})


def substitute[T](part: T, new: Mapping[Value, Value]) -> T:
    """An operation, or a part of one, that reads other values in place of some."""
    return rebuilt(part, lambda x: new.get(x, x) if isinstance(x, Value) else x)


def used(ops: Iterable[Op], kept: Iterable[Value] = ()) -> tuple[Op, ...]:
    """The operations without those that nothing reads; `kept` are read from outside."""
    needed, found = set(kept), []
    for op in reversed(tuple(ops)):
        if not needed & set(results(op)) and not any(isinstance(o, Store | Prefetch | Barrier) for o, _ in walk([op])):
            continue
        if isinstance(op, Loop | AtEnd):
            op = replace(op, body=used(op.body, op.yields))
        needed |= {v for o, _ in walk([op]) for v in reads(o)}
        found.append(op)
    return tuple(reversed(found))


class Numbers:
    """Hands out values with numbers that no value of some operations has, from the declaration's line `line`."""

    def __init__(self, ops: Iterable[Op] = ()):
        made = [v for op, _ in walk(ops) for v in (*results(op), *((*op.vars, *op.carries) if isinstance(op, Loop) else ()))]
        self.next, self.line = 1 + max((v.number for v in made), default=-1), ""

    def value(self, dtype: str, axes: Iterable[str] = (), name: str = "") -> Value:
        """A new value."""
        self.next += 1
        return Value(self.next - 1, dtype, tuple(axes), name, self.line)

    def like(self, value: Value, name: str = "") -> Value:
        """A new value of the same kind, and the same name if no other is said."""
        return replace(self.value(value.dtype, value.axes, name or value.name), line=value.line)


@dataclass
class Draft:
    """Operations being written into a program: what a pass puts in the place of one, or a scope's own."""

    program: TileProgram
    numbers: Numbers
    ops: list[Op] = field(default_factory=list)

    def emit(self, kind: Callable[..., Op], name: str = "", dtype: str = "", axes: Collection[str] = (), **fields) -> Value:
        """Write an operation; its result, whose dtype and axes follow from the operands where they can (`types.RESULT`)."""
        op = kind(out=Value(-1, dtype, self.program.blocked(axes)), **fields)
        out = self.numbers.value(*RESULT[type(op)](self.program, op), name)
        self.ops.append(replace(op, out=out))
        return out

    def const(self, value: bool | int | float, dtype: str = "int32", axes: Collection[str] = (), name: str = "") -> Value:
        """A number, or a block of it."""
        return self.emit(Const, name, dtype, axes, value=value)

    def cast(self, value: Value, dtype: str) -> Value:
        """A block in another dtype; nothing if it has it already."""
        return value if value.dtype == dtype else self.emit(Cast, "", dtype, value=value)

    def unary(self, op: str, value: Value) -> Value:
        """An element-wise function."""
        return self.emit(Unary, op=op, value=value)

    def binary(self, op: str, a: Value, b: Value, name: str = "") -> Value:
        """An element-wise function of two blocks."""
        return self.emit(Binary, name, op=op, left=a, right=b)

    def where(self, condition: Value, yes: Value, no: Value, name: str = "") -> Value:
        """A choice between two blocks."""
        return self.emit(Where, name, condition=condition, yes=yes, no=no)

    def becomes(self, out: Value) -> list[Op]:
        """The operations, of which the last one defines `out`."""
        return [*self.ops[:-1], replace(self.ops[-1], out=out)]
