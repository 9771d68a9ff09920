"""Random config.json files, read by transformers and by us: the same numbers, or a refusal of what is not served."""

import itertools
import json
import logging

import numpy as np
import pytest
import transformers
from hypothesis import event, given, settings
from hypothesis import strategies as st
from transformers import Qwen3NextConfig

from moekit.models.qwen3next import Config, ConfigError
from moekit.models.qwen3next.config import ATTENTION, GDN, SERVED, SIZES
from tests.models.micro import MICRO, check_same, check_sentence, theirs

EXAMPLES = settings(max_examples=max(300, settings.default.max_examples))
SMALL = {"model_type": "qwen3_next", "num_hidden_layers": 4, "head_dim": 32}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.CRITICAL)
    yield
    transformers.logging.set_verbosity(before)


def ours(raw):
    try:
        return Config.from_json(raw)
    except ConfigError as error:
        check_sentence(str(error))
        return None


def is_ordinary(raw, config, rotary):
    """Whether what transformers read is a model of the kind that is built here, judged by its own objects."""
    sizes = [getattr(config, name) for name in (*SIZES, "num_hidden_layers")]
    frequencies = rotary.inv_freq.numpy()
    return (
        raw.get("model_type") == "qwen3_next"
        and not config.is_heterogeneous
        and all(0 < size < 2**31 for size in sizes)
        and config.num_hidden_layers <= 65536
        and set(config.layer_types) <= {GDN, ATTENTION}
        and raw.get("layer_types") in (None, config.layer_types)
        and (raw.get("layer_types") or is_number(raw.get("full_attention_interval", 4), int))
        and config.rope_parameters["rope_type"] == "default"
        and not {GDN, ATTENTION} & set(config.rope_parameters)
        and raw.get("rope_scaling") != []
        and is_number(config.rope_parameters["rope_theta"], int, float)
        and config.rope_parameters["rope_theta"] < 1e38
        and is_number(config.rope_parameters.get("partial_rotary_factor", 1.0), int, float)
        and bool(np.isfinite(frequencies).all())
        and len(frequencies) > 0
        and (factor := int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))) % 2 == 0
        and factor <= config.head_dim
        and config.rms_norm_eps > 1e-40
        and np.isfinite(np.float32(config.rms_norm_eps))
        and config.hidden_act == "silu"
        and not config.attention_bias
        and (config.decoder_sparse_step, config.mlp_only_layers) == (1, [])
        and config.num_experts_per_tok <= config.num_experts
        and config.linear_num_value_heads % config.linear_num_key_heads == 0
        and config.num_attention_heads % config.num_key_value_heads == 0
        and (config.dtype is None or str(config.dtype).removeprefix("torch.") in ("float32", "float16", "bfloat16"))
        and raw.get("dtype") not in ("half", "float")
        and not REFUSED & set(raw)
    )


def is_number(value, *kinds):
    return type(value) in kinds and value > 0


REFUSED = {name for name in SERVED if name not in ("hidden_act", "attention_bias", "decoder_sparse_step", "mlp_only_layers")}


def check(raw):
    """The property; returns what came of it."""
    mine, read = ours(raw), theirs(raw)
    if read is None:
        assert mine is None, "transformers cannot read it"
        return "neither reads it"
    if mine is None:
        assert not is_ordinary(raw, *read), "transformers reads an ordinary model"
        return "refused"
    check_same(mine, *read)
    return "the same"


# ------------------------------------------------------------------------------------------------------ random configs

NAN, INF = float("nan"), float("inf")
ODD = st.sampled_from([None, True, False, 0, -1, 1, 2, 1.0, 0.5, NAN, INF, "", "x", "1", [], [1], {}, {"a": 1}])
THETA = st.sampled_from([1e4, 1e7, 10_000_000, 5.0, 0.5]) | st.sampled_from([0, 0.0, -1.0, 1e39, NAN, INF, "1e4", None])
FACTOR = st.sampled_from([0.25, 0.5, 1.0, 1, 0.125]) | st.sampled_from([0, 0.01, 0.3, 2.0, -0.5, NAN, "x", None, True])
KIND = st.sampled_from(["default"] * 6 + ["yarn", "linear", "dynamic", "llama3", "longrope", "proportional", "x", None, 3])
LAYERS = st.lists(st.sampled_from([GDN, ATTENTION]), min_size=4, max_size=4)
SIZE = st.sampled_from([1, 2, 4, 8, 16, 32])


def maybe(fields, most):
    """A mapping of some of these fields."""
    return st.lists(st.sampled_from(sorted(fields)), max_size=most, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )


ROPE = {
    "rope_type": KIND,
    "type": KIND,
    "rope_theta": THETA,
    "partial_rotary_factor": FACTOR,
    "factor": st.sampled_from([1.0, 2.0, 4]),
    "original_max_position_embeddings": st.just(4096),
    "mrope_section": st.just([11, 11, 10]),
    "mrope_interleaved": st.booleans(),
    "attention_factor": st.just(1.5),
    "low_freq_factor": st.just(1.0),
    "high_freq_factor": st.just(4.0),
}
LAYERED = st.fixed_dictionaries({}, optional={GDN: maybe(ROPE, 3), ATTENTION: maybe(ROPE, 3) | st.none()})
NO_MAPPING = st.sampled_from([[], [1], "yarn", 3, False])
MAPPING = st.none() | st.just({}) | maybe(ROPE, 4) | maybe(ROPE, 4) | maybe(ROPE, 4) | LAYERED | NO_MAPPING

PLACES = {
    "rope_scaling": MAPPING,
    "rope_parameters": MAPPING,
    "rope_theta": THETA,
    "partial_rotary_factor": FACTOR,
    "rope_type": KIND,
    "layer_types": LAYERS | st.none() | st.sampled_from([["mamba"] * 4, [GDN] * 3, [GDN, 3, GDN, GDN], ["sparse"] * 4, 3, "x"]),
    "full_attention_interval": st.sampled_from([1, 2, 3, 4, 5]) | st.sampled_from([0, -4, 4.0, True, None, "4"]),
    "num_hidden_layers": st.just(4) | st.just(4) | st.sampled_from([3, 8, 0, -1, True, 4.0, "4", None]),
    "head_dim": st.sampled_from([8, 16, 32, 64, 256]) | st.sampled_from([0, 7, 33, None, 32.0]),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 0.1])
    | st.sampled_from([0.0, 1, NAN, INF, -1e-6, 1e-60, "x", "1e-6", None, True]),
    "norm_topk_prob": st.booleans() | st.sampled_from([0, 1, "false", None]),
    "tie_word_embeddings": st.booleans() | st.sampled_from([0, 1, "false", None]),
    "dtype": st.sampled_from(["float32", "float16", "bfloat16", None]) | st.sampled_from(["half", "auto", "float64", "x"]),
    "torch_dtype": st.sampled_from(["float32", "float16", "bfloat16", None]),
    "eos_token_id": st.sampled_from([None, 3, [3, 4], []]) | st.sampled_from([True, "x", [None], 1.0, [1.5], -1]),
    "hidden_act": st.sampled_from(["silu", "swish"]) | st.sampled_from(["gelu", "relu", None]),
    "attention_bias": st.booleans() | st.sampled_from([None, 0, 1, "false"]),
    "decoder_sparse_step": st.just(1) | st.sampled_from([2, 0, -1, True, 1.0, None]),
    "mlp_only_layers": st.sampled_from([[], None]) | st.sampled_from([[1], [7], 0, "", {}]),
}
SAMPLED_SIZES = {name: SIZE | ODD for name in SIZES if name != "head_dim"}
ONE_WAY = {name: st.sampled_from(values) | ODD if values else ODD for name, (values, _) in SERVED.items() if name in REFUSED}
IGNORED = {
    "architectures": st.just(["Qwen3NextForCausalLM"]),
    "attention_dropout": st.just(0.0),
    "bos_token_id": st.just(1),
    "initializer_range": st.just(0.02),
    "intermediate_size": st.just(5120),
    "max_position_embeddings": st.just(262144),
    "output_router_logits": st.booleans(),
    "router_aux_loss_coef": st.just(0.001),
    "use_cache": st.booleans(),
    "transformers_version": st.just("4.57.0"),
    "num_local_experts": st.just(3),
    "n_embd": st.just(3),
    "moe_topk": st.just(3),
    "sliding_window": st.none() | st.just(64),
    "max_window_layers": st.just(2),
    "default_theta": st.just(3.0),
    "some_field": ODD,
}


@st.composite
def configs(draw):
    raw = dict(SMALL)
    for fields, most in ((PLACES, 7), (SAMPLED_SIZES, 2), (IGNORED, 4), (ONE_WAY, 1)):
        raw |= draw(maybe(fields, most))
    names = draw(st.permutations(sorted(raw)))
    return {name: raw[name] for name in names}


@EXAMPLES
@given(configs())
def test_any_config_is_read_as_transformers_reads_it_or_refused(raw):
    event(check(raw))


def test_every_pair_of_places():
    """rope_scaling, rope_parameters and the top level, each in every state."""
    states = [None, {}, {"rope_theta": 5e5}, {"partial_rotary_factor": 0.5}, {"rope_type": "default", "rope_theta": 2e4}]
    states += [{"type": "yarn", "factor": 4.0}, {"rope_type": "linear", "factor": 2.0}]
    states += [{"type": "yarn", "rope_type": "default"}, {ATTENTION: {"rope_theta": 3e4}}, {"mrope_section": [11, 11, 10]}]
    top = [{}, {"rope_theta": 1e6}, {"partial_rotary_factor": 0.125}, {"rope_theta": 1e6, "partial_rotary_factor": None}]

    def beside(name):
        return [{}, *({name: state} for state in states)]

    came = [
        check({**SMALL, **at_top, **a, **b})
        for a, b, at_top in itertools.product(beside("rope_scaling"), beside("rope_parameters"), top)
    ]
    assert len(came) == 484
    assert came.count("the same") > 200
    assert came.count("refused") > 100


def test_fields_of_transformers_that_are_new(tmp_path):
    """A file that transformers writes holds no field that is neither in a table here nor known to be ignored."""
    Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    known = {*SMALL, *PLACES, *SIZES, *SERVED, *IGNORED}
    assert set(written) - known <= {"pad_token_id"}
    assert set(MICRO.to_json()) <= known
