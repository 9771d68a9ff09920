"""How far a side's outputs are from float64, on the first and last rows of a call."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from bench.cases import Case, Operands
from bench.sides import Maker
from moekit.fusions import FUSIONS, topk_softmax
from moekit.lang.dtypes import is_float, numpy_dtype
from moekit.testing.bounds import bounds
from moekit.testing.constants import constant
from moekit.testing.oracle import ulp
from moekit.testing.propagate import Bound

ROWS = 4  # so many from either end
SEVERAL = ("gate_block",)  # cases of several fusions in a row


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
        self.case, self.operands, self.own = case, copied(operands), case.fusion not in SEVERAL
        self.fusion = FUSIONS[case.fusion if self.own else "gate_projections"]

    def __call__(self, make: Maker) -> dict[str, float]:
        """What to write beside a time. `relative`: the largest ‖out − reference‖ / ‖reference‖ of its outputs.

        `error`: the largest error in units of the bound of a fusion; several in a row have none. `ids`: the share of rows with
        the reference's.
        """
        own = self.own
        got = make(copied(self.operands))()
        got = [None if x is None else ends(x) for x in (got if isinstance(got, (tuple, list)) else (got,))]
        columns = slice(None)
        if self.case.fusion == "gate_gemm":
            got = [torch.cat(got, -1)]  # three products are its columns, but for the padding
            columns = slice(got[0].shape[-1])
        found: dict[str, float] = {}
        wanted = dict(self.expected[0] if own else self.separate)
        if self.case.k and len(got) > len(wanted):  # the router is held to what the side's own logits say
            logits = array(got[list(wanted).index("logits")])
            wanted |= topk_softmax.reference(logits, k=self.case.k, renormalize=True, nan_to_zero=False)
        for (name, want), value in zip(wanted.items(), got, strict=True):
            if value is None:
                continue
            value = array(value)
            if is_float(value.dtype.name):
                want, off = want[..., columns], value.astype(np.float64) - want[..., columns]
                found |= worse(found, "relative", np.linalg.norm(off) / np.linalg.norm(want))
                if own and name in self.expected[1]:
                    limit = self.expected[1][name].error(constant(self.case.fusion, None))[..., columns]
                    found |= worse(found, "error", (np.abs(off) / (0.5 * ulp(want, value.dtype.name) + limit)).max())
            else:  # the order of ids is that of the weights, which other roundings change
                same = value == want if own else np.sort(value, -1) == np.sort(want, -1)
                found["ids"] = float(same.all(-1).mean())
        return found

    @functools.cached_property
    def _inputs(self) -> tuple[dict[str, np.ndarray], dict]:
        """The operands, rows at the ends of those that have rows, and the static parameters."""
        by_row = [n for n, spec in self.fusion.tensors.items() if spec.dims[0].text == "T"]
        inputs = {n: array(ends(x) if n in by_row else x) for n, x in self.operands.items()}
        return inputs, self.fusion.bind_params(dict(self.case.params))

    @functools.cached_property
    def expected(self) -> tuple[dict[str, np.ndarray], dict[str, Bound]]:
        """The reference's outputs and their bounds."""
        inputs, params = self._inputs
        with np.errstate(all="ignore"):
            return self.fusion.reference(**inputs, **params), bounds(self.fusion, inputs, params)

    @functools.cached_property
    def separate(self) -> dict[str, np.ndarray]:
        """What the steps of several fusions make, the first rounded before the next, as Hugging Face does."""
        norm, gates = FUSIONS["add_rms_norm"], ("gate_up", "router", "shared_gate")
        o = {n: array(ends(x) if n in ("x", "residual") else x) for n, x in self.operands.items()}
        first = norm.reference(o["x"], o["residual"], o["weight"], **norm.bind_params({}))
        second = self.fusion.reference(first["out"].astype(o["x"].dtype), *(o[n] for n in gates))
        return {"hidden": first["out"], "residual": first["residual"], **second}


def worse(found: dict[str, float], key: str, off: float) -> dict[str, float]:
    """The larger of what was found and `off`; what is no number is infinitely wrong."""
    return {key: max(found.get(key, 0.0), math.inf if math.isnan(off) else float(off))}
