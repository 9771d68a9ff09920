"""One suite that every fusion's tests inherit: each implementation, dtype, size, layout and schedule against the reference.

    class TestSiluAndMul(FusionSuite):
        fusion = silu_and_mul
        sizes = ({"T": 7, "I": 37}, {"T": 1, "I": 1})

What it runs is `cases(fusion, …)`: fuzz cases that are the same every time.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moekit.lang.dtypes import FLOATS
from moekit.lang.fusion import Fusion
from moekit.testing.batch import check
from moekit.testing.case import FuzzCase, name_of
from moekit.testing.constants import constant
from moekit.testing.draw import plain_case
from moekit.testing.layouts import KINDS, READ_ONLY
from moekit.testing.oracle import Oracle, Standard

IMPLEMENTATIONS = ("interpret", "numpy", "eager", "eager in place", "xla", "pallas", "triton-jax", "triton", "triton in place")
KERNELS = ("pallas", "pallas-triton", "triton-jax", "mosaic")
SLOW = frozenset({*KERNELS, "xla"})  # a compilation per case: they run the cases marked `core`
LARGEST_WITH = {"small": 2500, "looped": 40000}  # elements of work, as every block costs the interpreter the same
COMPILED = frozenset({"interpret", *KERNELS, "triton"})  # what a schedule means something to
LAYOUTS = tuple(k for k in KINDS if k != "far")


@dataclass(frozen=True, eq=False)
class Picked:
    """A case with a label; `core` ones run where each is compiled."""

    label: str
    case: FuzzCase
    core: bool


def pick(fusion: Fusion, sizes: Mapping[str, int], dtype: str, params: Mapping[str, object], layout: str = "dense",
         recipe: str = "normal", schedule: str = "heuristic", core: bool = False) -> Picked:  # fmt: skip
    """A case of `fusion` with one kind of layout for all tensors, or with "mixed:N" another for each, turned by N."""
    given = (",".join(f"{n}={v}" for n, v in named.items()) for named in (sizes, params))
    parts = (*given, dtype, layout, recipe, schedule)
    label = " ".join(p for p in parts if p not in ("dense", "normal", "heuristic", ""))
    how = {"params": params, "recipe": recipe, "schedule": schedule, "seed": zlib.crc32(label.encode())}
    case = plain_case(name_of(fusion), sizes, dtype, **how)
    turn, kinds = layout.removeprefix("mixed:"), {}
    for i, name in enumerate(dict.fromkeys([*case.memory(), *case.names]) if layout != "dense" else ()):
        kind = layout if turn == layout else LAYOUTS[(int(turn) + 3 * i) % len(LAYOUTS)]
        writable = name not in case.shapes or name in case.names
        kinds[name] = case.laid(name, "dense" if writable and kind in READ_ONLY else kind)
    return Picked(label, replace(case, layouts=kinds), core)


def cases(
    fusion: Fusion,
    sizes: Sequence[Mapping[str, int]],
    params: Sequence[Mapping[str, object]] = ({},),
    recipes: Sequence[str] = ("integers", "tiny", "huge", "special"),
    schedules: Sequence[str] = ("looped", "dots", "rows", "small", "whole", "split"),
) -> Iterator[Picked]:
    """Cases for `fusion`: every size, dtype and parameter set; every layout, recipe and schedule on the first size.

    `schedules` are names of `moekit.testing.schedules.variants`; one that is not legal for a fusion is the heuristic's.
    """
    for i, size in enumerate(sizes):
        for j, given in enumerate(params):
            for k, dtype in enumerate(FLOATS):
                yield pick(fusion, size, dtype, given, core=j == i % len(params) and (i == 0 or k == i % 3))
    first, given = sizes[0], params[0]
    for i, layout in enumerate((*LAYOUTS[1:], *(f"mixed:{n}" for n in range(4)))):
        core = layout in LAYOUTS and layout not in READ_ONLY and i % 2 == 0
        yield pick(fusion, first, FLOATS[i % 3], given, layout, core=core)
    for i, recipe in enumerate(recipes):
        for dtype in FLOATS:
            yield pick(fusion, first, dtype, given, recipe=recipe, core=dtype == FLOATS[i % 3])
    for schedule in schedules:
        for i, size in enumerate(sizes):
            if math.prod(size.values()) > LARGEST_WITH.get(schedule, 10**9):
                continue
            yield pick(fusion, size, FLOATS[(i + len(schedule)) % 3], given, schedule=schedule, core=i == 0)
            yield pick(fusion, size, "float32", given, f"mixed:{i}", schedule=schedule)


class FusionSuite:
    """Inherit it as `class TestX(FusionSuite)`; set `fusion` and `sizes`, and `params` where it has any."""

    fusion: Fusion
    sizes: Sequence[Mapping[str, int]]
    params: Sequence[Mapping[str, object]] = ({},)
    recipes: Sequence[str] = ("integers", "tiny", "huge", "special")
    implementations: Sequence[str] = IMPLEMENTATIONS

    @classmethod
    def every_case(cls) -> list[Picked]:
        """The cases of this fusion, without repetitions."""
        return list({c.label: c for c in cases(cls.fusion, cls.sizes, cls.params, cls.recipes)}.values())

    @classmethod
    def serves(cls, implementation: str, picked: Picked) -> bool:
        """Whether a case is worth running: schedules matter to compiled programs only, "in place" to InOut operands."""
        if implementation.endswith("in place") and all(s.role != "InOut" for s in cls.fusion.tensors.values()):
            return False
        if picked.case.schedule != "heuristic" and implementation not in COMPILED:
            return False
        return picked.core or implementation not in SLOW

    @classmethod
    def pytest_generate_tests(cls, metafunc) -> None:
        """One test per implementation and case."""
        if "case" in metafunc.fixturenames:
            every = [(n, c) for c in cls.every_case() for n in cls.implementations if cls.serves(n, c)]
            metafunc.parametrize(("implementation", "case"), [_param(n, c, id=f"{n}-{c.label}") for n, c in every])

    def test_against_reference(self, implementation: str, case: Picked) -> None:
        """The outputs lie within the bound of the reference, and no other memory is touched."""
        check(implementation, case.case, _oracle(case, constant(case.case.declaration.name, implementation)))


@lru_cache(maxsize=2)
def _oracle(picked: Picked, factor: float) -> Oracle:
    """What a case is held to: worked out once, as its implementations come one after the other."""
    return Oracle.of(picked.case, standard=Standard(None, factor))


def implementations(names: Sequence[str] = IMPLEMENTATIONS) -> list:
    """Implementations as pytest parameters, those that need a GPU marked so."""
    return [_param(n) for n in names]


def _param(implementation: str, *more, **how):
    import pytest

    return pytest.param(implementation, *more, marks=[pytest.mark.gpu] if implementation.startswith("triton") else [], **how)
