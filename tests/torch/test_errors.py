"""Wrong input: one sentence that names operator, tensor, what came and what is needed, and nothing written before it."""

import numpy as np
import pytest
import torch

import moekit.torch as mt
from moekit.compile.schedule import Schedule
from moekit.errors import (
    AliasError,
    DeclarationError,
    DeviceError,
    DtypeError,
    MoekitError,
    ScheduleError,
    ShapeError,
    UnavailableError,
)
from moekit.jax import op as jax_op
from moekit.lang import In, cast, f32, fusion


def operands():
    return torch.randn(4, 16), torch.randn(4, 16), torch.randn(16)


X, RESIDUAL, WEIGHT = operands()
STATE = (
    torch.randn(2, 2, 4), torch.randn(2, 2, 4), torch.randn(2, 4, 8), torch.randn(2, 4), torch.randn(2, 4),
    torch.randn(4), torch.randn(4),
)  # fmt: skip

REFUSALS = {
    "device mix": (
        lambda: mt.add_rms_norm(X, RESIDUAL.to("meta"), WEIGHT),
        DeviceError,
        "add_rms_norm: residual is on meta but x is on cpu; move them to one device",
    ),
    "dtype that is not served": (
        lambda: mt.silu_and_mul(X.double()),
        DtypeError,
        "silu_and_mul: gate_up is torch.float64; it must be one of float32, float16",
    ),
    "dtype mix": (
        lambda: mt.delta_rule_step(*STATE, torch.randn(2, 4, 4, 8).half()),
        DtypeError,
        "delta_rule_step: state is float16; it must be float32",
    ),
    "dtype of an output": (
        lambda: mt.silu_and_mul(X, out=torch.empty(4, 8, dtype=torch.float16)),
        DtypeError,
        "silu_and_mul: out for out is torch.float16; it must be torch.float32",
    ),
    "dtypes of packed weights": (
        lambda: mt.pack_gate(torch.randn(8, 4), torch.randn(6, 4).bfloat16(), torch.randn(1, 4)),
        ShapeError,
        "gate_gemm: router is bfloat16 but its input is float32; they must match",
    ),
    "wrong rank": (
        lambda: mt.silu_and_mul(torch.randn(2, 4, 16)),
        ShapeError,
        r"silu_and_mul: gate_up has shape \[2, 4, 16\]; it must have 2 dimensions \[T, 2\*I\]",
    ),
    "wrong size": (
        lambda: mt.add_rms_norm(X, RESIDUAL, WEIGHT[:8]),
        ShapeError,
        r"add_rms_norm: weight has shape \[8\]; it must be \[H = 16\]",
    ),
    "more tokens than a kernel counts": (
        lambda: mt.silu_and_mul(torch.empty(3 * 10**9, 16, device="meta")),
        ShapeError,
        "^silu_and_mul: axis T has 3000000000 elements; kernels count to 2146435072, so split the call",
    ),
    "odd width": (
        lambda: mt.silu_and_mul(torch.randn(2, 7)),
        ShapeError,
        r"silu_and_mul: gate_up has 7 elements in dimension 1; it must be 2\*I",
    ),
    "empty last axis": (
        lambda: mt.add_rms_norm(torch.randn(4, 0), torch.randn(4, 0), torch.randn(0)),
        ShapeError,
        r"add_rms_norm: x has shape \[4, 0\]; axis H must have an element; only T may be 0",
    ),
    "non-tensor": (
        lambda: mt.silu_and_mul(np.zeros((2, 4), np.float32)),
        MoekitError,
        "silu_and_mul: gate_up is ndarray; it must be a torch.Tensor",
    ),
    "non-tensor output": (
        lambda: mt.silu_and_mul(X, out=3),
        MoekitError,
        "silu_and_mul: out for out is int; it must be a torch.Tensor",
    ),
    "sparse tensor": (
        lambda: mt.silu_and_mul(X.to_sparse()),
        MoekitError,
        "silu_and_mul: gate_up has layout torch.sparse_coo; it must be strided, so call to_dense",
    ),
    "tensor that negates lazily": (
        lambda: mt.silu_and_mul(torch.randn(2, 4, dtype=torch.complex64).conj().imag),
        MoekitError,
        "silu_and_mul: gate_up is a view that negates lazily; its memory is needed, so call resolve_neg",
    ),
    "shape of an output": (
        lambda: mt.silu_and_mul(X, out=torch.empty(4, 9)),
        ShapeError,
        r"silu_and_mul: out for out has shape \[4, 9\]; it must be \[4, 8\]",
    ),
    "number of outputs": (
        lambda: mt.silu_and_mul(X, out=(torch.empty(4, 8), torch.empty(4, 8))),
        ShapeError,
        r"silu_and_mul: out has 2 entries; it needs 1 \(out\)",
    ),
    "output with one address for many elements": (
        lambda: mt.silu_and_mul(X, out=torch.empty(1, 8).expand(4, 8)),
        AliasError,
        "silu_and_mul: out for out has several elements at one address",
    ),
    "output over an operand": (
        lambda: mt.silu_and_mul(X, out=X[:, :8]),
        AliasError,
        "silu_and_mul: out for out overlaps gate_up; pass other memory, or a copy of gate_up",
    ),
    "output over another": (
        lambda: mt.add_rms_norm(X, RESIDUAL, WEIGHT, out=(OUT, OUT)),
        AliasError,
        "add_rms_norm: out for out overlaps out for residual; pass separate memory",
    ),
    "in place on operands that overlap": (
        lambda: mt.add_rms_norm_(RESIDUAL, RESIDUAL, WEIGHT),
        AliasError,
        "add_rms_norm_: out for residual overlaps x",
    ),
    "gradient of an updated operand": (
        lambda: mt.add_rms_norm_(X, RESIDUAL.clone().requires_grad_(), WEIGHT),
        MoekitError,
        "add_rms_norm_: out for residual requires grad, which a form that writes to residual cannot record",
    ),
    "gradient of another operand": (
        lambda: mt.add_rms_norm_(X, RESIDUAL, WEIGHT.clone().requires_grad_()),
        MoekitError,
        "add_rms_norm_: weight requires grad, which a form that writes to residual cannot record",
    ),
    "unknown implementation": (
        lambda: mt.silu_and_mul(X, implementation="cuda"),
        UnavailableError,
        "silu_and_mul: there is no implementation 'cuda' for PyTorch; choose triton or eager",
    ),
    "implementation that cannot serve": (
        lambda: mt.silu_and_mul(X, implementation="triton"),
        UnavailableError,
        "silu_and_mul: gate_up is on cpu; Triton needs CUDA tensors, so use implementation='eager'",
    ),
    "tensor as a parameter": (
        lambda: mt.add_rms_norm(X, RESIDUAL, WEIGHT, torch.tensor(1e-6)),
        TypeError,
        "add_rms_norm: eps must be a Python number, bool or str, got Tensor",
    ),
    "operand left out": (lambda: mt.add_rms_norm(X, RESIDUAL), TypeError, r"^add_rms_norm\(\) missing .* 'weight'"),
    "operand of the form in place left out": (
        lambda: mt.add_rms_norm_(X, RESIDUAL),
        TypeError,
        r"^add_rms_norm_\(\) missing .* 'weight'",
    ),
    "wrong size in place": (
        lambda: mt.add_rms_norm_(X, RESIDUAL, WEIGHT[:8]),
        ShapeError,
        r"^add_rms_norm_: weight has shape \[8\]; it must be \[H = 16\]",
    ),
    "wrong size in place, by the operator": (
        lambda: torch.ops.moekit.add_rms_norm_(X, RESIDUAL, WEIGHT[:8]),
        ShapeError,
        r"^add_rms_norm_: weight has shape \[8\]",
    ),
    "wrong size in place, on fake tensors": (
        lambda: torch.ops.moekit.add_rms_norm_(*(x.to("meta") for x in (X, RESIDUAL, WEIGHT[:8]))),
        ShapeError,
        r"^add_rms_norm_: weight has shape \[8\]",
    ),
    "parameter in place": (
        lambda: mt.add_rms_norm_(X, RESIDUAL, WEIGHT, eps="small"),
        TypeError,
        "^add_rms_norm_: eps must be float, got str 'small'",
    ),
    "implementation in place": (
        lambda: mt.add_rms_norm_(X, RESIDUAL, WEIGHT, implementation="triton"),
        UnavailableError,
        "^add_rms_norm_: x is on cpu",
    ),
    "gradient by the operator": (
        lambda: torch.ops.moekit.add_rms_norm_(X, RESIDUAL.clone().requires_grad_(), WEIGHT),
        MoekitError,
        "^add_rms_norm_: .* requires grad",
    ),
    "text for a schedule": (
        lambda: mt.silu_and_mul(X, schedule="tile:T:1 whole:I:8"),
        ScheduleError,
        "^silu_and_mul: schedule is str; it must be a Schedule, which Schedule.parse makes of text",
    ),
    "something else for a schedule": (
        lambda: mt.add_rms_norm_(X, RESIDUAL, WEIGHT, schedule={"T": 1}, implementation="eager"),
        ScheduleError,
        "^add_rms_norm_: schedule is dict; it must be a Schedule",
    ),
    "schedule under a transform": (
        lambda: torch.vmap(lambda x: mt.silu_and_mul(x, schedule=3))(X[None]),
        ScheduleError,
        "^silu_and_mul: schedule is int; it must be a Schedule",
    ),
    "schedule of another fusion": (
        lambda: mt.silu_and_mul(X, schedule=Schedule.parse("tile:T:1 whole:H:16")),
        ScheduleError,
        "^silu_and_mul: the schedule must say once what is done with axis I",
    ),
    "output that negates lazily": (
        lambda: mt.silu_and_mul(X, out=torch._neg_view(torch.empty(4, 8))),
        MoekitError,
        "^silu_and_mul: out for out is a view that negates lazily",
    ),
    "operand that negates lazily, updated": (
        lambda: mt.add_rms_norm_(X, torch._neg_view(RESIDUAL), WEIGHT),
        MoekitError,
        "^add_rms_norm_: residual is a view that negates lazily",
    ),
    "parameter that is not there": (
        lambda: mt.silu_and_mul(X, eps=1),
        TypeError,
        r"silu_and_mul\(\) got an unexpected keyword argument 'eps'",
    ),
    "more chosen than there are": (lambda: mt.topk_softmax(X, 17), MoekitError, "17.*16|16.*17"),
}  # fmt: skip
OUT = torch.empty(4, 16)


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusal(case):
    call, kind, message = REFUSALS[case]
    before = [x.clone() for x in (X, RESIDUAL, WEIGHT, *STATE)]
    with pytest.raises(kind, match=message) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert all(torch.equal(a, b) for a, b in zip((X, RESIDUAL, WEIGHT, *STATE), before, strict=True))


def test_outputs_given_with_a_wrong_one_stay_as_they_were():
    first, second = torch.full((4, 16), 7.0), torch.full((4, 15), 7.0)
    with pytest.raises(ShapeError):
        mt.add_rms_norm(X, RESIDUAL, WEIGHT, out=(first, second))
    assert (first == 7).all()


def test_parameters_that_require_grad_are_served_without_grad():
    weight = torch.nn.Parameter(WEIGHT.clone())
    with torch.no_grad():
        out, residual = mt.add_rms_norm_(X, RESIDUAL.clone(), weight)
    assert not out.requires_grad
    assert not residual.requires_grad


def test_lazily_negated_tensors_by_the_short_way(emulated):
    """A call like one that was served, but for the bit: refused, and not read as if it were not set."""
    for _ in range(3):
        mt.silu_and_mul(X, implementation="triton")
    assert emulated.short
    with pytest.raises(MoekitError, match="negates lazily"):
        mt.silu_and_mul(torch._neg_view(X), implementation="triton")


@pytest.mark.parametrize("names", [("call", "results"), ("serve", "traced"), ("is_compiling", "make"), ("_eps", "len")])
def test_operands_may_be_called_as_they_like(names):
    """No name in what is generated around a declaration is taken from it."""
    a, b = names
    scope = {"f32": f32, "cast": cast}
    exec(f"def product({a}, {b}, *, eps=2.0):\n    return cast(f32({a}) * f32({b}) + eps, {a}.dtype)", scope)
    face = mt.op(fusion(None, **{a: In("T H"), b: In("T H")})(scope["product"]))
    assert torch.equal(face(X, RESIDUAL), X * RESIDUAL + 2)
    assert torch.equal(face(X, RESIDUAL, eps=1.0), X * RESIDUAL + 1)


@pytest.mark.parametrize("name", ["out", "implementation", "schedule"])
def test_names_that_every_function_has(name):
    scope = {"f32": f32}
    exec(f"def twice({name}):\n    return f32({name}) * 2.0", scope)
    declared = fusion(None, **{name: In("T H")})(scope["twice"])
    for op in (mt.op, jax_op):
        with pytest.raises(DeclarationError, match=f"^twice: '{name}' is a keyword of every function"):
            op(declared)
