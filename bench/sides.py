"""Every implementation that a bench sets beside moekit's: `sides(case)` gives a maker per name.

A maker takes one set of operands and returns the call to be timed; what a peer prepares once (contiguous copies, output
buffers, weights in its own form) happens in the maker. A call returns the fusion's outputs in their order, None for one that
it does not make, and then the router's weights and ids where the case goes on to that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from bench import eager
from bench.cases import Case, Operands
from moekit import torch as mt
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


def product(x: torch.Tensor, weight: torch.Tensor) -> Call:
    """x · weightᵀ by cuBLAS, into a buffer of its own."""
    out, turned = empty(x, x.shape[0], weight.shape[0]), weight.T
    return lambda: torch.mm(x, turned, out=out)


def _gemms(case: Case) -> dict[str, Maker]:
    def ours(o: Operands) -> Call:
        out = empty(o["x"], o["x"].shape[0], o["packed"].shape[0])
        return lambda: mt.gate_gemm(o["x"], o["packed"], out=out)

    def three(o: Operands) -> Call:
        each = [product(o["x"], w.contiguous()) for w in o["packed"][: sum(case.widths)].split(list(case.widths))]
        return lambda: [gemm() for gemm in each]

    return {"moekit": ours, "cublas padded": lambda o: product(o["x"], o["packed"]), "three gemms": three}


def gates(o: Operands) -> list[torch.Tensor]:
    """The three weights of a gate."""
    return [o[n] for n in ("gate_up", "router", "shared_gate")]


def _projections() -> dict[str, Maker]:
    def padded(o: Operands) -> Call:
        gemm, first = product(o["x"], mt.pack_gate(*gates(o)).weight), o["gate_up"].shape[0]
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

    ours = lambda o: lambda: mt.gate_projections(*o.values())  # noqa: E731
    return {"moekit": ours, "cublas padded + flashinfer": flashinfer, "cublas padded": padded}


def _blocks(case: Case) -> dict[str, Maker]:
    k = case.k

    def ours(o: Operands) -> Call:
        packed = mt.pack_gate(*gates(o))

        def call():
            x, residual = mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"])
            got = mt.gate_gemm(x, packed)
            logits = got.router_logits
            return x, residual, mt.silu_and_mul(got.gate_up), logits, None, *mt.topk_softmax(logits, k)

        return call

    def epilogue(o: Operands) -> Call:
        def call():
            x, residual = mt.add_rms_norm_(o["x"], o["residual"], o["weight"], out=o["x"])
            active, logits, share = mt.gate_projections(x, *gates(o))
            return x, residual, active, logits, share, *mt.topk_softmax(logits, k)

        return call

    return {
        "moekit": ours,
        "moekit, epilogue": epilogue,
        "peers: sgl norm, three gemms": _sequence(others.sgl_add_rms_norm, k, False),
        "peers: sgl norm, one padded gemm": _sequence(others.sgl_add_rms_norm, k, True),
        "peers: flashinfer norm, three gemms": _sequence(others.flashinfer_add_rms_norm, k, False),
        "peers: flashinfer norm, one padded gemm": _sequence(others.flashinfer_add_rms_norm, k, True),
    }


def _sequence(norm: Callable, k: int, one: bool) -> Maker:
    """A gate block of peers' kernels: `norm`, cuBLAS, FlashInfer's activation, sgl-kernel's router.

    `one`: a padded product and copies of its columns in place of three. The sigmoid is left to whoever combines.
    """

    def make(o: Operands) -> Call:
        x, tokens, (wide, experts) = o["x"], o["x"].shape[0], (o["gate_up"].shape[0], o["router"].shape[0])
        products = [product(x, w) for w in ([mt.pack_gate(*gates(o)).weight] if one else gates(o))]
        gate_up, logits = empty(x, tokens, wide), empty(x, tokens, experts)
        active, (values, ids) = empty(x, tokens, wide // 2), _topk_buffers(x, k)

        def call():
            norm(x, o["residual"], o["weight"], EPS, 1.0)
            outs = [gemm() for gemm in products]
            if one:
                gate_up.copy_(outs[0][:, :wide])
                logits.copy_(outs[0][:, wide : wide + experts])
            first, second = (gate_up, logits) if one else outs[:2]
            others.flashinfer_silu_and_mul(first, active)
            others.sgl_topk_softmax(second, values, ids, True)
            return x, o["residual"], active, second, None, values, ids

        return call

    return make


def _downs() -> dict[str, Maker]:
    combine = eager.compiled(eager.scaled_sum)

    def cublas(o: Operands) -> Call:
        gemm = product(o["activated"], o["down"])
        return lambda: combine(o["hidden"], gemm(), o["share"])

    return {"moekit": lambda o: lambda: mt.down_combine_(*o.values()), "cublas + torch.compile": cublas}


def _others(case: Case) -> dict[str, Maker]:
    def fla_norm(o: Operands) -> Call:
        return lambda: others.fla_gated_rms_norm(o["x"], o["z"], o["weight"], EPS)

    if case.fusion == "shared_expert_combine":
        return {"moekit": lambda o: lambda: mt.shared_expert_combine_(o["hidden"], o["shared"], o["gate"])}
    if case.fusion == "expert_down":
        return {"moekit": lambda o: lambda: mt.expert_down(*o.values())}
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
        "gate_projections": _projections, "gate_block": lambda: _blocks(case), "down_combine": _downs,
    }  # fmt: skip
    torch._dynamo.reset()
    found = table.get(case.fusion, lambda: _others(case))()
    plain = getattr(eager, case.fusion)
    fixed = {**case.params, **({"k": case.k} if case.k else {})}
    plain = functools.partial(plain, **fixed) if fixed else plain
    found["eager"] = lambda o: lambda: plain(*o.values())
    if compiled and case.fusion != "gate_gemm":
        fast = eager.compiled(plain)
        found["torch.compile"] = lambda o: lambda: fast(*o.values())
    return found if compiled else {n: m for n, m in found.items() if "torch.compile" not in n}
