"""Which part of a decode step a kernel belongs to, told from its name, and the same parts of the step's floor.

moekit's kernels are called what their fusion is called (`_partial` and `_combine`, or `_staged_` and a value, behind it where
it has several launches). XLA calls its kernels by their form, `gemm_fusion_dot`: projections, attention, head and arg-max
cannot be told apart, so they are one part, of times and of floors alike, and so are projections by moekit's kernels. Where no
kernel of moekit's computes the routed experts, they are in that part, too.
"""

EXPERTS, GATES, DELTA, NORMS = "routed experts", "gates, router, shared expert", "delta rule and its norm", "norms"
ATTENTION, COLLECTIVES, REST = "attention over the cache", "collectives", "projections, head, and what else XLA makes"
PARTS = (EXPERTS, GATES, DELTA, NORMS, ATTENTION, REST, COLLECTIVES)

# Of the prefixes that a name begins with, the first one counts.
PREFIXES = {
    "expert": EXPERTS,
    "scaled_expert": EXPERTS,
    "quantised": EXPERTS,
    "scaled_product": REST,
    "scaled_conv_projections": REST,
    "conv_projections": REST,
    "causal_conv1d": DELTA,
    "qkv_norm_rope": ATTENTION,
    "gated_attention_decode": ATTENTION,
    "moe_align": EXPERTS,
    "gate_": GATES,  # gate_projections, gate_gemm
    "scaled_gate_": GATES,
    "scaled_down_combine": GATES,
    "topk_softmax": GATES,
    "silu_and_mul": GATES,
    "down_combine": GATES,
    "shared_expert_combine": GATES,
    "delta_rule": DELTA,
    "unit_lower_inverse": DELTA,
    "gated_rms_norm": DELTA,
    "add_rms_norm": NORMS,
    "add_norm_gate_": GATES,
    "scaled_add_norm_gate_": GATES,
    "row_product": REST,
    "all_reduce_add_rms_norm": NORMS,
    "attention_decode": ATTENTION,
    "psum": COLLECTIVES,  # XLA's own kernel, fused with what stands around the sum
    "nccl": COLLECTIVES,
    "all-reduce": COLLECTIVES,
    "all-gather": COLLECTIVES,
}

# What bench/model_jax.py `moved` names: the bytes of "delta nets" and "attention" are their projections' weights.
FLOORS = {
    "experts": EXPERTS,
    "gates": GATES,
    "states": DELTA,
    "delta nets": REST,
    "attention": REST,
    "head": REST,
    "keys and values": REST,
}


def part(kernel: str) -> str:
    """The part of a step that a kernel of this name belongs to."""
    return next((found for prefix, found in PREFIXES.items() if kernel.startswith(prefix)), REST)


def spent(row: dict) -> dict[str, float]:
    """ms that the kernels of a row's step take, by part."""
    found = dict.fromkeys(PARTS, 0.0)
    for kernel, (_, us) in row.get("by name", {}).items():
        found[part(kernel)] += us / 1e3
    return found


def least(row: dict) -> dict[str, float]:
    """ms of a row's floor, by part."""
    found = dict.fromkeys(PARTS, 0.0)
    for name, ms in row.get("floor by part", {}).items():
        found[FLOORS.get(name, REST)] += ms
    return found
