"""Tensors in guarded arenas: strides as asked for, guards that notice, the same memory in torch."""

import ml_dtypes
import numpy as np
import pytest
import torch

from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS, numpy_dtype
from moekit.testing import LAYOUTS, RUNNERS, Call, as_torch, as_view, fetch, operands, place, place_empty
from moekit.testing.layouts import INPUT_ONLY, WRITABLE, tile_layout, to_numpy

SHAPES = [(3, 5), (1, 1), (0, 4), (4, 0), (7,), (2, 3, 5), (2, 1, 3, 4)]


def numbers(shape, dtype="float32"):
    """Distinct values."""
    return (np.arange(np.prod(shape)).reshape(shape) + 1).astype(numpy_dtype(dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_survive(layout, shape):
    """What is placed reads back, through numpy and through torch; strides agree."""
    for dtype in (*FLOATS, "int32"):
        x = numbers(shape, dtype)
        placed = place(x, layout)
        if layout in WRITABLE:
            np.testing.assert_array_equal(placed.array, x)
            assert int(placed.mask().sum()) == x.size
        assert placed.array.strides == tuple(s * x.itemsize for s in placed.strides) or not x.size
        tensor = as_torch(placed)
        assert tuple(tensor.stride()) == placed.strides
        assert tensor.storage_offset() == placed.offset
        np.testing.assert_array_equal(to_numpy(tensor), placed.array)
        assert placed.touched() == 0
        assert not placed.changed()


@pytest.mark.parametrize("layout", WRITABLE)
def test_writes_through_torch_are_seen_and_guards_notice(layout):
    """Inside, the array changes and the guards are quiet; one element outside, they are not."""
    placed = place(numbers((3, 5), "bfloat16"), layout)
    tensor = as_torch(placed)
    tensor += 1
    assert placed.changed()
    assert placed.touched() == 0
    np.testing.assert_array_equal(placed.array.astype(np.float32), numbers((3, 5)) + 1)
    outside = int(np.flatnonzero(~placed.mask())[len(placed.arena) // 3])
    placed.arena[outside] = 7
    assert 1 <= placed.touched() <= 2


@pytest.mark.parametrize("layout", ["row_padded", "every_second", "transposed_padded", "rows_apart"])
def test_gaps_are_guarded(layout):
    """Memory between rows and columns is no part of the tensor."""
    placed = place(numbers((3, 5)), layout)
    inside = np.flatnonzero(placed.mask())
    gaps = [i for i in range(inside[0], inside[-1]) if not placed.mask()[i]]
    assert gaps
    placed.arena[gaps[0]] = 1
    assert placed.touched() > 0


def test_copies_come_back():
    """What was done to a copy of the arena is brought back whole."""
    placed = place(numbers((3, 5), "bfloat16"), "every_second")
    copy = as_torch(placed).clone(memory_format=torch.preserve_format)
    assert copy.storage_offset() == 0
    moved = torch.as_strided(
        torch.from_numpy(placed.arena.view(np.int16)).clone().view(torch.bfloat16), (3, 5), placed.strides, placed.offset
    )
    moved *= 2
    fetch(placed, moved)
    np.testing.assert_array_equal(placed.array.astype(np.float32), numbers((3, 5)) * 2)
    assert placed.touched() == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_outputs_start_as_poison(dtype):
    """An element nobody stores stays NaN."""
    assert np.isnan(place_empty((3, 4), dtype, "offset").array.astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_hold_the_same_values(layout, shape):
    """A jax View of a larger base reads as the array."""
    for dtype in ("bfloat16", "int32"):
        x = numbers(shape, dtype)
        found = as_view(x, layout)
        np.testing.assert_array_equal(np.asarray(found.array()), x)
        if layout not in ("contiguous", *INPUT_ONLY) and x.size > 1:
            assert found.base.shape != x.shape or layout == "transposed"


def test_stride_classes():
    """1, a multiple of 16 bytes, anything else; and whether 32 bits are enough."""
    assert tile_layout(place(np.ones((3, 8), np.float32))).strides == ("aligned", "unit")
    assert tile_layout(place(np.ones((3, 8), ml_dtypes.bfloat16), "every_third")).strides == ("aligned", "any")
    assert tile_layout(place(np.ones((3, 5), np.float32), "same_column")).strides[1] == "aligned"
    assert not tile_layout(place(np.ones((3, 5), np.float32))).wide


def test_a_kernel_that_writes_too_much_is_caught():
    """The runners report writes outside an output, and to inputs."""
    fusion = FUSIONS["silu_and_mul"]
    call = Call(fusion, operands(fusion, {"T": 3, "I": 5}), layouts={"out": "row_padded"})
    assert RUNNERS["interpret"](call).problems == ()
    from moekit.testing import runners

    _, outs = runners._memory(call)
    outs["out"].arena[: runners.place(np.ones(1)).offset] = 0
    assert "bytes outside out (row_padded) were written" in runners._guarded(call, outs, {"out"})[0]
    inputs, _ = runners._memory(call)
    inputs["gate_up"].array[0, 0] = 9
    assert "gate_up was written, but it is an input" in runners._guarded(call, inputs, {"out"})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_without_axes_has_every_layout(layout):
    value = np.asarray(2.5, "float32")
    assert place(value, layout).array == value
    assert np.asarray(as_view(value, layout).array()) == value
