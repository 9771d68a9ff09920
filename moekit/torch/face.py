"""The PyTorch function of any fusion: plain, `out=` and in-place forms on tensors of any strides."""

from __future__ import annotations

from collections.abc import Callable

from torch.compiler import is_compiling

from moekit.lang.arguments import EXTRA, face_signature
from moekit.lang.fusion import Fusion
from moekit.torch.form import IMPLEMENTATIONS, Form
from moekit.torch.ops import dispatch, registered

__all__ = ["IMPLEMENTATIONS", "op"]


def op(fusion: Fusion, in_place: bool = False) -> Callable:
    """The PyTorch function of a fusion; with `in_place` the form that updates the InOut operands (a trailing underscore).

    Tensors may have any strides; nothing is made contiguous. Outputs come back in declared order (one alone as itself).
    `out=`: tensors to write to, a tuple where there are several outputs (None for those to allocate; one tensor stands for the
    first). An output may overlap an operand only where it is that operand's own memory and the declaration allows it.
    `implementation`: None takes "triton" for CUDA tensors and "eager" elsewhere. Gradients go through array evaluation; so do
    torch.func's transforms. Under torch.compile the call becomes `torch.ops.moekit.<name>`, for which a fusion that is not
    moekit's own must be registered (`moekit.torch.register`).
    Raises ShapeError, DtypeError, DeviceError, AliasError, ScheduleError or UnavailableError before anything is written.
    """
    in_place = in_place and any(s.role == "InOut" for s in fusion.tensors.values())
    known = registered(fusion)
    form = known.forms[in_place] if known else Form(fusion, in_place)
    serve = form.__call__

    def traced(tensors, params, out, implementation, schedule):
        return dispatch(known or registered(fusion), in_place, tensors, params, out, implementation, schedule)

    signature = face_signature(fusion)
    face = _written_out(fusion, in_place, serve, traced)
    updates = ", ".join(n for n, s in fusion.tensors.items() if s.role == "InOut")
    note = f"In place: updates {updates}. " if in_place else ""
    face.__doc__ = f"{fusion.doc}\n\n{note}Tensors of any strides; see `moekit.torch.op` for out=, implementation= and errors."
    face.__signature__ = signature
    face.fusion = fusion
    return face


def _written_out(fusion: Fusion, in_place: bool, serve: Callable, traced: Callable) -> Callable:
    """A function with the declaration's own parameters: Python itself sorts the arguments, at the least cost.

    A call that does not fit raises Python's TypeError, which names the function and the argument.
    """
    name = fusion.name + "_" * in_place
    signature = fusion.signature
    parameters = [
        p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else _Named(f"__default_{n}"))
        for n, p in signature.parameters.items()
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))[1:-1]
    star = "" if any(p.kind is p.KEYWORD_ONLY for p in parameters) else "*, "
    tensors, params = ("".join(f"{n}, " for n in names) for names in (fusion.tensors, fusion.params))
    extra = ", ".join(EXTRA)
    defaults = {f"__default_{n}": p.default for n, p in signature.parameters.items() if p.default is not p.empty}
    around = {"__traced": traced, "__serve": serve, "__is_compiling": is_compiling, **defaults}
    source = (
        f"def make({', '.join(around)}):\n"
        f"    def {name}({text}, {star}{', '.join(f'{e}=None' for e in EXTRA)}):\n"
        f"        __call = __traced if __is_compiling() else __serve\n"
        f"        __results = __call(({tensors}), ({params}), {extra})\n"
        f"        return __results[0] if __results.__len__() == 1 else __results\n"
        f"    return {name}\n"
    )
    scope: dict = {"__name__": f"moekit_face_of_{name}"}
    exec(compile(source, f"<moekit torch {name}>", "exec"), scope)
    made = scope["make"](**around)
    made.__qualname__ = name  # what Python's own TypeErrors say
    made.__module__ = fusion.__module__  # a function is pickled by both
    return made


class _Named:
    """A default that is written as a name."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name
