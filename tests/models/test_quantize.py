"""`quantize`: which tensors of a checkpoint become FP8, in which files, and that nothing is left of what fails."""

import importlib
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moekit.errors import ArgumentError, FileError, MoekitError
from moekit.models.qwen3next import CheckpointError, Config, ConfigError, load, quantize, write_random_checkpoint
from moekit.models.qwen3next.checkpoint import Checkpoint
from moekit.models.qwen3next.config import TEXT
from moekit.models.qwen3next.forms import Form
from moekit.models.qwen3next.fp8 import SCALE
from tests.models.conftest import CASES
from tests.models.micro import load_tensors

quantize_module = importlib.import_module("moekit.models.qwen3next.quantize")  # whose function has its name in the package
CONFIG = replace(CASES["two-layers"], hidden_size=128, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=128)
STAY = ("norm", "conv1d", "in_proj_ba", "mlp.gate", "shared_expert_gate", "embed_tokens", "lm_head", "A_log", "dt_bias", "mtp")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("quantize") / "plain", CONFIG, dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    layer = {"mtp.layers.0.mlp.experts.0.up_proj.weight": np.ones((128, 128), np.float32), "mtp.count": np.arange(3)}
    save_file({**tensors, **layer}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "other.bin").write_bytes(b"0")
    return folder


def equal(one, other):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_what_becomes_fp8_and_what_stays(source, tmp_path):
    seen = []
    made = quantize(source, tmp_path / "out", lambda *counts: seen.append(counts))
    before, after = stored(source), stored(tmp_path / "out")
    assert after.keys() - {key + SCALE for key in before} == before.keys()
    for key, (dtype, content) in before.items():
        stays = any(part in key for part in STAY)
        assert (after[key] == (dtype, content)) == stays, key
        assert (key + SCALE in after) == (after[key][0] == "F8_E4M3") == (not stays)
    assert made.quantised == sum(dtype == "F8_E4M3" for dtype, _ in after.values()) == 2 * 12 + 2 + 4
    assert made.uneven == ()
    assert made.before == sum(len(content) for _, content in before.values())
    assert seen[-1] == (made.after, made.after) == (sum(len(content) for _, content in after.values()),) * 2
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    said = raw.pop("quantization_config")
    assert raw == json.loads((source / "config.json").read_text())
    assert (said["quant_method"], said["weight_block_size"], said["activation_scheme"]) == ("fp8", [128, 128], "dynamic")
    assert {"lm_head", "model.layers.0.linear_attn.in_proj_ba", "model.layers.1.mlp.gate"} < set(said["modules_to_not_convert"])
    assert "mtp.layers.0.mlp.experts.0.up_proj" in said["modules_to_not_convert"]
    assert not any("norm" in name for name in said["modules_to_not_convert"])


def stored(folder):
    """Dtype and bytes of every tensor."""
    with Checkpoint(folder, Config.from_json(folder)) as checkpoint:
        return {key: (t.dtype, checkpoint.content(t).tobytes()) for key, t in checkpoint.tensors.items()}


def test_files_of_a_size_hold_the_same(source, tmp_path, mesh):
    one, many = quantize(source, tmp_path / "one"), quantize(source, tmp_path / "many", shard=100_000)
    listed = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert (one.files, one.tensors) == (1, many.tensors)
    assert 3 < many.files == len(set(listed["weight_map"].values()))
    assert listed["metadata"]["total_size"] == many.after == one.after
    a, b = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert a == b
    equal(load(tmp_path / "one", mesh(2)), load(tmp_path / "many", mesh(2)))


def test_fused_experts_are_taken_apart(tmp_path, mesh):
    config, rng = replace(CONFIG, model_type=TEXT), np.random.default_rng(0)
    apart = {key: rng.standard_normal(s).astype(np.float32) for key, s in Form(config, "model.", False).shapes.items()}
    fused = {key: apart.get(key) for key in Form(config, "model.", True).shapes}
    for layer in range(2):
        base = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            np.stack([apart[f"{base}{e}.{name}_proj.weight"] for e in range(3)]) for name in ("gate", "up", "down")
        )
        fused |= {base + "gate_up_proj": np.concatenate([gate, up], axis=1), base + "down_proj": down}
    for name, tensors in (("apart", apart), ("fused", fused)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_json()))
        quantize(tmp_path / name, tmp_path / f"{name}-fp8")
    assert stored(tmp_path / "apart-fp8") == stored(tmp_path / "fused-fp8")
    texts = [(tmp_path / f"{name}-fp8" / "config.json").read_text() for name in ("apart", "fused")]
    assert texts[0] == texts[1]
    load(tmp_path / "fused-fp8", mesh(4))


@pytest.mark.parametrize("fused", [False, True])
def test_sides_of_which_readers_differ_stay(tmp_path, mesh, fused):
    """192 rows have two scales: for halves of 96 where transformers dequantises, for 128 and 64 elsewhere."""
    config = replace(CONFIG, moe_intermediate_size=192)
    tensors = {k: np.full(s, 0.5, np.float32) for k, s in Form(config, "model.", fused).shapes.items()}
    (tmp_path / "plain").mkdir()
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config.to_json()))
    made = quantize(tmp_path / "plain", tmp_path / "out")
    after = load_tensors(tmp_path / "out")
    assert not any(value.dtype.itemsize == 1 for key, value in after.items() if ".experts." in key)
    assert made.quantised == 2 * 3 + 2 + 4
    name = "model.layers.0.mlp.experts" if fused else "model.layers.0.mlp.experts.1.down_proj"
    assert name in made.kept
    assert set(made.uneven) == {module for module in made.kept if ".experts" in module}
    equal(load(tmp_path / "out", mesh(1)), load(tmp_path / "plain", mesh(1)))  # halves are exact


def test_a_file_beside_the_source_that_cannot_be_read_is_blamed_itself(source, tmp_path, monkeypatch):
    """A link to nothing, as a download that was cut off leaves one: nothing is written, and OUT has no part in it."""
    plain = shutil.copytree(source, tmp_path / "plain")
    (plain / "vocab.txt").symlink_to("nothing")
    monkeypatch.setattr(quantize_module, "_written", lambda *_: pytest.fail("written"))
    refused(plain, tmp_path / "out", CheckpointError, r"plain/vocab\.txt does not exist")


def refused(source, out, error, words):
    with pytest.raises(error, match=words) as caught:
        quantize(source, out)
    assert isinstance(caught.value, MoekitError)
    assert not out.exists()
    assert not list(out.parent.glob(".moekit*"))


def test_what_is_refused(source, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="exists; give a folder that does not"):
        quantize(source, tmp_path)
    quantize(source, tmp_path / "fp8")
    refused(tmp_path / "fp8", tmp_path / "out", ConfigError, "is quantised; give a checkpoint in bfloat16 or float32")
    half = write_random_checkpoint(tmp_path / "half", CONFIG, dtype="float16")
    refused(half, tmp_path / "out", CheckpointError, "is of F16; BF16 or F32 is needed")
    refused(source, tmp_path / "none" / "out", FileError, "cannot be written: No such file or directory")
    broken = shutil.copytree(source, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    tensors[key] = tensors[key].copy()
    tensors[key][5, 7] = np.inf
    save_file(tensors, broken / "model.safetensors")
    refused(broken, tmp_path / "out", CheckpointError, f"tensor {key} holds NaN or an infinity")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.rename", full)
    refused(source, tmp_path / "out", FileError, "out cannot be written: No space left on device")
