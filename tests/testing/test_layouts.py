"""Tensors in guarded arenas: strides as asked for, guards that notice, the same memory in torch and in JAX."""

import numpy as np
import pytest

from moekit.fusions import FUSIONS
from moekit.lang.dtypes import FLOATS, numpy_dtype
from moekit.testing import KINDS, Call, as_torch, operands
from moekit.testing.batch import run_alone
from moekit.testing.executors import Evaluate, keep, to_numpy
from moekit.testing.guard import POISONS, Arena
from moekit.testing.layouts import READ_ONLY, VIEWS, lay

SHAPES = [(3, 5), (1, 1), (0, 4), (4, 0), (7,), (2, 3, 5), (2, 1, 3, 4), ()]
NEAR = [k for k in KINDS if k != "far"]


def numbers(shape, dtype="float32"):
    """Distinct values."""
    return (np.arange(np.prod(shape)).reshape(shape) + 1).astype(numpy_dtype(dtype))


def placed(x, kind):
    """An arena with one tensor, the tensor's slot, and the first image."""
    arena = Arena()
    slot = arena.add("x", x.shape, x.dtype.name, lay(kind, x.shape, x.itemsize), x)
    return arena, slot, arena.image(POISONS[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", NEAR)
def test_values_survive(kind, shape):
    """What is placed reads back, through numpy and through torch; strides agree."""
    for dtype in (*FLOATS, "int32"):
        x = numbers(shape, dtype)
        _, slot, image = placed(x, kind)
        tensor = as_torch(x, kind)
        if kind not in READ_ONLY:
            np.testing.assert_array_equal(slot.view(image), x)
            np.testing.assert_array_equal(to_numpy(tensor), x)
        assert slot.view(image).strides == tuple(s * x.itemsize for s in slot.strides) or not x.size
        assert tuple(tensor.stride()) == slot.strides
        assert tensor.storage_offset() == slot.start


@pytest.mark.parametrize("kind", [k for k in NEAR if k not in READ_ONLY])
def test_writes_inside_are_no_damage_and_writes_outside_are(kind):
    arena, slot, image = placed(numbers((3, 5), "bfloat16"), kind)
    after = image.copy()
    slot.view(after)[...] += 1
    assert arena.damage(image, after, [slot]) == []
    assert arena.damage(image, after, [])[0][0] is slot
    inside = {p + i for p in slot.places().ravel().tolist() for i in range(2)}
    outside = [p for p in range(slot.first, slot.last) if p not in inside]
    after[outside[len(outside) // 3]] ^= 7
    assert arena.damage(image, after, [slot]) == [(slot, 1)]


@pytest.mark.parametrize("kind", ["padded", "strided", "transposed padded", "apart", "arbitrary"])
def test_gaps_are_guarded(kind):
    """Memory between rows and columns is no part of the tensor."""
    arena, slot, image = placed(numbers((3, 5)), kind)
    places = set(slot.places().ravel().tolist())
    gap = next(p for p in range(min(places), max(places), 4) if p not in places)
    after = image.copy()
    after[gap] = 1
    assert arena.damage(image, after, [slot])


@pytest.mark.parametrize("dtype", FLOATS)
def test_outputs_start_as_poison(dtype):
    """An element nobody stores is NaN on the first image."""
    arena = Arena()
    slot = arena.add("out", (3, 4), dtype, lay("shifted", (3, 4), 2))
    assert np.isnan(slot.view(arena.image(POISONS[0])).astype(np.float32)).all()


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (1, 1), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("kind", VIEWS)
def test_views_hold_the_same_values(kind, shape):
    """A JAX View of the dense array reads as the tensor, and so do numpy's slices of it."""
    from moekit.testing.jax_executor import view_of

    for dtype in ("bfloat16", "int32"):
        x = numbers(shape, dtype)
        _, slot, image = placed(x, kind)
        base, layout = slot.whole(image), lay(kind, shape, x.itemsize)
        np.testing.assert_array_equal(np.asarray(view_of(base, layout, shape).array()), x)
        np.testing.assert_array_equal(layout.elements(base, shape), x)
        assert base.size == x.size or kind not in ("dense", "transposed") or not x.size


@pytest.mark.parametrize("result", [np.zeros((3, 4), np.float64), np.zeros((4, 3), np.float32)])
def test_a_result_of_another_shape_or_dtype_is_not_converted(result):
    with pytest.raises(TypeError, match="out is float"):
        keep(np.zeros((3, 4), np.float32), result, "out")


def test_a_kernel_that_writes_too_much_is_caught():
    """Writes outside an output, and to inputs."""
    fusion = FUSIONS["silu_and_mul"]
    call = Call(fusion, operands(fusion, {"T": 3, "I": 5}), layouts={"out": "padded"})

    class Wrong(Evaluate):
        def call(self, case, tensors):
            super().call(case, tensors)
            tensors["gate_up"][0, 0] = 9
            np.lib.stride_tricks.as_strided(tensors["out"], (3, 6), tensors["out"].strides)[0, 5] = 0

    assert not run_alone(Evaluate("right"), call).problems
    said = run_alone(Wrong("wrong"), call).problems
    assert "4 bytes of or around gate_up (dense) were written that must not be" in said[0]
    assert "4 bytes of or around out (padded) were written that must not be" in said[1]
