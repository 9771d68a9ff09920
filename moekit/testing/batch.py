"""Running many cases at once in guarded memory, and judging each: what a campaign and every single test are made of."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moekit.lang.dtypes import numpy_dtype
from moekit.testing.case import FuzzCase
from moekit.testing.executors import Executor, fatal, launches, starved
from moekit.testing.guard import POISONS, Arena, FarArena, Placed, differing, place
from moekit.testing.oracle import Oracle
from moekit.testing.room import place as room_for_one

LARGEST_ARENA = 2**24  # bytes: what malloc hands out again without new pages


@dataclass
class Verdict:
    """What came of one case: sentences about what is wrong, the worst error ratio, whether a kernel ran for it."""

    case: FuzzCase
    problems: list[str] = field(default_factory=list)
    ratio: float = 0.0
    launched: bool = False


def run_cases(executor: Executor, pairs: Sequence[tuple[FuzzCase, Oracle]]) -> list[Verdict]:
    """Run cases with their oracles, twice each on differently poisoned memory; verdicts in the same order."""
    near = [(c, o) for c, o in pairs if all(v.kind != "far" for v in c.layouts.values())]
    found: dict[int, Verdict] = {}
    for part in _parts(near):
        found |= dict(zip([id(c) for c, _ in part], _run_near(executor, part), strict=True))
    far = [(c, o) for c, o in pairs if id(c) not in found]
    with room_for_one() if far and _on_device(executor) else contextlib.nullcontext():
        try:
            found |= {id(c): _run_far(executor, c, o) for c, o in far}
        finally:
            if far:
                executor.forget()
                release()
    return [found[id(c)] for c, _ in pairs]


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


def run_case(executor: Executor, case: FuzzCase) -> Verdict:
    """Run one case."""
    return run_cases(executor, [(case, Oracle.of(case))])[0]


def _run_near(executor: Executor, pairs: Sequence[tuple[FuzzCase, Oracle]]) -> list[Verdict]:
    if not pairs:
        return []
    arena = Arena()
    placed = [place(arena, case, dict(oracle.values)) for case, oracle in pairs]
    before = launches[executor.name]
    runs = [executor.run(arena, placed, poison) for poison in POISONS]
    counted = launches[executor.name] - before
    verdicts = [Verdict(c) for c, _ in pairs]
    owners = {id(s): i for i, p in enumerate(placed) for s in p.slots.values()}
    written = [s for p in placed for s in p.written]
    for image, after, raised in runs:
        for verdict, text in zip(verdicts, raised, strict=True):
            if text and text not in verdict.problems:
                verdict.problems.append(text)
        for slot, count in arena.damage(image, after, written):
            verdict = verdicts[owners[id(slot)]]
            text = f"{verdict.case.fusion}: {count} bytes of or around {slot.name} ({verdict.case.layout(slot.name).kind})"
            if not any(p.startswith(text) for p in verdict.problems):  # the same on either image
                verdict.problems.append(f"{text} were written that must not be")
    needed = sum(2 for c, _ in pairs if any(np.prod(c.shape(n)) for n in c.names))
    for verdict, p, (case, oracle) in zip(verdicts, placed, pairs, strict=True):
        verdict.launched = counted >= needed and any(np.prod(case.shape(n)) for n in case.names)
        if not verdict.problems:
            outputs = [p.outputs(after) for _, after, _ in runs]
            problems, verdict.ratio = oracle.problems(outputs[0])
            verdict.problems = differing(p, runs[0][1], runs[1][1]) + problems
    return verdicts


def _run_far(executor: Executor, case: FuzzCase, oracle: Oracle) -> Verdict:
    """One case with a tensor whose offsets pass 2³¹ elements."""
    arena, verdict, count = FarArena(), Verdict(case), launches[executor.name]
    placed = place(arena, case, dict(oracle.values))
    index, outputs = arena.index(), []
    for poison in POISONS:
        before = arena.values(index, poison)
        memory = far_memory(executor, arena.end)
        scatter(memory, index, before)
        try:
            executor.call(case, {n: executor.tensor(memory, s) for n, s in placed.slots.items()})
        except Exception as error:
            if fatal(error) or starved(error):
                raise
            verdict.problems.append(f"{type(error).__name__}: {error}")
            return verdict
        after = gather(memory, index)
        for slot in placed.written:
            at = arena.compact(slot, index)
            before[at] = after[at]
        if not np.array_equal(before, after):
            changed = int(np.count_nonzero(before != after))
            verdict.problems.append(f"{case.fusion}: {changed} bytes around the tensors were written that must not be")
        outputs.append({n: _element(arena, placed, t, index, after) for n, t in case.targets.items()})
    verdict.launched = launches[executor.name] > count
    for n, x in outputs[0].items():
        if x.tobytes() != outputs[1][n].tobytes():
            verdict.problems.append(f"{case.fusion}: {n} depends on memory that is not an operand's")
    problems, verdict.ratio = oracle.problems(outputs[0])
    verdict.problems += problems
    return verdict


def _element(arena: FarArena, placed: Placed, name: str, index: np.ndarray, image: np.ndarray) -> np.ndarray:
    slot = placed.slots[name]
    data = image[arena.compact(slot, index)] if 0 not in slot.shape else np.empty((0, 1), np.uint8)
    return np.ascontiguousarray(data).reshape(-1).view(numpy_dtype(slot.dtype)).reshape(slot.shape)


_far: dict[str, Any] = {}


def _on_device(executor: Executor) -> bool:
    return getattr(executor, "device", "cpu") not in ("cpu", "numpy")


def far_memory(executor: Executor, size: int) -> Any:
    """Memory of at least `size` bytes, kept for the next call; pages that nobody touches cost nothing on a CPU."""
    device = getattr(executor, "device", "numpy")
    held = _far.get(device)
    if held is None or (held.nbytes if device == "numpy" else held.numel()) < size:
        held = None
        executor.forget()
        release() if _on_device(executor) else _far.pop(device, None)
        size = -(-size // 2**28) * 2**28
        if device == "numpy":
            _far[device] = np.zeros(size, np.uint8)
        else:
            import torch

            on_cpu = device == "cpu"
            _far[device] = (
                torch.from_numpy(np.zeros(size, np.uint8)) if on_cpu else torch.empty(size, dtype=torch.uint8, device=device)
            )
    return _far[device]


def release() -> None:
    """Give far memory back, of whose pages more and more have been touched, and what torch caches on a device."""
    _far.clear()
    if "torch" in sys.modules:
        import torch

        torch.cuda.empty_cache()


def scatter(memory: Any, index: np.ndarray, data: np.ndarray) -> None:
    """Put bytes at their places."""
    if isinstance(memory, np.ndarray):
        memory[index] = data
    else:
        import torch

        memory[torch.from_numpy(index).to(memory.device)] = torch.from_numpy(data).to(memory.device)


def gather(memory: Any, index: np.ndarray) -> np.ndarray:
    """Bytes from their places."""
    if isinstance(memory, np.ndarray):
        return memory[index]
    import torch

    return memory[torch.from_numpy(index).to(memory.device)].cpu().numpy()
