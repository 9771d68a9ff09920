"""Comparing what an implementation returned with the fusion's float64 reference, within its error bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from moekit.errors import MoekitError
from moekit.lang.dtypes import MANTISSA, MIN_EXPONENT, is_float, numpy_dtype, round_to
from moekit.lang.fusion import Fusion
from moekit.testing.bounds import graph_bounds
from moekit.testing.constants import constant
from moekit.testing.propagate import TINY, Bound


@dataclass(frozen=True)
class Comparison:
    """What came of a comparison: one sentence per problem (none: all is well), and the worst ratio per
    output.

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


def compare(
    fusion: Fusion,
    outputs: Mapping[str, np.ndarray],
    inputs: Mapping[str, np.ndarray],
    params: Mapping[str, object] | None = None,
    *,
    implementation: str | None = None,
) -> Comparison:
    """Hold `outputs` to the reference of `fusion` on `inputs` (their values before any update in place).

    Integers are equal. NaN matches NaN. A float lies between the reference's value less its error and more
    its error, both ends rounded to the output's dtype, so that overflow to infinity counts where rounding may
    bring it; where IEEE arithmetic leaves one result only (a rounded residual), it is that one: numpy's
    float32 operation, then the cast, which differs from rounding the float64 value once by at most an ulp.
    What is smaller than the smallest normal number may read as zero.
    """
    params = fusion.bind_params(params or {})
    shapes = {n: inputs[n].shape for n in fusion.tensors}
    binding = fusion.bind(shapes, {n: inputs[n].dtype.name for n in fusion.tensors}, params)
    graph = fusion.trace(binding)
    limits = graph_bounds(graph, inputs, dict(binding.sizes))
    with np.errstate(all="ignore"):
        wanted = reference_of(fusion)(**{n: inputs[n] for n in fusion.tensors}, **params)
    problems, ratios = [], {}
    if set(wanted) != set(outputs):
        problems.append(f"{fusion.name}: the outputs are {sorted(outputs)}, the reference has {sorted(wanted)}")
    for name in [n for n in wanted if n in outputs]:
        got, want, dtype = np.asarray(outputs[name]), np.asarray(wanted[name]), graph.tensors[name].dtype
        if (got.shape, got.dtype.name) != (want.shape, dtype):
            it_is, must_be = f"{got.dtype.name}{list(got.shape)}", f"{dtype}{list(want.shape)}"
            problems.append(f"{fusion.name}: {name} is {it_is}; it must be {must_be}")
            continue
        with np.errstate(all="ignore"):
            if is_float(dtype):
                ratios[name], bad = judge(got, want, limits[name], constant(fusion.name, implementation))
            else:
                ratios[name], bad = 0.0, got != want
        if bad.any():
            problems.append(f"{fusion.name}: {_first(name, got, want, bad)}")
    return Comparison(tuple(problems), ratios)


def reference_of(fusion: Fusion) -> Callable:
    """The reference of a declaration; raises MoekitError where it has none."""
    if fusion.reference is None:
        raise MoekitError(f"{fusion.name} has no reference to be compared with; give @fusion one")
    return fusion.reference


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


def judge(got: np.ndarray, want: np.ndarray, limit: Bound, factor: float) -> tuple[float, np.ndarray]:
    """The ratio of a float output, and where it is out of bounds."""
    return Judgement.of(want, limit, factor, got.dtype.name)(got)


def _flip(value: np.ndarray, reach: np.ndarray, dtype: str) -> np.ndarray:
    """How far rounding can move when `value` is off by `reach`: nothing, away from a tie."""
    middle = round_to(value, dtype)
    ends = [round_to(value + side * reach, dtype) for side in (-1, 1)]
    return np.maximum(*(np.where(end == middle, 0.0, np.abs(end - middle)) for end in ends))


def ulp(x: np.ndarray, dtype: str) -> np.ndarray:
    """The distance between neighbouring numbers of `dtype` at the float64 magnitude |x|."""
    exponent = np.where(x == 0, MIN_EXPONENT[dtype], np.frexp(np.abs(x))[1])
    return np.ldexp(1.0, np.maximum(exponent - 1, MIN_EXPONENT[dtype]) - MANTISSA[dtype])


def _first(name: str, got: np.ndarray, want: np.ndarray, bad: np.ndarray) -> str:
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    return (
        f"{name}{list(place)} is {got[place]}, the reference says {want[place]}; "
        f"{int(bad.sum())} of {bad.size} elements are out of bounds"
    )
