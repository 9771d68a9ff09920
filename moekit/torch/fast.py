"""Calls seen before, by exact layout: the way from a Python function to a launched kernel, with nothing left to decide.

The first call with a layout binds, checks, plans and launches through Triton's own front door. What came of it is kept: which
compiled kernels run, with which integers, on which tensors' pointers, and what is to be allocated. A later call with the same
shapes, strides, dtypes, device, alignment and parameters compares addresses (they alone may differ), allocates and launches.
Triton's compiled-kernel interface is not public; where it is missing, every call takes the front door.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch

from moekit.torch.launch import Launch

MOST_ENTRIES = 4096
PLAIN = (torch.Tensor, torch.nn.Parameter)
current_device = torch.cuda.current_device
raw_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
empty, empty_like = torch.empty, torch.empty_like
increment_version = torch.autograd.graph.increment_version


@dataclass(frozen=True)
class Ready:
    """A compiled kernel, ready to go: `pick` takes its pointers out of the list of all, `rest` are its other arguments.

    `kernel` is held for its code alone, which Triton unloads with it (from 3.8 on).
    """

    kernel: object
    run: Any
    function: object
    metadata: object
    count: int
    pick: Callable[[list[int]], tuple]
    rest: tuple[int, ...]


@dataclass(frozen=True)
class Fresh:
    """A tensor to allocate: like tensor `like` (None: of `shape` and `dtype` on `device`)."""

    like: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


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

    def find(self, tensors: Sequence[torch.Tensor], static: tuple) -> tuple[Entry | None, list[int], bool]:
        """The entry that serves these tensors (None if there is none yet), their addresses, and whether any requires grad."""
        key, pointers, grad = self.key(tensors, static)
        slot = self.slots.get(key)
        return (None if slot is None else slot.entry(pointers)), pointers, grad

    @staticmethod
    def key(tensors: Sequence[torch.Tensor], static: tuple) -> tuple[tuple, list[int], bool]:
        """What decides which entry serves, addresses, and whether any requires grad.

        Raises TypeError for anything but plain tensors, RuntimeError for those without an address (under vmap).
        """
        key, pointers, grad = [static], [], False
        for x in tensors:
            if type(x) not in PLAIN or x.is_neg():
                raise TypeError(f"{type(x).__name__} is no plain tensor")
            pointer = x.data_ptr()
            pointers.append(pointer)
            key.append((pointer & 15, x.get_device(), x.dtype, x.shape, x.stride()))
            grad = grad or x.requires_grad
        return tuple(key), pointers, grad

    def keep(self, tensors: Sequence[torch.Tensor], static: tuple, near: tuple, entry: Entry) -> None:
        """Remember what a call of this layout came to."""
        key, pointers, _ = self.key(tensors, static)
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
    every = list(tensors)
    for f in entry.fresh:
        made = empty(f.shape, dtype=f.dtype, device=f.device) if f.like is None else empty_like(tensors[f.like])
        every.append(made)
        pointers.append(made.data_ptr())
    if not entry.ready:
        pass  # nothing to launch: no tokens
    elif entry.device == current_device():
        _launch(entry, pointers)
    else:
        with torch.cuda.device(entry.device):
            _launch(entry, pointers)
    if entry.written:
        increment_version([every[i] for i in entry.written])
    return tuple([every[i] for i in entry.results])


def _launch(entry: Entry, pointers: list[int]) -> None:
    stream = raw_stream(entry.device)
    for r in entry.ready:
        r.run(r.count, 1, 1, stream, r.function, r.metadata, None, None, None, *r.pick(pointers), *r.rest)


class _Watch:
    """Triton's hooks on launches: only its own front door calls them."""

    runtime = None

    @classmethod
    def usable(cls) -> bool:
        """Whether the hooks are where they are looked for; called before anything is remembered."""
        if cls.runtime is None:
            from triton import knobs

            hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
            if not all(hasattr(h, "calls") for h in hooks):
                return False
            cls.runtime = knobs.runtime
        return True


def watched() -> bool:
    """Whether a profiler listens to Triton's launches."""
    runtime = _Watch.runtime
    return bool(runtime is not None and (runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls))


def ready(one: Launch, compiled: object, order: Sequence[str], device: torch.device) -> Ready | None:
    """A launch as it can be repeated; None if this Triton's compiled kernels are not as expected."""
    parts = [getattr(compiled, name, None) for name in ("run", "function", "packed_metadata")]
    if any(p is None for p in parts) or raw_stream is None or not _Watch.usable():
        return None
    at = [order.index(n) for n in one.pointers]
    pick = itemgetter(*at) if len(at) > 1 else lambda pointers, i=at[0]: (pointers[i],)
    run, function, metadata = parts
    return Ready(compiled, run, function, metadata, one.count, pick, (*one.integers, one.overlaps(device)))
