"""The fusions moekit ships, one file each. `FUSIONS` maps their names to their declarations."""

from moekit.fusions.add_norm_gate_projections import add_norm_gate_projections
from moekit.fusions.add_rms_norm import add_rms_norm
from moekit.fusions.all_reduce_add_rms_norm import all_reduce_add_rms_norm
from moekit.fusions.attention_decode import attention_decode
from moekit.fusions.causal_conv1d_step import causal_conv1d_step
from moekit.fusions.conv_projections import conv_projections
from moekit.fusions.delta_rule_chunks import delta_rule_chunks
from moekit.fusions.delta_rule_step import delta_rule_step
from moekit.fusions.down_combine import down_combine
from moekit.fusions.expert_down import expert_down
from moekit.fusions.expert_down_shared import expert_down_shared
from moekit.fusions.expert_gate_up import expert_gate_up
from moekit.fusions.experts import experts
from moekit.fusions.gate_gemm import gate_gemm
from moekit.fusions.gate_projections import gate_projections
from moekit.fusions.gate_topk import gate_topk
from moekit.fusions.gated_attention_decode import gated_attention_decode
from moekit.fusions.gated_rms_norm import gated_rms_norm
from moekit.fusions.moe_align import moe_align
from moekit.fusions.qkv_norm_rope import qkv_norm_rope
from moekit.fusions.quantised import quantised
from moekit.fusions.quantised_experts import quantised_experts
from moekit.fusions.row_product import row_product
from moekit.fusions.scaled_add_norm_gate_projections import scaled_add_norm_gate_projections
from moekit.fusions.scaled_conv_projections import scaled_conv_projections
from moekit.fusions.scaled_down_combine import scaled_down_combine
from moekit.fusions.scaled_expert_down import scaled_expert_down
from moekit.fusions.scaled_expert_down_shared import scaled_expert_down_shared
from moekit.fusions.scaled_expert_gate_up import scaled_expert_gate_up
from moekit.fusions.scaled_experts import scaled_experts
from moekit.fusions.scaled_gate_projections import scaled_gate_projections
from moekit.fusions.scaled_gate_topk import scaled_gate_topk
from moekit.fusions.scaled_product import scaled_product
from moekit.fusions.shared_expert_combine import shared_expert_combine
from moekit.fusions.silu_and_mul import silu_and_mul
from moekit.fusions.topk_softmax import topk_softmax
from moekit.fusions.unit_lower_inverse import unit_lower_inverse

FUSIONS = {
    f.name: f
    for f in (
        gate_gemm,
        silu_and_mul,
        topk_softmax,
        shared_expert_combine,
        add_rms_norm,
        row_product,
        add_norm_gate_projections,
        gated_rms_norm,
        causal_conv1d_step,
        conv_projections,
        delta_rule_step,
        delta_rule_chunks,
        unit_lower_inverse,
        gate_projections,
        gate_topk,
        down_combine,
        expert_gate_up,
        expert_down,
        expert_down_shared,
        qkv_norm_rope,
        attention_decode,
        gated_attention_decode,
        experts,
        moe_align,
        all_reduce_add_rms_norm,
        scaled_expert_gate_up,
        scaled_expert_down,
        scaled_experts,
        scaled_product,
        scaled_conv_projections,
        scaled_gate_projections,
        scaled_gate_topk,
        scaled_add_norm_gate_projections,
        scaled_down_combine,
        scaled_expert_down_shared,
        quantised,
        quantised_experts,
    )
}
