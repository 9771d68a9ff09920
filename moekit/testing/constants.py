"""The constants of the numerics contract, in one place: by how much float32 noise may exceed its first-order
estimate.

`moekit.testing.bounds` estimates for every output the noise of one float32 evaluation; an implementation may
be off by the constant times that. A constant stands no higher than four times the worst ratio seen on any
device, which `worst.json` beside this file keeps.
"""

DEFAULT = 4.0

# (fusion, implementation) or (fusion, None) for all of them -> constant. What adds nothing up, or little, has a smaller one.
CONSTANTS: dict[tuple[str, str | None], float] = {
    ("silu_and_mul", None): 3.0,
    ("shared_expert_combine", None): 3.0,
    ("delta_rule_step", None): 2.5,
    ("delta_rule_chunks", None): 2.0,
    ("unit_lower_inverse", None): 1.1,
    ("topk_softmax", None): 3.25,
    ("expert_gate_up", None): 2.75,
    ("expert_down", None): 2.75,
    ("experts", None): 2.0,
    ("attention_decode", None): 0.43,
    ("gated_attention_decode", None): 1.75,
    ("scaled_experts", None): 1.5,
    ("scaled_expert_gate_up", None): 2.75,
    ("scaled_add_norm_gate_projections", None): 3.25,
    ("quantised", None): 1.7,
}


def constant(fusion: str, implementation: str | None = None) -> float:
    """The constant for a fusion as one implementation computes it, `DEFAULT` where none is listed."""
    return CONSTANTS.get((fusion, implementation), CONSTANTS.get((fusion, None), DEFAULT))
