"""Tracing: `Value`, the thing a declaration computes with, and the builder that records nodes."""

from __future__ import annotations

import contextvars
import linecache
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from math import copysign
from types import MappingProxyType

from moekit.errors import DeclarationError, DtypeError, ShapeError
from moekit.lang import graph as g
from moekit.lang.dtypes import INTS, is_float, itemsize, promote, widened
from moekit.lang.elementwise import ELEMENTWISE, REFUSED, fold

LONGEST = 2**31 - 2**20  # elements of an axis: kernels count in int32, to the end of the last block

_builder: contextvars.ContextVar[Builder | None] = contextvars.ContextVar("moekit_builder", default=None)


def _infix(op: str):
    return lambda self, other: elementwise(op, self, other)


def _reflected(op: str):
    return lambda self, other: elementwise(op, other, self)


def _sign(op: str):
    return lambda self: elementwise(op, self)


class Value:
    """A value of the declaration being traced: a node, with a dtype and the set of axes it varies over."""

    __slots__ = ("builder", "node")
    __array_priority__ = 1000
    __hash__ = object.__hash__

    def __init__(self, builder: Builder, node: int):
        self.builder, self.node = builder, node

    @property
    def dtype(self) -> str:
        """The dtype's name."""
        return self.builder.nodes[self.node].dtype

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes the value varies over."""
        return self.builder.nodes[self.node].axes

    def __repr__(self) -> str:
        return f"<{self.dtype}[{', '.join(self.axes)}]>"

    def __bool__(self):
        raise DeclarationError(
            f"{self.builder.name}: a traced value has no truth value; use where(...), or a static parameter in `if`"
        )

    def __iter__(self):
        raise DeclarationError(f"{self.builder.name}: a traced value cannot be iterated over; use halves or slice")

    __neg__, __abs__, __invert__ = _sign("neg"), _sign("abs"), _sign("not")
    __add__, __radd__ = _infix("add"), _reflected("add")
    __sub__, __rsub__ = _infix("sub"), _reflected("sub")
    __mul__, __rmul__ = _infix("mul"), _reflected("mul")
    __truediv__, __rtruediv__ = _infix("div"), _reflected("div")
    __floordiv__, __mod__ = _infix("floordiv"), _infix("rem")
    __and__, __or__, __xor__ = _infix("and"), _infix("or"), _infix("xor")
    __lshift__, __rshift__ = _infix("shl"), _infix("shr")
    __lt__, __le__, __gt__, __ge__ = _infix("lt"), _infix("le"), _infix("gt"), _infix("ge")

    def __eq__(self, other):
        return elementwise("eq", self, other)

    def __ne__(self, other):
        return elementwise("ne", self, other)


class Builder:
    """Records nodes while a declaration runs; equal nodes are one node. `mesh`: how many ranks each mesh axis has."""

    def __init__(self, name: str, sizes: dict[str, int | None], code=None, mesh: Mapping[str, int] = MappingProxyType({})):
        self.name, self.sizes, self.code, self.mesh = name, dict(sizes), code, mesh
        self.nodes: list[g.Node] = []
        self.lines: dict[int, str] = {}
        self.frame = None
        self.blocked: dict[str, str] = {}  # the axis of blocks by that of their elements
        self._known: dict[g.Node, int] = {}

    def add(self, op: str, args: Sequence[int] = (), attrs: tuple = (), dtype: str = "float32") -> Value:
        """The value of a node, made if it is not there yet."""
        if args and all(self.nodes[a].op == "const" for a in args):
            value = fold(op, [(self.nodes[a].attr("value"), self.nodes[a].dtype) for a in args], dtype)
            if value is not None:
                op, args, attrs = "const", (), constant_attrs(value)
        varies = self._varies(op, args, dict(attrs))
        node = g.Node(op, tuple(args), attrs, tuple(a for a in self.sizes if a in varies), dtype)
        if (known := self._known.get(node)) is None:
            known = self._known[node] = len(self.nodes)
            self.nodes.append(node)
            self._note_source(known)
        return Value(self, known)

    def _varies(self, op: str, args: Sequence[int], attrs: dict) -> set[str]:
        """The axes of a node: its operands' and its indices', but for one that is reduced, and the one in its place."""
        index = attrs.get("index", ())
        found = {a for i in ((index,) if isinstance(index, g.Index) else index) for a in i.axes}
        found |= {a for x in args for a in self.nodes[x].axes}
        if op == "before":
            return found | {attrs["axis"]}
        reduced = {attrs.get("axis")} if op != "cumsum" else set()
        if op == "place":
            return found - {a for x in args[1:] for a in self.nodes[x].axes} | set(attrs["over"])
        return (found - reduced) | ({attrs["into"]} if "into" in attrs else set())

    def new_axis(self, axis: str, size: int | None) -> None:
        """Declare an axis the operands do not have (`into=`)."""
        if size is not None and size > LONGEST:
            raise ShapeError(f"{self.name}: axis {axis} would have {size} elements; kernels count to {LONGEST}")
        if axis in self.sizes and self.sizes[axis] != size:
            raise DeclarationError(
                f"{self.name}: axis {axis!r} is {self.sizes[axis]} already and cannot also be {size}; choose another name"
            )
        self.sizes.setdefault(axis, size)

    def arranged(self) -> tuple[dict[str, int | None], tuple[g.Node, ...]]:
        """The axes and the nodes, with each axis of blocks right before that of their elements.

        So Triton gives a warp's lanes a row's blocks, and its registers several rows, which share what is multiplied by them.
        """
        order = [a for axis in self.sizes for a in (self.blocked.get(axis), axis) if a and axis not in self.blocked.values()]
        nodes = (replace(n, axes=tuple(a for a in order if a in n.axes)) for n in self.nodes)
        return {a: self.sizes[a] for a in order}, tuple(nodes)

    def axis_size(self, axis: str) -> int | None:
        """The size of a known axis, None if it is dynamic."""
        if axis not in self.sizes:
            raise DeclarationError(f"{self.name}: there is no axis {axis!r}; it has {', '.join(self.sizes)}")
        return self.sizes[axis]

    def _note_source(self, node: int) -> None:
        frame = sys._getframe(2)
        while frame is not None and frame.f_code is not self.code:
            frame = frame.f_back
        if frame is not None:
            self.frame = frame
            self.lines[node] = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()

    def names(self) -> dict[int, str]:
        """Node names: the declaration's own local variables, and the fields of those that are named tuples."""
        if self.frame is None:
            return {}
        found: dict[int, str] = {}
        for name, value in self.frame.f_locals.items():
            fields = value._asdict() if hasattr(value, "_asdict") else {name: value}
            for own, each in fields.items():
                if isinstance(each, Value) and each.builder is self and own not in found.values():
                    found.setdefault(each.node, own)
        return found


@contextmanager
def tracing(builder: Builder) -> Iterator[Builder]:
    """Make `builder` the one that `iota`, `size` and constants belong to."""
    token = _builder.set(builder)
    try:
        yield builder
    finally:
        _builder.reset(token)


def current() -> Builder:
    """The builder of the declaration being traced."""
    builder = _builder.get()
    if builder is None:
        raise DeclarationError("the language's functions can only be called inside a declaration")
    return builder


def constant(value: bool | int | float, dtype: str) -> Value:
    """A constant of the given dtype."""
    kind = float if is_float(dtype) else bool if dtype == "bool" else int
    value = kind(value)
    if dtype in INTS and not -(2 ** (8 * itemsize(dtype) - 1)) <= value < 2 ** (8 * itemsize(dtype) - 1):
        raise DtypeError(f"{current().name}: {value} is no {dtype}; cast the other operand to a wider dtype first")
    return current().add("const", (), constant_attrs(value), dtype)


def constant_attrs(value: bool | int | float) -> tuple[tuple[str, object], ...]:
    """The attributes of a constant; -0.0, which Python finds equal to 0.0, gets one more."""
    negative_zero = isinstance(value, float) and value == 0 and copysign(1, value) < 0
    return (("value", value), ("negative", True)) if negative_zero else (("value", value),)


def as_value(x, like: str) -> Value:
    """A traced value as it is, a Python number as a constant that does not widen `like` without need."""
    if isinstance(x, Value):
        return x
    if isinstance(x, bool):
        return constant(x, "bool")
    if isinstance(x, int):
        return constant(x, widened(like) if like != "bool" else "int32")
    if isinstance(x, float):
        return constant(x, "float32")
    raise DeclarationError(
        f"{current().name}: {type(x).__name__} {x!r} is no traced value and no number; declare it as an operand"
    )


def convert(x: Value, dtype: str) -> Value:
    """`x` in another dtype; nothing if it has it already."""
    if x.dtype == dtype:
        return x
    node = x.builder.nodes[x.node]
    if node.op == "const" and (dtype == "float32" or not is_float(dtype)):
        return constant(node.attr("value"), dtype)
    return x.builder.add("cast", (x.node,), (), dtype)


def elementwise(op: str, *operands) -> Value:
    """An operation of the table (`elementwise.py`): axes are joined by name, narrow floats are widened to float32."""
    row = ELEMENTWISE[op]
    like = next((x.dtype for x in operands if isinstance(x, Value)), "int32" if row.arity > 1 else "float32")
    values = [as_value(x, like) for x in operands]
    builder, given = values[0].builder, [v.dtype for v in values]
    dtype = "float32" if row.domain == "float" else reduce(promote, given, given[0])
    if row.domain == "number" and dtype == "bool":
        dtype = "int32"
    refused, needed, hint = REFUSED.get(row.domain, ((), "", ""))
    if dtype in refused:
        called = "~" if op == "not" else op
        raise DtypeError(f"{builder.name}: {called} needs {needed}, got {' and '.join(given)}; {hint}")
    values = [convert(v, dtype) for v in values]
    result = "bool" if row.domain == "compare" else dtype
    return builder.add(op, [v.node for v in values], (), result)
