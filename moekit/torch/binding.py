"""Tensors bound to a fusion: dtypes by name, sizes that may be symbols under torch.compile, shapes of outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moekit.errors import DtypeError, MoekitError, ShapeError
from moekit.lang.dtypes import ALL
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph

DTYPES = {getattr(torch, n): n for n in ALL}
STAND_IN = 7919  # what a symbolic size is to the declaration, which never looks at the size of a dynamic axis


@dataclass(frozen=True)
class Bound:
    """A call's graph, and the size of every axis: numbers, or torch's symbolic ones for dynamic axes."""

    binding: Binding
    graph: Graph
    sizes: Mapping[str, int]

    @property
    def names(self) -> list[str]:
        """The outputs, in the order they are returned."""
        return [w.tensor for w in self.graph.writes]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand or output."""
        return self.graph.shape(name, self.sizes)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of an operand or output."""
        return getattr(torch, self.graph.tensors[name].dtype)

    def empty(self, name: str, device: torch.device) -> torch.Tensor:
        """Fresh contiguous memory for an output."""
        return torch.empty(self.shape(name), dtype=self.dtype(name), device=device)


def checked(fusion: Fusion, name: str, x: object) -> torch.Tensor:
    """`x` itself if it is a strided tensor; raises MoekitError if it is something else."""
    if not isinstance(x, torch.Tensor):
        raise MoekitError(f"{fusion.name}: {name} is {type(x).__name__}; it must be a torch.Tensor")
    if x.layout is not torch.strided:
        raise MoekitError(f"{fusion.name}: {name} has layout {x.layout}; it must be strided, so call to_dense()")
    if x.is_neg():
        raise MoekitError(f"{fusion.name}: {name} is a view that negates lazily; its memory is needed, so call resolve_neg()")
    return x


def dtype_name(fusion: Fusion, name: str, x: torch.Tensor) -> str:
    """The language's name of a tensor's dtype; raises DtypeError if it has none."""
    if x.dtype not in DTYPES:
        raise DtypeError(f"{fusion.name}: {name} is {x.dtype}; it must be one of {', '.join(DTYPES.values())}")
    return DTYPES[x.dtype]


def bind(fusion: Fusion, operands: Mapping[str, torch.Tensor], params: Mapping[str, object]) -> Bound:
    """Bind operands (of any kind: fake ones too) and parameters.

    Raises ShapeError, DtypeError or TypeError where they do not fit the declaration.
    """
    shapes, symbols = _plain_shapes(fusion, operands)
    dtypes = {n: dtype_name(fusion, n, x) for n, x in operands.items()}
    binding = fusion.bind(shapes, dtypes, fusion.bind_params(params))
    _refuse_empty(fusion, shapes)
    graph = fusion.trace(binding)
    sizes = graph.sizes(dict(binding.sizes)) | symbols
    if symbols:
        sizes |= fusion.follow(sizes, dict(binding.params))
    return Bound(binding, graph, sizes)


def _plain_shapes(fusion: Fusion, operands: Mapping[str, torch.Tensor]) -> tuple[dict, dict]:
    """Shapes in Python integers, and the symbols that stand behind them on dynamic axes."""
    shapes = {n: tuple(x.shape) for n, x in operands.items()}
    if all(type(s) is int for shape in shapes.values() for s in shape):
        return shapes, {}
    symbols: dict[str, Any] = {}
    along = [
        (n, i, d.text)
        for n, spec in fusion.tensors.items()
        for i, d in enumerate(spec.dims)
        if d.text in fusion.dynamic and len(shapes[n]) == len(spec.dims)
    ]
    for n, i, axis in along:
        if type(shapes[n][i]) is not int:
            symbols.setdefault(axis, shapes[n][i])
    plain = {n: list(shape) for n, shape in shapes.items()}
    for n, i, axis in along:
        if axis in symbols:
            same = shapes[n][i] == symbols[axis]
            torch._check(same, lambda a=axis: f"{fusion.name}: {a} differs among operands")
            plain[n][i] = STAND_IN
    return {n: tuple(int(s) for s in shape) for n, shape in plain.items()}, symbols


def _refuse_empty(fusion: Fusion, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for n, spec in fusion.tensors.items():
        for d, size in zip(spec.dims, shapes[n], strict=True):
            if size == 0 and d.text not in fusion.dynamic:
                said = f"{fusion.name}: {n} has shape {list(shapes[n])}; axis {d.text} must have an element"
                raise ShapeError(said + fusion.may_be_empty())
