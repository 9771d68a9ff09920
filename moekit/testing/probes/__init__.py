"""Small declarations that use the corners of the language which moekit's own fusions leave out.

They are what shows a fault in the compiler that no shipped fusion meets: `moekit fuzz` and `moekit mutants` run them
beside the fusions. Each has a numpy reference of its own, like any declaration.
"""

from __future__ import annotations

from moekit.lang import Fusion
from moekit.testing.probes import products, rows

PROBES = {f.name: f for file in (rows, products) for f in vars(file).values() if isinstance(f, Fusion)}
