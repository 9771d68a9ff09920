"""experts in every implementation: pairs in blocks of one expert, few tokens and many alike."""

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic
from moekit.compile.rules.order import order
from moekit.compile.tile import Dot, Loop, walk
from moekit.compile.tile.interpret import EXECUTE
from moekit.compile.tile.interpret import run as execute
from moekit.compile.tile.layouts import contiguous
from moekit.fusions.experts import experts
from moekit.lang import round_to
from moekit.lang.arguments import example
from moekit.testing import Call, implementations, operands, run

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
QWEN = {"D": 2048, "I": 512, "H": 2048, "E": 512, "K": 10}
SIZES = [
    {"T": 0, "K": 2, "E": 4, "D": 16, "I": 16, "H": 16}, {"T": 1, "K": 1, "E": 1, "D": 1, "I": 1, "H": 1},
    {"T": 1, "K": 10, "E": 30, "D": 33, "I": 17, "H": 50}, {"T": 3, "K": 4, "E": 5, "D": 127, "I": 40, "H": 35},
    {"T": 16, "K": 3, "E": 7, "D": 64, "I": 32, "H": 48}, {"T": 64, "K": 2, "E": 6, "D": 20, "I": 24, "H": 16},
]  # fmt: skip


def call(sizes, dtype, ids="outside", block=1, seed=0, layouts=None):
    """A call with ids of which some are no expert's ("outside"), or all one's ("one"), or as they are given."""
    rng = np.random.default_rng([seed, *sizes.values()])
    values = operands(experts, sizes, dtype, "normal", seed)
    for name, deep in (("gate_up", sizes["D"]), ("down", sizes["I"])):
        values[name] = (values[name].astype(np.float32) / np.sqrt(deep)).astype(values[name].dtype)
    shape, count = (sizes["T"], sizes["K"]), sizes["E"]
    drawn = {"outside": rng.integers(-1, count + 1, shape), "one": np.full(shape, count - 1)}
    values["ids"] = (drawn[ids] if isinstance(ids, str) else ids).astype(np.int32)
    return Call(experts, values, {"block": block}, layouts or {})


def expected(x, ids, weights, gate_up, down):
    """float64 but for the two roundings, pair by pair as arrays."""
    known = (ids >= 0) & (ids < len(down))
    chosen = np.where(known, ids, 0)
    rows, wide = x.astype(np.float64), gate_up.astype(np.float64)[chosen]
    both = np.einsum("td,tknd->tkn", rows, wide)
    gate, up = np.split(both, 2, axis=-1)
    activated = round_to(gate / (1 + np.exp(-gate)) * up, x.dtype)
    each = round_to(np.einsum("tki,tkih->tkh", activated, down.astype(np.float64)[chosen]), x.dtype)
    return np.einsum("tk,tkh->th", np.where(known, weights.astype(np.float64), 0), each)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s.values())))
def test_against_float64(implementation, block, sizes):
    for dtype in DTYPES if implementation in ("interpret", "numpy") else ("float32",):
        made = call(sizes, dtype, block=block)
        got = run(implementation, made)
        assert got.problems == ()
        rounding = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
        out = got.outputs["out"].astype(np.float64)
        np.testing.assert_allclose(out, expected(**made.operands), rtol=rounding, atol=rounding)
        np.testing.assert_allclose(experts.reference(**made.operands)["out"], expected(**made.operands), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("implementation", implementations(("interpret", "pallas", "triton")))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("ids", ["one", "outside"])
def test_narrow_floats(implementation, dtype, ids):
    for block in (1, 16):
        made = call(SIZES[3], dtype, ids, block)
        got = run(implementation, made).outputs["out"].astype(np.float64)
        rounding = {"float16": 4e-3, "bfloat16": 3e-2}[dtype]
        np.testing.assert_allclose(got, expected(**made.operands), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("block", [1, 16])
def test_a_pair_of_no_expert_adds_nothing(implementation, block):
    """Whatever its weight is, and whatever lies in the row: infinity times no expert is nothing."""
    ids = np.array([[0, -1], [3, 4], [2**31 - 1, 1], [-(2**31), 4]])
    made = call({"T": 4, "K": 2, "E": 4, "D": 20, "I": 8, "H": 16}, "float32", ids, block)
    made.operands["x"][3] = np.inf
    made.operands["weights"][~((ids >= 0) & (ids < 4))] = np.nan
    got = run(implementation, made).outputs["out"]
    clean = {**made.operands, "weights": np.nan_to_num(made.operands["weights"])}
    clean["x"] = np.where(np.isinf(clean["x"]), 0, clean["x"])
    np.testing.assert_allclose(got, expected(**clean), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[3], 0)


@pytest.mark.parametrize("layout", ["padded", "strided", "transposed padded", "shifted"])
@pytest.mark.parametrize("block", [1, 16])
def test_any_strides(layout, block):
    names = ("x", "ids", "weights", "gate_up", "down", "out")
    dense = run("interpret", call(SIZES[3], "float16", block=block)).outputs["out"]
    got = run("interpret", call(SIZES[3], "float16", block=block, layouts=dict.fromkeys(names, layout)))
    assert got.problems == ()
    np.testing.assert_array_equal(got.outputs["out"], dense)


def one_by_one(program, op):
    """A product whose terms are added one after the other: how numpy adds up hangs on the operands' layout."""
    m, n = op.out.axes
    left, right = (program.values[v].astype(np.float32) for v in (op.left, op.right))
    left, right = left if op.left.axes == (m, op.axis) else left.T, right if op.right.axes == (op.axis, n) else right.T
    total = np.zeros((len(left), right.shape[1]), np.float32) if op.acc is None else program.values[op.acc]
    for k in range(left.shape[1]):
        total = total + left[:, k : k + 1] * right[k : k + 1]
    return total


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_row_has_the_same_bits_in_any_company(dtype, monkeypatch):
    """In blocks of 1, 4, 16 and 64, and alone; in any order of programs."""
    monkeypatch.setitem(EXECUTE, Dot, one_by_one)
    sizes = SIZES[4] | {"T": 9, "D": 70, "I": 48}
    values = call(sizes, dtype).operands

    def out(block, rows=slice(None), backwards=False):
        given = {n: x[rows] if n in ("x", "ids", "weights") else x for n, x in values.items()}
        shapes, dtypes = {n: x.shape for n, x in given.items()}, {n: x.dtype.name for n, x in given.items()}
        binding = experts.bind(shapes, dtypes, {"block": block})
        graph, bound = experts.trace(binding), dict(binding.sizes)
        made = np.full((len(given["x"]), sizes["H"]), np.nan, given["x"].dtype)
        execute(plan(graph, None, contiguous(graph, bound)), {**given, "out": made}, bound, backwards)
        return made

    few = out(1)
    for block in (4, 16, 64):
        np.testing.assert_array_equal(out(block), few)
    np.testing.assert_array_equal(out(16, backwards=True), few)
    for block in (1, 16):
        np.testing.assert_array_equal(np.concatenate([out(block, slice(t, t + 1)) for t in range(9)]), few)


def graph_of(block, dtype="bfloat16", **sizes):
    """The graph at the 80B's sizes."""
    binding = example(experts, {"T": 4, **QWEN, **sizes}, dtype, {"block": block})
    return experts.trace(binding), dict(binding.sizes)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [{}, {"I": 256}, {"I": 64}, {"D": 64, "I": 8, "H": 64}, {"D": 8, "I": 3, "H": 5}], ids=str)
def test_all_blocks_add_up_in_one_order(dtype, sizes):
    """What the bits of a row hang on is the same for one pair a block and for many, at the model's widths and tiny ones."""
    orders = set()
    for block in (1, 16, 64, 128):
        graph, every = graph_of(block, dtype, **sizes)
        orders.add(order(plan(graph, None, contiguous(graph, every)).programs[-3:]))
    assert len(orders) == 1


def test_what_few_tokens_launch():
    """Products of a block's rows on the matrix unit, staged where they are rounded; a program for each block and 32 columns."""
    assert str(heuristic(graph_of(1)[0])) == (
        "tile:B:1 tile:J:16 loop:D:128 tile:I:32 warps:4 stages:4 stage:activated then "
        "tile:B:1 tile:J:16 loop:I:64 tile:H:64 warps:4 stages:4 stage:placed then "
        "tile:T:1 loop:K:1 tile:H:256 warps:1 stages:1 dependent"
    )


def test_what_many_tokens_launch():
    """First the tables, in three launches; then the same, with larger blocks of matrices."""
    few, many = (str(heuristic(graph_of(block)[0])).split(" then ") for block in (1, 16))
    assert many[-3:] == [
        "tile:B:1 tile:J:16 loop:D:128 tile:I:64 warps:8 stages:3 stage:activated",
        "tile:B:1 tile:J:16 loop:I:64 tile:H:256 warps:8 stages:3 stage:placed",
        few[-1],
    ]
    assert [text.rpartition("stage:")[2] for text in many[:3]] == ["counted,rank", "counts,before", "order,chosen,filled"]


@pytest.mark.parametrize("block", [1, 16])
def test_a_block_of_no_expert_has_nothing_to_add_up(block):
    """Its programs' loops along the contracted axes have no turns."""
    graph, sizes = graph_of(block)
    for program in plan(graph, None, contiguous(graph, sizes)).programs[-3:-1]:
        (loop,) = (op for op, _ in walk(program.body) if isinstance(op, Loop))
        assert loop.end is not None
        assert loop.over in (("D",), ("I",))
