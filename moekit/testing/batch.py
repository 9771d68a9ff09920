"""Running calls in guarded memory, and judging them: many cases at once as a campaign does, or one as a test does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from moekit.testing import far
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Executor, Run, executor
from moekit.testing.guard import POISONS, Arena, Placed, place
from moekit.testing.oracle import Comparison, Oracle

LARGEST_ARENA = 2**24  # bytes: what malloc hands out again without new pages


@dataclass
class Verdict:
    """What came of one case: sentences about what is wrong, the worst error ratio, whether a kernel ran for it."""

    case: FuzzCase
    problems: list[str] = field(default_factory=list)
    ratio: float = 0.0
    launched: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a call gave: outputs by name, and what it did that it must not do."""

    outputs: Mapping[str, np.ndarray]
    problems: tuple[str, ...] = ()


def run_cases(executor: Executor, pairs: Sequence[tuple[FuzzCase, Oracle]]) -> list[Verdict]:
    """Run cases with their oracles, twice each on differently poisoned memory; verdicts in the same order."""
    large = any(case.layout(n).kind == "far" for case, _ in pairs for n in case.memory())
    with far.held(executor.device) if large else contextlib.nullcontext():
        return [verdict for part in _parts(pairs) for verdict in _run_part(executor, part)]


def _parts(pairs: Sequence[tuple[FuzzCase, Oracle]]) -> Iterator[list[tuple[FuzzCase, Oracle]]]:
    """The pairs in runs that fit an arena of `LARGEST_ARENA` bytes (one case at least)."""
    part, total = [], 0
    for case, oracle in pairs:
        size = sum(8 * case.layout(n).span(case.shape(n)) for n in case.memory())
        if part and total + size > LARGEST_ARENA:
            yield part
            part, total = [], 0
        part.append((case, oracle))
        total += size
    if part:
        yield part


def _run_part(executor: Executor, pairs: Sequence[tuple[FuzzCase, Oracle]]) -> list[Verdict]:
    arena = Arena()
    placed = [place(arena, case, oracle.values) for case, oracle in pairs]
    verdicts = [Verdict(c) for c, _ in pairs]
    again = slice(None, None, executor.every)
    first = executor.run(arena, placed, POISONS[0])
    second = executor.run(arena, placed[again], POISONS[1])
    _note_faults(arena, placed, first, verdicts, verdicts)
    _note_faults(arena, placed, second, verdicts[again], verdicts)
    for i, (verdict, p, (case, oracle)) in enumerate(zip(verdicts, placed, pairs, strict=True)):
        verdict.launched = first.launched[i] and any(0 not in case.shape(n) for n in case.names)
        if not verdict.problems:
            found = oracle.compare(p.outputs(first.after))
            differing = p.differing(first.after, second.after) if i % executor.every == 0 else []
            verdict.ratio, verdict.problems = found.worst, [*differing, *found.problems]
    return verdicts


def _note_faults(arena: Arena, placed: Sequence[Placed], run: Run, mine: Sequence[Verdict], every: Sequence[Verdict]) -> None:
    """What was raised in one run, and which bytes changed that must not; what was said of the other run is not said again."""
    for verdict, error in zip(mine, run.raised, strict=True):
        text = f"{type(error).__name__}: {error}"
        if error is not None and text not in verdict.problems:
            verdict.problems.append(text)
    owners = {id(s): v for p, v in zip(placed, every, strict=True) for s in p.slots.values()}
    for slot, count in arena.damage(run.before, run.after, [s for p in placed for s in p.written]):
        verdict = owners[id(slot)]
        kind = verdict.case.layout(slot.name).kind
        text = f"{verdict.case.declaration.name}: {count} bytes of or around {slot.name} ({kind})"
        if not any(p.startswith(text) for p in verdict.problems):
            verdict.problems.append(f"{text} were written that must not be")


def run_case(executor: Executor, case: FuzzCase) -> Verdict:
    """Run one case."""
    return run_cases(executor, [(case, Oracle.of(case, executor.name, executor.standard))])[0]


def replay(case: FuzzCase, implementation: str) -> list[str]:
    """Run one case here and now; what is wrong with it."""
    return run_case(executor(implementation), case).problems


def run_alone(executor: Executor, case: FuzzCase, values: Mapping[str, np.ndarray] | None = None) -> Outcome:
    """One run (on other values than the case's own, if given); raises what the implementation raises."""
    arena, verdict = Arena(), Verdict(case)
    placed = [place(arena, case, case.values() if values is None else values)]
    made = executor.run(arena, placed, POISONS[0])
    if made.raised[0]:
        raise made.raised[0]
    _note_faults(arena, placed, made, [verdict], [verdict])
    return Outcome({n: x.copy() for n, x in placed[0].outputs(made.after).items()}, tuple(verdict.problems))


def run(implementation: str, call: FuzzCase) -> Outcome:
    """Run one call in guarded memory; raises what the implementation raises.

    `implementation`: a name that `executor` knows, or one with " in place" behind it. Outputs are given where the call has
    layouts, allocated by the face where it has none.
    """
    name, mode = implementation.removesuffix(" in place"), "out" if call.layouts else "plain"
    mode = "in place" if name == "interpret" or name != implementation else mode
    return run_alone(executor(name), replace(call, mode=mode))


def check(implementation: str, call: FuzzCase, oracle: Oracle | None = None) -> Comparison:
    """Run a call and raise AssertionError with everything that is wrong with what came back; `oracle`: that of the call."""
    outcome = run(implementation, call)
    result = (oracle or Oracle.of(call, implementation)).compare(outcome.outputs)
    problems = (*outcome.problems, *result.problems)
    if problems:
        raise AssertionError("\n".join(f"{implementation}: {p}" for p in problems))
    return result
