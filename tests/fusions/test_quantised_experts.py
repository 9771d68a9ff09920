"""Rows in float8 and routed experts that multiply them as they are, in every implementation."""

import re

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic
from moekit.compile.rules.order import order
from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.lang import round_to
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, check, implementations, run
from tests.backends.samples import strided
from tests.fusions.test_scaled_experts import SCALES, chosen, whole, widened

QUANTISED, EXPERTS = (FUSIONS[n] for n in ("quantised", "quantised_experts"))
FLOAT8 = ml_dtypes.float8_e4m3fn
SIZES = {"T": 5, "K": 3, "E": 9, "D": 50, "I": 24, "H": 35}
QWEN = {"T": 64, "D": 2048, "H": 2048, "I": 512, "E": 512, "K": 10}


def shapes(T, K, E, D, I, H, columns=16, inner=16):  # noqa: E741
    """Of every operand."""
    Db, Ib, Hb = -(-D // columns), -(-I // inner), -(-H // columns)
    return {"codes": (T, Db, columns), "codes_scale": (T, Db), "ids": (T, K), "weights": (T, K), "gate_up": (E, 2 * I, D),
            "gate_up_scale": (E, 2 * Ib, Db), "down": (E, H, I), "down_scale": (E, Hb, Ib)}  # fmt: skip


def call(sizes=SIZES, block=16, scales=None, seed=0, layouts=None, dtype="bfloat16", columns=16, inner=16):
    """A call with random codes of all kinds but NaN, and scales of a drawn size, or of `scales`."""
    rng, values = np.random.default_rng(seed), {}
    for name, shape in shapes(**sizes, columns=columns, inner=inner).items():
        if "scale" in name:
            drawn = rng.uniform(-1, 1, shape) * 2.0 ** rng.integers(-9, -3, shape)
            values[name] = (drawn if scales is None else rng.choice(scales, shape)).astype(np.float32)
        elif name == "ids":
            values[name] = rng.integers(-1, sizes["E"] + 1, shape).astype(np.int32)
        elif name == "weights":
            values[name] = rng.uniform(0, 1, shape).astype(np.float32)
        else:
            values[name] = rng.choice(np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF]), shape).view(FLOAT8)
    return Call(EXPERTS, values, {"block": block, "columns": columns, "inner": inner, "dtype": dtype}, layouts or {})


def in_float8(rows, length):
    """Rows as they are after the way to float8 and back, in float64, one block after the other."""
    found = np.zeros_like(rows)
    for at in range(0, rows.shape[-1], length):
        part = rows[..., at : at + length]
        with np.errstate(invalid="ignore", over="ignore"):
            scale = np.maximum(np.abs(part).max(-1, keepdims=True) / 448, 2.0**-64)
            found[..., at : at + length] = round_to(part / scale, "float8_e4m3fn") * scale
    return found


def expected(made):
    """In float64, with whole matrices, but for the roundings that are declared."""
    v, (columns, inner, dtype) = made.operands, (made.params[n] for n in ("columns", "inner", "dtype"))
    with np.errstate(over="ignore", invalid="ignore"):
        x = v["codes"].astype(np.float64) * v["codes_scale"][..., None]
        x = x.reshape(len(x), -1)[:, : v["gate_up"].shape[2]]
        gate, up = (
            np.einsum("td,tkid->tki", x, chosen(w, v["ids"])) for w in widened(v["gate_up"], v["gate_up_scale"], columns, inner)
        )
        rows = in_float8(round_to(gate / (1 + np.exp(-gate)) * up, dtype), inner)
        down = chosen(whole(v["down"], v["down_scale"], columns, inner), v["ids"])
        each = round_to(np.einsum("tki,tkhi->tkh", rows, down), dtype)
        known = (v["ids"] >= 0) & (v["ids"] < len(v["down"]))
        return np.einsum("tk,tkh->th", np.where(known, v["weights"].astype(np.float64), 0), each)


class TestQuantised(FusionSuite):
    """The suite, with a last block that is narrower."""

    fusion = QUANTISED
    sizes = ({"T": 5, "D": 50}, {"T": 0, "D": 50}, {"T": 1, "D": 1})
    params = ({"columns": 16}, {"columns": 128})
    recipes = ("special", "tiny")


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_codes_and_scales(implementation, dtype):
    """The largest magnitude is the largest number; others are its scale's nearest ones; a row of -x is that of x, negated."""
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((6, 50)) * np.exp(rng.uniform(-6, 6, (6, 1)))).astype(dtype if dtype != "bfloat16" else "bfloat16")
    x[2, 16:32] = 0
    got, other = (run(implementation, Call(QUANTISED, {"x": v}, {"columns": 16})).outputs for v in (x, -x))
    codes, scale = got["codes"].astype(np.float64), got["scale"].astype(np.float64)
    parts = np.zeros((6, 4, 16))
    parts.reshape(6, 64)[:, :50] = x
    np.testing.assert_allclose(scale, np.maximum(np.abs(parts).max(-1) / 448, 2.0**-64), rtol=1e-6)
    largest = np.abs(codes).max(-1)
    np.testing.assert_array_equal(largest, np.where(np.arange(6)[:, None] * 4 + np.arange(4) == 9, 0, 448))
    step = np.maximum(2.0 ** (np.floor(np.log2(np.maximum(np.abs(codes), 2.0**-6))) - 3), 2.0**-9)
    assert (np.abs(codes - parts / scale[..., None]) <= step * 0.5001).all()
    np.testing.assert_array_equal(other["codes"].astype(np.float64), -codes)
    np.testing.assert_array_equal(other["scale"], got["scale"])


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_makes_none_of_its_row(implementation, wrong):
    """And of no other: NaN in codes of its block, and in all that is made of the row."""
    made = call(seed=4)
    x = np.random.default_rng(4).standard_normal((5, 50)).astype(np.float32)
    x[2, 20] = wrong
    coded = run(implementation, Call(QUANTISED, {"x": x}, {"columns": 16})).outputs
    lost = np.isnan(coded["codes"].astype(np.float32)).any(-1)
    np.testing.assert_array_equal(lost, (np.arange(5)[:, None] == 2) & (np.arange(4) == 1))
    made.operands.update(codes=coded["codes"], codes_scale=coded["scale"])
    made.operands["ids"][2] = [0, 1, 2]
    (out,) = run(implementation, made).outputs.values()
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), np.arange(5)[:, None] == np.full((5, 35), 2))


@pytest.mark.parametrize("implementation", implementations())
def test_codes_past_the_end_are_times_zero(implementation):
    """Numbers there are nothing; what is no number makes its row NaN, in the reference, too."""
    made, plain = call(seed=5), call(seed=5)
    made.operands["ids"][:], plain.operands["ids"][:] = 3, 3
    made.operands["codes"][:, -1, 50 % 16 :], plain.operands["codes"][:, -1, 50 % 16 :] = 448, 0
    (out,), (wanted,) = (run(implementation, c).outputs.values() for c in (made, plain))
    np.testing.assert_array_equal(out.astype(np.float64), wanted.astype(np.float64))
    made.operands["codes"][2, -1, -1] = np.nan
    check(implementation, made)
    (out,) = run(implementation, made).outputs.values()
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)).any(1), np.arange(5) == 2)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("block", [1, 16, 64])
def test_against_float64(implementation, block):
    """The reference and every implementation. Where float32 sums round to another number than float64 ones, rows move by it."""
    for dtype in ("float32", "bfloat16"):
        made = call(block=block, dtype=dtype)
        got = run(implementation, made)
        assert got.problems == ()
        (out,), wanted = got.outputs.values(), expected(made)
        size = np.abs(wanted).max()
        assert size > 0.1
        np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=0, atol=size * (2e-2 if dtype == "float32" else 4e-2))
        (reference,) = EXPERTS.reference(**made.operands, **EXPERTS.bind_params(made.params)).values()
        np.testing.assert_allclose(reference, wanted, rtol=1e-9, atol=1e-9 * size)
        check(implementation, made)


@pytest.mark.parametrize("implementation", implementations())
def test_scales_of_all_kinds(implementation):
    """Zero of both signs, subnormal, negative and huge: within the bound of the reference."""
    check(implementation, call(scales=SCALES, seed=2))
    check(implementation, call(scales=[0.0, -0.0, -2.5, 3e-3], seed=3))


@pytest.mark.parametrize("implementation", implementations())
def test_no_rows_and_no_experts(implementation):
    """No tokens; tokens that choose nobody; experts that nobody chooses."""
    (out,) = run(implementation, call(SIZES | {"T": 0})).outputs.values()
    assert out.shape == (0, 35)
    made = call()
    made.operands["ids"][:] = [-1, 9, 2]
    (out,) = run(implementation, made).outputs.values()
    assert np.abs(out.astype(np.float64)).min() > 0
    made.operands["ids"][:] = -1
    (out,) = run(implementation, made).outputs.values()
    np.testing.assert_array_equal(out.astype(np.float64), 0)


@pytest.mark.parametrize("layout", ["padded", "strided", "transposed padded", "shifted"])
def test_any_strides(layout):
    x = np.random.default_rng(0).standard_normal((5, 50)).astype(np.float32)
    for fusion in (EXPERTS, QUANTISED):
        kinds = dict.fromkeys([*fusion.tensors, "out", "codes", "scale"], layout)

        def make(layouts=None, fusion=fusion):
            return call(layouts=layouts) if fusion is EXPERTS else Call(QUANTISED, {"x": x}, {"columns": 16}, layouts or {})

        dense, got = run("interpret", make()), run("interpret", make(kinds))
        assert got.problems == ()
        for name, value in dense.outputs.items():
            np.testing.assert_array_equal(got.outputs[name].astype(np.float64), value.astype(np.float64))


@pytest.mark.parametrize("implementation", implementations())
def test_rows_have_the_same_bits_in_blocks_of_any_size(implementation):
    """And alone or among others."""
    made = call(seed=6)
    (out,) = run(implementation, made).outputs.values()
    for block in (1, 32, 64):
        (other,) = run(implementation, call(seed=6, block=block)).outputs.values()
        np.testing.assert_array_equal(other.view(np.uint16), out.view(np.uint16))
    few = {n: v[1:3] if n in ("codes", "codes_scale", "ids", "weights") else v for n, v in made.operands.items()}
    (alone,) = run(implementation, Call(EXPERTS, few, made.params)).outputs.values()
    np.testing.assert_array_equal(alone.view(np.uint16), out[1:3].view(np.uint16))


def test_what_does_not_fit_is_refused():
    """Scales of other blocks, rows in blocks of other columns, and weights in another dtype: a sentence each."""
    made = call()
    values = made.operands | {"codes_scale": made.operands["codes_scale"][:, :3]}
    with pytest.raises(ShapeError, match="quantised_experts: "):
        run("numpy", Call(EXPERTS, values, made.params))
    with pytest.raises(ShapeError, match="quantised_experts: "):
        run("numpy", Call(EXPERTS, made.operands, made.params | {"columns": 32}))
    with pytest.raises(ShapeError, match="columns = 0; blocks have 1 element or more"):
        run("numpy", Call(QUANTISED, {"x": np.zeros((2, 8), np.float32)}, {"columns": 0}))


def graph(block, width=512):
    """At the 80B's sizes."""
    inner = min(128, width)
    sizes = {**QWEN, "I": width}
    named = shapes(**sizes, columns=128, inner=inner)
    f8, f32 = "float8_e4m3fn", "float32"
    kinds = {n: f32 if "scale" in n or n == "weights" else "int32" if n == "ids" else f8 for n in named}
    return EXPERTS.trace(EXPERTS.bind(named, kinds, EXPERTS.bind_params({"block": block, "inner": inner})))


@pytest.mark.parametrize("width", [512, 32])
def test_every_block_is_added_up_by_the_same_instructions(width):
    """Whatever stands left of it: 64 pairs or more, or 64 columns; of narrower experts 64 rows, of which some are empty."""
    first, *others = (order(plan(g := graph(b, width), None, strided(g, {})).programs[-4:]) for b in (1, 16, 32, 64, 128))
    assert all(first == other for other in others)
    assert {said[2] for said in first if said[0] == "float8"} == {True}


@pytest.mark.parametrize("width", [512, 256, 64])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_compiled_for_the_matrix_unit_without_spills(block, width):
    """Float8 operands go to it as they are; what is activated becomes float8 in a launch of its own."""
    pytest.importorskip("triton")
    from tests.backends.sm_90 import build, compiled

    made = graph(block, width)
    *_, first, codes, second, _ = plan(made, heuristic(made), strided(made, {})).programs
    for program in (first, codes, second):
        built, text = build(program), compiled(program).asm["ptx"]
        assert (built.spills, built.stack, built.serial) == (0, 0, False)
        assert {"gate_up", "down", "codes"}.isdisjoint(built.narrow)
        units = set(re.findall(r"\s((?:wgmma\.mma_async|mma)\.sync\S*)", text))
        assert bool(units) == (program is not codes)
        assert all("wgmma" in unit and unit.endswith("e4m3.e4m3") for unit in units)
        assert "cvt.rn.f16x2.e4m3x2" not in text
    assert "cvt.rn.satfinite.e4m3x2.f32" in compiled(codes).asm["ptx"]


def test_rows_of_x_become_float8_by_wide_loads():
    pytest.importorskip("triton")
    from tests.backends.sm_90 import build

    made = QUANTISED.trace(example(QUANTISED, {"T": 64, "D": 2048}, "bfloat16", {}))
    (program,) = plan(made, None, strided(made, {})).programs
    assert (build(program).spills, build(program).narrow) == (0, {})
