"""Pairs, flat loops and sections abreast: when they come about, and that no result depends on them."""

import re
import textwrap
from dataclasses import replace

import numpy as np
import programs as good
import pytest

from moekit.backends import triton
from moekit.compile import tile
from moekit.compile.rules import heuristic, row_classes, spread
from moekit.compile.schedule import Schedule
from moekit.compile.tile import interpret
from moekit.compile.tile.verify import verify
from moekit.errors import VerifyError
from moekit.fusions import FUSIONS
from moekit.lang import In, cast, contract, fusion, slice
from moekit.lang.dtypes import numpy_dtype
from moekit.testing import Call, check, operands, run

SIZES = {"T": 70, "D": 90, "I": 25, "E": 40, "G": 1}
TALL = "tile:T:64 loop:D:16 tile:E:16 tile:G:16 tile:I:16 parts:D:2 warps:4 stages:2"
RNG = np.random.default_rng(0)


@fusion(None, x=In("T D"), weight=In("P D"))
def every_other(x, weight):
    """Every other row of a weight from the fifth and from the sixth on: a pair that steps."""
    one, other = (contract(x, slice(weight, "P", start, 20, "I", 2), over="D") for start in (4, 5))
    return {"out": cast(one - other, x.dtype)}


@fusion(None, x=In("T D"), y=In("T D"), weight=In("P D"))
def strangers(x, y, weight):
    """Products of two left operands, and of one with rows at two paces."""
    pick = lambda start, step: slice(weight, "P", start, 20, "I", step)  # noqa: E731
    apart = contract(x, pick(0, 1), over="D") - contract(y, pick(20, 1), over="D")
    return {"out": cast(apart * contract(y, pick(0, 2), over="D"), x.dtype)}


def made(rows: int = 64, dtype: str = "bfloat16") -> tuple[Call, tile.Kernel]:
    """A call of the gate's products in blocks of so many rows, and its kernel."""
    fused = FUSIONS["gate_projections"]
    call = Call(fused, operands(fused, SIZES, dtype))
    call = replace(call, schedule=spread(call.graph, TALL.replace("tile:T:64", f"tile:T:{rows}")))
    return call, good.planned(call.graph, call.schedule).programs[0]


def accumulators(program: tile.TileProgram) -> list[tuple[str, ...]]:
    """The axes of every product."""
    return [op.out.axes for op in good.operations(program, tile.Dot)]


@pytest.mark.parametrize(
    ("rows", "dtype", "together"),
    [(64, "bfloat16", True), (64, "float16", True), (64, "float32", False), (32, "bfloat16", False)],
)
def test_products_that_become_pairs(rows, dtype, together):
    """Gate and up are one product in 16 bits and with many rows; the router's and the shared gate's have no twin.

    Only where a program has a single product is its loop over parts flat.
    """
    activated, logits, share = made(rows, dtype)[1].sections
    assert accumulators(activated) == ([("T", "I.twice")] if together else [("T", "I")] * 2)
    assert (accumulators(logits), accumulators(share)) == ([("T", "E")], [("T", "G")])
    flat = [any(len(op.over) > 1 for op in good.operations(p, tile.Loop)) for p in (activated, logits, share)]
    assert flat == [together, True, True]


def test_products_that_are_no_pairs():
    """They need one left operand and one pace."""
    graph = good.graph_of(strangers, {"x": (70, 90), "y": (70, 90), "weight": (60, 90)}, "bfloat16")
    (program,) = good.planned(graph, "tile:T:64 loop:D:16 tile:I:16").programs
    assert accumulators(program) == [("T", "I")] * 3


@pytest.mark.parametrize("implementation", ["interpret", "pallas"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_pairs_are_right(implementation, dtype):
    """In blocks that their columns do not fill, and rows neither."""
    check(implementation, made(dtype=dtype)[0])


def test_pairs_that_step():
    """The step multiplies the index, the start is added."""
    x, weight = (RNG.standard_normal(s).astype(numpy_dtype("bfloat16")) for s in ((70, 90), (50, 90)))
    graph = good.graph_of(every_other, {"x": x.shape, "weight": weight.shape}, "bfloat16")
    found = good.planned(graph, "tile:T:64 loop:D:16 tile:I:16 parts:D:2 pair:weight")
    assert accumulators(found.programs[0]) == [("T", "I.twice")]
    memory = {"x": x, "weight": weight, "out": interpret.poison((70, 20), "bfloat16")}
    interpret.run(found, memory, {"T": 70})
    product = x.astype(np.float64) @ weight.astype(np.float64).T
    np.testing.assert_allclose(memory["out"].astype(np.float64), product[:, 4:44:2] - product[:, 5:45:2], rtol=2**-7, atol=1e-4)


def test_pairs_of_a_product_with_an_end():
    """Gate and up of an expert that data choose, or of none: the choice stands around both blocks of columns; the same bits."""
    fused, sizes = FUSIONS["experts"], {"T": 20, "D": 40, "I": 24, "H": 24, "E": 3, "K": 2}
    values = operands(fused, sizes, "bfloat16", "normal", 1)
    values["ids"] = np.random.default_rng(2).integers(-1, 4, values["ids"].shape).astype(values["ids"].dtype)
    tables = str(heuristic(Call(fused, values, {"block": 64}).graph)).rpartition("stage:order,chosen,filled then ")
    got = []
    for pair in ("", "pair:gate_up "):
        text = f"tile:B:1 tile:J:64 loop:D:16 tile:I:16 {pair}warps:4 stages:2 stage:activated then "
        text += "tile:B:1 tile:J:64 loop:I:16 tile:H:16 warps:4 stages:2 stage:placed then tile:T:1 loop:K:1 tile:H:16"
        call = Call(fused, values, {"block": 64}, schedule=Schedule.parse("".join(tables[:2]) + text))
        products = accumulators(good.planned(call.graph, call.schedule).programs[-3])
        assert products == ([("J", "I.twice")] if pair else [("J", "I")] * 2)
        check("interpret", call)
        got.append(run("interpret", call).outputs["out"].astype(np.float32))
    np.testing.assert_array_equal(*got)


@pytest.mark.parametrize("implementation", ["interpret", "pallas"])
def test_pairs_whose_columns_stand_left(implementation):
    """Gate and up of float8 experts, scaled apart after each turn: 8 columns of either in turn; the bits of two products."""
    fused, sizes = FUSIONS["scaled_experts"], {"T": 20, "D": 128, "I": 96, "H": 128, "E": 3, "K": 2}
    kinds = dict.fromkeys(("weights", "gate_up_scale", "down_scale"), "float32") | {"x": "bfloat16", "ids": "int32"}
    params, got = {"block": 32, "columns": 32, "inner": 32}, []
    sizes |= {"Ib": 3, "Db": 4, "Hb": 4}
    values = operands(fused, sizes, kinds | dict.fromkeys(("gate_up", "down"), "float8_e4m3fn"), "normal", 1, params)
    values["ids"] = np.random.default_rng(2).integers(-1, 4, values["ids"].shape).astype(values["ids"].dtype)
    good_one = str(heuristic(Call(fused, values, params).graph))
    assert good_one.count("pair:gate_up ") == 1
    for text in (good_one, good_one.replace("pair:gate_up ", "")):
        call = Call(fused, values, params, schedule=Schedule.parse(text))
        program = good.planned(call.graph, call.schedule).programs[-3]
        paired = [(a.of, a.strip) for a in program.axes if a.of]
        assert (accumulators(program), paired) == (
            ([("Ii.twice", "J")], [("Ii", 8)]) if "pair:" in text else ([("J", "Ii")] * 2, [])
        )
        check(implementation, call)
        got.append(run(implementation, call).outputs["out"].astype(np.float32))
    np.testing.assert_array_equal(*got)


def test_columns_outermost():
    """A half takes the place of its own axis, wherever that stands."""
    program = good.tall_program()
    turned = replace(program, axes=(program.axis("I"), *(a for a in program.axes if a.name != "I")))
    op = good.operations(program, tile.Halves)[0]
    value = RNG.standard_normal((64, 32)).astype(np.float32)
    state = interpret.Program(turned, {}, {}, {}, 0, {})
    state.values[op.value] = value
    first, second = state.halves(replace(op, outs=tuple(replace(v, axes=("I", "T")) for v in op.outs)))
    np.testing.assert_array_equal(first, value[:, :16].T)
    np.testing.assert_array_equal(second, value[:, 16:].T)


def test_sections_abreast():
    """The programs of all sections for one block of rows come one after the other, and all of them come."""
    _, kernel = made()
    assert kernel.abreast
    text = triton.emit(kernel)
    blocks, counts = 4, {s.name: s.programs({"T": 200}) for s in kernel.sections}
    seen: dict[str, list[int]] = {name: [] for name in counts}
    for pid in range(sum(counts.values())):
        ((name, number),) = _called(text, pid)
        assert number // (counts[name] // blocks) == pid // (sum(counts.values()) // blocks)
        seen[name].append(number)
    assert seen == {name: list(range(count)) for name, count in counts.items()}


NAMES = [f"gate_projections_{section}" for section in ("activated", "logits", "share")]


def _called(text: str, pid: int) -> list[tuple[str, int]]:
    """Which section the emitted kernel calls for a program, and with which number."""
    body = text[text.index("    pid = tl.program_id(0)") :].split("\n", 1)[1]
    found: list[tuple[str, int]] = []
    scope: dict = {name: lambda own, *others, name=name: found.append((name, own)) for name in NAMES}
    names = re.findall(r"\w+_ptr|\w+_stride_\w+|PDL", body)
    exec(textwrap.dedent(body), scope | dict.fromkeys(names, None) | {"pid": pid, "T": 200})
    return found


def test_sections_with_other_blocks_are_not_abreast():
    """They would not have as many blocks."""
    _, kernel = made()
    first, *others = kernel.sections
    axes = tuple(replace(a, block=128) if a.name == "T" else a for a in first.axes)
    with pytest.raises(VerifyError, match=r"abreast: gate_projections_logits has other blocks than gate_projections_activated"):
        verify(replace(kernel, sections=(replace(first, axes=axes), *others)))
    split = good.planned(graph := made()[0].graph, spread(graph, TALL.replace("parts", "split"))).programs[0]
    assert not split.abreast


@pytest.mark.parametrize(
    ("width", "classes", "in_a_row"),
    [(64, (0, 17, 65, 193, 385, 769, 1409), 385), (512, (0, 17, 65, 129, 321, 641), 129), (4096, (0, 17, 65), 0)],
)
def test_many_rows_take_larger_tiles_once_smaller_ones_are_too_many(width, classes, in_a_row):
    """The classes of a GEMM's rows, by its columns; from `in_a_row` on its programs do all parts, in 16 bits."""
    shapes = {"x": (4, 2048), "gate_up": (2 * width, 2048), "router": (512, 2048), "shared_gate": (1, 2048)}
    graph = good.graph_of(FUSIONS["gate_projections"], shapes, "bfloat16")
    assert row_classes(graph) == classes
    schedules = [heuristic(graph, least) for least in row_classes(graph)]
    assert len({str(s) for s in schedules}) == len(schedules)
    cuts = [s.launches[0].cut for s in schedules]
    assert [cut is not None for cut in cuts] == [least < in_a_row for least in classes]
    parts = [s.parts for schedule in schedules if len(schedule.launches) == 1 for s in schedule.launches[0].sections]
    assert {(cut.axis, cut.count) for cut in cuts if cut} == {pair for some in parts for pair in some.items()}
    wide = good.graph_of(FUSIONS["gate_projections"], shapes, "float32")
    assert row_classes(wide) == ((0, 2048) if in_a_row else (0,))
