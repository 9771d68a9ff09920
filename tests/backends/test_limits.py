"""What each default schedule may cost, compiled for sm_90 at the models' sizes in bfloat16: tests/data/limits.json.

After a change that is meant, write the figures anew with `MOEKIT_WRITE_LIMITS=1 pytest tests/backends/test_limits.py`, each the
one measured and a tenth more, and read their diff. Which loads may be narrow, and why, is written by hand. Kernels that Triton
3.8 makes larger than that have figures of their own, written the same way where it is installed (`make test LOCK=newest`).
"""

import json
import math
import os
import re
from pathlib import Path

import pytest

from moekit.compat import release
from moekit.compile import tile as t
from moekit.compile.passes.flatten import flatten
from moekit.compile.plan import plan
from moekit.compile.rules import heuristic, row_classes
from moekit.compile.schedule import Schedule
from moekit.lang import In, cast, contract, fusion

from .samples import SAMPLES, Sample, strided

triton = pytest.importorskip("triton")
from .sm_90 import WIDE, Built, build, widths  # noqa: E402

PATH = Path(__file__).parents[1] / "data" / "limits.json"
LIMITS = json.loads(PATH.read_text())["triton sm_90"]
LATER = "kernels from triton 3.8"
IS_LATER = release(triton.__version__) >= (3, 8)
MARGIN, MOST_REGISTERS = 1.1, 255
HIDDEN, EXPERTS = 2048, 512


def _gates(i: int) -> dict:
    return {"gate_up": (2 * i, HIDDEN), "router": (EXPERTS, HIDDEN), "shared_gate": (1, HIDDEN)}


def _norm(h: int) -> Sample:
    return Sample("add_rms_norm", {"x": (4, h), "residual": (4, h), "weight": (h,)})


def _block(i: int) -> Sample:
    return Sample("gate_block", {"x": (4, HIDDEN), "residual": (4, HIDDEN), "weight": (HIDDEN,), **_gates(i)})


def _down(i: int) -> Sample:
    shapes = {"hidden": (4, HIDDEN), "activated": (4, i), "down": (HIDDEN, i), "share": (4, 1)}
    return Sample("down_combine", shapes, f32=("share",))


_DELTA = {"q": (4, 2, 128), "k": (4, 2, 128), "v": (4, 4, 128), "a": (4, 4), "b": (4, 4), "A_log": (4,), "dt_bias": (4,),
          "state": (4, 4, 128, 128)}  # fmt: skip

CALLS = {  # one rank of eight, and what differs in kind where one GPU holds the layer: down_combine's axis is split
    "add_rms_norm 2048": _norm(2048),
    "add_rms_norm 4096": _norm(4096),
    "silu_and_mul 64": Sample("silu_and_mul", {"gate_up": (4, 128)}),
    "silu_and_mul 512": Sample("silu_and_mul", {"gate_up": (4, 1024)}),
    "topk_softmax 512/10": Sample("topk_softmax", {"logits": (4, 512)}, {"k": 10}),
    "topk_softmax 256/8": Sample("topk_softmax", {"logits": (4, 256)}, {"k": 8}),
    "shared_expert_combine 2048": Sample(
        "shared_expert_combine", {"hidden": (4, HIDDEN), "shared": (4, HIDDEN), "gate": (4, 1)}
    ),
    "gate_gemm 648": Sample("gate_gemm", {"x": (4, HIDDEN), "packed": (648, HIDDEN)}),
    "gate_projections 64": Sample("gate_projections", {"x": (4, HIDDEN), **_gates(64)}),
    "gate_block 64": _block(64),
    "down_combine 64": _down(64),
    "down_combine 512": _down(512),
    "expert_gate_up 64": SAMPLES["expert_gate_up"],
    "attention_decode 2x8x256": SAMPLES["attention_decode"],
    "expert_down 64": SAMPLES["expert_down"],
    "conv_projections 4096": SAMPLES["conv_projections"],
    "gate_topk 64": SAMPLES["gate_topk"],
    "expert_down_shared 64": SAMPLES["expert_down_shared"],
    "gated_attention_decode 1x8x256": SAMPLES["gated_attention_decode"],
    "causal_conv1d_step 8192": SAMPLES["causal_conv1d_step"],
    "gated_rms_norm 4x128": Sample("gated_rms_norm", {"x": (4, 4, 128), "z": (4, 4, 128), "weight": (128,)}),
    "delta_rule_chunks 8/16": SAMPLES["delta_rule_chunks"],
    "delta_rule_step 2/4": Sample("delta_rule_step", _DELTA, f32=("A_log", "dt_bias", "state")),
}


def _programs(sample: Sample, rows: int):
    """The kernels of a call with that many rows, the least of a class."""
    _, binding, graph = sample.bound()
    return plan(graph, heuristic(graph, rows or None), strided(graph, dict(binding.sizes))).programs


def _cases() -> dict:
    """The kernels of every class of rows that has kernels of its own."""
    found = {}
    for name, sample in CALLS.items():
        for rows in row_classes(sample.bound()[2]):
            programs = _programs(sample, rows)
            if programs not in found.values():
                found[f"{name} T>={rows}" if rows else name] = programs
    return found


CASES = _cases()


def _limit(value: float, digits: int) -> float:
    return math.ceil(value * MARGIN * 10**digits) / 10**digits


def _excess(one: Built, limit: dict) -> dict:
    """What a kernel takes more of than its limit says: name → both."""
    taken = {"registers": one.registers, "per element": one.per_element, "stack": one.stack, "spills": one.spills}
    return {n: (value, limit.get(n, 0)) for n, value in taken.items() if value > limit.get(n, 0)}


def _write(name: str, built: list) -> None:
    everything = json.loads(PATH.read_text())
    rows = [
        {"registers": min(MOST_REGISTERS, int(_limit(b.registers, 0))), "per element": _limit(b.per_element, 2)}
        | ({"stack": b.stack, "spills": b.spills} if IS_LATER and b.spills else {})
        for b in built
    ]
    section = LATER if IS_LATER else "kernels"
    kernels = everything["triton sm_90"][section] | {name: rows}
    if IS_LATER and all(_excess(one, limit) == {} for one, limit in zip(built, LIMITS["kernels"][name], strict=True)):
        del kernels[name]
    everything["triton sm_90"][section] = {n: kernels[n] for n in CASES if n in kernels}
    text = json.dumps(everything, indent=1, ensure_ascii=False)
    one_line = re.sub(
        r"\[[^\[\]{}]*\]|\[\s*\{[^\[\]]*\}\s*\]|\{[^{}]*\}", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text
    )
    PATH.write_text(one_line + "\n")


def test_every_call_has_its_limits():
    """No call goes unseen, no limit stays behind."""
    if not os.environ.get("MOEKIT_WRITE_LIMITS"):
        assert set(LIMITS["kernels"]) == set(CASES)
    for name, rows in LIMITS[LATER].items():
        assert any(row[n] > limit.get(n, 0) for row, limit in zip(rows, LIMITS["kernels"][name], strict=True) for n in row)


@pytest.mark.parametrize("name", list(CASES))
def test_a_call_within_its_limits(name):
    """As many launches as stated; no spills; registers and instructions per element at most as stated; loads 16 bytes wide;
    products that overlap."""
    built = [build(program) for program in CASES[name]]
    if os.environ.get("MOEKIT_WRITE_LIMITS"):
        _write(name, built)
        return
    limits = (LIMITS[LATER] if IS_LATER else {}).get(name) or LIMITS["kernels"][name]
    excused = LIMITS["narrow loads"].get(CALLS[name.split(" T>=")[0]].fusion, {})
    assert len(built) == len(limits)
    for one, limit in zip(built, limits, strict=True):
        assert _excess(one, limit) == {}
        assert not one.serial
        assert {n: width for n, width in one.narrow.items() if width < excused.get(n, {"bytes": WIDE})["bytes"]} == {}


def test_excuses_are_needed():
    """A load that has become wide is no longer excused, nor is an excuse wider than needed."""
    if os.environ.get("MOEKIT_WRITE_LIMITS"):
        return
    narrowest: dict[str, dict[str, int]] = {}
    for name, programs in CASES.items():
        found = narrowest.setdefault(CALLS[name.split(" T>=")[0]].fusion, {})
        for operand, width in (pair for program in programs for pair in build(program).narrow.items()):
            found[operand] = min(found.get(operand, WIDE), width)
    excused = {f: {n: x["bytes"] for n, x in rows.items()} for f, rows in LIMITS["narrow loads"].items()}
    assert excused == {f: rows for f, rows in narrowest.items() if rows}


def test_a_narrow_load_a_spill_and_a_wasteful_kernel_are_seen():
    """The figures above are ones that can fail: rows at any stride load 2 bytes at a time, and a block too large spills."""
    sample = CALLS["silu_and_mul 64"]
    _, binding, graph = sample.bound()
    unaligned = {n: t.Strided(("any", "unit")) for n in graph.tensors}
    (odd,) = plan(graph, None, unaligned).programs
    (even,) = plan(graph, None, strided(graph, dict(binding.sizes))).programs
    assert build(odd).narrow == {"gate_up": 2}
    assert build(odd).per_element > MARGIN * build(even).per_element
    huge = Schedule.parse("tile:T:128 loop:D:64 tile:P:128 parts:D:4 warps:4 stages:3")
    sample = CALLS["gate_gemm 648"]
    _, binding, graph = sample.bound()
    (spilling,) = plan(graph, huge, strided(graph, dict(binding.sizes))).programs
    assert build(spilling).spills > 0
    assert build(spilling).stack > 0


@fusion(None, x=In("T D"), one=In("P D"), other=In("P D"))
def two_weights(x, one, other):
    """Two products that are no twins."""
    return {"out": cast(contract(x, one, over="D") * contract(x, other, over="D"), x.dtype)}


def test_two_products_of_a_flat_loop_would_wait_for_each_other(monkeypatch):
    """Why the compiler makes none, and what `serial` sees."""
    shapes = {"x": (4, HIDDEN), "one": (512, HIDDEN), "other": (512, HIDDEN)}
    graph = two_weights.trace(two_weights.bind(shapes, dict.fromkeys(shapes, "bfloat16"), {}))
    schedule = Schedule.parse("tile:T:128 loop:D:64 tile:P:64 parts:D:4 warps:8 stages:3")
    (program,) = plan(graph, schedule, strided(graph, {"T": 4})).programs
    assert not build(program).serial
    monkeypatch.setitem(flatten.__globals__, "MOST", 2)
    assert build(flatten(program)).serial


def test_widths_are_attributed_to_operands():
    """By the line of the source that an instruction is marked with; a line of another file is none of ours."""
    source = "\n".join(["a = tl.load(x_ptr + i)", "b = tl.load(w_ptr + i)"])
    ptx = """
\t.loc\t1 1 4
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\tld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
\t// begin inline asm
\t.loc\t1 2 4
\tmov.u32 %r1, %r2;
\t.loc\t1 3 4
\t@%p1 ld.global.b64 { %rd1 }, [ %rd1 + 0 ];
\t// end inline asm
\t.loc\t1 2 4
\tcp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
\tcp.async.commit_group;
\t.loc\t2 1 4
\t.file\t1 "<moekit triton name digest>"
\t.file\t2 "standard.py"
"""
    assert widths(ptx, source) == {"x": 8, "w": 4}
