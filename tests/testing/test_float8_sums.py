"""How a matrix unit adds up products of float8, bit for bit as an H200 does, and that the error bound has room for it."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from moekit.lang import In, contract, fusion
from moekit.testing.bounds import bounds
from moekit.testing.campaign import worst_seen
from moekit.testing.constants import DEFAULT, constant

FLOAT8 = ml_dtypes.float8_e4m3fn
MEASURED = Path(__file__).parent / "float8_sums.npz"  # codes of x and w, and what wgmma (m64n64k32) made of them on an H200
DEEP, BITS = 32, 13  # products of an instruction, and bits of each behind the largest one's exponent


@fusion(None, x=In("T D", dtype="float8_e4m3fn"), w=In("N D", dtype="float8_e4m3fn"))
def product(x, w):
    return {"out": contract(x, w, over="D")}


def unit(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x·wᵀ by instructions of 32 products, which keep 13 bits behind the largest exponent of all terms, and of their sum."""
    x, w, total = x.astype(np.float64), w.astype(np.float64), np.zeros((len(x), len(w)))

    def exponent(v):
        return np.where(v != 0, np.maximum(np.frexp(v)[1] - 1, -6), -500)

    for at in range(0, x.shape[1], DEEP):
        a, b = x[:, None, at : at + DEEP], w[None, :, at : at + DEEP]
        each = (exponent(a) + exponent(b)).max(-1)
        step = np.ldexp(1.0, np.maximum(each, np.where(total != 0, np.frexp(total)[1] - 1, -500)) - BITS)
        total = (np.trunc(a * b / step[..., None]).sum(-1) + np.trunc(total / step)) * step
        step = np.ldexp(1.0, np.where(total != 0, np.frexp(total)[1] - 1, 0) - BITS)
        total = np.trunc(total / step) * step
    return total


def drawn(kind: str, depth: int) -> list[np.ndarray]:
    """Codes of x and w: normal ones, of magnitudes far apart, or one large product among many that are cut off."""
    rng = np.random.default_rng(depth)
    found = rng.standard_normal((2, 24, depth))
    if kind == "far":
        found *= np.exp(rng.uniform(0, 8, found.shape))
    if kind == "cut off":
        found = np.broadcast_to(np.array([[[15.0 / 16]], [[15.0 / 16 * 2**-5]]]), found.shape).copy()
        found[:, :, ::DEEP] = 16.0
    return [np.clip(v, -448, 448).astype(FLOAT8) for v in found]


def test_the_model_is_what_the_gpu_does():
    with np.load(MEASURED) as kept:
        x, w, out = kept["x"].view(FLOAT8), kept["w"].view(FLOAT8), kept["out"]
    assert len(set(out.ravel())) > 100
    np.testing.assert_array_equal(unit(x, w), out)


@pytest.mark.parametrize("depth", [16, 32, 128, 512])
@pytest.mark.parametrize("kind", ["normal", "far", "cut off"])
def test_the_bound_has_room_for_it(kind, depth):
    """float32's own would not do."""
    x, w = drawn(kind, depth)
    bound = bounds(product, {"x": x, "w": w})["out"]
    error = np.abs(unit(x, w) - x.astype(np.float64) @ w.astype(np.float64).T)
    assert (error <= bound.error(DEFAULT)).all()
    if depth >= DEEP:
        wide = bounds(product_in_float32, {"x": x.astype(np.float32), "w": w.astype(np.float32)})["out"]
        assert (error > wide.error(DEFAULT)).any()


def test_the_worst_is_near_the_bound():
    """One large product, and terms after it of which much is cut off: what worst.json has of `quantised_experts`."""
    rows = np.full((2, 1, 128), 15.0 / 16)
    rows[1] *= 2.0**-5
    rows[:, 0, 0] = 16.0
    x, w = rows.astype(FLOAT8)
    bound = bounds(product, {"x": x, "w": w})["out"]
    ratio = float((np.abs(unit(x, w) - x.astype(np.float64) @ w.astype(np.float64).T) / bound.noise).max())
    assert ratio == pytest.approx(worst_seen()["quantised_experts"]["ratio"], abs=1e-3)
    assert ratio < constant("quantised_experts") == DEFAULT


@fusion(None, x=In("T D"), w=In("N D"))
def product_in_float32(x, w):
    return {"out": contract(x, w, over="D")}
