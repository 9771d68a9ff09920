"""The process that tries to kill one mutant: numerical properties of cases over every fusion and probe, `verify` switched off.

    python -m moekit.testing.mutants.killer STAGE SECONDS

It runs in a copy of the package and prints one JSON line: what failed first, or that nothing did.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator

STAGES = ("interpret", "triton-interpreter", "pallas")
ARRAYS = ("numpy", "eager", "xla")  # array evaluation: what no tile program goes through
VIEWED = ("pallas", "xla")  # where a tensor is a View of a base: no stride 0, no strides past 2^31
COMBOS = {"interpret": 24, "triton-interpreter": 10, "pallas": 8, "numpy": 12, "eager": 12, "xla": 8}
SEED = 7


def disarm() -> None:
    """Switch off every check that is not numerical: the verifier's rules."""
    from moekit.compile import plan

    plan.verify = lambda program: None


def tasks(stage: str) -> Iterator:
    """Small batches, every fusion and probe in turn, then random declarations."""
    from moekit.testing.tasks import template

    for task in _every(stage):
        # Triton's interpreter rounds to bfloat16 by cutting off bits: what it says of such a graph shows no fault of ours
        if stage != "triton-interpreter" or all(n.dtype != "bfloat16" for n in template(task)[0].graph.nodes):
            yield task


def _every(stage: str) -> Iterator:
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES
    from moekit.testing.tasks import JAX, Task

    shape = (5, 1) if stage in JAX else (2, 2)
    for combo in range(COMBOS[stage]):
        for name in (*PROBES, *FUSIONS):
            if stage == "triton-interpreter" and name == "probe_columns":
                continue  # Triton's interpreter cannot loop to a run-time extent under numpy 2.4
            yield Task(name, stage, SEED, combo, 0, *shape)
    for number in range(8 if stage in JAX else 24):
        yield Task(f"random:{number}", stage, SEED, 0, 0, *shape)


def directed(stage: str) -> Iterator:
    """Cases that chance meets seldom: one to three rows apart, offsets past 2³¹, more than 256 experts, rows of NaN, splits."""
    from moekit.testing.case import FuzzCase, Layout

    f32 = "float32"
    far = Layout("far", (0, 1), (0, 0), (2**27 + 5, 1), (0, 0))
    rows = (Layout("padded", (0, 1), (0, 0), (1, 1), (0, 5)), Layout("transposed", (1, 0), (0, 0), (1, 1), (0, 0)))
    for tokens, lying in itertools.product((1, 2, 3), rows):
        yield FuzzCase("silu_and_mul", {"T": tokens, "I": 6}, {"gate_up": f32}, layouts={"gate_up": lying, "out": lying})
    if stage in VIEWED:
        for name in ("gate_gemm", "probe_product"):
            operands = list(FuzzCase(name, {}, {}).declaration.tensors)
            axes = {"T": 18, "D": 150, "P": 20} if name == "gate_gemm" else {"T": 18, "H": 150, "P": 20}
            yield FuzzCase(name, axes, dict.fromkeys(operands, f32), recipe="integers")
        inner = Layout("arbitrary", (0, 1, 2), (0, 2, 1), (1, 3, 1), (0, 1, 0))
        sizes = {"T": 3, "V": 8, "D": 1}
        yield FuzzCase("gated_rms_norm", sizes, dict.fromkeys(("x", "z", "weight"), f32), layouts={"x": inner, "out": inner})
    else:
        yield FuzzCase("silu_and_mul", {"T": 9, "I": 4}, {"gate_up": "float16"}, layouts={"gate_up": far})
        yield FuzzCase("silu_and_mul", {"T": 9, "I": 4}, {"gate_up": "float16"}, layouts={"out": far})
    for dtype in (f32, "float16"):
        for recipe in ("nans", "normal", "special", "lowest", "ties", "equal"):
            for experts in (300, 60):
                yield FuzzCase("topk_softmax", {"T": 4, "E": experts}, {"logits": dtype}, {"k": 10, "renormalize": True,
                               "nan_to_zero": False}, recipe=recipe, layouts={"logits": Layout(
                                   "padded", (0, 1), (0, 0), (1, 1), (0, 4))} if stage not in VIEWED else {})  # fmt: skip
    sizes = {"T": 19, "H": 45, "P": 21, "D": 45, "I": 21, "E": 20, "G": 1}
    names = ("probe_extremes", "probe_product", "probe_gated", "probe_turned", "add_rms_norm", "gate_gemm", "gate_block")
    schedules = ("dots", "split", "looped", "single parts", "parts", "whole", "small")
    for recipe, dtype in itertools.product(("integers", "normal", "huge"), (f32, "float16")):
        for schedule, name in itertools.product(schedules, names):
            if name == "gate_block" and schedule in ("small", "single parts", "looped"):
                continue  # 20 seconds each
            fusion = FuzzCase(name, sizes, {}).declaration
            dtypes = dict.fromkeys(fusion.tensors, dtype)
            mode = "in place" if name == "add_rms_norm" else "out"
            params = {"eps": 1e-6, "offset": 1.0} if name in ("add_rms_norm", "gate_block") else {}
            used = {a: n for a, n in sizes.items() if a in _axes(fusion)}
            yield FuzzCase(name, used, dtypes, params, mode=mode, recipe=recipe, schedule=schedule)


def _axes(fusion) -> set[str]:
    return {a for s in fusion.tensors.values() for d in s.dims for _, a in d.terms}


def hunt(stage: str, seconds: float) -> dict:
    """The first failure of the stage, and how many cases it took."""
    from moekit.testing.campaign import replay
    from moekit.testing.tasks import run_task

    begin, ran = time.monotonic(), 0
    batches, single = tasks(stage), directed(stage)
    for turn in range(1_000_000):
        if time.monotonic() - begin > seconds:
            break
        case = next(single, None) if turn % 3 == 0 or stage not in VIEWED else None
        if case is not None:
            ran += 1
            try:
                problems = replay(case, stage)
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            if problems:
                return {"killed": True, "ran": ran, "by": problems[0][:200], "case": case.to_json()}
        task = next(batches, None)
        if task is None and case is None:
            break
        if task is None:
            continue
        try:
            report = run_task(task)
        except Exception as error:
            return {"killed": True, "ran": ran + 1, "by": f"{task.fusion}: {type(error).__name__}: {error}"[:200], "case": None}
        ran += report.coverage.ran
        if report.failures:
            failed, problems = report.failures[0]
            return {"killed": True, "ran": ran, "by": problems[0][:200], "case": failed.to_json()}
    return {"killed": False, "ran": ran, "by": "", "case": None}


def main() -> None:
    """Run one stage and print what came of it."""
    from moekit.cli.platform import prepare_jax

    prepare_jax()
    disarm()
    print(json.dumps(hunt(sys.argv[1], float(sys.argv[2]))), flush=True)


if __name__ == "__main__":
    main()
