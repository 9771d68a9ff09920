"""Patched Hugging Face models: the same function, the same state dict, and back again."""

import copy

import pytest
import torch

import moekit.torch as mt
from moekit.errors import MoekitError

from .patching import in_double, logits, tiny, tokens


@pytest.fixture(params=["Qwen3Next", "Qwen3_5Moe"])
def family(request):
    return request.param


def test_what_is_replaced(family):
    report = mt.patch(tiny(family))
    counts = {}
    for _, what in report.replaced:
        counts[what] = counts.get(what, 0) + 1
    assert counts == {
        "add_rms_norm": 4,
        "gated_rms_norm": 3,
        "gate_projections, down_combine": 4,
        "topk_softmax": 4,
        "rms_norm": 11,
    }
    assert report.left == ()
    assert "11 × rms_norm" in str(report)
    assert ("model.layers.0.mlp.gate", "topk_softmax") in report.replaced


def test_same_logits_and_tokens_in_float32(family):
    model, ids = tiny(family), tokens()
    before = logits(model, ids)
    chosen = model.generate(ids, max_new_tokens=8, do_sample=False)
    mt.patch(model)
    torch.testing.assert_close(logits(model, ids), before, rtol=2e-5, atol=2e-5)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), chosen)
    mt.unpatch(model)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("seed", [0, 1])
def test_bfloat16_within_the_error_of_the_original(family, seed):
    """Teacher-forced: no further from the float64 model, on the same rounded weights, than 1.5 times the original is."""
    model = tiny(family, seed).bfloat16()
    exact = logits(in_double(model), tokens(seed))
    original = logits(model, tokens(seed)).double()
    mt.patch(model)
    patched = logits(model, tokens(seed)).double()
    own, ours = ((x - exact).square().mean().sqrt() for x in (original, patched))
    assert ours <= 1.5 * own


def test_state_dict_is_the_original(family, tmp_path):
    model = tiny(family)
    original = {n: x.clone() for n, x in model.state_dict().items()}
    mt.patch(model)
    state = model.state_dict()
    assert list(state) == list(original)
    assert all(torch.equal(state[n], x) for n, x in original.items())
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(x, original[n]) for n, x in loaded.state_dict().items())
    torch.save(state, tmp_path / "state.pt")
    assert all(torch.equal(x, original[n]) for n, x in torch.load(tmp_path / "state.pt").items())


def test_parameters_stay_where_they_are(family):
    """They may be another owner's: an optimiser's, FSDP's, a memory map's."""
    model = tiny(family)
    before = {n: (id(p), p.data_ptr(), p.untyped_storage().nbytes()) for n, p in model.named_parameters()}
    for change in (mt.patch, logits, mt.unpatch):
        change(model, tokens()) if change is logits else change(model)
        assert {n: (id(p), p.data_ptr(), p.untyped_storage().nbytes()) for n, p in model.named_parameters()} == before


def test_loading_moving_and_replacing_weights_is_seen(family):
    model, other, ids = tiny(family), tiny(family, seed=7), tokens()
    wanted = logits(other, ids)
    mt.patch(model)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(logits(model, ids), wanted, rtol=2e-5, atol=2e-5)
    model.load_state_dict(copy.deepcopy(other).state_dict(), assign=True)
    torch.testing.assert_close(logits(model, ids), wanted, rtol=2e-5, atol=2e-5)
    rounded = logits(copy.deepcopy(other).bfloat16().float(), ids)
    torch.testing.assert_close(logits(model.bfloat16().float(), ids), rounded, rtol=2e-5, atol=2e-5)


def test_copies_are_independent(family):
    model, ids = tiny(family), tokens()
    mt.patch(model)
    wanted = logits(model, ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()
    torch.testing.assert_close(logits(twin, ids), wanted)
    assert not torch.equal(logits(model, ids), wanted)


def test_router_logits_are_still_recorded(family):
    model, ids = tiny(family), tokens()
    with torch.no_grad():
        wanted = model(ids, output_router_logits=True)
        mt.patch(model)
        got = model(ids, output_router_logits=True)
    for a, b in zip(got.router_logits, wanted.router_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.aux_loss, wanted.aux_loss, rtol=2e-5, atol=2e-5)


def test_training_has_the_original_gradients(family):
    model, ids = tiny(family), tokens()
    model(ids, labels=ids).loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mt.patch(model)
    model(ids, labels=ids).loss.backward()
    for n, p in model.named_parameters():
        if n in wanted:
            torch.testing.assert_close(p.grad, wanted[n], rtol=1e-3, atol=1e-5)


def test_patching_twice_and_unpatching_twice(family):
    model, ids = tiny(family), tokens()
    before = logits(model, ids)
    assert mt.patch(model).replaced == mt.patch(model).replaced
    torch.testing.assert_close(logits(model, ids), before, rtol=2e-5, atol=2e-5)
    assert mt.unpatch(mt.unpatch(model)) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny(family).modules()]
    assert [list(m.__dict__) for m in model.modules()] == [list(m.__dict__) for m in tiny(family).modules()]
    assert torch.equal(logits(model, ids), before)


class Quantised(torch.nn.Linear):
    """Stands in for a quantised layer."""


def spoil_bias(block):
    block.shared_expert.up_proj.bias = torch.nn.Parameter(torch.zeros(48))


def spoil_dtype(block):
    block.gate.weight.data = block.gate.weight.data.bfloat16().float().double()


def spoil_mix(block):
    block.shared_expert_gate.to(torch.bfloat16)


def spoil_class(block):
    block.shared_expert.gate_proj.__class__ = Quantised


def spoil_hook(block):
    block.shared_expert.register_forward_hook(lambda *args: None)


def spoil_activation(block):
    block.shared_expert.act_fn = torch.nn.GELU()


def spoil_device(block):
    block.shared_expert.up_proj.to("meta")


LEFT = {
    spoil_bias: "shared_expert.up_proj has a bias",
    spoil_dtype: "gate.weight is float64; float32, float16 and bfloat16 are served",
    spoil_mix: "shared_expert_gate is bfloat16 but its input is float32",
    spoil_class: "shared_expert.gate_proj is a Quantised, not a plain Linear: quantised, wrapped or sharded",
    spoil_hook: "shared_expert has hooks, which the fused path would pass by",
    spoil_activation: "the shared expert's activation is GELU; gate_projections has SiLU",
    spoil_device: "shared_expert.up_proj.weight is on the meta device",
}


@pytest.mark.parametrize("spoil", list(LEFT), ids=lambda f: f.__name__)
def test_what_is_left_and_why(spoil):
    model = tiny("Qwen3Next", num_hidden_layers=1, layer_types=["full_attention"])
    spoil(model.model.layers[0].mlp)
    left = dict(mt.patch(model).left)
    assert LEFT[spoil] in left["model.layers.0.mlp"]
    assert set(left) <= {"model.layers.0.mlp", "model.layers.0.mlp.gate"}


def more_by_a_hook(down):
    down.register_forward_hook(lambda module, args, out: 2 * out)


def more_by_a_bias(down):
    down.bias = torch.nn.Parameter(torch.linspace(-1, 1, down.out_features))


def more_by_its_class(down):
    down.__class__ = Doubled


class Doubled(torch.nn.Linear):
    """As adapters do: more than the product with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("more", [more_by_a_hook, more_by_a_bias, more_by_its_class])
def test_a_down_projection_that_is_more_than_its_weight_is_called(family, more):
    """And with it the block's other parts, as they are."""
    model, ids = tiny(family), tokens()
    before = logits(model, ids)
    for layer in model.model.layers:
        more(layer.mlp.shared_expert.down_proj)
    original = logits(model, ids)
    assert not torch.allclose(original, before, rtol=1e-2, atol=1e-2)
    left = dict(mt.patch(model).left)
    assert list(left) == [f"model.layers.{i}.mlp" for i in range(4)]
    assert all("down_proj" in why for why in left.values())
    torch.testing.assert_close(logits(model, ids), original, rtol=2e-5, atol=2e-5)


def test_a_dense_layer_stays():
    model, ids = tiny("Qwen3Next", mlp_only_layers=[1]), tokens()
    before = logits(model, ids)
    assert not any(name == "model.layers.1.mlp" for name, _ in mt.patch(model).replaced)
    torch.testing.assert_close(logits(model, ids), before, rtol=2e-5, atol=2e-5)


def test_another_model_is_refused():
    with pytest.raises(MoekitError, match="patch: the model is a Linear; it must be a Qwen3NextForCausalLM or"):
        mt.patch(torch.nn.Linear(2, 2))


def test_compiled(family):
    """The patched decoder layers compile without a break of moekit's making."""
    model, ids = tiny(family), tokens()
    mt.patch(model)
    wanted = logits(model, ids)
    layer = model.model.layers[3].mlp
    torch._dynamo.reset()
    layer.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model, ids), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_gpu(family, dtype):
    """Triton kernels in the model: close to the float64 model, and the same tokens in float32."""
    model, ids = tiny(family).cuda().to(dtype), tokens().cuda()
    exact = logits(in_double(model), ids)
    original = logits(model, ids)
    chosen = model.generate(ids, max_new_tokens=8, do_sample=False)
    mt.patch(model)
    for _ in range(2):  # the second pass takes the short way
        patched = logits(model, ids)
        own, ours = ((x.double() - exact).square().mean().sqrt() for x in (original, patched))
        assert ours <= 1.5 * own + 1e-6
    if dtype == torch.float32:
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), chosen)
    mt.unpatch(model)
    assert torch.equal(logits(model, ids), original)
