"""A fuzzing campaign: worker processes that take tasks, and a parent that survives whatever happens to them.

A worker that dies (an illegal access on a GPU, a segmentation fault) or hangs loses its task: the task is halved until one
case is left, that case is reported as a failure, and the campaign goes on with a fresh worker.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moekit.testing.agenda import Agenda, Failure, Plan, Result
from moekit.testing.coverage import Coverage
from moekit.testing.room import close_room, open_room
from moekit.testing.tasks import JAX, Report
from moekit.testing.workers import Trouble, Worker, isolated, replay

__all__ = ["Failure", "Plan", "Result", "accelerated", "isolated", "replay", "run"]

HANGS = 120.0  # seconds after which a task is taken to hang
BRIEF = 60.0  # the same for one case, when a task that hung is halved
GRACE = 3.0  # seconds that workers have to end what they are at once the time is over


def accelerated(implementation: str) -> bool:
    """Whether an implementation runs on a GPU here."""
    from moekit.cli.platform import gpu_count, jax_has_cuda
    from moekit.testing.peers import PEERS

    on_gpu = gpu_count() > 0
    if implementation in JAX:
        return on_gpu and jax_has_cuda() and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu"
    return implementation == "triton" or (on_gpu and (":" in implementation or implementation in PEERS))


def run(plan: Plan, watch: Callable[[Result], None] = lambda result: None) -> Result:
    """Run a campaign; `watch` is called after every task. Ctrl-C ends it with what there is."""
    result = Result({name: Coverage() for name in plan.implementations})
    try:
        _run(plan, result, watch)
    except KeyboardInterrupt:
        result.stopped = "interrupted"
    return result


def interrupted(plan: Plan) -> Result:
    """What a campaign found that was stopped before it began."""
    return Result({name: Coverage() for name in plan.implementations}, stopped="interrupted")


def _run(plan: Plan, result: Result, watch: Callable[[Result], None]) -> None:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the workers share the cores
    begin = time.monotonic()
    agenda, workers = Agenda(plan, result, begin), []
    with tempfile.TemporaryDirectory(prefix="moekit-fuzz-") as folder:
        open_room(Path(folder))
        try:
            _drive(plan, agenda, workers, watch)
        finally:
            close_room()
            agenda.end([w.task for w in workers if w.task is not None])
            for w in workers:
                w.stop()
            for w in workers:
                w.end()
            result.seconds = time.monotonic() - begin


def _drive(plan: Plan, agenda: Agenda, workers: list[Worker], watch: Callable[[Result], None]) -> None:
    result, limit = agenda.result, lambda w: BRIEF + (HANGS - BRIEF) * (w.task.size > 1)
    workers += [Worker(plan.disarmed) for _ in range(plan.workers)]
    while True:
        for w in workers:
            if w.task is None and (task := agenda.next([o.task for o in workers if o.task is not None])):
                w.give(task)
        busy = [w for w in workers if w.task is not None]
        if not busy:
            return
        ready = multiprocessing.connection.wait([w.connection for w in busy], timeout=1)
        for w in busy:
            if w.connection in ready:
                _receive(w, workers, agenda)
            elif time.monotonic() - w.since > limit(w):
                _lost(w, workers, agenda, f"it did not end in {limit(w):.0f} seconds")
        result.seconds = time.monotonic() - agenda.begin
        watch(result)
        if agenda.until is not None and result.seconds > agenda.until + GRACE:
            return


def _receive(w: Worker, workers: list[Worker], agenda: Agenda) -> None:
    task = w.task
    assert task is not None
    try:
        answer: Report | Trouble = w.connection.recv()
    except (EOFError, OSError):
        _lost(w, workers, agenda, "")
        return
    if isinstance(answer, Trouble) and answer.kind == "device":
        _lost(w, workers, agenda, f"its process ended with an error of the device: {answer.text}")
        return
    w.task = None
    if isinstance(answer, Report):
        agenda.done(task, answer.coverage, answer.failures)
    elif answer.kind == "memory":
        agenda.starved(task, answer.text)
    else:
        agenda.lost(task, answer.text, fatal=False)


def _lost(w: Worker, workers: list[Worker], agenda: Agenda, why: str) -> None:
    """A worker died or hangs: what it was at is narrowed down, and another takes its place."""
    task, code = w.task, w.end()
    assert task is not None
    workers[workers.index(w)] = Worker(agenda.plan.disarmed)
    agenda.lost(task, why or f"its process died with exit code {code}")
