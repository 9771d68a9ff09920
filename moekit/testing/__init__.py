"""Testing kernels against declarations: error bounds, guarded tensors of any strides, one harness for all implementations.

`Call` is one call of a declaration, `run` runs it through any implementation in guarded memory, `check` holds what comes back
to the reference, and `FusionSuite` is what a fusion's tests inherit. `moekit fuzz` draws calls by the million: docs/fuzzing.md.
"""

from moekit.testing.batch import Outcome, check, replay, run
from moekit.testing.bounds import bounds, graph_bounds
from moekit.testing.case import Call, FuzzCase
from moekit.testing.constants import constant
from moekit.testing.executors import as_torch
from moekit.testing.layouts import KINDS
from moekit.testing.oracle import Comparison, compare
from moekit.testing.schedules import variants
from moekit.testing.suite import FusionSuite, implementations
from moekit.testing.values import RECIPES, operands

__all__ = [
    "KINDS",
    "RECIPES",
    "Call",
    "Comparison",
    "FusionSuite",
    "FuzzCase",
    "Outcome",
    "as_torch",
    "bounds",
    "check",
    "compare",
    "constant",
    "graph_bounds",
    "implementations",
    "operands",
    "replay",
    "run",
    "variants",
]
