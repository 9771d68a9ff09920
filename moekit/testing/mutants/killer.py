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

from moekit.cli.platform import prepare_jax
from moekit.fusions import FUSIONS
from moekit.testing.batch import run_case
from moekit.testing.executors import JAX, executor
from moekit.testing.mutants.directed import RUN, VIEWED, Attempt, directed
from moekit.testing.probes import PROBES
from moekit.testing.processes import disarm
from moekit.testing.properties import PROPERTIES
from moekit.testing.random_graphs import WIDER
from moekit.testing.tasks import Task, run_task

STAGES = ("interpret", "triton-interpreter", "pallas")
ARRAYS = ("numpy", "eager", "xla")  # array evaluation: what no tile program goes through
COMBOS = {"interpret": 24, "triton-interpreter": 10, "pallas": 8, "numpy": 12, "eager": 12, "xla": 8}
RANDOM = {"interpret": 12, "triton-interpreter": 4, "pallas": 3, "numpy": 8, "eager": 8, "xla": 3}  # declarations a round
SEED = 7


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
        return report.failures[0][1] if report.failures else [], report.coverage.ran
    (prop, case), made = attempt, executor(stage)
    if prop == RUN:
        return run_case(made, case).problems, 1
    return PROPERTIES[prop](made, case) if made.supports(case) else [], 1


def hunt(stage: str, seconds: float) -> dict:
    """The first failure of the stage, and how many cases it took."""
    begin, ran = time.monotonic(), 0
    for attempt in attempts(stage):
        try:
            found, count = problems(stage, attempt)
        except Exception as error:
            found, count = [f"{type(error).__name__}: {error}"], 1
        ran += count
        if found:
            return {"killed": True, "ran": ran, "by": found[0][:200]}
        if time.monotonic() - begin > seconds:
            break
    return {"killed": False, "ran": ran, "by": ""}


if __name__ == "__main__":
    prepare_jax()
    disarm()
    print(json.dumps(hunt(sys.argv[1], float(sys.argv[2]))), flush=True)
