"""Running calls in guarded memory, and judging them: many cases at once as a campaign does, or one as a test does."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moekit.lang.dtypes import numpy_dtype
from moekit.testing.case import AnyCall, Call, FuzzCase
from moekit.testing.executors import Executor, Run, executor, fatal, launches, starved
from moekit.testing.guard import POISONS, Arena, FarArena, Placed, differing, place
from moekit.testing.oracle import Comparison, Oracle
from moekit.testing.room import place as room_for_one

LARGEST_ARENA = 2**24  # bytes: what malloc hands out again without new pages


@dataclass
class Verdict:
    """What came of one case: sentences about what is wrong, the worst error ratio, whether a kernel ran for it."""

    case: AnyCall
    problems: list[str] = field(default_factory=list)
    ratio: float = 0.0
    launched: bool = False

    def judge(self, oracle: Oracle, outputs: Mapping[str, np.ndarray]) -> None:
        """Take in how outputs compare with the reference."""
        found = oracle.compare(outputs)
        self.ratio = found.worst
        self.problems += found.problems


def run_cases(executor: Executor, pairs: Sequence[tuple[AnyCall, Oracle]]) -> list[Verdict]:
    """Run cases with their oracles, twice each on differently poisoned memory; verdicts in the same order."""
    near = [(c, o) for c, o in pairs if all(v.kind != "far" for v in c.layouts.values())]
    found: dict[int, Verdict] = {}
    for part in _parts(near):
        found |= dict(zip([id(c) for c, _ in part], _run_near(executor, part), strict=True))
    far = [(c, o) for c, o in pairs if id(c) not in found]
    with room_for_one() if far and _device(executor) not in ("cpu", "numpy") else contextlib.nullcontext():
        try:
            found |= {id(c): _run_far(executor, c, o) for c, o in far}
        finally:
            if far:
                executor.forget()
                release()
    return [found[id(c)] for c, _ in pairs]


def run_case(executor: Executor, case: AnyCall) -> Verdict:
    """Run one case."""
    return run_cases(executor, [(case, Oracle.of(case))])[0]


def replay(case: AnyCall, implementation: str) -> list[str]:
    """Run one case here and now; what is wrong with it."""
    made = executor(implementation)
    return run_cases(made, [(case, Oracle.of(case, implementation, made.standard))])[0].problems


def _parts(pairs: Sequence[tuple[AnyCall, Oracle]]) -> Iterator[list[tuple[AnyCall, Oracle]]]:
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


def _run_near(executor: Executor, pairs: Sequence[tuple[AnyCall, Oracle]]) -> list[Verdict]:
    arena = Arena()
    placed = [place(arena, case, dict(oracle.values)) for case, oracle in pairs]
    verdicts = [Verdict(c) for c, _ in pairs]
    again = slice(None, None, executor.every)
    runs = [executor.run(arena, placed, POISONS[0]), executor.run(arena, placed[again], POISONS[1])]
    for run, mine in zip(runs, (verdicts, verdicts[again]), strict=True):
        _note_faults(arena, placed, run, mine, verdicts)
    for i, (verdict, p, (case, oracle)) in enumerate(zip(verdicts, placed, pairs, strict=True)):
        verdict.launched = runs[0].launched[i] and any(np.prod(case.shape(n)) for n in case.names)
        if not verdict.problems:
            verdict.problems += differing(p, runs[0].after, runs[1].after) if i % executor.every == 0 else []
            verdict.judge(oracle, p.outputs(runs[0].after))
    return verdicts


def _note_faults(arena: Arena, placed: Sequence[Placed], run: Run, mine: Sequence[Verdict], every: Sequence[Verdict]) -> None:
    """What was raised in one run, and which bytes changed that must not; what was said of the other run is not said again."""
    for verdict, error in zip(mine, run.raised, strict=True):
        text = error and f"{type(error).__name__}: {error}"
        verdict.problems += [text] if text and text not in verdict.problems else []
    owners = {id(s): v for p, v in zip(placed, every, strict=True) for s in p.slots.values()}
    for slot, count in arena.damage(run.before, run.after, [s for p in placed for s in p.written]):
        verdict = owners[id(slot)]
        kind = verdict.case.layout(slot.name).kind
        text = f"{verdict.case.declaration.name}: {count} bytes of or around {slot.name} ({kind})"
        if not any(p.startswith(text) for p in verdict.problems):
            verdict.problems.append(f"{text} were written that must not be")


def run(implementation: str, call: Call | FuzzCase) -> Outcome:
    """Run one call in guarded memory; raises what the implementation raises.

    `implementation`: a name that `executor` knows, or one with " in place" behind it. Outputs are given where the call has
    layouts, allocated by the face where it has none.
    """
    name, mode = implementation.removesuffix(" in place"), "out" if call.layouts else "plain"
    made = executor(name)
    mode = "in place" if name == "interpret" or name != implementation else mode
    outputs, problems = run_alone(made, replace(call, mode=mode))
    return Outcome(outputs, tuple(problems))


@dataclass(frozen=True)
class Outcome:
    """What a call gave: outputs by name, and what it did that it must not do."""

    outputs: Mapping[str, np.ndarray]
    problems: tuple[str, ...] = ()


def run_alone(executor: Executor, case: AnyCall, values: Mapping[str, np.ndarray] | None = None) -> tuple[dict, list[str]]:
    """The outputs of one run (on other values than the case's own, if given), and which bytes changed that must not."""
    arena, verdict = Arena(), Verdict(case)
    placed = [place(arena, case, dict(case.values() if values is None else values))]
    made = executor.run(arena, placed, POISONS[0])
    if made.raised[0]:
        raise made.raised[0]
    _note_faults(arena, placed, made, [verdict], [verdict])
    return {n: x.copy() for n, x in placed[0].outputs(made.after).items()}, verdict.problems


def check(implementation: str, call: Call | FuzzCase) -> Comparison:
    """Run a call and raise AssertionError with everything that is wrong with what came back."""
    outcome = run(implementation, call)
    result = Oracle.of(call, implementation).compare(outcome.outputs)
    problems = (*outcome.problems, *result.problems)
    if problems:
        raise AssertionError("\n".join(f"{implementation}: {p}" for p in problems))
    return result


def _run_far(executor: Executor, case: AnyCall, oracle: Oracle) -> Verdict:
    """One case with a tensor whose offsets pass 2³¹ elements."""
    arena, verdict, count = FarArena(), Verdict(case), launches[executor.name]
    placed = place(arena, case, dict(oracle.values))
    index, outputs, name = arena.index(), [], case.declaration.name
    for poison in POISONS:
        before = arena.values(index, poison)
        memory = far_memory(executor, arena.end)
        _scatter(memory, index, before)
        try:
            executor.call(case, {n: executor.tensor(memory, s) for n, s in placed.slots.items()})
        except Exception as error:
            if fatal(error) or starved(error):
                raise
            verdict.problems.append(f"{type(error).__name__}: {error}")
            return verdict
        after = _gather(memory, index)
        for slot in placed.written:
            at = arena.compact(slot, index)
            before[at] = after[at]
        if changed := int(np.count_nonzero(before != after)):
            verdict.problems.append(f"{name}: {changed} bytes around the tensors were written that must not be")
        outputs.append({n: _element(arena, placed, t, index, after) for n, t in case.targets.items()})
    verdict.launched = launches[executor.name] > count
    for n, x in outputs[0].items():
        if x.tobytes() != outputs[1][n].tobytes():
            verdict.problems.append(f"{name}: {n} depends on memory that is not an operand's")
    verdict.judge(oracle, outputs[0])
    return verdict


def _element(arena: FarArena, placed: Placed, name: str, index: np.ndarray, image: np.ndarray) -> np.ndarray:
    slot = placed.slots[name]
    data = image[arena.compact(slot, index)] if 0 not in slot.shape else np.empty((0, 1), np.uint8)
    return np.ascontiguousarray(data).reshape(-1).view(numpy_dtype(slot.dtype)).reshape(slot.shape)


_far: dict[str, Any] = {}


def _device(executor: Executor) -> str:
    return getattr(executor, "device", "numpy")


def far_memory(executor: Executor, size: int) -> Any:
    """Memory of at least `size` bytes, kept for the next call; pages that nobody touches cost nothing on a CPU."""
    device = _device(executor)
    if len(_far.get(device, ())) < size:
        executor.forget()
        release()
        size = -(-size // 2**28) * 2**28
        if device == "numpy":
            _far[device] = np.zeros(size, np.uint8)
        else:
            import torch

            on_cpu = device == "cpu"
            _far[device] = torch.from_numpy(np.zeros(size, np.uint8)) if on_cpu else torch.empty(
                size, dtype=torch.uint8, device=device)  # fmt: skip
    return _far[device]


def release() -> None:
    """Give far memory back, of whose pages more and more have been touched, and what torch caches on a device."""
    _far.clear()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def _scatter(memory: Any, index: np.ndarray, data: np.ndarray) -> None:
    """Put bytes at their places."""
    if isinstance(memory, np.ndarray):
        memory[index] = data
    else:
        import torch

        memory[torch.from_numpy(index).to(memory.device)] = torch.from_numpy(data).to(memory.device)


def _gather(memory: Any, index: np.ndarray) -> np.ndarray:
    """Bytes from their places."""
    if isinstance(memory, np.ndarray):
        return memory[index]
    import torch

    return memory[torch.from_numpy(index).to(memory.device)].cpu().numpy()
