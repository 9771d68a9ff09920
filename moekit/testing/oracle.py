"""The oracle of one set of operand values: what every implementation's outputs are held to, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from moekit.lang.dtypes import is_float, round_to
from moekit.lang.fusion import Fusion
from moekit.lang.graph import COMPARE, Graph
from moekit.testing.bounds import graph_bounds
from moekit.testing.case import FuzzCase
from moekit.testing.compare import Judgement, reference_of
from moekit.testing.constants import DEFAULT, constant
from moekit.testing.propagate import TINY

EXACT = frozenset({"read", "const", "iota", "extent", "add", "sub", "mul", "neg", "abs", "maximum", "minimum", "reduce",
                   "contract", "cumsum", "where", "cast", "eq", "ne", "lt", "le", "gt", "ge", "and", "or"})  # fmt: skip
EXACT_SUM = 2.0**24


@dataclass(frozen=True)
class Standard:
    """What an implementation that is not moekit's is held to: values and bound of `declaration` (None: the fusion's own), which
    has the roundings that it documents, and a constant that is not moekit's. `wrong` judges outputs of integers that may differ
    from the reference's: by name, (operands, wanted, got) -> where it is wrong.
    """

    declaration: Fusion | None = None
    constant: float = DEFAULT
    wrong: Mapping[str, Callable[..., np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Oracle:
    """The reference's outputs for a case's values, and how far each implementation may be from them."""

    case: FuzzCase
    values: Mapping[str, np.ndarray]
    want: Mapping[str, np.ndarray]
    factor: float
    judgements: Mapping[str, Judgement]
    exact: Mapping[str, np.ndarray] = field(default_factory=dict)
    wrong: Mapping[str, Callable[..., np.ndarray]] = field(default_factory=dict)
    chosen: Mapping[str, np.ndarray] = field(default_factory=dict)  # integers as they come of operands that read as zero

    @classmethod
    def of(
        cls, case: FuzzCase, implementation: str | None = None, standard: Standard | None = None,
        values: Mapping[str, np.ndarray] | None = None,
    ) -> Oracle:  # fmt: skip
        """The oracle of a case: by the fusion's own declaration, or by the standard that a peer is held to.

        `values`: other operands than the case's own.
        """
        fusion, values = (standard and standard.declaration) or case.declaration, values or case.values()
        graph, params = fusion.trace(case.binding), fusion.bind_params(dict(case.params))
        factor = standard.constant if standard else constant(fusion.name, implementation)
        with np.errstate(all="ignore"):
            want = reference_of(fusion)(**{n: x.copy() for n, x in values.items()}, **params)
            limits = graph_bounds(graph, values, case.extents)
            judgements = {n: Judgement.of(np.asarray(w), limits[n], factor, graph.tensors[n].dtype)
                          for n, w in want.items() if is_float(graph.tensors[n].dtype)}  # fmt: skip
        exact = _exact(graph, want) if case.recipe in ("integers", "ties") else {}
        return cls(case, values, want, factor, judgements, exact, standard.wrong if standard else {},
                   _chosen(fusion, graph, values, params))  # fmt: skip

    def problems(self, outputs: Mapping[str, np.ndarray]) -> tuple[list[str], float]:
        """One sentence per output that is out of bounds, and the worst ratio of any."""
        found, worst, name = [], 0.0, self.case.fusion
        for n, want in self.want.items():
            got, dtype = outputs[n], self.case.graph.tensors[n].dtype
            if (got.shape, got.dtype.name) != (np.shape(want), dtype):
                found.append(f"{name}: {n} is {got.dtype.name}{list(got.shape)}; it must be {dtype}{list(np.shape(want))}")
                continue
            with np.errstate(all="ignore"):
                ratio, bad = self.judgements[n](got) if n in self.judgements else (0.0, got != want)
                if n in self.wrong:
                    bad = self.wrong[n](self.values, want, got)
                if n in self.chosen:
                    bad = bad & (got != self.chosen[n])
                if n in self.exact:
                    bad = bad | (got.astype(np.float64) != self.exact[n])
            worst = max(worst, ratio)
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                found.append(f"{name}: {n}{list(at)} is {got[at]}, the reference says {want[at]}; "
                             f"{int(bad.sum())} of {bad.size} elements are out of bounds")  # fmt: skip
        return found, worst


def _exact(graph: Graph, want: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs that sums and products of small integers (or quarters) determine bit by bit, in any order of addition."""
    found: dict[str, np.ndarray] = {}
    for w in graph.writes:
        dtype = graph.tensors[w.tensor].dtype
        nodes = _behind(graph, w.value)
        if is_float(dtype) and not w.ids and all(_is_exact(graph, i) for i in nodes):
            value = np.asarray(want[w.tensor], np.float64)
            if value.size and np.isfinite(value).all() and np.abs(value).max() < EXACT_SUM / 64:
                found[w.tensor] = round_to(value, dtype)
    return found


def _chosen(fusion: Fusion, graph: Graph, values: Mapping[str, np.ndarray], params: Mapping[str, object]) -> dict:
    """Outputs of integers that follow from comparisons of floats, as the reference has them where subnormal operands read as
    zero: XLA on a CPU compares them so, and of a row of subnormals the first element is its largest. Bits, as of a router's
    keys, never read as zero.
    """
    compared = [w.tensor for w in graph.writes if not is_float(graph.tensors[w.tensor].dtype) and _compares(graph, w.value)]
    read = {n: np.where(np.abs(x) < TINY, np.zeros_like(x), x) if is_float(x.dtype.name) else x for n, x in values.items()}
    if not compared or all(read[n].tobytes() == x.tobytes() for n, x in values.items()):
        return {}
    with np.errstate(all="ignore"):
        found = reference_of(fusion)(**read, **params)
    return {n: np.asarray(found[n]) for n in compared}


def _compares(graph: Graph, value: int) -> bool:
    """Whether two floats (not one with itself, which is a test for NaN) are compared on the way to a value."""
    nodes = [graph.nodes[i] for i in _behind(graph, value)]
    return any(n.op in COMPARE and len(set(n.args)) == 2 and is_float(graph.nodes[n.args[0]].dtype) for n in nodes)


def _behind(graph: Graph, node: int) -> set[int]:
    seen: set[int] = set()
    stack = [node]
    while stack:
        if (i := stack.pop()) not in seen:
            seen.add(i)
            stack.extend(graph.nodes[i].args)
    return seen


def _is_exact(graph: Graph, i: int) -> bool:
    """Whether an operation on integers below 2^8 stays exact: a constant must be an integer, and only the last cast narrows."""
    node = graph.nodes[i]
    if node.op == "const":
        return float(node.attr("value")).is_integer()
    narrow = node.op == "cast" and node.dtype in ("float16", "bfloat16") and any(i in n.args for n in graph.nodes)
    return node.op in EXACT and not narrow
