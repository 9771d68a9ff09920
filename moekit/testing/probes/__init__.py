"""Small declarations that use the corners of the language which moekit's own fusions leave out.

They are what shows a fault in the compiler that no shipped fusion meets: `moekit fuzz` and `moekit mutants` run them
beside the fusions. Each has a numpy reference of its own, like any declaration.
"""

from __future__ import annotations

from moekit.testing.probes.products import (
    probe_braided,
    probe_columns,
    probe_crossed,
    probe_gated,
    probe_grouped,
    probe_inverse,
    probe_product,
    probe_scaled,
    probe_turned,
)
from moekit.testing.probes.rows import (
    probe_apart,
    probe_bits,
    probe_centred,
    probe_counted,
    probe_exchange,
    probe_extremes,
    probe_first,
    probe_interleaved,
    probe_kept,
    probe_looked_up,
    probe_nearest,
    probe_ordered,
    probe_planes,
    probe_residual,
    probe_rounded,
    probe_running,
    probe_shuffled,
    probe_signs,
    probe_slots,
    probe_stacked,
    probe_states,
    probe_tables,
)

PROBES = {
    f.name: f
    for f in (probe_running, probe_slots, probe_nearest, probe_interleaved, probe_gated, probe_planes, probe_columns,
              probe_bits, probe_rounded, probe_grouped, probe_extremes, probe_product, probe_stacked, probe_turned,
              probe_residual, probe_shuffled, probe_crossed, probe_apart, probe_states, probe_exchange, probe_centred,
              probe_inverse, probe_tables, probe_looked_up, probe_ordered, probe_counted, probe_signs, probe_kept,
              probe_braided, probe_first, probe_scaled)
}  # fmt: skip
