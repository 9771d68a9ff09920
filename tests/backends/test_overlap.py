"""Programmatic dependent launch as it is compiled: what comes before a kernel waits for the launches before it, and after."""

import re
from dataclasses import replace

import pytest

from .samples import SAMPLES

pytest.importorskip("triton")
from .sm_90 import compiled

LOAD, STORE, BARRIER = (re.compile(x) for x in (r"ld\.global", r"st\.global", r"bar(rier)?\.(warp\.)?sync"))
STEPS = {"prefetch.global.L2": "P", "griddepcontrol.wait": "W", "griddepcontrol.launch_dependents": "T"}
STEP = re.compile("|".join([*map(re.escape, STEPS), r"ld\.global", r"st\.global", r"cp\.async\.c[ag]"]))


def _steps(program) -> str:
    """A letter per step of a kernel in the order of its text: P asks ahead, W waits, T lets the next launch in, M: memory."""
    found = [STEPS.get(step, "M") for step in STEP.findall(compiled(program).asm["ptx"])]
    return "".join(a for a, b in zip(found, [*found[1:], ""], strict=True) if a != b)


@pytest.mark.parametrize("name", ["gate_gemm", "gate_projections", "add_rms_norm"])
def test_memory_is_touched_after_the_wait(name):
    """Each section asks for its weight, waits, lets the next launch begin and only then loads; others wait before anything."""
    for program in SAMPLES[name].strided().programs:
        asks = program.name.endswith("_partial")
        assert _steps(program) == ("PWTM" * len(program.sections) if asks else "TWM"), program.name


@pytest.mark.parametrize("schedule", ["", "tile:T:1 tile:C:256 whole:S:4 whole:S+1:4 warps:8 stages:1"])
def test_lanes_store_after_all_have_loaded(schedule):
    """Of a tensor that is read at other elements than are written: between the last load and the first store all meet."""
    (program,) = replace(SAMPLES["causal_conv1d_step"], schedule=schedule).strided().programs
    ptx = compiled(program).asm["ptx"]
    last, first = max(m.start() for m in LOAD.finditer(ptx)), min(m.start() for m in STORE.finditer(ptx))
    assert BARRIER.search(ptx, last, first)


@pytest.mark.parametrize("depth", [96, 448, 2048])
def test_what_is_asked_for_ahead_can_be_compiled(depth):
    """Lines that are no power of two are asked for in pieces, each from an element that is named before."""
    sample = replace(SAMPLES["gate_gemm"], dtype="float32", shapes={"x": (4, depth), "packed": (24, depth)})
    assert "P" in _steps(sample.strided().programs[0])
