"""float8_e4m3fn: a dtype of operands and of what is rounded to it; nothing but products is computed in it."""

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


@fusion(None, x=In("T N"))
def narrowed(x):
    return {"out": cast(x, FLOAT8), "again": f32(cast(x, FLOAT8)) + 1.0}


def nearest(x: np.ndarray) -> np.ndarray:
    """The nearest numbers that codes mean, of two the one with an even code; what exceeds all of them is the largest."""
    values = np.array([meaning(code) for code in range(127)])
    size, found = np.abs(x.astype(np.float64)).ravel(), []
    for one in np.minimum(size, 448.0):
        away = np.abs(values - one)
        found.append(min(np.flatnonzero(away == away.min()), key=lambda code: code % 2) if one == one else 0x7F)
    sizes = np.array([meaning(int(code)) for code in found]).reshape(x.shape)
    return np.copysign(sizes, x.astype(np.float64))


def numbers() -> np.ndarray:
    """All codes' numbers, what lies between them, near that, and past the last, of both signs; infinities and NaN."""
    values = np.array([meaning(code) for code in range(127)], np.float32)
    ties = (values[1:] + values[:-1]) / 2
    ends = np.float32([448.1, 463.9, 464, 464.1, 480, 1e6, np.inf, 2.0**-10, 2.0**-11, 1e-30])
    found = np.concatenate([values, ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(0)), ends])
    return np.concatenate([found, -found, np.float32([np.nan, np.nan])]).reshape(4, -1)


@pytest.mark.parametrize("implementation", implementations())
def test_a_cast_rounds_to_nearest_even_and_saturates(implementation):
    """In every implementation alike, where the result is an output and where it is computed with."""
    x = numbers()
    got = run(implementation, Call(narrowed, {"x": x}))
    assert got.problems == ()
    want = nearest(x)
    np.testing.assert_array_equal(got.outputs["out"].astype(np.float64), want)
    np.testing.assert_array_equal(got.outputs["again"].astype(np.float64), want + 1.0)
    np.testing.assert_array_equal(round_to(x, FLOAT8), want)


@fusion(None, x=In("T D", dtype=FLOAT8), w=In("N D", dtype=FLOAT8))
def both(x, w):
    return {"out": contract(x, w, over="D")}


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("depth", [7, 32, 70])
def test_products_of_two(implementation, depth):
    """Exact products of exact numbers: the sum alone rounds; what is past the end of an axis is nothing."""
    rng = np.random.default_rng(depth)
    x, w = (rng.choice(np.delete(CODES, [0x7F, 0xFF]), (n, depth)).view(FLOAT8) for n in (19, 20))
    got = run(implementation, Call(both, {"x": x, "w": w}, layouts={"x": "padded", "w": "strided"}))
    assert got.problems == ()
    exact = [a.astype(np.float64) for a in (x, w)]
    size = np.abs(exact[0]) @ np.abs(exact[1]).T
    away = np.abs(got.outputs["out"] - exact[0] @ exact[1].T) / size
    assert away.max() < (1e-6 if implementation != "triton" else (depth // 32 + 1) * 34 * 2.0**-13)


def test_an_update_in_it_is_told_to_cast():
    declared = fusion(None, w=InOut("T N", dtype=FLOAT8))(lambda w: {"w": where(w > 1.0, w, w)})
    with pytest.raises(DeclarationError, match="w is float8_e4m3fn but is given float32; cast it"):
        declared.trace(declared.bind({"w": (3, 4)}, {"w": FLOAT8}, {}))


def test_what_is_computed_is_float32():
    made = {"a": lambda w: w + w, "b": lambda w: where(w > 1.0, w, w), "c": lambda w: contract(w, w, over="N"),
            "d": lambda w: top_k(w, 2, "N", "K")[0]}  # fmt: skip
    graph = traced(lambda w: {name: f(w) for name, f in made.items()})
    dtypes = {w.tensor: graph.nodes[w.value].dtype for w in graph.writes}
    assert dtypes == {"a": "float32", "b": "float32", "c": "float32", "d": "bfloat16"}
    (product,) = (n for n in graph.nodes if n.op == "contract")
    assert {graph.nodes[a].dtype for a in product.args} == {FLOAT8}  # the matrix unit has instructions for it


def test_it_is_no_dtype_that_an_operand_has_unless_said():
    plain = fusion(None, x=In("T N"))(lambda x: {"out": f32(x)})
    with pytest.raises(DtypeError, match="x is float8_e4m3fn; it must be float32, float16 or bfloat16"):
        plain.bind({"x": (2, 3)}, {"x": FLOAT8}, {})
    with pytest.raises(DeclarationError, match=r"'float8' is no dtype of the language; it has float32, .*float8_e4m3fn"):
        In("T", dtype="float8")
