"""Every implementation that a bench sets beside moekit's: `sides(case)` gives a maker per name.

A maker takes one set of operands and returns the call to be timed; what a peer prepares once (contiguous copies, output
buffers, weights in its own form) happens in the maker. A call returns the fusion's outputs in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench import eager
from bench.cases import EPILOGUE, Case, Operands
from moekit import torch as mt
from moekit.errors import UnavailableError
from moekit.testing import others

Call = Callable[[], Any]
Maker = Callable[[Operands], Call]

EPS = 1e-6


def empty(t: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An output buffer on t's device."""
    return torch.empty(*shape, dtype=dtype or t.dtype, device=t.device)


def _topk_buffers(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return empty(logits, logits.shape[0], k, dtype=torch.float32), empty(logits, logits.shape[0], k, dtype=torch.int32)


def _norms() -> dict[str, Maker]:
    def in_place(kernel) -> Maker:
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
        "liger": lambda o: lambda: others.liger_add_rms_norm(o["x"], o["residual"], o["weight"], EPS, 1.0),
        "quack": quack,
    }


def _silus() -> dict[str, Maker]:
    def into(kernel, dense: bool) -> Maker:
        def make(o: Operands) -> Call:
            gate_up = o["gate_up"].contiguous() if dense else o["gate_up"]
            out = empty(gate_up, gate_up.shape[0], gate_up.shape[1] // 2)

            def call():
                kernel(gate_up, out)
                return out

            return call

        return make

    return {
        "moekit": into(lambda x, out: mt.silu_and_mul(x, out=out), False),
        "moekit, contiguous": into(lambda x, out: mt.silu_and_mul(x, out=out), True),
        "flashinfer": into(others.flashinfer_silu_and_mul, True),
        "sgl-kernel": into(others.sgl_silu_and_mul, True),
        "liger": lambda o: lambda: others.liger_silu_and_mul(o["gate_up"]),
    }


def _topks(case: Case) -> dict[str, Maker]:
    k = case.params["k"]

    def ours(o: Operands) -> Call:
        out = _topk_buffers(o["logits"], k)
        return lambda: mt.topk_softmax(o["logits"], k, out=out)

    def sgl(o: Operands) -> Call:
        logits, (weights, ids) = o["logits"].contiguous(), _topk_buffers(o["logits"], k)

        def call():
            others.sgl_topk_softmax(logits, weights, ids, True)
            return weights, ids

        return call

    def vllm(o: Operands) -> Call:
        logits, (weights, ids) = o["logits"].contiguous(), _topk_buffers(o["logits"], k)
        source = torch.empty_like(ids)

        def call():
            others.vllm_topk_softmax(logits, weights, ids, source, True)
            return weights, ids

        return call

    return {"moekit": ours, "sgl-kernel": sgl, "vllm": vllm}


def parts(o: Operands, case: Case) -> list[torch.Tensor]:
    """The three weights inside a packed one, each as a tensor of its own."""
    widths = case.widths
    return [p.contiguous() for p in o["packed"].split([*widths, o["packed"].shape[0] - sum(widths)])[:3]]


def _gemms(case: Case) -> dict[str, Maker]:
    def ours(o: Operands) -> Call:
        out = empty(o["x"], o["x"].shape[0], o["packed"].shape[0])
        return lambda: mt.gate_gemm(o["x"], o["packed"], out=out)

    def cublas(o: Operands) -> Call:
        out, weight = empty(o["x"], o["x"].shape[0], o["packed"].shape[0]), o["packed"].T
        return lambda: torch.mm(o["x"], weight, out=out)

    def three(o: Operands) -> Call:
        weights = [w.T for w in parts(o, case)]
        outs = [empty(o["x"], o["x"].shape[0], w.shape[1]) for w in weights]

        def call():
            for w, out in zip(weights, outs, strict=True):
                torch.mm(o["x"], w, out=out)
            return outs

        return call

    return {"moekit": ours, "cublas padded": cublas, "three gemms": three}


def _epilogues(case: Case) -> dict[str, Maker]:
    def ours(o: Operands) -> Call:
        gemm, packed = gate_act(), mt.pack_gate(*parts(o, case))
        return lambda: gemm(o["x"], packed)

    def cublas(o: Operands) -> Call:
        """The product alone, then FlashInfer on a contiguous buffer: what it would cost if its columns were one already."""
        gemm, gate_up = (
            _gemms(case)["cublas padded"](o),
            torch.randn_like(o["x"][:, :1]).expand(-1, case.widths[0]).contiguous(),
        )
        out = empty(gate_up, gate_up.shape[0], case.widths[0] // 2)

        def call():
            gemm()
            others.flashinfer_silu_and_mul(gate_up, out)

        return call

    def product(o: Operands) -> Call:
        gemm = _gemms(case)["cublas padded"](o)
        return lambda: (gemm(), None)[1]  # what there is to compare is in no output of its own

    return {"moekit": ours, "cublas padded + flashinfer": cublas, "cublas padded": product}


def gate_act() -> Callable:
    """moekit's gate GEMM with its epilogue, called with rows and a packed gate."""
    if not hasattr(mt, EPILOGUE):
        raise UnavailableError(f"moekit.torch has no {EPILOGUE}")
    return getattr(mt, EPILOGUE)


def _blocks(case: Case) -> dict[str, Maker]:
    k = case.params["k"]

    def ours(o: Operands) -> Call:
        packed = mt.pack_gate(*parts(o, case))

        def call():
            x, residual = mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"])
            got = mt.gate_gemm(x, packed)
            return residual, mt.silu_and_mul(got.gate_up), *mt.topk_softmax(got.router_logits, k), got.shared_gate

        return call

    def fused(o: Operands) -> Call:
        gemm, packed = gate_act(), mt.pack_gate(*parts(o, case))

        def call():
            x, residual = mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"])
            active, logits, gate = gemm(x, packed)[:3]
            return residual, active, *mt.topk_softmax(logits, k), gate

        return call

    def sequence(norm, one: bool) -> Maker:
        def make(o: Operands) -> Call:
            x, tokens = o["x"], o["x"].shape[0]
            weights = [o["packed"].T] if one else [w.T for w in parts(o, case)]
            outs = [empty(x, tokens, w.shape[1]) for w in weights]
            gate_up, logits = empty(x, tokens, case.widths[0]), empty(x, tokens, case.widths[1])
            if not one:
                gate_up, logits = outs[:2]
            active, (values, ids) = empty(x, tokens, case.widths[0] // 2), _topk_buffers(x, k)
            middle = case.widths[0] + case.widths[1]

            def call():
                norm(x, o["residual"], o["weight"], EPS, 1.0)
                for w, out in zip(weights, outs, strict=True):
                    torch.mm(x, w, out=out)
                gate = outs[-1]
                if one:
                    gate_up.copy_(outs[0][:, : case.widths[0]])
                    logits.copy_(outs[0][:, case.widths[0] : middle])
                    gate = outs[0][:, middle : middle + 1]
                others.flashinfer_silu_and_mul(gate_up, active)
                others.sgl_topk_softmax(logits, values, ids, True)
                return o["residual"], active, values, ids, gate

            return call

        return make

    return {
        "moekit": ours,
        "moekit, epilogue": fused,
        "peers: sgl norm, three gemms": sequence(others.sgl_add_rms_norm, False),
        "peers: sgl norm, one padded gemm": sequence(others.sgl_add_rms_norm, True),
        "peers: flashinfer norm, three gemms": sequence(others.flashinfer_add_rms_norm, False),
        "peers: flashinfer norm, one padded gemm": sequence(others.flashinfer_add_rms_norm, True),
    }


def _others(case: Case) -> dict[str, Maker]:
    def fla_norm(o: Operands) -> Call:
        return lambda: others.fla_gated_rms_norm(o["x"], o["z"], o["weight"], EPS)

    if case.fusion == "shared_expert_combine":
        return {"moekit": lambda o: lambda: mt.shared_expert_combine_(o["hidden"], o["shared"], o["gate"])}
    if case.fusion == "gated_rms_norm":
        return {"moekit": lambda o: lambda: mt.gated_rms_norm(*o.values()), "fla": fla_norm}
    return {
        "moekit": lambda o: lambda: mt.delta_rule_step_(*o.values()),
        "fla": lambda o: lambda: others.fla_delta_rule_step(*o.values()),
    }


def sides(case: Case, compiled: bool = True) -> dict[str, Maker]:
    """Every side of a case by name: moekit first, then peers, `eager`, and with `compiled` `torch.compile` of the same."""
    table = {
        "add_rms_norm": _norms, "silu_and_mul": _silus, "topk_softmax": lambda: _topks(case), "gate_gemm": lambda: _gemms(case),
        "gate_epilogue": lambda: _epilogues(case), "gate_block": lambda: _blocks(case),
    }  # fmt: skip
    found = table.get(case.fusion, lambda: _others(case))()
    plain = getattr(eager, case.fusion)
    fixed = dict(case.params) | ({"widths": case.widths} if case.fusion in ("gate_epilogue", "gate_block") else {})
    plain = functools.partial(plain, **fixed) if fixed else plain
    found["eager"] = lambda o: lambda: plain(*o.values())
    if compiled and case.fusion != "gate_gemm":
        torch._dynamo.reset()
        fast = eager.compiled(plain)
        found["torch.compile"] = lambda o: lambda: fast(*o.values())
    return found
