"""Guarded memory: tensors of any strides in one arena, canaries before, after and in the gaps between their elements.

An arena has one plan and any number of images: the same tensors at the same places, with another poison in everything that is
not an operand's element. Two runs on two images must give the same bits, or something read what it must not, or left an
output unwritten. After a run only elements of tensors that may be written may differ from the image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from moekit.lang.dtypes import itemsize, numpy_dtype
from moekit.testing.case import FuzzCase
from moekit.testing.layouts import Layout

POISONS = (0xFF, 0x42)  # NaN and -1; a number about 3 to 50 in every float format
CANARY = 256  # bytes before and after each tensor, and the alignment of its base
FAR = 2**31  # bytes from which on an arena is not looked at as a whole
NEAR = CANARY // 4  # bytes before and after an element that are looked at there


@dataclass(frozen=True)
class Slot:
    """A tensor's place: shape, dtype, strides in elements, the element of the arena (in its dtype) it starts at, and the
    bytes that are its own, gaps and the canaries before and after it included. `base` is the element at which the dense array
    begins that it is a view of, and that array's extents (None where a stride is 0). `values` is None for an output."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    start: int
    first: int
    last: int
    base: tuple[int, tuple[int, ...] | None]
    values: np.ndarray | None = None

    def view(self, memory: np.ndarray) -> np.ndarray:
        """The tensor in the arena's memory."""
        size, dtype = itemsize(self.dtype), numpy_dtype(self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        return np.ndarray(self.shape, dtype, memory.data, self.start * size, tuple(s * size for s in self.strides))

    def whole(self, memory: np.ndarray) -> np.ndarray:
        """The dense array that the tensor is a view of; a copy of the tensor where some stride is 0."""
        start, extents = self.base
        if extents is None:
            return np.ascontiguousarray(self.view(memory))
        return np.ndarray(extents, numpy_dtype(self.dtype), memory.data, start * itemsize(self.dtype))

    def places(self) -> np.ndarray:
        """The byte of the arena at which each element begins."""
        steps = [np.arange(n, dtype=np.int64) * s for n, s in zip(self.shape, self.strides, strict=True)]
        found = functools.reduce(np.add.outer, steps, np.int64(self.start))
        return np.asarray(found) * itemsize(self.dtype)

    def among(self, index: np.ndarray) -> np.ndarray:
        """Where the bytes of the elements stand among the bytes at `index`: elements by bytes."""
        return np.searchsorted(index, self.places().ravel())[:, None] + np.arange(itemsize(self.dtype))


class Arena:
    """A plan of slots; `image` makes bytes of it: all of its memory, or of gigabytes what `index` names."""

    def __init__(self):
        self.slots: list[Slot] = []
        self.end = CANARY

    def add(self, name: str, shape: tuple[int, ...], dtype: str, layout: Layout, values: np.ndarray | None = None) -> Slot:
        """Reserve memory for a tensor."""
        size = itemsize(dtype)
        first, extents = self.end, layout.base(shape)
        start = first // size + layout.offset(shape)
        base = first // size + layout.shift, None if layout.zero else tuple(extents[d] for d in layout.order)
        self.end = -(-(first + layout.span(shape) * size + CANARY) // CANARY) * CANARY
        slot = Slot(name, shape, dtype, layout.strides(shape), start, first - CANARY, self.end, base, values)
        self.slots.append(slot)
        return slot

    def turns(self, names: list[str], case: FuzzCase, values: Mapping[str, np.ndarray]) -> dict[str, Slot]:
        """Reserve one array for tensors of one shape and dtype that take turns in it."""
        shape, dtype = case.shape(names[0]), case.dtype(names[0])
        whole = self.add("", (*shape, len(names)), dtype, Layout.dense(len(shape) + 1))
        self.slots.pop()
        made = {n: replace(whole, name=n, shape=shape, strides=whole.strides[:-1], start=whole.start + i, values=values.get(n))
                for i, n in enumerate(names)}  # fmt: skip
        self.slots += made.values()
        return made

    @functools.cached_property
    def index(self) -> np.ndarray | None:
        """Which bytes an image has of gigabytes: those of every element and `NEAR` around it. None: an image has all."""
        if self.end < FAR:
            return None
        lines = np.unique(np.concatenate([s.places().ravel() // NEAR for s in self.slots]))
        return (np.unique(lines[:, None] + np.arange(-1, 2))[:, None] * NEAR + np.arange(NEAR)).ravel()

    def image(self, poison: int) -> np.ndarray:
        """Operands' values, and `poison` everywhere else."""
        found = _aligned(self.end if self.index is None else self.index.size)
        found.fill(poison)
        for slot in self.slots:
            if slot.values is not None and slot.values.size:
                self.write(slot, found, slot.values)
        return found

    def read(self, slot: Slot, image: np.ndarray) -> np.ndarray:
        """A tensor as an image has it."""
        if self.index is None:
            return slot.view(image)
        return image[slot.among(self.index)].reshape(-1).view(numpy_dtype(slot.dtype)).reshape(slot.shape)

    def write(self, slot: Slot, image: np.ndarray, values: np.ndarray) -> None:
        """Put a tensor into an image."""
        if self.index is None:
            slot.view(image)[...] = values
        else:
            at = slot.among(self.index)
            image[at] = np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8).reshape(at.shape)

    def damage(self, before: np.ndarray, after: np.ndarray, written: Iterable[Slot]) -> list[tuple[Slot, int]]:
        """Slots within whose range bytes changed that must not, and how many."""
        expected = before.copy()
        for slot in written:
            self.write(slot, expected, self.read(slot, after))
        if np.array_equal(expected.view(np.uint64), after.view(np.uint64)):
            return []
        changed = np.flatnonzero(expected != after)
        at = changed if self.index is None else self.index[changed]
        counts = [(s, int(np.count_nonzero((at >= s.first) & (at < s.last)))) for s in self.slots]
        return [(s, n) for s, n in counts if n]


def _aligned(size: int) -> np.ndarray:
    """Bytes whose address is a multiple of 256, as a GPU's allocator gives them."""
    raw = np.empty(size + CANARY, np.uint8)
    shift = -raw.ctypes.data % CANARY
    return raw[shift : shift + size]


@dataclass(frozen=True)
class Placed:
    """A case in an arena: its slots by name."""

    case: FuzzCase
    arena: Arena
    slots: dict[str, Slot]

    @property
    def written(self) -> list[Slot]:
        """The slots a call may write."""
        return [self.slots[name] for name in dict.fromkeys(self.case.targets.values())]

    def outputs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs as they stand in an image."""
        return {n: self.arena.read(self.slots[t], image) for n, t in self.case.targets.items()}

    def differing(self, first: np.ndarray, second: np.ndarray) -> list[str]:
        """Outputs whose bits differ between two images: nondeterminism, a read of poison, or elements never written."""
        found, others = [], self.outputs(second)
        for name, a in self.outputs(first).items():
            a, b = np.ascontiguousarray(a), np.ascontiguousarray(others[name])
            bits = np.dtype(f"u{a.dtype.itemsize}")
            unequal = a.view(bits) != b.view(bits)
            if unequal.any():
                at = tuple(int(i) for i in np.argwhere(unequal)[0])
                where = f"{self.case.declaration.name}: {name}{list(at)}"
                found.append(f"{where} is {a[at]} or {b[at]}, by what lies around the tensors; "
                             f"{int(unequal.sum())} of {a.size} elements depend on memory that is not theirs")  # fmt: skip
        return found


def place(arena: Arena, case: FuzzCase, values: Mapping[str, np.ndarray]) -> Placed:
    """Reserve memory for every tensor of a case."""
    slots: dict[str, Slot] = {}
    if case.woven:
        weave = case.weave()
        for array in dict.fromkeys(a for a, _, _ in weave.values()):
            slots |= arena.turns([n for n, (a, _, _) in weave.items() if a == array], case, values)
    else:
        for n in case.memory():
            slots[n] = arena.add(n, case.shape(n), case.dtype(n), case.layout(n), values.get(n))
    return Placed(case, arena, slots)
