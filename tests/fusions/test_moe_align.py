"""moe_align in every implementation: the tables that grouped experts go by, exactly."""

import numpy as np
import pytest

from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, row_classes
from moekit.compile.tile.interpret import run as execute
from moekit.compile.tile.layouts import contiguous
from moekit.errors import ShapeError
from moekit.fusions.moe_align import moe_align
from moekit.jax import moe_align as in_jax
from moekit.testing import Call, implementations, run


def tables(ids, experts, block):
    """What moe_align makes, from a stable sort."""
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    order = order[(flat[order] >= 0) & (flat[order] < experts)]
    counts = np.bincount(flat[order].astype(np.int64), minlength=experts)
    used = -(-counts // block)
    blocks = flat.size // block + (min(experts, flat.size) if block > 1 else 0)
    chosen, pairs = np.full(blocks, -1, np.int32), np.full((blocks, block), -1, np.int32)
    chosen[: used.sum()] = np.repeat(np.arange(experts), used)
    first = np.repeat((np.cumsum(used) - used) * block - (np.cumsum(counts) - counts), counts)
    pairs.reshape(-1)[first + np.arange(order.size)] = order
    return {"pairs": pairs, "chosen": chosen}


def ids_of(kind, tokens, k, experts, dtype="int32"):
    """Distinct experts for each token, one for all, few of many, or ids of which some are no expert's."""
    rng = np.random.default_rng([tokens, k, experts])
    if kind == "distinct":
        ids = np.array([rng.permutation(experts)[:k] for _ in range(tokens)]).reshape(tokens, k)
    elif kind == "one":
        ids = np.full((tokens, k), experts - 1)
    elif kind == "few":
        ids = rng.choice([0, experts // 2], (tokens, k))
    else:
        ids = rng.choice([-1, -(2**31), experts, 2**31 - 1, 0, 1, experts - 1], (tokens, k))
    return ids.astype(dtype)


CALLS = [
    ("distinct", 0, 2, 4, 16), ("distinct", 1, 1, 1, 16), ("distinct", 3, 10, 70, 16), ("distinct", 64, 10, 50, 16),
    ("one", 33, 3, 9, 8), ("few", 40, 2, 300, 4), ("outside", 19, 4, 6, 4), ("distinct", 70, 4, 8, 64),
    ("distinct", 20, 3, 9, 1),
]  # fmt: skip


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize(("kind", "tokens", "k", "experts", "block"), CALLS)
def test_against_a_stable_sort(implementation, kind, tokens, k, experts, block):
    ids = ids_of(kind, tokens, k, experts)
    expected = tables(ids, experts, block)
    got = run(implementation, Call(moe_align, {"ids": ids}, {"experts": experts, "block": block}))
    assert got.problems == ()
    for name, x in expected.items():
        np.testing.assert_array_equal(got.outputs[name], x)
        np.testing.assert_array_equal(moe_align.reference(ids, experts, block)[name], x)


@pytest.mark.parametrize("implementation", implementations(("interpret", "numpy", "eager", "triton")))
def test_wide_ids_of_no_expert(implementation):
    """2**32 is not 0. (JAX has no int64 here, and refuses what does not fit.)"""
    ids = np.array([[2**32, 1], [1, -(2**32) + 1]])
    got = run(implementation, Call(moe_align, {"ids": ids}, {"experts": 3, "block": 2})).outputs
    np.testing.assert_array_equal(got["pairs"], [[1, 2], [-1, -1], [-1, -1], [-1, -1], [-1, -1]])


@pytest.mark.parametrize("layout", ["padded", "strided", "transposed padded", "shifted"])
def test_any_strides(layout):
    ids = ids_of("distinct", 21, 3, 11)
    call = Call(moe_align, {"ids": ids}, {"experts": 11, "block": 4}, dict.fromkeys(("ids", "pairs", "chosen"), layout))
    got = run("interpret", call)
    assert got.problems == ()
    for name, x in tables(ids, 11, 4).items():
        np.testing.assert_array_equal(got.outputs[name], x)


MANY = [("distinct", 70, 520), ("one", 130, 100), ("outside", 130, 100), ("few", 52, 9), ("distinct", 830, 20)]


@pytest.mark.parametrize(("kind", "tokens", "experts"), MANY)
def test_many_pairs_and_experts(kind, tokens, experts):
    """Several chunks, the last one not full, and more of them than a turn has; the order of programs does not matter."""
    ids = ids_of(kind, tokens, 10, experts)
    binding = moe_align.bind({"ids": ids.shape}, {"ids": "int32"}, moe_align.bind_params({"experts": experts, "block": 16}))
    graph, sizes, expected = moe_align.trace(binding), dict(binding.sizes), tables(ids, experts, 16)
    made = plan(graph, None, contiguous(graph, sizes))
    for backwards in (False, True):
        out = {n: np.full_like(x, 77) for n, x in expected.items()}
        execute(made, {"ids": ids, **out}, sizes, backwards)
        for name, x in expected.items():
            np.testing.assert_array_equal(out[name], x)


def test_one_plan_for_every_number_of_tokens():
    """Four launches, with the same text whatever T is."""
    binds = [moe_align.bind({"ids": (n, 10)}, {"ids": "int32"}, {"experts": 512, "block": 16}) for n in (1, 4096)]
    graphs = [moe_align.trace(b) for b in binds]
    assert graphs[0] is graphs[1]
    assert row_classes(graphs[0]) == (0,)
    stages = [text.rpartition("stage:")[2] for text in str(heuristic(graphs[0])).split(" then ")[:-1]]
    assert stages == ["counted,rank", "counts,before", "order,filled"]
    assert [dict(b.sizes)["B"] for b in binds] == [10, 40960 // 16 + 512]


def test_the_most_experts():
    """1024 of them, as arrays: programs of so many are the same."""
    ids = ids_of("distinct", 30, 10, 1024)
    got = run("numpy", Call(moe_align, {"ids": ids}, {"experts": 1024, "block": 16})).outputs
    for name, x in tables(ids, 1024, 16).items():
        np.testing.assert_array_equal(got[name], x)
    binding = moe_align.bind({"ids": ids.shape}, {"ids": "int32"}, {"experts": 1024, "block": 16})
    assert "whole:F:1024" in str(heuristic(moe_align.trace(binding)))


@pytest.mark.parametrize(
    ("params", "said"), [((0,), "experts = 0; there must be 1 or more"), ((4, 0), "block = 0; blocks have 1 pair or more")]
)
def test_parameters_that_no_call_has(params, said):
    with pytest.raises(ShapeError, match=said):
        in_jax(np.zeros((2, 2), np.int32), *params)


def test_what_may_be_empty_is_said_of_the_callers_axes():
    torch, torch_face = pytest.importorskip("torch"), pytest.importorskip("moekit.torch")
    with pytest.raises(ShapeError, match=r"axis K must have an element; only T may be 0$"):
        torch_face.moe_align(torch.zeros(2, 0, dtype=torch.int32), 4)
