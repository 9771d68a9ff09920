"""Cases that chance meets seldom, and properties that relate two calls: what the killer tries beside its random batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from moekit.testing.case import FuzzCase
from moekit.testing.draw import overwriting
from moekit.testing.layouts import Layout
from moekit.testing.schedules import variants
from moekit.testing.tasks import Task, cases

VIEWED = ("pallas", "xla")  # where a tensor is a View of a base: no stride 0, no strides past 2^31
PLAIN = ("numpy", "eager", "xla")  # no kernels: schedules mean nothing, and a library may add up the last rows another way
REFUSING = ("eager", "triton-interpreter", *VIEWED)  # outputs that overlap what they may not, decided by elements
F32 = "float32"
CHANCE = 3000  # the first number of the random declarations that are run under every schedule
SIZES = {"T": 19, "H": 45, "P": 21, "D": 45, "I": 21, "E": 20, "G": 1, "A": 6, "B": 5, "V": 3}
SCHEDULED = ("probe_extremes", "probe_product", "probe_gated", "probe_turned", "probe_crossed", "probe_apart", "probe_states",
             "probe_exchange", "probe_centred", "probe_inverse", "probe_tables", "probe_planes", "add_rms_norm", "gate_gemm",
             "gate_projections", "topk_softmax")  # fmt: skip
SCHEDULES = ("dots", "split", "looped", "single parts", "parts", "apart", "whole", "small", "rows")
ALIKE = ("probe_residual", "probe_rounded")  # three tensors or more of one shape and dtype, to take turns in one array
SLOW = ("small", "single parts", "looped")  # on a third of the sizes; 20 seconds each for a whole block of the model

Attempt = Callable[[str], list[str]]  # of a stage: what is wrong


def directed(stage: str) -> Iterator[Attempt]:
    """What to try in a stage: kinds of cases in turn, so that each has had a few before any has had all."""
    kinds = [_tall(stage), _rows(stage), _top_k(stage), _scheduled(stage), _related(stage), _far(stage), _over(stage),
             _classes(stage), _chance(stage)]  # fmt: skip
    while kinds:
        for kind in list(kinds):
            if (attempt := next(kind, None)) is None:
                kinds.remove(kind)
            else:
                yield attempt


def _replay(case: FuzzCase) -> Attempt:
    def attempt(stage: str) -> list[str]:
        from moekit.testing.batch import replay

        return replay(case, stage)

    return attempt


def _property(name: str, case: FuzzCase) -> Attempt:
    def attempt(stage: str) -> list[str]:
        from moekit.testing.executors import executor
        from moekit.testing.properties import PROPERTIES

        made = executor(stage)
        return PROPERTIES[name](made, case) if made.supports(case) else []

    return attempt


def _rows(stage: str) -> Iterator[Attempt]:
    """One to three rows apart or transposed; axes of one element; sums of more than a block."""
    rows = (Layout("padded", (0, 1), (0, 0), (1, 1), (0, 5)), Layout("transposed", (1, 0), (0, 0), (1, 1), (0, 0)))
    for tokens, lying in itertools.product((1, 2, 3), rows):
        yield _replay(FuzzCase("silu_and_mul", {"T": tokens, "I": 6}, {"gate_up": F32}, layouts=dict.fromkeys(
            ("gate_up", "out"), lying)))  # fmt: skip
    if stage in VIEWED:
        for name, axes in (("gate_gemm", {"T": 18, "D": 150, "P": 20}), ("probe_product", {"T": 18, "H": 150, "P": 20})):
            yield _replay(
                FuzzCase(name, axes, dict.fromkeys(FuzzCase(name, {}, {}).declaration.tensors, F32), recipe="integers")
            )
        inner = Layout("arbitrary", (0, 1, 2), (0, 2, 1), (1, 3, 1), (0, 1, 0))
        sizes = {"T": 3, "V": 8, "D": 1}
        yield _replay(FuzzCase("gated_rms_norm", sizes, dict.fromkeys(("x", "z", "weight"), F32),
                               layouts={"x": inner, "out": inner}))  # fmt: skip


def _far(stage: str) -> Iterator[Attempt]:
    """Numbers past 2³², and offsets past 2³¹: of columns, the last of them 2³¹ itself, of tokens, and of rows chosen by ids."""
    if stage in VIEWED:
        return
    yield _replay(FuzzCase("probe_counted", {"T": 40, "H": 3}, {"n": "int64"}))
    columns = Layout("far", (1, 0), (0, 0), (1, 2**30), (0, 0))
    yield _replay(FuzzCase("silu_and_mul", {"T": 1, "I": 3}, {"gate_up": "float16"}, layouts={"out": columns}))
    far = Layout("far", (0, 1), (0, 0), (2**27 + 5, 1), (0, 0))
    for tensor in ("gate_up", "out"):
        yield _replay(FuzzCase("silu_and_mul", {"T": 9, "I": 4}, {"gate_up": "float16"}, layouts={tensor: far}))
    rows = {"x": Layout("far", (0, 1), (0, 0), (2**30 + 3, 1), (0, 0))}
    yield _replay(FuzzCase("probe_shuffled", {"T": 4, "H": 3}, {"x": "float16", "ids": "int32"}, layouts=rows))


def _over(stage: str) -> Iterator[Attempt]:
    """Outputs written over an operand, wherever the compiler lets them be."""
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    schedules = ("small", "rows", "apart") if stage not in PLAIN else ("heuristic",)
    for name in (*reversed(PROBES), *FUSIONS) if stage not in VIEWED else ():
        fusion = FuzzCase(name, {}, {}).declaration
        axes = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
        dtypes = {n: s.dtypes[0] for n, s in fusion.tensors.items()}
        params = {n: 3 for n, p in fusion.params.items() if p.default is p.empty}
        case = FuzzCase(name, {a: max(1, SIZES.get(a, 6) // 3) for a in axes}, dtypes, params, recipe="normal")
        for mode in overwriting(case) if case.problem() is None else ():
            for schedule in schedules:
                yield _replay(replace(case, mode=mode, schedule=schedule))


def _classes(stage: str) -> Iterator[Attempt]:
    """Rows among so many others that the schedule is another one: their bits are the same."""
    many = {"probe_scaled": {"T": 100, "D": 600, "P": 20}, "probe_gated": {"T": 130, "D": 1400, "I": 800}}
    for name, sizes in many.items() if stage == "triton-interpreter" else ():
        dtypes = dict.fromkeys(FuzzCase(name, {}, {}).declaration.tensors, "bfloat16")
        yield _property("rows are independent", FuzzCase(name, sizes, dtypes))


def _top_k(stage: str) -> Iterator[Attempt]:
    """More than 256 experts, rows of NaN, ties."""
    padded = {"logits": Layout("padded", (0, 1), (0, 0), (1, 1), (0, 4))} if stage not in VIEWED else {}
    params = {"k": 10, "renormalize": True, "nan_to_zero": False}
    recipes = ("nans", "normal", "special", "lowest", "ties", "equal")
    for dtype, recipe, experts in itertools.product((F32, "float16"), recipes, (300, 60)):
        yield _replay(FuzzCase("topk_softmax", {"T": 4, "E": experts}, {"logits": dtype}, params, padded, recipe=recipe))


def _scheduled(stage: str) -> Iterator[Attempt]:
    """Every kind of schedule over axes that no block divides; each time round with other values and another dtype."""
    kinds = list(itertools.product((F32, "float16", "bfloat16"), ("integers", "normal", "special", "huge")))
    schedules = SCHEDULES if stage not in PLAIN else ("heuristic",)
    each = range(math.lcm(len(schedules), len(SCHEDULED)))  # the numbers have no common factor: all pairs, the first few of all
    pairs = [(schedules[i % len(schedules)], SCHEDULED[i % len(SCHEDULED)]) for i in each]
    for turn in range(len(kinds)):
        for at, (schedule, name) in enumerate(pairs):
            dtype, recipe = kinds[(turn + 5 * at) % len(kinds)]
            if name == "gate_projections" and schedule in SLOW:
                continue
            fusion = FuzzCase(name, SIZES, {}).declaration
            dtypes = {n: dtype if dtype in s.dtypes else s.dtypes[0] for n, s in fusion.tensors.items()}
            params = {"eps": 1e-6, "offset": 1.0} if name == "add_rms_norm" else {}
            params |= {"k": 3, "renormalize": True, "nan_to_zero": False} if name == "topk_softmax" else {}
            axes = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
            mode = "in place" if name in ("add_rms_norm", "probe_apart", "probe_states", "probe_exchange") else "out"
            sizes = {a: max(1, n // 3) if schedule in SLOW else n for a, n in SIZES.items() if a in axes}
            yield _replay(FuzzCase(name, sizes, dtypes, params, mode=mode, recipe=recipe, schedule=schedule))


def _tall(stage: str) -> Iterator[Attempt]:
    """Products of as many rows as a program may have for two of them at once, part by part."""
    names = ("probe_braided", "gate_gemm", "gate_projections", "probe_gated") if stage not in PLAIN else ()
    for recipe, name, dtype in itertools.product(("integers", "normal"), names, ("float16", "bfloat16")):
        fusion = FuzzCase(name, {}, {}).declaration
        axes = {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}
        sizes = {a: 67 if a == "T" else n for a, n in SIZES.items() if a in axes}
        dtypes = {n: dtype if dtype in s.dtypes else s.dtypes[0] for n, s in fusion.tensors.items()}
        yield _replay(FuzzCase(name, sizes, dtypes, recipe=recipe, schedule="tall"))


def _chance(stage: str) -> Iterator[Attempt]:
    """Random declarations under every schedule that is legal for them."""
    for number in range(CHANCE, CHANCE + 40) if stage not in PLAIN else ():
        operands = FuzzCase(f"random:{number}", {}, {}).declaration.tensors
        dtypes = {n: s.dtypes[0] for n, s in operands.items()}
        case = FuzzCase(f"random:{number}", {"T": 5, "A": 11, "B": 6}, dtypes, recipe="normal", seed=number)
        for schedule in list(variants(case.graph))[1:]:
            yield _replay(replace(case, schedule=schedule))


def _related(stage: str) -> Iterator[Attempt]:
    """Properties of two calls, all of them on one case of every fusion and probe in turn."""
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    yield _property("operands may be one", FuzzCase("probe_exchange", {"T": 3, "A": 4, "H": 4}, {"left": F32, "right": F32}))
    names = ["overlap is refused", "rows between rows"] if stage in REFUSING else []
    names += ["neighbours are apart", "in place is out of place", "operands may be one"]
    names += ["rows are independent"] if stage not in PLAIN else []
    for fusion, prop in itertools.product(sorted((*PROBES, *FUSIONS), key=lambda n: n not in ALIKE), names):
        case = cases(Task(fusion, stage, 5, 0, 0, 1, 1))[0][0]
        yield _property(prop, replace(case, layouts={n: v for n, v in case.layouts.items() if v.kind != "far"}))
