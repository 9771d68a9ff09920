"""A Plan on JAX arrays without Pallas: the Triton printer's kernels, by `jax.ffi` to XLA's own Triton compiler.

Pallas's Triton lowering ends in the same call of XLA, and is to go from a jax to come (docs/versions.md). Triton's front end
makes the text that XLA takes (TTIR) of the emitted source, for which it needs neither a GPU nor torch. XLA passes a kernel no
numbers, so sizes and strides are constants in it, and a View's is a kernel of its own, as with Pallas.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib import metadata
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.interpreters import mlir
from jax.sharding import ManualAxisType

from moekit.backends.loaded import load
from moekit.backends.triton_entry import Entry, Lying, begins, buffers, entry, picks, strides_of
from moekit.compile import tile as t
from moekit.compile.plan import Plan
from moekit.compile.tile import interpret
from moekit.errors import UnavailableError
from moekit.jax.launch import NOWHERE, interpreted, primitive, spread

TARGET = "__gpu$xla.gpu.triton"  # XLA's name of its compiler
CAPABILITY = 90  # of the GPU that the front end is told of: it asks for the float8 types alone; XLA knows what is there
POINTERS = {
    "float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int64": "*i64", "int32": "*i32", "int16": "*i16",
    "int8": "*i8", "bool": "*i1", "float8_e4m3fn": "*fp8e4nv",
}  # fmt: skip
ALIGNED = 16  # bytes that every array of XLA's begins at a multiple of


def unavailable() -> str | None:
    """Why kernels cannot be made this way here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; install moekit[triton]"
    try:
        from triton import knobs
    except ImportError:
        return f"triton {metadata.version('triton')} is installed, and 3.6 or newer is needed; install moekit[triton]"
    return "TRITON_INTERPRET is set, and XLA takes what Triton compiles; unset it" if knobs.runtime.interpret else None


@lru_cache(maxsize=1024)
def compiled(kernel: t.Kernel, lying: tuple[tuple[str, t.Viewed | t.Mailbox], ...]) -> tuple[Entry, str]:
    """The entry of a kernel, and the TTIR that Triton's front end makes of it. Raises UnavailableError without triton."""
    if why := unavailable():
        raise UnavailableError(f"{kernel.name}: {why}")
    made = entry(kernel, dict(lying))
    return made, ttir(made, kernel.warps, kernel.stages)


def ttir(made: Entry, warps: int, stages: int) -> str:
    """The text of an entry after Triton's own first passes, in which what it calls has become part of it."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler import ASTSource, make_backend

    function = load("triton", made.name, made.source)[made.name]
    signature = {name: POINTERS[dtype] for name, dtype in zip(function.arg_names, made.dtypes, strict=True)}
    aligned = {(i,): [["tt.divisibility", ALIGNED]] for i in range(len(signature))}
    source, target = ASTSource(function, signature, {}, aligned), GPUTarget("cuda", CAPABILITY, 32)
    context, stages_of = ir.context(), {}
    backend: Any = make_backend(target)
    options = backend.parse_options({"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True})
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, *generators, context)
    backend.add_stages(stages_of, options, Language.TRITON)
    return stages_of["ttir"](module, {}).str_nodebug()


def written(plan: Plan, lying: Lying) -> list[str]:
    """The buffers that the kernels of a plan write, scratch left out."""
    scratch = {s.name for s in plan.scratch}
    return [b for b in dict.fromkeys(b for p in plan.programs for b in buffers(p, lying)[1]) if b not in scratch]


def launch(
    plan: Plan,
    lying: Lying,
    lengths: Mapping[str, tuple[int, ...]],
    bases: Mapping[str, jax.Array],
    shapes: Mapping[str, tuple],
    sizes: Mapping[str, int],
    varying: Mapping[str, ManualAxisType],
) -> dict[str, jax.Array]:
    """As `launch.launch`, of kernels behind pointers: `lying` says where each tensor, of shape `lengths[name]`, lies in them.

    On a CUDA device the kernels are compiled by XLA, elsewhere moekit's interpreter executes the same programs.
    """
    arrays = {n: spread(a, varying.get(n, NOWHERE)) for n, a in bases.items()}
    kinds = {n: (a.shape, a.dtype) for n, a in bases.items()} | dict(shapes)
    wanted = written(plan, lying)
    outs = tuple((*kinds[b], varying.get(b, NOWHERE)) for b in wanted)
    run = partial(_run, plan, tuple(lying.items()), tuple(arrays), kinds, dict(sizes), varying)
    played = partial(_played, plan, lying, lengths, tuple(arrays), kinds, dict(sizes))
    default = partial(interpreted.bind, run=played, outs=outs)
    results = lax.platform_dependent(*arrays.values(), cuda=run, default=default)
    return dict(zip(wanted, results, strict=True))


def _run(plan: Plan, lying: tuple, names: tuple, kinds: dict, sizes: dict, varying: Mapping, *arrays: jax.Array) -> list:
    memory = dict(zip(names, arrays, strict=True))
    kinds = kinds | {s.name: (s.shape(sizes), s.dtype) for s in plan.scratch}
    anywhere = ManualAxisType(varying=frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays)))
    for program in plan.programs:
        own = tuple((n, at) for n, at in lying if n in {p.name for p in program.params})
        read, wrote = buffers(program, dict(own))
        outs = tuple((*kinds[b], varying.get(b, anywhere)) for b in wrote)
        with jax.named_scope(program.name):
            results = triton_call.bind(
                *(memory[b] for b in read), program=program, lying=own, count=program.programs(sizes), outs=outs
            )
        memory |= dict(zip(wrote, results, strict=True))
    return [memory[b] for b in written(plan, dict(lying))]


# One launch: `count` programs of a kernel, which takes the arrays that it reads. Triton makes its text when it is lowered.
triton_call = primitive("triton_call")


@partial(mlir.register_lowering, triton_call, platform="cuda")
def _lower(ctx, *operands, program, lying, count, outs):
    made, text = compiled(program, lying)
    aliases = {made.read.index(b): made.written.index(b) for b in made.written if b in made.read}
    numbers = {"num_warps": program.warps, "num_stages": program.stages, "grid_x": count, "grid_y": 1, "grid_z": 1}
    rule = jax.ffi.ffi_lowering(TARGET, operand_output_aliases=aliases)
    return rule(ctx, *operands, name=made.name, ir=text, debug=False, **{n: np.int32(x) for n, x in numbers.items()})


def _played(
    plan: Plan, lying: Lying, lengths: Mapping, names: tuple, kinds: Mapping, sizes: Mapping, *arrays: jax.Array
) -> list[jax.Array]:
    """What the kernels write, by moekit's interpreter: numpy executes the programs on copies of the arrays."""
    if mail := [at for at in lying.values() if isinstance(at, t.Mailbox)]:
        raise UnavailableError(f"{plan.graph.name}: no rank reaches another's {mail[0].buffer} on a CPU; choose xla or psum")
    wanted = written(plan, lying)
    outs = [jax.ShapeDtypeStruct(*kinds[b]) for b in wanted]
    return jax.pure_callback(partial(_on_host, plan, lying, lengths, names, kinds, sizes, wanted), outs, *arrays)


def _on_host(plan, lying, lengths, names, kinds, sizes, wanted, *arrays) -> list[np.ndarray]:
    held = {n: np.array(x) for n, x in zip(names, arrays, strict=True)}
    held |= {b: interpret.poison(*kinds[b]) for b in wanted if b not in held}
    interpret.run(plan, {n: part(held, lying[n], shape) for n, shape in lengths.items()}, sizes)
    return [held[b] for b in wanted]


def part(held: Mapping[str, np.ndarray], at: t.Viewed, shape: tuple[int, ...]) -> np.ndarray:
    """The elements of a tensor in the arrays that are held, as an array that writes to them."""
    base = held[at.buffer]
    start = begins(at) + sum(int(held[picked][0]) * step for picked, step in picks(at))
    steps = [step * base.itemsize for step in strides_of(at)]
    return np.lib.stride_tricks.as_strided(base.reshape(-1)[start:], shape, steps)
