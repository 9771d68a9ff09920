"""Routed experts by other packages, for bench/experts.py: a maker per side takes the weights and returns the call to be timed.

What a peer prepares once, weights in its own order above all, happens in the maker; sorting is part of the call. Each calls the
package's own entry, which looks up its file of tuned sizes for the shape and the GPU, if it brings one.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from moekit.errors import UnavailableError
from moekit.testing import others

Call = Callable[[Any], torch.Tensor]
VLLM = "vllm.model_executor.layers.fused_moe"
SGLANG = "sglang.srt.layers.moe.moe_runner"
BLOCK = [128, 128]  # float8 weights that share a scale, rows and columns


def vllm(layer: Any) -> Call:
    """vLLM's Triton experts: `fused_experts`, with its alignment of blocks, activation and sum from its CUDA library."""
    fused, down = others.module(f"{VLLM}.fused_moe"), layer.down.transpose(1, 2).contiguous()
    return lambda c: fused.fused_experts(c.x, layer.gate_up, down, c.weights, c.ids)


def vllm_float8(layer: Any) -> Call:
    """The same of float8 weights; x and the activations become float8, with a scale for each 128 of a row."""
    fused, config = others.module(f"{VLLM}.fused_moe"), others.module(f"{VLLM}.config")
    scales = {"w1_scale": _gate_up_scale(layer), "w2_scale": layer.down_scale, "block_shape": BLOCK}
    kind = config.fp8_w8a8_moe_quant_config(**scales)
    return lambda c: fused.fused_experts(c.x, layer.gate_up, layer.down, c.weights, c.ids, quant_config=kind)


@functools.lru_cache(maxsize=1)
def _sglang() -> tuple[Any, Any]:
    """SGLang's Triton experts and their settings, as one process without a server has them: defaults, and a group of one."""
    fused = others.module(f"{SGLANG}.triton_utils.fused_moe")
    others.module("sglang.srt.runtime_context").get_context().override_server_args().install()
    fused.get_tp_group = lambda: types.SimpleNamespace(world_size=1)
    return fused, others.module(SGLANG).MoeRunnerConfig


def _sglang_call(gate_up: torch.Tensor, down: torch.Tensor, **float8: Any) -> Call:
    fused, config = _sglang()
    one = config(num_experts=len(down), num_local_experts=len(down), inplace=False)
    return lambda c: fused.fused_experts(c.x, gate_up, down, (c.weights, c.ids, None), one, **float8)


def sglang(layer: Any) -> Call:
    """SGLang's Triton experts: `fused_experts`, with sglang-kernel's alignment of blocks and sum."""
    return _sglang_call(layer.gate_up, layer.down.transpose(1, 2).contiguous())


def sglang_float8(layer: Any) -> Call:
    """The same of float8 weights; x and the activations become float8, as vLLM's do."""
    scales = {"w1_scale": _gate_up_scale(layer), "w2_scale": layer.down_scale, "block_shape": BLOCK}
    return _sglang_call(layer.gate_up, layer.down, use_fp8_w8a8=True, **scales)


def _gate_up_scale(layer: Any) -> torch.Tensor:
    """The scales of gate_up if they are those of one matrix of 2I rows."""
    if (width := layer.down.shape[2]) % BLOCK[0]:
        raise UnavailableError(f"a scale is of 128 rows of gate_up, which {width} of gate and {width} of up do not fill")
    return layer.gate_up_scale


@triton.jit
def _silu_and_mul(tile):
    gate, up = tl.split(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 2, 2)))
    return gate / (1 + tl.exp(-gate)) * up


def triton_kernels(layer: Any) -> Call:
    """Triton's triton_kernels as vLLM brings and routes them: two `matmul_ogs`, silu·up in the first one's epilogue.

    vLLM's changes are a routing from ids and one whose number of experts a token need not be a power of two.
    """
    own = others.module(f"{VLLM}.experts.gpt_oss_triton_kernels_moe")
    if not hasattr(own, "matmul_ogs"):
        raise UnavailableError("vllm brings no triton_kernels that load")
    experts = len(layer.down)
    one = layer.gate_up.view(experts, 2, -1, layer.gate_up.shape[-1]).transpose(1, 2).flatten(1, 2)  # gate and up in turn
    gate_up = one.transpose(1, 2).contiguous()
    activation = own.FusedActivation(own.FnSpecs("silu_and_mul", _silu_and_mul, ()), (), 2)

    def call(c: Any) -> torch.Tensor:
        routed, gather, scatter = own.make_routing_data(c.ids, c.weights, experts)
        each = own.matmul_ogs(c.x, gate_up, None, routed, gather_indx=gather, fused_activation=activation)
        return own.matmul_ogs(each, layer.down, None, routed, scatter_indx=scatter, gammas=routed.gate_scal)

    return call


DENSE = {"vllm": vllm, "sglang": sglang, "triton_kernels": triton_kernels}
FLOAT8 = {"vllm": vllm_float8, "sglang": sglang_float8}
