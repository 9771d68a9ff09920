"""float8_e4m3fn: a dtype that operands are stored in, and nothing is computed or rounded in."""

import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from moekit.errors import DeclarationError, DtypeError
from moekit.lang import In, InOut, bitcast, cast, contract, f32, fusion, gather, round_to, sum, top_k, where
from moekit.testing import Call, implementations, run

FLOAT8 = "float8_e4m3fn"
CODES = np.arange(256, dtype=np.uint8)
ABOUT = """
from moekit.testing import Call, run
from tests.lang.test_stored import CODES, check, widened
check(run("triton-interpreter", Call(widened, {"w": CODES.view("float8_e4m3fn").reshape(2, 128)})).outputs["out"])
print("right")
"""


def meaning(code: int) -> float:
    """A code by its definition (Micikevicius et al. 2022): sign, 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    exponent, mantissa = code >> 3 & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return np.nan
    size = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -size if code >> 7 else size


def check(got: np.ndarray) -> None:
    """Every code in its place, signs of zero and all."""
    want = np.array([meaning(c) for c in CODES.tolist()])
    np.testing.assert_array_equal(got.ravel(), want)
    known = ~np.isnan(want)
    np.testing.assert_array_equal(np.signbit(got.ravel()[known]), np.signbit(want[known]))


@fusion(None, w=In("T N", dtype=FLOAT8))
def widened(w):
    return {"out": f32(w), "codes": bitcast(w, "int8")}


@fusion(None, x=In("T D"), w=In("E N D", dtype=FLOAT8), ids=In("T", dtype="int32"))
def chosen(x, w, ids):
    return {"out": f32(contract(x, gather(w, ids, over="E"), over="D")), "total": sum(w, over="E D")}


@pytest.mark.parametrize("implementation", implementations())
def test_all_codes(implementation):
    """In rows of any layout; what stands past a row's end is no number."""
    for shape, layout in (((2, 128), "dense"), ((16, 16), "strided"), ((8, 32), "transposed padded"), ((256, 1), "shifted")):
        got = run(implementation, Call(widened, {"w": CODES.view(FLOAT8).reshape(shape)}, layouts={"w": layout}))
        assert got.problems == ()
        check(got.outputs["out"])
        np.testing.assert_array_equal(got.outputs["codes"].view(np.uint8).ravel(), CODES)


def test_all_codes_in_tritons_interpreter():
    """Whose own conversion makes 480 of NaN (triton 3.6.0)."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ABOUT], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "right\n", done.stderr[-2000:]


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_are_of_the_other_dtype(implementation, dtype):
    """Ids out of range give zero; a product of float8 numbers is exact, so only float32 sums round."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 70)).astype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    w = rng.standard_normal((3, 20, 70)).astype(FLOAT8)
    ids = np.array([0, 2, -1, 3, 1], np.int32)
    got = run(implementation, Call(chosen, {"x": x, "w": w, "ids": ids}))
    assert got.problems == ()
    known = ((ids >= 0) & (ids < 3))[:, None]
    want = np.where(known, np.einsum("td,tnd->tn", x.astype(np.float64), w.astype(np.float64)[np.clip(ids, 0, 2)]), 0)
    np.testing.assert_allclose(got.outputs["out"], want, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(got.outputs["total"], w.astype(np.float64).sum((0, 2)), rtol=1e-5, atol=2e-5)


def traced(body, **operands):
    """A declaration of one operand w [T, N] in float8, traced."""
    declared = fusion(None, w=In("T N", dtype=FLOAT8), **operands)(body)
    shapes, dtypes = {"w": (3, 4)}, {"w": FLOAT8}
    return declared.trace(declared.bind(shapes, dtypes, {}))


def test_nothing_is_rounded_to_it():
    with pytest.raises(DtypeError, match="nothing is cast to float8_e4m3fn, which is a dtype of operands; cast to one of"):
        traced(lambda w: {"out": cast(f32(w), FLOAT8)})


def test_an_update_in_it_is_not_told_to_cast():
    """Which would be refused in turn."""
    declared = fusion(None, w=InOut("T N", dtype=FLOAT8))(lambda w: {"w": where(w > 1.0, w, w)})
    with pytest.raises(DeclarationError, match="w is float8_e4m3fn but is given float32; nothing is cast to that, so give it"):
        declared.trace(declared.bind({"w": (3, 4)}, {"w": FLOAT8}, {}))


def test_no_reference_rounds_to_it():
    with pytest.raises(DtypeError, match="round_to: nothing is rounded to 'float8_e4m3fn'; it takes float64, float32"):
        round_to(np.ones(3), FLOAT8)


def test_what_is_computed_is_float32():
    made = {"a": lambda w: w + w, "b": lambda w: where(w > 1.0, w, w), "c": lambda w: contract(w, w, over="N"),
            "d": lambda w: top_k(w, 2, "N", "K")[0]}  # fmt: skip
    graph = traced(lambda w: {name: f(w) for name, f in made.items()})
    dtypes = {w.tensor: graph.nodes[w.value].dtype for w in graph.writes}
    assert dtypes == {"a": "float32", "b": "float32", "c": "float32", "d": "bfloat16"}
    (product,) = (n for n in graph.nodes if n.op == "contract")
    assert {graph.nodes[a].dtype for a in product.args} == {"bfloat16"}  # which the matrix unit multiplies without loss


def test_it_is_no_dtype_that_an_operand_has_unless_said():
    plain = fusion(None, x=In("T N"))(lambda x: {"out": f32(x)})
    with pytest.raises(DtypeError, match="x is float8_e4m3fn; it must be float32, float16 or bfloat16"):
        plain.bind({"x": (2, 3)}, {"x": FLOAT8}, {})
    with pytest.raises(DeclarationError, match=r"'float8' is no dtype of the language; it has float32, .*float8_e4m3fn"):
        In("T", dtype="float8")
