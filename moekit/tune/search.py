"""Searching the legal schedules of a graph: from the heuristic's, step by step, for each bucket of rows.

First every bucket by itself. Then, because a row's result may not depend on the rows beside it, all buckets together: only
schedules that add up in the same order (compile/rules/order.py) can serve them side by side, so one order is chosen for all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from moekit.compile.rules import heuristic, spread
from moekit.compile.rules.order import Order
from moekit.compile.schedule import (
    Abreast,
    Dependent,
    Launch,
    Loop,
    Pair,
    Parts,
    Prefetch,
    Rounds,
    Schedule,
    Section,
    Split,
    Stage,
    Stages,
    Tile,
    Warps,
    Whole,
    pow2,
)
from moekit.compile.schedule.cuts import launched, sections_of, stageable
from moekit.compile.schedule.directives import Axis
from moekit.compile.schedule.facts import axis_uses, paired, part_axis, shares
from moekit.compile.schedule.legal import legal, prefetchable, uses_dot
from moekit.lang.graph import Graph
from moekit.tune.table import order_of, rows_axis

LONGEST_PIPELINE = 8
FEWEST_ROUNDS = 8  # parts that it can pay to take in turn
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
    """Legal schedules that are one step away in one directive: a block, the warps or both doubled or halved, a stage more or

    less, an axis held whole or looped over, a pair or a prefetch more or less, sections abreast or not, a launch dependent or
    not, the parts of a sum doubled or halved, in two launches or in one, a value staged or not.
    """
    found = list(_cuts(graph, schedule))
    for n, (launch, g, _) in enumerate(launched(graph, schedule)):
        found += [_with(schedule, n, step) for step in (*_axis_steps(g, launch), *_shared_steps(g, launch))]
    return [s for s in dict.fromkeys(found) if s != schedule and legal(graph, s) is None and _keeps_dots(graph, schedule, s)]


def _with(schedule: Schedule, n: int, launch: Launch) -> Schedule:
    return Schedule((*schedule.launches[:n], launch, *schedule.launches[n + 1 :]))


def _axis_steps(graph: Graph, launch: Launch) -> Iterator[Launch]:
    """Another block of an axis, or another way to hold it, in all sections that hold it alike."""
    for d in dict.fromkeys(d for s in launch.sections for d in s.axes):
        extent, several = graph.axes[d.axis], {a for s in launch.sections for a in s.parts} | set(shares(graph))
        sizes = [x for x in (d.block * 2, d.block // 2) if 1 <= x <= pow2(extent or x)] if not isinstance(d, Whole) else []
        for size in sizes:
            step = _everywhere(launch, d, replace(d, block=size))
            yield step
            if isinstance(d, Tile):
                yield step.but(Warps(launch.warps * 2 if size > d.block else launch.warps // 2))
        if isinstance(d, Whole) and d.block > 64:
            yield _everywhere(launch, d, Loop(d.axis, d.block // 2))
        elif isinstance(d, Loop) and extent is not None and d.axis not in several:
            yield _everywhere(launch, d, Whole(d.axis, pow2(extent)))


def _everywhere(launch: Launch, old: Axis, new: Axis) -> Launch:
    return replace(launch, sections=tuple(s.but(new) if old in s.directives else s for s in launch.sections))


def _shared_steps(graph: Graph, launch: Launch) -> Iterator[Launch]:
    """Other warps, stages, pairs, prefetches; sections abreast or not, dependent or not."""
    yield from (launch.but(Warps(w)) for w in (launch.warps * 2, launch.warps // 2))
    if any(s.all(Loop) for s in launch.sections):
        yield from (launch.but(Stages(n)) for n in (launch.stages + 1, launch.stages - 1) if n <= LONGEST_PIPELINE)
    for n, (mine, section) in enumerate(sections_of(graph, launch)):
        every = [*(Pair(x) for x in paired(mine)), *(Prefetch(x) for x in prefetchable(mine, section))]
        for d in every:
            has = d in section.directives
            other = replace(section, directives=tuple(x for x in section.directives if x != d)) if has else section.but(d)
            yield replace(launch, sections=(*launch.sections[:n], other, *launch.sections[n + 1 :]))
        for other in _rounds(mine, section):
            yield replace(launch, sections=(*launch.sections[:n], other, *launch.sections[n + 1 :]))
    yield from (launch.without(kind) for kind in (Abreast, Dependent) if launch.all(kind))
    if not launch.dependent:
        yield launch.but(Dependent())


def _rounds(graph: Graph, section: Section) -> Iterator[Section]:
    """Fewer programs along the parts of an axis, and twice or half as many where programs take turns."""
    for d in section.all(Tile):
        if d.axis in map(part_axis, shares(graph)) and (count := graph.axes[d.axis] or 0) >= FEWEST_ROUNDS:
            now = next((x.programs for x in section.all(Rounds)), count)
            yield from (section.but(Rounds(d.axis, n)) for n in (now // 2, now * 2) if 0 < n < count)
            yield from [section.without(Rounds)] if section.all(Rounds) else []


def _cuts(graph: Graph, schedule: Schedule) -> Iterator[Schedule]:
    """Other numbers of parts, and the same number in the other form; values staged."""
    launch = schedule.launches[0]
    axes = {d.axis: d for s in reversed(launch.sections) for d in s.axes}
    wish = Launch((Section((), tuple(axes.values())),), launch.without(Abreast, Split, Stage).directives)
    for d in wish.sections[0].all(Loop):
        if graph.axes.get(d.axis) is None or any(u.name == d.axis and u.in_turns for u in axis_uses(graph).values()):
            continue
        parts = max(s.parts.get(d.axis, 1) for s in launch.sections)
        split = launch.cut.count if isinstance(launch.cut, Split) and launch.cut.axis == d.axis else 1
        for count in {1, 2, parts * split * 2, parts * split // 2} - {parts * split, 0}:
            yield spread(graph, wish.but(Split(d.axis, count)) if count > 1 else wish)
        if split > 1:
            yield spread(graph, replace(wish, sections=(wish.sections[0].but(Parts(d.axis, split)),)))
        if parts > 1:
            yield spread(graph, wish.but(Split(d.axis, parts)))
    if launch.cut is None:
        yield from (spread(graph, wish.but(Stage(value))) for value in stageable(graph))


def _keeps_dots(graph: Graph, before: Schedule, after: Schedule) -> bool:
    """Whether as many products as before run on the matrix unit."""
    return _dots(graph, after) >= _dots(graph, before)


def _dots(graph: Graph, schedule: Schedule) -> int:
    pairs = [each for launch, g, _ in launched(graph, schedule) for each in sections_of(g, launch)]
    return sum(g.nodes[i].op == "contract" and uses_dot(g, s, i) for g, s in pairs for i in g.live())


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

    def spent(self) -> float:
        return time.monotonic() - self.begin

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
                own = [self._time(heuristic(self.graph, rows), rows) for rows in self.tokens[bucket]]
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
        allowed = {b: [s for s in own if order is None or order_of(self.graph, s) == order] for b, own in starts.items()}
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
        sections = lambda s: (x for launch in s.launches for x in launch.sections)  # noqa: E731
        blocks = lambda s: (d.block for x in sections(s) for d in x.all(Tile) if d.axis == axis)  # noqa: E731
        near = [s for s in neighbours(self.graph, best) if max(blocks(s), default=1) <= most]
        return [s for s in near if order is None or order_of(self.graph, s) == order]


def mean(values: Iterable[float]) -> float:
    """The geometric mean."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def search(graph: Graph, bench: Bench, seconds: float, buckets: Mapping[int, Sequence[int]]) -> Found:
    """The best schedules of each bucket, alone and in one order, within a time budget (what is begun is ended)."""
    run = _Search(graph, bench, buckets)
    own = {b: heuristic(graph, rows[0]) for b, rows in buckets.items()}
    everywhere = dict.fromkeys(own.values())
    free = own | run.descend({b: [s, *everywhere] for b, s in own.items()}, ALONE * seconds)
    return Found(free, _together(run, own, free, seconds), run.trials)


def _together(
    run: _Search, own: Mapping[int, Schedule], free: Mapping[int, Schedule], seconds: float
) -> Mapping[int, Schedule]:
    """The schedules of one order: one that is nowhere slower than the heuristic, if there is one, and fast over all buckets."""
    orders = _orders(run, [*own.values(), *free.values()])
    chosen, best = own, (False, 1.0)
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
            order = order_of(run.graph, schedule)
            seen.setdefault(order, {}).setdefault(bucket, ratio)
            fastest.setdefault(order, []).append((ratio, schedule))
    promising = sorted(seen, key=lambda order: mean(seen[order].get(b, 1.0) for b in run.tokens))
    first = [order for order in dict.fromkeys(order_of(run.graph, s) for s in wanted) if order in seen]
    chosen = list(dict.fromkeys([*first, *promising]))[: max(MOST_ORDERS, len(first))]
    return {order: list(dict.fromkeys(s for _, s in fastest[order]))[:MOST_STARTS] for order in chosen}


def winners(graph: Graph, together: Mapping[int, Schedule], times: Sequence[Timed]) -> dict[int, Schedule]:
    """The schedules of one order that are worth an entry: bucket by bucket where the heuristic has the same order, else all."""
    buckets = {t.bucket: [x for x in times if x.bucket == t.bucket] for t in times}
    ratios = {b: [t.ratio for t in mine] for b, mine in buckets.items()}
    fine = {b for b in buckets if max(ratios[b]) <= NO_WORSE}
    orders = {order_of(graph, heuristic(graph, t.rows)) for t in times}
    if orders == {order_of(graph, s) for s in together.values()}:
        return {b: together[b] for b in buckets if b in fine and mean(ratios[b]) <= WORTH}
    return dict(together) if fine == set(buckets) and mean(map(mean, ratios.values())) <= WORTH else {}
