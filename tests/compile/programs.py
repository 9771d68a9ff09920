"""Good programs for the compile tests to look at and to break."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from moekit.compile import tile as t
from moekit.compile.plan import Plan, plan
from moekit.compile.rules import spread
from moekit.compile.schedule import Schedule
from moekit.compile.tile.layouts import contiguous
from moekit.fusions import FUSIONS
from moekit.lang import In, InOut, cast, concat, cumsum, f32, fusion, gather, mean, put, rsqrt, size, slice, sum
from moekit.lang.fusion import Fusion
from moekit.lang.graph import Graph


@fusion(None, x=In("T H"), weight=In("H"))
def norm(x, weight):
    """An RMS norm."""
    v = f32(x)
    return {"out": cast(v * rsqrt(mean(v * v, over="H") + 1e-6) * f32(weight), x.dtype)}


@fusion(None, x=In("T H"), slots=In("T", dtype="int32"), state=InOut("S H", dtype="float32"), dynamic="T S")
def accumulate(x, slots, state):
    """state[slots] += x, and the sum of the updated rows."""
    new = gather(state, slots, over="S") + f32(x)
    return {"state": put(new, slots, over="S"), "total": sum(new, over="H")}


@fusion(None, x=In("T"), state=InOut("T H", dtype="float32"))
def window(x, state):
    """Every row loses its first element and gains x."""
    return {"state": concat(slice(state, "H", 1, size("H") - 1, "R"), f32(x), over="R 1", into="H")}


@fusion(None, table=In("E H"), ids=In("T", dtype=("int32", "int64")))
def lookup(table, ids):
    """Rows of a table."""
    return {"out": gather(table, ids, over="E")}


@fusion(x=In("T H"))
def running(x):
    """A running sum along a run-time axis."""
    return cumsum(x, over="T")


def _both_updated(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return {"a": a + b.sum(2), "b": a[:, :, None] * b}


@fusion(_both_updated, a=InOut("T H"), b=InOut("T H P"))
def both_updated(a, b):
    """Two updated tensors, each needed along all its axes for the other."""
    return {"a": cast(f32(a) + sum(f32(b), over="P"), a.dtype), "b": cast(f32(a) * f32(b), b.dtype)}


def _crossed(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    return {"a": a + b.sum(1, keepdims=True), "b": b * a.sum(1, keepdims=True)}


@fusion(_crossed, a=InOut("T H"), b=InOut("T P"))
def crossed(a, b):
    """Two updated tensors, of which each needs the other's sum."""
    return {"a": cast(f32(a) + sum(f32(b), over="P"), a.dtype), "b": cast(f32(b) * sum(f32(a), over="H"), b.dtype)}


def graph_of(f: Fusion, shapes: Mapping[str, tuple], dtypes: Mapping[str, str] | str = "float32", **params) -> Graph:
    """The graph of a call of these shapes."""
    dtypes = dict.fromkeys(f.tensors, dtypes) if isinstance(dtypes, str) else dtypes
    every = {n: dtypes[n] if dtypes.get(n) in s.dtypes else s.dtypes[0] for n, s in f.tensors.items()}
    return f.trace(f.bind(shapes, every, f.bind_params(params)))


def planned(graph: Graph, schedule: Schedule | str | None = None, wide: bool = False) -> Plan:
    """A plan for run-time strides of any kind."""
    schedule = Schedule.parse(schedule) if isinstance(schedule, str) else schedule
    layouts = {n: t.Strided(("any",) * len(x.dims), wide) for n, x in graph.tensors.items()}
    return plan(graph, schedule, layouts)


def norm_program(schedule: str = "tile:T:4 whole:H:64") -> t.TileProgram:
    """RMS norm of rows of 50, some rows to a program."""
    graph = graph_of(norm, {"x": (7, 50), "weight": (50,)}, "bfloat16")
    return planned(graph, schedule).programs[0]


def looped_program() -> t.TileProgram:
    """RMS norm of rows of 50 in blocks of 16: two passes."""
    return norm_program("tile:T:4 loop:H:16")


def running_program() -> t.TileProgram:
    """A running sum from turn to turn of a loop."""
    graph = graph_of(running, {"x": (20, 5)})
    return planned(graph, "loop:T:8 tile:H:4").programs[0]


def gemm_program() -> t.TileProgram:
    """A product on the matrix unit, its contracted axis in blocks that do not divide it."""
    graph = graph_of(FUSIONS["gate_gemm"], {"x": (20, 50), "packed": (33, 50)}, "bfloat16")
    return planned(graph, "tile:T:16 loop:D:16 tile:P:16").programs[0]


def split_programs() -> tuple[t.TileProgram, ...]:
    """The two launches of a split product."""
    graph = graph_of(FUSIONS["gate_gemm"], {"x": (20, 200), "packed": (33, 200)}, "bfloat16")
    return planned(graph, spread(graph, "tile:T:16 loop:D:16 tile:P:16 split:D:3")).programs


def tall_program() -> t.TileProgram:
    """Twins in parts: two products of one left operand, with columns that do not fill their blocks, in a flat loop."""
    shapes = {"x": (70, 200), "gate_up": (50, 200), "router": (40, 200), "shared_gate": (1, 200)}
    graph = graph_of(FUSIONS["gate_projections"], shapes, "bfloat16")
    return planned(graph, spread(graph, "tile:T:64 loop:D:16 tile:E:16 tile:G:16 tile:I:16 parts:D:2")).programs[0].sections[0]


def ahead_program(wide: bool = False) -> t.TileProgram:
    """The first launch of a split product that asks for its weight ahead: 192 elements a part, two lines and one."""
    graph = graph_of(FUSIONS["gate_gemm"], {"x": (20, 384), "packed": (33, 384)}, "bfloat16")
    layouts = {n: t.Strided(("any", "unit"), wide) for n in graph.tensors}
    return plan(graph, spread(graph, "tile:T:16 loop:D:64 tile:P:16 split:D:2"), layouts).programs[0]


def lookup_program() -> t.TileProgram:
    """Rows gathered by ids."""
    return planned(graph_of(lookup, {"table": (9, 20), "ids": (7,)}), "tile:T:4 tile:H:16").programs[0]


def accumulate_program() -> t.TileProgram:
    """Rows updated at ids."""
    shapes = {"x": (3, 20), "slots": (3,), "state": (9, 20)}
    return planned(graph_of(accumulate, shapes), "tile:T:1 whole:H:32").programs[0]


def window_program() -> t.TileProgram:
    """Rows of a state that move up by one, in place."""
    return planned(graph_of(window, {"x": (3,), "state": (3, 6)}), "tile:T:2 whole:H:8").programs[0]


def exchange_program() -> t.TileProgram:
    """Rows added up over two ranks."""
    graph = graph_of(FUSIONS["all_reduce_add_rms_norm"], {"partial": (7, 50), "residual": (7, 50), "weight": (50,)}, tp=2)
    sizes = {"T": 7, "H": 50}
    (program,) = plan(graph, Schedule.parse("tile:T:2 whole:H:64"), contiguous(graph, sizes)).programs
    assert isinstance(program, t.TileProgram)
    return program


def edit(program: t.TileProgram, change: Callable[[t.Op], t.Op | None]) -> t.TileProgram:
    """The program with every operation replaced by what `change` returns (None: left out), loops' bodies first."""

    def visit(ops) -> tuple:
        found = []
        for op in ops:
            if isinstance(op, t.Loop | t.AtEnd):
                op = replace(op, body=visit(op.body))
            if (new := change(op)) is not None:
                found.append(new)
        return tuple(found)

    return replace(program, body=visit(program.body))


def operations(program: t.TileProgram, kind: type) -> list:
    """All operations of a kind, loops' bodies included, in order."""
    found: list = []

    def note(op):
        if isinstance(op, kind):
            found.append(op)
        return op

    edit(program, note)
    return found
