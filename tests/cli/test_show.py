"""`moekit list` and `moekit show`."""

import json
import re

import pytest

from moekit.compile.schedule import Schedule
from moekit.fusions import FUSIONS

FORMS = {
    "reference": r"def reference\(",
    "graph": r"graph {name}\(",
    "schedule": r"(?m)^# {name}\w*: \d+ programs, .*\n.*tile:\w+:\d+",
    "tile": r"program {name}\w*\(",
    "triton": "@triton.jit",
    "pallas": r"def {name}\w*_kernel\(",  # a launch of several says which it is
}


def test_list_names_every_fusion_with_its_tensors(moekit):
    result = moekit("list")
    assert result.exit_code == 0
    for name, fusion in FUSIONS.items():
        assert f"{name} {fusion.signature}" in result.stdout
        assert fusion.doc.splitlines()[0] in result.stdout


def test_list_json(moekit):
    listed = json.loads(moekit("list", "--json").stdout)
    assert [row["name"] for row in listed] == list(FUSIONS)
    norm = next(row for row in listed if row["name"] == "add_rms_norm")
    assert norm["tensors"]["residual"] == {
        "role": "InOut",
        "shape": "T, H",
        "dtypes": ["float32", "float16", "bfloat16"],
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FUSIONS)
def test_show_every_fusion_in_every_form(moekit, name, form):
    result = moekit("show", name, "--as", form)
    assert result.exit_code == 0, result.output
    assert re.search(FORMS[form].format(name=name), result.stdout)


@pytest.mark.parametrize("form", ["triton", "pallas", "mosaic"])
def test_shown_source_is_python(moekit, form):
    compile(moekit("show", "topk_softmax", "--as", form, "--sizes", "E=37,T=3").stdout, form, "exec")


def test_sizes_dtype_parameters_and_schedule_are_used(moekit):
    graph = moekit("show", "add_rms_norm", "--sizes", "H=48", "--dtype", "float16", "--params", "eps=0.25").stdout
    assert "H=48" in graph
    assert "float16[T, H]" in graph
    assert "0.25" in graph
    schedule = "tile:T:2 loop:H:32 warps:2 stages:3"
    shown = moekit("show", "add_rms_norm", "--as", "schedule", "--sizes", "H=48", "--schedule", schedule).stdout
    assert str(Schedule.parse("\n".join(line for line in shown.splitlines() if not line.startswith("#")))) == schedule
    tile = moekit("show", "add_rms_norm", "--as", "tile", "--sizes", "H=48", "--schedule", schedule).stdout
    assert "axis H: 48 in loop blocks of 32" in tile
    assert "2 warps, 3 stages" in tile


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "there is no fusion 'nothing'; there are gate_gemm"),
        (["add_rms_norm", "--as", "cuda"], "'cuda' is not one of"),
        (["add_rms_norm", "--sizes", "Q=3"], "add_rms_norm has no axis Q; it has H, T"),
        (["add_rms_norm", "--sizes", "H"], "NAME=VALUE"),
        (["add_rms_norm", "--sizes", "H=-1"], "'-1' in 'H=-1' is no size"),
        (["add_rms_norm", "--sizes", "T=99999999999"], "axis T has 99999999999 elements; kernels count to 2146435072"),
        (["add_rms_norm", "--as", "triton", "--sizes", "H=99999999999999999999999"], "kernels count to 2146435072"),
        (["silu_and_mul", "--as", "pallas", "--sizes", "I=2000000000"], "axis 2*I has 4000000000 elements"),
        (["add_rms_norm", "--sizes", "H=0"], "axis H must have an element; only T may be 0"),
        (["add_rms_norm", "--params", "epsilon=1"], "there is no parameter 'epsilon'"),
        (["add_rms_norm", "--dtype", "float8"], "x is float8; it must be float32, float16 or bfloat16"),
        (["topk_softmax", "--sizes", "E=4"], "k"),
        (["add_rms_norm", "--as", "tile", "--schedule", "H"], "cannot read schedule 'H'"),
        (["add_rms_norm", "--schedule", "tile:T:3 whole:H:2048"], "axis T cannot be tile in blocks of 3"),
        (
            ["add_rms_norm", "--as", "tile", "--schedule", "tile:T:3 whole:H:2048"],
            "a block is a power of two",
        ),
    ],
)
def test_what_is_asked_wrongly_is_one_sentence_and_exit_code_2(moekit, arguments, said):
    result = moekit("show", *arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("backend", ["triton", "pallas"])
def test_packets_of_a_call_without_a_channel(moekit, backend):
    """Two ranks: mailboxes as wide as a row."""
    arguments = ("show", "all_reduce_add_rms_norm", "--as", backend, "--sizes", "H=64,T=2", "--params", "tp=2")
    text = moekit(*arguments).stdout
    assert text.count("= send_2(") == text.count("= receive_") == 2
