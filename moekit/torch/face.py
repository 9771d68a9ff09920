"""The PyTorch face of any fusion: plain, `out=` and in-place functions on tensors of any strides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import torch

from moekit.backends.array import evaluate
from moekit.compile import tile as t
from moekit.compile.alias import may_overwrite, out_of_place, over_operand, written_name
from moekit.compile.overlap import Region, overlap, overlaps_itself
from moekit.compile.plan import Plan, plan
from moekit.compile.schedule import Schedule
from moekit.errors import AliasError, DeviceError, DtypeError, MoekitError, ShapeError, UnavailableError
from moekit.lang.arguments import bind_arguments, face_signature
from moekit.lang.fusion import Binding, Fusion
from moekit.torch import launch

IMPLEMENTATIONS = ("triton", "eager")
_DTYPES = {getattr(torch, n): n for n in ("float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "bool")}


class Call:
    """One call of a fusion on tensors, checked on construction; `run` writes the outputs."""

    def __init__(self, fusion: Fusion, operands: Mapping[str, object], params: Mapping[str, object], in_place: bool, out, schedule):
        self.fusion, self.schedule = fusion, schedule
        self.operands = {n: _operand(fusion, n, x) for n, x in operands.items()}
        self.device = self._one_device(self.operands)
        shapes = {n: tuple(x.shape) for n, x in self.operands.items()}
        self.binding = fusion.bind(shapes, {n: _dtype(fusion, n, x) for n, x in self.operands.items()}, fusion.bind_params(params))
        self.graph = fusion.trace(self.binding)
        self.sizes = dict(self.binding.sizes) | {a: s for a, s in self.graph.axes.items() if s is not None}
        self.names = [w.tensor for w in self.graph.writes]
        self.outs = self._given(out)
        if in_place:
            updated = [n for n in self.names if n in self.operands and n not in self.outs]
            self.outs |= {n: self.operands[n] for n in updated}
        self._check_outputs()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an operand or output."""
        tensor = self.graph.tensors[name]
        return tuple(1 if i in tensor.ones else self.sizes[d.text] for i, d in enumerate(tensor.dims))

    def _one_device(self, tensors: Mapping[str, torch.Tensor]) -> torch.device:
        first, device = next((n, x.device) for n, x in tensors.items())
        for n, x in tensors.items():
            if x.device != device:
                raise DeviceError(f"{self.fusion.name}: {n} is on {x.device} but {first} is on {device}; move them to one device")
        return device

    def _given(self, out) -> dict[str, torch.Tensor]:
        if out is None:
            return {}
        given = (out,) if isinstance(out, torch.Tensor) or not isinstance(out, Sequence) else tuple(out)
        if len(given) == 1 and len(self.names) > 1:
            given = (*given, *[None] * (len(self.names) - 1))
        if len(given) != len(self.names):
            raise ShapeError(f"{self.fusion.name}: out has {len(given)} entries; it needs {len(self.names)} ({', '.join(self.names)})")
        return {n: _operand(self.fusion, f"out for {n}", x) for n, x in zip(self.names, given, strict=True) if x is not None}

    def _check_outputs(self) -> None:
        """Refuse outputs of the wrong shape, dtype or device, and those that overlap what they may not."""
        name = self.fusion.name
        for n, x in self.outs.items():
            wanted = self.graph.tensors[n].dtype
            if tuple(x.shape) != self.shape(n):
                raise ShapeError(f"{name}: out for {n} has shape {list(x.shape)}; it must be {list(self.shape(n))}")
            if _DTYPES.get(x.dtype) != wanted:
                raise DtypeError(f"{name}: out for {n} is {x.dtype}; it must be torch.{wanted}")
            if x.device != self.device:
                raise DeviceError(f"{name}: out for {n} is on {x.device}; it must be on {self.device}")
            if torch.is_grad_enabled() and x.requires_grad:
                raise MoekitError(f"{name}: out for {n} requires grad; it cannot be written in place, so use the plain form or no_grad")
        if self.device.type == "meta" or not self.outs:
            self.over = ()
            return
        regions = {n: _region(x) for n, x in self.operands.items()}
        outs = {n: _region(x) for n, x in self.outs.items()}
        self.over = self._overwritten(regions, outs)
        for n, r in outs.items():
            if overlaps_itself(r):
                raise AliasError(f"{name}: out for {n} has several elements at one address; pass a tensor without broadcast strides")
            for m, s in regions.items():
                if overlap(r, s) and not (m == n and r == s) and (n, m) not in self.over:
                    raise AliasError(f"{name}: out for {n} overlaps {m}; pass other memory, or a copy of {m}")
            for m, s in outs.items():
                if m != n and overlap(r, s):
                    raise AliasError(f"{name}: out for {n} overlaps out for {m}; pass separate memory")

    def _overwritten(self, regions: Mapping[str, Region], outs: Mapping[str, Region]) -> tuple[tuple[str, str], ...]:
        """Fresh outputs that were given exactly an operand's memory, where the declaration allows it."""
        pairs = []
        for n, r in outs.items():
            if n not in regions:
                same = [m for m, s in regions.items() if s == r and m not in self.names and may_overwrite(self.graph, n, m)]
                pairs += [(n, m) for m in same[:1]]
        return tuple(pairs)

    def eager(self) -> tuple[torch.Tensor, ...]:
        """The outputs by array evaluation, copied to the given tensors where there are any."""
        values = evaluate(self.graph, self.operands, self.sizes, "torch")
        fresh = {n: values[n] if n in self.outs else values[n].contiguous() for n in self.names}
        return tuple(self.outs[n].copy_(x) if n in self.outs else x for n, x in fresh.items())

    def triton(self) -> tuple[torch.Tensor, ...]:
        """The outputs by the emitted kernels."""
        separate = frozenset(n for n in self.names if n in self.operands and not self._in_place(n))
        results = {
            n: self.outs[n] if n in self.outs else torch.empty(self.shape(n), dtype=self._torch_dtype(n), device=self.device)
            for n in self.names
        }
        if any(x.numel() for x in results.values()):
            tensors = dict(self.operands)
            for n, x in results.items():
                tensors[dict(self.over).get(n) or (written_name(n) if n in separate else n)] = x
            dynamic = frozenset(a for a, s in self.graph.axes.items() if s is None)
            planned = planned_for(self.fusion, self.binding, separate, self.over, _layouts(self, separate, tensors, dynamic), self.schedule)
            launch.launch(planned, tensors, self.sizes)
        return tuple(results.values())

    def _in_place(self, name: str) -> bool:
        return name in self.outs and _region(self.outs[name]) == _region(self.operands[name])

    def _torch_dtype(self, name: str) -> torch.dtype:
        return getattr(torch, self.graph.tensors[name].dtype)


def _layouts(call: Call, separate: frozenset[str], tensors: Mapping[str, torch.Tensor], dynamic: frozenset[str]) -> tuple:
    found = []
    for n, x in tensors.items():
        declared = next((m for m in separate if written_name(m) == n), n)
        found.append((n, launch.layout(x, call.graph.tensors[declared].axes, dynamic)))
    return tuple(found)


@lru_cache(maxsize=8192)
def _plan_of_static(
    fusion: Fusion, binding: Binding, separate: frozenset[str], over: tuple[tuple[str, str], ...],
    layouts: tuple[tuple[str, t.Strided], ...], schedule: Schedule | None,
) -> Plan:  # fmt: skip
    graph = over_operand(out_of_place(fusion.trace(binding), separate), over)
    return plan(graph, schedule, dict(layouts))


def planned_for(fusion: Fusion, binding: Binding, separate, over, layouts, schedule) -> Plan:
    """The plan of a call, cached; dynamic sizes do not matter to it, so a new T is an old plan."""
    static = tuple((a, 0 if a in fusion.dynamic else s) for a, s in binding.sizes)
    return _plan_of_static(fusion, Binding(static, binding.dtypes, binding.params, binding.ones), separate, over, layouts, schedule)


class _Differentiable(torch.autograd.Function):
    """Triton forwards, array evaluation backwards."""

    @staticmethod
    def forward(ctx, call: Call, *tensors: torch.Tensor):
        ctx.call = call
        ctx.save_for_backward(*tensors)
        outs = call.triton()
        ctx.mark_non_differentiable(*(x for x in outs if not x.is_floating_point()))
        return outs

    @staticmethod
    def backward(ctx, *grads):
        call = ctx.call
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.requires_grad and x.is_floating_point()) for x in ctx.saved_tensors]
            values = evaluate(call.graph, dict(zip(call.operands, inputs, strict=True)), call.sizes, "torch")
            wanted = [x for x in inputs if x.requires_grad]
            pairs = [(values[n], g) for n, g in zip(call.names, grads, strict=True) if g is not None and values[n].requires_grad]
            found = iter(torch.autograd.grad([v for v, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
        return None, *(next(found) if x.requires_grad else None for x in inputs)


def _serve(call: Call, implementation: str | None) -> tuple[torch.Tensor, ...]:
    if implementation not in (None, *IMPLEMENTATIONS):
        raise UnavailableError(
            f"{call.fusion.name}: there is no implementation {implementation!r} for PyTorch; choose {' or '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "eager" or (implementation is None and call.device.type != "cuda"):
        return call.eager()
    launch.require_available(call.fusion.name, call.operands)
    if torch.is_grad_enabled() and any(x.requires_grad for x in call.operands.values()) and not call.outs:
        return _Differentiable.apply(call, *call.operands.values())
    return call.triton()


def _operand(fusion: Fusion, name: str, x) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise MoekitError(f"{fusion.name}: {name} is {type(x).__name__}; it must be a torch.Tensor")
    if x.layout is not torch.strided:
        raise MoekitError(f"{fusion.name}: {name} has layout {x.layout}; it must be strided, so call to_dense()")
    return x


def _dtype(fusion: Fusion, name: str, x: torch.Tensor) -> str:
    if x.dtype not in _DTYPES:
        raise DtypeError(f"{fusion.name}: {name} is {x.dtype}; it must be one of {', '.join(_DTYPES.values())}")
    return _DTYPES[x.dtype]


def _region(x: torch.Tensor) -> Region:
    size = x.element_size()
    return Region(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size)


def op(fusion: Fusion, in_place: bool = False) -> Callable:
    """The PyTorch function of a fusion; with `in_place` the form that updates the InOut operands (a trailing underscore).

    Tensors may have any strides; nothing is made contiguous. Outputs come back in declared order (one alone as itself).
    `out=`: tensors to write to, a tuple where there are several outputs (None for those to allocate; one tensor stands for the
    first). An output may overlap an operand only where it is that operand's own memory and the declaration allows it.
    `implementation`: None takes "triton" for CUDA tensors and "eager" elsewhere. Gradients go through array evaluation.
    Raises ShapeError, DtypeError, DeviceError, AliasError, ScheduleError or UnavailableError before anything is written.
    """

    def face(*args, out=None, implementation: str | None = None, schedule: Schedule | None = None, **kwargs):
        operands, params = bind_arguments(fusion, args, kwargs)
        results = _serve(Call(fusion, operands, params, in_place, out, schedule), implementation)
        return results[0] if len(results) == 1 else results

    face.__name__ = face.__qualname__ = fusion.name + "_" * in_place
    updates = ", ".join(n for n, s in fusion.tensors.items() if s.role == "InOut")
    form = f"In place: updates {updates}. " if in_place else ""
    face.__doc__ = f"{fusion.doc}\n\n{form}Tensors of any strides; see `moekit.torch.op` for out=, implementation= and errors."
    face.__signature__ = face_signature(fusion)
    face.fusion = fusion
    return face

