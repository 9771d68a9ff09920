"""One call of a fusion on tensors: everything is checked first, then the outputs are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from moekit.backends.array import evaluate
from moekit.compile import tile as t
from moekit.compile.passes.form import may_overwrite, out_of_place, over_operand, written_name
from moekit.compile.plan import Plan, plan
from moekit.compile.rules.alike import settled
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.legal import legal
from moekit.errors import AliasError, DeviceError, DtypeError, MoekitError, ScheduleError, ShapeError
from moekit.lang.arguments import refuse_empty
from moekit.lang.fusion import Binding, Fusion
from moekit.lang.graph import Graph
from moekit.torch import launch
from moekit.torch.autograd import carries_tangent
from moekit.torch.binding import DTYPES, bind, checked
from moekit.torch.channel import Channel, channel_of
from moekit.torch.overlap import Region, overlap, overlaps_itself
from moekit.tune.table import scheduled, serves, untuned

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Prepared:
    """A call ready to launch. `memory`: tensors by their names in the kernels; `targets`: the names of the outputs there."""

    memory: Mapping[str, torch.Tensor]
    launches: tuple[launch.Launch, ...]
    results: Mapping[str, torch.Tensor]
    targets: Mapping[str, str]
    scratch: tuple[str, ...]


class Call:
    """A call that may be made, or the constructor raises; `eager` and `triton` write the outputs and return them.

    `operands` and `params` by name; `out` as the face takes it; `in_place` updates the InOut operands.
    """

    def __init__(
        self, fusion: Fusion, operands: Mapping[str, object], params: Mapping[str, object], in_place: bool, out,
        schedule: Schedule | None,
    ):  # fmt: skip
        self.fusion, self.schedule = fusion, schedule
        self.operands = {n: checked(fusion, n, x) for n, x in operands.items()}
        self.device = one_device(fusion, self.operands)
        self.bound = bind(fusion, self.operands, params)
        self.graph, self.sizes, self.names = self.bound.graph, self.bound.sizes, self.bound.names
        refuse_empty(self.graph, self.sizes)
        if schedule is not None and (why := legal(self.graph, schedule)):
            raise ScheduleError(why)
        self.given = self._given(out)
        updated = [n for n in self.names if in_place and n in self.operands and n not in self.given]
        self.outs = self.given | {n: self.operands[n] for n in updated}
        self.over: tuple[tuple[str, str], ...] = ()
        self._check_outputs()

    def _given(self, out) -> dict[str, torch.Tensor]:
        if out is None:
            return {}
        given = (out,) if isinstance(out, torch.Tensor) or not isinstance(out, Sequence) else tuple(out)
        if len(given) == 1 and len(self.names) > 1:
            given = (*given, *[None] * (len(self.names) - 1))
        if len(given) != len(self.names):
            raise ShapeError(
                f"{self.fusion.name}: out has {len(given)} entries; it needs {len(self.names)} ({', '.join(self.names)})"
            )
        return {n: checked(self.fusion, f"out for {n}", x) for n, x in zip(self.names, given, strict=True) if x is not None}

    def _check_outputs(self) -> None:
        """Refuse outputs of the wrong shape, dtype or device, and those that overlap what they may not."""
        name = self.fusion.name
        for n, x in self.outs.items():
            wanted = self.graph.tensors[n].dtype
            if tuple(x.shape) != self.bound.shape(n):
                raise ShapeError(f"{name}: out for {n} has shape {list(x.shape)}; it must be {list(self.bound.shape(n))}")
            if DTYPES.get(x.dtype) != wanted:
                raise DtypeError(f"{name}: out for {n} is {x.dtype}; it must be torch.{wanted}")
            if x.device != self.device:
                raise DeviceError(f"{name}: out for {n} is on {x.device}; it must be on {self.device}")
            refuse_grad(self.fusion, n, x, self.operands)
        if self.device.type != "meta" and self.outs:
            self._check_overlap()

    def _check_overlap(self) -> None:
        name = self.fusion.name
        regions = {n: region(x) for n, x in self.operands.items()}
        outs = {n: region(x) for n, x in self.outs.items()}
        self.over = self._overwritten(regions, outs)
        for n, r in outs.items():
            if overlaps_itself(r):
                raise AliasError(
                    f"{name}: out for {n} has several elements at one address; pass a tensor without broadcast strides"
                )
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

    def arrays(self) -> dict[str, torch.Tensor]:
        """The outputs by array evaluation, differentiable; nothing is written."""
        return evaluate(self.graph, self.operands, self.sizes, "torch")

    def eager(self) -> Outputs:
        """The outputs by array evaluation, copied to the given tensors where there are any."""
        if self.device.type == "meta" and not carries_tangent(*self.operands.values()):
            return tuple(self.outs.get(n, self.bound.empty(n, self.device)) for n in self.names)
        values = self.arrays()
        held = {x.untyped_storage()._cdata for x in self.operands.values()}
        # every output has memory of its own before the first is written: it may go over an operand that another one is
        ready = {n: _apart(values[n] if n in self.outs else _dense(values[n]), held) for n in self.names}
        return tuple(self.outs[n].copy_(x) if n in self.outs else x for n, x in ready.items())

    def prepare(self) -> Prepared:
        """Everything up to the launches: plan, outputs and scratch allocated, kernels' arguments known."""
        separate = frozenset(n for n in self.names if n in self.operands and not self._in_place(n))
        results = {n: self.outs[n] if n in self.outs else self.bound.empty(n, self.device) for n in self.names}
        targets = {n: dict(self.over).get(n) or (written_name(n) if n in separate else n) for n in self.names}
        if not any(x.numel() for x in results.values()):
            return Prepared({}, (), results, targets, ())
        for n in self.partial():
            results[n].copy_(self.operands[n])  # the kernel writes the rows at its ids only
        tensors = dict(self.operands) | {targets[n]: x for n, x in results.items()}
        reached, lying = self.channel.reaches(self.graph) if self.channel else ({}, {})
        dynamic = frozenset(a for a, s in self.graph.axes.items() if s is None)
        layouts = (*self._layouts(separate, tensors, dynamic), *lying.items())
        tensors |= reached
        call = self.fusion, _static(self.fusion, self.bound.binding), separate, self.over
        planned = _planned(*call, layouts, self._scheduled(call), not self.schedule)
        scratch = launch.scratch(planned, self.sizes, self.device)
        launched = launch.launches(planned, tensors | scratch, self.sizes, dynamic)
        return Prepared(tensors | scratch, launched, results, targets, tuple(scratch))

    def _scheduled(self, call: tuple) -> Schedule:
        """The schedule that was given, else what the table or the rules have for the form of this call."""
        form, usual = _form(*call)
        chosen = scheduled(device_name(self.device), self.graph, self.sizes) if usual else untuned(form, self.sizes)
        return self.schedule or chosen

    @property
    def channel(self) -> Channel | None:
        """By what kernels reach the other ranks, where there are any."""
        return channel_of(self.device) if self.graph.ranks else None

    def unlinked(self) -> str | None:
        """Why packets do not serve a call of several ranks; None where they do."""
        if self.channel is None:
            return f"no channel reaches the other ranks of {', '.join(self.graph.ranks)}; make a moekit.torch.Channel"
        chosen = self.schedule or scheduled(device_name(self.device), self.graph, self.sizes)
        return self.channel.room.refuses(self.graph, self.sizes, chosen)

    def partial(self) -> list[str]:
        """The outputs that take an operand's new value elsewhere, and of which only the rows at some ids are new."""
        return [w.tensor for w in self.graph.writes if w.ids and w.tensor in self.operands and not self._in_place(w.tensor)]

    def triton(self) -> Outputs:
        """The outputs by the emitted kernels."""
        made = self.prepare()
        launch.start(made.launches, made.memory, self.device)
        written(self.outs.values())
        return tuple(made.results.values())

    def _in_place(self, name: str) -> bool:
        return name in self.outs and region(self.outs[name]) == region(self.operands[name])

    def _layouts(self, separate: frozenset[str], tensors: Mapping[str, torch.Tensor], dynamic) -> tuple:
        found = []
        for n, x in tensors.items():
            declared = next((m for m in separate if written_name(m) == n), n)
            found.append((n, launch.layout(x, self.graph.tensors[declared].axes, dynamic)))
        return tuple(found)


def one_device(fusion: Fusion, tensors: Mapping[str, torch.Tensor]) -> torch.device:
    """The device all tensors are on; raises DeviceError naming two that differ."""
    first, device = next((n, x.device) for n, x in tensors.items())
    for n, x in tensors.items():
        if x.device != device:
            raise DeviceError(f"{fusion.name}: {n} is on {x.device} but {first} is on {device}; move them to one device")
    return device


def refuse_grad(fusion: Fusion, name: str, x: torch.Tensor, operands: Mapping[str, torch.Tensor]) -> None:
    """Raise MoekitError if writing `x` would hide a derivative: it, or an operand, requires grad or carries a tangent."""
    every = {f"out for {name}": x, **operands}
    if carrying := [n for n, o in every.items() if carries_tangent(o)]:
        raise MoekitError(
            f"{fusion.name}: {carrying[0]} carries a tangent, which a form that writes to {name} cannot push forward; "
            "use the plain form"
        )
    if not torch.is_grad_enabled():
        return
    guilty = [n for n, o in every.items() if o.requires_grad]
    if guilty:
        raise MoekitError(
            f"{fusion.name}: {guilty[0]} requires grad, which a form that writes to {name} cannot record; "
            "use the plain form, or no_grad"
        )


def written(tensors) -> None:
    """Tell autograd that tensors were written, so that a backward pass that needs the old values says so."""
    for x in tensors:
        torch.autograd.graph.increment_version(x)


def region(x: torch.Tensor) -> Region:
    """The bytes of a tensor."""
    size = x.element_size()
    return Region(x.data_ptr(), tuple(x.shape), tuple(s * size for s in x.stride()), size)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`x` with the strides of fresh memory, of dimensions of one element, too."""
    return x.contiguous().flatten().view(x.shape) if 1 in x.shape else x.contiguous()


def _apart(x: torch.Tensor, held: set[int]) -> torch.Tensor:
    """`x`, or a copy of it where it is a view of storage that is held (by address: fake tensors have no memory)."""
    return x.clone() if x.untyped_storage()._cdata in held else x


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """What a table of tuned schedules is found by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _static(fusion: Fusion, binding: Binding) -> Binding:
    """A binding without the sizes of dynamic axes: neither graph nor plan depends on them, so a new T is an old plan."""
    static = tuple((a, 0 if a in fusion.dynamic else s) for a, s in binding.sizes)
    return Binding(static, binding.dtypes, binding.params, binding.ones)


@lru_cache(maxsize=8192)
def _form(fusion: Fusion, binding: Binding, separate: frozenset[str], over: tuple[tuple[str, str], ...]) -> tuple[Graph, bool]:
    """The graph that a call's kernels compute, and whether the declaration's schedules are for it, too."""
    graph = fusion.trace(binding)
    form = over_operand(out_of_place(graph, separate), over)
    return form, serves(graph, form)


@lru_cache(maxsize=8192)
def _planned(
    fusion: Fusion, binding: Binding, separate: frozenset[str], over: tuple[tuple[str, str], ...],
    layouts: tuple[tuple[str, t.Strided | t.Mailbox], ...], schedule: Schedule, by_rows: bool,
) -> Plan:  # fmt: skip
    """The plan of a call. `by_rows`: its schedule was chosen by their number, and serves only where it adds up as others do."""
    graph, _ = _form(fusion, binding, separate, over)
    return plan(graph, settled(graph, schedule, dict(layouts)) if by_rows else schedule, dict(layouts))
