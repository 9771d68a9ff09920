"""A fuzzing campaign: worker processes that take tasks, and a parent that survives whatever happens to them.

A worker that dies (an illegal access on a GPU, a segmentation fault) or hangs loses its task: the parent halves it until one
case is left, reports that case as a failure, and goes on with a fresh worker.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from moekit.testing.case import FuzzCase
from moekit.testing.coverage import Coverage
from moekit.testing.tasks import JAX, Report, Task, cases, run_task

HANGS = 120.0  # seconds after which a task is taken to hang
GRACE = 10.0  # seconds that workers have to end what they are at once the time is over
MOST_FAILURES = 50


@dataclass(frozen=True)
class Failure:
    """A case that one implementation gets wrong."""

    case: FuzzCase
    implementation: str
    problems: tuple[str, ...]


@dataclass
class Result:
    """What a campaign found: coverage by implementation, failures, and how long it took."""

    coverage: dict[str, Coverage] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""

    @property
    def counted(self) -> int:
        """Cases that count, of all implementations."""
        return sum(c.counted for c in self.coverage.values())

    @property
    def ran(self) -> int:
        """All cases that ran."""
        return sum(c.ran for c in self.coverage.values())


@dataclass(frozen=True)
class Plan:
    """What to run: fusions, implementations, and how many cases (or seconds) at most. `combos`: distinct calls of a fusion."""

    fusions: Sequence[str]
    implementations: Sequence[str]
    seed: int = 0
    examples: int | None = None
    seconds: float | None = None
    workers: int = 2
    combos: int = 80
    groups: int = 4
    layouts: int = 8

    def task(self, fusion: str, implementation: str, combo: int, turn: int) -> Task:
        """One task; through JAX a batch is one compiled shape with many values."""
        shape = (self.groups * self.layouts, 1) if implementation in JAX else (self.groups, self.layouts)
        gpu = implementation == "triton" or ":" in implementation or (implementation in JAX and _on_gpu())
        return Task(fusion, implementation, self.seed, combo, turn, *shape, accelerated=gpu)

    def tasks(self) -> Iterator[Task]:
        """Tasks without end, every fusion and call in turn: what stops a campaign is its budget."""
        for turn in count():
            for combo in range(self.combos):
                for fusion in self.fusions:
                    for implementation in self.implementations:
                        yield self.task(fusion, implementation, combo, turn)


def _on_gpu() -> bool:
    from moekit.cli.platform import gpu_count, jax_has_cuda

    return gpu_count() > 0 and jax_has_cuda() and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu"


class _Worker:
    """A process that runs one task at a time."""

    def __init__(self, context):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.since = time.monotonic()

    def give(self, task: Task) -> None:
        """Hand over a task."""
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def end(self) -> int | None:
        """Stop the process; its exit code, if it had ended by itself."""
        self.process.join(0.2)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            self.process.join(5)
        self.connection.close()
        return code


def _serve(connection) -> None:
    """A worker's whole life. It ends itself after an error that leaves its device unusable."""
    from moekit.cli.platform import prepare_jax

    prepare_jax()
    try:
        while True:
            task = connection.recv()
            try:
                connection.send(run_task(task))
            except Exception as error:
                if "CUDA" in str(error):
                    os._exit(70)
                connection.send((task, f"{type(error).__name__}: {error}", traceback.format_exc(limit=4)))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        return


def run(plan: Plan, watch: Callable[[Result], None] = lambda result: None) -> Result:
    """Run a campaign; `watch` is called after every task. Ctrl-C ends it with what there is."""
    result = Result({name: Coverage() for name in plan.implementations})
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the workers share the cores
    begin = time.monotonic()
    workers: list[_Worker] = []
    try:
        _drive(plan, result, workers, begin, watch)
    except KeyboardInterrupt:
        result.stopped = "interrupted"
    finally:
        for w in workers:
            w.end()
    result.seconds = time.monotonic() - begin
    return result


def _drive(plan: Plan, result: Result, workers: list[_Worker], begin: float, watch: Callable[[Result], None]) -> None:
    context = multiprocessing.get_context("spawn")
    stream, again = plan.tasks(), deque()
    workers += [_Worker(context) for _ in range(plan.workers)]

    def next_task() -> Task | None:
        if again:
            return again.popleft()
        late = plan.seconds is not None and time.monotonic() - begin > plan.seconds
        enough = plan.examples is not None and result.counted >= plan.examples
        return None if late or enough or len(result.failures) >= MOST_FAILURES else next(stream)

    while True:
        for w in workers:
            if w.task is None and (task := next_task()):
                w.give(task)
        busy = [w for w in workers if w.task is not None]
        if not busy:
            return
        ready = multiprocessing.connection.wait([w.connection for w in busy], timeout=2)
        for w in busy:
            if w.connection in ready:
                _receive(w, workers, result, again, context)
            elif time.monotonic() - w.since > HANGS:
                _lost(w, workers, result, again, context, f"it did not end in {HANGS:.0f} seconds")
        result.seconds = time.monotonic() - begin
        watch(result)
        if plan.seconds is not None and result.seconds > plan.seconds + GRACE:
            result.stopped = f"{len([w for w in workers if w.task])} tasks were cut off"
            return


def _receive(w: _Worker, workers: list[_Worker], result: Result, again: deque, context) -> None:
    try:
        answer = w.connection.recv()
    except (EOFError, OSError):
        _lost(w, workers, result, again, context, "")
        return
    w.task = None
    if isinstance(answer, Report):
        result.coverage[answer.task.implementation].add(answer.coverage)
        result.failures += [Failure(c, answer.task.implementation, tuple(p)) for c, p in answer.failures]
    else:
        task, text, where = answer
        _narrow(task, result, again, f"{text}\n{where}")


def _lost(w: _Worker, workers: list[_Worker], result: Result, again: deque, context, why: str) -> None:
    """A worker died or hangs: what it was at is narrowed down, and another takes its place."""
    task, code = w.task, w.end()
    workers[workers.index(w)] = _Worker(context)
    why = why or f"its process died with exit code {code}" + (": an error of the device" if code == 70 else "")
    _narrow(task, result, again, why)


def _narrow(task: Task, result: Result, again: deque, why: str) -> None:
    if halves := task.halves():
        again.extend(halves)
        return
    flat = [case for group in cases(task) for case in group]
    result.failures.append(Failure(flat[task.start], task.implementation, (why,)))


def replay(case: FuzzCase, implementation: str) -> list[str]:
    """Run one case here and now; what is wrong with it."""
    from moekit.testing.batch import run_cases
    from moekit.testing.executors import executor
    from moekit.testing.oracle import Oracle

    if implementation in JAX:
        from moekit.testing.jax_batch import run_values

        return run_values(implementation, [(case, Oracle.of(case, implementation))])[0].problems
    made = executor(implementation)
    return run_cases(made, [(case, Oracle.of(case, implementation, made.reference))])[0].problems


def isolated(case: FuzzCase, implementation: str, seconds: float = 120.0) -> list[str]:
    """Run one case in a process of its own, which may die of it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_isolated, args=(theirs, case, implementation), daemon=True)
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else [f"it did not end in {seconds:.0f} seconds"]
    except EOFError:
        process.join(5)
        return [f"its process died with exit code {process.exitcode}"]
    finally:
        if process.is_alive():
            process.kill()
        process.join(5)


def _isolated(connection, case: FuzzCase, implementation: str) -> None:
    from moekit.cli.platform import prepare_jax

    prepare_jax()
    connection.send(replay(case, implementation))


class Prober:
    """Says whether cases fail, in one worker process after another: shrinking asks hundreds of times."""

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.context = multiprocessing.get_context("spawn")
        self.process, self.connection = None, None

    def __call__(self, case: FuzzCase) -> bool:
        """Whether the case fails, or kills the process it runs in."""
        if self.process is None or not self.process.is_alive():
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=_probe, args=(theirs, self.implementation), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.connection.send(case)
            if self.connection.poll(120):
                return bool(self.connection.recv())
        except (EOFError, OSError):
            pass
        self.process.kill()
        self.process.join(5)
        return True


def _probe(connection, implementation: str) -> None:
    from moekit.cli.platform import prepare_jax

    prepare_jax()
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        try:
            problems = replay(case, implementation)
        except Exception as error:
            if "CUDA" in str(error):
                os._exit(70)
            problems = [f"{type(error).__name__}: {error}"]
        connection.send(problems)
