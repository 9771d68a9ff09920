"""The gate GEMM's weights packed once, and views of its output."""

import pytest
import torch

import moekit.torch as mt
from moekit.errors import ShapeError


def weights(inner=12, experts=10, width=1, hidden=16):
    return torch.randn(2 * inner, hidden), torch.randn(experts, hidden), torch.randn(width, hidden)


def test_parts_are_views_of_one_output():
    gate_up, router, shared = weights()
    packed = mt.pack_gate(gate_up, router, shared)
    x = torch.randn(5, 16)
    outs = mt.gate_gemm(x, packed)
    assert outs.fused.shape == (5, 40)
    for got, weight in zip(outs[1:], (gate_up, router, shared), strict=True):
        torch.testing.assert_close(got, x @ weight.T)
        assert got.untyped_storage().data_ptr() == outs.fused.untyped_storage().data_ptr()
        assert got.stride() == (40, 1)


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_padding_is_in_no_part(poison):
    """The padding is +0; were it anything else, no part and nothing computed from one would show it."""
    gate_up, router, shared = weights()
    packed = mt.pack_gate(gate_up, router, shared)
    used = 2 * 12 + 10 + 1
    assert packed.weight.shape[0] == 40
    assert (packed.weight[used:] == 0).all()
    assert not packed.weight[used:].signbit().any()
    x = torch.randn(5, 16)
    clean = mt.gate_gemm(x, packed)
    packed.weight[used:] = poison
    dirty = mt.gate_gemm(x, packed)
    assert not dirty.fused[:, used:].isfinite().any()
    for a, b in zip(clean[1:], dirty[1:], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(mt.topk_softmax(dirty.router_logits, 4)[1], mt.topk_softmax(clean.router_logits, 4)[1])


def test_output_into_a_buffer_and_a_plain_weight():
    gate_up, router, shared = weights()
    packed = mt.pack_gate(gate_up, router, shared, multiple=1)
    x, buffer = torch.randn(3, 16), torch.zeros(3, 64)
    outs = mt.gate_gemm(x, packed, out=buffer[:, 16:51])
    assert outs.fused.data_ptr() == buffer[:, 16:].data_ptr()
    torch.testing.assert_close(mt.gate_gemm(x, packed.weight), outs.fused)
    assert not buffer[:, :16].any()
    assert not buffer[:, 51:].any()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"router": torch.randn(10, 15)}, "router has 15 inputs, gate_up has 16; they must match"),
        ({"router": torch.zeros(10, 16, dtype=torch.int8)}, "router is int8; only unquantised .* can be packed$"),
        ({"gate_up": torch.zeros(24, 16).to(torch.float8_e4m3fn)}, "gate_up is float8_e4m3fn; .*; scaled_gate_projections"),
        ({"shared_gate": torch.randn(16)}, r"shared_gate has shape \[16\]; it must be \[outputs, hidden\]"),
        ({"multiple": 0}, "multiple = 0; it must be at least 1"),
    ],
)
def test_refusals(changed, message):
    given = dict(zip(("gate_up", "router", "shared_gate"), weights(), strict=True)) | changed
    with pytest.raises(ShapeError, match=message):
        mt.pack_gate(**given)
