"""Random declarations: 3 to 12 operations on two to four operands, valid by construction, the same for the same seed.

They fuzz the compiler rather than a fusion. From number `WIDER` on there are more operations, ids among the operands, tensors
that are updated and outputs stored in another order of axes; a smaller number stays the declaration that recorded cases mean.
The reference is the float64 evaluation that also gives the error bound, which shares nothing with array evaluation, the
lowering or the emitters. Comparisons are made between operands and integers
only: between computed values a last bit would decide.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np

from moekit import lang as ml
from moekit.errors import MoekitError
from moekit.lang import Fusion, In, InOut, Out, Value
from moekit.lang.dtypes import FLOATS
from moekit.lang.spec import Spec
from moekit.testing.bounds import bounds

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
        return (_Body if seed < WIDER else _Wider)(seed, operands).outputs()

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
        self.raw = list(operands.values())
        self.values = [ml.f32(x) for x in self.raw]

    @property
    def steps(self) -> tuple[Callable[[_Body], Value | None], ...]:
        """The operations that are chosen from, often ones more than once."""
        return STEPS

    def pick(self, values: list) -> Value:
        """One of the values, later ones more often."""
        return values[max(int(self.rng.integers(len(values))), int(self.rng.integers(len(values))))]

    def outputs(self) -> dict[str, Value]:
        """The outputs, of which one at least varies over the tokens."""
        for _ in range(int(self.rng.integers(3, 13))):
            step = self.steps[int(self.rng.integers(len(self.steps)))]
            try:
                made = step(self)
            except MoekitError:
                continue  # an operation that does not fit these values; the next may
            if made is not None:
                self.values.append(made)
        out = self.values[-1]
        if "T" not in out.axes:
            out = out + self.values[0]
        found = {"out": self.rounded(out)}
        if self.rng.integers(3) == 0:
            second = self.pick(self.values)
            found["second"] = second if second.axes else second + self.values[0]
        return found

    def rounded(self, x: Value) -> Value:
        """`x` in a random float dtype."""
        return ml.cast(x, FLOATS[int(self.rng.integers(len(FLOATS)))])

    def axis(self, x: Value) -> str | None:
        """A static axis that `x` varies over."""
        axes = [a for a in STATIC_AXES if a in x.axes]
        return axes[int(self.rng.integers(len(axes)))] if axes else None


class _Wider(_Body):
    """One trace of a random declaration with more operations; `state`, where there is one, is updated."""

    def __init__(self, seed: int, operands: dict[str, Value]):
        self.ids, self.state = operands["ids"], operands.get("state")
        super().__init__(seed, {n: x for n, x in operands.items() if n.startswith("x")})

    @property
    def steps(self) -> tuple[Callable[[_Body], Value | None], ...]:
        return (*STEPS, *MORE)

    def outputs(self) -> dict[str, Value]:
        """The outputs of any declaration, and what becomes of the state."""
        found = super().outputs()
        if self.state is None:
            return found
        inner = [v for v in self.values if set(v.axes) <= set(self.state.axes)]
        return found | {"state": self.state * 0.5 + self.pick(inner), "was": ml.sum(self.state, over="A")}


def _unary(b: _Body) -> Value:
    x = b.pick(b.values)
    tame: list[Callable[[Value], Value]] = [
        lambda v: ml.exp(-abs(v)),
        abs,
        lambda v: -v,
        ml.sigmoid,
        lambda v: ml.sqrt(abs(v)),
        lambda v: ml.rsqrt(abs(v) + 1.0),
        lambda v: ml.log(abs(v) + 1.0),
        ml.softplus,
        ml.silu,
        lambda v: v * 0.5 + 1.0,
    ]
    return tame[int(b.rng.integers(len(tame)))](x)


def _binary(b: _Body) -> Value:
    x, y = b.pick(b.values), b.pick(b.values)
    kinds: list[Callable[[Value, Value], Value]] = [
        lambda u, v: u + v,
        lambda u, v: u - v,
        lambda u, v: u * v,
        ml.maximum,
        ml.minimum,
        lambda u, v: u / (abs(v) + 1.0),
    ]
    return kinds[int(b.rng.integers(len(kinds)))](x, y)


def _reduce(b: _Body) -> Value | None:
    x = b.pick(b.values)
    if (axis := b.axis(x)) is None:
        return None
    kinds = [ml.sum, ml.max, ml.min, ml.mean]
    return kinds[int(b.rng.integers(len(kinds)))](x, over=axis)


def _contract(b: _Body) -> Value | None:
    x, y = b.pick(b.values), b.pick(b.values)
    shared = [a for a in STATIC_AXES if a in x.axes and a in y.axes]
    return ml.contract(x, y, over=shared[int(b.rng.integers(len(shared)))]) if shared else None


def _cumsum(b: _Body) -> Value | None:
    x = b.pick(b.values)
    axis = b.axis(x)
    return ml.cumsum(x, over=axis) if axis else None


def _cast(b: _Body) -> Value:
    return ml.f32(b.rounded(b.pick(b.values)))


def _where(b: _Body) -> Value:
    x, y, left = b.pick(b.values), b.pick(b.values), b.raw[int(b.rng.integers(len(b.raw)))]
    if b.rng.integers(2):
        return ml.where(left > 0.5, x, y)
    axis = STATIC_AXES[int(b.rng.integers(2))]
    return ml.where(ml.iota(axis) % 3 == 1, x, y)


def _softmax(b: _Body) -> Value | None:
    x = b.pick(b.values)
    axis = b.axis(x)
    return ml.softmax(x, over=axis) if axis else None


def _gather(b: _Body) -> Value | None:
    table = b.raw[int(b.rng.integers(len(b.raw)))]
    if "A" not in table.axes:
        return None
    return ml.f32(ml.gather(table, ml.iota("A") * 2 % ml.size("A"), over="A"))


STEPS: tuple[Callable[[_Body], Value | None], ...] = (
    _unary, _unary, _binary, _binary, _binary, _reduce, _reduce, _contract, _cumsum, _cast, _where, _softmax, _gather,
)  # fmt: skip


def _residual(b: _Body) -> Value:
    """What a rounding takes away, of an operand as it is or of a computed value."""
    x = b.pick(b.values)
    return x - ml.f32(b.rounded(x))


def _chosen(b: _Body) -> Value | None:
    """Rows chosen by ids among the operands, some of them out of range."""
    assert isinstance(b, _Wider)
    table = b.raw[int(b.rng.integers(len(b.raw)))]
    return ml.f32(ml.gather(table, b.ids - 1, over="A")) if "A" in table.axes else None


def _slice(b: _Body) -> Value | None:
    """The sum or the largest of every second element from the second on, or of all but the first and last."""
    x, into = b.pick(b.values), f"S{len(b.values)}"
    if (axis := b.axis(x)) is None:
        return None
    n, step = ml.size(axis), int(b.rng.integers(1, 3))
    part = ml.slice(x, axis, 1, (n - 1) // 2 if step == 2 else n - 2, into, step=step)
    return (ml.sum if b.rng.integers(2) else ml.max)(part, over=into)


def _top(b: _Body) -> Value | None:
    """The best of an operand, each times its place, or the places where they were."""
    x, into = b.raw[int(b.rng.integers(len(b.raw)))], f"K{len(b.values)}"
    if (axis := b.axis(x)) is None:
        return None
    best, ids = ml.top_k(x, 3, over=axis, into=into)
    return ml.sum(ml.f32(best if b.rng.integers(2) else ids) * ml.f32(ml.iota(into) + 1), over=into)


MORE: tuple[Callable[[_Body], Value | None], ...] = (_residual, _residual, _chosen, _slice, _slice, _top)
