"""What Python finds equal and a declaration does not; what is refused because it would be wrong in silence."""

import numpy as np
import pytest

from moekit import lang as ml
from moekit.errors import DeclarationError, DtypeError, ShapeError
from moekit.lang import In, fusion
from moekit.testing import Call
from moekit.testing import run as run_call

X = np.array([[-2.0, 1.0, 3.0]], np.float32)


def run(declare, x=X, tensor="T H", **params):
    """The output of a declaration of one tensor, by numpy."""
    f = declare if hasattr(declare, "bind") else fusion(None, x=In(tensor, dtype=x.dtype.name))(declare)
    return run_call("numpy", Call(f, {"x": x}, params)).outputs


def test_parameters_that_python_finds_equal():
    """2 and 2.0 give different dtypes, 0.0 and -0.0 different signs, whichever came first."""

    @fusion(None, x=In("T H"))
    def scaled(x, s):
        return ml.cast(x, "int32") * s

    @fusion(None, x=In("T H"))
    def signed(x, s):
        return abs(ml.f32(x)) * s

    assert run(scaled, s=2)["out"].dtype == np.int32
    assert run(scaled, s=2.0)["out"].dtype == np.float32
    assert not np.signbit(run(signed, s=0.0)["out"]).any()
    assert np.signbit(run(signed, s=-0.0)["out"]).all()


def test_bindings_of_equal_parameters_differ():
    """Plans are cached by binding."""

    @fusion(None, x=In("T H"))
    def scaled(x, s):
        return ml.f32(x) * s

    one, other = (Call(scaled, {"x": X}, {"s": s}).binding for s in (1, 1.0))
    assert one != other


def test_negative_zero_is_a_constant_of_its_own():
    """-0.0 is not merged with 0.0."""
    out = run(lambda x: {"a": ml.where(x > 0, 0.0, 1.0), "b": ml.where(x > 0, -0.0, 1.0)})
    assert np.signbit(out["b"][0, 1:]).all()
    assert not np.signbit(out["a"]).any()


@pytest.mark.parametrize(("start", "size", "step"), [(2, 3, -1), (1, 2, 0), (0, -2, 1)])
def test_slices_go_forward(start, size, step):
    """A step below 1 or a negative size is refused."""
    with pytest.raises(ShapeError, match="step >= 1 and size >= 0"):
        run(lambda x: ml.slice(x, "H", start, size, "R", step=step))


def test_dynamic_axis_is_not_sliced():
    """Nothing could say that the slice stays inside."""
    with pytest.raises(DeclarationError, match="slice of the dynamic axis 'T'"):
        run(lambda x: ml.slice(x, "T", 0, 5, "R"))


def test_constants_fit_their_dtype():
    """A Python integer beyond the operand's dtype is refused."""
    with pytest.raises(DtypeError, match="300 is no int8"):
        run(lambda x: x + 300, np.ones((1, 3), np.int8))


def test_axes_are_named_apart():
    """Two dimensions of one name, and names that differ in case only."""
    with pytest.raises(DeclarationError, match="axis 'H' twice"):
        run(lambda x: x, np.ones((3, 3), np.float32), "H H")
    with pytest.raises(DeclarationError, match="'H' and 'h' differ only in case"):
        run(lambda x: x, np.ones((3, 3), np.float32), "H h")


def test_ids_of_put_are_integers():
    """Floats are no ids."""

    @fusion(None, x=In("T H"), ids=In("T"), table=ml.InOut("S H"))
    def put(x, ids, table):
        return {"table": ml.put(x, ids, over="S")}

    values = {"x": X, "ids": np.zeros(1, np.float32), "table": np.ones((2, 3), np.float32)}
    with pytest.raises(DtypeError, match="put needs integer ids"):
        run_call("numpy", Call(put, values))


def test_mean_over_more_elements_than_an_int32_counts():
    """The count of two axes is not formed in 32 bits."""

    def mean(x):
        return ml.mean(ml.sum(x, over="T H") * ml.f32(ml.iota("K") * 0 + 1), over="K T")

    f = fusion(None, x=In("T H"), k=In("K"))(lambda x, k: mean(x) + ml.f32(k) * 0)
    graph = Call(f, {"x": np.ones((2, 3), np.float32), "k": np.ones(4, np.float32)}).graph
    assert not [n for n in graph.nodes if n.op == "mul" and n.dtype == "int32" and n.axes == ()]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"k": "3"}, "k must be int, got str '3'"),
        ({"k": True}, "k must be int, got bool True"),
        ({"k": 3, "renormalize": 1}, "renormalize must be bool, got int 1"),
    ],
)
def test_parameters_have_the_declared_types(params, message):
    """A static parameter of another type is refused by name; an int where a float is declared is that float."""
    from moekit.fusions import FUSIONS

    with pytest.raises(TypeError, match=message):
        FUSIONS["topk_softmax"].bind_params(params)
    assert repr(FUSIONS["add_rms_norm"].bind_params({"eps": 0})["eps"]) == "0.0"


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda x: ml.slice(2.0, "H", 0, 1, "R"), DeclarationError, "slice takes a traced value, got 2.0"),
        (lambda x: ml.halves(2.0, "I"), DeclarationError, "halves takes a traced value, got 2.0"),
        (lambda x: ml.top_k(2, 1, over="H", into="K")[0], DeclarationError, "top_k takes a traced value, got 2"),
        (lambda x: ml.bitcast(2, "int32"), DeclarationError, "bitcast takes a traced value, got 2"),
        (lambda x: ml.cast(x, "float64"), DtypeError, "'float64' is no dtype of the language; it has float32, "),
        (lambda x: ml.bitcast(x, "uint32"), DtypeError, "'uint32' is no dtype of the language"),
        (lambda x: ml.slice(x, "H", 1.0, 2, "R"), ShapeError, "slice takes whole numbers as start, size and step, got 1.0"),
        (
            lambda x: ml.slice(x, "H", 0, 2, "R", step=True),
            ShapeError,
            "slice takes whole numbers as start, size and step, got ",
        ),
        (lambda x: {}, DeclarationError, "it returns nothing; return a value, or values by name"),
    ],
)
def test_what_a_word_does_not_take(call, error, said):
    """One sentence, not a traceback of Python's."""
    with pytest.raises(error, match=said):
        run(call)


def test_a_rule_that_fails():
    """It is named, with the sizes that it was given."""

    @fusion(None, x=In("T H"), axes={"B": lambda H, block: H // block})
    def counted(x, block):
        return ml.f32(x) + ml.iota("B")

    said = r"counted: the rule for axis B fails for H = 3, block = 0 \(ZeroDivisionError: .*\); pass sizes that "
    with pytest.raises(ShapeError, match=said):
        run(counted, block=0)
