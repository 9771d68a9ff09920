"""Guarded memory: tensors of any strides in one arena, canaries before, after and in the gaps between their elements.

An arena has one plan and any number of images: the same tensors at the same places, with another poison in everything that is
not an operand's element. Two runs on two images must give the same bits, or something read what it must not, or left an
output unwritten. After a run only elements of tensors that may be written may differ from the image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from moekit.lang.dtypes import itemsize, numpy_dtype
from moekit.testing.case import AnyCall
from moekit.testing.layouts import Layout

POISONS = (0xFF, 0x42)  # NaN and -1; a number about 3 to 50 in every float format
CANARY = 256  # bytes before and after each tensor, and the alignment of its base


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

    def view(self, image: np.ndarray) -> np.ndarray:
        """The tensor in an image of the arena."""
        size, dtype = itemsize(self.dtype), numpy_dtype(self.dtype)
        if 0 in self.shape:
            return np.empty(self.shape, dtype)
        return np.ndarray(self.shape, dtype, image.data, self.start * size, tuple(s * size for s in self.strides))

    def whole(self, image: np.ndarray) -> np.ndarray:
        """The dense array that the tensor is a view of; a copy of the tensor where some stride is 0."""
        start, extents = self.base
        if extents is None:
            return np.ascontiguousarray(self.view(image))
        return np.ndarray(extents, numpy_dtype(self.dtype), image.data, start * itemsize(self.dtype))

    def places(self) -> np.ndarray:
        """The byte of the arena at which each element begins."""
        size, found = itemsize(self.dtype), np.full(self.shape, self.start, np.int64)
        for d, (n, step) in enumerate(zip(self.shape, self.strides, strict=True)):
            found += (np.arange(n, dtype=np.int64) * step).reshape([-1 if e == d else 1 for e in range(len(self.shape))])
        return found * size


class Arena:
    """A plan of slots; `image` makes memory of it."""

    def __init__(self):
        self.slots: list[Slot] = []
        self.end = CANARY

    def add(self, name: str, shape: tuple[int, ...], dtype: str, layout: Layout, values: np.ndarray | None = None) -> Slot:
        """Reserve memory for a tensor."""
        size = itemsize(dtype)
        first, extents = self.end, layout.base(shape)
        start = first // size + layout.offset(shape)
        base = first // size + layout.shift, None if layout.zero else tuple(extents[d] for d in layout.order)
        last = -(-(first + layout.span(shape) * size + CANARY) // CANARY) * CANARY
        slot = Slot(name, shape, dtype, layout.strides(shape), start, first - CANARY, last, base, values)
        self.slots.append(slot)
        self.end = last
        return slot

    def turns(self, names: Iterable[str], case: AnyCall, values: dict[str, np.ndarray]) -> dict[str, Slot]:
        """Reserve one array for tensors of one shape and dtype that take turns in it."""
        names = list(names)
        shape, dtype, count = case.shape(names[0]), case.dtype(names[0]), len(names)
        whole = self.add("", (*shape, count), dtype, Layout.dense(len(shape) + 1))
        self.slots.pop()
        made = {n: replace(whole, name=n, shape=shape, strides=whole.strides[:-1], start=whole.start + i, values=values.get(n))
                for i, n in enumerate(names)}  # fmt: skip
        self.slots += made.values()
        return made

    def image(self, poison: int) -> np.ndarray:
        """The arena's bytes: operands' values, and `poison` everywhere else."""
        found = _aligned(self.end)
        found.fill(poison)
        for slot in self.slots:
            if slot.values is not None and slot.values.size:
                slot.view(found)[...] = slot.values
        return found

    def damage(self, before: np.ndarray, after: np.ndarray, written: Iterable[Slot]) -> list[tuple[Slot, int]]:
        """Slots within whose range bytes changed that must not, and how many."""
        expected = before.copy()
        for slot in written:
            slot.view(expected)[...] = slot.view(after)
        if np.array_equal(expected.view(np.uint64), after.view(np.uint64)):
            return []
        changed = expected != after
        counts = [(s, int(np.count_nonzero(changed[s.first : s.last]))) for s in self.slots]
        return [(s, n) for s, n in counts if n]


def _aligned(size: int) -> np.ndarray:
    """Bytes whose address is a multiple of 256, as a GPU's allocator gives them."""
    size = -(-size // 64) * 64
    raw = np.empty(size + CANARY, np.uint8)
    shift = -raw.ctypes.data % CANARY
    return raw[shift : shift + size]


@dataclass(frozen=True)
class Placed:
    """A case in an arena: its slots by name."""

    case: AnyCall
    slots: dict[str, Slot]

    @functools.cached_property
    def written(self) -> list[Slot]:
        """The slots a call may write."""
        return [self.slots[name] for name in dict.fromkeys(self.case.targets.values())]

    def outputs(self, image: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs as they stand in an image."""
        return {n: self.slots[t].view(image) for n, t in self.case.targets.items()}


def place(arena: Arena, case: AnyCall, values: dict[str, np.ndarray]) -> Placed:
    """Reserve memory for every tensor of a case."""
    slots: dict[str, Slot] = {}
    weave = case.weave() if case.woven else {}
    for array in dict.fromkeys(a for a, _, _ in weave.values()):
        slots |= arena.turns([n for n, (a, _, _) in weave.items() if a == array], case, values)
    for name in () if case.woven else case.memory():
        shape = case.shape(name)
        slots[name] = arena.add(name, shape, case.dtype(name), case.layout(name), values.get(name))
    return Placed(case, slots)


def differing(placed: Placed, first: np.ndarray, second: np.ndarray) -> list[str]:
    """Outputs whose bits differ between two images: nondeterminism, a read of poison, or elements never written."""
    found = []
    for name, target in placed.case.targets.items():
        a, b = (placed.slots[target].view(image) for image in (first, second))
        if a.tobytes() != b.tobytes():
            bits = np.dtype(f"u{a.dtype.itemsize}")
            unequal = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
            at = tuple(int(i) for i in np.argwhere(unequal)[0])
            where = f"{placed.case.declaration.name}: {name}{list(at)}"
            found.append(f"{where} is {a[at]} or {b[at]}, by what lies around the tensors; "
                         f"{int(unequal.sum())} of {a.size} elements depend on memory that is not theirs")  # fmt: skip
    return found


class FarArena(Arena):
    """An arena of gigabytes, of which only the elements and a canary around each are ever touched.

    An image is compact: the bytes at `index`. `memory` is what they are scattered to and gathered from.
    """

    def index(self) -> np.ndarray:
        """The bytes that are looked at: every element and `CANARY // 4` bytes around it."""
        near = CANARY // 4
        found = [np.unique(s.places().ravel()[:, None] // near + np.arange(-1, 2)) for s in self.slots]
        lines = np.unique(np.concatenate(found))
        return (lines[:, None] * near + np.arange(near)).ravel()

    def compact(self, slot: Slot, index: np.ndarray) -> np.ndarray:
        """Where the bytes of a slot's elements stand in a compact image: elements by bytes."""
        return np.searchsorted(index, slot.places().ravel())[:, None] + np.arange(itemsize(slot.dtype))

    def values(self, index: np.ndarray, poison: int) -> np.ndarray:
        """A compact image: operands' values, and poison."""
        found = np.full(index.size, poison, np.uint8)
        for slot in self.slots:
            if slot.values is not None and slot.values.size:
                flat = np.ascontiguousarray(slot.values).reshape(-1, 1).view(np.uint8)
                found[self.compact(slot, index)] = flat.reshape(slot.values.size, -1)
        return found
