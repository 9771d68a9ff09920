"""Making a failing case small: fewer and smaller axes, contiguous layouts, plain values, the heuristic's schedule.

Each step is kept if the case still fails; steps are tried until none helps. What is left is what a person must look at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from moekit.errors import MoekitError
from moekit.lang.dtypes import itemsize
from moekit.testing.case import FuzzCase
from moekit.testing.layouts import KINDS, lay

RECIPES = ("integers", "normal", "ties", "mixed")


def simpler(case: FuzzCase) -> Iterator[FuzzCase]:
    """Cases a step simpler than `case`, boldest first."""
    if case.layouts:
        yield replace(case, layouts={})
    for name in case.layouts:
        yield replace(case, layouts={n: v for n, v in case.layouts.items() if n != name})
    for axis, n in case.sizes.items():
        for smaller in dict.fromkeys((1, n // 4, n // 2, n - n // 8, n - 1)):
            if 0 < smaller < n:
                yield _resized(case, {**case.sizes, axis: smaller})
    if case.schedule != "heuristic":
        yield replace(case, schedule="heuristic")
    for recipe in RECIPES[: RECIPES.index(case.recipe) if case.recipe in RECIPES else None]:
        yield replace(case, recipe=recipe)
    floats = [n for n, d in case.dtypes.items() if d in ("float16", "bfloat16")]
    if floats:
        yield replace(case, dtypes={n: "float32" if n in floats else d for n, d in case.dtypes.items()})
    for name, p in case.declaration.params.items():
        if p.default is not p.empty and case.params.get(name) != p.default:
            yield replace(case, params={n: v for n, v in case.params.items() if n != name})
        elif isinstance(given := case.params.get(name), int) and given > 1:
            yield replace(case, params={**case.params, name: 1})
    for name, layout in case.layouts.items():
        shape, size = case.shape(name), itemsize(case.dtype(name))
        for kind in KINDS[1 : KINDS.index(layout.kind) + 1]:
            if (plainer := lay(kind, shape, size)) != layout:
                yield replace(case, layouts={**case.layouts, name: plainer})
    if case.seed:
        yield replace(case, seed=0)


def _resized(case: FuzzCase, sizes: dict[str, int]) -> FuzzCase:
    """The case at other sizes; a far layout is laid out anew, so that it stays far."""
    found = replace(case, sizes=sizes)
    far = [n for n, v in case.layouts.items() if v.kind == "far"] if found.problem() is None else []
    return replace(found, layouts={**case.layouts, **{n: lay("far", found.shape(n), itemsize(found.dtype(n))) for n in far}})


def sort_of(problems: Sequence[str]) -> str:
    """What sort of failure it is, so that none is taken for another: an error's type, or the fusion's name for wrong values."""
    first = problems[0] if problems else ""
    return "process" if first.startswith(("it ", "its ")) else first.partition(":")[0]


def shrink(case: FuzzCase, fails: Callable[[FuzzCase], bool], most: int = 300, seconds: float | None = None) -> FuzzCase:
    """The smallest case found that still fails, after at most `most` tries and about `seconds`."""
    tries, progress = 0, True
    until = None if seconds is None else time.monotonic() + seconds
    while progress and tries < most:
        progress = False
        for candidate in simpler(case):
            if tries >= most or (until is not None and time.monotonic() > until):
                return case
            tries += 1
            if _valid(candidate) and fails(candidate):
                case, progress = candidate, True
                break
    return case


def _valid(case: FuzzCase) -> bool:
    try:
        return case.problem() is None and bool(case.memory())
    except (MoekitError, KeyError, ValueError):
        return False
