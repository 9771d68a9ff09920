"""The gated activation of an expert: silu(gate)·up."""

import numpy as np

from moekit.lang import In, cast, f32, fusion, halves, silu


def reference(gate_up):
    """float64, no inner rounding."""
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=-1)
    with np.errstate(over="ignore"):
        return {"out": gate / (1 + np.exp(-gate)) * up}


@fusion(reference, gate_up=In("T 2*I"))
def silu_and_mul(gate_up):
    """out = silu(gate)·up of gate_up = [gate | up].

    gate_up [T, 2I] -> out [T, I] in the same dtype; float32 inside, rounded once. SwiGLU: Shazeer 2020.
    """
    gate, up = halves(gate_up, "I")
    return cast(silu(gate) * f32(up), gate_up.dtype)
