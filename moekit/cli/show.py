"""`moekit show`: a fusion at each step from its declaration to a kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from moekit.cli.output import print_source
from moekit.errors import ScheduleError, UnavailableError
from moekit.lang.arguments import PARAMETERS
from moekit.lang.dtypes import FLOATS

if TYPE_CHECKING:
    from moekit.compile.plan import Plan
    from moekit.compile.schedule import Schedule
    from moekit.lang.fusion import Binding, Fusion

#: The sizes shown where none are given: one decode step of Qwen3-Next on one of 8 ranks.
SIZES = {"T": 8, "H": 2048, "D": 2048, "P": 648, "I": 512, "E": 512, "K": 2, "V": 4, "Dk": 128, "Dv": 128, "M": 2}
CHOSEN = {"K": 10}  # experts of a token, where K does not count key heads
OTHER_SIZE = 64


def parse_sizes(ctx: click.Context, param: click.Parameter, text: str | None) -> dict[str, int]:
    """Sizes of axes from `T=8,H=2048`."""
    return {name: _integer(value, text) for name, value in _pairs(text)}


def parse_parameters(ctx: click.Context, param: click.Parameter, text: str | None) -> dict[str, Any]:
    """Parameters of the fusion from `k=10,renormalize=false,eps=1e-5`."""
    return {name: _literal(value) for name, value in _pairs(text)}


def _pairs(text: str | None) -> list[tuple[str, str]]:
    pairs = []
    for word in filter(str.strip, (text or "").split(",")):
        name, _, value = word.partition("=")
        if not name.strip() or not value.strip():
            raise click.BadParameter(f"{text!r} is not a list such as NAME=VALUE,NAME=VALUE")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _integer(value: str, text: str | None) -> int:
    if not value.isdecimal():
        raise click.BadParameter(f"{value!r} in {text!r} is no size")
    return int(value)


def _literal(value: str) -> bool | int | float | str:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


@click.command(short_help="Show a fusion on its way from declaration to kernel.")
@click.argument("fusion")
@click.option(
    "--as",
    "form",
    type=click.Choice(["reference", "graph", "schedule", "passes", "tile", "triton", "pallas", "mosaic"]),
    default="graph",
    show_default=True,
    help="Which step.",
)
@click.option("--sizes", callback=parse_sizes, help="Sizes of axes, T=8,H=2048 (default: Qwen3-Next's).")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of every tensor that may have it.")
@click.option("--params", callback=parse_parameters, help="Parameters of the fusion, k=10,renormalize=false.")
@click.option("--schedule", help='As `--as schedule` prints it: "tile:T:1 loop:H:1024 warps:4 stages:2".')
def show(fusion: str, form: str, sizes: dict[str, int], dtype: str, params: dict[str, Any], schedule: str | None) -> None:
    """Show FUSION as reference, traced graph, schedule and cost, program after each pass or the last, or kernel source.

    Dimensions that may be 1 are shown as 1. The schedule is the rules' for few rows if none is given.
    """
    declared = _find(fusion)
    if form == "reference":
        print_source(_reference(declared), "python")
        return
    from moekit.compile.schedule import Schedule
    from moekit.compile.schedule.legal import legal

    binding = bound(declared, sizes, dtype, params)
    given = Schedule.parse(schedule) if schedule else None
    if given and (why := legal(declared.trace(binding), given)):
        raise ScheduleError(why)
    print_source(FORMS[form](declared, binding, given), "text" if form in ("graph", "schedule", "passes", "tile") else "python")


def _find(name: str) -> Fusion:
    from moekit.fusions import FUSIONS

    if name not in FUSIONS:
        raise click.BadParameter(f"there is no fusion {name!r}; there are {', '.join(FUSIONS)}", param_hint="FUSION")
    return FUSIONS[name]


def _reference(fusion: Fusion) -> str:
    if fusion.reference is None:
        raise click.BadParameter(f"{fusion.name} has no reference", param_hint="FUSION")
    return inspect.getsource(fusion.reference).rstrip()


def bound(fusion: Fusion, sizes: dict[str, int], dtype: str, params: dict[str, Any]) -> Binding:
    """A call of the fusion with these sizes, and the defaults of this command for what is not said."""
    dims = {name: spec.dims for name, spec in fusion.tensors.items()}
    axes = {axis for each in dims.values() for d in each for _, axis in d.terms}
    if unknown := sorted(set(sizes) - axes):
        raise click.BadParameter(
            f"{fusion.name} has no axis {unknown[0]}; it has {', '.join(sorted(axes))}", param_hint="--sizes"
        )
    refuse_empty_axes(fusion, sizes)
    usual = SIZES | (CHOSEN if "ids" in fusion.tensors else {})
    every, given = {axis: sizes.get(axis, usual.get(axis, OTHER_SIZE)) for axis in axes}, all_parameters(fusion, params)
    every |= {a: n for a, n in fusion.follow(every, given).items() if a in axes} | sizes
    shapes = {name: tuple(1 if d.optional else d.size(every) for d in each) for name, each in dims.items()}
    own = {name: next(iter(s.dtypes)) for name, s in fusion.tensors.items() if dtype not in s.dtypes and s.dtypes != FLOATS}
    dtypes = dict.fromkeys(fusion.tensors, dtype) | own
    return fusion.bind(shapes, dtypes, given)


def refuse_empty_axes(fusion: Fusion, sizes: dict[str, int]) -> None:
    """Refuse size 0 of an axis that is fixed in a kernel: no call has it."""
    if empty := [a for a, n in sizes.items() if n == 0 and a not in fusion.dynamic]:
        raise click.BadParameter(f"axis {empty[0]} must have an element{fusion.may_be_empty()}", param_hint="--sizes")


def all_parameters(fusion: Fusion, given: dict[str, Any]) -> dict[str, Any]:
    """The parameters that are given, and the others' defaults."""
    missing = {name for name, p in fusion.params.items() if p.default is p.empty}
    defaults = {name: value for name, value in PARAMETERS.items() if name in missing}
    try:
        return fusion.bind_params({**defaults, **given})
    except TypeError as error:
        raise click.BadParameter(str(error), param_hint="--params") from None


def _graph(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    return str(fusion.trace(binding))


def _schedule(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    """Launches, sections and directives, and what each launch costs."""
    from moekit.compile.schedule.cost import cost

    planned = _strided_plan(fusion, binding, schedule)
    lines = []
    for launch, one in zip(planned.schedule.launches, cost(planned.graph, planned.schedule, dict(binding.sizes)), strict=True):
        lines += [f"# {one}", *launch.lines(), "then"]
    return "\n".join(lines[:-1])


def _tile(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    return str(_strided_plan(fusion, binding, schedule))


def _passes(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    from moekit.compile.passes import watching

    shown: list[str] = []
    with watching(lambda name, program: shown.append(f"# after {name}\n{program}")):
        _strided_plan(fusion, binding, schedule)
    return "\n\n".join(shown)


def _triton(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    from moekit.backends.triton import emit

    return "\n\n".join(emit(program).rstrip() for program in _strided_plan(fusion, binding, schedule).programs)


def _pallas(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    from moekit.backends.pallas import emit
    from moekit.tune.way import served_by_mosaic

    text = "\n\n".join(emit(program).rstrip() for program in _viewed_plan(fusion, binding, schedule).programs)
    gpus = [] if schedule else served_by_mosaic(fusion.trace(binding))
    return "\n".join([*(f"# on an {gpu} pallas goes by Mosaic GPU here: --as mosaic" for gpu in gpus), text])


def _mosaic(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> str:
    from moekit.backends.mosaic import emit, refusal
    from moekit.compile.rules.warpgroups import warpgroups

    made = _viewed_plan(fusion, binding, schedule or warpgroups(fusion.trace(binding), dict(binding.sizes)), "mosaic")
    if why := next((why for why in map(refusal, made.programs) if why), None):
        raise UnavailableError(why)
    return "\n\n".join(emit(program).rstrip() for program in made.programs)


FORMS: dict[str, Callable[..., str]] = {
    "graph": _graph,
    "schedule": _schedule,
    "passes": _passes,
    "tile": _tile,
    "triton": _triton,
    "pallas": _pallas,
    "mosaic": _mosaic,
}


def _strided_plan(fusion: Fusion, binding: Binding, schedule: Schedule | None) -> Plan:
    """The programs for contiguous tensors with run-time strides, as PyTorch launches them."""
    from moekit.compile.plan import plan
    from moekit.compile.tile.layouts import contiguous

    graph = fusion.trace(binding)
    return plan(graph, schedule, contiguous(graph, dict(binding.sizes)))


def _viewed_plan(fusion: Fusion, binding: Binding, schedule: Schedule | None, target: str = "pallas") -> Plan:
    """The programs for whole contiguous arrays of static shapes, as JAX launches them."""
    from moekit.compile.plan import plan
    from moekit.compile.tile.layouts import arrays

    graph, sizes = fusion.trace(binding), dict(binding.sizes)
    return plan(graph, schedule, arrays(graph, sizes), sizes, target)
