"""The edges of peers' kernels, with kernels made up here in their stead."""

import pytest
import torch

from bench import peer_edges
from moekit.testing import others


def test_a_verdict():
    """Right to a rounding, wrong by a row, not written, and NaN where NaN should be."""
    want = torch.arange(1.0, 13.0, dtype=torch.float64).view(3, 4)
    assert peer_edges.verdict(want.bfloat16(), want).startswith("ok")
    assert peer_edges.verdict(want.roll(1, 0), want).startswith("WRONG")
    assert peer_edges.verdict(want.where(want < 12, torch.nan), want).startswith("WRONG")
    assert peer_edges.verdict(want, want.where(want < 12, torch.nan)).startswith("ok")


def test_strides_ignored(monkeypatch):
    """A kernel that takes rows to lie one after the other is wrong on rows of 12, and right on whole ones."""

    def kernel(gate_up, out):
        gate, up = torch.as_strided(gate_up, gate_up.shape, (gate_up.shape[1], 1)).chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    monkeypatch.setattr(others, "sgl_silu_and_mul", kernel)
    wide = torch.randn(5, 12)
    assert peer_edges.silu("sgl_silu_and_mul", wide).startswith("ok")
    assert peer_edges.silu("sgl_silu_and_mul", wide[:, :8]).startswith("WRONG")


def test_ids_twice(monkeypatch):
    """Counted by rows, as are ids out of range."""

    def kernel(logits, weights, ids, renormalize):
        chosen, order = torch.softmax(logits, -1).sort(dim=-1, descending=True, stable=True)
        weights.copy_(chosen[:, :4] / chosen[:, :4].sum(-1, keepdim=True))
        ids.copy_(order[:, :4])
        ids[0, 1] = ids[0, 0]
        ids[1:3, 3] = logits.shape[1]

    monkeypatch.setattr(others, "sgl_topk_softmax", kernel)
    said = peer_edges.topk("sgl_topk_softmax", torch.randn(6, 16), 4)
    assert "weights ok" in said
    assert "of 6 rows 3 have other ids, 2 ids out of range, 1 an id twice" in said


def test_a_case_that_dies_is_said_to(monkeypatch):
    """By its exit code; the other cases go on."""
    monkeypatch.setattr(peer_edges, "__file__", "no_such_file.py")
    assert peer_edges.run_apart("x") == "died with exit code 2"


@pytest.mark.parametrize("name", [
    "sgl_topk_softmax rows_of_nan", "flashinfer_silu_and_mul I_12", "flashinfer_cuda_add_rms_norm rows_of_2049",
    "liger_add_rms_norm columns_apart", "fla_delta_rule_step softplus_a_-8.0_A_log_0.0",
])  # fmt: skip
def test_the_cases_that_docs_name(name):
    """They are there."""
    assert name in peer_edges.CASES
