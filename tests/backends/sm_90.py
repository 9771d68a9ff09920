"""Kernels compiled by Triton's own compiler, without a GPU, and what can be read off the result for sm_90."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moekit.backends import triton as emitter
from moekit.compile import tile as t
from moekit.lang.dtypes import itemsize
from moekit.torch.launch import kernel

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "float8_e4m3fn": "*fp8e4nv"}
CUOBJDUMP, PTXAS = (Path(triton.__file__).parent / "backends/nvidia/bin" / name for name in ("cuobjdump", "ptxas"))
WIDE = 16  # bytes of the widest load a lane can make

INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.M)
PLACE = re.compile(r"\s*\.loc\s+(\d+) (\d+) ")
OURS = re.compile(r"\.file\s+(\d+) \"<moekit ")
LOAD = re.compile(r"ld\.global(?:\.[a-zL:\d_]+)*?(?:\.v(\d))?\.b(\d+)\s")
ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x[0-9a-f]+|\d+)")
POINTER = re.compile(r"tl\.load\((\w+)_ptr")


@dataclass(frozen=True)
class Built:
    """One kernel for sm_90.

    stack: bytes a lane keeps in memory; spills: loads from and stores to it; instructions: SASS instructions in its text,
    padding left out; per_element: the same times the lanes, over the elements of each section's largest block in memory;
    narrow: operand → bytes of its narrowest load, of those whose rows could be loaded 16 bytes at a time and some load is not;
    serial: whether the assembler says that products on the matrix unit wait for each other.
    """

    registers: int
    stack: int
    spills: int
    instructions: int
    per_element: float
    narrow: Mapping[str, int]
    serial: bool


@cache
def compiled(program: t.Kernel, target: str = "sm_90"):
    """A kernel as a launch compiles it: pointers 16-byte aligned, and on NVIDIA with programmatic dependent launch."""
    args = emitter.arguments(program)
    kinds = {a.name: POINTERS[program.param(a.subject).dtype] if a.kind == "pointer" else "i32" for a in args}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args) if a.kind == "pointer"}
    source = ASTSource(kernel(program), {**kinds, "PDL": "constexpr"}, {"PDL": TARGETS[target].backend == "cuda"}, aligned)
    options = {"num_warps": program.warps, "num_stages": program.stages}
    return triton.compile(source, target=TARGETS[target], options=options)


@cache
def build(program: t.Kernel) -> Built:
    """What can be read off a kernel as it is compiled."""
    assembled = compiled(program).asm
    text = disassembled(assembled["cubin"])
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    loaded = widths(assembled["ptx"], emitter.emit(program))
    mnemonics = [m for m in INSTRUCTION.findall(text) if m != "NOP"]
    return Built(
        registers=used["REG"],
        stack=used["STACK"] + used["LOCAL"],
        spills=sum(m.split(".")[0] in ("LDL", "STL") for m in mnemonics),
        instructions=len(mnemonics),
        per_element=len(mnemonics) * 32 * program.warps / elements(program),
        narrow={n: w for n, w in loaded.items() if w < WIDE <= row_bytes(program, n)},
        serial="wgmma.mma_async instructions are serialized" in _assembled(assembled["ptx"]),
    )


def _assembled(ptx: str) -> str:
    """What the assembler remarks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [PTXAS, "-v", "--gpu-name=sm_90a", path, "-o", path.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([CUOBJDUMP, "-res-usage", "-sass", path], capture_output=True, text=True, check=True).stdout


def crossed(sass: str) -> list[str]:
    """The instructions that make an fma of a product and what a neighbour in the warp has handed over (`SHFL.BFLY`)."""
    found, handed = [], set()
    for op, arguments in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)\s*(.*?);", sass):
        out, *read = (set(re.findall(r"\bR\d+\b", a)) for a in arguments.split(",") if not a.strip().startswith("P"))
        found += [f"{op} {arguments}"] if op.startswith("FFMA") and handed & set().union(*read) else []
        wide = 4 if ".128" in op else 2 if ".64" in op else 1
        out = {f"R{int(r[1:]) + i}" for r in out for i in range(wide)}
        handed = handed | out if op.startswith("SHFL.BFLY") else handed - out
    return found


def elements(program: t.Kernel) -> int:
    """Elements of the largest block that is loaded or stored, of all sections."""
    sections = program.sections if isinstance(program, t.Joined) else (program,)
    return sum(max(_blocks(s, s.body)) for s in sections)


def _blocks(program: t.TileProgram, ops):
    for op in ops:
        if isinstance(op, t.Loop):
            yield from _blocks(program, op.body)
        elif isinstance(op, t.Load | t.Store):
            axes = op.out.axes if isinstance(op, t.Load) else op.value.axes
            yield prod(program.axis(a).block for a in axes)


def row_bytes(program: t.Kernel, name: str) -> int:
    """Bytes of a row of an operand at the least: 0 where its last axis is dynamic, for rows are then single values."""
    param = program.param(name)
    last = (param.axes[-1] or "").rpartition("*")[2]  # a row of 2*I has at least I elements
    extents = {a.name: a.extent for a in program.axes}
    return (extents.get(last) or 0) * itemsize(param.dtype)


def widths(ptx: str, source: str) -> dict[str, int]:
    """Operand → bytes of its narrowest load, found by the line of the emitted source that each instruction is marked with.

    Inline assembly is where it begins: Triton 3.8 marks each of its lines as one further down in our source.
    """
    lines, found, operand, inline = ["", *source.splitlines()], {}, None, False
    ours = set(OURS.findall(ptx))
    for line in ptx.splitlines():
        if "ld.global.nc" in line:
            continue  # 2/π, of which libdevice's sine has a table
        inline = (inline or "// begin inline asm" in line) and "// end inline asm" not in line
        if place := PLACE.match(line):
            if inline:
                continue
            named = POINTER.search(lines[int(place[2])]) if place[1] in ours else None
            operand = named[1] if named else None
        elif load := LOAD.search(line):
            _narrowest(found, operand, int(load[1] or 1) * int(load[2]) // 8)
        elif copied := ASYNC.search(line):
            _narrowest(found, operand, int(copied[1], 0))
        else:
            assert "ld.global" not in line, line
            assert "cp.async.c" not in line or "commit" in line, line
    return found


def _narrowest(found: dict[str, int], operand: str | None, width: int) -> None:
    assert operand is not None, "a load whose line in the source loads nothing"
    found[operand] = min(found.get(operand, width), width)
