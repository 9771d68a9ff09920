"""Tuned schedules per GPU: JSON tables in the package, by what a graph computes and how many rows it has.

An entry holds for the kernels that were timed and for no others. It carries a hash of their text, the tuned ones' and the
heuristic's that they were compared with; where the compiler writes one of them otherwise today, where a schedule is no longer
legal, or where the schedules of two numbers of rows would not add up in the same order, the heuristic decides. So does it where
another Triton compiles.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources
from math import isqrt

from moekit.backends import triton as emitter
from moekit.compile.plan import Plan, plan
from moekit.compile.rules import class_axis, heuristic, row_classes
from moekit.compile.rules.order import Order, order
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.facts import once
from moekit.compile.schedule.legal import legal
from moekit.compile.tile.layouts import contiguous
from moekit.errors import MoekitError
from moekit.lang.graph import Graph

EDGES = (1, 17, 128, 512, 2048, 8192)
MEASURED = (1, 16, 64, 256, 1024, 4096, 16384)


def buckets(graph: Graph) -> dict[int, tuple[int, ...]]:
    """The least number of rows of each bucket of a graph, and the numbers at which schedules for it are timed.

    No class of the heuristic's (`row_classes`) is in two of them, nor two classes in one.
    """
    edges = sorted({*EDGES, *row_classes(graph)} - {0})
    ends = [*edges[1:], 2 * max(MEASURED[-1], edges[-1])]
    inside = {low: tuple(m for m in MEASURED if low <= m < end) for low, end in zip(edges, ends, strict=True)}
    return {low: inside[low] or (isqrt(low * end),) for low, end in zip(edges, ends, strict=True)}


@dataclass(frozen=True)
class Entry:
    """What a table says of one graph: a schedule for each bucket, by its least number of rows, but for those left to the

    heuristic; and the hash of the kernels that were timed.
    """

    schedules: Mapping[int, Schedule]
    kernels: str

    @classmethod
    def parse(cls, data: Mapping) -> Entry:
        """Read what `to_json` makes."""
        return cls({int(rows): Schedule.parse(text) for rows, text in data["schedules"].items()}, data["kernels"])

    def to_json(self) -> dict:
        """As it stands in a table."""
        return {"kernels": self.kernels, "schedules": {str(rows): str(s) for rows, s in sorted(self.schedules.items())}}


def device_key(device: str) -> str:
    """The name of a device's table: `NVIDIA H200` → `nvidia_h200`."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def graph_key(graph: Graph) -> str:
    """What a table's row is found by: the fusion, its static sizes and its operands' dtypes."""
    sizes = " ".join(f"{a}={s}" for a, s in sorted(graph.axes.items()) if s is not None)
    dtypes = " ".join(f"{t.name}:{t.dtype}" for t in graph.inputs())
    return f"{graph.name} {sizes} {dtypes}"


def rows_axis(graph: Graph) -> str | None:
    """The one dynamic axis, None for a graph with none or several: that is never tuned."""
    dynamic = [a for a, s in graph.axes.items() if s is None]
    return dynamic[0] if len(dynamic) == 1 else None


def bucket(edges: Iterable[int], rows: int) -> int:
    """The least number of rows of the bucket that `rows` is in; `edges`: those of all buckets."""
    return max((least for least in edges if least <= rows), default=1)


@lru_cache(maxsize=16)
def table(device: str) -> Mapping[str, Mapping]:
    """The shipped table of a device by graph key; empty for a device nobody has tuned for, and under another Triton."""
    path = resources.files("moekit.tune") / "tables" / f"{device_key(device)}.json"
    if not path.is_file():
        return {}
    made = json.loads(path.read_text(encoding="utf-8"))
    return made["entries"] if made["made with"]["triton"] == _triton() else {}


def _triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def scheduled(device: str, graph: Graph, sizes: Mapping[str, int]) -> Schedule:
    """The schedule of a call on a device: the table's, else the heuristic's for its number of rows."""
    return tuned(device, graph, sizes) or untuned(graph, sizes)


def untuned(graph: Graph, sizes: Mapping[str, int]) -> Schedule:
    """The heuristic's schedule for a number of rows.

    All classes of rows take it of the declaration: of a form of it (a tensor updated elsewhere) it may cut the sums otherwise.
    """
    return heuristic(graph, sizes.get(class_axis(graph) or "", 0))


def serves(graph: Graph, form: Graph) -> bool:
    """Whether a form of a declaration (a tensor updated elsewhere, an output over an operand) can take all its schedules.

    Else it has its own for every number of rows: some of either would add up in different orders.
    """
    return form is graph or not any(legal(form, heuristic(graph, least)) for least in row_classes(graph))


def tuned(device: str, graph: Graph, sizes: Mapping[str, int]) -> Schedule | None:
    """The table's schedule for a graph on a device, None where there is none that holds (the heuristic then decides)."""
    known = table(device)
    if not known or (axis := rows_axis(graph)) is None or (key := graph_key(graph)) not in known:
        return None
    serving = _in_force(device, key, known[key], graph)
    return serving[bucket(serving, sizes[axis])]


_checked: dict[tuple[str, str, str], Mapping[int, Schedule | None]] = {}


def _in_force(device: str, key: str, data: Mapping, graph: Graph) -> Mapping[int, Schedule | None]:
    """The schedule of each bucket by an entry, None where it has none or does not hold; looked at once per graph."""
    known = device, key, graph.digest()
    if known not in _checked:
        entry = Entry.parse(data)
        said = {} if stale(graph, entry) else entry.schedules
        _checked[known] = {least: said.get(least) for least in buckets(graph)}
    return _checked[known]


def stale(graph: Graph, entry: Entry) -> str | None:
    """None if an entry holds for a graph as the compiler is today, else one sentence saying why not."""
    if any(why := legal(graph, s) for s in entry.schedules.values()):
        return why
    try:
        kernels, orders = kernels_of(graph, entry.schedules)
    except MoekitError as error:
        return str(error)
    if kernels != entry.kernels:
        return f"{graph.name}: the kernels are not those that were timed; run `moekit tune {graph.name}` on the GPU again"
    if len(orders) > 1:
        return f"{graph.name}: the schedules of its buckets do not add up in the same order"
    return None


def kernels_of(graph: Graph, schedules: Mapping[int, Schedule]) -> tuple[str, set[Order]]:
    """A hash of the text of all kernels that an entry stands for, and in which orders those that would run add up.

    They are the tuned ones, and the heuristic's of every bucket: it was they that the tuned ones were faster than.
    """
    usual = {least: heuristic(graph, least) for least in buckets(graph)}
    plans = {s: _contiguous(graph, s) for s in (*usual.values(), *schedules.values())}
    texts = {text for planned in plans.values() for text in _texts(planned)}
    orders = {order(plans[s].programs) for s in (usual | dict(schedules)).values()}
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:16], orders


@once
def order_of(graph: Graph, schedule: Schedule) -> Order:
    """In which order a schedule adds up."""
    return order(_contiguous(graph, schedule).programs)


def _contiguous(graph: Graph, schedule: Schedule) -> Plan:
    return plan(graph, schedule, contiguous(graph, {a: 8 for a, s in graph.axes.items() if s is None}))


def _texts(planned: Plan) -> set[str]:
    """What is launched, without the line on top: it says how the graph is written down, which is no part of a kernel."""
    launches = zip(planned.schedule.launches, planned.programs, strict=True)
    return {f"{launch.dependent} {p.warps} {p.stages}\n{emitter.emit(p).partition(chr(10))[2]}" for launch, p in launches}
