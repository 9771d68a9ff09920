"""The oracle of one set of operand values: the fusion's float64 reference and its error bound, to which outputs are held.

Integers are equal. NaN matches NaN. A float lies between the reference's value less its error and more its error, both ends
rounded to the output's dtype, so that overflow to infinity counts where rounding may bring it; where IEEE arithmetic leaves
one result only (a rounded residual), it is that one: numpy's float32 operation, then the cast, which differs from rounding the
float64 value once by at most an ulp. What is smaller than the smallest normal number may read as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from moekit.errors import MoekitError
from moekit.lang.dtypes import MANTISSA, MIN_EXPONENT, is_float, numpy_dtype, round_to
from moekit.lang.fusion import Fusion
from moekit.lang.graph import COMPARE, Graph, made_of
from moekit.testing.bounds import graph_bounds
from moekit.testing.case import Call, FuzzCase
from moekit.testing.constants import DEFAULT, constant
from moekit.testing.evaluation import TINY, Bound

EXACT = frozenset({"read", "const", "iota", "extent", "add", "sub", "mul", "neg", "abs", "maximum", "minimum", "reduce",
                   "contract", "cumsum", "where", "cast", "eq", "ne", "lt", "le", "gt", "ge", "and", "or"})  # fmt: skip
EXACT_SUM = 2.0**24
MOST_FACTORS = 3  # operands of a product whose quarters float32 still holds: 64 is 4 ** 3
EXACT_RECIPES = ("integers", "ties")


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison: one sentence per problem (none: all is well), and the worst ratio per output.

    A ratio is the error beyond rounding, in units of the estimated noise: what the constant must be at least.
    """

    problems: tuple[str, ...]
    ratios: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The largest ratio of any output."""
        return max(self.ratios.values(), default=0.0)

    def check(self) -> None:
        """Raise AssertionError with every problem, if there is one."""
        if self.problems:
            raise AssertionError("\n".join(self.problems))


def reference(fusion: Fusion, values: Mapping[str, np.ndarray], params: Mapping[str, object]) -> dict[str, np.ndarray]:
    """What the reference of a declaration gives; raises MoekitError where it has none."""
    if fusion.reference is None:
        raise MoekitError(f"{fusion.name} has no reference to be compared with; give @fusion one")
    with np.errstate(all="ignore"):
        found = fusion.reference(**{n: x.copy() for n, x in values.items()}, **params)
    return {n: np.asarray(x) for n, x in found.items()}


@dataclass(frozen=True)
class Judgement:
    """What a float output may be: computed once from the reference and its bound, and then held to any number of outputs."""

    want: np.ndarray
    low: np.ndarray
    high: np.ndarray
    flushable: np.ndarray
    allowance: np.ndarray
    noise: np.ndarray
    exact: np.ndarray | None
    excused: np.ndarray
    zeroable: np.ndarray
    unknown: np.ndarray

    @classmethod
    def of(cls, want: np.ndarray, limit: Bound, factor: float, dtype: str) -> Judgement:
        """The judgement of an output of `dtype` for which the reference says `want`."""
        tiny, want = float(ml_dtypes.finfo(numpy_dtype(dtype)).smallest_normal), want.astype(np.float64)
        reach, unknown = limit.error(factor), np.isinf(limit.noise)
        turned = np.where(want == round_to(want, dtype), _flip(limit.value, reach, dtype), 0.0)  # a tie that noise may turn
        allowance = np.maximum(np.maximum(0.5 * ulp(want, dtype), turned), _flip(limit.value, limit.flips, dtype)) + limit.flips
        reach = np.maximum(reach, turned)
        zeroable = np.zeros(()) > 0 if limit.exact is None else (np.abs(limit.exact) < tiny) | (np.abs(limit.value) < TINY)
        return cls(want, round_to(want - reach, dtype), round_to(want + reach, dtype), np.abs(want) - reach < tiny,
                   allowance, np.where(unknown, 0.0, limit.noise), limit.exact, limit.flips > 0, zeroable, unknown)  # fmt: skip

    def __call__(self, got: np.ndarray) -> tuple[float, np.ndarray]:
        """The ratio of an output, and where it is out of bounds."""
        value = got.astype(np.float64)
        flushed = (value == 0) & self.flushable
        fine = ((value >= self.low) & (value <= self.high)) | flushed | (np.isnan(self.want) & np.isnan(value))
        if self.exact is not None:
            same = (value == self.exact) | (np.isnan(value) & np.isnan(self.exact))
            fine &= same | self.excused | ((value == 0) & self.zeroable)
        beyond = np.where(flushed, 0.0, np.abs(value - self.want) - self.allowance)
        known = (self.noise > 0) & np.isfinite(beyond)
        ratio = np.where(known, beyond / np.where(known, self.noise, 1.0), 0.0)
        return max(0.0, float(ratio.max(initial=0.0))), ~(fine | self.unknown)


def _flip(value: np.ndarray, reach: np.ndarray, dtype: str) -> np.ndarray:
    """How far rounding can move when `value` is off by `reach`: nothing, away from a tie."""
    middle = round_to(value, dtype)
    ends = [round_to(value + side * reach, dtype) for side in (-1, 1)]
    return np.maximum(*(np.where(end == middle, 0.0, np.abs(end - middle)) for end in ends))


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between neighbouring numbers of `dtype` at the float64 magnitude |x|."""
    exponent = np.where(x == 0, MIN_EXPONENT[dtype], np.frexp(np.abs(x))[1])
    return np.ldexp(1.0, np.maximum(exponent - 1, MIN_EXPONENT[dtype]) - MANTISSA[dtype])


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
    judgements: Mapping[str, Judgement]
    exact: Mapping[str, np.ndarray]
    chosen: Mapping[str, np.ndarray]  # integers as they come of operands that read as zero
    standard: Standard
    unsure: Mapping[str, np.ndarray]  # where integers are any, as what they were chosen among is that near

    @classmethod
    def of(
        cls, case: FuzzCase, implementation: str | None = None, standard: Standard | None = None,
        values: Mapping[str, np.ndarray] | None = None,
    ) -> Oracle:  # fmt: skip
        """The oracle of a case: by the fusion's own declaration, or by the standard that a peer is held to.

        `values`: other operands than the case's own.
        """
        standard = standard or Standard(None, constant(case.declaration.name, implementation))
        fusion, values = standard.declaration or case.declaration, values or case.values()
        graph, params = fusion.trace(case.binding), fusion.bind_params(dict(case.params))
        want, limits = reference(fusion, values, params), graph_bounds(graph, values, case.extents)
        with np.errstate(all="ignore"):
            judgements = {n: Judgement.of(w, limits[n], standard.constant, graph.tensors[n].dtype)
                          for n, w in want.items() if is_float(graph.tensors[n].dtype)}  # fmt: skip
        exact = _exact(graph, want) if case.recipe in EXACT_RECIPES else {}
        unsure = {n: np.isinf(limits[n].noise) for n in want if n not in judgements}
        return cls(case, values, want, judgements, exact, _chosen(fusion, graph, values, params), standard, unsure)

    def compare(self, outputs: Mapping[str, np.ndarray]) -> Comparison:
        """Hold outputs to the reference."""
        found, ratios, name = [], {}, self.case.declaration.name
        if set(self.want) != set(outputs):
            found.append(f"{name}: the outputs are {sorted(outputs)}, the reference has {sorted(self.want)}")
        for n, want in self.want.items():
            if n not in outputs:
                continue
            got, dtype = np.asarray(outputs[n]), self.case.graph.tensors[n].dtype
            if (got.shape, got.dtype.name) != (want.shape, dtype):
                found.append(f"{name}: {n} is {got.dtype.name}{list(got.shape)}; it must be {dtype}{list(want.shape)}")
                continue
            with np.errstate(all="ignore"):
                ratios[n], bad = self._bad(n, want, got)
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                found.append(f"{name}: {n}{list(at)} is {got[at]}, the reference says {want[at]}; "
                             f"{int(bad.sum())} of {bad.size} elements are out of bounds")  # fmt: skip
        return Comparison(tuple(found), ratios)

    def _some(self, n: str, ids: np.ndarray) -> np.ndarray:
        """Whether ids of ranked values are elements of their axis, and each but once in its row."""
        graph = self.case.graph
        node = graph.nodes[next(w.value for w in graph.writes if w.output == n or w.tensor == n)]
        while node.op == "cast":
            node = graph.nodes[node.args[0]]
        most = self.case.extents[node.attr("axis")] if node.op == "top_k" else np.inf
        once = (ids[..., :, None] == ids[..., None, :]).sum(-1) == 1
        return (ids >= 0) & (ids < most) & once

    def _bad(self, n: str, want: np.ndarray, got: np.ndarray) -> tuple[float, np.ndarray]:
        """The ratio of an output, and where it is wrong."""
        ratio, bad = self.judgements[n](got) if n in self.judgements else (0.0, got != want)
        if n in self.unsure and self.unsure[n].any():  # some element or other, none twice
            bad = np.where(self.unsure[n], ~self._some(n, got), bad)
        if n in self.standard.wrong:
            bad = self.standard.wrong[n](self.values, want, got)
        if n in self.chosen:
            bad = bad & (got != self.chosen[n])
        if n in self.exact:
            bad = bad | (got.astype(np.float64) != self.exact[n])
        return ratio, bad


def compare(
    fusion: Fusion,
    outputs: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    params: Mapping[str, object] | None = None,
    *,
    implementation: str | None = None,
) -> Comparison:
    """Hold `outputs` to the reference of `fusion` on `inputs` (their values before any update in place)."""
    return Oracle.of(Call(fusion, inputs, params or {}), implementation).compare(outputs)


def _exact(graph: Graph, want: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs that sums and products of small integers (or quarters) determine bit by bit, in any order of addition."""
    found: dict[str, np.ndarray] = {}
    for w in graph.writes:
        dtype, value = graph.tensors[w.tensor].dtype, want[w.tensor].astype(np.float64)
        made = made_of(graph.nodes, w.value)
        exact = is_float(dtype) and not w.ids and all(_is_exact(graph, i) for i in made)
        exact = exact and _factors(graph, made) <= MOST_FACTORS
        if exact and value.size and np.isfinite(value).all() and np.abs(value).max() < EXACT_SUM / 4**MOST_FACTORS:
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
    found = reference(fusion, read, params)
    return {n: found[n] for n in compared}


def _compares(graph: Graph, value: int) -> bool:
    """Whether two floats (not one with itself, which is a test for NaN) are compared on the way to a value."""
    nodes = [graph.nodes[i] for i in made_of(graph.nodes, value)]
    return any(n.op in COMPARE and len(set(n.args)) == 2 and is_float(graph.nodes[n.args[0]].dtype) for n in nodes)


def _factors(graph: Graph, made: Iterable[int]) -> int:
    """How many operands' elements the longest product is of, on the way to a value."""
    found: dict[int, int] = {}
    for i in sorted(made):  # a value's operands stand before it
        node = graph.nodes[i]
        before = [found[a] for a in node.args]
        if node.op == "read":
            found[i] = 1  # whatever chose it
        else:
            found[i] = sum(before) if node.op in ("mul", "contract") else max(before, default=0)
    return max(found.values())


def _is_exact(graph: Graph, i: int) -> bool:
    """Whether an operation on integers below 2^8 stays exact: a constant must be an integer, and only the last cast narrows."""
    node = graph.nodes[i]
    if node.op == "const":
        return float(node.attr("value")).is_integer()
    narrow = node.op == "cast" and node.dtype in ("float16", "bfloat16") and any(i in n.args for n in graph.nodes)
    return node.op in EXACT and not narrow
