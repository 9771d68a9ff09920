"""The meaning of the tile IR: numpy executes a TileProgram, block by block and mask by mask.

Every access is bounds-checked, masked lanes never touch memory, scratch and outputs start poisoned.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from moekit.compile import tile as t
from moekit.lang.dtypes import is_float, numpy_dtype
from moekit.lang.elementwise import ELEMENTWISE

INT32_MAX = 2**31 - 1


def poison(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Memory nobody has written: NaN, or the most negative integer."""
    value = np.nan if is_float(dtype) else 1 if dtype == "bool" else np.iinfo(numpy_dtype(dtype)).min + 1
    return np.full(shape, value, numpy_dtype(dtype))


def run(plan: Any, tensors: Mapping[str, np.ndarray], sizes: Mapping[str, int], backwards: bool = False) -> None:
    """Execute a Plan on arrays of any strides; outputs and InOut tensors are written in place.

    `backwards`: the last program of every launch goes first.
    """
    memory = dict(tensors) | {s.name: poison(s.shape(sizes), s.dtype) for s in plan.scratch}
    for program in plan.programs:
        execute(program, memory, sizes, backwards)


def execute(kernel: t.Kernel, memory: Mapping[str, Any], sizes: Mapping[str, int], backwards: bool = False) -> None:
    """Run every program of one launch, in order (the order must not matter)."""
    for program in programs(kernel, memory, sizes, backwards):
        with np.errstate(all="ignore"):
            program.ops(program.program.body)


def programs(
    kernel: t.Kernel, memory: Mapping[str, Any], sizes: Mapping[str, int], backwards: bool = False
) -> Iterator[Program]:
    """Every program of one launch, yet to be run."""
    number, used = itertools.count(), {p.name: Used(memory[p.name].shape) for p in kernel.params if p.role == "InOut"}
    for section in kernel.sections[::-1] if backwards else kernel.sections:
        counts = [n if isinstance(n, int) else -(-sizes[n.name] // n.block) for n in section.counts]
        for ids in itertools.product(*(range(n)[:: -1 if backwards else 1] for n in counts)):
            yield Program(section, memory, sizes, dict(zip(section.grid, ids, strict=True)), next(number), used)


class Used:
    """Which program of a launch has read each element of an updated tensor (-1: none, -2: several), and what is written."""

    def __init__(self, shape: tuple[int, ...]):
        self.readers, self.written = np.full(shape, -1, np.int32), np.zeros(shape, bool)

    def read(self, number: int, at: tuple) -> bool:
        """Program `number` reads elements, which it may where nothing is written yet."""
        self.readers[at] = np.where(np.isin(self.readers[at], (-1, number)), number, -2)
        return not self.written[at].any()

    def write(self, number: int, at: tuple) -> bool:
        """Program `number` writes elements, which it may where no other one reads."""
        self.written[at] = True
        return bool(np.isin(self.readers[at], (-1, number)).all())


class Program:
    """One program of a launch: its values, which axes are in their last turn, and what of updated tensors is used by whom."""

    def __init__(self, program: t.TileProgram, memory: Mapping, sizes: Mapping, ids: Mapping, number: int, used: Mapping):
        self.program, self.memory, self.sizes, self.ids, self.number, self.used = program, memory, sizes, ids, number, used
        self.values: dict[t.Value, np.ndarray] = {}
        self.last: dict[str | int, bool] = {}

    def steps(self) -> Iterator[t.Op]:
        """Run the program, but stop before each packet that it sends or waits for until asked on."""
        for op in self.program.body:
            if isinstance(op, t.Packet):
                yield op
            with np.errstate(all="ignore"):
                self.ops((op,))

    def packets(self, op: t.Packet) -> tuple[Any, list[tuple[np.ndarray, ...]], np.ndarray, np.ndarray]:
        """The mailboxes, each value's packets in them, where there are any, and their epochs; those of all values lie side by
        side."""
        mail, axes = self.memory[op.at.tensor], self.program.ordered(op.at.axes)
        *rows, last = mail.shape
        _, index, mask = self.address(op, axes, (*rows, last // op.words))
        *at, access = (i[mask] for i in index)
        places = [(*at, access * op.words + k) for k in range(op.words)]
        return mail, places, mask, np.broadcast_to(self.at(op.epoch, axes), mask.shape)[mask]

    def send(self, op: t.Send) -> np.ndarray:
        mail, places, mask, epoch = self.packets(op)
        peer = int(self.values[op.way])
        for at, value in zip(places, op.values, strict=True) if peer != mail.rank else ():
            data = np.broadcast_to(self.at(value, self.program.ordered(op.at.axes)), mask.shape)
            mail.send(peer, at, epoch, data[mask])
        return self.values[op.values[0]]

    def arrived(self, op: t.Receive) -> bool:
        """Whether what a receive waits for is there."""
        mail, places, _, epoch = self.packets(op)
        sender = int(self.values[op.way])
        return sender == mail.rank or all(mail.arrived(sender, at, epoch) for at in places)

    def receive(self, op: t.Receive) -> list[np.ndarray]:
        mail, places, mask, epoch = self.packets(op)
        axes = self.program.ordered(op.at.axes)
        outs = [np.broadcast_to(self.at(v, axes), mask.shape).copy() for v in op.own]
        if (sender := int(self.values[op.way])) != mail.rank:
            for out, at in zip(outs, places, strict=True):
                out[mask] = mail.receive(sender, at, epoch)
        return outs

    def deinterleave(self, op: t.Deinterleave) -> list[np.ndarray]:
        return [self.values[op.value][..., k :: len(op.outs)] for k in range(len(op.outs))]

    def interleave(self, op: t.Interleave) -> np.ndarray:
        stacked = np.stack([self.values[v] for v in op.values], axis=-1)
        return stacked.reshape(*stacked.shape[:-2], -1)

    def ops(self, ops: Iterable[t.Op]) -> None:
        for op in ops:
            if (made := EXECUTE[type(op)](self, op)) is not None:
                for out, array in zip(t.results(op), made if isinstance(made, list) else [made], strict=True):
                    self.values[out] = np.asarray(array, numpy_dtype(out.dtype))

    def at(self, value: t.Value, axes: tuple[str, ...]) -> np.ndarray:
        array = self.values[value]
        return array.reshape([array.shape[value.axes.index(a)] if a in value.axes else 1 for a in axes])

    def extent(self, axis: str) -> int:
        extent = self.program.axis(axis).extent
        return self.sizes[axis] if extent is None else extent

    def elements(self, op: t.Elements) -> np.ndarray:
        axis = self.program.axis(op.axis)
        lanes = np.arange(axis.block if axis.of is None else axis.block // 2)
        if axis.of:
            lanes = np.tile(lanes.reshape(-1, 1, axis.strip), (2, 1)).reshape(-1)
        own = self.program.bounded(op.axis)
        first = self.ids[own.name] * own.block if own.mode == "grid" else 0
        first += int(self.values[op.turn]) if op.turn else 0
        first += int(self.values[op.part]) * axis.share if op.part else 0
        return first + (lanes if op.out.axes else lanes[0])

    def loop(self, op: t.Loop) -> list[np.ndarray]:
        state = [self.values[v] for v in op.inits]
        steps, turns = [self._starts(a) for a in op.over], [()]
        if op.end is not None:
            if (end := int(self.values[op.end])) > steps[0].stop:
                raise IndexError(f"{self.program.name}: a loop over {op.over[0]} goes to {end}, past its end")
            steps = [range(steps[0].start, end, steps[0].step)]
        for each in steps:
            turns = [(*outer, i) for outer in turns for i in each]
        for turn in turns:
            self.last |= {a: i == each[-1] for a, i, each in zip(op.over, turn, steps, strict=True)}
            self.values |= {v: np.asarray(i, np.int32) for v, i in zip(op.vars, turn, strict=True)}
            self.values |= dict(zip(op.carries, state, strict=True))
            self.ops(op.body)
            state = [self.values[v] for v in op.yields]
        return state

    def _starts(self, over: str | int) -> range:
        if isinstance(over, int):
            return range(over)
        axis = self.program.axis(over)
        begin = self.ids[over] * axis.block if axis.beside else 0
        return range(begin, self.extent(over) if axis.length is None else axis.length, axis.step)

    def at_end(self, op: t.AtEnd) -> list[np.ndarray]:
        if self.last[op.axis]:
            self.ops(op.body)
        return [self.values[v] for v in (op.yields if self.last[op.axis] else op.otherwise)]

    def address(
        self, op: t.Memory, axes: tuple[str, ...], extents: tuple[int, ...] = ()
    ) -> tuple[Any, tuple[np.ndarray, ...], np.ndarray]:
        """What an access touches: memory, an index for each dimension (of `extents`, where it is no array), the mask."""
        array, shape, name = self.memory[op.at.tensor], self.program.block(axes), type(op).__name__
        mask = np.ones(shape, bool)
        for each in op.at.mask:
            mask = mask & self.at(each, axes)
        index = []
        strided = isinstance(self.program.param(op.at.tensor).layout, t.Strided)
        extents, strides = (extents, (0,) * len(extents)) if extents else (array.shape, array.strides)
        for size, step, at, wide in zip(extents, strides, op.at.index, op.at.wide, strict=True):
            i = self._index(at, axes)
            if (i.min() < 0 or i.max() >= size) and (mask & ((i < 0) | (i >= size))).any():
                raise IndexError(f"{self.program.name}: {name} of {op.at.tensor} leaves its bounds")
            if strided and not wide and (mask & (i * (step // array.itemsize) > INT32_MAX)).any():
                raise IndexError(f"{self.program.name}: {name} of {op.at.tensor} has an offset that passes 32 bits")
            index.append(np.broadcast_to(i, shape))
        return array, tuple(index), mask

    def _index(self, at: t.Index, axes: tuple[str, ...]) -> np.ndarray:
        found = np.full([1] * len(axes), at.start, np.int64)
        for value, step in at.terms:
            found = found + self.at(value, axes) * np.int64(step)
        return found

    def load(self, op: t.Load) -> np.ndarray:
        array, index, mask = self.address(op, op.out.axes)
        out, at = np.full(mask.shape, op.fill, array.dtype), (*(i[mask] for i in index), ...)
        if op.at.tensor in self.used and not self.used[op.at.tensor].read(self.number, at):
            raise IndexError(f"{self.program.name}: Load of {op.at.tensor} comes after a store of the same elements")
        out[mask] = array[at]
        return out

    def store(self, op: t.Store) -> None:
        axes = self.program.ordered({*op.at.axes, *op.value.axes})
        array, index, mask = self.address(op, axes)
        at = (*(i[mask] for i in index), ...)
        if op.at.tensor in self.used and not self.used[op.at.tensor].write(self.number, at):
            raise IndexError(f"{self.program.name}: Store of {op.at.tensor} to elements that another program reads")
        array[at] = np.broadcast_to(self.at(op.value, axes), mask.shape)[mask]

    def prefetch(self, op: t.Prefetch) -> None:
        array, index, mask = self.address(op, self.program.ordered(op.at.axes))
        if (mask & (index[op.along] + op.size > array.shape[op.along])).any():
            raise IndexError(f"{self.program.name}: Prefetch of {op.at.tensor} leaves its bounds")

    def dot(self, op: t.Dot) -> np.ndarray:
        m, n = op.out.axes
        left, right = (self.values[v].astype(np.float64) for v in (op.left, op.right))  # BLAS adds up in an order of its own:
        left = left if op.left.axes == (m, op.axis) else left.T  # rounded once, a row has the same bits in any block
        product = (left @ (right if op.right.axes == (op.axis, n) else right.T)).astype(np.float32)
        return product if op.acc is None else self.values[op.acc] + product

    def halves(self, op: t.Halves) -> list[np.ndarray]:
        of = self.program.axis(op.axis).of
        named = tuple(of if a == op.axis else a for a in op.value.axes)
        order, at = [named.index(a) for a in op.outs[0].axes], op.value.axes.index(op.axis)
        value, strip = self.values[op.value], self.program.axis(op.axis).strip
        strips = np.split(value, value.shape[at] // strip, axis=at)
        return [np.transpose(np.concatenate(strips[side::2], axis=at), order) for side in (0, 1)]

    def sides(self, op: t.Sides) -> np.ndarray:
        axis = self.program.axis(op.axis)
        return np.resize(np.repeat(np.array([0, op.apart], np.int32), axis.strip), axis.block)

    def in_bounds(self, op: t.InBounds) -> np.ndarray:
        return (self.values[op.value] >= 0) & (self.values[op.value] < self.extent(op.axis))

    def where(self, op: t.Where) -> np.ndarray:
        return np.where(*(self.at(v, op.out.axes) for v in (op.condition, op.yes, op.no)))

    def reduce(self, op: t.Reduce) -> np.ndarray:
        return REDUCE[op.op](self.values[op.value], axis=op.value.axes.index(op.axis), dtype=numpy_dtype(op.out.dtype))

    def scan(self, op: t.Scan) -> np.ndarray:
        return np.cumsum(self.values[op.value], axis=op.value.axes.index(op.axis), dtype=numpy_dtype(op.out.dtype))


REDUCE = {"sum": np.add.reduce, "max": np.maximum.reduce, "min": np.minimum.reduce}
EXECUTE = {
    t.Const: lambda p, op: np.full(p.program.block(op.out.axes), op.value, numpy_dtype(op.out.dtype)),
    t.Extent: lambda p, op: p.sizes[op.axis],
    t.Elements: Program.elements,
    t.Sides: Program.sides,
    t.InBounds: Program.in_bounds,
    t.Load: Program.load,
    t.Store: Program.store,
    t.Prefetch: Program.prefetch,
    t.Barrier: lambda p, op: None,
    t.Ways: lambda p, op: [*p.memory[op.tensor].ways],
    t.Send: Program.send,
    t.Receive: Program.receive,
    t.Cast: lambda p, op: p.values[op.value].astype(numpy_dtype(op.out.dtype)),
    t.Bitcast: lambda p, op: p.values[op.value].view(numpy_dtype(op.out.dtype)),
    t.Along: lambda p, op: p.values[op.value],
    t.Unary: lambda p, op: ELEMENTWISE[op.op].meaning(p.values[op.value]),
    t.Binary: lambda p, op: ELEMENTWISE[op.op].meaning(p.at(op.left, op.out.axes), p.at(op.right, op.out.axes)),
    t.Where: Program.where,
    t.Reduce: Program.reduce,
    t.Scan: Program.scan,
    t.Dot: Program.dot,
    t.Halves: Program.halves,
    t.Deinterleave: Program.deinterleave,
    t.Interleave: Program.interleave,
    t.Loop: Program.loop,
    t.AtEnd: Program.at_end,
}
