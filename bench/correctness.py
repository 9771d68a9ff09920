"""How far a side's outputs are from float64, on the first and last rows of a call."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from bench import layer
from bench.cases import Case, Operands
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import numpy_dtype
from moekit.testing.bounds import bounds
from moekit.testing.constants import constant
from moekit.testing.oracle import ulp

ROWS = 4  # so many from either end
Limits = Sequence[np.ndarray | None]  # what an output may be off by beside half an ulp; None where it is exact


def copied(operands: Operands) -> Operands:
    """The same numbers with the same strides in memory of their own."""
    return {n: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for n, x in operands.items()}


def array(x: Any, ends: bool = True) -> Any:
    """A tensor as numpy, bfloat16 included; `ends`: its first and last rows. What is None or numpy's stays so."""
    if x is None:
        return None
    if ends and x.shape[0] > 2 * ROWS:
        x = (torch.cat if isinstance(x, torch.Tensor) else np.concatenate)([x[:ROWS], x[-ROWS:]])
    if not isinstance(x, torch.Tensor):
        return np.asarray(x)
    if not x.dtype.is_floating_point:
        return x.cpu().numpy()
    return x.double().cpu().numpy().astype(numpy_dtype(str(x.dtype).removeprefix("torch.")))


def judge(got: Sequence[np.ndarray | None], wanted: Sequence[np.ndarray], limits: Limits | None = None) -> dict[str, float]:
    """What to write beside a time, over all outputs that a side makes.

    `relative`: the largest ‖out − reference‖ / ‖reference‖. `error`: with `limits`, the largest error in units of the bound.
    `ids`: the share of rows with the reference's, in any order where there are no limits: other roundings change it.
    """
    found = {"relative": 0.0}
    for i, (value, want) in enumerate(zip(got, wanted, strict=True)):
        if value is None:
            continue
        if value.dtype.kind == "i":
            same = value == want if limits else np.sort(value, -1) == np.sort(want, -1)
            found["ids"] = float(same.all(-1).mean())
            continue
        columns = value.shape[-1]  # three products are a padded one's columns, but for the padding
        want = want[..., :columns]
        off = value.astype(np.float64) - want
        found["relative"] = worse(found["relative"], np.linalg.norm(off) / np.linalg.norm(want))
        if limits and (limit := limits[i]) is not None:
            units = np.abs(off) / (0.5 * ulp(want, value.dtype.name) + limit[..., :columns])
            found["error"] = worse(found.get("error", 0.0), units.max())
    return found


def worse(before: float, off: float) -> float:
    """The larger of the two; what is no number is infinitely wrong."""
    return max(before, math.inf if math.isnan(off) else float(off))


class Checker:
    """One set of operands of a case, and what float64 makes of it, computed once for all sides."""

    def __init__(self, case: Case, operands: Operands):
        self.case, self.operands = case, copied(operands)

    def __call__(self, call: Callable[[Operands], Any]) -> dict[str, float]:
        """What `judge` says of a function of the operands that returns the outputs, as tensors or as numpy's arrays."""
        got = call(copied(self.operands))
        got = [array(x) for x in (got if isinstance(got, (tuple, list)) else (got,))]
        wanted, limits = self.expected
        if len(got) > len(wanted):
            got = [np.concatenate(got, -1)]  # three products are one's columns
        return judge(got, wanted, limits)

    @functools.cached_property
    def expected(self) -> tuple[list[np.ndarray], Limits | None]:
        """The reference's outputs and what they may be off by; a block is several fusions and has no bound."""
        fusion = None if self.case.part else FUSIONS[self.case.fusion]
        by_row = [n for n, spec in fusion.tensors.items() if spec.dims[0].text == "T"] if fusion else ["x", "residual"]
        inputs = {n: array(x, ends=n in by_row) for n, x in self.operands.items()}
        if fusion is None:
            return layer.reference(inputs, self.case.params["k"], self.case.part), None
        params = fusion.bind_params(dict(self.case.params))
        with np.errstate(all="ignore"):
            wanted, bound = fusion.reference(**inputs, **params), bounds(fusion, inputs, params)
        factor = constant(fusion.name, None)
        return [*wanted.values()], [bound[n].error(factor) if n in bound else None for n in wanted]
