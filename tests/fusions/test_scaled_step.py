"""What a step of float8 weights has in few kernels, in every implementation: each against the fusions it is made of."""

from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, row_classes
from moekit.compile.rules.order import order
from moekit.compile.schedule.legal import legal
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, check, implementations, operands, run
from tests.backends.samples import strided
from tests.fusions.test_scaled_experts import QWEN, SCALES, chosen, dtypes, own, whole

SIZES = {"T": 3, "D": 50, "P": 21, "C": 19, "Q": 5, "S": 3, "I": 24, "E": 9, "G": 1, "H": 35, "J": 20, "K": 3}


class Form(NamedTuple):
    """A fusion with the parameters by which it is called, and a name for it."""

    name: str
    params: dict

    @property
    def fusion(self):
        """Its declaration."""
        return FUSIONS[f"scaled_{self.name.removesuffix('_by_lanes')}"]


ALL = ROW, CONV, FEW, GATES, TOPK, DOWN, SHARED = (
    Form("product_by_lanes", {"rows": 16, "columns": 16, "lanes": True}),
    Form("conv_projections_by_lanes", {"rows": 8, "columns": 16, "lanes": True}),
    Form("conv_projections", {"rows": 8, "columns": 16}),
    Form("gate_projections", {"columns": 16, "inner": 8}),
    Form("gate_topk", {"columns": 16, "inner": 8, "k": 4}),
    Form("down_combine", {"columns": 16, "inner": 16}),
    Form("expert_down_shared", {"columns": 16, "inner": 16, "shared_inner": 8}),
)
EIGHTY = QWEN | {"P": 4096, "C": 8192, "Q": 64, "S": 3, "G": 1, "J": 512, "T": 1}


def made(form, rows="float32", scales=None, seed=0, layouts=None):
    """A call with random codes of all kinds but NaN, and scales of a drawn size, or of `scales`."""
    rng = np.random.default_rng(seed)
    fusion = form.fusion
    values = operands(fusion, own(fusion, SIZES), dtypes(fusion, rows), "normal", seed, form.params)
    for name, value in values.items():
        if value.dtype == ml_dtypes.float8_e4m3fn:
            codes = np.delete(np.arange(256, dtype=np.uint8), [0x7F, 0xFF])
            values[name] = rng.choice(codes, value.shape).view(value.dtype)
        elif "scale" in name:
            drawn = rng.uniform(-1, 1, value.shape) * 2.0 ** rng.integers(-12, -6, value.shape)
            values[name] = (drawn if scales is None else rng.choice(scales, value.shape)).astype(np.float32)
        elif name == "ids":
            values[name] = rng.integers(-1, SIZES["E"] + 1, value.shape).astype(value.dtype)
    return Call(fusion, values, form.params, layouts or {})


def suite(form):
    """The suite of one form of a fusion, with blocks that fill no axis; the fusions without one are parts of these."""

    class Suite(FusionSuite):
        fusion = form.fusion
        sizes = (own(form.fusion, SIZES), own(form.fusion, {**SIZES, "T": 0}))
        params = (form.params,)
        recipes = ("special",)

    return Suite


TestScaledConvByLanes, TestScaledConvProjections, TestScaledExpertDownShared = map(suite, (CONV, FEW, SHARED))


def expected(form, c):
    """What no implementation and no reference of a scaled fusion had a hand in, in float64, but for roundings."""
    v = {n: x if x.dtype == np.int32 else x.astype(np.float64) for n, x in c.operands.items()}
    p, kind = c.params, next(iter(c.operands.values())).dtype
    if form is ROW:
        return {"out": v["x"] @ whole(v["weight"], v["scale"], p["rows"], p["columns"]).T}
    if form in (CONV, FEW):
        mixed, rest = (v["x"] @ whole(v[n], v[f"{n}_scale"], p["rows"], p["columns"]).T for n in ("mixing", "others"))
        plain = {"x": mixed.astype(kind), "state": c.operands["state"], "weight": c.operands["weight"]}
        after = FUSIONS["causal_conv1d_step"].reference(**plain)
        return {"rest": rest, "gated": v["x"] @ v["gates"].T, "out": after["out"]}
    if form in (GATES, TOPK):
        halves = zip(*(np.split(v[n], 2) for n in ("gate_up", "scale")), strict=True)
        wide = np.concatenate([whole(*half, p["inner"], p["columns"]) for half in halves])
        made = FUSIONS["gate_projections"].reference(v["x"], wide, v["router"], v["shared_gate"])
        return made if form is GATES else {n: made[n] for n in ("activated", "share")}
    if form is DOWN:
        product = v["activated"] @ whole(v["down"], v["scale"], p["columns"], p["inner"]).T
        return {"hidden": v["hidden"] + v["share"] * product}
    rows = whole(v["down"], v["scale"], p["columns"], p["inner"])
    each = np.einsum("tki,tkhi->tkh", v["activated"], chosen(rows, v["ids"])).astype(kind).astype(np.float64)
    known = (v["ids"] >= 0) & (v["ids"] < len(rows))
    routed = np.einsum("tk,tkh->th", np.where(known, v["weights"], 0), each)
    shared = v["shared"] @ whole(v["shared_down"], v["shared_scale"], p["columns"], p["shared_inner"]).T
    return {"out": routed.astype(kind).astype(np.float64) + v["share"] * shared}


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("form", ALL, ids=lambda f: f.name)
def test_against_float64(implementation, form):
    for rows, tolerance in (("float32", 1e-5), ("bfloat16", 3e-2)):
        c = made(form, rows)
        got = run(implementation, c)
        assert got.problems == ()
        for name, wanted in expected(form, c).items():
            size = np.abs(wanted).max()
            np.testing.assert_allclose(
                got.outputs[name].astype(np.float64), wanted, rtol=0, atol=tolerance * size, err_msg=name
            )


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("form", ALL, ids=lambda f: f.name)
def test_scales_of_all_kinds(implementation, form):
    """Zero of both signs, subnormal, negative and huge: within the bound of the reference."""
    check(implementation, made(form, scales=SCALES, seed=2))
    check(implementation, made(form, "bfloat16", scales=[0.0, -0.0, -2.5, 3e-3], seed=3))


@pytest.mark.parametrize("implementation", implementations())
def test_a_code_that_is_no_number_is_none(implementation):
    """NaN stays NaN in its own column, and nowhere else."""
    c = made(SHARED, "bfloat16", seed=4)
    c.operands["shared_down"].view(np.uint8)[7, 3] = 0x7F
    lost = np.isnan(run(implementation, c).outputs["out"].astype(np.float32))
    np.testing.assert_array_equal(lost, np.arange(SIZES["H"])[None] == np.full((SIZES["T"], 1), 7))


@pytest.mark.parametrize("layout", ["padded", "transposed padded", "shifted"])
@pytest.mark.parametrize("form", ALL, ids=lambda f: f.name)
def test_any_strides(layout, form):
    dense = run("interpret", made(form, "float16")).outputs
    got = run("interpret", made(form, "float16", layouts=dict.fromkeys([*form.fusion.tensors, *dense], layout)))
    assert got.problems == ()
    for name, wanted in dense.items():
        np.testing.assert_array_equal(got.outputs[name], wanted)


def graph(form):
    """At the 80B's sizes, of one row."""
    fusion = form.fusion
    params = {n: v for n, v in {"k": 10, **form.params}.items() if n in fusion.params and n in ("k", "lanes")}
    given = own(fusion, EIGHTY) | ({"H?": 1} if "H" in own(fusion, EIGHTY) else {})
    return fusion.trace(example(fusion, given, dtypes(fusion, "bfloat16"), params))


@pytest.mark.parametrize(("form", "launches"), [(ROW, 1), (CONV, 1), (FEW, 1), (GATES, 2), (TOPK, 2), (DOWN, 1), (SHARED, 2)])
def test_compiled_without_spills(form, launches):
    """In as few launches as are meant; codes are loaded 16 bytes at a time and become wider by the fast instructions."""
    pytest.importorskip("triton")
    from tests.backends.sm_90 import build, compiled

    g = graph(form)
    programs = plan(g, heuristic(g, 1), strided(g, {})).programs
    assert len(programs) == launches
    for program in programs:
        built = build(program)
        assert (built.spills, built.stack) == (0, 0)
        assert {"gate_up", "down", "shared_down", "weight", "mixing", "others"}.isdisjoint(built.narrow)
    assert "cvt.bf16.f16" not in compiled(programs[0]).asm["ptx"]


def test_a_program_has_whole_rows_of_a_matrix_in_blocks():
    """As of `conv_projections`, whose sums go over one axis; so many elements a program, whatever they are in blocks of."""
    assert str(heuristic(graph(ROW))) == "tile:T:1 tile:P:4 whole:Db:16 whole:I:128 warps:4 stages:1 dependent"


@pytest.mark.parametrize("width", [512, 1408, 4096])
def test_a_wide_shared_product_is_beside_the_pairs(width):
    """In one launch, which has no place for it in parts; with the values that there should be."""
    sizes = {"T": 2, "K": 2, "E": 3, "I": 16, "H": 32, "J": width}
    shared = {"columns": 128, "inner": 128, "shared_inner": 128}
    fusion = SHARED.fusion
    values = operands(fusion, own(fusion, sizes), dtypes(fusion, "bfloat16"), "normal", 3, shared)
    call = Call(fusion, values, shared)
    assert len(heuristic(call.graph).launches) == 2
    assert legal(call.graph, heuristic(call.graph)) is None
    check("interpret", call)


@pytest.mark.parametrize("form", ALL, ids=lambda f: f.name)
def test_rows_have_the_same_bits_in_every_class(form):
    """One order of sums, whatever the number of rows."""
    g = graph(form)
    orders = [order(plan(g, heuristic(g, n), strided(g, {})).programs) for n in row_classes(g)]
    assert all(found == orders[0] for found in orders)


BF16, F32, F8 = "bfloat16", "float32", "float8_e4m3fn"
# Of each, operands with a row for every token, and the others, with their shapes and dtypes.
MATRIX = {
    "scaled_product": ({"x": ((2048,), BF16)}, {"weight": ((1024, 2048), F8), "scale": ((8, 16), F32)}),
    "scaled_gate_projections": (
        {"x": ((2048,), BF16)},
        {
            "gate_up": ((1024, 2048), F8),
            "scale": ((8, 16), F32),
            "router": ((512, 2048), BF16),
            "shared_gate": ((1, 2048), BF16),
        },
    ),
    "scaled_down_combine": (
        {"hidden": ((2048,), BF16), "activated": ((512,), BF16), "share": ((1,), F32)},
        {"down": ((2048, 512), F8), "scale": ((16, 4), F32)},
    ),
}


@pytest.mark.parametrize("name", MATRIX)
def test_more_rows_have_the_order_of_few(name):
    """At the 80B's sizes, where there are several classes of rows."""
    each, others = MATRIX[name]
    shapes = {n: (3, *shape) for n, (shape, _) in each.items()} | {n: shape for n, (shape, _) in others.items()}
    fusion = FUSIONS[name]
    g = fusion.trace(fusion.bind(shapes, {n: kind for n, (_, kind) in (each | others).items()}, fusion.bind_params({})))
    assert len(row_classes(g)) > 1
    orders = [order(plan(g, heuristic(g, n), strided(g, {})).programs) for n in row_classes(g)]
    assert all(found == orders[0] for found in orders)


@pytest.mark.gpu
@pytest.mark.parametrize("name", MATRIX)
def test_rows_have_the_same_bits_whatever_their_number(name):
    """The matrix unit's instructions differ in what they take first of an operand that was float8."""
    whole = _called(name, 300, "triton")
    assert all(x.isfinite().all() for x in whole)
    for many in (1, 16, 17, 65, 256, 257):
        assert all(bool((a == b[:many]).all()) for a, b in zip(_called(name, many, "triton"), whole, strict=True)), many


def _called(name: str, many: int, implementation: str) -> tuple:
    """What so many of 300 random rows give in PyTorch."""
    torch = pytest.importorskip("torch")
    import moekit.torch as mt

    (each, others), draw, given = MATRIX[name], np.random.default_rng(3), {}
    for n, (shape, kind) in (each | others).items():
        made = draw.standard_normal((300, *shape) if n in each else shape).astype(np.float32)
        placed = torch.from_numpy(made).to("cuda" if torch.cuda.is_available() else "cpu").to(getattr(torch, kind))
        given[n] = placed[:many] if n in each else placed
    found = getattr(mt, name)(**given, implementation=implementation)
    return found if isinstance(found, tuple) else (found,)
