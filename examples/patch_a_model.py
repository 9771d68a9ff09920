"""Patch a Hugging Face Qwen3-Next: a tiny random one, so that it runs anywhere in seconds.

    python examples/patch_a_model.py

On a GPU the patched modules run Triton kernels, on a CPU array evaluation of the same declarations.
"""

import torch
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from moekit.torch import patch, unpatch

config = Qwen3NextConfig(
    vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=96, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=16,
    num_experts_per_tok=4, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, max_position_embeddings=128,
)  # fmt: skip
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = Qwen3NextForCausalLM(config).to(device).eval()
prompt = torch.randint(0, 256, (2, 8), device=device)

with torch.no_grad():
    before = model(prompt).logits
    tokens = model.generate(prompt, max_new_tokens=8, do_sample=False)

    print(patch(model))  # what was replaced, and what was left and why
    after = model(prompt).logits
    print(f"largest difference of a logit: {(after - before).abs().max():.1e}")
    assert torch.equal(tokens, model.generate(prompt, max_new_tokens=8, do_sample=False))

    unpatch(model)  # everything as it was; a state dict saved in between is the original one too
    assert torch.equal(model(prompt).logits, before)
print("patched and unpatched: the same tokens")
