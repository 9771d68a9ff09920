"""One pass over the GPU for compute-sanitizer: every fusion and probe, in every dtype, layout and schedule, in both backends.

    python -m moekit.testing.gpu_pass NAMES I N FOLDER FILE SECONDS   # every N-th case from the I-th on; a report as JSON
    python -m moekit.testing.gpu_pass control                         # planted faults, which the tool must find

Processes with the same FOLDER share the cases: each takes the next that none has taken, and none after SECONDS.

A fuzz campaign keeps its tensors in one arena, where a checker of allocations sees nothing; here each has an allocation of its
own that ends with its last element. Every output is held to the reference, and every case must have launched kernels.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moekit.cli.platform import prepare_jax
from moekit.compile.tile.interpret import poison
from moekit.files import write_text
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.lang.dtypes import FLOATS
from moekit.testing.batch import Outcome, run_alone
from moekit.testing.case import FuzzCase
from moekit.testing.draw import plain_case
from moekit.testing.executors import FRONT, SHORT, Executor, Torch, as_torch, executor, launches, schedule_of, to_numpy
from moekit.testing.guard import POISONS, Arena, place
from moekit.testing.oracle import Oracle
from moekit.testing.probes import PROBES
from moekit.testing.schedules import variants

ODD = dict(T=5, S=9, H=200, D=200, P=40, I=50, E=60, K=2, V=4, Dk=24, Dv=17, R=21, A=3, B=11, M=3, Cq=3, Ck=3, Cv=3)  # noqa: C408
EVEN = dict(T=33, S=40, H=256, D=128, P=64, I=64, E=64, K=2, V=4, Dk=16, Dv=32, R=32, A=4, B=16, M=2, Cq=16, Ck=16, Cv=16)  # noqa: C408
# For schedules whose programs would be too large of those.
SMALL = dict(T=5, S=9, H=24, D=24, P=20, I=20, E=12, K=2, V=2, Dk=8, Dv=9, R=9, A=3, B=11, M=2, Cq=3, Ck=3, Cv=3, Lr=9, Lc=9)  # noqa: C408
OTHER = 24
ALSO = {"block": 16}  # values of parameters that make other kernels than the defaults
SLOWEST = 5  # cases that a report names
COMPILED = "compiled"  # the door of Pallas's kernels
KINDS = ("dense", "padded", "strided", "transposed", "apart", "arbitrary")


def cases(names: Collection[str] = (*FUSIONS, *PROBES)) -> Iterator[tuple[str, FuzzCase]]:
    """Every implementation with every case it shall run of these fusions and probes, cheapest variety first, none twice."""
    for name in names:
        once = {json.dumps(c.to_json() | {"schedule": str(schedule_of(c))}): c for c in _cases(name)}
        for i, case in enumerate(once.values()):
            yield "triton", case
            if name in FUSIONS or i % 2 == 0 or case.schedule != "heuristic":
                yield "pallas", case


def _cases(name: str) -> Iterator[FuzzCase]:
    fusion = FuzzCase(name, {}, {}).declaration
    dims = [d for s in fusion.tensors.values() for d in s.dims]
    dtypes = [d for d in FLOATS if any(d in s.dtypes for s in fusion.tensors.values())] or ["int32"]
    params, ones = dict(example(fusion, dtype=dtypes[0]).params), {f"{d.text}?": 1 for d in dims if d.optional}

    def case(sizes: dict[str, int], turn: int, **more: Any) -> FuzzCase:
        return plain_case(name, sizes | ones, dtypes[turn % len(dtypes)], OTHER, **{"params": params, **more})

    for i in range(len(dtypes)):
        yield case(ODD, i)
        yield case(EVEN, i)
        once = case(ODD | {"T": 1}, i, mode="plain")
        yield once if i != 1 else replace(once, sizes={a: n for a, n in once.sizes.items() if a not in ones})
        if any(s.role == "InOut" for s in fusion.tensors.values()):
            yield case(ODD, i, mode="in place")
    if also := {n: x for n, x in ALSO.items() if n in params}:
        yield case(ODD, 0, params=params | also)
        yield case(EVEN, 1, params=params | also)
    plain = case(ODD, 0)
    for i, kind in enumerate(KINDS[1:]):
        made = case(ODD, i)
        yield replace(made, layouts={n: made.laid(n, kind) for n in made.memory()})
    usual = variants(plain.graph)
    for i, schedule in enumerate(s for s in {**usual, **variants(case(SMALL, 0).graph)} if s != "heuristic"):
        yield case(ODD if schedule in usual else SMALL, i, schedule=schedule)
        yield case(EVEN if schedule in usual else SMALL, i + 1, schedule=schedule)


def cell(implementation: str, case: FuzzCase) -> str:
    """What a case is counted as: implementation, fusion and the dtype of the operands that may have any."""
    free = [n for n, s in case.declaration.tensors.items() if set(FLOATS) <= set(s.dtypes)]
    return f"{implementation} {case.fusion} {case.dtypes[free[0]] if free else FLOATS[0]}"


def doors_of(implementation: str, case: FuzzCase) -> tuple[str, ...]:
    """The ways by which a case must launch kernels; old rows that a `put` keeps elsewhere are copied at the front door."""
    if implementation != "triton":
        return (COMPILED,)
    copied = any(w.ids and case.targets[w.tensor] != w.tensor for w in case.graph.writes)
    return (FRONT,) if copied else (FRONT, SHORT)


def run_triton(made: Torch, case: FuzzCase) -> Outcome:
    """What three calls gave, on fresh memory each time; the first warms what the others go through."""
    values, tensors = case.values(), {}
    for _ in range(3):
        contents = {n: values[n] if n in values else poison(case.shape(n), case.dtype(n)) for n in case.memory()}
        tensors = {n: _alone(case, n, x, made.device) for n, x in contents.items()}
        made.call(case, tensors)
    return Outcome({n: to_numpy(tensors[t]) for n, t in case.targets.items()})


def _alone(case: FuzzCase, name: str, values: Any, device: str) -> Any:
    """A tensor in an allocation that ends with its last element."""
    import torch

    layout, shape = case.layout(name), values.shape
    strides, offset = layout.strides(shape), layout.offset(shape) if values.size else 0
    span = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if values.size else 0
    flat = torch.zeros(span, dtype=getattr(torch, values.dtype.name), device=device)
    return torch.as_strided(flat, shape, strides, offset).copy_(as_torch(values))


def counted(made: Executor, case: FuzzCase) -> tuple[Outcome, dict[str, int]]:
    """What a case gave, and the kernels that were launched for it by door."""
    before = Counter(launches)
    if isinstance(made, Torch):
        return run_triton(made, case), {d: launches[d] - before[d] for d in (FRONT, SHORT)}
    return run_alone(made, case), {COMPILED: launches[made.name] - before[made.name]}


def pallas_call(case: FuzzCase) -> tuple[Callable, dict]:
    """The jitted function that makes a case's call in Pallas, and the arrays that it takes."""
    from moekit.testing.jax_executor import arrays, compiled

    placed = place(arena := Arena(), case, case.values())
    image = arena.image(POISONS[0])
    return compiled("pallas", case), arrays(case, {n: s.whole(image) for n, s in placed.slots.items()})


def mark(implementation: str, case: FuzzCase) -> str:
    """The name of the file by which a process says that it takes a case."""
    return hashlib.sha256(f"{implementation} {json.dumps(case.to_json())}".encode()).hexdigest()[:16]


def taken(folder: Path, mine: Sequence[tuple[str, FuzzCase]], who: str) -> Iterator[tuple[str, FuzzCase]]:
    """The cases that no other process has taken; each is taken as it is given, by a file that says by whom."""
    for one in mine:
        try:
            with open(folder / mark(*one), "x", encoding="utf-8") as file:
                file.write(who)
        except FileExistsError:
            continue
        yield one


def run_share(mine: Sequence[tuple[str, FuzzCase]], folder: Path, seconds: float, who: str = "") -> dict:
    """Run what no other process takes of `mine`; the report: cases, kernels by door and by cell, one sentence per problem, and

    the cases that took longest, with their seconds. Each case is printed before it runs: the last line of a share that did not
    end says where it was.
    """
    begin = time.monotonic()
    prepare_jax()
    made = {name: executor(name) for name in dict.fromkeys(implementation for implementation, _ in mine)}
    report = {"cases": 0, "doors": Counter(), "cells": Counter(), "problems": [], "slow": []}
    for implementation, case in taken(folder, mine, who):
        what, since = f"{implementation} {json.dumps(case.to_json())}", time.monotonic()
        print(f"case {report['cases'] + 1}: {what}", flush=True)
        outcome, launched = counted(made[implementation], case)
        found = [f"no kernel by the way {d!r}" for d in doors_of(implementation, case) if not launched.get(d)]
        found += Oracle.of(case, implementation).compare(outcome.outputs).problems
        report["problems"] += [f"{what}: {p}" for p in found]
        report["cases"] += 1
        report["doors"].update({f"{implementation} {d}": n for d, n in launched.items()})
        report["cells"][cell(implementation, case)] += sum(launched.values())
        now = time.monotonic()
        report["slow"] = sorted([*report["slow"], [round(now - since, 1), what]], reverse=True)[:SLOWEST]
        if now - begin > seconds:
            break
    return report


CONTROL = """
extern "C" __global__ void past_the_end(float* x, int n) { x[n + threadIdx.x] = 1.0f; }
extern "C" __global__ void no_barrier(float* x, int n) {
    __shared__ float row[256];
    row[threadIdx.x] = x[threadIdx.x];
    x[threadIdx.x] = row[(threadIdx.x + 64) % n];
}
"""


def control() -> None:
    """Launch a race in shared memory and a store past the end of an allocation."""
    import torch

    x = torch.zeros(256, device="cuda")
    for name in ("no_barrier", "past_the_end"):
        kernel = torch.cuda._compile_kernel(CONTROL, name)
        kernel(grid=(1, 1, 1), block=(256, 1, 1), args=[x, 256])
        torch.cuda.synchronize()


if __name__ == "__main__":
    if sys.argv[1] == "control":
        control()
    else:
        names, first, step, folder, report, seconds = sys.argv[1:]
        mine, place = list(cases(names.split(",")))[int(first) - 1 :: int(step)], Path(report)
        write_text(place, json.dumps(run_share(mine, Path(folder), float(seconds), place.name)))
