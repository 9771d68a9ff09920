"""Operands of every fusion, small and random, and the devices that a test's kernels run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
import pytest

from moekit.fusions import FUSIONS
from moekit.jax import op
from moekit.lang.arguments import example

SIZES = {"T": 4, "H": 16, "D": 16, "P": 24, "I": 8, "E": 8, "V": 4, "K": 2, "Dk": 8, "Dv": 8, "G": 1, "H?": 1,
         "M": 2, "Cq": 4, "Ck": 4, "Cv": 4}  # fmt: skip
PARAMS = {"k": 3, "experts": 8}
SCALE = {"delta_rule_chunks": 0.3}  # of its operands, which are multiplied by each other from chunk to chunk
CPU_AND_GPU = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@dataclass(frozen=True)
class Call:
    """One call of a fusion: its operands in float64 (ids in int32) and the operands of its derivatives, by place."""

    name: str
    arrays: tuple[np.ndarray, ...]
    params: dict

    @property
    def moving(self) -> tuple[int, ...]:
        """The places of the operands that have derivatives."""
        return tuple(i for i, a in enumerate(self.arrays) if a.dtype == np.float64)

    @property
    def floats(self) -> tuple[np.ndarray, ...]:
        """Those operands."""
        return tuple(self.arrays[i] for i in self.moving)

    def placed(self, floats) -> list:
        """All operands, some of them given."""
        given = dict(zip(self.moving, floats, strict=True))
        return [given.get(i, a) for i, a in enumerate(self.arrays)]

    def whole(self, implementation: str | None) -> Callable[..., dict]:
        """From all operands to the outputs with derivatives by name."""
        face = op(FUSIONS[self.name])

        def run(*arrays):
            outs = face(*arrays, **self.params, implementation=implementation)
            outs = outs if isinstance(outs, tuple) else (outs,)
            return {n: o for n, o in zip(self.outputs, outs, strict=True) if o.dtype != np.int32}

        return run

    def face(self, implementation: str) -> Callable[..., dict]:
        """From the operands that have derivatives, in float32, to the same."""
        return lambda *floats: self.whole(implementation)(*self.placed(floats))

    @property
    def outputs(self) -> list[str]:
        """The names of the outputs, in order."""
        fusion = FUSIONS[self.name]
        shapes = {n: a.shape for n, a in zip(fusion.tensors, self.arrays, strict=True)}
        dtypes = {n: "int32" if a.dtype == np.int32 else "float32" for n, a in zip(fusion.tensors, self.arrays, strict=True)}
        graph = fusion.trace(fusion.bind(shapes, dtypes, fusion.bind_params(self.params)))
        return [w.tensor for w in graph.writes]

    def reference(self, floats) -> dict[str, np.ndarray]:
        """The declaration's own reference in float64, nothing rounded; outputs with derivatives."""
        fusion = FUSIONS[self.name]
        arrays = dict(zip(fusion.tensors, self.placed(floats), strict=True))
        assert fusion.reference is not None
        outs = fusion.reference(**arrays, **fusion.bind_params(self.params))
        return {n: o for n, o in outs.items() if o.dtype == np.float64}


def call_of(name: str, seed: int = 0) -> Call:
    """A random call of a fusion."""
    fusion, rng = FUSIONS[name], np.random.default_rng(seed)
    axes = {axis for spec in fusion.tensors.values() for d in spec.dims for _, axis in d.terms} - set(fusion.axes)
    optional = {f"{d.text}?" for spec in fusion.tensors.values() for d in spec.dims if d.optional}
    params = {n: x for n, x in PARAMS.items() if n in fusion.params}
    binding = example(fusion, {a: SIZES.get(a, 8) for a in axes | optional}, params=params)
    sizes, ones = dict(binding.sizes), dict(binding.ones)
    shapes = {n: tuple(1 if i in ones[n] else d.size(sizes) for i, d in enumerate(s.dims)) for n, s in fusion.tensors.items()}
    arrays = tuple(
        SCALE.get(name, 1.0) * rng.standard_normal(shapes[n])
        if "float32" in s.dtypes
        else rng.integers(0, 2, shapes[n]).astype(np.int32)
        for n, s in fusion.tensors.items()
    )
    return Call(name, arrays, params)


ROUNDED = ("quantised", "quantised_experts")  # to float8, which has no derivative


@pytest.fixture(params=list(FUSIONS))
def call(request: pytest.FixtureRequest) -> Call:
    """A call of each fusion."""
    return call_of(request.param)


@pytest.fixture
def smooth(call: Call) -> None:
    """The fusion of this test has an operand with derivatives."""
    if call.name in ROUNDED or not call.moving:
        pytest.skip(f"{call.name} has no operand with derivatives")


@pytest.fixture
def call_named() -> Callable[[str], Call]:
    """From a fusion's name to a call of it."""
    return call_of


@pytest.fixture(params=CPU_AND_GPU)
def platform(request: pytest.FixtureRequest):
    """Where kernels run: interpreted on the CPU, and compiled on a GPU."""
    with jax.default_device(jax.devices(request.param)[0]):
        yield request.param
