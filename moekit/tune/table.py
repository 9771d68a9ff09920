"""Tuned schedules per GPU: JSON tables in the package, looked up by what a graph computes, never by a dynamic size."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from importlib import resources

from moekit.compile.schedule import Schedule, legal
from moekit.lang.graph import Graph


def device_key(device: str) -> str:
    """The name of a device's table: `NVIDIA H200` → `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def graph_key(graph: Graph) -> str:
    """What a table's row is found by: the fusion, its static sizes and its operands' dtypes."""
    sizes = " ".join(f"{a}={s}" for a, s in sorted(graph.axes.items()) if s is not None)
    dtypes = " ".join(f"{t.name}:{t.dtype}" for t in graph.inputs())
    return f"{graph.name} {sizes} {dtypes}"


@lru_cache(maxsize=16)
def table(device: str) -> dict[str, str]:
    """The shipped table of a device: graph key → schedule; empty for a device nobody has tuned for."""
    path = resources.files("moekit.tune") / "tables" / f"{device_key(device)}.json"
    return json.loads(path.read_text())["schedules"] if path.is_file() else {}


def tuned(device: str, graph: Graph) -> Schedule | None:
    """The tuned schedule for a graph on a device, None where there is none (the heuristic then decides)."""
    text = table(device).get(graph_key(graph))
    if text is None:
        return None
    schedule = Schedule.parse(text)
    return schedule if legal(graph, schedule) is None else None
