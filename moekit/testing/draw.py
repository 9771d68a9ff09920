"""The space of fuzz cases, written once against a `Source` of choices.

`layouts.numpy_source` makes choices fast, for campaigns; `moekit.testing.strategies` makes the same choices through Hypothesis,
which shrinks them: every list below starts with what is simplest, and every integer is simplest when small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from moekit.compile.passes.form import may_overwrite
from moekit.errors import MoekitError
from moekit.lang.arguments import parameter_type
from moekit.lang.dtypes import FLOATS, INTS, itemsize
from moekit.lang.fusion import Fusion
from moekit.testing.case import FuzzCase, find_fusion, unique_ids
from moekit.testing.layouts import KINDS, READ_ONLY, Layout, Source, draw_layout
from moekit.testing.schedules import variants
from moekit.testing.values import RECIPES

DYNAMIC = (1, 2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 97, 127, 128, 129, 257, 300, 0)
STATIC = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 37, 48, 60, 63, 64, 65, 97, 100, 127, 128, 129, 255, 256, 257,
          384, 512, 640, 768, 1000, 1023, 1025, 2048, 2560)  # fmt: skip
SCHEDULES = ("heuristic", "looped", "rows", "small", "whole", "dots", "split", "parts", "tall")


@dataclass(frozen=True)
class Limits:
    """How far a case may go: elements of its largest tensor, which kinds of layouts and modes there are, and which dtypes."""

    elements: int = 20_000
    smallest: int = 0
    kinds: tuple[str, ...] = KINDS
    modes: tuple[str, ...] = ("out", "in place", "over", "plain")
    schedules: tuple[str, ...] = SCHEDULES
    dtypes: tuple[str, ...] = FLOATS
    integers: tuple[str, ...] = (*INTS, "bool")


def axes_of(fusion: Fusion) -> list[str]:
    """The plain axes of a fusion, as its operands name them, but for those whose sizes follow from others."""
    named = (a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms)
    return [a for a in dict.fromkeys(named) if a not in fusion.axes]


def plain_case(name: str, sizes: Mapping[str, int], dtype: str = "float32", other: int = 6, **more) -> FuzzCase:
    """A call of the fusion named `name`: axes that `sizes` does not name have `other` elements, operands that cannot be `dtype`
    the first dtype they can be, and numbers that must be given are 3. `more` are fields of the case.
    """
    fusion = find_fusion(name)
    params = {n: 3 for n, p in fusion.params.items() if p.default is p.empty}
    dtypes = {n: dtype if dtype in s.dtypes else s.dtypes[0] for n, s in fusion.tensors.items()}
    used = {a: sizes.get(a, other) for a in axes_of(fusion)}
    used |= {a: n for a, n in sizes.items() if a.endswith("?")}
    return FuzzCase(name, used, dtypes, **{"params": params, **more})


def draw_call(name: str, source: Source, limits: Limits) -> FuzzCase:
    """Sizes, dtypes and parameters of a call that fits the declaration; layouts are contiguous yet."""
    fusion = find_fusion(name)
    for _ in range(200):
        case = FuzzCase(name, _sizes(fusion, source), _dtypes(fusion, source, limits))
        case = replace(case, params=_params(fusion, source, case))
        if _operands_fit(case, limits) and case.problem() is None and _fits(case, limits):
            return case
    plain = {n: "float32" if "float32" in s.dtypes else s.dtypes[0] for n, s in fusion.tensors.items()}
    for dtypes in (case.dtypes, plain):  # when chance gives none; of mixed dtypes a declaration may want some to be one
        for size in (8, 4, 2, 1, 16, 64):
            case = replace(case, sizes=dict.fromkeys(axes_of(fusion), size), dtypes=dtypes)
            if case.problem() is None:
                return case
    raise MoekitError(f"{fusion.name}: no sizes found for which it can be traced; say them with FuzzCase(sizes=…)")


def _operands_fit(case: FuzzCase, limits: Limits) -> bool:
    """What `_fits` asks of the operands alone, for which nothing is traced."""
    return all(math.prod(max(1, n) for n in shape) <= limits.elements for shape in case.shapes.values())


def _fits(case: FuzzCase, limits: Limits) -> bool:
    return limits.smallest <= case.elements() and case.elements(1) <= limits.elements


def _sizes(fusion: Fusion, source: Source) -> dict[str, int]:
    sizes = {a: source.choose(DYNAMIC if a in fusion.dynamic else STATIC) for a in axes_of(fusion)}
    optional = [d.text for s in fusion.tensors.values() for d in s.dims if d.optional]
    return sizes | {f"{a}?": 1 for a in optional if source.integer(0, 1)}


def redraw_dynamic(case: FuzzCase, source: Source, limits: Limits) -> FuzzCase:
    """The same call with other dynamic sizes: what costs no compilation."""
    dynamic = [a for a in case.sizes if a in case.declaration.dynamic]
    for _ in range(20):
        found = replace(case, sizes={**case.sizes, **{a: source.choose(DYNAMIC) for a in dynamic}})
        if _fits(found, limits):
            return found
    return case


def _dtypes(fusion: Fusion, source: Source, limits: Limits) -> dict[str, str]:
    uniform, mixed = source.choose(limits.dtypes), source.integer(0, 5) == 5
    found = {}
    for name, spec in fusion.tensors.items():
        options = [d for d in spec.dtypes if d in (*limits.dtypes, *limits.integers)] or list(spec.dtypes)
        found[name] = source.choose(options) if mixed or uniform not in options else uniform
    return found


def _params(fusion: Fusion, source: Source, case: FuzzCase) -> dict[str, object]:
    found, largest = {}, max(case.sizes.values())
    for name, p in fusion.params.items():
        if name in fusion.mesh:
            continue  # one rank: several are for `ranks_add_up`
        kind, default = parameter_type(p), None if p.default is p.empty else p.default
        options = [] if default is None else [default]
        if kind is bool:
            options = [default or False, not default]
        elif kind is int:
            options += range(1, 1 + min(16, largest))
        elif kind is float:
            options = [default or 0.0, (default or 1.0) * 2]
        if options:
            found[name] = source.choose(options)
    return found


def draw_kinds(case: FuzzCase, source: Source, limits: Limits) -> dict[str, str]:
    """A kind of layout for every tensor of the call; at most one lies far, and outputs are never broadcast."""
    every, found = [k for k in limits.kinds if k != "far"], {}
    calm = source.integer(0, 3) == 0
    for name in case.memory():
        free = name in case.shapes and name not in case.targets.values() and name not in unique_ids(case.graph)
        allowed = every if free else [k for k in every if k not in READ_ONLY]
        found[name] = "dense" if calm and source.integer(0, 2) else source.choose(allowed)
    if "far" in limits.kinds and source.integer(0, 15) == 15:
        found[source.choose(list(found))] = "far"
    return found


def overwriting(case: FuzzCase) -> list[str]:
    """The modes in which an output goes over an operand."""
    outputs, operands = (n for n in case.names if n not in case.shapes), [n for n in case.shapes if n not in case.names]
    pairs = ((o, i) for o, i in itertools.product(outputs, operands) if case.shape(o) == case.shape(i))
    return [f"over:{o}:{i}" for o, i in pairs if may_overwrite(case.graph, o, i)]


def draw_mode(case: FuzzCase, source: Source, limits: Limits) -> str:
    """How outputs are given, of the modes that mean something for this call."""
    options = ["out", "out"]
    if "in place" in limits.modes and any(n in case.shapes for n in case.names):
        options += ["in place", "in place"]
    if "over" in limits.modes:
        options += overwriting(case)[:1]
    if "plain" in limits.modes:
        options.append("plain")
    return source.choose(options)


def draw_layouts(case: FuzzCase, kinds: dict[str, str], source: Source) -> dict[str, Layout]:
    """A layout of its kind for every tensor whose kind is not "dense"."""
    found = {n: draw_layout(k, case.shape(n), itemsize(case.dtype(n)), source) for n, k in kinds.items() if k != "dense"}
    return {n: v for n, v in found.items() if v.kind != "dense"}


def draw_case(name: str, source: Source, limits: Limits) -> FuzzCase:
    """A whole case of the fusion named `name`."""
    case = draw_call(name, source, limits)
    case = replace(case, mode=draw_mode(case, source, limits), recipe=source.choose(list(RECIPES)))
    case = replace(case, schedule=draw_schedule(case, source, limits), seed=source.integer(0, 2**20))
    return replace(case, layouts=draw_layouts(case, draw_kinds(case, source, limits), source))


def draw_schedule(case: FuzzCase, source: Source, limits: Limits) -> str:
    """The heuristic's schedule more often than not, else one of the legal variants."""
    if source.integer(0, 2) or len(limits.schedules) == 1:
        return "heuristic"
    return source.choose([s for s in variants(case.graph) if s in limits.schedules])
