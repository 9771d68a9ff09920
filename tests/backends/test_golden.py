"""The emitted text, held by golden files: read their diff like code.

After a change that is meant, write them anew with `MOEKIT_WRITE_GOLDEN=1 pytest tests/backends/test_golden.py`.
"""

import ast
import os
import re
from pathlib import Path

import pytest

from moekit.backends import pallas, triton

from .samples import GOLDEN

FOLDER = Path(__file__).parent / "golden"


def _text(backend: str, name: str) -> str:
    plan = GOLDEN[name].strided() if backend == "triton" else GOLDEN[name].viewed()
    emit = triton.emit if backend == "triton" else pallas.emit
    return "\n\n".join(emit(p) for p in plan.programs)


@pytest.mark.parametrize("backend", ["triton", "pallas"])
@pytest.mark.parametrize("name", list(GOLDEN))
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
    for backend, allowed in (("triton", {"triton"}), ("pallas", {"jax"})):
        tree = ast.parse(_text(backend, name))
        modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert {m.split(".")[0] for m in modules} == allowed


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
