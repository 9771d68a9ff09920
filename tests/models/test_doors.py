"""A jax without Pallas's Triton lowering, played by an import that fails: what serves then, and what is said of it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from moekit.models.qwen3next import TINY, write_random_checkpoint
from moekit.models.qwen3next.config import ATTENTION, GDN

pytest.importorskip("triton")

PALLAS, TRITON = "jax.experimental.pallas.triton", "triton"
SMALL = replace(TINY, layer_types=(GDN, ATTENTION), num_experts=5, num_experts_per_tok=2, vocab_size=64)
STEP = """
import json
from collections import Counter
from tests.models.test_h200 import CONFIG, compiled_step
found = compiled_step(None)
print(json.dumps([Counter(i.fusion for i in found.entry.values() if i.fusion), CONFIG.num_layers]))
"""
FACE = """
import warnings
import jax.numpy as jnp
from moekit.jax import doors, silu_and_mul
from moekit.errors import UnavailableError
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    print(doors.best(), doors.best())
print(*(str(w.message) for w in said if "moekit" in str(w.message)))
for door in doors.DOORS:
    try:
        print(silu_and_mul(jnp.ones((2, 8)), implementation=door).shape)
    except UnavailableError as error:
        print(error)
"""
LOWERED = """
import jax
import jax.numpy as jnp
from moekit.jax import silu_and_mul
x = jax.ShapeDtypeStruct((4, 128), jnp.bfloat16)
call = jax.jit(lambda x: silu_and_mul(x, implementation="triton")).trace(x)
print(call.lower(lowering_platforms=("cuda",)).as_text())
"""


@pytest.fixture
def without(tmp_path):
    """Run Python in processes in which modules cannot be imported."""

    def run(missing, *arguments):
        lines = [f"sys.modules[{module!r}] = None" for module in missing]
        (tmp_path / "sitecustomize.py").write_text("\n".join(["import sys", *lines, ""]))
        paths = os.pathsep.join([str(tmp_path), os.getcwd(), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"},
                              capture_output=True, text=True, check=False, timeout=500)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


@pytest.mark.timeout(600)
def test_a_step_has_its_kernels_without_pallas(without):
    """Every fusion of a decode step that is compiled for H200s is a kernel, as with Pallas, though nobody asked for triton."""
    called, layers = json.loads(without([PALLAS], "-c", STEP))
    assert called["add_rms_norm"] == 2 * layers + 1
    assert set(called) == {"add_rms_norm", "causal_conv1d_step", "delta_rule_step", "expert_down_shared", "expert_gate_up",
                           "gate_topk", "gated_attention_decode", "gated_rms_norm", "qkv_norm_rope"}  # fmt: skip


def test_torch_is_not_needed(without):
    text = without([PALLAS, "torch"], "-c", LOWERED)
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert "tt.func public @silu_and_mul(" in text


def test_faces_without_pallas(without):
    said = without([PALLAS], "-c", FACE).splitlines()
    assert said[0] == "triton triton"
    assert said[2].startswith("silu_and_mul: jax ")
    assert said[2].endswith("has no jax.experimental.pallas.triton; choose another implementation than pallas")
    assert said[3] == "(2, 4)"


def test_faces_without_pallas_and_triton(without):
    """Array evaluation serves, which is said once; a named door says what is missing."""
    said = without([PALLAS, TRITON], "-c", FACE).splitlines()
    assert said[0] == "xla xla"
    assert said[1].startswith("moekit.jax: no kernels, array evaluation serves: jax ")
    assert said[1].endswith("; triton is not installed; install moekit[triton]")
    assert said[3] == "silu_and_mul: triton is not installed; install moekit[triton]; choose another implementation than triton"


@pytest.mark.timeout(600)
def test_commands_say_which_door_serves(without, tmp_path):
    decode = ("-m", "moekit.cli", "decode", "--tp", "1", "--new-tokens", "2", "--batch", "1", "--prompt-len", "2", "--json")
    decode = (*decode, "--checkpoint", str(write_random_checkpoint(tmp_path / "small", SMALL)))
    for missing, fused in (([PALLAS], "triton"), ([PALLAS, TRITON], "xla")):
        report = json.loads(without(missing, *decode))
        assert report["kernels"] == report["fused"] == fused
        assert report["agreement"]["agree"]
        served = {how["implementation"] for how in report["served"].values()}
        assert served == ({"triton, interpreted", "xla"} if fused == "triton" else {"xla"})
        rows = json.loads(without(missing, "-m", "moekit.cli", "doctor", "--json"))["implementations"]
        states = {row["implementation"]: row for row in rows if row["framework"] == "jax"}
        assert states["pallas"]["state"] == "no"
        assert states["pallas"]["why"].endswith("has no jax.experimental.pallas.triton")
        assert states["triton"]["state"] == ("runs" if fused == "triton" else "no")
