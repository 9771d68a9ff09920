"""Kernels of other packages as plain functions on tensors, loaded at their first call: what `peers` fuzzes and `bench` times.

Each raises UnavailableError where its package is not installed, and asks for contiguous operands unless it says otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from moekit.errors import UnavailableError


def installed(package: str) -> bool:
    """Whether a package can be imported; nothing is imported for it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


@functools.lru_cache(maxsize=32)
def module(name: str) -> Any:
    """An imported module of a package that must be installed."""
    if not installed(package := name.partition(".")[0]):
        raise UnavailableError(f"{package} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not load is as good as none
        raise UnavailableError(f"{name} does not load: {type(error).__name__}: {error}".splitlines()[0]) from None


@functools.lru_cache(maxsize=8)
def _operators(package: str, library: str) -> Any:
    """`torch.ops.PACKAGE` of a shared library in a package, without importing the package, which would load much else."""
    import torch

    if not installed(package):
        raise UnavailableError(f"{package} is not installed")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / library).is_file():
            try:
                torch.ops.load_library(path)
            except OSError as error:
                raise UnavailableError(f"{package}: {library} does not load: {error}".splitlines()[0]) from None
            return torch.ops
    raise UnavailableError(f"{package}: there is no {library} in it")


def sgl() -> Any:
    """`torch.ops.sgl_kernel` of sgl-kernel's library for sm_90."""
    return _operators("sgl_kernel", "sm90/common_ops.abi3.so").sgl_kernel


def vllm_moe() -> Any:
    """`torch.ops._moe_C` of vLLM."""
    return _operators("vllm", "_moe_C.abi3.so")._moe_C


def flashinfer_add_rms_norm(x, residual, weight, eps: float, offset: float) -> None:
    """x becomes the norm, residual the sum; rows may have any stride. The default of the package: CuTe kernels if they load."""
    norm = module("flashinfer.norm")
    (norm.gemma_fused_add_rmsnorm if offset else norm.fused_add_rmsnorm)(x, residual, weight, eps, enable_pdl=True)


@functools.lru_cache(maxsize=1)
def flashinfer_cuda() -> Any:
    """FlashInfer's CUDA norms, compiled at the first call if the package brings none."""
    return module("flashinfer.jit.norm").gen_norm_module().build_and_load()


def flashinfer_cuda_add_rms_norm(x, residual, weight, eps: float, offset: float) -> None:
    """The same by the package's CUDA kernels (what FLASHINFER_USE_CUDA_NORM=1 chooses)."""
    norm = flashinfer_cuda()
    (norm.gemma_fused_add_rmsnorm if offset else norm.fused_add_rmsnorm)(x, residual, weight, eps, True)


def flashinfer_silu_and_mul(gate_up, out) -> None:
    """out = silu(gate)·up."""
    module("flashinfer.activation").silu_and_mul(gate_up, out=out, enable_pdl=True)


def sgl_add_rms_norm(x, residual, weight, eps: float, offset: float) -> None:
    """x becomes the norm, residual the sum; with programmatic dependent launch."""
    ops = sgl()
    (ops.gemma_fused_add_rmsnorm if offset else ops.fused_add_rmsnorm)(x, residual, weight, eps, True)


def sgl_silu_and_mul(gate_up, out) -> None:
    """out = silu(gate)·up."""
    sgl().silu_and_mul(out, gate_up)


def sgl_topk_softmax(logits, weights, ids, renormalize: bool) -> None:
    """weights float32 [T, k] and ids int32 [T, k] of the k largest."""
    sgl().topk_softmax(weights, ids, logits, renormalize, 0.0, None)


def vllm_topk_softmax(logits, weights, ids, source, renormalize: bool) -> None:
    """The same by vLLM; `source` int32 [T, k] is a third output, the row numbers that its other kernels want."""
    vllm_moe().topk_softmax(weights, ids, source, logits, renormalize, None)


def liger_add_rms_norm(x, residual, weight, eps: float, offset: float) -> tuple[Any, Any]:
    """out, residual; rows may have any stride. Gemma's casting: everything of the rounded sum in float32."""
    forward = module("liger_kernel.ops.fused_add_rms_norm").fused_add_rms_norm_forward
    return forward(x, residual, weight, eps, offset, "gemma")[:2]


def liger_silu_and_mul(gate_up) -> Any:
    """silu(gate)·up, with silu rounded before the product; rows may have any stride."""
    return module("liger_kernel.ops.swiglu").swiglu_fused_gate_up_forward(gate_up)[1]


def quack_add_rms_norm(x, residual, weight, eps: float, offset: float) -> tuple[Any, Any]:
    """out, residual; QuACK has no offset, so the weight must carry it."""
    if offset:
        raise UnavailableError("quack: its norm has no offset; give it 1 + weight and offset 0")
    return module("quack.rmsnorm").rmsnorm_fwd(x, weight, residual=residual, eps=eps)[:2]


def fla_gated_rms_norm(x, z, weight, eps: float) -> Any:
    """rms_norm(x)·weight·silu(z) of [T, V, D], unrounded inside."""
    forward = module("fla.modules.norm.fused_norm_gate").layer_norm_gated_fwd
    shape = x.shape
    return forward(x.view(-1, shape[-1]), z.view(-1, shape[-1]), weight, None, "swish", eps, is_rms_norm=True)[0].view(shape)


def fla_delta_rule_step(q, k, v, a, b, A_log, dt_bias, state) -> tuple[Any, Any]:
    """out, state: its recurrent kernel over a sequence of one, gates and normalisation inside; its eps is 1e-6."""
    step = module("fla.ops.gated_delta_rule.fused_recurrent").fused_recurrent_gated_delta_rule_fwd
    q, k, v, a, b = (t.unsqueeze(1) for t in (q, k, v, a, b))
    inside = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "output_final_state": True}
    out, state = step(
        q, k, v, g=a, beta=b, A_log=A_log, dt_bias=dt_bias, scale=q.shape[-1] ** -0.5, initial_state=state, **inside
    )
    return out.squeeze(1), state


def flashinfer_delta_rule_step(q, k, v, a, b, A_log, dt_bias, state, out) -> None:
    """out and state by its decode kernel of CuTe; state is [T, V, Dv, Dk] in float32 or bfloat16, A_log and dt_bias float32."""
    step = module("flashinfer.gdn_decode").gated_delta_rule_decode_pretranspose
    q, k, v, a, b, out = (t.unsqueeze(1) for t in (q, k, v, a, b, out))
    step(q, k, v, state, A_log, a, dt_bias, b, q.shape[-1] ** -0.5, out, use_qk_l2norm=True)
