"""bench/ways_jax.py: its rows as the table that `pallas` goes by; test_smoke.py measures some."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from bench.ways_jax import CASES, Chain, end
from moekit.backends.mosaic import unprinted
from moekit.tune import way as ways
from moekit.tune.table import graph_key
from moekit.tune.way import LAYOUTS, MOSAIC, TRITON


def test_rows_become_a_table(tmp_path, monkeypatch):
    """What is won is chosen; what was there of others stays. A layout with another number's bits, or with a time that is
    missing at some number of tokens, is none of them."""
    case = CASES[0]
    graph, path = case.graph("float32"), tmp_path / "table.json"
    key, cut = graph_key(graph), "silu_and_mul I=8"
    rows = [
        {"T": t, "every": [1, 64], "side": side, "layout": layout, "key": key, "us": us * t, "first": "a"}
        for t in (64, 1)
        for layout in LAYOUTS
        for side, us in ((TRITON, 2.0), (MOSAIC, 1.5))
    ]
    rows += [{**row, "key": cut, "first": str(row["T"])} for row in rows if row["layout"] == "whole"]
    rows += [{**row, "key": cut} for row in rows if row["layout"] == "columns" and (row["T"] == 1) == (row["side"] == MOSAIC)]
    path.write_text(json.dumps({"entries": {"silu_and_mul I=9": {}}}))
    head = {"device": "NVIDIA H200", "versions": {"jax": ways._jax(), "triton": "3.6.0"}}
    said = end(head | {"rows": rows, "table": str(path)})
    assert said == "\n".join(f"other bits: {cut} whole {way}" for way in (TRITON, MOSAIC))
    made = json.loads(path.read_text())
    assert made["entries"] == {
        key: {layout: {"T": [1, 64], TRITON: [2.0, 128.0], MOSAIC: [1.5, 96.0]} for layout in LAYOUTS},
        "silu_and_mul I=9": {},
    }
    monkeypatch.setattr(ways, "_shipped", lambda: {made["gpu"]: made})
    ways.table.cache_clear()
    assert ways.way("NVIDIA H200", graph) == MOSAIC
    ways.table.cache_clear()


def test_a_call_has_its_operands_in_their_order():
    """Under jit, too, which sorts a dict's keys: of any case, calls are of the declared shapes."""
    for case in CASES:
        given = {n: jnp.zeros(x.shape, x.dtype) for n, x in small(case).operands("float32", 2).items()}
        jax.eval_shape(Chain(small(case), "xla", "whole").one, given)


def small(case):
    """A case with few of everything."""
    sizes = {a: min(n, 8) if a not in ("R", "N", "Dv", "H?") else n for a, n in case.sizes.items()}
    sizes |= {"E": 16} if case.fusion == "topk_softmax" else {}
    return replace(case, sizes=sizes, tokens=(1, 2))


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.fusion} {' '.join(map(str, c.sizes.values()))}")
def test_every_case_is_printed(case):
    """For Mosaic GPU, in every dtype that it says; what is updated is an operand."""
    for dtype in case.printed:
        graph = case.graph(dtype)
        assert unprinted(graph, {a: 2 for a, n in graph.axes.items() if n is None}) is None
    assert {*case.updated} <= {n for n, x in graph.tensors.items() if x.role == "InOut"}
    assert Chain(case, MOSAIC, "whole").layout in LAYOUTS
