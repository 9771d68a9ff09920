"""Tracing: what a declaration becomes, and what it is told when it says something that cannot be."""

import numpy as np
import pytest

from moekit import lang as ml
from moekit.errors import DeclarationError, DtypeError, MoekitError, ShapeError
from moekit.fusions import FUSIONS
from moekit.lang import In, InOut, Out, fusion
from moekit.lang.graph import made_of
from moekit.testing import Call, check, operands


def trace(declare, specs=None, sizes=None, dtypes="float32", dynamic="T", **params):
    """The graph of a declaration of `x: [T, H]` (or of `specs`) for sizes T = 3, H = 8."""
    f = fusion(None, dynamic=dynamic, **(specs or {"x": In("T H")}))(declare)
    return Call(f, operands(f, sizes or {"T": 3, "H": 8}, dtypes), params).graph


def test_equal_expressions_are_one_node():
    """What is written twice is computed once; operand order makes a difference."""

    def twice(x):
        return ml.exp(x) * 2 + ml.exp(x) * 2 + (ml.f32(x) - 1.0) + (1.0 - ml.f32(x))

    graph = trace(twice)
    ops = [graph.nodes[i].op for i in graph.live()]
    assert ops.count("exp") == 1
    assert ops.count("mul") == 1
    assert ops.count("sub") == 2


def test_dead_code_is_not_live():
    """Only what an output needs counts."""

    def wasteful(x):
        ml.exp(x)
        return ml.f32(x) + 1.0

    graph = trace(wasteful)
    assert "exp" not in [graph.nodes[i].op for i in graph.live()]
    assert [n.op for n in graph.live_nodes()] == ["read", "const", "add"]
    assert [n.op for n in graph.live_nodes("add", "exp", "read")] == ["read", "add"]


def test_what_a_value_is_made_of():
    """All beneath it, and nothing beside it."""

    def declared(x):
        left = ml.exp(x)
        return {"one": left + left, "other": ml.sin(x)}

    graph = trace(declared)
    one, other = ({graph.nodes[i].op for i in made_of(graph.nodes, w.value)} for w in graph.writes)
    assert (one, other) == ({"read", "exp", "add"}, {"read", "sin"})
    assert made_of(graph.nodes) == set()
    assert len(made_of(graph.nodes, *(w.value for w in graph.writes))) == len(graph.live()) == 4


def test_sizes_and_shapes_of_a_call():
    """A call says the sizes of dynamic axes, and no others; a dimension that came with size 1 has that."""
    f = fusion(None, x=In("T H"), gate=In("T H?"))(lambda x, gate: ml.f32(x) * ml.f32(gate))
    graph = f.trace(f.bind({"x": (3, 8), "gate": (3, 1)}, dict.fromkeys(("x", "gate"), "float32"), {}))
    assert graph.sizes({"T": 5, "H": 7}) == {"T": 5, "H": 8}
    assert [graph.shape(n, graph.sizes({"T": 5})) for n in ("x", "gate", "out")] == [(5, 8), (5, 1), (5, 8)]


def test_names_and_lines_come_from_the_declaration():
    """Local variables name nodes, and each node knows its line of source."""

    def named(x):
        doubled = ml.f32(x) * 2.0
        return doubled + 1.0

    graph = trace(named)
    node = next(i for i, n in graph.names.items() if n == "doubled")
    assert graph.nodes[node].op == "mul"
    assert graph.lines[node] == "doubled = ml.f32(x) * 2.0"
    assert "%3:doubled" in str(graph) or ":doubled = mul" in str(graph)


def test_narrow_floats_are_widened_before_arithmetic():
    """bfloat16 plus bfloat16 is float32; integers and comparisons keep theirs."""
    graph = trace(lambda x: {"a": x + x, "b": ml.iota("H") + 1, "c": x > 0, "d": -x, "e": ml.iota("H") / 2}, dtypes="bfloat16")
    kinds = {name: t.dtype for name, t in graph.tensors.items()}
    assert kinds == {"x": "bfloat16", "a": "float32", "b": "int32", "c": "bool", "d": "float32", "e": "float32"}


def test_trace_does_not_depend_on_a_dynamic_size():
    """The same graph for every T, traced once."""
    f = FUSIONS["silu_and_mul"]
    graphs = [Call(f, operands(f, {"T": t, "I": 8})).graph for t in (0, 1, 3, 300)]
    assert all(g is graphs[0] for g in graphs)
    assert graphs[0].axes["T"] is None


def test_digest_ignores_names_and_sees_everything_else():
    """Two spellings of one computation share a digest; another constant changes it."""

    def first(x):
        y = ml.f32(x) * 2.0
        return y

    def second(x):
        return ml.f32(x) * 2.0

    def third(x):
        return ml.f32(x) * 3.0

    for f in (first, second, third):
        f.__name__ = "same"
    assert trace(first).digest() == trace(second).digest() != trace(third).digest()


@pytest.mark.parametrize(
    ("text", "sizes", "shape"),
    [("2*I", {"I": 5}, 10), ("2*I+E+1", {"I": 5, "E": 3}, 14), ("3", {}, 3), ("3*E", {"E": 4}, 12), ("I+2", {"I": 1}, 3)],
)
def test_composite_dimensions_bind(text, sizes, shape):
    """Linear forms over axis names, solved for the one that is unknown."""
    f = _declared({"x": f"T {text}", **{f"s{a}": a for a in list(sizes)[1:]}})
    shapes = {"x": (2, shape), **{f"s{a}": (sizes[a],) for a in list(sizes)[1:]}}
    bound = dict(f.bind(shapes, dict.fromkeys(shapes, "float32"), {}).sizes)
    assert bound[text] == shape
    assert all(bound[a] == n for a, n in sizes.items())


@pytest.mark.parametrize(
    ("specs", "shapes", "error", "message"),
    [
        ({"x": "T H"}, {"x": (3,)}, ShapeError, "x has shape [3]; it must have 2 dimensions [T, H]"),
        ({"x": "T H", "w": "H"}, {"x": (3, 8), "w": (9,)}, ShapeError, "w has shape [9]; it must be [H = 8] to fit"),
        ({"x": "T 2*I"}, {"x": (3, 7)}, ShapeError, "x has 7 elements in dimension 1; it must be 2*I"),
        ({"x": "T I+4"}, {"x": (3, 3)}, ShapeError, "x has 3 elements in dimension 1; it must be I+4"),
        ({"x": "T 3"}, {"x": (3, 4)}, ShapeError, "x has shape [3, 4]; it must be [T = 3, 3] to fit the other operands"),
        ({"x": "T H", "g": "T H?"}, {"x": (3, 8), "g": (3, 2)}, ShapeError, "g has shape [3, 2]; it must be [T = 3, H = 8]"),
        ({"x": "T H"}, {"x": (3, 8)}, DtypeError, "x is int32; it must be float32, float16 or bfloat16"),
    ],
)  # fmt: skip
def test_binding_errors(specs, shapes, error, message):
    """Each names the fusion, the tensor, what came and what is needed, in one sentence."""
    f = _declared(specs)
    dtype = "int32" if error is DtypeError else "float32"
    with pytest.raises(error) as caught:
        f.bind(shapes, dict.fromkeys(shapes, dtype), {})
    assert str(caught.value).startswith(f"some: {message}")
    assert "\n" not in str(caught.value)


def _declared(specs):
    """A fusion with these operands that returns the first."""
    names = list(specs)
    scope: dict = {"ml": ml}
    exec(f"def some({', '.join(names)}):\n    return ml.f32({names[0]})", scope)
    return fusion(None, **{n: In(s) for n, s in specs.items()})(scope["some"])


def test_optional_dimension():
    """`H?` may be 1; where H itself is 1 it is an axis like any other."""
    f = FUSIONS["shared_expert_combine"]
    for width, gate, ones in ((8, 1, {1}), (8, 8, set()), (1, 1, set())):
        shapes = {"hidden": (3, width), "shared": (3, width), "gate": (3, gate)}
        bound = f.bind(shapes, dict.fromkeys(shapes, "float32"), {})
        assert dict(bound.ones)["gate"] == ones


def test_params():
    """Defaults fill in; an unknown, missing or odd one is named."""
    f = FUSIONS["topk_softmax"]
    assert f.bind_params({"k": 3}) == {"k": 3, "renormalize": True, "nan_to_zero": False}
    with pytest.raises(TypeError, match="topk_softmax: parameter 'k' is missing"):
        f.bind_params({})
    with pytest.raises(TypeError, match="there is no parameter 'q'; it has k, renormalize, nan_to_zero"):
        f.bind_params({"k": 3, "q": 1})
    with pytest.raises(TypeError, match="k must be a Python number, bool or str, got ndarray"):
        f.bind_params({"k": np.ones(1)})


SLICED = {"x": In("T H")}
ERRORS = [
    (lambda x: 1 if x > 0 else 2, DeclarationError, "a traced value has no truth value; use where(...)"),
    (lambda x: list(x), DeclarationError, "a traced value cannot be iterated over; use halves or slice"),
    (lambda x: x + np.ones(3), DeclarationError, "ndarray .* is no traced value and no number; declare it as an operand"),
    (lambda x: x + "a", DeclarationError, "str 'a' is no traced value"),
    (lambda x: x // 2, DtypeError, "floordiv needs integers, got float32 and .*; cast first"),
    (lambda x: x & x, DtypeError, "and needs integers or bools, got float32 and float32; use bitcast"),
    (lambda x: ~x, DtypeError, "~ needs integers or bools, got float32"),
    (lambda x: -(x > 0), DtypeError, "neg needs numbers, got bool; use ~ or where"),
    (lambda x: ml.where(x, 1, 2), DtypeError, "where needs a bool condition"),
    (lambda x: ml.bitcast(x, "int16"), DtypeError, "bitcast from float32 to int16 changes the width"),
    (lambda x: ml.sum(x, over="Q"), DeclarationError, "there is no axis 'Q'; it has T, H"),
    (lambda x: ml.sum(x, over=""), DeclarationError, "over= names no axis"),
    (lambda x: ml.cumsum(x, over="T J"), DeclarationError, "cumsum over 'J', but the value varies over"),
    (lambda x: ml.place(x, T=ml.f32(ml.iota("T"))), DtypeError, "place needs integer indices, got float32 for T"),
    (lambda x: ml.place(x, H=ml.iota("T")), DeclarationError, "place along 'H', which the value varies over"),
    (lambda x: ml.slice(ml.place(x, H=ml.iota("H")), "H", 0, 2, "J"), DeclarationError, "cannot be sliced or gathered along"),
    (lambda x: ml.cumsum(ml.iota("T"), over="H"), DeclarationError, r"cumsum over 'H', but the value varies over \('T',\)"),
    (lambda x: ml.contract(x, ml.iota("H"), over="H"), DtypeError, "contract needs floats, got float32 and int32; cast first"),
    (lambda x: ml.contract(x, ml.f32(ml.iota("T")), over="H"), DeclarationError, "contract over 'H' needs it in both operands"),
    (lambda x: ml.top_k(x, 9, "H", "K")[0], ShapeError, "k = 9, but H has 8 elements; pass 1 <= k <= 8"),
    (lambda x: ml.top_k(x, 2, "T", "K")[0], DeclarationError, "top_k over the dynamic axis 'T'"),
    (lambda x: ml.top_k(ml.iota("H"), 2, "H", "K")[0], DtypeError, "top_k ranks floats, got int32; cast first"),
    (lambda x: ml.top_k(x, 2, "H", "T")[0], DeclarationError, "axis 'T' .* choose another name"),
    (lambda x: ml.slice(x, "H", 4, 5, "K"), ShapeError, "slice 4:9:1 leaves axis H of size 8"),
    (lambda x: ml.slice(x, "H", -1, 2, "K"), ShapeError, "slice -1:1:1 leaves axis H of size 8"),
    (lambda x: ml.halves(x, "H"), DeclarationError, r"halves into 'H' needs an axis '2\*H', the value has"),
    (lambda x: ml.gather(x, ml.f32(ml.iota("T")), over="H"), DtypeError, "gather needs integer ids, got float32"),
    (lambda x: ml.slice(ml.cumsum(x, over="H"), "H", 0, 4, "K"), DeclarationError, "a cumsum cannot be sliced or gathered"),
    (lambda x: ml.slice(ml.top_k(x, 4, "H", "K")[1], "K", 0, 2, "J"), DeclarationError, "a top_k cannot be sliced or gathered"),
    (lambda x: ml.concat(x, x, over="T", into="S"), DeclarationError, "concat over the dynamic axis 'T': where the next value"),
    (lambda x: ml.concat(x, x, over="H H H", into="K"), DeclarationError, "concat of 2 values over 'H H H'; name one axis for"),
    (lambda x: ml.concat(x, 1.0, over="1", into="H"), DeclarationError, "concat into 'H', which the value along '1' varies"),
    (lambda x: ml.concat(1.0, 2.0, over="1", into="T"), DeclarationError, "axis 'T' .* choose another name"),
    (lambda x: ml.concat(ml.cumsum(x, over="H"), 0.0, over="H 1", into="K"), DeclarationError, "a cumsum cannot be sliced"),
    (lambda x: ml.size("T"), DeclarationError, r"axis 'T' is dynamic; use extent\('T'\)"),
    (lambda x: {"x": ml.f32(x)}, DeclarationError, "it returns 'x', which is declared In; declare it InOut"),
]  # fmt: skip


@pytest.mark.parametrize(("declare", "error", "message"), ERRORS, ids=[str(i) for i in range(len(ERRORS))])
def test_declaration_errors(declare, error, message):
    """One sentence that names the declaration; never a stack trace's worth."""

    def some(x):
        return declare(x)

    with pytest.raises(error, match=message) as caught:
        trace(some, SLICED)
    assert isinstance(caught.value, MoekitError)
    assert str(caught.value).startswith("some: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: ml.softmax_sum(x, 1.0, over="H"),
        lambda x: ml.softmax_sum(2, x, over="H"),
        lambda x: ml.contract(x, 1.0, over="H"),
        lambda x: ml.place(x),
        lambda x: None,
        lambda x: (x, x),
    ],
)
def test_numbers_and_nothing_are_refused_in_a_sentence(body):
    declared = fusion(None, x=In("T H"))(body)
    with pytest.raises(MoekitError, match=r"^unnamed: "):
        declared.trace(declared.bind({"x": (2, 3)}, {"x": "float32"}, {}))


def test_an_index_may_be_a_number():
    """Of a gather it is one element; what is placed at one is there."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3)

    @fusion(
        lambda x: {"one": x[:, 2], "there": np.where(np.arange(3) == 1, x.sum(1)[:, None], 0)}, x=In("T H", dtype="float32")
    )
    def numbered(x):
        there = ml.place(ml.sum(x, "H"), H=1)
        return {"one": ml.gather(x, 2, over="H"), "there": ml.where(ml.iota("H") == 1, there, 0.0)}

    for implementation in ("numpy", "interpret"):
        check(implementation, Call(numbered, {"x": x}))


def test_updates_must_be_read_where_they_are_written():
    """An InOut read at elements that another program writes would race; one program holds all of a static axis."""

    def shifted(x):
        return {"x": ml.f32(x) + ml.gather(x, 7 - ml.iota("H"), over="H")}

    assert trace(shifted, {"x": InOut("T H")}).elsewhere == {"x": {1}}

    def mixed(x):
        return {"x": ml.f32(x) + ml.gather(x, ml.iota("T") // 2, over="T")}

    with pytest.raises(DeclarationError, match=r"x is updated along T and read at other .* as T is dynamic; read"):
        trace(mixed, {"x": InOut("T H")})

    def placed(x):
        return {"x": ml.put(ml.gather(x, ml.iota("T"), over="H") + 1.0, ml.iota("T") // 2, over="H")}

    with pytest.raises(DeclarationError, match=r"x is updated along H and read at .* as it is put there at ids; read it where"):
        trace(placed, {"x": InOut("T H")})

    def single(x, y):
        return {"x": x + ml.f32(y)}

    with pytest.raises(DeclarationError, match=r"x is updated along H and read at .* as it came with size 1; read it where"):
        trace(single, {"x": InOut("T H?"), "y": In("T H")}, {"T": 4, "H": 8, "H?": 1})

    def forgotten(x):
        return {"out": ml.f32(x)}

    with pytest.raises(DeclarationError, match="x is InOut but is not returned"):
        trace(forgotten, {"x": InOut("T H")})

    def uncast(x):
        return {"x": x + 1}

    with pytest.raises(DeclarationError, match="x is bfloat16 but is given float32; cast it"):
        trace(uncast, {"x": InOut("T H")}, dtypes="bfloat16")


def test_outputs_may_not_vary_over_axes_they_do_not_have():
    """An output declared [T] is not given [T, H]."""

    def wide(x):
        return {"out": ml.f32(x)}

    with pytest.raises(DeclarationError, match=r"out has axes .*, but its value also varies over \['H'\]"):
        trace(wide, {"x": In("T H"), "out": Out("T")})


def test_specs_that_cannot_be_read():
    """Dimensions are names, INT*NAME and sums of them; dtypes are those of the language."""
    with pytest.raises(DeclarationError, match="cannot read dimension 'T-1'"):
        In("T-1").dims  # noqa: B018
    with pytest.raises(DeclarationError, match="'float8' is no dtype of the language"):
        In("T", dtype="float8")
    with pytest.raises(DeclarationError, match="its parameters begin"):
        fusion(None, y=In("T"))(lambda x: x)
    with pytest.raises(DeclarationError, match="can only be called inside a declaration"):
        ml.iota("T")


def test_dynamic_axes_are_plain():
    """`2*T` cannot be dynamic."""
    with pytest.raises(DeclarationError, match=r"'2\*T' is made of the dynamic axis; only a plain axis can be dynamic"):
        trace(lambda x: ml.f32(x), {"x": In("2*T H")})


def _reference(x, table, ids):
    x, table = x.astype(np.float64), table.astype(np.float64)
    inside = (ids >= 0) & (ids < len(table))
    rows = np.where(inside[:, None], np.exp(table[np.where(inside, ids, 0)]) * inside[:, None], 0)
    halves = x[:, :4] * x[:, 4:]
    return {"rows": np.where(inside[:, None], rows, 1.0), "halves": halves, "third": x[:, 1::3] + np.arange(1, 8, 3)}


@fusion(_reference, x=In("T 2*I"), table=In("E H"), ids=In("T", dtype="int32"))
def substituted(x, table, ids):
    """Slices and gathers of computed values."""
    left, right = ml.halves(ml.f32(x), "I")
    numbered = ml.f32(x) + ml.f32(ml.iota("2*I"))
    rows = ml.gather(ml.exp(table), ids, over="E")
    return {"rows": rows, "halves": left * right, "third": ml.slice(numbered, "2*I", 1, 3, "J", step=3)}


def test_slices_and_gathers_are_substitutions():
    """They reach through element-wise operations down to the reads: ids out of range read zero, whose exp is one."""
    values = operands(substituted, {"T": 5, "I": 4, "E": 6, "H": 3})
    values["ids"] = np.array([0, 5, -1, 6, 3], np.int32)
    check("interpret", Call(substituted, values))
    graph = Call(substituted, values).graph
    assert {graph.nodes[i].op for i in graph.live()} <= {"read", "exp", "mul", "add", "iota", "cast"}
