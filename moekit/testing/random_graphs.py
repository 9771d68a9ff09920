"""Random declarations: 3 to 12 operations on two to four operands, valid by construction, the same for the same seed.

They fuzz the compiler rather than a fusion. From number `WIDER` on there are more operations, ids among the operands, tensors
that are updated and outputs stored in another order of axes; a smaller number stays the declaration that recorded cases mean.
The reference is the float64 evaluation that also gives the error bound, which shares nothing with array evaluation, the
lowering or the emitters. Comparisons are made between operands and integers
only: between computed values a last bit would decide.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from moekit import lang as ml
from moekit.errors import MoekitError
from moekit.lang import Fusion, In, InOut, Out, Value
from moekit.lang.dtypes import FLOATS
from moekit.lang.spec import Spec
from moekit.testing.bounds import bounds

T = TypeVar("T")
SHAPES = ("T A", "T A B", "T B", "A", "B", "A B", "T")
STATIC_AXES = ("A", "B")
WIDER = 1000


def random_fusion(seed: int) -> Fusion:
    """The declaration number `seed`; outputs are `out` and, for every third, `second`."""
    rng = np.random.default_rng(seed)
    shapes = ["T A", *(SHAPES[int(i)] for i in rng.integers(0, len(SHAPES), int(rng.integers(1, 3)))), "T A B"]
    specs: dict[str, Spec] = {f"x{i}": In(s) for i, s in enumerate(shapes)}
    if seed >= WIDER:
        specs["ids"] = In("T", dtype="int32")
        specs |= {"state": InOut("T A", dtype="float32")} if rng.integers(3) == 0 else {}

    def declared(**operands):
        return _Body(seed, operands).outputs()

    def reference(**arrays):
        """The float64 evaluation of the traced graph, rounded to the outputs' dtypes where those are integers."""
        found = {}
        for name, bound in bounds(made, arrays).items():
            value = np.asarray(bound.value)
            found[name] = value.astype(np.int32) if value.dtype.kind in "iu" else value
        return found

    declared.__name__ = f"random_{seed}"
    declared.__doc__ = f"Random declaration {seed}."
    declared.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in specs])
    made = Fusion(declared, reference, specs, ("T",))
    if seed >= WIDER and rng.integers(2):
        made = Fusion(declared, reference, specs | _turned(made), ("T",))
    return made


def _turned(fusion: Fusion) -> dict[str, Spec]:
    """The outputs of a declaration, each with its axes the other way round."""
    sizes = {"T": 5, "A": 7, "B": 6}
    shapes = {n: tuple(d.size(sizes) for d in s.dims) for n, s in fusion.tensors.items()}
    dtypes = {n: s.dtypes[0] for n, s in fusion.tensors.items()}
    graph = fusion.trace(fusion.bind(shapes, dtypes, {}))
    return {n: Out(" ".join(d.text for d in reversed(t.dims))) for n, t in graph.tensors.items() if t.role == "Out"}


class _Body:
    """One trace of a random declaration."""

    def __init__(self, seed: int, operands: dict[str, Value]):
        self.rng = np.random.default_rng([seed, 1])
        self.raw = [x for n, x in operands.items() if n.startswith("x")]
        self.values = [ml.f32(x) for x in self.raw]
        self.ids, self.state = operands.get("ids"), operands.get("state")
        self.steps = STEPS if self.ids is None else (*STEPS, *MORE)

    def any(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def pick(self, values: list[Value] | None = None) -> Value:
        """One of the values so far, or of those given, later ones more often."""
        values = self.values if values is None else values
        return values[max(int(self.rng.integers(len(values))), int(self.rng.integers(len(values))))]

    def outputs(self) -> dict[str, Value]:
        """The outputs, of which one at least varies over the tokens, and what becomes of the state, if there is one."""
        for _ in range(int(self.rng.integers(3, 13))):
            step = self.any(self.steps)
            with contextlib.suppress(MoekitError):  # an operation that does not fit these values; the next may
                self.values.append(step(self))
        out = self.values[-1]
        found = {"out": self.rounded(out if "T" in out.axes else out + self.values[0])}
        if self.rng.integers(3) == 0:
            second = self.pick()
            found["second"] = second if second.axes else second + self.values[0]
        if (state := self.state) is not None:
            inner = [v for v in self.values if set(v.axes) <= set(state.axes)]
            found |= {"state": state * 0.5 + self.pick(inner), "was": ml.sum(state, over="A")}
        return found

    def rounded(self, x: Value) -> Value:
        """`x` in a random float dtype."""
        return ml.cast(x, self.any(FLOATS))

    def axis(self, *values: Value) -> str:
        """A static axis that all of these vary over; raises MoekitError where there is none."""
        axes = [a for a in STATIC_AXES if all(a in x.axes for x in values)]
        if not axes:
            raise MoekitError("no static axis")
        return self.any(axes)


Step = Callable[[_Body], Value]
TAME: tuple[Callable[[Value], Value], ...] = (
    lambda v: ml.exp(-abs(v)), abs, lambda v: -v, ml.sigmoid, lambda v: ml.sqrt(abs(v)), lambda v: ml.rsqrt(abs(v) + 1.0),
    lambda v: ml.log(abs(v) + 1.0), ml.softplus, ml.silu, lambda v: v * 0.5 + 1.0,
)  # fmt: skip
OF_TWO: tuple[Callable[[Value, Value], Value], ...] = (
    lambda u, v: u + v, lambda u, v: u - v, lambda u, v: u * v, ml.maximum, ml.minimum, lambda u, v: u / (abs(v) + 1.0),
)  # fmt: skip


def _unary(b: _Body) -> Value:
    x = b.pick()
    return b.any(TAME)(x)


def _binary(b: _Body) -> Value:
    x, y = b.pick(), b.pick()
    return b.any(OF_TWO)(x, y)


def _reduce(b: _Body) -> Value:
    x = b.pick()
    axis = b.axis(x)
    return b.any((ml.sum, ml.max, ml.min, ml.mean))(x, over=axis)


def _contract(b: _Body) -> Value:
    x, y = b.pick(), b.pick()
    return ml.contract(x, y, over=b.axis(x, y))


def _cumsum(b: _Body) -> Value:
    x = b.pick()
    return ml.cumsum(x, over=b.axis(x))


def _cast(b: _Body) -> Value:
    return ml.f32(b.rounded(b.pick()))


def _where(b: _Body) -> Value:
    x, y, left = b.pick(), b.pick(), b.any(b.raw)
    if b.rng.integers(2):
        return ml.where(left > 0.5, x, y)
    return ml.where(ml.iota(b.any(STATIC_AXES)) % 3 == 1, x, y)


def _softmax(b: _Body) -> Value:
    x = b.pick()
    return ml.softmax(x, over=b.axis(x))


def _table(b: _Body) -> Value:
    """An operand with rows along A; raises MoekitError for any other."""
    table = b.any(b.raw)
    if "A" not in table.axes:
        raise MoekitError("no rows along A")
    return table


def _gather(b: _Body) -> Value:
    return ml.f32(ml.gather(_table(b), ml.iota("A") * 2 % ml.size("A"), over="A"))


def _residual(b: _Body) -> Value:
    """What a rounding takes away, of an operand as it is or of a computed value."""
    x = b.pick()
    return x - ml.f32(b.rounded(x))


def _chosen(b: _Body) -> Value:
    """Rows chosen by ids among the operands, some of them out of range."""
    assert b.ids is not None
    return ml.f32(ml.gather(_table(b), b.ids - 1, over="A"))


def _wave(b: _Body) -> Value:
    return b.any((ml.sin, ml.cos))(b.pick() * b.any((1.0, 3.0, 1e4)))


def _slice(b: _Body) -> Value:
    """The sum or the largest of every second element from the second on, or of all but the first and last."""
    x, into = b.pick(), f"S{len(b.values)}"
    axis = b.axis(x)
    n, step = ml.size(axis), int(b.rng.integers(1, 3))
    part = ml.slice(x, axis, 1, (n - 1) // 2 if step == 2 else n - 2, into, step=step)
    return (ml.sum if b.rng.integers(2) else ml.max)(part, over=into)


def _blocks(b: _Body) -> Value:
    """What there is in each block, the last of which may reach past the end, each weighed by its place."""
    x, block, element = b.pick(), f"B{len(b.values)}", f"E{len(b.values)}"
    parts = ml.blocks(x, b.axis(x), b.any((2, 3, 4)), into=f"{block} {element}")
    each = (ml.sum if b.rng.integers(2) else ml.max)(parts, over=element)
    return ml.sum(each * ml.f32(ml.iota(block) % 3 + 1), over=block)


def _concat(b: _Body) -> Value:
    """A sum over values one after the other, each element weighed by its place."""
    x, y, into = b.pick(), b.pick(), f"C{len(b.values)}"
    first, second, rest = b.axis(x), b.axis(y), f"P{into}"
    if b.rng.integers(2):
        joined = ml.concat(x, y, over=f"{first} {second}", into=into)
    else:
        late = ml.slice(y, second, 1, ml.size(second) - 1, rest)
        joined = ml.concat(x, 0.5, late, over=f"{first} 1 {rest}", into=into)
    return ml.sum(joined * ml.f32(ml.iota(into) % 5 - 2), over=into)


def _top(b: _Body) -> Value:
    """The best of an operand, each times its place, or the places where they were."""
    x, into = b.any(b.raw), f"K{len(b.values)}"
    best, ids = ml.top_k(x, 3, over=b.axis(x), into=into)
    return ml.sum(ml.f32(best if b.rng.integers(2) else ids) * ml.f32(ml.iota(into) + 1), over=into)


STEPS: tuple[Step, ...] = (
    _unary, _unary, _binary, _binary, _binary, _reduce, _reduce, _contract, _cumsum, _cast, _where, _softmax, _gather,
)  # fmt: skip
MORE: tuple[Step, ...] = (_residual, _residual, _chosen, _wave, _slice, _slice, _concat, _top, _blocks)
