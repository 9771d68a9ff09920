"""`warmup`: every form of the fusions asked for is called, at the sizes asked for."""

from functools import partial

import pytest
import torch

import moekit.torch as mt
from moekit.errors import MoekitError
from moekit.fusions import FUSIONS
from moekit.torch import op, warm

SIZES = {"T": 2, "H": 32, "D": 32, "P": 24, "I": 16, "E": 16, "G": 1, "V": 2, "K": 1, "Dk": 8, "Dv": 8}


def test_every_form_of_every_fusion():
    warmed = mt.warmup(sizes=SIZES, dtype="float32", device="cpu")
    assert {(w.fusion, w.in_place) for w in warmed} == {
        (f, False)
        for f in (
            "row_product", "add_norm_gate_projections", "scaled_add_norm_gate_projections",
            "gate_gemm", "silu_and_mul", "topk_softmax", "shared_expert_combine", "add_rms_norm", "gated_rms_norm",
            "delta_rule_step", "delta_rule_chunks", "unit_lower_inverse",
            "gate_projections", "down_combine", "expert_gate_up", "expert_down",
            "attention_decode", "experts", "moe_align", "all_reduce_add_rms_norm", "causal_conv1d_step", "qkv_norm_rope",
            "gated_attention_decode", "expert_down_shared", "gate_topk",
            "conv_projections",
            "scaled_expert_gate_up",
            "scaled_expert_down", "scaled_experts", "scaled_product", "scaled_conv_projections",
            "scaled_gate_projections", "scaled_gate_topk", "scaled_down_combine", "scaled_expert_down_shared",
            "quantised", "quantised_experts",
        )
    } | {
        (f, True) for f in ("shared_expert_combine", "add_rms_norm", "all_reduce_add_rms_norm", "delta_rule_step",
                            "delta_rule_chunks", "down_combine", "causal_conv1d_step", "qkv_norm_rope", "conv_projections",
                            "scaled_conv_projections", "scaled_down_combine")
    }  # fmt: skip
    assert all(w.first > 0 < w.next for w in warmed)


def test_chosen_fusions_several_sizes_and_parameters():
    sizes = [{"T": 1, "E": 16}, {"T": 1, "E": 32}]
    warmed = mt.warmup(["topk_softmax", mt.silu_and_mul.fusion], sizes, params={"k": 3}, device="cpu")
    assert [(w.fusion, w.sizes) for w in warmed if w.fusion == "topk_softmax"] == [
        ("topk_softmax", (("T", 1), ("E", 16))),
        ("topk_softmax", (("T", 1), ("E", 32))),
    ]


def test_kernels_are_there_afterwards(emulated, monkeypatch):
    """What a warm-up compiles is what calls of any other T need."""
    serve = mt.add_rms_norm
    for tokens in (2, 1, 7, 64):
        serve(*(torch.zeros(tokens, 32) for _ in range(2)), torch.zeros(32), implementation="triton")
    assert len(emulated.compiled) == 1


@pytest.mark.parametrize("fusion", ["gate_gemm", "gate_projections", "down_combine", "silu_and_mul"])
def test_every_class_of_rows_is_there_afterwards(fusion, tensors, emulated, monkeypatch):
    """A GEMM has kernels by its number of rows: calls of any T compile nothing after a warm-up without one."""
    served = lambda f, in_place: partial(op(f, in_place), implementation="triton")  # noqa: E731
    monkeypatch.setattr(warm, "op", served)
    monkeypatch.setattr("moekit.compile.tile.interpret.execute", lambda *args: None)
    sizes = {"H": 24, "D": 64, "P": 24, "I": 16, "E": 16, "G": 1, "H?": 1}
    mt.warmup([fusion], sizes, device="cpu")
    compiled = set(emulated.compiled)
    assert compiled
    for tokens in (1, 2, 16, 17, 100, 127, 128, 300, 2047, 2048, 2500, 65535, 65536):
        axes = {a for spec in FUSIONS[fusion].tensors.values() for d in spec.dims for _, a in d.terms}
        here = {a: n for a, n in sizes.items() if a.removesuffix("?") in axes}
        served(FUSIONS[fusion], False)(*tensors(fusion, "bfloat16", sizes={**here, "T": tokens}))
    assert emulated.compiled == compiled


def test_a_router_is_compiled_for_many_rows_too(emulated, monkeypatch):
    """From 2048 programs of one warp on its launches do not overlap: another kernel to Triton."""
    rows = []
    monkeypatch.setattr(warm, "op", lambda f, in_place: lambda x, **_: rows.append(len(x)))
    mt.warmup(["topk_softmax"], {"E": 256}, params={"k": 8}, device="cpu")
    assert sorted(set(rows)) == [1, 2048]
    rows.clear()
    mt.warmup(["topk_softmax"], {"E": 32}, params={"k": 2}, device="cpu")  # several rows to a program
    assert len(set(rows)) == 2
    assert max(rows) > 2048


def test_rows_that_are_given_are_the_only_ones(emulated, monkeypatch):
    """A T of one's own: its class of rows alone is compiled."""
    monkeypatch.setattr(warm, "op", lambda f, in_place: partial(op(f, in_place), implementation="triton"))
    mt.warmup(["gate_gemm"], {"T": 3, "D": 32, "P": 24}, device="cpu")
    assert len(emulated.compiled) == 1


def test_unknown_fusion():
    with pytest.raises(MoekitError, match="there is no fusion 'rope'"):
        mt.warmup(["rope"])
