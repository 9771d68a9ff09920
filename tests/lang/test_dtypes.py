"""dtypes: promotion, single rounding, and integers that sort as floats do."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit import lang as ml
from moekit.lang import In, Out, fusion
from moekit.lang.dtypes import ALL, FLOATS, INTS, STORED, int_of_width, itemsize, numpy_dtype, promote, widened
from moekit.lang.ops import from_ordered_bits, ordered_bits
from moekit.testing import Call, run

NARROW = ("float16", "bfloat16")


def wide(x: np.ndarray) -> np.ndarray:
    """The same numbers in float64; signalling NaN makes numpy warn."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def every(dtype: str) -> np.ndarray:
    """All 65,536 numbers of a 16-bit float."""
    return np.arange(2**16, dtype=np.uint16).view(numpy_dtype(dtype))


@pytest.mark.parametrize("dtype", NARROW)
def test_round_to_narrow_is_exact_on_its_own_numbers(dtype):
    """What is representable is not changed, infinities included."""
    x = wide(every(dtype))
    np.testing.assert_array_equal(ml.round_to(x, dtype), x)


@pytest.mark.parametrize("dtype", NARROW)
def test_round_to_narrow_breaks_every_tie_to_even(dtype):
    """Between all pairs of neighbours: the tie goes to the even mantissa, a hair beside it to the nearer one."""
    bits = np.arange(2**15, dtype=np.uint16)
    numbers = wide(bits.view(numpy_dtype(dtype)))
    finite = np.isfinite(numbers)
    low, high, even = numbers[finite][:-1], numbers[finite][1:], bits[finite][:-1] % 2 == 0
    tie = (low + high) / 2
    for sign in (1, -1):
        np.testing.assert_array_equal(ml.round_to(sign * tie, dtype), sign * np.where(even, low, high))
        np.testing.assert_array_equal(ml.round_to(sign * np.nextafter(tie, np.inf), dtype), sign * high)
        np.testing.assert_array_equal(ml.round_to(sign * np.nextafter(tie, 0), dtype), sign * low)


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_to_overflows_like_the_format(dtype):
    """Half an ulp beyond the largest number is infinity; less is the largest number."""
    info = ml_dtypes.finfo(numpy_dtype(dtype))
    largest = float(info.max)
    half = 2.0 ** (np.floor(np.log2(largest)) - info.nmant - 1)
    x = np.array([largest, largest + half * 0.999, largest + half, -largest - half, np.nan])
    np.testing.assert_array_equal(ml.round_to(x, dtype), [largest, largest, np.inf, -np.inf, np.nan])


@given(st.floats(allow_nan=False, width=64))
def test_round_to_agrees_with_numpy_where_numpy_rounds_once(x):
    """float32 and float16 are numpy's own casts; bfloat16 is within half of its ulp."""
    with np.errstate(over="ignore"):
        for dtype in ("float32", "float16"):
            assert ml.round_to(np.float64(x), dtype) == np.float64(x).astype(dtype)
    rounded = float(ml.round_to(np.float64(x), "bfloat16"))
    if np.isfinite(rounded):
        quantum = max(2.0 ** (np.frexp(x)[1] - 8), 2.0**-133)
        assert abs(rounded - x) <= quantum / 2


def test_round_to_rounds_once_where_two_steps_round_twice():
    """1 + 2⁻⁸ + 2⁻³⁰: through float32 it becomes a tie and goes down."""
    x = np.float64(1 + 2.0**-8 + 2.0**-30)
    assert ml.round_to(x, "bfloat16") == 1 + 2.0**-7
    assert x.astype(np.float32).astype(ml_dtypes.bfloat16) == 1
    np.testing.assert_array_equal(ml.round_to(x, "float64"), x)


@pytest.mark.parametrize("a", ALL)
@pytest.mark.parametrize("b", ALL)
def test_promotion(a, b):
    """A float makes float32, integers the wider one; the order does not matter."""
    joined = promote(a, b)
    if {a, b} & {*FLOATS, *STORED}:
        assert joined == "float32"
    elif "bool" in (a, b):
        assert joined == (a if b == "bool" else b)
    else:
        assert joined in (a, b)
        assert itemsize(joined) == max(itemsize(a), itemsize(b))
    assert promote(b, a) == joined


def test_widths():
    """Narrow floats compute in float32, integers as they are; each dtype has an integer of its width."""
    assert [widened(d) for d in (*FLOATS, *STORED)] == ["float32"] * 4
    assert [widened(d) for d in INTS] == list(INTS)
    assert all(itemsize(int_of_width(d)) == itemsize(d) for d in ALL)


@fusion(None, x=In("T H", dtype=NARROW), back=Out("T H"), order=Out("T H"))
def order_of(x):
    """The integers that `top_k` ranks by, and the float they stand for."""
    keys, _ = ordered_bits(x)
    return {"order": keys, "back": from_ordered_bits(keys, x.dtype)}


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("implementation", ["interpret", "numpy", "eager"])
def test_ordered_bits_sort_as_floats_do(implementation, dtype):
    """Over all numbers of the format: order kept, -0 with +0, NaN below all, one integer free for padding."""
    x = every(dtype)
    outputs = run(implementation, Call(order_of, {"x": x.reshape(256, 256)})).outputs
    keys, values = outputs["order"].ravel().astype(np.int64), wide(x)
    numbers = ~np.isnan(values)
    order = np.argsort(values[numbers], kind="stable")
    steps = np.sign(np.diff(keys[numbers][order]))
    ascending = values[numbers][order]
    np.testing.assert_array_equal(steps, ascending[1:] > ascending[:-1])
    assert (keys % 2**16 == 0).all()
    assert set(keys[~numbers]) == {-(2**31) + 2**16}
    assert keys[numbers].min() > -(2**31) + 2**16
    back = outputs["back"].ravel().astype(np.float64)
    np.testing.assert_array_equal(back, values)
    assert not np.signbit(back[values == 0]).any()


@given(st.lists(st.floats(width=32, allow_subnormal=True), min_size=2, max_size=8))
def test_ordered_bits_of_float32(row):
    """The same for float32, over whatever Hypothesis finds."""
    x = np.array([row], np.float32)

    @fusion(None, x=In("T H", dtype="float32"))
    def keys_of(x):
        return ordered_bits(x)[0]

    keys = run("numpy", Call(keys_of, {"x": x})).outputs["out"][0].astype(np.int64)
    for a, i in zip(x[0], keys, strict=True):
        for b, j in zip(x[0], keys, strict=True):
            if np.isnan(a) or np.isnan(b):
                assert (i < j) == (np.isnan(a) and not np.isnan(b))
            else:
                assert (i < j) == (a < b)
