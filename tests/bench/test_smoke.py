"""Every question's `--smoke` on a machine without a GPU: all of a bench but the times."""

import jax
import pytest

from bench import fusions_jax, layer_jax, patched_model
from bench.cases import CASES, block_case
from bench.common import load
from bench.model_jax import Setting, model_of
from bench.runner import ask
from tests.bench.questions import NAMES, question

NARROW = {
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "vocab_size": 64,
    "hidden_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
PEERS = ("flashinfer", "sgl", "liger", "quack", "vllm", "fla", "peers", "triton_kernels")  # not installed, or not for a CPU


@pytest.fixture(autouse=True)
def quick():
    """No figure of a smoke run means anything, so XLA need not make its programs fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.parametrize("name", NAMES)
def test_a_small_case_is_measured(name, monkeypatch, tmp_path):
    """All sides but peers have a time, and the file has what was told."""
    if name == "patched_model":
        pytest.importorskip("transformers")
    monkeypatch.setitem(CASES, "gate_block 648", block_case("gate", 16, hidden=64, experts=32, k=4))
    monkeypatch.setattr(fusions_jax, "LENGTH", 2)
    every = layer_jax.layers()
    monkeypatch.setattr(layer_jax, "layers", lambda: {name: every[name] for name in ("moekit, epilogue", "jnp, one gemm")})
    monkeypatch.setattr(patched_model, "SMALL", NARROW)
    path = tmp_path / "r.json"
    result = ask(question(name), ["--smoke", "--json", str(path)])
    assert load(path)["rows"] == result["rows"]
    assert result["left out"] == []
    mine = [r for r in result["rows"] if not str(r.get("side", "")).removeprefix("float8, ").startswith(PEERS)]
    assert mine
    for row in mine:
        assert "problem" not in row, row
        times = [v for k, v in row.items() if k in ("us", "ms", "s", "step_ms", "bare ms", "ulps")]
        assert times
        assert all(v > 0 for v in times), row


def test_weights_are_random_everywhere():
    """Of the model that the smoke runs have, too."""
    model = model_of(Setting(1, 1, "512", "float32", True))
    for array in jax.tree.leaves(model.params):
        assert (array != 0).mean() > 0.9
