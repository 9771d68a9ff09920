"""topk_softmax in every implementation: ties, NaN, infinities, any E and k."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS, numpy_dtype
from moekit.testing import Call, FusionSuite, check, implementations, operands, run

FUSION = FUSIONS["topk_softmax"]
NAN, INF = np.nan, np.inf
ROWS = {
    "all equal": [1.5] * 9,
    "ties among the best": [0, 3, 1, 3, 3, 2, 3, 0, 2],
    "both zeros": [-0.0, 0.0, -0.0, 0.0, -1, -0.0, 0.0, -2, -3],
    "all -inf": [-INF] * 9,
    "one finite": [-INF, -INF, -INF, 0.25, -INF, -INF, -INF, -INF, -INF],
    "one +inf": [0, 1, 2, INF, 3, 4, 5, 6, 7],
    "two +inf": [0, INF, 2, INF, 3, 4, 5, 6, 7],
    "some NaN": [0, NAN, 2, 1, NAN, 4, -INF, 6, INF],
    "all NaN": [NAN] * 9,
    "all but one NaN": [NAN, NAN, NAN, NAN, 1, NAN, NAN, NAN, NAN],
    "NaN and -inf": [NAN, -INF, NAN, -INF, NAN, NAN, -INF, NAN, NAN],
    "large": [6e4, -6e4, 6e4, 5e4, 1, 0, -1, 3e4, 2e4],
    "all negative": [-1, -2, -3, -4, -5, -6, -7, -8, -9],
}


class TestTopkSoftmax(FusionSuite):
    """The suite: E and k that are no powers of two, and all experts chosen."""

    fusion = FUSION
    sizes = ({"T": 5, "E": 60}, {"T": 0, "E": 60}, {"T": 1, "E": 10}, {"T": 33, "E": 64}, {"T": 2, "E": 513})
    params = ({"k": 10}, {"k": 7, "renormalize": False}, {"k": 1, "nan_to_zero": True})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("params", [{}, {"renormalize": False}, {"nan_to_zero": True}], ids=str)
@pytest.mark.parametrize("implementation", implementations())
def test_odd_rows(implementation, params, dtype):
    """Ties, NaN and infinities: ids valid, unique and in order; NaN weights exactly where the softmax is NaN."""
    logits = np.array(list(ROWS.values())).astype(numpy_dtype(dtype))
    call = Call(FUSION, {"logits": logits}, {"k": 5, **params})
    check(implementation, call)
    outputs = run(implementation, call).outputs
    for row, name in zip(outputs["ids"], ROWS, strict=True):
        assert len(set(row.tolist())) == 5, name
        assert row.min() >= 0, name
        assert row.max() < 9, name
    if "nan_to_zero" in params:
        assert np.isfinite(outputs["weights"]).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("implementation", implementations())
def test_every_expert_chosen(implementation, dtype):
    """k = E, from +inf to -inf and on through NaN: the whole row in the order of a stable sort, no key found twice."""
    logits = np.array(list(ROWS.values())).astype(numpy_dtype(dtype))
    ids = run(implementation, Call(FUSION, {"logits": logits}, {"k": 9})).outputs["ids"]
    np.testing.assert_array_equal(ids, FUSION.reference(logits, k=9, renormalize=True, nan_to_zero=False)["ids"])


@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 2), (32, 32), (33, 32), (60, 4), (512, 10), (1000, 31), (1024, 32)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", implementations())
def test_any_number_of_experts(implementation, dtype, experts, k):
    """Few or many experts and choices."""
    values = operands(FUSION, {"T": 2, "E": experts}, dtype, "integers" if experts % 2 else "normal", seed=k)
    check(implementation, Call(FUSION, values, {"k": k}))


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_out_of_range(k):
    """k is an integer from 1 to E; the message says so."""
    with pytest.raises(ShapeError, match=r"k = .*E has 9 elements; pass 1 <= k <= 9"):
        Call(FUSION, {"logits": np.ones((2, 9), np.float32)}, {"k": k}).graph  # noqa: B018


@pytest.mark.parametrize("k", [2.0, True, "3", None])
def test_k_of_another_type(k):
    """Nothing that only looks like an integer is one."""
    with pytest.raises(TypeError, match="topk_softmax: k must be int"):
        Call(FUSION, {"logits": np.ones((2, 9), np.float32)}, {"k": k}).graph  # noqa: B018


@given(st.permutations([-2.0, -1.0, 0.0, 1.0, NAN, -INF, INF]), st.integers(1, 7))
def test_order_of_anything(row, k):
    """Distinct values in any order come out best first, numbers before NaN."""
    outcome = run("interpret", Call(FUSION, {"logits": np.array([row], np.float32)}, {"k": k}))
    order = [INF, 2.0, 1.0, 0.0, -1.0, -2.0, -INF]
    wanted = [row.index(v) for v in order if v in row] + [i for i, v in enumerate(row) if v != v]
    assert outcome.outputs["ids"].tolist() == [wanted[:k]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_padding_columns_are_never_chosen(dtype):
    """Logits may be a view of wider rows: what stands beyond the view has no effect."""
    for pad, k in itertools.product((1e4, NAN), (3, 6)):
        base = np.full((4, 16), pad).astype(numpy_dtype(dtype))
        base[:, :6] = operands(FUSION, {"T": 4, "E": 6}, dtype)["logits"]
        check("interpret", Call(FUSION, {"logits": base[:, :6]}, {"k": k}))
