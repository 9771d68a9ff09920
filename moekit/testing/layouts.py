"""Tensors of any strides inside a guarded arena: what lies outside their elements must stay as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from moekit.compile.tile import Strided
from moekit.compile.tile.interpret import poison

MARGIN = 64  # elements of canary before and after; a multiple of 16 bytes for every dtype
CANARY = 0xA5


@dataclass(frozen=True)
class Placed:
    """An array of some strides inside `arena`, a one-dimensional array that is canary everywhere else.

    `strides` and `offset` count elements, as torch.as_strided has them. `array` is the tensor, a view of the
    arena.
    """

    array: np.ndarray
    arena: np.ndarray
    strides: tuple[int, ...]
    offset: int
    before: np.ndarray = field(repr=False)

    def mask(self) -> np.ndarray:
        """Which elements of the arena belong to the tensor."""
        inside = np.zeros(self.arena.size, bool)
        _strided(inside, self.array.shape, self.strides, self.offset)[...] = True
        return inside

    def touched(self) -> int:
        """How many bytes outside the tensor are not what they were."""
        outside = np.repeat(~self.mask(), self.arena.itemsize)
        return int(np.count_nonzero(_bytes(self.arena)[outside] != _bytes(self.before)[outside]))

    def changed(self) -> bool:
        """Whether any byte is not what it was: an input that was written."""
        return not np.array_equal(_bytes(self.arena), _bytes(self.before))


def _bytes(arena: np.ndarray) -> np.ndarray:
    return arena.view(np.uint8)


def _strided(arena: np.ndarray, shape: Sequence[int], strides: Sequence[int], offset: int) -> np.ndarray:
    steps = tuple(s * arena.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(arena[offset:], tuple(shape), steps)


def dense(shape: Sequence[int], order: Sequence[int] | None = None, inner: int = 1, pad: int = 0) -> tuple[int, ...]:
    """Strides of an array stored in `order` (outermost first), `inner` apart, with `pad` spare elements per
    row.
    """
    strides, step = [0] * len(shape), inner
    for place, axis in enumerate(reversed(order or range(len(shape)))):
        strides[axis] = step
        step = step * max(1, shape[axis]) + (pad if place == 0 else 0)
    return tuple(strides)


def _backwards(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(reversed(range(len(shape))))


def _row_broadcast(shape: Sequence[int]) -> tuple[int, ...]:
    return (0, *dense(shape[1:])) if len(shape) > 1 else dense(shape)


def _column_broadcast(shape: Sequence[int]) -> tuple[int, ...]:
    return (*dense(shape[:-1]), 0)


# name -> (strides for a shape, storage offset beyond the margin); all in elements
LAYOUTS: dict[str, tuple[Callable[[Sequence[int]], tuple[int, ...]], int]] = {
    "contiguous": (dense, 0),
    "offset": (dense, 3),
    "row_padded": (lambda shape: dense(shape, pad=5), 0),
    "row_aligned": (lambda shape: dense(shape, pad=-shape[-1] % 16 + 16), 0),
    "every_second": (lambda shape: dense(shape, inner=2), 1),
    "every_third": (lambda shape: dense(shape, inner=3), 2),
    "transposed": (lambda shape: dense(shape, _backwards(shape)), 0),
    "transposed_padded": (lambda shape: dense(shape, _backwards(shape), pad=3), 1),
    "rows_apart": (lambda shape: tuple(s * 7 if i == 0 else s for i, s in enumerate(dense(shape))), 0),
    "same_row": (_row_broadcast, 0),
    "same_column": (_column_broadcast, 0),
}
INPUT_ONLY = frozenset({"same_row", "same_column"})  # several elements are one: nothing may be written there
WRITABLE = tuple(name for name in LAYOUTS if name not in INPUT_ONLY)


def place(values: np.ndarray, layout: str = "contiguous") -> Placed:
    """`values` in a guarded arena, laid out as `LAYOUTS[layout]` says; stride 0 keeps one of the values."""
    strides, extra = LAYOUTS[layout][0](values.shape) if values.ndim else (), LAYOUTS[layout][1]
    return place_strided(values, strides, MARGIN + extra)


def place_strided(values: np.ndarray, strides: tuple[int, ...], offset: int = MARGIN) -> Placed:
    """`values` in a guarded arena at the given strides and offset, in elements."""
    span = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True)) if values.size else 0
    arena = np.empty(offset + span + MARGIN, values.dtype)
    _bytes(arena)[...] = CANARY
    array = _strided(arena, values.shape, strides, offset)
    if values.size:
        array[...] = values
    return Placed(array, arena, strides, offset, arena.copy())


def place_empty(shape: tuple[int, ...], dtype: str, layout: str = "contiguous") -> Placed:
    """A tensor to be written: NaN, or the most negative integers, where nothing has been stored yet."""
    return place(poison(shape, dtype), layout)


def tile_layout(placed: Placed) -> Strided:
    """What the compiler is told of such a tensor: a class for each stride, and whether offsets may pass 2³¹ -
    1.
    """
    size = placed.array.itemsize

    def kind(stride: int) -> str:
        return "unit" if stride == 1 else "aligned" if stride * size % 16 == 0 else "any"

    reach = sum((n - 1) * s for n, s in zip(placed.array.shape, placed.strides, strict=True) if n)
    return Strided(tuple(kind(s) for s in placed.strides), wide=reach > 2**31 - 1)


def as_torch(placed: Placed, device: str = "cpu"):
    """A torch tensor with exactly these strides and offset, over the same memory (a copy of the arena on a
    GPU).

    bfloat16 goes through an int16 view, as torch.from_numpy does not know it.
    """
    import torch

    narrow = placed.arena.dtype.name == "bfloat16"
    arena = torch.from_numpy(placed.arena.view(np.int16) if narrow else placed.arena)
    arena = arena.view(torch.bfloat16) if narrow else arena
    return torch.as_strided(arena.to(device), placed.array.shape, placed.strides, placed.offset)


def fetch(placed: Placed, tensor) -> None:
    """Bring the storage of a tensor that `as_torch` made back into the arena, gaps and canaries included."""
    import torch

    whole = torch.as_strided(tensor.detach(), (placed.arena.size,), (1,), 0).cpu()
    narrow = placed.arena.dtype.name == "bfloat16"
    _bytes(placed.arena)[...] = _bytes((whole.view(torch.int16) if narrow else whole).numpy())


def to_numpy(tensor) -> np.ndarray:
    """A torch tensor's values as a numpy array of the same dtype, strides kept where it is on the CPU."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_view(values: np.ndarray, layout: str = "contiguous"):
    """`values` as a `moekit.jax.View` of a canary-filled base, laid out as far as a View can say it.

    Stride 0 has no View: such an operand is the whole of an array. So is a single element without axes.
    """
    import jax.numpy as jnp

    from moekit.jax import view

    shape = values.shape
    if not shape:
        return view(jnp.asarray(values))
    whole = tuple(slice(0, n) for n in shape)
    base_shape, index, flip = {
        "offset": ((*shape[:-1], shape[-1] + 3), (*whole[:-1], slice(3, None)), False),
        "row_padded": ((*shape[:-1], shape[-1] + 5), whole, False),
        "row_aligned": ((*shape[:-1], shape[-1] + -shape[-1] % 16 + 16), whole, False),
        "every_second": ((*shape[:-1], 2 * shape[-1] + 1), (*whole[:-1], slice(1, None, 2)), False),
        "every_third": ((*shape[:-1], 3 * shape[-1] + 2), (*whole[:-1], slice(2, None, 3)), False),
        "transposed": (shape[::-1], whole[::-1], True),
        "transposed_padded": ((*shape[:0:-1], shape[0] + 4), (*whole[:0:-1], slice(1, 1 + shape[0])), True),
        "rows_apart": ((7 * shape[0] + 1, *shape[1:]), (slice(0, 7 * shape[0], 7), *whole[1:]), False),
    }.get(layout, (shape, whole, False))
    base = np.empty(base_shape, values.dtype)
    base.view(np.uint8)[...] = CANARY
    base[index] = values.transpose() if flip else values
    found = view(jnp.asarray(base))[index]
    return found.T if flip else found
