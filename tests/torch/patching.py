"""Small models of transformers for the tests of `patch`, and what is asked of them."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")
TINY = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48,
    "num_experts": 8, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "max_position_embeddings": 128,
}  # fmt: skip


def tiny(family: str, seed: int = 0, **changes):
    """A small model with weights of a size at which every part matters."""
    torch.manual_seed(seed)
    if family == "Qwen3Next":
        config, model = transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM
    else:
        from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig as config

        model = transformers.Qwen3_5MoeForCausalLM
    made = model(config(**{**TINY, **changes})).eval()
    made.config.use_cache = "linear_attention" in made.config.layer_types  # their caches ask for such a layer up to 5.12
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p) * 0.1 if p.dim() > 1 else torch.rand_like(p) * 0.5)
    return made


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def in_double(model):
    """A float64 copy of a model."""
    copied = copy.deepcopy(model).double()
    copied.set_experts_implementation("eager")  # the grouped one has no float64
    return copied


def tokens(seed: int = 0, shape=(2, 9)):
    return torch.randint(0, TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def close(got, wanted):
    """Within what float32 sums in another order give."""
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=5e-5)


def blocks(model) -> list:
    """The MoE blocks of a model."""
    return [layer.mlp for layer in model.model.layers]
