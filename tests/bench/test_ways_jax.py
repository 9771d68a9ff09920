"""bench/ways_jax.py: its rows as the table that `pallas` goes by; test_smoke.py measures some."""

import json

import pytest

from bench.ways_jax import CASES, Chain, end
from moekit.backends.mosaic import unprinted
from moekit.tune import way as ways
from moekit.tune.table import graph_key
from moekit.tune.way import LAYOUTS, MOSAIC, TRITON


def test_rows_become_a_table(tmp_path, monkeypatch):
    """What is won is chosen; what was there of others stays; a side that failed leaves no row; other bits are said."""
    case = CASES[0]
    graph, path = case.graph("float32"), tmp_path / "table.json"
    key = graph_key(graph)
    rows = [
        {"T": t, "side": side, "layout": layout, "key": key, "us": us * t, "first": first}
        for t in (1, 64)
        for layout in LAYOUTS
        for side, us, first in ((TRITON, 2.0, "a"), (MOSAIC, 1.5, f"{layout == 'whole' and t}"))
    ]
    rows += [
        {"T": 1, "side": TRITON, "layout": "whole", "key": "silu_and_mul I=8", "us": 1.0, "first": "b"},
        {"T": 1, "side": MOSAIC, "layout": "whole", "key": "silu_and_mul I=8", "problem": "no"},
    ]
    path.write_text(json.dumps({"entries": {"silu_and_mul I=9": {}}}))
    head = {"device": "NVIDIA H200", "versions": {"jax": ways._jax(), "triton": "3.6.0"}}
    assert end(head | {"rows": rows, "table": str(path)}) == f"other bits: {key} whole {MOSAIC}"
    made = json.loads(path.read_text())
    assert made["entries"] == {
        key: {layout: {"T": [1, 64], TRITON: [2.0, 128.0], MOSAIC: [1.5, 96.0]} for layout in LAYOUTS},
        "silu_and_mul I=8": {},
        "silu_and_mul I=9": {},
    }
    monkeypatch.setattr(ways, "_shipped", lambda: {made["gpu"]: made})
    ways.table.cache_clear()
    assert ways.way("NVIDIA H200", graph) == MOSAIC
    ways.table.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.fusion} {' '.join(map(str, c.sizes.values()))}")
def test_every_case_is_printed(case):
    """For Mosaic GPU, in every dtype; what is updated is an operand."""
    for dtype in ("bfloat16", "float32", "float16"):
        graph = case.graph(dtype)
        assert unprinted(graph, {a: 2 for a, n in graph.axes.items() if n is None}) is None
    assert {*case.updated} <= {n for n, x in graph.tensors.items() if x.role == "InOut"}
    assert Chain(case, MOSAIC, "whole").layout in LAYOUTS
