"""The meaning of the tile IR: numpy executes a TileProgram, block by block and mask by mask.

Every access is bounds-checked, masked lanes never touch memory, scratch and outputs start poisoned.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from moekit.compile import tile as t
from moekit.compile.plan import Plan
from moekit.lang.dtypes import is_float, numpy_dtype

INT32_MAX = 2**31 - 1


def poison(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory nobody has written: NaN, or the most negative integer."""
    value = np.nan if is_float(dtype) else 1 if dtype == "bool" else np.iinfo(numpy_dtype(dtype)).min + 1
    return np.full(shape, value, numpy_dtype(dtype))


def run(plan: Plan, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, int], backwards: bool = False) -> None:
    """Execute a plan on arrays of any strides; outputs and InOut tensors are written in place.

    `backwards`: the last program of every launch goes first.
    """
    memory = dict(tensors) | {s.name: poison(s.shape(sizes), s.dtype) for s in plan.scratch}
    for program in plan.programs:
        execute(program, memory, sizes, backwards)


def execute(kernel: t.Kernel, memory: Mapping[str, np.ndarray], sizes: Mapping[str, int], backwards: bool = False) -> None:
    """Run every program of one launch, in order (the order must not matter)."""
    for section in kernel.sections[::-1] if backwards else kernel.sections:
        _execute(section, memory, sizes, backwards)


def _execute(program: t.TileProgram, memory: Mapping[str, np.ndarray], sizes: Mapping[str, int], backwards: bool) -> None:
    counts = []
    for name in program.grid:
        a = program.axis(name)
        counts.append(-(-(sizes[name] if a.extent is None else a.extent) // a.block))
    for ids in itertools.product(*(range(n)[:: -1 if backwards else 1] for n in counts)):
        with np.errstate(all="ignore"):
            _Program(program, memory, sizes, dict(zip(program.grid, ids, strict=True))).ops(program.body)


class _Program:
    """One program: its values by name."""

    def __init__(self, program: t.TileProgram, memory, sizes, ids):
        self.program, self.memory, self.sizes, self.ids = program, memory, sizes, ids
        self.values: dict[str, np.ndarray] = {}

    def ops(self, ops) -> None:
        for op in ops:
            if isinstance(op, t.Loop):
                self._loop(op)
            elif isinstance(op, t.Store):
                self._store(op)
            elif isinstance(op, t.Prefetch):
                self._prefetch(op)
            else:
                self.values[op.out.name] = np.asarray(EXECUTE[type(op)](self, op), numpy_dtype(op.out.dtype))

    def at(self, value: t.Value, axes: tuple[str, ...]) -> np.ndarray:
        """A value's block with a dimension of size 1 for every axis of `axes` it does not have."""
        array = self.values[value.name]
        return array.reshape([array.shape[value.axes.index(a)] if a in value.axes else 1 for a in axes])

    def extent(self, axis: str) -> int:
        a = self.program.axis(axis)
        return self.sizes[axis] if a.extent is None else a.extent

    def _loop(self, op: t.Loop) -> None:
        stop = int(self.values[op.stop.name]) if isinstance(op.stop, t.Value) else op.stop
        state = [self.values[v.name] for v in op.inits]
        for i in range(0, stop, op.step):
            self.values[op.var.name] = np.asarray(i, np.int32)
            for carry, value in zip(op.carries, state, strict=True):
                self.values[carry.name] = value
            self.ops(op.body)
            state = [self.values[v.name] for v in op.yields]
        for out, value in zip(op.outs, state, strict=True):
            self.values[out.name] = value

    def _address(self, op, axes: tuple[str, ...]):
        """Index arrays over `axes` and the mask; bounds-checked where the mask holds."""
        array = self.memory[op.tensor]
        shape = self.program.block(axes)
        mask = np.broadcast_to(self.at(op.mask, axes), shape) if op.mask is not None else np.ones(shape, bool)
        index = []
        strided = isinstance(self.program.param(op.tensor).layout, t.Strided)
        for size, step, v, wide in zip(array.shape, array.strides, op.index, op.wide, strict=True):
            i = np.broadcast_to(
                self.at(v, axes).astype(np.int64) if v is not None else np.zeros([1] * len(axes), np.int64),
                shape,
            )
            if (mask & ((i < 0) | (i >= size))).any():
                raise IndexError(f"{self.program.name}: {type(op).__name__} of {op.tensor} leaves its bounds")
            if strided and not wide and (mask & (i * (step // array.itemsize) > INT32_MAX)).any():
                raise IndexError(f"{self.program.name}: {type(op).__name__} of {op.tensor} has an offset that passes 32 bits")
            index.append(np.where(mask, i, 0))
        return array, tuple(index), mask

    def load(self, op: t.Load) -> np.ndarray:
        array, index, mask = self._address(op, op.out.axes)
        out = np.full(mask.shape, op.fill, array.dtype)
        out[mask] = array[tuple(i[mask] for i in index)]
        return out

    def _store(self, op: t.Store) -> None:
        axes = {a for v in (*op.index, op.mask, op.value) if v is not None for a in v.axes}
        ordered = tuple(a.name for a in self.program.axes if a.name in axes)
        array, index, mask = self._address(op, ordered)
        value = np.broadcast_to(self.at(op.value, ordered), mask.shape)
        array[(*(i[mask] for i in index), ...)] = value[mask]

    def _prefetch(self, op: t.Prefetch) -> None:
        """Nothing happens, within bounds."""
        axes = {a for v in op.index if v is not None for a in v.axes}
        array, index, mask = self._address(op, tuple(a.name for a in self.program.axes if a.name in axes))
        if (mask & (index[op.along] + op.size > array.shape[op.along])).any():
            raise IndexError(f"{self.program.name}: Prefetch of {op.tensor} leaves its bounds")

    def dot(self, op: t.Dot) -> np.ndarray:
        m, n = op.out.axes
        left = self.at(op.left, (m, op.axis)).astype(np.float32)
        right = self.at(op.right, (op.axis, n)) if op.right.axes == (op.axis, n) else self.values[op.right.name].T
        if op.left.axes != (m, op.axis):
            left = self.values[op.left.name].T.astype(np.float32)
        product = left @ right.astype(np.float32)
        return product if op.acc is None else self.values[op.acc.name] + product

    def index(self, op: t.Index) -> np.ndarray:
        start = self.values[op.start.name] if op.start is not None else np.zeros((), np.int32)
        lanes = np.arange(self.program.axis(op.axis).block, dtype=np.int32)
        return start + (np.tile(lanes, 2) if op.out.axes != (op.axis,) else lanes) if op.out.axes else start

    def sides(self, op: t.Sides) -> np.ndarray:
        return np.repeat(np.asarray(op.values, np.int32), self.program.axis(op.axis).block // 2)

    def half(self, op: t.Half) -> np.ndarray:
        halves = np.split(self.values[op.value.name], 2, axis=op.value.axes.index(op.axis))
        of = self.program.axis(op.axis).of
        named = tuple(of if a == op.axis else a for a in op.value.axes)
        return np.transpose(halves[op.side], [named.index(a) for a in op.out.axes])

    def binary(self, op: t.Binary) -> np.ndarray:
        axes = op.out.axes
        return BINARY[op.op](self.at(op.left, axes), self.at(op.right, axes))

    def where(self, op: t.Where) -> np.ndarray:
        return np.where(*(self.at(v, op.out.axes) for v in (op.condition, op.yes, op.no)))

    def reduce(self, op: t.Reduce) -> np.ndarray:
        return REDUCE[op.op](self.values[op.value.name], axis=op.value.axes.index(op.axis), dtype=numpy_dtype(op.out.dtype))


def _sum(x, axis, dtype):
    return np.add.reduce(x, axis=axis, dtype=dtype)


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """Convert, rounding to nearest even; integers of another width wrap."""
    return x.astype(numpy_dtype(dtype))


def trunc_div(a, b):
    """Integer division as hardware does it: toward zero; by zero gives 0."""
    safe = np.where(b == 0, 1, b)
    return np.where(b == 0, 0, (np.abs(a) // np.abs(safe)) * np.sign(a) * np.sign(safe)).astype(a.dtype)


def trunc_rem(a, b):
    """The remainder that goes with `trunc_div`: it has the sign of the dividend."""
    return (a - trunc_div(a, b) * b).astype(a.dtype)


BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "floordiv": trunc_div,
    "rem": trunc_rem,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
UNARY = {
    "neg": np.negative,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "abs": np.abs,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "not": np.invert,
}
REDUCE = {
    "sum": _sum,
    "max": lambda x, axis, dtype: np.max(x, axis=axis),
    "min": lambda x, axis, dtype: np.min(x, axis=axis),
}
EXECUTE = {
    t.Const: lambda p, op: np.asarray(op.value, numpy_dtype(op.out.dtype)),
    t.Full: lambda p, op: np.full(p.program.block(op.out.axes), op.value, numpy_dtype(op.out.dtype)),
    t.ProgramId: lambda p, op: p.ids[op.axis],
    t.Extent: lambda p, op: p.sizes[op.axis],
    t.Index: _Program.index,
    t.Sides: _Program.sides,
    t.Half: _Program.half,
    t.InBounds: lambda p, op: p.values[op.index.name] < p.extent(op.axis),
    t.Load: _Program.load,
    t.Cast: lambda p, op: cast(p.values[op.value.name], op.out.dtype),
    t.Bitcast: lambda p, op: p.values[op.value.name].view(numpy_dtype(op.out.dtype)),
    t.Unary: lambda p, op: UNARY[op.op](p.values[op.value.name]),
    t.Binary: _Program.binary,
    t.Where: _Program.where,
    t.Reduce: _Program.reduce,
    t.Scan: lambda p, op: np.cumsum(
        p.values[op.value.name], axis=op.value.axes.index(op.axis), dtype=numpy_dtype(op.out.dtype)
    ),
    t.Dot: _Program.dot,
}
