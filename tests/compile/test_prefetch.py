"""Weights asked for ahead: exactly what a program reads of them, and nothing where that is not known or too much."""

from collections import defaultdict

import breakers
import numpy as np
import programs as good
import pytest

from moekit.compile import tile as t
from moekit.compile.plan import plan
from moekit.compile.rules import spread
from moekit.compile.schedule import Schedule
from moekit.compile.tile import interpret
from moekit.fusions import FUSIONS
from moekit.lang import In, contract, fusion, gather
from moekit.lang.dtypes import numpy_dtype

GATES = {"x": (20, 448), "gate_up": (50, 448), "router": (33, 448), "shared_gate": (1, 448)}
BFLOAT16 = numpy_dtype("bfloat16")


@fusion(None, x=In("T D"), w=In("E D"), ids=In("K", dtype="int32"))
def chosen(x, w, ids):
    """A product with every row of a weight, and one with rows that ids choose."""
    return {"out": contract(x, w, over="D") * contract(x, gather(w, ids, over="E"), over="D")}


@fusion(None, x=In("T D"), w=In("P D"), y=In("T P"))
def turned(x, w, y):
    """Products along both axes of a weight."""
    return {"a": contract(x, w, over="D"), "b": contract(y, w, over="P")}


def _plan(name: str, shapes: dict, schedule: str, dtype: str = "bfloat16", last: str = "unit"):
    graph = good.graph_of(FUSIONS[name], shapes, dtype)
    layouts = {n: t.Strided((*["any"] * (len(x.dims) - 1), last)) for n, x in graph.tensors.items()}
    return plan(graph, spread(graph, schedule), layouts)


def _hints(program) -> list:
    return [op for s in program.sections for op in good.operations(s, t.Prefetch)]


def _touched(monkeypatch, program, shapes: dict, dtype) -> tuple[dict, dict]:
    """By section, program and tensor: the elements asked for, and those of the same tensors that are read."""
    asked, read = defaultdict(set), defaultdict(set)
    rows = dict(zip("TDIEGP", (20, 448, 25, 33, 1, 33), strict=True))

    def elements(run, op, axes):
        _, index, mask = run.address(op, axes)
        return {tuple(int(i[at]) for i in index) for at in np.ndindex(mask.shape) if mask[at]}

    def prefetch(run, op):
        for at in elements(run, op, run.program.ordered(op.at.axes)):
            for i in range(op.size):
                where = list(at)
                where[op.along] += i
                asked[run.program.name, str(run.ids), op.at.tensor].add(tuple(where))

    load = interpret.Program.load

    def noted(run, op):
        read[run.program.name, str(run.ids), op.at.tensor] |= elements(run, op, op.out.axes)
        return load(run, op)

    monkeypatch.setitem(interpret.EXECUTE, t.Prefetch, prefetch)
    monkeypatch.setitem(interpret.EXECUTE, t.Load, noted)
    memory = {n: np.zeros(shape, dtype) for n, shape in shapes.items()}
    for s in program.sections:
        for p in s.params:
            if p.role == "Out":
                memory[p.name] = np.zeros([{**rows, "D.part": 2}[a] if a else 1 for a in p.axes], np.float32)
    interpret.execute(program, memory, {"T": 20})
    return dict(asked), dict(read)


def test_each_program_asks_for_what_it_reads(monkeypatch):
    """Every element of a weight that a program reads, and no other; x, which may just have been written, is not asked for."""
    program = _plan("gate_projections", GATES, "tile:T:16 loop:D:32 tile:I:16 tile:E:16 tile:G:16 split:D:2").programs[0]
    asked, read = _touched(monkeypatch, program, GATES, BFLOAT16)
    weights = {key: where for key, where in read.items() if key[2] != "x"}
    # a part is 224 elements: 3 lines and half of one, which is left to the load
    assert set(asked) == set(weights)
    for key, where in weights.items():
        first = min(d for _, d in where)
        assert asked[key] == {(row, d) for row, d in where if d < first + 192}


@pytest.mark.parametrize(
    ("why", "shapes", "schedule", "last"),
    [
        ("the weight's rows are not dense", GATES, "tile:T:16 loop:D:32 tile:I:16 tile:E:16 tile:G:16 split:D:2", "any"),
        ("a part reaches past the end", GATES, "tile:T:16 loop:D:64 tile:I:16 tile:E:16 tile:G:16 split:D:2", "unit"),
        ("there are more lines than lanes ask for",
         {n: (*s[:1], 8192) for n, s in GATES.items()} | {"router": (128, 8192)},
         "tile:T:16 loop:D:64 tile:I:128 tile:E:128 tile:G:128 split:D:2 warps:1", "unit"),
        ("nothing runs on the matrix unit", GATES, "tile:T:1 loop:D:32 tile:I:16 tile:E:16 tile:G:16 split:D:2", "unit"),
    ],
)  # fmt: skip
def test_nothing_is_asked_for(why, shapes, schedule, last):
    """Where it is not known to be read, or too much."""
    assert not any(_hints(p) for p in _plan("gate_projections", shapes, schedule, last=last).programs), why


def test_a_whole_row_where_the_axis_is_not_split():
    """All of the contracted axis, in powers of two of lines."""
    shapes = {"x": (20, 384), "packed": (33, 384)}
    for text in ("", " parts:D:2"):
        (program,) = _plan("gate_gemm", shapes, f"tile:T:16 loop:D:64 tile:P:16{text}").programs
        assert [(h.at.tensor, h.size) for h in _hints(program)] == [("packed", 256), ("packed", 128)]
    (program,) = _plan("gate_gemm", shapes, "tile:T:16 loop:D:64 tile:P:16", "float32").programs
    assert [(h.at.tensor, h.size) for h in _hints(program)] == [("packed", 256), ("packed", 128)]


def test_an_access_past_the_end_is_an_error():
    """The interpreter checks what is asked for as it checks loads."""
    program = breakers.with_ops(good.ahead_program(), t.Prefetch, lambda op: op.size == 64, size=128)
    memory = {"x": np.zeros((20, 384), BFLOAT16), "packed": np.zeros((33, 384), BFLOAT16)}
    memory["partial_0"] = np.zeros((2, 20, 33), np.float32)
    with pytest.raises(IndexError, match="Prefetch of packed leaves its bounds"):
        interpret.execute(program, memory, {"T": 20})


@pytest.mark.parametrize(("declared", "shapes", "schedule"), [
    (chosen, {"x": (20, 256), "w": (64, 256), "ids": (16,)}, "tile:T:16 loop:D:64 tile:E:16 tile:K:16"),
    (turned, {"x": (20, 256), "w": (64, 256), "y": (20, 64)}, "tile:T:16 loop:D:64 whole:P:64"),
])  # fmt: skip
@pytest.mark.parametrize("along", [0, 1])
def test_other_reads_of_the_weight_are_not_asked_for(declared, shapes, schedule, along):
    """A schedule's word is of the reads that can be; rows chosen by ids and a product across the loop wait for something."""
    graph = good.graph_of(declared, shapes, "bfloat16")
    layouts = {n: t.Strided(("any",) * (len(x.dims) - 1) + ("unit",)) for n, x in graph.tensors.items()}
    layouts["w"] = t.Strided(("aligned", "unit") if along else ("unit", "aligned"))
    (program,) = plan(graph, Schedule.parse(f"{schedule} prefetch:w dependent"), layouts).programs
    assert len(good.operations(program, t.Prefetch)) == along
