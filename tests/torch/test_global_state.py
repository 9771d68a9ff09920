"""What torch lets a program set for all operations changes no result: values and derivatives, against the references."""

import contextlib

import pytest
import torch

import moekit.torch as mt
from moekit.fusions import FUSIONS

from .derivatives import Differences, as_tuple, close

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {
    "gate_gemm": {"T": 24, "D": 64, "P": 40},
    "gate_projections": {"T": 24, "D": 64, "I": 24, "E": 40, "G": 1},
    "down_combine": {"T": 24, "H": 40, "I": 64, "H?": 1},
    "delta_rule_step": {"T": 3, "K": 2, "V": 4, "Dk": 16, "Dv": 24},
}
STATES = {}


def state(make):
    """A context of a device's type, as a case of the tests."""
    STATES[make.__name__] = contextlib.contextmanager(make)
    return make


@state
def autocast_to_bfloat16(device):
    with torch.autocast(device, dtype=torch.bfloat16):
        yield


@state
def autocast_to_float16(device):
    with torch.autocast(device, dtype=torch.float16):
        yield


@state
def medium_precision(device):
    """TF32 on a GPU, bfloat16 on a CPU."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@state
def narrow_reductions(device):
    cuda = torch.backends.cuda.matmul
    kept = cuda.allow_bf16_reduced_precision_reduction, cuda.allow_fp16_reduced_precision_reduction
    cuda.allow_tf32 = cuda.allow_bf16_reduced_precision_reduction = cuda.allow_fp16_reduced_precision_reduction = True
    try:
        yield
        assert cuda.allow_tf32
    finally:
        cuda.allow_tf32 = False
        cuda.allow_bf16_reduced_precision_reduction, cuda.allow_fp16_reduced_precision_reduction = kept


@state
def default_dtype_float64(device):
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@state
def default_dtype_bfloat16(device):
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@state
def default_device_meta(device):
    with torch.device("meta"):
        yield


@state
def deterministic(device):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def gradients(call, loss, operands) -> list:
    """Of autograd: first ones, and those of their inner product with themselves."""
    roots = [x.clone().requires_grad_() for x in operands]
    first = torch.autograd.grad(loss(as_tuple(call(*roots))), roots, create_graph=True)
    return [first, torch.autograd.grad(sum(g.square().sum() for g in first), roots, allow_unused=True)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", list(STATES))
@pytest.mark.parametrize("name", list(SIZES))
def test_values_and_derivatives(tensors, name, setting, device):
    """float32 in, float32 out: forwards, backwards, twice backwards, tangents and mapped."""
    operands = tensors(name, sizes=SIZES[name], device=device)
    wanted = Differences(name, operands, {})
    v, face = wanted.directions(operands), mt.op(FUSIONS[name])
    twice = gradients(face, wanted.scalar, operands)[1]
    with STATES[setting](device):
        outs = as_tuple(face(*operands))
        assert [x.dtype for x in outs] == [torch.float32] * len(outs)
        close(outs, wanted.outputs())
        close(torch.func.jvp(lambda *xs: as_tuple(face(*xs)), operands, v)[1], wanted.tangents())
        close([x[1] for x in as_tuple(torch.vmap(lambda *xs: face(*xs))(*(torch.stack([x, x]) for x in operands)))],
              wanted.outputs())  # fmt: skip
        first, second = gradients(face, wanted.scalar, operands)
        pulled = torch.func.grad(lambda *xs: wanted.scalar(as_tuple(face(*xs))), tuple(range(len(v))))(*operands)
    for found in (first, pulled):
        close([sum((g * y).sum() for g, y in zip(found, v, strict=True))], [wanted.first()], 1e-3)
    for a, b in zip(second, twice, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            close([a], [b.detach().cpu().double()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", ["autocast_to_bfloat16", "medium_precision"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled(tensors, setting, backend, device):
    """Compiled and run inside the setting, backward pass included."""
    torch._dynamo.reset()
    operands = tensors("gate_projections", sizes=SIZES["gate_projections"], device=device)
    wanted = Differences("gate_projections", operands, {})
    with STATES[setting](device):
        call = torch.compile(lambda *xs: mt.gate_projections(*xs), fullgraph=True, backend=backend)
        roots = [x.clone().requires_grad_() for x in operands]
        outs = call(*roots)
        found = torch.autograd.grad(wanted.scalar(outs), roots)
    close(outs, wanted.outputs())
    assert [x.dtype for x in outs] == [torch.float32] * 3
    close([sum((g * y).sum() for g, y in zip(found, wanted.directions(operands), strict=True))], [wanted.first()], 1e-3)


def test_a_precision_that_was_inherited_stays_so(tensors):
    """A call leaves torch's settings as they were: the one for all backends goes on to decide."""
    every, products = torch.backends, torch.backends.mkldnn.matmul
    kept, products.fp32_precision, every.fp32_precision = products.fp32_precision, "none", "bf16"
    try:
        mt.gate_gemm(*tensors("gate_gemm"), implementation="eager")
        assert products.fp32_precision == "bf16"
        every.fp32_precision = "ieee"
        assert products.fp32_precision == "ieee"
    finally:
        every.fp32_precision, products.fp32_precision = "none", kept
