"""The product of array evaluation in PyTorch: IEEE float32 whatever the caller allows torch, and so are its derivatives.

It is an operator of its own, so that a graph of torch.compile keeps it whole, and an autograd function over that, whose
derivatives are products again: a backward pass may run long after the forward one, in another thread and another state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

NAME = "_product"
_library = torch.library.Library("moekit", "FRAGMENT")
_library.define(f"{NAME}(str equation, Tensor a, Tensor b) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def product(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`torch.einsum(equation, a, b)` of two tensors that share no letter twice, in float32; `equation` as "ab,cb->ac".

    Autocast, TF32 on a GPU and bfloat16 products on a CPU do not touch it, nor its gradients, tangents and their own.
    """
    a, b = a.float(), b.float()
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if recorded or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        return _Product.apply(equation, a, b)
    return getattr(torch.ops.moekit, NAME)(equation, a, b)  # what autograd asks Python for takes longer than the product


class _Product(torch.autograd.Function):
    """`forward` of float32 tensors; every rule is a product again."""

    @staticmethod
    def forward(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return getattr(torch.ops.moekit, NAME)(equation, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.equation, a, b = inputs
        ctx.save_for_backward(a, b)
        ctx.save_for_forward(a, b)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        (grad,), (a, b) = grads, ctx.saved_tensors
        left, right, out = _letters(ctx.equation)
        if grad is None:
            return None, None, None
        of_a = product(f"{out},{right}->{left}", grad, b) if ctx.needs_input_grad[1] else None
        of_b = product(f"{left},{out}->{right}", a, grad) if ctx.needs_input_grad[2] else None
        return None, of_a, of_b

    @staticmethod
    def jvp(ctx, *tangents):
        (_, da, db), (a, b) = tangents, (torch._VF._unpack_dual(x, level=0)[0] for x in ctx.saved_tensors)
        with forward_ad._set_fwd_grad_enabled(True):  # torch turns it off here, for tangents of an outer level as well
            parts = [product(ctx.equation, x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
            return sum(parts[1:], parts[0])

    @staticmethod
    def vmap(info, in_dims, equation: str, a: torch.Tensor, b: torch.Tensor):
        """The mapped axis is one more letter, in front."""
        left, right, out = _letters(equation)
        letter = next(c for c in map(chr, range(ord("A"), ord("z"))) if c.isalpha() and c not in equation)
        parts = [
            (names, x) if dim is None else (letter + names, x.movedim(dim, 0))
            for names, x, dim in ((left, a, in_dims[1]), (right, b, in_dims[2]))
        ]
        (left, a), (right, b) = parts
        return product(f"{left},{right}->{letter}{out}", a, b), 0


def _letters(equation: str) -> tuple[str, str, str]:
    operands, out = equation.split("->")
    left, right = operands.split(",")
    return left, right, out


def _made(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    backends: Any = torch.backends
    backend = backends.cuda.matmul if a.is_cuda else backends.mkldnn.matmul
    with torch._C._DisableAutocast():
        allowed = backend.fp32_precision
        if allowed in ("ieee", "none"):
            return torch.einsum(equation, a, b).contiguous()
        backend.fp32_precision = "ieee"
        try:
            return torch.einsum(equation, a, b).contiguous()
        finally:
            backend.fp32_precision = "none"  # if that says what was allowed, it was inherited and has to stay so
            if backend.fp32_precision != allowed:
                backend.fp32_precision = allowed


def _shaped(equation: str, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    left, right, out = _letters(equation)
    sizes = {**dict(zip(left, a.shape, strict=True)), **dict(zip(right, b.shape, strict=True))}
    return a.new_empty([sizes[c] for c in out])


_library.impl(NAME, _made, "CompositeExplicitAutograd")
torch.library.register_fake(f"moekit::{NAME}", _shaped, lib=_library)
