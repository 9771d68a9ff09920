"""Whether modules and tensors are still plain: asked at each call about everything that a fused way reads around."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._C._functorch import peek_interpreter_stack as transformed
from torch.compiler import is_compiling
from torch.nn.modules import module as every

from moekit.torch.fast import PLAIN
from moekit.torch.form import moded

strided = torch.strided
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Linear, Parameter, Tensor = nn.Linear, nn.Parameter, torch.Tensor
autocast, tracing, globally_hooked = torch._C._is_any_autocast_enabled, torch._C._is_tracing, every._has_any_global_hook


def usual(x: Any) -> bool:
    """Whether a call with `x` is an ordinary one on a plain tensor: no autocast, torch.func transform, dispatch mode, tracing
    by torch.jit or hook on all modules, which would see other operations than the original's."""
    if type(x) is not Tensor or x.dtype not in FLOATS:
        return False
    if is_compiling():
        return not torch.is_autocast_enabled(x.device.type)
    return not (autocast() or moded() or transformed() is not None or tracing() or globally_hooked())


def alike(x: torch.Tensor, *tensors: Any) -> bool:
    """Whether tensors are plain floats in memory, on `x`'s device."""
    device = x.get_device()
    for t in tensors:
        if type(t) not in PLAIN or t.dtype not in FLOATS or t.get_device() != device or t.layout is not strided:
            return False
    return True


def bare(module: Any) -> bool:
    """Whether a call of a module is a call of its class's `forward`: no hooks, no `forward` of its own."""
    return not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or "forward" in module.__dict__
    )  # fmt: skip


def plain_weights(linears: Iterable[Any], x: torch.Tensor) -> list[torch.Tensor] | None:
    """The weights of modules that are torch's own Linear, called as such, without bias, in memory, of `x`'s dtype and on its
    device; None if one is not. Backward hooks may be there: this is for calls that autograd does not record."""
    dtype, device, found = x.dtype, x.get_device(), []
    for m in linears:
        if type(m) is not Linear or m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
            return None
        own = m._parameters
        w: Any = own.get("weight")
        if type(w) not in PLAIN or w.dtype is not dtype or w.get_device() != device or w.layout is not strided:
            return None
        if own.get("bias") is not None:
            return None
        found.append(w)
    return found


def unplain(name: str, module: Any, kind: type) -> str | None:
    """One sentence on why a module is not a bare one of a class; None if it is."""
    if type(module) is not kind:
        own = type(module).__name__
        own = own if own != kind.__name__ else f"{type(module).__module__}.{own}"
        return f"{name} is a {own}, not a plain {kind.__name__}: quantised, wrapped or sharded"
    if "forward" in module.__dict__:
        return f"the forward of {name} has been replaced already (accelerate does so when it offloads)"
    return None if bare(module) else f"{name} has hooks, which the fused path would pass by"


def unserved(name: str, weight: Any) -> str | None:
    """One sentence on why kernels cannot read a weight; None if they can."""
    if not isinstance(weight, torch.Tensor):
        return f"{name} is no parameter of its module: it is sharded, or made by a parametrisation"
    if type(weight) not in PLAIN or type(weight.data) is not Tensor:
        return f"{name} is sharded or wrapped (a {type(weight.data).__name__})"
    if weight.is_meta:
        return f"{name} is on the meta device: the model is offloaded or not loaded"
    if weight.dtype not in FLOATS:
        return f"{name} is {str(weight.dtype).removeprefix('torch.')}; float32, float16 and bfloat16 are served"
    return None if weight.layout is strided else f"{name} has layout {weight.layout}; it must be strided"
