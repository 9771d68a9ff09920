"""One suite that every fusion's tests inherit: each implementation, dtype, size, layout and schedule against
the reference.

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
from moekit.lang.fusion import Fusion
from moekit.testing.compare import Comparison, compare
from moekit.testing.layouts import LAYOUTS, WRITABLE
from moekit.testing.runners import NEEDS_GPU, RUNNERS, Call
from moekit.testing.schedules import variants
from moekit.testing.values import operands

SLOW = frozenset({"pallas", "xla"})  # a compilation per case: they run the cases marked `core`

LARGEST_WITH = {"small": 2500, "looped": 40000}  # elements of work, as every block costs the interpreter the same
COMPILED = frozenset({"interpret", "pallas", "triton"})  # what a schedule means something to


@dataclass(frozen=True)
class Case:
    """One case: sizes of the plain axes, dtype of the float operands, parameters, layouts and a recipe for
    values.
    """

    sizes: Mapping[str, int]
    dtype: str = "float32"
    params: Mapping[str, object] = field(default_factory=dict)
    layout: str = "contiguous"
    recipe: str = "normal"
    schedule: str = "heuristic"
    core: bool = False

    def __str__(self) -> str:
        sizes = ",".join(f"{a}={n}" for a, n in self.sizes.items())
        params = ",".join(f"{n}={v}" for n, v in self.params.items())
        parts = (sizes, params, self.dtype, self.layout, self.recipe, self.schedule)
        plain = ("contiguous", "normal", "heuristic", "")
        return " ".join(p for p in parts if p not in plain)


def layouts_of(fusion: Fusion, layout: str, names: Sequence[str]) -> dict[str, str]:
    """A layout for each of `names`: `layout` itself, or with "mixed:N" another one for each, turned by N."""
    if layout == "contiguous":
        return {}
    if not layout.startswith("mixed:"):
        return dict.fromkeys(names, layout)
    turn, every = int(layout.removeprefix("mixed:")), list(LAYOUTS)
    return {n: every[(turn + 3 * i) % len(every)] for i, n in enumerate(names)}


def cases(
    fusion: Fusion,
    sizes: Sequence[Mapping[str, int]],
    params: Sequence[Mapping[str, object]] = ({},),
    recipes: Sequence[str] = ("integers", "tiny", "huge", "special"),
    schedules: Sequence[str] = ("looped", "dots", "rows", "small", "whole", "split"),
) -> Iterator[Case]:
    """Cases for `fusion`: every size, dtype and parameter set; every layout, recipe and schedule on the first
    size.

    `schedules` are names of `moekit.testing.schedules.variants`; one that is not legal for a fusion is the
    heuristic's.
    """
    for i, size in enumerate(sizes):
        for j, given in enumerate(params):
            for k, dtype in enumerate(FLOATS):
                yield Case(size, dtype, given, core=j == i % len(params) and (i == 0 or k == i % 3))
    first, given = sizes[0], params[0]
    for i, layout in enumerate((*list(LAYOUTS)[1:], *(f"mixed:{n}" for n in range(4)))):
        yield Case(first, FLOATS[i % 3], given, layout, core=layout in WRITABLE and i % 2 == 0)
    for i, recipe in enumerate(recipes):
        for dtype in FLOATS:
            yield Case(first, dtype, given, recipe=recipe, core=dtype == FLOATS[i % 3])
    for schedule in schedules:
        for i, size in enumerate(sizes):
            if math.prod(size.values()) > LARGEST_WITH.get(schedule, 10**9):
                continue
            dtype = FLOATS[(i + len(schedule)) % 3]
            yield Case(size, dtype, given, schedule=schedule, core=i == 0)
            yield Case(size, "float32", given, f"mixed:{i}", schedule=schedule)


class FusionSuite:
    """Inherit it as `class TestX(FusionSuite)`; set `fusion` and `sizes`, and `params` where it has any."""

    fusion: Fusion
    sizes: Sequence[Mapping[str, int]]
    params: Sequence[Mapping[str, object]] = ({},)
    recipes: Sequence[str] = ("integers", "tiny", "huge", "special")
    implementations: Sequence[str] = tuple(RUNNERS)

    @classmethod
    def every_case(cls) -> list[Case]:
        """The cases of this fusion, without repetitions."""
        unique = {str(c): c for c in cases(cls.fusion, cls.sizes, cls.params, cls.recipes)}
        return list(unique.values())

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
        if "case" not in metafunc.fixturenames:
            return
        import pytest

        pairs = [(name, case) for name in cls.implementations for case in cls.every_case() if cls.serves(name, case)]
        gpu = [[pytest.mark.gpu] if name in NEEDS_GPU else [] for name, _ in pairs]
        marked = [pytest.param(n, c, id=f"{n}-{c}", marks=m) for (n, c), m in zip(pairs, gpu, strict=True)]
        metafunc.parametrize(("implementation", "case"), marked)

    def test_against_reference(self, implementation: str, case: Case) -> None:
        """The outputs lie within the bound of the reference, and no other memory is touched."""
        check(implementation, call_of(self.fusion, case, self.operands(case)))


def implementations() -> list:
    """The names of all implementations as pytest parameters, those that need a GPU marked so."""
    import pytest

    return [pytest.param(n, marks=[pytest.mark.gpu] if n in NEEDS_GPU else []) for n in RUNNERS]


def call_of(fusion: Fusion, case: Case, values: Mapping) -> Call:
    """The call that a case stands for."""
    bare = Call(fusion, values, case.params)
    schedule = _schedules(bare.fusion, bare.binding).get(case.schedule)
    names = list(dict.fromkeys([*values, *bare.names]))
    return Call(fusion, values, case.params, layouts_of(fusion, case.layout, names), schedule).placed()


@functools.lru_cache(maxsize=256)
def _schedules(fusion: Fusion, binding) -> dict:
    return variants(fusion.trace(binding))


def check(implementation: str, call: Call) -> Comparison:
    """Run a call and raise AssertionError with everything that is wrong with what came back."""
    outcome = RUNNERS[implementation](call)
    result = compare(call.fusion, outcome.outputs, call.operands, call.params, implementation=implementation)
    problems = (*outcome.problems, *result.problems)
    if problems:
        raise AssertionError("\n".join(f"{implementation}: {p}" for p in problems))
    return result
