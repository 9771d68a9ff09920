"""A fuzzing campaign: threads that each give tasks to a process of their own, and survive whatever happens to it.

A process that dies (an illegal access on a GPU, a segmentation fault) or hangs loses its task: the cases of the task are then
run one by one, those that do it again are reported as failures, and the campaign goes on with a fresh process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from math import isqrt
from pathlib import Path
from typing import Any

from moekit.cli import platform
from moekit.files import read_json, write_text
from moekit.testing import far
from moekit.testing.executors import JAX
from moekit.testing.failures import Failure
from moekit.testing.peers import PEERS
from moekit.testing.processes import Process, Trouble
from moekit.testing.tasks import Cell, Coverage, Report, Task, cases, run_task

WORST = Path(__file__).parent / "worst.json"
HANGS = 120.0  # seconds after which a task on a GPU is taken to hang
BRIEF = 60.0  # the same for one case
PLAIN = 5  # times as long on a CPU, which other work may keep from it
GRACE = 3.0  # seconds that processes have to end what they are at once the time is over
MOST_FAILURES = 50
MAIN = 0.75  # the share of the time after which cells with too few cases come first
FOR_SHRINKING = 0.2  # the share of the time that is kept for making failures small, once there are any
SPREAD = 16  # calls of every fusion that a small budget reaches, where a call costs no compilation
COMPILED = (*JAX, "triton", "triton-interpreter")
EXTRA = 1_000_000  # the turns of tasks for cells with too few cases begin here
DEAR = 1.5  # times a fusion's even share of the seconds: one that has taken more waits until the others have, too
MOST_EXTRA = 6  # such tasks for one cell, beyond those it needs if each of their cases counts


@dataclass
class Result:
    """What a campaign found: coverage by implementation, failures, how long it took, and in words what it left undone."""

    coverage: dict[str, Coverage] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""
    left: list[str] = field(default_factory=list)
    first_failure: int | None = None

    @property
    def counted(self) -> int:
        """Cases that count, of all implementations."""
        return sum(c.counted for c in self.coverage.values())

    @property
    def ran(self) -> int:
        """All cases that ran."""
        return sum(c.ran for c in self.coverage.values())

    def fail(self, failure: Failure) -> None:
        """Take in a failure; the first is remembered with how many cases had run."""
        if self.first_failure is None:
            self.first_failure = self.ran
        self.failures.append(failure)


@dataclass(frozen=True)
class Plan:
    """What to run: fusions, implementations, and how many cases (or seconds) at most.

    `examples` are shared by all implementations but those that have their own in `own`. `combos`: distinct calls of a fusion.
    `least`: cases that every cell of an implementation must have. `accelerated`: implementations that run on a GPU.
    `disarmed`: the verifier is off.
    """

    fusions: Sequence[str]
    implementations: Sequence[str]
    seed: int = 0
    examples: int | None = None
    seconds: float | None = None
    workers: int = 2
    combos: int = 80
    groups: int = 4
    layouts: int = 8
    own: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    accelerated: frozenset[str] = frozenset()
    disarmed: bool = False

    def task(self, fusion: str, implementation: str, combo: int, turn: int, wanted: Cell | None = None) -> Task:
        """One task; through JAX a batch is one compiled shape with many values."""
        groups, layouts = (self.groups, self.layouts) if wanted else self.batch(implementation)
        shape = (groups * layouts, 1) if implementation in JAX else (groups, layouts)
        gpu = implementation in self.accelerated
        return Task(fusion, implementation, self.seed, combo, turn, *shape, accelerated=gpu, wanted=wanted)

    def batch(self, implementation: str) -> tuple[int, int]:
        """Sets of sizes of a task, and of strides for each: fewer where the budget would else be spent on few calls."""
        budget = self.budget(implementation)
        if budget is None or implementation in COMPILED:
            return self.groups, self.layouts
        most = max(4, budget // (len(self.fusions) * min(self.combos, SPREAD)))
        layouts = min(self.layouts, isqrt(most))
        return min(self.groups, most // layouts), layouts

    def tasks(self, implementation: str) -> Iterator[Task]:
        """Tasks without end, every fusion and call in turn: what stops a campaign is its budget."""
        for turn in count():
            for combo in range(self.combos):
                for fusion in self.fusions:
                    yield self.task(fusion, implementation, combo, turn)

    def budget(self, implementation: str) -> int | None:
        """How many cases an implementation is to count, None for as many as there is time for."""
        if implementation in self.own:
            return self.own[implementation]
        return None if self.examples is None else -(-self.examples // (len(self.implementations) - len(self.own)))


def accelerated(implementation: str) -> bool:
    """Whether an implementation runs on a GPU here."""
    on_gpu = platform.gpu_count() > 0
    if implementation in JAX:
        return on_gpu and platform.jax_has_cuda() and os.environ.get("JAX_PLATFORMS", "cuda") != "cpu"
    return implementation == "triton" or (on_gpu and (":" in implementation or implementation in PEERS))


def run(plan: Plan, watch: Callable[[Result], None] = lambda result: None) -> Result:
    """Run a campaign; `watch` is called now and then. Ctrl-C ends it with what there is."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the processes share the cores
    campaign = Campaign(plan)
    processes = [Process(plan.disarmed) for _ in range(plan.workers)]
    with far.room(), ThreadPoolExecutor(plan.workers) as threads:
        serving = [threads.submit(campaign.serve, process) for process in processes]
        try:
            while not all(s.done() for s in serving) and not campaign.overdue:
                with campaign.changed:
                    campaign.changed.wait(0.5)
                    campaign.result.seconds = campaign.elapsed
                    watch(campaign.result)
        except KeyboardInterrupt:
            campaign.result.stopped = "interrupted"
        finally:
            campaign.over = True
            while wait(serving, 0.1).not_done:
                for process in processes:
                    process.kill()
    for served in serving:
        served.result()
    campaign.close()
    return campaign.result


class Campaign:
    """What is next: the main stream of tasks, then more cases for cells that have too few; and what became of them."""

    def __init__(self, plan: Plan):
        self.plan, self.result = plan, Result({name: Coverage() for name in plan.implementations})
        self.begin, self.over, self.changed = time.monotonic(), False, threading.Condition()
        self.streams = {name: plan.tasks(name) for name in plan.implementations}
        self.given: Counter[str] = Counter()
        self.spent: Counter[tuple[str, str]] = Counter()  # seconds, of an implementation and a fusion that it serves
        self.combos: dict[tuple[str, Cell], list[int]] = defaultdict(list)
        self.extra: Counter[tuple[str, Cell]] = Counter()
        self.running: list[Task] = []
        self.cut: list[Task] = []
        self.starved: list[Task] = []
        self.alone: set[Task] = set()

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    @property
    def until(self) -> float:
        """The seconds after which nothing is begun any more."""
        kept = FOR_SHRINKING if self.result.failures else 0.0
        return float("inf") if self.plan.seconds is None else self.plan.seconds * (1 - kept)

    @property
    def overdue(self) -> bool:
        """Whether what is still running must be stopped."""
        return self.elapsed > self.until + GRACE

    def serve(self, process: Process) -> None:
        """A thread's whole life: tasks are given to a process until there is none."""
        while (task := self._take()) is not None:
            try:
                self.run(process, task)
            finally:
                with self.changed:
                    self.running.remove(task)
                    self.changed.notify_all()
        process.end()

    def _take(self) -> Task | None:
        with self.changed:
            while (task := self.next()) is None and self.running and not self.over:
                self.changed.wait(0.5)
            if task is not None:
                self.running.append(task)
            return task

    def next(self) -> Task | None:
        """The next task; None if there is none while others are running. What found too little memory runs at last, alone."""
        if self.over or self.elapsed > self.until or len(self.result.failures) >= MOST_FAILURES:
            return None
        if self.alone.intersection(self.running):
            return None
        pressed = self.plan.seconds is not None and self.elapsed > MAIN * self.plan.seconds
        task = (self._extra() if pressed else None) or self._main() or self._extra()
        if task is None and self.starved and not self.running:
            task = self.starved.pop(0)
            self.alone.add(task)
        return task

    def _main(self) -> Task | None:
        """A task of the implementation that is furthest from its budget."""
        best, least = None, 1.0
        for name in self.plan.implementations:
            budget, coverage = self.plan.budget(name), self.result.coverage[name]
            done = self.given[name] * 1e-9 if budget is None else coverage.counted / max(1, budget)
            if done < least and not self._idle(name):
                best, least = name, done
        if best is None:
            return None
        self.given[best] += 1
        return next(task for task in self.streams[best] if not self._dear(task))

    def _dear(self, task: Task) -> bool:
        """Whether a fusion has had more than its share of the time; every call has its first turn whatever it costs.

        Those that an implementation does not serve have no share: the others would wait until refusals had taken as long.
        """
        served = [seconds for (name, _), seconds in self.spent.items() if name == task.implementation]
        return task.turn > 0 and self.spent.get((task.implementation, task.fusion), 0.0) * len(served) > DEAR * sum(served)

    def _idle(self, name: str) -> bool:
        """Whether an implementation was asked for every call once and could serve none."""
        every = self.plan.combos * len(self.plan.fusions)
        return self.given[name] >= every and not self.result.coverage[name].ran and not self.result.failures

    def _extra(self) -> Task | None:
        """A task for the cell that lacks most, those that run taken as done."""
        lacks: Counter[tuple[str, Cell]] = Counter()
        for name, coverage in self.result.coverage.items():
            least = self.plan.least.get(name, 0)
            most = MOST_EXTRA + least // (self.plan.groups * self.plan.layouts)
            lacks.update({(name, c): n for c, n in coverage.below(least).items() if self.extra[name, c] < most})
        for t in self.running:
            if t.wanted is not None:
                lacks[t.implementation, t.wanted] -= t.size
        if not (lacking := (+lacks).most_common(1)):
            return None
        name, c = wanted = lacking[0][0]
        self.extra[wanted] += 1
        combos = self.combos[wanted]
        return self.plan.task(c[0], name, combos[self.extra[wanted] % len(combos)], EXTRA + self.extra[wanted], wanted=c)

    def run(self, process: Process, task: Task) -> None:
        """Run a task, and find out which of its cases it is if it takes the process with it, or raises."""
        if (trouble := self._ask(process, task)) is None:
            return
        if task.size == 1:
            self._blame(task, trouble)
            return
        again = [(one, t) for one in task.singles() if not self.over and (t := self._ask(process, one))]
        for one, its in again:
            self._blame(one, its)
        if not again:
            how = "the time did not suffice to say which it is" if self.over else "it did not happen again to any"
            self._blame(task, Trouble("ended", f"{trouble.text}; {how} of the {task.size} cases from this one on"))

    def _ask(self, process: Process, task: Task) -> Trouble | None:
        """Run a task and take in what came of it; the trouble, if a case of the task is to blame for it."""
        begin = time.monotonic()
        patience = (HANGS if task.size > 1 else BRIEF) * (1 if task.accelerated else PLAIN)
        answer = process.ask(run_task, task, patience=patience)
        with self.changed:
            if not isinstance(answer, Report) or answer.coverage.ran or answer.failures:
                self.spent[task.implementation, task.fusion] += time.monotonic() - begin
            if isinstance(answer, Report):
                self._done(task, answer)
            elif self.over:
                self.cut.append(task)
            elif answer.kind != "memory":
                return answer
            elif task not in self.alone:
                self.starved.append(task)
            else:
                text = f"{task.size} cases of {task.fusion} ({task.implementation}) were not run: {answer.text}"
                self.result.left.append(text)
        return None

    def _done(self, task: Task, report: Report) -> None:
        for c in report.coverage.cells:
            if task.combo not in (combos := self.combos[task.implementation, c]):
                combos.append(task.combo)
        self.result.coverage[task.implementation].add(report.coverage)
        for failure in report.failures:
            self.result.fail(failure)

    def _blame(self, task: Task, trouble: Trouble) -> None:
        with self.changed:
            fatal = trouble.kind == "ended"
            self.result.fail(Failure(cases(task)[0], task.implementation, (trouble.text,), fatal=fatal))

    def close(self) -> None:
        """Nothing is run any more: what is left goes into words."""
        left, self.result.seconds = self.result.left, self.elapsed
        if self.cut:
            left.append(f"{sum(t.size for t in self.cut)} cases of {len(self.cut)} tasks were cut off when the time was over")
        if waiting := sum(t.size for t in self.starved):
            left.append(f"{waiting} cases were not run again by themselves, having found too little memory on the device")
        for name, coverage in self.result.coverage.items():
            if self._idle(name):
                left.append(f"{name}: it can be asked for none of these calls")
            least = self.plan.least.get(name, 0)
            if few := coverage.below(least):
                left.append(f"{name}: {len(few)} of {len(coverage.cells)} cells have fewer than {least} cases")


def worst_seen(path: Path = WORST) -> dict[str, dict[str, Any]]:
    """For every fusion the worst error ratio that campaigns have seen, and the implementation, device and command of it.

    The constants of the numerics contract are held to these.
    """
    return read_json(path) if path.exists() else {}


def record_worst(path: Path, coverage: Mapping[str, Coverage], plan: Plan) -> None:
    """Take the ratios of a campaign into the file where they are worse than what it has."""
    kept, gpus = worst_seen(path), platform.gpus()
    for implementation, seen in coverage.items():
        device = gpus[0].name if gpus and implementation in plan.accelerated else "CPU"
        for fusion, ratio in seen.worst.items():
            if ratio > kept.get(fusion, {"ratio": 0.0})["ratio"]:
                kept[fusion] = {"ratio": round(ratio, 4), "implementation": implementation, "device": device,
                                "command": " ".join(["moekit", *sys.argv[1:]])}  # fmt: skip
    write_text(path, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
