"""Fusions as operators of torch's dispatcher, `torch.ops.moekit.*`: what torch.compile, opcheck and subclasses see.

Of a fusion with an InOut operand `r` and an output `out` come

    name(Tensor x, Tensor r, float eps=1e-06) -> (Tensor, Tensor)                               nothing is mutated
    name.out(Tensor x, Tensor r, float eps=1e-06, *, Tensor(a!) out, Tensor(b!) r_out) -> ()
    name_(Tensor x, Tensor(a!) r, float eps=1e-06) -> Tensor                                    fresh outputs only
    name_.out(Tensor x, Tensor(a!) r, float eps=1e-06, *, Tensor(b!) out) -> ()

and of each `.out` an `.into` that takes the outputs after the operands, by position: torch.compile lets no `out=` through that
is not contiguous, and the functions of this package do.

The kernels sit on the Autograd key and serve plain tensors at once: one hop through Python. Fake implementations come from the
graph; gradients, vmap and the other transforms of torch.func from array evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moekit.errors import DeclarationError, UnavailableError
from moekit.lang.arguments import example, naming, parameter_type
from moekit.lang.fusion import Fusion
from moekit.torch.autograd import carries_tangent, differentiable, needs_grad
from moekit.torch.binding import DTYPES, bind, checked
from moekit.torch.call import one_device, refuse_grad
from moekit.torch.form import Form, foreign

NAMESPACE = "moekit"
TYPES = {float: "float", int: "int", bool: "bool", str: "str"}
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_registered: dict[str, Ops] = {}


@dataclass
class Ops:
    """The operators of one fusion. `outputs`: what it returns, in order; `updated`: those that are InOut operands."""

    fusion: Fusion
    forms: dict[bool, Form]
    outputs: tuple[str, ...]
    updated: tuple[str, ...]
    plain: Any = None
    plain_out: Any = None
    plain_into: Any = None
    in_place: Any = None
    in_place_out: Any = None
    in_place_into: Any = None

    @property
    def fresh(self) -> tuple[str, ...]:
        """The outputs that are no operands."""
        return tuple(n for n in self.outputs if n not in self.updated)


@dataclass(frozen=True)
class Variant:
    """One operator: of a form, with the outputs it writes to (`given`, named in an "out" overload, by position in "into")
    and those it returns."""

    ops: Ops
    form: Form
    overload: str
    given: tuple[str, ...]
    returned: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name within the namespace, with the overload."""
        return self.ops.fusion.name + "_" * self.form.in_place + f".{self.overload}" * bool(self.overload)

    @property
    def qualified(self) -> str:
        """The name with the namespace."""
        return f"{NAMESPACE}::{self.name}"

    def schema(self) -> str:
        """The operator's schema, with exact mutations."""
        fusion, letters = self.ops.fusion, iter("abcdefgh")
        operands = [
            f"Tensor({next(letters)}!) {n}" if self.form.in_place and s.role == "InOut" else f"Tensor {n}"
            for n, s in fusion.tensors.items()
        ]
        params = [_parameter(fusion, n) for n in fusion.params]
        outs = [f"Tensor({next(letters)}!) {out_name(fusion, n)}" for n in self.given]
        returns = ", ".join(["Tensor"] * len(self.returned))
        result = returns if len(self.returned) == 1 else f"({returns})"
        tail = [*outs, *params] if self.overload == "into" else [*params, *(["*"] if outs else []), *outs]
        return f"{self.name}({', '.join([*operands, *tail])}) -> {result}"

    def split(self, args: tuple, kwargs: dict) -> tuple[tuple, tuple, tuple | None]:
        """Operands, parameters and given outputs; the dispatcher leaves out arguments that equal their defaults."""
        fusion = self.ops.fusion
        count = len(fusion.tensors)
        tensors, rest = args[:count], args[count:]
        if self.overload == "into":
            given = dict(zip(self.given, rest, strict=False))
            rest = rest[len(self.given) :]
        else:
            given = {n: kwargs[out_name(fusion, n)] for n in self.given}
        defaults = [p.default for p in fusion.params.values()][len(rest) :]
        out = tuple(given.get(n) for n in self.ops.outputs) if given else None
        return tensors, (*rest, *defaults), out

    def packed(self, outputs: tuple) -> object:
        """What the operator returns, of all outputs."""
        kept = tuple(x for n, x in zip(self.ops.outputs, outputs, strict=True) if n in self.returned)
        return kept if len(kept) > 1 else kept[0] if kept else None

    def kernel(self, *args, **kwargs):
        """The operator on real tensors."""
        tensors, params, out = self.split(args, kwargs)
        return self.packed(self.form(tensors, params, out))

    def quick(self, otherwise: Callable) -> Callable:
        """`otherwise` (`kernel` or `entry`), but calls seen before are served at once."""
        count, form, split = len(self.ops.fusion.tensors), self.form.quick, self.split
        defaults = tuple(p.default for p in self.ops.fusion.params.values())
        kept = [i for i, n in enumerate(self.ops.outputs) if n in self.returned]

        def returning(*args, **kwargs):
            outs = form(args[:count], args[count:] + defaults[len(args) - count :], None, None)
            if outs is None:
                return otherwise(*args, **kwargs)
            return outs[kept[0]] if len(kept) == 1 else tuple([outs[i] for i in kept]) if kept else None

        def writing(*args, **kwargs):
            return otherwise(*args, **kwargs) if form(*split(args, kwargs), None) is None else None

        return writing if self.given else returning

    def entry(self, *args, **kwargs):
        """The operator with everything decided: plain tensors are served, others go on below autograd."""
        with naming(self.ops.fusion.name, self.form.name):
            return self._entry(*args, **kwargs)

    def _entry(self, *args, **kwargs):
        tensors, params, out = self.split(args, kwargs)
        given = tuple(x for x in out or () if x is not None)
        if not foreign((*tensors, *given)) or carries_tangent(*tensors, *given):
            return self.packed(self.form(tensors, params, out))
        below = partial(self._below, args[len(tensors) :], kwargs)
        if not needs_grad((*tensors, *given)):
            return below(*tensors)
        fusion, named = self.ops.fusion, dict(zip(self.ops.fusion.tensors, tensors, strict=True))
        for n, x in zip(self.ops.outputs, out or (), strict=False):
            if x is not None:
                refuse_grad(fusion, n, x, named)
        for i in self.form.updated:
            refuse_grad(fusion, list(named)[i], tensors[i], named)
        outs = differentiable(lambda *xs: _as_tuple(below(*xs)), fusion, dict(zip(fusion.params, params, strict=True)), tensors)
        return self.packed(outs)

    def _below(self, params: tuple, kwargs: dict, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return overload(self.name)(*tensors, *params, **kwargs)

    def fake(self, *args, **kwargs):
        """Shapes and dtypes of the outputs, from the graph; refuses what the operator would refuse."""
        with naming(self.ops.fusion.name, self.form.name):
            return self._fake(*args, **kwargs)

    def _fake(self, *args, **kwargs):
        tensors, params, out = self.split(args, kwargs)
        fusion = self.ops.fusion
        operands = {n: checked(fusion, n, x) for n, x in zip(fusion.tensors, tensors, strict=True)}
        device = one_device(fusion, operands)
        bound = bind(fusion, operands, dict(zip(fusion.params, params, strict=True)))
        for n, x in zip(self.ops.outputs, out or (), strict=False):
            if x is not None:
                torch._check(
                    tuple(x.shape) == bound.shape(n) and DTYPES.get(x.dtype) == bound.graph.tensors[n].dtype,
                    lambda n=n: f"{self.form.name}: out for {n} has another shape or dtype than {n}",
                )
        return self.packed(tuple(bound.empty(n, device) if n in self.returned else None for n in bound.names))

    def transformed(self, *args, **kwargs):
        """The operator under torch.func's vmap, grad and the like: array evaluation, which they all understand."""
        tensors, params, out = self.split(args, kwargs)
        return self.packed(self.form.serve(tensors, params, out, None, None))


def register(fusion: Fusion, sizes: dict | None = None, params: dict | None = None) -> Ops:
    """Define `torch.ops.moekit.<name>` and its other forms for a fusion; moekit's own are there already.

    A fusion of one's own needs this before torch.compile meets it. `sizes` and `params` are for the one trace that finds out
    what it returns, where the usual ones do not fit it. Registering a fusion again changes nothing.
    Raises DeclarationError for a name that another fusion has, or a parameter whose type is not known.
    """
    known = _registered.get(fusion.name)
    if known is not None:
        if known.fusion is not fusion:
            raise DeclarationError(f"{fusion.name}: torch.ops.{NAMESPACE}.{fusion.name} is another fusion; rename yours")
        return known
    outputs = tuple(w.tensor for w in fusion.trace(example(fusion, sizes, params=params)).writes)
    updated = tuple(n for n in outputs if n in fusion.tensors)
    ops = Ops(fusion, {p: Form(fusion, p) for p in ((False, True) if updated else (False,))}, outputs, updated)
    plain, into = ops.forms[False], ops.forms.get(True)
    ops.plain = _define(Variant(ops, plain, "", (), outputs))
    ops.plain_out = _define(Variant(ops, plain, "out", outputs, ()))
    ops.plain_into = _define(Variant(ops, plain, "into", outputs, ()))
    if into is not None:
        ops.in_place = _define(Variant(ops, into, "", (), ops.fresh))
        if ops.fresh:
            ops.in_place_out = _define(Variant(ops, into, "out", ops.fresh, ()))
            ops.in_place_into = _define(Variant(ops, into, "into", ops.fresh, ()))
    for form in ops.forms.values():
        form.dispatched = partial(dispatch, ops, form.in_place)
    _registered[fusion.name] = ops
    return ops


def registered(fusion: Fusion) -> Ops | None:
    """The operators of a fusion, if it has any."""
    ops = _registered.get(fusion.name)
    return ops if ops is not None and ops.fusion is fusion else None


def dispatch(ops: Ops | None, in_place: bool, tensors, params, out, implementation, schedule) -> tuple:
    """A call of a face through the dispatcher, as torch.compile traces it: all outputs in declared order."""
    ops = _traceable(ops, in_place, tensors, implementation, schedule)
    if out is None:
        if not in_place:
            return _as_tuple(ops.plain(*tensors, *params))
        returned = ops.in_place(*tensors, *params)
        return _in_order(ops, tensors, _as_tuple(returned))
    given = (out,) if isinstance(out, torch.Tensor) else tuple(out)
    outs = dict(zip(ops.outputs, given, strict=False))
    operands = dict(zip(ops.fusion.tensors, tensors, strict=True))
    if in_place and all(outs.get(n) is None for n in ops.updated):
        wanted, target = ops.fresh, ops.in_place_into
    else:
        wanted, target = ops.outputs, ops.plain_into
    for n in wanted:
        if outs.get(n) is None and n not in operands:
            raise UnavailableError(f"{ops.forms[in_place].name}: under torch.compile out= must have a tensor for {n}")
        if outs.get(n) is None:
            outs[n] = operands[n] if in_place else operands[n].new_empty(operands[n].shape)
    target(*tensors, *[outs[n] for n in wanted], *params)
    return tuple([operands[n] if outs.get(n) is None else outs[n] for n in ops.outputs])


def _traceable(ops: Ops | None, in_place: bool, tensors, implementation, schedule) -> Ops:
    if ops is None:
        raise UnavailableError(
            "a fusion must be registered before torch.compile meets it: call moekit.torch.register(fusion) first"
        )
    own = "triton" if tensors[0].is_cuda else "eager"
    if schedule is not None or implementation not in (None, own):
        raise UnavailableError(
            f"{ops.forms[in_place].name}: under torch.compile the device decides; leave out implementation= and schedule="
        )
    return ops


def _in_order(ops: Ops, tensors, returned: tuple) -> tuple:
    operands = dict(zip(ops.fusion.tensors, tensors, strict=True))
    fresh = dict(zip(ops.fresh, returned, strict=True))
    return tuple([fresh[n] if n in fresh else operands[n] for n in ops.outputs])


def _as_tuple(returned) -> tuple:
    if returned is None:
        return ()
    return (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)


def out_name(fusion: Fusion, output: str) -> str:
    """The keyword of an output that is written to."""
    return f"{output}_out" if output in fusion.tensors or output in fusion.params else output


def overload(name: str):
    """The OpOverload called `name` or `name.overload`."""
    base, _, variant = name.partition(".")
    return getattr(getattr(getattr(torch.ops, NAMESPACE), base), variant or "default")


def _parameter(fusion: Fusion, name: str) -> str:
    p = fusion.params[name]
    kind = parameter_type(p)
    if kind is None:
        raise DeclarationError(f"{fusion.name}: parameter {name} has no type an operator could have; annotate it")
    if p.default is p.empty:
        return f"{TYPES[kind]} {name}"
    if p.default is None:
        return f"{TYPES[kind]}? {name}=None"
    return f"{TYPES[kind]} {name}=" + (f'"{p.default}"' if kind is str else repr(kind(p.default)))


def _define(variant: Variant):
    _library.define(variant.schema(), tags=TAGS)
    _library.impl(variant.name, variant.quick(variant.kernel), "CompositeExplicitAutograd")
    _library.impl(variant.name, variant.quick(variant.entry), "Autograd")
    torch.library.register_fake(variant.qualified, variant.fake, lib=_library)
    _library.impl(variant.name, variant.transformed, "FuncTorchDynamicLayerFrontMode")
    return overload(variant.name)
