"""Going through programs, and writing them anew: what passes and rules are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moekit.compile.tile.operations import (
    AtEnd,
    Binary,
    Const,
    Loop,
    Op,
    Prefetch,
    Store,
    Unary,
    Value,
    Where,
    operands,
    results,
)
from moekit.compile.tile.program import TileProgram
from moekit.lang.graph import COMPARE


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


def substitute[T](part: T, new: Mapping[Value, Value]) -> T:
    """An operation, or a part of one, that reads other values in place of some."""

    def visit(x: Any) -> Any:
        if isinstance(x, Value):
            return new.get(x, x)
        if isinstance(x, tuple):
            return tuple(map(visit, x))
        if hasattr(x, "__dataclass_fields__"):
            return replace(x, **{n: visit(getattr(x, n)) for n in x.__dataclass_fields__})
        return x

    return visit(part)


def used(ops: Iterable[Op], kept: Iterable[Value] = ()) -> tuple[Op, ...]:
    """The operations without those that nothing reads; `kept` are read from outside."""
    needed, found = set(kept), []
    for op in reversed(tuple(ops)):
        if not isinstance(op, Store | Prefetch) and not needed & set(results(op)) and not _stores(op):
            continue
        if isinstance(op, Loop | AtEnd):
            op = replace(op, body=used(op.body, op.yields))
            needed |= {v for o, _ in walk(op.body) for v in operands(o)} | set(op.yields)
            needed |= {v for o, _ in walk(op.body) if isinstance(o, Loop | AtEnd) for v in o.yields}
        needed |= set(operands(op))
        found.append(op)
    return tuple(reversed(found))


def _stores(op: Op) -> bool:
    return isinstance(op, Loop | AtEnd) and any(isinstance(o, Store) for o, _ in walk(op.body))


class Numbers:
    """Hands out values with numbers that no value of some operations has."""

    def __init__(self, ops: Iterable[Op] = ()):
        made = [v for op, _ in walk(ops) for v in (*results(op), *((*op.vars, *op.carries) if isinstance(op, Loop) else ()))]
        self.next = 1 + max((v.number for v in made), default=-1)

    def value(self, dtype: str, axes: Iterable[str] = (), name: str = "", line: str = "") -> Value:
        """A new value."""
        self.next += 1
        return Value(self.next - 1, dtype, tuple(axes), name, line)

    def like(self, value: Value) -> Value:
        """A new value of the same kind and name."""
        return self.value(value.dtype, value.axes, value.name, value.line)


class Draft:
    """Operations being written into a program: what a pass puts in the place of one."""

    def __init__(self, program: TileProgram, numbers: Numbers, line: str = ""):
        self.program, self.numbers, self.line, self.ops = program, numbers, line, []

    def emit(self, kind: Callable[..., Op], dtype: str, axes: Iterable[str], name: str = "", **fields) -> Value:
        """Write an operation; its result. `axes` in any order."""
        wanted = set(axes)
        ordered = (a.name for a in self.program.axes if a.name in wanted)
        out = self.numbers.value(dtype, ordered, name, self.line)
        self.ops.append(kind(out=out, **fields))
        return out

    def const(self, value: bool | int | float, dtype: str = "int32", axes: Iterable[str] = (), name: str = "") -> Value:
        """A number, or a block of it."""
        return self.emit(Const, dtype, axes, name, value=value)

    def unary(self, op: str, value: Value) -> Value:
        """An element-wise function."""
        return self.emit(Unary, value.dtype, value.axes, op=op, value=value)

    def binary(self, op: str, a: Value, b: Value, name: str = "") -> Value:
        """An element-wise function of two blocks."""
        dtype = "bool" if op in COMPARE else a.dtype
        return self.emit(Binary, dtype, (*a.axes, *b.axes), name, op=op, left=a, right=b)

    def where(self, condition: Value, yes: Value, no: Value, name: str = "") -> Value:
        """A choice between two blocks."""
        axes = (*condition.axes, *yes.axes, *no.axes)
        return self.emit(Where, yes.dtype, axes, name, condition=condition, yes=yes, no=no)

    def becomes(self, out: Value) -> list[Op]:
        """The operations, of which the last one defines `out`."""
        return [*self.ops[:-1], replace(self.ops[-1], out=out)]
