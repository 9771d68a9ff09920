"""What is attached to, wrapped around or exchanged in a patched model has its effect: the unpatched model is the oracle."""

import copy
import sys

import pytest
import torch
from torch import nn

import moekit.torch as mt
from moekit.torch.huggingface import modules

from .patching import blocks, close, logits, tiny, tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SITES = (
    "mlp.shared_expert", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
    "mlp.shared_expert.act_fn", "mlp.shared_expert_gate", "mlp.gate", "mlp.experts", "mlp", "input_layernorm",
    "post_attention_layernorm",
)  # fmt: skip


@pytest.fixture(params=DEVICES)
def pair(request):
    """`pair()`: an unpatched model of one layer and a patched one with the same weights."""

    def make():
        return [one_layer().to(request.param), patched(one_layer().to(request.param))]

    return make


@pytest.fixture
def fused(monkeypatch):
    """The calls of blocks that are fused are counted in it."""
    calls, original = [], modules.gates
    monkeypatch.setattr(modules, "gates", lambda *args: calls.append(1) or original(*args))
    return calls


def one_layer():
    return tiny("Qwen3Next", num_hidden_layers=1, layer_types=["full_attention"])


def patched(model):
    assert mt.patch(model).left == ()
    return model


def ids_for(model):
    return tokens().to(model.device)


def both(models, what=logits):
    """What two models give, the second compared with the first."""
    wanted, got = (what(m, ids_for(m)) for m in models)
    close(got, wanted)
    return wanted


def at(model, site):
    return [layer.get_submodule(site) for layer in model.model.layers]


@pytest.mark.parametrize("site", SITES)
def test_hooks_run_and_what_they_change_is_changed(pair, fused, site):
    """Each hook once, and the model is fused again when they are gone."""
    models, seen = pair(), [[], []]
    before = both(models)
    handles = []
    for model, calls in zip(models, seen, strict=True):

        def before_it(module, args, calls=calls):
            calls.append("pre")
            return (args[0] * 1.25, *args[1:]) if args else None

        def after_it(module, args, out, calls=calls):
            calls.append("post")
            return tuple(x * 0.5 if x.is_floating_point() else x for x in out) if isinstance(out, tuple) else 0.5 * out

        for m in at(model, site):
            handles += [m.register_forward_pre_hook(before_it), m.register_forward_hook(after_it)]
    assert not torch.allclose(both(models), before, atol=1e-2)
    assert seen[0] == seen[1] == ["pre", "post"]
    for h in handles:
        h.remove()
    fused.clear()
    both(models)
    assert len(fused) == 1


def test_hooks_on_all_modules_see_every_module(pair):
    models = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen[-1].append(type(m).__name__))
    try:
        for model in models:
            seen.append([])
            logits(model, ids_for(model))
    finally:
        handle.remove()
    assert seen[0] == seen[1]


def test_a_hook_may_keep_the_experts_output(pair):
    """It is not written to afterwards."""
    models, kept = pair(), [[], []]
    for model, outs in zip(models, kept, strict=True):
        at(model, "mlp.experts")[0].register_forward_hook(lambda m, args, out, outs=outs: outs.append(out))
    both(models)
    close(kept[1][0], kept[0][0])


class Scaled(nn.Linear):
    """As adapters are: a Linear that does more than its weight says."""

    def forward(self, x):
        return super().forward(x) * 1.5


def exchange(module):
    module.__class__ = Scaled


def own_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 1.5


def parametrise(module):
    scaled = nn.Module()
    scaled.forward = lambda w: w * 1.5
    nn.utils.parametrize.register_parametrization(module, "weight", scaled)


def add_bias(module):
    module.bias = nn.Parameter(torch.full_like(module.weight[:, 0], 0.5))


@pytest.mark.parametrize("change", [exchange, own_forward, parametrise, add_bias])
@pytest.mark.parametrize("site", [s for s in SITES if s.endswith(("_proj", "_gate"))])
def test_projections_that_are_more_than_their_weight(pair, change, site):
    models = pair()
    before = both(models)
    for model in models:
        for m in at(model, site):
            change(m)
    assert not torch.allclose(both(models), before, atol=1e-3)


def test_another_activation(pair):
    models = pair()
    before = both(models)
    for model in models:
        for m in at(model, "mlp.shared_expert"):
            m.act_fn = nn.GELU()
    assert not torch.allclose(both(models), before, atol=1e-3)


def lora(model, targets):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"], ["shared_expert_gate"]], ids=str)
def test_adapters_in_front_of_and_behind_patch(pair, targets):
    """Logits and the gradients of every adapter, in training and in evaluation mode."""
    plain, ours = pair()
    wanted, late = lora(plain, targets), lora(ours, targets)
    early = lora(copy.deepcopy(plain.unload() if hasattr(plain, "unload") else one_layer()).to(plain.device), targets)
    mt.patch(early.base_model.model)
    for adapted in (late, early):
        both([wanted, adapted])
        for mode in (True, False):
            grads = [gradients(m.train(mode), ids_for(plain)) for m in (wanted, adapted)]
            assert list(grads[0]) == list(grads[1])
            assert any("lora" in n for n in grads[0])
            for n, g in grads[0].items():
                torch.testing.assert_close(grads[1][n], g, rtol=1e-3, atol=1e-5, msg=n)


def test_autocast_is_the_original(pair):
    """A block's products in bfloat16, as autocast has them; a layer's sums in the dtypes of its own."""
    plain, ours = pair()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(plain.device)
    with torch.no_grad(), torch.autocast(plain.device.type, torch.bfloat16):
        wanted, got = (m.model.layers[0].mlp(x) for m in (plain, ours))
        assert torch.equal(got, wanted)
        outs = [m(ids_for(m)).logits for m in (plain, ours)]
        assert outs[0].dtype == outs[1].dtype


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_another_dtype(pair, fused, move):
    """float64 is not the kernels', and runs as it was."""
    models = [getattr(m, move)() for m in pair()]
    for m in models:
        m.set_experts_implementation("eager")
    fused.clear()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(models[0].device, models[0].dtype) / 8
    with torch.no_grad():
        wanted, got = (m.model.layers[0].mlp(x) for m in models)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    assert len(fused) == (move != "double")
    if move == "double":
        both(models)


def test_weights_of_a_mixed_block_are_not_the_kernels(pair, fused):
    models = pair()
    for model in models:
        block = model.model.layers[0].mlp
        block.shared_expert_gate.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        logits(models[0], ids_for(models[0]))
    with pytest.raises(RuntimeError, match="dtype"):
        logits(models[1], ids_for(models[1]))
    assert not fused


def test_functional_call_and_gradients_of_functions(pair):
    """torch.func sees the original's operations."""
    plain, ours = pair()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(plain.device)
    found = []
    for model in (plain, ours):
        block = model.model.layers[0].mlp
        block.experts.config._experts_implementation = "eager"
        weights = {n: p.detach() * 1.1 for n, p in block.named_parameters()}
        grad = torch.func.grad(lambda w, block=block: torch.func.functional_call(block, w, (x,)).square().mean())(weights)
        with torch.no_grad():
            found.append(grad | {"out": torch.func.functional_call(block, weights, (x,))})
    for n, g in found[0].items():
        close(found[1][n], g)


def test_a_saved_model_can_be_read(pair, tmp_path, fused):
    plain, ours = pair()
    torch.save(ours, tmp_path / "model.pt")
    for name in ("qwen3_next", "qwen3_5_moe"):
        sys.modules.pop(f"moekit.torch.huggingface.{name}", None)  # as in a process that has patched nothing
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    both([plain, read])
    assert len(fused) == 1
    assert type(mt.unpatch(read).model.layers[0]) is type(plain.model.layers[0])


def replica(module):
    """As nn.DataParallel makes them: another dictionary of attributes, parameters that are plain tensors."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = replica(child)
    for name, p in module._parameters.items():
        setattr(made, name, None if p is None else p.detach().clone())
    return made


def test_replicas_have_weights_of_their_own(pair):
    """A replica's forward is its own, not that of the module it was made from."""
    models = pair()
    before = both(models)
    replicas = [replica(m.model) for m in models]
    with torch.no_grad():
        for model in models:
            for p in model.model.layers.parameters():
                p.zero_()
        outs = [m.lm_head(r(ids_for(m)).last_hidden_state) for m, r in zip(models, replicas, strict=True)]
    close(outs[0], before)
    close(outs[1], before)


def test_two_copies(pair):
    models = pair()
    before = both(models)
    copies = [copy.deepcopy(m) for m in models]
    with torch.no_grad():
        for m in models:
            for block in blocks(m):
                block.shared_expert.gate_proj.weight.mul_(2)
                block.gate.weight.mul_(-1)
    close(both(copies), before)
    assert not torch.allclose(both(models), before, atol=1e-2)


def test_offloaded_afterwards(pair):
    """accelerate brings weights in through hooks on the modules that own them."""
    accelerate = pytest.importorskip("accelerate")
    models = pair()
    before = both(models)
    offloaded = accelerate.cpu_offload(models[1], execution_device=models[0].device)
    assert offloaded.model.layers[0].mlp.gate.weight.is_meta
    with torch.no_grad():
        close(offloaded(ids_for(models[0])).logits, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_afterwards():
    """torch.ao exchanges every Linear."""
    models = [one_layer(), patched(one_layer())]
    before = both(models)
    quantised = [torch.ao.quantization.quantize_dynamic(m, {nn.Linear}) for m in models]
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for one, other in zip(*[blocks(m) for m in quantised], strict=True):
            close(other(x), one(x))
    assert not torch.equal(logits(quantised[1], tokens()), before)
