"""The process that tries to kill one mutant: numerical properties of cases over every fusion and probe, `verify` switched off.

    python -m moekit.testing.mutants.killer STAGE SECONDS

It runs in a copy of the package and prints one JSON line: what failed first, or that nothing did. Beside random batches it
tries cases that chance meets seldom, and properties that relate two calls.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from moekit.cli.platform import prepare_jax
from moekit.fusions import FUSIONS
from moekit.testing.batch import run_case
from moekit.testing.case import FuzzCase
from moekit.testing.draw import overwriting, plain_case
from moekit.testing.executors import JAX, executor
from moekit.testing.layouts import Layout
from moekit.testing.probes import PROBES
from moekit.testing.processes import disarm
from moekit.testing.properties import PROPERTIES
from moekit.testing.random_graphs import WIDER
from moekit.testing.schedules import variants
from moekit.testing.tasks import Task, cases, run_task

STAGES = ("interpret", "triton-interpreter", "pallas")
ARRAYS = ("numpy", "eager", "xla")  # array evaluation: what no tile program goes through
COMBOS = {"interpret": 24, "triton-interpreter": 10, "pallas": 8, "numpy": 12, "eager": 12, "xla": 8}
RANDOM = {"interpret": 12, "triton-interpreter": 4, "pallas": 3, "numpy": 8, "eager": 8, "xla": 3}  # declarations a round
SEED = 7
VIEWED = JAX  # where a tensor is a View of a base: no stride 0, no strides past 2^31
PLAIN = ARRAYS  # no kernels: schedules mean nothing, and a library may add up the last rows another way
REFUSING = ("eager", "triton-interpreter", *VIEWED)  # outputs that overlap what they may not, decided by elements
F32 = "float32"
CHANCE = 3000  # the first number of the random declarations that are run under every schedule
SIZES = {"T": 19, "H": 45, "P": 21, "D": 45, "I": 21, "E": 20, "G": 1, "A": 6, "B": 5, "V": 3}
SCHEDULED = ("probe_extremes", "probe_product", "probe_gated", "probe_turned", "probe_crossed", "probe_apart", "probe_states",
             "probe_exchange", "probe_centred", "probe_inverse", "probe_tables", "probe_planes", "add_rms_norm", "gate_gemm",
             "gate_projections", "topk_softmax", "silu_and_mul")  # fmt: skip
UPDATING = ("add_rms_norm", "probe_apart", "probe_states", "probe_exchange")  # those of them that are run in place
SCHEDULES = ("dots", "split", "looped", "single parts", "parts", "apart", "rounds", "whole", "small", "rows")
ALIKE = ("probe_residual", "probe_rounded")  # three tensors or more of one shape and dtype, to take turns in one array
SLOW = ("small", "single parts", "looped")  # on a third of the sizes; 20 seconds each for a whole block of the model
TOP_K = {"k": 10, "renormalize": True, "nan_to_zero": False}

Attempt = tuple[str, FuzzCase]  # a property of `moekit.testing.properties`, and the case that must have it
RUN = "agreement in guarded memory"


def tasks(stage: str) -> Iterator[Task]:
    """Small batches: every fusion and probe in turn, then some random declarations, then all again with other sizes."""
    shape, some = (5, 1) if stage in JAX else (2, 2), RANDOM[stage]
    for combo in range(COMBOS[stage]):
        for name in (*PROBES, *FUSIONS):
            yield Task(name, stage, SEED, combo, 0, *shape)
        for number in range(combo * some, (combo + 1) * some):
            yield Task(f"random:{number if number % 3 == 0 else WIDER + number}", stage, SEED, 0, 0, *shape)


def attempts(stage: str) -> Iterator[Task | Attempt]:
    """Batches and directed cases in turn; where each directed case is compiled, one for every two batches."""
    batches, singles = tasks(stage), directed(stage)
    for turn in itertools.count():
        mine = [batches] if turn % 2 and stage in VIEWED else [singles, batches]
        found = [attempt for source in mine if (attempt := next(source, None)) is not None]
        yield from found
        if not found and len(mine) == 2:
            return


def problems(stage: str, attempt: Task | Attempt) -> tuple[list[str], int]:
    """What is wrong with an attempt, and how many cases ran."""
    if isinstance(attempt, Task):
        report = run_task(attempt)
        return list(report.failures[0].problems) if report.failures else [], report.coverage.ran
    (prop, case), made = attempt, executor(stage)
    if prop == RUN:
        return run_case(made, case).problems, 1
    return PROPERTIES[prop](made, case) if made.supports(case) else [], 1


def hunt(stage: str, seconds: float) -> dict:
    """The first failure of the stage and how many cases it took; `seconds` of the processor, whatever else a machine does."""
    begin, ran = time.process_time(), 0
    for attempt in attempts(stage):
        try:
            found, count = problems(stage, attempt)
        except Exception as error:
            found, count = [f"{type(error).__name__}: {error}"], 1
        ran += count
        if found:
            return {"killed": True, "ran": ran, "by": found[0][:200]}
        if time.process_time() - begin > seconds:
            break
    return {"killed": False, "ran": ran, "by": ""}


def directed(stage: str) -> Iterator[Attempt]:
    """What to try in a stage: kinds of cases in turn, so that each has had a few before any has had all."""
    kinds = [_ranks(stage), _tall(stage), _rows(stage), _top_k(stage), _scheduled(stage), _related(stage), _far(stage),
             _over(stage), _classes(stage), _chance(stage)]  # fmt: skip
    for turn in itertools.zip_longest(*kinds):
        yield from (attempt for attempt in turn if attempt is not None)


def _sized(share: int = 1, **sizes: int) -> dict[str, int]:
    """`SIZES`, or a part of each, and some of other size."""
    return {a: max(1, n // share) for a, n in SIZES.items()} | sizes


def _rows(stage: str) -> Iterator[Attempt]:
    """One to three rows apart or transposed; axes of one element; sums of more than a block."""
    rows = (Layout("padded", (0, 1), (0, 0), (1, 1), (0, 5)), Layout("transposed", (1, 0), (0, 0), (1, 1), (0, 0)))
    for tokens, lying in itertools.product((1, 2, 3), rows):
        yield RUN, plain_case("silu_and_mul", {"T": tokens, "I": 6}, layouts={"gate_up": lying, "out": lying})
    if stage in VIEWED:
        for name in ("gate_gemm", "probe_product"):
            yield RUN, plain_case(name, {"T": 18, "D": 150, "H": 150, "P": 20}, recipe="integers")
        inner = Layout("arbitrary", (0, 1, 2), (0, 2, 1), (1, 3, 1), (0, 1, 0))
        yield RUN, plain_case("gated_rms_norm", {"T": 3, "V": 8, "D": 1}, layouts={"x": inner, "out": inner})


def _far(stage: str) -> Iterator[Attempt]:
    """Numbers past 2³², and offsets past 2³¹: of columns, the last of them 2³¹ itself, of tokens, and of rows chosen by ids."""
    if stage in VIEWED:
        return
    yield RUN, plain_case("probe_counted", {"T": 40, "H": 3}, "int64")
    columns = Layout("far", (1, 0), (0, 0), (1, 2**30), (0, 0))
    yield RUN, plain_case("silu_and_mul", {"T": 1, "I": 3}, "float16", layouts={"out": columns})
    far = Layout("far", (0, 1), (0, 0), (2**27 + 5, 1), (0, 0))
    for tensor in ("gate_up", "out"):
        yield RUN, plain_case("silu_and_mul", {"T": 9, "I": 4}, "float16", layouts={tensor: far})
    rows = Layout("far", (0, 1), (0, 0), (2**30 + 3, 1), (0, 0))
    yield RUN, plain_case("probe_shuffled", {"T": 4, "H": 3}, "float16", layouts={"x": rows})


def _over(stage: str) -> Iterator[Attempt]:
    """Outputs written over an operand, wherever the compiler lets them be."""
    schedules = ("small", "rows", "apart") if stage not in PLAIN else ("heuristic",)
    for name in (*reversed(PROBES), *FUSIONS) if stage not in VIEWED else ():
        case = plain_case(name, _sized(3), other=2)
        for mode in overwriting(case) if case.problem() is None else ():
            for schedule in schedules:
                yield RUN, replace(case, mode=mode, schedule=schedule)


def _classes(stage: str) -> Iterator[Attempt]:
    """Rows among so many others that the schedule is another one: their bits are the same."""
    if stage == "triton-interpreter":
        yield "rows are independent", plain_case("probe_scaled", {"T": 100, "D": 600, "P": 20}, "bfloat16")
        yield "rows are independent", plain_case("probe_gated", {"T": 130, "D": 1400, "I": 800}, "bfloat16")


def _top_k(stage: str) -> Iterator[Attempt]:
    """More than 256 experts, rows of NaN, ties."""
    padded = {"logits": Layout("padded", (0, 1), (0, 0), (1, 1), (0, 4))} if stage not in VIEWED else {}
    recipes = ("nans", "normal", "special", "lowest", "ties", "equal")
    for dtype, recipe, experts in itertools.product((F32, "float16"), recipes, (300, 60)):
        sizes = {"T": 4, "E": experts}
        yield RUN, plain_case("topk_softmax", sizes, dtype, params=TOP_K, layouts=padded, recipe=recipe)


def _scheduled(stage: str) -> Iterator[Attempt]:
    """Every kind of schedule over axes that no block divides; each time round with other values and another dtype."""
    kinds = list(itertools.product((F32, "float16", "bfloat16"), ("integers", "normal", "special", "huge")))
    schedules = SCHEDULES if stage not in PLAIN else ("heuristic",)
    each = range(math.lcm(len(schedules), len(SCHEDULED)))  # the numbers have no common factor: all pairs, the first few of all
    for turn, at in itertools.product(range(len(kinds)), each):
        schedule, name = schedules[at % len(schedules)], SCHEDULED[at % len(SCHEDULED)]
        dtype, recipe = kinds[(turn + 5 * at) % len(kinds)]
        if name != "gate_projections" or schedule not in SLOW:
            mode = "in place" if name in UPDATING else "out"
            sizes = _sized(3 if schedule in SLOW else 1)
            yield RUN, plain_case(name, sizes, dtype, mode=mode, recipe=recipe, schedule=schedule)


def _tall(stage: str) -> Iterator[Attempt]:
    """Products of as many rows as a program may have for two of them at once, part by part."""
    names = ("probe_braided", "gate_gemm", "gate_projections", "probe_gated") if stage not in PLAIN else ()
    for recipe, name, dtype in itertools.product(("integers", "normal"), names, ("float16", "bfloat16")):
        yield RUN, plain_case(name, _sized(T=67), dtype, recipe=recipe, schedule="tall")


def _ranks(stage: str) -> Iterator[Attempt]:
    """Sums over two, three and four ranks, whose packets come in other orders each time."""
    for seed, dtype in itertools.product(range(12) if stage == "interpret" else (), (F32, "float16")):
        yield "ranks add up", plain_case("all_reduce_add_rms_norm", {"T": 3, "H": 6}, dtype, seed=seed)


def _chance(stage: str) -> Iterator[Attempt]:
    """Random declarations under every schedule that is legal for them."""
    for number in range(CHANCE, CHANCE + 40) if stage not in PLAIN else ():
        case = plain_case(f"random:{number}", {"T": 5, "A": 11, "B": 6}, seed=number)
        for schedule in list(variants(case.graph))[1:]:
            yield RUN, replace(case, schedule=schedule)


def _related(stage: str) -> Iterator[Attempt]:
    """Properties of two calls, all of them on one case of every fusion and probe in turn."""
    yield "operands may be one", plain_case("probe_exchange", {"T": 3, "A": 4, "H": 4})
    names = ["overlap is refused", "rows between rows"] if stage in REFUSING else []
    names += ["neighbours are apart", "in place is out of place", "operands may be one"]
    names += ["rows are independent"] if stage not in PLAIN else []
    for fusion, prop in itertools.product(sorted((*PROBES, *FUSIONS), key=lambda n: n not in ALIKE), names):
        case = cases(Task(fusion, stage, 5, 0, 0, 1, 1))[0]
        yield prop, replace(case, layouts={n: v for n, v in case.layouts.items() if case.layout(n).kind != "far"})


if __name__ == "__main__":
    prepare_jax()
    disarm()
    print(json.dumps(hunt(sys.argv[1], float(sys.argv[2]))), flush=True)
