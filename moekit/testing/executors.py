"""Implementations as a campaign runs them: on tensors that already lie in guarded memory, many calls at a time."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from moekit.compile.alias import out_of_place, over_operand, written_name
from moekit.compile.dense import strided
from moekit.compile.plan import Plan, plan
from moekit.compile.schedule import Schedule
from moekit.compile.schedule.legal import legal
from moekit.compile.tile import Strided, interpret
from moekit.errors import UnavailableError
from moekit.lang.fusion import Binding, Fusion
from moekit.testing import interpreted
from moekit.testing.case import FuzzCase
from moekit.testing.guard import POISONS, Arena, Placed, Slot
from moekit.testing.oracle import Standard
from moekit.testing.schedules import variants

launches: Counter[str] = Counter()  # kernels launched, by implementation: a case that launches none does not count


def static(case: FuzzCase) -> Binding:
    """The case's binding with dynamic sizes blanked: what plans and schedules depend on."""
    b, dynamic = case.binding, case.declaration.dynamic
    return Binding(tuple((a, 1 if a in dynamic else s) for a, s in b.sizes), b.dtypes, b.params, b.ones)


def schedule_of(case: FuzzCase) -> Schedule | None:
    """The schedule that a case names; the heuristic's (None) where it is not legal, be it for what an output goes over."""
    if case.schedule == "heuristic":
        return None
    found = _schedules(case.declaration, static(case)).get(case.schedule)
    over = tuple((o, t) for o, t in case.targets.items() if o not in case.shapes and t != o)
    return found if found is None or not over or legal(over_operand(case.graph, over), found) is None else None


@functools.lru_cache(maxsize=2048)
def _schedules(fusion: Fusion, binding: Binding) -> dict[str, Schedule | None]:
    return variants(fusion.trace(binding))


class Executor(ABC):
    """How one implementation runs a case on tensors by name, writing each output to its target."""

    compiled = True
    standard: Standard | None = None

    def __init__(self, name: str):
        self.name = name
        self.backwards = False
        self.flat: dict[int, dict[str, Any]] = {}  # by address: views of the memory at hand, by dtype

    def supports(self, case: FuzzCase) -> bool:
        """Whether the implementation can be asked to serve the case at all."""
        return True

    def upload(self, image: np.ndarray) -> Any:
        """The image where the implementation can reach it; it may be written."""
        return image

    def tensor(self, memory: Any, slot: Slot) -> Any:
        """One tensor in that memory."""
        return slot.view(memory)

    @abstractmethod
    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Run the case."""

    def download(self, memory: Any) -> np.ndarray:
        """The bytes of the memory after every call has ended."""
        return memory

    def forget(self) -> None:
        """Hold on to no memory."""
        self.flat = {}

    def run(self, arena: Arena, placed: Sequence[Placed], poison: int) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
        """Run cases on one image of the arena: bytes before and after, and per case what was raised (None: nothing).

        On the second image programs go in reverse order, where the implementation has a say in it.
        """
        self.backwards = poison != POISONS[0]
        before = arena.image(poison)
        memory = self.upload(before.copy() if self.upload.__func__ is Executor.upload else before)
        raised: list[str | None] = []
        for p in placed:
            tensors = {n: self.tensor(memory, s) for n, s in p.slots.items()}
            try:
                self.call(p.case, tensors)
                raised.append(None)
            except Exception as error:
                if fatal(error) or starved(error):
                    raise
                raised.append(f"{type(error).__name__}: {error}")
        return before, self.download(memory), raised


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
        over = tuple((o, t) for o, t in case.targets.items() if o not in case.shapes and t != o)
        layouts = tuple((n, _layout(x, _axes(case, n), dynamic)) for n, x in tensors.items())
        if any(x.size for x in (tensors[t] for t in case.targets.values())):
            made = _planned(case.declaration, static(case), separate, over, layouts, schedule_of(case))
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
def _planned(fusion: Fusion, binding: Binding, separate, over, layouts, schedule) -> Plan:
    graph = over_operand(out_of_place(fusion.trace(binding), separate), over)
    return plan(graph, schedule, dict(layouts))


class Evaluate(Executor):
    """The graph, evaluated by numpy."""

    compiled = False

    def call(self, case: FuzzCase, tensors: Mapping[str, np.ndarray]) -> None:
        """Evaluate, then copy to the targets: none before all are known, as one may be an operand that another goes over."""
        from moekit.backends.array import evaluate

        results = evaluate(case.graph, {n: tensors[n] for n in case.shapes}, case.extents, "numpy")
        launches[self.name] += 1
        own = {name: np.array(x) for name, x in results.items()}
        for name, target in case.targets.items():
            tensors[target][...] = own[name]


class Torch(Executor):
    """A PyTorch implementation through its face; on a GPU an image is copied there and back once per batch."""

    def __init__(self, name: str, implementation: str, device: str):
        import torch

        super().__init__(name)
        self.torch, self.implementation, self.device = torch, implementation, device
        self.compiled = implementation == "triton"
        if self.compiled:
            _count_launches(name)

    def upload(self, image: np.ndarray) -> Any:
        """The image as a tensor of bytes on the device."""
        return self.torch.from_numpy(image.copy() if self.device == "cpu" else image).to(self.device)

    def tensor(self, memory: Any, slot: Slot) -> Any:
        """A view of exactly the slot's strides and offset."""
        key = memory.data_ptr()
        if key not in self.flat:
            self.flat = {key: {}}
        flat = self.flat[key]
        if slot.dtype not in flat:
            flat[slot.dtype] = memory.view(getattr(self.torch, slot.dtype))
        return self.torch.as_strided(flat[slot.dtype], slot.shape, slot.strides, slot.start)

    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Call the face as the case's mode says."""
        in_place = case.mode == "in place"
        given = None
        if case.mode != "plain":
            given = tuple(None if t == n and n in case.shapes else tensors[t] for n, t in case.targets.items())
            given = None if all(x is None for x in given) else given
        face = _face(case.declaration, in_place)
        got = face(*(tensors[n] for n in case.shapes), **case.params, implementation=self.implementation,
                   schedule=schedule_of(case), out=given)  # fmt: skip
        if not self.compiled:
            launches[self.name] += 1
        if case.mode == "plain":
            got = got if isinstance(got, tuple) else (got,)
            for result, target in zip(got, case.targets.values(), strict=True):
                tensors[target].copy_(result)

    def download(self, memory: Any) -> np.ndarray:
        """The bytes, back on the host."""
        self.forget()
        return memory.cpu().numpy()


class Interpreted(Torch):
    """The emitted Triton in Triton's own interpreter."""

    def __init__(self, name: str):
        super().__init__(name, "triton", "cpu")
        interpreted.mend()

    def call(self, case: FuzzCase, tensors: Mapping[str, Any]) -> None:
        """Call the face, with programs in the order that is wanted."""
        with interpreted.backwards(self.backwards):
            super().call(case, tensors)


@functools.lru_cache(maxsize=256)
def _face(fusion: Fusion, in_place: bool) -> Callable:
    from moekit.torch import op

    return op(fusion, in_place=in_place)


def _count_launches(name: str) -> None:
    """Count every kernel that moekit launches through Triton, by either way, in this process."""
    from moekit.torch import fast, launch

    straight, slow = fast._launch, launch._start
    if hasattr(straight, "counts"):
        return

    def quick(entry, pointers):
        launches[name] += len(entry.ready)
        straight(entry, pointers)

    def front(one, tensors):
        launches[name] += 1
        return slow(one, tensors)

    quick.counts = True
    fast._launch, launch._start = quick, front


def _jax(name: str) -> Executor:
    from moekit.testing.jax_batch import Jax

    return Jax(name)


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "interpret": lambda: Interpret("interpret"),
    "numpy": lambda: Evaluate("numpy"),
    "eager": lambda: Torch("eager", "eager", "cpu"),
    "triton": lambda: Torch("triton", "triton", "cuda"),
    "triton-interpreter": lambda: Interpreted("triton-interpreter"),
    "xla": lambda: _jax("xla"),
    "pallas": lambda: _jax("pallas"),
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
    import importlib.util
    import os

    need = {"eager": "torch", "triton": "torch", "triton-interpreter": "torch", "xla": "jax", "pallas": "jax"}.get(name)
    if need and importlib.util.find_spec(need) is None:
        return f"{need} is not installed; install moekit[{need}]"
    if name.startswith("triton") and importlib.util.find_spec("triton") is None:
        return "triton is not installed; install moekit[torch]"
    if name == "triton-interpreter" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton's interpreter needs TRITON_INTERPRET=1 in the environment"
    if name == "triton":
        from moekit.cli.platform import gpu_count

        return None if gpu_count() else "there is no NVIDIA GPU here; choose interpret, eager or pallas"
    return None
