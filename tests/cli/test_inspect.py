"""`moekit inspect`: what headers say, and what a rank needs."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from moekit.models.qwen3next import FitError, Room, load, memory, prefill, quantize, write_random_checkpoint
from moekit.models.qwen3next.memory import needed
from moekit.models.qwen3next.model import abstract_model
from tests.models.conftest import CASES, mesh_of
from tests.models.micro import load_tensors

CONFIG = CASES["two-layers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = write_random_checkpoint(tmp_path_factory.mktemp("inspect") / "small", CONFIG)
    tensors = load_file(where / "model.safetensors")
    save_file({**tensors, "mtp.fc.weight": np.zeros((3, 5), np.float32)}, where / "model.safetensors")
    return where


def test_the_report(moekit, folder):
    made = moekit("inspect", str(folder), "--tp", "2", "--batch", "3", "--length", "128", "--memory", "2", "--json")
    report = json.loads(made.stdout)
    tensors = load_file(folder / "model.safetensors")
    assert report["skipped"] == {"mtp.": {"tensors": 1, "bytes": 60}}
    assert report["tensors"] == len(tensors)
    assert report["parameters"] == sum(value.size for value in tensors.values()) - 15
    idle = sum(value.size for name, value in tensors.items() if ".experts." in name and int(name.split(".")[5]) >= 4)
    assert report["active"] == report["parameters"] - idle
    assert report["bytes"] == 4 * report["parameters"]
    assert (report["layers"], report["experts"], report["dtype"]) == ({"linear_attention": 1, "all": 2}, "apart", "F32")
    model = load(folder, mesh_of(2))
    shards = [array.addressable_shards[1].data.nbytes for array in jax.tree.leaves(model.params)]
    assert report["rank"]["weights"] == sum(shards)
    assert report["rank"]["total"] == sum(report["rank"][part] for part in ("weights", "cache", "temporaries"))
    assert report["fits"]
    assert report["sequences"] * report["rank"]["one_sequence"] <= 2e9


def test_in_words(moekit, folder):
    said = moekit("inspect", str(folder), "--memory", "0.001")
    assert said.exit_code == 0, said.output
    for words in ("qwen3_next, 1 delta nets, 1 attentions", "16, 4 of them for a token", "mtp.*: 1 tensors", "does not fit in"):
        assert words in said.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--tp", "3"], 2, "tp = 3 does not divide"),
        (["--batch", "0"], 2, "0 is not in the range"),
        (["--memory", "nan"], 2, "nan is no number of GB"),
        (["--memory", "inf"], 2, "inf is no number of GB"),
    ],
)
def test_what_is_asked_wrongly(moekit, folder, arguments, code, words):
    result = moekit("inspect", str(folder), *arguments)
    assert result.exit_code == code
    assert words in " ".join(result.stderr.split())


def test_a_model_that_does_not_fit_is_refused_before_anything_is_placed(folder, monkeypatch):
    config, mesh = CONFIG, mesh_of(2)
    room = Room(4, 256, 16)
    need = needed(config, 2, "float32", room)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: need.total - 1)
    monkeypatch.setattr(jax, "device_put", None)
    with pytest.raises(FitError, match=r"each of 2 ranks needs .* GB of weights, .* are free on a device; give more devices"):
        load(folder, mesh, room=room)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "free_bytes", lambda devices: need.total)
    load(folder, mesh, room=room)


def test_a_cache_is_of_xlas_size_and_the_estimate_of_temporaries_not_below_it_nor_far_above():
    model = abstract_model(replace(CONFIG, vocab_size=4096), mesh_of(2), "float32")
    rows = (jax.ShapeDtypeStruct(shape, np.int32) for shape in ((2, 512), (2,)))
    compiled = prefill.lower(model, *rows, cache_length=512, kernels="xla").compile()
    held, need = compiled.memory_analysis(), needed(model.config, 2, "float32", Room(2, 512, 512))
    assert held.temp_size_in_bytes <= need.temporaries <= 4 * held.temp_size_in_bytes
    logits = 2 * 4096 // 2 * 4
    assert held.output_size_in_bytes - logits == pytest.approx(need.cache, rel=1e-3)


def test_fp8_is_told_of(moekit, folder, tmp_path):
    quantize(folder, tmp_path / "fp8")
    report, plain = (
        json.loads(moekit("inspect", str(where), "--tp", "2", "--dtype", "bfloat16", "--json").stdout)
        for where in (tmp_path / "fp8", folder)
    )
    fp8 = report["fp8"]
    assert plain["fp8"] is None
    scales = sum(value.nbytes for name, value in load_tensors(tmp_path / "fp8").items() if name.endswith("_scale_inv"))
    assert (fp8["block"], fp8["tensors"], fp8["scales"]) == ([128, 128], report["tensors"] - plain["tensors"], scales)
    assert report["bytes"] == 4 * (report["parameters"] - fp8["bytes"]) + fp8["bytes"] + fp8["scales"]
    for same in ("parameters", "active", "skipped", "rank"):
        assert report[same] == plain[same]
    said = " ".join(moekit("inspect", str(tmp_path / "fp8")).stdout.split())
    assert f"FP8 {fp8['tensors']} of them, " in said
    assert "of scales for 128 × 128, read to float32" in said
