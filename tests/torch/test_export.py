"""Exported files: they stand alone, test themselves, and refuse what does not fit."""

import ast
import os
import re
import subprocess
import sys

import pytest
import torch

from moekit.compile.rules import heuristic, row_classes
from moekit.compile.schedule import Schedule
from moekit.errors import DtypeError, MoekitError, ScheduleError, ShapeError
from moekit.export import export
from moekit.fusions import FUSIONS
from moekit.lang import In, cast, f32, fusion
from moekit.lang.arguments import example
from tests.sizes import sizes_of

FOLLOWS = dict.fromkeys(("experts", "moe_align", "scaled_experts", "quantised_experts"), "B")  # whose size a call says
AXES = {"D": 64, "P": 24, "I": 12, "E": 40, "H": 40, "H?": 1, "V": 4, "K": 2, "Dk": 16, "Dv": 24, "G": 3, "Q": 6, "L": 300,
        "C": 8, "S": 3, "R": 4, "N": 8, "J": 24, "M": 2, "Cq": 8, "Ck": 8, "Cv": 8, "Lr": 8, "Lc": 8}  # fmt: skip
MANY_ROWS = ("silu_and_mul", "shared_expert_combine", "combine_wide")
LONG = ("silu_and_mul", "shared_expert_combine", "add_rms_norm", "all_reduce_add_rms_norm", "gated_rms_norm")
AXES_OF = {name: AXES | {"H": 1000, "D": 1000, "I": 1000} for name in LONG}  # long rows are of the class of many sooner
REFUSED = (*FOLLOWS, "quantised")
SIZES = {name: sizes_of(fusion, AXES_OF.get(name, AXES)) for name, fusion in FUSIONS.items() if name not in REFUSED}
SPLIT = Schedule.parse(
    "tile:D.part:1 tile:T:16 tile:P:16 loop:D:16 split:D:2 warps:1 stages:1 then loop:D.part:1 tile:T:1 tile:P:64 warps:1"
)

RUN = """
import runpy, sys
sys.modules["moekit"] = None  # importing it would raise
for path in sys.argv[1:]:
    print("==", path)
    runpy.run_path(path, run_name="__main__")
"""


def write(folder, dtypes) -> list[str]:
    """Every fusion in every dtype, one with a width of its own, and two whose contraction is split."""
    paths = []
    for dtype in dtypes:
        texts = {name: export(FUSIONS[name], dtype, sizes) for name, sizes in SIZES.items()}
        texts["gate_gemm_split"] = export(FUSIONS["gate_gemm"], dtype, SIZES["gate_gemm"], schedule=SPLIT)
        texts["gate_gemm_deep"] = export(FUSIONS["gate_gemm"], dtype, {"D": 512, "P": 16})
        texts["combine_wide"] = export(FUSIONS["shared_expert_combine"], dtype, {"H": 1000})
        texts["topk_plain"] = export(FUSIONS["topk_softmax"], dtype, {"E": 33}, {"k": 3, "renormalize": False})
        for name, text in texts.items():
            paths.append(str(folder / f"{name}_{dtype}.py"))
            (folder / f"{name}_{dtype}.py").write_text(text)
    return paths


def run(paths, folder, **environment):
    command = [sys.executable, "-c", RUN, *paths]
    clean = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    return subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True, check=False)


def test_exported_files_run_where_moekit_cannot_be_imported(tmp_path):
    """In one dtype by turns, and in float32 where thousands of rows take long: a GPU runs them all."""
    wide, narrow = (write(tmp_path, (dtype,)) for dtype in ("float32", "float16"))
    short = [not any(name in path for name in MANY_ROWS) for path in wide]
    paths = [n if i % 2 and few else w for i, (w, n, few) in enumerate(zip(wide, narrow, short, strict=True))]
    done = run(paths, tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count(": right") == len(paths)


@pytest.mark.gpu
def test_exported_files_run_on_the_gpu(tmp_path):
    paths = write(tmp_path, ("float32", "float16", "bfloat16"))
    done = run(paths, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count(": right") == len(paths) == 3 * (len(SIZES) + 4)


def test_self_test_catches_a_wrong_kernel(tmp_path):
    text = export(FUSIONS["add_rms_norm"], "float32", {"H": 40})
    (tmp_path / "wrong.py").write_text(text.replace("+ 1e-06", "+ 1e-01"))
    done = run([str(tmp_path / "wrong.py")], tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode != 0
    assert "out is wrong" in done.stderr


def test_every_fusion_is_exported_or_refused():
    """A size that follows from others at the call is worked out by moekit alone."""
    assert {*SIZES, *REFUSED} == {*FUSIONS}
    for name, axis in FOLLOWS.items():
        said = f"^{name}: the size of {axis} follows from others at the call, which a file of its own does not work out; call"
        with pytest.raises(MoekitError, match=said):
            export(FUSIONS[name])
    with pytest.raises(MoekitError, match=r"^quantised: codes is rounded to float8, which a file's own test does not follow"):
        export(FUSIONS["quantised"])
    with pytest.raises(MoekitError, match=r"^all_reduce_add_rms_norm: it adds up over tp, whose ranks a file of its own"):
        export(FUSIONS["all_reduce_add_rms_norm"], params={"tp": 2})


@pytest.mark.parametrize("name", list(SIZES))
def test_what_a_file_imports_and_says(name):
    text = export(FUSIONS[name])
    tree = ast.parse(text)
    imported = {a.name for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    assert imported == {"torch", "triton", "triton.language", "gdc_launch_dependents", "gdc_wait"}
    assert "moekit." not in text
    assert ast.get_docstring(tree).startswith(f"{name}: ")
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    assert len({n.name for n in functions}) == len(functions)  # kernels and their sections, for dense tensors and for any
    launcher = next(n for n in functions if n.name == name)
    assert ast.get_docstring(launcher)


def test_a_gemm_has_every_class_of_rows():
    """The launcher chooses by T as moekit does, first among kernels for dense tensors; a schedule given is the only one."""
    text = export(FUSIONS["gate_gemm"])
    rows = row_classes(FUSIONS["gate_gemm"].trace(example(FUSIONS["gate_gemm"], dtype="bfloat16")))[1:]
    tests = [line.strip() for line in text.splitlines() if " T < " in line]
    wanted = [f"{'dense and ' * dense}T < {least}:" for dense in (True, False) for least in rows]
    assert tests == [f"{'elif' if n else 'if'} {test}" for n, test in enumerate(wanted)]
    branches = re.split(r"\n        (?:if|elif|else)\b", text.split("with torch.cuda.device_of(x):")[1])[1:]
    launched = {tuple(re.findall(r"(\w+_kernel)\[", branch)) for branch in branches}
    assert len(launched) == len(branches) == 2 * (len(rows) + 1)
    assert f"Schedule from T = {rows[0]} on: {heuristic_of('gate_gemm', rows[0])}" in text
    assert " T < " not in export(FUSIONS["gate_gemm"], schedule=SPLIT)
    assert " T < " not in export(FUSIONS["add_rms_norm"])


def test_one_row_of_a_weight_may_have_any_stride():
    """Where there is one element the stride is never used, by kernels of one class as of another."""
    one, two = (export(FUSIONS["gate_projections"], sizes={"D": 64, "I": 16, "E": 16, "G": n}) for n in (1, 2))
    assert "_fits(shared_gate, (1,), (), (0, 1))" in one
    assert "_fits(shared_gate, (1,), (0,), (0, 1))" in two


def heuristic_of(name: str, rows: int) -> Schedule:
    """The heuristic's schedule for a class of rows."""
    return heuristic(FUSIONS[name].trace(example(FUSIONS[name], dtype="bfloat16")), rows)


def test_a_file_refuses_what_does_not_fit(tmp_path, monkeypatch):
    (tmp_path / "silu.py").write_text(export(FUSIONS["silu_and_mul"], "float32", {"I": 8}))
    scope = {"__name__": "silu"}
    source = (tmp_path / "silu.py").read_text().replace("@triton.jit", "@(lambda **k: lambda f: f)")
    exec(compile(source, "silu.py", "exec"), scope)
    with pytest.raises(ValueError, match=r"gate_up is torch.float32 \[3, 15\] on cpu; it must be torch.float32 \[3, 16\]"):
        scope["silu_and_mul"](torch.zeros(3, 15))
    with pytest.raises(ValueError, match=r"out is torch.float16"):
        scope["silu_and_mul"](torch.zeros(3, 16), torch.zeros(3, 8, dtype=torch.float16))
    assert scope["silu_and_mul"](torch.zeros(0, 16)).shape == (0, 8)


def test_refusals():
    with pytest.raises(ShapeError, match="there is no axis 'Q'; its axes are T, I"):
        export(FUSIONS["silu_and_mul"], sizes={"Q": 3})
    with pytest.raises(DtypeError, match="no operand can be int8"):
        export(FUSIONS["silu_and_mul"], dtype="int8")
    with pytest.raises(ScheduleError, match="axis D cannot be split in 2: only a reduced axis of static size can be split"):
        export(FUSIONS["silu_and_mul"], schedule=SPLIT)
    with pytest.raises(TypeError, match="there is no parameter 'k'"):
        export(FUSIONS["silu_and_mul"], params={"k": 3})


def borrowed(x):
    """A reference that leans on something the file cannot take along."""
    return {"out": torch.from_numpy(x).numpy() * 2}


@fusion(borrowed, x=In("T H"))
def doubled(x):
    """out = 2·x."""
    return cast(f32(x) * 2.0, x.dtype)


def twice(x):
    """A function of another name that a reference calls."""
    return shifted(x) * 2 - 2


def shifted(x):
    """One that is called by that one."""
    return x + 1


def calling(x):
    """A reference that calls others."""
    return {"out": twice(x.astype("float64"))}


@fusion(calling, x=In("T H"))
def doubled_by_another(x):
    """out = 2·x."""
    return cast(f32(x) * 2.0, x.dtype)


def test_what_a_reference_calls_is_taken_along(tmp_path):
    """Also what that calls in turn."""
    (tmp_path / "doubled.py").write_text(export(doubled_by_another, "float32", {"H": 8}))
    done = run([str(tmp_path / "doubled.py")], tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]


def test_reference_that_cannot_be_taken_along():
    with pytest.raises(MoekitError, match="the reference of doubled uses torch, which cannot be taken along"):
        export(doubled)
