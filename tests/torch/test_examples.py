"""Every script in examples/ that is no JAX runs, here on the CPU, and on the GPU where there is one.

Those in JAX have tests/examples.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path for path in sorted((ROOT / "examples").glob("*.py")) if "import jax" not in path.read_text()]


def run(script, folder, **environment):
    if "transformers" in script.read_text():
        pytest.importorskip("transformers")
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": python_path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_there_are_examples():
    assert {s.stem for s in SCRIPTS} >= {"cuda_graph", "export_a_kernel", "patch_a_model", "strided_slices"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example(script, tmp_path):
    done = run(script, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_example_on_the_gpu(script, tmp_path):
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
