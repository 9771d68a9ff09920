"""attention_decode in every implementation: ragged lengths, parts of a fixed length, bits that nothing beside a row moves."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from moekit.compile import tile
from moekit.compile.plan import plan
from moekit.compile.rules import heuristic
from moekit.compile.rules.choose import row_classes
from moekit.compile.schedule import Rounds, Schedule
from moekit.compile.schedule.legal import legal
from moekit.compile.tile import interpret
from moekit.compile.tile.layouts import contiguous
from moekit.fusions import FUSIONS
from moekit.lang.arguments import example
from moekit.testing import Call, FusionSuite, check, implementations, run
from tests.compile.test_lengths import outputs

FUSION = FUSIONS["attention_decode"]
KINDS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class TestAttentionDecode(FusionSuite):
    """The suite, whose lengths are 0 to 3; caches of several parts, and heads that share keys or do not."""

    fusion = FUSION
    sizes = (
        {"T": 5, "K": 2, "G": 3, "L": 40, "D": 24, "Dv": 17},
        {"T": 0, "K": 1, "G": 2, "L": 8, "D": 4, "Dv": 4},
        {"T": 1, "K": 1, "G": 1, "L": 1, "D": 1, "Dv": 1},
        {"T": 2, "K": 1, "G": 8, "L": 300, "D": 16, "Dv": 16},
    )
    params = ({"scale": 0.25}, {})


def cache(
    dtype="float32", length=600, ends=(0, 1, 255, 256, 257, 600, 599, 64, -5, 10**6), heads=(2, 3), dims=(20, 12), seed=5
):
    """Caches whose positions behind a row's length hold NaN and infinities."""
    rng, rows = np.random.default_rng(seed), len(ends)
    shapes = {
        "q": (rows, *heads, dims[0]),
        "k_cache": (rows, heads[0], length, dims[0]),
        "v_cache": (rows, heads[0], length, dims[1]),
    }
    made = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    made["q"] *= 3
    lengths = np.array(ends, np.int32)
    past = (np.arange(length)[None] >= np.clip(lengths, 0, length)[:, None])[:, None, :, None]
    made["k_cache"] = np.where(past, np.nan, made["k_cache"])
    made["v_cache"] = np.where(past, np.inf, made["v_cache"])
    return {n: x.astype(KINDS[dtype]) for n, x in made.items()} | {"lengths": lengths}


def textbook(values, scale):
    """All heads of a row at once, in float64: not the reference's order, nor its formula."""
    q, k, v = (values[n].astype(np.float64) for n in ("q", "k_cache", "v_cache"))
    here = np.arange(k.shape[2])[None] < values["lengths"][:, None]
    k, v = (np.where(here[:, None, :, None], x, 0) for x in (k, v))
    scores = np.einsum("tkgd,tkld->tkgl", q, k) * scale
    weights = np.where(here[:, None, None], np.exp(scores - scores.max(-1, keepdims=True, initial=-1e30)), 0)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("tkgl,tkld->tkgd", weights / np.where(total == 0, 1, total), v)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("dtype", KINDS)
def test_ragged_caches(implementation, dtype):
    """Lengths of nothing, one, ends of parts and blocks, all, less than nothing and more than there is."""
    values = cache(dtype)
    check(implementation, Call(FUSION, values, {"scale": 0.2}))
    got = run(implementation, Call(FUSION, values, {"scale": 0.2})).outputs["out"].astype(np.float64)
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}[dtype]
    np.testing.assert_allclose(got, textbook(values, 0.2), rtol=tolerance, atol=tolerance)
    assert not got[values["lengths"] <= 0].any()


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("layout", ["strided", "transposed padded", "shifted"])
def test_caches_of_any_strides(implementation, layout):
    """A layer's part of a larger cache, heads before or after positions: nothing is made contiguous."""
    values = cache("bfloat16", 300, (300, 17, 0), dims=(16, 16))
    check(implementation, Call(FUSION, values, {}, dict.fromkeys(("q", "k_cache", "v_cache", "lengths"), layout)))


def bits(x):
    return x.view({2: np.int16, 4: np.int32}[x.itemsize])


@pytest.mark.parametrize("dtype", KINDS)
def test_bits_of_a_row_depend_on_that_row_alone(dtype):
    """Not on the rows beside it, and not on the capacity, be it less than a part or many."""
    values = cache(dtype, 600, (200, 1, 0, 64, 199))
    many, made = outputs(FUSION, values)
    assert len(made.programs) == 2
    for r in range(5):
        alone, _ = outputs(FUSION, {n: x[r : r + 1] for n, x in values.items()})
        np.testing.assert_array_equal(bits(alone["out"]), bits(many["out"][r : r + 1]))
    for capacity, launches in ((200, 1), (256, 1), (257, 2), (601, 2), (5000, 2)):
        shaped = dict(values)
        for n in ("k_cache", "v_cache"):
            shaped[n] = np.full((*values[n].shape[:2], capacity, values[n].shape[3]), np.nan, values[n].dtype)
            shaped[n][:, :, :200] = values[n][:, :, :200]
        other, made = outputs(FUSION, shaped)
        assert len(made.programs) == launches
        np.testing.assert_array_equal(bits(other["out"]), bits(many["out"]), err_msg=str(capacity))


def test_parts_that_a_row_does_not_have_are_not_written():
    """Programs past a row's end leave the scratch as it was, and the second launch does not read it: it is poison here."""
    values = cache("float32", 1000, (0, 1, 256, 257, 1000))
    graph = Call(FUSION, values).graph
    made = plan(graph, None, contiguous(graph, {"T": 5}))
    memory = {**values, "out": interpret.poison((5, 2, 3, 12), "float32")}
    memory |= {s.name: interpret.poison(s.shape({"T": 5}), s.dtype) for s in made.scratch}
    for program in made.programs:
        interpret.execute(program, memory, {"T": 5})
    assert np.isfinite(memory["out"]).all()
    written = np.isfinite(memory[made.scratch[1].name]).all((2, 3))  # sums, which are never infinite
    np.testing.assert_array_equal(written.T, np.arange(4) < np.array([0, 1, 1, 2, 4])[:, None])


def test_parts_of_256_and_the_matrix_unit():
    """At Qwen3-Next's sizes."""
    sizes = {"T": 1, "K": 2, "G": 8, "L": 4096, "D": 256, "Dv": 256}
    graph = FUSION.trace(example(FUSION, sizes, "bfloat16"))
    assert str(heuristic(graph)) == (
        "tile:L.part:1 tile:T:1 tile:K:1 tile:G:16 whole:D:256 loop:L:64 whole:Dv:256 warps:4 stages:3 dependent "
        "split:L:16:256 then loop:L.part:1 tile:T:1 tile:K:1 tile:G:1 tile:Dv:64 warps:2 stages:1 dependent"
    )


@pytest.mark.parametrize("implementation", implementations())
def test_no_score_above_minus_infinity_is_nothing(implementation):
    """As the language says of `softmax_sum`: a softmax of such scores would be no number."""
    q, keys = np.ones((2, 1, 2, 4), np.float32), np.full((2, 1, 3, 4), -np.inf, np.float32)
    keys[1, 0, 2] = 0.5
    values = np.random.default_rng(1).normal(size=(2, 1, 3, 5)).astype(np.float32)
    given = {"q": q, "k_cache": keys, "v_cache": values, "lengths": np.array([3, 3], np.int32)}
    got = run(implementation, Call(FUSION, given)).outputs["out"]
    np.testing.assert_array_equal(got[0], 0)
    np.testing.assert_allclose(got[1], np.broadcast_to(values[1, 0, 2], (1, 2, 5)), rtol=1e-6)


def in_rounds(graph, programs):
    """The schedule with so many programs along the parts."""
    chosen = heuristic(graph)
    (section,) = chosen.launches[0].sections
    taking = replace(chosen.launches[0], sections=(section.but(Rounds("L.part", programs)),))
    return replace(chosen, launches=(taking, *chosen.launches[1:]))


@pytest.mark.parametrize("implementation", [i for i in implementations() if i.values[0] in ("interpret", "triton", "pallas")])
@pytest.mark.parametrize("programs", [1, 3, 9])
def test_parts_in_rounds(implementation, programs):
    """Rows that end in the first round, at its end, in the last one, or nowhere: the bits of a program for each part."""
    values = cache("float16", 2500, (0, 1, 255, 256, 700, 768, 2500, -3, 10**6), heads=(1, 3))
    graph = Call(FUSION, values).graph
    call = Call(FUSION, values, schedule=in_rounds(graph, programs))
    check(implementation, call)
    got, wanted = (run(implementation, c).outputs["out"] for c in (call, Call(FUSION, values)))
    np.testing.assert_array_equal(bits(got), bits(wanted))


def test_rounds_where_there_is_much_room():
    """Fewer programs a row the more rows there are; and a program for each part where there are few of them."""
    sizes = {"T": 1, "K": 1, "G": 8, "L": 131072, "D": 256, "Dv": 256}
    graph = FUSION.trace(example(FUSION, sizes, "bfloat16"))
    assert row_classes(graph) == (0, 4, 16)
    found = [re.findall(r"rounds:L.part:(\d+)", str(heuristic(graph, rows))) for rows in (1, 3, 4, 64)]
    assert found == [["256"], ["256"], ["64"], ["16"]]
    near = FUSION.trace(example(FUSION, sizes | {"L": 4096}, "bfloat16"))
    assert "rounds" not in str(heuristic(near))
    assert row_classes(near) == (0,)


def test_programs_past_the_last_round_go_through_none():
    """A program whose first part begins behind the row's end does nothing at all: its loop has no turns."""
    values = cache("float32", 5000, (300,), heads=(1, 2))
    graph = Call(FUSION, values).graph
    made = plan(graph, in_rounds(graph, 4), contiguous(graph, {"T": 1}))
    (loop,) = [op for op in made.programs[0].body if isinstance(op, tile.Loop)]
    assert loop.end is not None
    assert made.programs[0].programs({"T": 1}) == 4


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("rounds:L.part:20", "needs a tile of L.part, of static size, in more than 20 blocks"),
        ("rounds:L.part:0", "in more than 0 blocks"),
        ("rounds:T:1", "needs a tile of T, of static size"),
        ("rounds:L:1", "needs a tile of L, of static size"),
        ("rounds:L.part:2 pair:v_cache", "cannot stand beside pair"),
    ],
)
def test_rounds_that_cannot_be(said, why):
    """Refused before anything is compiled, in one sentence."""
    graph = Call(FUSION, cache("float32", 5000, (300,), heads=(1, 2))).graph
    text = str(heuristic(graph)).replace("warps:4", f"{said} warps:4", 1)
    assert why in (legal(graph, Schedule.parse(text)) or "")
