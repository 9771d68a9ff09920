"""Declarations, functions and plain data pickle: by name, as functions do, or by value; what has no name says so."""

import copy
import importlib
import pickle
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from moekit.compile.schedule import Schedule
from moekit.errors import MoekitError, ShapeError
from moekit.fusions import FUSIONS
from moekit.lang import In, cast, f32, fusion
from moekit.lang.arguments import example

ROOT = Path(__file__).parents[2]
PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
MODULE = """
    from moekit.lang import In, cast, f32, fusion

    @fusion(None, x=In("T H"))
    def doubled(x):
        return cast(f32(x) * 2.0, x.dtype)

    tripled = fusion(None, x=In("T H"))(lambda x: cast(f32(x) * 3.0, x.dtype))
"""


@fusion(None, x=In("T H"))
def at_the_top(x):
    """2·x."""
    return cast(f32(x) * 2.0, x.dtype)


def test_declarations_are_pickled_by_name():
    for declared in (*FUSIONS.values(), at_the_top):
        for protocol in PROTOCOLS:
            assert pickle.loads(pickle.dumps(declared, protocol)) is declared
        assert copy.copy(declared) is copy.deepcopy(declared) is declared
    assert len(pickle.dumps(FUSIONS["add_rms_norm"])) < 100


def elsewhere(data: bytes, path: Path, then: str) -> str:
    """What another process, with `path` on its own, prints of `x` read from `data`."""
    script = f"import pickle, sys; sys.path[:0] = [{str(path)!r}, {str(ROOT)!r}]; x = pickle.load(sys.stdin.buffer); {then}"
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode().strip()


def test_another_process_reads_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "declared_elsewhere.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("declared_elsewhere")
    assert pickle.loads(pickle.dumps(module.tripled)) is module.tripled
    data = pickle.dumps([module.doubled, module.tripled, FUSIONS["topk_softmax"]])
    says = "print([f.name for f in x], x[0].trace(__import__('moekit.lang.arguments').lang.arguments.example(x[0])).name)"
    assert elsewhere(data, tmp_path, says) == "['doubled', 'unnamed', 'topk_softmax'] doubled"


def test_another_process_reads_the_functions():
    import moekit.torch as mt

    functions = [getattr(mt, n) for n in mt.__all__ if hasattr(getattr(mt, n), "fusion")]
    assert {face.fusion.name for face in functions} == {*FUSIONS} - {"gate_gemm"}  # which is a function of its own
    for face in functions:
        assert pickle.loads(pickle.dumps(face)) is face
    says = "import moekit.torch as mt; print(x == [getattr(mt, f.__name__) for f in x])"
    assert elsewhere(pickle.dumps([*functions, mt.gate_gemm]), ROOT, says) == "True"


def test_functions_of_jax():
    import moekit.jax as mj

    for n in mj.__all__:
        assert pickle.loads(pickle.dumps(getattr(mj, n))) is not None
    assert pickle.loads(pickle.dumps(mj.silu_and_mul)) is mj.silu_and_mul


def test_what_has_no_name_says_so():
    """One in a function, and one of an interactive session."""

    @fusion(None, x=In("T H"))
    def inside(x):
        return x

    sentence = "it is pickled by its name, which .* does not have at the top of a file; declare it at the top of a module"
    with pytest.raises(MoekitError, match=f"^inside: {sentence}"):
        pickle.dumps(inside)
    assert copy.deepcopy(inside) is inside
    session = textwrap.dedent(MODULE) + "import pickle; pickle.dumps(doubled)"
    for how, given in (["-c", session], ""), (["-"], session):
        done = subprocess.run([sys.executable, *how], input=given, capture_output=True, text=True, check=False, cwd=ROOT)
        assert re.search(f"MoekitError: doubled: {sentence}", done.stderr)


def test_plain_data():
    declared = FUSIONS["add_rms_norm"]
    binding = example(declared)
    schedule = Schedule.parse("tile:T:16 tile:P:16 loop:D:16 split:D:2 warps:1 stages:1 then loop:D.part:1 tile:T:1 tile:P:64")
    for value in (binding, declared.trace(binding), schedule, In("T H")):
        for again in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value)):
            assert again == value
            assert str(again) == str(value)
    error = pickle.loads(pickle.dumps(ShapeError("add_rms_norm: x has shape [3]")))
    assert isinstance(error, ShapeError)
    assert str(error) == "add_rms_norm: x has shape [3]"


def test_packed_weights():
    import torch

    import moekit.torch as mt

    packed = mt.pack_gate(*(torch.randn(n, 32) for n in (16, 10, 1)))
    again = pickle.loads(pickle.dumps(packed))
    assert again.widths == packed.widths
    np.testing.assert_array_equal(again.weight.numpy(), packed.weight.numpy())


@pytest.mark.parametrize(("face", "extra"), [("torch", "moekit[torch]"), ("jax", "moekit[jax]")])
def test_a_face_without_its_framework_names_the_extra(face, extra):
    script = (
        f"import sys; sys.modules[{face!r}] = None\n"
        "from moekit.errors import MoekitError\n"
        f"try: import moekit.{face}.face\n"
        "except ImportError as error: print(isinstance(error, MoekitError), error.name, error, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    known, name, sentence = done.stdout.strip().split("|")
    assert (known, name) == ("True", face)
    assert sentence.startswith(f"moekit.{face}: {face} is not installed; install {extra}")
