"""A forward error bound for any declaration: its Graph evaluated in float64, with an error carried beside
each value.

Each node has a value and two errors, both propagated to first order by |∂f/∂x| (`moekit.testing.propagate`):

- `noise`: what float32 arithmetic adds, in units that the constants of `moekit.testing.constants` multiply;
- `flips`: what a rounding point (a narrowing cast inside the declaration) adds where noise may carry a value
  over a tie, or where a subnormal may read as zero. Away from ties a rounding point removes all noise, so
  that a missing one is seen.

`exact` is the value that IEEE float32 arithmetic must give bit for bit, as long as only correctly rounded
operations that no compiler may fuse lie behind it: a rounded residual stays exact, which float64 rounded once
would not be.

Comparisons, `where`, gathers, `top_k` and everything on integers are selections: made on the float64 values,
and taken to fall the same way in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moekit.lang.fusion import Fusion
from moekit.lang.graph import Graph, Node, Write
from moekit.lang.turns import unrolled
from moekit.testing.evaluation import LARGEST, Bound, Evaluation
from moekit.testing.propagate import ALONG, RULES, placed


def bounds(fusion: Fusion, inputs: Mapping[str, np.ndarray], params: Mapping[str, object] | None = None) -> dict[str, Bound]:
    """The bound of every output of `fusion` for these operands, before the output's own rounding."""
    shapes = {n: inputs[n].shape for n in fusion.tensors}
    dtypes = {n: inputs[n].dtype.name for n in fusion.tensors}
    binding = fusion.bind(shapes, dtypes, fusion.bind_params(params or {}))
    return graph_bounds(fusion.trace(binding), inputs, dict(binding.sizes))


def graph_bounds(graph: Graph, inputs: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> dict[str, Bound]:
    """The bound of every output of a traced graph; `sizes` gives the dynamic axes."""
    with np.errstate(all="ignore"):
        return _Evaluation(unrolled(graph), inputs, sizes).outputs()


class _Evaluation(Evaluation):
    """An evaluation with the bounds of its nodes: before the rounding of a narrowing cast, and after it."""

    def outputs(self) -> dict[str, Bound]:
        """Every write's bound, before the rounding that the write's dtype makes."""
        self.unrounded: dict[int, Bound] = {}
        for i in self.graph.live():
            node = self.graph.nodes[i]
            args = [self.nodes[a] for a in node.args]
            lost, known = self._lost(node, args), [_finite(a) for a in args]
            if node.op in ALONG:
                known = [self.whole(a, node.attr("axis")) for a in known]
            made = RULES[node.op](self, node, known)
            pair = made if isinstance(made, tuple) else (made, made)
            self.unrounded[i], self.nodes[i] = (_settled(b, lost) for b in pair)
        return {w.tensor: self._written(w) for w in self.graph.writes}

    def _lost(self, node: Node, args: list[Bound]) -> np.ndarray:
        """Where an operand, or one it is added up with, is unknown."""
        if node.op == "place":
            return placed(self, node, [a.value for a in args[1:]], np.isinf(args[0].noise))
        lost = np.zeros((1,) * len(self.order), bool)
        for a in args[:1] if node.op == "pick" else args:
            lost = lost | np.isinf(a.noise)
        if node.op in ALONG:
            lost = lost.any(axis=self.order[node.attr("axis")], keepdims=True)
        return lost

    def _written(self, w: Write) -> Bound:
        bound, tensor = self.unrounded[w.value], self.graph.tensors[w.tensor]
        shape = tuple(self.sizes[d.axis] for d in tensor.dims)
        if not w.ids:
            return bound.each(lambda x: self._spread(x, [a for i in w.index for a in i.axes], shape))
        return self._put(bound, w, next(i for i, e in enumerate(w.index) if e.operands), shape)

    def _put(self, bound: Bound, w: Write, dim: int, shape: tuple[int, ...]) -> Bound:
        """The operand's own values, with rows `ids` replaced; ids out of range write nothing."""
        names = [a for i in w.index for a in i.axes]
        full = (*(a for a in self.graph.nodes[w.ids[0]].axes if a not in names), *names)
        inner = tuple(self.sizes[a] for a in full)
        ids = self._spread(self.nodes[w.ids[0]].value, full, inner).astype(np.int64)
        spread = bound.each(lambda x: self._spread(x, full, inner))
        index = [np.arange(self.sizes[a]).reshape([-1 if b == a else 1 for b in full]) for a in names]
        index.insert(dim, ids)
        keep = (ids >= 0) & (ids < shape[dim])
        where = tuple(np.broadcast_to(i, inner)[keep] for i in index)

        def placed(new: np.ndarray, base: np.ndarray) -> np.ndarray:
            base = base.copy()
            base[where] = new[keep]
            return base

        old, zero = self.inputs[w.tensor].astype(np.float64), np.zeros(shape)
        exact = None if spread.exact is None else placed(spread.exact, old)
        return Bound(placed(spread.value, old), placed(spread.noise, zero), placed(spread.flips, zero), exact)

    def _spread(self, x: np.ndarray, names, shape: tuple[int, ...]) -> np.ndarray:
        """`x` as an array with one dimension per name, broadcast to `shape`."""
        kept = [self.order[a] for a in names]
        x = np.transpose(x, [*kept, *(i for i in range(x.ndim) if i not in kept)])
        return np.broadcast_to(x.reshape(x.shape[: len(kept)]), shape)


def _finite(b: Bound) -> Bound:
    """The bound with unknown places taken as known, so that no infinity of theirs spreads by arithmetic."""
    if not (np.isinf(b.noise).any() or np.isinf(b.flips).any()):
        return b
    return replace(b, noise=np.where(np.isinf(b.noise), 0.0, b.noise), flips=np.where(np.isinf(b.flips), 0.0, b.flips))


def _settled(b: Bound, lost: np.ndarray) -> Bound:
    """Errors made usable: infinite where nothing is known, zero for an infinity or NaN that the mathematics
    has.
    """
    noise, flips = np.broadcast_to(b.noise, b.value.shape), np.broadcast_to(b.flips, b.value.shape)
    total = np.abs(b.value) + noise + flips
    if not lost.any() and total.max(initial=0.0) < LARGEST:
        return replace(b, noise=noise, flips=flips)  # all is known and finite, as most is
    proper = ~np.isfinite(b.value)
    lost = (lost | (~proper & ~(total < LARGEST))) if b.value.dtype.kind == "f" else lost
    clean = [np.where(lost, np.inf, np.where(proper, 0.0, e)) for e in (noise, flips)]
    return replace(b, noise=clean[0], flips=clean[1])
