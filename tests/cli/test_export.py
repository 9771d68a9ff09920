"""`moekit export` and `moekit doctor --warm`."""

import json
from functools import partial

from moekit import torch as moekit_torch
from moekit.fusions import FUSIONS


def test_export_to_a_file_and_to_stdout(moekit, tmp_path):
    path = tmp_path / "norm.py"
    arguments = ("export", "add_rms_norm", "--dtype", "float16", "--sizes", "H=48", "--params", "eps=1e-5")
    written = moekit(*arguments, "-o", str(path))
    assert written.exit_code == 0
    assert f"wrote {path}" in written.stderr
    text = path.read_text()
    compile(text, str(path), "exec")
    assert "eps = 1e-05" in text
    assert "H = 48" in text
    assert moekit(*arguments).stdout.rstrip() == text.rstrip()


def test_export_with_a_schedule_and_a_dimension_of_one(moekit):
    shown = moekit(
        "export", "shared_expert_combine", "--sizes", "H=64,H?=1", "--schedule", "tile:T:1 tile:H:64 warps:2 stages:1"
    )
    assert shown.exit_code == 0
    assert "gate: bfloat16 (T, 1)" in shown.stdout
    assert "num_warps=2" in shown.stdout


def test_export_asked_wrongly(moekit):
    wrong = (
        ("rope",),
        ("silu_and_mul", "--dtype", "int8"),
        ("silu_and_mul", "--schedule", "tile:T:1"),
        ("gate_gemm", "--params", "k=1"),
        ("add_rms_norm", "--sizes", "H=0"),
        ("add_rms_norm", "--sizes", "H=99999999999"),
    )
    for arguments in wrong:
        refused = moekit("export", *arguments)
        assert refused.exit_code == 2
        assert refused.stderr


def test_export_of_what_only_moekit_can_call(moekit, tmp_path):
    """One sentence, and no file."""
    for name in ("experts", "moe_align"):
        refused = moekit("export", name, "-o", str(tmp_path / "kernel.py"))
        assert refused.exit_code == 1
        assert f"{name}: the size of B follows from others at the call" in " ".join(refused.stderr.split())
        assert not list(tmp_path.iterdir())


def test_doctor_warm(moekit, monkeypatch):
    """At small sizes: those of Qwen3-Next are warmup's own default, and its tests'."""
    small = {"T": 2, "H": 32, "D": 32, "I": 32, "E": 16}
    monkeypatch.setattr("moekit.torch.warmup", partial(moekit_torch.warmup, sizes=small))
    report = json.loads(moekit("doctor", "--warm", "--json").stdout)["warm"]
    assert report["device"]
    assert {"fusion", "in_place", "sizes", "first", "next"} == set(report["calls"][0])
    updating = [f for f in FUSIONS.values() if any(x.role == "InOut" for x in f.tensors.values())]
    assert len(report["calls"]) == len(FUSIONS) + len(updating)  # which have a form that works in place
    assert report["seconds"] > 0
    assert "first call" in moekit("doctor", "--warm").stdout
