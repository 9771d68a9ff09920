"""Whether the installed transformers computes what a patched class computes: tried on a small layer of each kind, side by side.

Attributes, signatures and what a router returns have changed between versions of transformers; a class is put in place of
another only where both give the same results and call the same submodules in the same way.
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from moekit.torch.huggingface.modules import Layer, Patched

SMALL = {
    "vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "intermediate_size": 16, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
    "num_experts": 4, "num_experts_per_tok": 2, "linear_num_key_heads": 1, "linear_num_value_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


class Mixer(nn.Module):
    """Stands in for attention or the delta rule, and remembers how it was called."""

    def __init__(self, out: Any):
        super().__init__()
        self.out, self.calls = out, []

    def forward(self, *args, **kwargs):
        """What it was given to give."""
        self.calls.append((args, {n: x for n, x in kwargs.items() if n != "hidden_states"}))
        return self.out


@cache
def differs(kind: type[Patched]) -> str | None:
    """One sentence on how a class's results differ from those of the class that it would replace; None if they do not."""
    import transformers

    where = f"transformers {transformers.__version__}: {kind.__name__}"
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            modules = [(layer, m) for layer in _layers(kind) for m in layer.modules() if type(m) is kind.original()]
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                same = all(_same(*[_called(m, layer) for m in (module, _replaced(module, kind))]) for layer, module in modules)
        except Exception as error:  # whatever another version raises is a reason to leave its modules
            return f"{where} cannot be called as moekit does ({type(error).__name__}: {str(error).splitlines()[0]})"
    return None if modules and same else f"{where} computes or calls something else than moekit's"


def _layers(kind: type[Patched]) -> list[nn.Module]:
    """A layer of each type, with random weights."""
    family = import_module(kind.__module__)
    config = family.Config(**SMALL)
    config._experts_implementation = "eager"
    layer = next(c for c in family.CLASSES if issubclass(c, Layer)).original()
    made = [layer(config, i).float().eval() for i in range(2)]
    for p in (p for m in made for p in m.parameters()):
        p.normal_()
    return made


def _replaced(module: nn.Module, kind: type[Patched]) -> nn.Module:
    """A copy with the class in place, and those that it needs."""
    copied = copy.deepcopy(module)
    family = import_module(kind.__module__).CLASSES
    needed = {c.original(): c for c in family if issubclass(c, kind.needs)} if kind.needs else {}
    for m in copied.modules():
        m.__class__ = needed.get(type(m), type(m))
    copied.__class__ = kind
    return copied


def _called(module: Any, layer: nn.Module) -> tuple:
    """What a module gives on random input, the same each time, and how it called its mixer."""
    random = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float32)  # noqa: E731
    if not isinstance(module, type(layer)):
        width = module.weight.shape[-1] if "weight" in module._parameters else SMALL["hidden_size"]
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        count = 2 if "gate" in names else 1
        return module(*[make(2, 3, width) for _ in range(count)]), []
    x, mixed = make(2, 3, SMALL["hidden_size"]), make(2, 3, SMALL["hidden_size"])
    name = "linear_attn" if hasattr(module, "linear_attn") else "self_attn"
    mixer = Mixer(mixed if name == "linear_attn" else (mixed, None))
    setattr(module, name, mixer)
    known = inspect.signature(type(layer).forward).parameters.values()
    given = {p.name: p.name for p in list(known)[2:] if p.kind is not p.VAR_KEYWORD}
    return module(x, **given, something_else="something_else"), mixer.calls


def _same(one: tuple, other: tuple) -> bool:
    """Whether two calls came to the same."""
    outs = [x if isinstance(x, tuple) else (x,) for x, _ in (one, other)]
    return one[1] == other[1] and len(outs[0]) == len(outs[1]) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(*outs, strict=True)
    )  # fmt: skip
