"""A Plan on torch tensors: kernels compiled from emitted source and launched through Triton."""

from __future__ import annotations

import linecache
from collections.abc import Mapping
from functools import lru_cache

import torch

from moekit.backends import triton as emitter
from moekit.compile import tile as t
from moekit.compile.plan import Plan
from moekit.errors import ShapeError, UnavailableError

LARGEST_GRID = 2**31 - 1


@lru_cache(maxsize=4096)
def kernel(program: t.TileProgram):
    """The `triton.jit` function of a program, made from its emitted source."""
    source = emitter.emit(program)
    filename = f"<moekit triton {program.name} {program.digest} {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    names: dict = {"__name__": f"moekit_generated_{program.name}"}
    exec(compile(source, filename, "exec"), names)
    return names[emitter.kernel_name(program)]


def layout(tensor: torch.Tensor, axes: tuple[str | None, ...], dynamic: frozenset[str]) -> t.Strided:
    """What is known of a tensor's strides: which are 1, which a multiple of 16 bytes, whether offsets need 64 bits."""
    kinds, reach = [], 0
    itemsize = tensor.element_size()
    for size, stride, axis in zip(tensor.shape, tensor.stride(), axes, strict=True):
        if stride == 1 or (size == 1 and axis not in dynamic):
            kinds.append("unit")
        else:
            kinds.append("aligned" if stride * itemsize % 16 == 0 and stride < 2**31 else "any")
        if axis not in dynamic:
            reach += max(0, size - 1) * stride
    return t.Strided(tuple(kinds), wide=reach >= 2**31)


def launch(plan: Plan, tensors: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Run every program of a plan on the current stream of the tensors' device; outputs are written in place."""
    device = next(iter(tensors.values())).device
    memory = dict(tensors)
    for s in plan.scratch:
        memory[s.name] = torch.empty(s.shape(sizes), dtype=getattr(torch, s.dtype), device=device)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _programs(plan, memory, sizes)
    else:
        _programs(plan, memory, sizes)


def _programs(plan: Plan, memory: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    for program in plan.programs:
        count = program.programs(sizes)
        if count > LARGEST_GRID:
            raise ShapeError(f"{program.name}: {count} programs are more than one launch can have ({LARGEST_GRID}); split the tokens")
        if count:
            args = [_argument(a, memory, sizes) for a in emitter.arguments(program)]
            kernel(program)[(count,)](*args, num_warps=program.warps, num_stages=program.stages)


def _argument(a: emitter.Argument, memory: Mapping[str, torch.Tensor], sizes: Mapping[str, int]):
    if a.kind == "pointer":
        return memory[a.subject]
    if a.kind == "extent":
        return sizes[a.subject]
    return memory[a.subject].stride(a.dim) // a.unit


def unavailable(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """None if Triton can serve these tensors here, else why not."""
    try:
        import triton
    except ImportError:
        return "triton is not installed; install moekit[torch]"
    on_cpu = [n for n, x in tensors.items() if x.device.type != "cuda"]
    if on_cpu and not triton.knobs.runtime.interpret:
        return f"{on_cpu[0]} is on {tensors[on_cpu[0]].device.type}; Triton needs CUDA tensors, so use implementation='eager'"
    return None


def require_available(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise UnavailableError if Triton cannot serve these tensors here."""
    if why := unavailable(tensors):
        raise UnavailableError(f"{name}: {why}")
