"""One token of a depthwise causal convolution, as a gated delta net has before its rule."""

import numpy as np

from moekit.lang import In, InOut, cast, concat, f32, fusion, silu, size, slice, sum


def reference(x, state, weight):
    """The window is the state and x behind it; float64."""
    window = np.concatenate([state.astype(np.float64), x.astype(np.float64)[..., None]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):
        out = (window * weight.astype(np.float64)).sum(-1)
        return {"out": out / (1 + np.exp(-out)), "state": window[..., 1:]}


@fusion(reference, x=In("T C"), state=InOut("T C S"), weight=In("C S+1"))
def causal_conv1d_step(x, state, weight):
    """out = silu(Σ window·weight) of a channel's inputs so far, the newest last; state loses its oldest input and gains x.

    x [T, C], state [T, C, S] (the last S inputs, the oldest first, in x's dtype), weight [C, S+1] -> out [T, C] in x's dtype,
    rounded once; the sum is float32. The state is updated in place.
    """
    window = concat(state, x, over="S 1", into="S+1")
    out = silu(sum(f32(window) * f32(weight), over="S+1"))
    return {"out": cast(out, x.dtype), "state": slice(window, "S+1", 1, size("S"), into="S")}
