"""Training a patched model: the unpatched one's gradients, however weights are sharded and activations recomputed."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import moekit.torch as mt
from moekit.errors import MoekitError
from moekit.torch.huggingface import modules

from .patching import close, logits, tiny, tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def small():
    return tiny("Qwen3Next", num_hidden_layers=2, layer_types=["full_attention", "full_attention"])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def pair(device):
    """An unpatched model and a patched one with the same weights."""
    models = [small().to(device) for _ in range(2)]
    assert mt.patch(models[1]).left == ()
    return models


def ids_for(model):
    return tokens().to(model.device)


def gradients(model):
    """The gradient of each parameter, by name."""
    ids = ids_for(model)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same_gradients(models):
    wanted, got = (gradients(m) for m in models)
    assert list(got) == list(wanted)
    for n, g in wanted.items():
        torch.testing.assert_close(got[n], g, rtol=1e-3, atol=1e-5, msg=lambda text, n=n: f"{n}: {text}")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_runs_experts_twice_and_has_the_same_gradients(pair, reentrant):
    runs = [[], []]
    for model, calls in zip(pair, runs, strict=True):
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        for layer in model.model.layers:
            layer.mlp.experts.register_forward_hook(lambda *args, calls=calls: calls.append(torch.is_grad_enabled()))
    same_gradients(pair)
    assert runs[0] == runs[1]
    assert len(runs[1]) == 4


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_by_hand_in_evaluation_mode(pair, reentrant, device):
    """The first run of a reentrant one does not record, and goes the way that its repetition goes."""
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    found = []
    for model in pair:
        layer = model.model.layers[0]
        rotary = model.model.rotary_emb(x, torch.arange(3, device=device)[None])
        model.zero_grad()
        out = checkpoint(lambda x, layer=layer, rotary=rotary: layer(x, position_embeddings=rotary), x, use_reentrant=reentrant)
        (found_x,) = torch.autograd.grad(out.square().sum(), x) if not reentrant else (None,)
        if reentrant:
            out.square().sum().backward()
            found_x, x.grad = x.grad, None
        found.append((out.detach(), found_x))
    for wanted, got in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_both_runs_of_a_checkpoint_go_the_same_way(pair, reentrant, monkeypatch, device):
    """Not seen in float32's logits: rounded otherwise, a router chooses other experts."""
    calls, original = [], modules.gates
    monkeypatch.setattr(modules, "gates", lambda *args: calls.append(1) or original(*args))
    model = pair[1]
    layer, x = model.model.layers[0], torch.randn(2, 3, 64, device=device, requires_grad=True)
    rotary = model.model.rotary_emb(x, torch.arange(3, device=device)[None])
    checkpoint(lambda x: layer(x, position_embeddings=rotary), x, use_reentrant=reentrant).sum().backward()
    checkpoint(layer.mlp, x, use_reentrant=reentrant).sum().backward()
    assert not calls


@pytest.mark.parametrize("mode", [True, False])
def test_only_routed_experts_trained(pair, mode):
    for model in pair:
        model.train(mode).requires_grad_(False)
        for layer in model.model.layers:
            layer.mlp.experts.requires_grad_(True)
    same_gradients(pair)


def test_training_after_inference_mode(device):
    """Nothing was made of the parameters there."""
    models = [small().to(device) for _ in range(2)]
    with torch.inference_mode():
        mt.patch(models[1])
        close(models[1](ids_for(models[1])).logits, models[0](ids_for(models[0])).logits)
    assert not any(p.is_inference() for p in models[1].parameters())
    same_gradients([m.train() for m in models])


def test_a_frozen_model_is_fused_where_gradients_are_on(pair, monkeypatch):
    calls, original = [], modules.gates
    monkeypatch.setattr(modules, "gates", lambda *args: calls.append(1) or original(*args))
    for model in pair:
        model.requires_grad_(False)
    close(pair[1](ids_for(pair[1])).logits, pair[0](ids_for(pair[0])).logits)
    assert len(calls) == 2


@pytest.fixture
def group(device):
    """A process group of this process alone."""
    import torch.distributed as dist

    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh(device, (1,))
    dist.destroy_process_group()


UNITS = {
    "model": lambda model: [model],
    "layers": lambda model: [*model.model.layers, model],
    "parts": lambda model: [
        m for layer in model.model.layers
        for m in (layer.mlp.shared_expert, layer.mlp.gate, layer.mlp, layer.post_attention_layernorm, layer)
    ] + [model],
}  # fmt: skip


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fully_sharded(pair, group, units, first):
    """Two steps of SGD; after each, an unpatched model with the same weights has the same logits and gradients."""
    from torch.distributed.fsdp import fully_shard

    plain, model = pair
    if first == "shard":
        mt.unpatch(model)
    for unit in UNITS[units](model):
        fully_shard(unit, mesh=group)
    if first == "shard":
        left = mt.patch(model).left
        assert all("class made on top" in why or "sharded" in why or "is left" in why for _, why in left)
    whole = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    for _ in range(3):
        close(logits(model.eval(), ids_for(plain)), logits(plain.eval(), ids_for(plain)))
        wanted, got = (gradients(m.train()) for m in (plain, model))
        with torch.no_grad():
            for (n, p), own in zip(model.named_parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(whole(got[n]), wanted[n], rtol=1e-3, atol=1e-4)
                p.sub_(p.grad * 0.1)
                p.grad = None  # the next forward leaves other parameters, unsharded ones, for zero_grad to find
                own.copy_(whole(p))


def test_a_class_made_of_a_patched_one_stays(pair, group):
    from torch.distributed.fsdp import fully_shard

    fully_shard(pair[1].model.layers[0], mesh=group)
    with pytest.raises(MoekitError, match=r"unpatch: model\.layers\.0 is a FSDPQwen3NextDecoderLayer, a class made on top"):
        mt.unpatch(pair[1])
    assert isinstance(pair[1].model.layers[1].mlp, modules.Block)
