"""`View`: a strided part of a JAX array that enters a kernel without a copy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from moekit.errors import DtypeError, MoekitError, ShapeError


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class View:
    """Elements `start + step·i` along some axes of `base`, in any order of axes; other axes stay at one element.

    `axes[d]`, `starts[d]`, `steps[d]`, `shape[d]` describe dimension d; `fixed` pairs the remaining base axes with their
    element, or (`picked`) at one that an integer array of no dimensions says at run time, taken into range. Made by
    `view(base)` and indexing: `view(fused)[:, 128:640]`, `[::2]`, `.T`, `view(states)[layer]`. XLA copies a slice that feeds a
    kernel; a View is indexed inside it. It is a pytree whose leaves are `base` and what picks. Raises ShapeError for what is
    no part of the base.
    """

    base: jax.Array
    axes: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    shape: tuple[int, ...]
    fixed: tuple[tuple[int, int], ...] = ()
    picked: tuple[tuple[int, jax.Array], ...] = ()

    def __post_init__(self):
        for name in ("axes", "starts", "steps", "shape"):
            object.__setattr__(self, name, tuple(_integer(n, name) for n in getattr(self, name)))
        object.__setattr__(self, "fixed", tuple((_integer(a, "fixed"), _integer(n, "fixed")) for a, n in self.fixed))
        if why := self._misfit(tuple(self.base.shape)):
            raise ShapeError(f"View: {why}")

    def _misfit(self, extents: tuple[int, ...]) -> str | None:
        """Why this is no part of a base of these extents; None if it is one."""
        if not len(self.axes) == len(self.starts) == len(self.steps) == len(self.shape):
            return "axes, starts, steps and shape have different lengths; each needs an entry for every dimension"
        others = tuple(a for a, _ in (*self.fixed, *self.picked))
        if sorted((*self.axes, *others)) != list(range(len(extents))):
            return f"axes {self.axes}, fixed and picked {others} must name every axis of a base of shape {list(extents)} once"
        for d, (axis, start, step, n) in enumerate(zip(self.axes, self.starts, self.steps, self.shape, strict=True)):
            if start < 0 or start > extents[axis]:
                return f"start {start} in dimension {d} lies outside base axis {axis}, which has {extents[axis]} elements"
            if step < 1 or n < 0:
                wrong, least = (f"step {step}", 1) if step < 1 else (f"size {n}", 0)
                return f"{wrong} in dimension {d}; it must be at least {least}"
            if n and start + step * (n - 1) >= extents[axis]:
                last = start + step * (n - 1)
                return f"dimension {d} (start {start}, step {step}, size {n}) reaches element {last} of base axis {axis}, " \
                       f"which has {extents[axis]}"  # fmt: skip
        if empty := [a for a, _ in self.picked if not extents[a]]:
            return f"base axis {empty[0]} has no element to pick"
        if wrong := [at for _, at in self.picked if not _picks(at)]:
            return f"{wrong[0]!r} picks an element; it must be a JAX array of one integer without dimensions"
        wrong = [(a, n) for a, n in self.fixed if not 0 <= n < extents[a]]
        return (
            f"fixed takes element {wrong[0][1]} of base axis {wrong[0][0]}, which has {extents[wrong[0][0]]}" if wrong else None
        )

    @property
    def dtype(self):
        """The base's dtype."""
        return self.base.dtype

    @property
    def ndim(self) -> int:
        """How many dimensions the view has."""
        return len(self.axes)

    @property
    def size(self) -> int:
        """How many elements the view has."""
        total = 1
        for n in self.shape:
            total *= n
        return total

    @property
    def T(self) -> View:
        """The view with its dimensions reversed."""
        return self.transpose(*reversed(range(self.ndim)))

    def transpose(self, *order: int) -> View:
        """The view with its dimensions in another order."""
        if sorted(order) != list(range(self.ndim)):
            raise ShapeError(f"View.transpose: {order} is no order of {self.ndim} dimensions")
        pick = lambda items: tuple(items[d] for d in order)  # noqa: E731
        return replace(
            self, axes=pick(self.axes), starts=pick(self.starts), steps=pick(self.steps), shape=pick(self.shape)
        )  # fmt: skip

    def __getitem__(self, index) -> View:
        index = index if isinstance(index, tuple) else (index,)
        if any(i is Ellipsis for i in index):
            at = next(n for n, i in enumerate(index) if i is Ellipsis)
            index = (*index[:at], *[slice(None)] * (self.ndim - len(index) + 1), *index[at + 1 :])
        if len(index) > self.ndim:
            raise ShapeError(f"View: {len(index)} indices for {self.ndim} dimensions")
        index = (*index, *[slice(None)] * (self.ndim - len(index)))
        kept, fixed, picked = [], list(self.fixed), list(self.picked)
        for d, i in enumerate(index):
            if isinstance(i, slice):
                start, stop, step = i.indices(self.shape[d])
                if step < 1:
                    raise ShapeError(f"View: step {step} in dimension {d}; steps must be positive")
                size = len(range(start, stop, step))
                kept.append((self.axes[d], self.starts[d] + start * self.steps[d], self.steps[d] * step, size))
            elif _is_integer(i) and -self.shape[d] <= i < self.shape[d]:
                fixed.append((self.axes[d], self.starts[d] + (int(i) % self.shape[d]) * self.steps[d]))
            elif _picks(i) and self.shape[d]:
                whole = (self.starts[d], self.steps[d], self.shape[d]) == (0, 1, self.base.shape[self.axes[d]])
                at = i if whole else self.starts[d] + in_range(i, self.shape[d]) * self.steps[d]
                picked.append((self.axes[d], at))
            else:
                raise ShapeError(
                    f"View: index {i!r} in dimension {d} of size {self.shape[d]}; use integers in range, slices, and JAX "
                    "arrays of one integer without dimensions"
                )
        axes, starts, steps, shape = zip(*kept, strict=True) if kept else ((), (), (), ())
        return View(self.base, axes, starts, steps, shape, tuple(fixed), tuple(picked))

    def array(self) -> jax.Array:
        """The view's elements as an array of their own: a slice, which XLA may fuse or copy."""
        order = [sorted(self.axes).index(a) for a in self.axes]
        return jnp.transpose(self._plane()[self._index()], order)

    def set(self, value: jax.Array) -> jax.Array:
        """The base with the view's elements replaced by `value`."""
        order = sorted(range(self.ndim), key=lambda d: self.axes[d])
        changed = self._plane().at[self._index()].set(jnp.transpose(value, order))
        if not self.picked:
            return changed
        begin = [jnp.int32(0)] * self.base.ndim
        for axis, at in self.picked:
            begin[axis] = in_range(at, self.base.shape[axis])
        return lax.dynamic_update_slice(self.base, changed, begin)

    def _plane(self) -> jax.Array:
        """The base, with one element left along the axes that are picked."""
        plane = self.base
        for axis, at in self.picked:
            plane = lax.dynamic_index_in_dim(plane, in_range(at, self.base.shape[axis]), axis)
        return plane

    def _index(self) -> tuple[int | slice, ...]:
        """What `array` and `set` index that with."""
        fixed = dict(self.fixed) | {axis: 0 for axis, _ in self.picked}
        return tuple(fixed[a] if a in fixed else self._slice(self.axes.index(a)) for a in range(self.base.ndim))

    def _slice(self, d: int) -> slice:
        n = self.shape[d]
        return slice(
            self.starts[d],
            self.starts[d] + self.steps[d] * (n - 1) + 1 if n else self.starts[d],
            self.steps[d],
        )

    def same_elements(self, other: View) -> bool:
        """Whether two views of one base are the same elements in the same places."""
        mine = (self.axes, self.starts, self.steps, self.shape, sorted(self.fixed))
        picked = {axis: id(at) for axis, at in self.picked} == {axis: id(at) for axis, at in other.picked}
        return picked and mine == (other.axes, other.starts, other.steps, other.shape, sorted(other.fixed))

    def overlaps(self, other: View) -> bool:
        """Whether two views of one base share an element: decided by elements, not by ranges; what is picked may be any."""
        if 0 in self.shape or 0 in other.shape:
            return False
        return all(_meet(self._progression(a), other._progression(a)) for a in range(self.base.ndim))

    def _progression(self, axis: int) -> tuple[int, int, int]:
        for fixed, at in self.fixed:
            if fixed == axis:
                return at, 1, 1
        if axis not in self.axes:
            return 0, 1, self.base.shape[axis]
        d = self.axes.index(axis)
        return self.starts[d], self.steps[d], self.shape[d]

    def tree_flatten(self):
        """The base and what picks as leaves."""
        axes = tuple(axis for axis, _ in self.picked)
        return (self.base, *(at for _, at in self.picked)), (self.axes, self.starts, self.steps, self.shape, self.fixed, axes)

    @classmethod
    def tree_unflatten(cls, aux, children) -> View:
        """The view around a new base, which may be anything: JAX builds trees of what is no array, too."""
        made, (*aux, axes), (base, *at) = object.__new__(cls), aux, children
        values = (base, *aux, tuple(zip(axes, at, strict=True)))
        for name, value in zip(("base", "axes", "starts", "steps", "shape", "fixed", "picked"), values, strict=True):
            object.__setattr__(made, name, value)
        return made


def in_range(at: jax.Array, extent: int) -> jax.Array:
    """An integer of any dtype as an int32 from 0 to extent - 1, the nearest; clipped before it is made narrower or wider."""
    return jnp.clip(at, 0, min(extent - 1, jnp.iinfo(at.dtype).max)).astype(jnp.int32)


def _picks(i: object) -> bool:
    """Whether an index is an element that is known at run time."""
    return isinstance(i, jax.Array) and i.ndim == 0 and jnp.issubdtype(i.dtype, jnp.integer)


def _is_integer(n: object) -> bool:
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def _integer(n: object, where: str) -> int:
    if not _is_integer(n):
        raise ShapeError(f"View: {where} has {n!r}; it must be an integer")
    return int(n)  # type: ignore[call-overload]


def _meet(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether two progressions (start, step, count) have a common term."""
    low, high = max(a[0], b[0]), min(a[0] + a[1] * (a[2] - 1), b[0] + b[1] * (b[2] - 1))
    if low > high or (a[0] - b[0]) % gcd(a[1], b[1]):
        return False
    short, long = sorted((a, b), key=lambda p: p[2])
    terms = range(long[0], long[0] + long[1] * long[2], long[1])
    return any(short[0] + short[1] * i in terms for i in range(short[2]))


def view(base) -> View:
    """All of an array, ready to be indexed: `view(fused)[:, 128:640]`. A View is returned as it is.

    Raises MoekitError for what is no array, and DtypeError as `held` does.
    """
    if isinstance(base, View):
        return base
    if isinstance(base, np.ndarray | jax.Array):
        base = held(base, "view: the base")
    if not (hasattr(base, "ndim") and hasattr(base, "at")):
        raise MoekitError(f"view: the base is {type(base).__name__}; it must be a JAX array")
    n = base.ndim
    return View(base, tuple(range(n)), (0,) * n, (1,) * n, tuple(base.shape))


def held(x, named: str) -> jax.Array:
    """A numpy or JAX array as JAX holds it now: without jax_enable_x64, int64 as int32 and float64 as float32.

    Raises DtypeError where a value is lost by that or cannot be looked at, being traced, and for what is no array of numbers;
    `named` begins the sentence.
    """
    if not jnp.issubdtype(x.dtype, jnp.number) and x.dtype != bool:
        raise DtypeError(f"{named} is {x.dtype}; it must be an array of numbers")
    dtype = jax.dtypes.canonicalize_dtype(x.dtype)
    if dtype == x.dtype:
        return jnp.asarray(x)
    if isinstance(x, Tracer) or not _fits(np.asarray(x), dtype):
        raise DtypeError(f"{named} is {x.dtype}, which JAX makes {dtype} without jax_enable_x64, and its values are not known "
                         f"to fit that; enable it, or pass {dtype}")  # fmt: skip
    return jnp.asarray(np.asarray(x).astype(dtype))


def _fits(wide: np.ndarray, dtype: np.dtype) -> bool:
    """Whether integers stay what they are in a narrower dtype, and finite floats finite."""
    with np.errstate(all="ignore"):
        narrow = wide.astype(dtype)
    same = narrow == wide if wide.dtype.kind in "iu" else np.isfinite(narrow) == np.isfinite(wide)
    return bool(same.all())
