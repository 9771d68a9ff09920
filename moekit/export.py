"""A fusion as one standalone Python file: kernels, launcher and self-test, with torch and triton as its only imports.

The file has two sets of kernels: one for tensors laid out like contiguous ones (rows may be padded), one for any strides. Sizes
of weight-side axes, dtypes and parameters are fixed in it; the number of tokens is not. The self-test alone uses numpy.
"""

from __future__ import annotations

import dis
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from types import CodeType
from typing import Any

from moekit import __version__
from moekit.backends import triton as emitter
from moekit.compile import tile as t
from moekit.compile.plan import Plan, plan
from moekit.compile.rules import class_axis, heuristic, row_classes
from moekit.compile.rules.alike import settled
from moekit.compile.schedule import Schedule
from moekit.compile.tile.layouts import contiguous
from moekit.compile.tile.walk import walk
from moekit.errors import MoekitError
from moekit.lang.arguments import example
from moekit.lang.dtypes import STORED
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph, Tensor, Write, made_of

ANY = "_any_strides"
TOLERANCE = {"float32": 3e-5, "float16": 4e-3, "bfloat16": 3e-2}
TURNED = 0.1  # of a narrow dtype's tolerance: what ties that turn within add to a wider output
HELPERS = '''def _overlap(device):
    """The options of a launch: programmatic dependent launch where the GPU has it (compute capability 9.0 and later)."""
    new = device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if new else {"PDL": False}


def _check(name, x, shape, dtype, device):
    if tuple(x.shape) != shape or x.dtype != dtype or x.device != device:
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}; it must be {dtype} {list(shape)} on {device}")


def _fits(x, unit, aligned, static):
    """Whether strides are 1 along `unit`, multiples of 16 bytes along `aligned`, and offsets along `static` below 2**31."""
    step = 16 // x.element_size()
    return (
        all(x.stride(d) == 1 for d in unit)
        and all(x.stride(d) % step == 0 for d in aligned)
        and sum((x.shape[d] - 1) * x.stride(d) for d in static) < 2**31
    )
'''

# Triton 3.6's interpreter takes the end of a loop from an array of one element, of which numpy 2.5 makes no number.
ENDED = """if interpreted:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = with_index
"""


@dataclass(frozen=True)
class _Class:
    """The plans for one class of rows: from so many rows on, for dense tensors and for any strides."""

    least: int
    dense: Plan
    strided: Plan


@dataclass(frozen=True)
class _Exported:
    """What the text is made from: `classes` by their least number of rows, counted along `rows` (None: there is one class)."""

    fusion: Fusion
    binding: Binding
    graph: Graph
    classes: tuple[_Class, ...]
    rows: str | None

    @property
    def dynamic(self) -> tuple[str, ...]:
        return tuple(a for a, s in self.graph.axes.items() if s is None)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Operands, then the outputs that are none."""
        return tuple(self.graph.tensors.values())

    @cached_property
    def kernels(self) -> dict[t.Kernel, t.Kernel]:
        """Every program and what it is in the file: those of a class of rows, and for any strides, have names of their own."""
        named: dict[t.Kernel, t.Kernel] = {}
        for c in self.classes:
            rows = f"_from_{c.least}" if c.least else ""
            for programs, suffix in ((c.dense.programs, rows), (c.strided.programs, rows + ANY)):
                for program in programs:
                    named.setdefault(program, _renamed(program, suffix))
        return named

    def has_kernels(self, rows: _Class) -> bool:
        """Whether a class of rows has kernels that fewer rows do not have; else only their launch is another."""
        before = {p for c in self.classes if c.least < rows.least for p in (*c.dense.programs, *c.strided.programs)}
        return not before.issuperset((*rows.dense.programs, *rows.strided.programs))

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(w.tensor for w in self.graph.writes)

    @property
    def fresh(self) -> tuple[Tensor, ...]:
        return tuple(x for x in self.tensors if x.role == "Out")

    def shape(self, x: Tensor) -> str:
        """A tensor's shape as text: numbers and the names of dynamic axes."""
        sizes = self.graph.axes | {a: s for a, s in self.binding.sizes if a not in self.dynamic}
        words = [("1" if a is None else a if sizes.get(a) is None else str(sizes[a])) for a in x.axes]
        return f"({', '.join(words)}{',' * (len(words) == 1)})"


def export(
    fusion: Fusion,
    dtype: str = "bfloat16",
    sizes: Mapping[str, int] | None = None,
    params: Mapping[str, object] | None = None,
    schedule: Schedule | None = None,
) -> str:
    """The text of a standalone file for `fusion`.

    `sizes`, `dtype` and `params` as `moekit.lang.arguments.example` takes them. Without a `schedule` it has the heuristic's: of
    a GEMM one for each class of rows, among which the launcher chooses as moekit does.
    Raises ShapeError, DtypeError or ScheduleError for what does not fit, MoekitError for a reference that cannot be taken
    along, for what several ranks do, and for outputs in float8.
    """
    if follows := [a for a in fusion.dynamic if a in fusion.axes]:
        what = f"the size of {follows[0]} follows from others at the call, which a file of its own does not work out"
        raise MoekitError(f"{fusion.name}: {what}; call it through moekit")
    binding = example(fusion, sizes, dtype, params)
    graph = fusion.trace(binding)
    if graph.ranks:
        what = f"it adds up over {', '.join(graph.ranks)}, whose ranks a file of its own does not reach"
        raise MoekitError(f"{fusion.name}: {what}; call it through moekit, or export what one rank does")
    if short := [w.tensor for w in graph.writes if graph.tensors[w.tensor].dtype in STORED]:
        what = f"{short[0]} is rounded to float8, which a file's own test does not follow"
        raise MoekitError(f"{fusion.name}: {what}; call it through moekit")
    extents = graph.sizes(dict(binding.sizes))
    dense = contiguous(graph, extents)
    strided = {x.name: t.Strided(("any",) * len(x.dims), wide=True) for x in graph.tensors.values()}
    rows, schedules = class_axis(graph), {least: heuristic(graph, least) for least in row_classes(graph)}
    if schedule is not None:
        rows, schedules = None, {0: schedule}
    free = {least: s if schedule else settled(graph, s, strided) for least, s in schedules.items()}
    classes = tuple(_Class(least, plan(graph, s, dense), plan(graph, free[least], strided)) for least, s in schedules.items())
    made = _Exported(fusion, binding, graph, classes, rows)
    parts = [_docstring(made), _kernels(made), HELPERS, _launcher(made), _self_test(made)]
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


def _docstring(made: _Exported) -> str:
    fusion = made.fusion
    fixed = [f"{a} = {s}" for a, s in made.binding.sizes if a not in made.dynamic]
    params = [f"{n} = {v!r}" for n, v in made.binding.params]
    tensors = [f"    {x.name}: {x.dtype} {made.shape(x)}" for x in made.tensors]
    lines = [
        f"{fusion.name}: {fusion.doc}", "",
        f"Generated by moekit {__version__} (graph {made.graph.digest()}).",
        *(f"Schedule{f' from {made.rows} = {c.least} on' if c.least else ''}: {c.dense.schedule}" for c in made.classes),
        f"Fixed: {', '.join([*fixed, *params])}. Run-time: {', '.join(made.dynamic) or 'nothing'}, strides.", "",
        *tensors, "",
        "It imports torch and triton alone. Run it to test it: on a GPU, or with TRITON_INTERPRET=1 on a CPU (not in bfloat16,",
        "which Triton's interpreter rounds wrongly).",
    ]  # fmt: skip
    return '"""' + "\n".join(lines) + '\n"""\n\nimport torch\nimport triton\nimport triton.language as tl\n' + emitter.IMPORT


def _kernels(made: _Exported) -> str:
    """Helpers once, then every kernel."""
    bodies, helpers = [], {}
    for program in made.kernels.values():
        text = emitter.emit(program).split(emitter.IMPORT + "\n", 1)[1]
        for name, helper in emitter.HELPERS.items():
            if helper in text:
                helpers[name] = helper
                text = text.replace(helper, "")
        bodies.append(text.strip("\n") + "\n")
    return "\n\n".join([h.strip("\n") + "\n" for h in helpers.values()] + bodies)


def _renamed(kernel: t.Kernel, suffix: str) -> t.Kernel:
    """A kernel with a name of its own, and so its sections."""
    if isinstance(kernel, t.Joined):
        sections = tuple(replace(s, name=s.name + suffix) for s in kernel.sections)
        return replace(kernel, name=kernel.name + suffix, sections=sections)
    return replace(kernel, name=kernel.name + suffix)


def _launcher(made: _Exported) -> str:
    operands = [x for x in made.tensors if x.role != "Out"]
    updated = [x.name for x in operands if x.role == "InOut"]
    takes = ", ".join([*(x.name for x in operands), *(f"{x.name}=None" for x in made.fresh)])
    first = operands[0].name
    lines = [f"def {made.fusion.name}({takes}):", f'    """{_purpose(made, updated)}"""']
    for axis in made.dynamic:
        x, d = next((x, d) for x in operands for d, a in enumerate(x.axes) if a == axis)
        lines.append(f"    {axis} = {x.name}.shape[{d}]")
    for x in made.fresh:
        lines.append(f"    if {x.name} is None:")
        lines.append(f"        {x.name} = torch.empty({made.shape(x)}, dtype=torch.{x.dtype}, device={first}.device)")
    for x in made.tensors:
        lines.append(f'    _check("{x.name}", {x.name}, {made.shape(x)}, torch.{x.dtype}, {first}.device)')
    results = ", ".join(made.outputs)
    if made.dynamic:
        lines += [f"    if {' or '.join(f'{a} == 0' for a in made.dynamic)}:", f"        return {results}"]
    if any(launch.dependent for c in made.classes for p in (c.dense, c.strided) for launch in p.schedule.launches):
        lines.append(f"    overlap = _overlap({first}.device)")
    tests = [test for c in made.classes for p in c.dense.programs for x in p.params if (test := _fits(made, x))]
    lines += ["    dense = (", *_joined(list(dict.fromkeys(tests)), "        ", " and"), "    )"]
    lines += [f"    with torch.cuda.device_of({first}):", *_branches(made, first)]
    return "\n".join([*lines, f"    return {results}"]) + "\n"


def _branches(made: _Exported, first: str) -> list[str]:
    """A branch for each class of rows on dense tensors, then on any."""
    choices = []
    for dense in (True, False):
        for c, after in zip(made.classes, (*made.classes[1:], None), strict=True):
            tests = ["dense"] * dense + ([f"{made.rows} < {after.least}"] if after else [])
            choices.append((" and ".join(tests), c.dense if dense else c.strided))
    lines = []
    for number, (test, planned) in enumerate(choices):
        word = "else" if not test else f"elif {test}" if number else f"if {test}"
        lines.append(f"        {word}:")
        for s in planned.scratch:
            shape = ", ".join(a if n is None else str(n) for a, n in zip(s.axes, s.sizes, strict=True))
            lines.append(f"            {s.name} = torch.empty(({shape}), dtype=torch.{s.dtype}, device={first}.device)")
        for program, launch in zip(planned.programs, planned.schedule.launches, strict=True):
            lines += _launch(program, made.kernels[program].name, launch.dependent)
    return lines


def _joined(parts: list[str], pad: str, end: str) -> list[str]:
    return [pad + part + (end if i < len(parts) - 1 else "") for i, part in enumerate(parts)]


def _purpose(made: _Exported, updated: list[str]) -> str:
    effect = f"Updates {', '.join(updated)} in place. " if updated else ""
    given = f"{', '.join(x.name for x in made.fresh)}: allocated if not given. " if made.fresh else ""
    return f"{effect}{given}Tensors of any strides; no output may overlap another tensor."


def _fits(made: _Exported, x: t.Param) -> str | None:
    """The test that a tensor is laid out as the kernels for dense tensors expect; none for scratch."""
    if x.name not in made.graph.tensors:
        return None
    kinds = x.strided.strides
    unit = tuple(d for d, k in enumerate(kinds) if k == "unit" and made.graph.axes.get(x.axes[d] or "", 1) != 1)
    aligned = tuple(d for d, k in enumerate(kinds) if k == "aligned")
    static = () if x.strided.wide else tuple(d for d, a in enumerate(x.axes) if a is not None and a not in made.dynamic)
    return f"_fits({x.name}, {unit}, {aligned}, {static})"


def _programs(section: t.TileProgram) -> str:
    """How many programs a section has, as text."""
    counts = []
    for n in section.counts:
        dynamic = n if isinstance(n, int) else n.name if n.block == 1 else f"triton.cdiv({n.name}, {n.block})"
        counts.append(str(dynamic))
    return " * ".join(c for c in counts if c != "1") or "1"


def _launch(program: t.Kernel, name: str, dependent: bool) -> list[str]:
    """`kernel[grid](arguments)`, on as many lines as it takes."""
    arguments = [
        a.subject
        if a.kind in ("pointer", "extent")
        else f"{a.subject}.stride({a.dim})" + (f" // {a.unit}" if a.unit > 1 else "")
        for a in emitter.arguments(program)
    ]
    grid = " + ".join(map(_programs, program.sections))
    options = [f"num_warps={program.warps}", f"num_stages={program.stages}", "**overlap" if dependent else "PDL=False"]
    pad = " " * 12
    whole = "\0"  # stands for the spaces within an argument, so that no line ends there
    body = textwrap.wrap(", ".join(a.replace(" ", whole) for a in [*arguments, *options]) + ",", 108, break_long_words=False)
    lines = [f"{pad}    {line.replace(whole, ' ')}" for line in body]
    return [f"{pad}{name}_kernel[({grid},)](", *lines, f"{pad})"]


def _tolerance(graph: Graph, write: Write) -> float:
    """How far an output may be from the reference: a value that is rounded on its way there may fall to a tie's other side."""
    own = TOLERANCE.get(graph.tensors[write.tensor].dtype, 0)
    rounded = (n.dtype for i in made_of(graph.nodes, write.value) if (n := graph.nodes[i]).op == "cast")
    return max([own, *(TURNED * TOLERANCE.get(dtype, 0) for dtype in rounded)]) if own else own


def _self_test(made: _Exported) -> str:
    """`__main__`: the launcher against the declaration's numpy reference in float64, on several layouts."""
    if made.fusion.reference is None:
        raise MoekitError(f"export: {made.fusion.name} has no reference to test the file with; give it one")
    operands = [x for x in made.tensors if x.role != "Out"]
    params = ", ".join(f"{n}={v!r}" for n, v in made.binding.params)
    makers = [f'"{x.name}": make({made.shape(x)}, torch.{x.dtype}),' for x in operands]
    tolerances = {w.tensor: _tolerance(made.graph, w) for w in made.graph.writes}
    axes = ", ".join(made.dynamic)
    said = "".join(f"{a} {{{a}}} " for a in made.dynamic)
    given = ", ".join(["size"] * len(made.dynamic))
    own = [c.least for c in made.classes[1:] if made.has_kernels(c)]
    others = [c.least for c in made.classes[1:] if c.least not in own]
    leasts = [f"{own}"] * bool(own) + [f"{others} if not interpreted else []"] * bool(others)
    classes = "".join(f'for size in {x}:\n    self_test(device, {given}, ("contiguous", "every second"))\n' for x in leasts)
    ended = any(isinstance(op, t.Loop) and op.end for k in made.kernels for p in k.sections for op, _ in walk(p.body))
    body = f'''import os

import numpy as np

class Rounded:
    """Float64 values that know the dtype they were rounded to: an operand, as the reference takes it."""

    def __init__(self, values, dtype):
        self.values, self.dtype, self.shape = values, dtype, values.shape

    def __getitem__(self, at):
        return Rounded(self.values[at], self.dtype)

    def astype(self, dtype):
        return self.values.astype(dtype)

def round_to(x, dtype):
    """float64 values rounded to a dtype."""
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype)).double().numpy()

{_reference_source(made.fusion)}

TOLERANCE = {tolerances!r}
LAYOUTS = {{
    "contiguous": lambda x: x.clone(),
    "padded rows": lambda x: torch.nn.functional.pad(x, (0, 8))[..., : x.shape[-1]],
    "transposed": lambda x: x.clone().permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim()))),
    "every second": lambda x: torch.stack((x, x), -1).flatten(-2)[..., ::2],
}}

def self_test(device, {axes}, layouts=tuple(LAYOUTS)):
    generator = torch.Generator().manual_seed(1)
    make = lambda shape, dtype: torch.randn(shape, generator=generator).to(dtype)
    operands = {{
        {(chr(10) + "        ").join(makers)}
    }}
    rounded = {{n: Rounded(x.double().cpu().numpy(), str(x.dtype).removeprefix("torch.")) for n, x in operands.items()}}
    wanted = reference(**rounded{", " + params if params else ""})
    for name in layouts:
        given = {{n: LAYOUTS[name](x.to(device)) for n, x in operands.items()}}
        results = {made.fusion.name}(**given)
        results = results if isinstance(results, tuple) else (results,)
        for output, x in zip({made.outputs!r}, results):
            got, exact = x.double().cpu().numpy(), np.asarray(wanted[output], np.float64)
            error = np.max(np.abs(got - exact), initial=0.0) / (1 + np.max(np.abs(exact), initial=0.0))
            print(f"{said}{{name:12s}} {{output:10s}} error {{error:.1e}}")
            if not error <= TOLERANCE[output]:
                raise SystemExit(f"{{output}} is wrong: {{error}} is more than {{TOLERANCE[output]}}")

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
device = "cpu" if interpreted and not torch.cuda.is_available() else "cuda"
{ENDED if ended else ""}for size in (1, 7, 0):
    self_test(device, {given})
{classes}print("{made.fusion.name}: right")
'''
    return 'if __name__ == "__main__":\n' + textwrap.indent(body, "    ")


def _reference_source(fusion: Fusion) -> str:
    """The reference's source under the name `reference`, after that of the functions it calls, by the names it calls them."""
    found: dict[str, Any] = {}
    _gather(fusion, "reference", fusion.reference, found)
    return "\n\n".join(_source(name, function) for name, function in found.items())


def _gather(fusion: Fusion, name: str, function: Any, found: dict[str, Any]) -> None:
    """`function` and all that it calls, callees first; only numpy and `round_to` are there already."""
    for used_name in dict.fromkeys(_globals(function.__code__)):
        used = function.__globals__.get(used_name)
        if used is None or used_name in ("np", "round_to") or found.get(used_name) is used:
            continue
        if not inspect.isfunction(used) or used_name in (*found, "reference"):
            raise MoekitError(
                f"export: the reference of {fusion.name} uses {used_name}, which cannot be taken along; "
                "write it with numpy, round_to and functions of other names that use no more"
            )
        _gather(fusion, used_name, used, found)
    found[name] = function


def _globals(code: CodeType) -> Iterator[str]:
    """The global names that a function's code reads, and what is defined in it, as a generator expression is."""
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals(inner)


def _source(name: str, function: Any) -> str:
    """A function's source under a name."""
    text = textwrap.dedent(inspect.getsource(function))
    return re.sub(rf"^def {function.__name__}\(", f"def {name}(", text).strip("\n") + "\n"
