"""The error bound: it holds for honest float32 arithmetic and refuses what is wrong by an ulp too much."""

from itertools import product

import ml_dtypes
import numpy as np
import pytest

from moekit import lang as ml
from moekit.fusions import FUSIONS
from moekit.lang import In, fusion, round_to
from moekit.lang.dtypes import FLOATS, numpy_dtype
from moekit.testing import Call, bounds, compare, operands, run
from moekit.testing.batch import run_case
from moekit.testing.campaign import Plan, record_worst, worst_seen
from moekit.testing.case import FuzzCase
from moekit.testing.constants import constant
from moekit.testing.executors import executor
from moekit.testing.oracle import Oracle, ulp
from moekit.testing.tasks import Coverage

SIZES = {
    "gate_gemm": {"T": 5, "P": 9, "D": 70},
    "silu_and_mul": {"T": 5, "I": 37},
    "topk_softmax": {"T": 5, "E": 60},
    "shared_expert_combine": {"T": 5, "H": 50},
    "add_rms_norm": {"T": 5, "H": 50},
    "gated_rms_norm": {"T": 3, "V": 2, "D": 33},
    "delta_rule_step": {"T": 3, "K": 1, "V": 2, "Dk": 8, "Dv": 9},
}


def result(name: str, dtype: str = "bfloat16", seed: int = 0):
    """A fusion, honest outputs, operands and parameters."""
    fusion, params = FUSIONS[name], {"k": 7} if name == "topk_softmax" else {}
    values = operands(fusion, SIZES[name], dtype, seed=seed)
    return fusion, dict(run("numpy", Call(fusion, values, params)).outputs), values, params


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SIZES)
def test_honest_results_pass_with_room(name, dtype):
    """numpy's float32 stays well below the estimate: the worst ratio is under a half."""
    fusion, outputs, values, params = result(name, dtype)
    found = compare(fusion, outputs, values, params)
    assert not found.problems
    assert found.worst < 0.5
    found.check()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", SIZES)
def test_errors_of_a_few_ulps_are_refused(name, dtype):
    """Some element off by three ulps of the output's dtype (more in float32, where sums are long) is found."""
    fusion, outputs, values, params = result(name, dtype)
    for out, array in outputs.items():
        if array.dtype.kind in "iu":
            continue
        wide = array.dtype == np.float32
        bad = array.astype(np.float64)
        place = np.unravel_index(np.argmax(np.abs(bad)), bad.shape)
        bad[place] += ulp(bad[place], array.dtype.name) * (400 if wide else 3)
        found = compare(fusion, outputs | {out: bad.astype(array.dtype)}, values, params)
        assert any(f"{out}[" in p and "out of bounds" in p for p in found.problems), out


def test_other_ids_are_refused():
    """Integers are equal or wrong."""
    fusion, outputs, values, params = result("topk_softmax")
    outputs["ids"] = outputs["ids"][:, ::-1].copy()
    assert "ids[0, 0] is" in compare(fusion, outputs, values, params).problems[0]


def test_shape_dtype_and_names_are_compared():
    """A result of another shape or dtype, or a missing one, is a problem and not an exception."""
    fusion, outputs, values, params = result("add_rms_norm")
    cut = compare(fusion, {n: x[:, :-1] for n, x in outputs.items()}, values, params)
    assert "out is bfloat16[5, 49]; it must be bfloat16[5, 50]" in cut.problems[0]
    other = compare(fusion, {n: x.astype(np.float32) for n, x in outputs.items()}, values, params)
    assert "out is float32[5, 50]; it must be bfloat16[5, 50]" in other.problems[0]
    assert "the outputs are ['out']" in compare(fusion, {"out": outputs["out"]}, values, params).problems[0]


def test_rounded_residual_is_exact():
    """One ulp beside float32's sum is refused where float32 leaves no doubt."""
    fusion, outputs, values, params = result("add_rms_norm")
    bits = outputs["residual"].view(np.int16).copy()
    bits[1, 1] += 1
    outputs["residual"] = bits.view(ml_dtypes.bfloat16)
    assert "residual[1, 1]" in compare(fusion, outputs, values, params).problems[0]


def test_missing_rounding_point_is_seen():
    """A norm of the unrounded sum differs from that of the rounded one, and the bound tells them apart."""
    fusion, outputs, values, params = result("add_rms_norm", seed=3)
    total = values["x"].astype(np.float64) + values["residual"].astype(np.float64)
    scale = 1 / np.sqrt(np.mean(total * total, -1, keepdims=True) + 1e-6)
    unrounded = total * scale * (1 + values["weight"].astype(np.float64))
    outputs["out"] = round_to(unrounded, "bfloat16").astype(ml_dtypes.bfloat16)
    assert any("out[" in p for p in compare(fusion, outputs, values, params).problems)


def test_bfloat16_accumulation_is_seen():
    """A product accumulated in bfloat16 is out of bounds."""
    fusion, outputs, values, params = result("gate_gemm")
    total = np.zeros(outputs["out"].shape, ml_dtypes.bfloat16)
    for d in range(70):
        step = values["x"][:, d : d + 1].astype(np.float32) * values["packed"][:, d].astype(np.float32)
        total = (total.astype(np.float32) + step).astype(ml_dtypes.bfloat16)
    assert compare(fusion, {"out": total}, values, params).problems


def test_tf32_is_seen():
    """A float32 product of operands cut to ten bits of mantissa is out of bounds."""
    fusion, _, values, params = result("gate_gemm", "float32")
    cut = {n: (x.view(np.int32) & ~0x1FFF).view(np.float32) for n, x in values.items()}
    assert compare(fusion, {"out": cut["x"] @ cut["packed"].T}, values, params).problems


@pytest.mark.parametrize(("got", "fine"), [(np.nan, False), (np.inf, False), (1.0, True)])
def test_nan_and_infinity_must_be_where_the_reference_has_them(got, fine):
    """A spurious NaN or infinity is a problem."""
    fusion = FUSIONS["silu_and_mul"]
    values = {"gate_up": np.array([[30.0, 1 / 30]], np.float32)}
    assert (not compare(fusion, {"out": np.array([[got]], np.float32)}, values).problems) == fine


def test_nan_of_the_reference_must_come_out():
    """A NaN that got lost is a problem as well."""
    fusion = FUSIONS["silu_and_mul"]
    values = {"gate_up": np.array([[np.nan, 1.0]], np.float32)}
    assert compare(fusion, {"out": np.array([[0.0]], np.float32)}, values).problems
    assert not compare(fusion, {"out": np.array([[np.nan]], np.float32)}, values).problems


def test_overflow_may_round_to_infinity():
    """At the edge of float16 both neighbours are right; far beyond it infinity alone is."""
    fusion = FUSIONS["shared_expert_combine"]
    dtype = np.float16
    values = {
        "hidden": np.array([[65504, 65504]], dtype),
        "shared": np.array([[32, 4096]], dtype),
        "gate": np.zeros((1, 2), dtype),
    }
    for edge in (65504, np.inf):
        assert not compare(fusion, {"hidden": np.array([[edge, np.inf]], dtype)}, values).problems
    assert compare(fusion, {"hidden": np.array([[65504, 65504]], dtype)}, values).problems


def test_subnormals_may_read_as_zero():
    """A result below the smallest normal number may be zero, and nothing else far off."""
    fusion = FUSIONS["silu_and_mul"]
    values = {"gate_up": np.array([[40.0, 1e-40]], np.float32)}
    assert not compare(fusion, {"out": np.zeros((1, 1), np.float32)}, values).problems
    assert compare(fusion, {"out": np.full((1, 1), 1e-36, np.float32)}, values).problems


ABOVE, LITTLE = 2.0**-14 * (1 + 2.0**-9), 2.0**-20
COMBINED = {  # of two differences d and e to a number that subnormals come close to, or that is little beside them
    "product": (ABOVE, lambda d, e: d * e, lambda d, e: d * e),
    "contraction": (ABOVE, lambda d, e: ml.contract(d, e, over="N"), lambda d, e: (d * e).sum(-1)),
    "quotient": (LITTLE, lambda d, e: 2.0 / e, lambda d, e: 2 / e),
    "behind a pole": (LITTLE, lambda d, e: ml.rsqrt(abs(e)) * 2.0, lambda d, e: 2 / np.sqrt(np.abs(e))),
}


@pytest.mark.parametrize("name", COMBINED)
def test_errors_as_large_as_their_values_are_not_only_added(name):
    """Where subnormals read as zero at a rounding point a difference of them may be all error: what is made of two is, too."""
    other, declared, computed = COMBINED[name]

    def reference(a, b):
        return {"out": computed(*(round_to(v.astype(np.float64), "float16") - other for v in (a, b)))}

    @fusion(reference, a=In("T N"), b=In("T N"))
    def combined(a, b):
        return declared(*(ml.f32(ml.cast(ml.f32(v), "float16")) - other for v in (a, b)))

    below = np.full((1, 3), 2.0**-14 * (1 - 2.0**-8), np.float32)
    kept, flushed = (computed(x - np.float32(other), x - np.float32(other)) for x in (below, 0 * below))
    for out in (kept, flushed):
        assert not compare(combined, {"out": out}, {"a": below, "b": below}).problems
    if other == ABOVE:
        assert compare(combined, {"out": 1.1 * flushed}, {"a": below, "b": below}).problems


@fusion(None, x=In("T H"))
def squares(x):
    """A sum of squares, and a value that overflows on the way."""
    big = ml.f32(x) * 1e30
    return {"sum": ml.sum(x * ml.f32(x), over="H"), "lost": big * big / 1e30 / 1e30}


def test_bound_is_of_the_right_size():
    """Noise grows with Σ|x| and not with the result; where float32 overflows nothing is known."""
    x = np.array([[1e3, -1e3, 1.0, 3.0]], np.float32)
    found = bounds(squares, {"x": x})
    noise = float(found["sum"].noise[0])
    assert 2.0**-24 * 2e6 <= noise <= 20 * 2.0**-24 * 2e6
    assert np.isinf(found["lost"].noise).all()
    assert found["sum"].value[0] == 2e6 + 10


@fusion(None, a=In("T A"), b=In("A B"), c=In("T B"))
def products_added(a, b, c):
    """Two contractions that are added up, and one with what is less a product."""
    first = ml.contract(a, b, over="A")
    return {"both": first + ml.contract(a, b * 0.5, over="A"), "less": first - ml.f32(c)}


def test_a_sum_of_products_may_go_on_where_another_ended():
    """Matrix units add onto what is there: -1e38 and then -3e38, before the 2e38 that would have made it less."""
    a = np.array([[-1.0, 1.0, -1.0]], np.float32)
    b = np.array([[1.0], [1.0], [1.0]], np.float32) * np.float32(0.8e38)
    few = bounds(products_added, {"a": a, "b": b, "c": np.array([[0.5e38]], np.float32)})
    assert np.isinf(few["both"].noise).all()
    assert np.isfinite(few["less"].noise).all()
    more = bounds(products_added, {"a": a, "b": b / 2, "c": np.array([[3e38]], np.float32)})
    assert np.isfinite(more["both"].noise).all()
    assert np.isinf(more["less"].noise).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_ulp(dtype):
    """The distance to the next number, subnormals included."""
    one = np.array(1.0, numpy_dtype(dtype))
    following = np.nextafter(one, np.array(2.0, one.dtype)).astype(np.float64)
    assert ulp(np.float64(1.0), dtype) == following - 1
    assert ulp(np.float64(0.0), dtype) == float(ml_dtypes.finfo(one.dtype).smallest_subnormal)


LONG_SUMS = {
    "gate_gemm": {"T": 1, "D": 500, "P": 2},
    "add_rms_norm": {"T": 2, "H": 500},
    "all_reduce_add_rms_norm": {"T": 2, "H": 500},
    "gated_rms_norm": {"T": 2, "V": 1, "D": 500},
    "gate_topk": {"T": 1, "D": 500, "I": 2, "E": 4, "G": 1},
    "row_product": {"T": 1, "D": 500, "P": 2},
    "add_norm_gate_projections": {"T": 1, "H": 500, "I": 2, "E": 4, "G": 1},
    "conv_projections": {"T": 1, "D": 500, "C": 2, "P": 1, "S": 3},
    "expert_down_shared": {"T": 1, "K": 2, "I": 300, "E": 3, "H": 2, "J": 500},
    "qkv_norm_rope": {"T": 2, "Q": 1, "K": 1, "L": 2, "R": 4, "N": 492, "Dv": 2},
    "causal_conv1d_step": {"T": 1, "C": 4, "S": 400},
    "scaled_product": {"T": 1, "D": 160, "P": 2},
    "scaled_conv_projections": {"T": 1, "D": 160, "C": 2, "P": 1, "Q": 2, "S": 3},
    "scaled_gate_projections": {"T": 1, "D": 160, "I": 2, "E": 4, "G": 1},
    "scaled_gate_topk": {"T": 1, "D": 160, "I": 2, "E": 4, "G": 1},
    "scaled_add_norm_gate_projections": {"T": 1, "H": 160, "I": 2, "E": 4, "G": 1},
    "scaled_down_combine": {"T": 1, "H": 2, "I": 160, "H?": 1},
    "scaled_expert_gate_up": {"T": 1, "K": 2, "E": 3, "I": 2, "D": 160},
    "scaled_expert_down": {"T": 1, "K": 2, "E": 3, "I": 160, "H": 2},
    "scaled_expert_down_shared": {"T": 1, "K": 2, "E": 3, "I": 160, "J": 160, "H": 2, "H?": 1},
}
BLOCKS = {"rows": 2, "columns": 160, "inner": 160, "shared_inner": 160, "k": 2}  # a scale for all of a sum


@pytest.mark.parametrize("name", LONG_SUMS)
def test_equal_terms_added_up_in_order_are_within_the_bound(name):
    """A block of one adds up one term after another, and rounds equal terms the same way each time."""
    declared = FUSIONS[name].tensors.items()
    params = {n: BLOCKS[n] for n in FUSIONS[name].params if n in BLOCKS}
    dtypes = {n: "float32" if "float32" in t.dtypes else t.dtypes[0] for n, t in declared}
    ways = [{"lanes": False}, {"lanes": True}] if "lanes" in FUSIONS[name].params else [{}]
    for seed, way in product(range(4), ways):
        case = FuzzCase(name, LONG_SUMS[name], dtypes, params | way, recipe="equal", seed=seed, schedule="small")
        verdict = run_case(executor("interpret"), case)
        assert not verdict.problems
        assert verdict.ratio < 2


def test_products_of_both_signs_have_the_bound_of_a_tree():
    """Only what adds up to much may lose much: random terms cancel in their partial sums, too."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((4, 2560)).astype("float32"), rng.standard_normal((3, 2560)).astype("float32")
    bound = bounds(FUSIONS["gate_gemm"], {"x": x, "packed": w})["out"]
    assert (bound.noise < 20 * 2.0**-24 * (np.abs(x) @ np.abs(w).T)).all()


def test_only_subnormal_operands_excuse_a_rounded_sum():
    """Of a rounded residual of tiny numbers, exactness is given up where an operand may read as zero, and nowhere else."""
    tiny = 2.0**-126
    x = np.array([[3 * tiny, tiny / 2]]).astype(ml_dtypes.bfloat16)
    values = {"x": x, "residual": np.array([[5 * tiny, 4 * tiny]]).astype(ml_dtypes.bfloat16),
              "weight": np.ones(2, ml_dtypes.bfloat16)}  # fmt: skip
    flips = bounds(FUSIONS["add_rms_norm"], values)["residual"].flips
    assert flips[0, 0] == 0
    assert flips[0, 1] > 0


@pytest.mark.parametrize(("low", "fine"), [([3, 2], True), ([0, 0], True), ([1, 1], False), ([3, -1], False)])
def test_what_is_chosen_of_subnormals_may_be_what_is_chosen_of_zeros(low, fine, monkeypatch):
    """The first of all, as where every element reads as zero."""
    x = np.array([[2, 3, 1, 0], [2, 1, 0, 3]], np.float32) * np.float32(2.0**-140)
    monkeypatch.setattr(FuzzCase, "values", lambda case: {"x": x})
    oracle = Oracle.of(FuzzCase("probe_nearest", {"T": 2, "H": 4}, {"x": "float32"}))
    outputs = {"low": np.array(low, np.int32), "high": np.array([1, 3], np.int32), "span": x.max(1)}
    assert (not oracle.compare(outputs).problems) == fine


def test_a_router_never_takes_subnormals_for_zeros():
    """Its keys are bits: it has no other choice."""
    tiny = FuzzCase("topk_softmax", {"T": 5, "E": 16}, {"logits": "bfloat16"}, {"k": 3}, recipe="tiny")
    assert not Oracle.of(tiny).chosen


FLOATING = [n for n, f in FUSIONS.items() if any("float32" in s.dtypes for s in f.tensors.values())]


@pytest.mark.parametrize("name", FLOATING)
def test_no_constant_is_above_four_times_the_worst_that_was_seen(name):
    worst = worst_seen()[name]
    assert constant(name) <= 4 * worst["ratio"]
    assert worst["ratio"] < constant(name)
    assert {*worst} == {"ratio", "implementation", "device", "command"}


def test_the_worst_is_kept_with_where_it_came_from(tmp_path):
    path, plan = tmp_path / "worst.json", Plan(["f", "g"], ["numpy"])
    record_worst(path, {"numpy": Coverage(worst={"f": 0.5, "g": 0.25})}, plan)
    record_worst(path, {"numpy": Coverage(worst={"f": 0.25, "g": 0.75})}, plan)
    assert {n: v["ratio"] for n, v in worst_seen(path).items()} == {"f": 0.5, "g": 0.75}
    assert worst_seen(path)["f"]["device"] == "CPU"


def test_ids_among_computed_values_are_any_where_those_are_within_their_errors():
    """Two logits that float32 may sum up in either order may change places; two that stand apart may not."""
    fusion, params = FUSIONS["gate_topk"], {"k": 3}
    values = operands(fusion, {"T": 1, "D": 2, "I": 1, "E": 4, "G": 1}, "float32")
    values |= {"x": np.ones((1, 2), np.float32), "router": np.array([[1, 1], [2, 1], [1, 1 + 2.0**-23], [0, 0]], np.float32)}
    made = dict(run("numpy", Call(fusion, values, params)).outputs)
    made["ids"] = np.array([[1, 0, 2]], np.int32)
    assert not compare(fusion, made, values, params).problems
    made["ids"] = np.array([[0, 1, 2]], np.int32)
    assert "ids[0, 0] is 0, the reference says 1" in compare(fusion, made, values, params).problems[0]
