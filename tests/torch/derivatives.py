"""Derivatives of the numpy references, by differences in float64: what those of PyTorch are held to."""

import numpy as np
import torch

from moekit.fusions import FUSIONS


class Differences:
    """A fusion along the line x + s·v of its float operands: outputs, and first and second derivatives at s = 0.

    The scalar that is differentiated twice is the sum of all float outputs, each times a random `weights`.
    """

    def __init__(self, name: str, operands, params: dict, seed: int = 7):
        rng = np.random.default_rng(seed)
        defaults = {n: p.default for n, p in FUSIONS[name].params.items() if p.default is not p.empty}
        self.name, self.params = name, defaults | params
        self.x = [np.asarray((t.detach().double() if t.is_floating_point() else t).cpu()) for t in operands]
        self.v = [rng.standard_normal(a.shape) if a.dtype == np.float64 else None for a in self.x]
        self.names = [n for n, a in self._outputs(0.0).items() if a.dtype == np.float64]
        self.weights = {n: rng.standard_normal(a.shape) for n, a in self._outputs(0.0).items() if n in self.names}

    def _outputs(self, s: float) -> dict:
        at = {n: x if v is None else x + s * v for n, x, v in zip(FUSIONS[self.name].tensors, self.x, self.v, strict=True)}
        return FUSIONS[self.name].reference(**at, **self.params)

    def _loss(self, s: float) -> float:
        outs = self._outputs(s)
        return sum(float((outs[n] * w).sum()) for n, w in self.weights.items())

    def outputs(self) -> list:
        return [self._outputs(0.0)[n] for n in self.names]

    def tangents(self, h: float = 1e-6) -> list:
        ahead, behind = self._outputs(h), self._outputs(-h)
        return [(ahead[n] - behind[n]) / (2 * h) for n in self.names]

    def first(self, h: float = 1e-6) -> float:
        return (self._loss(h) - self._loss(-h)) / (2 * h)

    def second(self, h: float = 1e-4) -> float:
        return (self._loss(h) - 2 * self._loss(0.0) + self._loss(-h)) / h**2

    def directions(self, like) -> tuple:
        """v as tensors, like the float operands."""
        return tuple(torch.from_numpy(v).to(t) for v, t in zip([v for v in self.v if v is not None], like, strict=True))

    def scalar(self, outs) -> torch.Tensor:
        """The weighted sum of a call's float outputs."""
        floats = [x for x in outs if x.is_floating_point()]
        return sum((x * torch.from_numpy(w).to(x)).sum() for x, w in zip(floats, self.weights.values(), strict=True))


def as_tuple(x) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def close(got, wanted, tolerance: float = 2e-4) -> None:
    """Float32 results against float64 ones, up to a part of the largest; TF32 and bfloat16 are ten times as far."""
    for a, b in zip(got, wanted, strict=True):
        a, b = np.asarray(a.detach().cpu().double() if isinstance(a, torch.Tensor) else a), np.asarray(b)
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0.0) <= tolerance * max(1.0, np.abs(b).max(initial=0.0))
