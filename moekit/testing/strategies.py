"""Hypothesis strategies for fuzz cases: `cases(fusion)` works for any declaration, a user's own included.

    @settings(deadline=None)  # the first call imports a framework
    @given(cases(my_fusion))
    def test_my_fusion(case):
        assert not replay(case, "triton")

The choices are those of `moekit.testing.draw`, made by Hypothesis, so that a failure shrinks: to small sizes, contiguous
layouts, the first dtype, plain values, the heuristic's schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import strategies as st

from moekit.lang.fusion import Fusion
from moekit.testing.case import FuzzCase
from moekit.testing.draw import Limits, draw_case
from moekit.testing.layouts import KINDS, Layout, draw_layout
from moekit.testing.values import RECIPES

T = TypeVar("T")


@dataclass(frozen=True)
class _HypothesisSource:
    """Choices that Hypothesis makes and shrinks."""

    draw: Callable[[st.SearchStrategy], Any]

    def integer(self, low: int, high: int) -> int:
        """An integer; it shrinks towards `low`."""
        return self.draw(st.integers(low, high))

    def choose(self, options: Sequence[T]) -> T:
        """One of the options; it shrinks towards the first."""
        return self.draw(st.sampled_from(list(options)))


@st.composite
def _cases(draw, fusion: Fusion, name: str, limits: Limits) -> FuzzCase:
    return draw_case(fusion, name, _HypothesisSource(draw), limits)


def cases(fusion: Fusion | str, limits: Limits | None = None, **overrides: Any) -> st.SearchStrategy[FuzzCase]:
    """Cases of a fusion: sizes, dtypes, parameters, layouts, aliasing, values and schedule.

    `fusion`: a declaration, or the name by which `find_fusion` knows it; a declaration of your own is named by its module.
    `overrides` are fields of `Limits`: `elements=500`, `kinds=("dense", "padded")`, `dtypes=("float32",)`, ….
    """
    from moekit.testing.case import find_fusion, name_of

    known = find_fusion(fusion) if isinstance(fusion, str) else fusion
    limits = limits or Limits(**{"elements": 4000, **overrides})
    return _cases(known, fusion if isinstance(fusion, str) else name_of(fusion), limits)


@st.composite
def layouts(draw, shape: tuple[int, ...], itemsize: int = 4, kinds: Sequence[str] = KINDS) -> Layout:
    """Layouts of a tensor of a shape; they shrink towards contiguous."""
    source = _HypothesisSource(draw)
    return draw_layout(source.choose(list(kinds)), shape, itemsize, source)


def recipes() -> st.SearchStrategy[str]:
    """Names of recipes for values."""
    return st.sampled_from(list(RECIPES))
