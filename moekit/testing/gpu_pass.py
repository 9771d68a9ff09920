"""One pass over the GPU for compute-sanitizer: every fusion and probe, in every dtype, layout and schedule, in both backends.

    python -m moekit.testing.gpu_pass SHARE SHARES FILE    # every SHARES-th case from number SHARE on; a report as JSON
    python -m moekit.testing.gpu_pass control              # two kernels with planted faults, which the tool must find

A fuzz campaign keeps its tensors in one arena, where a checker of allocations sees nothing; here each has an allocation of its
own that ends with its last element. Every output is held to the reference, and every case must have launched kernels.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moekit.compile.tile.interpret import poison
from moekit.files import write_text
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.lang.dtypes import FLOATS
from moekit.lang.fusion import Fusion
from moekit.testing.case import FuzzCase, Layout
from moekit.testing.executors import schedule_of
from moekit.testing.oracle import Oracle
from moekit.testing.probes import PROBES
from moekit.testing.schedules import variants

ODD = {
    "T": 5,
    "S": 9,
    "H": 200,
    "D": 200,
    "P": 40,
    "I": 50,
    "E": 60,
    "K": 2,
    "V": 4,
    "Dk": 24,
    "Dv": 17,
    "R": 21,
    "A": 3,
    "B": 11,
}
EVEN = {
    "T": 33,
    "S": 40,
    "H": 256,
    "D": 128,
    "P": 64,
    "I": 64,
    "E": 64,
    "K": 2,
    "V": 4,
    "Dk": 16,
    "Dv": 32,
    "R": 32,
    "A": 4,
    "B": 16,
}
OTHER = 24
IMPLEMENTATIONS = ("triton", "pallas")
KINDS: dict[str, Callable[[int], dict]] = {
    "dense": lambda rank: {},
    "padded": lambda rank: {"pads": _last(rank, 3, 0)},
    "offset": lambda rank: {"starts": _last(rank, 3, 0)},
    "strided": lambda rank: {"steps": _last(rank, 2, 1), "starts": _last(rank, 1, 0)},
    "transposed": lambda rank: {"order": tuple(reversed(range(rank)))},
    "apart": lambda rank: {"steps": (3, *(1,) * (rank - 1)) if rank else ()},
}


def _last(rank: int, value: int, other: int) -> tuple[int, ...]:
    return (*(other,) * (rank - 1), value) if rank else ()


def layout(kind: str, rank: int) -> Layout:
    """The layout of a tensor of some rank."""
    return replace(Layout.dense(rank), kind=kind, **KINDS[kind](rank))


def cases() -> Iterator[tuple[str, FuzzCase]]:
    """Every implementation with every case it shall run, cheapest variety first."""
    for name, fusion in {**FUSIONS, **PROBES}.items():
        for i, case in enumerate({json.dumps(c.to_json()): c for c in _cases(name, fusion)}.values()):
            yield "triton", case
            if name in FUSIONS or i % 2 == 0 or case.schedule != "heuristic":
                yield "pallas", case


def _dtypes(fusion: Fusion) -> list[str]:
    """The floats that operands can be; int32 where none can be one."""
    return [d for d in FLOATS if any(d in s.dtypes for s in fusion.tensors.values())] or ["int32"]


def _cases(name: str, fusion: Fusion) -> Iterator[FuzzCase]:
    dtypes = _dtypes(fusion)
    params = dict(example(fusion, dtype=dtypes[0]).params)
    for i, dtype in enumerate(dtypes):
        for sizes in (ODD, EVEN):
            yield _case(name, fusion, sizes, dtype, params)
        yield _case(name, fusion, ODD | {"T": 1}, dtype, params, mode="plain", wide=i == 1)
        if any(s.role == "InOut" for s in fusion.tensors.values()):
            yield _case(name, fusion, ODD, dtype, params, mode="in place")
    for i, kind in enumerate([k for k in KINDS if k != "dense"]):
        case = _case(name, fusion, ODD, dtypes[i % len(dtypes)], params)
        yield replace(case, layouts={n: layout(kind, len(case.shape(n))) for n in case.memory()})
    plain = _case(name, fusion, ODD, dtypes[0], params)
    for i, schedule in enumerate(s for s in variants(plain.graph) if s != "heuristic"):
        for turn in (0, 1):
            yield replace(_case(name, fusion, (ODD, EVEN)[turn], dtypes[(i + turn) % len(dtypes)], params), schedule=schedule)


def _case(name: str, fusion: Fusion, sizes: Mapping[str, int], dtype: str, params: Mapping, mode: str = "out",
          wide: bool = False) -> FuzzCase:  # fmt: skip
    dims = [d for s in fusion.tensors.values() for d in s.dims]
    used = {a: sizes.get(a, OTHER) for d in dims for _, a in d.terms}
    optional = {f"{d.text}?": 1 for d in dims if d.optional and not wide}
    dtypes = {n: dtype if dtype in s.dtypes else s.dtypes[0] for n, s in fusion.tensors.items()}
    return FuzzCase(name, used | optional, dtypes, params, mode=mode, recipe="normal")


def cell(implementation: str, case: FuzzCase) -> str:
    """What a case is counted as: implementation, fusion and the dtype of the operands that may have any."""
    free = [n for n, s in case.declaration.tensors.items() if set(FLOATS) <= set(s.dtypes)]
    return f"{implementation} {case.fusion} {case.dtypes[free[0]] if free else FLOATS[0]}"


def doors_of(implementation: str, case: FuzzCase) -> tuple[str, ...]:
    """The ways by which a case must launch kernels; old rows that a `put` keeps elsewhere are copied at the front door."""
    if implementation != "triton":
        return ("compiled",)
    copied = any(w.ids and case.targets[w.tensor] != w.tensor for w in case.graph.writes)
    return ("front",) if copied else ("front", "short")


class Doors:
    """Counts the kernels that go through each of the two ways in which moekit launches Triton kernels."""

    def __init__(self) -> None:
        from moekit.torch import fast, launch

        self.counts: Counter[str] = Counter()
        front, short = launch._start, fast._launch

        def counted_front(one, tensors):
            self.counts["front"] += 1
            return front(one, tensors)

        def counted_short(entry, pointers):
            self.counts["short"] += len(entry.ready)
            short(entry, pointers)

        launch._start, fast._launch = counted_front, counted_short


def run_triton(case: FuzzCase, doors: Doors, device: str = "cuda") -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The outputs, and the kernels launched through either door: the call is made three times, on fresh memory each time."""
    import torch

    from moekit.testing.layouts import to_numpy
    from moekit.torch import op

    doors.counts.clear()
    face, outputs = op(case.declaration, in_place=case.mode == "in place"), {}
    for _ in range(3):
        tensors = {n: _alone(case, n, x, device) for n, x in _contents(case).items()}
        given = None
        if case.mode != "plain":
            given = tuple(None if t == n and n in case.shapes else tensors[t] for n, t in case.targets.items())
        got = face(*(tensors[n] for n in case.shapes), **case.params, implementation="triton", schedule=schedule_of(case),
                   out=given if given and any(x is not None for x in given) else None)  # fmt: skip
        outputs = {n: to_numpy(x).copy() for n, x in zip(case.names, got if isinstance(got, tuple) else (got,), strict=True)}
    if device == "cuda":
        torch.cuda.synchronize()
    return outputs, dict(doors.counts)


def _contents(case: FuzzCase) -> dict[str, np.ndarray]:
    """What every tensor of the call holds before it: values, or poison for outputs."""
    values = case.values()
    return {n: values[n] if n in values else poison(case.shape(n), case.dtype(n)) for n in case.memory()}


def _alone(case: FuzzCase, name: str, values: np.ndarray, device: str) -> Any:
    """A tensor in an allocation that ends with its last element."""
    import torch

    place, shape = case.layout(name), values.shape
    strides, offset = place.strides(shape), place.offset(shape)
    span = offset + 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if values.size else 0
    flat = torch.zeros(span, dtype=getattr(torch, values.dtype.name), device=device)
    bits = values.view(np.int16) if values.dtype.name == "bfloat16" else values
    tensor = torch.as_strided(flat, shape, strides, offset if values.size else 0)
    tensor.copy_(torch.from_numpy(np.ascontiguousarray(bits)).view(tensor.dtype))
    return tensor


def pallas_call(case: FuzzCase) -> tuple[Callable, tuple[tuple, dict]]:
    """A function of (operands, given outputs) that makes a case's call in Pallas, and these."""
    from moekit.jax import op

    views = {n: _view(case, n, x) for n, x in _contents(case).items()}
    given = {t: views[t] for t in case.targets.values() if case.mode != "plain" and t not in case.shapes}

    def call(operands: tuple, outs: dict):
        out = tuple(outs.get(t) for t in case.targets.values()) if outs else None
        return op(case.declaration)(*operands, **case.params, implementation="pallas", schedule=schedule_of(case), out=out)

    return call, (tuple(views[n] for n in case.shapes), given)


def run_pallas(case: FuzzCase) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The outputs, and the Pallas kernels in the compiled program that gave them."""
    import jax

    call, arguments = pallas_call(case)
    given = arguments[1]
    compiled = jax.jit(call).lower(*arguments).compile()
    got = compiled(*arguments)
    outputs = {}
    for (name, target), x in zip(case.targets.items(), got if isinstance(got, tuple) else (got,), strict=True):
        outputs[name] = np.asarray(replace(given[target], base=x).array() if target in given else x)
    return outputs, {"compiled": (compiled.as_text() or "").count('custom_call_target="__gpu$xla.gpu.triton"')}


def _view(case: FuzzCase, name: str, values: np.ndarray) -> Any:
    import jax.numpy as jnp

    from moekit.jax import View

    place, shape = case.layout(name), values.shape
    extents = place.base(shape)
    axes = tuple(place.order.index(d) for d in range(len(shape)))
    base = np.zeros([extents[d] for d in place.order], values.dtype)
    inside = tuple(slice(place.starts[d], None if values.size else 0, place.steps[d]) for d in place.order)
    trimmed = tuple(slice(0, shape[d]) for d in place.order)
    base[inside][trimmed] = np.transpose(values, place.order)
    return View(jnp.asarray(base), axes, place.starts, place.steps, shape)


def run_share(share: int, shares: int) -> dict:
    """Run every `shares`-th case; the report: cases, kernels by door and by cell, and one sentence per problem.

    Each case is printed before it runs: the last line of a share that did not end says where it was.
    """
    from moekit.cli.platform import prepare_jax

    prepare_jax()
    doors, report = Doors(), {"cases": 0, "doors": Counter(), "cells": Counter(), "problems": []}
    mine = list(cases())[share::shares]
    for n, (implementation, case) in enumerate(mine, 1):
        what = f"{implementation} {json.dumps(case.to_json())}"
        print(f"case {n} of {len(mine)}: {what}", flush=True)
        outputs, launched = run_triton(case, doors) if implementation == "triton" else run_pallas(case)
        wanted = doors_of(implementation, case)
        report["problems"] += [f"{what}: no kernel by the way {d!r}" for d in wanted if not launched.get(d)]
        report["problems"] += [f"{what}: {p}" for p in Oracle.of(case, implementation).problems(outputs)[0]]
        report["cases"] += 1
        report["doors"].update({f"{implementation} {d}": n for d, n in launched.items()})
        report["cells"][cell(implementation, case)] += sum(launched.values())
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


def main() -> None:
    """Run a share and write its report, or the control."""
    if sys.argv[1] == "control":
        control()
        return
    share, shares, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    write_text(path, json.dumps(run_share(share, shares)))


if __name__ == "__main__":
    main()
