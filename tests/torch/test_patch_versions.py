"""`patch` tries what it relies on before it says that a module is replaced: versions of transformers differ."""

from importlib import import_module

import pytest
import torch
from torch.nn import functional as F

import moekit.torch as mt
from moekit.torch.huggingface.trial import differs

from .patching import logits, tiny, tokens, transformers


@pytest.fixture(params=["qwen3_next", "qwen3_5_moe"])
def classes(request):
    """The patched classes of a family, by the mixin they have; what was tried is forgotten before and after."""
    family = pytest.importorskip(f"moekit.torch.huggingface.{request.param}", exc_type=ImportError)
    differs.cache_clear()
    yield {c.__bases__[0].__name__: c for c in family.CLASSES}
    differs.cache_clear()


def test_all_is_as_it_is_in_the_installed_version(classes):
    assert {name: differs(c) for name, c in classes.items()} == dict.fromkeys(classes)


def test_trying_leaves_the_random_numbers_alone(classes):
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    differs(classes["Layer"])
    assert torch.equal(torch.rand(3), wanted)


def probabilities(self, hidden_states):
    """A router as up to transformers 5.5: what it calls logits are probabilities."""
    logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    chances = F.softmax(logits, dtype=torch.float, dim=-1)
    weights, ids = torch.topk(chances, self.top_k, dim=-1)
    return chances, weights / weights.sum(dim=-1, keepdim=True), ids


def another_eps(self, x):
    return F.rms_norm(x, x.shape[-1:], 1 + self.weight, 1e-2)


def without_more(self, hidden_states, position_embeddings, attention_mask=None, position_ids=None, past_key_values=None, **kw):
    """A layer as up to transformers 5.8: the delta rule is not given what else came."""
    normed, more = self.input_layernorm(hidden_states), {"attention_mask": attention_mask}
    if hasattr(self, "linear_attn"):
        mixed = self.linear_attn(hidden_states=normed, cache_params=past_key_values, **more)
    else:
        more |= {"position_ids": position_ids, "position_embeddings": position_embeddings, **kw}
        mixed, _ = self.self_attn(hidden_states=normed, past_key_values=past_key_values, **more)
    residual = hidden_states + mixed
    return residual + self.mlp(self.post_attention_layernorm(residual))


def another_argument(self, hidden_states, router_state):
    return hidden_states * router_state


def a_pair(self, hidden_states):
    return hidden_states, None


CHANGES = {
    ("Router", probabilities): "computes or calls something else than moekit's",
    ("Norm", another_eps): "computes or calls something else than moekit's",
    ("Layer", without_more): "computes or calls something else than moekit's",
    ("Block", another_argument): "cannot be called as moekit does (TypeError",
    ("Block", a_pair): "computes or calls something else than moekit's",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{c[0]}-{c[1].__name__}")
def test_a_version_that_computes_something_else_is_left(classes, change, monkeypatch):
    """The model still gives what it gave; what rests on the module that is left is left, too."""
    kind, forward = change
    monkeypatch.setattr(classes[kind].original(), "forward", forward)
    why = differs(classes[kind])
    assert why is not None
    assert why.startswith(f"transformers {transformers.__version__}: {classes[kind].__name__} {CHANGES[change]}")


def test_the_report_says_so_and_the_logits_stay(monkeypatch):
    kind = import_module("moekit.torch.huggingface.qwen3_next").Qwen3NextTopKRouter
    differs.cache_clear()
    monkeypatch.setattr(kind.original(), "forward", probabilities)
    model = tiny("Qwen3Next", num_hidden_layers=1, layer_types=["full_attention"])
    before = logits(model, tokens())
    report = mt.patch(model)
    differs.cache_clear()
    assert [name for name, _ in report.left] == ["model.layers.0.mlp", "model.layers.0.mlp.gate"]
    assert "computes or calls something else" in dict(report.left)["model.layers.0.mlp.gate"]
    torch.testing.assert_close(logits(model, tokens()), before, rtol=2e-5, atol=2e-5)


def test_a_class_made_on_top_of_one_of_transformers_is_left():
    model = tiny("Qwen3Next", num_hidden_layers=1, layer_types=["full_attention"])
    norm = model.model.layers[0].input_layernorm
    norm.__class__ = type("Louder", (type(norm),), {"forward": lambda self, x: 2 * super(type(norm), self).forward(x)})
    before = logits(model, tokens())
    assert dict(mt.patch(model).left)["model.layers.0.input_layernorm"].startswith("it is a Louder, a class made on top")
    torch.testing.assert_close(logits(model, tokens()), before, rtol=2e-5, atol=2e-5)
