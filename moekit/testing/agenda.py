"""What a campaign does next: its main stream of tasks, then more cases for cells that have too few, and, before either,
the halves of a task that killed its worker.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from math import isqrt

from moekit.testing.case import FuzzCase
from moekit.testing.coverage import Cell, Coverage
from moekit.testing.tasks import JAX, Task, cases

MOST_FAILURES = 50
MAIN = 0.75  # the share of the time after which cells with too few cases come first
FOR_SHRINKING = 0.2  # the share of the time that is kept for making failures small, once there are any
SPREAD = 16  # calls of every fusion that a small budget reaches, where a call costs no compilation
COMPILED = (*JAX, "triton", "triton-interpreter")
EXTRA = 1_000_000  # the turns of tasks for cells with too few cases begin here
MOST_EXTRA = 6  # such tasks for one cell, beyond those it needs if each of their cases counts


@dataclass(frozen=True)
class Failure:
    """A case that one implementation gets wrong."""

    case: FuzzCase
    implementation: str
    problems: tuple[str, ...]
    fatal: bool = False


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
        shared = [i for i in self.implementations if i not in self.own]
        return None if self.examples is None else -(-self.examples // len(shared))


@dataclass
class _Trial:
    """The search for the case that killed a worker."""

    task: Task
    why: str
    open: int
    found: bool = False


class Agenda:
    """Hands out tasks, and takes in what became of them."""

    def __init__(self, plan: Plan, result: Result, begin: float):
        self.plan, self.result, self.begin = plan, result, begin
        self.streams = {name: plan.tasks(name) for name in plan.implementations}
        self.given: Counter[str] = Counter()
        self.again: deque[Task] = deque()
        self.alone: deque[Task] = deque()
        self.lonely: Task | None = None
        self.trials: dict[int, _Trial] = {}
        self.combos: dict[tuple[str, Cell], list[int]] = defaultdict(list)
        self.extra: Counter[tuple[str, Cell]] = Counter()

    @property
    def until(self) -> float | None:
        """The seconds after which nothing is begun any more."""
        kept = FOR_SHRINKING if self.result.failures else 0.0
        return None if self.plan.seconds is None else self.plan.seconds * (1 - kept)

    def next(self, running: Sequence[Task]) -> Task | None:
        """The next task; None if there is none while `running` are under way."""
        elapsed = time.monotonic() - self.begin
        if (self.until is not None and elapsed > self.until) or len(self.result.failures) >= MOST_FAILURES:
            return None
        if self.lonely is not None:
            return None
        if self.again:
            return self.again.popleft()
        pressed = self.plan.seconds is not None and elapsed > MAIN * self.plan.seconds
        task = (pressed and self._extra(running)) or self._main() or self._extra(running)
        if task is None and self.alone and not running:
            task = self.lonely = self.alone.popleft()
        return task or None

    def _main(self) -> Task | None:
        """A task of the implementation that is furthest from its budget."""
        best, least = None, 1.0
        for name in self.plan.implementations:
            if self._idle(name):
                continue
            budget = self.plan.budget(name)
            done = self.given[name] * 1e-9 if budget is None else self.result.coverage[name].counted / max(1, budget)
            if done < least:
                best, least = name, done
        if best is None:
            return None
        self.given[best] += 1
        return next(self.streams[best])

    def _idle(self, name: str) -> bool:
        """Whether an implementation was asked for every call once and could serve none."""
        every = self.plan.combos * len(self.plan.fusions)
        return self.given[name] >= every and not self.result.coverage[name].ran and not self.result.failures

    def _extra(self, running: Sequence[Task]) -> Task | None:
        """A task for the cell that lacks most, those under way taken as done."""
        coming: Counter[tuple[str, Cell]] = Counter()
        for t in running:
            if t.wanted is not None:
                coming[t.implementation, t.wanted] += t.size
        best, lack = None, 0
        for name in self.plan.implementations:
            least = self.plan.least.get(name, 0)
            for c, missing in self.result.coverage[name].below(least).items():
                missing -= coming[name, c]
                most = MOST_EXTRA + least // (self.plan.groups * self.plan.layouts)
                if missing > lack and self.combos[name, c] and self.extra[name, c] < most:
                    best, lack = (name, c), missing
        if best is None:
            return None
        self.extra[best] += 1
        combos = self.combos[best]
        combo = combos[self.extra[best] % len(combos)]
        return self.plan.task(best[1][0], best[0], combo, EXTRA + self.extra[best], wanted=best[1])

    def done(self, task: Task, coverage: Coverage, failures: Sequence[tuple[FuzzCase, Sequence[str]]]) -> None:
        """A task came to its end."""
        for c in coverage.cells:
            combos = self.combos[task.implementation, c]
            if task.combo not in combos:
                combos.append(task.combo)
        self.result.coverage[task.implementation].add(coverage)
        for case, problems in failures:
            self.result.fail(Failure(case, task.implementation, tuple(problems)))
        self._close(task)

    def starved(self, task: Task, why: str) -> None:
        """A task found too little memory: it is tried once more, with no other beside it."""
        if self.lonely is not task:
            self.alone.append(task)
            return
        self.result.left.append(f"{task.size} cases of {task.fusion} ({task.implementation}) were not run: {why}")
        self._close(task)

    def lost(self, task: Task, why: str, fatal: bool = True) -> None:
        """A task took its worker with it, or raised: it is halved until one case is left."""
        self.lonely = None if self.lonely is task else self.lonely
        trial = self.trials.get(task.trial)
        if trial is None:
            task = replace(task, trial=len(self.trials) + 1)
            trial = self.trials[task.trial] = _Trial(task, why, 1)
        halves = task.halves()
        trial.open += len(halves)
        self.again.extend(halves)
        if not halves:
            trial.found = True
            self._blame(task, why, fatal)
        self._close(task)

    def _close(self, task: Task) -> None:
        if self.lonely is task:
            self.lonely = None
        if (trial := self.trials.get(task.trial)) is None:
            return
        trial.open -= 1
        if not trial.open and not trial.found:
            self._blame(
                trial.task, f"{trial.why}; it did not happen again to any of the {trial.task.size} cases from this one on"
            )

    def _blame(self, task: Task, why: str, fatal: bool = True) -> None:
        case = [c for group in cases(task) for c in group][task.start]
        self.result.fail(Failure(case, task.implementation, (why,), fatal))

    def end(self, cut: Sequence[Task]) -> None:
        """Nothing is begun any more, and `cut` were stopped: what is left goes into words, a death unexplained is a failure."""
        left = self.result.left
        if cut:
            left.append(f"{sum(t.size for t in cut)} cases of {len(cut)} tasks were cut off when the time was over")
        for trial in self.trials.values():
            if trial.open and not trial.found:
                text = f"the time did not suffice to say which of {trial.task.size} cases from this one on it is"
                self._blame(trial.task, f"{trial.why}; {text}")
        if waiting := sum(t.size for t in self.alone):
            left.append(f"{waiting} cases were not run again by themselves, having found too little memory on the device")
        for name, coverage in self.result.coverage.items():
            if self._idle(name):
                left.append(f"{name}: it can be asked for none of these calls")
            least = self.plan.least.get(name, 0)
            if few := coverage.below(least):
                left.append(f"{name}: {len(few)} of {len(coverage.cells)} cells have fewer than {least} cases")
