"""FP8 checkpoints: codes and block scales, every rank's cut of them, transformers' own reading, and what is refused."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from transformers import FineGrainedFP8Config, Qwen3NextForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from moekit.models.qwen3next import CheckpointError, Config, ConfigError, load, prefill, quantize, write_random_checkpoint
from moekit.models.qwen3next.checkpoint import Checkpoint
from moekit.models.qwen3next.config import TEXT
from moekit.models.qwen3next.forms import Form
from moekit.models.qwen3next.fp8 import MATRIX, SCALE, Blocks, dequantised, quantised, to_float8
from moekit.models.qwen3next.sharding import Slab
from tests.models.conftest import CASES
from tests.models.micro import load_tensors

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
CODES = np.arange(256, dtype=np.uint8).view(FLOAT8)
# 4 bits of exponent with a bias of 7, 3 of mantissa, 0x7f NaN
VALUES = np.array([(8 + c % 8) * 2.0 ** (c // 8 - 10) if c >= 8 else c * 2.0**-9 for c in range(127)])
METHOD = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# blocks end within matrices, and within a rank's share of most: 24 of 192 columns at tp 8
RAGGED = replace(
    CASES["two-layers"],
    vocab_size=24,
    hidden_size=160,
    linear_num_key_heads=8,
    linear_num_value_heads=16,
    linear_key_head_dim=24,
    linear_value_head_dim=8,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=192,
    shared_expert_intermediate_size=136,
)
SCALES = np.float32([0.0, -0.0, 1e-40, -2.5, 3e-3, 1e30, 2.0**-149, 0.1])


def same(got, wanted):
    """Bits are equal, but for those of NaN."""
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(np.signbit(got[got == 0]), np.signbit(wanted[got == 0]))


def nearest(values):
    """The code of each float64 value: the nearest, of two the one whose last bit is 0, and the largest beyond."""
    size = np.minimum(np.abs(values), 448.0)
    high = np.clip(np.searchsorted(VALUES, size), 1, 126)
    below, above = size - VALUES[high - 1], VALUES[high] - size
    code = np.where((below < above) | ((below == above) & (high % 2 == 1)), high - 1, high)
    return (code + 128 * np.signbit(values)).astype(np.uint8)


def widened(codes, scales, rows=128, columns=128):
    """code · scale element by element in float64, which holds the product, and then in float32."""
    *_, n, d = codes.shape
    wide = scales.astype(np.float64)[..., np.arange(n)[:, None] // rows, np.arange(d) // columns]
    with np.errstate(over="ignore", invalid="ignore"):
        return (codes.astype(np.float64) * wide).astype(np.float32)


def test_rounding_is_to_nearest_even_and_saturates():
    rng = np.random.default_rng(0)
    ties = np.array([(a + b) / 2 for a, b in pairwise(VALUES)])
    beside = [np.nextafter(np.float32(ties), np.float32(to)) for to in (0, np.inf)]
    drawn = rng.standard_normal(2000) * 2.0 ** rng.integers(-14, 10, 2000)
    values = np.concatenate([VALUES, ties, *beside, drawn, [449, 464, 465, 3e38, np.inf, 1e-45]]).astype(np.float32)
    values = np.concatenate([values, -values])
    np.testing.assert_array_equal(to_float8(values).view(np.uint8), nearest(values.astype(np.float64)))
    assert np.isnan(to_float8(np.float32([np.nan])).astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (7, 500)])
def test_any_block_of_a_matrix_keeps_its_scales(dtype, block):
    rng = np.random.default_rng(1)
    codes = rng.choice(CODES, (300, 200))
    codes[0, :128], codes[1, :128] = CODES[:128], CODES[128:]
    grid = Blocks(*block).grid(codes.shape)
    scales = rng.choice(np.float32([*SCALES, np.inf, np.nan, 3e38]), grid).astype(dtype)
    wanted = widened(codes, scales, *block)
    same(dequantised(codes, scales, Blocks(*block)), wanted)
    for row, column in ((0, 0), (64, 0), (127, 199), (250, 3)):
        for count, width in ((1, 1), (24, 60), (300, 200)):
            place = slice(row, row + count), slice(column, column + width)
            same(dequantised(codes[place], scales, Blocks(*block), (row, column)), wanted[place])


def test_scales_are_the_largest_magnitude_of_448():
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((384, 256)).astype(np.float32)
    sizes = np.float32([[1, 1e-3], [1e-42, 1e30], [0, 1]])
    matrix *= np.repeat(np.repeat(sizes, 128, 0), 128, 1)
    matrix[300, 200], matrix[0, 0] = np.finfo(np.float32).max, -0.0
    codes, scales = quantised(matrix, Blocks(128, 128))
    most = np.abs(matrix.reshape(3, 128, 2, 128)).max(axis=(1, 3))
    plain = np.array([[True, True], [False, True], [False, False]])
    np.testing.assert_array_equal(scales[plain], (most / np.float32(448))[plain])
    assert scales[2, 0] == 1  # a block of zeros
    with np.errstate(over="ignore"):
        quotient = matrix / np.repeat(np.repeat(scales, 128, 0), 128, 1)
    np.testing.assert_array_equal(codes.view(np.uint8), nearest(quotient.astype(np.float64)))
    back = dequantised(codes, scales, Blocks(128, 128))
    assert np.isfinite(back).all()
    assert np.signbit(back[0, 0])
    normal = np.abs(quotient) >= VALUES[8]
    assert (np.abs(back - matrix)[normal] <= np.abs(matrix)[normal] / 16 * (1 + 1e-6)).all()


def test_a_narrow_matrix_and_the_least_floats():
    """Fewer rows and columns than a block has; values whose scale float32 does not hold."""
    matrix = np.array([[1e-45, -3e-45, 0.0]], np.float32)
    codes, scales = quantised(matrix, Blocks(128, 128))
    assert scales.shape == (1, 1)
    same(dequantised(codes, scales, Blocks(128, 128)), matrix)
    rows = np.random.default_rng(3).standard_normal((40, 24)).astype(ml_dtypes.bfloat16)
    codes, scales = quantised(rows, Blocks(128, 128))
    assert (codes.shape, scales.shape) == ((40, 24), (1, 1))
    assert scales[0, 0] == np.abs(rows.astype(np.float32)).max() / np.float32(448)


def made(config, fused, rng):
    """Tensors in FP8 by their names in files, and the same weights in float32."""
    short, plain = {}, {}
    for key, shape in Form(config, "model.", fused).shapes.items():
        if not MATRIX.fullmatch(key):
            short[key] = plain[key] = rng.standard_normal(shape).astype(np.float32)
            continue
        codes = rng.choice(np.delete(CODES, [0x7F, 0xFF]), shape)
        scales = rng.choice(SCALES, Blocks(128, 128).grid(shape)).astype(rng.choice([np.float32, ml_dtypes.bfloat16]))
        short |= {key: codes, key + SCALE: scales}
        plain[key] = widened(codes, scales)
    return short, plain


def written(folder, tensors, config, **fields):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config.to_json(), **fields}))
    return folder


@pytest.mark.parametrize(("kind", "fused"), [("qwen3_next", False), ("qwen3_next", True), (TEXT, False)])
def test_every_rank_has_the_scales_of_what_it_holds(tmp_path, mesh, kind, fused):
    config = replace(RAGGED, model_type=kind)
    short, plain = made(config, fused, np.random.default_rng(4))
    ours = written(tmp_path / "fp8", short, config, quantization_config=METHOD)
    wide = written(tmp_path / "plain", plain, config)
    for tp, dtype in ((1, "float32"), (2, "bfloat16"), (8, "float32"), (8, "bfloat16")):
        for a, b in zip(*(jax.tree.leaves(load(f, mesh(tp), dtype).params) for f in (ours, wide)), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


WIDE = replace(CASES["two-layers"], hidden_size=128, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A bfloat16 checkpoint, and those in FP8 that moekit and transformers make of it."""
    root = tmp_path_factory.mktemp("fp8")
    plain = write_random_checkpoint(root / "plain", WIDE, seed=3, dtype="bfloat16")
    quantize(plain, root / "moekit")
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config()))
    tensors = {}
    for key, value in load_torch(plain / "model.safetensors").items():
        tensors |= theirs.convert({key: value}) if MATRIX.fullmatch(key) else {key: value}
    (root / "transformers").mkdir()
    save_torch(tensors, root / "transformers" / "model.safetensors")
    raw = {**json.loads((plain / "config.json").read_text()), "quantization_config": METHOD}
    (root / "transformers" / "config.json").write_text(json.dumps(raw))
    return root


def transformers_reads(folder, dtype):
    given = {"dtype": dtype, "attn_implementation": "eager", "experts_implementation": "eager"}
    dequantising = FineGrainedFP8Config(dequantize=True)
    return Qwen3NextForCausalLM.from_pretrained(folder, quantization_config=dequantising, **given).eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("writer", ["moekit", "transformers"])
def test_dequantised_weights_have_transformers_bits(sources, writer, dtype):
    folder = sources / writer
    theirs = transformers_reads(folder, getattr(torch, dtype)).state_dict()
    with Checkpoint(folder, Config.from_json(folder)) as checkpoint:
        assert len(checkpoint.scales) > 2 * 3 * 4
        for key in checkpoint.scales:
            if ".experts." in key:
                base, expert, name, _ = key.rsplit(".", 3)
                half = WIDE.moe_intermediate_size
                value = theirs[f"{base}.{'down' if name == 'down_proj' else 'gate_up'}_proj"][int(expert)]
                value = {"down_proj": value, "gate_proj": value[:half], "up_proj": value[half:]}[name]
            else:
                value = theirs[key]
            assert value.dtype == getattr(torch, dtype)
            mine = checkpoint.read(Slab(key)).astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(mine.view(np.uint32), value.float().numpy().view(np.uint32))


@pytest.fixture(scope="module")
def answers(sources):
    tokens = np.random.default_rng(5).integers(0, WIDE.vocab_size, (2, 9)).astype(np.int32)
    with torch.no_grad():
        return tokens, transformers_reads(sources / "moekit", torch.float32).float()(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_logits_are_transformers(sources, answers, mesh, tp):
    tokens, wanted = answers
    model, lengths = load(sources / "moekit", mesh(tp), "float32"), np.full(2, 9, np.int32)
    got, _ = prefill(model, tokens, lengths, cache_length=16, kernels="xla", every_logit=True)
    assert np.abs(wanted).max() > 1
    assert np.abs(np.asarray(got) - wanted).max() <= 1e-4 * np.abs(wanted).max()


PROJECTION = "model.layers.1.self_attn.o_proj.weight"


def spoilt(tensors, key, at, value):
    array = tensors[key].copy()
    array[at] = value
    tensors[key] = array


@pytest.mark.parametrize(
    ("change", "fields", "words"),
    [
        (lambda t: t.pop(PROJECTION + SCALE), {}, f"{PROJECTION} has dtype F8_E4M3, and its scales {PROJECTION}_scale_inv are"),
        (
            lambda t: t.update({PROJECTION + SCALE: np.ones((2, 1), np.float32)}),
            {},
            r"F32 and shape \[2, 1\] where F32 or BF16",
        ),
        (lambda t: t.update({PROJECTION + SCALE: np.ones((1, 1), np.float16)}), {}, r"dtype F16 and shape \[1, 1\] where F32"),
        (lambda t: t.update({PROJECTION: t[PROJECTION].astype(np.float32)}), {}, "o_proj.weight_scale_inv is not part of"),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].astype(FLOAT8)}),
            {},
            "lm_head.weight has dtype F8_E4M3, and only",
        ),
        (lambda t: None, {"quantization_config": None}, "config.json has no quantization_config"),
        (
            lambda t: None,
            {"quantization_config": {**METHOD, "modules_to_not_convert": ["x", "model.layers.1.self_attn"]}},
            "modules_to_not_convert of config.json names its module",
        ),
        (lambda t: None, {"quantization_config": {**METHOD, "ignored_layers": ["o_proj"]}}, "names its module"),
        (lambda t: spoilt(t, PROJECTION, (3, 2), np.nan), {}, f"tensor {PROJECTION} holds NaN or an infinity"),
        (lambda t: spoilt(t, PROJECTION + SCALE, (0, 0), 3e38), {}, f"tensor {PROJECTION} holds NaN or an infinity"),
    ],
)
def test_what_is_refused_of_files(sources, tmp_path, mesh, change, fields, words):
    tensors = load_tensors(sources / "moekit")
    change(tensors)
    folder = written(tmp_path / "broken", tensors, WIDE, **{"quantization_config": METHOD, **fields})
    with pytest.raises(CheckpointError, match=words) as caught:
        load(folder, mesh(2))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq', and such quantised weights are not supported ('fp8' is"),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
        ({"weight_block_size": None}, "weight_block_size is None"),  # one scale for a tensor
        ({"weight_block_size": [128]}, "weight_block_size is [128]"),
        ({"weight_block_size": [128, 0]}, "a list of two positive integers"),
        ({"weight_block_size": [128, 10**30]}, "a list of two positive integers"),
        ({"activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt is 'ue8m0'"),
        ({"expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({"modules_to_convert": ["embed_tokens"]}, "modules_to_convert is ['embed_tokens']"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
        ({"modules_to_not_convert": [3]}, "a list of modules' names is needed"),
    ],
)
def test_what_is_refused_of_a_config(change, words):
    plain = WIDE.to_json()
    assert Config.from_json({**plain, "quantization_config": METHOD}).blocks == Blocks(128, 128)
    with pytest.raises(ConfigError) as caught:
        Config.from_json({**plain, "quantization_config": {**METHOD, **change}})
    assert words in str(caught.value)


def test_a_config_with_a_tower_says_it_beside_the_text():
    inner = {"model_type": TEXT}
    raw = {"model_type": "qwen3_5_moe", "text_config": inner, "quantization_config": {**METHOD, "ignored_layers": ["lm_head"]}}
    assert Config.from_json(raw).blocks == Blocks(128, 128, frozenset(["lm_head"]))
    with pytest.raises(ConfigError, match="quantization_config of text_config is not read"):
        Config.from_json({**raw, "text_config": {**inner, "quantization_config": METHOD}})
