"""Cases that once failed, replayed. `moekit fuzz` appends to the JSON files beside this one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.testing import replay
from moekit.testing.executors import unavailable
from moekit.testing.failures import load

RECORDED = [(f"{r.case.fusion}-{r.implementation}-{i}", r) for i, r in enumerate(load(Path(__file__).parent))]
GPU = [pytest.mark.gpu]


@pytest.mark.parametrize("regression", [
    pytest.param(r, id=name, marks=GPU if r.implementation == "triton" else []) for name, r in RECORDED
])  # fmt: skip
def test_replay(regression):
    name = "eager" if regression.implementation == "triton-interpreter" else regression.implementation
    if why := unavailable(name):
        pytest.skip(why)
    assert replay(regression.case, name) == []


def test_triton_interpreter(tmp_path):
    """Those of Triton run in its interpreter too, which is a process of its own."""
    mine = [r.to_json() for _, r in RECORDED if r.implementation == "triton-interpreter"]
    if not mine:
        pytest.skip("none is recorded")
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(mine))
    done = subprocess.run([sys.executable, "-m", "moekit.cli", "fuzz", "--replay", str(path)], capture_output=True, text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
