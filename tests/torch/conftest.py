"""Triton without a GPU: kernels executed by the interpreter of the tile IR, entered through the same doors."""

import ctypes
from math import prod

import numpy as np
import pytest

from moekit.compile.tile import interpret
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import numpy_dtype
from moekit.lang.spec import Dim
from tests.sizes import sizes_of


class Emulated:
    """Stands in for a `triton.jit` function: it counts what Triton would compile, and runs the program on CPU memory."""

    def __init__(self, program, jit, log: "Log"):
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime.jit import create_function_from_signature

        self.program, self.log = program, log
        backend = CUDABackend(GPUTarget("cuda", 90, 32))
        self.specialise = create_function_from_signature(jit.signature, jit.params, backend)

    def __getitem__(self, grid):
        def front_door(*args, **options):
            key = (self.program, str(self.specialise(*args, **options)[1]))
            self.log.compiled.add(key)
            self.log.front += 1
            self._execute(*(x.data_ptr() if hasattr(x, "data_ptr") else x for x in args))
            return CompiledKernel(self)

        return front_door

    def _execute(self, *args) -> None:
        from moekit.backends import triton as emitter

        sizes, strides, pointers = {}, {}, {}
        for argument, value in zip(emitter.arguments(self.program), args, strict=True):
            if argument.kind == "pointer":
                pointers[argument.subject] = value
            elif argument.kind == "extent":
                sizes[argument.subject] = value
            else:
                strides[argument.subject, argument.dim] = value * argument.unit
        memory = {p.name: self._array(p, pointers[p.name], sizes, strides) for p in self.program.params}
        interpret.execute(self.program, memory, sizes)

    def _array(self, param, pointer: int, sizes: dict, strides: dict) -> np.ndarray:
        dtype = numpy_dtype(param.dtype)
        axes = {a.name: sizes.get(a.name, a.extent) for a in self.program.axes}
        shape = tuple(1 if a is None else axes[a] if a in axes else Dim.parse(a).size(axes) for a in param.axes)
        steps = tuple(strides.get((param.name, d), 1) for d in range(len(shape)))
        if not prod(shape):
            return np.empty(shape, dtype)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True))
        raw = (ctypes.c_byte * (span * dtype.itemsize)).from_address(pointer)
        flat = np.frombuffer(raw, dtype)
        flat.flags.writeable = True
        return np.lib.stride_tricks.as_strided(flat, shape, tuple(s * dtype.itemsize for s in steps))


class CompiledKernel:
    """Stands in for Triton's compiled kernel, with what the short way asks of it."""

    def __init__(self, emulated: Emulated):
        self.emulated = emulated
        self.function, self.packed_metadata = 1, (4, 1, 0)

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        """Triton's launcher: grid, stream, handles, hooks, then addresses, integers and whether launches may overlap."""
        assert (y, z, function, metadata) == (1, 1, self.function, self.packed_metadata)
        self.emulated.log.short += 1
        *plain, overlap = args
        assert overlap is False
        self.emulated._execute(*plain)


class Log:
    """What was compiled, and how often each door was used."""

    def __init__(self):
        self.compiled: set = set()
        self.front = self.short = 0


@pytest.fixture
def emulated(monkeypatch) -> Log:
    """CPU tensors served by `implementation="triton"`, on the interpreter."""
    from moekit.torch import fast, launch, ops

    log, made, original = Log(), {}, launch.kernel
    monkeypatch.setattr(launch, "_known", {})
    monkeypatch.setattr(launch, "unavailable", lambda tensors: None)
    monkeypatch.setattr(launch, "kernel", lambda p: made.setdefault(p, Emulated(p, original(p), log)))
    monkeypatch.setattr(fast, "current_device", lambda: None)
    monkeypatch.setattr(fast, "raw_stream", lambda device: 0)
    forms = [form for known in ops._registered.values() for form in known.forms.values()]
    for form in forms:
        monkeypatch.setattr(form, "cache", fast.Cache())
    return log


AXES = {"T": 5, "D": 32, "P": 24, "I": 24, "E": 16, "H": 24, "H?": 1, "V": 4, "K": 2, "Dk": 8, "Dv": 16, "G": 3, "Q": 6,
        "L": 20, "C": 24, "S": 3, "R": 4, "N": 8, "J": 16, "M": 2, "Cq": 5, "Ck": 5, "Cv": 5, "Lr": 4, "Lc": 4}  # fmt: skip
PARAMS = {
    "topk_softmax": {"k": 4},
    "gate_topk": {"k": 4},
    "scaled_gate_topk": {"k": 4},
    "moe_align": {"experts": 6, "block": 4},
}
ROUNDED = ("quantised", "quantised_experts")  # to float8, which has no derivative


@pytest.fixture
def tensors():
    """`tensors(name, dtype, layout, device, seed)`: operands of a fusion, in declared order, in the layout."""
    from moekit.testing import as_torch, operands

    def make(name, dtype="float32", layout="dense", device="cpu", seed=0, sizes=None):
        values = operands(FUSIONS[name], sizes or sizes_of(FUSIONS[name], AXES), dtype, seed=seed)
        return tuple(as_torch(x, layout, device) for x in values.values())

    return make


@pytest.fixture(params=list(FUSIONS))
def fused(request):
    """Every fusion's name in turn."""
    return request.param


@pytest.fixture
def smooth(fused) -> None:
    """The fusion of this test has an operand with derivatives."""
    if fused in ROUNDED or not any("float32" in spec.dtypes for spec in FUSIONS[fused].tensors.values()):
        pytest.skip(f"{fused} has no operand with derivatives")


@pytest.fixture
def params(fused) -> dict:
    """The parameters the fusion of this test needs."""
    return PARAMS.get(fused, {})
