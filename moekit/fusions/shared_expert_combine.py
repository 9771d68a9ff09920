"""The gated shared expert joins the routed ones."""

import numpy as np

from moekit.lang import In, InOut, cast, f32, fusion, sigmoid


def reference(hidden, shared, gate):
    """float64, rounded once by the caller."""
    with np.errstate(over="ignore"):
        gate = 1 / (1 + np.exp(-gate.astype(np.float64)))
    return {"hidden": hidden.astype(np.float64) + gate * shared.astype(np.float64)}


@fusion(reference, hidden=InOut("T H"), shared=In("T H"), gate=In("T H?"))
def shared_expert_combine(hidden, shared, gate):
    """hidden becomes hidden + sigmoid(gate)·shared.

    hidden, shared [T, H], gate [T, 1] or [T, H]; float32 inside, rounded once to hidden's dtype.
    """
    total = f32(hidden) + sigmoid(gate) * f32(shared)
    return {"hidden": cast(total, hidden.dtype)}
