"""The JAX face: fusions as pure functions on arrays and Views."""

from moekit.errors import MissingExtraError as _MissingExtraError

try:
    import jax as _jax  # noqa: F401
except ModuleNotFoundError as _missing:
    if _missing.name != "jax":
        raise
    raise _MissingExtraError(
        "moekit.jax: jax is not installed; install moekit[jax], or moekit[cuda] for a GPU", name="jax"
    ) from None

from moekit.fusions import FUSIONS as _FUSIONS
from moekit.fusions.packing import gate_refusal
from moekit.jax.channel import Channel
from moekit.jax.face import IMPLEMENTATIONS, exchange, op
from moekit.jax.gate import GateOutputs, PackedGate, gate_gemm, pack_gate, split_gate
from moekit.jax.link import Link
from moekit.jax.view import View, view

silu_and_mul = op(_FUSIONS["silu_and_mul"])
topk_softmax = op(_FUSIONS["topk_softmax"])
unit_lower_inverse = op(_FUSIONS["unit_lower_inverse"])
shared_expert_combine = op(_FUSIONS["shared_expert_combine"])
add_rms_norm = op(_FUSIONS["add_rms_norm"])
add_norm_gate_projections = op(_FUSIONS["add_norm_gate_projections"])
all_reduce_add_rms_norm = op(_FUSIONS["all_reduce_add_rms_norm"])
gated_rms_norm = op(_FUSIONS["gated_rms_norm"])
causal_conv1d_step = op(_FUSIONS["causal_conv1d_step"])
conv_projections = op(_FUSIONS["conv_projections"])
delta_rule_chunks = op(_FUSIONS["delta_rule_chunks"])
delta_rule_step = op(_FUSIONS["delta_rule_step"])
gate_projections = op(_FUSIONS["gate_projections"])
gate_topk = op(_FUSIONS["gate_topk"])
down_combine = op(_FUSIONS["down_combine"])
expert_gate_up = op(_FUSIONS["expert_gate_up"])
expert_down = op(_FUSIONS["expert_down"])
expert_down_shared = op(_FUSIONS["expert_down_shared"])
qkv_norm_rope = op(_FUSIONS["qkv_norm_rope"])
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
scaled_gate_projections = op(_FUSIONS["scaled_gate_projections"])
scaled_gate_topk = op(_FUSIONS["scaled_gate_topk"])
scaled_add_norm_gate_projections = op(_FUSIONS["scaled_add_norm_gate_projections"])
scaled_down_combine = op(_FUSIONS["scaled_down_combine"])
scaled_expert_down_shared = op(_FUSIONS["scaled_expert_down_shared"])
moe_align = op(_FUSIONS["moe_align"])

for _function in [x for x in globals().values() if hasattr(x, "fusion")]:
    _function.__module__ = __name__  # where it is found again when it is pickled

__all__ = [
    "IMPLEMENTATIONS",
    "Channel",
    "GateOutputs",
    "Link",
    "PackedGate",
    "View",
    "add_norm_gate_projections",
    "add_rms_norm",
    "all_reduce_add_rms_norm",
    "attention_decode",
    "causal_conv1d_step",
    "conv_projections",
    "delta_rule_chunks",
    "delta_rule_step",
    "down_combine",
    "exchange",
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
    "qkv_norm_rope",
    "quantised",
    "quantised_experts",
    "row_product",
    "scaled_add_norm_gate_projections",
    "scaled_conv_projections",
    "scaled_down_combine",
    "scaled_expert_down",
    "scaled_expert_down_shared",
    "scaled_expert_gate_up",
    "scaled_experts",
    "scaled_gate_projections",
    "scaled_gate_topk",
    "scaled_product",
    "shared_expert_combine",
    "silu_and_mul",
    "split_gate",
    "topk_softmax",
    "unit_lower_inverse",
    "view",
]
