"""Testing kernels against declarations: error bounds, guarded tensors of any strides, one suite for them all.

`compare` holds outputs to a fusion's reference; `FusionSuite` is what a fusion's tests inherit; `place` lays
an array out in a guarded arena; `Call` and `RUNNERS` run any implementation.
"""

from moekit.testing.bounds import bounds, graph_bounds
from moekit.testing.compare import Comparison, compare
from moekit.testing.constants import constant
from moekit.testing.layouts import LAYOUTS, Placed, as_torch, as_view, fetch, place, place_empty
from moekit.testing.runners import RUNNERS, Call, Outcome
from moekit.testing.schedules import variants
from moekit.testing.suite import Case, FusionSuite, cases, check, implementations
from moekit.testing.values import RECIPES, operands

__all__ = [
    "LAYOUTS",
    "RECIPES",
    "RUNNERS",
    "Call",
    "Case",
    "Comparison",
    "FusionSuite",
    "Outcome",
    "Placed",
    "as_torch",
    "as_view",
    "bounds",
    "cases",
    "check",
    "compare",
    "constant",
    "fetch",
    "graph_bounds",
    "implementations",
    "operands",
    "place",
    "place_empty",
    "variants",
]
