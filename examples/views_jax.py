"""Parts of one projection as operands of fusions, without a copy: views in JAX.

    python examples/views_jax.py

XLA copies a slice that feeds a kernel; a View is indexed inside it. With plain slices the same call gives the same numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moekit.jax import silu_and_mul, topk_softmax, view

tokens, inner, experts, top_k = 8, 128, 64, 8
fused = jax.random.normal(jax.random.key(0), (tokens, 2 * inner + experts))  # gate_up | router, as one GEMM writes them


@jax.jit
def viewed(fused):
    """The shared expert's activation and the router's choice, read where the GEMM wrote them."""
    columns = view(fused)
    activated = silu_and_mul(columns[:, : 2 * inner])
    weights, ids = topk_softmax(columns[:, 2 * inner :], top_k)
    return activated, weights, ids


@jax.jit
def sliced(fused):
    """The same, of slices: on a GPU XLA copies both before the kernels run."""
    return silu_and_mul(fused[:, : 2 * inner]), *topk_softmax(fused[:, 2 * inner :], top_k)


for mine, plain in zip(viewed(fused), sliced(fused), strict=True):
    np.testing.assert_allclose(mine, plain, rtol=1e-6)

# Of a stack, one layer: which one is known when the kernel runs, so that all layers share one compiled kernel.
stack = jnp.stack([fused, 2 * fused, 3 * fused])
of_layer = jax.jit(lambda stack, layer: silu_and_mul(view(stack)[layer, :, : 2 * inner]))
for layer in range(3):
    np.testing.assert_allclose(of_layer(stack, jnp.int32(layer)), silu_and_mul(stack[layer, :, : 2 * inner]), rtol=1e-6)

print(f"{viewed(fused)[0].shape} activations and {viewed(fused)[2].shape} ids, read in place")
