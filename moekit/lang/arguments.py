"""How the arguments of a face are sorted into operands and static parameters."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping

from moekit.errors import DeclarationError, DtypeError, MoekitError, ScheduleError, ShapeError
from moekit.lang.dtypes import FLOATS
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph

EXTRA = ("out", "implementation", "schedule")
SIZES = {
    "T": 16, "H": 2048, "D": 2048, "P": 648, "I": 512, "E": 512, "V": 32, "K": 16, "Dk": 128, "Dv": 128, "M": 2,
}  # fmt: skip
OTHER_SIZE = 64
PARAMETERS = {"k": 10, "experts": 512}


def bind_arguments(fusion: Fusion, args: tuple, kwargs: dict) -> tuple[dict, dict]:
    """Operands and static parameters of a call; raises TypeError naming what is missing or too much."""
    try:
        bound = fusion.signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TypeError(f"{fusion.name}: {error}; call it as {fusion.name}{fusion.signature}") from None
    return {n: bound[n] for n in fusion.tensors}, {n: v for n, v in bound.items() if n not in fusion.tensors}


@contextlib.contextmanager
def naming(plain: str, called: str) -> Iterator[None]:
    """Errors that begin with the name of the plain operator begin with the name that was called."""
    try:
        yield
    except (MoekitError, TypeError) as error:
        text = str(error)
        if called != plain and text.startswith(f"{plain}:"):
            error.args = (called + text.removeprefix(plain), *error.args[1:])
        raise


def refuse_schedule(name: str, schedule: object, wanted: type) -> None:
    """Raise ScheduleError for what is no schedule, whether or not the implementation looks at it."""
    if schedule is not None and not isinstance(schedule, wanted):
        raise ScheduleError(
            f"{name}: schedule is {type(schedule).__name__}; it must be a {wanted.__name__}, which "
            f"{wanted.__name__}.parse makes of text"
        )


def refuse_empty(graph: Graph, sizes: Mapping[str, int]) -> None:
    """Raise ShapeError for a maximum or minimum over an axis of no elements: there is no largest of nothing."""
    if 0 not in sizes.values():
        return
    for node in (graph.nodes[i] for i in sorted(graph.needy)):
        if sizes.get(axis := node.attr("axis")) == 0:
            raise ShapeError(f"{graph.name}: {node.attr('kind')} over {axis} needs at least one element, got {axis} = 0")


def face_signature(fusion: Fusion) -> inspect.Signature:
    """The declaration's signature with the keywords every face adds.

    Raises DeclarationError where an operand or parameter is called like one of those.
    """
    if taken := [n for n in EXTRA if n in fusion.signature.parameters]:
        raise DeclarationError(f"{fusion.name}: {taken[0]!r} is a keyword of every function; give the operand another name")
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None) for n in EXTRA]
    return inspect.Signature([*fusion.signature.parameters.values(), *extra])


def parameter_type(parameter: inspect.Parameter) -> type | None:
    """The Python type of a static parameter: its annotation, else its default's type, else None."""
    named = {"int": int, "float": float, "bool": bool, "str": str}
    said = parameter.annotation
    if isinstance(said, str):
        said = named.get(said.strip().removesuffix("| None").strip())
    if said in named.values():
        return said
    return type(parameter.default) if type(parameter.default) in named.values() else None


def example(
    fusion: Fusion,
    sizes: Mapping[str, int] | None = None,
    dtype: str | Mapping[str, str] | None = None,
    params: Mapping[str, object] | None = None,
) -> Binding:
    """A call of `fusion` of typical sizes: Qwen3-Next's for the axes it knows, 64 for others, `sizes` before both.

    Operands have `dtype` (or dtypes by name; float32 if not said) where their declaration allows it, else the first;
    `?` dimensions have their full size, or 1 where `sizes` has `"NAME?": 1`. Required parameters that are not given are
    those of a model (`k = 10`), or the zero of their type.
    Raises ShapeError for an axis the fusion does not have and DtypeError for a dtype no operand can have, but for a float dtype
    of a fusion without floats, of which it says nothing.
    """
    axes = [axis for s in fusion.tensors.values() for d in s.dims for _, axis in d.terms]
    if unknown := [a for a in sizes or {} if a.removesuffix("?") not in axes]:
        known = ", ".join(dict.fromkeys(axes))
        raise ShapeError(f"{fusion.name}: there is no axis {unknown[0]!r}; its axes are {known}")
    every = {a: (sizes or {}).get(a, SIZES.get(a, OTHER_SIZE)) for a in axes}
    missing = {n: p for n, p in fusion.params.items() if p.default is p.empty}
    defaults = {n: PARAMETERS.get(n, (parameter_type(p) or int)()) for n, p in missing.items()}
    bound = fusion.bind_params({**defaults, **(params or {})})
    every |= {a: n for a, n in fusion.follow(every, bound).items() if a in axes}
    every |= {a: n for a, n in (sizes or {}).items() if a in every}
    optional = {a: n for a, n in (sizes or {}).items() if a.endswith("?")}
    shapes = {
        n: tuple(optional.get(f"{d.text}?", d.size(every)) if d.optional else d.size(every) for d in s.dims)
        for n, s in fusion.tensors.items()
    }
    wanted = dict(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(fusion.tensors, dtype or "float32")
    several = {d for s in fusion.tensors.values() for d in s.dtypes}
    if isinstance(dtype, str) and dtype not in several and (dtype not in FLOATS or several & {*FLOATS}):
        raise DtypeError(f"{fusion.name}: no operand can be {dtype}; {next(iter(fusion.tensors))} can be "
                         f"{', '.join(next(iter(fusion.tensors.values())).dtypes)}")  # fmt: skip
    dtypes = {n: wanted[n] if wanted.get(n) in s.dtypes else s.dtypes[0] for n, s in fusion.tensors.items()}
    return fusion.bind(shapes, dtypes, bound)
