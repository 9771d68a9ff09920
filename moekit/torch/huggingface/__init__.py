"""Hugging Face's Qwen3-Next and Qwen3.5-MoE with moekit's kernels: `patch(model)`, `unpatch(model)`.

A module is given another class, derived from its own: parameters, names, hooks and wrappers of calls stay, copies and pickles
keep it. Weights are read where they are, at each call; what is no longer plain by then runs as transformers has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn

from moekit.errors import MoekitError
from moekit.torch.huggingface.modules import Patched
from moekit.torch.huggingface.trial import differs

MODELS = {"Qwen3NextForCausalLM": "qwen3_next", "Qwen3_5MoeForCausalLM": "qwen3_5_moe"}

__all__ = ["MODELS", "PatchReport", "patch", "unpatch"]


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


def patch(model: nn.Module) -> PatchReport:
    """Replace norms, routers, gate GEMMs, shared experts and combines of a model, in place; `unpatch` undoes it.

    `model`: a Qwen3NextForCausalLM or Qwen3_5MoeForCausalLM of transformers, on any device. A module that cannot be served
    (quantised, biased, sharded, hooked, of another dtype or of a version of transformers that computes something else) is left,
    and the report says why. What changes afterwards is seen at each call: a module around which the kernels can no longer read
    runs as transformers has it, as MoE blocks do in training mode, under autocast and where autograd records.
    Raises MoekitError for other models.
    """
    classes = {c.original(): c for c in _family(model).CLASSES}
    found: dict[str, tuple[bool, str]] = {}
    for name, module in reversed(list(model.named_modules())):  # submodules first: a block needs its router in place
        kind = classes.get(type(module))
        if isinstance(module, Patched):
            found[name] = True, module.fusions
        elif kind is not None:
            why = differs(kind) or _refusal(module, kind)
            found[name] = why is None, why or kind.fusions
        elif isinstance(module, tuple(classes)):
            found[name] = False, f"it is a {type(module).__name__}, a class made on top of that of transformers"
    ordered = list(reversed(found.items()))
    return PatchReport(
        tuple((name, what) for name, (done, what) in ordered if done),
        tuple((name, why) for name, (done, why) in ordered if not done),
    )


def unpatch(model: nn.Module) -> nn.Module:
    """The model as it was before `patch`; one that was never patched stays as it is.

    Raises MoekitError, with nothing changed, if a class was made on top of a patched one since (FSDP2's `fully_shard` does).
    """
    patched: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if isinstance(m, Patched)]
    for name, module in patched:
        if not type(module).put_in_place():
            raise MoekitError(
                f"unpatch: {name} is a {type(module).__name__}, a class made on top of the patched one; "
                "call unpatch before what makes it (FSDP2's fully_shard does)"
            )
    for _, module in patched:
        module.__class__ = type(module).original()
    return model


def _family(model: nn.Module) -> ModuleType:
    """The module with the classes for a model; imported here, since it imports transformers' own."""
    names = [c.__name__ for c in type(model).__mro__]
    family = next((MODELS[n] for n in names if n in MODELS), None)
    if family is None:
        raise MoekitError(f"patch: the model is a {type(model).__name__}; it must be a {' or '.join(MODELS)}")
    return import_module(f"{__name__}.{family}")


def _refusal(module: Any, kind: type[Patched]) -> str | None:
    """Put the class in place, unless there is a reason not to, which is returned."""
    if "forward" in module.__dict__:
        return "its forward has been replaced already (accelerate does so when it offloads)"
    original, module.__class__ = module.__class__, kind
    why = module.why_not()
    if why is not None:
        module.__class__ = original
    return why
