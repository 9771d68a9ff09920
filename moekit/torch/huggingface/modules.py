"""What is put in place of a transformers module's class: mixins in front of it, whose `forward` is fused where it may be.

Nothing is kept from the time of patching: each call reads parameters and submodules as they are, and where something that
would be read around is no longer plain, it is the original's `forward`.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, ClassVar

import torch
from torch import nn
from torch.compiler import is_compiling

from moekit.fusions import FUSIONS
from moekit.fusions.packing import gate_refusal
from moekit.torch.face import op
from moekit.torch.huggingface.plain import alike, bare, plain_weights, unplain, unserved, usual
from moekit.torch.rms_norm import norm
from moekit.torch.unpacked_gates import gates

SILU = ("silu", "swish")

_add_rms_norm = op(FUSIONS["add_rms_norm"])
_gated_rms_norm = op(FUSIONS["gated_rms_norm"])
_topk_softmax = op(FUSIONS["topk_softmax"])
_down_combine = op(FUSIONS["down_combine"])


class Patched(nn.Module):
    """A class with kernels, derived from itself (a mixin below) and from the class of transformers that it stands in for."""

    fusions: ClassVar[str]
    needs: ClassVar[tuple[type[Patched], ...]] = ()
    """Mixins that must be in place on submodules for this one to be fused."""

    @classmethod
    def original(cls) -> type[nn.Module]:
        """The class of transformers."""
        return cls.__bases__[1]

    @classmethod
    def put_in_place(cls) -> bool:
        """Whether `patch` puts this class in place; no if another was made on top of it since."""
        return cls in getattr(sys.modules[cls.__module__], "CLASSES", ())

    def why_not(self) -> str | None:
        """One sentence on why this module, its class in place, would not be fused; None if it would."""
        return unserved("weight", self._parameters.get("weight"))


class Norm(Patched):
    """RMSNorm over the last dimension, with 1 + weight."""

    fusions = "rms_norm"
    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., H] -> the same shape and dtype."""
        weight: Any = self._parameters.get("weight")
        if not (usual(x) and alike(x, weight)):
            return super().forward(x)
        return norm(x.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape)


class GatedNorm(Patched):
    """RMSNorm over the last dimension, times the weight and silu(gate)."""

    fusions = "gated_rms_norm"
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """hidden_states and gate [..., D] -> the same shape, in hidden_states' dtype."""
        weight: Any = self._parameters.get("weight")
        if not (usual(hidden_states) and alike(hidden_states, gate, weight) and getattr(self, "activation", "silu") in SILU):
            return super().forward(hidden_states, gate)
        x, z = (t.reshape(-1, 1, t.shape[-1]) for t in (hidden_states, gate))
        return _gated_rms_norm(x, z, weight, self.variance_epsilon).view(hidden_states.shape)

    def why_not(self) -> str | None:
        """Its activation, too."""
        activation = getattr(self, "activation", "silu")
        return super().why_not() if activation in SILU else f"its activation is {activation}; gated_rms_norm has silu"


class Router(Patched):
    """Softmax over all experts, and the k best."""

    fusions = "topk_softmax"
    weight: torch.Tensor
    hidden_dim: int
    top_k: int

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor | None = None):
        """Logits [T, E] (computed here unless they are given), weights [T, k] in their dtype and ids [T, k]."""
        if logits is None:
            if not (usual(hidden_states) and alike(hidden_states, self._parameters.get("weight"))):
                return super().forward(hidden_states)
            logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        weights, ids = _topk_softmax(logits, self.top_k, renormalize=getattr(self, "norm_topk_prob", True))
        return logits, weights.to(logits.dtype), ids.long()


class Block(Patched):
    """The gate GEMM with its epilogue, the router, experts as they are, and the down projection with the combine."""

    fusions = "gate_projections, down_combine"
    needs = (Router,)
    gate: Any
    experts: Any
    shared_expert: Any
    shared_expert_gate: Any
    router: ClassVar[type[nn.Module]]
    mlp: ClassVar[type[nn.Module]]
    activations: ClassVar[tuple[type[nn.Module], ...]]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [..., H] -> the same shape and dtype. In training mode and where autograd records: the original's, also
        where a reentrant checkpoint runs it without recording at first, so that both runs choose the same experts."""
        fused = not self.training and usual(hidden_states) and not records(self, hidden_states)
        weights = self.plain_weights(hidden_states) if fused else None
        if weights is None:
            return super().forward(hidden_states)
        gate, up, down, shared_gate, router = weights
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        activated, logits, share = gates(x, gate, up, router, shared_gate)
        _, chosen, ids = self.gate(x, logits=logits)
        routed = self.experts(x, ids, chosen)
        if type(routed) is torch.Tensor and routed.dtype is x.dtype:
            routed = _down_combine(routed, activated, down, share)
        else:  # what a hook or a parallel plan made of it
            routed = routed + share.to(x.dtype) * nn.functional.linear(activated, down)
        return routed.view(hidden_states.shape)

    def plain_weights(self, x: torch.Tensor) -> list[torch.Tensor] | None:
        """gate_proj, up_proj, down_proj, shared gate and router, if nothing but they and `x` decides the result; else None."""
        own = self._modules
        router: Any = own["gate"]
        shared: Any = own["shared_expert"]
        inner = shared._modules
        act: Any = inner.get("act_fn")
        if type(shared) is not self.mlp or type(router) is not self.router or type(act) not in self.activations:
            return None
        if router._forward_pre_hooks or "forward" in router.__dict__:
            return None  # it is called, so that its forward hooks run
        for m in (shared, act):
            if m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__:
                return None
        weight: Any = router._parameters.get("weight")
        if not alike(x, weight) or weight.dtype is not x.dtype:
            return None
        weights = plain_weights((inner["gate_proj"], inner["up_proj"], inner["down_proj"], own["shared_expert_gate"]), x)
        return None if weights is None else [*weights, weight]

    def why_not(self) -> str | None:
        """What `plain_weights` would stumble over."""
        if why := self._unplain() or self._apart():
            return why
        return "it is not as transformers makes it" if self.plain_weights(self.gate.weight) is None else None

    def _unplain(self) -> str | None:
        shared, router = self.shared_expert, self.gate
        found = [unplain("shared_expert", shared, self.mlp)]
        for name, m in self._linears().items():
            found.append(unplain(name, m, nn.Linear) or unserved(f"{name}.weight", m._parameters.get("weight")))
        if not found[0] and type(shared.act_fn) not in self.activations:
            found.append(f"the shared expert's activation is {type(shared.act_fn).__name__}; gate_projections has SiLU")
        found.append(unplain("shared_expert.act_fn", shared.act_fn, type(shared.act_fn)))
        found.append(unserved("gate.weight", router._parameters.get("weight")))
        if type(router) is not self.router:
            found.append("its router is left")
        elif router._forward_pre_hooks or "forward" in router.__dict__:
            found.append(unplain("gate", router, self.router))
        return next((why for why in found if why), None)

    def _apart(self) -> str | None:
        """Why weights that are plain, each for itself, do not fit together."""
        linears = self._linears()
        weights = {n: m.weight for n, m in [*linears.items(), ("gate", self.gate)]}
        devices = {str(w.device) for w in weights.values()}
        if len(devices) > 1:
            return f"its gate weights are on {' and '.join(sorted(devices))}"
        dtype = lambda w: str(w.dtype).removeprefix("torch.")  # noqa: E731
        down = weights.pop("shared_expert.down_proj")
        named = [(n, tuple(w.shape), dtype(w)) for n, w in weights.items()]
        biased = [n for n, m in linears.items() if m.bias is not None]
        if dtype(down) != named[0][2]:
            return f"shared_expert.down_proj is {dtype(down)} but its input is {named[0][2]}"
        return gate_refusal(named[0][2], named, biased)

    def _linears(self) -> dict[str, nn.Module]:
        shared = self.shared_expert
        return {
            "shared_expert.gate_proj": shared.gate_proj, "shared_expert.up_proj": shared.up_proj,
            "shared_expert.down_proj": shared.down_proj, "shared_expert_gate": self.shared_expert_gate,
        }  # fmt: skip


class Layer(Patched):
    """A decoder layer in which the first residual sum and the norm after it are one."""

    fusions = "add_rms_norm"
    needs = (Norm,)
    norm: ClassVar[type[nn.Module]]
    caches: ClassVar[dict[str, str]]
    """What the two mixers call their cache."""
    input_layernorm: Any
    post_attention_layernorm: Any
    linear_attn: Any
    self_attn: Any
    mlp: Any

    def __init_subclass__(cls, **kwargs):
        """Find out what a cache is called (another name from transformers 5.24 on); a class made on top inherits it."""
        if not hasattr(cls, "caches"):
            new = "cache" in inspect.signature(cls.original().forward).parameters
            names = ("cache", "cache") if new else ("cache_params", "past_key_values")
            cls.caches = dict(zip(("linear_attn", "self_attn"), names, strict=True))
        super().__init_subclass__(**kwargs)

    def forward(
        self, hidden_states, position_embeddings, attention_mask=None, position_ids=None, past_key_values=None, cache=None,
        **kwargs,
    ):  # fmt: skip
        """hidden_states [B, S, H] -> the same shape; the rest is handed on to the mixer."""
        normed = self.input_layernorm(hidden_states)
        cache = past_key_values if cache is None else cache
        kwargs |= {"hidden_states": normed, "attention_mask": attention_mask}
        if block_type(self) == "linear_attention":
            mixed = self.linear_attn(**kwargs, **{self.caches["linear_attn"]: cache})
        else:
            kwargs |= {"position_ids": position_ids, "position_embeddings": position_embeddings}
            mixed, _ = self.self_attn(**kwargs, **{self.caches["self_attn"]: cache})
        normed, residual = self._summed(mixed, hidden_states)
        if hidden_states.requires_grad and not (torch.is_grad_enabled() or is_compiling()):
            normed = normed.detach().requires_grad_()  # a reentrant checkpoint's first run: the block is to know
        moved = self.mlp(normed)
        return residual + (moved[0] if isinstance(moved, tuple) else moved)

    def _summed(self, mixed: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of the sum, and the sum; one after the other where the norm is not plain or the sum has another dtype."""
        after = self.post_attention_layernorm
        weight = after._parameters.get("weight")
        plain = type(after) is self.norm and bare(after) and usual(mixed) and mixed.dtype is hidden_states.dtype
        if not (plain and alike(mixed, hidden_states, weight)):
            residual = hidden_states + mixed
            return after(residual), residual
        shape = hidden_states.shape
        flat = [t.reshape(-1, shape[-1]) for t in (mixed, hidden_states)]
        normed, residual = _add_rms_norm(*flat, weight, after.eps)
        return normed.view(shape), residual.view(shape)

    def why_not(self) -> str | None:
        """What keeps its second norm from being part of it."""
        after = self.post_attention_layernorm
        if type(after) is not self.norm:
            return "post_attention_layernorm is left"
        weight = after._parameters.get("weight")
        return unplain("post_attention_layernorm", after, self.norm) or unserved("post_attention_layernorm.weight", weight)


def block_type(layer: Any) -> str:
    """What mixes a layer's tokens; `layer_type` up to transformers 5.12."""
    return layer.block_type if hasattr(layer, "block_type") else layer.layer_type


def records(module: nn.Module, x: torch.Tensor) -> bool:
    """Whether autograd records a call, or will: a reentrant checkpoint hides only that it will."""
    return x.requires_grad or (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
