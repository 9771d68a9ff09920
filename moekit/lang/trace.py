"""Tracing: `Value`, the thing a declaration computes with, and the builder that records nodes."""

from __future__ import annotations

import contextvars
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from math import copysign

from moekit.errors import DeclarationError, DtypeError
from moekit.lang import graph as g
from moekit.lang.dtypes import INTS, is_float, itemsize, promote, widened
from moekit.lang.fold import fold

_builder: contextvars.ContextVar[Builder | None] = contextvars.ContextVar("moekit_builder", default=None)


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

    def __add__(self, other):
        return binary("add", self, other)

    def __radd__(self, other):
        return binary("add", other, self)

    def __sub__(self, other):
        return binary("sub", self, other)

    def __rsub__(self, other):
        return binary("sub", other, self)

    def __mul__(self, other):
        return binary("mul", self, other)

    def __rmul__(self, other):
        return binary("mul", other, self)

    def __truediv__(self, other):
        return binary("div", self, other)

    def __rtruediv__(self, other):
        return binary("div", other, self)

    def __floordiv__(self, other):
        return binary("floordiv", self, other)

    def __mod__(self, other):
        return binary("rem", self, other)

    def __and__(self, other):
        return binary("and", self, other)

    def __or__(self, other):
        return binary("or", self, other)

    def __xor__(self, other):
        return binary("xor", self, other)

    def __lshift__(self, other):
        return binary("shl", self, other)

    def __rshift__(self, other):
        return binary("shr", self, other)

    def __lt__(self, other):
        return binary("lt", self, other)

    def __le__(self, other):
        return binary("le", self, other)

    def __gt__(self, other):
        return binary("gt", self, other)

    def __ge__(self, other):
        return binary("ge", self, other)

    def __eq__(self, other):
        return binary("eq", self, other)

    def __ne__(self, other):
        return binary("ne", self, other)

    def __neg__(self):
        return unary("neg", self)

    def __abs__(self):
        return unary("abs", self)

    def __invert__(self):
        return unary("not", self)


class Builder:
    """Records nodes while a declaration runs; equal nodes are one node."""

    def __init__(self, name: str, sizes: dict[str, int | None], code=None):
        self.name, self.sizes, self.code = name, dict(sizes), code
        self.nodes: list[g.Node] = []
        self.lines: dict[int, str] = {}
        self.frame = None
        self._known: dict[g.Node, int] = {}

    def add(self, op: str, args=(), attrs=(), axes=(), dtype="float32") -> Value:
        """The value of a node, made if it is not there yet; `axes` in any order."""
        if args and all(self.nodes[a].op == "const" for a in args):
            value = fold(op, [(self.nodes[a].attr("value"), self.nodes[a].dtype) for a in args], dtype)
            if value is not None:
                op, args, attrs, axes = "const", (), constant_attrs(value), ()
        wanted = set(axes)
        ordered = tuple(a for a in self.sizes if a in wanted)
        node = g.Node(op, tuple(args), tuple(attrs), ordered, dtype)
        if (known := self._known.get(node)) is None:
            known = self._known[node] = len(self.nodes)
            self.nodes.append(node)
            self._note_source(known)
        return Value(self, known)

    def new_axis(self, axis: str, size: int | None) -> None:
        """Declare an axis the operands do not have (`into=`)."""
        if axis in self.sizes and self.sizes[axis] != size:
            raise DeclarationError(
                f"{self.name}: axis {axis!r} is {self.sizes[axis]} already and cannot also be {size}; choose another name"
            )
        self.sizes.setdefault(axis, size)

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
        """Node names: the declaration's own local variables."""
        if self.frame is None:
            return {}
        found: dict[int, str] = {}
        for name, value in self.frame.f_locals.items():
            if isinstance(value, Value) and value.builder is self:
                found.setdefault(value.node, name)
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
    return current().add("const", (), constant_attrs(value), (), dtype)


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
    return x.builder.add("cast", (x.node,), (), x.axes, dtype)


def binary(op: str, a, b) -> Value:
    """An element-wise operation; axes are joined by name, narrow floats are widened to float32."""
    a = as_value(a, b.dtype if isinstance(b, Value) else "int32")
    b = as_value(b, a.dtype)
    builder = a.builder
    dtype = promote(a.dtype, b.dtype)
    if op == "div" and not is_float(dtype):
        dtype = "float32"
    if op in ("floordiv", "rem", "shl", "shr") and (is_float(dtype) or dtype == "bool"):
        raise DtypeError(f"{builder.name}: {op} needs integers, got {a.dtype} and {b.dtype}; cast first")
    if op in ("and", "or", "xor") and is_float(dtype):
        raise DtypeError(f"{builder.name}: {op} needs integers or bools, got {a.dtype} and {b.dtype}; use bitcast")
    if op in ("add", "sub", "mul") and dtype == "bool":
        dtype = "int32"
    a, b = convert(a, dtype), convert(b, dtype)
    result = "bool" if op in g.COMPARE else dtype
    return builder.add(op, (a.node, b.node), (), (*a.axes, *b.axes), result)


def unary(op: str, x) -> Value:
    """An element-wise operation of one operand, in float32 where `op` is transcendental."""
    x = as_value(x, "float32")
    if op == "not":
        if is_float(x.dtype):
            raise DtypeError(f"{x.builder.name}: ~ needs integers or bools, got {x.dtype}")
        return x.builder.add("not", (x.node,), (), x.axes, x.dtype)
    dtype = widened(x.dtype) if op in ("neg", "abs") else "float32"
    if dtype == "bool":
        raise DtypeError(f"{x.builder.name}: {op} needs numbers, got bool; use ~ or where")
    x = convert(x, dtype)
    return x.builder.add(op, (x.node,), (), x.axes, dtype)
