"""Softmax-weighted sums: one loop with a running maximum, parts and splits of it, on the matrix unit and off it."""

import ml_dtypes
import numpy as np
import pytest

from moekit.compile import tile as t
from moekit.lang import In, contract, fusion, softmax_sum
from moekit.testing import Call, check, implementations, run

from .test_lengths import outputs


def reference(q, k, v, lengths):
    """float64, row by row in the textbook order."""
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]))
    for r, n in enumerate(np.clip(lengths.astype(np.int64), 0, k.shape[1])):
        if n:
            scores = q[r].astype(np.float64) @ k[r, :n].astype(np.float64).T
            with np.errstate(invalid="ignore"):  # every score -inf
                weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[r] = weights / weights.sum(-1, keepdims=True) @ v[r, :n].astype(np.float64)
    return {"out": out}


@fusion(reference, q=In("T G D"), k=In("T L D"), v=In("T L M"), lengths=In("T", dtype=("int32", "int64")))
def read_cache(q, k, v, lengths):
    """softmax(q·k)·v over the first positions, in float32."""
    return softmax_sum(contract(q, k, over="D"), v, over="L", upto=lengths)


WHOLE = "tile:T:1 whole:G:4 whole:D:32 whole:L:128 tile:M:16 warps:1 stages:1"
LOOPED = "tile:T:1 tile:G:4 whole:D:32 loop:L:16 tile:M:16 warps:1 stages:1"
DOTS = "tile:T:1 tile:G:16 whole:D:32 loop:L:16 tile:M:16 warps:4 stages:2"
SCHEDULES = (
    WHOLE, LOOPED, DOTS,
    "tile:T:4 tile:G:4 whole:D:32 loop:L:16 tile:M:16 warps:1 stages:1",
    "tile:T:1 tile:G:2 loop:D:8 loop:L:1 tile:M:1 warps:1 stages:1",
    "tile:T:1 tile:G:2 whole:D:32 loop:L:16 loop:M:8 warps:1 stages:1",
    "tile:T:1 tile:G:4 whole:D:32 loop:L:16 parts:L:3 tile:M:16 warps:1 stages:1",
    "tile:L.part:1 tile:T:1 tile:G:4 whole:D:32 loop:L:16 whole:M:16 warps:1 stages:1 split:L:3 then "
    "loop:L.part:1 tile:T:1 tile:G:4 tile:M:16 warps:1 stages:1",
    "tile:T:1 tile:G:4 whole:D:32 loop:L:16 parts:L:4:32 tile:M:16 warps:1 stages:1",
    "tile:L.part:1 tile:T:1 tile:G:4 whole:D:32 loop:L:16 whole:M:16 warps:1 stages:1 split:L:4:32 then "
    "loop:L.part:1 tile:T:1 tile:G:4 tile:M:16 warps:1 stages:1",
)  # fmt: skip


def given(kind="float32", length=100, ends=(0, 1, 15, 16, 17, 100, 99, -3, 1000), seed=3):
    """Rows whose elements past their length are NaN and infinite."""
    rng = np.random.default_rng(seed)
    lengths = np.array(ends, np.int32)
    made = {n: rng.standard_normal((len(ends), *shape)).astype(np.float32) for n, shape in
            (("q", (3, 20)), ("k", (length, 20)), ("v", (length, 12)))}  # fmt: skip
    past = np.arange(length)[None] >= np.clip(lengths, 0, length)[:, None]
    made["k"][past], made["v"][past] = np.nan, np.inf
    narrow = ml_dtypes.bfloat16 if kind == "bfloat16" else np.dtype(kind)
    return {n: x.astype(narrow) for n, x in made.items()} | {"lengths": lengths}


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("schedule", [*SCHEDULES, None])
def test_against_float64(schedule, kind):
    values = given(kind)
    got, made = outputs(read_cache, values, schedule)
    tolerance = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 2e-2}[kind]
    np.testing.assert_allclose(got["out"], reference(**values)["out"], rtol=tolerance, atol=tolerance)
    dots = [op for op, _ in t.walk(made.programs[0].body) if isinstance(op, t.Dot)]
    assert len(dots) == (2 if schedule == DOTS else 0) or schedule is None


def bits(x):
    return x.view({2: np.int16, 4: np.int32}[x.itemsize])


@pytest.mark.parametrize("pair", [SCHEDULES[-4:-2], SCHEDULES[-2:]])
def test_parts_and_a_split_give_the_same_bits(pair):
    parts, split = (outputs(read_cache, given("float16"), s)[0]["out"] for s in pair)
    np.testing.assert_array_equal(bits(parts), bits(split))


@pytest.mark.parametrize("schedule", [LOOPED, DOTS])
def test_bits_do_not_depend_on_other_rows_or_on_capacity(schedule):
    values = given("bfloat16")
    many = outputs(read_cache, values, schedule)[0]["out"]
    wide = {n: np.concatenate([x, np.full_like(x, np.nan)], 1) if n in "kv" else x for n, x in values.items()}
    wide["lengths"] = np.clip(values["lengths"], 0, 100)
    np.testing.assert_array_equal(bits(many), bits(outputs(read_cache, wide, schedule)[0]["out"]))
    for r in range(len(many)):
        alone = outputs(read_cache, {n: x[r : r + 1] for n, x in values.items()}, schedule)[0]["out"]
        np.testing.assert_array_equal(bits(many[r : r + 1]), bits(alone))


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("implementation", implementations())
def test_within_the_bound(implementation, kind):
    """The bound allows for weights that are rounded against a running maximum, and for no more."""
    check(implementation, Call(read_cache, given(kind)))


@pytest.mark.parametrize("implementation", implementations())
def test_scores_far_apart_and_infinite(implementation):
    """Scores that no exponential of theirs alone would survive; -inf among them, and nothing but -inf."""
    values = given("float32", ends=(100, 100, 60, 40))
    values["q"][:, :, 0], values["k"][:, :, 0] = 1000, np.arange(100)[None] * np.where(np.arange(4) % 2, 1, -1)[:, None]
    values["k"][2, 10:50, 0] = -np.inf
    values["k"][3, :, 0] = -np.inf
    values["v"][2:] = np.where(np.isfinite(values["v"][2:]), values["v"][2:], 0)
    expected = reference(**values)["out"]
    expected[3] = 0
    got = run(implementation, Call(read_cache, values)).outputs["out"]
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-4)
