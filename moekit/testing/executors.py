"""Implementations as a campaign runs them: on tensors that already lie in guarded memory, many calls at a time."""

from __future__ import annotations

import functools
import importlib.util
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moekit.cli import platform
from moekit.compile.passes.form import out_of_place, over_operand, written_name
from moekit.compile.plan import Plan, plan
from moekit.compile.tile import Strided, interpret
from moekit.compile.tile.layouts import strided
from moekit.errors import UnavailableError
from moekit.lang.dtypes import numpy_dtype
from moekit.lang.fusion import Binding, Fusion
from moekit.testing import far, interpreted
from moekit.testing.case import FuzzCase
from moekit.testing.guard import POISONS, Arena, Placed, Slot
from moekit.testing.layouts import lay
from moekit.testing.oracle import Standard
from moekit.testing.schedules import over, schedule_of, static

JAX = ("pallas", "pallas-triton", "triton-jax", "mosaic", "xla")
FRONT, SHORT = "front door", "short door"  # the two ways in which moekit launches Triton kernels
launches: Counter[str] = Counter()  # kernels, by implementation and by door: a case that launches none does not count


@dataclass
class Run:
    """Bytes of an arena before and after; and for every case what was raised (None: nothing), and whether a kernel ran."""

    before: np.ndarray
    after: np.ndarray
    raised: list[Exception | None]
    launched: list[bool]


class Executor(ABC):
    """How one implementation runs a case on tensors by name, writing each output to its target."""

    standard: Standard | None = None
    every = 1  # of so many cases one is run again on memory with another poison
    device = "cpu"
    backwards = False  # whether programs go in reverse order, where it can have them so

    def __init__(self, name: str):
        self.name = name

    def supports(self, case: FuzzCase) -> bool:
        """Whether the implementation can be asked to serve the case at all."""
        return True

    def upload(self, arena: Arena, image: np.ndarray) -> Any:
        """Memory that holds an image, where the implementation can reach it; it may be written."""
        return image.copy() if arena.index is None else far.scattered(self.device, arena.end, arena.index, image)

    def tensor(self, memory: Any, slot: Slot) -> Any:
        """One tensor in that memory."""
        return slot.view(memory)

    @abstractmethod
    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Run the case."""

    def download(self, arena: Arena, memory: Any) -> np.ndarray:
        """The image after every call has ended."""
        return memory if arena.index is None else far.gathered(self.device, arena.index)

    def run(self, arena: Arena, placed: Sequence[Placed], poison: int) -> Run:
        """Run cases on one image of the arena; on the second image programs go in reverse order."""
        self.backwards = poison != POISONS[0]
        before = arena.image(poison)
        memory = self.upload(arena, before)
        made = Run(before, before, [], [])
        for p in placed:
            count, error = launches[self.name], None
            try:
                self.call(p.case, {n: self.tensor(memory, s) for n, s in p.slots.items()})
            except Exception as raised:
                if fatal(raised) or starved(raised):
                    raise
                error = raised
            made.raised.append(error)
            made.launched.append(launches[self.name] > count)
        made.after = self.download(arena, memory)
        return made


def keep(target: Any, result: Any, name: str) -> Any:
    """`target`, where the result named `name` shall go; raises TypeError where that has another shape or dtype."""
    if (tuple(target.shape), target.dtype) != (tuple(result.shape), result.dtype):
        raise TypeError(f"{name} is {result.dtype}{list(result.shape)}; it must be {target.dtype}{list(target.shape)}")
    return target


def fatal(error: Exception) -> bool:
    """Whether an error leaves the device unusable for this process."""
    text = str(error)
    signs = ("CUDA error", "CUDA_ERROR", "Triton Error", "illegal memory access")
    return not starved(error) and any(sign in text for sign in signs)


def starved(error: Exception) -> bool:
    """Whether an error says that the device had no memory left, which is no fault of a kernel."""
    text = str(error)
    return any(sign in text for sign in ("out of memory", "OUT_OF_MEMORY", "RESOURCE_EXHAUSTED: Out of memory"))


class Interpret(Executor):
    """The tile program, executed by numpy."""

    def call(self, case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> None:
        """Lower (cached by static sizes and strides' classes) and interpret."""
        dynamic = frozenset(case.declaration.dynamic)
        separate = frozenset(n for n in case.names if n in case.shapes and case.targets[n] != n)
        layouts = tuple((n, _layout(x, _axes(case, n), dynamic)) for n, x in tensors.items())
        if any(x.size for x in (tensors[t] for t in case.targets.values())):
            made = _planned(case.declaration, static(case), separate, over(case), layouts, schedule_of(case))
            for w in case.graph.writes:
                if w.ids and case.targets[w.tensor] != w.tensor:
                    tensors[case.targets[w.tensor]][...] = tensors[w.tensor]
            interpret.run(made, tensors, case.extents, self.backwards)
            launches[self.name] += len(made.programs)


def _axes(case: FuzzCase, name: str) -> tuple[str | None, ...]:
    found = next((n for n in case.names if written_name(n) == name), name)
    return case.graph.tensors[found].axes


def _layout(x: np.ndarray, axes: Sequence[str | None], dynamic: frozenset[str]) -> Strided:
    """What the compiler is told of an array's strides."""
    return strided(x.shape, [step // x.itemsize for step in x.strides], axes, dynamic, x.itemsize)


@functools.lru_cache(maxsize=4096)
def _planned(fusion: Fusion, binding: Binding, separate, pairs, layouts, schedule) -> Plan:
    graph = over_operand(out_of_place(fusion.trace(binding), separate), pairs)
    return plan(graph, schedule, dict(layouts))


class Evaluate(Executor):
    """The graph, evaluated by numpy."""

    def call(self, case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> None:
        """Evaluate, then copy to the targets: none before all are known, as one may be an operand that another goes over."""
        from moekit.backends.array import evaluate

        results = evaluate(case.graph, {n: tensors[n] for n in case.shapes}, case.extents, "numpy")
        launches[self.name] += 1
        own = {name: np.array(x) for name, x in results.items()}
        for name, target in case.targets.items():
            keep(tensors[target], own[name], name)[...] = own[name]


class Torch(Executor):
    """A PyTorch implementation through its face; on a GPU an image is copied there and back once per batch."""

    def __init__(self, name: str, implementation: str, device: str):
        import torch

        super().__init__(name)
        self.torch, self.implementation, self.device = torch, implementation, device
        self.counted = implementation == "triton"
        if self.counted:
            _count_launches(name)

    def upload(self, arena: Arena, image: np.ndarray) -> Any:
        """The memory as a tensor of bytes on the device."""
        if arena.index is None and self.device != "cpu":
            return self.torch.from_numpy(image).to(self.device)
        memory = super().upload(arena, image)
        return self.torch.from_numpy(memory) if isinstance(memory, np.ndarray) else memory

    def tensor(self, memory: Any, slot: Slot) -> Any:
        """A view of exactly the slot's strides and offset."""
        return self.torch.as_strided(memory.view(getattr(self.torch, slot.dtype)), slot.shape, slot.strides, slot.start)

    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Call the face as the case's mode says."""
        given = None
        if case.mode != "plain":
            given = tuple(None if t == n and n in case.shapes else tensors[t] for n, t in case.targets.items())
            given = None if all(x is None for x in given) else given
        face = _face(case.declaration, case.mode == "in place")
        got = face(*(tensors[n] for n in case.shapes), **case.params, implementation=self.implementation,
                   schedule=schedule_of(case), out=given)  # fmt: skip
        if not self.counted:
            launches[self.name] += 1
        for (name, target), result in zip(case.targets.items(), got if isinstance(got, tuple) else (got,), strict=True):
            if case.mode == "plain":
                keep(tensors[target], result, name).copy_(result)
            elif result.data_ptr() != tensors[target].data_ptr() and result.numel():
                raise ValueError(f"{case.declaration.name}: what was returned for {name} is not the buffer given")

    def download(self, arena: Arena, memory: Any) -> np.ndarray:
        """The image, back on the host."""
        return super().download(arena, memory.cpu().numpy() if arena.index is None else memory)


class Interpreted(Torch):
    """The emitted Triton in Triton's own interpreter."""

    def __init__(self, name: str):
        super().__init__(name, "triton", "cpu")
        interpreted.mend()

    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Call the face, with programs in the order that is wanted."""
        interpreted.ORDER["backwards"] = self.backwards
        super().call(case, tensors)


@functools.lru_cache(maxsize=256)
def _face(fusion: Fusion, in_place: bool) -> Callable:
    from moekit.torch import op

    return op(fusion, in_place=in_place)


def _count_launches(name: str) -> None:
    """Count every kernel that moekit launches through Triton, by either door, in this process."""
    from moekit.torch import fast, launch

    straight, slow = fast._launch, launch._start
    if hasattr(straight, "counts"):
        return

    def quick(entry, pointers):
        for counted in (name, SHORT):
            launches[counted] += len(entry.ready)
        straight(entry, pointers)

    def front(one, tensors):
        for counted in (name, FRONT):
            launches[counted] += 1
        return slow(one, tensors)

    quick.counts = True
    fast._launch, launch._start = quick, front


def as_torch(values: np.ndarray, kind: str = "dense", device: str = "cpu") -> Any:
    """A torch tensor of these values in guarded memory, in one of `moekit.testing.layouts.KINDS`."""
    arena, made = Arena(), Torch("eager", "eager", device)
    slot = arena.add("x", values.shape, values.dtype.name, lay(kind, values.shape, values.itemsize), values)
    like = made.tensor(memory := made.upload(arena, arena.image(POISONS[0])), slot)
    bare = made.torch.empty(0, dtype=like.dtype, device=device)
    return bare.set_(memory.untyped_storage(), slot.start, slot.shape, slot.strides)


def to_numpy(tensor: Any) -> np.ndarray:
    """A torch tensor's values as a numpy array of the same dtype."""
    import torch

    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    flat = dense.reshape(-1).view(torch.uint8).numpy()
    return flat.view(numpy_dtype(str(tensor.dtype).removeprefix("torch."))).reshape(tuple(tensor.shape))


def _jax(name: str) -> Executor:
    from moekit.testing.jax_executor import Jax

    return Jax(name)


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "interpret": lambda: Interpret("interpret"),
    "numpy": lambda: Evaluate("numpy"),
    "eager": lambda: Torch("eager", "eager", "cpu"),
    "triton": lambda: Torch("triton", "triton", "cuda"),
    "triton-interpreter": lambda: Interpreted("triton-interpreter"),
    "xla": lambda: _jax("xla"),
    "pallas": lambda: _jax("pallas"),
    "pallas-triton": lambda: _jax("pallas-triton"),
    "triton-jax": lambda: _jax("triton-jax"),
    "mosaic": lambda: _jax("mosaic"),
}
NEEDED = {  # packages, each with the extra that installs it
    "eager": {"torch": "torch"},
    "triton": {"torch": "torch", "triton": "torch"},
    "triton-interpreter": {"torch": "torch", "triton": "torch"},
    "xla": {"jax": "jax"},
    "pallas": {"jax": "jax"},
    "pallas-triton": {"jax": "jax"},
    "triton-jax": {"jax": "jax", "triton": "triton"},
    "mosaic": {"jax": "jax"},
}


def executor(name: str) -> Executor:
    """The implementation `name`; raises UnavailableError if there is none, or none here."""
    from moekit.testing.peers import PEERS, peer_executor

    if name in PEERS or ":" in name:
        return peer_executor(name)
    if name not in EXECUTORS:
        raise UnavailableError(f"there is no implementation {name!r}; choose of {', '.join(EXECUTORS)}")
    if why := unavailable(name):
        raise UnavailableError(f"{name}: {why}")
    return EXECUTORS[name]()


def unavailable(name: str) -> str | None:
    """Why an implementation cannot be run here, None if it can."""
    for package, extra in NEEDED.get(name, {}).items():
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; install moekit[{extra}]"
    if name == "triton-interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's interpreter needs TRITON_INTERPRET=1 in the environment"
    if name == "triton" and not platform.gpu_count():
        return "there is no NVIDIA GPU here; choose interpret, eager or pallas"
    return None
