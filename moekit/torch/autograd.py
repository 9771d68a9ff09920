"""Gradients of any fusion: forwards by a kernel, backwards through array evaluation; and who carries a tangent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.autograd import forward_ad

from moekit.backends.array import evaluate
from moekit.lang.fusion import Fusion
from moekit.torch.binding import Bound, bind

Tensors = tuple[torch.Tensor, ...]


class _Differentiable(torch.autograd.Function):
    """`forwards(*tensors)` computes the outputs; `bind(fusion, tensors, params)` says how to evaluate them again."""

    @staticmethod
    def forward(ctx, forwards: Callable[..., Tensors], fusion: Fusion, params: dict, *tensors: torch.Tensor):
        ctx.fusion, ctx.params = fusion, params
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        outs = forwards(*tensors)
        ctx.mark_non_differentiable(*(x for x in outs if not x.is_floating_point()))
        return outs

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *_gradients(ctx.fusion, ctx.params, ctx.saved_tensors, needed, grads)


def _gradients(fusion: Fusion, params: dict, tensors: Tensors, needed: Sequence[bool], grads: Sequence) -> list:
    """The gradient of every tensor that needs one; differentiable again where the backward pass is recorded."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [
            (x.view_as(x) if again else x.detach().requires_grad_()) if need else x.detach()
            for x, need in zip(tensors, needed, strict=True)
        ]
        bound, values = evaluated(fusion, params, inputs)
        pairs = [(values[n], g) for n, g in zip(bound.names, grads, strict=True) if g is not None]
        pairs = [(v, g) for v, g in pairs if v.requires_grad]
        wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
        if not pairs:
            return [None] * len(inputs)
        found = iter(
            torch.autograd.grad([v for v, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, create_graph=again)
        )
    return [next(found) if need else None for need in needed]


def evaluated(fusion: Fusion, params: dict, tensors: Sequence[torch.Tensor]) -> tuple[Bound, dict]:
    """A call bound, and its outputs by name, computed by torch operations alone: traceable and differentiable."""
    operands = dict(zip(fusion.tensors, tensors, strict=True))
    bound = bind(fusion, operands, params)
    return bound, evaluate(bound.graph, operands, bound.sizes, "torch")


def differentiable(forwards: Callable[..., Tensors], fusion: Fusion, params: dict, tensors: Sequence[torch.Tensor]) -> Tensors:
    """`forwards(*tensors)`, recorded for autograd."""
    return _Differentiable.apply(forwards, fusion, params, *tensors)


def needs_grad(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def carries_tangent(*tensors: object) -> bool:
    """Whether forward mode would push a tangent of one of these through an operation on it."""
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    return any(isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in tensors)
