"""Mosaic kernels as an H200 would run them, without one: compiled for it, their PTX run by a machine in numpy (ptx.py)."""

from __future__ import annotations

import ast
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moekit.compile import tile as t
from moekit.jax import mosaic
from moekit.jax.launch import NOWHERE

from .ptx import Machine

DATA = Path(__file__).parents[1] / "data" / "h200.textproto"
POISON = 0xA5
_built: dict[tuple, tuple[str, str]] = {}


@cache
def h200(number: int = 1) -> Mesh:
    """So many virtual H200s."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=DATA.read_text(), topology=f"1x1x{number}")
    return Mesh(np.array(topology.devices).reshape(-1), ("tp",))


def assembled(program, buffers, wrote, grid: int) -> tuple[str, str]:
    """A kernel's PTX, and what the assembler says of it; `buffers`: the shape of each by name.

    A text is compiled once: jax 0.12 keeps what it has compiled, and says nothing of it again.
    """
    key = (mosaic.mosaic.emit(program), str(buffers), *wrote, grid)
    if key not in _built:
        _built[key] = _assembled(program, buffers, wrote, grid)
    return _built[key]


def _assembled(program, buffers, wrote, grid: int) -> tuple[str, str]:
    sharding = NamedSharding(h200(), PartitionSpec())
    given = {b: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for b, x in buffers.items()}
    shapes = [jax.ShapeDtypeStruct(buffers[b].shape, buffers[b].dtype, manual_axis_type=NOWHERE) for b in wrote]
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder), jax.set_mesh(h200()):
        jax.jit(lambda memory: REAL(program, memory, wrote, shapes, grid, False)).lower(given).compile()
        (ptx,), (said,) = ([p.read_text() for p in Path(folder).glob(f"*.{kind}")] for kind in ("ptx", "ptxas"))
    return ptx, said


def used(program: t.Kernel) -> list[str]:
    """The buffers in the order in which a kernel's text first names them: so MLIR numbers the parameters of a launch, but for
    those whose address is taken, to be copied into shared memory, which are the last."""
    calls = [n for n in ast.walk(ast.parse(mosaic.mosaic.emit(program))) if isinstance(n, ast.Call)]
    copied = {n.args[0].id for n in calls if ast.unparse(n.func) == "asked" and any(k.arg == "width" for k in n.keywords)}
    found: list[str] = []
    for section in program.sections:
        found += [place for p in section.params for _, place in p.viewed.picked]
        memory = (op.at.tensor for op, _ in t.walk(section.body) if isinstance(op, t.Load | t.Store))
        found += [section.param(name).viewed.buffer for name in memory]
    return sorted(dict.fromkeys(found), key=lambda name: f"{name}_ref" in copied)


REAL = mosaic.call


@contextmanager
def emulated() -> Iterator[list[Machine]]:
    """Run every Mosaic kernel that is called meanwhile, on the CPU, by its PTX; the machines that did."""
    machines: list[Machine] = []

    def call(program, memory, wrote, shapes, grid, interpret):
        read, _ = mosaic.mosaic.buffers(program)
        kinds = {b: jax.ShapeDtypeStruct(s.shape, s.dtype) for b, s in zip(wrote, shapes, strict=True)}
        kinds |= {b: jax.ShapeDtypeStruct(memory[b].shape, memory[b].dtype) for b in read}
        text, _ = elsewhere.submit(assembled, program, kinds, wrote, grid).result()

        def run(*arrays):
            held = {b: np.full(s.size * s.dtype.itemsize, POISON, np.uint8).view(s.dtype) for b, s in kinds.items()}
            held |= {b: np.array(x) for b, x in zip(read, arrays, strict=True)}
            machine = Machine(text, [held[b] for b in used(program)], grid)
            machines.append(machine)
            machine.run()
            return [held[b].reshape(kinds[b].shape) for b in wrote]

        return jax.pure_callback(run, [kinds[b] for b in wrote], *(memory[b] for b in read))

    with ThreadPoolExecutor(1) as elsewhere, patch.object(mosaic, "call", call):  # a thread that traces nothing else
        yield machines
