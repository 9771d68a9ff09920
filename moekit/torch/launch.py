"""A Plan on torch tensors: kernels compiled from emitted source and launched through Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from moekit.backends import triton as emitter
from moekit.backends.loaded import load
from moekit.compile import tile as t
from moekit.compile.plan import Plan
from moekit.compile.tile.layouts import strided
from moekit.errors import ShapeError, UnavailableError

LARGEST_GRID = 2**31 - 1
MOST_KNOWN = 8192


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `count` programs, the tensors whose pointers it takes, then its integer arguments.

    `dependent`: whether its schedule says so.
    """

    program: t.Kernel
    count: int
    pointers: tuple[str, ...]
    integers: tuple[int, ...]
    dependent: bool

    def overlaps(self, device: torch.device) -> bool:
        """Whether it is a programmatic dependent launch: where the schedule says so, and the device has them."""
        return self.dependent and overlapping(device)


@lru_cache(maxsize=4096)
def kernel(program: t.Kernel):
    """The `triton.jit` function of a program, made from its emitted source."""
    return load("triton", program.name, emitter.emit(program), program.digest)[emitter.kernel_name(program)]


_known: dict[int, tuple[t.Kernel, Any, tuple[emitter.Argument, ...]]] = {}


def known(program: t.Kernel) -> tuple[t.Kernel, Any, tuple[emitter.Argument, ...]]:
    """A program with its kernel and the kernel's arguments, found by identity: hashing a program takes longer than a launch."""
    found = _known.get(id(program))
    if found is None or found[0] is not program:
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        found = _known[id(program)] = (program, kernel(program), emitter.arguments(program))
    return found


def strides_of(tensor: torch.Tensor, axes: Sequence[str | None], dynamic: frozenset[str]) -> tuple[int, ...]:
    """The strides a kernel is told: the tensor's own, and for a single element of a dynamic axis a dense tensor's.

    What stride one element has does not matter, and T = 1 shall need no kernel of its own.
    """
    shape = tensor.shape
    return tuple(
        prod(shape[d + 1 :]) if shape[d] == 1 and axes[d] in dynamic else stride for d, stride in enumerate(tensor.stride())
    )


def layout(tensor: torch.Tensor, axes: tuple[str | None, ...], dynamic: frozenset[str]) -> t.Strided:
    """What is known of a tensor's strides: which are 1, which a multiple of 16 bytes, whether offsets need 64 bits."""
    return strided(tensor.shape, strides_of(tensor, axes, dynamic), axes, dynamic, tensor.element_size())


def scratch(plan: Plan, sizes: Mapping[str, int], device: torch.device) -> dict[str, torch.Tensor]:
    """Fresh memory for what one launch of a plan leaves to the next."""
    return {s.name: torch.empty(s.shape(sizes), dtype=getattr(torch, s.dtype), device=device) for s in plan.scratch}


def launches(
    plan: Plan, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int], dynamic: frozenset[str]
) -> tuple[Launch, ...]:
    """The launches of a plan on tensors (scratch among them); those of no programs are left out.

    Raises ShapeError if there are more programs than one launch can have.
    """
    found = []
    for program, how in zip(plan.programs, plan.schedule.launches, strict=True):
        count = program.programs(dict(sizes))
        if count > LARGEST_GRID:
            most = f"more than one launch can have ({LARGEST_GRID})"
            raise ShapeError(f"{program.name}: {count} programs are {most}; split the tokens")
        arguments = known(program)[2]
        strides = {p.name: strides_of(tensors[p.name], p.axes, dynamic) for p in program.params}
        integers = tuple(
            sizes[a.subject] if a.kind == "extent" else strides[a.subject][a.dim] // a.unit
            for a in arguments
            if a.kind != "pointer"
        )
        pointers = tuple(a.subject for a in arguments if a.kind == "pointer")
        if count:
            found.append(Launch(program, count, pointers, integers, how.dependent))
    return tuple(found)


def start(launched: Sequence[Launch], tensors: Mapping[str, torch.Tensor], device: torch.device) -> list:
    """Run launches in order on the current stream of `device`; the compiled kernels come back (None if interpreted)."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return [_start(one, tensors) for one in launched]
    return [_start(one, tensors) for one in launched]


def _start(one: Launch, tensors: Mapping[str, torch.Tensor]):
    pointers = [tensors[n] for n in one.pointers]
    overlap = one.overlaps(pointers[0].device)
    options = {"num_warps": one.program.warps, "num_stages": one.program.stages, "PDL": overlap}
    if overlap:
        options["launch_pdl"] = True
    return known(one.program)[1][(one.count,)](*pointers, *one.integers, **options)


@lru_cache(maxsize=64)
def overlapping(device: torch.device) -> bool:
    """Whether kernels can be launched with programmatic dependent launch: on NVIDIA GPUs of compute capability 9.0 and later.

    Kernels wait for the one before them before they read or write anything: nothing changes but when a launch's cost is paid.
    """
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def unavailable(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """None if Triton can serve these tensors here, else why not."""
    try:
        from triton import knobs
    except ImportError:
        return "triton is not installed; install moekit[torch]"
    on_cpu = [n for n, x in tensors.items() if x.device.type != "cuda"]
    if on_cpu and not knobs.runtime.interpret:
        where = tensors[on_cpu[0]].device.type
        return f"{on_cpu[0]} is on {where}; Triton needs CUDA tensors, so use implementation='eager'"
    return None


def require_available(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UnavailableError if Triton cannot serve these tensors here."""
    if why := unavailable(tensors):
        raise UnavailableError(f"{name}: {why}")
