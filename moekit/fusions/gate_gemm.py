"""One GEMM for the shared expert's gate_up, the router and the shared expert's gate."""

import numpy as np

from moekit.lang import In, cast, contract, fusion


def reference(x, packed):
    """float64 matrix product."""
    return {"out": x.astype(np.float64) @ packed.astype(np.float64).T}


@fusion(reference, x=In("T D"), packed=In("P D"))
def gate_gemm(x, packed):
    """out = x · packedᵀ.

    x [T, D], packed [P, D] -> out [T, P] in x's dtype, accumulated in float32; see `pack_gate` for P.
    """
    return cast(contract(x, packed, over="D"), x.dtype)
