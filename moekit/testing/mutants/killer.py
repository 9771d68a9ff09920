"""The process that tries to kill one mutant: numerical properties of cases over every fusion and probe, `verify` switched off.

    python -m moekit.testing.mutants.killer STAGE SECONDS

It runs in a copy of the package and prints one JSON line: what failed first, or that nothing did.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator

from moekit.testing.executors import JAX
from moekit.testing.mutants.directed import VIEWED, directed
from moekit.testing.random_graphs import WIDER
from moekit.testing.tasks import Task

STAGES = ("interpret", "triton-interpreter", "pallas")
ARRAYS = ("numpy", "eager", "xla")  # array evaluation: what no tile program goes through
COMBOS = {"interpret": 24, "triton-interpreter": 10, "pallas": 8, "numpy": 12, "eager": 12, "xla": 8}
RANDOM = {"interpret": 12, "triton-interpreter": 4, "pallas": 3, "numpy": 8, "eager": 8, "xla": 3}  # declarations a round
SEED = 7


def disarm() -> None:
    """Switch off every check that is not numerical: the verifier's rules."""
    from moekit.compile import plan

    plan.verify = lambda program: None


def tasks(stage: str) -> Iterator:
    """Small batches: every fusion and probe in turn, then some random declarations, then all again with other sizes."""
    from moekit.fusions import FUSIONS
    from moekit.testing.probes import PROBES

    shape, some = (5, 1) if stage in JAX else (2, 2), RANDOM[stage]
    for combo in range(COMBOS[stage]):
        for name in (*PROBES, *FUSIONS):
            yield Task(name, stage, SEED, combo, 0, *shape)
        for number in range(combo * some, (combo + 1) * some):
            yield Task(f"random:{number if number % 3 == 0 else WIDER + number}", stage, SEED, 0, 0, *shape)


def _ran(task: Task) -> tuple[list[str], int]:
    """What is wrong with the first failure of a batch, and how many cases ran."""
    from moekit.testing.tasks import run_task

    report = run_task(task)
    return report.failures[0][1] if report.failures else [], report.coverage.ran


def attempts(stage: str) -> Iterator[Callable[[], tuple[list[str], int]]]:
    """Batches and directed cases in turn; where each directed case is compiled, one for every two batches."""
    batches, singles = tasks(stage), directed(stage)
    for turn in itertools.count():
        single = next(singles, None) if turn % 2 == 0 or stage not in VIEWED else None
        batch = next(batches, None)
        if single is not None:
            yield lambda single=single: (single(stage), 1)
        if batch is not None:
            yield lambda batch=batch: _ran(batch)
        if turn % 2 == 0 and single is None and batch is None:
            return


def hunt(stage: str, seconds: float) -> dict:
    """The first failure of the stage, and how many cases it took."""
    begin, ran = time.monotonic(), 0
    for attempt in attempts(stage):
        try:
            problems, count = attempt()
        except Exception as error:
            problems, count = [f"{type(error).__name__}: {error}"], 1
        ran += count
        if problems:
            return {"killed": True, "ran": ran, "by": problems[0][:200]}
        if time.monotonic() - begin > seconds:
            break
    return {"killed": False, "ran": ran, "by": ""}


def main() -> None:
    """Run one stage and print what came of it."""
    from moekit.cli.platform import prepare_jax

    prepare_jax()
    disarm()
    print(json.dumps(hunt(sys.argv[1], float(sys.argv[2]))), flush=True)


if __name__ == "__main__":
    main()
