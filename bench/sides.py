"""Every implementation that a bench sets beside moekit's: `sides(case)` gives a maker per name.

A maker takes one set of operands and returns the call to be timed; what a peer prepares once (contiguous copies, output
buffers, weights in its own form) happens in the maker. A call returns the fusion's outputs in their order, None for one that
it does not make.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench import eager, layer
from bench.cases import EPS, Case, Operands, empty, padded
from moekit import torch as mt
from moekit.testing import others

Call = Callable[[], Any]
Maker = Callable[[Operands], Call]


def _direct(kernel: Callable, *more: object) -> Maker:
    """A function that takes the operands in their order and returns the outputs."""
    return lambda o: lambda: kernel(*o.values(), *more)


def _writing(kernel: Callable, operands: Callable[[Operands], tuple], outputs: Callable[..., tuple]) -> Maker:
    """A kernel that takes what `operands` makes of the operands and then what `outputs` makes of those, which it writes."""

    def make(o: Operands) -> Call:
        given = operands(o)
        made = outputs(*given)

        def call():
            kernel(*given, *made)
            return made

        return call

    return make


def _norms(case: Case) -> dict[str, Maker]:
    def in_place(kernel: Callable) -> Maker:
        def make(o: Operands) -> Call:
            x, residual, weight = o.values()

            def call():
                kernel(x, residual, weight, EPS, 1.0)
                return x, residual

            return call

        return make

    def quack(o: Operands) -> Call:
        weight = 1 + o["weight"].float()
        return lambda: others.quack_add_rms_norm(o["x"], o["residual"], weight, EPS, 0.0)

    return {
        "moekit": lambda o: lambda: mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"]),
        "sgl-kernel": in_place(others.sgl_add_rms_norm),
        "flashinfer": in_place(others.flashinfer_add_rms_norm),
        "flashinfer cuda": in_place(others.flashinfer_cuda_add_rms_norm),
        "liger": _direct(others.liger_add_rms_norm, EPS, 1.0),
        "quack": quack,
    }


def _silus(case: Case) -> dict[str, Maker]:
    def into(kernel: Callable, dense: bool = True) -> Maker:
        return _writing(
            kernel,
            lambda o: (o["gate_up"].contiguous() if dense else o["gate_up"],),
            lambda x: (empty(x, x.shape[0], x.shape[1] // 2),),
        )

    def ours(x: torch.Tensor, out: torch.Tensor) -> None:
        mt.silu_and_mul(x, out=out)

    return {
        "moekit": into(ours, dense=False),
        "moekit, contiguous": into(ours),
        "flashinfer": into(others.flashinfer_silu_and_mul),
        "sgl-kernel": into(others.sgl_silu_and_mul),
        "liger": _direct(others.liger_silu_and_mul),
    }


def _topks(case: Case) -> dict[str, Maker]:
    k = case.params["k"]

    def buffers(x: torch.Tensor, *_: torch.Tensor) -> tuple:
        return empty(x, len(x), k, dtype=torch.float32), empty(x, len(x), k, dtype=torch.int32)

    def ours(logits: torch.Tensor, *out: torch.Tensor) -> None:
        mt.topk_softmax(logits, k, out=out)

    def sgl(logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        others.sgl_topk_softmax(logits, weights, ids, True)

    def vllm(logits: torch.Tensor, source: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        others.vllm_topk_softmax(logits, weights, ids, source, True)

    def dense(o: Operands) -> tuple:
        return (o["logits"].contiguous(),)

    return {
        "moekit": _writing(ours, lambda o: (o["logits"],), buffers),
        "sgl-kernel": _writing(sgl, dense, buffers),
        "vllm": _writing(vllm, lambda o: (*dense(o), buffers(o["logits"])[1]), buffers),
    }


def product(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """x · weightᵀ by cuBLAS, into a buffer of its own."""
    out, turned = empty(x, x.shape[0], weight.shape[0]), weight.T
    return lambda: torch.mm(x, turned, out=out)


def _gemms(case: Case) -> dict[str, Maker]:
    def ours(o: Operands) -> Call:
        out = empty(o["x"], o["x"].shape[0], o["packed"].shape[0])
        return lambda: mt.gate_gemm(o["x"], o["packed"], out=out)

    def three(o: Operands) -> Call:
        widths = [len(o["packed"]) - padded(513), 512, 1]
        each = [product(o["x"], w.contiguous()) for w in o["packed"][: sum(widths)].split(widths)]
        return lambda: [gemm() for gemm in each]

    return {"moekit": ours, "cublas padded": lambda o: product(o["x"], o["packed"]), "three gemms": three}


def _projections(case: Case) -> dict[str, Maker]:
    def padded(o: Operands) -> Call:
        gemm, first = product(o["x"], layer.packed(o)["packed"].weight), o["gate_up"].shape[0]
        return lambda: (None, gemm()[:, first : first + o["router"].shape[0]], None)

    def flashinfer(o: Operands) -> Call:
        """The product alone, then FlashInfer on a contiguous buffer: what it would cost if its columns were one already."""
        gemm, gate_up = padded(o), empty(o["x"], o["x"].shape[0], o["gate_up"].shape[0]).normal_()
        out = empty(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)

        def call():
            made = gemm()
            others.flashinfer_silu_and_mul(gate_up, out)
            return made

        return call

    return {"moekit": _direct(mt.gate_projections), "cublas padded + flashinfer": flashinfer, "cublas padded": padded}


def _blocks(case: Case) -> dict[str, Maker]:
    def side(one: layer.Layer) -> Maker:
        def make(o: Operands) -> Call:
            given = layer.packed(o)
            return lambda: one(given, case.params["k"], case.part)

        return make

    return {name: side(one) for name, one in layer.layers().items()}


def _downs(case: Case) -> dict[str, Maker]:
    combine = eager.compiled(eager.scaled_sum)

    def cublas(o: Operands) -> Call:
        gemm = product(o["activated"], o["down"])
        return lambda: combine(o["hidden"], gemm(), o["share"])

    return {"moekit": _direct(mt.down_combine_), "cublas + torch.compile": cublas}


def _deltas(case: Case) -> dict[str, Maker]:
    def flashinfer(dtype: torch.dtype) -> Maker:
        """Its states are [T, V, Dv, Dk] and stay so."""

        def make(o: Operands) -> Call:
            *given, state = o.values()
            own = state.transpose(-1, -2).contiguous().to(dtype)
            out = torch.empty_like(o["v"])

            def call():
                others.flashinfer_delta_rule_step(*given, own, out)
                return out, own.transpose(-1, -2)

            return call

        return make

    return {
        "moekit": _direct(mt.delta_rule_step_),
        "fla": _direct(others.fla_delta_rule_step),
        "flashinfer": flashinfer(torch.float32),
        "flashinfer, bfloat16 state": flashinfer(torch.bfloat16),
    }


SIDES: dict[str, Callable[[Case], dict[str, Maker]]] = {
    "add_rms_norm": _norms,
    "silu_and_mul": _silus,
    "topk_softmax": _topks,
    "shared_expert_combine": lambda case: {"moekit": _direct(mt.shared_expert_combine_)},
    "gate_gemm": _gemms,
    "gate_projections": _projections,
    "gate_block": _blocks,
    "moe_block": _blocks,
    "down_combine": _downs,
    "gated_rms_norm": lambda case: {"moekit": _direct(mt.gated_rms_norm), "fla": _direct(others.fla_gated_rms_norm, EPS)},
    "delta_rule_step": _deltas,
}


def sides(case: Case, compiled: bool = True) -> dict[str, Maker]:
    """Every side of a case by name: moekit first, then peers, `eager`, and with `compiled` `torch.compile` of the same."""
    torch._dynamo.reset()
    if case.fusion not in SIDES:
        return {"moekit": _direct(getattr(mt, case.fusion))}
    found = SIDES[case.fusion](case)
    if not case.part:  # whose layers have both already
        plain = functools.partial(getattr(eager, case.fusion), **case.params)
        found["eager"] = _direct(plain)
        if case.fusion != "gate_gemm":
            found["torch.compile"] = _direct(eager.compiled(plain))
    return found if compiled else {n: m for n, m in found.items() if "torch.compile" not in n}
