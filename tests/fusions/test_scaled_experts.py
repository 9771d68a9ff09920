"""Routed experts of weights with a scale for each of their blocks, in every implementation."""

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic
from moekit.compile.rules.order import order
from moekit.compile.tile import Dot, walk
from moekit.errors import ShapeError
from moekit.fusions import FUSIONS
from moekit.lang import round_to
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, check, implementations, operands, run
from tests.backends.samples import strided

GATE_UP, DOWN, EXPERTS = (FUSIONS[n] for n in ("scaled_expert_gate_up", "scaled_expert_down", "scaled_experts"))
FLOAT8 = "float8_e4m3fn"
SIZES = {"T": 5, "K": 3, "E": 9, "D": 50, "I": 24, "H": 35}
BLOCKS = {"columns": 16, "inner": 16}  # the last of each axis is narrower
QWEN = {"D": 2048, "H": 2048, "I": 512, "E": 512, "K": 10}
SCALES = np.float32([0.0, -0.0, 1e-40, -2.5, 3e-3, 1e30, 2.0**-149, 0.1])


def own(fusion, sizes):
    """Those of `sizes` that a fusion has."""
    return {a: n for a, n in sizes.items() if any(a == b for s in fusion.tensors.values() for d in s.dims for _, b in d.terms)}


def dtypes(fusion, rows="float32"):
    """Weights in float8, their scales in float32, the others in `rows`."""
    return {n: FLOAT8 if FLOAT8 in s.dtypes else s.dtypes[0] if len(s.dtypes) < 3 else rows for n, s in fusion.tensors.items()}


def call(fusion, rows="float32", sizes=SIZES, scales=None, seed=0, layouts=None, **params):
    """A call with random codes of all kinds but NaN, and scales of a drawn size, or of `scales`."""
    rng, params = np.random.default_rng(seed), BLOCKS | params
    values = operands(fusion, own(fusion, sizes), dtypes(fusion, rows), "normal", seed, params)
    for name, value in values.items():
        if value.dtype == ml_dtypes.float8_e4m3fn:
            codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
            values[name] = rng.choice(codes, value.shape).view(value.dtype)
        elif "scale" in name:
            drawn = rng.uniform(-1, 1, value.shape) * 2.0 ** rng.integers(-12, -6, value.shape)
            values[name] = (drawn if scales is None else rng.choice(scales, value.shape)).astype(np.float32)
        elif name == "ids":
            values[name] = rng.integers(-1, sizes["E"] + 1, value.shape).astype(value.dtype)
    return Call(fusion, values, params, layouts or {})


def whole(codes, scales, rows, columns):
    """Element by element: the code times the scale of its block."""
    at = np.arange(codes.shape[-2])[:, None] // rows, np.arange(codes.shape[-1]) // columns
    return codes.astype(np.float64) * scales.astype(np.float64)[..., *at]


def widened(gate_up, scale, columns, inner):
    """Gate and up, each with rows of scales of its own."""
    halves = zip(np.split(gate_up, 2, 1), np.split(scale, 2, 1), strict=True)
    return [whole(*half, inner, columns) for half in halves]


def chosen(weights, ids):
    """Each pair's matrix, zeros where there is no such expert."""
    known = (ids >= 0) & (ids < len(weights))
    return np.where(known[..., None, None], weights[np.where(known, ids, 0)], 0)


def expected(made):
    """In float64 but for the roundings that are declared."""
    v, (columns, inner) = made.operands, (made.params[n] for n in ("columns", "inner"))
    with np.errstate(over="ignore", invalid="ignore"):
        rows = v["activated"].astype(np.float64) if "activated" in v else None
        if rows is None:
            scale = v.get("gate_up_scale", v.get("scale"))
            gate, up = (
                np.einsum("td,tkid->tki", v["x"].astype(np.float64), chosen(w, v["ids"]))
                for w in widened(v["gate_up"], scale, columns, inner)
            )
            rows = gate / (1 + np.exp(-gate)) * up
            if "down" not in v:
                return rows
            rows = round_to(rows, v["x"].dtype)
        weights = chosen(whole(v["down"], v.get("down_scale", v.get("scale")), columns, inner), v["ids"])
        kind = v["x"].dtype if "x" in v else v["activated"].dtype
        each = round_to(np.einsum("tki,tkhi->tkh", rows, weights), kind)
        known = (v["ids"] >= 0) & (v["ids"] < len(v["down"]))
        return np.einsum("tk,tkh->th", np.where(known, v["weights"].astype(np.float64), 0), each)


class TestScaledExpertGateUp(FusionSuite):
    """The suite, with blocks that fill neither axis."""

    fusion = GATE_UP
    sizes = (own(GATE_UP, SIZES), own(GATE_UP, {**SIZES, "T": 0}), {"T": 1, "D": 1, "I": 1, "E": 1, "K": 1})
    params = ({"columns": 16, "inner": 8},)
    recipes = ("special", "tiny")


class TestScaledExpertDown(FusionSuite):
    """The suite, with blocks that fill neither axis."""

    fusion = DOWN
    sizes = (own(DOWN, SIZES), own(DOWN, {**SIZES, "T": 0}), {"T": 1, "H": 1, "I": 1, "E": 1, "K": 1})
    params = ({"columns": 16, "inner": 16},)
    recipes = ("special", "tiny")


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("fusion", [GATE_UP, DOWN, EXPERTS], ids=lambda f: f.name)
def test_against_float64(implementation, fusion):
    """The reference and every implementation, with float8 weights, rows of each dtype and both ways of the experts."""
    for rows in ("float32", "float16", "bfloat16") if implementation in ("interpret", "numpy") else ("float32", "bfloat16"):
        for block in (1, 16) if fusion is EXPERTS else (None,):
            made = call(fusion, rows, **({"block": block} if block else {}))
            got = run(implementation, made)
            assert got.problems == ()
            (out,), wanted = got.outputs.values(), expected(made)
            size = np.abs(wanted).max()
            assert size > 0.1
            rounding = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[rows] * size
            np.testing.assert_allclose(out.astype(np.float64), wanted, rtol=0, atol=rounding)
            (reference,) = fusion.reference(**made.operands, **fusion.bind_params(made.params)).values()
            np.testing.assert_allclose(reference, wanted, rtol=1e-9, atol=1e-9 * size)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("fusion", [GATE_UP, DOWN, EXPERTS], ids=lambda f: f.name)
def test_scales_of_all_kinds(implementation, fusion):
    """Zero of both signs, subnormal, negative and huge: within the bound of the reference."""
    check(implementation, call(fusion, scales=SCALES, seed=2))
    check(implementation, call(fusion, "bfloat16", scales=[0.0, -0.0, -2.5, 3e-3], seed=3))


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_code_that_is_no_number_is_none(implementation, code):
    """NaN stays NaN, in what its expert gives and nowhere else."""
    made = call(GATE_UP, "bfloat16", seed=4)
    made.operands["ids"][:] = np.arange(3)
    made.operands["ids"][2] = [3, 4, 5]
    made.operands["gate_up"].view(np.uint8)[4, 7, 33] = code
    (out,) = run(implementation, made).outputs.values()
    lost = np.zeros(out.shape, bool)
    lost[2, 1, 7] = True
    np.testing.assert_array_equal(np.isnan(out.astype(np.float32)), lost)


@pytest.mark.parametrize("layout", ["padded", "strided", "transposed padded", "shifted"])
@pytest.mark.parametrize("fusion", [GATE_UP, DOWN, EXPERTS], ids=lambda f: f.name)
def test_any_strides(layout, fusion):
    kinds = dict.fromkeys([*fusion.tensors, "out", "activated"], layout)
    (dense,) = run("interpret", call(fusion, "float16")).outputs.values()
    got = run("interpret", call(fusion, "float16", layouts=kinds))
    assert got.problems == ()
    np.testing.assert_array_equal(*got.outputs.values(), dense)


def test_scales_that_do_not_fit():
    """One sentence, which says how many there must be."""
    made = call(GATE_UP)
    values = made.operands | {"scale": made.operands["scale"][:, :, :3]}
    with pytest.raises(ShapeError, match="scaled_expert_gate_up: axis Db has 3 elements in the operands; it must have 4"):
        run("numpy", Call(GATE_UP, values, BLOCKS))
    with pytest.raises(ShapeError, match="columns = 0; blocks have 1 element or more"):
        run("numpy", call(GATE_UP, columns=0))


def graph(fusion, rows="bfloat16", width=512, **params):
    """At the 80B's sizes."""
    sizes = own(fusion, QWEN | {"I": width})
    return fusion.trace(example(fusion, sizes, dtypes(fusion, rows), {"inner": min(128, width)} | params))


@pytest.mark.parametrize("width", [512, 256, 64])
@pytest.mark.parametrize("block", [16, 64, 128])
def test_blocks_of_pairs_run_on_the_matrix_unit(width, block):
    """Gate and up as one product where a block has more than 16 pairs, down in another launch, a block of scales a turn; as few
    launches as `experts` has."""
    made = graph(EXPERTS, width=width, block=block)
    programs = plan(made, None, strided(made, {})).programs
    plain = FUSIONS["experts"]
    other = plain.trace(example(plain, own(plain, QWEN | {"I": width}), "bfloat16", {"block": block}))
    assert len(programs) == len(heuristic(other).launches)
    dots = [[op for op, _ in walk(p.body) if isinstance(op, Dot)] for p in programs if hasattr(p, "body")]
    assert [len(found) for found in dots if found] == [2 if block == 16 else 1, 1]
    assert {"loop:Db:1", "loop:Ib:1"} <= {*str(heuristic(made)).split()}


def test_a_row_adds_up_alike_in_blocks_of_any_size():
    """The order of sums is one in blocks of more than 16 pairs, and one in those of fewer (docs/performance_tried.md)."""
    few, same, *larger = (
        order(plan(g := graph(EXPERTS, block=b), None, strided(g, {})).programs[-3:]) for b in (1, 16, 32, 64, 128)
    )
    assert few == same != larger[0] == larger[1] == larger[2]


@pytest.mark.parametrize("width", [512, 256, 64])
@pytest.mark.parametrize("fusion", [GATE_UP, DOWN, EXPERTS], ids=lambda f: f.name)
def test_compiled_without_spills(fusion, width):
    """Codes are loaded 16 bytes at a time, and become wider by the fast instructions."""
    pytest.importorskip("triton")
    from tests.backends.sm_90 import build, compiled

    for block in (16, 64, 128) if fusion is EXPERTS else (None,):
        made = graph(fusion, width=width, **({"block": block} if block else {}))
        for program in plan(made, heuristic(made), strided(made, {})).programs:
            if any(p.name in ("gate_up", "down") for p in program.params):
                built = build(program)
                assert (built.spills, built.stack, built.serial) == (0, 0, False)
                assert {"gate_up", "down"}.isdisjoint(built.narrow)
                text = compiled(program).asm["ptx"]
                assert "cvt.rn.f16x2.e4m3x2" in text
                assert "cvt.bf16.f16" not in text
