"""The constants of the numerics contract, in one place: by how much float32 noise may exceed its first-order
estimate.

`moekit.testing.bounds` estimates for every output the noise of one float32 evaluation; an implementation may
be off by the constant times that. A constant stands no higher than four times the worst ratio seen in a
campaign on any device.
"""

DEFAULT = 4.0

# (fusion, implementation) or (fusion, None) for all of them -> constant
CONSTANTS: dict[tuple[str, str | None], float] = {}


def constant(fusion: str, implementation: str | None = None) -> float:
    """The constant for a fusion as one implementation computes it, `DEFAULT` where none is listed."""
    return CONSTANTS.get((fusion, implementation), CONSTANTS.get((fusion, None), DEFAULT))
