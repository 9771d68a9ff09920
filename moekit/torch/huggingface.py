"""Hugging Face's Qwen3-Next and Qwen3.5-MoE with moekit's kernels: `patch(model)`, `unpatch(model)`.

Modules keep their parameters, names and hooks; their `forward` is replaced on the instance. The weights of each gate GEMM
(shared gate_proj and up_proj, router, shared gate) are packed once: the parameters become views of the packed tensor, so
nothing is held twice, and a state dict, its saving and its loading are as before. Weights that were moved or replaced since
are packed anew.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moekit.errors import MoekitError
from moekit.fusions import FUSIONS
from moekit.fusions.packing import gate_refusal
from moekit.torch.autograd import needs_grad
from moekit.torch.face import op
from moekit.torch.gate import PackedGate, pack_gate
from moekit.torch.rms_norm import norm

MODELS = ("Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM")
FAMILIES = ("Qwen3Next", "Qwen3_5Moe")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
RECORD = "_moekit_patch"

_add_rms_norm = op(FUSIONS["add_rms_norm"])
_gated_rms_norm = op(FUSIONS["gated_rms_norm"])
_gate_projections = op(FUSIONS["gate_projections"])
_topk_softmax = op(FUSIONS["topk_softmax"])
_down_combine_ = op(FUSIONS["down_combine"], in_place=True)


@dataclass(frozen=True)
class PatchReport:
    """What `patch` did: (module, fusions) pairs that were replaced, and (module, reason) pairs that were left."""

    replaced: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for _, what in self.replaced:
            counts[what] = counts.get(what, 0) + 1
        lines = [f"{n:4d} × {what}" for what, n in counts.items()]
        return "\n".join([*lines, *(f"left {name}: {why}" for name, why in self.left)])


@dataclass
class _Record:
    """What `unpatch` has to undo."""

    modules: list[nn.Module] = field(default_factory=list)
    packed: list[_Packed] = field(default_factory=list)


class _Packed:
    """The packed weight of one block and the modules whose parameters are its rows."""

    def __init__(self, block: Any):
        self.linears = (
            block.shared_expert.gate_proj, block.shared_expert.up_proj, block.gate, block.shared_expert_gate,
        )  # fmt: skip
        self.plain_down = _is_plain(block.shared_expert.down_proj, like=block.shared_expert.up_proj.weight)
        self.packed = self._pack()

    def _pack(self) -> PackedGate:
        gate, up, router, shared = (m.weight.detach() for m in self.linears)
        packed = pack_gate(torch.cat([gate, up]), router, shared)
        row = 0
        for m in self.linears:
            m.weight.data = packed.weight[row : row + m.weight.shape[0]]
            row += m.weight.shape[0]
        return packed

    def current(self) -> PackedGate:
        """The packed weight; packed anew if a parameter is no longer part of it."""
        if torch.compiler.is_compiling():
            return self.packed
        weight = self.packed.weight
        address, step = weight.data_ptr(), weight.shape[1] * weight.element_size()
        for m in self.linears:
            if m.weight.data_ptr() != address or m.weight.dtype != weight.dtype:
                self.packed = self._pack()
                break
            address += m.weight.shape[0] * step
        return self.packed

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        for m in self.linears:
            m.weight.data = m.weight.data.clone()


def patch(model: nn.Module) -> PatchReport:
    """Replace norms, routers, gate GEMMs, shared experts and combines of a model, in place; `unpatch` undoes it.

    `model`: a Qwen3NextForCausalLM or Qwen3_5MoeForCausalLM of transformers, on any device, for inference: where autograd
    records, the MoE blocks run as they were. A module that cannot be served (quantised, biased, sharded, hooked, another
    dtype) is left, and the report says why. A patched model is patched anew. Raises MoekitError for other models.
    """
    if type(model).__name__ not in MODELS:
        raise MoekitError(f"patch: the model is a {type(model).__name__}; it must be a {' or '.join(MODELS)}")
    unpatch(model)
    record, replaced, left = _Record(), [], []
    for name, module in model.named_modules():
        kind = _kind(module)
        if kind is None:
            continue
        forward, refusal, what = PATCHES[kind]
        why = _refusal(module) or refusal(module)
        if why:
            left.append((name, why))
            continue
        if kind == "SparseMoeBlock":
            packed = _Packed(module)
            record.packed.append(packed)
            module.__dict__["_moekit_packed"] = packed
        module.forward = types.MethodType(forward, module)
        record.modules.append(module)
        replaced.append((name, what))
    model.__dict__[RECORD] = record
    return PatchReport(tuple(replaced), tuple(left))


def unpatch(model: nn.Module) -> nn.Module:
    """The model as it was before `patch`; one that was never patched stays as it is."""
    record = model.__dict__.pop(RECORD, None)
    if record is not None:
        for module in record.modules:
            del module.forward
            module.__dict__.pop("_moekit_packed", None)
        for packed in record.packed:
            packed.release()
    return model


def _kind(module: Any) -> str | None:
    """The name of a module's class without its family, if it is one that is replaced."""
    name = type(module).__name__
    family = next((f for f in FAMILIES if name.startswith(f)), None)
    kind = name.removeprefix(family) if family else None
    return kind if kind in PATCHES and type(module).__module__.startswith("transformers.") else None


def _refusal(module: Any) -> str | None:
    """Why a module of a known class is left, whatever it is: hooks, tensors that are not plain, dtypes."""
    if "forward" in module.__dict__:
        return "its forward has been replaced already (accelerate does so when it offloads)"
    for name, weight in module.named_parameters(recurse=False):
        if why := _weight_refusal(name, weight):
            return why
    return None


def _weight_refusal(name: str, weight: torch.Tensor) -> str | None:
    if type(weight.data) is not torch.Tensor:
        return f"{name} is sharded or wrapped (a {type(weight.data).__name__})"
    if weight.is_meta:
        return f"{name} is on the meta device: the model is offloaded or not loaded"
    if weight.dtype not in FLOATS:
        return f"{name} is {str(weight.dtype).removeprefix('torch.')}; float32, float16 and bfloat16 are served"
    return None


def _served(module: Any) -> str | None:
    return None


def _gated_refusal(module: Any) -> str | None:
    activation = getattr(module, "activation", "silu")
    return None if activation in ("silu", "swish") else f"its activation is {activation}; gated_rms_norm has silu"


def _block_refusal(block: Any) -> str | None:
    """Why the gate GEMMs of a block cannot be one."""
    shared = block.shared_expert
    linears = {
        "shared_expert.gate_proj": shared.gate_proj, "shared_expert.up_proj": shared.up_proj, "gate": block.gate,
        "shared_expert_gate": block.shared_expert_gate,
    }  # fmt: skip
    for name, m in linears.items():
        if name != "gate" and type(m) is not nn.Linear:
            return f"{name} is a {type(m).__name__}, not a plain Linear: quantised or sharded"
        if name != "gate" and (hooked := _hooks(m)):
            return f"{name} {hooked}"
        if why := _weight_refusal(f"{name}.weight", m.weight):
            return why
    if hooked := _hooks(shared):
        return f"shared_expert {hooked}"
    if "forward" in block.gate.__dict__:
        return "the forward of gate has been replaced already (accelerate does so when it offloads)"
    activation = type(shared.act_fn).__name__
    if not activation.startswith("SiLU"):
        return f"the shared expert's activation is {activation}; gate_projections has SiLU"
    devices = {str(m.weight.device) for m in linears.values()}
    if len(devices) > 1:
        return f"its gate weights are on {' and '.join(sorted(devices))}"
    dtype = lambda m: str(m.weight.dtype).removeprefix("torch.")  # noqa: E731
    biased = [n for n, m in linears.items() if getattr(m, "bias", None) is not None]
    weights = [(n, tuple(m.weight.shape), dtype(m)) for n, m in linears.items()]
    return gate_refusal(dtype(shared.gate_proj), weights, biased)


def _is_plain(down: Any, like: torch.Tensor) -> bool:
    """Whether a down projection is its weight and no more, of `like`'s dtype and device: what `down_combine` computes."""
    if type(down) is not nn.Linear or down.bias is not None or _hooks(down):
        return False
    weight = down.weight
    return _weight_refusal("weight", weight) is None and (weight.dtype, weight.device) == (like.dtype, like.device)


def _hooks(module: Any) -> str | None:
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    return "has hooks, which the fused path would pass by" if hooked else None


def _norm_forward(self, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, with 1 + weight."""
    return norm(x.reshape(-1, x.shape[-1]), self.weight, self.eps).view(x.shape)


def _gated_norm_forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last dimension, times the weight and silu(gate)."""
    x, z = (t.reshape(-1, 1, t.shape[-1]) for t in (hidden_states, gate))
    return _gated_rms_norm(x, z, self.weight, self.variance_epsilon).view(hidden_states.shape)


def _router_forward(self, hidden_states: torch.Tensor, logits: torch.Tensor | None = None):
    """Logits (computed here unless they are given), weights in their dtype and ids of the chosen experts."""
    if logits is None:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    weights, ids = _topk_softmax(logits, self.top_k, renormalize=getattr(self, "norm_topk_prob", True))
    return logits, weights.to(logits.dtype), ids.long()


def _block_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    """The gate GEMM with its epilogue, the router, experts as they are, and the down projection with the combine."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    held, down = self.__dict__["_moekit_packed"], self.shared_expert.down_proj
    if needs_grad((x, *(m.weight for m in held.linears), down.weight)):
        return type(self).forward(self, hidden_states)
    activated, logits, share = _gate_projections(x, *held.current().parts)
    _, weights, ids = self.gate(x, logits=logits)
    routed = self.experts(x, ids, weights)
    routed = _down_combine_(routed, activated, down.weight, share) if held.plain_down else routed.add_(share * down(activated))
    return routed.view(hidden_states.shape)


def _layer_forward(
    self, hidden_states, position_embeddings, attention_mask=None, position_ids=None, past_key_values=None, **kwargs
):  # fmt: skip
    """A decoder layer in which the first residual sum and the norm after it are one."""
    normed = self.input_layernorm(hidden_states)
    if self.block_type == "linear_attention":
        mixed = self.linear_attn(hidden_states=normed, cache_params=past_key_values, attention_mask=attention_mask, **kwargs)
    else:
        mixed, _ = self.self_attn(
            hidden_states=normed, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, position_embeddings=position_embeddings, **kwargs,
        )  # fmt: skip
    after, shape = self.post_attention_layernorm, hidden_states.shape
    flat = [t.reshape(-1, shape[-1]) for t in (mixed, hidden_states)]
    normed, residual = (t.view(shape) for t in _add_rms_norm(*flat, after.weight, after.eps))
    moved = self.mlp(normed)
    return residual + (moved[0] if isinstance(moved, tuple) else moved)


def _layer_refusal(layer: Any) -> str | None:
    if hooked := _hooks(layer.post_attention_layernorm):
        return f"post_attention_layernorm {hooked}"
    return _weight_refusal("post_attention_layernorm.weight", layer.post_attention_layernorm.weight)


PATCHES: dict[str, tuple[Callable, Callable[[nn.Module], str | None], str]] = {
    "RMSNorm": (_norm_forward, _served, "rms_norm"),
    "RMSNormGated": (_gated_norm_forward, _gated_refusal, "gated_rms_norm"),
    "TopKRouter": (_router_forward, _served, "topk_softmax"),
    "SparseMoeBlock": (_block_forward, _block_refusal, "gate_projections, down_combine"),
    "DecoderLayer": (_layer_forward, _layer_refusal, "add_rms_norm"),
}
