"""The shared expert's down projection, added to the routed experts' output."""

import numpy as np

from moekit.lang import In, InOut, cast, contract, f32, fusion


def reference(hidden, activated, down, share):
    """float64, rounded once by the caller."""
    product = activated.astype(np.float64) @ down.astype(np.float64).T
    return {"hidden": hidden.astype(np.float64) + share.astype(np.float64) * product}


@fusion(reference, hidden=InOut("T H"), activated=In("T I"), down=In("H I"), share=In("T H?"))
def down_combine(hidden, activated, down, share):
    """hidden becomes hidden + share·(activated·downᵀ).

    hidden [T, H], activated [T, I], down [H, I], share [T, 1] or [T, H] as `gate_projections` gives it, a sigmoid already;
    accumulated in float32 and rounded once, to hidden's dtype.
    """
    return {"hidden": cast(f32(hidden) + f32(share) * contract(activated, down, over="I"), hidden.dtype)}
