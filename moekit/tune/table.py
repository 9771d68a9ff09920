"""Tuned schedules per GPU: JSON tables in the package, by what a graph computes and a class of rows that changes no result."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

from moekit.compile.heuristic import heuristic, tokens_class
from moekit.compile.schedule import Schedule, legal
from moekit.lang.graph import Graph


def device_key(device: str) -> str:
    """The name of a device's table: `NVIDIA H200` → `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def graph_key(graph: Graph, tokens: int | None = None) -> str:
    """What a table's row is found by: the fusion, its static sizes, its operands' dtypes, and the class of a GEMM's rows."""
    sizes = " ".join(f"{a}={s}" for a, s in sorted(graph.axes.items()) if s is not None)
    dtypes = " ".join(f"{t.name}:{t.dtype}" for t in graph.inputs())
    rows = f" T>={tokens}" if tokens else ""
    return f"{graph.name} {sizes} {dtypes}{rows}"


@lru_cache(maxsize=16)
def table(device: str) -> dict[str, str]:
    """The shipped table of a device: graph key → schedule; empty for a device nobody has tuned for."""
    path = resources.files("moekit.tune") / "tables" / f"{device_key(device)}.json"
    return json.loads(path.read_text())["schedules"] if path.is_file() else {}


def scheduled(device: str, graph: Graph, sizes: Mapping[str, int]) -> Schedule | None:
    """The schedule of a call: the table's, else the heuristic's for its number of rows; None where that does not matter."""
    tokens = tokens_class(graph, sizes)
    return tuned(device, graph, tokens) or (heuristic(graph, tokens) if tokens else None)


def tuned(device: str, graph: Graph, tokens: int | None = None) -> Schedule | None:
    """The tuned schedule for a graph on a device, None where there is none (the heuristic then decides)."""
    text = table(device).get(graph_key(graph, tokens))
    if text is None:
        return None
    schedule = Schedule.parse(text)
    return schedule if legal(graph, schedule) is None else None
