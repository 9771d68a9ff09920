"""Tuning fusions on the GPU at hand: operands, checks against the reference, times, and the table that results."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from moekit import __version__
from moekit.compile.rules import heuristic
from moekit.compile.schedule import Schedule
from moekit.files import read_json, write_text
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import numpy_dtype
from moekit.lang.graph import Graph
from moekit.testing import Call, compare, operands
from moekit.torch.face import op
from moekit.tune.search import Bench, Found, Timed, Trial, search, winners
from moekit.tune.table import Entry, buckets, device_key, graph_key, kernels_of, stale
from moekit.tune.timer import capture, copies_needed, microseconds, replay

CHECKED_ROWS = 19
COMPARED_ROWS = (2500, 300)  # the first that take no more than LARGEST_BYTES
MOST_SETS = 100
LARGEST_BYTES = 2**31  # of one set of operands
MOST_WORKERS = 15

# what a decode step of the published models has at tensor parallel 8 and 1
SIZES: Mapping[str, tuple[dict[str, int], ...]] = {
    "gate_gemm": ({"D": 2048, "P": 648}, {"D": 2048, "P": 1544}),
    "gate_projections": ({"D": 2048, "I": 64, "E": 512, "G": 1}, {"D": 2048, "I": 512, "E": 512, "G": 1}),
    "down_combine": ({"I": 64, "H": 2048, "H?": 1}, {"I": 512, "H": 2048, "H?": 1}),
    "expert_gate_up": ({"I": 64, "D": 2048, "E": 512, "K": 10}, {"I": 512, "D": 2048, "E": 512, "K": 10}),
    "expert_down": ({"I": 64, "H": 2048, "E": 512, "K": 10}, {"I": 512, "H": 2048, "E": 512, "K": 10}),
    "silu_and_mul": ({"I": 64}, {"I": 512}, {"I": 1024}),
    "topk_softmax": ({"E": 512}, {"E": 256}),
    "shared_expert_combine": ({"H": 2048, "H?": 1}, {"H": 4096, "H?": 1}),
    "add_rms_norm": ({"H": 2048}, {"H": 4096}),
    "gated_rms_norm": ({"V": 4, "D": 128}, {"V": 32, "D": 128}),
    "delta_rule_step": ({"K": 2, "V": 4, "Dk": 128, "Dv": 128}, {"K": 16, "V": 32, "Dk": 128, "Dv": 128}),
}
FLOAT32 = {"A_log", "dt_bias", "share"}  # what the models keep in float32 whatever their dtype


def params_of(name: str, sizes: Mapping[str, int]) -> dict:
    """The static parameters a fusion is tuned with."""
    return {"k": 10 if sizes["E"] >= 512 else 8} if name == "topk_softmax" else {}


class Target:
    """One fusion at one set of static sizes and a dtype, on this GPU."""

    def __init__(self, name: str, sizes: Mapping[str, int], dtype: str):
        self.fusion, self.params = FUSIONS[name], params_of(name, sizes)
        self.call = op(self.fusion, in_place=any(s.role == "InOut" for s in self.fusion.tensors.values()))
        values = operands(self.fusion, {"T": CHECKED_ROWS, **sizes}, dtype, "normal", 1)
        self.values = {n: x.astype("float32") if n in FLOAT32 else x for n, x in values.items()}
        self.reference = Call(self.fusion, self.values, self.params)
        self.sets: dict[int, list[list[torch.Tensor]]] = {}

    @property
    def buckets(self) -> dict[int, tuple[int, ...]]:
        """The numbers of rows to time by bucket, but those that take too much memory."""
        fitting = {b: tuple(r for r in rows if self._bytes(r) <= LARGEST_BYTES) for b, rows in buckets(self.graph).items()}
        return {b: rows for b, rows in fitting.items() if rows}

    @property
    def graph(self) -> Graph:
        """What is tuned."""
        return self.reference.graph

    def check(self, schedule: Schedule) -> str | None:
        """The first problem of a schedule's outputs on random operands, None if there is none."""
        names = self.reference.names
        outs = self._outputs(
            [torch.from_numpy(x.astype("float32")).to(_torch(x)).cuda() for x in self.values.values()], schedule
        )
        arrays = {
            n: x.double().cpu().numpy().astype(numpy_dtype(self.graph.tensors[n].dtype))
            for n, x in zip(names, outs, strict=True)
        }
        problems = compare(self.fusion, arrays, self.values, self.params, implementation="triton").problems
        return problems[0] if problems else None

    def differ(self, schedules: Sequence[Schedule]) -> str | None:
        """None if all schedules give the same bits on the same rows, else which two do not."""
        given = self._random(next(r for r in COMPARED_ROWS if self._bytes(r) <= LARGEST_BYTES))
        every = [self._outputs(given, s) for s in schedules]
        for schedule, outs in zip(schedules, every, strict=True):
            for name, a, b in zip(self.reference.names, every[0], outs, strict=True):
                if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                    return f"{self.fusion.name}: {name} has other bits with {schedule} than with {schedules[0]}"
        return None

    def _outputs(self, given: Sequence[torch.Tensor], schedule: Schedule) -> tuple[torch.Tensor, ...]:
        """What a schedule makes of operands, in memory that was filled with something else."""
        rows, call = given[0].shape[0], self.reference
        shapes = {
            n: tuple(rows if s == CHECKED_ROWS and d == 0 else s for d, s in enumerate(call.shape(n))) for n in call.names
        }
        dtypes = {n: getattr(torch, call.graph.tensors[n].dtype) for n in call.names}
        outs = tuple(torch.full(shapes[n], 77, dtype=dtypes[n], device="cuda") for n in call.names)
        op(self.fusion)(*given, **self.params, implementation="triton", schedule=schedule, out=outs)
        return outs

    def measure(self, schedule: Schedule, rows: int) -> float:
        """Microseconds per call."""
        return microseconds(self._calls(schedule, rows), replays=8, warmup=1)

    def timed(self, schedules: Mapping[str, Schedule], rows: int) -> dict[str, float]:
        """Microseconds per call of several schedules, in turn."""
        return {n: t.us for n, t in replay({n: capture(self._calls(s, rows)) for n, s in schedules.items()}).items()}

    def _calls(self, schedule: Schedule, rows: int) -> list[Callable]:
        if rows not in self.sets:
            total = sum(
                x.itemsize * torch.Size(s).numel() for x, s in zip(self.values.values(), self._shapes(rows), strict=True)
            )
            self.sets[rows] = [self._random(rows) for _ in range(min(copies_needed(total), MOST_SETS))]
        return [lambda given=given: self.call(*given, **self.params, schedule=schedule) for given in self.sets[rows]]

    def _bytes(self, rows: int) -> int:
        return sum(x.itemsize * prod(shape) for x, shape in zip(self.values.values(), self._shapes(rows), strict=True))

    def _shapes(self, rows: int) -> list[tuple[int, ...]]:
        """The operands' shapes; T comes first wherever it is."""
        dynamic = {n: [d.axis == "T" for d in s.dims] for n, s in self.fusion.tensors.items()}
        return [tuple(rows if t else s for t, s in zip(dynamic[n], x.shape, strict=True)) for n, x in self.values.items()]

    def _random(self, rows: int) -> list[torch.Tensor]:
        pairs = zip(self.values.values(), self._shapes(rows), strict=True)
        return [torch.randn(shape, device="cuda").to(_torch(x)) for x, shape in pairs]


def _torch(x) -> torch.dtype:
    return getattr(torch, x.dtype.name)


@lru_cache(maxsize=2)
def _target(name: str, sizes: tuple[tuple[str, int], ...], dtype: str) -> Target:
    return Target(name, dict(sizes), dtype)


def _checked(name: str, sizes: tuple[tuple[str, int], ...], dtype: str, schedule: Schedule) -> str | None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints what ptxas could not assemble
            return _target(name, sizes, dtype).check(schedule)
    except Exception as error:  # what the compiler cannot serve (shared memory, registers) is refused
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _begin() -> None:
    torch.zeros(1, device="cuda")
    time.sleep(0.5)  # leaves the next one to a process that has not begun


class Checkers:
    """Processes that compile schedules and hold them to the reference, so that timing finds them in Triton's cache.

    None of them works while something is timed.
    """

    def __init__(self, workers: int | None = None):
        workers = min(MOST_WORKERS, (os.cpu_count() or 1) - 1) if workers is None else workers
        self.pool = ProcessPoolExecutor(workers, get_context("spawn")) if workers > 1 else None
        if self.pool:  # all begin at once, and what they import is not counted against any search
            for future in [self.pool.submit(_begin) for _ in range(workers)]:
                future.result()

    def __enter__(self) -> Checkers:
        return self

    def __exit__(self, *_) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, name: str, sizes: Mapping[str, int], dtype: str, schedules: Sequence[Schedule]) -> list[str | None]:
        """A problem, or None, of each schedule."""
        jobs = [(name, tuple(sizes.items()), dtype, s) for s in schedules]
        if self.pool is None:
            return [_checked(*job) for job in jobs]
        return [future.result() for future in [self.pool.submit(_checked, *job) for job in jobs]]


@dataclass(frozen=True)
class Tuned:
    """What tuning one graph gave: the entry for the table (None if the heuristic is as good), times, and what was tried."""

    key: str
    entry: Entry | None
    times: Sequence[Timed]
    trials: Sequence[Trial]
    problem: str | None = None

    def gains(self) -> dict[str, float]:
        """Tuned time over the heuristic's, by the number of rows."""
        tuned = self.entry.schedules if self.entry else {}
        return {str(t.rows): round(t.ratio, 3) for t in self.times if t.bucket in tuned}


def tune(
    name: str, sizes: Mapping[str, int], dtype: str, seconds: float, checkers: Checkers, tell: Callable[[Trial, float], None]
) -> Tuned:
    """Search schedules for one graph, then time the best once more beside the heuristic's."""
    target = Target(name, sizes, dtype)
    bench = Bench(lambda schedules: checkers(name, sizes, dtype, schedules), target.measure, tell)
    return _settled(target, search(target.graph, bench, seconds, target.buckets))


def again(name: str, sizes: Mapping[str, int], dtype: str, entries: Mapping[str, Mapping]) -> Tuned:
    """Time what a table has of one graph once more; what does not win again is left out."""
    target = Target(name, sizes, dtype)
    found = entries.get(graph_key(target.graph))
    known = Entry.parse(found) if found else None
    if known is not None and (why := stale(target.graph, known)):
        return Tuned(graph_key(target.graph), None, (), (), why)
    said = known.schedules if known else {}
    together = {b: said.get(b) or heuristic(target.graph, rows[-1]) for b, rows in target.buckets.items()}
    return _settled(target, Found(together, together, ()))


def _settled(target: Target, found: Found) -> Tuned:
    """The last word: all sides in turn, the same bits for every number of rows, and an entry that holds."""
    graph, times = target.graph, []
    for bucket, several in target.buckets.items():
        for rows in several:
            sides = {"heuristic": heuristic(graph, rows), "tuned": found.together[bucket], "free": found.free[bucket]}
            us = target.timed({str(s): s for s in sides.values()}, rows)
            named = {n: str(s) for n, s in sides.items()}
            times.append(Timed(bucket, rows, {n: us[s] for n, s in named.items()}, named))
    schedules = winners(graph, found.together, times)
    if schedules and len(kernels_of(graph, schedules)[1]) > 1:  # of another order: then it serves rows that were not timed, too
        schedules = {b: schedules[max(m for m in schedules if m <= b)] for b in buckets(graph)}
    if not schedules:
        return Tuned(graph_key(graph), None, times, found.trials)
    served = dict.fromkeys(schedules.get(b) or heuristic(graph, b) for b in buckets(graph))
    entry = Entry(schedules, kernels_of(graph, schedules)[0])
    problem = target.differ(list(served)) or stale(graph, entry)
    return Tuned(graph_key(graph), None if problem else entry, times, found.trials, problem)


def device() -> str:
    """The GPU's name."""
    return torch.cuda.get_device_name()


def made() -> dict:
    """What figures were made with."""
    versions = {"moekit": __version__, "torch": torch.__version__, "triton": triton.__version__}
    return {"device": device(), "cuda": torch.version.cuda, "versions": versions, "command": "moekit tune"}


def table_path() -> Path:
    """Where the package has the table of this GPU."""
    return Path(__file__).parent / "tables" / f"{device_key(device())}.json"


def write(path: Path, tuned: Sequence[Tuned]) -> None:
    """The table of a device as JSON, with what made it: what was tuned now, and what another run left of other graphs."""
    by = {"device": device()} | made()["versions"]
    before = read_json(path) if path.is_file() else {}
    kept = before.get("entries", {}) if before.get("made with", {}).get("triton") == triton.__version__ else {}
    entries = {k: e for k, e in kept.items() if k not in {t.key for t in tuned}} | {
        t.key: t.entry.to_json() | {"time over the heuristic's": t.gains()} for t in tuned if t.entry
    }
    write_text(path, json.dumps({"made with": by, "entries": dict(sorted(entries.items()))}, indent=1) + "\n")
