"""A shared expert cut over the devices there are: fusions under `jax.shard_map`, and one all-reduce.

    python examples/shard_map_jax.py                   # XLA_FLAGS=--xla_force_host_platform_device_count=4 for four on a CPU

Each rank has its columns of gate and up and the same columns of down, so its output is a part of the sum: the all-reduce adds
the parts, and the norm after it runs on every rank.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from moekit.jax import add_rms_norm, silu_and_mul

tokens, hidden = 8, 64
ranks = max(n for n in (1, 2, 4, 8) if n <= len(jax.devices()))
inner = 32  # of a rank
mesh = Mesh(np.array(jax.devices()[:ranks]), ("tp",))
keys = jax.random.split(jax.random.key(0), 4)
x, residual = (jax.random.normal(key, (tokens, hidden)) for key in keys[:2])
gate_up = jax.random.normal(keys[2], (ranks, 2 * inner, hidden)) / 8  # the rows of a rank: its gate, then its up
down = jax.random.normal(keys[3], (ranks, inner, hidden)) / 8
norm = jnp.zeros(hidden)


def block(x, residual, gate_up, down, norm):
    """What one rank does."""
    activated = silu_and_mul(x @ gate_up[0].T)
    return add_rms_norm(jax.lax.psum(activated @ down[0], "tp"), residual, norm, offset=1.0)


places = (P(), P(), P("tp"), P("tp"), P())
run = jax.jit(jax.shard_map(block, mesh=mesh, in_specs=places, out_specs=(P(), P())))
out, summed = run(x, residual, gate_up, down, norm)

# The same on one device, of arrays.
gate, up = jnp.split(jnp.einsum("th,rih->rti", x, gate_up), 2, axis=-1)
wanted = residual + jnp.einsum("rti,rih->th", jax.nn.silu(gate) * up, down)
np.testing.assert_allclose(summed, wanted, rtol=1e-2, atol=1e-2)
np.testing.assert_allclose(out, wanted / jnp.sqrt(jnp.mean(wanted**2, axis=1, keepdims=True) + 1e-6), rtol=1e-2, atol=1e-2)
print(f"{ranks} ranks, each with {inner} columns of the expert: {out.shape}")
