"""The emitted text, held by golden files: read their diff like code.

After a change that is meant, write them anew with `MOEKIT_WRITE_GOLDEN=1 pytest tests/backends/test_golden.py`.
"""

import ast
import os
import re
from pathlib import Path

import pytest

from moekit.backends import mosaic, pallas, triton
from moekit.compile.plan import plan
from moekit.compile.rules.warpgroups import warpgroups

from .samples import GOLDEN, viewed

FOLDER = Path(__file__).parent / "golden"


MOSAIC = ("silu_and_mul", "add_rms_norm", "gated_rms_norm", "shared_expert_combine", "topk_softmax", "delta_rule_step",
          "causal_conv1d_step", "qk_norm_rope", "gate_gemm_split", "down_combine")  # fmt: skip


def _text(backend: str, name: str) -> str:
    sample = GOLDEN[name]
    if backend == "mosaic":
        _, binding, graph = sample.bound()
        sizes = dict(binding.sizes)
        programs = plan(graph, warpgroups(graph), viewed(graph, sizes), sizes, "mosaic").programs
    else:
        programs = (sample.strided() if backend == "triton" else sample.viewed()).programs
    emit = {"triton": triton.emit, "pallas": pallas.emit, "mosaic": mosaic.emit}[backend]
    return "\n\n".join(emit(p) for p in programs)


@pytest.mark.parametrize(
    ("backend", "name"), [(b, n) for b in ("triton", "pallas") for n in GOLDEN] + [("mosaic", n) for n in MOSAIC]
)
def test_emitted_text(backend, name):
    """Not a word differs."""
    path = FOLDER / f"{name}.{backend}.txt"
    text = _text(backend, name)
    if os.environ.get("MOEKIT_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("name", list(GOLDEN))
def test_emitters_need_no_framework(name):
    """The text is Python, imports only its own framework, and printing it imports neither."""
    allowed_by = {"triton": {"triton"}, "pallas": {"jax"}, "mosaic": {"jax", "numpy", "math", "contextlib"}}
    for backend, allowed in allowed_by.items():
        if backend == "mosaic" and name not in MOSAIC:
            continue
        tree = ast.parse(_text(backend, name))
        modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        found = {m.split(".")[0] for m in modules}
        assert found <= allowed if backend == "mosaic" else found == allowed


def test_no_backend_or_compiler_file_names_a_fusion():
    """A special case for one fusion would have to name it."""
    import moekit
    from moekit.fusions import FUSIONS

    for folder in ("compile", "backends", "lang"):
        for path in (Path(moekit.__file__).parent / folder).rglob("*.py"):
            text = path.read_text()
            for name in FUSIONS:
                said = name if "_" in name else rf'(==|in|\[) ?\(?"{name}"'  # one that is a word may be spoken of
                assert not re.search(said, text), f"{path.name} speaks of {name}"
