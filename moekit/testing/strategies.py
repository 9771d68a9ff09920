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
from typing import Any

from hypothesis import strategies as st

from moekit.lang.fusion import Fusion
from moekit.testing.case import FuzzCase, name_of
from moekit.testing.draw import Limits, draw_case
from moekit.testing.layouts import KINDS, Layout, Source, draw_layout


def _source(draw: Callable) -> Source:
    """Choices that Hypothesis makes and shrinks, towards what is small and early."""
    return Source(lambda low, high: draw(st.integers(low, high)))


@st.composite
def cases(draw, fusion: Fusion | str, limits: Limits | None = None, **overrides: Any) -> FuzzCase:
    """Cases of a fusion: sizes, dtypes, parameters, layouts, aliasing, values and schedule.

    `fusion`: a declaration, or the name by which `find_fusion` knows it; a declaration of your own is named by its module.
    `overrides` are fields of `Limits`: `elements=500`, `kinds=("dense", "padded")`, `dtypes=("float32",)`, ….
    """
    name = fusion if isinstance(fusion, str) else name_of(fusion)
    return draw_case(name, _source(draw), limits or Limits(**{"elements": 4000, **overrides}))


@st.composite
def layouts(draw, shape: tuple[int, ...], itemsize: int = 4, kinds: Sequence[str] = KINDS) -> Layout:
    """Layouts of a tensor of a shape; they shrink towards contiguous."""
    source = _source(draw)
    return draw_layout(source.choose(list(kinds)), shape, itemsize, source)
