"""Corners of the language in every implementation: outputs without axes, axes of one element, bool masks, narrow integers."""

import numpy as np
import pytest

from moekit import lang as ml
from moekit.lang import In, Out, fusion
from moekit.testing import Call, check, implementations, operands


def _f64(*arrays):
    return [a.astype(np.float64) for a in arrays]


def _scalars(x, y):
    x, y = _f64(x, y)
    return {"dot": (x * y).sum(), "largest": np.abs(x).max()}


@fusion(_scalars, x=In("T H"), y=In("T H"))
def scalars(x, y):
    """Nothing but numbers comes out."""
    x, y = ml.f32(x), ml.f32(y)
    return {"dot": ml.sum(x * y, over="T H"), "largest": ml.max(abs(x), over="T H")}


def _single(x):
    (x,) = _f64(x)
    return {"mean": x.mean(-1, keepdims=True), "over": x.mean(0), "first": x[:, :1]}


@fusion(_single, x=In("T H"))
def single(x):
    """An axis of one element, its index cast and compared; means over the dynamic axis."""
    one = ml.slice(ml.iota("H"), "H", 0, 1, "O")
    least = ml.where(~(one == 0) | (-one > 0), -1.0, 1.0 + ml.f32(one))
    x32 = ml.f32(x)
    return {"mean": ml.mean(x32, over="H") * least, "over": ml.mean(x32, over="T"), "first": ml.slice(x32, "H", 0, 1, "O")}


def _masked(x, mask):
    any_, total = mask.any(-1), np.where(mask, x, 0).astype(np.int64)
    return {"any": any_, "total": total.sum(-1).astype(np.int32), "largest": x.max(-1).astype(np.int32)}


@fusion(_masked, x=In("T H", dtype="int8"), mask=In("T H", dtype="bool"))
def masked(x, mask):
    """Reductions of bools and of narrow integers, which are added up in int32."""
    zero = ml.cast(0, "int8")
    total = ml.sum(ml.where(mask, x, zero), over="H")
    return {"any": ml.max(mask, over="H") > 0, "total": total, "largest": ml.max(x, over="H")}


@fusion(lambda a, b: {"out": np.einsum("tbk,bkn->btn", *_f64(a, b))}, a=In("T B K"), b=In("B K N"), out=Out("B T N"))
def batched(a, b):
    """A batched product whose second operand is not transposed."""
    return ml.contract(a, b, over="K")


@fusion(
    lambda table, ids: {"out": table[ids].astype(np.float64)},
    table=In("E H"),
    ids=In("T", dtype="int8"),
    out=Out("T H"),
)
def picked(table, ids):
    """A gather by narrow ids."""
    return ml.gather(table, ids, over="E")


def _nothing(x):
    (x,) = _f64(x)
    none = x[:, 1:1]
    return {"added": x - none.sum(-1, keepdims=True) + x * (none * none).sum(-1, keepdims=True)}


@fusion(_nothing, x=In("T H"))
def nothing(x):
    """A sum and a product over no column at all, of what does not vary along it, too."""
    x32, none = ml.f32(x), ml.slice(ml.f32(x), "H", 1, 0, "O")
    least = ml.sum(ml.where(x32 > 0, none, x32), over="O")
    return {"added": x32 - least + x32 * ml.contract(none, none, over="O")}


SIZES = {
    nothing: {"T": 7, "H": 13},
    scalars: {"T": 7, "H": 35},
    single: {"T": 5, "H": 13},
    masked: {"T": 5, "H": 300},
    batched: {"T": 17, "B": 3, "K": 21, "N": 18},
    picked: {"T": 5, "E": 11, "H": 9},
}


FLOATS = dict.fromkeys(SIZES, ("float32", "bfloat16")) | {masked: ("float32",)}  # masked has no operand of floats
CASES = [pytest.param(f, dtype, id=f"{f.name}-{dtype}") for f, dtypes in FLOATS.items() for dtype in dtypes]


@pytest.mark.parametrize(("fusion", "dtype"), CASES)
@pytest.mark.parametrize("implementation", implementations())
def test_every_implementation(implementation, fusion, dtype):
    """Within the bound of the reference."""
    values = operands(fusion, SIZES[fusion], dtype, seed=3)
    if fusion is masked:
        rng = np.random.default_rng(3)
        values = {"x": rng.integers(90, 128, (5, 300)).astype(np.int8), "mask": rng.random((5, 300)) < 0.5}
    if fusion is picked:
        values["ids"] = np.array([3, 0, 10, 5, 1], np.int8)
    check(implementation, Call(fusion, values))


@pytest.mark.parametrize("implementation", ["numpy", "eager", "xla", "pallas"])
def test_largest_of_nothing(implementation):
    """A maximum over zero tokens is refused in a sentence."""
    from moekit.errors import ShapeError

    @fusion(lambda x: {"out": x.max(0)}, x=In("T H"))
    def highest(x):
        return ml.max(x, over="T")

    with pytest.raises(ShapeError, match="max over T needs at least one element"):
        check(implementation, Call(highest, {"x": np.zeros((0, 3), np.float32)}))
