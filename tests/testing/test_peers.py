"""Adapters of others' kernels, with kernels made up here in their stead: right ones pass, wrong ones are found."""

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from moekit.cli.app import cli
from moekit.errors import UnavailableError
from moekit.fusions import FUSIONS
from moekit.testing import others
from moekit.testing.case import FuzzCase, Layout
from moekit.testing.executors import executor
from moekit.testing.peers import PEERS, _in_place_norm, _returning, _topk, _writing, vectors
from moekit.testing.tasks import Task, run_task


def campaign(monkeypatch, name: str, call, combos: int = 6):
    """The adapter of peer `name` with `call` as its kernel, on a few hundred cases: counted cases and failures."""
    fake = f"fake {name} {id(call)}"
    monkeypatch.setitem(PEERS, fake, replace(PEERS[name], call=call, load=lambda: None))
    counted, failures = 0, []
    for combo in range(combos):
        report = run_task(Task(PEERS[name].fusion, fake, 5, combo, 0, groups=3, layouts=4))
        counted += report.coverage.counted
        failures += report.failures
    return counted, failures


def norm(x, residual, weight, eps, offset):
    """What FlashInfer documents, in float32."""
    total = x.float() + residual.float()
    scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    residual.copy_(total.to(residual.dtype))
    x.copy_((total * scale * (weight.float() + offset)).to(x.dtype))


def norm_without_strides(x, residual, weight, eps, offset):
    """Takes rows to lie one after the other."""
    flat = [torch.as_strided(t, t.shape, (t.shape[1], 1)) for t in (x, residual)]
    norm(*flat, weight, eps, offset)


def norm_late(x, residual, weight, eps, offset):
    """Forms 1 + weight in the weight's dtype, which loses small weights."""
    norm(x, residual, weight + offset, eps, 0.0)


def test_an_in_place_norm(monkeypatch):
    """The right one passes on every layout that is asked for."""
    counted, failures = campaign(monkeypatch, "flashinfer-add-norm", _in_place_norm(norm), 12)
    assert counted > 50
    assert not failures


@pytest.mark.parametrize("kernel", [norm_without_strides, norm_late])
def test_a_wrong_in_place_norm_is_found(monkeypatch, kernel):
    """A row stride ignored, and 1 + weight in bfloat16: both happened to others."""
    _, failures = campaign(monkeypatch, "flashinfer-add-norm", _in_place_norm(kernel), 12)
    assert failures


def rounded_silu(gate_up):
    """What Liger computes."""
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate.float()).to(up.dtype) * up


def test_a_peer_is_held_to_its_own_rounding(monkeypatch):
    """Liger rounds silu before the product: that passes for it, and not rounding does not."""
    counted, failures = campaign(monkeypatch, "liger-silu", _returning(rounded_silu), 10)
    assert counted > 50
    assert not failures

    def unrounded(gate_up):
        gate, up = gate_up.float().chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)

    assert campaign(monkeypatch, "liger-silu", _returning(unrounded), 10)[1]


def test_a_kernel_that_writes_its_output(monkeypatch):
    """One that leaves the last row alone is found: outputs are poisoned."""

    def silu(gate_up, out):
        gate, up = gate_up.float().chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    counted, failures = campaign(monkeypatch, "flashinfer-silu", _writing(silu), 16)
    assert counted > 20
    assert not failures
    assert campaign(monkeypatch, "flashinfer-silu", _writing(lambda x, out: silu(x[:-1], out[:-1])), 16)[1]


def test_a_router(monkeypatch):
    """Ties go to the lower id; torch.topk, whose order among ties is its own, is found."""

    def stable(logits, weights, ids, renormalize):
        order = torch.sort(logits, dim=-1, descending=True, stable=True)[1][:, : ids.shape[1]]
        chosen = torch.softmax(logits.float(), -1).gather(1, order)
        weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
        ids.copy_(order)

    def unstable(logits, weights, ids, renormalize):
        chosen, order = torch.softmax(logits.float(), -1).topk(ids.shape[1], -1)
        weights.copy_(chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen)
        ids.copy_(order)

    counted, failures = campaign(monkeypatch, "sgl-topk", _topk(stable), 12)
    assert counted > 20
    assert not failures
    assert campaign(monkeypatch, "sgl-topk", _topk(unstable), 12)[1]


def test_only_rows_that_begin_where_a_vector_may_are_asked_for():
    """`vectors` looks at every tensor's strides and offset: 8 numbers of 16 bits, or as many as divide the row."""
    case = FuzzCase("silu_and_mul", {"T": 3, "I": 16}, {"gate_up": "bfloat16"}, {})
    assert vectors(case)
    padded = replace(Layout.dense(2), kind="padded", pads=(0, 1))
    assert not vectors(replace(case, layouts={"gate_up": padded}))
    assert vectors(replace(case, layouts={"gate_up": replace(padded, pads=(0, 8))}))
    assert not vectors(replace(case, layouts={"gate_up": replace(Layout.dense(2), shift=1)}))
    assert not vectors(replace(case, layouts={"gate_up": replace(Layout.dense(2), steps=(1, 2))}))
    assert vectors(replace(case, sizes={"T": 3, "I": 9}))


@pytest.mark.parametrize("name", [n for n in PEERS if n != "compiled-eager"])
def test_a_peer_that_is_not_installed(name):
    """Says so in one sentence, and the command ends with 3."""
    try:
        PEERS[name].load()
    except UnavailableError:
        pass
    else:
        pytest.skip(f"{name} is installed here")
    with pytest.raises(UnavailableError, match=f"{name}: "):
        executor(name)
    ended = CliRunner().invoke(cli, ["fuzz", PEERS[name].fusion, "--impl", name, "--examples", "1"])
    assert ended.exit_code == 3, ended.output


def test_every_adapter_is_for_a_fusion():
    """The table names fusions that exist; an empty name is for all of them."""
    assert {p.fusion for p in PEERS.values()} <= {"", *FUSIONS}
    assert not others.installed("no_such_package_at_all")
