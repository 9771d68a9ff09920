"""`moekit quantize`: what it prints and how it refuses."""

import json
from dataclasses import replace

import pytest

from moekit.models.qwen3next import Config, write_random_checkpoint
from moekit.models.qwen3next.checkpoint import Checkpoint
from tests.models.micro import MICRO


@pytest.fixture
def folder(tmp_path):
    return write_random_checkpoint(tmp_path / "plain", MICRO, dtype="bfloat16")


def test_the_report(moekit, folder, tmp_path):
    out = tmp_path / "fp8"
    made = moekit("quantize", str(folder), str(out), "--json")
    report = json.loads(made.stdout)
    with Checkpoint(out, Config.from_json(out)) as checkpoint:
        assert (report["tensors"], report["quantised"]) == (len(checkpoint.tensors), len(checkpoint.scales))
    assert (report["checkpoint"], report["directory"], report["files"]) == (str(folder), str(out), 1)
    assert report["kept"] == json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "quantising" in made.stderr
    said = moekit("quantize", str(folder), str(tmp_path / "again"))
    assert said.stdout.startswith(
        f"wrote {tmp_path / 'again'}: {report['quantised']} matrices in FP8, 0.00 MB became 0.00 MB in 1 file"
    )


def test_sides_that_keep_matrices_as_they_are_are_said(moekit, tmp_path):
    """A shared expert of 192: its model would have float8 weights but for that one, and nobody would know why."""
    config = replace(MICRO, shared_expert_intermediate_size=192)
    folder = write_random_checkpoint(tmp_path / "plain", config, dtype="bfloat16")
    said = moekit("quantize", str(folder), str(tmp_path / "fp8")).stdout
    count = 3 * config.num_layers
    assert f"{count} modules stay as they are, of which a side above 128 is no multiple of it" in said
    assert "model.layers.*.mlp.shared_expert.down_proj" in said
    made = json.loads(moekit("quantize", str(folder), str(tmp_path / "again"), "--json").stdout)
    assert len(made["uneven"]) == count
    assert set(made["uneven"]) < set(made["kept"])


def test_what_is_refused(moekit, folder, tmp_path):
    made = moekit("quantize", str(folder), str(folder))
    assert (made.exit_code, "exists; give a folder that does not" in made.stderr) == (2, True)
    moekit("quantize", str(folder), str(tmp_path / "fp8"))
    made = moekit("quantize", str(tmp_path / "fp8"), str(tmp_path / "out"))
    assert (made.exit_code, "is quantised; give a checkpoint in bfloat16 or float32" in made.stderr) == (1, True)
    assert moekit("quantize", str(tmp_path / "none"), str(tmp_path / "out")).exit_code == 2
    assert not (tmp_path / "out").exists()
