"""An axis in blocks: one index over two axes, in every implementation; masks where the last block reaches past the end."""

import numpy as np
import programs as good
import pytest

from moekit import lang as ml
from moekit.compile import tile as t
from moekit.compile.rules import heuristic, row_classes
from moekit.compile.rules.order import order
from moekit.errors import DeclarationError, ShapeError
from moekit.fusions.scaled_product import scaled_product as FUSION
from moekit.lang import In, Out, fusion
from moekit.testing import Call, FusionSuite, check, implementations, operands, run


class TestScaledProduct(FusionSuite):
    """The suite, with blocks that fill neither axis."""

    fusion = FUSION
    params = ({"rows": 16, "columns": 16},)
    sizes = ({"T": 3, "D": 71, "P": 37},)
    recipes = ("special",)


@pytest.mark.parametrize("implementation", implementations())
def test_blocks_that_fill_an_axis(implementation):
    """Behind no mask, or as a view; and no tokens."""
    for tokens in (5, 0):
        sizes, params = {"T": tokens, "D": 96, "P": 48}, {"rows": 16, "columns": 16}
        check(implementation, Call(FUSION, operands(FUSION, sizes, "float32", "normal", 1, params), params))


def graph(d=2048, p=512, dtype="bfloat16"):
    """At a model's sizes."""
    shapes = {"x": (4, d), "weight": (p, d), "scale": (-(-p // 128), -(-d // 128))}
    return good.graph_of(FUSION, shapes, {"x": dtype, "weight": dtype, "scale": "float32"})


def weights_load(made):
    """The load of the weight of a graph's first program."""
    program = good.planned(made).programs[0]
    return program, next(op for op in good.operations(program, t.Load) if op.at.tensor == "weight")


def test_blocks_are_one_index():
    """Read where they lie, `128·b + i`, behind no mask where blocks fill the axis; checked where they do not."""
    assert "read(tensor=weight, index=(P, 128*Db+I))" in str(graph())
    program, load = weights_load(graph())
    block, element = load.at.index[1].values
    assert load.at.index[1] == t.Index(((block, 128), (element, 1)))
    assert (block.axes, element.axes, load.at.mask) == ((), ("I",), ())
    assert not [a for a in program.axes if a.mode == "gather" and a.name == "D"]
    program, load = weights_load(graph(2047))
    assert [m for m in good.operations(program, t.InBounds) if m.axis == "D" and m.out in load.at.mask]


def test_blocks_lie_beside_their_elements():
    """In a program's blocks, wherever an operand has their axis: lanes get what comes last. Outputs stay as they were."""
    axes = list(graph().axes)
    assert axes.index("I") == axes.index("Db") + 1 > axes.index("P")

    @fusion(lambda x, scale: {"out": None}, x=In("T D"), scale=In("B T"), axes={"B": lambda D: -(-D // 4)})
    def apart(x, scale):
        parts = ml.blocks(x, "D", 4, into="B I")
        return {"out": parts * scale, "inner": ml.blocks(parts, "I", 2, into="S J")}

    traced = Call(apart, {"x": np.zeros((2, 8), np.float32), "scale": np.zeros((2, 2), np.float32)}).graph
    assert list(traced.axes) == ["T", "D", "B", "I", "S", "J"]
    assert all(n.axes == traced.ordered(n.axes) for n in traced.nodes)
    assert [d.text for d in traced.tensors["out"].dims] == ["B", "T", "I"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_rules_split_the_blocks(dtype):
    """On the matrix unit, a block a turn; one order of sums whatever the number of rows."""
    made = graph(dtype=dtype)
    assert "split:Db:8" in str(heuristic(made, 1))
    orders = {order(good.planned(made, heuristic(made, rows)).programs) for rows in row_classes(made)}
    assert len(orders) == 1
    for rows in row_classes(made):
        for launch in heuristic(made, rows).launches[:1]:
            (section,) = launch.sections
            assert section.block("Db") == 1
            assert section.parts.get("Db") == 8 or "split:Db:8" in str(launch)
    assert any(isinstance(op, t.Dot) for op in good.operations(good.planned(made).programs[0], t.Dot))


def test_a_deep_split_has_two_programs_an_sm():
    """Each with 512 of the contracted axis or more, and shared memory that two have room in: 256 programs of 64 columns."""
    first, second, *_ = (heuristic(graph(4096, 2048), rows).launches[0] for rows in row_classes(graph(4096, 2048)))
    assert "split:Db:8" in str(first)
    assert (first.sections[0].block("P"), first.stages, second.stages) == (64, 4, 4)
    assert "split:Db:4" in str(heuristic(graph(2048, 2048), 1))
    assert "split" not in str(heuristic(graph(2048, 12288), 1))


def test_rows_have_the_same_bits_in_every_class():
    """Few rows and many, with blocks that do not fill the axis."""
    values = operands(FUSION, {"T": 200, "D": 300, "P": 40}, "bfloat16", "normal", 3)
    made = Call(FUSION, values).graph
    many = run("interpret", Call(FUSION, values, schedule=heuristic(made, 200))).outputs["out"]
    few = run("interpret", Call(FUSION, values | {"x": values["x"][:7]})).outputs["out"]
    np.testing.assert_array_equal(many[:7], few)


def chosen_reference(x, ids, weight, scale):
    """Matrix by matrix."""
    whole = weight.astype(np.float64) * np.repeat(scale, 128, axis=2)[:, :, : weight.shape[2]]
    return {"out": np.stack([rows.astype(np.float64) @ whole[i].T for rows, i in zip(x, ids, strict=True)])}


@fusion(chosen_reference, x=In("T J D"), ids=In("T", dtype="int32"), weight=In("E N D"), scale=In("E N B", dtype="float32"))
def chosen(x, ids, weight, scale):
    """Blocks of rows times a matrix each, which has a scale for every 128 columns of a row."""
    parts, kept = ml.blocks(x, "D", 128, into="B I"), ml.gather(ml.blocks(weight, "D", 128, into="B I"), ids, over="E")
    scales = ml.gather(scale, ids, over="E")
    return {"out": ml.cast(ml.sum(ml.contract(parts, kept, over="I") * scales, over="B"), x.dtype)}


@pytest.mark.parametrize("deep", [512, 500])
def test_matrices_that_data_choose(deep):
    """Row block by row block on the matrix unit, a block of the matrix a turn."""
    values = operands(chosen, {"T": 3, "J": 16, "D": deep, "E": 4, "N": 40, "B": 4}, "bfloat16", "normal", 2)
    values["ids"] = np.array([3, 0, 3], np.int32)
    made = Call(chosen, values)
    (launch,) = heuristic(made.graph).launches
    assert (launch.sections[0].mode("B"), launch.sections[0].block("B"), launch.sections[0].block("I")) == ("loop", 1, 128)
    assert any(isinstance(op, t.Dot) for op, _ in t.walk(good.planned(made.graph).programs[0].body))
    check("interpret", made)


def nested_reference(x, ids):
    """By reshaping a padded copy."""
    padded = np.zeros((len(x), 30), np.float64)
    padded[:, :27] = x[:, 3:]
    parts = padded.reshape(-1, 5, 6)
    return {
        "sums": parts.sum(-1),
        "halves": parts[:, :4].reshape(-1, 4, 2, 3).sum(-1),
        "every": parts[:, 1:4:2].sum(-1),
        "turned": (parts * np.arange(30).reshape(5, 6)).sum(-1).T,
        "picked": parts[:, ids].sum(-1),
    }


@fusion(nested_reference, x=In("T H"), ids=In("K", dtype=("int32", "int64")), turned=Out("B T"), halves=Out("T F S"))
def nested(x, ids):
    """Blocks of a slice, blocks of blocks, every second block, elements and their numbers, and blocks by number."""
    late = ml.slice(ml.f32(x), "H", 3, 27, "L")
    parts = ml.blocks(late, "L", 6, into="B I")
    inner = ml.slice(ml.blocks(parts, "I", 3, into="S J"), "B", 0, 4, "F")
    return {
        "sums": ml.sum(parts, over="I"),
        "halves": ml.sum(inner, over="J"),
        "every": ml.sum(ml.slice(parts, "B", 1, 2, "E", step=2), over="I"),
        "turned": ml.sum(parts * ml.f32(ml.blocks(ml.iota("L"), "L", 6, into="B I")), over="I"),
        "picked": ml.sum(ml.gather(parts, ids, over="B"), over="I"),
    }


@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("implementation", implementations())
def test_blocks_of_slices_and_of_blocks(implementation, layout):
    """Steps and starts multiply out to one index; strides and Views are the tensor's."""
    x = np.random.default_rng(5).standard_normal((3, 30)).astype(np.float32)
    check(implementation, Call(nested, {"x": x, "ids": np.array([4, 0, 2], np.int32)}, layouts={"x": layout}))
    text = str(Call(nested, {"x": x, "ids": np.array([4, 0, 2], np.int32)}).graph)
    assert "index=(T, 3+6*F+3*S+J)" in text
    assert "index=(T, 9+12*E+I)" in text


@fusion(None, x=In("T 2*N"), ids=In("K", dtype=("int32", "int64")))
def parts_by_number(x, ids):
    """Elements of parts of an axis, beside which the tensor has others."""
    first, second = ml.halves(x, "N")
    parts = ml.blocks(x, "2*N", 4, into="B I")
    odd = ml.slice(x, "2*N", 1, 4, into="S", step=2)
    return {
        "first": ml.gather(first, ids, over="N"),
        "second": ml.gather(second, ids, over="N"),
        "block": ml.gather(parts, ids, over="B"),
        "element": ml.gather(parts, ids, over="I"),
        "odd": ml.gather(odd, ids, over="S"),
    }


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ids_past_the_ends_of_a_part_read_zero(implementation, dtype):
    """And no element of the tensor that the part has not, nor one to which the product with a block's size wraps."""
    least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
    ids = np.array([0, 3, -1, 4, 5, 2, -2, least, most, most // 2 + 1, least // 4 * 3], dtype)
    x = np.random.default_rng(4).standard_normal((3, 10)).astype(np.float32)
    padded = np.zeros((3, 12), np.float32)
    padded[:, :10] = x
    whole = {"first": x[:, :5], "second": x[:, 5:], "block": padded.reshape(3, 3, 4),
             "element": padded.reshape(3, 3, 4).transpose(0, 2, 1), "odd": x[:, 1:9:2]}  # fmt: skip
    got = run(implementation, Call(parts_by_number, {"x": x, "ids": ids})).outputs
    axes = Call(parts_by_number, {"x": x, "ids": ids}).graph.tensors
    for name, part in whole.items():
        wanted = np.zeros((3, len(ids), *part.shape[2:]), np.float32)
        for n, i in enumerate(ids.tolist()):
            wanted[:, n] = part[:, i] if 0 <= i < part.shape[1] else 0
        own = [d.text for d in axes[name].dims]
        np.testing.assert_array_equal(np.moveaxis(got[name], own.index("K"), 1), wanted, err_msg=name)


def test_blocks_are_taken_apart_without_a_copy():
    """Array evaluation views blocks that fill an axis, and gathers no element."""
    jax = pytest.importorskip("jax")
    from moekit.jax import op

    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((4, 64), (32, 64), (2, 4))]
    text = str(jax.make_jaxpr(lambda *a: op(FUSION)(*a, rows=16, columns=16, implementation="xla"))(*shapes))
    assert text.count("gather") == 1  # of the scales


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: ml.blocks(x, "H", 4, into="B"), DeclarationError, "blocks into 'B'; name two axes"),
        (lambda x: ml.blocks(x, "T", 4, into="B I"), DeclarationError, "blocks of the dynamic axis 'T'"),
        (lambda x: ml.blocks(x, "H", 2.0, into="B I"), ShapeError, "blocks have 1 element or more, a whole number, got 2.0"),
        (lambda x: ml.blocks(x, "H", 0, into="B I"), ShapeError, "blocks have 1 element or more, a whole number, got 0"),
        (lambda x: ml.blocks(x, "H", 2**40, into="B I"), ShapeError, "axis I would have 1099511627776 elements; kernels count"),
        (lambda x: ml.blocks(x, "H", 4, into="B T"), DeclarationError, "blocks into 'T', which the value varies over already"),
        (lambda x: ml.blocks(1.0, "H", 4, into="B I"), DeclarationError, "blocks takes a traced value, got 1.0"),
        (lambda x: ml.blocks(x, "K", 4, into="B I"), DeclarationError, "there is no axis 'K'"),
    ],
)
def test_what_blocks_cannot_be(call, error, said):
    """One sentence, before anything is compiled."""
    made = fusion(None, x=In("T H"))(lambda x: call(x))
    with pytest.raises(error, match=said):
        good.graph_of(made, {"x": (3, 8)})


def test_scales_that_do_not_fit():
    """As many as there are blocks: what `blocks` says, and what the rule of an axis does."""
    shapes = {"x": (2, 16, 300), "ids": (2,), "weight": (4, 40, 300), "scale": (4, 40, 2)}
    with pytest.raises(ShapeError, match="axis B has 2 elements; D has 3 blocks of 128; pass that"):
        good.graph_of(chosen, shapes, {"ids": "int32"})
    shapes = {"x": (4, 300), "weight": (40, 300), "scale": (2, 3)}
    with pytest.raises(ShapeError, match="axis Pb has 2 elements in the operands; it must have 1 as its rule says"):
        good.graph_of(FUSION, shapes)


def test_many_rows_without_spills():
    """The product, the sum and a part's sum are held at once; what lies side by side is loaded 16 bytes at a time."""
    pytest.importorskip("triton")
    from moekit.compile.plan import plan
    from tests.backends.samples import SAMPLES, strided
    from tests.backends.sm_90 import build

    _, binding, made = SAMPLES["scaled_product"].bound()
    rows = max(row_classes(made))
    assert "parts:" in str(heuristic(made, rows))
    (program,) = plan(made, heuristic(made, rows), strided(made, dict(binding.sizes))).programs
    built = build(program)
    assert (built.spills, built.stack, built.serial, set(built.narrow)) == (0, 0, False, {"scale"})
