"""The bench of a patched model's logits: what it holds fixed is fixed."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from bench.patched_accuracy import SMALL, error, measure, other, run
from bench.patched_model import build


@pytest.fixture(scope="module")
def model():
    return build(4, "cpu", **SMALL | {"hidden_size": 64, "num_experts": 16})


def test_the_same_experts_are_taken(model):
    """And where they are a router's own, nothing changes."""
    ids = torch.arange(12).reshape(2, 6)
    logits, chosen = run(model, ids)
    again, _ = run(model, ids, chosen)
    assert error(again, logits) < 1e-2  # their weights are made in another way
    assert not any(r._forward_hooks for r in model.modules())
    turned = [(c + 1) % 16 for c in chosen]
    assert error(run(model, ids, turned)[0], logits) > 1e-2
    assert other(turned, chosen) > 0 == other([c.flip(-1) for c in chosen], chosen)


def test_rows_of_both_sides(model):
    """Against itself in float32, with its own experts and with float32's; the model is the patched one afterwards."""
    exact = copy.deepcopy(model).float()
    exact.set_experts_implementation("eager")
    original, patched = measure(model, exact, 2)
    assert [original["way"], patched["way"]] == ["original", "patched"]
    for row in (original, patched):
        assert 0 < row["same experts"] < 0.05
        assert row["same experts"] <= row["error"] * 1.5
    assert original["apart"] == patched["apart"] > 0
