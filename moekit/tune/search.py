"""Searching the legal schedules of a graph: from the heuristic's, step by step, for each bucket of rows.

First every bucket by itself. Then, because a row's result may not depend on the rows beside it, all buckets together: only
schedules that add up in the same order (compile/order.py) can serve them side by side, so one order is chosen for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moekit.compile.analysis import axis_uses
from moekit.compile.order import Order
from moekit.compile.schedule import WARPS, Schedule, legal, pow2, uses_dot
from moekit.lang.graph import Graph
from moekit.tune.table import heuristics, order_of, rows_axis

LONGEST_PIPELINE = 8
BETTER = 0.99  # a step is taken if it takes at most so much of the time
ALONE = 0.6  # of the time is for each bucket by itself
MOST_ORDERS, MOST_STARTS = 8, 4  # that are tried for all buckets together
AT_ONCE = 32  # schedules checked between two looks at the clock
WORTH = 0.95  # an entry is, if its schedule takes at most so much of the heuristic's time
NO_WORSE = 1.02  # at any number of rows


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried for a bucket: its time over the heuristic's (geometric mean), or why it was refused."""

    bucket: int
    schedule: Schedule
    ratio: float
    problem: str | None = None


@dataclass
class Bench:
    """What a search needs of a machine. `check`: a problem, or None, of each of several schedules; `measure`: microseconds

    of one at a number of rows. `tell` hears of every trial, with the seconds spent.
    """

    check: Callable[[Sequence[Schedule]], Sequence[str | None]]
    measure: Callable[[Schedule, int], float]
    tell: Callable[[Trial, float], None] = lambda trial, spent: None


@dataclass(frozen=True)
class Found:
    """What a search found. `free`: the best schedule of each bucket by itself; `together`: those of one order, where they are

    not the heuristic's; `trials`: all that was tried.
    """

    free: Mapping[int, Schedule]
    together: Mapping[int, Schedule]
    trials: Sequence[Trial]


@dataclass(frozen=True)
class Timed:
    """Microseconds at a number of rows, and the schedules: `heuristic`, `tuned` (the one found), and `free`, the best for these

    rows by themselves.
    """

    bucket: int
    rows: int
    us: Mapping[str, float]
    schedules: Mapping[str, str]

    @property
    def ratio(self) -> float:
        """Tuned time over the heuristic's."""
        return self.us["tuned"] / self.us["heuristic"]


def neighbours(graph: Graph, schedule: Schedule) -> list[Schedule]:
    """Legal schedules that are one step away: a block, the warps or both doubled or halved, a stage more or less, an axis held

    whole or looped over, the parts of a split axis doubled or halved, in two launches or in one.
    """
    uses, found = axis_uses(graph), []
    for axis, mode, block in schedule.axes:
        sizes = [block * 2, block // 2] if mode != "whole" else []
        for size in sizes:
            if 1 <= size <= pow2(uses[axis].extent or size):
                step = schedule.with_axis(axis, block=size)
                found.append(step)
                if mode == "grid":
                    warps = schedule.warps * 2 if size > block else schedule.warps // 2
                    found.append(replace(step, warps=warps))
        if not uses[axis].parallel and mode == "whole" and block > 64:
            found.append(schedule.with_axis(axis, "loop", block // 2))
        elif not uses[axis].parallel and mode == "loop" and uses[axis].extent is not None and not _several(schedule):
            found.append(schedule.with_axis(axis, "whole", pow2(uses[axis].extent or 1)))
    found += [replace(schedule, warps=w) for w in (schedule.warps * 2, schedule.warps // 2)]
    if any(mode == "loop" for _, mode, _ in schedule.axes):
        found += [replace(schedule, stages=s) for s in (schedule.stages + 1, schedule.stages - 1) if s <= LONGEST_PIPELINE]
        found += _cuts(graph, schedule)
    return [s for s in dict.fromkeys(found) if s.warps in WARPS and s != schedule and _sensible(graph, schedule, s)]


def _several(schedule: Schedule) -> tuple[tuple[str, int], ...]:
    return schedule.split or schedule.parts


def _cuts(graph: Graph, schedule: Schedule) -> list[Schedule]:
    """Other numbers of parts, and the same number in the other form."""
    found = []
    for axis, mode, _ in schedule.axes:
        if mode != "loop" or graph.axes[axis] is None:
            continue
        now = dict(_several(schedule)).get(axis, 1)
        for parts in {1, 2, now * 2, now // 2} - {now, 0}:
            several = ((axis, parts),) if parts > 1 else ()
            found.append(replace(schedule, split=several, parts=()))
        if now > 1:
            found.append(replace(schedule, split=schedule.parts, parts=schedule.split))
    return found


def _sensible(graph: Graph, before: Schedule, after: Schedule) -> bool:
    """Whether a schedule is legal and keeps on the matrix unit what is there."""
    if legal(graph, after) is not None:
        return False
    dots = [i for i in graph.live() if graph.nodes[i].op == "contract" and uses_dot(graph, before, i)]
    return all(uses_dot(graph, after, i) for i in dots)


@dataclass
class _Search:
    """One search in progress."""

    graph: Graph
    bench: Bench
    tokens: Mapping[int, Sequence[int]]
    begin: float = field(default_factory=time.monotonic)
    trials: list[Trial] = field(default_factory=list)
    problems: dict[Schedule, str | None] = field(default_factory=dict)
    times: dict[tuple[Schedule, int], float] = field(default_factory=dict)
    ratios: dict[tuple[Schedule, int], float] = field(default_factory=dict)
    orders: dict[Schedule, Order] = field(default_factory=dict)

    def spent(self) -> float:
        return time.monotonic() - self.begin

    def base(self, rows: int) -> Schedule:
        """The heuristic's schedule for a number of rows."""
        return heuristics(self.graph, [rows])[0]

    def order(self, schedule: Schedule) -> Order:
        if schedule not in self.orders:
            self.orders[schedule] = order_of(self.graph, schedule)
        return self.orders[schedule]

    def check(self, schedules: Iterable[Schedule], until: float) -> None:
        """Check what is not yet known, as long as there is time; the first of them in any case."""
        unknown = list(dict.fromkeys(s for s in schedules if s not in self.problems))
        for n in range(0, len(unknown), AT_ONCE):
            if n and self.spent() > until:
                break
            some = unknown[n : n + AT_ONCE]
            self.problems |= dict(zip(some, self.bench.check(some), strict=True))

    def ranked(self, bucket: int, schedules: Iterable[Schedule], until: float = math.inf) -> list[Schedule]:
        """Those that were checked, timed for a bucket as long as there is time, one in any case: the fastest first, none that

        has a problem.
        """
        timed: list[Schedule] = []
        for schedule in dict.fromkeys(s for s in schedules if s in self.problems):
            if (schedule, bucket) not in self.ratios:
                if timed and self.spent() > until:
                    continue
                self._try(bucket, schedule)
            if self.problems[schedule] is None:
                timed.append(schedule)
        return sorted(timed, key=lambda s: self.ratios[s, bucket])

    def _try(self, bucket: int, schedule: Schedule) -> None:
        ratio = math.inf
        if self.problems[schedule] is None:
            try:
                own = [self._time(self.base(rows), rows) for rows in self.tokens[bucket]]
                ratio = mean(self._time(schedule, rows) / t for rows, t in zip(self.tokens[bucket], own, strict=True))
            except Exception as error:  # a schedule that the GPU cannot serve is a refused one
                self.problems[schedule] = f"{type(error).__name__}: {error}".splitlines()[0]
        self.ratios[schedule, bucket] = ratio
        self.trials.append(Trial(bucket, schedule, ratio, self.problems[schedule]))
        self.bench.tell(self.trials[-1], self.spent())

    def _time(self, schedule: Schedule, rows: int) -> float:
        if (schedule, rows) not in self.times:
            self.times[schedule, rows] = self.bench.measure(schedule, rows)
        return self.times[schedule, rows]

    def descend(
        self, starts: Mapping[int, Iterable[Schedule]], until: float, order: Order | None = None
    ) -> dict[int, Schedule]:
        """From the best start of each bucket on to neighbours (of one order, if given), while that helps and there is time."""
        allowed = {b: [s for s in own if order is None or self.order(s) == order] for b, own in starts.items()}
        self.check((s for own in allowed.values() for s in own), math.inf)
        best = {b: ranked[0] for b, own in allowed.items() if (ranked := self.ranked(b, own, until))}
        active = set(best)
        while active and self.spent() < until:
            steps = {b: self._steps(b, best[b], order) for b in best if b in active}
            self.check((s for own in steps.values() for s in own), until)
            for b, own in steps.items():
                ranked = self.ranked(b, [best[b], *own, *best.values()], until)
                if ranked and self.ratios[ranked[0], b] <= BETTER * self.ratios[best[b], b]:
                    best[b] = ranked[0]
                else:
                    active.discard(b)
        return best

    def _steps(self, bucket: int, best: Schedule, order: Order | None) -> list[Schedule]:
        """Neighbours whose blocks of rows are not beyond the bucket's rows (a product's tile has 16)."""
        most, axis = max(16, pow2(max(self.tokens[bucket]))), rows_axis(self.graph)
        near = [s for s in neighbours(self.graph, best) if all(b <= most for a, _, b in s.axes if a == axis)]
        return [s for s in near if order is None or self.order(s) == order]


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def search(graph: Graph, bench: Bench, seconds: float, buckets: Mapping[int, Sequence[int]]) -> Found:
    """The best schedules of each bucket, alone and in one order, within a time budget (what is begun is ended)."""
    run = _Search(graph, bench, buckets)
    own = {b: heuristics(graph, rows) for b, rows in buckets.items()}
    everywhere = list(dict.fromkeys(s for several in own.values() for s in several))
    free = run.descend({b: [*several, *everywhere] for b, several in own.items()}, ALONE * seconds)
    free = {b: free.get(b, own[b][-1]) for b in buckets}
    heuristic = {b: several[-1] for b, several in own.items()}
    return Found(free, _together(run, heuristic, free, seconds), run.trials)


def _together(
    run: _Search, heuristic: Mapping[int, Schedule], free: Mapping[int, Schedule], seconds: float
) -> Mapping[int, Schedule]:
    """The schedules of one order: one that is nowhere slower than the heuristic, if there is one, and fast over all buckets."""
    orders = _orders(run, [*heuristic.values(), *free.values()])
    chosen, best = heuristic, (False, 1.0)
    for n, (order, starts) in enumerate(orders.items(), 1):
        if n > 1 and run.spent() > seconds:
            break
        until = seconds * (ALONE + (1 - ALONE) * n / len(orders))
        members = run.descend({b: [*starts, free[b]] for b in run.tokens}, until, order)
        if len(members) < len(run.tokens):
            continue
        ratios = [run.ratios[members[b], b] for b in members]
        found = max(ratios) > NO_WORSE, mean(ratios)
        if found < (best if n == 1 else (best[0], BETTER * best[1])):
            chosen, best = members, found
    return chosen


def _orders(run: _Search, wanted: Iterable[Schedule]) -> dict[Order, list[Schedule]]:
    """The orders worth trying for all buckets, each with its most promising schedules: the heuristic's first, those of the

    schedules wanted, and those that were fastest where they were tried.
    """
    seen: dict[Order, dict[int, float]] = {}
    fastest: dict[Order, list[tuple[float, Schedule]]] = {}
    for (schedule, bucket), ratio in sorted(run.ratios.items(), key=lambda item: item[1]):
        if run.problems[schedule] is None:
            order = run.order(schedule)
            seen.setdefault(order, {}).setdefault(bucket, ratio)
            fastest.setdefault(order, []).append((ratio, schedule))
    promising = sorted(seen, key=lambda order: mean(seen[order].get(b, 1.0) for b in run.tokens))
    first = [order for order in dict.fromkeys(map(run.order, wanted)) if order in seen]
    chosen = list(dict.fromkeys([*first, *promising]))[: max(MOST_ORDERS, len(first))]
    return {order: list(dict.fromkeys(s for _, s in fastest[order]))[:MOST_STARTS] for order in chosen}


def winners(graph: Graph, together: Mapping[int, Schedule], times: Sequence[Timed]) -> dict[int, Schedule]:
    """The schedules of one order that are worth an entry: bucket by bucket where the heuristic has the same order, else all."""
    buckets = {t.bucket: [x for x in times if x.bucket == t.bucket] for t in times}
    ratios = {b: [t.ratio for t in mine] for b, mine in buckets.items()}
    fine = {b for b in buckets if max(ratios[b]) <= NO_WORSE}
    orders = {order_of(graph, s) for t in times for s in heuristics(graph, [t.rows])}
    if orders == {order_of(graph, s) for s in together.values()}:
        return {b: together[b] for b in buckets if b in fine and mean(ratios[b]) <= WORTH}
    return dict(together) if fine == set(buckets) and mean(map(mean, ratios.values())) <= WORTH else {}
