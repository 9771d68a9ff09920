"""Qwen3-Next and Qwen3.5 MoE in every form in which transformers writes them, against transformers."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    FineGrainedFP8Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from moekit.models.qwen3next import CheckpointError, Config, ConfigError, load, quantize, write_random_checkpoint
from moekit.models.qwen3next.checkpoint import Checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN
from moekit.models.qwen3next.files import read_tensors
from moekit.models.qwen3next.forms import Form
from tests.models.conftest import CASES

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "layer_types": [GDN, ATTENTION],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 16,  # four a key head, as the larger of Qwen3.5 have
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 32,
    "eos_token_id": [3, 5],
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
}
TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 48}
FAMILIES = ("next", "text", "with a tower")
LENGTHS, NEW = (66, 3), 3


def scaled(model):
    """Random weights of a trained model's sizes, so that every part of a layer changes the logits."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("A_log"):
                value.copy_(torch.log(torch.rand(value.shape, generator=rng) * 4 + 0.05))
            elif value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=rng) - 0.3)
            else:
                gain = 4.0 if name.endswith("mlp.gate.weight") else 1.0
                width = 1 if "embed_tokens" in name else value.shape[-1] if value.ndim < 4 else 100
                value.copy_(torch.randn(value.shape, generator=rng) * gain * width**-0.5)
    return model.eval()


def made(family):
    torch.manual_seed(0)
    if family == "next":
        return scaled(Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES)))
    if family == "text":
        return scaled(Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**SIZES)))
    sections = {**SIZES["rope_parameters"], "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    tower = {**TOWER, "num_position_embeddings": 4}
    whole = Qwen3_5MoeConfig(text_config={**SIZES, "rope_parameters": sections}, vision_config=tower)
    return scaled(Qwen3_5MoeForConditionalGeneration(whole))


@dataclass(frozen=True)
class Family:
    """A model of transformers and the folders it was saved to: experts apart, and fused."""

    model: torch.nn.Module
    apart: Path
    fused: Path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    model = made(request.param)
    root = tmp_path_factory.mktemp("family")
    for name in ("apart", "fused"):
        model.save_pretrained(root / name, save_original_format=name == "apart")
    names = set(read_tensors(root / "fused"))
    assert sum(name.endswith("mlp.experts.gate_up_proj") for name in names) == 2
    assert any(name.endswith("mlp.experts.5.up_proj.weight") for name in read_tensors(root / "apart"))
    return Family(model, root / "apart", root / "fused")


@pytest.fixture(scope="module")
def answers(family):
    """Prompts of unequal lengths, random tokens after them, and the float32 logits of every prompt place and of these."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, SIZES["vocab_size"], n + NEW) for n in LENGTHS]
    with torch.no_grad():
        logits = [family.model(torch.tensor(row)[None]).logits[0].numpy() for row in rows]
    prompts = [row[:n].tolist() for row, n in zip(rows, LENGTHS, strict=True)]
    return prompts, np.stack([row[n:] for row, n in zip(rows, LENGTHS, strict=True)]), logits


@pytest.mark.parametrize("tp", [1, 4])
def test_float32_logits_of_prompts_and_of_cached_steps(family, answers, forced, mesh, tp):
    prompts, tokens, wanted = answers
    every, steps = forced(load(family.fused, mesh(tp)), prompts, tokens, fill="xla", step="xla")
    for row, (length, want) in enumerate(zip(LENGTHS, wanted, strict=True)):
        scale = np.abs(want).max()
        assert scale > 1
        assert np.abs(every[row] - want[:length]).max() <= 1e-4 * scale
        assert np.abs(steps[row] - want[length - 1 :]).max() <= 1e-4 * scale


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_both_forms_give_the_same_arrays(family, mesh, tp):
    """The one whose logits are transformers', and the other."""
    fused, apart = (load(where, mesh(tp)) for where in (family.fused, family.apart))
    assert fused.config == apart.config
    for a, b in zip(jax.tree.leaves(fused.params), jax.tree.leaves(apart.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_config_is_read(family):
    config = Config.from_json(family.fused)
    assert config == Config.from_json(family.apart)
    theirs = family.model.config.get_text_config()
    assert config.eos_token_ids == (3, 5)
    assert (config.rope_theta, config.rotary_dim, config.dtype) == (5e5, 8, "float32")
    assert (config.vocab_size, config.num_experts) == (theirs.vocab_size, theirs.num_experts)
    assert Config.from_json(config.to_json()) == config


def test_in_fp8_it_is_what_transformers_reads(family, mesh, tmp_path):
    """Of the fused form: experts taken apart, the tower as it was."""
    quantize(family.fused, tmp_path / "fp8")
    given = {"quantization_config": FineGrainedFP8Config(dequantize=True), "dtype": torch.float32}
    theirs, other = type(family.model).from_pretrained(tmp_path / "fp8", **given), type(family.model)(family.model.config)
    other.load_state_dict(theirs.state_dict())
    other.save_pretrained(tmp_path / "plain")
    fp8, plain, exact = (load(folder, mesh(2)).params for folder in (tmp_path / "fp8", tmp_path / "plain", family.fused))
    for a, b in zip(jax.tree.leaves(fp8), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(fp8), jax.tree.leaves(exact), strict=True))


def test_fused_experts_of_another_number_are_refused(family, mesh, tmp_path):
    directory = shutil.copytree(family.fused, tmp_path / "other")
    raw = json.loads((directory / "config.json").read_text())
    raw.get("text_config", raw)["num_experts"] = 10**9
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"experts.gate_up_proj has shape \[6, 32, 48\] where \[1000000000, 32, 48\]"):
        load(directory, mesh(1))


def test_a_tensor_of_nan_is_named_as_its_file_names_it(family, mesh, tmp_path):
    directory = shutil.copytree(family.fused, tmp_path / "nan")
    tensors = load_file(directory / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.experts.down_proj"))
    tensors[name][5, 3, 2] = np.nan
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN or an infinity"):
        load(directory, mesh(2))


def test_what_a_narrow_checkpoint_keeps_in_float32_stays_so(mesh, tmp_path):
    """Qwen3.5's A_log and the delta nets' norms: of float32 where all else is bfloat16."""
    model = made("text").bfloat16()
    exact = torch.rand(SIZES["linear_value_head_dim"], generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.layers.0.linear_attn.norm.weight": exact.numpy()}, tmp_path / "model.safetensors")
    layer = load(tmp_path, mesh(1)).params["layers"][0]
    np.testing.assert_array_equal(layer["norm"], exact.numpy())
    assert not np.array_equal(exact.bfloat16().float().numpy(), exact.numpy())


def test_a_tower_is_refused_where_the_family_has_none(mesh, tmp_path):
    made("next").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "model.visual.x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor model.visual.x is not part of the model"):
        load(tmp_path, mesh(1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": None}, "text_config is None where a JSON object is needed"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights are not supported"),
        ({"text_config": {"model_type": "qwen3_next"}}, "model_type of text_config is 'qwen3_next'"),
        ({"text_config": {"text_config": {}}}, "a config within the config is not read"),
        ({"text_config": {"attn_output_gate": False}}, "attention without its output gate"),
        ({"model_type": "qwen3_5"}, "model_type is 'qwen3_5' where 'qwen3_next', 'qwen3_5_moe' or"),
    ],
)
def test_what_a_config_with_a_tower_may_not_say(change, words):
    raw = {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text"}, "vision_config": {"depth": 27}}
    plain = Config.from_json(raw)
    assert (plain.num_layers, plain.num_experts, plain.num_experts_per_tok, plain.vocab_size) == (40, 256, 8, 248320)
    with pytest.raises(ConfigError, match=words):
        Config.from_json({**raw, **change})


@pytest.mark.parametrize("form", ["apart", "fused"])
def test_what_is_skipped_says_nothing_of_the_form(tmp_path, form):
    """A multi-token-prediction layer may have its experts in another form, and in other sizes."""
    config = CASES["two-layers"]
    file = write_random_checkpoint(tmp_path, config) / "model.safetensors"
    tensors = load_file(file)
    if form == "fused":
        sizes = Form(config, "model.", fused=True).shapes
        tensors = {name: tensors.get(name, np.zeros(shape, np.float32)) for name, shape in sizes.items()}
    save_file({"mtp.layers.0.mlp.experts.gate_up_proj": np.zeros((2, 3, 5), np.float32), **tensors}, file)
    with Checkpoint(tmp_path, config) as checkpoint:
        assert checkpoint.form.fused == (form == "fused")
        assert len(checkpoint.skipped["mtp."]) == 1
