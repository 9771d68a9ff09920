"""A form of a fusion (plain, or in place) as it serves calls: which implementation, recorded for autograd or not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from moekit.compile.schedule import Schedule
from moekit.errors import UnavailableError
from moekit.lang.arguments import naming, refuse_schedule
from moekit.lang.fusion import Fusion
from moekit.torch import fast, launch
from moekit.torch.autograd import carries_tangent, differentiable, needs_grad
from moekit.torch.call import Call, Outputs, Prepared, region, written

IMPLEMENTATIONS = ("triton", "eager")


class Form:
    """Serves calls of one fusion; `in_place` updates the InOut operands."""

    def __init__(self, fusion: Fusion, in_place: bool):
        self.fusion, self.in_place, self.name = fusion, in_place, fusion.name + "_" * in_place
        self.cache = fast.Cache()
        names = list(fusion.tensors)
        self.dispatched: Callable | None = None  # set by `ops.register`: the same call through torch's dispatcher
        self.updated = tuple(i for i, n in enumerate(names) if fusion.tensors[n].role == "InOut" and in_place)

    def __call__(
        self, tensors: tuple, params: tuple, out=None, implementation: str | None = None,
        schedule: Schedule | None = None,
    ) -> Outputs:  # fmt: skip
        """All outputs in declared order. `tensors` and `params` in declared order, the rest as `op` documents it."""
        results = None if implementation == "eager" else self.quick(tensors, params, out, schedule)
        return self.serve(tensors, params, out, implementation, schedule) if results is None else results

    def quick(self, tensors: tuple, params: tuple, out, schedule: Schedule | None) -> Outputs | None:
        """The call by the short way; None if it has to take the long one."""
        if moded() or forward_ad._current_level >= 0:  # someone else looks on, or a tangent may be carried
            return None
        try:
            given, static = _flat(tensors, params, out, schedule)
            entry, pointers, grad = self.cache.find(given, static)
        except (TypeError, RuntimeError):
            return None
        if entry is None or fast.watched():
            return None
        if grad and torch.is_grad_enabled():
            return None if entry.written else self._recorded(tensors, params, schedule)
        return fast.launch(entry, given, pointers)

    def serve(self, tensors: tuple, params: tuple, out, implementation, schedule) -> Outputs:
        """A call with every check; errors name the form that was called."""
        with naming(self.fusion.name, self.name):
            return self._serve(tensors, params, out, implementation, schedule)

    def _serve(self, tensors: tuple, params: tuple, out, implementation, schedule) -> Outputs:
        name = self.name
        refuse_schedule(name, schedule, Schedule)
        if implementation not in (None, *IMPLEMENTATIONS):
            known = " or ".join(IMPLEMENTATIONS)
            raise UnavailableError(f"{name}: there is no implementation {implementation!r} for PyTorch; choose {known}")
        operands = dict(zip(self.fusion.tensors, tensors, strict=True))
        given = dict(zip(self.fusion.params, params, strict=True))
        if transformed():
            return self._under_transform(operands, given, out, implementation, schedule)
        if carries_tangent(*tensors, *(out if isinstance(out, list | tuple) else (out,))):
            if implementation == "triton":
                raise UnavailableError(f"{name}: Triton cannot push a tangent forward; use implementation='eager'")
            return Call(self.fusion, operands, given, self.in_place, out, schedule).eager()
        if self.dispatched is not None and foreign(tensors):
            return self.dispatched(tensors, params, out, implementation, schedule)
        call = Call(self.fusion, operands, given, self.in_place, out, schedule)
        if implementation == "eager" or (implementation is None and call.device.type != "cuda"):
            return call.eager()
        if call.graph.ranks and (why := call.unlinked()):
            if implementation == "triton":
                raise UnavailableError(f"{name}: {why}")
            return call.eager()
        launch.require_available(name, call.operands)
        if needs_grad(tensors):
            return call.eager() if call.graph.ranks else self._recorded(tensors, params, schedule)
        return self._remembered(call, tensors, params, out, schedule)

    def _recorded(self, tensors: tuple, params: tuple, schedule) -> Outputs:
        """The plain form by Triton, recorded for autograd."""
        named = dict(zip(self.fusion.params, params, strict=True))
        forwards = lambda *xs: self(xs, params, None, "triton", schedule)  # noqa: E731
        return differentiable(forwards, self.fusion, named, tensors)

    def _under_transform(self, operands: dict, params: dict, out, implementation, schedule) -> Outputs:
        """Inside torch.func's vmap, grad and the like: array evaluation of the plain form, which they all understand."""
        name = self.name
        if self.in_place or out is not None:
            raise UnavailableError(
                f"{name}: a form that writes to its operands has no meaning under torch.func transforms; use the plain form"
            )
        if implementation == "triton":
            raise UnavailableError(
                f"{name}: Triton cannot serve a call under torch.func transforms; use implementation='eager'"
            )
        call = Call(self.fusion, operands, params, False, None, schedule)
        values = call.arrays()
        return tuple(values[n] for n in call.names)

    def _remembered(self, call: Call, tensors: tuple, params: tuple, out, schedule) -> Outputs:
        """Launch through Triton's front door, and remember how to come in by the short way."""
        made = call.prepare()
        compiled = launch.start(made.launches, made.memory, call.device)
        written(call.outs.values())
        if all(c is not None for c in compiled) and not call.partial() and not call.graph.ranks:
            given, static = _flat(tensors, params, out, schedule)
            entry = self._entry(call, given, made, compiled)
            if entry is not None and all(type(x) in fast.PLAIN for x in given):
                self.cache.keep(given, static, self._near(given), entry)
        return tuple(made.results.values())

    def _entry(self, call: Call, given: tuple, made: Prepared, compiled: list) -> fast.Entry | None:
        """What the short way needs to know, every tensor by its place in the row: operands, given outputs, fresh ones."""
        operands = list(call.operands)
        fresh = [n for n in call.names if n not in call.outs]
        made_here = [*call.given, *fresh]
        order = [*operands, *(made.targets[n] for n in made_here), *made.scratch]
        place = {n: operands.index(n) for n in call.outs if n not in call.given}
        place |= {n: len(operands) + i for i, n in enumerate(made_here)}
        pairs = zip(made.launches, compiled, strict=True)
        ready = [r for one, kernel in pairs if (r := fast.ready(one, kernel, order, call.device)) is not None]
        if len(ready) < len(made.launches):
            return None
        allocated = [*(made.results[n] for n in fresh), *(made.memory[n] for n in made.scratch)]
        return fast.Entry(
            call.device.index,
            tuple(ready),
            tuple(_fresh(x, given) for x in allocated),
            tuple(place[n] for n in call.names),
            tuple(place[n] for n in call.outs),
        )

    def _near(self, given: tuple) -> tuple[tuple[int, int, int, int], ...]:
        """The pairs of tensors of which one is written, with the bytes they span."""
        spans = [region(x).end - x.data_ptr() if x.numel() else 0 for x in given]
        targets = sorted({*self.updated, *range(len(self.fusion.tensors), len(given))})
        return tuple(
            (i, j, spans[i], spans[j]) for i in targets for j in range(len(given)) if j != i and not (j in targets and j < i)
        )


moded = torch._C._len_torch_dispatch_stack


def foreign(tensors: tuple) -> bool:
    """Whether someone else should see the call: a tensor subclass (fake tensors too) or a dispatch mode (tracing)."""
    return bool(moded()) or any(isinstance(x, torch.Tensor) and type(x) not in fast.PLAIN for x in tensors)


def transformed() -> bool:
    """Whether a torch.func transform (vmap, grad, …) is active."""
    return peek_interpreter_stack() is not None


def _flat(tensors: tuple, params: tuple, out, schedule) -> tuple[tuple, tuple]:
    """Operands and given outputs in one row, and what else a call depends on."""
    if out is None:
        return tensors, (repr(params), schedule)
    outs = (out,) if isinstance(out, torch.Tensor) else tuple(out)
    mask = tuple([x is not None for x in outs])
    return (*tensors, *[x for x in outs if x is not None]), (repr(params), schedule, mask)


def _fresh(x: torch.Tensor, given: tuple) -> fast.Fresh:
    like = (
        i for i, g in enumerate(given) if (g.shape, g.dtype, g.stride()) == (x.shape, x.dtype, x.stride()) and g.is_contiguous()
    )
    return fast.Fresh(next(like, None), tuple(x.shape), x.dtype, x.device)
