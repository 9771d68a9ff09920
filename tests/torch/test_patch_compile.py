"""A patched model under torch.compile: one graph, and weights and modules exchanged afterwards are seen."""

import copy

import pytest
import torch
from torch import nn

import moekit.torch as mt

from .patching import close, logits, tiny, tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def one_layer(seed=0):
    return tiny("Qwen3Next", seed, num_hidden_layers=1, layer_types=["full_attention"])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def compiled(device):
    """A patched model whose layer is compiled whole, and the graphs that were made of it."""
    torch._dynamo.reset()
    model, graphs = one_layer().to(device), []
    model.set_experts_implementation("batched_mm")  # the others count tokens on the host
    assert mt.patch(model).left == ()

    def backend(graph, inputs):
        graphs.append({str(n.target) for n in graph.graph.nodes})
        return graph.forward

    model.model.layers[0].compile(backend=backend, fullgraph=True)
    close(logits(model, tokens().to(device)), logits(one_layer().to(device), tokens().to(device)))
    assert len(graphs) == 1
    assert {"moekit.unpacked_gate_projections.default", "moekit.down_combine.default"} <= graphs[0]
    return model, graphs


def assign(model, other):
    model.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)


def load(model, other):
    model.load_state_dict(other.state_dict())


def set_data(model, other):
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.data = q.data.clone()


def new_parameters(model, other):
    for m, o in zip(model.modules(), other.modules(), strict=True):
        for n, p in o._parameters.items():
            if p is not None:
                setattr(m, n, nn.Parameter(p.detach().clone()))


def in_place(model, other):
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.mul_(0).add_(q)


def move(model, other):
    load(model, other)
    model.double().float()


@pytest.mark.parametrize("change", [assign, load, set_data, new_parameters, in_place, move])
def test_exchanged_weights(compiled, device, change):
    model, _ = compiled
    other, ids = one_layer(seed=7).to(device), tokens().to(device)
    change(model, other)
    close(logits(model, ids), logits(other, ids))


def test_another_dtype(compiled, device):
    model, graphs = compiled
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    plain = one_layer().to(device).bfloat16()
    model.bfloat16()
    ids = tokens().to(device)
    assert logits(model, ids).dtype == torch.bfloat16
    assert len(graphs) == 2
    with torch.no_grad():
        torch.testing.assert_close(model.model.layers[0].mlp(x), plain.model.layers[0].mlp(x), rtol=2e-2, atol=2e-2)


class Scaled(nn.Linear):
    """As adapters are: a Linear that does more than its weight says."""

    def forward(self, x):
        return super().forward(x) * 1.5


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
def test_an_exchanged_projection(compiled, device, name):
    model, graphs = compiled
    other, ids = one_layer().to(device), tokens().to(device)
    for m in (model, other):
        expert = m.model.layers[0].mlp.shared_expert
        weight = getattr(expert, name).weight
        setattr(expert, name, Scaled(*reversed(weight.shape), bias=False, device=device))
        getattr(expert, name).weight = weight
    close(logits(model, ids), logits(other, ids))
    assert "moekit.unpacked_gate_projections.default" not in graphs[-1]


def test_training_mode_and_autocast(compiled, device):
    """Each has a graph of its own, of the original's operations."""
    model, graphs = compiled
    plain, ids = one_layer().to(device), tokens().to(device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        wanted, got = plain(ids).logits, model(ids).logits
    assert got.dtype == wanted.dtype
    assert "moekit.unpacked_gate_projections.default" not in graphs[-1]
    found = []
    for m in (plain, model):
        m.train()
        m(ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert "moekit.unpacked_gate_projections.default" not in graphs[-1]
    for n, g in found[0].items():
        torch.testing.assert_close(found[1][n], g, rtol=1e-3, atol=1e-4)
