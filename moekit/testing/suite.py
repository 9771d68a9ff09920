"""One suite that every fusion's tests inherit: each implementation, dtype, size, layout and schedule against the reference.

    class TestSiluAndMul(FusionSuite):
        fusion = silu_and_mul
        sizes = ({"T": 7, "I": 37}, {"T": 1, "I": 1})

What it runs is `cases(fusion, …)`; a case names everything that is needed to run it again.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moekit.lang.dtypes import FLOATS
from moekit.lang.fusion import Binding, Fusion
from moekit.testing.batch import check
from moekit.testing.case import Call
from moekit.testing.layouts import KINDS, READ_ONLY
from moekit.testing.schedules import variants
from moekit.testing.values import operands

IMPLEMENTATIONS = ("interpret", "numpy", "eager", "eager in place", "xla", "pallas", "triton", "triton in place")
SLOW = frozenset({"pallas", "xla"})  # a compilation per case: they run the cases marked `core`
LARGEST_WITH = {"small": 2500, "looped": 40000}  # elements of work, as every block costs the interpreter the same
COMPILED = frozenset({"interpret", "pallas", "triton"})  # what a schedule means something to
LAYOUTS = tuple(k for k in KINDS if k != "far")


@dataclass(frozen=True)
class Case:
    """Sizes of the plain axes, dtype of the float operands, parameters, kinds of layout and schedule, a recipe for values."""

    sizes: Mapping[str, int]
    dtype: str = "float32"
    params: Mapping[str, object] = field(default_factory=dict)
    layout: str = "dense"
    recipe: str = "normal"
    schedule: str = "heuristic"
    core: bool = False

    def __str__(self) -> str:
        sizes = ",".join(f"{a}={n}" for a, n in self.sizes.items())
        params = ",".join(f"{n}={v}" for n, v in self.params.items())
        parts = (sizes, params, self.dtype, self.layout, self.recipe, self.schedule)
        return " ".join(p for p in parts if p not in ("dense", "normal", "heuristic", ""))

    def call(self, fusion: Fusion, values: Mapping) -> Call:
        """The call that the case stands for; "mixed:N" gives every tensor another layout, turned by N."""
        bare = Call(fusion, values, self.params)
        turn, layouts = int(self.layout.removeprefix("mixed:")) if self.layout.startswith("mixed:") else None, {}
        for i, name in enumerate(dict.fromkeys([*values, *bare.names])):
            layouts[name] = self.layout if turn is None else LAYOUTS[(turn + 3 * i) % len(LAYOUTS)]
        schedule = _schedules(bare.fusion, bare.binding).get(self.schedule)
        return Call(fusion, values, self.params, layouts if self.layout != "dense" else {}, schedule)


def cases(
    fusion: Fusion,
    sizes: Sequence[Mapping[str, int]],
    params: Sequence[Mapping[str, object]] = ({},),
    recipes: Sequence[str] = ("integers", "tiny", "huge", "special"),
    schedules: Sequence[str] = ("looped", "dots", "rows", "small", "whole", "split"),
) -> Iterator[Case]:
    """Cases for `fusion`: every size, dtype and parameter set; every layout, recipe and schedule on the first size.

    `schedules` are names of `moekit.testing.schedules.variants`; one that is not legal for a fusion is the heuristic's.
    """
    for i, size in enumerate(sizes):
        for j, given in enumerate(params):
            for k, dtype in enumerate(FLOATS):
                yield Case(size, dtype, given, core=j == i % len(params) and (i == 0 or k == i % 3))
    first, given = sizes[0], params[0]
    for i, layout in enumerate((*LAYOUTS[1:], *(f"mixed:{n}" for n in range(4)))):
        yield Case(first, FLOATS[i % 3], given, layout, core=layout in LAYOUTS and layout not in READ_ONLY and i % 2 == 0)
    for i, recipe in enumerate(recipes):
        for dtype in FLOATS:
            yield Case(first, dtype, given, recipe=recipe, core=dtype == FLOATS[i % 3])
    for schedule in schedules:
        for i, size in enumerate(sizes):
            if math.prod(size.values()) > LARGEST_WITH.get(schedule, 10**9):
                continue
            yield Case(size, FLOATS[(i + len(schedule)) % 3], given, schedule=schedule, core=i == 0)
            yield Case(size, "float32", given, f"mixed:{i}", schedule=schedule)


class FusionSuite:
    """Inherit it as `class TestX(FusionSuite)`; set `fusion` and `sizes`, and `params` where it has any."""

    fusion: Fusion
    sizes: Sequence[Mapping[str, int]]
    params: Sequence[Mapping[str, object]] = ({},)
    recipes: Sequence[str] = ("integers", "tiny", "huge", "special")
    implementations: Sequence[str] = IMPLEMENTATIONS

    @classmethod
    def every_case(cls) -> list[Case]:
        """The cases of this fusion, without repetitions."""
        return list({str(c): c for c in cases(cls.fusion, cls.sizes, cls.params, cls.recipes)}.values())

    @classmethod
    def serves(cls, implementation: str, case: Case) -> bool:
        """Whether a case is worth running: schedules matter to compiled programs only, "in place" to InOut operands."""
        if implementation.endswith("in place") and all(s.role != "InOut" for s in cls.fusion.tensors.values()):
            return False
        if case.schedule != "heuristic" and implementation not in COMPILED:
            return False
        return case.core or implementation not in SLOW

    @classmethod
    def operands(cls, case: Case) -> dict:
        """The operands of a case; override it where values must meet a precondition."""
        return operands(cls.fusion, case.sizes, case.dtype, case.recipe, zlib.crc32(str(case).encode()))

    @classmethod
    def pytest_generate_tests(cls, metafunc) -> None:
        """One test per implementation and case."""
        if "case" in metafunc.fixturenames:
            every = [(n, c) for n in cls.implementations for c in cls.every_case() if cls.serves(n, c)]
            marked = [_param(n, c, id=f"{n}-{c}") for n, c in every]
            metafunc.parametrize(("implementation", "case"), marked)

    def test_against_reference(self, implementation: str, case: Case) -> None:
        """The outputs lie within the bound of the reference, and no other memory is touched."""
        check(implementation, case.call(self.fusion, self.operands(case)))


def implementations(names: Sequence[str] = IMPLEMENTATIONS) -> list:
    """Implementations as pytest parameters, those that need a GPU marked so."""
    return [_param(n) for n in names]


def _param(implementation: str, *more, **how):
    import pytest

    return pytest.param(implementation, *more, marks=[pytest.mark.gpu] if implementation.startswith("triton") else [], **how)


@functools.lru_cache(maxsize=256)
def _schedules(fusion: Fusion, binding: Binding) -> dict:
    return variants(fusion.trace(binding))
