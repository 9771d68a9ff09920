"""How far a side's outputs are from float64, on the first and last rows of a call."""

from __future__ import annotations

import functools

import numpy as np
import torch

from bench.cases import Case, Operands
from bench.sides import EPS, Maker
from moekit.fusions import FUSIONS
from moekit.lang.dtypes import is_float, numpy_dtype
from moekit.testing.bounds import bounds
from moekit.testing.compare import ulp
from moekit.testing.constants import constant
from moekit.testing.propagate import Bound

ROWS = 4  # so many from either end


def copied(operands: Operands) -> Operands:
    """The same numbers with the same strides in memory of their own."""
    return {n: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x) for n, x in operands.items()}


def ends(x: torch.Tensor) -> torch.Tensor:
    """The first and last rows."""
    return x if x.shape[0] <= 2 * ROWS else torch.cat([x[:ROWS], x[-ROWS:]])


def array(x: torch.Tensor) -> np.ndarray:
    """A tensor as numpy, bfloat16 included."""
    if x.dtype.is_floating_point:
        return x.double().cpu().numpy().astype(numpy_dtype(str(x.dtype).removeprefix("torch.")))
    return x.cpu().numpy()


class Checker:
    """One set of operands of a case, and what float64 makes of it, computed once for all sides."""

    def __init__(self, case: Case, operands: Operands):
        self.case, self.operands = case, operands

    def __call__(self, make: Maker) -> dict[str, float]:
        """What to write beside a time: `error` in units of the bound, or `relative` to the norm; `ids`: the share of rows."""
        got = make(copied(self.operands))()
        if got is None:
            return {}
        got = [ends(x) for x in (got if isinstance(got, (tuple, list)) else (got,))]
        bounded = self.case.fusion in FUSIONS and not (self.case.fusion == "gate_gemm" and len(got) == 3)
        return self._within_bound(got) if bounded else self._relative(got)

    @functools.cached_property
    def _bounded(self) -> tuple[dict[str, np.ndarray], dict[str, Bound]]:
        """The reference's outputs and their bounds."""
        fusion = FUSIONS[self.case.fusion]
        by_row = [n for n, spec in fusion.tensors.items() if spec.dims[0].text == "T"]
        inputs = {n: array(ends(x) if n in by_row else x) for n, x in self.operands.items()}
        params = fusion.bind_params(dict(self.case.params))
        with np.errstate(all="ignore"):
            return fusion.reference(**inputs, **params), bounds(fusion, inputs, params)

    def _within_bound(self, got: list[torch.Tensor]) -> dict[str, float]:
        """The largest error over the fusion's bound, and how many rows have the reference's ids."""
        wanted, limits = self._bounded
        found: dict[str, float] = {"error": 0.0}
        for (name, want), value in zip(wanted.items(), map(array, got), strict=True):
            if not is_float(value.dtype.name):
                found["ids"] = float((value == want).all(-1).mean())
                continue
            allowed = 0.5 * ulp(want, value.dtype.name) + limits[name].error(constant(self.case.fusion, None))
            found["error"] = max(found["error"], float((np.abs(value.astype(np.float64) - want) / allowed).max()))
        return found

    @functools.cached_property
    def _products(self) -> list[torch.Tensor]:
        return reference(self.case, self.operands)

    def _relative(self, got: list[torch.Tensor]) -> dict[str, float]:
        """The largest ‖out − reference‖ / ‖reference‖ of the floats, and how many rows choose the reference's experts."""
        found = {"relative": 0.0}
        for want, value in zip(self._products, got, strict=True):
            if not value.dtype.is_floating_point:
                found["ids"] = float((value.sort(-1)[0] == want.sort(-1)[0]).all(-1).double().mean())
                continue
            found["relative"] = max(found["relative"], float((value.double() - want).norm() / want.norm()))
        return found


def reference(case: Case, operands: Operands) -> list[torch.Tensor]:
    """Products with a gate's weight in float64, of rows rounded where the model rounds them."""
    rows = {n: ends(x) if n in ("x", "residual") else x for n, x in operands.items()}
    x, before = rows["x"].double(), []
    if case.fusion == "gate_block":
        total = (x + rows["residual"].double()).to(rows["x"].dtype)
        t = total.double()
        x = t * torch.rsqrt(t.pow(2).mean(-1, keepdim=True) + EPS) * (1 + rows["weight"].double())
        x, before = x.to(total.dtype).double(), [t]
    gate_up, logits, gate = (x @ w.double().T for w in rows["packed"][: sum(case.widths)].split(list(case.widths)))
    first, second = gate_up.chunk(2, -1)
    active = torch.nn.functional.silu(first) * second
    if case.fusion == "gate_gemm":
        return [gate_up, logits, gate]
    if case.fusion == "gate_epilogue":
        return [active, logits, gate.sigmoid()]
    values, ids = torch.topk(logits.softmax(-1), int(case.params["k"]))
    return [*before, active, values / values.sum(-1, keepdim=True), ids, gate]
