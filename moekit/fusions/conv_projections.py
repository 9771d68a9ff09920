"""A gated delta net's projections of few rows, with its convolution's step where they are added up."""

import numpy as np

from moekit.fusions.causal_conv1d_step import causal_conv1d_step
from moekit.fusions.causal_conv1d_step import reference as convolved
from moekit.lang import In, InOut, cast, f32, fusion, round_to, sum


def reference(x, mixing, others, state, weight):
    """float64; a projection is rounded before the convolution."""
    mixed, rest = (x.astype(np.float64) @ w.astype(np.float64).T for w in (mixing, others))
    return {"rest": rest, **convolved(round_to(mixed, x.dtype), state, weight)}


@fusion(reference, x=In("T D"), mixing=In("C D"), others=In("P D"), state=InOut("T C S"), weight=In("C S+1"))
def conv_projections(x, mixing, others, state, weight):
    """rest = x·othersᵀ, and `causal_conv1d_step` of x·mixingᵀ: its out and state.

    x [T, D], mixing [C, D], others [P, D], state [T, C, S], weight [C, S+1] -> rest [T, P], out [T, C] in x's dtype; state in
    place. Products are accumulated in float32 and rounded to x's dtype, then again where they are convolved. Every row reads
    the matrices anew, as lanes multiply and not the matrix unit: for one row, which that would have to be filled up for.
    """
    mixed, rest = (cast(sum(f32(x) * f32(w), over="D"), x.dtype) for w in (mixing, others))
    return {"rest": rest, **causal_conv1d_step.fn(mixed, state, weight)}
