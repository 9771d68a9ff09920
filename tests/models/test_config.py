"""config.json: what transformers writes is read, and what is not built is refused by name."""

import json
from dataclasses import replace

import pytest
from transformers import Qwen3NextConfig

from moekit.errors import MoekitError
from moekit.models.qwen3next import TINY, Config, ConfigError, load
from moekit.models.qwen3next.config import ATTENTION, GDN, check_tensor_parallel


def test_what_transformers_writes_is_read(tmp_path):
    theirs = Qwen3NextConfig(
        num_hidden_layers=6,
        layer_types=[GDN, ATTENTION] * 3,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 0.5},
        norm_topk_prob=False,
        tie_word_embeddings=True,
        eos_token_id=[3, 4],
        dtype="bfloat16",
    )
    theirs.save_pretrained(tmp_path)
    mine = Config.from_json(tmp_path)
    assert mine == Config.from_json(tmp_path / "config.json")
    assert mine.layer_types == (GDN, ATTENTION) * 3
    assert (mine.rope_theta, mine.rotary_dim, mine.head_dim) == (12345.0, 128, 256)
    assert (mine.norm_topk_prob, mine.tie_word_embeddings, mine.eos_token_ids) == (False, True, (3, 4))
    assert (mine.dtype, mine.hidden_size, mine.num_experts, mine.num_layers) == ("bfloat16", 2048, 512, 6)


def test_defaults_and_older_names():
    raw = {
        "model_type": "qwen3_next",
        "vocab_size": 10,
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_experts": 16,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "torch_dtype": "float16",
        "eos_token_id": 7,
    }
    config = Config.from_json(raw)
    assert [i for i, kind in enumerate(config.layer_types) if kind == ATTENTION] == [3, 7]
    assert (config.rope_theta, config.rotary_dim, config.dtype, config.eos_token_ids) == (1e7, 64, "float16", (7,))
    every_other = Config.from_json({**raw, "full_attention_interval": 2})
    assert every_other.layer_types == (GDN, ATTENTION) * 4


def test_a_config_survives_the_round_trip_and_transformers_reads_it(tmp_path):
    config = replace(TINY, dtype="float32", eos_token_ids=(5,))
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    assert Config.from_json(tmp_path) == config
    theirs = Qwen3NextConfig.from_pretrained(tmp_path)
    assert tuple(theirs.layer_types) == config.layer_types
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["partial_rotary_factor"] * theirs.head_dim == config.rotary_dim


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe'"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers is [1], and dense layers are not supported"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"attention_bias": True}, "biases are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 8}}, "quantised weights are not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope type is 'linear'"),
        ({"layer_types": [GDN]}, "layer_types has 1 entries where num_hidden_layers is 4"),
        ({"layer_types": [GDN, GDN, GDN, "sliding_attention"]}, "'sliding_attention'"),
        ({"hidden_size": "64"}, "hidden_size is '64' where a positive integer is needed"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok = 17 exceeds num_experts = 16"),
        ({"linear_num_value_heads": 12}, "linear_num_value_heads = 12 is no multiple"),
        ({"partial_rotary_factor": 2.0}, "64 of 32 head dimensions are rotated"),
        ({"dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'"),
        ({"rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_type": "default"}}, "rope_scaling: rope type is 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "rotary embeddings per layer type are not supported"),
        ({"rope_scaling": [1]}, "rope_scaling is [1] where a JSON object or null is needed"),
        ({"rope_theta": 0}, "rope_theta is 0 where a positive float32 number is needed"),
        ({"rope_theta": None}, "rope_theta is None where"),
        ({"rope_theta": float("nan")}, "rope_theta is nan where"),
        ({"partial_rotary_factor": "x"}, "partial_rotary_factor is 'x' where a positive number is needed"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor is nan where"),
        ({"attn_output_gate": False}, "attn_output_gate is False, and attention without its output gate"),
        ({"output_gate_type": "sigmoid"}, "output_gate_type is 'sigmoid', and other output gates"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "quantised weights are not supported (the field must not be there)"),
        ({"quantization_config": {}}, "quantised weights are not supported"),
        ({"is_causal": False}, "attention that sees later tokens is not supported"),
        ({"use_sliding_window": True}, "sliding windows are not supported"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "layers of their own sizes are not supported"),
        ({"attribute_map": {"num_experts": "x"}}, "other names for fields are not read (the field must not be there)"),
        ({"transformers_weights": "x.safetensors"}, "weights under another name"),
        ({"configuration_files": ["config.4.0.0.json"]}, "other config files than config.json are not read"),
        ({"decoder_sparse_step": True}, "decoder_sparse_step is True"),
        ({"attention_bias": 0}, "attention_bias is 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x' where a positive float32 number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan where"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0 where"),
        ({"norm_topk_prob": "false"}, "norm_topk_prob is 'false' where true or false is needed"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0 where true or false is needed"),
        ({"layer_types": 3}, "layer_types is 3 where a list"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is 1000000000 where at most 65536 is needed"),
        ({"hidden_size": 10**30}, "where at most 2147483647 is needed"),
        ({"hidden_size": True}, "hidden_size is True where a positive integer is needed"),
        ({"hidden_size": None}, "hidden_size is None where"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x' where a token's id or a list of them is needed"),
        ({"eos_token_id": [1, None]}, "eos_token_id is [1, None] where"),
    ],
)
def test_what_is_not_built_is_refused(change, words):
    with pytest.raises(ConfigError) as caught:
        Config.from_json({**TINY.to_json(), **change})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MoekitError)


@pytest.mark.parametrize(
    "change",
    [
        {"quantization_config": None, "rope_scaling": None, "attn_output_gate": True, "output_gate_type": "swish"},
        {"hidden_act": "swish", "mlp_only_layers": None, "use_sliding_window": False},
        {"torch_dtype": "auto", "dtype": "float16"},
        {"rope_scaling": {}, "rope_parameters": {"type": "yarn", "rope_type": "default", "rope_theta": TINY.rope_theta}},
        {"some_field": float("inf"), "num_local_experts": 3, "sliding_window": 7, "rope_type": "yarn", "n_embd": "x"},
    ],
)
def test_what_changes_nothing_is_ignored(change):
    mine = Config.from_json({**TINY.to_json(), **change})
    assert mine == replace(TINY, dtype=change.get("dtype"))


def test_rope_scaling_stands_for_all_of_rope_parameters():
    """It wins whole: what it does not say comes from the top level and not from the other mapping."""
    rope = {"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 1.0}}
    rope |= {"rope_theta": 3e4, "partial_rotary_factor": 0.5}
    mine = Config.from_json({**TINY.to_json(), **rope, "rope_scaling": {"type": "default"}})
    assert (mine.rope_theta, mine.rotary_dim) == (3e4, 16)
    mine = Config.from_json({**TINY.to_json(), **rope, "partial_rotary_factor": None, "rope_scaling": {"rope_theta": 5}})
    assert (mine.rope_theta, mine.rotary_dim) == (5.0, 32)


def test_a_config_that_is_missing_or_no_json(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        Config.from_json(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        Config.from_json(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="list where a JSON object is needed"):
        Config.from_json(tmp_path)


@pytest.mark.parametrize(
    ("change", "tp", "words"),
    [
        ({}, 3, "tp = 3 does not divide linear_num_key_heads = 8"),
        ({"linear_num_key_heads": 16, "num_attention_heads": 4}, 8, "num_attention_heads = 4"),
        ({"moe_intermediate_size": 60}, 8, "moe_intermediate_size = 60"),
        ({"shared_expert_intermediate_size": 36}, 8, "shared_expert_intermediate_size = 36"),
        ({"num_attention_heads": 24, "num_key_value_heads": 3}, 2, "num_key_value_heads = 3"),
        ({}, 0, "tp must be at least 1"),
    ],
)
def test_a_tp_that_does_not_divide_is_refused(change, tp, words):
    with pytest.raises(ConfigError) as caught:
        check_tensor_parallel(replace(TINY, **change), tp)
    assert words in str(caught.value)


def test_tp_is_refused_before_anything_is_read(tmp_path, mesh):
    """The directory holds no weights at all, so reading would have given another error."""
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_json()))
    with pytest.raises(ConfigError, match="tp = 5 does not divide"):
        load(tmp_path, mesh(5))
    other = mesh(2)
    with pytest.raises(ConfigError, match="one named 'tp' is needed"):
        load(tmp_path, type(other)(other.devices, ("model",)))
