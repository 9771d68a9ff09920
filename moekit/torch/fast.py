"""Calls seen before, by exact layout: the way from a Python function to a launched kernel, with nothing left to decide.

The first call with a layout binds, checks, plans and launches through Triton's own front door. What came of it is kept: which
compiled kernels run, with which integers, on which tensors' pointers, and what is to be allocated. A later call with the same
shapes, strides, dtypes, device, alignment and parameters compares addresses (they alone may differ), allocates and launches.
Triton's compiled-kernel interface is not public; where it is missing, every call takes the front door.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter

import torch

from moekit.torch.launch import Launch

MOST_ENTRIES = 4096
PLAIN = (torch.Tensor, torch.nn.Parameter)
current_device = torch.cuda.current_device
raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


@dataclass(frozen=True)
class Ready:
    """A compiled kernel, ready to go: `pick` takes its pointers out of the list of all pointers."""

    run: Callable
    function: object
    metadata: object
    count: int
    pick: Callable[[list[int]], tuple]
    integers: tuple[int, ...]


@dataclass(frozen=True)
class Fresh:
    """A tensor to allocate: like tensor `like` (None: of `shape` and `dtype` on `device`)."""

    like: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def make(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Uninitialised, contiguous memory."""
        if self.like is not None:
            return torch.empty_like(tensors[self.like])
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Entry:
    """All that a call of one layout needs. Tensors are counted: those given, then fresh ones (outputs, then scratch)."""

    device: int | None
    ready: tuple[Ready, ...]
    fresh: tuple[Fresh, ...]
    results: tuple[int, ...]
    written: tuple[int, ...]


@dataclass
class Slot:
    """The entries of one layout: where nothing written meets another tensor, and by distance where something does.

    `near`: pairs (written, other, bytes that written spans, bytes that other spans). Ranges of addresses that meet need not
    share an element (two column halves of a buffer): the full check has allowed each distance that is here.
    """

    near: tuple[tuple[int, int, int, int], ...]
    apart: Entry | None = None
    meeting: dict[tuple, Entry] = field(default_factory=dict)

    def distances(self, pointers: Sequence[int]) -> tuple | None:
        """None if no pair's ranges meet, else the distance of each pair whose ranges do."""
        found, meet = [], False
        for i, j, span, other in self.near:
            a, b = pointers[i], pointers[j]
            close = a < b + other and b < a + span
            meet |= close
            found.append(a - b if close else None)
        return tuple(found) if meet else None

    def entry(self, pointers: Sequence[int]) -> Entry | None:
        """The entry for tensors at these addresses."""
        distances = self.distances(pointers) if self.near else None
        return self.apart if distances is None else self.meeting.get(distances)


class Cache:
    """What is remembered of one form of one fusion."""

    def __init__(self):
        self.slots: dict[tuple, Slot] = {}

    def find(self, tensors: Sequence[torch.Tensor], static: tuple) -> tuple[Entry | None, list[int]]:
        """The entry that serves these tensors, and their addresses; None if there is none yet."""
        key, pointers = self.key(tensors, static)
        slot = self.slots.get(key)
        return (None if slot is None else slot.entry(pointers)), pointers

    @staticmethod
    def key(tensors: Sequence[torch.Tensor], static: tuple) -> tuple[tuple, list[int]]:
        """What decides which entry serves, and addresses.

        Raises TypeError for anything but plain tensors, RuntimeError for those without an address (under vmap).
        """
        key, pointers = [static], []
        for x in tensors:
            if type(x) not in PLAIN:
                raise TypeError(f"{type(x).__name__} is no plain tensor")
            pointer = x.data_ptr()
            pointers.append(pointer)
            key += (x.shape, x.stride(), x.dtype, x.get_device(), pointer & 15)
        return tuple(key), pointers

    def keep(self, tensors: Sequence[torch.Tensor], static: tuple, near: tuple, entry: Entry) -> None:
        """Remember what a call of this layout came to."""
        key, pointers = self.key(tensors, static)
        if len(self.slots) >= MOST_ENTRIES:
            self.slots.clear()
        slot = self.slots.setdefault(key, Slot(near))
        distances = slot.distances(pointers)
        if distances is None:
            slot.apart = entry
        else:
            slot.meeting[distances] = entry


def launch(entry: Entry, tensors: Sequence[torch.Tensor], pointers: list[int]) -> tuple[torch.Tensor, ...]:
    """Allocate what is fresh, launch the kernels on the current stream, and return the outputs."""
    every = [*tensors, *(f.make(tensors) for f in entry.fresh)]
    pointers += [x.data_ptr() for x in every[len(tensors) :]]
    if not entry.ready or entry.device == current_device():
        _launch(entry, pointers)
    else:
        with torch.cuda.device(entry.device):
            _launch(entry, pointers)
    for i in entry.written:
        torch.autograd.graph.increment_version(every[i])
    return tuple([every[i] for i in entry.results])


def _launch(entry: Entry, pointers: list[int]) -> None:
    if not entry.ready:
        return
    stream = raw_stream(entry.device)
    for r in entry.ready:
        r.run(r.count, 1, 1, stream, r.function, r.metadata, None, None, None, *r.pick(pointers), *r.integers)


@lru_cache(maxsize=1)
def _runtime():
    from triton import knobs

    return knobs.runtime


def watched() -> bool:
    """Whether a profiler listens to Triton's launches, which only its own front door tells it of."""
    enter, leave = _runtime().launch_enter_hook, _runtime().launch_exit_hook
    return bool(getattr(enter, "calls", enter)) or bool(getattr(leave, "calls", leave))


def ready(one: Launch, compiled: object, order: Sequence[str]) -> Ready | None:
    """A launch as it can be repeated; None if this Triton's compiled kernels are not as expected."""
    parts = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
    if any(p is None for p in parts) or raw_stream is None:
        return None
    at = [order.index(n) for n in one.pointers]
    pick = itemgetter(*at) if len(at) > 1 else lambda pointers, i=at[0]: (pointers[i],)
    return Ready(*parts, one.count, pick, one.integers)
