"""The PyTorch face: fusions as functions on tensors of any strides, and as `torch.ops.moekit.*`."""

from moekit.errors import MissingExtraError as _MissingExtraError

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as _missing:
    if _missing.name != "torch":
        raise
    raise _MissingExtraError("moekit.torch: torch is not installed; install moekit[torch]", name="torch") from None

from moekit.fusions import FUSIONS as _FUSIONS
from moekit.fusions.packing import gate_refusal
from moekit.torch.channel import Channel
from moekit.torch.face import IMPLEMENTATIONS, op
from moekit.torch.ops import register

for _fusion in _FUSIONS.values():
    register(_fusion)

from moekit.torch.gate import GateOutputs, PackedGate, gate_gemm, pack_gate, split_gate  # noqa: E402
from moekit.torch.huggingface import PatchReport, patch, unpatch  # noqa: E402
from moekit.torch.warm import Warmed, warmup  # noqa: E402

silu_and_mul = op(_FUSIONS["silu_and_mul"])
topk_softmax = op(_FUSIONS["topk_softmax"])
unit_lower_inverse = op(_FUSIONS["unit_lower_inverse"])
shared_expert_combine = op(_FUSIONS["shared_expert_combine"])
shared_expert_combine_ = op(_FUSIONS["shared_expert_combine"], in_place=True)
add_rms_norm = op(_FUSIONS["add_rms_norm"])
add_norm_gate_projections = op(_FUSIONS["add_norm_gate_projections"])
all_reduce_add_rms_norm = op(_FUSIONS["all_reduce_add_rms_norm"])
all_reduce_add_rms_norm_ = op(_FUSIONS["all_reduce_add_rms_norm"], in_place=True)
add_rms_norm_ = op(_FUSIONS["add_rms_norm"], in_place=True)
gated_rms_norm = op(_FUSIONS["gated_rms_norm"])
causal_conv1d_step = op(_FUSIONS["causal_conv1d_step"])
causal_conv1d_step_ = op(_FUSIONS["causal_conv1d_step"], in_place=True)
conv_projections = op(_FUSIONS["conv_projections"])
conv_projections_ = op(_FUSIONS["conv_projections"], in_place=True)
delta_rule_chunks = op(_FUSIONS["delta_rule_chunks"])
delta_rule_chunks_ = op(_FUSIONS["delta_rule_chunks"], in_place=True)
delta_rule_step = op(_FUSIONS["delta_rule_step"])
delta_rule_step_ = op(_FUSIONS["delta_rule_step"], in_place=True)
gate_projections = op(_FUSIONS["gate_projections"])
gate_topk = op(_FUSIONS["gate_topk"])
down_combine = op(_FUSIONS["down_combine"])
expert_gate_up = op(_FUSIONS["expert_gate_up"])
expert_down = op(_FUSIONS["expert_down"])
expert_down_shared = op(_FUSIONS["expert_down_shared"])
qkv_norm_rope = op(_FUSIONS["qkv_norm_rope"])
qkv_norm_rope_ = op(_FUSIONS["qkv_norm_rope"], in_place=True)
attention_decode = op(_FUSIONS["attention_decode"])
gated_attention_decode = op(_FUSIONS["gated_attention_decode"])
experts = op(_FUSIONS["experts"])
scaled_expert_gate_up = op(_FUSIONS["scaled_expert_gate_up"])
scaled_expert_down = op(_FUSIONS["scaled_expert_down"])
scaled_experts = op(_FUSIONS["scaled_experts"])
quantised = op(_FUSIONS["quantised"])
quantised_experts = op(_FUSIONS["quantised_experts"])
scaled_product = op(_FUSIONS["scaled_product"])
row_product = op(_FUSIONS["row_product"])
scaled_conv_projections = op(_FUSIONS["scaled_conv_projections"])
scaled_conv_projections_ = op(_FUSIONS["scaled_conv_projections"], in_place=True)
scaled_gate_projections = op(_FUSIONS["scaled_gate_projections"])
scaled_gate_topk = op(_FUSIONS["scaled_gate_topk"])
scaled_add_norm_gate_projections = op(_FUSIONS["scaled_add_norm_gate_projections"])
scaled_down_combine = op(_FUSIONS["scaled_down_combine"])
scaled_down_combine_ = op(_FUSIONS["scaled_down_combine"], in_place=True)
scaled_expert_down_shared = op(_FUSIONS["scaled_expert_down_shared"])
moe_align = op(_FUSIONS["moe_align"])
down_combine_ = op(_FUSIONS["down_combine"], in_place=True)

for _function in [x for x in globals().values() if hasattr(x, "fusion")]:
    _function.__module__ = __name__  # where it is found again when it is pickled

__all__ = [
    "IMPLEMENTATIONS",
    "Channel",
    "GateOutputs",
    "PackedGate",
    "PatchReport",
    "Warmed",
    "add_norm_gate_projections",
    "add_rms_norm",
    "add_rms_norm_",
    "all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm_",
    "attention_decode",
    "causal_conv1d_step",
    "causal_conv1d_step_",
    "conv_projections",
    "conv_projections_",
    "delta_rule_chunks",
    "delta_rule_chunks_",
    "delta_rule_step",
    "delta_rule_step_",
    "down_combine",
    "down_combine_",
    "expert_down",
    "expert_down_shared",
    "expert_gate_up",
    "experts",
    "gate_gemm",
    "gate_projections",
    "gate_refusal",
    "gate_topk",
    "gated_attention_decode",
    "gated_rms_norm",
    "moe_align",
    "op",
    "pack_gate",
    "patch",
    "qkv_norm_rope",
    "qkv_norm_rope_",
    "quantised",
    "quantised_experts",
    "register",
    "row_product",
    "scaled_add_norm_gate_projections",
    "scaled_conv_projections",
    "scaled_conv_projections_",
    "scaled_down_combine",
    "scaled_down_combine_",
    "scaled_expert_down",
    "scaled_expert_down_shared",
    "scaled_expert_gate_up",
    "scaled_experts",
    "scaled_gate_projections",
    "scaled_gate_topk",
    "scaled_product",
    "shared_expert_combine",
    "shared_expert_combine_",
    "silu_and_mul",
    "split_gate",
    "topk_softmax",
    "unit_lower_inverse",
    "unpatch",
    "warmup",
]
